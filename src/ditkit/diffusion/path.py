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

from ..config import DitkitError, near, register

__all__ = ["DDPM", "GVP", "VE", "VP", "Linear", "Path", "Time", "as_time", "log_snr"]

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
        """The t at which log(alpha^2 / sigma^2) has the given value; the nearest end where no t has it."""
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


def _noise_to_signal(log_snr: Time) -> Tensor:
    """sigma / alpha of a log-SNR."""
    return torch.exp(-torch.as_tensor(log_snr, dtype=torch.float64) / 2)


@register("path", "gvp")
@dataclass(frozen=True)
class GVP:
    """alpha = cos(pi t / 2), sigma = sin(pi t / 2): the generalised variance-preserving path of SiT (section 2.3)."""

    def __call__(self, t: Time) -> tuple[Tensor, Tensor]:
        t = as_time(t)
        return torch.sin((1 - t) * (math.pi / 2)), torch.sin(t * (math.pi / 2))  # the cosine at t = 1 would be 6e-17

    def rate(self, t: Time) -> tuple[Tensor, Tensor]:
        alpha, sigma = self(t)
        return -math.pi / 2 * sigma, math.pi / 2 * alpha

    def time(self, log_snr: Time) -> Tensor:
        return (torch.atan(_noise_to_signal(log_snr)) * (2 / math.pi)).clamp(max=1)

    @property
    def prior_std(self) -> float:
        return 1.0


@register("path", "vp")
@dataclass(frozen=True)
class VP:
    """The variance-preserving diffusion of Song et al. 2021 (equation 33), with a linear beta in continuous time.

    log alpha = -t^2 (beta_max - beta_min) / 4 - t beta_min / 2, sigma = sqrt(1 - alpha^2). alpha(1) is small, not 0.
    d sigma / dt is infinite at t = 0.
    """

    beta_min: float = 0.1
    beta_max: float = 20.0

    def __post_init__(self) -> None:
        if not 0 < self.beta_min < self.beta_max:
            raise DitkitError(
                f"a VP path needs 0 < beta_min < beta_max, not beta_min {self.beta_min}, beta_max {self.beta_max}"
            )

    def _log_alpha(self, t: Tensor) -> Tensor:
        return -t.square() * (self.beta_max - self.beta_min) / 4 - t * self.beta_min / 2

    def __call__(self, t: Time) -> tuple[Tensor, Tensor]:
        log_alpha = self._log_alpha(as_time(t))
        return log_alpha.exp(), (-torch.expm1(2 * log_alpha)).sqrt()

    def rate(self, t: Time) -> tuple[Tensor, Tensor]:
        t = as_time(t)
        alpha, sigma = self(t)
        d_log_alpha = -(t * (self.beta_max - self.beta_min) + self.beta_min) / 2
        return alpha * d_log_alpha, -alpha.square() * d_log_alpha / sigma

    def time(self, log_snr: Time) -> Tensor:
        log_alpha = torch.nn.functional.logsigmoid(torch.as_tensor(log_snr, dtype=torch.float64)) / 2
        beyond = log_alpha <= self._log_alpha(torch.ones((), dtype=torch.float64))
        # the positive root of the quadratic in t, in the form that does not cancel near t = 0
        half = self.beta_min / 2
        root = (half**2 - (self.beta_max - self.beta_min) * log_alpha).sqrt()
        return torch.where(beyond, 1.0, -2 * log_alpha / (half + root)).clamp(max=1)

    @property
    def prior_std(self) -> float:
        return 1.0


@register("path", "ve")
@dataclass(frozen=True)
class VE:
    """alpha = 1, sigma = sigma_max t: the variance-exploding path of EDM (Karras et al. 2022), its sigma over 80.

    The signal is never gone: at t = 1, x has a standard deviation of sigma_max up to that of the data.
    """

    sigma_max: float = 80.0

    def __post_init__(self) -> None:
        if not self.sigma_max > 0:
            raise DitkitError(f"path.sigma_max is a positive noise level, not {self.sigma_max}")

    def __call__(self, t: Time) -> tuple[Tensor, Tensor]:
        t = as_time(t)
        return torch.ones_like(t), self.sigma_max * t

    def rate(self, t: Time) -> tuple[Tensor, Tensor]:
        ones = torch.ones_like(as_time(t))
        return 0 * ones, self.sigma_max * ones

    def time(self, log_snr: Time) -> Tensor:
        return (_noise_to_signal(log_snr) / self.sigma_max).clamp(max=1)

    @property
    def prior_std(self) -> float:
        return self.sigma_max


SCHEDULES = ("linear", "scaled_linear", "cosine")


@functools.lru_cache(maxsize=16)
def _table(steps: int, schedule: str, first: float, last: float, zero_snr: bool) -> Float[Tensor, "steps+1"]:
    """alpha^2 (the running product of 1 - beta) after 0..steps steps, entry 0 = 1 (the data)."""
    if schedule == "cosine":
        share = torch.arange(steps + 1, dtype=torch.float64, device="cpu") / steps
        level = torch.cos((share + 0.008) / 1.008 * math.pi / 2).square()
        betas = (1 - level[1:] / level[:-1]).clamp(max=0.999)
    else:
        power = 2 if schedule == "scaled_linear" else 1
        betas = torch.linspace(first ** (1 / power), last ** (1 / power), steps, dtype=torch.float64, device="cpu")
        betas = betas**power
    alpha2 = torch.cumprod(1 - betas, dim=0)
    if zero_snr:
        # Lin et al. 2024 algorithm 1: shift sqrt(alpha^2) so that the last is 0, scale so that the first stays
        root = alpha2.sqrt()
        alpha2 = ((root - root[-1]) * (root[0] / (root[0] - root[-1]))).square()
    return torch.cat((betas.new_ones(1), alpha2))


@register("path", "ddpm")
@dataclass(frozen=True)
class DDPM:
    """A variance-preserving table of betas (Ho et al. 2020). Only the times i / steps exist; there are no rates.

    The authors' index 0..steps-1 is i - 1. schedule: "linear" from beta_first to beta_last (DDPM, DiT),
    "scaled_linear" (linear in sqrt(beta): Stable Diffusion, with 0.00085 and 0.012), "cosine" (Nichol & Dhariwal 2021
    equation 17, without the two betas). zero_snr: rescaled so that nothing of the data is left at t = 1 (Lin et al.
    2024, arXiv 2305.08891); predict v then, and sample on a grid that begins at t = 1, such as "trailing".
    """

    steps: int = 1000
    beta_first: float = 1e-4
    beta_last: float = 2e-2
    schedule: str = "linear"
    zero_snr: bool = False

    def __post_init__(self) -> None:
        if self.schedule not in SCHEDULES:
            raise DitkitError(f"unknown schedule {self.schedule!r} of path.schedule: {near(self.schedule, SCHEDULES)}")
        if self.steps < 1 or not 0 < self.beta_first < self.beta_last < 1:
            raise DitkitError(
                f"a DDPM path needs at least 1 step and 0 < beta_first < beta_last < 1, not {self.steps} steps, "
                f"{self.beta_first} and {self.beta_last}"
            )

    @property
    def table(self) -> Float[Tensor, "steps+1"]:
        """alpha^2 at the times 0, 1/steps .. 1."""
        return _table(self.steps, self.schedule, self.beta_first, self.beta_last, self.zero_snr)

    def index(self, t: Time) -> Tensor:
        """The authors' index of a time, -1 for the data. Raises DitkitError between the entries of the table."""
        position = as_time(t) * self.steps
        index = position.round()
        between = (position - index).abs() > 1e-3  # wide enough for a float32 time
        if bool(between.any()):
            where = float(position[between][0]) / self.steps
            raise DitkitError(
                f"the DDPM path is a table of {self.steps} steps and has no entry at t = {where:g}: "
                "use the grid 'ddpm' and the time sampler 'discrete', or another path"
            )
        return index.long() - 1

    def __call__(self, t: Time) -> tuple[Tensor, Tensor]:
        alpha2 = self.table[self.index(t) + 1]
        return alpha2.sqrt(), (1 - alpha2).sqrt()

    def rate(self, t: Time) -> tuple[Tensor, Tensor]:
        raise DitkitError("the DDPM path is a table and has no rates: use the spaces x0, eps or v, and the solver ddim")

    def time(self, log_snr: Time) -> Tensor:
        """The entry of the table whose log-SNR is nearest."""
        alpha2 = self.table[1:]
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
