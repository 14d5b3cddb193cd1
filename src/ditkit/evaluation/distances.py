"""Distances between two sets of features: Frechet, and by kernels: KID and the MMD of CMMD. All in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from ..config import DitkitError

__all__ = ["Estimate", "checked_sets", "frechet_distance", "gaussian_distance", "kernel_distance"]

_ROWS = 1024  # rows of a kernel matrix in memory at a time: 8 KiB per row of the other set


@dataclass(frozen=True)
class Estimate:
    """A number and its standard error."""

    value: float
    error: float


def checked_sets(a: Tensor, b: Tensor, least: int) -> tuple[Float[Tensor, "n d"], Float[Tensor, "m d"]]:
    """Two sets of features in float64. Raises DitkitError for what does not compare, or fewer rows than `least`."""
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1]:
        raise DitkitError(f"feature sets must be [n, d] and [m, d], not {list(a.shape)} and {list(b.shape)}")
    if min(len(a), len(b)) < least:
        raise DitkitError(f"feature sets need at least {least} rows each, not {len(a)} and {len(b)}")
    a, b = a.detach().double(), b.detach().double()
    if not (a.isfinite().all() and b.isfinite().all()):
        raise DitkitError("features must be finite: there are infinities or NaNs among them")
    return a, b


def _factor(centred: Float[Tensor, "n d"]) -> Float[Tensor, "k d"]:
    """R with R^T R = the sample covariance, k = min(n, d)."""
    return torch.linalg.qr(centred / math.sqrt(len(centred) - 1), mode="r").R


def frechet_distance(a: Float[Tensor, "n d"], b: Float[Tensor, "m d"]) -> float:
    """Squared Frechet distance of the Gaussians fitted to two sets (Heusel et al. 2017, arXiv:1706.08500, eq. 6).

    |mu_a - mu_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)), in squared units of the features. Biased upwards, and strongly
    where n < d: compare only numbers with the same n and m. Raises DitkitError for fewer than 2 rows or values that
    are not finite.
    """
    a, b = checked_sets(a, b, least=2)
    mean_a, mean_b = a.mean(0), b.mean(0)
    root_a, root_b = _factor(a - mean_a), _factor(b - mean_b)
    # With S = R^T R, the eigenvalues of S_a S_b are the squared singular values of R_a R_b^T. So the trace of the root
    # is their sum: no covariance is formed, no square root of a rounding error taken, and n < d is no special case.
    overlap = torch.linalg.svdvals(root_a @ root_b.T).sum()
    distance = (mean_a - mean_b).square().sum() + root_a.square().sum() + root_b.square().sum() - 2 * overlap
    return max(distance.item(), 0.0)  # below zero only by rounding


def _cubic(x: Tensor, y: Tensor) -> Float[Tensor, "n m"]:
    """k(x_i, y_j) = (x_i . y_j / d + 1)^3."""
    return (x @ y.T / x.shape[1] + 1) ** 3


def _kernel_sums(
    x: Tensor, y: Tensor, kernel: Callable[[Tensor, Tensor], Tensor] = _cubic
) -> tuple[Float[Tensor, "n"], Float[Tensor, "m"]]:
    """Sums over the rows and over the columns of a kernel's matrix."""
    rows, columns = [], torch.zeros(len(y), dtype=x.dtype, device=x.device)
    for chunk in x.split(_ROWS):
        block = kernel(chunk, y)
        rows.append(block.sum(1))
        columns += block.sum(0)
    return torch.cat(rows), columns


def _within(x: Tensor) -> Float[Tensor, "n"]:
    """For each row, the sum of its kernels with all the other rows."""
    return _kernel_sums(x, x)[0] - (x.square().sum(1) / x.shape[1] + 1) ** 3


def _jackknife(leave_one_out: Float[Tensor, "n"]) -> Float[Tensor, ""]:
    n = len(leave_one_out)
    return (n - 1) / n * (leave_one_out - leave_one_out.mean()).square().sum()


def kernel_distance(a: Float[Tensor, "n d"], b: Float[Tensor, "m d"]) -> Estimate:
    """KID: unbiased squared MMD with a cubic kernel, on the full sets (Binkowski et al. 2018, arXiv:1801.01401, eq. 4).

    Negative values are part of an unbiased estimate near zero and are kept. The standard error is the jackknife's: each
    row of each set is left out once, exactly and without random subsets, and the two variances add. It is right to
    leading order where the distributions differ and errs upwards, by at most sqrt(2), where they are equal (Efron &
    Stein 1981). Raises DitkitError for fewer than 3 rows or values that are not finite.
    """
    x, y = checked_sets(a, b, least=3)
    n, m = len(x), len(y)
    within_x, within_y = _within(x), _within(y)
    cross_x, cross_y = _kernel_sums(x, y)
    sum_x, sum_y, sum_cross = within_x.sum(), within_y.sum(), cross_x.sum()
    mean_x, mean_y = sum_x / (n * (n - 1)), sum_y / (m * (m - 1))
    value = mean_x + mean_y - 2 * sum_cross / (n * m)
    without_x = (sum_x - 2 * within_x) / ((n - 1) * (n - 2)) + mean_y - 2 * (sum_cross - cross_x) / ((n - 1) * m)
    without_y = (sum_y - 2 * within_y) / ((m - 1) * (m - 2)) + mean_x - 2 * (sum_cross - cross_y) / (n * (m - 1))
    return Estimate(value.item(), math.sqrt(_jackknife(without_x) + _jackknife(without_y)))


def gaussian_distance(
    a: Float[Tensor, "n d"], b: Float[Tensor, "m d"], sigma: float = 10.0, scale: float = 1000.0
) -> Estimate:
    """The squared MMD with the kernel exp(-|x - y|^2 / (2 sigma^2)), times `scale`: of CLIP embeddings, CMMD
    (Jayasumana et al. 2024, arXiv:2401.09603, eq. 4, with their sigma and scale).

    Means are over all pairs, a row with itself included (Gretton et al. 2012, eq. 5), so it is 0 for equal sets and
    never below, and biased upwards by about the mean of 1 - k over n and m. The standard error is the jackknife's, as
    that of `kernel_distance`. Raises DitkitError for fewer than 3 rows or values that are not finite.
    """
    if not (sigma > 0 and scale > 0):
        raise DitkitError(f"sigma and scale of a Gaussian kernel must be above 0, not {sigma:g} and {scale:g}")
    x, y = checked_sets(a, b, least=3)
    middle = y.mean(0)
    x, y = x - middle, y - middle

    def less(p: Tensor, q: Tensor) -> Tensor:
        """k - 1, as the ones cancel and their digits are worth keeping: a wide kernel is nearly 1 everywhere."""
        squared = p.square().sum(1)[:, None] + q.square().sum(1) - 2 * p @ q.T
        return torch.expm1(squared.clamp(min=0) / (-2 * sigma**2))

    n, m = len(x), len(y)
    within_x, within_y = _kernel_sums(x, x, less)[0], _kernel_sums(y, y, less)[0]
    cross_x, cross_y = _kernel_sums(x, y, less)
    sum_x, sum_y, sum_cross = within_x.sum(), within_y.sum(), cross_x.sum()
    mean_x, mean_y = sum_x / n**2, sum_y / m**2
    value = mean_x + mean_y - 2 * sum_cross / (n * m)
    # k - 1 of a row with itself is 0
    without_x = (sum_x - 2 * within_x) / (n - 1) ** 2 + mean_y - 2 * (sum_cross - cross_x) / ((n - 1) * m)
    without_y = (sum_y - 2 * within_y) / (m - 1) ** 2 + mean_x - 2 * (sum_cross - cross_y) / (n * (m - 1))
    error = math.sqrt(_jackknife(without_x) + _jackknife(without_y))
    return Estimate(scale * max(value.item(), 0.0), scale * error)
