"""Sets of features compared by their neighbours, and the diversity of one set. All in float64, a block at a time."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from ..config import DitkitError
from .distances import Estimate, checked_sets
from .intervals import Interval, bootstrap_mean

__all__ = ["density_coverage", "inception_score", "precision_recall", "vendi_score"]

_NUMBERS = 1 << 24  # distances in memory at a time: 128 MiB
_ROUNDING = 1e-13  # of squared norms: what is below is the distance of equal rows


def _squared(x: Float[Tensor, "n d"], y: Float[Tensor, "m d"]) -> Float[Tensor, "n m"]:
    """Squared distances by a matrix product; those of equal rows are 0 exactly."""
    norms = x.square().sum(1)[:, None] + y.square().sum(1)
    squared = norms - 2 * x @ y.T
    return torch.where(squared > _ROUNDING * norms, squared, 0)


def _blocks(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    return x.split(max(1, _NUMBERS // len(y)))


def _radii(x: Float[Tensor, "n d"], k: int) -> Float[Tensor, "n"]:
    """Squared distance of each row to the k-th nearest of the others: itself is the nearest of all."""
    return torch.cat([_squared(rows, x).kthvalue(k + 1, dim=1).values for rows in _blocks(x, x)])


def _centred(samples: Tensor, real: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Both sets in float64 about the mean of the real one, which changes no distance and keeps their digits.

    Raises DitkitError for sets that have no k-th neighbour.
    """
    x, y = checked_sets(samples, real, least=2)
    if k < 1 or min(len(x), len(y)) <= k:
        raise DitkitError(f"a {k}-th neighbour needs more than {k} images in each set, not {len(x)} and {len(y)}")
    middle = y.mean(0)
    return x - middle, y - middle


def _inside(x: Tensor, centres: Tensor, radii: Tensor) -> Float[Tensor, "n"]:
    """In how many of the closed balls each row lies."""
    return torch.cat([(_squared(rows, centres) <= radii).sum(1) for rows in _blocks(x, centres)]).double()


def precision_recall(
    samples: Float[Tensor, "n d"], real: Float[Tensor, "m d"], k: int = 3, seed: int = 0
) -> tuple[Interval, Interval]:
    """Improved precision and recall (Kynkäänniemi et al. 2019, arXiv:1904.06991, eq. 1 and 2).

    Precision is the share of samples that lie in a ball around a real image that reaches to its k-th nearest real
    image, recall the same with both sets exchanged. Both depend on n and m: compare equal counts only. The bootstrap is
    over the rows whose share it is, the set of the balls as it is. Raises DitkitError for sets that do not compare.
    """
    x, y = _centred(samples, real, k)
    precision, recall = _inside(x, y, _radii(y, k)) > 0, _inside(y, x, _radii(x, k)) > 0
    return bootstrap_mean(precision.double(), seed=seed), bootstrap_mean(recall.double(), seed=seed)


def density_coverage(
    samples: Float[Tensor, "n d"], real: Float[Tensor, "m d"], k: int = 5, seed: int = 0
) -> tuple[Interval, Interval]:
    """Density and coverage (Naeem et al. 2020, arXiv:2002.09797, eq. 3 and 4).

    Density is the mean over samples of the number of real images whose balls they lie in, over k; it may exceed 1.
    Coverage is the share of real images with a sample in their ball. The bootstrap is over samples for density and over
    real images for coverage, the other set as it is. Raises DitkitError for sets that do not compare.
    """
    x, y = _centred(samples, real, k)
    radii = _radii(y, k)
    nearest = torch.cat([_squared(rows, x).amin(1) for rows in _blocks(y, x)])
    density, coverage = _inside(x, y, radii) / k, (nearest <= radii).double()
    return bootstrap_mean(density, seed=seed), bootstrap_mean(coverage, seed=seed)


def vendi_score(features: Float[Tensor, "n d"]) -> float:
    """Vendi score (Friedman & Dieng 2023, arXiv:2210.02410, definition 3.1) with the cosine kernel: how many samples,
    all different, would be as diverse; 1 to n.

    exp of the entropy of the eigenvalues of K / n. It grows with n, so compare equal counts only; a bootstrap repeats
    rows, which lowers it, and so there is no interval. Raises DitkitError for a row of zeros, which has no direction.
    """
    x, _ = checked_sets(features, features, least=1)
    norms = x.norm(dim=1, keepdim=True)
    if not bool((norms > 0).all()):
        raise DitkitError("the Vendi score is of directions of features, and one of them is zero")
    x = x / norms
    # K = X X^T and X^T X have the same eigenvalues but for zeros: take the smaller matrix
    gram = x.T @ x if x.shape[1] < len(x) else x @ x.T
    values = torch.linalg.eigvalsh(gram / len(x)).clamp(min=0)
    return float(torch.exp(-torch.xlogy(values, values).sum()))


def inception_score(logits: Float[Tensor, "n c"], splits: int = 10) -> Estimate:
    """Inception score (Salimans et al. 2016, arXiv:1606.03498, section 4): exp of the mean KL of each sample's classes
    to all samples' classes, mean over `splits` consecutive parts.

    logits: of the classifier, or log-probabilities. The error is the standard error of that mean over parts; what is
    published with a score as ± is their standard deviation, sqrt(splits - 1) times as much with n - 1 below its root.
    Raises DitkitError for fewer samples than parts.
    """
    x, _ = checked_sets(logits, logits, least=1)
    if splits < 1 or len(x) < splits:
        raise DitkitError(f"an inception score of {splits} parts needs as many samples, not {len(x)}")
    scores = []
    for i in range(splits):
        log_p = x[i * len(x) // splits : (i + 1) * len(x) // splits].log_softmax(1)
        p = log_p.exp()
        mean = p.mean(0)
        divergence = (torch.xlogy(p, p) - torch.xlogy(p, mean)).sum(1)
        scores.append(float(divergence.mean().exp()))
    found = torch.tensor(scores, dtype=torch.float64)
    error = float(found.std()) / splits**0.5 if splits > 1 else 0.0
    return Estimate(float(found.mean()), error)
