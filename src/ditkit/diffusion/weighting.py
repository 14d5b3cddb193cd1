"""Weightings: how much the loss at a time counts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor

from ..config import DitkitError, register
from .path import Path
from .space import reading, row, singular_ends

__all__ = ["P2", "Likelihood", "LogVariance", "MinSNR", "Weighting"]


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
