"""The order that each solver declares, measured.

On a mixture of two Gaussians whose denoiser is known; where noise is added, by the mean and variance of the samples of
a Gaussian, which are computed, not drawn.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from pathlib import Path as Folder
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from ditkit.config import lookup, names
from ditkit.diffusion import (
    AB2,
    DDIM,
    DEIS2,
    DEIS3,
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
    Midpoint,
    Path,
    SiTSDE,
    UniPC2,
    UniPC3,
    integrate,
)
from ditkit.diffusion.solvers.stochastic import FORMS
from ditkit.rng import Rng

from .exact import NO_NOISE, NOTHING, gaussian, log_snr_grid, mixture, moments, start, true_trajectory

PATHS: tuple[Path, ...] = (Linear(), VP(), GVP())
COUNTS = (24, 48, 96)

DETERMINISTIC: dict[str, Any] = {
    "euler": Euler(),
    "heun": Heun(),
    "midpoint": Midpoint(),
    "rk4": RK4(),
    "ddim": DDIM(),
    "ab2": AB2(),
    "dpmpp_2m": DPMpp2M(),
    "dpmpp_3m": DPMpp3M(),
    "deis_2": DEIS2(),
    "deis_2 in t": DEIS2("t"),
    "deis_3": DEIS3(),
    "deis_3 in t": DEIS3("t"),
    "unipc_2": UniPC2(),
    "unipc_2 bh1": UniPC2("bh1"),
    "unipc_3": UniPC3(),
    "unipc_3 bh1": UniPC3("bh1"),
    "dpmpp_2m_sde, eta 0": DPMpp2MSDE(eta=0.0),
    "edm_stochastic_heun, no churn": EDMStochasticHeun(),
}
STOCHASTIC: dict[str, Any] = {
    "ddpm": Ancestral("posterior"),
    "ddpm beta": Ancestral("beta"),
    "ddim, eta 1": DDIM(eta=1.0),
    "ddim, eta 0.4": DDIM(eta=0.4),
    "dpmpp_2m_sde": DPMpp2MSDE(),
    "dpmpp_2m_sde, eta 0.5": DPMpp2MSDE(eta=0.5),
    "edm_stochastic_heun": EDMStochasticHeun(S_churn=5.0),
    **{f"sit_sde {form}": SiTSDE(form) for form in FORMS},
}


def test_every_registered_solver_is_measured() -> None:
    # jumps between tokens are measured in test_discrete.py, against exact transition matrices
    measured = {type(s) for s in (*DETERMINISTIC.values(), *STOCHASTIC.values(), Dopri5(), Jumps())}
    assert measured == {lookup("solver", name) for name in names("solver")}


def test_the_page_tells_the_order_and_the_cost_of_every_solver() -> None:
    page = (Folder(__file__).parents[1] / "docs" / "solvers.md").read_text()
    rows = {row[1].strip().strip("`"): row for row in (line.split("|") for line in page.splitlines()) if len(row) == 8}
    for name in names("solver"):
        kind = lookup("solver", name)
        if kind is not Jumps:
            assert int(rows[name][3]) == kind.order, name
            assert rows[name][5].strip() == (str(kind.nfe) if kind.nfe else "by tolerance"), name


def error(solver: Any, path: Path, n: int) -> float:
    """Mean absolute error at t = 0.05 of n equal steps of log-SNR from t = 0.9; the history of a solver with memory is
    filled from the exact trajectory: its first order - 1 steps begin and end there."""
    finest, stride = log_snr_grid(path, COUNTS[-1]), COUNTS[-1] // n
    times, truth = finest[::stride], true_trajectory(path, finest, 4)[::stride]
    denoise = mixture(path).denoise
    x, state = truth[0], solver.init(truth[0], times)
    for k, (t, s) in enumerate(itertools.pairwise(times)):
        x, state = solver.step(denoise, x, t, s, state, NO_NOISE)
        if state is not None and k < solver.order - 1:
            x = truth[k + 1]
            if hasattr(state, "x"):
                state = replace(state, x=truth[k])
    return float((x - truth[-1]).abs().mean())


@pytest.mark.parametrize("path", PATHS, ids=lambda path: type(path).__name__)
@pytest.mark.parametrize("name", DETERMINISTIC)
def test_a_solver_has_at_least_the_order_that_it_declares(name: str, path: Path) -> None:
    solver = DETERMINISTIC[name]
    errors = [error(solver, path, n) for n in COUNTS]
    for coarse, fine in itertools.pairwise(errors):
        assert math.log2(coarse / fine) > solver.order - 0.4
        if not name.startswith("unipc"):  # corrected, it has one order more than its name says
            assert math.log2(coarse / fine) < solver.order + 0.4
    assert errors[0] < 0.05


@pytest.mark.parametrize("path", PATHS, ids=lambda path: type(path).__name__)
def test_the_published_third_order_of_dpm_solver_is_a_second(path: Path) -> None:
    """Half of the second difference is missing: `second_difference="published"` is for comparisons alone."""
    errors = [error(DPMpp3M("published"), path, n) for n in COUNTS]
    assert math.log2(errors[1] / errors[2]) == pytest.approx(2, abs=0.2)
    assert error(DPMpp3M(), path, COUNTS[-1]) < errors[-1] / 5


@pytest.mark.parametrize("name", ["dpmpp_3m", "deis_3", "unipc_3"])
def test_without_history_the_first_steps_cost_an_order_at_most(name: str) -> None:
    """Warmed up with lower orders, as published, from t = 0.9 on."""
    path, solver = VP(), DETERMINISTIC[name]
    finest = log_snr_grid(path, COUNTS[-1])
    truth = true_trajectory(path, finest, 4)
    errors = []
    for n in COUNTS:
        times = finest[:: COUNTS[-1] // n]
        x, state = truth[0], solver.init(truth[0], times)
        for t, s in itertools.pairwise(times):
            x, state = solver.step(mixture(path).denoise, x, t, s, state, NO_NOISE)
        errors.append(float((x - truth[-1]).abs().mean()))
    for coarse, fine in itertools.pairwise(errors):
        assert math.log2(coarse / fine) > solver.order - 1.4


@pytest.mark.parametrize("path", PATHS, ids=lambda path: type(path).__name__)
def test_dopri5_keeps_its_tolerance(path: Path) -> None:
    finest = log_snr_grid(path, COUNTS[-1])
    truth = true_trajectory(path, finest, 4)
    calls = []
    for tolerance in (1e-3, 1e-6, 1e-9):
        exact = mixture(path)
        x, _ = Dopri5(tolerance, tolerance / 1000).step(exact.denoise, truth[0], finest[0], finest[-1], None, NO_NOISE)
        assert float((x - truth[-1]).abs().max()) < 20 * tolerance
        calls.append(len(exact.calls))
    # a fifth of an order of the tolerance more steps for each order less: 10^(6/5) = 16 for all
    assert 4 < calls[2] / calls[0] < 32


@pytest.mark.parametrize("path", PATHS, ids=lambda path: type(path).__name__)
@pytest.mark.parametrize("name", STOCHASTIC)
def test_noise_gives_the_moments_of_a_gaussian(name: str, path: Path) -> None:
    """With the order of the solver, from the exact law at t = 0.9 to that at t = 0.05."""
    solver, mean, std = STOCHASTIC[name], 0.7, 0.5
    (alpha, sigma), (last_alpha, last_sigma) = ((float(c) for c in path(t)) for t in (0.9, 0.05))
    errors = []
    for n in (64, 128):
        found = moments(
            solver, gaussian(path, mean, std), log_snr_grid(path, n), (alpha * std) ** 2 + sigma**2, alpha * mean
        )
        errors.append((abs(found[0] - last_alpha * mean), abs(found[1] - (last_alpha * std) ** 2 - last_sigma**2)))
    for coarse, fine in zip(*errors, strict=True):  # of the mean, which most solvers keep exactly, and of the variance
        assert coarse < 0.04
        assert fine < 1e-12 or math.log2(coarse / fine) > solver.order - 0.4


def test_without_diffusion_sits_sde_is_euler() -> None:
    times = log_snr_grid(VP(), 7)
    x = start()
    for solver in (SiTSDE("constant", 0.0), SiTSDE("SBDM", 0.0)):
        rng = Rng(1).at(0, torch.arange(24))
        out = integrate(mixture(VP()).denoiser(), solver, times, x, NOTHING, rng)
        assert_close(out, integrate(mixture(VP()).denoiser(), Euler(), times, x, NOTHING, rng), rtol=1e-12, atol=1e-12)
