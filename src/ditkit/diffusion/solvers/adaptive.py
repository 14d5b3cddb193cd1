"""dopri5 on the velocity, and the likelihood of data under the same ODE. Needs the extra "ode" (torchdiffeq)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from ...conditioning import Conditioning
from ...config import DitkitError, register
from ...rng import Draw
from ..denoiser import Denoise, Startable
from .solver import Once

__all__ = ["Dopri5", "LogLikelihood", "Rademacher", "log_likelihood"]


def _odeint(function: Callable[[float, Any], Any], x: Any, t: float, s: float, rtol: float, atol: float) -> Any:
    """x at s, from x at t, by torchdiffeq's dopri5. A step ends at s, beyond which time may not go; the trial by which
    torchdiffeq finds its first step would, and is held there."""
    try:
        from torchdiffeq import odeint
    except ModuleNotFoundError:
        raise DitkitError("dopri5 needs torchdiffeq: pip install 'ditkit[ode]'") from None
    device = (x if isinstance(x, Tensor) else x[0]).device
    times = torch.tensor([t, s], dtype=torch.float64, device=device)

    def within(time: Tensor, x: Any) -> Any:
        return function(min(max(float(time), min(t, s)), max(t, s)), x)

    out = odeint(within, x, times, rtol=rtol, atol=atol, method="dopri5", options={"step_t": times[1:]})
    return out[-1] if isinstance(out, Tensor) else tuple(o[-1] for o in out)


@register("solver", "dopri5")
@dataclass(frozen=True)
class Dopri5(Once):
    """Dormand-Prince 5(4) on the velocity with torchdiffeq's step control, which keeps the error of a step under
    atol + rtol |x|; the defaults are SiT's.

    Each step of the grid starts it anew: one step to the data (steps = 1) is the cheapest. The control looks at the
    whole batch: unlike with all other solvers, a sample depends on its batch, within the tolerance. The velocity is
    read at both ends of the step.
    """

    order: ClassVar[int] = 5
    nfe: ClassVar[int] = 0
    needs: ClassVar[tuple[str, ...]] = ("velocity",)
    rtol: float = 1e-3
    atol: float = 1e-6

    def __post_init__(self) -> None:
        if not (self.rtol >= 0 and self.atol > 0):
            raise DitkitError(f"solver.rtol and solver.atol must be above 0, not {self.rtol} and {self.atol}")

    def visits(self, t: float, s: float) -> tuple[float, ...]:
        return (t, s)

    def step(self, denoise: Denoise, x: Tensor, t: float, s: float, state: None, rng: Draw) -> tuple[Tensor, None]:
        def velocity(time: float, x: Tensor) -> Tensor:
            return denoise(x, time).velocity

        return _odeint(velocity, x, t, s, self.rtol, self.atol), None


@dataclass(frozen=True)
class Rademacher:
    """-1 or 1 with equal probability: the law of the probes with the least variance (Hutchinson 1990)."""

    @property
    def base(self) -> str:
        return "uniform"

    def __call__(self, draws: Tensor) -> Tensor:
        return torch.where(draws < 0.5, -1.0, 1.0)


PROBES = {"rademacher": Rademacher(), "normal": "normal"}


@dataclass(frozen=True)
class LogLikelihood:
    """log p(x0) of each sample in nats, of x0 with `dimensions` numbers; nfe: evaluations of the network."""

    nats: Float[Tensor, "b"]
    dimensions: int
    nfe: int

    def bits_per_dim(self, bin_width: float = 1.0) -> Float[Tensor, "b"]:
        """-log2 p per dimension, of data that were measured in bins: 2 / 256 for bytes that became [-1, 1]."""
        return -self.nats / (self.dimensions * math.log(2)) - math.log2(bin_width)


def log_likelihood(
    denoiser: Startable,
    x0: Float[Tensor, "b c *space"],
    cond: Conditioning,
    rng: Draw,
    *,
    prior_std: float = 1.0,
    probes: int = 1,
    law: str = "rademacher",
    ends: tuple[float, float] = (0.0, 1.0),
    rtol: float = 1e-3,
    atol: float = 1e-6,
) -> LogLikelihood:
    """log p(x0) under the probability-flow ODE, from the instantaneous change of variables (Chen et al. 2018; Song et
    al. 2021 section 4.3; SiT): log p(x at ends[0]) = log N(x at ends[1]; 0, prior_std^2) + integral of div velocity.

    The divergence is Hutchinson's estimate v^T J v, unbiased in nats, with `probes` vectors v from `rng` (names
    "probe0", ...), "rademacher" or "normal", held fixed along the trajectory. dopri5 controls its steps by the whole
    batch. prior_std: `path.prior_std`; ends: where the ODE begins and ends (0 = data). Raises DitkitError where the
    velocity cannot be read.
    """
    if law not in PROBES:
        raise DitkitError(f"probes are 'rademacher' or 'normal', not {law!r}")
    low, high = ends
    if probes < 1 or not 0 <= low < high <= 1:
        raise DitkitError(f"a likelihood takes at least 1 probe and ends 0 <= low < high <= 1, not {probes} and {ends}")
    denoiser.check(ends, ("velocity",))
    denoise = denoiser.start(cond, x0.shape, (high, low))
    vectors = [rng(f"probe{i}", PROBES[law], x0.shape[1:]).to(x0) for i in range(probes)]
    count = 0

    def flow(time: float, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        nonlocal count
        count += 1
        with torch.enable_grad():
            x = state[0].detach().requires_grad_()
            velocity = denoise(x, time).velocity
            divergence = torch.zeros_like(state[1])
            for i, v in enumerate(vectors):
                (product,) = torch.autograd.grad(velocity, x, v, retain_graph=i + 1 < probes)
                divergence = divergence + (product * v).flatten(1).sum(1) / probes
        return velocity.detach(), divergence

    x, change = _odeint(flow, (x0, x0.new_zeros(len(x0))), low, high, rtol, atol)
    dimensions = math.prod(x0.shape[1:])
    prior = -0.5 * (x / prior_std).square().flatten(1).sum(1) - dimensions * math.log(
        prior_std * math.sqrt(2 * math.pi)
    )
    return LogLikelihood(prior + change, dimensions, count)
