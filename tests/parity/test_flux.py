"""FLUX.1 and FLUX.2 against diffusers' networks, latents packed by its pipelines; the authors' names against diffusers'
own converters."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.loaders import single_file_utils
from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel
from diffusers.models.transformers.transformer_flux2 import Flux2Transformer2DModel
from diffusers.pipelines.flux.pipeline_flux import FluxPipeline
from diffusers.pipelines.flux2.pipeline_flux2 import Flux2Pipeline
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.testing import assert_close

from ditkit.conditioning import Conditioning, Tokens
from ditkit.config import DitkitError
from ditkit.diffusion import Linear, Meaning
from ditkit.exporting import export_run
from ditkit.importing import import_file
from ditkit.interop import DIFFUSERS_FLUX, DIFFUSERS_FLUX2, FLUX, FLUX2, FORMATS, Format, read, save
from ditkit.models import Flux, FluxConfig, Model

from ..conftest import randomised
from .carried import assert_gradients_agree, random_parameters

COMMON: dict[str, Any] = {
    "patch_size": 1, "in_channels": 16, "num_layers": 1, "num_single_layers": 2, "attention_head_dim": 16,
    "num_attention_heads": 2, "joint_attention_dim": 12,
}  # fmt: skip
KINDS: dict[str, tuple[Any, Format, dict[str, Any]]] = {
    "flux1": (
        FluxTransformer2DModel,
        DIFFUSERS_FLUX,
        {"pooled_projection_dim": 10, "guidance_embeds": True, "axes_dims_rope": (4, 6, 6)},
    ),
    "flux1 without guidance": (
        FluxTransformer2DModel,
        DIFFUSERS_FLUX,
        {"pooled_projection_dim": 10, "guidance_embeds": False, "axes_dims_rope": (2, 6, 8), "num_layers": 2},
    ),
    "flux2": (
        Flux2Transformer2DModel,
        DIFFUSERS_FLUX2,
        {"timestep_guidance_channels": 16, "axes_dims_rope": (4, 4, 4, 4)},
    ),
    "flux2 without guidance": (
        Flux2Transformer2DModel,
        DIFFUSERS_FLUX2,
        {"guidance_embeds": False, "axes_dims_rope": (2, 4, 4, 6), "num_layers": 2, "mlp_ratio": 2.0},
    ),
}
MEANING = Meaning(Linear(), "velocity", "t")
SHAPES = [(2, 4, 6, 5), (1, 8, 2, 1), (3, 2, 2, 9)]  # samples, rows and columns of patches, tokens of text


def theirs(kind: str) -> Any:
    network, _, options = KINDS[kind]
    return random_parameters(network(**{**COMMON, **options}))


def ours(kind: str, folder: Path) -> Flux:
    found = read(folder, FORMATS)
    assert found.format is KINDS[kind][1]
    assert found.denoiser == MEANING
    model = found.config.build()
    model.load_state_dict(found.weights)
    assert isinstance(model, Flux)
    return model.eval()


def drawn(config: Any, shape: tuple[int, int, int, int], references: int = 0) -> tuple[Tensor, Tensor, Conditioning]:
    b, rows, columns, length = shape
    generator = torch.Generator().manual_seed(1)
    p = config.patch_size
    x = torch.randn(b, config.in_channels, rows * p, columns * p, generator=generator)
    text = torch.randn(b, length, config.text_dim, generator=generator)
    cond = Conditioning(
        text=Tokens(text, torch.ones(b, length, dtype=torch.bool)),
        pooled=torch.randn(b, config.pooled_dim, generator=generator) if config.pooled_dim else None,
        scalars={"guidance": 1 + 4 * torch.rand(b, generator=generator)} if config.guidance else {},
        references=(
            torch.randn(b, references, config.in_channels, 3 * p, 2 * p, generator=generator) if references else None
        ),
    )
    return x, torch.rand(b, generator=generator), cond


def called(model: Any, x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
    """diffusers' network, with latents and positions as its pipelines make them."""
    assert cond.text is not None
    text, seen = cond.text.values, [] if cond.references is None else list(cond.references.unbind(1))
    if isinstance(model, FluxTransformer2DModel):

        def packed(latents: Tensor) -> tuple[Tensor, Tensor]:
            b, c, h, w = latents.shape
            ids = FluxPipeline._prepare_latent_image_ids(b, h // 2, w // 2, torch.device("cpu"), torch.float32)
            return FluxPipeline._pack_latents(latents, b, c, h, w), ids

        tokens, ids = (list(both) for both in zip(*map(packed, (x, *seen)), strict=True))
        for i, place in enumerate(ids):
            place[:, 0] = i  # FluxKontextPipeline gives its one reference 1
        rest = {"pooled_projections": cond.pooled, "txt_ids": torch.zeros(text.shape[1], 3)}
    else:
        pipeline: Any = Flux2Pipeline
        tokens = [pipeline._pack_latents(latents) for latents in (x, *seen)]
        ids = [pipeline._prepare_latent_ids(x)[0]]
        if seen:
            ids.append(pipeline._prepare_image_ids([latents[:1] for latents in seen])[0])
        rest = {"txt_ids": pipeline._prepare_text_ids(text)[0]}
    out = model(
        hidden_states=torch.cat(tokens, dim=1),
        encoder_hidden_states=text,
        timestep=t,
        img_ids=torch.cat(ids),
        guidance=cond.scalars.get("guidance"),
        return_dict=False,
        **rest,
    )[0][:, : tokens[0].shape[1]]
    h, w = x.shape[2:]
    if isinstance(model, FluxTransformer2DModel):
        return FluxPipeline._unpack_latents(out, h * 8, w * 8, 8)
    return out.transpose(1, 2).unflatten(2, (h, w))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_outputs_and_gradients_are_those_of_diffusers(
    kind: str, shape: tuple[int, int, int, int], tmp_path: Path
) -> None:
    reference = theirs(kind)
    reference.save_pretrained(tmp_path)
    model = ours(kind, tmp_path)
    x, t, cond = drawn(model.config, shape)
    # angles above 1000, rounded to float32, move the gradients of what embeds them by more than 1e-5
    cond = replace(cond, scalars={name: value / 5 for name, value in cond.scalars.items()})
    there, here = called(reference, x, t, cond), model(x, t, cond)
    assert there.std() > 0.01
    assert_close(here, there, rtol=1e-5, atol=1e-5)
    weight = torch.randn(there.shape, generator=torch.Generator().manual_seed(2))
    (there * weight).sum().backward()
    (here * weight).sum().backward()
    assert_gradients_agree(KINDS[kind][1], model, reference)


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("kind", ["flux1", "flux2"])
@torch.no_grad()
def test_references_are_those_of_diffusers(kind: str, count: int, tmp_path: Path) -> None:
    reference = theirs(kind)
    reference.save_pretrained(tmp_path)
    model = ours(kind, tmp_path)
    x, t, cond = drawn(model.config, SHAPES[0], count)
    here = model(x, t, cond)
    assert_close(here, called(reference, x, t, cond), rtol=1e-5, atol=1e-5)
    assert torch.equal(model(x, t, model.prepare(cond, x.shape)), here)
    assert (here - model(x, t, replace(cond, references=None))).abs().max() > 1e-3
    if count == 2:  # their order is told apart
        assert cond.references is not None
        assert (here - model(x, t, replace(cond, references=cond.references.flip(1)))).abs().max() > 1e-3


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_diffusers_loads_what_we_write(kind: str, tmp_path: Path) -> None:
    network, form, _ = KINDS[kind]
    theirs(kind).save_pretrained(tmp_path / "there")
    model = ours(kind, tmp_path / "there")
    save(form, model, MEANING, tmp_path / "here")
    name = "diffusion_pytorch_model.safetensors"
    first, second = (load_file(tmp_path / side / name) for side in ("there", "here"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    back = network.from_pretrained(tmp_path / "here").eval()
    x, t, cond = drawn(model.config, SHAPES[0])
    assert_close(called(back, x, t, cond), model(x, t, cond), rtol=1e-5, atol=1e-5)


SIZES: dict[str, Any] = {
    "input_size": 8, "in_channels": 4, "hidden_size": 32, "depth": 2, "single_depth": 3, "num_heads": 2, "text_dim": 12,
}  # fmt: skip
SECOND: dict[str, Any] = {
    "patch_size": 1, "mlp_ratio": 3.0, "pooled_dim": 0, "axes": (4, 4, 4, 4), "theta": 2000.0, "reference_step": 10,
    "swiglu": True, "bias": False, "shared_modulation": True,
}  # fmt: skip
OURS: dict[str, tuple[Format, Format, FluxConfig]] = {
    "dev": (FLUX, DIFFUSERS_FLUX, FluxConfig(**SIZES, pooled_dim=10, axes=(4, 6, 6))),
    "schnell": (FLUX, DIFFUSERS_FLUX, FluxConfig(**SIZES, pooled_dim=10, axes=(4, 6, 6), guidance=False)),
    "flux2": (FLUX2, DIFFUSERS_FLUX2, FluxConfig(**SIZES, **SECOND)),
}


def official(kind: str) -> tuple[Model, dict[str, Tensor]]:
    """Random weights, and the same under the authors' names."""
    form, _, config = OURS[kind]
    model = randomised(config)
    return model, form.write(model, model.state_dict())


def converter(kind: str, dim: int) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    """diffusers' own, with the width that FLUX.1's has built in replaced."""
    if kind == "flux2":
        return single_file_utils.convert_flux2_transformer_checkpoint_to_diffusers
    source = inspect.getsource(single_file_utils.convert_flux_transformer_checkpoint_to_diffusers)
    assert source.count("inner_dim = 3072") == 1
    found: dict[str, Any] = {}
    exec(source.replace("inner_dim = 3072", f"inner_dim = {dim}"), dict(vars(single_file_utils)), found)
    return found["convert_flux_transformer_checkpoint_to_diffusers"]


@pytest.mark.parametrize("kind", OURS)
def test_the_official_names_are_those_that_diffusers_converts(kind: str) -> None:
    """Official names through diffusers' converter, and our tables of both layouts, end in the same tensors."""
    model, file = official(kind)
    converted = converter(kind, model.config.hidden_size)(dict(file))
    written = OURS[kind][1].write(model, model.state_dict())
    assert written.keys() == converted.keys()
    for key, value in written.items():
        assert torch.equal(value, converted[key]), key


@pytest.mark.parametrize("around", ["alone", "checkpoint"])
@pytest.mark.parametrize("kind", OURS)
def test_an_official_file_comes_in_and_goes_out_unchanged(kind: str, around: str, tmp_path: Path) -> None:
    """Alone, and in a checkpoint of ComfyUI with autoencoder and text encoders."""
    form, _, config = OURS[kind]
    model, file = official(kind)
    given = dict(file)
    if around == "checkpoint":
        given = {f"model.diffusion_model.{key}": value for key, value in file.items()}
        given |= {"vae.encoder.conv_in.weight": torch.ones(2, 2)}
    save_file(given, tmp_path / "in.safetensors")
    with pytest.raises(DitkitError, match=r"how its heads divide into time, row, column.*give --model\.axes"):
        read(tmp_path / "in.safetensors", FORMATS)
    found = read(tmp_path / "in.safetensors", FORMATS, options={"axes": config.axes, "input_size": 8})
    assert found.format is form
    assert found.config == config
    assert found.weights.keys() == model.state_dict().keys()
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in found.weights.items())
    save(form, model, MEANING, tmp_path / "out.safetensors")
    again = load_file(tmp_path / "out.safetensors")
    assert again.keys() == file.keys()
    assert all(torch.equal(again[key], file[key]) for key in file)


@pytest.mark.parametrize("kind", OURS)
def test_an_official_file_becomes_a_run_and_is_exported_both_ways(kind: str, tmp_path: Path) -> None:
    own, of_diffusers, config = OURS[kind]
    model, file = official(kind)
    save_file(file, tmp_path / "in.safetensors")
    run, lines = import_file(
        tmp_path / "in.safetensors", tmp_path / "run", options={"axes": config.axes, "input_size": 8}
    )
    assert lines[0].startswith(own.title)
    recipe = run.newest().recipe  # type: ignore[union-attr]
    assert (recipe.model, recipe.denoiser) == (config, MEANING)
    export_run(tmp_path / "run", "official", tmp_path / "out.safetensors")
    again = load_file(tmp_path / "out.safetensors")
    assert again.keys() == file.keys()
    assert all(torch.equal(again[key], file[key]) for key in file)
    (said, *_) = export_run(tmp_path / "run", "diffusers", tmp_path / "there")
    assert said.startswith(of_diffusers.title)
    found = read(tmp_path / "there", FORMATS, options={"input_size": 8})
    assert found.config == config
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in found.weights.items())


@pytest.mark.parametrize(
    ("kind", "change", "says"),
    [
        ("dev", {"drop": "single_blocks.2.linear1.bias"}, "lacks single_blocks.2.linear1.bias"),
        ("dev", {"single_blocks.1.linear1.weight": (200, 32)}, r"linear1\.weight is \[200, 32\], .* need \[224, 32\]"),
        ("dev", {"img_in.weight": (32, 17)}, "no patches of 2 x 2"),
        ("flux2", {"double_blocks.0.img_attn.norm.query_norm.scale": (9,)}, "no heads of 9"),
        ("flux2", {"extra.weight": (2,)}, "nothing there is called extra.weight"),
    ],
)
def test_files_that_are_wrong_are_refused(kind: str, change: dict[str, Any], says: str, tmp_path: Path) -> None:
    _, file = official(kind)
    for key, value in change.items():
        if key == "drop":
            del file[value]
        else:
            file[key] = torch.zeros(value)
    save_file(file, tmp_path / "in.safetensors")
    with pytest.raises(DitkitError, match=says) as caught:
        read(tmp_path / "in.safetensors", FORMATS, options={"axes": OURS[kind][2].axes})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "form", "change", "meaning", "says"),
    [
        ("dev", DIFFUSERS_FLUX, {"mlp_ratio": 2.0}, {}, "mlp_ratio of 4"),
        ("dev", DIFFUSERS_FLUX, {"frequencies": 64}, {}, "256 frequencies"),
        ("dev", FLUX, {}, {"clock": "1000t"}, "with the clock t, and this model was trained as velocity"),
        ("dev", FLUX2, {}, {}, "FLUX.2 has patch_size 1, and this model 2"),
        ("dev", FLUX, {"theta": 100.0}, {}, "FLUX.1 has theta 10000.0, and this model 100.0"),
        ("dev", FLUX, {"axes": (4, 4, 4, 4)}, {}, "has three axes"),
        ("flux2", FLUX2, {"axes": (4, 6, 6)}, {}, "has four axes"),
        ("flux2", FLUX2, {"pooled_dim": 4}, {}, "given no pooled text"),
        ("flux2", DIFFUSERS_FLUX2, {}, {"prediction": "-velocity"}, "trained as -velocity on"),
    ],
)
def test_what_a_layout_cannot_say_is_refused(
    kind: str, form: Format, change: dict[str, Any], meaning: dict[str, Any], says: str
) -> None:
    config = OURS[kind][2]
    assert all(own.refusal(config, MEANING) is None for own in OURS[kind][:2])
    refusal = form.refusal(replace(config, **change), replace(MEANING, **meaning))
    assert refusal is not None
    assert says in refusal
