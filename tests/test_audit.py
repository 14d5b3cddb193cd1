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
from ditkit.evaluation import audit, write_audit
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
    assert copies.nearest.training.max() < 100
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


def test_few_images_are_enough(tmp_path: Path) -> None:
    """Twenty images do not fill a cell of the copy test: then all is one."""
    data = digits(100)
    fresh = Digits().open().heldout.batch(torch.arange(1, 100, 5)).data
    found = audit(saved(fresh, tmp_path / "x.npz"), data, size=32)
    assert "1 of 1 cells, with 20 of the samples" in found.protocol["c_t"]
    assert found.passed
    assert found.verdict == "Nothing was found."
    train, count = data.train.batch(torch.arange(100)).data.flatten(1).double(), 0
    for image in fresh.flatten(1).double():
        apart = (train - image).square().sum(1)
        others = (train - train[apart.argmin()]).square().sum(1).sort().values
        count += float(apart.min()) > float(others[1])
    assert found.numbers["authentic"] == pytest.approx(count / 20)
    with pytest.raises(DitkitError, match="at least 20 images, not 19"):
        audit(saved(fresh[:19], tmp_path / "x.npz"), data, size=32)


def test_training_images_among_the_held_out_ones_do_not_raise_the_floor(tmp_path: Path) -> None:
    """Else a model that copies as often as these are met would pass."""
    data = digits(100)
    train, heldout = data.train.batch(torch.arange(100)).data, data.heldout.batch(torch.arange(100)).data
    leaking = torch.cat((train[:30], heldout))
    known = replace(data, heldout=InMemory(leaking, None, torch.arange(130)))
    fresh = Digits().open().heldout.batch(torch.arange(1, 500, 5)).data
    found = audit(saved(torch.cat((train[50:70], fresh)), tmp_path / "x.npz"), known, size=32)
    assert (found.numbers["heldout_known"], found.numbers["f_mem_floor"], found.protocol["heldout"]) == (30, 0, 100)
    assert found.numbers["f_mem"] == pytest.approx(1 / 6)
    assert not found.passed
    nothing = replace(known, heldout=InMemory(leaking, None, torch.arange(40)))
    with pytest.raises(DitkitError, match="without 30 that are training images, too, digits has 10 held-out images"):
        audit(tmp_path / "x.npz", nothing, size=32)


def test_copies_too_few_to_fail_are_said(tmp_path: Path) -> None:
    data = digits(100)
    fresh = Digits().open().heldout.batch(torch.arange(1, 500, 5)).data
    some = torch.cat((data.train.batch(torch.tensor([7])).data, fresh))
    found = audit(saved(some, tmp_path / "x.npz"), data, size=32)
    assert found.passed
    assert "and yet 0.99% of the samples are copies by f_mem in pixels" in found.verdict
    assert found.nearest.training[0] == 7
    assert found.nearest.rows()[0] == {"sample": "0", "training": 7, "d1 / d2": 0.0}


def test_mirrored_redrawings_count_where_training_mirrors(tmp_path: Path) -> None:
    """Too far to be copies by f_mem, but nearer than new images, mirrored; and a training image with its mirror image
    beside it is one."""
    data = digits(200)
    images = data.train.batch(torch.arange(200)).data
    both = replace(data, train=InMemory(torch.cat((images, images[:50].flip(-1))), None, torch.arange(250), flip=True))
    fresh = Digits().open().heldout.batch(torch.arange(1, 1000, 10)).data
    mixed = (0.65 * images[:100].flip(-1).float() + 0.35 * fresh.float()).round().to(torch.uint8)
    found = audit(saved(mixed, tmp_path / "x.npz"), both, size=32)
    assert found.numbers["duplicates"] == 50
    assert found.numbers["c_t"] < -3
    exact = audit(saved(images[:50].flip(-1), tmp_path / "y.npz"), both, size=32)
    assert exact.numbers["f_mem"] == exact.numbers["f_mem_features"] == 1


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
    with pytest.raises(DitkitError, match="needs 20 samples and 20 held-out ones, not 10 and 300"):
        copy_test(x[:10], y, z)


def test_the_copy_test_is_the_plain_one() -> None:
    """With all components and one cell it is Mann and Whitney's U of nearest distances; with more, cell by cell."""
    generator = torch.Generator().manual_seed(3)
    x, y, z = (torch.randn(n, 5, generator=generator).double() for n in (80, 60, 90))

    def plain(a: Tensor, b: Tensor, c: Tensor) -> float:
        near = [torch.stack([(c - p).square().sum(1).min().sqrt() for p in some]) for some in (a, b)]
        n, m = len(a), len(b)
        above = float((near[0][:, None] > near[1]).sum())
        return (above - n * m / 2) / (n * m * (n + m + 1) / 12) ** 0.5

    assert copy_test(x, y, z, cells=1).value == pytest.approx(plain(x, y, z), rel=1e-9)
    away = 100 * torch.eye(5, dtype=torch.float64)[0]
    halves = [part[: len(part) // 2].flip(1) for part in (x, y, z)]
    two = [torch.cat((part, half + away)) for part, half in zip((x, y, z), halves, strict=True)]
    found = copy_test(*two, cells=2)
    assert (found.cells, found.samples) == (2, 120)
    assert found.value == pytest.approx((60 * plain(x, y, z) + 30 * plain(*halves)) / 90, rel=1e-9)


def test_authentic() -> None:
    found = authentic(torch.tensor([0.1, 2.0, 1.0]), torch.tensor([0, 1, 2]), torch.tensor([1.0, 1.0, 1.0]))
    assert found.tolist() == [False, True, False]


def test_images_from_files(tmp_path: Path) -> None:
    images = digits().train.batch(torch.arange(30)).data
    assert torch.equal(read_images(saved(images, tmp_path / "a.npz"), (1, 28, 28)).pixels, images)
    np.save(tmp_path / "b.npy", images.numpy())
    assert torch.equal(read_images(tmp_path / "b.npy", (1, 28, 28)).pixels, images)
    with pytest.raises(DitkitError, match=r"are \[1, 28, 28\], and the training images are \[1, 32, 32\]: read"):
        read_images(tmp_path / "a.npz", (1, 32, 32))
    with pytest.raises(DitkitError, match="there is no run and there are no images at"):
        read_images(tmp_path / "c", (1, 28, 28))
    (tmp_path / "d.npz").write_bytes(b"nothing")
    with pytest.raises(DitkitError, match=r"is no \.npz that can be read"):
        read_images(tmp_path / "d.npz", (1, 28, 28))
    folder = tmp_path / "pictures"
    (folder / "deep" / "er").mkdir(parents=True)
    for k, name in enumerate(("a", "deep/b", "deep/er/c")):
        Image.fromarray(images[k, 0].numpy()).save(folder / f"{name}.png")
    (folder / "deep" / "loop").symlink_to(folder)
    read = read_images(folder, (1, 28, 28))
    assert torch.equal(read.pixels, images[:3])
    assert (read.names, read.changed) == (("a.png", "deep/b.png", "deep/er/c.png"), 0)
    read = read_images(folder, (3, 14, 14))
    assert (read.pixels.shape, read.changed) == ((3, 3, 14, 14), 3)
    with pytest.raises(DitkitError, match=r"a.png is \[1, 28, 28\], and the training images are \[1, 14, 36\]"):
        read_images(folder, (1, 14, 36))
    coloured = images[0].expand(3, -1, -1).clone()
    coloured[2, 5, 5] = 255 - coloured[0, 5, 5]
    Image.fromarray(coloured.permute(1, 2, 0).numpy()).save(folder / "red.png")
    with pytest.raises(DitkitError, match=r"red.png is in colour, and the training images are grey"):
        read_images(folder, (1, 28, 28))
    assert read_images(folder, (3, 28, 28)).names[-1] == "red.png"
    (folder / "e.png").write_bytes(b"nothing")
    with pytest.raises(DitkitError, match=r"e.png: not an image of the accepted formats: mend the file, or remove it"):
        read_images(folder, (1, 28, 28))


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
    saved(noisy(digits(300).train.batch(torch.arange(100)).data), tmp_path / "copies.npz")
    done = ditkit("audit", tmp_path / "copies.npz", *data, "--out", tmp_path / "copied")
    assert (done.returncode, "there are signs of copying" in done.stderr) == (3, True)
    bad = ditkit("audit", tmp_path / "new.npz")
    assert (bad.returncode, "say what the images' model was trained on" in bad.stderr) == (1, True)
    bad = ditkit("audit", tmp_path / "nowhere", "--train", "digits")
    assert (bad.returncode, "there is no run and there are no images at" in bad.stderr) == (1, True)
    bad = ditkit("audit", tmp_path / "new.npz", "--train", "digits", "--steps", "5")
    assert (bad.returncode, "leave out --steps" in bad.stderr) == (1, True)
    bad = ditkit("audit", tmp_path / "new.npz", "--train", "digits", "--samples", "5")
    assert (bad.returncode, "leave out --samples" in bad.stderr) == (1, True)
    bad = ditkit("audit", tmp_path / "new.npz", *data, "--out", tmp_path / "new.npz" / "report")
    assert (bad.returncode, "new.npz is a file; choose a folder with --out" in bad.stderr) == (1, True)
    bad = ditkit("audit", tmp_path / "train", *data, "--out", tmp_path / "train" / "report")
    assert (bad.returncode, "would lie among the images" in bad.stderr) == (1, True)


def test_the_command_on_a_run(tiny: Recipe, ditkit: Command, tmp_path: Path) -> None:
    data = Folder(as_pictures(tmp_path / "train"), resolution=28, channels=1, holdout=0.3)
    settings = Train(steps=2, batch=4, sample_every=0, checkpoint_every=2)
    recipe = replace(tiny, data=data, train=settings, evaluate=Evaluate(size=32))
    train(recipe, tmp_path / "run", quiet=True)
    done = ditkit("audit", tmp_path / "run", "--samples", "40", "--steps", "2")
    assert done.returncode in (0, 3), done.stderr  # two steps of training may draw anything but copies
    report = json.loads((tmp_path / "run" / "audit" / "report.json").read_text())
    drawn = report["protocol"]
    assert (report["f_mem"], drawn["samples"], drawn["sampling"]["steps"]) == (0.0, 40, 2)
    assert drawn["sampling"]["solver"]["type"].startswith("solver/")
    assert "step-00000002/ema-" in drawn["checkpoint"]
    assert report["passed"] is (done.returncode == 0)
    assert "none among 40 samples: below 7.50%; held-out 0.00%" in done.stdout
    assert {*report["nearest"][0]} == {"sample", "training", "d1 / d2"}
    for count in ("0", "-5", "19"):
        bad = ditkit("audit", tmp_path / "run", "--samples", count)
        assert (bad.returncode, f"at least 20 images, not {count}" in bad.stderr) == (1, True), bad.stderr
    bad = ditkit("audit", tmp_path / "run", "--train", "digits")
    assert (bad.returncode, "a run knows its training data: leave out --train" in bad.stderr) == (1, True)


class Spectrum(torch.nn.Module):
    """In the place of SSCD: what of a spectrum a shift leaves as it is."""

    def forward(self, x: Tensor) -> Tensor:
        small = torch.nn.functional.adaptive_avg_pool2d(x.mean(1), 16)
        size = torch.fft.rfft2(small - small.mean((1, 2), keepdim=True)).abs().flatten(1)
        return 3 * (size - size.mean(1, keepdim=True))


def test_descriptors_find_copies_that_were_moved(ditkit: Command, tmp_path: Path) -> None:
    noise = torch.randint(0, 256, (120, 1, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    splits = [InMemory(x, None, torch.arange(len(x))) for x in (noise[:60], noise[60:])]
    data = replace(digits(), train=splits[0], heldout=splits[1], shape=(1, 16, 16))
    file = tmp_path / "sscd.torchscript.pt"
    torch.jit.save(torch.jit.script(Spectrum()), str(file))
    moved = saved(noise[:40].roll((2, 3), (2, 3)), tmp_path / "moved.npz")
    assert audit(moved, data, size=32).passed
    found = audit(moved, data, size=32, sscd=str(file))
    assert (found.numbers["f_mem"], found.numbers["sscd_copies"]) == (0, 1)
    assert found.numbers["sscd_copies_floor"] < 0.2
    assert found.numbers["sscd_95"] > 0.9 > 0.6 > found.numbers["sscd_95_heldout"]
    assert [fine for _, _, fine in found.verdicts] == [True, True, False, True]
    assert found.similar is not None
    assert sorted(found.similar.training.tolist())[-1] < 40
    assert found.similar.scores[0] >= found.similar.scores[-1] > 0.5
    assert found.protocol["sscd"]["status"].startswith("unproven")
    pages = write_audit(found, tmp_path / "report")
    assert {"nearest.png", "similar.png"} <= {page.name for page in pages}
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    assert all(int(row["sample"]) == row["training"] and row["cosine"] > 0.5 for row in report["similar"])

    torch.jit.save(torch.jit.script(torch.nn.Identity()), str(tmp_path / "other.pt"))
    for name, says in (
        ("nowhere.pt", "there is no file"),
        ("moved.npz", "is no TorchScript that can be loaded"),
        ("other.pt", "does not answer with one descriptor an image"),
    ):
        with pytest.raises(DitkitError, match=says):
            audit(moved, data, size=32, sscd=str(tmp_path / name))
    bad = ditkit("audit", moved, "--train", "digits", "--data.resolution", "16", "--sscd", "nowhere.pt")
    assert (bad.returncode, "SSCD needs its authors' sscd_disc_mixup" in bad.stderr) == (1, True)
