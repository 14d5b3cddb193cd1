"""What an encoder is."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor

from ..config import DitkitError

__all__ = ["Encoder", "as_images"]


@runtime_checkable
class Encoder(Protocol):
    """A frozen network that sees images: features at places, on the device of the images."""

    @property
    def width(self) -> int:
        """Channels of the features."""
        ...

    def __call__(self, images: UInt8[Tensor, "b c h w"]) -> Float[Tensor, "b z rows columns"]: ...


def as_images(data: Tensor, size: int) -> Float[Tensor, "b 3 size size"]:
    """Numbers 0..255 of RGB images (grey ones repeated), scaled bicubically. Raises DitkitError for other data."""
    if data.ndim != 4 or data.dtype != torch.uint8 or data.shape[1] not in (1, 3):
        raise DitkitError(f"an encoder sees uint8 images [b, 1 or 3, h, w], not {data.dtype} {list(data.shape)}")
    x = data.float()
    if x.shape[2:] != (size, size):
        x = F.interpolate(x, size=(size, size), mode="bicubic", antialias=True)
    return x.expand(-1, 3, -1, -1)
