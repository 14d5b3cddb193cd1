"""Samples beside training images, as an audit shows them and writes them down."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float, Int, UInt8
from torch import Tensor

from ..data import Split
from ..report import Picture, Table, number
from ..sheet import beside, rendered

__all__ = ["Pairs", "pairs_of"]


@dataclass(frozen=True)
class Pairs:
    """Samples, each before a training image, the most alike first; how alike they are, by a score of this name."""

    images: UInt8[Tensor, "k c h w"]
    samples: tuple[str, ...]
    """Names of files, or numbers."""
    training: Int[Tensor, "j"]
    """Numbers in the training split, from 0."""
    score: str
    scores: Float[Tensor, "j"]

    def shown(self, file: str, which: str) -> tuple[str | Picture | Table, ...]:
        """The picture, and a table that says what its pairs are, row by row of eight pairs."""
        rows = tuple(
            (str(k), row["sample"], f"{row['training']:,}", number(row[self.score]))
            for k, row in enumerate(self.rows(), start=1)
        )
        return (
            f"Each sample is followed by the training image {which}; the ones most like a copy first, eight in a row.",
            Picture(file, f"samples and the training images {which}", rendered(self.images, ".png", 16)),
            Table(("pair", "sample", "number among the training images, from 0", self.score), rows),
        )

    def rows(self) -> list[dict[str, Any]]:
        """The table for a program."""
        found = zip(self.samples, self.training.tolist(), self.scores.tolist(), strict=True)
        return [{"sample": sample, "training": image, self.score: score} for sample, image, score in found]


def pairs_of(
    images: UInt8[Tensor, "n c h w"],
    names: Sequence[str],
    train: Split,
    order: Int[Tensor, "j"],
    nearest: Int[Tensor, "j"],
    score: str,
    scores: Float[Tensor, "j"],
) -> Pairs:
    """The samples of this order beside these training images."""
    chosen = tuple(names[int(k)] for k in order)
    return Pairs(beside(images[order], train.batch(nearest).data), chosen, nearest, score, scores)
