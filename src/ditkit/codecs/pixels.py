"""Pixels themselves as the diffused tensor, as JiT has them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from ..config import DitkitError, register
from ..rng import Draw
from .codec import Stateless

__all__ = ["Pixels"]


@register("codec", "pixels")
@dataclass(frozen=True)
class Pixels(Stateless):
    """Bytes 0..255 of images and videos to [-1, 1] and back; decoding clips, and rounds to the nearest byte."""

    @property
    def vocab(self) -> int:
        return 0

    def encode(self, data: UInt8[Tensor, "b c *space"], rng: Draw | None = None) -> Float[Tensor, "b c *space"]:
        return data.float() / 127.5 - 1

    def decode(self, x0: Float[Tensor, "b c *space"]) -> UInt8[Tensor, "b c *space"]:
        return (x0.float() * 127.5 + 127.5).clamp(0, 255).round().to(torch.uint8)

    def shape(self, sample: tuple[int, ...]) -> tuple[int, ...]:
        if len(sample) not in (3, 4):
            raise DitkitError(
                f"the codec pixels is for images [c h w] and videos [c t h w], and a sample is {list(sample)}: choose "
                "another"
            )
        return sample
