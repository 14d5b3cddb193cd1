"""Tests of copying besides f_mem: do samples lie nearer to the training set than new data does?"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ..config import DitkitError
from ..rng import Rng

__all__ = ["CopyTest", "authentic", "copy_test", "mann_whitney", "most_similar"]


def mann_whitney(a: Float[Tensor, "n"], b: Float[Tensor, "m"]) -> float:
    """The z of Mann and Whitney's U of a against b, ties corrected: below 0 where a is smaller than b.

    The normal approximation without correction for continuity; 0 where all values are equal.
    """
    n, m = len(a), len(b)
    _, inverse, counts = torch.cat((a, b)).double().unique(return_inverse=True, return_counts=True)
    ranks = (counts.cumsum(0) - (counts.double() - 1) / 2)[inverse]  # the mean rank of equal values
    u = float(ranks[:n].sum()) - n * (n + 1) / 2
    total = n + m
    ties = float((counts.double() ** 3 - counts).sum()) / (total * (total - 1))
    variance = n * m / 12 * (total + 1 - ties)
    return (u - n * m / 2) / math.sqrt(variance) if variance > 0 else 0.0


def most_similar(
    samples: Float[Tensor, "n d"], train: Float[Tensor, "m d"], rows: int = 1024
) -> tuple[Float[Tensor, "n"], Int[Tensor, "n"]]:
    """The largest cosine of each sample with a training sample, and which this is; rows of length 1."""
    found = [(part @ train.T).max(dim=1) for part in samples.split(rows)]
    return torch.cat([part.values for part in found]), torch.cat([part.indices for part in found])


@dataclass(frozen=True)
class CopyTest:
    """C_T: the mean z over the cells; far below 0 = samples are nearer to training data than new data is."""

    value: float
    cells: int
    """Cells that had enough samples and held-out data to be compared."""
    all_cells: int
    samples: int
    """Samples in these cells."""


def copy_test(
    samples: Float[Tensor, "n d"],
    heldout: Float[Tensor, "m d"],
    train: Float[Tensor, "k d"],
    *,
    components: int = 64,
    cells: int = 5,
    least: int = 20,
    seed: int = 0,
) -> CopyTest:
    """The three-sample test of Meehan, Chaudhuri and Dasgupta 2020 (arXiv 2004.05675), section 3.

    Features are reduced to principal components of the training data, whose k-means cells are compared one by one: the
    distances of samples to the nearest training point against those of held-out data, by `mann_whitney`, weighted by
    the share of held-out data in a cell. Cells with fewer than `least` of either are left out; where none has enough,
    all is one cell. Raises DitkitError for fewer than `least` samples or held-out ones.
    """
    if min(len(samples), len(heldout)) < least:
        raise DitkitError(
            f"the copy test needs {least} samples and {least} held-out ones, not {len(samples)} and {len(heldout)}"
        )
    centre = train.double().mean(0)
    frame = torch.linalg.svd(train.double() - centre, full_matrices=False).Vh[:components]
    x, y, z = ((part.double() - centre) @ frame.T for part in (samples, heldout, train))
    found = _in_cells(x, y, z, _means(z, cells, seed), least)
    return found if found.cells else _in_cells(x, y, z, z.mean(0, keepdim=True), least)


def _in_cells(
    x: Float[Tensor, "n c"], y: Float[Tensor, "m c"], z: Float[Tensor, "k c"], middles: Float[Tensor, "j c"], least: int
) -> CopyTest:
    """C_T over the cells around these points; 0 of no cell."""
    groups = [torch.cdist(part, middles).argmin(1) for part in (x, y, z)]
    total, weight, used, seen = 0.0, 0.0, 0, 0
    for cell in range(len(middles)):
        a, b, c = (part[group == cell] for part, group in zip((x, y, z), groups, strict=True))
        if len(a) < least or len(b) < least or len(c) == 0:
            continue
        score = mann_whitney(torch.cdist(a, c).amin(1), torch.cdist(b, c).amin(1))
        share = len(b) / len(y)
        total, weight, used, seen = total + share * score, weight + share, used + 1, seen + len(a)
    return CopyTest(total / weight if used else 0.0, used, len(middles), seen)


def _means(points: Float[Tensor, "k d"], cells: int, seed: int, rounds: int = 100) -> Float[Tensor, "c d"]:
    """The centres of k-means, from points that are drawn far apart (k-means++)."""
    generator = Rng(seed).generator("cells")
    cells = min(cells, len(points))
    chosen = [int(torch.randint(len(points), (1,), generator=generator))]
    for _ in range(cells - 1):
        apart = torch.cdist(points, points[chosen]).amin(1).square()
        if not bool((apart > 0).any()):
            break
        chosen.append(int(torch.multinomial(apart, 1, generator=generator)))
    middles = points[chosen].clone()
    for _ in range(rounds):
        group = torch.cdist(points, middles).argmin(1)
        new = torch.stack(
            [points[group == k].mean(0) if bool((group == k).any()) else middles[k] for k in range(len(middles))]
        )
        if torch.equal(new, middles):
            break
        middles = new
    return middles


def authentic(distance: Float[Tensor, "n"], nearest: Int[Tensor, "n"], own: Float[Tensor, "n"]) -> Bool[Tensor, "n"]:
    """Which samples are further from their nearest training sample than this is from its own nearest one.

    The authenticity of Alaa et al. 2022 (arXiv 2102.08921). distance: of each sample to its nearest training sample;
    own: of that one to the nearest other. What share to expect, held-out data says.
    """
    if distance.shape != own.shape or nearest.shape != own.shape:
        raise ValueError(f"one of each for each sample, not {len(distance)}, {len(nearest)}, {len(own)}")
    return distance > own
