"""MMDiT against diffusers' SD3Transformer2DModel, and Stability AI's names against diffusers' own converter."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.loaders.single_file_utils import convert_sd3_transformer_checkpoint_to_diffusers
from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.testing import assert_close

from ditkit.conditioning import Conditioning, Tokens
from ditkit.config import DitkitError
from ditkit.diffusion import Linear, Meaning
from ditkit.importing import import_file
from ditkit.interop import DIFFUSERS_SD3, FORMATS, SD3, Format, read, save
from ditkit.models import MMDiT, MMDiTConfig, Model

from ..conftest import randomised
from .carried import assert_gradients_agree, random_parameters

TINY: dict[str, Any] = {
    "sample_size": 8, "patch_size": 2, "in_channels": 4, "out_channels": 4, "num_layers": 2, "attention_head_dim": 8,
    "num_attention_heads": 4, "joint_attention_dim": 16, "caption_projection_dim": 32, "pooled_projection_dim": 12,
    "pos_embed_max_size": 12,
}  # fmt: skip
KINDS: dict[str, dict[str, Any]] = {
    "sd3": {},
    "sd35_large": {"qk_norm": "rms_norm", "num_layers": 3},
    "sd35_medium": {"qk_norm": "rms_norm", "dual_attention_layers": (0,)},
}
MEANING = Meaning(Linear(), "velocity", "1000t")
SHAPES = [(2, 8, 12, 5), (1, 24, 4, 1), (3, 6, 2, 9)]  # samples, rows, columns, tokens of text


def theirs(kind: str) -> Any:
    return random_parameters(SD3Transformer2DModel(**{**TINY, **KINDS[kind]}))


def ours(folder: Path) -> MMDiT:
    found = read(folder, FORMATS)
    assert found.format is DIFFUSERS_SD3
    assert found.denoiser == MEANING
    model = found.config.build()
    model.load_state_dict(found.weights)
    assert isinstance(model, MMDiT)
    return model.eval()


def drawn(config: Any, shape: tuple[int, int, int, int], seed: int = 1) -> tuple[Tensor, Tensor, Conditioning]:
    b, rows, columns, length = shape
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(b, config.in_channels, rows, columns, generator=generator)
    text = torch.randn(b, length, config.text_dim, generator=generator)
    pooled = torch.randn(b, config.pooled_dim, generator=generator)
    t = 1000 * torch.rand(b, generator=generator)
    return x, t, Conditioning(text=Tokens(text, torch.ones(b, length, dtype=torch.bool)), pooled=pooled)


def called(model: Any, x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
    """diffusers' network."""
    assert cond.text is not None
    return model(x, cond.text.values, cond.pooled, t, return_dict=False)[0]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_outputs_and_gradients_are_those_of_diffusers(
    kind: str, shape: tuple[int, int, int, int], tmp_path: Path
) -> None:
    reference = theirs(kind)
    reference.save_pretrained(tmp_path)
    model = ours(tmp_path)
    x, t, cond = drawn(model.config, shape)
    there, here = called(reference, x, t, cond), model(x, t, cond)
    assert there.std() > 0.01
    assert_close(here, there, rtol=1e-5, atol=1e-5)
    weight = torch.randn(there.shape, generator=torch.Generator().manual_seed(2))
    (there * weight).sum().backward()
    (here * weight).sum().backward()
    assert_gradients_agree(DIFFUSERS_SD3, model, reference)
    # time, pooled text and text are seen
    for change in (
        {"t": t + 100},
        {"cond": replace(cond, pooled=-cond.pooled)},  # type: ignore[operator]
        {"cond": replace(cond, text=replace(cond.text, values=-cond.text.values))},  # type: ignore[union-attr]
    ):
        assert (model(**{"x": x, "t": t, "cond": cond, **change}) - there).abs().max() > 1e-3, change


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_diffusers_loads_what_we_write(kind: str, tmp_path: Path) -> None:
    theirs(kind).save_pretrained(tmp_path / "there")
    model = ours(tmp_path / "there")
    save(DIFFUSERS_SD3, model, MEANING, tmp_path / "here")
    name = "diffusion_pytorch_model.safetensors"
    first, second = (load_file(tmp_path / side / name) for side in ("there", "here"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    back: Any = SD3Transformer2DModel.from_pretrained(tmp_path / "here")
    x, t, cond = drawn(model.config, SHAPES[0])
    assert_close(called(back.eval(), x, t, cond), model(x, t, cond), rtol=1e-5, atol=1e-5)
    with pytest.raises(DitkitError, match="exists already"):
        save(DIFFUSERS_SD3, model, MEANING, tmp_path / "here")


OURS = {
    "sd3": MMDiTConfig(
        input_size=8, in_channels=4, hidden_size=32, depth=3, num_heads=4, text_dim=16, pooled_dim=12, position_size=12
    ),
    "sd35_large": MMDiTConfig(
        input_size=8, in_channels=4, hidden_size=32, depth=2, num_heads=4, text_dim=16, pooled_dim=12, position_size=12,
        qk_norm=True,
    ),
    "sd35_medium": MMDiTConfig(
        input_size=8, in_channels=4, hidden_size=32, depth=3, num_heads=4, text_dim=16, pooled_dim=12, position_size=12,
        qk_norm=True, self_attention=2,
    ),
}  # fmt: skip


def official(kind: str) -> tuple[Model, dict[str, Tensor]]:
    """Random weights, and the same under Stability AI's names, with its prefix."""
    model = randomised(OURS[kind])
    with torch.no_grad():
        model.get_parameter("pos_embed").mul_(1.5)  # a published file brings its own table
    return model, SD3.write(model, model.state_dict())


@pytest.mark.parametrize("kind", OURS)
def test_the_official_names_are_those_that_diffusers_converts(kind: str) -> None:
    """Official names through diffusers' converter, and our tables of both layouts, end in the same tensors."""
    model, file = official(kind)
    assert all(key.startswith("model.diffusion_model.") for key in file)
    converted = convert_sd3_transformer_checkpoint_to_diffusers(dict(file))
    written = DIFFUSERS_SD3.write(model, model.state_dict())
    assert written.keys() == converted.keys()
    for key, value in written.items():
        assert torch.equal(value, converted[key]), key


@pytest.mark.parametrize("around", ["alone", "bare", "checkpoint"])
@pytest.mark.parametrize("kind", OURS)
def test_an_official_file_comes_in_and_goes_out_unchanged(kind: str, around: str, tmp_path: Path) -> None:
    """Alone, without its prefix as in a folder of ComfyUI, and in a checkpoint with autoencoder and text encoders."""
    model, file = official(kind)
    given = dict(file)
    if around == "bare":
        given = {key.removeprefix("model.diffusion_model."): value for key, value in file.items()}
    elif around == "checkpoint":
        given |= {"first_stage_model.conv_in.weight": torch.ones(2, 2), "text_encoders.t5xxl.a.weight": torch.ones(3)}
    save_file(given, tmp_path / "in.safetensors")
    options = {} if model.config.qk_norm else {"num_heads": 4}
    found = read(tmp_path / "in.safetensors", FORMATS, options={**options, "input_size": 8})
    assert found.format is SD3
    assert found.config == model.config
    assert found.weights.keys() == model.state_dict().keys()
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in found.weights.items())
    save(SD3, model, MEANING, tmp_path / "out.safetensors")
    again = load_file(tmp_path / "out.safetensors")
    assert again.keys() == file.keys()
    assert all(torch.equal(again[key], file[key]) for key in file)


def test_what_a_file_does_not_say_is_asked_for(tmp_path: Path) -> None:
    _, file = official("sd3")
    save_file(file, tmp_path / "in.safetensors")
    with pytest.raises(DitkitError, match=r"how many heads it has: give --model\.num-heads"):
        read(tmp_path / "in.safetensors", FORMATS)
    found = read(tmp_path / "in.safetensors", FORMATS, options={"num_heads": 4})
    assert found.config.input_size == 24  # all that its positions reach, and at most 128


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"drop": "joint_blocks.1.x_block.attn.ln_k.weight"}, "lacks joint_blocks.1.x_block.attn.ln_k.weight"),
        ({"drop": "joint_blocks.0.x_block.attn2.qkv.weight"}, r"the blocks \[1\] let the image attend to itself"),
        ({"add": "joint_blocks.2.context_block.mlp.fc1.weight"}, "nothing there is called joint_blocks.2.context"),
        ({"pos_embed": (1, 143, 32)}, "143 places, which are no square"),
        ({"final_layer.linear.weight": (32, 32)}, "makes 32 features, not the 16 of a patch"),
    ],
)
def test_files_that_are_wrong_are_refused(change: dict[str, Any], says: str, tmp_path: Path) -> None:
    _, file = official("sd35_medium")
    for key, value in change.items():
        if key == "drop":
            del file[f"model.diffusion_model.{value}"]
        else:
            name, size = (value, (2,)) if key == "add" else (key, value)
            file[f"model.diffusion_model.{name}"] = torch.zeros(size)
    save_file(file, tmp_path / "in.safetensors")
    with pytest.raises(DitkitError, match=says) as caught:
        read(tmp_path / "in.safetensors", FORMATS)
    assert "\n" not in str(caught.value)


def test_an_official_file_becomes_a_run(tmp_path: Path) -> None:
    model, file = official("sd35_large")
    save_file(file, tmp_path / "in.safetensors")
    run, lines = import_file(tmp_path / "in.safetensors", tmp_path / "run", options={"input_size": 8})
    assert "Stable Diffusion 3" in lines[0]
    recipe = run.newest().recipe  # type: ignore[union-attr]
    assert (recipe.model, recipe.denoiser) == (model.config, MEANING)


@pytest.mark.parametrize(
    ("form", "change", "meaning", "says"),
    [
        (DIFFUSERS_SD3, {"mlp_ratio": 2.0}, {}, "mlp_ratio of 4, not 2"),
        (SD3, {}, {"clock": "t"}, "with the clock 1000t, and this model was trained as velocity"),
        (DIFFUSERS_SD3, {}, {"prediction": "x0"}, "trained as x0 on"),
    ],
)
def test_what_a_layout_cannot_say_is_refused(form: Format, change: dict, meaning: dict, says: str) -> None:
    right = MEANING
    assert form.refusal(OURS["sd3"], right) is None
    refusal = form.refusal(replace(OURS["sd3"], **change), replace(right, **meaning))
    assert refusal is not None
    assert says in refusal
