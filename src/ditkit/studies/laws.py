"""Laws read off results: power laws with the bootstrap's error, and where a curve reaches a level."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor

from ..rng import Rng

__all__ = ["PowerLaw", "crossing", "power_law", "power_laws"]

RESAMPLES = 1000


@dataclass(frozen=True)
class PowerLaw:
    """y = factor x^exponent, with the bootstrap's standard error of the exponent and its 95% interval."""

    factor: float
    exponent: float
    error: float
    low: float
    high: float
    explained: float
    """The share of the variance of log y that the law explains."""


def power_law(points: Mapping[float, Sequence[float]], seed: int = 0) -> PowerLaw:
    """Least squares of log y on log x; at each x the y of several seeds, of which the mean counts.

    The bootstrap draws points with replacement, and for each point its seeds with replacement. Raises ValueError for
    fewer than 3 points and for numbers that are not positive.
    """
    return power_laws({(x,): ys for x, ys in points.items()}, seed)[0]


def power_laws(
    points: Mapping[tuple[float, ...], Sequence[float]], seed: int = 0, *, fixed: bool = False
) -> tuple[PowerLaw, ...]:
    """y = factor x1^a x2^b ..., as `power_law`: one law for each variable, with a common factor and explained share.

    fixed: the bootstrap keeps the points and draws their seeds only: what a design of few points allows. Raises
    ValueError as `power_law`, and where the points cannot tell the variables apart.
    """
    least = 2 + len(next(iter(points), ()))
    positive = all(x > 0 for xs in points for x in xs) and all(y > 0 for ys in points.values() for y in ys)
    if len(points) < least or not positive or not all(points.values()):
        raise ValueError(f"a power law is fitted to {least} points or more, all positive")
    x = torch.tensor(list(points), dtype=torch.float64).log()
    values = [torch.tensor(list(ys), dtype=torch.float64) for ys in points.values()]
    found = _plane(x, torch.stack([ys.mean() for ys in values]).log())
    if found is None:
        raise ValueError("the variables change together: the points cannot tell their exponents apart")
    slopes, intercept, explained = found
    generator = Rng(seed).generator("bootstrap")
    if fixed:
        means = torch.stack(
            [ys[torch.randint(len(ys), (RESAMPLES, len(ys)), generator=generator)].mean(1) for ys in values], dim=1
        )
        spread = means.log() @ torch.linalg.pinv(x - x.mean(0)).T
    else:
        drawn = []
        for _ in range(RESAMPLES):
            chosen = torch.randint(len(x), (len(x),), generator=generator).tolist()
            heights = [values[i][torch.randint(len(values[i]), (len(values[i]),), generator=generator)] for i in chosen]
            again = _plane(x[chosen], torch.stack([ys.mean() for ys in heights]).log())
            if again is not None:
                drawn.append(again[0])
        spread = torch.stack(drawn)
    ends = spread.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64), dim=0)
    return tuple(
        PowerLaw(
            math.exp(intercept),
            float(slopes[k]),
            float(spread[:, k].std()),
            float(ends[0, k]),
            float(ends[1, k]),
            explained,
        )
        for k in range(x.shape[1])
    )


def crossing(x: Sequence[float], y: Sequence[float], level: float) -> float | None:
    """Where a curve first comes from below a level to it, on straight lines of y over log x; None where it does not.

    A curve that begins at the level or above has no crossing. x: positive and rising.
    """
    for (x0, y0), (x1, y1) in pairwise(zip(x, y, strict=True)):
        if y0 < level <= y1:
            return x0 * (x1 / x0) ** ((level - y0) / (y1 - y0))
    return None


def _plane(x: Float[Tensor, "n k"], y: Float[Tensor, "n"]) -> tuple[Float[Tensor, "k"], float, float] | None:
    """Slopes, intercept and explained share of a plane by least squares; None where they are not determined."""
    centred, height = x - x.mean(0), y - y.mean()
    if int(torch.linalg.matrix_rank(centred)) < x.shape[1]:
        return None
    slopes = torch.linalg.lstsq(centred, height[:, None], driver="gelsd").solution[:, 0]
    total, left = float(height.square().sum()), float((height - centred @ slopes).square().sum())
    explained = 1 - left / total if total and len(x) > x.shape[1] + 1 else 1.0
    return slopes, float(y.mean() - x.mean(0) @ slopes), explained
