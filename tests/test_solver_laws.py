"""Whole samplings, from the noise to the data: errors, variances and laws of what comes out."""

from __future__ import annotations

import functools
import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from ditkit.conditioning import Conditioning
from ditkit.config import DitkitError
from ditkit.diffusion import (
    DDIM,
    DDPM,
    Ancestral,
    Euler,
    Heun,
    Linear,
    Meaning,
    integrate,
    posterior,
)
from ditkit.rng import Replay, Rng

from .exact import NOTHING, Exact, gaussian, grid, mixture, moments, run, start

DETERMINISTIC: dict[str, Any] = {"euler": Euler(), "heun": Heun(), "ddim": DDIM()}
STOCHASTIC: dict[str, Any] = {"ddpm": Ancestral("posterior"), "ddpm beta": Ancestral("beta"), "ddim eta": DDIM(eta=1.0)}


@functools.cache
def classical_runge_kutta(scale: float) -> Tensor:
    """The mixture's trajectories on the linear path, with many steps of order 4."""
    x, denoiser = start(scale=scale), mixture(Linear(scale)).denoiser()

    def velocity(x: Tensor, t: float) -> Tensor:
        # at t = 0, where x0 says nothing, the velocity is its limit, which a step of 1e-7 approaches
        return denoiser(x, max(t, 1e-7), NOTHING).velocity

    for t, s in itertools.pairwise(grid("uniform", 1500, Linear(scale))):
        h, m = s - t, (s + t) / 2
        k1 = velocity(x, t)
        k2 = velocity(x + h / 2 * k1, m)
        k3 = velocity(x + h / 2 * k2, m)
        x = x + h / 6 * (k1 + 2 * k2 + 2 * k3 + velocity(x + h * k3, s))
    return x


@pytest.mark.parametrize("scale", [1.0, 2.0])
@pytest.mark.parametrize("name", DETERMINISTIC)
def test_a_solver_has_the_order_that_it_declares(name: str, scale: float) -> None:
    """On a mixture of two Gaussians, whose denoiser is known."""
    solver, path, truth = DETERMINISTIC[name], Linear(scale), classical_runge_kutta(scale)
    x, exact = start(scale=scale), mixture(path)
    errors = [float((run(solver, exact, grid("uniform", n, path), x) - truth).abs().mean()) for n in (48, 96, 192)]
    for coarse, fine in itertools.pairwise(errors):
        assert math.log2(coarse / fine) == pytest.approx(solver.order, abs=0.3)
    assert errors[0] < 0.1


@pytest.mark.parametrize("name", ["ddim"])
def test_the_order_on_the_published_table(name: str) -> None:
    """For Gaussian data, (x - alpha m) / sqrt(alpha^2 s^2 + sigma^2) does not change along the exact trajectory."""
    path, mean, std = DDPM(), 0.7, 0.5
    solver, x = DETERMINISTIC[name], start(d=1)
    alpha, sigma = (float(c) for c in path(1.0))
    truth = mean + std * (x - alpha * mean) / math.sqrt((alpha * std) ** 2 + sigma**2)
    exact = gaussian(path, mean, std)
    errors = [float((run(solver, exact, grid("uniform", n, path), x) - truth).abs().mean()) for n in (125, 250, 500)]
    for coarse, fine in itertools.pairwise(errors):
        assert math.log2(coarse / fine) == pytest.approx(solver.order, abs=0.3)


@pytest.mark.parametrize("name", STOCHASTIC)
@pytest.mark.parametrize(("path", "counts"), [(Linear(), (100, 200, 400)), (DDPM(), (125, 250, 500))], ids=str)
def test_a_random_solver_draws_the_right_variance_with_the_order_it_declares(
    name: str, path: Any, counts: tuple[int, ...]
) -> None:
    solver, exact = STOCHASTIC[name], gaussian(path, 0.7, 0.5)
    alpha, sigma = (float(c) for c in path(1.0))
    prior = (alpha * 0.5) ** 2 + sigma**2
    errors = []
    for n in counts:
        _, variance = moments(solver, exact, grid("uniform", n, path), prior)
        errors.append(abs(variance - 0.25))
    for coarse, fine in itertools.pairwise(errors):
        assert math.log2(coarse / fine) == pytest.approx(solver.order, abs=0.3)
    assert errors[-1] < 0.01


@pytest.mark.parametrize("n", [4, 20, 100])
def test_each_bound_of_the_variance_is_exact_where_its_paper_says(n: int) -> None:
    """Ho et al. 2020 section 3.2: beta for data of variance 1, the posterior variance for a single point."""
    path = DDPM()
    times = grid("ddpm", n, path)
    alpha = float(path(times[-2])[0])
    # data ~ N(0, 1): x keeps the variance 1 up to the last step, which takes the mean alpha x
    mean, variance = moments(Ancestral("beta"), gaussian(path, 0.0, 1.0), times, 1.0)
    assert (mean, variance) == (pytest.approx(0, abs=1e-12), pytest.approx(alpha**2, rel=1e-9))
    # data = 0.7: every x_s ~ N(0.7 alpha, sigma^2), if the first x is
    point = gaussian(path, 0.7, 1e-12)
    for solver in (Ancestral("posterior"), DDIM(eta=1.0)):
        for stop in sorted({2, n // 2 + 1, n}):
            a, sigma = (float(c) for c in path(times[stop - 1]))
            first = [float(c) for c in path(times[0])]
            mean, variance = moments(solver, point, times[:stop], first[1] ** 2, first[0] * 0.7)
            assert mean == pytest.approx(0.7 * a, rel=1e-9)
            assert variance == pytest.approx(sigma**2, rel=1e-9)


def test_samples_of_a_mixture_have_its_law() -> None:
    """Really drawn: 4,000 samples in one dimension against the distribution function of the data."""
    means, stds, weights = [-1.0, 1.2], [0.4, 0.6], [0.35, 0.65]
    for path, solver, n in ((Linear(), Heun(), 40), (Linear(), DDIM(eta=1.0), 250), (DDPM(), Ancestral("beta"), 250)):
        exact = Exact(path, [[m] for m in means], stds, weights)
        rng = Rng(4).at(0, torch.arange(4000))
        x = rng("noise", "normal", (1,)).double()
        out = integrate(exact.denoiser(), solver, grid("uniform", n, path), x, NOTHING, rng)[:, 0].sort().values
        cdf = sum(
            w * torch.special.ndtr((out - m) / s) for m, s, w in zip(means, stds, weights, strict=True)
        ) + torch.zeros(())
        distance = float((cdf - (torch.arange(4000) + 0.5) / 4000).abs().max())
        assert distance * math.sqrt(4000) < 2.2, solver  # 1.95 with probability .001, and a bias of the steps


# relations


@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_on_a_linear_path_ddim_is_euler(scale: float) -> None:
    path = Linear(scale)
    times = grid("uniform", 9, path)
    x = start(scale=scale)
    assert_close(run(DDIM(), mixture(path), times, x), run(Euler(), mixture(path), times, x), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("path", [Linear(), Linear(2.0), DDPM()], ids=str)
def test_ddim_with_eta_1_is_the_ancestral_step_with_the_posterior_variance(path: Any) -> None:
    times = grid("uniform", 10, path)
    rng = Rng(3).at(0, torch.arange(24))
    x = start()
    a = integrate(mixture(path).denoiser(), DDIM(eta=1.0), times, x, NOTHING, rng)
    b = integrate(mixture(path).denoiser(), Ancestral("posterior"), times, x, NOTHING, rng)
    assert_close(a, b, rtol=1e-7, atol=1e-7)
    assert float((a - integrate(mixture(path).denoiser(), DDIM(), times, x, NOTHING, rng)).abs().max()) > 0.1


@pytest.mark.parametrize("solver", [Euler(), Heun(), DDIM(), DDIM(eta=0.5), Ancestral("beta")], ids=str)
def test_one_step_to_the_data_takes_the_prediction(solver: Any) -> None:
    """All solvers agree on the last step: the predicted x0."""
    path = Linear()
    exact, x = mixture(path), start()
    out = integrate(exact.denoiser(), solver, (1.0, 0.0), x, NOTHING, Rng(0).at(0, torch.arange(24)))
    exact.time = 1.0
    assert_close(out, exact(x, torch.ones(24), NOTHING), rtol=1e-12, atol=1e-12)


def test_heun_is_the_trapezoid() -> None:
    """dx/dt = velocity is here t-independent and linear: x0 = (1 + t) x gives velocity -x, so one step multiplies by
    1 + h + h^2 / 2."""

    def model(x: Tensor, t: Tensor, cond: Conditioning, *, edit: Any = None) -> Tensor:
        return -x

    x, h = start(), 0.25
    out = integrate(Meaning(Linear(), "velocity").of(model), Heun(), (1.0, 1 - h, 1 - 2 * h), x, NOTHING, Replay({}))
    assert_close(out, x * (1 + h + h * h / 2) ** 2, rtol=1e-12, atol=0)
    out = integrate(Meaning(Linear(), "velocity").of(model), Euler(), (1.0, 1 - h), x, NOTHING, Replay({}))
    assert_close(out, x * (1 + h), rtol=1e-12, atol=0)


def test_the_learned_variance_is_between_the_two_others() -> None:
    path = DDPM()
    t, s = 0.5, 0.4
    q = posterior(path, t, s)
    for raw, expected in ((-1.0, q.variance), (1.0, q.beta), (0.0, (q.variance * q.beta).sqrt())):

        def model(x: Tensor, t: Tensor, cond: Conditioning, *, edit: Any = None, raw: float = raw) -> Tensor:
            return torch.cat((x, torch.full_like(x, raw)), dim=1)

        denoise = Meaning(path, "eps", "index").of(model).start(NOTHING, (1, 1), (t, s))
        x = torch.ones(1, 1, dtype=torch.float64)
        outs = [
            Ancestral().step(denoise, x, t, s, None, Replay({"solver": torch.full((1, 1), z)}))[0] for z in (0.0, 1.0)
        ]
        assert float(outs[1] - outs[0]) == pytest.approx(math.sqrt(float(expected)), rel=1e-9)


def test_the_variance_must_be_there_and_known() -> None:
    with pytest.raises(DitkitError, match="predicts no variance"):
        run(Ancestral(), mixture(DDPM()), grid("ddpm", 5, DDPM()), start())
    with pytest.raises(DitkitError, match="'learned', 'posterior' or 'beta', not 'fixed'"):
        Ancestral("fixed")
