"""Pictures that need a look at both ends: two handwritten digits, far apart, of one class that nobody names."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Int, UInt8
from torch import Tensor

from ..config import DitkitError, register
from ..rng import Rng
from .dataset import Dataset, InMemory
from .digits import Digits

__all__ = ["Twins"]


@register("data", "twins")
@dataclass(frozen=True)
class Twins:
    """A digit at the left end, another one of the same class at the right end, `gap` black columns between them:
    1 x side x (2 side + gap), without classes.

    Whoever draws one end must know the other. Each digit is at the left once for each of `partners` others, which are
    drawn once: pictures are the same for everyone. Held-out pictures are of held-out digits.
    """

    side: int = 16
    """Of the square that a digit fills, in pixels."""
    gap: int = 32
    partners: int = 4

    def __post_init__(self) -> None:
        if not 4 <= self.side <= 28 or self.gap < 0 or self.partners < 1:
            raise DitkitError(
                "data twins: data.side is 4 to 28, data.gap at least 0 and data.partners at least 1, not "
                f"{self.side}, {self.gap} and {self.partners}"
            )

    def open(self) -> Dataset:
        """Reads the digits and pairs them. Raises DitkitError as `Digits` does."""
        digits = Digits(resolution=self.side).open()
        splits = []
        for split in (digits.train, digits.heldout):
            batch = split.batch(torch.arange(len(split)))
            assert batch.label is not None
            pairs = self._pairs(batch.label)
            pictures = self._drawn(batch.data[pairs[0]], batch.data[pairs[1]])
            splits.append(InMemory(pictures, None, torch.arange(len(pictures))))
        return Dataset(
            name="twins",
            classes=(),
            shape=tuple(splits[0].data.shape[1:]),
            train=splits[0],
            heldout=splits[1],
            source=f"twins: pairs of one class, {self.partners} for each digit, {self.gap} pixels between them, of "
            f"{digits.source}",
        )

    def _pairs(self, labels: Int[Tensor, "n"]) -> Int[Tensor, "2 m"]:
        """Rows of the left and of the right digits: another one of the same class."""
        draws = Rng(0).at(0, torch.arange(len(labels)))("partner", "uniform", (self.partners,))
        left = torch.arange(len(labels))[:, None].expand(-1, self.partners)
        right = torch.empty_like(left)
        for label in labels.unique():
            rows = (labels == label).nonzero().squeeze(1)
            # the place of a digit in its class, and as many places further, around the end, as was drawn
            places = torch.arange(len(rows))[:, None] + 1 + (draws[rows] * (len(rows) - 1)).long()
            right[rows] = rows[places % len(rows)]
        return torch.stack((left.flatten(), right.flatten()))

    def _drawn(self, left: UInt8[Tensor, "n 1 s s"], right: UInt8[Tensor, "n 1 s s"]) -> UInt8[Tensor, "n 1 s w"]:
        return torch.cat((F.pad(left, (0, self.gap)), right), dim=3)

    def ends(self, pictures: UInt8[Tensor, "n 1 s w"]) -> tuple[UInt8[Tensor, "n 1 s s"], UInt8[Tensor, "n 1 s s"]]:
        """What is at the left and at the right."""
        return pictures[..., : self.side], pictures[..., -self.side :]
