"""What resolution costs: what is measured, what is only planned, and the powers that are claimed."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from ditkit.models import DiTConfig
from ditkit.report import Table
from ditkit.studies import Finding, Results, compare, find_study, write_report
from ditkit.studies.resolution import RESOLUTIONS, WAYS, matrices


def test_matrices_are_counted_by_hand() -> None:
    model = DiTConfig(input_size=64, patch_size=8, hidden_size=96, depth=4, num_heads=3)
    one = 3 * 64 * 64 * 4  # heads, tokens by tokens, bytes
    assert [matrices(model, work) for work in ("attention", "sampling", "training")] == [2 * one, 2 * one, 6 * one]


def test_what_fits_is_measured_and_what_does_not_is_planned(tmp_path: Path) -> None:
    study = find_study("resolution")
    huge = next(c for c in study.cells if c.name == "math-1024")
    huge = replace(huge, recipe=replace(huge.recipe, model=replace(huge.recipe.model, input_size=2**14)))
    assert compare(replace(study, cells=(huge,)), tmp_path, quiet=True)
    assert not (tmp_path / "runs").exists()  # nothing is trained
    content = json.loads((tmp_path / "results" / "math-1024-0.json").read_text())
    numbers, protocol = content["numbers"], content["protocol"]
    assert numbers["tokens"] == 2**22
    assert numbers["attention_planned_mib"] > 2**20
    assert "attention_mib" not in numbers
    assert "flash instead of math" in protocol["math-1024 attention"]
    assert "smaller batch" not in protocol["math-1024 attention"]  # it is one image already


@pytest.mark.slow
def test_small_sizes_are_measured(tmp_path: Path) -> None:
    study = find_study("resolution")
    study = replace(study, cells=tuple(c for c in study.cells if c.name.endswith(("-32", "-64"))))
    assert compare(study, tmp_path, quiet=True)
    written = {p.name for p in write_report(study, tmp_path)}
    works = ("attention", "sampling", "training")
    assert written >= {f"{work}-seconds.png" for work in works} | {"report.md", "report.html", "report.json"}
    for result in json.loads((tmp_path / "report.json").read_text())["results"]:
        assert all(result["numbers"][f"{work}_seconds"] > 0 for work in works)


def judged(powers: dict[tuple[str, str], float]) -> list[bool | None]:
    """The verdicts on numbers that grow as a power of the tokens, 2 or 1 unless given by (way, number)."""
    study, found = find_study("resolution"), {}
    for way in WAYS:
        for pixels in RESOLUTIONS:
            tokens = float((pixels // 8) ** 2)
            numbers = {"tokens": tokens}
            for name in ("attention_seconds", "attention_mib", "training_mib"):
                usual = 1.0 if way == "flash" and name.endswith("mib") else 2.0
                numbers[name] = tokens ** powers.get((way, name), usual)
            found[f"{way}-{pixels}", 0] = Finding(numbers, {})
    return [verdict.holds for verdict in study.verdicts(Results(study, found))]


def test_the_claims_break_one_by_one() -> None:
    assert judged({}) == [True] * 5
    keys = [(w, n) for n in ("attention_seconds", "attention_mib") for w in WAYS] + [("flash", "training_mib")]
    for i, key in enumerate(keys):
        assert judged({key: 1.5}) == [j != i for j in range(5)], key


def test_the_square_law_fills_what_was_not_measured(tmp_path: Path) -> None:
    study = find_study("resolution")
    found = {(c.name, 0): Finding({"tokens": float((int(c.name.split("-")[1]) // 8) ** 2)}, {}) for c in study.cells}
    found["math-512", 0] = Finding({"tokens": 4096.0, "attention_seconds": 2.0}, {})
    parts = {section.title: section.parts for section in study.present(Results(study, found))}
    table = next(part for part in parts["Attention alone"] if isinstance(part, Table))
    assert str(table.rows[-1][2]) == "32,000 (by the square law)"  # ms; 16,384 tokens are 4 times as many


def test_the_report_says_why_what_was_not_measured_was_not_and_where_the_square_begins(tmp_path: Path) -> None:
    study = find_study("resolution")
    study = replace(study, cells=tuple(c for c in study.cells if c.name in ("math-32", "math-64", "math-128")))
    found = {}
    for cell, seconds in zip(study.cells, (0.001, 0.004, 0.064), strict=True):  # tokens 16, 64, 256: powers 1 and 2
        numbers = {"tokens": float(cell.recipe.model.length), "attention_seconds": seconds, "attention_mib": 2.0}
        found[cell.name, 0] = Finding(numbers, {})
    found["math-64", 0] = replace(found["math-64", 0], protocol={"math-64 training": "not measured: too much; do less"})
    parts = {section.title: section.parts for section in study.present(Results(study, found))}
    assert "math-64 was not measured: too much; do less." in parts["A step of training"]
    assert not [part for part in parts["A step of sampling"] if isinstance(part, str)]
    times = next(p for p in parts["Where the square begins to count"] if isinstance(p, Table))
    column = times.head.index("attention, math")
    assert [(row[0], str(row[column])) for row in times.rows] == [("16 to 64", "1"), ("64 to 256", "2")]
    assert "one image at a time" in str(parts["What was measured"][0])
    milliseconds = next(p for p in parts["Attention alone"] if isinstance(p, Table))
    assert [str(row[milliseconds.head.index("math: ms")]) for row in milliseconds.rows] == ["1", "4", "64"]
