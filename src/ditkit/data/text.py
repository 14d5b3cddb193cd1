"""Texts as tensors: the code points of their characters, filled up with 0 to one length."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Int
from torch import Tensor

from ..conditioning import Known, strings
from ..config import DitkitError

__all__ = ["points", "prompt", "strings", "template"]


def points(texts: Sequence[str], length: int) -> Int[Tensor, "n l"]:
    """The code points of texts. Raises ValueError for a text that is longer than `length` or contains a 0."""
    table = torch.zeros(len(texts), length, dtype=torch.int64)
    for row, text in zip(table, texts, strict=True):
        if len(text) > length or "\0" in text:
            raise ValueError(f"a text has at most {length} characters and no 0: {text!r}")
        row[: len(text)] = torch.tensor([ord(c) for c in text], dtype=torch.int64)
    return table


def prompt(text: str, length: int) -> Known:
    """The beginning of a text of at most `length` characters; what follows is open, its end, too.

    Raises DitkitError for a longer text, an empty one and one with a 0.
    """
    return Known(_checked(text, "prompt", length), torch.arange(length) < len(text))


def template(text: str, length: int, blank: str = "_") -> Known:
    """A whole text with a `blank` in place of each character that is open; nothing comes after it.

    Raises DitkitError for a text longer than `length`, an empty one and one with a 0.
    """
    values = _checked(text, "template", length)
    mask = values != ord(blank)
    return Known(values.where(mask, 0), mask)


def _checked(text: str, name: str, length: int) -> Int[Tensor, "l"]:
    if not 0 < len(text) <= length or "\0" in text:
        what = f"{len(text)} characters" if "\0" not in text else "a character 0"
        raise DitkitError(f"the {name} {text!r} has {what}: give one of 1 to {length} characters, none of them a 0")
    return points([text], length)[0]
