"""The report of a run: one self-contained HTML page, and the same as JSON, Markdown and pictures."""

from __future__ import annotations

import base64
import html
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..config import DitkitError, to_json
from ..runs import Run, atomic_write
from ..sheet import png, sheet
from .measure import MEANING, Measurement

__all__ = ["bounds", "curve", "number", "write_report"]

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60em; margin: 2em auto; padding: 0 1em; color: #1a1a1a }
table { border-collapse: collapse; width: 100% }
th, td { text-align: left; padding: .35em .7em; border-bottom: 1px solid #ddd }
td.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap }
img { max-width: 100%; image-rendering: pixelated }
pre { background: #f6f6f6; padding: 1em; overflow: auto; font-size: 13px }
.ok { color: #17692c } .missed { color: #b00020; font-weight: 600 }
"""


def number(value: float | None) -> str:
    """A number as people read it: four significant digits."""
    return "-" if value is None else f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def curve(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """The loss over the steps as a PNG: each logged mean and a running mean. Raises DitkitError without matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise DitkitError("the plots of a report need matplotlib: pip install 'ditkit[metrics]'") from None
    steps, losses = [r["step"] for r in rows], [r["loss"] for r in rows]
    windows = [losses[max(0, i - 9) : i + 1] for i in range(len(losses))]
    smooth = [sum(window) / len(window) for window in windows]
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.add_subplot()
    axes.plot(steps, losses, color="#b8c4d6", linewidth=1, label="mean over the steps of a row")
    axes.plot(steps, smooth, color="#1f4e9e", linewidth=2, label="mean over the last 10 rows")
    axes.set(xlabel="step", ylabel="training loss", yscale="log")
    axes.grid(alpha=0.3, which="both")
    axes.legend(frameon=False)
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    return buffer.getvalue()


def write_report(run: Run, found: Measurement) -> list[Path]:
    """Write samples.png, loss.png, report.json, report.md and report.html into the run; the paths, the page first."""
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
    pictures = {"samples.png": png(sheet(found.images[order[:200]], columns)), "loss.png": curve(run.rows())}

    values = {**found.numbers, "missed": [str(gate) for gate in found.missed]}
    recipe = run.recipe()
    content = {**values, "protocol": found.protocol, "recipe": to_json(recipe)}
    files = {
        **pictures,
        "report.json": json.dumps(content, indent=1, allow_nan=False) + "\n",
        "report.md": _markdown(run, found),
        "report.html": _page(run, found, pictures, recipe.to_json()),
    }
    for name, data in files.items():
        atomic_write(run.folder / name, data)
    return [run.folder / name for name in reversed(files)]


def _table(found: Measurement) -> list[tuple[str, str, str]]:
    """Name, value with its standard error, meaning."""
    numbers = found.numbers
    lines = []
    for name, meaning in MEANING.items():
        if name in numbers:
            error = numbers.get(f"{name}_error")
            lines.append((name, number(numbers[name]) + (f" ± {number(error)}" if error else ""), meaning))
    return lines


def bounds(found: Measurement) -> list[tuple[str, str, bool]]:
    """Each bound, what it came to, and whether it was kept."""
    return [
        (str(g), f"{number(found.numbers[g.metric])} against {number(g.limit(found.numbers))}", g.holds(found.numbers))
        for g in found.gates
    ]


def _markdown(run: Run, found: Measurement) -> str:
    lines = [
        f"# {run.folder.name}",
        "",
        "![samples](samples.png)",
        "",
        "| number | value | what it means |",
        "|---|---|---|",
    ]
    lines += [f"| {name} | {value} | {meaning} |" for name, value, meaning in _table(found)]
    if found.gates:
        lines += ["", "| bound | found | |", "|---|---|---|"]
        lines += [f"| {bound} | {came} | {'kept' if kept else '**missed**'} |" for bound, came, kept in bounds(found)]
    lines += ["", "![loss](loss.png)", "", "```json", json.dumps(found.protocol, indent=1), "```", ""]
    return "\n".join(lines)


def _page(run: Run, found: Measurement, pictures: Mapping[str, bytes], recipe: str) -> str:
    def image(name: str, alt: str) -> str:
        data = base64.b64encode(pictures[name]).decode()
        return f'<p><img alt="{alt}" src="data:image/png;base64,{data}"></p>'

    escape = html.escape
    rows = "".join(
        f"<tr><td>{escape(n)}</td><td class=n>{escape(v)}</td><td>{escape(m)}</td></tr>" for n, v, m in _table(found)
    )
    kept_or_not = "".join(
        f"<tr><td>{escape(b)}</td><td class=n>{escape(came)}</td>"
        f"<td class={'ok' if kept else 'missed'}>{'kept' if kept else 'missed'}</td></tr>"
        for b, came, kept in bounds(found)
    )
    title = escape(run.folder.name)
    return "\n".join(
        [
            f"<!doctype html><html lang=en><meta charset=utf-8><title>{title}</title><style>{_STYLE}</style>",
            f"<h1>{title}</h1><h2>Samples</h2>" + image("samples.png", "samples, one row for each class"),
            f"<h2>Numbers</h2><table><tr><th>number<th>value<th>what it means{rows}</table>",
            f"<h2>Bounds</h2><table><tr><th>bound<th>found<th>{kept_or_not}</table>" if found.gates else "",
            "<h2>Training</h2>" + image("loss.png", "training loss over steps"),
            f"<h2>Protocol</h2><pre>{escape(json.dumps(found.protocol, indent=1))}</pre>",
            f"<h2>Recipe</h2><pre>{escape(recipe)}</pre></html>",
        ]
    )
