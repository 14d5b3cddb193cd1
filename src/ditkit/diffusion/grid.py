"""Grids: the decreasing times that a sampler visits, from 1 (noise) to 0 (data), as pure functions.

A grid is a frozen dataclass of its parameters, called as `grid(n, path, length)`: it returns n + 1 times for n steps.
`length` is the number of tokens, for grids that depend on resolution.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch

from ..config import DitkitError, register
from .path import DDPM, VP, Path

__all__ = [
    "SD3",
    "Diffusers",
    "Exponential",
    "Flux",
    "Grid",
    "IntegerStride",
    "Karras",
    "Leading",
    "Respaced",
    "SiT",
    "Trailing",
    "Uniform",
]


@runtime_checkable
class Grid(Protocol):
    """The times of a sampling of n steps. Raises DitkitError for a number of steps or a path that it has none for."""

    def __call__(self, n: int, path: Path, length: int, /) -> tuple[float, ...]: ...


@register("grid", "uniform")
@dataclass(frozen=True)
class Uniform:
    """Equal steps (JiT, SiT)."""

    def __call__(self, n: int, path: Path, length: int) -> tuple[float, ...]:
        _at_least_one(n)
        return tuple(1 - i / n for i in range(n + 1))


# on the table of a DDPM path


@register("grid", "ddpm")
@dataclass(frozen=True)
class Respaced:
    """The respacing of DiT's "250" (Nichol & Dhariwal 2021): n entries with a fractional stride, both ends kept."""

    def __call__(self, n: int, path: Path, length: int) -> tuple[float, ...]:
        steps = _table(n, path)
        stride = (steps - 1) / (n - 1) if n > 1 else 1.0
        kept, position = [], 0.0
        for _ in range(n):  # summed, not multiplied, and rounded half to even: the published indices depend on it
            kept.append(round(position))
            position += stride
        return _descending(kept, steps)


@register("grid", "ddpm_integer")
@dataclass(frozen=True)
class IntegerStride:
    """The respacing "ddimN": the smallest whole stride that keeps exactly n entries, starting from the cleanest."""

    def __call__(self, n: int, path: Path, length: int) -> tuple[float, ...]:
        steps = _table(n, path)
        for stride in range(1, steps + 1):
            kept = range(0, steps, stride)
            if len(kept) == n:
                return _descending(kept, steps)
        raise DitkitError(f"no whole stride through {steps} steps keeps exactly {n}: use the grid 'ddpm'")


@register("grid", "leading")
@dataclass(frozen=True)
class Leading:
    """diffusers' "leading" spacing: n entries from the cleanest, the stride rounded down; the noisiest may be left out.

    offset: diffusers' `steps_offset`, 0 for DiT and 1 for Stable Diffusion.
    """

    offset: int = 0

    def __call__(self, n: int, path: Path, length: int) -> tuple[float, ...]:
        steps = _table(n, path)
        kept = [i * (steps // n) + self.offset for i in range(n)]
        if not 0 <= self.offset < steps or kept[-1] >= steps:
            raise DitkitError(
                f"an offset of {self.offset} leads beyond the {steps} steps of the path: use grid.offset 0"
            )
        return _descending(kept, steps)


@register("grid", "trailing")
@dataclass(frozen=True)
class Trailing:
    """n entries from the noisiest on, which zero terminal SNR needs (Lin et al. 2024 table 2)."""

    def __call__(self, n: int, path: Path, length: int) -> tuple[float, ...]:
        steps = _table(n, path)
        return _descending(sorted(round(steps - i * steps / n) - 1 for i in range(n)), steps)


# equal steps of something else than time


@register("grid", "karras")
@dataclass(frozen=True)
class Karras:
    """EDM's grid (Karras et al. 2022 equation 5): equal steps of sigma^(1/rho) from sigma_max to sigma_min, then 0.

    sigma is the noise over the signal, sigma(t) / alpha(t), so that the grid serves every path.
    """

    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0

    def __post_init__(self) -> None:
        _noise_levels(self.sigma_min, self.sigma_max)
        if not self.rho > 0:
            raise DitkitError(f"grid.rho must be above 0, not {self.rho}")

    def __call__(self, n: int, path: Path, length: int) -> tuple[float, ...]:
        _at_least_one(n)
        first, last = self.sigma_max ** (1 / self.rho), self.sigma_min ** (1 / self.rho)
        return _at_sigmas(((first + share * (last - first)) ** self.rho for share in _shares(n)), path)


@register("grid", "exponential")
@dataclass(frozen=True)
class Exponential:
    """Equal steps of log sigma, which is log-SNR, from sigma_max to sigma_min, then 0 (DPM-Solver, k-diffusion)."""

    sigma_min: float = 0.002
    sigma_max: float = 80.0

    def __post_init__(self) -> None:
        _noise_levels(self.sigma_min, self.sigma_max)

    def __call__(self, n: int, path: Path, length: int) -> tuple[float, ...]:
        _at_least_one(n)
        first, last = math.log(self.sigma_max), math.log(self.sigma_min)
        return _at_sigmas((math.exp(first + share * (last - first)) for share in _shares(n)), path)


# shifted towards the noise, for flows


def _shifted(t: float, shift: float) -> float:
    """Esser et al. 2024 equation 23: the time at `shift`^2 times as many pixels that looks as noisy as t."""
    return min(shift * t / (1 + (shift - 1) * t), 1.0)  # rounding may lead beyond 1


@register("grid", "sd3")
@dataclass(frozen=True)
class SD3:
    """Equal steps, shifted: t' = shift t / (1 + (shift - 1) t) (Esser et al. 2024 equation 23).

    SD3 has 3, Kandinsky 5 has 10 for video. LightningDiT's "timestep_shift" of 0.3, in a time that runs from noise to
    data, is 1 / 0.3 here.
    """

    shift: float = 3.0

    def __post_init__(self) -> None:
        _positive_shift(self.shift)

    def __call__(self, n: int, path: Path, length: int) -> tuple[float, ...]:
        _at_least_one(n)
        return tuple(_shifted(1 - i / n, self.shift) for i in range(n + 1))


@register("grid", "flux")
@dataclass(frozen=True)
class Flux:
    """Equal steps, shifted by e^mu; mu grows linearly with the number of tokens (FLUX.1).

    mu is base_shift at base_length tokens and max_shift at max_length tokens; t' = e^mu / (e^mu + 1/t - 1).
    """

    base_shift: float = 0.5
    max_shift: float = 1.15
    base_length: int = 256
    max_length: int = 4096

    def __post_init__(self) -> None:
        if self.base_length >= self.max_length:
            raise DitkitError(
                f"grid.base_length {self.base_length} must be below grid.max_length {self.max_length}: they span a line"
            )

    def mu(self, length: int) -> float:
        """The shift's logarithm for a number of tokens."""
        slope = (self.max_shift - self.base_shift) / (self.max_length - self.base_length)
        return self.base_shift + slope * (length - self.base_length)

    def __call__(self, n: int, path: Path, length: int) -> tuple[float, ...]:
        _at_least_one(n)
        shift = math.exp(self.mu(length))
        return tuple(_shifted(1 - i / n, shift) for i in range(n + 1))


@register("grid", "diffusers")
@dataclass(frozen=True)
class Diffusers:
    """What diffusers' FlowMatchEulerDiscreteScheduler (0.42) visits with a static shift.

    The last noise level before 0 is shifted twice (its issue #13243): the levels run evenly from 1 to the shifted
    1/train_steps and are then shifted again. To get the same images as diffusers; "sd3" is the published grid.
    """

    shift: float = 3.0
    train_steps: int = 1000

    def __post_init__(self) -> None:
        _positive_shift(self.shift)

    def __call__(self, n: int, path: Path, length: int) -> tuple[float, ...]:
        _at_least_one(n)
        last = _shifted(1 / self.train_steps, self.shift)
        return (*(_shifted(1 + share * (last - 1), self.shift) for share in _shares(n)), 0.0)


@register("grid", "sit")
@dataclass(frozen=True)
class SiT:
    """SiT's intervals (Ma et al. 2024, its transport code), for n steps.

    eps: how far from the ends the steps stay; SiT has 0 for velocity prediction on the linear and GVP paths and 1e-3
    otherwise. The VP path begins at noise itself whatever eps is. last_step: the length of the last step, which SiT's
    SDE sampler sets to 0.04 and takes to t = 0; the other steps are equal. 0: all are equal, and end at eps.
    """

    eps: float = 0.0
    last_step: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.eps < 0.5 or not 0 <= self.last_step < 0.5:
            raise DitkitError(f"grid.eps and grid.last_step lie in [0, 0.5), not {self.eps} and {self.last_step}")

    def __call__(self, n: int, path: Path, length: int) -> tuple[float, ...]:
        _at_least_one(n)
        first = 1.0 if isinstance(path, VP) else 1 - self.eps
        if not self.last_step:
            return tuple(first + i / n * (self.eps - first) for i in range(n + 1))
        if n == 1:
            raise DitkitError("the grid 'sit' with a last_step takes at least 2 steps: the last one is apart")
        return (*(first + share * (self.last_step - first) for share in _shares(n)), 0.0)


def _shares(n: int) -> Iterable[float]:
    """n numbers from 0 to 1 in equal steps; 0 alone for n = 1."""
    return (i / max(n - 1, 1) for i in range(n))


def _at_sigmas(sigmas: Iterable[float], path: Path) -> tuple[float, ...]:
    """The times of noise-to-signal ratios, and then the data."""
    log_snr = torch.tensor([-2 * math.log(sigma) for sigma in sigmas], dtype=torch.float64)
    return (*path.time(log_snr).tolist(), 0.0)


def _noise_levels(sigma_min: float, sigma_max: float) -> None:
    if not 0 < sigma_min < sigma_max:
        raise DitkitError(f"a grid needs 0 < sigma_min < sigma_max, not {sigma_min} and {sigma_max}")


def _positive_shift(shift: float) -> None:
    if not shift > 0:
        raise DitkitError(f"grid.shift must be above 0 (1 = no shift), not {shift}")


def _descending(kept: Iterable[int], steps: int) -> tuple[float, ...]:
    return (*((i + 1) / steps for i in reversed(list(kept))), 0.0)


def _table(n: int, path: Path) -> int:
    _at_least_one(n)
    if not isinstance(path, DDPM):
        raise DitkitError("a DDPM grid needs a DDPM path: use the grid 'uniform'")
    if n > path.steps:
        raise DitkitError(f"{n} steps were asked of a path of {path.steps}: use fewer steps")
    return path.steps


def _at_least_one(n: int) -> None:
    if n < 1:
        raise DitkitError(f"sampling takes at least 1 step, not {n}")
