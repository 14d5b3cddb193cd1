"""What a study is: cells that differ in one thing, seeds, a number to compare them by, and what is asked of it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jaxtyping import Shaped
from torch import Tensor

from ..config import DitkitError
from ..recipe import Recipe
from ..report import Section, Value

__all__ = ["Cell", "Claim", "Finding", "Missing", "Results", "Study", "Verdict", "common"]


@dataclass(frozen=True)
class Finding:
    """What was measured on one cell with one seed: numbers, how they were obtained, and samples to look at."""

    numbers: Mapping[str, float]
    protocol: Mapping[str, Any]
    samples: Shaped[Tensor, "n *sample"] | None = None
    diverged: str = ""
    """Why there is nothing to measure: the loss, its gradient or the samples were not finite."""
    series: Mapping[str, Sequence[float]] = field(default_factory=dict)
    """What was measured more than once, such as at many steps of the training: columns of one length."""


@dataclass(frozen=True)
class Cell:
    """One of the things compared: a recipe and its name. Cells of one `run` are samplings of the same training."""

    name: str
    recipe: Recipe
    run: str = ""
    """The folder of the training; by default the cell has its own."""

    @property
    def folder(self) -> str:
        return self.run or self.name


@dataclass(frozen=True)
class Claim:
    """Something that is expected of the results, and how they are asked: what came, and whether it is so."""

    text: str
    judge: Callable[[Results], tuple[str, bool]]
    """Called with complete results only; what it needs of a cell that diverged raises Missing."""


@dataclass(frozen=True)
class Verdict:
    """A claim, what came, and whether it holds; None where it cannot be said."""

    text: str
    found: str
    holds: bool | None

    @property
    def word(self) -> str:
        return "open" if self.holds is None else "kept" if self.holds else "missed"


class Missing(ValueError):
    """A number that is asked for is not there."""


Measure = Callable[[Path, Cell, int], Finding]
"""A run folder with a finished training, the cell that it belongs to, and the seed: the numbers."""


@dataclass(frozen=True)
class Study:
    """A controlled comparison: a frozen description, from which everything else follows."""

    name: str
    preset: str
    question: str
    cells: tuple[Cell, ...]
    measure: Measure
    present: Callable[[Results], tuple[Section, ...]]
    """Tables and pictures of whatever is there; may be called with a part of the results."""
    claims: tuple[Claim, ...]
    seeds: tuple[int, ...] = (0, 1, 2)
    trains: bool = True
    """Whether a cell is trained before it is measured."""

    def __post_init__(self) -> None:
        names = [cell.name for cell in self.cells]
        if len(set(names)) != len(names):
            raise ValueError(f"two cells of {self.name} have one name: {sorted(names)}")

    @property
    def total(self) -> int:
        """Results that a complete study has."""
        return len(self.cells) * len(self.seeds)

    def verdicts(self, results: Results) -> tuple[Verdict, ...]:
        """What became of the claims; nothing while results are missing."""
        return tuple(_verdict(claim, results) for claim in self.claims) if results.complete else ()


def _verdict(claim: Claim, results: Results) -> Verdict:
    try:
        return Verdict(claim.text, *claim.judge(results))
    except Missing as error:
        return Verdict(claim.text, f"cannot be said: {error}", None)


@dataclass(frozen=True)
class Results:
    """Findings by cell and seed; where some are missing, the study is not complete."""

    study: Study
    found: Mapping[tuple[str, int], Finding]

    @property
    def complete(self) -> bool:
        return len(self.found) == self.study.total

    def values(self, cell: str, number: str) -> list[float]:
        """A number of a cell for each seed that is there."""
        return [f.numbers[number] for (name, _), f in self.found.items() if name == cell and number in f.numbers]

    def diverged(self, cell: str) -> list[int]:
        """The seeds with which a cell diverged."""
        return [seed for (name, seed), f in self.found.items() if name == cell and f.diverged]

    def value(self, cell: str, number: str) -> Value:
        """Mean and standard error over seeds; with one seed the measurement's own error; nothing for no seed.

        Seeds that diverged are not in the mean, and the note says so. By which evaluator it was measured goes with it.
        Raises DitkitError for seeds that were measured by different ones.
        """
        values, lost = self.values(cell, number), self.diverged(cell)
        note = (f"{len(lost)} of {len(lost) + len(values)} diverged" if values else "diverged") if lost else ""
        if not values:
            return Value(None, note=note)
        by = self._evaluator(cell, number)
        mean = sum(values) / len(values)
        if len(values) == 1:
            return Value(mean, next(iter(self.values(cell, f"{number}_error")), None), note, by)
        variance = sum((v - mean) ** 2 for v in values) / (len(values) - 1)
        return Value(mean, math.sqrt(variance / len(values)), note, by)

    def _evaluator(self, cell: str, number: str) -> str:
        """By what a number of a cell was measured; "" where the protocols do not say."""
        protocols = [f.protocol.get("evaluators", {}) for (name, _), f in self.found.items() if name == cell]
        found = sorted({p[number] for p in protocols if number in p})
        if len(found) > 1:
            raise DitkitError(f"{number} of {cell} was measured by different protocols: {found[0]}; and {found[1]}")
        return found[0] if found else ""

    def mean(self, cell: str, number: str) -> float:
        """The mean over seeds. Raises Missing where there is none, or where a seed diverged."""
        if lost := self.diverged(cell):
            raise Missing(f"{cell} diverged with seed {', '.join(map(str, lost))}")
        found = self.value(cell, number).value
        if found is None:
            raise Missing(f"there is no {number} of {cell}")
        return found

    def samples(self, cell: str) -> Tensor | None:
        """Samples of the first seed that has some."""
        return next((f.samples for (name, _), f in self.found.items() if name == cell and f.samples is not None), None)


def common(protocols: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """One protocol for many: what is equal in all of them once, and of what differs every value."""
    merged: dict[str, list[Any]] = {}
    for protocol in protocols:
        for key, value in protocol.items():
            seen = merged.setdefault(key, [])
            if value not in seen:
                seen.append(value)
    return {key: values[0] if len(values) == 1 else _several(values) for key, values in merged.items()}


def _several(values: Sequence[Any]) -> dict[str, Any]:
    return {"different": sorted(values, key=json.dumps)}
