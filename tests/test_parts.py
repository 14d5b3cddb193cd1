"""Parts of networks: a ControlNet's branch and adapters of low rank, with a base, from files to samples."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.testing import assert_close

import ditkit
from ditkit.cli import main
from ditkit.conditioners import Edges
from ditkit.config import DitkitError
from ditkit.importing import import_file, write_run
from ditkit.interop import DIFFUSERS_SD3, Z_IMAGE, Z_IMAGE_CONTROL, save, write_adapters
from ditkit.models import ControlConfig, LoRAConfig, merged
from ditkit.parts import import_part
from ditkit.recipe import Recipe
from ditkit.recipes import find_recipe
from ditkit.runs import Run

from .conftest import randomise, tiny_autoencoder

PLACES = (0, 3)


def random_run(name: str, folder: Path) -> Path:
    """A run of a family's recipe whose weights are random, for those that begin at zero hide what others do."""
    recipe = find_recipe(name)
    recipe = recipe.fitted(recipe.data.open())
    recipe = replace(recipe, sample=replace(recipe.sample, steps=2, ema=0.0))
    write_run(Run(folder), recipe, {"model": randomise(recipe.model.build()).state_dict()}, [])
    return folder


@pytest.fixture(scope="module")
def z_image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_run("z_image_tiny", tmp_path_factory.mktemp("z_image") / "run")


@pytest.fixture(scope="module")
def branch(z_image: Path) -> tuple[Path, ControlConfig, dict[str, Tensor]]:
    """A file as alibaba-pai publish it, of a control of 2 c + 1 channels."""
    config = ControlConfig(Run(z_image).recipe().model, places=PLACES, control_channels=3, refiner="hints")
    weights = {name: 0.05 * torch.randn(p.shape) + p for name, p in config.build(3).state_dict().items()}
    own = {name: value for name, value in weights.items() if name.startswith("control.")}
    path = z_image.parent / "branch.safetensors"
    save_file(Z_IMAGE_CONTROL.write(config.build(), own), path)
    return path, config, own


def test_a_branch_and_its_base_become_a_run(z_image: Path, branch: tuple[Path, ControlConfig, Any]) -> None:
    path, config, own = branch
    folder = z_image.parent / "controlled"
    words = ["import", str(path), "--base", str(z_image), "--model.places", "0", "3", "--out", str(folder)]
    assert main(words) == 0
    pipeline, base = ditkit.load(folder), ditkit.load(z_image)
    assert pipeline.recipe.model == config
    assert pipeline.recipe.conditioner == Edges(base.recipe.conditioner)
    state = pipeline.model.state_dict()
    assert all(torch.equal(state[name], value) for name, value in own.items())
    assert all(torch.equal(state[f"base.{name}"], value) for name, value in base.model.state_dict().items())
    image = torch.zeros(1, 16, 16, dtype=torch.uint8)
    image[:, 4:12, 6] = 255
    plain = base.sample("3", 2, steps=2)
    assert torch.equal(pipeline.sample("3", 2, steps=2), plain)
    assert torch.equal(pipeline.sample("3", 2, steps=2, control=image, control_scale=0.0), plain)
    assert not torch.equal(pipeline.sample("3", 2, steps=2, control=image), plain)
    # the control is the image, then what is not given: the mask and the image that is kept
    control = pipeline.recipe.control(image[None])
    assert control.shape == (1, 3, 16, 16)
    assert torch.equal(control[:, :1], image[None].float() / 127.5 - 1)
    assert not bool(control[:, 1:].any())


def test_a_published_base_serves_too(
    z_image: Path, branch: tuple[Path, ControlConfig, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = Run(z_image).recipe()
    model = randomise(recipe.model.build())
    save(Z_IMAGE, model, recipe.denoiser, tmp_path / "base.safetensors")
    run, lines = import_part(
        branch[0], tmp_path / "base.safetensors", tmp_path / "run", options={"places": PLACES, **z_options(recipe)}
    )
    assert lines[0].startswith("base: ")
    assert "copies of the blocks 0, 3, control of 3 channels, refiner hints" in lines[-1]
    weights = Run(run.folder).newest().tensors("model")  # type: ignore[union-attr]
    assert all(torch.equal(weights[f"base.{name}"], value) for name, value in model.state_dict().items())


def z_options(recipe: Recipe) -> dict[str, Any]:
    return {name: getattr(recipe.model, name) for name in ("axes", "num_heads")}


def test_parts_that_do_not_fit_are_one_line(
    z_image: Path, branch: tuple[Path, ControlConfig, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(branch[0])
    digits, controlled = tmp_path / "digits", tmp_path / "controlled"
    random_run("mmdit_tiny", digits)
    import_part(path, z_image, controlled, options={"places": PLACES})
    recipe = Run(z_image).recipe()
    save(Z_IMAGE, recipe.model.build(), recipe.denoiser, tmp_path / "whole.safetensors")
    capsys.readouterr()
    for words, said in (
        ([path], "which blocks its copies are of: give --model.places"),
        ([path, "--base", str(z_image)], "give --model.places"),
        ([path, "--model.places", "0"], "is for a ControlNet's branch"),
        ([path, "--base", str(tmp_path / "no"), "--model.places", "0", "3"], "there is no file"),
        ([path, "--base", str(z_image), "--as", "dit"], "leave out --as"),
        ([path, "--base", str(z_image), "--autoencoder", "vae"], "leave out --autoencoder"),
        ([path, "--base", str(controlled), "--model.places", "0", "3"], "is a ControlNet already"),
        ([path, "--base", str(digits), "--model.places", "0", "3"], "base"),
        ([str(tmp_path / "whole.safetensors"), "--base", str(z_image)], "holds a whole"),
    ):
        assert main(["import", *words, "--out", str(tmp_path / "out")]) == 1
        error = capsys.readouterr().err
        assert said in error
        assert error.count("\n") == 1
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("channels", "path"), [(4, "stabilityai/sd-vae-ft-mse"), (16, "")])
def test_a_model_without_its_autoencoder_is_not_given_another_ones(
    channels: int, path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_autoencoder(tmp_path / "here" / "vae")  # of something else, in the folder where one happens to be
    shutil.copyfile(tmp_path / "here" / "vae" / "config.json", tmp_path / "here" / "config.json")
    monkeypatch.chdir(tmp_path / "here")
    recipe = find_recipe("z_image_tiny")
    model = replace(recipe.model, in_channels=channels)
    save(Z_IMAGE, model.build(), recipe.denoiser, tmp_path / "model.safetensors")
    run, lines = import_file(tmp_path / "model.safetensors", tmp_path / "run", options=z_options(recipe))
    assert run.recipe().codec.path == path
    own = "have 16 channels and are not Stable Diffusion's: to sample, give its own autoencoder" in "".join(lines)
    assert own == (channels == 16)
    says = "no autoencoder is known.*--autoencoder FOLDER" if channels == 16 else "cannot load the autoencoder stab"
    with pytest.raises(DitkitError, match=says):
        run.recipe().codec.decode(torch.zeros(1, channels, 4, 4))


# adapters


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, dict[str, Tensor]]:
    """A run of Stable Diffusion 3's network, a file of adapters as diffusers writes them, and what both come to."""
    folder = tmp_path_factory.mktemp("sd3")
    random_run("mmdit_tiny", folder / "run")
    config = LoRAConfig(Run(folder / "run").recipe().model, rank=3, alpha=1.5)
    state = dict(randomise(config.build()).state_dict())
    save_file(write_adapters(DIFFUSERS_SD3, config, state), folder / "lora.safetensors")
    base = Run(folder / "run").newest().tensors("model")  # type: ignore[union-attr]
    return folder / "run", folder / "lora.safetensors", merged(config, {**state, **base})


def test_samples_are_drawn_with_adapters_of_a_file(adapters: tuple[Path, Path, dict[str, Tensor]]) -> None:
    run, file, both = adapters
    plain, pipeline = ditkit.load(run), ditkit.load(run, lora=file)
    for name, value in pipeline.model.state_dict().items():
        assert_close(value, both[name], rtol=1e-5, atol=1e-6)
    assert "1 lora.safetensors" in pipeline.origin
    none = ditkit.load(run, lora=[file, file], lora_scale=0.0).model.state_dict()
    assert all(torch.equal(none[name], value) for name, value in plain.model.state_dict().items())
    half = ditkit.load(run, lora=[file, file], lora_scale=0.5).model.state_dict()
    for name, value in half.items():
        assert_close(value, both[name], rtol=1e-5, atol=1e-6)
    out = run.parent / "drawn"
    assert main(["sample", str(run), "--lora", str(file), "--count", "2", "--steps", "2", "--out", f"{out}.npy"]) == 0
    import numpy as np

    assert np.array_equal(np.load(f"{out}.npy"), pipeline.sample(count=2, steps=2).numpy())
    assert not torch.equal(pipeline.sample(count=2, steps=2), plain.sample(count=2, steps=2))


def test_adapters_and_their_network_become_a_run(adapters: tuple[Path, Path, dict[str, Tensor]]) -> None:
    run, file, both = adapters
    folder = run.parent / "merged"
    assert main(["import", str(file), "--base", str(run), "--out", str(folder)]) == 0
    pipeline = ditkit.load(folder)
    assert pipeline.recipe.model == Run(run).recipe().model
    for name, value in pipeline.model.state_dict().items():
        assert_close(value, both[name], rtol=1e-5, atol=1e-6)


def test_adapters_reach_the_base_of_a_control_net(z_image: Path, branch: tuple[Path, ControlConfig, Any]) -> None:
    folder = z_image.parent / "adapted"
    import_part(branch[0], z_image, folder, options={"places": PLACES})
    config = LoRAConfig(Run(z_image).recipe().model, rank=2, alpha=2.0, targets=("q",))
    state = dict(randomise(config.build()).state_dict())
    save_file(write_adapters(Z_IMAGE, config, state), z_image.parent / "lora.safetensors")
    before, after = ditkit.load(folder), ditkit.load(folder, lora=z_image.parent / "lora.safetensors")
    moved = [n for n, p in after.model.state_dict().items() if not torch.equal(p, before.model.state_dict()[n])]
    assert moved
    assert all(name.startswith("base.") and name.endswith(".q.weight") for name in moved)


def test_adapters_of_nothing_are_one_line(
    z_image: Path, adapters: tuple[Path, Path, dict[str, Tensor]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, file, _ = adapters
    save_file({"a": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(DitkitError, match=r"holds adapters of low rank, not a network: .* --lora FILE"):
        import_file(file, tmp_path / "run")
    capsys.readouterr()
    for words, said in (
        ([str(run), "--lora", str(tmp_path / "other.safetensors")], "holds no adapters of low rank"),
        ([str(run), "--lora", str(tmp_path / "no.safetensors")], "there is no file"),
        ([str(z_image), "--lora", str(file)], "has no Linear called"),
    ):
        assert main(["sample", *words]) == 1
        error = capsys.readouterr().err
        assert said in error
        assert error.count("\n") == 1
