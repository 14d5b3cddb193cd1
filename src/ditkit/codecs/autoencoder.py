"""Latents of an autoencoder, as DiT, SiT and most of their successors have them: diffusers' AutoencoderKL."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from ..config import DitkitError, register
from ..hub import locate, unloadable
from ..rng import Draw
from .codec import Stateless

__all__ = ["Autoencoder"]


@register("codec", "autoencoder")
@dataclass(frozen=True)
class Autoencoder(Stateless):
    """Images to latents (z - shift) scale, [b channels h/factor w/factor], and back; with Stable Diffusion's defaults.

    Where `means` and `stds` are given, z is normalised with those of each channel before that (VA-VAE's latents).

    The scale brings the latents near standard deviation 1 and is a part of what a network was trained on: it is said
    here, whatever the autoencoder's own file says. Encoding draws "codec" where the posterior is sampled.
    """

    positional: ClassVar[str] = "path"
    path: str = "stabilityai/sd-vae-ft-mse"
    """A folder of diffusers (config.json beside the weights), or a name on the hub."""
    download: bool = False
    """Let diffusers fetch a hub name that is not in its cache yet."""
    scale: float = 0.18215
    shift: float = 0.0
    channels: int = 4
    factor: int = 8
    """Pixels of an image in one latent, along a side."""
    sample: bool = True
    """Encode to a draw from the posterior, as DiT does; False = to its mean."""
    means: tuple[float, ...] = ()
    stds: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if self.channels < 1 or self.factor < 1 or not self.scale > 0:
            raise DitkitError(
                f"codec.channels and codec.factor must be at least 1 and codec.scale above 0, not {self.channels}, "
                f"{self.factor} and {self.scale}"
            )
        given = {len(self.means), len(self.stds)}
        if given not in ({0}, {self.channels}) or not all(std > 0 for std in self.stds):
            raise DitkitError(
                f"codec.means and codec.stds are one number for each of the {self.channels} channels, stds above 0, "
                f"or none; they are {len(self.means)} and {len(self.stds)}"
            )

    @property
    def vocab(self) -> int:
        return 0

    def shape(self, sample: tuple[int, ...]) -> tuple[int, ...]:
        """Raises DitkitError for what is no RGB image, or is not tiled by the factor."""
        if len(sample) != 3 or sample[0] != 3 or sample[1] % self.factor or sample[2] % self.factor:
            raise DitkitError(
                f"the codec autoencoder is for images [3 h w] with sides divisible by {self.factor}, and a sample is "
                f"{list(sample)}: change --data.resolution, or choose another codec"
            )
        return self.channels, sample[1] // self.factor, sample[2] // self.factor

    @torch.no_grad()
    def encode(self, data: UInt8[Tensor, "b 3 h w"], rng: Draw | None = None) -> Float[Tensor, "b c h/f w/f"]:
        """Without `rng`, the mean of the posterior. Raises DitkitError if the autoencoder cannot be had."""
        return self.drawn(self.moments(data), rng)

    @torch.no_grad()
    def moments(self, data: UInt8[Tensor, "b 3 h w"]) -> Float[Tensor, "b m c h/f w/f"]:
        """Of the autoencoder's own z. Raises DitkitError if the autoencoder cannot be had."""
        posterior = self.model(data.device).encode(data.float() / 127.5 - 1).latent_dist
        return torch.stack((posterior.mean, posterior.std) if self.sample else (posterior.mean,), 1)

    def drawn(self, moments: Float[Tensor, "b m c h w"], rng: Draw | None = None) -> Float[Tensor, "b c h w"]:
        z = moments[:, 0]
        if moments.shape[1] == 2 and rng is not None:
            z = z + moments[:, 1] * rng("codec", "normal", z.shape[1:]).to(z)
        mean, std = self._statistics(z)
        return ((z - mean) / std - self.shift) * self.scale

    @torch.no_grad()
    def decode(self, x0: Float[Tensor, "b c h/f w/f"]) -> UInt8[Tensor, "b 3 h w"]:
        """Clips, and rounds to the nearest byte. Raises DitkitError if the autoencoder cannot be had."""
        mean, std = self._statistics(x0)
        image = self.model(x0.device).decode((x0.float() / self.scale + self.shift) * std + mean).sample
        return (image * 127.5 + 127.5).clamp(0, 255).round().to(torch.uint8)

    def _statistics(self, z: Tensor) -> tuple[Tensor | float, Tensor | float]:
        """Mean and standard deviation by channel, in the form that goes with z."""
        if not self.means:
            return 0.0, 1.0
        mean, std = (torch.tensor(v, device=z.device)[:, None, None] for v in (self.means, self.stds))
        return mean, std

    def model(self, device: torch.device | str = "cpu") -> Any:
        """diffusers' AutoencoderKL in float32, loaded once for each path.

        Raises DitkitError without diffusers, for a path that holds none, and for one of other channels or factor.
        """
        model = _load(self.path, self.download)
        factor = 2 ** (len(model.config.block_out_channels) - 1)
        if (model.config.latent_channels, factor) != (self.channels, self.factor):
            raise DitkitError(
                f"the autoencoder {self.path} has {model.config.latent_channels} channels and the factor {factor}, "
                f"not {self.channels} and {self.factor}: change codec.channels and codec.factor"
            )
        return model.to(device)


@functools.lru_cache(maxsize=2)
def _load(path: str, download: bool) -> Any:
    path = locate(path, "autoencoder", "diffusers")
    try:
        from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    except ImportError:
        raise DitkitError("the codec autoencoder needs diffusers: pip install 'ditkit[diffusers]'") from None
    try:
        model = AutoencoderKL.from_pretrained(
            path, local_files_only=not download, low_cpu_mem_usage=False, torch_dtype=torch.float32
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise unloadable(path, "autoencoder", download, error) from None
    return model.eval().requires_grad_(False)  # type: ignore[union-attr]
