"""Are samples copies of training images? Distances in pixel space, after Bonnaire et al. 2025 (arXiv:2505.17638)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int, Shaped, UInt8
from torch import Tensor

from ..config import DitkitError
from ..rng import Rng
from .intervals import percentiles

__all__ = ["FMem", "Neighbours", "f_mem", "memorized", "share_of", "within_class_distance"]


def _rows(images: Shaped[Tensor, "n d"]) -> int:
    """How many images to hold in float64 at a time: at most 128 MiB of them, and 8 MiB of distances between blocks."""
    return min(1024, max(1, 2**24 // images.shape[1]))


@dataclass(frozen=True)
class Neighbours:
    """The two nearest distinct training images of each sample; distances are L2 over pixels, in the images' units."""

    nearest: Int[Tensor, "n"]  # index into the training set as given; of equal images the first
    d1: Float[Tensor, "n"]
    d2: Float[Tensor, "n"]
    ratio: Float[Tensor, "n"]  # d1 / d2: 0 for a copy, near 1 for a sample as far from one image as from the next
    memorized: Bool[Tensor, "n"]  # ratio < the threshold


@dataclass(frozen=True)
class FMem:
    """The fraction of memorized samples, with bootstrap standard error and 95% confidence interval."""

    value: float
    error: float
    low: float
    high: float
    samples: int


def _squared_distances(a: Float[Tensor, "n d"], b: Float[Tensor, "m d"]) -> Float[Tensor, "n m"]:
    """|a_i - b_j|^2 of float64 rows by a matrix product: exact for integers such as uint8 pixels."""
    return (a.square().sum(1)[:, None] + b.square().sum(1)[None] - 2 * a @ b.T).clamp(min=0)


def _distinct(images: Shaped[Tensor, "n d"]) -> Int[Tensor, "k"]:
    """Indices, in order, of the first of each group of equal rows."""
    groups, group = torch.unique(images, dim=0, return_inverse=True)
    order = torch.arange(len(images), device=images.device)
    first = torch.full((len(groups),), len(images), device=images.device)
    return first.scatter_reduce(0, group, order, "amin").sort().values


@torch.no_grad()
def memorized(samples: Shaped[Tensor, "n *s"], train: Shaped[Tensor, "m *s"], ratio: float = 1 / 3) -> Neighbours:
    """Which samples are copies: d1 / d2 < ratio, for the distances to the two nearest training images (their eq. 6).

    The training set is reduced to its distinct images first: with a duplicate d1 = d2, and its copies would hide.
    Near-duplicates still hide theirs. Samples must be in the space of the training images, quantised alike (uint8 with
    uint8). An exact copy has d1 = 0 exactly. Raises DitkitError for images that do not compare.
    """
    alike = samples.shape[1:] == train.shape[1:] and samples.dtype == train.dtype
    if samples.ndim < 2 or not alike or samples.numel() == 0 or len(train) == 0:
        raise DitkitError(
            f"samples {samples.dtype} {list(samples.shape)} do not compare with "
            f"training images {train.dtype} {list(train.shape)}: same shape and dtype, and at least one of each"
        )
    x, y = samples.flatten(1), train.to(samples.device).flatten(1)
    if x.is_floating_point() and not (x.isfinite().all() and y.isfinite().all()):
        raise DitkitError("images must be finite: there are infinities or NaNs among them")
    distinct = _distinct(y)
    if len(distinct) < 2:
        raise DitkitError(f"memorization needs at least 2 distinct training images, not {len(distinct)}")

    found, distances = [], []
    for rows in x.split(_rows(x)):
        rows = rows.double()
        best = torch.full((len(rows), 2), torch.inf, dtype=torch.float64, device=x.device)
        index = torch.zeros(len(rows), 2, dtype=torch.int64, device=x.device)
        for block in distinct.split(_rows(y)):
            squared = torch.cat((best, _squared_distances(rows, y[block].double())), dim=1)
            best, chosen = squared.topk(2, largest=False)
            index = torch.cat((index, block.expand(len(rows), -1)), dim=1).gather(1, chosen)
        # The product form rounds at 1e-16 of the norms, enough to choose but not for d1 = 0: measure the chosen again.
        exact = (rows[:, None] - y[index].double()).square().sum(2).sqrt()
        exact, order = exact.sort(dim=1)
        distances.append(exact)
        found.append(index.gather(1, order))
    d1, d2 = torch.cat(distances).unbind(1)
    return Neighbours(torch.cat(found)[:, 0], d1, d2, d1 / d2, d1 / d2 < ratio)


def f_mem(
    samples: Shaped[Tensor, "n *s"],
    train: Shaped[Tensor, "m *s"],
    ratio: float = 1 / 3,
    resamples: int = 1000,
    seed: int = 0,
) -> FMem:
    """The fraction of samples that are copies of training images, f_mem of Bonnaire et al. 2025, section 2.

    The interval is the bootstrap's 2.5% to 97.5%. With no copy among n samples it is 0 to 0: then what can be said is
    a fraction below 3 / n. Raises DitkitError as `memorized`.
    """
    return share_of(memorized(samples, train, ratio).memorized, resamples, seed)


def share_of(copies: Bool[Tensor, "n"], resamples: int = 1000, seed: int = 0) -> FMem:
    """The fraction of yes among so many, with the bootstrap's error and interval as in `f_mem`."""
    n, value = len(copies), copies.double().mean().item()
    # n draws with replacement from n yes-or-no outcomes hold a binomial number of yes: no need to draw the indices
    generator = Rng(seed).generator("bootstrap")
    counts = torch.full((resamples,), float(n), dtype=torch.float64)
    fractions = torch.binomial(counts, torch.full_like(counts, value), generator=generator) / n
    low, high = percentiles(fractions)
    return FMem(value, fractions.std().item(), low, high, n)


@torch.no_grad()
def within_class_distance(images: UInt8[Tensor, "n *s"], labels: Int[Tensor, "n"]) -> float:
    """How different images of one class are: mean over pairs in a class, then over classes.

    The distance of a pair is the root mean square over pixels, in units where images span [-1, 1]; 0 means that each
    class has collapsed to one image. Classes with one image do not count. Raises DitkitError where none has two.
    """
    if images.dtype != torch.uint8 or labels.shape != images.shape[:1]:
        raise DitkitError(
            f"need uint8 images and one label each, not {images.dtype} {list(images.shape)} and {list(labels.shape)}"
        )
    means = []
    for label in labels.unique():
        x = images[labels.to(images.device) == label].flatten(1).double()
        if len(x) < 2:
            continue
        total = sum(_squared_distances(rows, x).sqrt().sum().item() for rows in x.split(_rows(x)))
        means.append(total / (len(x) * (len(x) - 1)) / x.shape[1] ** 0.5 / 127.5)
    if not means:
        raise DitkitError("no class has two images: there is no distance within a class")
    return sum(means) / len(means)
