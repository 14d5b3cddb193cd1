"""Solvers that add noise: DPM-Solver++(2M) SDE, EDM's stochastic Heun, and SiT's Euler-Maruyama."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from ...config import DitkitError, near, register
from ...rng import Draw
from ..denoiser import Denoise
from ..path import Path
from .exponential import Exponential, Point, middle, moment, usable
from .multistep import Memory
from .solver import Once

__all__ = ["DPMpp2MSDE", "EDMStochasticHeun", "SiTSDE"]


@register("solver", "dpmpp_2m_sde")
@dataclass(frozen=True)
class DPMpp2MSDE(Exponential):
    """DPM-Solver++(2M) on the reverse SDE (Lu et al. 2022 section 5; k-diffusion's dpmpp_2m_sde with "midpoint").

    eta scales the SDE's noise: 0 is dpmpp_2m, 1 the reverse SDE itself (diffusers' sde-dpmsolver++). The order is that
    at eta = 0; with noise it is found in the variance of the samples of a Gaussian. lower_order_final: as in dpmpp_2m.
    """

    order: ClassVar[int] = 2
    needs: ClassVar[tuple[str, ...]] = ("x0",)
    eta: float = 1.0
    lower_order_final: bool = False

    def __post_init__(self) -> None:
        if not self.eta >= 0:
            raise DitkitError(f"solver.eta must not be negative, it is {self.eta}")

    def step(self, denoise: Denoise, x: Tensor, t: float, s: float, state: Memory, rng: Draw) -> tuple[Tensor, Memory]:
        prediction = denoise(x, t)
        here, there = Point.of(prediction.path, t), Point.of(prediction.path, s)
        h = there.half_log_snr - here.half_log_snr
        state = state.add(here.half_log_snr, prediction.x0, keep=2)
        x0 = middle(usable(state, h, self.lower_order_final), h)
        forgotten = self.eta * h if self.eta else 0.0  # 0 times an infinite h is 0
        x = there.sigma / here.sigma * math.exp(-forgotten) * x + there.alpha * moment(h + forgotten, 0) * x0
        std = there.sigma * math.sqrt(-math.expm1(-2 * forgotten))
        if std > 0:
            x = x + std * rng("solver", "normal", x.shape[1:]).to(x)
        return x, state


@dataclass(frozen=True)
class Churn:
    """The number of steps over which S_churn is spread, and the path as soon as a prediction has told it."""

    steps: int = 0
    path: Path | None = None


@register("solver", "edm_stochastic_heun")
@dataclass(frozen=True)
class EDMStochasticHeun(Once):
    """EDM's sampler (Karras et al. 2022 algorithm 2), on any path in the frame x / alpha, where sigma / alpha is EDM's
    sigma: noise is added up to (1 + gamma) sigma, gamma = min(S_churn / steps, sqrt(2) - 1), from which Heun's step
    leads to the next sigma; the step to sigma = 0 is Euler's, and so is one from alpha = 0, exact for a constant x0.

    Noise is added where S_tmin <= sigma <= S_tmax (None = no upper end), S_noise times as much as the level says. There
    is none at the path's end, beyond which no time is noisier; on a table the raised level is that of the nearest
    entry, as EDM rounds it.
    The order is that at S_churn = 0; below the limit of sqrt(2) - 1 it is found in the variance of the samples of a
    Gaussian, too. A grid that begins below t = 1 with churn costs one evaluation more.
    """

    order: ClassVar[int] = 2
    nfe: ClassVar[int] = 2
    needs: ClassVar[tuple[str, ...]] = ("x0", "eps")
    S_churn: float = 0.0
    S_tmin: float = 0.0
    S_tmax: float | None = None
    S_noise: float = 1.0

    def __post_init__(self) -> None:
        if not (self.S_churn >= 0 and self.S_noise >= 0 and 0 <= self.S_tmin <= self._highest):
            raise DitkitError(
                "solver.S_churn and solver.S_noise must not be negative, and 0 <= S_tmin <= S_tmax; they are "
                f"{self.S_churn}, {self.S_noise}, {self.S_tmin}, {self.S_tmax}"
            )

    def visits(self, t: float, s: float) -> tuple[float, ...]:
        return (t,) if s == 0 else (t, s)

    def init(self, x: Tensor, times: Sequence[float] = ()) -> Churn:
        if self.S_churn and len(times) < 2:
            raise DitkitError("edm_stochastic_heun spreads S_churn over the steps: start it with init(x, times)")
        return Churn(len(times) - 1)

    def step(self, denoise: Denoise, x: Tensor, t: float, s: float, state: Churn, rng: Draw) -> tuple[Tensor, Churn]:
        prediction = None
        if state.path is None:
            prediction = denoise(x, t)
            state = replace(state, path=prediction.path)
        path: Path = state.path  # type: ignore[assignment]
        here, there = Point.of(path, t), Point.of(path, s)
        raised = self._raised(path, here, state.steps)
        if raised.t > t:
            noise = self.S_noise * rng("solver", "normal", x.shape[1:]).to(x)
            added = (raised.sigma / raised.alpha) ** 2 - (here.sigma / here.alpha) ** 2
            x = raised.alpha * (x / here.alpha + math.sqrt(added) * noise)
            prediction = None
        if prediction is None:
            prediction = denoise(x, raised.t)
        if raised.alpha == 0 or there.sigma == 0:
            return there.alpha * prediction.x0 + there.sigma * prediction.eps, state
        step = there.sigma / there.alpha - raised.sigma / raised.alpha
        euler = there.alpha * (x / raised.alpha + step * prediction.eps)
        slope = 0.5 * (prediction.eps + denoise(euler, s).eps)
        return there.alpha * (x / raised.alpha + step * slope), state

    @property
    def _highest(self) -> float:
        return math.inf if self.S_tmax is None else self.S_tmax

    def _raised(self, path: Path, here: Point, steps: int) -> Point:
        """The point at (1 + gamma) sigma."""
        if self.S_churn == 0 or here.t == 1 or not self.S_tmin <= here.sigma / here.alpha <= self._highest:
            return here
        gamma = min(self.S_churn / steps, math.sqrt(2) - 1)
        return Point.of(path, float(path.time(2 * (here.half_log_snr - math.log1p(gamma)))))


FORMS = ("constant", "SBDM", "sigma", "linear", "decreasing", "increasing-decreasing")
LAST_STEPS = ("Mean", "Tweedie", "Euler", None)


@register("solver", "sit_sde")
@dataclass(frozen=True)
class SiTSDE(Once):
    """Euler-Maruyama on SiT's reverse SDE (Ma et al. 2024, arXiv 2401.08740, equation 10): each step adds w score to
    the velocity and sqrt(2 w) noise, which leaves the law of the samples as it is, whatever w is.

    diffusion: w as a function of time, times `norm`, as SiT's code names it: constant: 1; SBDM: the diffusion of the
    path's own forward process, sigma^2 d/dt log(sigma / alpha), infinite where alpha = 0; sigma: sigma; linear: t;
    decreasing: (1 - norm cos(pi t))^2 / 4; increasing-decreasing: sin^2(pi t).
    last_step: how the step that reaches the data differs from the others: "Mean" adds no noise, "Tweedie" takes the
    predicted x0, "Euler" follows the velocity alone, None is as the others. SiT's last step is from t = 0.04.
    The order is that of the law of the samples (weak).
    """

    order: ClassVar[int] = 1
    needs: ClassVar[tuple[str, ...]] = ("velocity", "score")
    diffusion: str = "SBDM"
    norm: float = 1.0
    last_step: str | None = "Mean"

    def __post_init__(self) -> None:
        if self.diffusion not in FORMS:
            raise DitkitError(f"unknown solver.diffusion {self.diffusion!r}: {near(self.diffusion, FORMS)}")
        if self.last_step not in LAST_STEPS:
            raise DitkitError(f"solver.last_step is 'Mean', 'Tweedie', 'Euler' or None, not {self.last_step!r}")
        if not self.norm >= 0:
            raise DitkitError(f"solver.norm must not be negative, it is {self.norm}")

    def step(self, denoise: Denoise, x: Tensor, t: float, s: float, state: None, rng: Draw) -> tuple[Tensor, None]:
        prediction = denoise(x, t)
        last = self.last_step if s == 0 else None
        if last == "Tweedie":
            return prediction.x0, None
        h = s - t
        if last == "Euler":
            return x + h * prediction.velocity, None
        w = self._diffusion(prediction.path, t)
        x = x + h * (prediction.velocity - w * prediction.score)
        if last == "Mean":
            return x, None
        return x + math.sqrt(2 * w * -h) * rng("solver", "normal", x.shape[1:]).to(x), None

    def _diffusion(self, path: Path, t: float) -> float:
        """w(t)."""
        here = Point.of(path, t)
        if self.diffusion == "SBDM":
            if here.alpha == 0:
                raise DitkitError(
                    f"the diffusion 'SBDM' is infinite at t = {t:g}, where alpha = 0: start the grid later (SiT's at "
                    "t = 0.999), or choose another solver.diffusion"
                )
            alpha_rate, sigma_rate = (float(c) for c in path.rate(t))
            return self.norm * (here.sigma * sigma_rate - alpha_rate / here.alpha * here.sigma**2)
        if self.diffusion == "decreasing":
            return 0.25 * (1 - self.norm * math.cos(math.pi * t)) ** 2
        if self.diffusion == "increasing-decreasing":
            return self.norm * math.sin(math.pi * t) ** 2
        return self.norm * {"constant": 1.0, "sigma": here.sigma, "linear": t}[self.diffusion]
