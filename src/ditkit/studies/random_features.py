"""Two times of training in a model that can be solved: a score of random features, after Bonnaire et al. 2025.

Section 4 of arXiv 2505.17638. Data x0 ~ N(0, I) in d dimensions, of which n are trained on, the noise of one time t of
dx = -x dt + sqrt(2) dB, so that x = e^-t x0 + sqrt(Delta) xi with Delta = 1 - e^-2t, and a score

    s_A(x) = A / sqrt(p) sigma(W x / sqrt(d)),    A [d p] trained, W [p d] standard normal and fixed,

with the loss L(A) = E |sqrt(Delta) s_A(x) + xi|^2 / d. It is quadratic in A. With the features phi = sigma(W x /
sqrt(d)), U = E phi phi^T and V = E phi xi^T, gradient flow from A = 0 relaxes each eigenvector of U at a rate that is
its eigenvalue times Delta / psi_p, where psi_p = p / d, psi_n = n / d, and time is counted such that dA/dtau = -d^2 / 2
grad L. The paper finds eigenvalues of about psi_p, which belong to the population and learn the score: tau_gen ~ 1 /
Delta. And, where p > n, others of about psi_p / psi_n, which belong to the training set: tau_mem ~ psi_n / Delta.

Here sigma(z) = sin(frequency z), for which the means over the noise are elementary, for a training set as for the
population: no number below has noise of sampling but that of W and of the training set.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from ..rng import Rng
from .laws import crossing

__all__ = ["Flow", "Losses", "moments", "population"]

Moments = tuple[Float[Tensor, "p p"], Float[Tensor, "p d"]]
"""U and V."""


def _overlaps(w: Float[Tensor, "p d"], variance: float) -> tuple[Float[Tensor, "p p"], Float[Tensor, "p p"]]:
    """exp(-variance |w_i - w_j|^2 / 2d) and the same of w_i + w_j: what noise of a variance leaves of a cosine."""
    squares, products = w.square().sum(1), w @ w.T
    scale = variance / (2 * w.shape[1])
    both = squares[:, None] + squares[None]
    return torch.exp(-scale * (both - 2 * products)), torch.exp(-scale * (both + 2 * products))


def moments(w: Float[Tensor, "p d"], x0: Float[Tensor, "n d"], t: float) -> Moments:
    """U = E phi phi^T and V = E phi xi^T over a training set and all noise, for phi = sin(w x / sqrt(d)).

    From E cos(m + g) = cos(m) exp(-var g / 2), and E sin(w x) xi = sqrt(Delta) w E cos(w x) (Stein).
    """
    d, delta = w.shape[1], -math.expm1(-2 * t)
    angles = math.exp(-t) * x0 @ w.T / math.sqrt(d)
    cosines, sines = angles.cos(), angles.sin()
    cc, ss = cosines.T @ cosines / len(x0), sines.T @ sines / len(x0)
    minus, plus = _overlaps(w, delta)
    damped = cosines.mean(0) * torch.exp(-delta * w.square().sum(1) / (2 * d))
    return ((cc + ss) * minus - (cc - ss) * plus) / 2, math.sqrt(delta / d) * damped[:, None] * w


def population(w: Float[Tensor, "p d"], t: float) -> Moments:
    """The same for infinitely many data, where x ~ N(0, I) at every time."""
    d, delta = w.shape[1], -math.expm1(-2 * t)
    minus, plus = _overlaps(w, 1.0)
    return (minus - plus) / 2, math.sqrt(delta / d) * torch.exp(-w.square().sum(1) / (2 * d))[:, None] * w


@dataclass(frozen=True)
class Losses:
    """Training and test loss at some times."""

    times: tuple[float, ...]
    train: tuple[float, ...]
    test: tuple[float, ...]

    def generalises(self, share: float = 0.9) -> float:
        """tau_gen: the time at which so much of the whole fall of the test loss is done."""
        falls = [self.test[0] - v for v in self.test]
        return _found(crossing(self.times, falls, share * max(falls)))

    def memorizes(self, share: float = 0.1) -> float:
        """tau_mem: the time at which the test loss is above the training loss by a share of what it is in the end."""
        gaps = [b - a for a, b in zip(self.train, self.test, strict=True)]
        return _found(crossing(self.times, gaps, share * gaps[-1]))


def _found(time: float | None) -> float:
    """Raises ValueError where there is none."""
    if time is None:
        raise ValueError("the times do not reach from before the fall of the losses to the end of training")
    return time


@dataclass(frozen=True)
class Flow:
    """Gradient flow of a random-features score in closed form. d, n, p: dimensions, training data, features."""

    d: int
    n: int
    p: int
    t: float = 0.1
    frequency: float = 1.5
    seed: int = 0

    @property
    def delta(self) -> float:
        """The variance of the noise."""
        return -math.expm1(-2 * self.t)

    def features(self) -> Float[Tensor, "p d"]:
        """The frozen weights, times the frequency."""
        draws = Rng(self.seed).generator("features")
        return self.frequency * torch.randn(self.p, self.d, generator=draws, dtype=torch.float64)

    def data(self) -> Float[Tensor, "n d"]:
        """The training set."""
        return torch.randn(self.n, self.d, generator=Rng(self.seed).generator("data"), dtype=torch.float64)

    def spectrum(self) -> Float[Tensor, "p"]:
        """Eigenvalues of U of the training set, from the least."""
        return torch.linalg.eigvalsh(moments(self.features(), self.data(), self.t)[0])

    def losses(self, times: Sequence[float]) -> Losses:
        """Training and test loss after each time of gradient flow from A = 0, where both are 1.

        The score of the population, s = -x, has the test loss 1 - Delta: none is lower.
        """
        w = self.features()
        u, v = moments(w, self.data(), self.t)
        values, vectors = torch.linalg.eigh(u)
        values = values.clamp(min=1e-12)  # rounding leaves some below 0
        mine = vectors.T @ v
        test_u, test_v = population(w, self.t)
        test_u, test_v = vectors.T @ test_u @ vectors, vectors.T @ test_v
        train, test = [], []
        for time in times:
            # A = -sqrt(p / Delta) (learned V)^T in the basis of U
            learned = (-torch.expm1(-self.delta * self.d / self.p * values * time) / values)[:, None] * mine
            fitted = (learned * (values[:, None] * learned - 2 * mine)).sum() / self.d
            met = (learned * (test_u @ learned - 2 * test_v)).sum() / self.d
            train.append(1 + float(fitted))
            test.append(1 + float(met))
        return Losses(tuple(times), tuple(train), tuple(test))
