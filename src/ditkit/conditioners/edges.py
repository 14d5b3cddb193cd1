"""Edges of the images themselves as control images: what a ControlNet is trained on without any labels."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Self

import torch
import torch.nn.functional as F
from jaxtyping import Int, UInt8
from torch import Tensor

from ..conditioning import Conditioning, Given
from ..config import DitkitError, register, registered_as
from ..rng import Draw
from .label import Label

__all__ = ["Edges"]

_ACROSS = torch.tensor([[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0], [-1.0, 0.0, 1.0]]) / 4
"""Sobel's kernel; a step from 0 to 255 has the gradient 255."""


@register("conditioner", "edges")
@dataclass(frozen=True)
class Edges:
    """What `inner` makes, and the edges of each image: 255 on thin lines, 0 elsewhere, in as many channels.

    An edge is where Sobel's gradient of the mean over the channels is above the threshold, and not smaller than at
    the two neighbours in the direction (of eight) of the gradient: Canny's detector (1986) without its smoothing and
    without its second threshold. A null has no control, and neither has a batch that comes without its data.
    """

    inner: Any = Label()
    """What else is given: classes, or texts."""
    threshold: int = 64
    """Gradient in bytes; 255 is a step from black to white."""

    def __post_init__(self) -> None:
        if not 0 < self.threshold <= 255:
            raise DitkitError(f"conditioner.threshold is a gradient from 1 to 255, not {self.threshold}")
        if registered_as(self.inner)[0] != "conditioner" or isinstance(self.inner, Edges):
            raise DitkitError("conditioner.inner is another conditioner, such as label or random_text")

    @property
    def classes(self) -> tuple[str, ...]:
        return self.inner.classes

    def __call__(self, batch: Given, rng: Draw | None = None) -> Conditioning:
        """Draws what `inner` draws. Raises DitkitError for data that is no images."""
        cond = self.inner(batch, rng)
        return cond if batch.data is None else replace(cond, control=self.control(batch.data))

    def control(self, images: UInt8[Tensor, "b c h w"]) -> UInt8[Tensor, "b c h w"]:
        """The control image of each image. Raises DitkitError for what is no bytes of images."""
        if images.ndim != 4 or images.dtype != torch.uint8:
            raise DitkitError(
                "the conditioner edges is for images of bytes [c h w], and the data is "
                f"{str(images.dtype).removeprefix('torch.')} {list(images.shape[1:])}"
            )
        grey = F.pad(images.float().mean(1, keepdim=True), (1, 1, 1, 1), mode="replicate")
        kernels = torch.stack((_ACROSS, _ACROSS.T))[:, None].to(images.device)
        dx, dy = F.conv2d(grey, kernels).unbind(1)
        size = dx.hypot(dy)
        # neighbours by the octant of the gradient: 0 = right and left, 1 = down right and up left, ...
        direction = (torch.atan2(dy, dx) / (torch.pi / 4)).round().long() % 4
        around = F.pad(size, (1, 1, 1, 1))
        height, width = size.shape[1:]
        peak = torch.zeros_like(size, dtype=torch.bool)
        for i, (row, column) in enumerate(((0, 1), (1, 1), (1, 0), (1, -1))):
            one, other = (
                around[:, 1 + s * row : 1 + s * row + height, 1 + s * column : 1 + s * column + width] for s in (1, -1)
            )
            # a plateau of two is one pixel wide: the first of them
            peak |= (direction == i) & (size >= one) & (size > other)
        lines = (peak & (size >= self.threshold)).byte() * 255
        return lines[:, None].expand_as(images)

    def null(self, n: int) -> Conditioning:
        """As `inner`'s: what a guide leaves out is the class or the text, not the control."""
        return self.inner.null(n)

    def fitted(self, classes: tuple[str, ...]) -> Self:
        return replace(self, inner=self.inner.fitted(classes))

    def index(self, names: Any) -> Int[Tensor, "b"]:
        """As `inner`'s."""
        return self.inner.index(names)
