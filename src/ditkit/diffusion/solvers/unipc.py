"""UniPC: a predictor of order p and a corrector that costs no evaluation (Zhao et al. 2023, arXiv 2302.04867)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
from torch import Tensor

from ...config import DitkitError, register
from ...rng import Draw
from ..denoiser import Denoise
from .exponential import Point, moment
from .multistep import Memory
from .solver import Once

__all__ = ["UniPC2", "UniPC3"]


@dataclass(frozen=True)
class Pending:
    """A predicted step that waits for its correction: x before it, where it began, and its order; None = no step."""

    memory: Memory
    x: Tensor | None = None
    start: Point | None = None
    order: int = 0


@dataclass(frozen=True)
class _UniPC(Once):
    """UniPC-p in the x0 form: the prediction at the end of a step first corrects that step, and then serves the next.

    The last step stays as predicted, and so does a step from alpha = 0, whose length in log-SNR is infinite.
    variant: "bh1" or "bh2", the function B(h) of the paper: h or exp(h) - 1. lower_order_final: no step has a higher
    order than steps are left (its authors). A step to sigma = 0 always has order 1.
    """

    needs: ClassVar[tuple[str, ...]] = ("x0",)
    variant: str = "bh2"
    lower_order_final: bool = False

    def __post_init__(self) -> None:
        if self.variant not in ("bh1", "bh2"):
            raise DitkitError(f"solver.variant is 'bh1' or 'bh2', not {self.variant!r}")

    def init(self, x: Tensor, times: Sequence[float] = ()) -> Pending:
        return Pending(Memory.of(times))

    def step(
        self, denoise: Denoise, x: Tensor, t: float, s: float, state: Pending, rng: Draw
    ) -> tuple[Tensor, Pending]:
        prediction = denoise(x, t)
        here, there = Point.of(prediction.path, t), Point.of(prediction.path, s)
        if state.x is not None and state.start is not None and math.isfinite(state.start.half_log_snr):
            readings = state.memory.first(state.order)
            x = self._advance(state.x, state.start, here, readings, prediction.x0)
        memory = state.memory.add(here.half_log_snr, prediction.x0, keep=self.order)
        order = len(memory.values) if math.isfinite(there.half_log_snr - here.half_log_snr) else 1
        if self.lower_order_final:
            order = min(order, memory.left())
        end = self._advance(x, here, there, memory.first(order), None)
        return end, replace(state, memory=memory, x=x, start=here, order=order)

    def _advance(self, x: Tensor, here: Point, there: Point, memory: Memory, ahead: Tensor | None) -> Tensor:
        """The step with the readings of `memory`, newest first, and with the prediction at its end if there is one."""
        h = there.half_log_snr - here.half_log_snr
        newest = memory.values[0]
        # divided differences from the newest reading, and where they end in units of h
        places = [(at - here.half_log_snr) / h for at in memory.at[1:]]
        slopes = [(value - newest) / place for value, place in zip(memory.values[1:], places, strict=True)]
        if ahead is not None:
            places.append(1.0)
            slopes.append(ahead - newest)
        x = there.sigma / here.sigma * x + there.alpha * moment(h, 0) * newest
        size = h if self.variant == "bh1" else moment(h, 0)
        for rho, slope in zip(_weights(places, h, size), slopes, strict=True):
            x = x + there.alpha * size * rho * slope
        return x


def _weights(places: Sequence[float], h: float, size: float) -> list[float]:
    """Weights of the divided differences, by the conditions of order (equation 5); 1/2 for one alone, as published."""
    if len(places) == 1:
        return [0.5]
    matrix = [[place**i for place in places] for i in range(len(places))]
    wanted = [moment(h, i + 1) / size for i in range(len(places))]
    return np.linalg.solve(matrix, wanted).tolist() if places else []


@register("solver", "unipc_2")
@dataclass(frozen=True)
class UniPC2(_UniPC):
    __doc__ = _UniPC.__doc__
    order: ClassVar[int] = 2


@register("solver", "unipc_3")
@dataclass(frozen=True)
class UniPC3(_UniPC):
    __doc__ = _UniPC.__doc__
    order: ClassVar[int] = 3
