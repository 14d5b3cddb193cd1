"""Kandinsky 5 against diffusers' Kandinsky5Transformer3DModel: outputs and gradients, weights over and back."""

from __future__ import annotations

import json
import types
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.autoencoders.autoencoder_kl_hunyuan_video import AutoencoderKLHunyuanVideo
from diffusers.models.transformers import transformer_kandinsky as reference
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.testing import assert_close

from ditkit.cli import main
from ditkit.codecs import Autoencoder
from ditkit.conditioning import Conditioning, Tokens
from ditkit.config import DitkitError
from ditkit.diffusion import Linear, Meaning
from ditkit.diffusion.grid import SD3
from ditkit.exporting import export_run
from ditkit.importing import import_file
from ditkit.interop import FORMATS, KANDINSKY5, kandinsky5_settings, read, save
from ditkit.interop import SD3 as SD3_FILE
from ditkit.interop.table import read_table
from ditkit.layers import Nabla, SlidingTiles
from ditkit.models import Kandinsky5, Kandinsky5Config, create_model
from ditkit.pipeline import load
from ditkit.rng import Rng

COMMON: dict[str, Any] = {
    "in_visual_dim": 4, "out_visual_dim": 4, "in_text_dim": 20, "in_text_dim2": 12, "time_dim": 32,
    "patch_size": (1, 2, 2), "model_dim": 48, "ff_dim": 96, "axes_dims": (4, 6, 6),
}  # fmt: skip
# config of theirs; frames, rows and columns of x; text length; scale factors
CASES: list[tuple[dict[str, Any], tuple[int, int, int], int, tuple[float, float, float]]] = [
    ({"num_text_blocks": 1, "num_visual_blocks": 2, "visual_cond": True}, (3, 8, 12), 7, (1.0, 2.0, 2.0)),
    ({"num_text_blocks": 2, "num_visual_blocks": 1, "visual_cond": False}, (1, 10, 4), 3, (1.0, 1.0, 1.0)),
    ({"num_text_blocks": 2, "num_visual_blocks": 3, "visual_cond": True}, (5, 2, 6), 12, (1.0, 3.16, 3.16)),
]
SPARSE = {"num_text_blocks": 1, "num_visual_blocks": 2, "visual_cond": True}


class InFloat32(types.ModuleType):
    """torch, but for bfloat16: their attention rounds q and k to it after the rotation, whatever the model is."""

    bfloat16 = torch.float32

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


@pytest.fixture(autouse=True)
def in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "torch", InFloat32("torch"))


def theirs(seed: int = 0, **config: Any) -> Any:
    """Their network with random weights, all of them."""
    model = reference.Kandinsky5Transformer3DModel(**COMMON, **config).eval()
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        p.data = (1.0 if name.endswith("norm.weight") else 0.0) + 0.08 * torch.randn(p.shape, generator=generator)
    return model


def read_from(model: Any, folder: Path) -> Kandinsky5:
    model.save_pretrained(folder)
    found = read(folder, FORMATS)
    assert found.format is KANDINSKY5
    assert found.denoiser == Meaning(Linear(), "velocity", "1000t")
    own = found.config.build().eval()
    own.load_state_dict(found.weights)
    return own


def given(size: tuple[int, int, int], length: int, channels: int, b: int = 2) -> tuple[Tensor, Tensor, Conditioning]:
    """x and its channels, times, text without padding, a pooled vector."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(b, channels, *size, generator=generator)
    text = Tokens(torch.randn(b, length, 20, generator=generator), torch.ones(b, length, dtype=torch.bool))
    cond = Conditioning(
        text=text,
        pooled=torch.randn(b, 12, generator=generator),
        channels=x[:, 4:] if channels > 4 else None,
    )
    return x, torch.tensor([10.0, 730.0])[:b], cond


def call(model: Any, x: Tensor, t: Tensor, cond: Conditioning, scale: Any, sparse: Any = None) -> Tensor:
    """Theirs takes [b t h w c], with all channels joined."""
    assert cond.text is not None
    frames, rows, columns = x.shape[2], x.shape[3] // 2, x.shape[4] // 2
    out = model(
        hidden_states=x.permute(0, 2, 3, 4, 1),
        encoder_hidden_states=cond.text.values,
        timestep=t,
        pooled_projections=cond.pooled,
        visual_rope_pos=[torch.arange(frames), torch.arange(rows), torch.arange(columns)],
        text_rope_pos=torch.arange(cond.text.mask.shape[1]),
        scale_factor=scale,
        sparse_params=sparse,
        return_dict=False,
    )
    return out.permute(0, 4, 1, 2, 3)


def compare(own: Kandinsky5, model: Any, x: Tensor, t: Tensor, cond: Conditioning, scale: Any, sparse: Any) -> None:
    """Outputs, and the gradients of every parameter."""
    weight = torch.randn(x[:, :4].shape, generator=torch.Generator().manual_seed(9))
    there = call(model, x, t, cond, scale, sparse)
    here = own(x[:, :4], t, cond)
    assert float(there.std()) > 0.1
    assert_close(here, there, rtol=1e-5, atol=1e-5)
    (there * weight).sum().backward()
    (here * weight).sum().backward()
    wanted = {name: p.grad for name, p in model.named_parameters()}
    table = KANDINSKY5.pairs(own)
    assert sorted(pair.theirs[0] for pair in table) == sorted(wanted)
    for pair in table:
        gradient = wanted[pair.theirs[0]]
        assert gradient is not None
        assert bool(gradient.any()), pair.theirs
        size = float(gradient.abs().max())
        assert_close(own.get_parameter(pair.ours).grad, gradient, rtol=1e-4, atol=1e-4 * size, msg=pair.ours)


@pytest.mark.parametrize("case", range(len(CASES)))
def test_outputs_and_gradients_are_theirs(case: int, tmp_path: Path) -> None:
    config, size, length, scale = CASES[case]
    model = theirs(**config)
    own = read_from(model, tmp_path)
    x, t, cond = given(size, length, 9 if config["visual_cond"] else 4)
    scales = torch.tensor([scale, scale])
    compare(own, model, x, t, replace(cond, scalars={"scale_factor": scales}), scale, None)


def test_nabla_is_theirs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their lists of blocks, read back as a dense mask: on a CPU their own attention fails on them."""

    def attention(q: Tensor, k: Tensor, v: Tensor, attn_mask: Any = None, **_: Any) -> Tensor:
        mask = None
        if attn_mask is not None:
            counts, places = attn_mask.full_kv_num_blocks, attn_mask.full_kv_indices
            kept = torch.zeros(places.shape, dtype=torch.bool)
            for index in torch.ones(counts.shape).nonzero().tolist():
                kept[(*index, places[tuple(index)][: int(counts[tuple(index)])].long())] = True
            assert 0.2 < float(kept.float().mean()) < 0.9
            mask = kept.repeat_interleave(64, -1).repeat_interleave(64, -2)
        q, k, v = (y.transpose(1, 2) for y in (q, k, v))
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2)

    monkeypatch.setattr(reference, "dispatch_attention_fn", attention)
    nabla = {"attention_P": 0.4, "attention_wT": 3, "attention_wH": 1, "attention_wW": 1, "attention_add_sta": True}
    model = theirs(**SPARSE, attention_type="nabla", **nabla)
    own = read_from(model, tmp_path)
    assert own.config.pattern == Nabla(0.4, (3, 1, 1))
    x, t, cond = given((3, 32, 32), 5, 9, b=1)
    x = 3 * x
    frame = torch.arange(12) // 4
    near = ((frame[:, None] - frame).abs() <= 1) & (torch.arange(12)[:, None] % 4 == torch.arange(12) % 4)
    sparse = {"sta_mask": near[None, None], "to_fractal": True, "P": 0.4}
    cond = replace(cond, channels=x[:, 4:])
    compare(own, model, x, t, cond, (1.0, 2.0, 2.0), sparse)


def test_their_padding_is_seen_and_ours_is_not(tmp_path: Path) -> None:
    """What the mask is for: with zeros behind the text their output moves, ours does not."""
    model = theirs(**CASES[0][0])
    own = read_from(model, tmp_path)
    x, t, cond = given((3, 8, 12), 7, 9)
    assert cond.text is not None
    padded = replace(cond, text=cond.text.padded(11))
    with torch.no_grad():
        assert (
            call(model, x, t, padded, (1.0, 2.0, 2.0)) - call(model, x, t, cond, (1.0, 2.0, 2.0))
        ).abs().max() > 1e-3
        assert_close(own(x[:, :4], t, padded), own(x[:, :4], t, cond), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", range(len(CASES)))
def test_weights_go_over_and_back_bit_for_bit(case: int, tmp_path: Path) -> None:
    """Out into their layout, into their class, back from their file; and an official file of weights alone."""
    config = CASES[case][0]
    own = read_from(theirs(**config), tmp_path / "one")
    weights = KANDINSKY5.write(own, own.state_dict())
    (tmp_path / "two").mkdir()
    save_file(weights, tmp_path / "two" / "diffusion_pytorch_model.safetensors", {"format": "pt"})
    (tmp_path / "two" / "config.json").write_text(json.dumps(kandinsky5_settings(own.config)))
    again: Any = reference.Kandinsky5Transformer3DModel.from_pretrained(tmp_path / "two")
    for name, value in theirs(**config).state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    back = read(tmp_path / "two", FORMATS)
    assert back.config == own.config
    save_file(weights, tmp_path / "official.safetensors")
    official = read(tmp_path / "official.safetensors", FORMATS, options={"axes": (4, 6, 6)})
    assert official.config == own.config
    for found in (back.weights, official.weights):
        for name, value in own.state_dict().items():
            assert torch.equal(found[name], value), name


def test_the_pattern_travels_with_the_settings_of_diffusers(tmp_path: Path) -> None:
    base = Kandinsky5Config(
        in_channels=4, hidden_size=48, ff_dim=96, time_dim=32, text_depth=1, depth=1, axes=(4, 6, 6), text_dim=20,
        pooled_dim=12,
    )  # fmt: skip
    for pattern in (None, Nabla(0.7, (11, 3, 5)), Nabla(0.8, None)):
        own = replace(base, pattern=pattern).build()
        folder = tmp_path / str(hash(pattern))
        folder.mkdir()
        save_file(KANDINSKY5.write(own, own.state_dict()), folder / "diffusion_pytorch_model.safetensors")
        (folder / "config.json").write_text(json.dumps(kandinsky5_settings(own.config)))
        reference.Kandinsky5Transformer3DModel.from_pretrained(folder)
        assert read(folder, FORMATS).config == own.config


def test_released_heads_are_known_and_others_are_asked_for(tmp_path: Path) -> None:
    own = Kandinsky5Config(
        in_channels=2, hidden_size=64, ff_dim=8, time_dim=8, text_depth=1, depth=1, text_dim=4, pooled_dim=4,
        input_size=(1, 128, 128), given_channels=False, scale_factor=(1.0, 1.0, 1.0),
    ).build()  # fmt: skip
    save_file(KANDINSKY5.write(own, own.state_dict()), tmp_path / "image.safetensors")
    assert read(tmp_path / "image.safetensors", FORMATS).config == own.config
    other = replace(own.config, axes=(4, 2, 2)).build()
    save_file(KANDINSKY5.write(other, other.state_dict()), tmp_path / "other.safetensors")
    with pytest.raises(DitkitError, match=r"how a head is divided among the axes: give --model\.axes"):
        read(tmp_path / "other.safetensors", FORMATS)
    with pytest.raises(DitkitError, match=r"do not fit heads of 8 channels"):
        read(tmp_path / "other.safetensors", FORMATS, options={"axes": (4, 4, 4)})
    with pytest.raises(DitkitError, match="neither x alone nor x with a latent and a mask"):
        read(tmp_path / "other.safetensors", FORMATS, options={"axes": (4, 2, 2), "patch_size": (1, 3, 2)})


def test_what_the_layout_cannot_say_is_refused() -> None:
    config, meaning = Kandinsky5Config(), Meaning(Linear(), "velocity", "1000t")
    assert KANDINSKY5.refusal(config, meaning) is None
    assert KANDINSKY5.refusal(replace(config, pattern=Nabla()), meaning) is None
    assert "clock t" in str(KANDINSKY5.refusal(config, replace(meaning, clock="t")))
    for pattern in (SlidingTiles(), Nabla(tile=(1, 4, 4))):
        assert "tiles of 1 x 8 x 8 alone" in str(KANDINSKY5.refusal(replace(config, pattern=pattern), meaning))


def test_read_table_is_the_inverse_of_write_table() -> None:
    own = Kandinsky5Config(
        in_channels=4, hidden_size=48, ff_dim=96, time_dim=32, depth=2, axes=(4, 6, 6), text_dim=20, pooled_dim=12
    ).build()
    state = own.state_dict()
    shapes = {name: tuple(value.shape) for name, value in state.items()}
    back = read_table(KANDINSKY5.pairs(own), KANDINSKY5.write(own, state), shapes)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], state[name]) for name in state)


# pipelines as runs


VIDEO: dict[str, Any] = {"block_out_channels": (4,) * 4, "layers_per_block": 1, "norm_num_groups": 2}
IMAGE: dict[str, Any] = {
    "down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2,
    "block_out_channels": (8, 16), "norm_num_groups": 4, "scaling_factor": 0.3611, "shift_factor": 0.1159,
}  # fmt: skip
SIZE = {"videos": (3, 4, 2), "images": (1, 8, 6)}


def published(kind: str, folder: Path) -> tuple[Any, Any]:
    """The network and the autoencoder of a pipeline, in its folder."""
    model = theirs(**CASES[kind == "images"][0])
    model.save_pretrained(folder / "transformer")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vae: Any = AutoencoderKL(**IMAGE) if kind == "images" else AutoencoderKLHunyuanVideo(**VIDEO, latent_channels=4)
    vae.save_pretrained(folder / "vae")
    return model, vae.eval()


@pytest.mark.parametrize("kind", SIZE)
@torch.no_grad()
def test_a_pipeline_becomes_a_run_that_samples_and_goes_back(kind: str, tmp_path: Path) -> None:
    model, vae = published(kind, tmp_path / "pipe")
    run, lines = import_file(tmp_path / "pipe", tmp_path / "run", options={"input_size": SIZE[kind]})
    assert "it is given text [n 256 20], pooled [n 12], and no encoder that makes it is here" in lines[-1]
    recipe = run.recipe()
    image = kind == "images"
    fields = {"one_frame": True, "shift": 0.0} if image else {}
    assert recipe.codec == Autoencoder.of(tmp_path / "pipe" / "vae", **fields)
    assert (recipe.codec.frames, recipe.codec.shift) == (None if image else 4, 0.0)
    assert (recipe.denoiser, recipe.model.given_channels) == (Meaning(Linear(), "velocity", "1000t"), not image)
    assert recipe.sample.grid == SD3(3.0 if image else 10.0)

    pipeline = load(run.folder, device="cpu")
    generator = torch.Generator().manual_seed(6)
    text = Tokens(torch.randn(2, 7, 20, generator=generator), torch.ones(2, 7, dtype=torch.bool))
    cond = Conditioning(text=text, pooled=torch.randn(2, 12, generator=generator))
    samples = pipeline.sample(count=2, steps=2, seed=4, embeddings=cond)
    assert samples.shape == ((2, 3, 16, 12) if image else (2, 3, 9, 32, 16))
    # the same by hand: Euler's two steps with their network, their autoencoder
    x = pipeline.denoiser.prior(Rng(4).at(0, torch.arange(2)), recipe.model.shape)
    shift = 3.0 if image else 10.0
    middle = shift / 2 / (1 + (shift - 1) / 2)
    for t, s in ((1.0, middle), (middle, 0.0)):
        given = x if image else torch.cat((x, torch.zeros_like(x), torch.zeros_like(x[:, :1])), 1)
        x = x + (s - t) * call(model, given, torch.full((2,), 1000 * t), cond, recipe.model.scale_factor)
    z = x / vae.config.scaling_factor
    wanted = vae.decode(z[:, :, 0] if image else z).sample * 127.5 + 127.5
    assert wanted.std() > 3
    assert_close(samples.float(), wanted.clamp(0, 255), rtol=0, atol=0.51)  # half a byte is rounded

    export_run(run.folder, "diffusers", tmp_path / "there")
    again: Any = reference.Kandinsky5Transformer3DModel.from_pretrained(tmp_path / "there")
    said, first = ({k: v for k, v in json.loads(m.to_json_string()).items() if k[0] != "_"} for m in (again, model))
    assert said == first
    export_run(run.folder, "official", tmp_path / "official.safetensors")
    for back in (again.state_dict(), load_file(tmp_path / "official.safetensors")):
        assert back.keys() == model.state_dict().keys()
        assert all(torch.equal(back[name], value) for name, value in model.state_dict().items())


def test_a_transformer_and_its_autoencoder_on_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, _ = published("videos", tmp_path / "pipe")
    save_file(model.state_dict(), tmp_path / "lite.safetensors")
    vae, out = str(tmp_path / "pipe" / "vae"), str(tmp_path / "run")
    words = ["import", str(tmp_path / "lite.safetensors"), "--autoencoder", vae, "--model.axes", "4", "6", "6"]
    assert main([*words, "--model.input-size", "2", "4", "2", "--out", out]) == 0
    texts = str(tmp_path / "texts.safetensors")
    save_file({"text": torch.randn(1, 7, 20), "pooled": torch.randn(1, 12)}, texts)
    sample = ["sample", out, "--count", "2", "--steps", "2", "--out", str(tmp_path / "two.gif")]
    assert main([*sample, "--embeddings", texts]) == 0
    assert (tmp_path / "two.gif").read_bytes().startswith(b"GIF")
    capsys.readouterr()
    for size in (["4", "2"], ["1", "2", "4", "2"]):
        assert main([*words, "--model.input-size", *size, "--out", str(tmp_path / "no")]) == 1
        error = capsys.readouterr().err
        assert "FRAMES ROWS COLUMNS" in error
        assert error.count("\n") == 1


def test_an_autoencoder_of_another_kind_is_refused(tmp_path: Path) -> None:
    for kind in SIZE:
        published(kind, tmp_path / kind)
    AutoencoderKLHunyuanVideo(**VIDEO).save_pretrained(tmp_path / "wide")
    for kind, other, says in (
        ("videos", "images/vae", "is an autoencoder of images, and the model draws videos"),
        ("images", "videos/vae", "is an autoencoder of videos, and the model draws images"),
        ("videos", "wide", "makes latents of 16 channels, and the model takes 4"),
    ):
        with pytest.raises(DitkitError, match=says):
            import_file(tmp_path / kind, tmp_path / "run", autoencoder=str(tmp_path / other))
        assert not (tmp_path / "run").exists()
    meaning = Meaning(Linear(), "velocity", "1000t")
    save(SD3_FILE, create_model("mmdit_tiny"), meaning, tmp_path / "sd3.safetensors")
    with pytest.raises(DitkitError, match=r"sd3, whose --model\.input-size is one side, or ROWS COLUMNS, not"):
        read(tmp_path / "sd3.safetensors", FORMATS, options={"num_heads": 4, "input_size": (1, 8, 8)})
    with pytest.raises(DitkitError, match="is an autoencoder of videos, and the model draws images"):
        import_file(
            tmp_path / "sd3.safetensors", tmp_path / "run", autoencoder=str(tmp_path / "wide"), options={"num_heads": 4}
        )


def test_the_network_that_edits_images_is_known_by_its_autoencoder(tmp_path: Path) -> None:
    """It is given a latent and a mask, as networks of videos are; and it may come alone."""
    model = theirs(**CASES[0][0])
    model.save_pretrained(tmp_path / "edit" / "transformer")
    AutoencoderKL(**IMAGE).save_pretrained(tmp_path / "edit" / "vae")
    recipe = import_file(tmp_path / "edit", tmp_path / "one")[0].recipe()
    assert (recipe.model.input_size, recipe.model.scale_factor) == ((1, 128, 128), (1.0, 1.0, 1.0))
    assert (recipe.model.given_channels, recipe.codec.one_frame, recipe.sample.grid) == (True, True, SD3(3.0))
    model.save_pretrained(tmp_path / "alone")
    run, lines = import_file(tmp_path / "alone", tmp_path / "two")
    assert run.recipe().codec == Autoencoder("", channels=4)
    assert run.recipe().model.input_size == (31, 64, 96)
    assert any("give its own autoencoder" in line for line in lines)
