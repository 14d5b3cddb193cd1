"""Latents of an autoencoder that was trained with `ditkit train autoencoder`."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from jaxtyping import Float, UInt8
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ..config import DitkitError, from_json, learned, register, to_json
from ..models import Autoencoder, AutoencoderConfig
from ..rng import Draw
from .codec import Samples, draw
from .pixels import Pixels

__all__ = ["FILE", "TrainedAutoencoder", "state"]

FILE = "autoencoder.safetensors"
"""What a run of an autoencoder has beside its newest checkpoint."""
_PIXELS = Pixels()


def state(model: Autoencoder, mean: Float[Tensor, "k"], std: Float[Tensor, "k"]) -> dict[str, Tensor]:
    """An autoencoder, what it is, and the statistics of its latents by channel, as tensors by name."""
    weights = {f"model.{name}": value.detach() for name, value in model.state_dict().items()}
    config = torch.tensor(list(json.dumps(to_json(model.config)).encode()), dtype=torch.uint8)
    return {**weights, "latent_mean": mean, "latent_std": std, "config": config}


@dataclass(frozen=True)
class _Learned:
    """The network, frozen and in float32, and the statistics of its latents."""

    model: Autoencoder
    mean: Float[Tensor, "k"]
    std: Float[Tensor, "k"]


@register("codec", "trained_autoencoder")
@dataclass(frozen=True)
class TrainedAutoencoder:
    """Images to the latents of an autoencoder of ditkit's own, (z - mean) / std by channel, and back.

    z is the mean of the posterior, or with `sample` a draw of it ("codec"). Mean and std are those of the training
    images that the autoencoder was trained on, so that each channel has mean 0 and standard deviation 1 there.
    """

    positional: ClassVar[str] = "path"
    path: str
    """A run of `ditkit train autoencoder`, or its autoencoder.safetensors. A run that uses the codec keeps the weights,
    and needs this no more."""
    sample: bool = False
    """Encode to a draw from the posterior instead of its mean."""
    network: Any = learned()

    def __post_init__(self) -> None:
        if not self.path:
            raise DitkitError("the codec trained_autoencoder needs a run: write --codec trained_autoencoder:RUN")
        # the same from wherever a run is continued
        object.__setattr__(self, "path", os.path.abspath(os.path.expanduser(self.path)))

    @property
    def vocab(self) -> int:
        return 0

    def downsampling(self) -> int:
        return (self if self.network is not None else self._read())._config().factor

    def shape(self, sample: tuple[int, ...]) -> tuple[int, ...]:
        """Raises DitkitError for images of other channels, and for sizes that the factor does not tile."""
        config = self._config()
        if len(sample) != 3 or sample[0] != config.in_channels or any(n % config.factor for n in sample[1:]):
            raise DitkitError(
                f"the autoencoder of {self.path} is for images [{config.in_channels} h w] with sides divisible by "
                f"{config.factor}, and a sample is {list(sample)}: change --data.resolution, or choose another codec"
            )
        return config.latent_channels, sample[1] // config.factor, sample[2] // config.factor

    def fitted(self, data: Samples) -> Self:
        """With what the file holds. Raises DitkitError if it cannot be read, or is no autoencoder's."""
        return self if self.network is not None else self._read()

    def _read(self) -> Self:
        file = Path(self.path)
        if file.is_dir():
            file = file / FILE
        if not file.exists():
            raise DitkitError(
                f"there is no {file}: give a run of `ditkit train autoencoder` that has come to its first checkpoint"
            )
        try:
            return self.loaded(load_file(file))
        except (OSError, SafetensorError, DitkitError) as error:
            raise DitkitError(f"{file} is no autoencoder of ditkit: {error}") from None

    def state(self) -> dict[str, Tensor]:
        """Weights of the network, and the statistics."""
        if self.network is None:
            return {}
        found: _Learned = self.network
        return state(found.model, found.mean, found.std)

    def loaded(self, state: Mapping[str, Tensor]) -> Self:
        """Raises DitkitError for weights of another network."""
        missing = [name for name in ("config", "latent_mean", "latent_std") if name not in state]
        if missing:
            raise DitkitError(f"{missing[0]} is missing")
        try:
            config = from_json(json.loads(bytes(state["config"].tolist())), "its config")
        except (ValueError, TypeError) as error:
            raise DitkitError(f"its config cannot be read: {error}") from None
        if not isinstance(config, AutoencoderConfig):
            raise DitkitError("its config is of another network")
        weights = {n.removeprefix("model."): v.float() for n, v in state.items() if n.startswith("model.")}
        with torch.device("meta"):
            model = config.build()
        try:
            model.load_state_dict(weights, assign=True)
        except RuntimeError as error:
            raise DitkitError(f"its weights do not fit its config: {str(error).splitlines()[1].strip()}") from None
        mean, std = state["latent_mean"].float(), state["latent_std"].float()
        if mean.shape != std.shape or mean.shape != (config.latent_channels,) or not bool((std > 0).all()):
            raise DitkitError(f"its statistics are not those of {config.latent_channels} channels")
        return replace(self, network=_Learned(model.eval().requires_grad_(False), mean, std))

    def encode(self, data: UInt8[Tensor, "b c h w"], rng: Draw | None = None) -> Float[Tensor, "b k h/f w/f"]:
        """Without `rng`, the mean of the posterior. Raises DitkitError before the codec is fitted."""
        return self.drawn(self.moments(data), rng)

    @torch.no_grad()
    def moments(self, data: UInt8[Tensor, "b c h w"]) -> Float[Tensor, "b m k h/f w/f"]:
        """The mean, and where `sample` is set the standard deviation of the posterior, normalised: m = 1 or 2."""
        model, mean, std = self._on(data.device)
        z, log_variance = model.encode(_PIXELS.encode(data))
        wanted = [(z - mean) / std, (0.5 * log_variance).exp() / std]
        return torch.stack(wanted[: 1 + self.sample], 1)

    def drawn(self, moments: Float[Tensor, "b m k h/f w/f"], rng: Draw | None = None) -> Float[Tensor, "b k h/f w/f"]:
        """Without `rng`, the mean. Draws "codec" where there is a standard deviation."""
        return draw(moments, rng)

    @torch.no_grad()
    def decode(self, x0: Float[Tensor, "b k h/f w/f"]) -> UInt8[Tensor, "b c h w"]:
        """Clips, and rounds to the nearest byte. Raises DitkitError before the codec is fitted."""
        model, mean, std = self._on(x0.device)
        return _PIXELS.decode(model.decode(x0.float() * std + mean))

    def _on(self, device: torch.device) -> tuple[Autoencoder, Tensor, Tensor]:
        if self.network is None:
            raise DitkitError("the codec trained_autoencoder has not been fitted: recipe.fitted(data) does it")
        found: _Learned = self.network
        mean, std = (v.to(device)[:, None, None] for v in (found.mean, found.std))
        return found.model.to(device), mean, std

    def _config(self) -> AutoencoderConfig:
        if self.network is None:
            raise DitkitError("the codec trained_autoencoder has not been fitted: recipe.fitted(data) does it")
        return self.network.model.config
