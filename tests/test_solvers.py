"""Solvers and grids, on denoisers that are known in closed form."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from ditkit.conditioning import Conditioning
from ditkit.config import DitkitError, lookup
from ditkit.diffusion import (
    DDIM,
    DDPM,
    Ancestral,
    Denoiser,
    Euler,
    Heun,
    Linear,
    Meaning,
    Solver,
    integrate,
    posterior,
)
from ditkit.rng import Replay, Rng

NOTHING = Conditioning()
DETERMINISTIC: dict[str, Any] = {"euler": Euler(), "heun": Heun(), "ddim": DDIM()}
STOCHASTIC: dict[str, Any] = {"ddpm": Ancestral("posterior"), "ddpm beta": Ancestral("beta"), "ddim eta": DDIM(eta=1.0)}


class Exact:
    """The posterior mean of x0 for data from a mixture of Gaussians: the network that training cannot beat."""

    def __init__(self, path: Any, means: Sequence[Sequence[float]], stds: Sequence[float], weights: Sequence[float]):
        self.path = path
        self.means = torch.tensor(means, dtype=torch.float64)
        self.stds = torch.tensor(stds, dtype=torch.float64)
        self.weights = torch.tensor(weights, dtype=torch.float64)
        self.calls: list[int] = []

    def __call__(self, x: Tensor, t: Tensor, cond: Conditioning, *, edit: Any = None) -> Tensor:
        self.calls.append(len(x))
        alpha, sigma = self.path(self.time)
        variance = (alpha * self.stds) ** 2 + sigma**2  # [k]
        off = x[:, None] - alpha * self.means  # [b k d]
        log_p = self.weights.log() - 0.5 * (off.square().sum(-1) / variance + x.shape[1] * variance.log())
        means = self.means + (alpha * self.stds**2 / variance)[:, None] * off
        return (log_p.softmax(1)[..., None] * means).sum(1)

    time: float = 1.0

    def denoiser(self, t_eps: float = 0.0) -> Denoiser:
        """With this network; it is given time in float64, which a network never gets."""
        exact = self

        class InFloat64(Denoiser):
            def __call__(self, x: Tensor, t: Any, cond: Conditioning, *, edit: Any = None) -> Any:
                exact.time = float(t)
                return super().__call__(x, t, cond, edit=edit)

        return InFloat64(self, self.path, "x0", "t", t_eps)


def mixture(path: Any) -> Exact:
    return Exact(path, [[-1.0, 0.5], [1.2, -0.3]], [0.4, 0.6], [0.35, 0.65])


def gaussian(path: Any, mean: float = 0.7, std: float = 0.5) -> Exact:
    return Exact(path, [[mean]], [std], [1.0])


def start(n: int = 24, d: int = 2, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(n, d, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def grid(name: str, n: int, path: Any) -> tuple[float, ...]:
    return lookup("grid", name)()(n, path, 0)


def run(solver: Solver, exact: Exact, times: Sequence[float], x: Tensor) -> Tensor:
    return integrate(exact.denoiser(), solver, times, x, NOTHING, Replay({}))


# order


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


def moments(solver: Solver, exact: Exact, times: Sequence[float], variance: float) -> tuple[float, float]:
    """Mean and variance of the samples of a solver on Gaussian data, without drawing one: each step is affine in x and
    in its noise, x -> a x + b + c z, and three runs of the step give a, b and c."""
    denoise = exact.denoiser().start(NOTHING, (3, 1), times)
    x = torch.tensor([[0.0], [1.0], [0.0]], dtype=torch.float64)
    z = torch.tensor([[0.0], [0.0], [1.0]], dtype=torch.float64)
    mean = 0.0
    for t, s in itertools.pairwise(times):
        out, _ = solver.step(denoise, x, t, s, solver.init(x), Replay({"solver": z}))
        b, a, c = float(out[0]), float(out[1] - out[0]), float(out[2] - out[0])
        mean, variance = a * mean + b, a * a * variance + c * c
    return mean, variance


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
            mean, variance = moments(solver, point, times[:stop], first[1] ** 2)
            mean += _carried(solver, point, times[:stop]) * first[0] * 0.7
            assert mean == pytest.approx(0.7 * a, rel=1e-9)
            assert variance == pytest.approx(sigma**2, rel=1e-9)


def _carried(solver: Solver, exact: Exact, times: Sequence[float]) -> float:
    """How much of the first mean is left at the end."""
    denoise = exact.denoiser().start(NOTHING, (2, 1), times)
    x = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    for t, s in itertools.pairwise(times):
        x, _ = solver.step(denoise, x, t, s, None, Replay({"solver": torch.zeros(2, 1, dtype=torch.float64)}))
    return float(x[1] - x[0])


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


# what a run costs, and what it refuses


@pytest.mark.parametrize("n", [1, 2, 7])
@pytest.mark.parametrize("name", [*DETERMINISTIC, *STOCHASTIC])
def test_the_network_runs_as_often_as_declared(name: str, n: int) -> None:
    solver = {**DETERMINISTIC, **STOCHASTIC}[name]
    path, seen = Linear(), []
    exact = mixture(path)
    rng = Rng(0).at(0, torch.arange(24))
    integrate(
        exact.denoiser(), solver, grid("uniform", n, path), start(), NOTHING, rng, lambda k, x: seen.append((k, x))
    )
    last = 1  # the last step reaches the data and is a single evaluation
    assert exact.calls == [24] * (solver.nfe * (n - 1) + last)
    assert [k for k, _ in seen] == list(range(n))


@pytest.mark.parametrize("name", [*DETERMINISTIC, *STOCHASTIC])
def test_a_trajectory_does_not_depend_on_its_batch(name: str) -> None:
    solver, path = {**DETERMINISTIC, **STOCHASTIC}[name], Linear()
    times = grid("uniform", 6, path)

    def sample(ids: Tensor) -> Tensor:
        rng = Rng(8).at(0, ids)
        x = rng("noise", "normal", (2,)).double()
        return integrate(mixture(path).denoiser(), solver, times, x, NOTHING, rng)

    whole = sample(torch.arange(11))
    for ids in (torch.tensor([4]), torch.tensor([10, 0, 3]), torch.arange(5, 11)):
        assert_close(sample(ids), whole[ids], rtol=1e-13, atol=1e-13)


def test_noise_differs_between_steps_and_between_samples() -> None:
    path = DDPM()
    drawn: list[Tensor] = []

    class Listening(Rng):
        def at(self, step: int, sample_ids: Tensor | None = None) -> Listening:
            return Listening(self.seed, step, self.sample_ids if sample_ids is None else sample_ids)

        def __call__(self, name: str, law: Any, shape: Sequence[int] = ()) -> Tensor:
            drawn.append(super().__call__(name, law, shape))
            return drawn[-1]

    rng = Listening(0, 0, torch.arange(24))
    integrate(mixture(path).denoiser(), Ancestral("beta"), grid("ddpm", 8, path), start(), NOTHING, rng)
    assert len(drawn) == 7  # none in the last step
    assert len(torch.cat(drawn).unique()) == 7 * 24 * 2


@pytest.mark.parametrize("times", [(), (1.0,), (0.5, 0.5), (0.0, 1.0), (1.0, 0.2, 0.3, 0.0)])
def test_a_grid_must_decrease(times: tuple[float, ...]) -> None:
    with pytest.raises(DitkitError, match="two decreasing times"):
        run(Euler(), mixture(Linear()), times, start())


@pytest.mark.parametrize(
    ("meaning", "solver", "times", "refused"),
    [
        (Meaning(Linear(), "eps"), Euler(), (1.0, 0.5, 0.0), True),
        (Meaning(Linear(), "eps"), DDIM(), (1.0, 0.5, 0.0), True),
        (Meaning(Linear(), "eps"), Ancestral("beta"), (1.0, 0.5, 0.0), True),
        (Meaning(Linear(), "eps"), Euler(), (0.99, 0.5, 0.0), False),
        (Meaning(Linear(), "eps", t_eps=0.01), Euler(), (1.0, 0.5, 0.0), False),
        (Meaning(Linear(), "x0"), Heun(), (1.0, 0.5, 0.0), False),  # its last step is Euler's and does not look at 0
        (Meaning(DDPM(), "eps", "index"), Heun(), (1.0, 0.5, 0.0), True),  # a table has no velocity
        (Meaning(DDPM(), "eps", "index"), Euler(), (1.0, 0.5, 0.0), True),
        (Meaning(DDPM(), "eps", "index"), DDIM(), (1.0, 0.5, 0.0), False),
        (Meaning(DDPM(), "v", "index"), Ancestral("beta"), (1.0, 0.5, 0.0), False),
    ],
)
def test_a_singular_grid_is_refused_before_the_network_runs(
    meaning: Meaning, solver: Any, times: tuple[float, ...], refused: bool
) -> None:
    calls = []

    def model(x: Tensor, t: Tensor, cond: Conditioning, *, edit: Any = None) -> Tensor:
        calls.append(t)
        return x

    def sample() -> Tensor:
        return integrate(meaning.of(model), solver, times, start(), NOTHING, Rng(0).at(0, torch.arange(24)))

    if refused:
        with pytest.raises(DitkitError, match=r"cannot be read as \w+ at t = 1, which this grid visits|has no rates"):
            sample()
        assert not calls
    else:
        assert bool(sample().isfinite().all())
        assert calls


def test_work_that_does_not_change_is_done_once() -> None:
    prepared = []

    class Model:
        def prepare(self, cond: Conditioning, shape: Sequence[int], times: Sequence[float]) -> Conditioning:
            prepared.append((tuple(shape), tuple(times)))
            return cond.with_static(table=torch.ones(1))

        def __call__(self, x: Tensor, t: Tensor, cond: Conditioning, *, edit: Any = None) -> Tensor:
            assert "table" in cond.static
            return x

    times = grid("uniform", 5, Linear())
    integrate(Meaning().of(Model()), Heun(), times, start(), NOTHING, Replay({}))
    assert prepared == [((24, 2), times)]
