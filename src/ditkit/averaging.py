"""Power-function averages of weights, and averages of any length after training (EDM2: Karras et al. 2023).

At step t the average moves by average = beta average + (1 - beta) weights, beta = (1 - 1/t)^(gamma + 1). The weights of
step k then count as (k^(gamma+1) - (k-1)^(gamma+1)) / t^(gamma+1): the profile is a power of k that stretches with the
training, and its width, as a share of the training, stays the same. That share is the standard deviation `std` that
names an average; 0.05 and 0.10 are what the paper tracks (arXiv 2312.02696 section 3.1).

Averages of other lengths are linear combinations of stored ones, whose profiles together come nearest to the profile
that is wanted (section 3.2 and appendix C): nothing has to be decided before training.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from .config import DitkitError

__all__ = ["decay_name", "exponent", "power_decay", "reconstruction", "std_name"]

WIDEST = 12**-0.5  # gamma = 0: the mean over all steps


def decay_name(decay: float) -> str:
    """The name of an average with a fixed decay, such as "ema-0.9999"."""
    return f"ema-{decay}"


def std_name(std: float) -> str:
    """The name of a power-function average, such as "ema-std-0.05"."""
    return f"ema-std-{std}"


@functools.cache  # asked for at every step of a training
def exponent(std: float) -> float:
    """gamma >= 0 for a relative standard deviation: std^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3)).

    The cubic gamma^3 + 7 gamma^2 + (16 - std^-2) gamma + 12 - std^-2 has one root there. Raises DitkitError for a std
    outside (0, 0.288].
    """
    if not 0 < std <= WIDEST:
        raise DitkitError(f"the length of a power-function average is a share of the training in (0, 0.288], not {std}")
    inverse = std**-2
    low, high = 0.0, 1 / std  # the root lies below: at 1 / std the cubic is 6 std^-2 + 16 / std + 12 > 0
    while (middle := (low + high) / 2) not in (low, high):
        if ((middle + 7) * middle + 16 - inverse) * middle + 12 - inverse < 0:
            low = middle
        else:
            high = middle
    return high


def power_decay(std: float, step: int) -> float:
    """beta at a step, counted from 1; 0 at the first: an average begins as the weights."""
    return (1 - 1 / step) ** (exponent(std) + 1)


def _gram(a: Sequence[tuple[int, float]], b: Sequence[tuple[int, float]]) -> Float[Tensor, "n m"]:
    """Inner products of profiles (gamma + 1) k^gamma / t^(gamma + 1) on [0, t], given as pairs (t, std)."""

    def columns(profiles: Sequence[tuple[int, float]]) -> tuple[Tensor, Tensor]:
        steps = torch.tensor([float(t) for t, _ in profiles], dtype=torch.float64)
        return steps, torch.tensor([exponent(std) for _, std in profiles], dtype=torch.float64)

    (t, p), (s, q) = columns(a), columns(b)
    t, p = t[:, None], p[:, None]
    shorter, both = torch.minimum(t, s), p + q + 1
    # (shorter / t)^(p + 1) (shorter / s)^(q + 1) / shorter, without leaving the range of float64
    powers = torch.exp((p + 1) * torch.log(shorter / t) + (q + 1) * torch.log(shorter / s)) / shorter
    return (p + 1) * (q + 1) / both * powers


def reconstruction(stored: Sequence[tuple[int, float]], wanted: tuple[int, float]) -> tuple[Float[Tensor, "n"], float]:
    """Factors with which stored averages, given as (step, std), add up to a wanted one; and what is missing.

    The least squares of appendix C among factors whose sum is 1, so that weights which do not change stay what they
    are. What is missing is the norm of the difference of the two profiles, as a share of the norm of the wanted one.
    Raises DitkitError where nothing is stored.
    """
    if not stored:
        raise DitkitError("an average of another length needs stored power-function averages")
    among, across = _gram(stored, stored), _gram(stored, [wanted])[:, 0]
    own = float(_gram([wanted], [wanted]))
    # profiles of one length at neighbouring steps are nearly the same: scale them to norm 1, and cut what float64 lost
    norm = among.diagonal().sqrt()
    values, vectors = torch.linalg.eigh(among / norm[:, None] / norm)
    kept = values > 1e-13 * values[-1]
    values, vectors = values[kept], vectors[:, kept]

    def solve(right: Tensor) -> Tensor:
        return vectors @ ((vectors.T @ (right / norm)) / values) / norm

    factors, towards = solve(across), solve(torch.ones_like(across))
    factors = factors + (1 - factors.sum()) / towards.sum() * towards
    left = own - 2 * float(factors @ across) + float(factors @ among @ factors)
    return factors, math.sqrt(max(left, 0.0) / own)
