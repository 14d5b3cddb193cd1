"""What resolution costs: time and memory from 32 to 1024 pixels, of attention alone and of whole steps, by kernel.

Nothing is trained. Each number is measured in a process of its own under a limit of memory. What the plan says will not
fit is not begun: it is planned, and the message says what to change.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from ..config import DitkitError
from ..guarded import Taken, attention, available, network
from ..models import DiTConfig
from ..plan import cost
from ..recipe import Recipe
from ..report import Line, Picture, Section, Table, Value, lines, number
from .study import Cell, Claim, Finding, Missing, Results, Study

__all__ = ["RESOLUTIONS", "WAYS", "matrices", "resolution"]

RESOLUTIONS = (32, 64, 128, 256, 512, 1024)
WAYS = ("math", "flash")
"""Kernels of `scaled_dot_product_attention`: the matrix of weights in memory, or never whole."""
WORKS = ("attention", "sampling", "training")
SHARE = 0.5
"""Of the free memory, which a measurement may take."""
COPIES = {"attention": 2, "sampling": 2, "training": 3}
"""Matrices of weights that math holds at once: scores and weights, and in training the gradient of one of them."""


def resolution(preset: str = "cpu") -> Study:
    """cpu: a DiT of width 96 and 2 blocks on patches of 8 pixels, batch 1, float32. full: DiT-B on such patches."""
    size: dict[str, Any] = {"hidden_size": 96, "depth": 2, "num_heads": 3}
    if preset == "full":
        size = {"hidden_size": 768, "depth": 12, "num_heads": 12}
    cells = tuple(
        Cell(
            _name(pixels, way),
            Recipe(model=DiTConfig(input_size=pixels, patch_size=8, in_channels=3, learn_sigma=False, **size)),
        )
        for way in WAYS
        for pixels in RESOLUTIONS
    )
    question = (
        "How do time and memory grow from 32 to 1024 pixels, and where does the square of the number of tokens begin "
        "to count? With the matrix of attention in memory, and with a kernel that never holds it whole."
    )
    return Study("resolution", preset, question, cells, _measure, _present, _CLAIMS, (0,), trains=False)


def _name(pixels: int, way: str) -> str:
    return f"{way}-{pixels}"


def matrices(model: DiTConfig, work: str) -> int:
    """Bytes of the matrices of attention that math holds at once, batch 1, float32: of one block, and in training of
    every block, whose weights the backward pass needs."""
    one = 4 * model.num_heads * model.length**2
    return one * (COPIES[work] + (model.depth - 1 if work == "training" else 0))


def _planned(model: DiTConfig, way: str, work: str) -> int:
    """Bytes by shapes alone."""
    extra = matrices(model, work) if way == "math" else 0
    if work == "attention":
        return 4 * 4 * model.length * model.hidden_size + extra  # q, k, v and the result
    planned = cost(model, dtype="fp32")
    return extra + (planned.training if work == "training" else planned.sampling)


def _taken(model: DiTConfig, way: str, work: str, limit: int) -> Taken:
    calls = 1 if model.length > 2000 else 3
    if work == "attention":
        shape = (1, model.num_heads, model.length, model.hidden_size // model.num_heads)
        return attention(shape, training=False, limit=limit, backend=way, calls=calls)
    return network(model, 1, training=work == "training", limit=limit, backend=way, calls=calls)


def _measure(folder: Path, cell: Cell, seed: int) -> Finding:
    model, way = cell.recipe.model, cell.name.split("-")[0]
    numbers: dict[str, float] = {"tokens": float(model.length)}
    protocol: dict[str, object] = {"limit": f"{SHARE:.0%} of the free memory", "batch": 1, "dtype": "float32"}
    for work in WORKS:
        needed, room = _planned(model, way, work), int(SHARE * available())
        numbers[f"{work}_planned_mib"] = needed / 2**20
        try:
            if needed > room:
                raise DitkitError(f"planned {needed / 2**20:,.0f} MiB, and {room / 2**20:,.0f} may be taken")
            taken = _taken(model, way, work, room)
            numbers |= {f"{work}_seconds": taken.seconds, f"{work}_mib": taken.bytes / 2**20}
        except DitkitError as error:
            advice = "flash instead of math, larger patches, latents, or more memory"
            protocol[_unmeasured(cell.name, work)] = f"not measured: {error}; what helps: {advice}"
    return Finding(numbers, protocol)


def _unmeasured(name: str, work: str) -> str:
    """The key of the protocol that says why something was not measured."""
    return f"{name} {work}"


def _known(results: Results, way: str, number: str) -> dict[float, float]:
    """A number by tokens, where it was measured."""
    found = {}
    for pixels in RESOLUTIONS:
        value = results.value(_name(pixels, way), number).value
        if value:
            found[results.mean(_name(pixels, way), "tokens")] = value
    return found


def _slope(results: Results, way: str, number: str) -> float:
    """The power of the number of tokens between the two largest that were measured. Raises Missing for fewer."""
    known = sorted(_known(results, way, number).items())
    if len(known) < 2:
        raise Missing(f"{number} of {way} was measured at fewer than two sizes")
    return _power(*known[-2:])


def _power(one: tuple[float, float], two: tuple[float, float]) -> float:
    """The power of the number of tokens with which something grows between two sizes, each (tokens, value)."""
    return math.log(two[1] / one[1]) / math.log(two[0] / one[0])


def _claims() -> tuple[Claim, ...]:
    def power(way: str, name: str, low: float, high: float, text: str) -> Claim:
        def judge(results: Results) -> tuple[str, bool]:
            slope = _slope(results, way, name)
            return number(slope), low <= slope <= high

        return Claim(f"{text}: a power of the number of tokens from {low:g} to {high:g}", judge)

    return (
        power("math", "attention_seconds", 1.7, 2.3, "time of attention, math"),
        power("flash", "attention_seconds", 1.7, 2.3, "time of attention, flash"),
        power("math", "attention_mib", 1.7, 2.3, "memory of attention, math"),
        power("flash", "attention_mib", 0.7, 1.3, "memory of attention, flash"),
        power("flash", "training_mib", 0.7, 1.3, "memory of a training step, flash"),
    )


_CLAIMS = _claims()


def _law(results: Results, way: str, number: str, tokens: float) -> Value:
    """What was measured; where nothing was, the square law from the largest that was."""
    known = _known(results, way, number)
    if tokens in known:
        return Value(known[tokens])
    if not known:
        return Value(None)
    largest = max(known)
    return Value(known[largest] * (tokens / largest) ** 2, note="by the square law")


def _present(results: Results) -> tuple[Section, ...]:
    model = results.study.cells[0].recipe.model
    said = (
        f"A DiT of width {model.hidden_size}, {model.depth} blocks and {model.num_heads} heads, with patches of "
        f"{model.patch_size} x {model.patch_size} pixels: one image at a time, in float32, random weights.",
        "math: the matrix of attention is in memory. flash: it never is, whole.",
        "MiB: the most memory that was held at once, beyond what the process had before; at the smallest sizes it is "
        "what torch itself keeps. Planned: by shapes alone, before anything is begun. By the square law: from the "
        "largest size that was measured.",
    )
    return Section("What was measured", said), *(_section(results, work) for work in WORKS), _growth(results)


def _growth(results: Results) -> Section:
    """Where the square begins to count: powers between one size and the next."""
    parts: list[str | Table] = [
        "The power of the number of tokens with which each grows from one size to the next: 1 is in proportion, 2 is "
        "the square."
    ]
    for title, unit in (("time", "seconds"), ("memory", "mib")):
        known = {f"{work}, {way}": _known(results, way, f"{work}_{unit}") for work in WORKS for way in WAYS}
        sizes = sorted({tokens for found in known.values() for tokens in found})
        rows = tuple(
            (
                f"{few:,.0f} to {many:,.0f}",
                *(
                    Value(round(_power((few, v[few]), (many, v[many])), 2) if {few, many} <= v.keys() else None)
                    for v in known.values()
                ),
            )
            for few, many in pairwise(sizes)
        )
        parts.append(Table((f"{title}: tokens", *known), rows))
    return Section("Where the square begins to count", tuple(parts))


def _section(results: Results, work: str) -> Section:
    rows = []
    for pixels in RESOLUTIONS:
        count = next((v for w in WAYS if (v := results.value(_name(pixels, w), "tokens").value)), None)
        if count is None:
            continue
        row: list[str | Value] = [f"{pixels}", Value(count)]
        for way in WAYS:
            name = _name(pixels, way)
            measured, planned = (results.value(name, f"{work}{kind}_mib") for kind in ("", "_planned"))
            seconds = _law(results, way, f"{work}_seconds", count)
            time = seconds if seconds.value is None else replace(seconds, value=1e3 * seconds.value)
            row += [time, planned, measured]
        rows.append(tuple(row))
    head = ("pixels", "tokens", *(f"{way}: {what}" for way in WAYS for what in ("ms", "MiB planned", "MiB")))
    parts: list[str | Table | Picture] = [Table(head, tuple(rows))]
    for (name, _), finding in results.found.items():
        if why := finding.protocol.get(_unmeasured(name, work)):
            parts.append(f"{name} was {why}.")
    for what, unit in (("seconds", "seconds"), ("mib", "MiB")):
        curves = [Line(way, *_axes(_known(results, way, f"{work}_{what}"))) for way in WAYS]
        curves = [curve for curve in curves if curve.x]
        if curves:
            plot = lines(curves, "tokens", unit, log_x=True, log_y=True)
            parts.append(Picture(f"{work}-{what}.png", f"{work}: {unit} against tokens, log-log", plot))
    titles = {"attention": "Attention alone", "sampling": "A step of sampling", "training": "A step of training"}
    return Section(titles[work], tuple(parts))


def _axes(known: dict[float, float]) -> tuple[Sequence[float], Sequence[float]]:
    return list(known), list(known.values())
