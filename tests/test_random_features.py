"""Random features: the solved flow is gradient descent, its means are those of draws, and its two times scale apart."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from ditkit.rng import Rng
from ditkit.studies.laws import crossing
from ditkit.studies.random_features import Flow, moments, population

TINY = Flow(d=3, n=4, p=6, t=0.2)


def draws(name: str, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=Rng(7).generator(name), dtype=torch.float64)


def test_the_means_over_the_noise_are_those_of_many_draws() -> None:
    w, x0 = TINY.features(), TINY.data()
    noise = draws("noise", 100_000, 1, 3)
    for found, start in ((moments(w, x0, TINY.t), x0), (population(w, TINY.t), draws("fresh", 100_000, 1, 3))):
        x = math.exp(-TINY.t) * start + math.sqrt(TINY.delta) * noise  # [draws, n or 1, d]
        phi = torch.sin(x @ w.T / math.sqrt(3)).flatten(0, 1)
        xi = noise.expand_as(x).flatten(0, 1)
        for mean, exact in ((phi.T @ phi / len(phi), found[0]), (phi.T @ xi / len(phi), found[1])):
            assert (mean - exact).abs().max() < 0.015
            assert exact.abs().max() > 0.1


def test_the_closed_form_is_gradient_descent_in_small_steps() -> None:
    """With autograd, on the loss as it is written, from A = 0."""
    w = TINY.features()
    (u, v), (test_u, test_v) = moments(w, TINY.data(), TINY.t), population(w, TINY.t)
    d, p, delta = TINY.d, TINY.p, TINY.delta

    def loss(a: Tensor, second: Tensor, cross: Tensor) -> Tensor:
        return 1 + (delta / p * torch.trace(a @ second @ a.T) + 2 * math.sqrt(delta / p) * torch.trace(a @ cross)) / d

    a = torch.zeros(d, p, dtype=torch.float64, requires_grad=True)
    times, step = (1.0, 4.0, 16.0), 0.005
    train, test = [], []
    for k in range(1, 3201):
        (gradient,) = torch.autograd.grad(loss(a, u, v), a)
        a = (a - step * d**2 / 2 * gradient).detach().requires_grad_()
        if k in (200, 800, 3200):
            train.append(loss(a, u, v).item())
            test.append(loss(a, test_u, test_v).item())
    found = TINY.losses(times)
    assert len(train) == 3
    assert found.train == pytest.approx(train, abs=1e-4)
    assert found.test == pytest.approx(test, abs=1e-4)
    assert found.train[0] < 0.999
    assert abs(found.test[2] - found.train[2]) > 0.01


def test_before_training_both_losses_are_1_and_no_test_loss_is_below_the_scores() -> None:
    flow = Flow(d=8, n=16, p=64)
    times = [10 ** (k / 4) for k in range(-4, 25)]
    found = flow.losses([0.0, *times])
    assert (found.train[0], found.test[0]) == (1.0, 1.0)
    assert list(found.train) == sorted(found.train, reverse=True)
    assert min(found.test) > 1 - flow.delta
    assert found.train[-1] < 1 - flow.delta < found.test[-1]  # below what the score of the population has: by heart
    assert flow.losses([1e9]).train[0] >= 0
    assert int((flow.spectrum() < -1e-9).sum()) == 0


def test_with_more_data_copies_come_later_and_the_score_does_not() -> None:
    times = [10 ** (k / 8) for k in range(-8, 49)]
    losses = {n: Flow(d=16, n=n, p=512, t=0.1, frequency=1.0).losses(times) for n in (32, 128)}
    assert losses[128].generalises() < 1.5 * losses[32].generalises()
    assert losses[128].memorizes() > 2.5 * losses[32].memorizes()
    assert losses[32].memorizes() > 2 * losses[32].generalises()
    with pytest.raises(ValueError, match="reach"):
        Flow(d=3, n=4, p=6).losses([1.0, 2.0, 3.0]).memorizes(1.5)


def test_where_a_curve_reaches_a_level() -> None:
    assert crossing([1, 10, 100], [0.0, 0.2, 0.4], 0.1) == pytest.approx(10**0.5)
    assert crossing([1, 10, 100], [0.0, 0.2, 0.4], 0.2) == 10
    assert crossing([1, 10, 100], [0.0, 0.2, 0.4], 0.5) is None
    assert crossing([1, 10, 100], [0.3, 0.2, 0.4], 0.3) == pytest.approx(10**1.5)
    assert crossing([1, 10], [0.5, 0.6], 0.3) is None
