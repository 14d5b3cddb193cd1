"""PixArt and Sana against diffusers' networks, and the authors' names against diffusers' through our tables."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.transformers.pixart_transformer_2d import PixArtTransformer2DModel
from diffusers.models.transformers.sana_transformer import SanaTransformer2DModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.testing import assert_close

from ditkit.conditioning import Conditioning, Tokens
from ditkit.config import DitkitError
from ditkit.diffusion import DDPM, Linear, Meaning
from ditkit.exporting import export_run
from ditkit.importing import import_file
from ditkit.interop import DIFFUSERS_PIXART, DIFFUSERS_SANA, FORMATS, PIXART, SANA, Format, read, save
from ditkit.models import Model, PixArtConfig, SanaConfig

from ..conftest import randomised
from .carried import assert_gradients_agree, random_parameters

PIXART_TINY: dict[str, Any] = {
    "num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4, "out_channels": 8, "num_layers": 2,
    "cross_attention_dim": 24, "sample_size": 8, "patch_size": 2, "caption_channels": 12,
    "use_additional_conditions": False,
}  # fmt: skip
SANA_TINY: dict[str, Any] = {
    "in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 2,
    "num_cross_attention_heads": 4, "cross_attention_head_dim": 4, "cross_attention_dim": 16, "caption_channels": 12,
    "sample_size": 8, "patch_size": 1,
}  # fmt: skip
KINDS: dict[str, tuple[type, Format, dict[str, Any]]] = {
    "sigma": (PixArtTransformer2DModel, DIFFUSERS_PIXART, PIXART_TINY),
    "sigma, scaled positions": (PixArtTransformer2DModel, DIFFUSERS_PIXART, {**PIXART_TINY, "interpolation_scale": 2}),
    "alpha": (
        PixArtTransformer2DModel,
        DIFFUSERS_PIXART,
        {**PIXART_TINY, "use_additional_conditions": True, "out_channels": 4, "num_layers": 3},
    ),
    "sana": (SanaTransformer2DModel, DIFFUSERS_SANA, SANA_TINY),
    "sana in patches": (SanaTransformer2DModel, DIFFUSERS_SANA, {**SANA_TINY, "patch_size": 2, "mlp_ratio": 2.0}),
    "sprint": (
        SanaTransformer2DModel,
        DIFFUSERS_SANA,
        {**SANA_TINY, "qk_norm": "rms_norm_across_heads", "guidance_embeds": True},
    ),
}
SHAPES = [(2, 8, 12, 5), (1, 24, 4, 1), (3, 6, 2, 9)]  # samples, rows, columns, tokens of text


def theirs(kind: str) -> Any:
    cls, _, options = KINDS[kind]
    return random_parameters(cls(**options))


def ours(folder: Path, form: Format) -> Model:
    found = read(folder, FORMATS)
    assert found.format is form
    model = found.config.build()
    model.load_state_dict(found.weights)
    return model.eval()


def drawn(config: Any, shape: tuple[int, int, int, int], seed: int = 1) -> tuple[Tensor, Tensor, Conditioning]:
    """Row i has one token of text fewer than the row before, and something else in the padding."""
    b, rows, columns, length = shape
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(b, config.in_channels, rows, columns, generator=generator)
    text = torch.randn(b, length, config.text_dim, generator=generator)
    mask = torch.arange(length) < (length - torch.arange(b)).clamp(min=1)[:, None]
    scalars = {
        name: 1 + 5 * torch.rand(of.shape, generator=generator) for name, of in config.example(b).scalars.items()
    }
    t = 100 * torch.rand(
        b, generator=generator
    )  # where float32 rounds angles to 1e-5: later only outputs agree so well
    return x, t, Conditioning(text=Tokens(text, mask), scalars=scalars)


def called(model: Any, x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
    """diffusers' network. Its pipeline multiplies the guidance scale by 0.1."""
    assert cond.text is not None
    if isinstance(model, PixArtTransformer2DModel):
        sizes: Any = {name: cond.scalars.get(name) for name in ("resolution", "aspect_ratio")}
        return model(
            x,
            cond.text.values,
            t,
            added_cond_kwargs=sizes,
            encoder_attention_mask=cond.text.mask,
            return_dict=False,
        )[0]
    guidance = cond.scalars.get("guidance")
    return model(
        x,
        cond.text.values,
        t,
        guidance=None if guidance is None else 0.1 * guidance,
        encoder_attention_mask=cond.text.mask,
        return_dict=False,
    )[0]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_outputs_and_gradients_are_those_of_diffusers(
    kind: str, shape: tuple[int, int, int, int], tmp_path: Path
) -> None:
    reference = theirs(kind)
    reference.save_pretrained(tmp_path)
    model = ours(tmp_path, KINDS[kind][1])
    x, t, cond = drawn(model.config, shape)
    there, here = called(reference, x, t, cond), model(x, t, cond)
    assert there.std() > 0.01
    assert_close(here, there, rtol=1e-5, atol=1e-5)
    weight = torch.randn(there.shape, generator=torch.Generator().manual_seed(2))
    (there * weight).sum().backward()
    (here * weight).sum().backward()
    assert_gradients_agree(KINDS[kind][1], model, reference)
    # time, also late, and numbers are seen
    late = model(x, t + 899, cond)
    assert_close(late, called(reference, x, t + 899, cond), rtol=1e-5, atol=1e-5)
    assert (late - there).abs().max() > 1e-4
    for name, value in cond.scalars.items():
        assert (model(x, t, replace(cond, scalars={**cond.scalars, name: 2 * value})) - there).abs().max() > 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_folders_are_written_as_diffusers_writes_them(kind: str, tmp_path: Path) -> None:
    """With the same tensors, and a config.json from which diffusers builds the same network."""
    cls, form, _ = KINDS[kind]
    reference = theirs(kind)
    reference.save_pretrained(tmp_path / "there")
    found = read(tmp_path / "there", FORMATS)
    save(form, ours(tmp_path / "there", form), found.denoiser, tmp_path / "back")
    name = "diffusion_pytorch_model.safetensors"
    first, second = (load_file(tmp_path / folder / name) for folder in ("there", "back"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    loaded: Any = cls.from_pretrained(tmp_path / "back")  # type: ignore[attr-defined]
    x, t, cond = drawn(found.config, SHAPES[0])
    assert torch.equal(called(loaded.eval(), x, t, cond), called(reference, x, t, cond))
    assert read(tmp_path / "back", FORMATS).config == found.config


NULL = "y_embedder.y_embedding"
RELEASES: dict[str, tuple[Format, Any, set[str]]] = {
    "sigma": (
        PIXART,
        PixArtConfig(input_size=8, hidden_size=24, depth=2, num_heads=2, text_dim=12, position_scale=0.125),
        {"y_embedder.y_proj.fc1.weight", "t_block.1.bias", "blocks.1.cross_attn.kv_linear.weight",
         "blocks.0.cross_attn.proj.bias", "blocks.0.scale_shift_table", "final_layer.scale_shift_table"},
    ),
    "alpha": (
        PIXART,
        PixArtConfig(
            input_size=8, hidden_size=24, depth=2, num_heads=2, text_dim=12, position_scale=0.125, sizes=True
        ),
        {"csize_embedder.mlp.0.weight", "ar_embedder.mlp.2.bias", "blocks.0.cross_attn.q_linear.weight"},
    ),
    "sprint": (
        SANA,
        SanaConfig(
            input_size=8, in_channels=4, hidden_size=16, depth=2, num_heads=2, cross_heads=2, text_dim=12,
            qk_norm=True, guidance=True,
        ),
        {"attention_y_norm.weight", "cfg_embedder.mlp.0.weight", "blocks.0.mlp.inverted_conv.conv.weight",
         "blocks.1.mlp.point_conv.conv.weight", "blocks.0.cross_attn.k_norm.weight", "blocks.0.attn.q_norm.weight"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", RELEASES)
def test_the_authors_files_are_read_and_written_bit_for_bit(kind: str, tmp_path: Path) -> None:
    """Their names are those of the release; what guides with no caption, and positions, may lie beside."""
    form, config, known = RELEASES[kind]
    model = randomised(config)
    weights = form.write(model, model.state_dict())
    assert known <= weights.keys()
    assert not any(".conv.conv" in key or "cross.q" in key for key in weights)
    length = 120 if kind == "alpha" else 300
    torch.save({"state_dict": {**weights, NULL: torch.randn(length, 12)}}, tmp_path / "release.pth")
    options = {"num_heads": 2, "cross_heads": 2, "input_size": 8}
    with pytest.raises(DitkitError, match=r"no published size.*--model\.num-heads"):
        read(tmp_path / "release.pth", FORMATS)
    found = read(tmp_path / "release.pth", FORMATS, options=options)
    assert found.format is form
    assert found.config == replace(config, **({"text_length": length} if form is PIXART else {}))
    assert all(torch.equal(found.weights[key], value) for key, value in model.state_dict().items())
    save(form, model, found.denoiser, tmp_path / "back.safetensors")
    back = load_file(tmp_path / "back.safetensors")
    assert back.keys() == weights.keys()
    assert all(torch.equal(back[key], weights[key]) for key in back)


def test_what_the_outputs_mean() -> None:
    eps, flow = Meaning(DDPM(), "eps", "index"), Meaning(Linear(), "velocity", "1000t")
    sprint = SanaConfig(qk_norm=True, guidance=True)
    for form, config, meaning in (
        (PIXART, PixArtConfig(), eps),
        (DIFFUSERS_PIXART, PixArtConfig(), eps),
        (SANA, SanaConfig(), flow),
        (DIFFUSERS_SANA, SanaConfig(), flow),
        (SANA, sprint, Meaning(Linear(), "velocity", "t")),
    ):
        assert form.refusal(config, meaning) is None
        other = flow if meaning != flow else eps
        assert "this model was trained as" in str(form.refusal(config, other))
    assert "squares only, not 8 x 4" in str(DIFFUSERS_PIXART.refusal(PixArtConfig(input_size=(8, 4)), eps))
    assert "squares only, not 8 x 4" in str(DIFFUSERS_SANA.refusal(SanaConfig(input_size=(8, 4)), flow))
    assert "mlp_ratio of 4, not 2" in str(DIFFUSERS_PIXART.refusal(PixArtConfig(mlp_ratio=2.0), eps))


def test_the_rotation_of_sprint_s_program_is_the_linear_path() -> None:
    """TrigFlow's x = cos(a) x0 + sin(a) z, seen by the network after division by cos + sin, is the linear path's x at
    t = sin / (cos + sin); what the program makes of the network's velocity is TrigFlow's, -sin(a) x0 + cos(a) z."""
    generator = torch.Generator().manual_seed(0)
    x0, z = torch.randn(2, 50, generator=generator, dtype=torch.float64).unbind(0)
    for angle in (0.3, 1.0, 1.5):
        a = torch.tensor(angle, dtype=torch.float64)
        t = a.sin() / (a.cos() + a.sin())
        norm = (t**2 + (1 - t) ** 2).sqrt()
        seen = (a.cos() * x0 + a.sin() * z) * norm
        assert_close(seen, (1 - t) * x0 + t * z)
        rotated = ((1 - 2 * t) * seen + (1 - 2 * t + 2 * t**2) * (z - x0)) / norm
        assert_close(rotated, a.cos() * z - a.sin() * x0)


@pytest.mark.parametrize("kind", ["sigma", "sana"])
def test_a_folder_becomes_a_run(kind: str, tmp_path: Path) -> None:
    theirs(kind).save_pretrained(tmp_path / "there")
    run, lines = import_file(tmp_path / "there", tmp_path / "run")
    assert KINDS[kind][1].title in lines[0]
    newest = run.newest()
    assert newest is not None
    assert newest.recipe.denoiser == read(tmp_path / "there", FORMATS).denoiser
    # and the run either layout again
    export_run(run.folder, "diffusers", tmp_path / "back")
    export_run(run.folder, "official", tmp_path / "official.safetensors")
    name = "diffusion_pytorch_model.safetensors"
    first, second = (load_file(tmp_path / folder / name) for folder in ("there", "back"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    options = {"num_heads": 2, "cross_heads": 4, "input_size": 8}
    again = read(tmp_path / "official.safetensors", FORMATS, options=options)
    assert again.format is {"sigma": PIXART, "sana": SANA}[kind]
    assert all(torch.equal(again.weights[key], value) for key, value in newest.tensors("model").items())


@pytest.mark.parametrize(
    ("kind", "change", "says"),
    [
        ("sigma", {"activation_fn": "geglu"}, "activation_fn is 'geglu'; only 'gelu-approximate' is a PixArt"),
        ("sigma", {"num_attention_heads": 3}, "3 heads of 12 channels are not the 24 of the weights"),
        ("sigma", {"interpolation_scale": "two"}, "interpolation_scale is 'two', not a number"),
        ("sana", {"qk_norm": "layer_norm"}, "qk_norm 'layer_norm' .* is no Sana"),
        ("sana", {"interpolation_scale": 2.0}, "interpolation_scale is 2.0; only None is a Sana"),
        ("sana", {"cross_attention_head_dim": 8}, "4 heads of 8 channels are not the 16 of the weights"),
    ],
)
def test_settings_that_are_not_supported_are_named(kind: str, change: dict, says: str, tmp_path: Path) -> None:
    theirs(kind).save_pretrained(tmp_path)
    said = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**said, **change}))
    with pytest.raises(DitkitError, match=says):
        read(tmp_path, FORMATS)


def test_a_file_without_its_folder_is_refused(tmp_path: Path) -> None:
    for kind in ("sigma", "sana"):
        save_file(theirs(kind).state_dict(), tmp_path / "alone.safetensors")
        with pytest.raises(DitkitError, match="give the folder, not the file"):
            read(tmp_path / "alone.safetensors", FORMATS)
