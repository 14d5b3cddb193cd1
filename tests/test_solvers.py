"""The contract of solvers: what a sampling costs, on what it depends, and what is refused."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from ditkit.conditioning import Conditioning
from ditkit.config import DitkitError, from_json, lookup, names, to_json
from ditkit.diffusion import (
    AB2,
    DDIM,
    DDPM,
    DEIS2,
    GVP,
    RK4,
    VP,
    Ancestral,
    Dopri5,
    DPMpp2M,
    DPMpp2MSDE,
    DPMpp3M,
    EDMStochasticHeun,
    Euler,
    Heun,
    Jumps,
    Linear,
    Meaning,
    Midpoint,
    Prediction,
    SiTSDE,
    Solver,
    UniPC2,
    UniPC3,
    integrate,
)
from ditkit.rng import Replay, Rng

from .exact import NOTHING, grid, mixture, run, start

# every solver of images, with its defaults where they work from t = 1 and with any network, and some others
SETTINGS: dict[str, dict[str, Any]] = {"ddpm": {"variance": "posterior"}, "sit_sde": {"diffusion": "sigma"}}
SOLVERS: dict[str, Any] = {
    **{n: lookup("solver", n)(**SETTINGS.get(n, {})) for n in names("solver") if lookup("solver", n) is not Jumps},
    "ddpm beta": Ancestral("beta"),
    "ddim eta": DDIM(eta=1.0),
    "edm_stochastic_heun churn": EDMStochasticHeun(S_churn=10.0, S_noise=1.003),
    "deis_2 t": DEIS2("t"),
    "sit_sde without last step": SiTSDE("increasing-decreasing", last_step=None),
}
FIXED = [name for name in SOLVERS if name != "dopri5"]


def test_a_solver_says_what_it_is() -> None:
    for solver in SOLVERS.values():
        assert isinstance(solver, Solver)
        assert solver.order >= 1
        assert set(solver.needs) <= {"x0", "eps", "velocity", "score"}
        assert solver.nfe == len(solver.visits(0.5, 0.25)) or isinstance(solver, Dopri5)


def test_settings_survive_the_recipe_as_standard_json() -> None:
    for solver in (*SOLVERS.values(), UniPC3("bh1", True), DPMpp3M("published"), EDMStochasticHeun(S_tmax=50.0)):
        text = json.dumps(to_json(solver), allow_nan=False)
        assert from_json(json.loads(text)) == solver


@pytest.mark.parametrize("n", [1, 2, 7])
@pytest.mark.parametrize("name", FIXED)
def test_the_network_runs_as_often_as_declared(name: str, n: int) -> None:
    solver, path, seen = SOLVERS[name], Linear(), []
    exact = mixture(path, "velocity")
    rng = Rng(0).at(0, torch.arange(24))
    times = grid("uniform", n, path)
    integrate(exact.denoiser(), solver, times, start(), NOTHING, rng, lambda k, x: seen.append((k, x)))
    visited = [time for t, s in itertools.pairwise(times) for time in solver.visits(t, s)]
    # from alpha = 0 EDM's step is Euler's, exact for a constant x0
    saved = isinstance(solver, EDMStochasticHeun) and n > 1
    assert exact.calls == [24] * (len(visited) - saved)
    assert len(solver.visits(times[-2], 0.0)) <= solver.nfe
    assert [k for k, _ in seen] == list(range(n))


@pytest.mark.parametrize("name", FIXED)
def test_a_trajectory_does_not_depend_on_its_batch(name: str) -> None:
    solver, path = SOLVERS[name], Linear()
    times = grid("uniform", 6, path)

    def sample(ids: Tensor) -> Tensor:
        rng = Rng(8).at(0, ids)
        x = rng("noise", "normal", (2,)).double()
        return integrate(mixture(path, "velocity").denoiser(), solver, times, x, NOTHING, rng)

    whole = sample(torch.arange(11))
    for ids in (torch.tensor([4]), torch.tensor([10, 0, 3]), torch.arange(5, 11)):
        assert_close(sample(ids), whole[ids], rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("name", SOLVERS)
def test_a_solver_stays_in_the_dtype_of_x_and_keeps_no_state_of_its_own(name: str) -> None:
    solver, path = SOLVERS[name], Linear()
    times = grid("uniform", 5, path)
    rng = Rng(2).at(0, torch.arange(24))

    def sample(dtype: torch.dtype) -> Tensor:
        return integrate(mixture(path, "velocity").denoiser(), solver, times, start().to(dtype), NOTHING, rng)

    single, double = sample(torch.float32), sample(torch.float64)
    assert single.dtype == torch.float32
    assert_close(single.double(), double, rtol=1e-4, atol=1e-4 if name != "dopri5" else 1e-2)
    assert torch.equal(sample(torch.float64), double)


def test_the_step_control_of_dopri5_sees_the_whole_batch() -> None:
    """What its page says: a row depends on the others, within the tolerance."""
    exact, x = mixture(Linear(), "velocity"), start()
    whole = run(Dopri5(), exact, (1.0, 0.0), x)
    alone = run(Dopri5(), exact, (1.0, 0.0), x[:1])
    assert not torch.equal(whole[:1], alone)
    assert_close(whole[:1], alone, rtol=0, atol=2e-2)


def test_dopri5_asks_for_no_time_beyond_its_step() -> None:
    """torchdiffeq finds its first step by a trial, which knows no end."""
    asked: list[float] = []

    def slow(x: Tensor, t: Any) -> Prediction:
        asked.append(float(t))
        return Prediction(1e-9 * x, x, torch.tensor(float(t), dtype=torch.float64), Linear(), "velocity")

    x = torch.ones(2, 3)
    for t, s in ((1.0, 0.9), (0.003, 0.0), (0.5, 0.25)):
        asked.clear()
        Dopri5().step(slow, x, t, s, None, Rng(0))
        assert min(asked) == pytest.approx(s)
        assert max(asked) == pytest.approx(t)
        assert all(s <= time <= t for time in asked)


def test_deis_in_time_says_that_a_table_has_no_rates() -> None:
    said = Prediction(torch.ones(2, 3), torch.ones(2, 3), torch.tensor(0.5, dtype=torch.float64), DDPM(), "eps")
    with pytest.raises(DitkitError, match="has no rates"):
        DEIS2(variable="t").step(lambda x, t: said, said.x, 0.5, 0.25, DEIS2().init(said.x), Rng(0))


def test_without_its_grid_a_solver_that_counts_steps_refuses() -> None:
    with pytest.raises(DitkitError, match=r"spreads S_churn over the steps: start it with init\(x, times\)"):
        EDMStochasticHeun(S_churn=1.0).init(start())
    assert EDMStochasticHeun().init(start()).steps <= 0
    lowered: tuple[Any, ...] = (DPMpp3M(lower_order_final=True), UniPC2(lower_order_final=True))
    for solver in lowered:  # no step is known to be the last
        state = solver.init(start())
        x = start()
        for t, s in ((0.8, 0.6), (0.6, 0.5), (0.5, 0.4)):
            x, state = solver.step(mixture(VP()).denoise, x, t, s, state, Replay({}))
        plain = replace(solver, lower_order_final=False)
        x2, state = start(), plain.init(start())
        for t, s in ((0.8, 0.6), (0.6, 0.5), (0.5, 0.4)):
            x2, state = plain.step(mixture(VP()).denoise, x2, t, s, state, Replay({}))
        assert torch.equal(x, x2)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: UniPC2("bh3"), "solver.variant is 'bh1' or 'bh2', not 'bh3'"),
        (lambda: DEIS2("rho"), "solver.variable is 'log_rho' or 't', not 'rho'"),
        (lambda: DPMpp3M("half"), "solver.second_difference is 'exact' or 'published', not 'half'"),
        (lambda: DPMpp2MSDE(-1.0), "solver.eta must not be negative"),
        (lambda: EDMStochasticHeun(S_churn=-1.0), "must not be negative"),
        (lambda: EDMStochasticHeun(S_tmin=2.0, S_tmax=1.0), "S_tmin <= S_tmax"),
        (lambda: SiTSDE("sigm"), "unknown solver.diffusion 'sigm': did you mean sigma"),
        (lambda: SiTSDE(last_step="mean"), "'Mean', 'Tweedie', 'Euler' or None, not 'mean'"),
        (lambda: SiTSDE(norm=-1.0), "solver.norm must not be negative"),
        (lambda: Dopri5(atol=0.0), "solver.rtol and solver.atol"),
    ],
)
def test_wrong_settings_are_refused(build: Any, message: str) -> None:
    with pytest.raises(DitkitError, match=message):
        build()


def test_an_infinite_diffusion_is_refused_by_name() -> None:
    for path in (Linear(), GVP()):
        with pytest.raises(DitkitError, match="'SBDM' is infinite at t = 1, where alpha = 0"):
            run(SiTSDE(), mixture(path, "velocity"), (1.0, 0.5), start())
    assert run(SiTSDE(last_step="Mean"), mixture(VP(), "velocity"), (1.0, 0.0), start()).isfinite().all()


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
        *(
            (Meaning(Linear(), "x0"), RK4(), times, refused)
            for times, refused in (((1.0, 0.0), True), ((1.0, 0.1), False))
        ),
        *(
            (Meaning(Linear(), "x0"), solver, (1.0, 0.5, 0.0), False)
            for solver in (Midpoint(), AB2(), UniPC3(), DPMpp2M())
        ),
        *(
            (Meaning(GVP(), "eps"), solver, (1.0, 0.5, 0.0), True)
            for solver in (UniPC3(), DPMpp3M(), DEIS2(), SiTSDE())
        ),
        *(
            (Meaning(VP(), "eps"), solver, (1.0, 0.5, 0.0), False)
            for solver in (UniPC3(), DPMpp3M(), DEIS2(), SiTSDE())
        ),
        (Meaning(VP(), "velocity"), RK4(), (1.0, 0.5, 0.0), False),  # taken as it is, not read in another space
        (Meaning(VP(), "v"), RK4(), (1.0, 0.5, 0.0), True),
        (Meaning(Linear(), "x0"), Dopri5(), (1.0, 0.0), True),
        (Meaning(DDPM(), "eps", "index"), EDMStochasticHeun(9.0), (1.0, 0.5, 0.0), False),
        (Meaning(DDPM(), "eps", "index"), UniPC3(), (1.0, 0.5, 0.0), False),
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
        with pytest.raises(
            DitkitError, match=r"cannot be read as \w+ at t = [01], which this grid visits|has no rates"
        ):
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
