"""Texts and vectors as data: captions, characters, how samples are shown, and training on them."""

from __future__ import annotations

import importlib.util
import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import ditkit.data.captions as module
from ditkit.codecs import Characters, Codec, Pixels, Vectors
from ditkit.config import DitkitError, from_json, to_json
from ditkit.data import Captions, Dataset, InMemory, points, strings
from ditkit.diffusion import Euler, Jumps
from ditkit.models import DDiTConfig
from ditkit.pipeline import load
from ditkit.recipe import Recipe, Sample, Train
from ditkit.recipes import captions, captions_uniform, digits
from ditkit.runs import Run
from ditkit.sheet import rendered, suffix
from ditkit.training import train

from .conftest import Command
from .test_training import assert_same


def tiny(recipe: Recipe, steps: int = 6) -> Recipe:
    return replace(
        recipe,
        model=DDiTConfig(hidden_size=16, depth=1, num_heads=2, cond_dim=8, drop=0.2),
        train=Train(steps=steps, batch=8, lr=3e-3, emas=(0.9,), log_every=2, sample_every=0, checkpoint_every=100),
        sample=Sample(steps=4, solver=Jumps(), batch=8),
    )


def test_texts_and_their_points() -> None:
    table = points(["cat", "a ’ü", ""], 5)
    assert table.tolist() == [[99, 97, 116, 0, 0], [97, 32, 8217, 252, 0], [0] * 5]
    assert strings(table) == ["cat", "a ’ü", ""]
    assert strings(torch.tensor([[99, 0, 97, 0]])) == ["c\u2400a"]
    for wrong in ("cattle", "a\0b"):
        with pytest.raises(ValueError, match="at most 5 characters and no 0"):
            points([wrong], 5)


def test_captions_are_those_of_the_package_and_no_text_is_in_both_parts() -> None:
    data = Captions().open()
    parts = [strings(split.batch(torch.arange(len(split))).data) for split in (data.train, data.heldout)]
    assert [len(part) for part in parts] == [1704, 208]
    assert len({*parts[0], *parts[1]}) == 1912
    assert {"cat face", "red heart", "smiling cat with heart-eyes"} <= {*parts[0], *parts[1]}
    assert not any("skin tone" in text for part in parts for text in part)
    assert data.symbols == "".join(sorted({c for part in parts for text in part for c in text}))
    short = Captions(length=12).open()
    inside = set(strings(short.heldout.batch(torch.arange(len(short.heldout))).data))
    assert inside == {text for text in parts[1] if len(text) <= 12}  # the length moves no text to the other part
    assert json.loads(json.dumps(to_json(Captions(12))))["type"] == "data/captions"
    with pytest.raises(DitkitError, match="at least 4"):
        Captions(3)


def test_another_file_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SHA256", "0" * 64)
    with pytest.raises(DitkitError, match=r"not the file of emoji 2\.16\.0"):
        Captions().open()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DitkitError, match=r"pip install 'ditkit\[data\]'"):
        Captions().open()


def text_data(symbols: str) -> Dataset:
    nothing = InMemory(torch.empty(0, 4, dtype=torch.int64), None, torch.arange(0))
    return Dataset("texts", (), (4,), nothing, nothing, "made up", symbols)


def test_characters_to_tokens_and_back() -> None:
    codec = Characters().fitted(text_data("ca’b"))
    assert isinstance(codec, Codec)
    assert codec.vocab == 5
    data = points(["cab", "’"], 4)
    assert codec.encode(data).tolist() == [[1, 2, 4, 0], [3, 0, 0, 0]]
    assert torch.equal(codec.decode(codec.encode(data)), data)
    assert codec.shape((4,)) == (4,)
    assert from_json(to_json(codec)) == codec
    with pytest.raises(DitkitError, match="'x' is none of those"):
        codec.encode(points(["ax"], 3))
    with pytest.raises(DitkitError, match="the data holds none"):
        Characters().fitted(text_data(""))
    with pytest.raises(DitkitError, match="different characters"):
        Characters("aa")


def test_a_codec_refuses_data_of_another_kind() -> None:
    with pytest.raises(DitkitError, match="for images"):
        Pixels().shape((32,))
    for codec in (Vectors(), Characters("ab")):
        with pytest.raises(DitkitError, match="choose another"):
            codec.shape((3, 8, 8))


def test_samples_are_shown_as_what_they_are() -> None:
    images = torch.zeros(3, 1, 8, 8, dtype=torch.uint8)
    vectors, texts = torch.tensor([[0.0, 0.0, 9.0], [1.0, 1.0, 9.0]]), points(["cat", "hat"], 5)
    assert [suffix(x) for x in (images, vectors, texts)] == [".png", ".png", ".txt"]
    assert rendered(texts, ".txt") == b"cat\nhat\n"
    for x in (images, vectors, texts):
        assert np.array_equal(np.load(io.BytesIO(rendered(x, ".npy"))), x.numpy())
    picture = np.asarray(Image.open(io.BytesIO(rendered(vectors, ".png"))).convert("L")) < 200
    rows, columns = np.nonzero(picture)
    assert picture.shape == (512, 512)
    assert picture[485:488, 24:27].all()  # (0, 0) is below on the left ...
    assert picture[24:27, 485:488].all()  # ... and (1, 1) above on the right
    assert len(rows) < 80
    assert len(columns) < 80
    for x, kind in ((images, ".txt"), (texts, ".png"), (vectors, ".txt")):
        with pytest.raises(DitkitError, match="cannot be shown"):
            rendered(x, kind)


@pytest.mark.parametrize("recipe", [captions, captions_uniform])
def test_a_short_training_lowers_the_loss(recipe: object, tmp_path: Path) -> None:
    chosen = tiny(recipe(), 60)  # type: ignore[operator]
    chosen = replace(chosen, train=replace(chosen.train, batch=32, log_every=10))
    assert train(chosen, tmp_path / "run", quiet=True)
    losses = [row["loss"] for row in Run(tmp_path / "run").rows()]
    assert losses[-1] < 0.75 * losses[0]
    saved = Run(tmp_path / "run").recipe()
    masked = saved.denoiser.path.source == "mask"
    assert saved.denoiser.path.vocab == saved.model.vocab == saved.codec.vocab + masked == 80 + masked
    assert saved.model.length == 32


def test_resume_of_tokens_is_bit_exact(tmp_path: Path) -> None:
    recipe = tiny(captions())
    train(recipe, tmp_path / "whole", quiet=True)
    train(replace(recipe, train=replace(recipe.train, steps=3)), tmp_path / "parts", quiet=True)
    torch.rand(17)
    train(recipe, tmp_path / "parts", quiet=True)
    assert_same(Run(tmp_path / "whole"), Run(tmp_path / "parts"))


def test_a_text_run_on_the_command_line(ditkit: Command, tmp_path: Path) -> None:
    train(
        replace(tiny(captions()), train=replace(tiny(captions()).train, sample_every=6)), tmp_path / "run", quiet=True
    )
    sheet = (tmp_path / "run" / "samples" / "step-00000006.txt").read_text()
    assert len(sheet.splitlines()) == 64
    printed = ditkit("sample", tmp_path / "run", "--count", "5")
    assert printed.returncode == 0
    assert len(printed.stdout.splitlines()) == 5
    assert ditkit("sample", tmp_path / "run", "--count", "5", "--out", "texts.txt").returncode == 0
    assert (tmp_path / "texts.txt").read_text() == printed.stdout
    assert ditkit("sample", tmp_path / "run", "--count", "2", "--out", "single").returncode == 0
    assert (tmp_path / "single" / "000001.txt").read_text() == printed.stdout.splitlines(keepends=True)[1]
    refused = ditkit("sample", tmp_path / "run", "--count", "2", "--out", "texts.png")
    assert refused.returncode == 1
    assert "cannot be shown as .png: use .txt" in refused.stderr
    pipeline = load(tmp_path / "run")
    whole = pipeline.sample(count=4, seed=2)
    assert torch.equal(pipeline.sample(count=3, seed=2, batch=2), whole[:3])


def test_recipes_that_mix_kinds_are_refused(tmp_path: Path) -> None:
    text, image = tiny(captions()), digits()
    for wrong, says in (
        (replace(text, model=image.model), "the model is for images"),
        (replace(text, denoiser=image.denoiser), "use --denoiser tokens"),
        (replace(text, codec=Pixels()), "for images"),
        (replace(text, objective=image.objective), "tokens have no velocity"),
        (replace(text, sample=replace(text.sample, solver=Euler())), "tokens have no velocity"),
        (replace(image, denoiser=text.denoiser), "this denoiser is for tokens"),
        (replace(image, model=text.model), "the model ddit is for tokens"),
        (replace(image, codec=Characters()), "the data holds none"),
        (replace(image, objective=text.objective), "use objective regression"),
        (replace(image, sample=replace(image.sample, solver=Jumps())), "jumps"),
    ):
        with pytest.raises(DitkitError, match=says):
            train(wrong, tmp_path / "run", quiet=True)
        assert not (tmp_path / "run").exists()
