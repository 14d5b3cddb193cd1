"""Reports: one self-contained HTML page, and the same as Markdown, JSON and pictures. Nothing else writes one."""

from __future__ import annotations

import base64
import html
import io
import json
import os
import platform
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .config import DitkitError
from .files import atomic_write

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "Line",
    "Listing",
    "Picture",
    "Report",
    "Section",
    "Table",
    "Value",
    "check_folder",
    "drawn",
    "figure",
    "lines",
    "number",
    "panels",
    "provenance",
    "write",
]

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60em; margin: 2em auto; padding: 0 1em; color: #1a1a1a }
table { border-collapse: collapse; width: 100%; margin: 1em 0 }
th, td { text-align: left; padding: .35em .7em; border-bottom: 1px solid #ddd }
td.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap }
img { max-width: 100%; image-rendering: pixelated }
pre { background: #f6f6f6; padding: 1em; overflow: auto; font-size: 13px }
.ok { color: #17692c } .missed { color: #b00020; font-weight: 600 }
"""
COLOURS = ("#1f4e9e", "#c8553d", "#2f8f5b", "#8a5fb0", "#b8860b", "#4a9aa8", "#a04070", "#666666")


def number(value: float | None) -> str:
    """A number as people read it: four significant digits."""
    return "-" if value is None else f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


@dataclass(frozen=True)
class Value:
    """A number in a table, with its standard error where there is one, and a note about it."""

    value: float | None
    error: float | None = None
    note: str = ""
    protocol: str = ""
    """By which evaluator it was made, where that matters: what two numbers must have in common to be compared."""

    def __str__(self) -> str:
        if self.value is None and self.note:
            return self.note
        error = f" ± {number(self.error)}" if self.error else ""
        return number(self.value) + error + (f" ({self.note})" if self.note else "")


@dataclass(frozen=True)
class Table:
    """Rows under a head. A bool in a row is a verdict: kept, or missed.

    Numbers in a column are there to be compared: raises DitkitError if two of them are of different protocols.
    """

    head: tuple[str, ...]
    rows: tuple[tuple[str | Value | bool, ...], ...]

    def __post_init__(self) -> None:
        for i, name in enumerate(self.head):
            column = [row[i] for row in self.rows if i < len(row)]
            found = sorted({v.protocol for v in column if isinstance(v, Value) and v.value is not None and v.protocol})
            if len(found) > 1:
                raise DitkitError(
                    f"numbers of different protocols cannot stand in one column ({name}): {found[0]}; and {found[1]}"
                )


@dataclass(frozen=True)
class Picture:
    """A PNG and the name of its file; `alt` says what it shows."""

    name: str
    alt: str
    png: bytes


@dataclass(frozen=True)
class Listing:
    """JSON, shown as it is; `brief` leaves it to the page and report.json."""

    content: Any
    brief: bool = False


@dataclass(frozen=True)
class Section:
    """A title and what is below it; a string is a paragraph."""

    title: str
    parts: tuple[str | Table | Picture | Listing, ...]


@dataclass(frozen=True)
class Report:
    """What a person reads, and `data`, the same for programs."""

    title: str
    sections: tuple[Section, ...]
    data: Mapping[str, Any]


def write(report: Report, folder: Path) -> list[Path]:
    """Write report.html, report.md, report.json and the pictures into a folder; the paths, the page first.

    Raises DitkitError if a file cannot be written, and ValueError for data that holds a NaN.
    """
    files: dict[str, str | bytes] = {
        part.name: part.png for section in report.sections for part in section.parts if isinstance(part, Picture)
    }
    files["report.json"] = json.dumps(report.data, indent=1, allow_nan=False) + "\n"
    files["report.md"] = _markdown(report)
    files["report.html"] = _page(report)
    for name, content in files.items():
        atomic_write(folder / name, content)
    return [folder / name for name in reversed(files)]


def check_folder(folder: Path) -> None:
    """Raises DitkitError if a report cannot be written into a folder: better said before the work than after it."""
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not there.is_dir():
        raise DitkitError(f"the report cannot be written into {folder}: {there} is a file; choose a folder with --out")
    if not os.access(there, os.W_OK):
        raise DitkitError(f"the report cannot be written into {folder}: {there} may not be written; use --out FOLDER")


def _markdown(report: Report) -> str:
    def cell(value: str | Value | bool) -> str:
        if isinstance(value, bool):
            return "kept" if value else "**missed**"
        return str(value).replace("|", "\\|")

    blocks = [f"# {report.title}"]
    for section in report.sections:
        shown = [part for part in section.parts if not (isinstance(part, Listing) and part.brief)]
        blocks += [f"## {section.title}"] if shown else []
        for part in shown:
            if isinstance(part, Table):
                rows = [part.head, ["---"] * len(part.head), *part.rows]
                blocks.append("\n".join("| " + " | ".join(map(cell, row)) + " |" for row in rows))
            elif isinstance(part, Picture):
                blocks.append(f"![{part.alt}]({part.name})")
            elif isinstance(part, Listing):
                blocks.append(f"```json\n{json.dumps(part.content, indent=1)}\n```")
            else:
                blocks.append(part)
    return "\n\n".join(blocks) + "\n"


def _page(report: Report) -> str:
    escape = html.escape

    def cell(value: str | Value | bool) -> str:
        if isinstance(value, bool):
            return f"<td class={'ok' if value else 'missed'}>{'kept' if value else 'missed'}</td>"
        return f"<td{' class=n' if isinstance(value, Value) else ''}>{escape(str(value))}</td>"

    title = escape(report.title)
    blocks = [
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{title}</title><style>{_STYLE}</style>",
        f"<h1>{title}</h1>",
    ]
    for section in report.sections:
        blocks.append(f"<h2>{escape(section.title)}</h2>")
        for part in section.parts:
            if isinstance(part, Table):
                head = "".join(f"<th>{escape(name)}" for name in part.head)
                rows = "".join(f"<tr>{''.join(map(cell, row))}</tr>" for row in part.rows)
                blocks.append(f"<table><tr>{head}{rows}</table>")
            elif isinstance(part, Picture):
                data = base64.b64encode(part.png).decode()
                blocks.append(f'<p><img alt="{escape(part.alt)}" src="data:image/png;base64,{data}"></p>')
            elif isinstance(part, Listing):
                blocks.append(f"<pre>{escape(json.dumps(part.content, indent=1))}</pre>")
            else:
                blocks.append(f"<p>{escape(part)}</p>")
    return "\n".join([*blocks, "</html>"])


def figure(width: float = 8, height: float = 4) -> Figure:
    """An empty figure, in inches. Raises DitkitError without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise DitkitError("the plots of a report need matplotlib: pip install 'ditkit[metrics]'") from None
    return Figure(figsize=(width, height), layout="constrained")


def drawn(picture: Figure) -> bytes:
    """The figure as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    buffer = io.BytesIO()
    FigureCanvasAgg(picture).print_png(buffer)
    return buffer.getvalue()


@dataclass(frozen=True)
class Line:
    """One curve of a plot; `error` draws standard errors, `strong=False` a thin pale line."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    error: Sequence[float] | None = None
    strong: bool = True


def lines(curves: Sequence[Line], x: str, y: str, *, log_x: bool = False, log_y: bool = False) -> bytes:
    """Curves over a common axis as a PNG. Raises DitkitError without matplotlib."""
    picture = figure()
    axes = picture.add_subplot()
    strong = 0
    for curve in curves:
        if not curve.strong:
            axes.plot(curve.x, curve.y, color="#b8c4d6", linewidth=1, label=curve.label)
            continue
        colour, marker = COLOURS[strong % len(COLOURS)], "o" if len(curve.x) <= 20 else None
        style = "-" if strong < len(COLOURS) else "--"
        strong += 1
        axes.plot(curve.x, curve.y, style, color=colour, linewidth=2, marker=marker, markersize=4, label=curve.label)
        if curve.error is not None:
            axes.errorbar(curve.x, curve.y, curve.error, color=colour, linestyle="none", capsize=3)
    axes.set(xlabel=x, ylabel=y, xscale="log" if log_x else "linear", yscale="log" if log_y else "linear")
    axes.grid(alpha=0.3, which="both")
    axes.legend(frameon=False, ncols=1 if strong <= len(COLOURS) else 2)
    return drawn(picture)


def panels(
    rows: Sequence[str],
    columns: Sequence[str],
    draw: Callable[[Axes, int, int], None],
    *,
    side: float = 2.2,
) -> bytes:
    """A grid of small pictures with a name for each row and column; `draw(axes, row, column)` fills one."""
    picture = figure(side * len(columns) + 0.4, side * len(rows) + 0.4)
    for i, row in enumerate(rows):
        for j, column in enumerate(columns):
            axes = picture.add_subplot(len(rows), len(columns), i * len(columns) + j + 1)
            axes.set(xticks=[], yticks=[])
            if i == 0:
                axes.set_title(column, fontsize=11)
            if j == 0:
                axes.set_ylabel(row, fontsize=11)
            draw(axes, i, j)
    return drawn(picture)


def provenance() -> dict[str, Any]:
    """The part of a protocol that is the same for all numbers of a process: versions, commit, machine."""
    return {
        "versions": {"torch": torch.__version__, "python": platform.python_version(), "commit": _commit()},
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
    }


def _commit() -> str | None:
    """The commit of the source that is running, with "+" if it was changed; None outside a checkout."""
    here = Path(__file__).parent
    tracked = ["ls-files", "--error-unmatch", Path(__file__).name]  # or it is somebody else's repository
    try:
        commit, status, _ = (
            subprocess.run(["git", "-C", here, *words], capture_output=True, text=True, check=True, timeout=10).stdout
            for words in (["rev-parse", "--short=12", "HEAD"], ["status", "--porcelain", "--", here], tracked)
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return commit.strip() + ("+" if status.strip() else "")
