"""Clips of one moving handwritten digit each, made of the real digits (Srivastava et al. 2015, Moving MNIST)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from ..config import DitkitError, register
from ..rng import Rng
from .dataset import Dataset, InMemory
from .digits import Digits

__all__ = ["MovingDigits"]


@register("data", "moving_digits")
@dataclass(frozen=True)
class MovingDigits:
    """A digit that crosses the picture and bounces off its edges: 1 x frames x resolution x resolution, class = digit.

    digit: its side in pixels. Where it starts, its direction and its speed (`slowest` to `fastest` pixels a frame) are
    drawn once for each digit: clips are the same for everyone.
    """

    frames: int = 8
    resolution: int = 32
    digit: int = 16
    slowest: float = 1.0
    fastest: float = 3.0

    def __post_init__(self) -> None:
        if self.frames < 1 or not 4 <= self.digit <= 28 or self.digit >= self.resolution:
            raise DitkitError(
                "data moving_digits: data.frames is at least 1, data.digit 4 to 28 and below data.resolution, not "
                f"{self.frames}, {self.digit} and {self.resolution}"
            )
        if not 0 <= self.slowest <= self.fastest:
            raise DitkitError(
                f"data moving_digits: data.slowest {self.slowest} and data.fastest {self.fastest} are speeds, the "
                "first at most the second"
            )

    def open(self) -> Dataset:
        """Reads the digits and moves them. Raises DitkitError as `Digits` does."""
        still = Digits(resolution=self.digit).open()
        assert isinstance(still.train, InMemory)
        assert isinstance(still.heldout, InMemory)
        images, labels = still.train.data, still.train.labels
        clips = self._moved(images[:, 0])
        return Dataset(
            name="moving_digits",
            classes=still.classes,
            shape=tuple(clips.shape[1:]),
            train=InMemory(clips, labels, still.train.rows),
            heldout=InMemory(clips, labels, still.heldout.rows),
            source=f"moving digits: {self.frames} frames of {self.resolution} x {self.resolution}, "
            f"{self.slowest:g} to {self.fastest:g} pixels a frame, from {still.source}",
        )

    def _moved(self, images: UInt8[Tensor, "n d d"]) -> UInt8[Tensor, "n 1 t h w"]:
        corners = self.places(len(images))
        offsets = torch.arange(self.digit)
        rows = (corners[..., 0, None] + offsets)[:, :, :, None]
        columns = (corners[..., 1, None] + offsets)[:, :, None, :]
        clips = torch.zeros(len(images), self.frames, self.resolution, self.resolution, dtype=torch.uint8)
        sample, frame = torch.arange(len(images))[:, None, None, None], torch.arange(self.frames)[None, :, None, None]
        clips[sample, frame, rows, columns] = images[:, None].expand(-1, self.frames, -1, -1)
        return clips[:, None]

    def places(self, count: int) -> Int[Tensor, "n t 2"]:
        """Row and column of the upper left corner of each digit in each frame."""
        rng = Rng(0).at(0, torch.arange(count))
        room = self.resolution - self.digit
        start = rng("start", "uniform", (2,)).double() * room
        angle = rng("direction", "uniform", ()).double() * 2 * math.pi
        speed = self.slowest + (self.fastest - self.slowest) * rng("speed", "uniform", ()).double()
        step = speed[:, None] * torch.stack((angle.sin(), angle.cos()), dim=1)
        way: Float[Tensor, "n t 2"] = start[:, None] + torch.arange(self.frames)[None, :, None] * step[:, None]
        # a path that is folded at both edges: there and back again has the period 2 room
        folded = way.remainder(2 * room)
        return torch.minimum(folded, 2 * room - folded).round().long()
