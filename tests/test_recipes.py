"""Published recipes: each fits a data set of 1000 classes, its parts go together, and its numbers are the papers'."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
import torch

from ditkit.config import DitkitError
from ditkit.data import Dataset, InMemory
from ditkit.diffusion import REPA, Prediction, SiTSDE
from ditkit.interop import JIT, SIT
from ditkit.pipeline import Pipeline
from ditkit.recipe import Recipe, Sample
from ditkit.recipes import PUBLISHED, find_recipe
from ditkit.rng import Replay
from ditkit.runs import Run

from .conftest import Command

# model, steps, batch, rate, guidance, interval, channels, sampling steps
NUMBERS: dict[str, tuple[Any, ...]] = {
    "dit_s_2": ((12, 384, 6, 2), 400_000, 256, 1e-4, 1.0, (0, 1), None, 250),
    "dit_b_4": ((12, 768, 12, 4), 400_000, 256, 1e-4, 1.0, (0, 1), None, 250),
    "dit_l_8": ((24, 1024, 16, 8), 400_000, 256, 1e-4, 1.0, (0, 1), None, 250),
    "dit_xl_2": ((28, 1152, 16, 2), 7_000_000, 256, 1e-4, 1.5, (0, 1), 3, 250),
    "dit_xl_2_512": ((28, 1152, 16, 2), 3_000_000, 256, 1e-4, 1.5, (0, 1), 3, 250),
    "sit_b_2": ((12, 768, 12, 2), 400_000, 256, 1e-4, 1.0, (0, 1), None, 250),
    "sit_xl_2": ((28, 1152, 16, 2), 7_000_000, 256, 1e-4, 1.5, (0, 1), 3, 250),
    "jit_b_16": ((12, 768, 12, 16), 750_600, 1024, 2e-4, 3.0, (0, 0.9), None, 50),
    "jit_l_32": ((24, 1024, 16, 32), 750_600, 1024, 2e-4, 2.5, (0, 0.9), None, 50),
    "jit_h_16": ((32, 1280, 16, 16), 750_600, 1024, 2e-4, 2.2, (0, 0.9), None, 50),
    "repa_sit_xl_2": ((28, 1152, 16, 2), 4_000_000, 256, 1e-4, 1.8, (0, 0.7), None, 250),
    "lightningdit_xl_1": ((28, 1152, 16, 1), 80_000, 1024, 2e-4, 10.0, (0, 0.9), 3, 250),
    "lightningdit_xl_1_800": ((28, 1152, 16, 1), 1_000_000, 1024, 2e-4, 6.7, (0, 0.875), 3, 250),
}


def imagenet(recipe: Recipe) -> Dataset:
    """A data set of that shape and no content."""
    side = recipe.data.resolution
    empty = InMemory(torch.empty(0, 3, side, side, dtype=torch.uint8), torch.empty(0).long(), torch.empty(0).long())
    names = tuple(f"n{i:08d}" for i in range(1000))
    return Dataset("imagenet", names, (3, side, side), empty, empty, "a stand-in")


def test_the_published_sizes_are_all_there() -> None:
    dit = {f"dit_{size}_{patch}" for size in ("s", "b", "l", "xl") for patch in (2, 4, 8)} | {"dit_xl_2_512"}
    sit = {f"sit_{size}_2" for size in ("s", "b", "l", "xl")} | {"sit_xl_2_512"}
    jit = {f"jit_{size}_{patch}" for size in "blhg" for patch in (16, 32)}
    others = {"repa_sit_b_2", "repa_sit_l_2", "repa_sit_xl_2", "lightningdit_xl_1", "lightningdit_xl_1_800"}
    assert set(PUBLISHED) == dit | sit | jit | others


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_part_of_a_published_recipe_goes_with_the_others(name: str) -> None:
    recipe = find_recipe(f"{name}:/data/imagenet")
    recipe = recipe.fitted(imagenet(recipe))
    assert recipe == Recipe.from_json(recipe.to_json())
    assert name.split("_512")[0].removeprefix("repa_") in (PUBLISHED[name].__doc__ or "")
    assert f"ditkit train {name}:PATH" in (PUBLISHED[name].__doc__ or "")
    with torch.device("meta"):
        # the depth makes no difference to what is checked, and most of the time
        least = REPA().depth if isinstance(recipe.objective, REPA) else 11
        model = dataclasses.replace(recipe.model, depth=min(recipe.model.depth, least)).build()
        denoiser = recipe.denoiser.of(model)
        recipe.objective.check(denoiser)
        pipeline = Pipeline(recipe, model, recipe.model.shape)
        chosen, times = pipeline.check()
    assert chosen.steps == len(times) - 1
    assert times[0] == 1
    assert times[-1] == 0
    assert recipe.model.num_classes == 1000
    assert recipe.conditioner.drop == 0.1
    assert recipe.data.flip
    assert recipe.data.holdout == 0
    assert recipe.evaluate.samples == 50_000


@pytest.mark.parametrize("name", NUMBERS)
def test_the_numbers_are_the_papers(name: str) -> None:
    size, steps, batch, lr, guidance, interval, channels, sampling = NUMBERS[name]
    recipe = PUBLISHED[name]("/data/imagenet")
    model, train, sample = recipe.model, recipe.train, recipe.sample
    assert (model.depth, model.hidden_size, model.num_heads, model.patch_size) == size
    assert (train.steps, train.batch, train.lr, train.weight_decay, train.emas[0]) == (steps, batch, lr, 0, 0.9999)
    assert (sample.guidance, sample.interval, sample.channels, sample.steps) == (guidance, interval, channels, sampling)


def test_what_tells_the_papers_apart() -> None:
    recipes = {name: PUBLISHED[name]("/data/imagenet") for name in PUBLISHED}
    for name, recipe in recipes.items():
        train, family = recipe.train, name.split("_")[0]
        slow = family in ("jit", "lightningdit")
        assert train.betas == ((0.9, 0.95) if slow else (0.9, 0.999))
        assert train.precision == ("fp32" if family in ("dit", "sit") else "bf16")
        assert train.clip == (1.0 if family == "repa" else 0)
        assert train.warmup == (5 * 1251 if family == "jit" else 0)
        assert recipe.data.resolution == (512 if name.endswith(("512", "_32")) else 256)
    assert recipes["jit_b_16"].denoiser.path.noise_scale == 1
    assert recipes["jit_b_32"].denoiser.path.noise_scale == 2
    assert recipes["jit_h_32"].model.proj_drop == 0.2
    assert recipes["dit_xl_2"].codec.path.endswith("ft-ema")
    assert recipes["dit_s_8"].codec.path.endswith("ft-mse")
    assert recipes["dit_xl_2_512"].model.shape == (4, 64, 64)
    assert not recipes["repa_sit_xl_2"].model.learn_sigma
    assert recipes["sit_xl_2"].model.learn_sigma
    # LightningDiT's grid, in its own time: s t / (1 + (s - 1) t) with s = 0.3, from noise to data
    light = recipes["lightningdit_xl_1"]
    times = light.sample.grid(250, light.denoiser.path, light.model.length)
    for i in (0, 1, 100, 249, 250):
        t = i / 250
        assert 1 - times[i] == pytest.approx(0.3 * t / (1 + (0.3 - 1) * t), abs=1e-12)


@pytest.mark.parametrize("name", ["sit_xl_2", "jit_b_16", "jit_l_32", "jit_h_16", "jit_h_32", "jit_g_16", "jit_g_32"])
def test_an_imported_model_samples_as_the_recipe_of_its_paper(name: str) -> None:
    """But for the guidance of SiT: the authors' program has 4, their best FID 1.5."""
    recipe = PUBLISHED[name]("/data/imagenet")
    imported = Sample(**(SIT if name.startswith("sit") else JIT).sampling(recipe.model))
    for field in ("steps", "solver", "grid", "interval", "channels"):
        assert getattr(imported, field) == getattr(recipe.sample, field), field
    assert imported.guidance == (4.0 if name.startswith("sit") else recipe.sample.guidance)
    if name.startswith("sit"):
        assert imported.solver == SiTSDE("sigma", 1.0, "Mean")
        times = imported.grid(250, recipe.denoiser.path, recipe.model.length)
        assert times[:1] + times[-2:] == pytest.approx((1.0, 0.04, 0.0), abs=1e-15)


def test_repa_s_diffusion_is_t_as_its_authors_code_has_it() -> None:
    """samplers.py: dx = (v - 0.5 g s) dt + sqrt(g) dw with g = 2 t, so that our w = g / 2 = t."""
    recipe = PUBLISHED["repa_sit_xl_2"]("/data/imagenet")
    solver, path = recipe.sample.solver, recipe.denoiser.path
    x, said, t, s = torch.randn(2, 3, 4, 4).double(), torch.randn(2, 3, 4, 4).double(), 0.6, 0.57
    noise = torch.randn(2, 3, 4, 4).double()
    prediction = Prediction(said, x, torch.tensor(t, dtype=torch.float64), path, "velocity")
    got, _ = solver.step(lambda x, t: prediction, x, t, s, None, Replay({"solver": noise}))
    score = -(x + (1 - t) * said) / t
    wanted = x + (s - t) * (said - 0.5 * 2 * t * score) + (2 * t * (t - s)) ** 0.5 * noise
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("dit_xl_2", "write dit_xl_2:PATH"),
        ("dit_xl_3:/data", "did you mean .*dit_xl_2"),
        ("dit-xl-2:/data", "did you mean .*dit_xl_2"),
        ("jit_b_61", "did you mean .*jit_b_16"),
        ("digit", "did you mean .*digits"),
    ],
)
def test_names_that_are_nearly_right_are_answered_with_the_right_ones(name: str, message: str) -> None:
    with pytest.raises(DitkitError, match=message):
        find_recipe(name)


def test_a_published_recipe_is_trained_by_its_name(ditkit: Command, pictures: Any) -> None:
    """JiT-B/16, made small: the folder of its run has the name of the recipe."""
    words = [
        "--model.hidden-size",
        "24",
        "--model.depth",
        "2",
        "--model.num-heads",
        "2",
        "--model.in-context-start",
        "1",
    ]
    words += ["--data.resolution", "32", "--train.steps", "2", "--train.batch", "4", "--train.sample-every", "0"]
    words += ["--sample.steps", "2", "--train.no-compile", "--train.precision", "fp32"]
    done = ditkit("train", f"jit_b_16:{pictures}", "--quiet", *words)
    assert done.returncode == 0, done.stderr
    recipe = Run("runs/jit_b_16").recipe()
    assert recipe.model.shape == (3, 32, 32)
    assert recipe.train.emas == (0.9999, 0.9996)
    assert json.loads(recipe.to_json())["objective"]["times"] == {"type": "times/logit_normal", "mean": 0.8, "std": 0.8}
