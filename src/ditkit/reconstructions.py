"""What a trained autoencoder is for: images through its latents, and the file that makes it a codec."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from jaxtyping import Float, UInt8
from safetensors.torch import save
from torch import Tensor

from .codecs import Pixels, examples, trained
from .config import DitkitError, registered_as
from .data import Dataset, Split, evenly
from .models import Autoencoder
from .recipe import Recipe

__all__ = ["Reconstructions"]


class Reconstructions:
    """A trained autoencoder, where a run of a diffusion model has its pipeline."""

    def __init__(self, recipe: Recipe, model: Autoencoder, origin: str = "memory"):
        """origin: where the weights come from, for protocols. Raises DitkitError for a codec that is not pixels."""
        if not isinstance(recipe.codec, Pixels):
            name = registered_as(recipe.codec)[1]
            raise DitkitError(f"an autoencoder is trained on pixels, not on what the codec {name} makes of them")
        self.recipe, self.model, self.origin = recipe, model.eval(), origin

    @property
    def classes(self) -> tuple[str, ...]:
        """Of the data; the network knows none."""
        return self.recipe.conditioner.classes

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def sample(self, *args: Any, **settings: Any) -> NoReturn:
        """Raises DitkitError: there is nothing to draw."""
        raise DitkitError(
            "an autoencoder draws no samples: ditkit evaluate RUN shows what it makes of held-out images, and "
            "ditkit train RECIPE --codec trained_autoencoder:RUN trains a model of its latents"
        )

    stream = sample

    @torch.no_grad()
    def encode(self, data: UInt8[Tensor, "b c h w"]) -> tuple[Float[Tensor, "b k h w"], Float[Tensor, "b k h w"]]:
        """Mean and log-variance of the latents of images."""
        return self.model.encode(self.recipe.codec.encode(data.to(self.device)))

    @torch.no_grad()
    def decode(self, z: Float[Tensor, "b k h w"]) -> UInt8[Tensor, "b c h w"]:
        """Images of latents, on the CPU."""
        return self.recipe.codec.decode(self.model.decode(z)).cpu()

    @torch.no_grad()
    def linear(self, data: UInt8[Tensor, "b c h w"]) -> UInt8[Tensor, "b c h w"]:
        """Images through as many principal components of their patches, which the autoencoder began as."""
        x = self.recipe.codec.encode(data.to(self.device))
        return self.recipe.codec.decode(self.model.components.unproject(self.model.components.project(x))).cpu()

    def rehearse(self) -> None:
        """Nothing is drawn, so nothing can go wrong that the loss has not met."""

    def sheet(self, data: Dataset) -> tuple[UInt8[Tensor, "n c h w"], int]:
        """Ten held-out images above their reconstructions, four times, and the images in a row."""
        split = data.heldout if len(data.heldout) else data.train
        count, rows = min(40, len(split)), []
        shown = split.batch(evenly(split, count)).data
        for part in shown.split(10):
            rows += [part, self.decode(self.encode(part)[0])]
        # a last row that is short would mix originals and reconstructions
        return torch.cat(rows[: 2 * max(1, count // 10)]), min(10, count)

    def statistics(self, split: Split) -> tuple[Float[Tensor, "k"], Float[Tensor, "k"]]:
        """Mean and standard deviation of each channel of the latents' means over a split, in float64.

        A channel that is the same everywhere has the standard deviation 1.
        """
        count, total, squares = 0, torch.zeros(()), torch.zeros(())
        for part in examples(split):
            rows = self.encode(part)[0].double().movedim(1, 3).flatten(0, 2).cpu()
            count, total, squares = count + len(rows), total + rows.sum(0), squares + rows.square().sum(0)
        mean = total / count
        variance = (squares / count - mean.square()).clamp(min=0)
        return mean, torch.where(variance > 1e-10, variance.sqrt(), 1.0)

    def files(self, data: Dataset) -> dict[str, bytes]:
        """What is written beside a checkpoint, by name: the weights as the codec trained_autoencoder reads them."""
        mean, std = self.statistics(data.train)
        tensors = trained.state(self.model, mean.float(), std.float())
        # one entry: several have no order of their own, and the file would differ from time to time
        about = {"about": f"{self.origin}, trained on {data.source}"}
        return {trained.FILE: save({name: value.cpu().contiguous() for name, value in tensors.items()}, about)}
