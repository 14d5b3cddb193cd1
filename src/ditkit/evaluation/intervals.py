"""Intervals by the bootstrap (Efron 1979)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from ..rng import Rng

__all__ = ["Interval", "bootstrap_mean", "percentiles"]

_DRAWS = 1 << 22  # indices in memory at a time: 32 MiB


@dataclass(frozen=True)
class Interval:
    """A number with its standard error and its interval of 95%."""

    value: float
    error: float
    low: float
    high: float


def bootstrap_mean(values: Float[Tensor, "n"], resamples: int = 1000, seed: int = 0) -> Interval:
    """The mean of one number for each sample, with the bootstrap's standard error and its 2.5% and 97.5% percentiles.

    It holds for samples that are independent of each other. Where all numbers are equal the interval has no width, and
    what can be said of a share of 0 or 1 is that it is within 3 / n.
    """
    values = values.detach().double().flatten().cpu()
    n, generator = len(values), Rng(seed).generator("bootstrap")
    means = []
    for first in range(0, resamples, rows := max(1, _DRAWS // n)):
        shape = (min(rows, resamples - first), n)
        means.append(values[torch.randint(n, shape, generator=generator)].mean(1))
    drawn = torch.cat(means)
    return Interval(float(values.mean()), float(drawn.std()), *percentiles(drawn))


def percentiles(drawn: Float[Tensor, "r"]) -> tuple[float, float]:
    """The 2.5% and 97.5% percentiles of what resamples gave: the interval of 95%."""
    low, high = drawn.double().quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high
