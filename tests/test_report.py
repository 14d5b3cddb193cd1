"""The one report module: what is in the page, the Markdown, the JSON and the pictures."""

from __future__ import annotations

import base64
import io
import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from ditkit.config import DitkitError
from ditkit.report import (
    Line,
    Listing,
    Picture,
    Report,
    Section,
    Table,
    Value,
    lines,
    number,
    panels,
    provenance,
    write,
)

CURVE = lines(
    [Line("a", [1, 10, 100], [1.0, 0.1, 0.01], [0.1, 0.01, 0.001]), Line("b", [1, 100], [2.0, 1.0], strong=False)],
    "steps",
    "error",
    log_x=True,
    log_y=True,
)
TABLE = Table(("cell", "kid", ""), (("x0|eps", Value(0.12345, 0.01), True), ("b", Value(None), False)))
REPORT = Report(
    "a <study>",
    (
        Section("Question", ("Is 1 < 2 & 3 > 2?", Picture("curve.png", 'an "error" curve', CURVE))),
        Section("Numbers", (TABLE,)),
        Section("Protocol", (Listing({"steps": 3}),)),
        Section("Recipe", (Listing({"secretly": "long"}, brief=True),)),
    ),
    {"kid": 0.12345, "protocol": {"steps": 3}},
)


class Tags(HTMLParser):
    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_is_self_contained_and_says_everything(tmp_path: Path) -> None:
    written = write(REPORT, tmp_path / "deep" / "out")
    assert written[0].name == "report.html"
    assert {path.name for path in written} == {"report.html", "report.md", "report.json", "curve.png"}
    page = Tags(written[0].read_text())
    sources = [a["src"] for _, a in page.found if "src" in a or "href" in a]
    assert len(sources) == 1
    head, data = str(sources[0]).split(",")
    assert head == "data:image/png;base64"
    assert base64.b64decode(data) == CURVE
    for said in ("a <study>", "1 < 2 & 3 > 2", "x0|eps", "0.1235 ± 0.01", "kept", "missed", "secretly", '"steps": 3'):
        assert said in page.text
    assert [a["alt"] for tag, a in page.found if tag == "img"] == ['an "error" curve']


def test_the_markdown_has_the_tables_and_leaves_out_what_is_long(tmp_path: Path) -> None:
    write(REPORT, tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert "| x0\\|eps | 0.1235 ± 0.01 | kept |\n| b | - | **missed** |" in text
    assert '![an "error" curve](curve.png)' in text
    assert "secretly" not in text
    assert "## Recipe" not in text
    assert json.loads((tmp_path / "report.json").read_text()) == REPORT.data
    assert (tmp_path / "curve.png").read_bytes() == CURVE


def test_a_number_that_is_none_never_reaches_a_report(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nan"):
        write(Report("x", (), {"kid": float("nan")}), tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("value", "shown"), [(None, "-"), (0.00012345, "0.0001234"), (12345.6, "12,346"), (-0.5, "-0.5"), (0.0, "0")]
)
def test_numbers_are_shown_with_four_digits(value: float | None, shown: str) -> None:
    assert number(value) == shown


def test_panels_are_drawn_in_rows_and_columns() -> None:
    seen = []
    picture = panels(["a", "b"], ["c", "d", "e"], lambda axes, i, j: seen.append((i, j)))
    assert seen == [(i, j) for i in range(2) for j in range(3)]
    wide, high = Image.open(io.BytesIO(picture)).size
    assert wide > 1.3 * high


def test_without_matplotlib_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(DitkitError, match=r"pip install 'ditkit\[metrics\]'"):
        lines([Line("a", [1], [1])], "x", "y")


def test_the_protocol_names_versions_commit_and_machine() -> None:
    found = provenance()
    assert set(found["versions"]) == {"torch", "python", "commit"}
    commit = found["versions"]["commit"]
    assert commit is None or re.fullmatch(r"[0-9a-f]{12}\+?", commit)
    assert "threads" in found["machine"]
