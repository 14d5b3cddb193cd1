"""When a network copies: the study's design, the times that are read off its curves, its verdicts, and a tiny run."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from ditkit.data import Digits
from ditkit.plan import gmacs
from ditkit.recipe import Monitor
from ditkit.studies import Finding, Results, Study, compare, find_study, read_results, write_report
from ditkit.studies.copies import CLASSIFIER, dense, seen_live, times_of
from ditkit.studies.memorization import MODEL, NARROW, SNAPSHOTS, STEPS

from .test_studies import shrunk


def test_the_design_is_a_sweep_over_n_and_one_over_w_of_networks_below_a_million_macs() -> None:
    study = find_study("memorization")
    cells = {c.name: c.recipe for c in study.cells}
    assert [(r.data.count, r.model.hidden_size) for r in cells.values()] == [
        (256, 120),
        (512, 120),
        (1024, 120),
        (512, 60),
        (512, 84),
    ]
    assert len(study.seeds) >= 2
    for name, recipe in cells.items():
        train = recipe.train
        assert train.steps == SNAPSHOTS * train.snapshot_every
        assert train.cooldown == 0
        length = STEPS[recipe.data.count] * (120 / recipe.model.hidden_size) ** NARROW
        assert train.steps == pytest.approx(length, rel=0.02), name
        same = replace(cells["n512"], data=recipe.data, model=recipe.model, train=train)
        assert same == recipe, name
        one = {"steps": 1, "snapshot_every": 1, "checkpoint_every": 1}
        assert replace(train, **one) == replace(cells["n512"].train, **one)
    largest = cells["n1024"].model
    assert gmacs(largest.fitted((1, 14, 14), 10, 0), (1, 14, 14)) <= 1e-3
    full = find_study("memorization", "full")
    assert [c.name for c in full.cells] == ["n256", "n512", "n1024", "w128", "w512"]


def test_at_least_four_evaluations_lie_in_each_octave() -> None:
    every = 37
    chosen = dense([every * k for k in range(1, SNAPSHOTS + 1)])
    assert chosen[-1] == every * SNAPSHOTS
    assert chosen == sorted(set(chosen))
    for start in (every * SNAPSHOTS / 2, every * SNAPSHOTS / 4, every * SNAPSHOTS / 8):
        assert sum(start < s <= 2 * start for s in chosen) >= 4
    assert max(b / a for a, b in pairwise(c for c in chosen if c >= 16 * every)) < 2**0.25
    assert dense([5]) == [5]


def rows_of(n: int, **change: Any) -> list[dict[str, Any]]:
    """A training that is good from step 400 and copies from about 4 n, as share (step / 10 n)^2."""
    rows = []
    for step in dense([n // 8 * k for k in range(1, 101)]):
        share = min(1.0, (step / (10 * n)) ** 2)
        row = {
            "step": step,
            "samples": 512,
            "f_mem": share,
            "f_mem_low": max(0.0, share - 0.01),
            "f_mem_high": share + 0.01,
            "floor": 0.0,
            "accuracy": step / (step + 100),
            "kid": 0.2 + 8 * 10 / (10 + step),
            "kid_error": 0.01,
            "train_loss": 1.0,
            "heldout_loss": 1 + abs(math.log(step / (2 * n))),
        }
        rows.append({name: change[name](row) if name in change else value for name, value in row.items()})
    return rows


def test_the_times_are_where_the_curves_reach_their_levels() -> None:
    times = times_of(rows_of(512))
    for level in (2, 10, 25):
        assert times[f"tau_mem_{level}"] == pytest.approx(5120 * math.sqrt(level / 100), rel=0.02)
    assert times["tau_gen"] == pytest.approx(400, rel=0.02)
    assert times["lowest_step"] == pytest.approx(1024, rel=0.07)
    assert times["last_step"] == 6400
    assert times["last_f_mem"] == 1.0
    assert times["window_f_mem"] < 0.025
    never = times_of(rows_of(512, f_mem=lambda row: 0.0, f_mem_low=lambda row: 0.0, accuracy=lambda row: 0.5))
    assert not {"tau_mem_2", "tau_mem_10", "tau_mem_25", "tau_gen"} & set(never)
    flat = times_of(rows_of(512, kid=lambda row: 1.0))
    assert "tau_gen_kid" not in flat
    # KID rises before it falls: the fall is counted from the top
    rising = times_of(rows_of(512, kid=lambda row: 1 + math.exp(-((math.log(row["step"] / 300)) ** 2))))
    assert rising["tau_gen_kid"] > 300


def judged(**change: Any) -> list[bool | None]:
    """Verdicts but the theory's on exact laws tau_mem = 1000 n / W; `cell__number=value` changes one number."""
    study = find_study("memorization")
    found = {}
    for cell in study.cells:
        n, w = cell.recipe.data.count, cell.recipe.model.hidden_size
        numbers = {
            "tau_mem_2": 1000.0 * n / w,
            "tau_gen": 700.0,
            "tau_gen_kid": 900.0,
            "dense_copies": 100.0,
            "live_copies": 110.0,
            "lowest_f_mem": 0.0,
            "last_f_mem": 0.4,
        }
        for name, value in change.items():
            where, what = name.split("__")
            if where == cell.name:
                numbers[what] = value
        numbers.setdefault("live_tau_mem_2", 1.1 * numbers["tau_mem_2"])
        for seed in study.seeds:
            noisy = {k: v * (1 + 0.01 * seed) if k.endswith("tau_mem_2") else v for k, v in numbers.items()}
            found[cell.name, seed] = Finding(noisy, {})
    return [v.holds for v in replace(study, claims=study.claims[:-1]).verdicts(Results(study, found))]


def test_the_claims_break_one_by_one() -> None:
    kept = [True] * 7

    def missed(place: int) -> list[bool]:
        return [k != place for k in range(7)]

    assert judged() == kept
    assert judged(n256__tau_mem_2=4000.0, n1024__tau_mem_2=4000.0) == missed(0)
    assert judged(w60__tau_mem_2=1000.0, w84__tau_mem_2=1000.0)[1] is False
    assert judged(n1024__tau_gen=1401.0) == missed(2)
    assert judged(n1024__tau_gen_kid=1801.0) == missed(3)
    assert judged(n256__live_tau_mem_2=1.25 * 256e3 / 120) == missed(4)
    assert judged(n256__live_tau_mem_2=0.8 * 256e3 / 120) == missed(4)
    assert judged(w60__live_copies=118.0) == kept
    assert judged(w60__live_copies=120.0) == missed(5)
    assert judged(w60__live_copies=83.0) == missed(5)
    assert judged(n512__lowest_f_mem=0.03) == missed(6)
    assert judged(n512__last_f_mem=0.2) == missed(6)


def test_the_monitor_is_read_as_the_snapshots_are() -> None:
    rows = rows_of(512)
    dense = times_of(rows)
    live = seen_live(rows, [*rows[:3], {"step": rows[3]["step"], "heldout_loss": 1.0}, *rows[4:]])  # a look without
    for level in (2, 10, 25):
        assert live[f"live_tau_mem_{level}"] == pytest.approx(dense[f"tau_mem_{level}"], rel=1e-9)
    assert live["live_copies"] == live["dense_copies"]
    assert set(seen_live(rows, [])) == {"dense_copies"}
    assert "live_tau_mem_25" not in seen_live(rows, [row for row in rows if row["f_mem"] < 0.2])


def tiny() -> Study:
    """Eight steps on 40 digits of 8 x 8."""
    study = shrunk(find_study("memorization"), emas=(), ema_stds=(0.05,), steps=8, snapshot_every=1)
    recipe = study.cells[0].recipe
    recipe = replace(
        recipe,
        data=Digits(resolution=8, count=40),
        model=replace(recipe.model, patch_size=8, hidden_size=32, num_heads=1),
        train=replace(recipe.train, monitor=Monitor(budget=50.0, samples=32, steps=2)),
    )
    return replace(study, cells=(replace(study.cells[0], recipe=recipe),), claims=())


def test_a_tiny_run_is_measured_at_its_snapshots_and_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    for name, value in {"d": 4, "p": 64, "ratios": (2, 4)}.items():
        monkeypatch.setitem(MODEL, name, value)
    monkeypatch.setitem(CLASSIFIER, "steps", 10)
    study = tiny()
    assert compare(study, tmp_path, quiet=True)
    finding = read_results(study, tmp_path).found["n256", 0]
    assert list(finding.series["step"]) == [1, 2, 3, 4, 5, 6, 7, 8]
    assert {len(column) for column in finding.series.values()} == {8}
    assert all(0 <= f <= 1 for f in finding.series["f_mem"])
    assert finding.series["heldout_loss"][-1] < finding.series["heldout_loss"][0]
    assert finding.numbers["last_step"] == 8
    assert finding.protocol["checkpoint"] == "snapshots/step-*, ema-std-0.05"
    assert finding.samples is not None
    assert finding.samples.shape == (20, 1, 8, 8)
    assert (tmp_path / "runs" / "n256-0" / "monitor.jsonl").exists()
    pages = write_report(study, tmp_path)
    names = {page.name for page in pages}
    assert {"copies.png", "collapse.png", "kid.png", "accuracy.png", "loss.png", "theory.png"} <= names
    data = json.loads((tmp_path / "report.json").read_text())
    assert data["results"][0]["series"]["step"][-1] == 8


@pytest.mark.slow
def test_the_theory_has_one_time_that_grows_and_one_that_does_not() -> None:
    study = find_study("memorization")
    _, holds = study.claims[-1].judge(Results(study, {}))
    assert holds
