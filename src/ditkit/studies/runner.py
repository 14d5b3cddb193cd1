"""Run a study: every cell and seed is an ordinary run folder, trained by the one loop; results are kept as they come.

OUT/study.json                   which study and preset the folder holds
OUT/runs/CELL-SEED/              run folders, as `ditkit train` writes them
OUT/results/CELL-SEED.json       a finished cell: its recipe, numbers, series and protocol; .npy beside it, samples
OUT/report.html, .md, .json      the report, and its pictures
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..config import DitkitError, NotFinite, differences, from_json, to_json
from ..files import TEMPORARY, atomic_write, held
from ..recipe import Recipe
from ..report import Listing, Report, Section, Table, number, provenance, write
from ..runs import Run
from ..sheet import rendered
from ..training import train
from .study import Cell, Finding, Results, Study, common

__all__ = ["compare", "read_results", "write_report"]

_SHOWN = 100  # samples that are kept of a cell


def compare(
    study: Study, folder: str | Path, *, quiet: bool = False, say: Callable[[str], None] = lambda line: None
) -> bool:
    """Train and measure what is missing, seed by seed. True if nothing is left to do here.

    Several processes may work on one folder: each takes what no other has. False: SIGTERM or Ctrl-C came while a cell
    was trained; the same call goes on from there, and no finished cell is done again. A cell whose loss or samples are
    not finite is finished, too: that is its result. say: gets a line for each cell. Raises DitkitError for a folder
    that holds something else.
    """
    out = Path(folder)
    _claim(study, out)
    read_results(study, out)  # what is there must be of these recipes
    for seed in study.seeds:
        for cell in study.cells:
            recipe, name = replace(cell.recipe, seed=seed), f"{cell.name}-{seed}"
            if _result(out, cell, seed).exists():
                continue
            with held(out / "locks" / f"{cell.folder}-{seed}") as mine:
                if not mine:
                    say(f"{name}: another process is at it")
                elif not _result(out, cell, seed).exists() and not _one(study, out, cell, recipe, quiet, say):
                    return False
    return True


def _one(study: Study, out: Path, cell: Cell, recipe: Recipe, quiet: bool, say: Callable[[str], None]) -> bool:
    """Train and measure one cell with one seed. False: it was stopped."""
    begun = time.perf_counter()
    run = out / "runs" / f"{cell.folder}-{recipe.seed}"
    try:
        if study.trains and not _trained(run, recipe) and not train(recipe, run, quiet=quiet):
            return False
        found = study.measure(run, replace(cell, recipe=recipe), recipe.seed)
    except NotFinite as error:
        found = Finding({}, {}, diverged=str(error))
    _store(out, cell, recipe, found, time.perf_counter() - begun)
    done = sum(_result(out, c, s).exists() for c in study.cells for s in study.seeds)
    numbers = ", ".join(f"{k} {number(v)}" for k, v in found.numbers.items() if not k.endswith(("_error", "seconds")))
    became = f"diverged ({found.diverged})" if found.diverged else numbers
    say(f"{done}/{study.total} {cell.name}, seed {recipe.seed}: {became}")
    return True


def _result(out: Path, cell: Cell, seed: int) -> Path:
    return out / "results" / f"{cell.name}-{seed}.json"


def _claim(study: Study, out: Path) -> None:
    """Make the folder this study's own. Raises DitkitError if it is another's."""
    mine = {"study": study.name, "preset": study.preset}
    path = out / "study.json"
    # before the look at study.json, which another process may be writing
    foreign = out.exists() and [p for p in out.iterdir() if not p.name.startswith(TEMPORARY)]
    if path.exists():
        found = _json(path)
        if {key: found.get(key) for key in mine} != mine:
            raise DitkitError(
                f"{out} holds the study {found.get('study')} with the preset {found.get('preset')}, not {study.name} "
                f"with {study.preset}: choose another --out"
            )
        return
    if foreign:
        raise DitkitError(f"{out} is not empty and holds no study: choose another --out")
    atomic_write(path, json.dumps(mine) + "\n")


def _trained(run: Path, recipe: Recipe) -> bool:
    """Whether the run folder holds this training, finished: another cell of the same run has done it.

    Raises DitkitError if it is the training of another recipe.
    """
    newest = Run(run).newest() if Run(run).exists() else None
    if newest is None or newest.step != recipe.train.steps:
        return False  # `train` looks at what is there
    wished = to_json(recipe.fitted(recipe.data.open(), newest.learned(recipe.codec)))
    for change in differences(to_json(Run(run).recipe()), wished):
        if not change.startswith(("sample", "evaluate")):
            raise DitkitError(f"{run} holds a run with another recipe: {change}; choose another --out, or delete it")
    return True


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise DitkitError(f"{path} cannot be read: {error}; delete it to have it made again") from None
    if not isinstance(content, dict):
        raise DitkitError(f"{path} does not hold what it should; delete it to have it made again")
    return content


def _store(out: Path, cell: Cell, recipe: Recipe, found: Finding, seconds: float) -> None:
    """The samples first: a result that is there is complete."""
    path = _result(out, cell, recipe.seed)
    if found.samples is not None:
        atomic_write(path.with_suffix(".npy"), rendered(found.samples[:_SHOWN], ".npy"))
    content = {
        "recipe": to_json(recipe),
        "numbers": {**found.numbers, "seconds": round(seconds, 1)},
        "protocol": {**found.protocol, **provenance()},
        "samples": found.samples is not None,
        "diverged": found.diverged,
        "series": {name: list(column) for name, column in found.series.items()},
    }
    atomic_write(path, json.dumps(content, indent=1, allow_nan=False) + "\n")


def read_results(study: Study, folder: str | Path) -> Results:
    """Whatever of the study is there. Raises DitkitError for results of another recipe, or a damaged file."""
    found: dict[tuple[str, int], Finding] = {}
    for seed in study.seeds:
        for cell in study.cells:
            path = _result(Path(folder), cell, seed)
            if not path.exists():
                continue
            content = _json(path)
            try:
                numbers, protocol = dict(content["numbers"]), dict(content["protocol"])
                recipe = to_json(from_json(content["recipe"], str(path)))  # with fields that are newer than the file
                samples = _samples(path.with_suffix(".npy")) if content["samples"] else None
                diverged = str(content.get("diverged", ""))
                series = {str(k): [float(v) for v in column] for k, column in content.get("series", {}).items()}
            except DitkitError:
                raise
            except (AttributeError, KeyError, TypeError, ValueError, OSError) as error:
                raise DitkitError(f"{path} is damaged: {error!r}; delete it to have it made again") from None
            changed = differences(recipe, to_json(replace(cell.recipe, seed=seed)))
            if changed:
                raise DitkitError(f"{path} is of another recipe: {changed[0]}; choose another --out, or delete it")
            found[cell.name, seed] = Finding(numbers, protocol, samples, diverged, series)
    return Results(study, found)


def _settings(cell: Cell) -> dict[str, Any]:
    """How a cell is trained."""
    return {name: value for name, value in to_json(cell.recipe.train).items() if name != "type"}


def _samples(path: Path) -> Tensor:
    return torch.from_numpy(np.load(path, allow_pickle=False))


def write_report(study: Study, folder: str | Path) -> list[Path]:
    """The report of whatever is there; the paths, the page first. Raises DitkitError where nothing is."""
    results = read_results(study, folder)
    if not results.found:
        raise DitkitError(f"{folder} holds no results of the study {study.name} yet: run it first")
    verdicts = study.verdicts(results)
    protocol = {
        "study": study.name,
        "preset": study.preset,
        "seeds": list(study.seeds),
        "cells": len(study.cells),
        "results": f"{len(results.found)} of {study.total}",
        **({"train": common(map(_settings, study.cells))} if study.trains else {}),
        "measurement": common(f.protocol for f in results.found.values()),
        "seconds": round(sum(f.numbers["seconds"] for f in results.found.values()), 1),
    }
    judged = Table(
        ("what was expected", "what came", ""),
        tuple((v.text, v.found, v.word if v.holds is None else v.holds) for v in verdicts),
    )
    errors = ("Errors are standard errors over the seeds.",) if len(study.seeds) > 1 else ()
    partial = f"{len(results.found)} of {study.total} results are there: run the same command to get the others."
    sections = (
        Section("Question", (study.question, *(() if results.complete else (partial,)))),
        *((Section("Expectations", (judged,)),) if verdicts else ()),
        *study.present(results),
        Section("Protocol", (*errors, Listing(protocol))),
        Section("Recipes", (Listing({cell.name: to_json(cell.recipe) for cell in study.cells}, brief=True),)),
    )
    data = {
        "study": study.name,
        "preset": study.preset,
        "question": study.question,
        "complete": results.complete,
        "expectations": [{"text": v.text, "found": v.found, "holds": v.holds} for v in verdicts],
        "results": [
            {"cell": name, "seed": seed, "numbers": dict(f.numbers), "protocol": dict(f.protocol)}
            | ({"diverged": f.diverged} if f.diverged else {})
            | ({"series": {k: list(column) for k, column in f.series.items()}} if f.series else {})
            for (name, seed), f in results.found.items()
        ],
        "protocol": protocol,
        "recipes": {cell.name: to_json(cell.recipe) for cell in study.cells},
    }
    return write(Report(f"{study.name} ({study.preset})", sections, data), Path(folder))
