"""Latents without training a network: the principal components of the patches of the training images."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor

from ..config import DitkitError, learned, register
from ..rng import Draw, Rng
from .codec import Samples
from .pixels import Pixels

__all__ = ["Pca"]

_PIXELS = Pixels()
_FLAT = 1e-8
"""A variance, of pixels in [-1, 1], below which a component is the same everywhere but for rounding."""
_AT_ONCE = 1 << 22
"""Numbers of the data that are read at a time when the components are found."""


@register("codec", "pca")
@dataclass(frozen=True)
class Pca:
    """Images to the first `channels` principal components of their patches of factor x factor pixels, and back.

    One latent is z = V^T (patch - mean) / std: each channel has mean 0 and standard deviation 1 on the images that it
    was fitted to, and the first ones hold the most of the variance (Pearson 1901; Hotelling 1933). Decoding is the
    nearest patch that these components can make, clipped and rounded; with all c factor^2 of them nothing is lost. A
    component that is the same everywhere (colours of grey images) is not scaled.
    """

    positional: ClassVar[str] = "factor"
    factor: int = 4
    """Pixels of an image in one latent, along a side."""
    channels: int = 16
    """Components that are kept, at most the numbers of a patch."""
    samples: int = 4096
    """The most training images that the components are found from; of more, this many are drawn."""
    basis: Mapping[str, Tensor] | None = learned()

    def __post_init__(self) -> None:
        if min(self.factor, self.channels, self.samples) < 1:
            raise DitkitError(
                "codec.factor, codec.channels and codec.samples must be at least 1, not "
                f"{self.factor}, {self.channels} and {self.samples}"
            )

    @property
    def vocab(self) -> int:
        return 0

    def shape(self, sample: tuple[int, ...]) -> tuple[int, ...]:
        """Raises DitkitError for what is no image, is not tiled by the patches, or has other channels than those."""
        if len(sample) != 3 or sample[1] % self.factor or sample[2] % self.factor:
            raise DitkitError(
                f"the codec pca is for images [c h w] with sides divisible by {self.factor}, and a sample is "
                f"{list(sample)}: change --codec.factor or --data.resolution, or choose another codec"
            )
        size = sample[0] * self.factor**2
        if self.channels > size:
            raise DitkitError(
                f"patches of {sample[0]} x {self.factor} x {self.factor} have {size} components, and codec.channels is "
                f"{self.channels}: choose fewer channels or a larger codec.factor"
            )
        if self.basis is not None and len(self.basis["mean"]) != sample[0]:
            raise DitkitError(
                f"the codec pca was fitted to images of {len(self.basis['mean'])} channels, and a sample is "
                f"{list(sample)}"
            )
        return self.channels, sample[1] // self.factor, sample[2] // self.factor

    @torch.no_grad()
    def fitted(self, data: Samples) -> Self:
        """With the components of the training images, found in float64; the same images give the same signs.

        Raises DitkitError for data that has no images.
        """
        self.shape(data.shape)
        if self.basis is not None:
            return self
        count = len(data.train)
        if not count:
            raise DitkitError("the codec pca is fitted to training images, and there are none")
        order = torch.argsort(Rng(0).at(0, torch.arange(count))("codec", "uniform"), stable=True)
        chosen = order[: self.samples].sort().values
        size, patches = data.shape[0] * self.factor**2, 0
        total = torch.zeros(size, dtype=torch.float64)
        scatter = torch.zeros(size, size, dtype=torch.float64)
        for part in chosen.split(max(1, _AT_ONCE // math.prod(data.shape))):
            rows = self._patches(data.train.batch(part).data).double().movedim(1, 3).flatten(0, 2)
            total += rows.sum(0)
            scatter += rows.T @ rows
            patches += len(rows)
        mean = total / patches
        variance, vectors = torch.linalg.eigh(scatter / patches - torch.outer(mean, mean))  # ascending
        variance, vectors = variance.flip(0)[: self.channels], vectors.flip(1)[:, : self.channels].T
        # an eigenvector is one up to its sign: the first entry that is not far below the largest is made positive
        large = (vectors.abs() >= 0.5 * vectors.abs().amax(1, keepdim=True)).int().argmax(1, keepdim=True)
        vectors = vectors * vectors.gather(1, large).sign()
        std = torch.where(variance > _FLAT, variance.clamp(min=_FLAT).sqrt(), 1.0)
        patch = (data.shape[0], self.factor, self.factor)
        found = {"mean": mean.view(patch), "components": vectors.reshape(-1, *patch), "std": std}
        return replace(self, basis={name: value.float().contiguous() for name, value in found.items()})

    def state(self) -> dict[str, Tensor]:
        """Mean and components as patches [c factor factor] of pixels in [-1, 1], and each component's deviation."""
        return dict(self.basis or {})

    def loaded(self, state: Mapping[str, Tensor]) -> Self:
        """Raises DitkitError for components of another number or size."""
        shapes = {name: tuple(value.shape) for name, value in state.items()}
        patch = shapes.get("mean", ())
        wanted = {"mean": patch, "components": (self.channels, *patch), "std": (self.channels,)}
        if len(patch) != 3 or patch[1:] != (self.factor, self.factor) or shapes != wanted:
            raise DitkitError(
                f"it has learned {shapes}, which is not for codec.factor {self.factor} and codec.channels "
                f"{self.channels}"
            )
        return replace(self, basis=dict(state))

    def encode(self, data: UInt8[Tensor, "b c h w"], rng: Draw | None = None) -> Float[Tensor, "b k h/f w/f"]:
        """Raises DitkitError before the codec is fitted."""
        mean, components, std = self._learned(data.device)
        return torch.einsum("bphw,kp->bkhw", self._patches(data) - mean[:, None, None], components / std[:, None])

    def decode(self, x0: Float[Tensor, "b k h/f w/f"]) -> UInt8[Tensor, "b c h w"]:
        """Clips, and rounds to the nearest byte. Raises DitkitError before the codec is fitted."""
        mean, components, std = self._learned(x0.device)
        patches = torch.einsum("bkhw,kp->bphw", x0.float(), components * std[:, None]) + mean[:, None, None]
        return _PIXELS.decode(F.pixel_shuffle(patches, self.factor))

    def _patches(self, data: UInt8[Tensor, "b c h w"]) -> Float[Tensor, "b p h/f w/f"]:
        """The numbers of a patch, channel by channel, in [-1, 1]."""
        return F.pixel_unshuffle(_PIXELS.encode(data), self.factor)

    def _learned(self, device: torch.device) -> tuple[Float[Tensor, "p"], Float[Tensor, "k p"], Float[Tensor, "k"]]:
        if self.basis is None:
            raise DitkitError("the codec pca has not been fitted: recipe.fitted(data) or codec.fitted(data) does it")
        mean, components, std = (self.basis[name].to(device) for name in ("mean", "components", "std"))
        return mean.flatten(), components.flatten(1), std
