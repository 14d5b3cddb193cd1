"""Codecs that learn: their state in checkpoints, resume, their words; the principal components of patches."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from ditkit.cli.configs import named
from ditkit.cli.train import override
from ditkit.codecs import Autoencoder, Characters, Codec, Latents, Pca, Pixels, TokenIds, Vectors
from ditkit.config import DitkitError, from_json, to_json
from ditkit.data import Dataset, Digits, InMemory
from ditkit.models import JiTConfig
from ditkit.pipeline import load
from ditkit.recipe import Recipe
from ditkit.recipes import find_recipe
from ditkit.runs import Run, find_checkpoint
from ditkit.training import train

from .conftest import TINY_FLAGS, Command
from .test_training import assert_same, with_train


def dataset(images: Tensor, name: str = "made up") -> Dataset:
    split = InMemory(images, None, torch.arange(len(images)))
    return Dataset(name, (), tuple(images.shape[1:]), split, split, f"{name}, {len(images)} images")


def smooth(count: int, channels: int, side: int, seed: int = 0) -> Tensor:
    """Images whose pixels depend on their neighbours and channels on each other."""
    draws = torch.randn(count, channels + 1, side, side, generator=torch.Generator().manual_seed(seed))
    draws = draws[:, :channels] + 0.5 * draws[:, channels:]
    blurred = torch.nn.functional.avg_pool2d(draws, 5, 1, 2, count_include_pad=False)
    return (blurred * 150 + 110).clamp(0, 255).round().to(torch.uint8)


@pytest.fixture
def latent(tiny: Recipe) -> Recipe:
    """The digits in 49 latents of 12 of the 16 components of their patches."""
    return replace(tiny, codec=Pca(factor=4, channels=12), model=replace(tiny.model, patch_size=1))


# ------------------------------------------------------------------------------------------------------ the components


@pytest.mark.parametrize("channels", [1, 3])
def test_with_all_components_every_byte_comes_back(channels: int) -> None:
    images = smooth(20, channels, 16)
    codec = Pca(factor=4, channels=16 * channels).fitted(dataset(images))
    assert isinstance(codec, Codec)
    noise = torch.randint(0, 256, (8, channels, 8, 24), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))
    for data in (images, noise):  # also of images that it has never seen
        latents = codec.encode(data)
        assert tuple(latents.shape[1:]) == codec.shape(tuple(data.shape[1:]))
        assert torch.equal(codec.decode(latents), data)


def test_latents_are_normal_uncorrelated_and_sorted_by_what_they_explain() -> None:
    images = smooth(60, 3, 16)
    codec = Pca(factor=4, channels=48).fitted(dataset(images))
    rows = codec.encode(images).double().movedim(1, 3).flatten(0, 2)
    assert_close(rows.mean(0), torch.zeros(48, dtype=torch.float64), rtol=0, atol=1e-4)
    assert_close(rows.T @ rows / len(rows), torch.eye(48, dtype=torch.float64), rtol=0, atol=1e-3)
    std = codec.state()["std"]
    assert bool((std[1:] <= std[:-1]).all())
    basis = codec.state()["components"].flatten(1)
    assert_close(basis @ basis.T, torch.eye(48), rtol=0, atol=1e-6)


def test_no_other_projection_of_as_many_numbers_is_nearer() -> None:
    """Eckart and Young: the error of the mean squares is the variance of the components that were left out."""
    images = smooth(60, 1, 16)
    whole = Pca(factor=4, channels=16).fitted(dataset(images))
    codec = Pca(factor=4, channels=5).fitted(dataset(images))
    assert torch.equal(codec.state()["components"], whole.state()["components"][:5])
    latents = codec.encode(images)
    mean, components, std = (codec.state()[name] for name in ("mean", "components", "std"))
    patches = torch.einsum("bkhw,k,kcij->bchwij", latents, std, components) + mean[:, None, None]
    theirs = (images / 127.5 - 1).unfold(2, 4, 4).unfold(3, 4, 4)
    assert_close((patches - theirs).square().mean() * 16, whole.state()["std"][5:].square().sum(), rtol=1e-4, atol=0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        other = torch.linalg.qr(torch.randn(16, 5)).Q
    off = (theirs - mean[:, None, None]).flatten(4).movedim(1, 3).flatten(3)
    assert (off - off @ other @ other.T).square().mean() > (patches - theirs).square().mean()


def test_the_signs_do_not_depend_on_how_the_images_lie() -> None:
    """Mirrored data has mirrored components; the sums are the same up to rounding, and so is the sign."""
    images = smooth(60, 3, 16)
    first = Pca(factor=4, channels=20).fitted(dataset(images)).state()
    turned = Pca(factor=4, channels=20).fitted(dataset(images.flip(0).roll(8, 2))).state()
    for name in first:
        assert_close(first[name], turned[name], rtol=1e-4, atol=1e-5)
    for component in first["components"].flatten(1):
        large = component[component.abs() >= 0.5 * component.abs().max()]
        assert large[0] > 0


def test_a_part_of_the_images_is_drawn_from_all_of_them_and_always_the_same() -> None:
    images = torch.cat((smooth(64, 1, 8), smooth(64, 1, 8, seed=1) // 2))
    few = Pca(factor=4, channels=4, samples=32)
    assert torch.equal(*(few.fitted(dataset(images)).state()["mean"] for _ in range(2)))
    halves = [
        Pca(factor=4, channels=4, samples=32).fitted(dataset(images[half])) for half in (slice(64), slice(64, 128))
    ]
    low, high = sorted(float(codec.state()["mean"].mean()) for codec in halves)
    mean = float(few.fitted(dataset(images)).state()["mean"].mean())
    assert low + 0.2 * (high - low) < mean < high - 0.2 * (high - low)
    everything = Pca(factor=4, channels=4, samples=128).fitted(dataset(images))
    assert_close(everything.state()["mean"].mean(), images.float().mean() / 127.5 - 1, rtol=1e-5, atol=1e-6)


def test_reading_in_parts_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    images = smooth(50, 3, 16)
    whole = Pca(factor=8, channels=9).fitted(dataset(images)).state()
    monkeypatch.setattr("ditkit.codecs.pca._AT_ONCE", 7 * 3 * 16 * 16 + 5)
    for name, value in Pca(factor=8, channels=9).fitted(dataset(images)).state().items():
        assert_close(value, whole[name], rtol=1e-5, atol=1e-6)


def test_grey_images_in_colour_keep_their_dead_components_small() -> None:
    images = smooth(40, 1, 16).expand(-1, 3, -1, -1).contiguous()
    codec = Pca(factor=4, channels=48).fitted(dataset(images))
    latents = codec.encode(images)
    assert torch.equal(codec.decode(latents), images)
    assert latents[:, 16:].abs().max() < 1e-3
    assert bool((codec.state()["std"][16:] == 1).all())
    flat = torch.full((4, 1, 8, 8), 7, dtype=torch.uint8)
    codec = Pca(factor=4, channels=3).fitted(dataset(flat))
    assert torch.equal(codec.decode(codec.encode(flat)), flat)


def test_what_was_learned_is_its_state_and_is_not_learned_anew() -> None:
    images, others = smooth(30, 1, 8), smooth(30, 1, 8, seed=5) // 3
    codec = Pca(factor=2, channels=3).fitted(dataset(images))
    back = Pca(factor=2, channels=3).loaded(codec.state())
    assert torch.equal(back.encode(others), codec.encode(others))
    again = back.fitted(dataset(others))
    assert torch.equal(again.state()["mean"], codec.state()["mean"])
    assert not torch.equal(Pca(factor=2, channels=3).fitted(dataset(others)).state()["mean"], codec.state()["mean"])
    assert from_json(json.loads(json.dumps(to_json(codec)))).state() == {}
    for codec in (Pixels(), Vectors(), Characters("ab"), TokenIds(3), Autoencoder()):
        assert codec.state() == {}
        assert codec.loaded({}) == codec


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Pca(factor=0), "must be at least 1, not 0, 16 and 4096"),
        (lambda: Pca().shape((3, 16, 4, 4)), r"for images \[c h w\]"),
        (lambda: Pca(factor=8).shape((1, 28, 28)), r"sides divisible by 8.*change --codec.factor"),
        (lambda: Pca(factor=2).shape((3, 8, 8)), "have 12 components, and codec.channels is 16"),
        (lambda: Pca().encode(torch.zeros(1, 1, 8, 8, dtype=torch.uint8)), "has not been fitted"),
        (lambda: Pca().decode(torch.zeros(1, 16, 2, 2)), "has not been fitted"),
        (lambda: Pca().fitted(dataset(smooth(1, 1, 8)[:0])), "there are none"),
        (lambda: Pca().loaded({}), "not for codec.factor 4 and codec.channels 16"),
        (lambda: Pca().loaded(taught(channels=15).state()), "not for codec.factor 4 and codec.channels 16"),
        (lambda: Pca().loaded(taught(factor=8).state()), "not for codec.factor 4 and codec.channels 16"),
        (lambda: taught().shape((3, 8, 8)), r"fitted to images of 1 channels, and a sample is \[3, 8, 8\]"),
    ],
)
def test_what_cannot_be_gets_one_line(make: Any, says: str) -> None:
    with pytest.raises(DitkitError, match=says) as caught:
        make()
    assert "\n" not in str(caught.value)


def taught(factor: int = 4, channels: int = 16) -> Pca:
    return Pca(factor, channels).fitted(dataset(smooth(5, 1, 16)))


# ------------------------------------------------------------------------------------------------------------- in runs


def test_every_checkpoint_holds_what_the_codec_learned(latent: Recipe, tmp_path: Path) -> None:
    recipe = replace(latent, train=replace(latent.train, ema_stds=(0.1,), snapshot_every=3))
    assert train(recipe, tmp_path / "run", quiet=True)
    wanted = recipe.codec.fitted(Digits().open()).state()
    run = Run(tmp_path / "run")
    folders = [*run.checkpoints(), *run.snapshots()]
    assert len(folders) == 4
    for folder in folders:
        found = find_checkpoint(folder).recipe.codec.state()
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert "basis" not in (tmp_path / "run" / "recipe.json").read_text()


def test_a_run_samples_without_its_data(latent: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train(latent, tmp_path / "run", quiet=True)
    monkeypatch.setattr(Digits, "open", lambda self: pytest.fail("the data was opened"))
    monkeypatch.setattr(Pca, "fitted", lambda self, data: pytest.fail("the codec was fitted"))
    pipeline = load(tmp_path / "run", device="cpu")
    assert pipeline.sample(count=3, steps=2).shape == (3, 1, 28, 28)
    learned = find_checkpoint(tmp_path / "run").tensors("codec")
    latents = torch.randn(2, 12, 7, 7, generator=torch.Generator().manual_seed(0))
    assert torch.equal(pipeline.recipe.codec.decode(latents), latent.codec.loaded(learned).decode(latents))


def test_resume_has_the_codec_of_the_checkpoint_and_is_bit_exact(
    latent: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(latent, tmp_path / "whole", quiet=True)
    train(with_train(latent, steps=3), tmp_path / "parts", quiet=True)
    monkeypatch.setattr(torch.linalg, "eigh", lambda *_: pytest.fail("the codec was fitted anew"))
    train(latent, tmp_path / "parts", quiet=True)
    assert_same(Run(tmp_path / "whole"), Run(tmp_path / "parts"))


def test_a_run_is_not_gone_on_with_by_another_codec(latent: Recipe, tmp_path: Path) -> None:
    train(with_train(latent, steps=3), tmp_path / "run", quiet=True)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    pixels = replace(latent, codec=Pixels(), model=replace(latent.model, patch_size=4))
    for wrong, says in (
        (replace(latent, codec=Pca(channels=16)), "is of another codec.*choose another --out"),
        (pixels, "codec is codec/pca, not codec/pixels"),
        (replace(latent, codec=Pca(channels=12, samples=50)), "codec.samples is 4096, not 50"),
        (replace(latent, data=Digits(flip=True)), "data.flip is False, not True"),
    ):
        with pytest.raises(DitkitError, match=says):
            train(wrong, tmp_path / "run", quiet=True)
    train(with_train(pixels, steps=3), tmp_path / "pixels", quiet=True)
    with pytest.raises(DitkitError, match="codec is codec/pixels, not codec/pca"):
        train(latent, tmp_path / "pixels", quiet=True)
    assert {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()} == before


def test_data_that_changed_is_refused_as_before(
    latent: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(with_train(latent, steps=3), tmp_path / "run", quiet=True)
    other = replace(Digits().open(), source="other digits")
    monkeypatch.setattr(Digits, "open", lambda self: other)
    with pytest.raises(DitkitError, match="the data has changed"):
        train(latent, tmp_path / "run", quiet=True)


def test_a_run_that_begins_with_a_run_of_this_codec_has_its_latents(
    latent: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(with_train(latent, steps=3), tmp_path / "first", quiet=True)
    first = find_checkpoint(tmp_path / "first").tensors("codec")
    opened = Digits().open()
    assert isinstance(opened.train, InMemory)
    darker = replace(opened, train=replace(opened.train, data=opened.train.data // 2), source="darker digits")
    monkeypatch.setattr(Digits, "open", lambda self: darker)
    for codec, same in ((latent.codec, True), (replace(latent.codec, samples=4000), False)):
        recipe = replace(latent, codec=codec)
        train(with_train(recipe, steps=3), tmp_path / f"second {same}", init=tmp_path / "first", quiet=True)
        second = find_checkpoint(tmp_path / f"second {same}").tensors("codec")
        assert torch.equal(first["mean"], second["mean"]) == same


def test_a_damaged_codec_is_said(latent: Recipe, tmp_path: Path) -> None:
    train(with_train(latent, steps=3), tmp_path / "run", quiet=True)
    path = next((tmp_path / "run").rglob("codec.safetensors"))
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    for use in (lambda: load(tmp_path / "run"), lambda: train(latent, tmp_path / "run", quiet=True)):
        with pytest.raises(DitkitError, match=r"damaged: codec\.safetensors"):
            use()


# ------------------------------------------------------------------------------------------------- on the command line


def test_the_digits_in_their_components_on_the_command_line(ditkit: Command, tmp_path: Path) -> None:
    words = ("--train.steps", "4", "--train.batch", "8", "--sample.steps", "2", "--train.sample-every", "0")
    done = ditkit("train", "digits", "--codec", "pca", *words, "--out", "run", "--quiet")
    assert done.returncode == 0, done.stderr
    assert "a patch covers 4 x 4 pixels as before" in done.stderr
    recipe = Run(tmp_path / "run").recipe()
    assert (recipe.codec, recipe.model.patch_size, recipe.model.shape) == (Pca(), 1, (16, 7, 7))
    assert ditkit("sample", "run", "--count", "2", "--out", "x.png").returncode == 0


def test_patches_cover_as_many_pixels_with_another_codec_as_long_as_that_one_can_be_read() -> None:
    digits = find_recipe("digits")
    assert [codec.downsampling() for codec in (Pixels(), Pca(7), Autoencoder("no/where", factor=2))] == [1, 7, 2]
    assert Latents(Pca(7), (1, 28, 28)).downsampling() == 7
    latent = override(digits, ["--codec", "pca:2"], "train")
    assert (digits.model.patch_size, latent.model.patch_size) == (4, 2)
    elsewhere = replace(digits, codec=Autoencoder("no/where"))  # whose factor only its files say
    assert override(elsewhere, ["--codec", "pca:2"], "train").model.patch_size == 4
    for codec in ("autoencoder:no/where", "trained_autoencoder:nowhere"):
        recipe = override(digits, ["--codec", codec], "train")
        assert recipe.model.patch_size == 4
        with pytest.raises(DitkitError, match=r"no.?where"):
            recipe.fitted(recipe.data.open())


def test_a_value_behind_the_name_of_a_codec(ditkit: Command, tmp_path: Path) -> None:
    flags = [*TINY_FLAGS, "--train.steps", "1", "--quiet", "--out"]
    assert ditkit("train", "digits", "--codec", "pca:14", *flags, "run", "--model.patch-size", "2").returncode == 0
    recipe = Run(tmp_path / "run").recipe()
    assert recipe.codec == Pca(14)
    assert isinstance(recipe.model, JiTConfig)
    assert recipe.model.patch_size == 2  # as it was said
    for codec, says in (
        ("pixels:2", "takes no value: write pixels instead of pixels:2"),
        ("pca:", "needs its factor: write pca:FACTOR"),
        ("pca:wide", "codec/pca.factor must be int, not 'wide'"),
        ("pcb:2", "unknown codec 'pcb': did you mean pca?"),
        ("autoencoder:", "needs its path: write autoencoder:PATH"),
        ("latents", "what `ditkit prepare` writes, and come with --data prepared:FOLDER"),
    ):
        done = ditkit("train", "digits", "--codec", codec, *flags, "x")
        assert done.returncode != 0
        assert says in done.stderr, done.stderr
        assert not (tmp_path / "x").exists()
    assert named("codec", "autoencoder:8") == Autoencoder("8")  # a name, not a number
    assert "--codec.basis" not in ditkit("train", "run", "--fields").stdout
