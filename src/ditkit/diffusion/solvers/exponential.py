"""Exponential multistep solvers: DPM-Solver++(2M, 3M) and DEIS.

With lambda = log(alpha / sigma), half of the log-SNR, the ODE is linear but for the prediction, and its linear part is
solved exactly (Lu et al. 2022, arXiv 2211.01095, equation 9; Zhang & Chen 2022, arXiv 2204.13902, equation 10):

    x_s = sigma_s / sigma_t x_t + alpha_s integral of exp(lambda - lambda_s) x0 d lambda       (x0 form)
    x_s = alpha_s / alpha_t x_t - sigma_s integral of exp(lambda_s - lambda) eps d lambda      (eps form)

A polynomial through the last predictions stands for x0 or eps under the integral. Where lambda is infinite, at the ends
of time, one prediction says all that there is: from alpha = 0 the first step is exact for a constant x0, and the step
to sigma = 0 is the predicted x0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from ...config import DitkitError, register
from ...rng import Draw
from ..denoiser import Denoise
from ..path import Path
from .multistep import Memory, polynomial
from .solver import Once

__all__ = ["DEIS2", "DEIS3", "DPMpp2M", "DPMpp3M", "Exponential", "Point", "middle", "moment", "usable"]

FEW = 15
"""Below so many steps `lower_order_final` acts (the authors of DPM-Solver, and diffusers)."""


SMALLEST = 1e-9
"""A coefficient below it is 0: the cosine of a quarter turn is 6e-17."""


@dataclass(frozen=True)
class Point:
    """A time with its coefficients, and lambda = log(alpha / sigma): -inf where alpha = 0, inf where sigma = 0."""

    t: float
    alpha: float
    sigma: float
    half_log_snr: float

    @classmethod
    def of(cls, path: Path, t: float) -> Point:
        alpha, sigma = (c if c > SMALLEST else 0 * c for c in path(t))
        return cls(t, float(alpha), float(sigma), float(alpha.log() - sigma.log()))


def moment(h: float, k: int) -> float:
    """The integral of exp(u - h) (u / h)^k from u = 0 to h: h k! phi_{k+1}(-h). h may be negative, or infinite."""
    if abs(h) < 1:  # the recursion would lose its digits; 20 terms are exact in float64
        return h * math.fsum((-h) ** j * math.factorial(k) / math.factorial(k + 1 + j) for j in range(20))
    value = -math.expm1(-h)
    for i in range(1, k + 1):
        value = 1 - i / h * value
    return value


def usable(memory: Memory, h: float, lower_order_final: bool = False) -> Memory:
    """The readings that a step of length h in lambda may use: one if h is infinite, fewer at the end if asked for."""
    if not math.isfinite(h):
        return memory.first(1)
    return memory.first(memory.left()) if lower_order_final and memory.steps < FEW else memory


class Exponential(Once):
    """A solver with a memory of predictions over lambda."""

    def init(self, x: Tensor, times: Sequence[float] = ()) -> Memory:
        return Memory.of(times)


def middle(memory: Memory, h: float) -> Tensor:
    """The polynomial at the middle of the step."""
    return torch.stack([d / 2**k for k, d in enumerate(polynomial(memory, h))]).sum(0)


@register("solver", "dpmpp_2m")
@dataclass(frozen=True)
class DPMpp2M(Exponential):
    """DPM-Solver++(2M) (Lu et al. 2022, algorithm 2): the x0 form, with x0 as it is in the middle of the step.

    lower_order_final: on grids of fewer than 15 steps the last step has order 1 (its authors, diffusers). A step to
    sigma = 0 always has.
    """

    order: ClassVar[int] = 2
    needs: ClassVar[tuple[str, ...]] = ("x0",)
    lower_order_final: bool = False

    def step(self, denoise: Denoise, x: Tensor, t: float, s: float, state: Memory, rng: Draw) -> tuple[Tensor, Memory]:
        prediction = denoise(x, t)
        here, there = Point.of(prediction.path, t), Point.of(prediction.path, s)
        h = there.half_log_snr - here.half_log_snr
        state = state.add(here.half_log_snr, prediction.x0, keep=2)
        x0 = middle(usable(state, h, self.lower_order_final), h)
        return there.sigma / here.sigma * x + there.alpha * moment(h, 0) * x0, state


@register("solver", "dpmpp_3m")
@dataclass(frozen=True)
class DPMpp3M(Exponential):
    """DPM-Solver++(3M): the x0 form, with the parabola through three predictions.

    second_difference: "exact"; or "published", half of it, as the authors' code and its descendants (diffusers,
    k-diffusion) have it, which makes the method one of order 2. lower_order_final: on grids of fewer than 15 steps the
    last step has order 1 and the one before it 2 (its authors, diffusers). A step to sigma = 0 always has order 1.
    """

    order: ClassVar[int] = 3
    needs: ClassVar[tuple[str, ...]] = ("x0",)
    second_difference: str = "exact"
    lower_order_final: bool = False

    def __post_init__(self) -> None:
        if self.second_difference not in ("exact", "published"):
            raise DitkitError(f"solver.second_difference is 'exact' or 'published', not {self.second_difference!r}")

    def step(self, denoise: Denoise, x: Tensor, t: float, s: float, state: Memory, rng: Draw) -> tuple[Tensor, Memory]:
        prediction = denoise(x, t)
        here, there = Point.of(prediction.path, t), Point.of(prediction.path, s)
        h = there.half_log_snr - here.half_log_snr
        state = state.add(here.half_log_snr, prediction.x0, keep=3)
        readings = usable(state, h, self.lower_order_final)
        x = there.sigma / here.sigma * x
        if len(readings.values) < 3:  # its authors warm up with 2M
            return x + there.alpha * moment(h, 0) * middle(readings, h), state
        x0, slope, bend = polynomial(readings, h)
        if self.second_difference == "published":
            bend = bend / 2
        return x + there.alpha * (moment(h, 0) * x0 + moment(h, 1) * slope + moment(h, 2) * bend), state


@dataclass(frozen=True)
class _DEIS(Exponential):
    """DEIS (Zhang & Chen 2022): the eps form, with the polynomial through the last `order` predictions of eps.

    variable: what eps is a polynomial of. "log_rho" is log(sigma / alpha) = -lambda (diffusers' "logrho"; works on a
    table); "t" is time (tAB-DEIS, the paper's choice; needs a path with rates). lower_order_final: on grids of fewer
    than 15 steps no step has a higher order than steps are left (diffusers). A step to sigma = 0 always has order 1.
    """

    needs: ClassVar[tuple[str, ...]] = ("x0", "eps")
    variable: str = "log_rho"
    lower_order_final: bool = False

    def __post_init__(self) -> None:
        if self.variable not in ("log_rho", "t"):
            raise DitkitError(f"solver.variable is 'log_rho' or 't', not {self.variable!r}")

    def step(self, denoise: Denoise, x: Tensor, t: float, s: float, state: Memory, rng: Draw) -> tuple[Tensor, Memory]:
        prediction = denoise(x, t)
        here, there = Point.of(prediction.path, t), Point.of(prediction.path, s)
        h = there.half_log_snr - here.half_log_snr
        in_time = self.variable == "t" and math.isfinite(here.half_log_snr)
        state = state.add(t if in_time else here.half_log_snr, prediction.eps, keep=self.order)
        if not math.isfinite(h):
            return there.alpha * prediction.x0 + there.sigma * prediction.eps, state
        coefficients = polynomial(usable(state, h, self.lower_order_final), s - t if in_time else h)
        x = there.alpha / here.alpha * x
        for k, d in enumerate(coefficients):
            weight = there.alpha * _moment_in_time(prediction.path, t, s, k) if in_time else there.sigma * moment(-h, k)
            x = x + weight * d
        return x, state


@register("solver", "deis_2")
@dataclass(frozen=True)
class DEIS2(_DEIS):
    __doc__ = _DEIS.__doc__
    order: ClassVar[int] = 2


@register("solver", "deis_3")
@dataclass(frozen=True)
class DEIS3(_DEIS):
    __doc__ = _DEIS.__doc__
    order: ClassVar[int] = 3


_NODES, _WEIGHTS = (torch.from_numpy(a) for a in np.polynomial.legendre.leggauss(16))


def _moment_in_time(path: Path, t: float, s: float, k: int) -> float:
    """The integral of ((u - t) / (s - t))^k d(sigma / alpha)(u) from u = t to s, by Gauss-Legendre quadrature."""
    share = (1 + _NODES) / 2
    u = t + (s - t) * share
    (alpha_rate, sigma_rate), (alpha, sigma) = path.rate(u), path(u)  # the rates first: a table has none to say so
    rate = (sigma_rate * alpha - sigma * alpha_rate) / alpha**2
    return float((_WEIGHTS / 2 * share**k * rate).sum()) * (s - t)
