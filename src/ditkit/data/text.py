"""Texts as tensors: the code points of their characters, filled up with 0 to one length."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from jaxtyping import Int
from torch import Tensor

__all__ = ["points", "strings"]

_INNER = "\u2400"  # the picture of a 0, for a model that goes on after it


def points(texts: Sequence[str], length: int) -> Int[Tensor, "n l"]:
    """The code points of texts. Raises ValueError for a text that is longer than `length` or contains a 0."""
    table = torch.zeros(len(texts), length, dtype=torch.int64)
    for row, text in zip(table, texts, strict=True):
        if len(text) > length or "\0" in text:
            raise ValueError(f"a text has at most {length} characters and no 0: {text!r}")
        row[: len(text)] = torch.tensor([ord(c) for c in text], dtype=torch.int64)
    return table


def strings(rows: Iterable[Int[Tensor, "l"]]) -> list[str]:
    """The texts of code points: the filling at the end goes, a 0 inside is shown as \u2400."""
    return ["".join(map(chr, row.tolist())).rstrip("\0").replace("\0", _INNER) for row in rows]
