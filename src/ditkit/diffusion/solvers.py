"""Solvers: one step from t to s < t with explicit state, and the loop over a grid.

A solver is a frozen dataclass with `order` (of the global error on a smooth problem), `nfe` (network evaluations a
step), `needs` (the spaces it reads), `init(x) -> state` and `step(denoise, x, t, s, state, rng) -> (x, state)`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor

from ..conditioning import Conditioning
from ..config import DitkitError, register
from ..rng import Draw
from .denoiser import Denoise, Prediction, Startable
from .posterior import learned_log_variance, posterior

__all__ = ["DDIM", "Ancestral", "Euler", "Heun", "Solver", "check_grid", "integrate"]


@runtime_checkable
class Solver(Protocol):
    """One step of a sampler."""

    order: ClassVar[int]
    nfe: ClassVar[int]
    needs: ClassVar[tuple[str, ...]]

    def init(self, x: Tensor) -> Any: ...

    def step(self, denoise: Denoise, x: Tensor, t: float, s: float, state: Any, rng: Draw) -> tuple[Tensor, Any]: ...


class _OneStep:
    """A solver without memory."""

    order: ClassVar[int] = 1
    nfe: ClassVar[int] = 1
    needs: ClassVar[tuple[str, ...]] = ("velocity",)

    def init(self, x: Tensor) -> None:
        return None


@register("solver", "euler")
@dataclass(frozen=True)
class Euler(_OneStep):
    """x + (s - t) velocity."""

    def step(self, denoise: Denoise, x: Tensor, t: float, s: float, state: None, rng: Draw) -> tuple[Tensor, None]:
        return x + (s - t) * denoise(x, t).velocity, None


@register("solver", "heun")
@dataclass(frozen=True)
class Heun(_OneStep):
    """Euler's step corrected by the velocity at its end; the step that reaches the data is plain Euler (EDM, JiT)."""

    order: ClassVar[int] = 2
    nfe: ClassVar[int] = 2

    def step(self, denoise: Denoise, x: Tensor, t: float, s: float, state: None, rng: Draw) -> tuple[Tensor, None]:
        velocity = denoise(x, t).velocity
        euler = x + (s - t) * velocity
        if s == 0:
            return euler, None
        return x + (s - t) * 0.5 * (velocity + denoise(euler, s).velocity), None


@register("solver", "ddim")
@dataclass(frozen=True)
class DDIM(_OneStep):
    """alpha x0 + sigma eps at the next time (Song et al. 2020 equation 12).

    eta = 0 is deterministic; eta = 1 adds as much noise as DDPM with the posterior variance.
    """

    needs: ClassVar[tuple[str, ...]] = ("x0", "eps")
    eta: float = 0.0

    def step(self, denoise: Denoise, x: Tensor, t: float, s: float, state: None, rng: Draw) -> tuple[Tensor, None]:
        prediction = denoise(x, t)
        alpha, sigma = (float(c) for c in prediction.path(s))
        variance = self.eta**2 * float(posterior(prediction.path, t, s).variance) if self.eta and s > 0 else 0.0
        x = alpha * prediction.x0 + max(sigma**2 - variance, 0.0) ** 0.5 * prediction.eps
        if variance:
            x = x + variance**0.5 * rng("solver", "normal", x.shape[1:]).to(x)
        return x, None


@register("solver", "ddpm")
@dataclass(frozen=True)
class Ancestral(_OneStep):
    """DDPM's ancestral step: a draw from p(x_s | x_t) (Ho et al. 2020 algorithm 2); the last step takes the mean.

    variance: "learned" (the network's second half, DiT), "posterior" (the lower bound) or "beta" (the upper bound).
    """

    needs: ClassVar[tuple[str, ...]] = ("x0",)
    variance: str = "learned"

    def __post_init__(self) -> None:
        if self.variance not in ("learned", "posterior", "beta"):
            raise DitkitError(f"solver.variance is 'learned', 'posterior' or 'beta', not {self.variance!r}")

    def step(self, denoise: Denoise, x: Tensor, t: float, s: float, state: None, rng: Draw) -> tuple[Tensor, None]:
        prediction = denoise(x, t)
        q = posterior(prediction.path, t, s)
        mean = float(q.of_x) * x + float(q.of_x0) * prediction.x0
        if s == 0:
            return mean, None
        return mean + self._std(prediction, q) * rng("solver", "normal", x.shape[1:]).to(x), None

    def _std(self, prediction: Prediction, q: Any) -> float | Tensor:
        if self.variance != "learned":
            return float(q.variance if self.variance == "posterior" else q.beta) ** 0.5
        if prediction.extra is None:
            raise DitkitError("the network predicts no variance: set solver.variance to 'posterior' or 'beta'")
        low, high = float(q.variance.log()), float(q.beta.log())
        return torch.exp(0.5 * learned_log_variance(prediction.extra, low, high))


def check_grid(denoiser: Startable, solver: Solver, times: Sequence[float], name: str = "this grid") -> None:
    """Raises DitkitError for a grid that does not decrease, or at which the solver cannot read the prediction.

    name: of the grid, for the message.
    """
    if len(times) < 2 or any(s >= t for t, s in pairwise(times)):
        raise DitkitError(f"a grid is at least two decreasing times, and {name} gives {times}")
    visited = times[:-1] if solver.nfe == 1 or times[-1] == 0 else times
    denoiser.check(visited, solver.needs, name)


def integrate(
    denoiser: Startable,
    solver: Solver,
    times: Sequence[float],
    x: Tensor,
    cond: Conditioning,
    rng: Draw,
    progress: Callable[[int, Tensor], None] | None = None,
) -> Tensor:
    """Sample: x at times[0] to x at times[-1]. `rng.at(k)` is the randomness of the k-th step.

    `progress(k, x)` is called after each step. Raises DitkitError before the first step for a grid that does not
    decrease or visits a time at which the prediction cannot be read.
    """
    check_grid(denoiser, solver, times)
    denoise = denoiser.start(cond, x.shape, times)
    state = solver.init(x)
    for k, (t, s) in enumerate(pairwise(times)):
        x, state = solver.step(denoise, x, t, s, state, rng.at(k))
        if progress is not None:
            progress(k, x)
    return x
