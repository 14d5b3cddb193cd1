"""Data of two dimensions in a space of many: JiT's toy (Li & He 2025, arXiv 2511.13720, section 3 and figure 2).

A spiral lies in a random plane of R^D, D = 2, 8, 16, 512. A small ReLU network is trained to predict the data, the
noise or the velocity, always with the velocity loss. The data stays two-dimensional however large D is; noise and
velocity fill all D dimensions, and a network of 256 units cannot carry 512 of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..codecs import Vectors
from ..data import Spiral
from ..diffusion import Euler, Meaning, Regression, Uniform
from ..evaluation import sampling_protocol
from ..models import MLPConfig
from ..pipeline import load
from ..recipe import Recipe, Sample, Train
from ..report import Line, Picture, Section, Table, lines, panels
from .study import Cell, Claim, Finding, Results, Study

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["manifold"]

DIMENSIONS = (2, 8, 16, 512)
PREDICTIONS = ("x0", "eps", "velocity")


def manifold(preset: str = "cpu") -> Study:
    """cpu: 2,000 steps of 256 points, about 15 minutes on two idle cores. full: 50,000 steps of 1,024."""
    steps, batch = (2000, 256) if preset == "cpu" else (50_000, 1024)
    base = Recipe(
        data=Spiral(),
        codec=Vectors(),
        model=MLPConfig(),
        denoiser=Meaning(prediction="x0", clock="t", t_eps=0.05),
        objective=Regression("velocity", Uniform()),
        train=Train(
            steps=steps,
            batch=batch,
            lr=1e-3,
            cooldown=steps // 2,
            emas=(0.99,),
            log_every=50,
            sample_every=0,
            checkpoint_every=1000,
            keep=1,
        ),
        sample=Sample(steps=100, solver=Euler(), batch=512),
    )
    cells = tuple(
        Cell(
            _name(dimension, prediction),
            replace(base, data=Spiral(dimension=dimension), denoiser=replace(base.denoiser, prediction=prediction)),
        )
        for dimension in DIMENSIONS
        for prediction in PREDICTIONS
    )
    question = (
        "A spiral in a plane of R^D: can a network of 256 units generate it when it predicts the data, the noise or "
        "the velocity? JiT answers that only the prediction of data survives in many dimensions, because the data "
        "alone stays on a manifold that the network has room for."
    )
    return Study("manifold", preset, question, cells, _measure, _present, tuple(_claims()))


def _name(dimension: int, prediction: str) -> str:
    return f"d{dimension}-{prediction}"


def _measure(folder: Path, cell: Cell, seed: int) -> Finding:
    """Mean distance of 1,000 samples to the spiral, within its plane and away from it; samples in their plane."""
    pipeline, count = load(folder, device=cell.recipe.train.device), 1000
    data = cell.recipe.data
    points = pipeline.sample(count=count, seed=seed)
    inside, away = data.distances(points)
    numbers = {
        "distance": float((inside.square() + away.square()).sqrt().mean()),
        "in_plane": float(inside.mean()),
        "out_of_plane": float(away.mean()),
    }
    protocol = sampling_protocol(pipeline, pipeline.settings(), count, seed)
    protocol["distance"] = "mean over samples of the Euclidean distance to the nearest of 4,000 points of the curve"
    protocol["data"] = f"radius {data.radius:g}, {data.samples} training points"
    return Finding(numbers, protocol, points @ data.basis())


def _ratio(results: Results, dimension: int, prediction: str) -> float:
    """How many times the distance of a prediction is that of x0 prediction."""
    distance, best = (results.mean(_name(dimension, p), "distance") for p in (prediction, "x0"))
    return distance / best


def _planar(results: Results) -> tuple[str, bool]:
    radius = Spiral().radius
    shares = {p: results.mean(_name(2, p), "distance") / radius for p in PREDICTIONS}
    return ", ".join(f"{p} {share:.3f}" for p, share in shares.items()), all(share < 0.1 for share in shares.values())


def _claims() -> Iterator[Claim]:
    yield Claim("in 2 dimensions all three draw the curve: mean distance below 0.1 of its radius", _planar)
    for prediction in PREDICTIONS[1:]:

        def grows(results: Results, prediction: str = prediction) -> tuple[str, bool]:
            ratios = [_ratio(results, dimension, prediction) for dimension in DIMENSIONS]
            return ", ".join(f"{r:.3g}" for r in ratios), all(a < b for a, b in pairwise(ratios))

        def high(results: Results, prediction: str = prediction) -> tuple[str, bool]:
            ratio = _ratio(results, DIMENSIONS[-1], prediction)
            return f"{ratio:.3g}", ratio >= 5

        yield Claim(f"{prediction} over x0 prediction: the ratio of distances grows with D", grows)
        yield Claim(f"{prediction} over x0 prediction: at least 5 at D = 512", high)


def _present(results: Results) -> tuple[Section, ...]:
    columns = [f"{p} prediction" for p in PREDICTIONS]

    def table(number: str) -> Table:
        rows = [(f"{d}", *(results.value(_name(d, p), number) for p in PREDICTIONS)) for d in DIMENSIONS]
        return Table(("D", *columns), tuple(rows))

    def draw(axes: Axes, row: int, column: int) -> None:
        data = Spiral()
        curve = data.curve(torch.linspace(0, 1, 400)).numpy()
        axes.plot(curve[:, 0], curve[:, 1], color="#c8553d", linewidth=1)
        points = results.samples(_name(DIMENSIONS[row], PREDICTIONS[column]))
        limit = 1.3 * data.radius
        if points is not None:
            axes.scatter(points[:, 0].numpy(), points[:, 1].numpy(), s=3, color="#1f4e9e", zorder=2)
            outside = int((points.abs() > limit).any(1).sum())
            if outside:
                axes.text(0, -0.95 * limit, f"{outside} of {len(points)} outside", ha="center", fontsize=8)
        axes.set(xlim=(-limit, limit), ylim=(-limit, limit), aspect="equal")

    curves = []
    for prediction in PREDICTIONS:
        values = {d: results.value(_name(d, prediction), "distance") for d in DIMENSIONS}
        known = {d: v for d, v in values.items() if v.value}
        if known:
            errors = [v.error or 0.0 for v in known.values()]
            curves.append(
                Line(f"{prediction} prediction", list(known), [v.value or 0.0 for v in known.values()], errors)
            )
    samples = panels([f"D = {d}" for d in DIMENSIONS], columns, draw)
    plot = lines(curves, "dimensions D", "mean distance to the curve", log_x=True, log_y=True)
    return (
        Section(
            "Samples",
            (
                "100 samples of the first seed, projected to the plane of the data (blue), and the curve (red).",
                Picture("samples.png", "samples in the plane of the data, rows D, columns predictions", samples),
            ),
        ),
        Section(
            "Mean distance of samples to the curve",
            (
                f"The curve has radius {Spiral().radius:g}.",
                table("distance"),
                Picture("distance.png", "mean distance of samples to the curve against D", plot),
            ),
        ),
        Section("Within the plane", (table("in_plane"),)),
        Section("Out of the plane", (table("out_of_plane"),)),
        Section("Seconds for training and measuring", (table("seconds"),)),
    )
