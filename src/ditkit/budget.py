"""Equal terms: a network of any family, sized to a budget of compute or of parameters."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch

from . import plan
from .config import DitkitError
from .models import ModelConfig, resized, size, width_unit

__all__ = ["match", "parameters"]

C = TypeVar("C", bound=ModelConfig)
SKIPPED = 16
"""Widths in a row that cannot be built before a search gives up on its direction."""


def parameters(config: ModelConfig) -> int:
    """How many numbers the weights are, fixed positions among them."""
    with torch.device("meta"):
        return sum(p.numel() for p in config.build().parameters())


def match(
    config: C,
    shape: tuple[int, ...],
    *,
    gmacs: float | None = None,
    params: float | None = None,
    tolerance: float = 0.05,
) -> C:
    """The same family at another size, which meets a budget for x of `shape` within a share `tolerance`.

    gmacs: billions of multiply-accumulates of one forward pass of one sample. params: weights, fixed positions among
    them. The width changes first, with heads of the same size or else of about the same; where that does not do, the
    depth changes too, as little as it must. All else that the family ties to them keeps its proportion, and the
    patches, the number of classes and the sizes of the text stay. Raises DitkitError for a budget that no size meets,
    with the nearest.
    """
    if (gmacs is None) == (params is None):
        raise DitkitError("a network is matched to gmacs or to params: give one of them")
    target = gmacs if gmacs is not None else params
    assert target is not None
    if not 0 < target < math.inf or not 0 < tolerance < 1:
        raise DitkitError(f"a budget is above 0 and a tolerance in (0, 1), not {target:g} and {tolerance:g}")
    config = config.fitted(shape, getattr(config, "num_classes", 0), config.vocab)
    count = parameters if gmacs is None else lambda c: plan.gmacs(c, shape)
    nearest, found = config, math.inf
    for candidate, value in _candidates(config, count, target):
        if abs(value / target - 1) <= tolerance:
            return candidate
        if abs(math.log(value / target)) < abs(math.log(found / target)):
            nearest, found = candidate, value
    width, depth = size(nearest)
    what = "GMACs" if gmacs is not None else "parameters"
    raise DitkitError(
        f"no size of this family has {target:,.6g} {what} within {tolerance:.0%}: the nearest has {found:,.6g} (width "
        f"{width}, depth {depth}); choose another budget, tolerance or patch size"
    )


def _candidates(config: C, count: Callable[[C], float], target: float) -> Iterator[tuple[C, float]]:
    """Networks on both sides of the target, in the order of preference, with their counts."""
    own = size(config)[1]
    depths = sorted(range(max(1, math.ceil(own / 2)), 2 * own + 1), key=lambda d: abs(math.log(d / own)))
    seen: dict[tuple[int, int], tuple[C, float] | None] = {}

    def at(width: int, depth: int) -> tuple[C, float] | None:
        if (width, depth) not in seen:
            try:
                candidate = resized(config, width, depth)
                seen[width, depth] = candidate, count(candidate)
            except DitkitError:  # what a family refuses is no size of it
                seen[width, depth] = None
        return seen[width, depth]

    start = size(config)[0]
    for several in (depths[:1], depths[1:]):
        for exact in (True, False):
            unit = width_unit(config, exact=exact)
            for depth in several:
                found = list(_around(lambda k, d=depth, u=unit: at(k * u, d), max(1, start // unit), target))
                if found:
                    start = size(found[0][0])[0]  # where the next search begins
                yield from found


def _around(at: Callable[[int], tuple[C, float] | None], start: int, target: float) -> Iterator[tuple[C, float]]:
    """Of networks that grow with a whole number k: the last below the target and the first that is not, nearest first.

    Counts grow about as k squared, which says where to look next.
    """

    def valid(k: int, step: int) -> tuple[int, C, float] | None:
        """The network of k, or of the next k up or down that there is."""
        for j in range(k, k + SKIPPED * step, step):
            if j >= 1 and (entry := at(j)) is not None:
                return j, *entry
        return None

    here = valid(start, 1) or valid(start, -1)
    low = high = None  # the nearest on either side
    while here is not None:
        k, _, value = here
        low, high = (here, high) if value < target else (low, here)
        guess = round(k * math.sqrt(target / value))
        if value < target:
            guess = max(k + 1, min(guess, high[0] - 1 if high else 4 * k))
            here = valid(guess, 1)
            if high and here and here[0] >= high[0]:
                here = valid(guess, -1)
        else:
            guess = min(k - 1, max(guess, low[0] + 1 if low else k // 4))
            here = valid(guess, -1)
            if low and here and here[0] <= low[0]:
                here = valid(guess, 1)
        if here is not None and not (low[0] if low else 0) < here[0] < (high[0] if high else math.inf):
            here = None
    found = [(config, value) for _, config, value in filter(None, (low, high))]
    yield from sorted(found, key=lambda entry: abs(math.log(entry[1] / target)))
