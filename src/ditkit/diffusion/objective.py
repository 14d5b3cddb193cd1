"""Objectives: everything that defines the training loss, given a denoiser."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ..conditioning import Conditioning
from ..config import DitkitError, register, registered_as
from ..rng import Draw, Rng
from .denoiser import Denoiser, Prediction, over
from .path import DDPM, Path, log_snr
from .posterior import gaussian_kl, learned_log_variance, posterior, quantised_nll
from .space import check_space, infinite_ends
from .times import Discrete, Uniform
from .weighting import LogVariance, Weighting

__all__ = ["Loss", "Objective", "Regression"]


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
