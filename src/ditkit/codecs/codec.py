"""What a codec is."""

from __future__ import annotations

from typing import Protocol, Self, runtime_checkable

from jaxtyping import Shaped
from torch import Tensor

from ..rng import Draw

__all__ = ["Codec"]


@runtime_checkable
class Codec(Protocol):
    """Data <-> the tensor that is diffused, x0: floats [b c *space] or [b d], or tokens (int64 [b l])."""

    @property
    def vocab(self) -> int:
        """How many different tokens there are; 0 where x0 is continuous."""
        ...

    def encode(self, data: Shaped[Tensor, "b *sample"], rng: Draw | None = None) -> Shaped[Tensor, "b *shape"]: ...

    def decode(self, x0: Shaped[Tensor, "b *shape"]) -> Shaped[Tensor, "b *sample"]: ...

    def shape(self, sample: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of one encoded sample of data of shape `sample`. Raises DitkitError for data of another kind."""
        ...

    def fitted(self, symbols: str) -> Self:
        """The codec for data whose texts are made of these characters (none where it is no text)."""
        ...
