"""The report of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..config import to_json
from ..report import Line, Listing, Picture, Report, Section, Table, Value, lines, number, write
from ..runs import Run
from ..sheet import png, sheet
from .decisions import decide
from .measure import MEANING, Measurement

__all__ = ["bounds", "curve", "watched", "write_report"]


def curve(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """The loss over the steps as a PNG: each logged mean and a running mean. Raises DitkitError without matplotlib."""
    steps, losses = [r["step"] for r in rows], [r["loss"] for r in rows]
    windows = [losses[max(0, i - 9) : i + 1] for i in range(len(losses))]
    smooth = [sum(window) / len(window) for window in windows]
    return lines(
        [
            Line("mean over the steps of a row", steps, losses, strong=False),
            Line("mean over the last 10 rows", steps, smooth),
        ],
        "step",
        "training loss",
        log_y=True,
    )


def write_report(run: Run, found: Measurement) -> list[Path]:
    """Write report.html, report.md, report.json and the pictures into the run; the paths, the page first."""
    values = {**found.numbers, "missed": [str(gate) for gate in found.missed]}
    recipe = to_json(run.recipe())
    if found.texts:
        rows = tuple((n.text, n.nearest, str(n.edits)) for n in found.texts[:50])
        samples = Table(("sample", "nearest training text", "edits"), rows)
    else:
        samples = Picture("samples.png", found.caption, _samples(found))
    loss = Picture("loss.png", "training loss over steps", curve(run.rows()))
    sections = [
        Section("Samples", (samples,)),
        Section("Numbers", (Table(("number", "value", "what it means"), _numbers(found)),)),
        Section("Bounds", (Table(("bound", "found", ""), tuple(bounds(found))),)) if found.gates else None,
        Section("Training", (loss,)),
        watched(run),
        Section("Protocol", (Listing(found.protocol),)),
        Section("Recipe", (Listing(recipe, brief=True),)),
    ]
    content = {**values, "protocol": found.protocol, "recipe": recipe}
    return write(Report(run.folder.name, tuple(s for s in sections if s), content), run.folder)


def watched(run: Run) -> Section | None:
    """What the monitor saw: its decisions, and curves of losses, copies and quality; None where it saw nothing."""
    rows = run.watched()
    if not rows:
        return None
    said = decide(rows).lines()
    spent = f"{len(rows)} evaluations took {number(rows[-1]['seconds'])} seconds of the training."
    compared = [row for row in rows if row.get("heldout_loss") is not None]
    sampled = [row for row in rows if row.get("f_mem") is not None]
    parts: list[str | Picture] = [f"{line[0].upper()}{line[1:]}." for line in said]
    if not compared:
        parts.append("Losses were not compared: there are fewer than 2 held-out samples.")
    if not sampled:
        parts.append("Copies were not looked for: no samples were drawn.")
    parts.append(spent)
    if compared:
        steps = [row["step"] for row in compared]
        losses = [
            Line("training samples", steps, [row["train_loss"] for row in compared]),
            Line("held-out samples", steps, [row["heldout_loss"] for row in compared]),
        ]
        positive = all(min(row["train_loss"], row["heldout_loss"]) > 0 for row in compared)
        loss = lines(losses, "step", "loss of the averaged weights", log_x=True, log_y=positive)
        parts.append(Picture("monitor-loss.png", "losses of training and held-out samples over steps", loss))
    if sampled:
        at = [row["step"] for row in sampled]
        copies = [
            Line("f_mem", at, [row["f_mem"] for row in sampled]),
            Line("floor: held-out samples", at, [row["floor"] for row in sampled], strong=False),
        ]
        drawn = lines(copies, "step", "share of samples that copy", log_x=True)
        parts.append(Picture("monitor-copies.png", "share of samples that copy training samples over steps", drawn))
    judged = [row for row in rows if row.get("kid") is not None]
    if judged:
        kid = Line("KID", [r["step"] for r in judged], [r["kid"] for r in judged], [r["kid_error"] for r in judged])
        drawn = lines([kid], "step", "kernel distance to held-out images", log_x=True)
        parts.append(Picture("monitor-kid.png", "kernel distance to held-out images over steps", drawn))
    if (nearest := run.folder / "monitor.png").exists():
        parts.append(
            Picture("nearest.png", "samples nearest to training images, each before that one", nearest.read_bytes())
        )
    return Section("Monitor", tuple(parts))


def _samples(found: Measurement) -> bytes:
    columns = 10
    classes = 0 if found.labels is None else len(set(found.labels.tolist()))
    order = list(range(len(found.images)))
    if found.labels is not None and classes <= 20:
        # one row for each class, its first ten samples
        rows: dict[int, list[int]] = {}
        for i, label in enumerate(found.labels.tolist()):
            rows.setdefault(label, []).append(i)
        columns = min(columns, *map(len, rows.values()))
        order = [i for label in sorted(rows) for i in rows[label][:columns]]
    return png(sheet(found.images[order[:200]], columns))


def _numbers(found: Measurement) -> tuple[tuple[str, Value, str], ...]:
    """Name, value with its standard error, meaning."""
    numbers = found.numbers
    return tuple(
        (name, Value(numbers[name], numbers.get(f"{name}_error")), meaning)
        for name, meaning in MEANING.items()
        if name in numbers
    )


def bounds(found: Measurement) -> list[tuple[str, str, bool]]:
    """Each bound, what it came to, and whether it was kept."""
    return [
        (str(g), f"{number(found.numbers[g.metric])} against {number(g.limit(found.numbers))}", g.holds(found.numbers))
        for g in found.gates
    ]
