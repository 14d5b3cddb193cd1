"""Mean and covariance of features, summed as they come, and the Frechet distance of what was summed. All in float64."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from ..config import DitkitError

__all__ = ["Gaussian", "Moments", "frechet_of_gaussians"]

_ROUNDED = 1e-3
"""A share of the largest number, by which published covariances may be off: some were summed in float32."""


@dataclass(frozen=True)
class Gaussian:
    """Mean and covariance of features in float64, and of how many rows where that is known."""

    mean: Float[Tensor, "d"]
    covariance: Float[Tensor, "d d"]
    count: int | None = None

    def __post_init__(self) -> None:
        width = len(self.mean) if self.mean.ndim == 1 else 0
        if not width or tuple(self.covariance.shape) != (width, width):
            raise DitkitError(
                f"statistics are a mean [d] and a covariance [d, d], not {list(self.mean.shape)} and "
                f"{list(self.covariance.shape)}"
            )
        for name in ("mean", "covariance"):
            value = getattr(self, name).detach()
            if value.is_complex():
                raise DitkitError(f"the {name} of features must be real, not {value.dtype}")
            value = value.double()
            if not bool(value.isfinite().all()):
                raise DitkitError(f"the {name} of features must be finite: there are infinities or NaNs in it")
            object.__setattr__(self, name, value)
        if float((self.covariance - self.covariance.T).abs().max()) > _ROUNDED * float(self.covariance.abs().max()):
            raise DitkitError("a covariance is symmetric, and this one is not: is it the right array?")


class Moments:
    """Mean and covariance of features that come in parts, in any number of processes.

    The mean is moved and deviations from it are summed (Chan et al. 1979, eq. 2.1), so that a mean far from zero costs
    no digits. What comes out is that of all rows at once, up to rounding in float64.
    """

    def __init__(self) -> None:
        self.count = 0
        self._mean, self._scatter = torch.zeros(0), torch.zeros(0, 0)

    def add(self, features: Float[Tensor, "n d"]) -> Moments:
        """Sum more rows. Raises DitkitError for rows of another width or values that are not finite."""
        if features.ndim != 2 or not features.shape[1]:
            raise DitkitError(f"features are rows [n, d], not {list(features.shape)}")
        if not bool(features.isfinite().all()):
            raise DitkitError("features must be finite: there are infinities or NaNs among them")
        if len(features):
            rows = features.detach().cpu().double()
            mean = rows.mean(0)
            self._join(len(rows), mean, (rows - mean).T @ (rows - mean))
        return self

    def merge(self, other: Moments) -> Moments:
        """Add what another one has summed. Raises DitkitError for features of another width."""
        if other.count:
            self._join(other.count, other._mean, other._scatter)
        return self

    def _join(self, count: int, mean: Tensor, scatter: Tensor) -> None:
        if not self.count:
            self.count, self._mean, self._scatter = count, mean.clone(), scatter.clone()
            return
        if mean.shape != self._mean.shape:
            raise DitkitError(f"features of {len(mean)} numbers cannot be added to features of {len(self._mean)}")
        total, step = self.count + count, mean - self._mean
        self._scatter += scatter + self.count * count / total * torch.outer(step, step)
        self._mean += count / total * step
        self.count = total

    def gaussian(self) -> Gaussian:
        """Mean and unbiased covariance. Raises DitkitError for fewer than 2 rows."""
        if self.count < 2:
            raise DitkitError(f"a covariance needs at least 2 rows of features, not {self.count}")
        return Gaussian(self._mean.clone(), self._scatter / (self.count - 1), self.count)


def _factor(covariance: Float[Tensor, "d d"]) -> Float[Tensor, "k d"]:
    """R with R^T R = the covariance; eigenvalues that are rounding are left out, as their roots would not be."""
    values, vectors = torch.linalg.eigh((covariance + covariance.T) / 2)
    if float(values.min()) < -_ROUNDED * float(values.abs().max()):
        raise DitkitError(
            f"a covariance has no negative eigenvalues, and this one has {float(values.min()):.3g} beside "
            f"{float(values.max()):.3g}: is it the right array?"
        )
    kept = values > len(values) * torch.finfo(values.dtype).eps * values.abs().max()
    return values[kept].sqrt()[:, None] * vectors[:, kept].T


def frechet_of_gaussians(a: Gaussian, b: Gaussian) -> float:
    """Squared Frechet distance of two Gaussians (Heusel et al. 2017, arXiv:1706.08500, eq. 6), in units of the features
    squared: `frechet_distance` where only statistics are there. Raises DitkitError for other widths."""
    if a.mean.shape != b.mean.shape:
        raise DitkitError(
            f"statistics of {len(a.mean)} and {len(b.mean)} features do not compare: they are of different networks"
        )
    # the trace of (S_a S_b)^(1/2) is the sum of the singular values of R_a R_b^T
    overlap = torch.linalg.svdvals(_factor(a.covariance) @ _factor(b.covariance).T).sum()
    spread = a.covariance.trace() + b.covariance.trace() - 2 * overlap
    return max(float((a.mean - b.mean).square().sum() + spread), 0.0)  # below zero only by rounding
