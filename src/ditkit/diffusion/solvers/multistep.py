"""What solvers with memory share, and Adams-Bashforth on the velocity."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from ...config import register
from ...rng import Draw
from ..denoiser import Denoise
from .solver import Once

__all__ = ["AB2", "Memory", "polynomial"]


@dataclass(frozen=True)
class Memory:
    """Earlier readings of a trajectory, newest first, and the coordinate (t, or log-SNR) at which each was taken.

    steps: of the whole grid, 0 if it is not known; taken: how many of them are done.
    """

    at: tuple[float, ...] = ()
    values: tuple[Float[Tensor, "b *x"], ...] = ()
    steps: int = 0
    taken: int = 0

    @classmethod
    def of(cls, times: Sequence[float]) -> Memory:
        return cls(steps=max(len(times) - 1, 0))

    def add(self, at: float, value: Tensor, keep: int) -> Memory:
        """With the newest reading, and at most `keep` of them.

        A reading at an infinite log-SNR (alpha = 0) serves its own step and is then forgotten: no polynomial runs
        through it, and the limit of the formulas gives it the weight 0.
        """
        kept = [(a, v) for a, v in zip(self.at, self.values, strict=True) if math.isfinite(a)][: keep - 1]
        return replace(
            self, at=(at, *(a for a, _ in kept)), values=(value, *(v for _, v in kept)), taken=self.taken + 1
        )

    def first(self, count: int) -> Memory:
        """The newest `count` readings."""
        return replace(self, at=self.at[:count], values=self.values[:count])

    def left(self) -> int:
        """Steps from here to the end of the grid, this one included; enough for any order if the grid is not known."""
        return self.steps - self.taken + 1 if self.steps else len(self.values)


def polynomial(memory: Memory, h: float) -> list[Float[Tensor, "b *x"]]:
    """d_k such that sum d_k u^k runs through at most three readings; u = 0 is the newest, u = 1 lies h beyond it."""
    values, at = memory.values, memory.at
    if len(values) == 1:
        return [values[0]]
    h1 = at[0] - at[1]
    slope = (values[0] - values[1]) / h1
    if len(values) == 2:
        return [values[0], h * slope]
    h2 = at[1] - at[2]
    bend = (slope - (values[1] - values[2]) / h2) / (h1 + h2)  # the second divided difference
    return [values[0], h * (slope + h1 * bend), h * h * bend]


@register("solver", "ab2")
@dataclass(frozen=True)
class AB2(Once):
    """Adams-Bashforth 2 on the velocity, for steps of any length; the first step is Euler's.

    Exact where the velocity is linear in t along the trajectory: the velocity of the last two points, extended.
    """

    order: ClassVar[int] = 2
    needs: ClassVar[tuple[str, ...]] = ("velocity",)

    def init(self, x: Tensor, times: Sequence[float] = ()) -> Memory:
        return Memory.of(times)

    def step(self, denoise: Denoise, x: Tensor, t: float, s: float, state: Memory, rng: Draw) -> tuple[Tensor, Memory]:
        state = state.add(t, denoise(x, t).velocity, keep=2)
        h = s - t
        for k, of_u in enumerate(polynomial(state, h)):
            x = x + h / (k + 1) * of_u
        return x, state
