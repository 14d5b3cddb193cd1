"""Every command and code block of the README and of docs/ runs; the ones marked `slow` train for minutes."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ditkit.recipe import Recipe
from ditkit.training import train

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```(\w+)([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page: Path, slow: bool) -> list[tuple[str, str]]:
    """Language and content of the blocks that run: bash and python, marked `slow` or not."""
    found = FENCE.findall(page.read_text())
    return [(lang, text) for lang, mark, text in found if lang in ("bash", "python") and ("slow" in mark) == slow]


def run_blocks(page: Path, slow: bool, folder: Path) -> None:
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    for language, text in blocks(page, slow):
        command = ["bash", "-euo", "pipefail", "-c", text] if language == "bash" else [sys.executable, "-c", text]
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=3000)
        assert done.returncode == 0, f"{page.name}:\n{text}\n{done.stdout[-1000:]}\n{done.stderr[-2000:]}"


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, slow=False)], ids=lambda p: p.stem)
def test_the_blocks_of_a_page_run(page: Path, tiny: Recipe, pictures: Path, tmp_path: Path) -> None:
    """In a folder that has a run at runs/demo and pictures in pets/."""
    train(tiny, tmp_path / "runs" / "demo", quiet=True)
    shutil.copytree(pictures, tmp_path / "pets")
    run_blocks(page, False, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, slow=True)], ids=lambda p: p.stem)
def test_the_slow_blocks_of_a_page_run(page: Path, pictures: Path, tmp_path: Path) -> None:
    """In a fresh clone that has pictures in pets/."""
    clone = tmp_path / "ditkit"
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
    shutil.copytree(pictures, clone / "pets")
    run_blocks(page, True, clone)


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CONTRIBUTING.md"], ids=lambda p: p.stem)
def test_links_and_pictures_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), f"{page.name} leads to {target}"


def test_the_map_names_files_that_exist_and_every_page() -> None:
    text = (ROOT / "docs" / "map.md").read_text()
    named = set(re.findall(r"`((?:src/ditkit|diffusion|models|layers|data|training|evaluation|cli)[\w/.]*)`", text))
    for name in named:
        assert (ROOT / "src" / "ditkit" / name.removeprefix("src/ditkit/")).exists(), name
    for page in (ROOT / "docs").glob("*.md"):
        assert page.name == "map.md" or page.name in text, f"docs/map.md does not mention {page.name}"
