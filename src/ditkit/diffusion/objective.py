"""Objectives: everything that defines the training loss, given a denoiser."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ..conditioning import Conditioning
from ..config import DitkitError, register, registered_as
from ..rng import Draw, Law, Rng
from .denoiser import Denoiser, Prediction, over
from .path import DDPM, Path, log_snr
from .posterior import gaussian_kl, learned_log_variance, posterior, quantised_nll
from .space import check_space, infinite_ends, reading, row, singular_ends

__all__ = [
    "P2",
    "Cosmap",
    "Discrete",
    "Likelihood",
    "LogNormal",
    "LogVariance",
    "LogitNormal",
    "Loss",
    "MinSNR",
    "Mode",
    "Objective",
    "Regression",
    "TimeSampler",
    "Uniform",
    "Weighting",
]


@runtime_checkable
class TimeSampler(Protocol):
    """A law for t; `ends` are the ends of time that it comes so near that a singular gain has infinite variance.

    `atoms` are those that are drawn themselves.
    """

    @property
    def ends(self) -> tuple[float, ...]: ...

    @property
    def atoms(self) -> tuple[float, ...]: ...

    def on(self, path: Path) -> Law:
        """The law of t on a path, which is the same on all paths unless it is a law of the noise level."""
        ...


_BELOW_ONE = 1 - 2**-24
"""The last float32 before 1."""


class _OfTime:
    """A time sampler that is a law of t itself; without atoms, unless it says so."""

    @property
    def base(self) -> str:
        return "uniform"

    @property
    def ends(self) -> tuple[float, ...]:
        return (0.0, 1.0)

    @property
    def atoms(self) -> tuple[float, ...]:
        return ()

    def on(self, path: Path) -> Any:
        return self


@register("times", "uniform")
@dataclass(frozen=True)
class Uniform(_OfTime):
    """t uniform on (low, high). SiT trains a VP path from low = 1e-5 on, and others, unless velocities, inside 1e-3."""

    low: float = 0.0
    high: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.low < self.high <= 1:
            raise DitkitError(f"times.low and times.high are 0 <= low < high <= 1, not {self.low} and {self.high}")

    @property
    def ends(self) -> tuple[float, ...]:
        return tuple(end for end in (self.low, self.high) if end in (0.0, 1.0))

    def __call__(self, draws: Tensor) -> Tensor:
        return self.low + (self.high - self.low) * draws


@register("times", "logit_normal")
@dataclass(frozen=True)
class LogitNormal(_OfTime):
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
        return ()  # the density falls faster than any power of t: gains keep a finite variance

    def __call__(self, draws: Tensor) -> Tensor:
        return torch.sigmoid(self.mean + self.std * draws).clamp(max=_BELOW_ONE).float().double()  # see Law


@register("times", "mode")
@dataclass(frozen=True)
class Mode(_OfTime):
    """t = 1 - u - scale (cos^2(pi u / 2) - 1 + u), u uniform (Esser et al. 2024 equation 20): more of the middle.

    scale: 0 is uniform; up to 2 / (pi - 2) = 1.75. SD3's comparison has 1.29 as its best.
    """

    scale: float = 1.29

    def __post_init__(self) -> None:
        if not -1 <= self.scale <= 2 / (math.pi - 2):
            raise DitkitError(f"times.scale lies in [-1, {2 / (math.pi - 2):.4f}], or t would turn back: {self.scale}")

    def __call__(self, draws: Tensor) -> Tensor:
        t = 1 - draws - self.scale * (torch.cos(math.pi / 2 * draws).square() - 1 + draws)
        return t.clamp(2**-32, _BELOW_ONE).float().double()


@register("times", "cosmap")
@dataclass(frozen=True)
class Cosmap(_OfTime):
    """t = 1 - 1 / (tan(pi u / 2) + 1), u uniform (Esser et al. 2024 equation 21): the log-SNR of a cosine schedule."""

    def __call__(self, draws: Tensor) -> Tensor:
        return (1 - 1 / (torch.tan(math.pi / 2 * draws) + 1)).clamp(max=_BELOW_ONE).float().double()


@register("times", "discrete")
@dataclass(frozen=True)
class Discrete(_OfTime):
    """t uniform on the entries 1/steps .. 1 of a tabulated path (DDPM algorithm 1)."""

    steps: int = 1000

    @property
    def ends(self) -> tuple[float, ...]:
        return (1.0,)

    @property
    def atoms(self) -> tuple[float, ...]:
        return (1.0,)

    def __call__(self, draws: Tensor) -> Tensor:
        return (torch.floor(draws * self.steps) + 1) / self.steps


@register("times", "log_normal")
@dataclass(frozen=True)
class LogNormal:
    """log(sigma / alpha) ~ N(mean, std^2): EDM's law of the noise level (Karras et al. 2022 table 1), on any path.

    EDM has -1.2 and 1.2; EDM2 has -0.4 and 1.0 for latents. Levels beyond the end of the path are taken at its end: on
    the VE path up to 80 that is one draw in 600,000 of EDM's.
    """

    mean: float = -1.2
    std: float = 1.2

    @property
    def ends(self) -> tuple[float, ...]:
        return ()

    @property
    def atoms(self) -> tuple[float, ...]:
        return ()  # the end of a path that has one: no noise level is infinite there

    def on(self, path: Path) -> Law:
        return _NoiseLevel(self, path)


@dataclass(frozen=True)
class _NoiseLevel:
    """The law of t that a law of the noise level is on a path."""

    of: LogNormal
    path: Path
    base: str = "normal"

    def __call__(self, draws: Tensor) -> Tensor:
        return self.path.time(-2 * (self.of.mean + self.of.std * draws)).float().double().clamp(max=1)


@runtime_checkable
class Weighting(Protocol):
    """A factor of the squared error in `space`, as a function of time."""

    space: ClassVar[str]

    def infinite(self, path: Path, /) -> tuple[float, ...]:
        """The ends of time at which it is infinite."""
        ...

    def __call__(self, path: Path, t: Tensor) -> Float[Tensor, "b"]: ...


@register("weighting", "min_snr")
@dataclass(frozen=True)
class MinSNR:
    """min(SNR, gamma) on the squared error of x0 (Hang et al. 2023, arXiv 2303.09556)."""

    gamma: float = 5.0

    space: ClassVar[str] = "x0"

    def __post_init__(self) -> None:
        if not self.gamma > 0:
            raise DitkitError(f"weighting.gamma must be above 0, not {self.gamma}")

    def infinite(self, path: Path) -> tuple[float, ...]:
        return ()

    def __call__(self, path: Path, t: Tensor) -> Tensor:
        alpha, sigma = path(t)
        return (alpha / sigma).square().clamp(max=self.gamma)


@register("weighting", "p2")
@dataclass(frozen=True)
class P2:
    """1 / (k + SNR)^gamma on the squared error of eps (Choi et al. 2022, arXiv 2204.00227 equation 8)."""

    gamma: float = 1.0
    k: float = 1.0

    space: ClassVar[str] = "eps"

    def __post_init__(self) -> None:
        if not (self.gamma >= 0 and self.k > 0):
            raise DitkitError(
                f"weighting.gamma must not be negative and weighting.k above 0, not {self.gamma}, {self.k}"
            )

    def infinite(self, path: Path) -> tuple[float, ...]:
        return ()

    def __call__(self, path: Path, t: Tensor) -> Tensor:
        alpha, sigma = path(t)
        return (self.k + (alpha / sigma).square()) ** -self.gamma


@register("weighting", "likelihood")
@dataclass(frozen=True)
class Likelihood:
    """SiT's "likelihood" weighting, on the squared error of eps: the gain from eps to velocity over sigma.

    With that gain itself, squared, it would be SiT's "velocity" weighting, which is the loss space velocity.
    """

    space: ClassVar[str] = "eps"

    def infinite(self, path: Path) -> tuple[float, ...]:
        row("velocity", path, 1.0)  # no table has rates
        return (0.0, *(end for end in singular_ends("eps", path) if end))

    def __call__(self, path: Path, t: Tensor) -> Tensor:
        return reading("eps", "velocity", path, t)[1].abs() / path(t)[1]


@register("weighting", "log_variance")
@dataclass(frozen=True)
class LogVariance:
    """A learned uncertainty u of the noise level: error / e^u + u (Kendall & Gal 2017; EDM2, Karras et al. 2024).

    u is linear in random Fourier features of log(sigma / alpha) / 4 and starts at 0; levels beyond a log-SNR of 40 on
    either side count as there. It evens out the loss over the noise levels; it is trained beside the network and never
    exported.
    """

    features: int = 128

    def __post_init__(self) -> None:
        if self.features < 1:
            raise DitkitError(f"weighting.features must be at least 1, not {self.features}")


@dataclass(frozen=True)
class Loss:
    """Named terms of the loss, each one number per sample, and the times they were taken at."""

    terms: Mapping[str, Float[Tensor, "b"]]
    t: Float[Tensor, "b"]
    watched: Mapping[str, Float[Tensor, "b"]] = field(default_factory=dict)
    """Numbers for the log that are no part of the loss."""

    @property
    def total(self) -> Float[Tensor, "b"]:
        """The sum of the terms."""
        return torch.stack(tuple(self.terms.values())).sum(0)


@runtime_checkable
class Objective(Protocol):
    """What the training loop minimises."""

    def loss(self, denoiser: Denoiser, x0: Tensor, cond: Conditioning, rng: Draw, data: Tensor | None = None) -> Loss:
        """data: the batch as it was before the codec, for terms that look at it."""
        ...

    def check(self, denoiser: Denoiser) -> None:
        """Raises DitkitError for a combination that cannot work, before training starts."""
        ...

    def learn(self, denoiser: Denoiser, rng: Rng) -> Objective:
        """The objective that training uses: an nn.Module where it has parameters of its own, or else itself.

        The parameters are trained beside the network's and stored with the run, never exported.
        """
        ...


@register("objective", "regression")
@dataclass(frozen=True)
class Regression:
    """Mean squared error of the prediction, measured in `loss_space`.

    An error in another space is the same error times the gain, so a loss space is a weight. `weighting` multiplies
    further. With `variance="hybrid"` a bound on the likelihood in bits per dimension, which trains the learned variance
    only, is added as the term "vb" (Improved DDPM equation 16 with weight 1, as DiT's code has it). `direction` is the
    factor of a further term, 1 - cos of the angle between output and target, over the channels of each place
    (LightningDiT has 1).
    """

    loss_space: str = "velocity"
    times: Any = Uniform()
    weighting: Any = None
    variance: str | None = None
    direction: float = 0.0

    def __post_init__(self) -> None:
        check_space(self.loss_space)
        if self.variance not in (None, "hybrid"):
            raise DitkitError(f"objective.variance is None or 'hybrid', not {self.variance!r}")
        if not self.direction >= 0:
            raise DitkitError(f"objective.direction must not be negative, it is {self.direction}")

    def check(self, denoiser: Denoiser) -> None:
        if isinstance(self.weighting, Weighting) and self.loss_space.removeprefix("-") != self.weighting.space:
            name, space = registered_as(self.weighting)[1], self.weighting.space
            raise DitkitError(
                f"the weighting {name} is defined on the error of {space}: set objective.loss_space to {space}"
            )
        sampler = f"the time sampler {registered_as(self.times)[1]!r}"
        denoiser.check((), (self.loss_space,))  # that it has such a space at all
        denoiser.check_readings(self.times.ends, (self.loss_space,), sampler)
        infinite = () if denoiser.t_eps else infinite_ends(self.loss_space, denoiser.path)
        for end in sorted({*infinite} & {*self.times.ends}):
            raise DitkitError(
                f"a loss in {self.loss_space} is infinite at t = {end:g}, which {sampler} visits: set denoiser.t_eps "
                "above 0, or choose another loss space or time sampler"
            )
        if isinstance(self.weighting, Weighting):
            for end in sorted({*self.weighting.infinite(denoiser.path)} & {*self.times.ends}):
                raise DitkitError(
                    f"the weighting {registered_as(self.weighting)[1]} is infinite at t = {end:g}, which {sampler} "
                    "visits: choose one that stays inside, such as uniform with a times.low and times.high"
                )
        if isinstance(denoiser.path, DDPM) and self.times != Discrete(denoiser.path.steps):
            raise DitkitError(
                f"a DDPM path of {denoiser.path.steps} steps needs the time sampler discrete with as many steps, "
                f"not {self.times}"
            )
        if self.variance:
            if not isinstance(denoiser.path, DDPM):
                raise DitkitError("objective.variance = 'hybrid' needs a DDPM path")
            denoiser.check_readings(self.times.ends, ("x0",), sampler)
        denoiser.check_clock(self.times.atoms)

    def learn(self, denoiser: Denoiser, rng: Rng) -> Objective:
        if not isinstance(self.weighting, LogVariance):
            return self
        return _Uncertain(self, self.weighting.features, rng)

    def loss(
        self,
        denoiser: Denoiser,
        x0: Float[Tensor, "b c *space"],
        cond: Conditioning,
        rng: Draw,
        data: Tensor | None = None,
    ) -> Loss:
        """Draws "t" and "noise". Raises DitkitError if the variance is to be trained and the network has none."""
        if isinstance(self.weighting, LogVariance):
            raise DitkitError("the weighting log_variance learns: take the loss of objective.learn(denoiser, rng)")
        t = rng("t", self.times.on(denoiser.path)).double().cpu()
        eps = rng("noise", "normal", x0.shape[1:]).to(x0.device, x0.dtype)
        alpha, sigma = denoiser.path(t)
        x = over(alpha, x0) * x0 + over(sigma, eps) * eps
        prediction = denoiser(x, t, cond)
        target = prediction.target(x0, eps)
        error = (prediction.out - target).square().flatten(1).mean(1)
        weight = prediction.gain(self.loss_space).square()
        if isinstance(self.weighting, Weighting):
            weight = weight * self.weighting(denoiser.path, t)
        terms = {"mse": error * weight.to(error.device, error.dtype)}
        if self.variance == "hybrid":
            terms["vb"] = self._bound(prediction, x0, denoiser.path)
        if self.direction:
            cosine = F.cosine_similarity(prediction.out.float(), target.float(), dim=1)
            terms["direction"] = self.direction * (1 - cosine).reshape(len(cosine), -1).mean(1)
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


class _Uncertain(nn.Module):
    """A regression whose squared error is divided by a learned variance of its noise level."""

    frequencies: Tensor
    phases: Tensor

    def __init__(self, regression: Regression, features: int, rng: Rng):
        super().__init__()
        self.regression = replace(regression, weighting=None)
        generator = rng.generator("log_variance")
        self.register_buffer("frequencies", torch.randn(features, generator=generator))
        self.register_buffer("phases", torch.rand(features, generator=generator))
        self.weight = nn.Parameter(torch.zeros(features))

    def check(self, denoiser: Denoiser) -> None:
        self.regression.check(denoiser)

    def learn(self, denoiser: Denoiser, rng: Rng) -> Objective:
        return self

    def log_variance(self, path: Path, t: Tensor) -> Float[Tensor, "b"]:
        """u at time t."""
        level = (-log_snr(path, t).clamp(-40, 40) / 8).to(self.weight.device, self.weight.dtype)
        waves = torch.cos(2 * math.pi * (level[:, None] * self.frequencies + self.phases))
        return math.sqrt(2) * waves @ self.weight / len(self.weight) ** 0.5

    def loss(self, denoiser: Denoiser, x0: Tensor, cond: Conditioning, rng: Draw, data: Tensor | None = None) -> Loss:
        plain = self.regression.loss(denoiser, x0, cond, rng, data)
        u = self.log_variance(denoiser.path, plain.t)
        terms = {**plain.terms, "mse": plain.terms["mse"] / u.exp() + u}
        return Loss(terms, plain.t, {"error": plain.terms["mse"], "log_variance": u})
