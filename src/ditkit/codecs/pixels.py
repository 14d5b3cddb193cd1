"""Pixels themselves as the diffused tensor, as JiT has them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from ..config import register
from ..rng import Draw

__all__ = ["Codec", "Pixels"]


@runtime_checkable
class Codec(Protocol):
    """Data <-> the tensor that is diffused."""

    def encode(self, data: UInt8[Tensor, "b c h w"], rng: Draw | None = None) -> Float[Tensor, "b d *space"]: ...

    def decode(self, x0: Float[Tensor, "b d *space"]) -> UInt8[Tensor, "b c h w"]: ...

    def shape(self, channels: int, height: int, width: int) -> tuple[int, ...]:
        """The shape of one encoded sample."""
        ...


@register("codec", "pixels")
@dataclass(frozen=True)
class Pixels:
    """Bytes 0..255 to [-1, 1] and back; decoding clips, and rounds to the nearest byte."""

    def encode(self, data: UInt8[Tensor, "b c h w"], rng: Draw | None = None) -> Float[Tensor, "b c h w"]:
        return data.float() / 127.5 - 1

    def decode(self, x0: Float[Tensor, "b c h w"]) -> UInt8[Tensor, "b c h w"]:
        return (x0.float() * 127.5 + 127.5).clamp(0, 255).round().to(torch.uint8)

    def shape(self, channels: int, height: int, width: int) -> tuple[int, ...]:
        return channels, height, width
