"""Solvers without memory: Runge-Kutta methods on the velocity, DDIM, and DDPM's ancestral step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...config import DitkitError, register
from ...rng import Draw
from ..denoiser import Denoise, Prediction
from ..posterior import learned_log_variance, posterior
from .solver import Once

__all__ = ["DDIM", "RK4", "Ancestral", "Euler", "Heun", "Midpoint"]


@register("solver", "euler")
@dataclass(frozen=True)
class Euler(Once):
    """x + (s - t) velocity."""

    needs: ClassVar[tuple[str, ...]] = ("velocity",)

    def step(self, denoise: Denoise, x: Tensor, t: float, s: float, state: None, rng: Draw) -> tuple[Tensor, None]:
        return x + (s - t) * denoise(x, t).velocity, None


@register("solver", "heun")
@dataclass(frozen=True)
class Heun(Once):
    """Euler's step corrected by the velocity at its end; the step that reaches the data is plain Euler (EDM, JiT)."""

    needs: ClassVar[tuple[str, ...]] = ("velocity",)
    order: ClassVar[int] = 2
    nfe: ClassVar[int] = 2

    def visits(self, t: float, s: float) -> tuple[float, ...]:
        return (t,) if s == 0 else (t, s)

    def step(self, denoise: Denoise, x: Tensor, t: float, s: float, state: None, rng: Draw) -> tuple[Tensor, None]:
        velocity = denoise(x, t).velocity
        euler = x + (s - t) * velocity
        if s == 0:
            return euler, None
        return x + (s - t) * 0.5 * (velocity + denoise(euler, s).velocity), None


@register("solver", "midpoint")
@dataclass(frozen=True)
class Midpoint(Once):
    """The velocity at the middle of the step, where half of Euler's step leads."""

    needs: ClassVar[tuple[str, ...]] = ("velocity",)
    order: ClassVar[int] = 2
    nfe: ClassVar[int] = 2

    def visits(self, t: float, s: float) -> tuple[float, ...]:
        return (t, (t + s) / 2)

    def step(self, denoise: Denoise, x: Tensor, t: float, s: float, state: None, rng: Draw) -> tuple[Tensor, None]:
        start, middle = self.visits(t, s)
        half = x + (middle - t) * denoise(x, start).velocity
        return x + (s - t) * denoise(half, middle).velocity, None


@register("solver", "rk4")
@dataclass(frozen=True)
class RK4(Once):
    """Kutta's 3/8 rule (Kutta 1901), which torchdiffeq, and so SiT, calls rk4. It reads the velocity at t = 0, too."""

    needs: ClassVar[tuple[str, ...]] = ("velocity",)
    order: ClassVar[int] = 4
    nfe: ClassVar[int] = 4

    def visits(self, t: float, s: float) -> tuple[float, ...]:
        return (t, t + (s - t) / 3, t + (s - t) * 2 / 3, s)

    def step(self, denoise: Denoise, x: Tensor, t: float, s: float, state: None, rng: Draw) -> tuple[Tensor, None]:
        h = s - t
        t1, t2, t3, t4 = self.visits(t, s)
        k1 = denoise(x, t1).velocity
        k2 = denoise(x + h / 3 * k1, t2).velocity
        k3 = denoise(x + h * (k2 - k1 / 3), t3).velocity
        k4 = denoise(x + h * (k1 - k2 + k3), t4).velocity
        return x + h / 8 * (k1 + 3 * (k2 + k3) + k4), None


@register("solver", "ddim")
@dataclass(frozen=True)
class DDIM(Once):
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
class Ancestral(Once):
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
            raise DitkitError(
                "the network predicts no variance, or a guide holds x still and asks none: set solver.variance to "
                "'posterior' or 'beta'"
            )
        low, high = float(q.variance.log()), float(q.beta.log())
        return torch.exp(0.5 * learned_log_variance(prediction.extra, low, high))
