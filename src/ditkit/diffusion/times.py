"""Time samplers: at which times training looks."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from ..config import DitkitError, register
from ..rng import Law
from .path import Path

__all__ = ["Cosmap", "Discrete", "LogNormal", "LogitNormal", "Mode", "TimeSampler", "Uniform"]


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
