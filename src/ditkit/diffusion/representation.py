"""REPA: "Representation Alignment for Generation", Yu et al. 2024, arXiv 2410.06940.

The hidden states of a block early in the network, through a small MLP, are to point where the features of a frozen
encoder of clean images point. The MLP is needed in training only.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ..conditioning import Conditioning
from ..config import DitkitError, register
from ..rng import Draw, Rng
from .denoiser import Denoiser, Prediction
from .objective import Loss, Objective, Regression
from .path import Time

__all__ = ["REPA"]


@register("objective", "repa")
@dataclass(frozen=True)
class REPA:
    """Another objective, plus `weight` times the mean of -cos(projector(hidden state), feature) over the tokens.

    The projector is D -> hidden -> hidden -> width of the features, with SiLU between. Features are resampled to the
    grid of the model's tokens (antialiased bilinear) where their own is another one.
    """

    base: Any = Regression()
    """The objective that it is added to."""
    encoder: Any = None
    """What sees the clean images; it must be chosen: transformers (DINOv2-B in the paper), efficientnet."""
    depth: int = 8
    """The tap is behind so many blocks."""
    hidden: int = 2048
    weight: float = 0.5

    def __post_init__(self) -> None:
        if self.depth < 1 or self.hidden < 1 or not self.weight > 0:
            raise DitkitError(
                "objective.depth and objective.hidden must be at least 1 and objective.weight above 0, not "
                f"{self.depth}, {self.hidden} and {self.weight}"
            )

    def check(self, denoiser: Denoiser) -> None:
        """Reads no weights. Raises DitkitError without an encoder, or for a network without such a block."""
        self.base.check(denoiser)
        if self.encoder is None:
            raise DitkitError("REPA needs an encoder: set objective.encoder to transformers or efficientnet")
        blocks = getattr(getattr(denoiser.model, "config", None), "depth", 0)
        if self.depth > blocks:
            raise DitkitError(f"objective.depth is {self.depth}, and the model has {blocks} blocks")

    def learn(self, denoiser: Denoiser, rng: Rng) -> Objective:
        """With the projector. Raises DitkitError if the encoder cannot be had."""
        return _Aligned(replace(self, base=self.base.learn(denoiser, rng)), denoiser, rng)

    def loss(self, denoiser: Denoiser, x0: Tensor, cond: Conditioning, rng: Draw, data: Tensor | None = None) -> Loss:
        raise DitkitError("REPA learns a projector: take the loss of objective.learn(denoiser, rng)")


class _Tapped(Denoiser):
    """A denoiser that remembers what came out of one block of its network."""

    def __init__(self, denoiser: Denoiser, site: str):
        self.__dict__.update(denoiser.__dict__)
        self.site = site
        self.seen: Tensor | None = None

    def __call__(self, x: Tensor, t: Time, cond: Conditioning, *, edit: Any = None) -> Prediction:
        def tap(site: str, block: nn.Module, h: Any, *args: Any) -> Any:
            out = block(h, *args) if edit is None else edit(site, block, h, *args)
            if site == self.site:
                self.seen = out
            return out

        return super().__call__(x, t, cond, edit=tap)


class _Aligned(nn.Module):
    """REPA with its projector."""

    def __init__(self, repa: REPA, denoiser: Denoiser, rng: Rng):
        super().__init__()
        self.repa = repa
        if isinstance(repa.base, nn.Module):
            self.base = repa.base  # so that its parameters are learned, too
        width = denoiser.model.config.hidden_size  # type: ignore[attr-defined]
        sizes = (width, repa.hidden, repa.hidden, repa.encoder.width)
        layers: list[nn.Module] = []
        for i, (inputs, outputs) in enumerate(pairwise(sizes)):
            linear: Any = nn.utils.skip_init(nn.Linear, inputs, outputs)
            nn.init.xavier_uniform_(linear.weight, generator=rng.generator(f"repa.{i}"))
            nn.init.zeros_(linear.bias)
            layers += [linear, nn.SiLU()]
        self.projector = nn.Sequential(*layers[:-1])

    def check(self, denoiser: Denoiser) -> None:
        self.repa.check(denoiser)

    def learn(self, denoiser: Denoiser, rng: Rng) -> Objective:
        return self

    def loss(self, denoiser: Denoiser, x0: Tensor, cond: Conditioning, rng: Draw, data: Tensor | None = None) -> Loss:
        """Adds the term "repa". Raises DitkitError without images, and where the tap has other tokens than theirs."""
        if data is None:
            raise DitkitError(
                "REPA looks at the images before the codec, and prepared data has none: train on the data itself "
                "(in Python: loss(..., data=images))"
            )
        tapped = _Tapped(denoiser, f"blocks.{self.repa.depth - 1}")
        loss = self.repa.base.loss(tapped, x0, cond, rng, data)
        patch = getattr(denoiser.model.config, "patch_size", 1)  # type: ignore[attr-defined]
        grid = (x0.shape[-2] // patch, x0.shape[-1] // patch)
        hidden = tapped.seen
        if hidden is None or hidden.shape[1] != grid[0] * grid[1]:
            found = "nothing" if hidden is None else f"{hidden.shape[1]} tokens"
            raise DitkitError(
                f"behind block {self.repa.depth} there are {found}, and the image has {grid[0]} x {grid[1]} patches: "
                "set objective.depth to a block that sees the image's tokens alone"
            )
        with torch.no_grad():
            wanted = resampled(self.repa.encoder(data), grid)
        cosine = F.cosine_similarity(self.projector(hidden).float(), wanted.float(), dim=-1)
        return replace(loss, terms={**loss.terms, "repa": -self.repa.weight * cosine.mean(1)})


def resampled(features: Float[Tensor, "b z h w"], grid: tuple[int, int]) -> Float[Tensor, "b n z"]:
    """Features at the places of a grid of patches, row by row."""
    if features.shape[2:] != grid:
        features = F.interpolate(features, size=grid, mode="bilinear", antialias=True)
    return features.flatten(2).transpose(1, 2)
