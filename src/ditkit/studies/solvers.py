"""What a solver makes of a number of network evaluations: the error against a fine solution of the same trajectory.

One trained flow, the same noise for all, float64, so that nothing but the solver is measured. Two grids: equal steps of
log-SNR, on which the theory of exponential solvers is written, and equal steps of t, which flows are sampled with.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ..conditioning import Given
from ..config import registered_as
from ..data import Digits, Folder
from ..diffusion import LogitNormal, Meaning, Regression, integrate
from ..diffusion.grid import Exponential, Uniform
from ..diffusion.solvers import AB2, DDIM, DEIS2, DEIS3, RK4, DPMpp2M, DPMpp3M, Euler, Heun, Midpoint, UniPC2, UniPC3
from ..evaluation import measure_kid
from ..models import DiTConfig
from ..pipeline import Pipeline, load
from ..recipe import Evaluate, Recipe, Sample, Train
from ..recipes.sit import sit_xl_2
from ..report import Line, Picture, Section, Table, Value, lines, number
from ..rng import Rng
from .study import Cell, Claim, Finding, Missing, Results, Study

__all__ = ["BUDGETS", "SOLVERS", "evaluations", "solvers"]

GRIDS = {"log-snr": Exponential(), "t": Uniform()}
SOLVERS = (
    *(Euler(), DDIM()),
    *(Heun(), Midpoint(), AB2(), DPMpp2M(), DEIS2(), UniPC2()),
    *(DPMpp3M(), DEIS3(), UniPC3(), RK4()),
)
BUDGETS = (4, 6, 8, 10, 15, 20, 30, 50, 100)
SEEN = (4, 8)
"""The budgets at which images are drawn and compared with real ones."""
SAMPLES = 16
FINE = 1000
"""Steps to the exact samples: the `sample.steps` of a cell."""


def solvers(preset: str = "cpu") -> Study:
    """cpu: digits of 16 x 16, velocity prediction. full: SiT-XL/2, 400K steps, on ImageNet in a folder `imagenet`."""
    base = _cpu() if preset == "cpu" else _full()
    cells = tuple(
        Cell(f"{_name(solver)}-{name}", replace(base, sample=replace(base.sample, solver=solver, grid=grid)), run="net")
        for name, grid in GRIDS.items()
        for solver in SOLVERS
    )
    question = (
        "How far from the exact solution does a solver end after so many evaluations of the network? Orders are "
        "promises for small steps; which solver is nearest at 4, at 10, at 100 evaluations, and do the orders hold on "
        "a trained network?"
    )
    return Study("solvers", preset, question, cells, _measure, _present, _CLAIMS, seeds=(0,))


def _cpu() -> Recipe:
    """A SiT of 16 tokens. Its clock is SiT's, t itself: with 1000 t a network may be as rough in t as its sinusoids."""
    return Recipe(
        data=Digits(resolution=16),
        model=DiTConfig(patch_size=4, hidden_size=64, depth=4, num_heads=4, learn_sigma=False),
        denoiser=Meaning(prediction="-velocity", clock="1-t"),
        objective=Regression("velocity", LogitNormal(0.0, 1.0)),
        train=Train(
            steps=2000,
            batch=64,
            lr=2e-3,
            warmup=50,
            cooldown=1200,
            emas=(0.99,),
            log_every=50,
            sample_every=0,
            checkpoint_every=500,
            keep=1,
        ),
        sample=Sample(steps=FINE, batch=200),
        evaluate=Evaluate(samples=400, size=64),
    )


def _full() -> Recipe:
    published = sit_xl_2("imagenet")
    return replace(
        published,
        data=Folder(path="imagenet", resolution=256, flip=True),
        train=replace(published.train, steps=400_000, sample_every=0, keep=1),
        sample=Sample(steps=FINE, batch=64),
        evaluate=Evaluate(samples=5000, size=224),
    )


def _name(solver: Any) -> str:
    return registered_as(solver)[1]


def order(solver: Any) -> int:
    """The order that is expected: UniPC's corrector adds one to the order in its name (docs/solvers.md)."""
    return solver.order + isinstance(solver, UniPC2 | UniPC3)


def evaluations(solver: Any, times: Sequence[float]) -> int:
    """Network evaluations of a trajectory."""
    return sum(len(solver.visits(t, s)) for t, s in pairwise(times))


def steps_for(solver: Any, budget: int) -> int:
    """The most steps that a budget of evaluations pays for; Heun's last step takes one instead of two."""
    return (budget + isinstance(solver, Heun)) // solver.nfe


class Noise:
    """A network in float64, and the noise and classes that every solver starts from."""

    def __init__(self, pipeline: Pipeline, seed: int):
        pipeline.model.double()
        ids = torch.arange(SAMPLES)
        self.pipeline, self.rng = pipeline, Rng(seed).at(0, ids.to(pipeline.device))
        self.cond = pipeline.recipe.conditioner(Given(pipeline.labels(None, SAMPLES))).to(pipeline.device)
        self.x = pipeline.denoiser.prior(self.rng, pipeline.shape).double()

    def times(self, grid: Any, steps: int) -> tuple[float, ...]:
        return grid(steps, self.pipeline.denoiser.path, self.pipeline.recipe.model.length)

    @torch.no_grad()
    def drawn(self, solver: Any, times: Sequence[float], x: Tensor | None = None) -> Float[Tensor, "n c *space"]:
        """The samples as the network has them, not decoded."""
        return integrate(self.pipeline.denoiser, solver, times, self.x if x is None else x, self.cond, self.rng)


@functools.lru_cache(maxsize=4)
def _fine(folder: Path, device: str, grid: Any, steps: int, seed: int) -> tuple[Noise, tuple[float, ...], Tensor]:
    """The start, and where RK4 leads in many steps; on a grid of log-SNR all but the last, to t = 0, which is left."""
    noise = Noise(load(folder, device=device), seed)
    times = noise.times(grid, steps)
    last = len(times) - isinstance(grid, Exponential)
    return noise, times[last - 1 :], noise.drawn(RK4(), times[:last])


def _exact(folder: Path, cell: Cell, seed: int) -> tuple[Noise, Tensor]:
    """The start, and where it leads.

    From the end of a grid of log-SNR one step leads to t = 0, however fine the grid is. It is the solver's own here,
    too: what the grid costs is no error of the solver.
    """
    sample = cell.recipe.sample
    noise, left, x = _fine(folder, cell.recipe.train.device, sample.grid, sample.steps, seed)
    return noise, noise.drawn(sample.solver, left, x) if len(left) > 1 else x


def _measure(folder: Path, cell: Cell, seed: int) -> Finding:
    sample, pipeline = cell.recipe.sample, load(folder, device=cell.recipe.train.device)
    noise, exact = _exact(folder, cell, seed)
    numbers: dict[str, float] = {}
    protocol: dict[str, Any] = {}
    for budget in BUDGETS:
        steps = steps_for(sample.solver, budget)
        if not steps:
            continue
        found = noise.drawn(sample.solver, noise.times(sample.grid, steps))
        numbers[f"rms_{budget}"] = float((found - exact).square().mean().sqrt())
        if budget in SEEN:
            seen = measure_kid(pipeline, seed=seed, solver=sample.solver, grid=sample.grid, steps=steps)
            numbers |= {f"{k.replace('kid', f'kid_{budget}')}": v for k, v in seen.numbers.items() if v is not None}
            protocol |= {k: v for k, v in seen.protocol.items() if k not in ("sampling", "dtype")}
    protocol |= {
        "rms": f"root mean square over {SAMPLES} samples of the difference to RK4 in {sample.steps} steps on the same "
        f"grid, from the same noise, before decoding; they have a standard deviation of {number(float(exact.std()))}",
        "dtype": "float64 for rms, float32 for KID",
    }
    return Finding(numbers, protocol)


def slope(results: Results, solver: Any, grid: str, low: int = BUDGETS[-2], high: int = BUDGETS[-1]) -> float:
    """The measured order: of log rms against log of the evaluations, between two budgets."""
    cell = f"{_name(solver)}-{grid}"
    a, b = (results.mean(cell, f"rms_{budget}") for budget in (low, high))
    recipe = next(c.recipe for c in results.study.cells if c.name == cell)
    few, many = (
        evaluations(solver, recipe.sample.grid(steps_for(solver, budget), recipe.denoiser.path, 1))
        for budget in (low, high)
    )
    return math.log(a / b) / math.log(many / few)


# what is expected


def _errors(results: Results, grid: str, budget: int, among: Sequence[Any] = SOLVERS) -> list[tuple[float, Any]]:
    found = [(results.mean(f"{_name(s)}-{grid}", f"rms_{budget}"), s) for s in among]
    return sorted(found, key=lambda pair: pair[0])


def _slopes(results: Results) -> tuple[str, bool]:
    found = {s: slope(results, s, "log-snr") for s in SOLVERS}
    shown = ", ".join(f"{_name(s)} {value:.2f}" for s, value in found.items())
    return shown, all(abs(value - order(s)) <= 0.5 for s, value in found.items())


def _limited(results: Results) -> tuple[str, bool]:
    found = {s: slope(results, s, "t") for s in (DPMpp3M(), DEIS3(), UniPC3())}
    return ", ".join(f"{_name(s)} {value:.2f}" for s, value in found.items()), all(v <= 2.5 for v in found.values())


def _higher(results: Results) -> tuple[str, bool]:
    """Solvers of one evaluation a step, so that all have the same grid."""
    by_order: dict[int, list[float]] = {}
    for s in SOLVERS:
        if s.nfe == 1:
            by_order.setdefault(order(s), []).append(results.mean(f"{_name(s)}-log-snr", "rms_100"))
    shown = "; ".join(f"order {k}: {number(min(v))} to {number(max(v))}" for k, v in sorted(by_order.items()))
    return shown, all(min(by_order[a]) > max(by_order[b]) for a, b in pairwise(sorted(by_order)))


def _memory(results: Results) -> tuple[str, bool]:
    found = {s: results.mean(f"{_name(s)}-t", "rms_100") for s in (AB2(), Heun(), Midpoint())}
    shown = ", ".join(f"{_name(s)} {number(value)}" for s, value in found.items())
    return shown, found[AB2()] < min(found[Heun()], found[Midpoint()])


def _few(results: Results) -> tuple[str, bool]:
    shown, holds = [], True
    for grid in GRIDS:
        (best, first), *rest = _errors(results, grid, 4)
        shown.append(f"{grid}: {_name(first)} {number(best)}, last {_name(rest[-1][1])} {number(rest[-1][0])}")
        holds = holds and first.nfe == 1 and order(first) > 1
    return "; ".join(shown), holds


_CLAIMS = (
    Claim("log-SNR grid: from 50 to 100 evaluations every slope is within 0.5 of the solver's order", _slopes),
    Claim(
        "t grid: exponential solvers of order 3 and more have slopes of at most 2.5, as their last step, to infinite "
        "log-SNR, is Euler's",
        _limited,
    ),
    Claim(
        "log-SNR grid, 100 evaluations, solvers of one evaluation a step: each of a higher order is nearer than each "
        "of a lower one",
        _higher,
    ),
    Claim("t grid, 100 evaluations: ab2, which remembers, is nearer than heun and midpoint, which do not", _memory),
    Claim("4 evaluations: on either grid the nearest is a multistep solver of order 2 or more", _few),
)


def _present(results: Results) -> tuple[Section, ...]:
    def measured(solver: Any, grid: str) -> Value:
        try:
            return Value(round(slope(results, solver, grid), 2))
        except Missing:  # not there yet, or diverged
            return Value(None)

    sections = []
    for grid in GRIDS:
        curves, rows = [], []
        for s in SOLVERS:
            cell = f"{_name(s)}-{grid}"
            values = {b: results.value(cell, f"rms_{b}") for b in BUDGETS}
            known = {b: v.value for b, v in values.items() if v.value}
            if known:
                curves.append(Line(_name(s), list(known), [float(v) for v in known.values()]))
            rows.append((_name(s), str(order(s)), measured(s, grid), *values.values()))
        head = ("solver", "order", "slope 50-100", *map(str, BUDGETS))
        plot = lines(
            curves, "evaluations of the network", "rms difference to the exact samples", log_x=True, log_y=True
        )
        kids = tuple((_name(s), *(results.value(f"{_name(s)}-{grid}", f"kid_{b}") for b in SEEN)) for s in SOLVERS)
        sections.append(
            Section(
                f"Equal steps of {grid}",
                (
                    Picture(f"{grid}.png", f"error against evaluations, equal steps of {grid}, log-log", plot),
                    "RMS difference to the exact samples by number of evaluations, and its slope. A solver takes as "
                    "many steps as the number pays for.",
                    Table(head, tuple(rows)),
                    "KID of images.",
                    Table(("solver", *(f"{b} evaluations" for b in SEEN)), kids),
                ),
            )
        )
    return tuple(sections)
