"""Vectors as they are."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from ..config import DitkitError, register
from ..rng import Draw
from .codec import Stateless

__all__ = ["Vectors"]


@register("codec", "vectors")
@dataclass(frozen=True)
class Vectors(Stateless):
    """Points of R^d: what is diffused is the data itself, in float32."""

    @property
    def vocab(self) -> int:
        return 0

    def encode(self, data: Float[Tensor, "b d"], rng: Draw | None = None) -> Float[Tensor, "b d"]:
        return data.float()

    def decode(self, x0: Float[Tensor, "b d"]) -> Float[Tensor, "b d"]:
        return x0.float()

    def shape(self, sample: tuple[int, ...]) -> tuple[int, ...]:
        if len(sample) != 1:
            raise DitkitError(f"the codec vectors is for vectors [d], and a sample is {list(sample)}: choose another")
        return sample
