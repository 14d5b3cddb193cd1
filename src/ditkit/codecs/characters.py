"""Characters of a text as tokens."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

import torch
from jaxtyping import Int
from torch import Tensor

from ..config import DitkitError, register
from ..rng import Draw
from .codec import Samples, Stateless

__all__ = ["Characters"]


@register("codec", "characters")
@dataclass(frozen=True)
class Characters(Stateless):
    """Code points, filled up with 0, to tokens and back: 0 is the filling, then come the characters of `symbols`."""

    symbols: str = ""

    def __post_init__(self) -> None:
        if "\0" in self.symbols or len(set(self.symbols)) < len(self.symbols):
            raise DitkitError("codec.symbols are different characters, and none is the filling, 0")

    @property
    def vocab(self) -> int:
        return 1 + len(self.symbols)

    def _table(self, device: torch.device) -> Int[Tensor, "vocab"]:
        return torch.tensor([0, *map(ord, self.symbols)], device=device)

    def encode(self, data: Int[Tensor, "b l"], rng: Draw | None = None) -> Int[Tensor, "b l"]:
        """Raises DitkitError for a character that is not among the symbols."""
        table = self._table(data.device)
        values, order = table.sort()
        place = torch.searchsorted(values, data).clamp(max=len(table) - 1)
        if bool((values[place] != data).any()):
            wrong = chr(int(data[values[place] != data][0]))
            raise DitkitError(f"the character {wrong!r} is none of those that the model knows: {self.symbols}")
        return order[place]

    def decode(self, x0: Int[Tensor, "b l"]) -> Int[Tensor, "b l"]:
        return self._table(x0.device)[x0]

    def shape(self, sample: tuple[int, ...]) -> tuple[int, ...]:
        if len(sample) != 1:
            raise DitkitError(f"the codec characters is for texts [l], and a sample is {list(sample)}: choose another")
        return sample

    def fitted(self, data: Samples) -> Self:
        """With the characters of the data. Raises DitkitError if it has none."""
        if not data.symbols:
            raise DitkitError("the codec characters is for texts, and the data holds none: choose another --codec")
        return replace(self, symbols=data.symbols)
