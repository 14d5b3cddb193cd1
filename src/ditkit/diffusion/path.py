"""Paths from data to noise: x_t = alpha(t) x0 + sigma(t) eps.

Time runs from t = 0 (data) to t = 1 (noise), in float64 on the host; alpha and sigma have the shape of t.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from ..config import DitkitError, register

__all__ = ["DDPM", "Linear", "Path", "Time", "as_time", "log_snr"]

Time = float | Tensor


def as_time(t: Time) -> Float[Tensor, "*b"]:
    """A time as a float64 tensor on the host. Raises ValueError outside [0, 1]."""
    t = torch.as_tensor(t, dtype=torch.float64, device="cpu")
    if bool((t < 0).any()) or bool((t > 1).any()):
        raise ValueError(f"a time lies in [0, 1] (0 = data, 1 = noise), not {t.tolist()}")
    return t


@runtime_checkable
class Path(Protocol):
    """The schedule of signal and noise."""

    def __call__(self, t: Time, /) -> tuple[Tensor, Tensor]:
        """alpha(t), sigma(t)."""
        ...

    def rate(self, t: Time, /) -> tuple[Tensor, Tensor]:
        """d alpha / dt, d sigma / dt. Raises DitkitError where the path has none."""
        ...

    def time(self, log_snr: Time, /) -> Tensor:
        """The t at which log(alpha^2 / sigma^2) has the given value."""
        ...

    @property
    def prior_std(self) -> float:
        """Standard deviation of x at t = 1, from which sampling starts."""
        ...


@register("path", "linear")
@dataclass(frozen=True)
class Linear:
    """alpha = 1 - t, sigma = noise_scale t: rectified flow (Liu et al. 2022), SiT, JiT.

    JiT's noise_scale grows with the image: 1 at 256 px, 2 at 512 px, 4 at 1024 px (JiT section 4.3).
    """

    noise_scale: float = 1.0

    def __call__(self, t: Time) -> tuple[Tensor, Tensor]:
        t = as_time(t)
        return 1 - t, self.noise_scale * t

    def rate(self, t: Time) -> tuple[Tensor, Tensor]:
        ones = torch.ones_like(as_time(t))
        return -ones, self.noise_scale * ones

    def time(self, log_snr: Time) -> Tensor:
        return torch.sigmoid(-torch.as_tensor(log_snr, dtype=torch.float64) / 2 - math.log(self.noise_scale))

    @property
    def prior_std(self) -> float:
        return self.noise_scale


@functools.lru_cache(maxsize=16)
def _linear_betas(steps: int, first: float, last: float) -> Tensor:
    """alpha^2 after 0..steps steps, entry 0 = 1 (the data)."""
    betas = torch.linspace(first, last, steps, dtype=torch.float64, device="cpu")
    return torch.cat((betas.new_ones(1), torch.cumprod(1 - betas, dim=0)))


@register("path", "ddpm")
@dataclass(frozen=True)
class DDPM:
    """The table of Ho et al. 2020: variance preserving, betas linear from beta_first to beta_last.

    Only the times i / steps exist; the authors' index 0..steps-1 is i - 1. The table has no rates.
    """

    steps: int = 1000
    beta_first: float = 1e-4
    beta_last: float = 2e-2

    def index(self, t: Time) -> Tensor:
        """The authors' index of a time, -1 for the data. Raises DitkitError between the entries of the table."""
        position = as_time(t) * self.steps
        index = position.round()
        if bool(((position - index).abs() > 1e-3).any()):  # wide enough for a float32 time
            raise DitkitError(
                f"the DDPM path is a table of {self.steps} steps and has no entry at t = {as_time(t).tolist()}: "
                "use the grid 'ddpm' and the time sampler 'discrete', or another path"
            )
        return index.long() - 1

    def __call__(self, t: Time) -> tuple[Tensor, Tensor]:
        alpha2 = _linear_betas(self.steps, self.beta_first, self.beta_last)[self.index(t) + 1]
        return alpha2.sqrt(), (1 - alpha2).sqrt()

    def rate(self, t: Time) -> tuple[Tensor, Tensor]:
        raise DitkitError("the DDPM path is a table and has no rates: use the spaces x0, eps or v, and the solver ddim")

    def time(self, log_snr: Time) -> Tensor:
        """The entry of the table whose log-SNR is nearest."""
        alpha2 = _linear_betas(self.steps, self.beta_first, self.beta_last)[1:]
        table = torch.log(alpha2) - torch.log1p(-alpha2)
        wanted = torch.as_tensor(log_snr, dtype=torch.float64).clamp(table[-1], table[0])
        return ((table - wanted[..., None]).abs().argmin(-1).double() + 1) / self.steps

    @property
    def prior_std(self) -> float:
        return 1.0


def log_snr(path: Path, t: Time) -> Tensor:
    """log(alpha^2 / sigma^2); infinite at the ends of time."""
    alpha, sigma = path(t)
    return 2 * (torch.log(alpha) - torch.log(sigma))
