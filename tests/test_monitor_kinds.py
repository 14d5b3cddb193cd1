"""The monitor on every kind of training: copies that are planted, what is left out and said, and the same weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from ditkit.codecs import Autoencoder, Pca
from ditkit.conditioners import Text, TextEncoder
from ditkit.data import Dataset, Digits, Emoji, Folder, Prepared, Spiral
from ditkit.diffusion import REPA, LogVariance, Loss
from ditkit.evaluation import Observer, decide
from ditkit.evaluation.neighbours import Index, mirrored
from ditkit.evaluation.report import watched
from ditkit.models import DiTConfig, LoRAConfig, model_config
from ditkit.pipeline import Pipeline, load
from ditkit.prepare import prepare
from ditkit.recipe import Evaluate, Monitor, Recipe, Train
from ditkit.recipes import control, digits, digits_dit, find_recipe
from ditkit.rng import Draw, Replay, Rng
from ditkit.runs import Run
from ditkit.studies.manifold import manifold
from ditkit.training import train

from .conftest import TINY, tiny_autoencoder
from .test_reconstruction import SMALL
from .test_representation import Pooled
from .test_text_encoder import bert

LOOK = Monitor(budget=1e9, samples=32, probes=32, steps=2)
SHORT = {"steps": 2, "batch": 8, "emas": (0.5,), "warmup": 0, "cooldown": 0, "sample_every": 0, "checkpoint_every": 2}


def short(recipe: Recipe, **changes: Any) -> Recipe:
    """A few steps under a monitor that has time for everything."""
    settings = replace(recipe.train, **{**SHORT, "monitor": LOOK, **changes})
    sample = replace(recipe.sample, steps=2, batch=64, guidance=1.0)
    return replace(recipe, train=settings, sample=sample, evaluate=Evaluate(samples=10, size=32))


def drawn(folder: Path, count: int, classes: tuple[str, ...] = ("red", "blue"), same: bool = False) -> Path:
    """Pictures of 16 x 16 in colours that say their class, or all the same."""
    generator = torch.Generator().manual_seed(1)
    for hue, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for i in range(count):
            pixels = torch.randint(0, 60, (16, 16, 3), generator=generator, dtype=torch.uint8)
            pixels = torch.full_like(pixels, 60) if same else pixels
            pixels[..., hue] += 150
            Image.fromarray(pixels.numpy()).save(folder / name / f"{i:02d}.png")
    return folder


def images(place: Path, **changes: Any) -> Recipe:
    data = Folder(str(drawn(place / "pictures", 30)), 16, **{"holdout": 0.3, **changes})
    return short(replace(digits(), data=data, model=replace(TINY, patch_size=4)))


def components(place: Path) -> Recipe:
    recipe = images(place)
    return replace(recipe, codec=Pca(factor=4, channels=8), model=replace(TINY, patch_size=1))


def draws(place: Path) -> Recipe:
    """Latents that are drawn, as narrowly as those of published autoencoders."""
    folder = tiny_autoencoder(place / "vae")
    weights = load_file(file := folder / "diffusion_pytorch_model.safetensors")
    weights["quant_conv.bias"][4:] -= 12
    save_file(weights, file)
    codec = Autoencoder(str(folder), scale=0.7, shift=0.3, factor=2)
    return replace(images(place), codec=codec, model=replace(TINY, patch_size=2))


def shards(make: Callable[[Path], Recipe]) -> Callable[[Path], Recipe]:
    def prepared(place: Path) -> Recipe:
        recipe = make(place)
        prepare(recipe, place / "shards", dtype="float32", shard=64, batch=32, quiet=True)
        return replace(recipe, data=Prepared(str(place / "shards")))

    return prepared


def unlabelled(place: Path) -> Recipe:
    recipe = images(place)
    flat = drawn(place / "flat", 60, ("",))
    return replace(recipe, data=replace(recipe.data, path=str(flat)))


def spiral(place: Path) -> Recipe:
    return short(replace(manifold().cells[0].recipe, data=Spiral(dimension=8, samples=400)))


def videos(place: Path) -> Recipe:
    return short(find_recipe("kandinsky5_tiny"))


def captions(place: Path) -> Recipe:
    """Emoji whose captions a random text encoder sees."""
    model = model_config("mmdit_tiny", patch_size=1, depth=2, hidden_size=32, num_heads=2, text_dim=12, pooled_dim=12)
    recipe = short(find_recipe("emoji_captions"))
    conditioner = Text(TextEncoder(str(bert(place / "bert")), length=12))
    return replace(
        recipe, data=Emoji(16, flip=True), codec=Pca(factor=4, channels=16), conditioner=conditioner, model=model
    )


SAMPLED = {
    "vectors": spiral,
    "videos": videos,
    "images without labels": unlabelled,
    "components": components,
    "components in shards": shards(components),
    "drawn latents": draws,
    "drawn latents in shards": shards(draws),
    "captions": captions,
}


def slow(kind: str) -> Any:
    return pytest.param(kind, marks=pytest.mark.slow)


class Planted(Pipeline):
    """A pipeline whose samples are given as what is diffused."""

    def __init__(self, recipe: Recipe, x0: Tensor):
        super().__init__(recipe, recipe.model.build(0), recipe.model.shape)
        self.x0 = x0

    def latents(self, *given: Any, count: int = 16, **settings: Any) -> Iterator[Tensor]:
        yield from self.x0[:count].split(64)


def seen(recipe: Recipe, data: Dataset, x0: Tensor) -> dict[str, Any]:
    """The row of one evaluation with these samples."""
    found = Observer(recipe, data, replace(LOOK, samples=len(x0)), Silent()).observe(Planted(recipe, x0), 1, 1e9)
    assert found is not None
    return found.row


class Silent:
    """An objective whose loss takes no network: what is planted has none that was trained."""

    def loss(self, denoiser: Any, x0: Tensor, cond: Any, rng: Draw, data: Any = None) -> Loss:
        return Loss({"mse": x0.flatten(1).square().mean(1)}, rng("t", "uniform"))

    def check(self, denoiser: Any) -> None:
        raise NotImplementedError

    def learn(self, denoiser: Any, rng: Rng) -> Any:
        raise NotImplementedError


TAKES_LONG = ("images without labels", "components", "captions", "drawn latents in shards")


@pytest.mark.parametrize("kind", [slow(k) if k in TAKES_LONG else k for k in SAMPLED])
def test_copies_are_seen_in_what_is_diffused(kind: str, tmp_path: Path) -> None:
    recipe = SAMPLED[kind](tmp_path)
    data = recipe.data.open()
    recipe = recipe.fitted(data)
    held = recipe.codec.encode(data.heldout.batch(torch.arange(min(40, len(data.heldout)))).data)
    other = seen(recipe, data, held)
    assert decide([other]).copies is None
    assert other["floor_samples"] == min(512, len(data.heldout))
    if kind == "vectors":  # on a curve, chance makes many of them
        assert other["f_mem"] == pytest.approx(other["floor"], abs=0.1)
        assert other["floor_high"] > other["floor"] > 0.2
    else:
        assert other["f_mem"] < 0.03  # one of the 40 emoji of 16 pixels, by chance
        assert other["floor"] < 0.01
    ids = torch.arange(40)
    views = {"plain": data.train.batch(ids).data}
    mirrors = kind not in ("vectors", "videos")
    if mirrors:
        views["mirrored"] = data.train.batch(ids, Replay({"flip": torch.zeros(40)})).data
        assert not torch.equal(*views.values())
    for name, view in views.items():
        x0 = recipe.codec.encode(view, Rng(0).at(1, ids))  # where latents are drawn, a draw
        noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(0))
        row = seen(recipe, data, x0 + (1e-5 if kind == "vectors" else 1e-3) * x0.std() * noise)
        assert row["f_mem"] > (0.8 if kind == "captions" else 0.95), name  # clocks hide the copies of other clocks
        assert decide([row]).copies == 1
        if mirrors:
            assert row["f_mem_features"] > (0.8 if kind == "captions" else 0.95), name


def test_mirrored_rows_are_as_near_as_mirrored_samples() -> None:
    """Two ways to the same distances; the second is for latents, which cannot be mirrored."""
    generator = torch.Generator().manual_seed(0)
    some = torch.randn(20, 3 * 12 * 12, generator=generator).view(20, 3, 12, 12)
    basis = torch.cat((some, some.flip(-1))).flatten(1)
    train, samples = ((torch.randn(n, 40, generator=generator) @ basis).view(-1, 3, 12, 12) for n in (700, 60))
    samples[:20] = train[:20].flip(-1) + 0.02 * samples[:20]
    found = []
    for how in ({"mirror": mirrored((3, 12, 12))}, {"read_mirrored": lambda ids: train[ids].flip(-1).flatten(1)}):
        index = Index(lambda ids: (train[ids], train[ids].flatten(1)), 700, **how)  # type: ignore[arg-type]
        index.extend(700)
        found.append(index.nearest(samples.flatten(1), distances=True))
    one, other = found
    assert torch.equal(one.nearest, other.nearest)
    assert torch.equal(one.copied, other.copied)
    assert one.copied.tolist() == [True] * 20 + [False] * 40
    torch.testing.assert_close(one.d1, other.d1)


@pytest.mark.parametrize("holdout", [0.0, pytest.param(0.045, marks=pytest.mark.slow)])  # none, one
def test_without_held_out_samples_copies_are_looked_for_alone(holdout: float, tmp_path: Path) -> None:
    recipe = images(tmp_path, holdout=holdout)
    data = recipe.data.open()
    assert len(data.heldout) == (holdout > 0)
    train(recipe, tmp_path / "run", quiet=True)
    rows = Run(tmp_path / "run").watched()
    assert [row["step"] for row in rows] == [1, 2]
    assert all(row.keys().isdisjoint({"heldout_loss", "levels", "kid"}) for row in rows)
    assert all((row["samples"], row["f_mem"], row["floor_samples"]) == (32, 0.0, holdout > 0) for row in rows)
    section = watched(Run(tmp_path / "run"))
    assert section is not None
    assert "Losses were not compared: there are fewer than 2 held-out samples." in section.parts
    recipe = recipe.fitted(data)
    row = seen(recipe, data, recipe.codec.encode(data.train.batch(torch.arange(40)).data))
    assert decide([row]).copies == 1


def test_of_two_training_samples_copies_are_seen_and_of_equal_ones_it_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = images(tmp_path, holdout=0.0)
    folder = drawn(tmp_path / "two", 2, ("",))
    data = (two := replace(recipe, data=replace(recipe.data, path=str(folder)))).data.open()
    two = two.fitted(data)
    both = two.codec.encode(data.train.batch(torch.tensor([0, 1, 1, 0])).data)
    row = seen(two, data, both)
    assert (row["indexed"], row["f_mem"]) == (2, 1.0)
    folder = drawn(tmp_path / "same", 4, ("",), same=True)
    train(replace(recipe, data=replace(recipe.data, path=str(folder), flip=False)), tmp_path / "run", quiet=True)
    assert "3 of the training samples are equal to others" in capsys.readouterr().err  # quiet is for progress
    assert [row["duplicates"] for row in Run(tmp_path / "run").watched()] == [3, 3]
    section = watched(Run(tmp_path / "run"))
    assert section is not None
    assert "Copies were not looked for: no samples were drawn." in section.parts


def test_copies_begin_above_the_interval_of_the_floor() -> None:
    row = {"step": 8, "f_mem": 0.42, "f_mem_low": 0.38, "samples": 512, "floor": 0.33, "floor_samples": 64}
    assert decide([row]).copies == 8
    assert decide([{**row, "floor_high": 0.44}]).copies is None
    assert decide([{**row, "floor_high": 0.36}]).copies == 8


def test_what_draws_nothing_has_no_window() -> None:
    rows = [{"step": k, "heldout_loss": loss, "levels": []} for k, loss in ((1, 3.0), (2, 2.0), (4, 2.5))]
    assert (decide(rows).best, decide(rows).lowest) == (None, 2)
    levels = [{"t": [0.0, 0.0], "gap": 0.1, "low": 0.05, "high": 0.2}]
    grows = [{**row, "levels": [{**levels[0], "gap": k / 10}]} for k, row in enumerate(rows)]
    assert "training and held-out loss part since step 1 (3 evaluations in a row, 95%)" in decide(grows).lines()


def test_held_out_samples_that_are_harder_from_the_first_are_not_memorized() -> None:
    """Seen with PixArt and Drax at step 1; the same samples differ in the same way each time."""

    def rows(*gaps: float) -> list[dict[str, Any]]:
        looks = zip((1, 2, 4, 8, 16), (3.0, 3.0, 3.0, 0.3, 0.3), gaps, strict=True)
        return [
            {"step": step, "heldout_loss": 1.0}
            | {"levels": [{"t": [0.0, 0.5], "train": loss, "gap": gap, "low": gap - 0.01, "high": gap + 0.01}]}
            for step, loss, gap in looks
        ]

    assert decide(rows(0.06, 0.061, 0.062, 0.007, 0.008)).parted is None
    assert decide(rows(0.0, 0.061, 0.062, 0.063, 0.064)).parted == 2
    assert decide(rows(0.06, 0.06, 0.06, 0.1, 0.2)).parted is None  # at two looks
    assert decide([*rows(0.06, 0.06, 0.06, 0.1, 0.2), {**rows(0, 0, 0, 0, 0.3)[-1], "step": 32}]).parted == 8


def autoencoder(place: Path) -> Recipe:
    recipe = short(find_recipe(f"autoencoder:{drawn(place / 'pictures', 30)}"))
    return replace(recipe, data=replace(recipe.data, resolution=16, holdout=0.3), model=SMALL)


def controlled(place: Path) -> Recipe:
    model = DiTConfig(patch_size=4, hidden_size=24, depth=2, num_heads=3, learn_sigma=False)
    base = short(replace(digits_dit(), data=Digits(resolution=16, count=200), model=model), monitor=Monitor(budget=0))
    train(base, place / "base", quiet=True)
    return short(control(str(place / "base")))


def texts(place: Path) -> Recipe:
    recipe = short(find_recipe("captions"))
    return replace(recipe, model=replace(recipe.model, hidden_size=16, depth=1, num_heads=2))


def adapted(place: Path) -> Recipe:
    base = short(replace(images(place), train=Train()), monitor=Monitor(budget=0))
    train(base, place / "base", quiet=True)
    return short(replace(base, model=LoRAConfig(base.model, 2, 2.0)))


def aligned(place: Path) -> Recipe:
    recipe = images(place)
    objective = REPA(base=recipe.objective, encoder=Pooled(), depth=1, hidden=8)
    return replace(recipe, model=replace(TINY, patch_size=4, in_context_len=0), objective=objective)


def uncertain(place: Path) -> Recipe:
    recipe = images(place)
    return replace(recipe, objective=replace(recipe.objective, weighting=LogVariance(16)))


def accumulated(place: Path) -> Recipe:
    return short(images(place), accumulate=4)


def speech(place: Path) -> Recipe:
    return short(find_recipe("drax_tiny"))


LOSSES = {"autoencoder": autoencoder, "ControlNet": controlled, "texts": texts, "speech": speech}
TRAINED = {
    **LOSSES,
    **SAMPLED,
    "adapters": adapted,
    "REPA": aligned,
    "log-variance": uncertain,
    "accumulated": accumulated,
}
SLOW = {*TRAINED} - {"autoencoder", "texts", "vectors"}


def weights(folder: Path) -> dict[str, bytes]:
    newest = Run(folder).newest()
    assert newest is not None
    return {file.name: file.read_bytes() for file in newest.folder.glob("*.safetensors")}


@pytest.mark.parametrize("kind", [slow(k) if k in SLOW else k for k in TRAINED])
def test_a_watched_training_is_the_same_training(kind: str, tmp_path: Path) -> None:
    recipe = TRAINED[kind](tmp_path)
    base = tmp_path / "base"
    init = base if base.exists() else None
    train(recipe, tmp_path / "watched", init=init, quiet=True)
    train(short(recipe, **kept(recipe), monitor=Monitor(budget=0)), tmp_path / "plain", init=init, quiet=True)
    assert weights(tmp_path / "watched") == weights(tmp_path / "plain")
    run = Run(tmp_path / "watched")
    rows, best = run.watched(), run.best()
    assert [row["step"] for row in rows] == [1, 2]
    assert all(row["train_loss"] > 0 < row["heldout_loss"] for row in rows)
    section = watched(run)
    assert section is not None
    if kind in LOSSES:
        assert all("f_mem" not in row for row in rows)
        assert best == []
        assert "Copies were not looked for: no samples were drawn." in section.parts
    else:
        assert all((row["samples"], row["f_mem"]) == (32, 0.0) for row in rows)
        assert (run.folder / "monitor.png").exists() == (kind not in ("vectors", "videos"))
        assert len(best) == 1
        assert len(load(best[0]).sample(count=2)) == 2
    if kind == "autoencoder":  # no time: no levels of it
        assert [len(row["levels"]) for row in rows] == [1, 1]


def kept(recipe: Recipe) -> dict[str, Any]:
    return {"accumulate": recipe.train.accumulate}
