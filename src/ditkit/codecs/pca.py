"""Latents without training a network: the principal components of the patches of the training images."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from ..config import DitkitError, learned, register
from ..layers import principal_components, project, unproject
from ..rng import Draw
from .codec import EXAMPLES, Samples, examples
from .pixels import Pixels

__all__ = ["Pca"]

_PIXELS = Pixels()
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
    samples: int = EXAMPLES
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

    def downsampling(self) -> int:
        return self.factor

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
        if not len(data.train):
            raise DitkitError("the codec pca is fitted to training images, and there are none")
        parts = examples(data.train, self.samples, max(1, _AT_ONCE // math.prod(data.shape)))
        images = map(_PIXELS.encode, parts)
        return replace(self, basis=principal_components(images, self.factor, self.channels))

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
        return project(_PIXELS.encode(data), **self._learned(data.device))

    def decode(self, x0: Float[Tensor, "b k h/f w/f"]) -> UInt8[Tensor, "b c h w"]:
        """Clips, and rounds to the nearest byte. Raises DitkitError before the codec is fitted."""
        return _PIXELS.decode(unproject(x0, **self._learned(x0.device)))

    def _learned(self, device: torch.device) -> dict[str, Tensor]:
        if self.basis is None:
            raise DitkitError("the codec pca has not been fitted: recipe.fitted(data) or codec.fitted(data) does it")
        return {name: value.to(device) for name, value in self.basis.items()}
