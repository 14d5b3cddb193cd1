"""The Gaussian step from t back to s < t: q(x_s | x_t, x0) (DDPM equations 6 and 7), on any path, and its variance."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from .path import Path, Time

__all__ = ["Posterior", "gaussian_kl", "learned_log_variance", "posterior", "quantised_nll"]


@dataclass(frozen=True)
class Posterior:
    """Mean = of_x x_t + of_x0 x0; `variance` of the step back, `beta` of the step forward; all as t in shape."""

    of_x: Tensor
    of_x0: Tensor
    variance: Tensor
    beta: Tensor


def posterior(path: Path, t: Time, s: Time) -> Posterior:
    """The step from t to s. On a DDPM path with neighbouring times these are the published tables."""
    (alpha_t, sigma_t), (alpha_s, sigma_s) = path(t), path(s)
    ratio = alpha_t / alpha_s
    beta = sigma_t**2 - (ratio * sigma_s) ** 2
    return Posterior(
        of_x=ratio * sigma_s**2 / sigma_t**2,
        of_x0=alpha_s * beta / sigma_t**2,
        variance=beta * sigma_s**2 / sigma_t**2,
        beta=beta,
    )


def learned_log_variance(
    raw: Float[Tensor, "b *x"], low: float | Tensor, high: float | Tensor
) -> Float[Tensor, "b *x"]:
    """Improved DDPM equation 15 (Nichol & Dhariwal 2021): raw in [-1, 1] goes from log-variance `low` to `high`."""
    share = (raw + 1) / 2
    return share * high + (1 - share) * low


def gaussian_kl(mean1: Tensor, log_var1: Tensor | float, mean2: Tensor, log_var2: Tensor) -> Tensor:
    """KL(N(mean1, var1) || N(mean2, var2)) in nats, element by element."""
    difference = (mean1 - mean2).square() * torch.exp(-log_var2)
    return 0.5 * (log_var2 - log_var1 - 1 + torch.exp(log_var1 - log_var2) + difference)


def _cdf(x: Tensor) -> Tensor:
    """The Gaussian CDF in the tanh form that DDPM's authors used."""
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def quantised_nll(x0: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """-log of the probability of x0's bin of width 2/255 in [-1, 1] under a Gaussian, in nats (DDPM equation 13)."""
    centred, inverse = x0 - mean, torch.exp(-log_std)
    upper, lower = _cdf(inverse * (centred + 1 / 255)), _cdf(inverse * (centred - 1 / 255))
    inside = (upper - lower).clamp(min=1e-12)
    probability = torch.where(x0 < -0.999, upper.clamp(min=1e-12), inside)
    return -torch.where(x0 > 0.999, (1 - lower).clamp(min=1e-12), probability).log()
