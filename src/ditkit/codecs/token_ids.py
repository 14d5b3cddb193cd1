"""Tokens that are tokens already."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from jaxtyping import Int
from torch import Tensor

from ..config import DitkitError, register
from ..rng import Draw
from .codec import Samples, Stateless

__all__ = ["TokenIds"]


@register("codec", "token_ids")
@dataclass(frozen=True)
class TokenIds(Stateless):
    """Numbers of tokens in a vocabulary that another program made and reads, such as Whisper's: nothing is changed."""

    vocab: int = 0

    def encode(self, data: Int[Tensor, "b l"], rng: Draw | None = None) -> Int[Tensor, "b l"]:
        """Raises DitkitError for a number outside the vocabulary."""
        if data.numel() and not 0 <= int(data.min()) <= int(data.max()) < self.vocab:
            raise DitkitError(
                f"tokens are 0..{self.vocab - 1} (codec.vocab), and the data has {int(data.min())}..{int(data.max())}"
            )
        return data

    def decode(self, x0: Int[Tensor, "b l"]) -> Int[Tensor, "b l"]:
        return x0

    def shape(self, sample: tuple[int, ...]) -> tuple[int, ...]:
        if len(sample) != 1:
            raise DitkitError(f"the codec token_ids is for tokens [l], and a sample is {list(sample)}: choose another")
        return sample

    def fitted(self, data: Samples) -> Self:
        """Raises DitkitError where the vocabulary is not set: the data does not say it."""
        if self.vocab < 1:
            raise DitkitError("the codec token_ids needs the size of the vocabulary: set codec.vocab")
        return self
