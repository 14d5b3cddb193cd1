"""Objectives: everything that defines the training loss, given a denoiser."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from ..conditioning import Conditioning
from ..config import DitkitError, register
from ..rng import Draw, Law
from .denoiser import Denoiser, Prediction, over
from .path import DDPM, Path
from .posterior import gaussian_kl, learned_log_variance, posterior, quantised_nll
from .space import check_space

__all__ = ["Discrete", "LogitNormal", "Loss", "MinSNR", "Objective", "Regression", "TimeSampler", "Uniform"]


@runtime_checkable
class TimeSampler(Law, Protocol):
    """A law for t; `ends` are the ends of time that it comes so near that a singular gain has infinite variance."""

    @property
    def ends(self) -> tuple[float, ...]: ...


@register("times", "uniform")
@dataclass(frozen=True)
class Uniform:
    """t uniform on (0, 1)."""

    @property
    def base(self) -> str:
        return "uniform"

    @property
    def ends(self) -> tuple[float, ...]:
        return (0.0, 1.0)

    def __call__(self, draws: Tensor) -> Tensor:
        return draws


@register("times", "logit_normal")
@dataclass(frozen=True)
class LogitNormal:
    """logit(t) ~ N(mean, std^2) (Esser et al. 2024 equation 19), in ditkit's time: a positive mean favours noise.

    JiT's mean -0.8 is written in a time that runs from noise to data, and is +0.8 here.
    """

    mean: float = 0.0
    std: float = 1.0

    @property
    def base(self) -> str:
        return "normal"

    @property
    def ends(self) -> tuple[float, ...]:
        return ()  # the density falls faster than any power of t: every gain keeps a finite variance

    def __call__(self, draws: Tensor) -> Tensor:
        return torch.sigmoid(self.mean + self.std * draws).float().double()  # see Law


@register("times", "discrete")
@dataclass(frozen=True)
class Discrete:
    """t uniform on the entries 1/steps .. 1 of a tabulated path (DDPM algorithm 1)."""

    steps: int = 1000

    @property
    def base(self) -> str:
        return "uniform"

    @property
    def ends(self) -> tuple[float, ...]:
        return (1.0,)

    def __call__(self, draws: Tensor) -> Tensor:
        return (torch.floor(draws * self.steps) + 1) / self.steps


@register("weighting", "min_snr")
@dataclass(frozen=True)
class MinSNR:
    """min(SNR, gamma) on the squared error of x0 (Hang et al. 2023, arXiv 2303.09556); needs the loss space x0."""

    gamma: float = 5.0

    def __call__(self, path: Path, t: Tensor) -> Tensor:
        alpha, sigma = path(t)
        return (alpha / sigma).square().clamp(max=self.gamma)


@dataclass(frozen=True)
class Loss:
    """Named terms of the loss, each one number per sample, and the times they were taken at."""

    terms: Mapping[str, Float[Tensor, "b"]]
    t: Float[Tensor, "b"]

    @property
    def total(self) -> Float[Tensor, "b"]:
        """The sum of the terms."""
        return torch.stack(tuple(self.terms.values())).sum(0)


@runtime_checkable
class Objective(Protocol):
    """What the training loop minimises."""

    def loss(self, denoiser: Denoiser, x0: Tensor, cond: Conditioning, rng: Draw) -> Loss: ...

    def check(self, denoiser: Denoiser) -> None:
        """Raises DitkitError for a combination that cannot work, before training starts."""
        ...


@register("objective", "regression")
@dataclass(frozen=True)
class Regression:
    """Mean squared error of the prediction, measured in `loss_space`.

    An error in another space is the same error times the gain, so a loss space is a weight. `weighting` multiplies
    further. With `variance="hybrid"` a bound on the likelihood in bits per dimension, which trains the learned variance
    only, is added as the term "vb" (Improved DDPM equation 16 with weight 1, as DiT's code has it).
    """

    loss_space: str = "velocity"
    times: Any = Uniform()
    weighting: Any = None
    variance: str | None = None

    def __post_init__(self) -> None:
        check_space(self.loss_space)
        if self.variance not in (None, "hybrid"):
            raise DitkitError(f"objective.variance is None or 'hybrid', not {self.variance!r}")

    def check(self, denoiser: Denoiser) -> None:
        if isinstance(self.weighting, MinSNR) and self.loss_space != "x0":
            raise DitkitError("the weighting min_snr is defined on the error of x0: set objective.loss_space to x0")
        denoiser.check(self.times.ends, (self.loss_space,))
        if isinstance(denoiser.path, DDPM) and self.times != Discrete(denoiser.path.steps):
            raise DitkitError(
                f"a DDPM path of {denoiser.path.steps} steps needs the time sampler discrete with as many steps, "
                f"not {self.times}"
            )
        if self.variance and not isinstance(denoiser.path, DDPM):
            raise DitkitError("objective.variance = 'hybrid' needs a DDPM path")

    def loss(self, denoiser: Denoiser, x0: Float[Tensor, "b c *space"], cond: Conditioning, rng: Draw) -> Loss:
        """Draws "t" and "noise". Raises DitkitError if the variance is to be trained and the network has none."""
        t = rng("t", self.times).double().cpu()
        eps = rng("noise", "normal", x0.shape[1:]).to(x0.device, x0.dtype)
        alpha, sigma = denoiser.path(t)
        x = over(alpha, x0) * x0 + over(sigma, eps) * eps
        prediction = denoiser(x, t, cond)
        error = (prediction.out - prediction.target(x0, eps)).square().flatten(1).mean(1)
        weight = prediction.gain(self.loss_space).square()
        if self.weighting is not None:
            weight = weight * self.weighting(denoiser.path, t)
        terms = {"mse": error * weight.to(error.device, error.dtype)}
        if self.variance == "hybrid":
            terms["vb"] = self._bound(prediction, x0, denoiser.path)
        return Loss(terms, t)

    def _bound(self, prediction: Prediction, x0: Tensor, path: Path) -> Float[Tensor, "b"]:
        """Variational bound of one step in bits per dimension; the mean is detached, only the variance learns."""
        if not isinstance(path, DDPM):
            raise DitkitError("objective.variance = 'hybrid' needs a DDPM path")
        if prediction.extra is None:
            raise DitkitError("objective.variance = 'hybrid' needs a network that predicts it: model.learn_sigma=True")
        t, step = prediction.t, 1 / path.steps
        q = posterior(path, t, (t - step).clamp(min=0))  # a time rounded to float32 may lie below its entry
        # the last step has variance 0; its logarithm is cut to that of the step before
        floor = posterior(path, 2 * step, step).variance
        low = torch.where(q.variance > 0, q.variance, floor).log()
        x, log_low = prediction.x, over(low, x0)
        log_variance = learned_log_variance(prediction.extra, log_low, over(q.beta.log(), x0))
        of_x, of_x0 = over(q.of_x, x0), over(q.of_x0, x0)
        mean = of_x * x + of_x0 * prediction.x0.detach()
        kl = gaussian_kl(of_x * x + of_x0 * x0, log_low, mean, log_variance)
        nll = quantised_nll(x0, mean, 0.5 * log_variance)
        last = (path.index(t) == 0).to(x0.device)
        nats = torch.where(last, nll.flatten(1).mean(1), kl.flatten(1).mean(1))
        return nats / math.log(2)
