"""The audit: its tests against other implementations, planted copies, and the command."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import mannwhitneyu
from torch import Tensor

from ditkit.config import DitkitError
from ditkit.data import Dataset, Digits, Folder
from ditkit.data.dataset import InMemory
from ditkit.evaluation import audit
from ditkit.evaluation.copying import authentic, copy_test, mann_whitney
from ditkit.evaluation.images import read_images
from ditkit.recipe import Evaluate, Recipe, Train
from ditkit.training import train

from .conftest import Command


def digits(training: int = 400) -> Dataset:
    """Some digits for training, and some held out."""
    data = Digits().open()
    rows = torch.arange(training) * len(data.train) // training
    splits = (data.train.batch(rows), data.heldout.batch(torch.arange(0, 1000, 5)))
    train, heldout = (InMemory(b.data, b.label, torch.arange(len(b.data))) for b in splits)
    return replace(data, train=train, heldout=heldout)


def saved(images: Tensor, path: Path) -> Path:
    np.savez(path, images.permute(0, 2, 3, 1).numpy())
    return path


def as_pictures(folder: Path) -> str:
    """A folder of 300 digits as files."""
    folder.mkdir()
    for k, image in enumerate(digits(300).train.batch(torch.arange(300)).data):
        Image.fromarray(image[0].numpy()).save(folder / f"{k}.png")
    return str(folder)


def noisy(images: Tensor) -> Tensor:
    noise = 4 * torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    return (images + noise).round().clamp(0, 255).to(torch.uint8)


def test_planted_copies_are_found_and_new_digits_are_none(tmp_path: Path) -> None:
    data = digits()
    copies = audit(saved(noisy(data.train.batch(torch.arange(100)).data), tmp_path / "copies.npz"), data, size=32)
    assert copies.numbers["f_mem"] > 0.95
    assert copies.numbers["c_t"] < -3
    assert copies.numbers["c_t_features"] > -3  # noise is far in features: each space sees what the other does not
    assert copies.numbers["authentic"] < 0.1
    assert not copies.passed
    assert copies.indices.max() < 100
    fresh = Digits().open().heldout.batch(torch.arange(1, 1000, 5)).data  # none of the 200 that are compared with
    new = audit(saved(fresh, tmp_path / "new.npz"), data, size=32)
    assert new.numbers["f_mem"] < 0.01
    assert abs(new.numbers["c_t"]) < 3
    assert abs(new.numbers["c_t_features"]) < 3
    assert abs(new.numbers["authentic"] - new.numbers["authentic_heldout"]) < 0.15
    assert new.passed
    assert new.numbers["kid_heldout"] < copies.numbers["kid_heldout"] + 0.2


def test_every_image_twice_does_not_hide_copies(tmp_path: Path) -> None:
    data = digits(150)
    images = data.train.batch(torch.arange(150)).data
    labels = torch.zeros(300, dtype=torch.long)
    twice = replace(data, train=InMemory(torch.cat((images, images)), labels, torch.arange(300)))
    found = audit(saved(noisy(images), tmp_path / "x.npz"), twice, size=32)
    assert found.numbers["f_mem"] > 0.95
    assert found.numbers["duplicates"] == 150


def test_mann_whitney_is_scipy_s() -> None:
    generator = torch.Generator().manual_seed(0)
    for n, m, ties in ((30, 50, False), (200, 20, True), (25, 25, True)):
        a, b = torch.rand(n, generator=generator), torch.rand(m, generator=generator) + 0.1
        if ties:
            a, b = (a * 5).round(), (b * 5).round()
        theirs = mannwhitneyu(
            a.double().numpy(), b.double().numpy(), use_continuity=False, method="asymptotic", alternative="less"
        )
        ours = torch.tensor(mann_whitney(a, b), dtype=torch.float64)
        p = float(torch.special.ndtr(ours))
        assert p == pytest.approx(float(theirs.pvalue), rel=1e-9)
    assert mann_whitney(torch.ones(5), torch.ones(7)) == 0.0


def test_the_copy_test_is_a_standard_score_where_nothing_is_copied() -> None:
    """Of samples drawn as the held-out ones are, over 200 repetitions; of near copies far below."""
    scores = []
    for seed in range(200):
        x, y, z = torch.randn(3, 300, 4, generator=torch.Generator().manual_seed(seed)).unbind(0)
        scores.append(copy_test(x[:150], y[:150], z, cells=1, seed=seed).value)
    found = torch.tensor(scores)
    assert abs(float(found.mean())) < 0.3
    assert 0.8 < float(found.std()) < 1.2
    x, y, z = torch.randn(3, 300, 4, generator=torch.Generator().manual_seed(0)).unbind(0)
    near = copy_test(z + 0.05 * x, y, z, cells=3)
    assert near.value < -5
    assert near.cells == 3
    with pytest.raises(DitkitError, match="at least one of its cells"):
        copy_test(x[:10], y, z)


def test_authentic() -> None:
    found = authentic(torch.tensor([0.1, 2.0, 1.0]), torch.tensor([0, 1, 2]), torch.tensor([1.0, 1.0, 1.0]))
    assert found.tolist() == [False, True, False]


def test_images_from_files(tmp_path: Path) -> None:
    images = digits().train.batch(torch.arange(30)).data
    assert torch.equal(read_images(saved(images, tmp_path / "a.npz"), (1, 28, 28)), images)
    np.save(tmp_path / "b.npy", images.numpy())
    assert torch.equal(read_images(tmp_path / "b.npy", (1, 28, 28)), images)
    with pytest.raises(DitkitError, match=r"are \[1, 28, 28\], and the training images are \[1, 32, 32\]: read"):
        read_images(tmp_path / "a.npz", (1, 32, 32))
    with pytest.raises(DitkitError, match="is neither a folder of images"):
        read_images(tmp_path / "c", (1, 28, 28))
    (tmp_path / "d.npz").write_bytes(b"nothing")
    with pytest.raises(DitkitError, match=r"is no \.npz that can be read"):
        read_images(tmp_path / "d.npz", (1, 28, 28))


def test_the_command_on_images(ditkit: Command, tmp_path: Path) -> None:
    images = Digits().open().heldout.batch(torch.arange(0, 1000, 10)).data
    saved(images, tmp_path / "new.npz")
    as_pictures(tmp_path / "train")
    read = ["--data.resolution", "28", "--data.channels", "1", "--data.holdout", "0.3"]
    data = ["--train", f"folder:{tmp_path / 'train'}", *read]
    done = ditkit("audit", tmp_path / "new.npz", *data, "--out", tmp_path / "report")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("kept    ") == 3
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    assert report["passed"] is True
    assert (tmp_path / "report" / "nearest.png").exists()
    assert "or their mirror images" in report["protocol"]["copies"]
    bad = ditkit("audit", tmp_path / "new.npz")
    assert (bad.returncode, "say what the images' model was trained on" in bad.stderr) == (1, True)
    bad = ditkit("audit", tmp_path / "new.npz", "--train", "digits", "--steps", "5")
    assert (bad.returncode, "leave out --steps" in bad.stderr) == (1, True)


def test_the_command_on_a_run(tiny: Recipe, ditkit: Command, tmp_path: Path) -> None:
    data = Folder(as_pictures(tmp_path / "train"), resolution=28, channels=1, holdout=0.3)
    settings = Train(steps=2, batch=4, sample_every=0, checkpoint_every=2)
    recipe = replace(tiny, data=data, train=settings, evaluate=Evaluate(size=32))
    train(recipe, tmp_path / "run", quiet=True)
    done = ditkit("audit", tmp_path / "run", "--samples", "40", "--steps", "2")
    assert done.returncode in (0, 1), done.stderr  # two steps of training may draw anything but copies
    report = json.loads((tmp_path / "run" / "audit" / "report.json").read_text())
    drawn = report["protocol"]
    assert (report["f_mem"], drawn["samples"], drawn["sampling"]["steps"]) == (0.0, 40, 2)
    assert drawn["sampling"]["solver"]["type"].startswith("solver/")
    assert "step-00000002/ema-" in drawn["checkpoint"]
    assert report["passed"] is (done.returncode == 0)
    bad = ditkit("audit", tmp_path / "run", "--train", "digits")
    assert (bad.returncode, "a run knows its training data: leave out --train" in bad.stderr) == (1, True)
