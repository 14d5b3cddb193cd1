"""Metrics of features against packages that others keep, against what is known exactly, and against simulations."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from prdc import compute_prdc
from torch import Tensor
from torchmetrics.image.fid import _compute_fid
from torchmetrics.image.inception import InceptionScore
from torchmetrics.image.kid import poly_mmd
from vendi_score import vendi

from ditkit.config import DitkitError
from ditkit.evaluation.distances import frechet_distance, gaussian_distance, kernel_distance
from ditkit.evaluation.intervals import bootstrap_mean
from ditkit.evaluation.moments import Gaussian, Moments, frechet_of_gaussians
from ditkit.evaluation.sets import density_coverage, inception_score, precision_recall, vendi_score


def rows(n: int, d: int, seed: int, shift: float = 0.0) -> Tensor:
    """Correlated features in float64."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(d, d, generator=torch.Generator().manual_seed(99), dtype=torch.float64) / d**0.5
    return torch.randn(n, d, generator=generator, dtype=torch.float64) @ mix + shift


SAMPLES, REAL = rows(400, 24, 1, 0.2), rows(500, 24, 2)


def test_frechet_distances_agree_with_torchmetrics() -> None:
    theirs = float(_compute_fid(SAMPLES.mean(0), SAMPLES.T.cov(), REAL.mean(0), REAL.T.cov()))
    a, b = (Moments().add(x).gaussian() for x in (SAMPLES, REAL))
    assert frechet_of_gaussians(a, b) == pytest.approx(theirs, rel=1e-6)
    assert frechet_distance(SAMPLES, REAL) == pytest.approx(theirs, rel=1e-6)


def test_kernel_distances_agree_with_torchmetrics() -> None:
    theirs = float(poly_mmd(REAL[:400], SAMPLES))
    assert kernel_distance(SAMPLES, REAL[:400]).value == pytest.approx(theirs, rel=1e-6)


@pytest.mark.parametrize("k", [3, 5])
def test_precision_recall_density_and_coverage_agree_with_prdc(k: int) -> None:
    for shift in (0.0, 0.5, 1.0):
        samples = SAMPLES + shift
        theirs = compute_prdc(REAL.numpy(), samples.numpy(), k)
        found = (*precision_recall(samples, REAL, k), *density_coverage(samples, REAL, k))
        for ours, name in zip(found, ("precision", "recall", "density", "coverage"), strict=True):
            assert ours.value == pytest.approx(float(theirs[name]), rel=1e-6), (shift, name)
    assert 0 < found[0].value < 1  # something was there to agree about


@pytest.mark.parametrize("n", [20, 300])
def test_vendi_scores_agree_with_vendi_score(n: int) -> None:
    x = rows(n, 24, 3)
    assert vendi_score(x) == pytest.approx(float(vendi.score_X(x.numpy())), rel=1e-6)
    assert vendi_score(torch.eye(7)) == pytest.approx(7)
    assert vendi_score(torch.ones(9, 4)) == pytest.approx(1)


def test_inception_scores_agree_with_torchmetrics() -> None:
    logits = 3 * rows(1000, 10, 4)
    metric = InceptionScore(feature=torch.nn.Identity(), splits=10).double().set_dtype(torch.float64)
    metric.update(logits)
    torch.manual_seed(5)
    theirs = [float(x) for x in metric.compute()]
    torch.manual_seed(5)
    ours = inception_score(logits[torch.randperm(1000)], splits=10)  # as they shuffle
    assert ours.value == pytest.approx(theirs[0], rel=1e-6)
    assert ours.error * 10**0.5 == pytest.approx(theirs[1], rel=1e-6)
    # classes that are certain, and logits whose probability is 0
    assert inception_score(1e4 * torch.eye(5).repeat(4, 1), splits=1).value == pytest.approx(5)


def test_gaussian_distances_are_the_plain_double_sum() -> None:
    """Over more rows than a block has; CLIP's embeddings have length 1."""
    x, y = (torch.nn.functional.normalize(v, dim=1) for v in (rows(1100, 6, 5, 0.1), rows(40, 6, 6)))

    def plain(x: np.ndarray, y: np.ndarray) -> float:
        def mean(u: np.ndarray, v: np.ndarray) -> float:
            return float(np.exp(-((u[:, None] - v[None]) ** 2).sum(2) / 200).mean())

        return 1000 * (mean(x, x) + mean(y, y) - 2 * mean(x, y))

    assert gaussian_distance(x, y).value == pytest.approx(plain(x.numpy(), y.numpy()), rel=1e-6)
    x = x[:30]
    found = gaussian_distance(x, y)
    left = [
        np.array([plain(np.delete(x.numpy(), i, 0), y.numpy()) for i in range(len(x))]),
        np.array([plain(x.numpy(), np.delete(y.numpy(), i, 0)) for i in range(len(y))]),
    ]
    assert found.error == pytest.approx(sum((len(v) - 1) * v.var() for v in left) ** 0.5, rel=1e-5)


def test_moments_do_not_depend_on_how_the_rows_come() -> None:
    far = REAL + 1e6  # sums of squares in float64 would keep four digits of the variances
    whole = Moments().add(far).gaussian()
    torch.testing.assert_close(whole.covariance, REAL.T.cov(), rtol=1e-7, atol=1e-9)
    for size in (1, 7, 499):
        halves = Moments(), Moments()
        for i, part in enumerate(far.split(size)):
            halves[i % 2].add(part)
        parts = halves[0].merge(halves[1]).gaussian()
        assert parts.count == 500
        torch.testing.assert_close(parts.mean, whole.mean, rtol=1e-14, atol=0)
        torch.testing.assert_close(parts.covariance, whole.covariance, rtol=1e-8, atol=1e-9)
    single = Moments().add(REAL.float()).gaussian()
    torch.testing.assert_close(single.covariance, REAL.float().double().T.cov(), rtol=1e-12, atol=1e-14)


def test_a_set_is_at_no_distance_from_itself() -> None:
    few, repeated = rows(10, 24, 7), REAL[:50].repeat(6, 1)
    for x in (REAL, few, repeated, 1e3 + REAL):
        scale = float(x.var(0).sum())
        gaussian = Moments().add(x).gaussian()
        assert frechet_distance(x, x) < 1e-10 * scale
        assert frechet_of_gaussians(gaussian, gaussian) < 1e-10 * scale
        assert gaussian_distance(x, x).value == 0
        for share in (*precision_recall(x, x), density_coverage(x, x)[1]):
            assert share.value == 1
            assert (share.low, share.high) == (1, 1)


def test_statistics_of_fewer_rows_than_features_are_as_good_as_the_rows() -> None:
    a, b = rows(10, 24, 7), rows(15, 24, 8, 1.0)
    found = frechet_of_gaussians(Moments().add(a).gaussian(), Moments().add(b).gaussian())
    assert found == pytest.approx(frechet_distance(a, b), rel=1e-6)


def coverage_of_intervals(measure: Callable[[int], tuple[float, float]], truth: float, repeats: int = 200) -> float:
    """The share of repetitions whose interval holds the truth."""
    return sum(low <= truth <= high for low, high in map(measure, range(repeats))) / repeats


def test_bootstrap_intervals_of_a_mean_cover_the_truth() -> None:
    """95% intervals of 200 numbers of a skewed distribution: the exponential's mean is 1."""
    draws = torch.empty(1000, 200).exponential_(generator=torch.Generator().manual_seed(0))

    def measure(seed: int) -> tuple[float, float]:
        found = bootstrap_mean(draws[seed], seed=seed)
        return found.low, found.high

    assert 0.90 <= coverage_of_intervals(measure, 1.0, 1000) <= 0.99


@pytest.mark.parametrize("name", ["precision", "density", "recall", "coverage"])
def test_bootstrap_intervals_of_neighbours_cover_the_truth(name: str) -> None:
    """One set is fixed; the truth is what many sets like the other one give on average."""
    fixed, d, n = rows(150, 4, 11), 4, 200
    place = {"precision": 0, "density": 0, "recall": 1, "coverage": 1}[name]
    function = precision_recall if name in ("precision", "recall") else density_coverage

    def found(other: Tensor, seed: int = 0):
        pair = (fixed, other) if place else (other, fixed)
        return function(*pair, seed=seed)[place]

    truth = float(np.mean([found(rows(n, d, 50_000 + i, 0.7)).value for i in range(200)]))
    assert 0.05 < truth < 0.95

    def measure(seed: int) -> tuple[float, float]:
        interval = found(rows(n, d, 20_000 + seed, 0.7), seed)
        return interval.low, interval.high

    assert 0.90 <= coverage_of_intervals(measure, truth) <= 0.99


def test_intervals_of_the_gaussian_distance_cover_the_truth() -> None:
    """Two standard errors; the truth, by exact integrals: E k of N(0, 1) and N(m, 1) is sqrt(s^2 / (s^2 + 2))
    exp(-m^2 / (2 (s^2 + 2))). The bias of its diagonal, (1 - E k) (1/n + 1/m), is added."""
    sigma, shift, n = 2.0, 0.6, 150
    flat = (sigma**2 / (sigma**2 + 2)) ** 0.5
    truth = 2 * flat * (1 - np.exp(-(shift**2) / (2 * (sigma**2 + 2)))) + (1 - flat) * 2 / n

    def measure(seed: int) -> tuple[float, float]:
        generator = torch.Generator().manual_seed(seed)
        draws = torch.randn(2, n, 1, generator=generator, dtype=torch.float64)
        found = gaussian_distance(draws[0] + shift, draws[1], sigma=sigma, scale=1.0)
        return found.value - 1.96 * found.error, found.value + 1.96 * found.error

    assert 0.90 <= coverage_of_intervals(measure, truth) <= 0.99


def test_what_cannot_be_measured_is_refused() -> None:
    for call in (
        lambda: precision_recall(REAL[:3], REAL, 3),
        lambda: density_coverage(REAL, REAL[:, :3]),
        lambda: precision_recall(REAL, REAL, 0),
        lambda: vendi_score(torch.zeros(4, 3)),
        lambda: inception_score(REAL[:5], splits=10),
        lambda: gaussian_distance(REAL, REAL, sigma=0),
        lambda: Moments().add(REAL[:1]).gaussian(),
        lambda: Moments().add(REAL).add(REAL[:, :3]),
        lambda: Moments().add(torch.full((2, 2), float("nan"))),
        lambda: Gaussian(torch.zeros(3), torch.zeros(4, 4)),
        lambda: Gaussian(torch.zeros(3), torch.full((3, 3), float("inf"))),
        lambda: frechet_of_gaussians(*(Moments().add(x).gaussian() for x in (REAL, REAL[:, :3]))),
    ):
        with pytest.raises(DitkitError):
            call()
