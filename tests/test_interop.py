"""Published files: what is recognised, that both ways are exact, and that a bad file is only ever a clear error."""

from __future__ import annotations

import argparse
import io
import json
import os
import pickle
import struct
import subprocess
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch._utils import _rebuild_tensor_v2

from ditkit.config import DitkitError
from ditkit.diffusion import DDPM, Linear, Meaning
from ditkit.exporting import export_run
from ditkit.importing import import_file
from ditkit.interop import DIFFUSERS, DIT, FORMATS, JIT, SIT, Found, diffusers_settings, meta, read, size_name
from ditkit.interop.source import Source
from ditkit.models import DiTConfig, JiTConfig, UNetConfig, create_model, model_config
from ditkit.pipeline import load
from ditkit.recipe import Recipe
from ditkit.runs import Run, find_checkpoint

from .conftest import Command, randomised

DIT_TINY = DiTConfig(input_size=4, patch_size=2, hidden_size=16, depth=2, num_heads=2, num_classes=3)
JIT_TINY = JiTConfig(
    input_size=8, patch_size=4, hidden_size=16, depth=3, num_heads=2, num_classes=3, bottleneck_dim=4, in_context_len=2,
    in_context_start=1,
)  # fmt: skip
ADM_TINY = UNetConfig(
    input_size=16, model_channels=32, channel_mult=(1, 1), num_res_blocks=1, attention_resolutions=(2,), num_heads=2,
    num_head_channels=0, num_classes=3, null_label=False,
)  # fmt: skip
HEADS = {"num_heads": 2}
START = {"in_context_start": 1}


def state(config: Any, seed: int = 0, prefix: str = "") -> dict[str, Tensor]:
    """A state dict as an author's `torch.save` would find it: an OrderedDict with `_metadata`."""
    found = randomised(config, seed).state_dict()
    out = OrderedDict((prefix + key, value.clone()) for key, value in found.items())
    out._metadata = getattr(found, "_metadata", None)  # type: ignore[attr-defined]
    return out


def dit_training_file(path: Path) -> Path:
    """What DiT's train.py saves."""
    model = randomised(DIT_TINY, 0)
    optimizer = torch.optim.AdamW(model.parameters())
    sum(p.sum() for p in model.parameters() if p.requires_grad).backward()  # type: ignore[union-attr]
    optimizer.step()
    saved = {
        "model": state(DIT_TINY, 0),
        "ema": state(DIT_TINY, 1),
        "opt": optimizer.state_dict(),
        "args": argparse.Namespace(model="DiT-XL/2", image_size=256, results=Path("results"), ckpt=None),
    }
    torch.save(saved, path)
    return path


def jit_training_file(path: Path, **args: Any) -> Path:
    """JiT's checkpoint-last.pth."""
    saved = {
        "model": state(JIT_TINY, 0, "net."),
        "optimizer": {"state": {}, "param_groups": [{"lr": 1e-4, "betas": (0.9, 0.95), "params": [0, 1]}]},
        "epoch": 3,
        "model_ema1": state(JIT_TINY, 1, "net."),
        "model_ema2": state(JIT_TINY, 2, "net."),
        "args": argparse.Namespace(model="JiT-B/16", **args),
    }
    torch.save(saved, path)
    return path


def diffusers_folder(path: Path) -> Path:
    DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=2, sample_size=4,
        patch_size=2, num_embeds_ada_norm=3,
    ).save_pretrained(path)  # fmt: skip
    weights = DIFFUSERS.write(meta(DIT_TINY), state(DIT_TINY, 1))
    save_file(weights, path / "diffusion_pytorch_model.safetensors")
    return path


def same(found: dict[str, Tensor] | Any, wanted: dict[str, Tensor]) -> bool:
    return set(found) == set(wanted) and all(torch.equal(found[key], wanted[key]) for key in wanted)


# what is recognised


def test_a_bare_dit_is_recognised_and_asks_for_what_no_shape_says(tmp_path: Path) -> None:
    torch.save(state(DIT_TINY), tmp_path / "dit.pt")
    with pytest.raises(DitkitError, match=r"how many heads its attention has: give --model\.num-heads"):
        read(tmp_path / "dit.pt", FORMATS)
    found = read(tmp_path / "dit.pt", FORMATS, options=HEADS)
    assert found.format is DIT
    assert found.config == DIT_TINY
    assert found.denoiser == Meaning(DDPM(), "eps", "index")
    assert found.alike == ("sit",)
    assert (found.group, found.decay) == ("weights", 0.0)
    assert same(found.weights, state(DIT_TINY))


def test_sit_has_dit_s_names_and_another_meaning(tmp_path: Path) -> None:
    torch.save(state(DIT_TINY), tmp_path / "sit.pt")
    found = read(tmp_path / "sit.pt", FORMATS, name="sit", options=HEADS)
    assert found.format is SIT
    assert found.denoiser == Meaning(Linear(), "-velocity", "1-t")
    with pytest.raises(DitkitError, match="its names are those of dit"):
        read(tmp_path / "sit.pt", FORMATS, name="jit")
    with pytest.raises(DitkitError, match="did you mean sit"):
        read(tmp_path / "sit.pt", FORMATS, name="sitt")


def test_a_training_file_gives_its_average_or_what_is_asked_for(tmp_path: Path) -> None:
    path = dit_training_file(tmp_path / "0100000.pt")
    found = read(path, FORMATS, options=HEADS)
    assert (found.group, found.decay) == ("ema", 0.9999)
    assert same(found.weights, state(DIT_TINY, 1))
    found = read(path, FORMATS, weights="model", options=HEADS)
    assert (found.group, found.decay) == ("model", 0.0)
    assert same(found.weights, state(DIT_TINY, 0))
    with pytest.raises(DitkitError, match="holds no weights 'emma': did you mean ema"):
        read(path, FORMATS, weights="emma", options=HEADS)


def test_jit_is_recognised_with_its_averages_and_its_settings(tmp_path: Path) -> None:
    path = jit_training_file(tmp_path / "checkpoint-last.pth", noise_scale=2.0, t_eps=0.04, proj_dropout=0.2)
    with pytest.raises(DitkitError, match=r"give --model\.in-context-start"):
        read(path, FORMATS)
    found = read(path, FORMATS, options=START)
    assert found.format is JIT
    assert found.config == replace(JIT_TINY, proj_drop=0.2)
    assert found.denoiser == Meaning(Linear(2.0), "x0", "1-t", 0.04)
    assert (found.group, found.decay) == ("model_ema1", 0.9999)
    for number, group in enumerate(("model", "model_ema1", "model_ema2")):
        assert same(read(path, FORMATS, weights=group, options=START).weights, state(JIT_TINY, number))


def test_a_jit_without_class_tokens_asks_for_nothing(tmp_path: Path) -> None:
    config = replace(JIT_TINY, in_context_len=0, in_context_start=0)
    save_file(state(config), tmp_path / "jit.safetensors")
    assert read(tmp_path / "jit.safetensors", FORMATS).config == config


@pytest.mark.parametrize(("size", "scale"), [(256, 1.0), (512, 2.0), (1024, 4.0), (96, 1.0)])
def test_the_noise_of_a_jit_grows_with_its_image_unless_the_file_says(size: int, scale: float, tmp_path: Path) -> None:
    config = replace(JIT_TINY, input_size=size, patch_size=size // 4)
    save_file(state(config, prefix="net."), tmp_path / "jit.safetensors")
    found = read(tmp_path / "jit.safetensors", FORMATS, options=START)
    assert found.denoiser.path == Linear(scale)


@pytest.mark.parametrize(("heads", "ratio"), [(4, 4.0), (2, 3.0), (1, 2.5), (8, 1.0)])
def test_the_config_of_a_jit_follows_from_shapes(heads: int, ratio: float, tmp_path: Path) -> None:
    config = replace(JIT_TINY, hidden_size=32, num_heads=heads, mlp_ratio=ratio)
    save_file(state(config), tmp_path / "jit.safetensors")
    found = read(tmp_path / "jit.safetensors", FORMATS, options=START)
    shapes = {key: value.shape for key, value in meta(found.config).state_dict().items()}
    assert shapes == {key: value.shape for key, value in meta(config).state_dict().items()}
    assert replace(found.config, mlp_ratio=ratio) == config


@pytest.mark.parametrize(
    "change",
    [
        {"learn_sigma": False},
        {"num_classes": 0},
        {"in_channels": 7, "patch_size": 4},
        {"mlp_ratio": 2.5},
        {"depth": 11, "hidden_size": 8},
    ],
)
def test_the_config_of_a_dit_follows_from_shapes(change: dict[str, Any], tmp_path: Path) -> None:
    config = replace(DIT_TINY, **change)
    torch.save(state(config), tmp_path / "dit.pt")
    assert read(tmp_path / "dit.pt", FORMATS, options=HEADS).config == config


@pytest.mark.parametrize("name", ["dit_s_8", "dit_b_4", "dit_l_2", "dit_xl_2", "jit_b_16", "jit_l_32", "jit_h_16"])
def test_published_sizes_need_no_option(name: str) -> None:
    """From shapes alone, without a weight."""
    config: Any = model_config(name)
    form = JIT if isinstance(config, JiTConfig) else DIT
    with torch.device("meta"):
        shapes = {key: tuple(value.shape) for key, value in create_model(name).state_dict().items()}
    found = form.config(Source(Path("nowhere"), {}, lambda entries: {}), shapes, {})
    assert found == replace(config, **({"proj_drop": 0.0} if form is JIT else {}))
    assert size_name(found) == name


def test_a_shared_size_takes_the_name_of_its_family() -> None:
    assert size_name(model_config("dit_xl_2"), "sit") == "sit_xl_2"
    assert size_name(model_config("dit_xl_2"), "dit") == "dit_xl_2"
    assert size_name(DIT_TINY) is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_half_precision_stays_and_is_computed_with_in_float32(dtype: torch.dtype, tmp_path: Path) -> None:
    given = {key: value.to(dtype) for key, value in state(DIT_TINY).items()}
    torch.save(given, tmp_path / "dit.pt")
    found = read(tmp_path / "dit.pt", FORMATS, options=HEADS).weights
    kept = torch.float32 if dtype == torch.float64 else dtype
    assert all(value.dtype == kept for value in found.values())
    assert same(found, {key: value.to(kept) for key, value in given.items()})
    run, _ = import_file(tmp_path / "dit.pt", tmp_path / "run", options=HEADS)
    loaded = load(run.folder, device="cpu").model.state_dict()
    assert all(value.dtype == torch.float32 for value in loaded.values())
    assert same(loaded, {key: value.to(kept).float() for key, value in given.items()})


def test_a_large_file_in_shards_is_imported_without_a_second_copy_in_memory(tmp_path: Path) -> None:
    """110 MB of bf16 in three files: what the process holds at its peak, the mapped files among it, is measured."""
    config = replace(DIT_TINY, hidden_size=640, depth=9, num_heads=8, num_classes=1000, frequency_shift=1)
    model = meta(config)
    weights = {key: torch.zeros(value.shape, dtype=torch.bfloat16) for key, value in model.state_dict().items()}
    weights["pos_embed"] = config.build().pos_embed.data
    tensors = DIFFUSERS.write(model, weights)
    folder = tmp_path / "pipeline" / "transformer"
    folder.mkdir(parents=True)
    names = sorted(tensors)
    index = {name: f"diffusion_pytorch_model-0000{1 + i % 3}-of-00003.safetensors" for i, name in enumerate(names)}
    for file in set(index.values()):
        save_file({name: tensors[name].contiguous() for name in names if index[name] == file}, folder / file)
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    (folder / "config.json").write_text(
        json.dumps(diffusers_settings(config, Meaning(DDPM(), "eps", "index"))["transformer/config.json"])
    )
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors")) / 2**20
    code = (
        "import resource, sys; from ditkit.importing import import_file; import diffusers\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024\n"
        "before = peak(); import_file(sys.argv[1], sys.argv[2]); print(peak() - before)"
    )
    words = [sys.executable, "-c", code, str(tmp_path / "pipeline"), str(tmp_path / "run")]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    assert size > 100
    assert float(done.stdout) < 1.5 * size


def test_tensors_that_share_a_storage_or_are_views_come_out_right(tmp_path: Path) -> None:
    given = state(DIT_TINY)
    key = "blocks.0.attn.proj.weight"
    wide = torch.randn(16, 40)
    given[key] = wide.T[3:19]
    torch.save(given, tmp_path / "dit.pt")
    assert same(read(tmp_path / "dit.pt", FORMATS, options=HEADS).weights, given)


def test_rectangles_are_asked_for(tmp_path: Path) -> None:
    config = replace(DIT_TINY, input_size=(4, 6))
    torch.save(state(config), tmp_path / "dit.pt")
    with pytest.raises(DitkitError, match=r"6 places, which are no square: give --model\.input-size"):
        read(tmp_path / "dit.pt", FORMATS, options=HEADS)
    found = read(tmp_path / "dit.pt", FORMATS, options={**HEADS, "input_size": (4, 6)})
    assert found.config == config
    with pytest.raises(DitkitError, match="pos_embed is"):
        read(tmp_path / "dit.pt", FORMATS, options={**HEADS, "input_size": (4, 8)})


# a run of a file, and a file of a run


def official(recipe: Recipe, folder: Path, groups: dict[str, dict[str, Tensor]]) -> Run:
    from ditkit.config import to_json

    run = Run(folder)
    run.save(0, to_json(recipe), groups, {"log": {"sums": {}, "count": 0, "seconds": 0.0}, "data": None})
    run.begin(recipe)
    return run


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("name", ["dit", "sit"])
def test_dit_and_sit_files_make_the_round_trip(name: str, suffix: str, tmp_path: Path) -> None:
    torch.save(state(DIT_TINY, 5), tmp_path / "first.pt")
    run, _ = import_file(tmp_path / "first.pt", tmp_path / "run", name=name, options=HEADS)
    out = tmp_path / f"second{suffix}"
    lines = export_run(run.folder, "official", out)
    assert {"dit": "DiT", "sit": "SiT"}[name] in lines[0]
    again = load_file(out) if suffix == ".safetensors" else torch.load(out, weights_only=True)
    assert same(again, state(DIT_TINY, 5))
    second, _ = import_file(out, tmp_path / "again", name=name, options=HEADS)
    assert same(find_checkpoint(second.folder).tensors("model"), state(DIT_TINY, 5))


def test_a_jit_file_makes_the_round_trip(tmp_path: Path) -> None:
    path = jit_training_file(tmp_path / "checkpoint-last.pth", noise_scale=3.0)
    run, _ = import_file(path, tmp_path / "run", options=START)
    export_run(run.folder, "official", tmp_path / "again.pth")
    found = read(tmp_path / "again.pth", FORMATS)  # the exported file says where the class tokens join
    assert found.config == JIT_TINY
    assert found.denoiser.path == Linear(3.0)
    assert same(found.weights, state(JIT_TINY, 1))
    with torch.serialization.safe_globals([argparse.Namespace]):
        saved = torch.load(tmp_path / "again.pth", weights_only=True)
    for group in ("model", "model_ema1", "model_ema2"):
        assert same(saved[group], state(JIT_TINY, 1, "net."))


def test_a_run_of_several_weights_exports_those_that_are_asked_for(tiny: Recipe, tmp_path: Path) -> None:
    from ditkit.training import train

    train(tiny, tmp_path / "run", quiet=True)
    checkpoint = find_checkpoint(tmp_path / "run")
    export_run(tmp_path / "run", "official", tmp_path / "jit.pth", ema=0.99)
    for group, name in {"model": "model", "model_ema1": "ema-0.99", "model_ema2": "ema-0.9"}.items():
        assert same(read(tmp_path / "jit.pth", FORMATS, weights=group).weights, checkpoint.tensors(name)), group
    export_run(tmp_path / "run", "official", tmp_path / "one.safetensors", ema=0)
    assert same(read(tmp_path / "one.safetensors", FORMATS, options=START).weights, checkpoint.tensors("model"))
    with pytest.raises(DitkitError, match=r"not 0\.5"):
        export_run(tmp_path / "run", "official", tmp_path / "no.pth", ema=0.5)


def test_an_imported_run_samples_and_says_what_it_lacks(tmp_path: Path, ditkit: Command) -> None:
    jit_training_file(tmp_path / "checkpoint-last.pth")
    done = ditkit("import", "checkpoint-last.pth", "--model.in-context-start", "1")
    assert done.returncode == 0, done.stderr
    for text in ("JiT", "no published size", "3 classes", "model_ema1", "0.9999", "x0 on", "clock 1-t", "model_ema2"):
        assert text in done.stdout, text
    checkpoint = find_checkpoint("runs/checkpoint-last")
    assert checkpoint.groups == ("ema-0.9999",)
    assert same(checkpoint.tensors("ema-0.9999"), state(JIT_TINY, 1))
    images = load("runs/checkpoint-last", device="cpu").sample(label=2, count=2, steps=2)
    assert images.shape == (2, 3, 8, 8)
    save_file(state(replace(JIT_TINY, in_context_len=0)), tmp_path / "x.safetensors")
    done = ditkit("sample", "runs/checkpoint-last", "--steps", "2", "--count", "4", "--out", "x.png")
    assert done.returncode == 0, done.stderr
    for words, says in {
        ("evaluate", "runs/checkpoint-last"): "ditkit train RECIPE --init RUN",
        ("train", "runs/checkpoint-last"): "ditkit train RECIPE --init RUN",
        ("sample", "runs/checkpoint-last", "--ema", "0"): "holds no model.safetensors",
        ("import", "checkpoint-last.pth"): "is not empty",
        ("import", "nothing.pt"): "there is no file nothing.pt",
        ("import", "runs/checkpoint-last", "--out", "b"): "is a run of ditkit already",
        ("import", "x.safetensors", "--out", "b", "--autoencoder", "x"): "works on pixels",
        ("export", "runs/checkpoint-last", "--format", "diffusers", "--out", "d"): "use --format official",
        ("export", "runs/checkpoint-last", "--format", "onnx", "--out", "d"): "official or diffusers",
        ("export", "runs/checkpoint-last", "--format", "official", "--out", "x.png"): "exists already",
    }.items():
        done = ditkit(*words)
        assert done.returncode == 1, words
        assert says in done.stderr, (words, done.stderr)
        assert len([line for line in done.stderr.splitlines() if "..." not in line]) == 1, done.stderr


def test_a_latent_model_takes_stable_diffusion_s_autoencoder_and_downloads_nothing(tmp_path: Path) -> None:
    torch.save(state(DIT_TINY), tmp_path / "dit.pt")
    run, lines = import_file(tmp_path / "dit.pt", tmp_path / "run", options=HEADS)
    codec = run.recipe().codec
    assert (codec.path, codec.download, codec.scale) == ("stabilityai/sd-vae-ft-mse", False, 0.18215)
    assert "nothing was downloaded" in lines[-1]
    with pytest.raises(DitkitError, match="hf download stabilityai/sd-vae-ft-mse"):
        load(run.folder, device="cpu").sample(count=1, steps=2)
    assert run.recipe().sample.channels == 3
    assert run.recipe().sample.ema == 0


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"denoiser": Meaning(DDPM(), "v", "index")}, "a DiT file means eps on"),
        ({"denoiser": Meaning(Linear(), "velocity", "t")}, "a SiT file means -velocity on"),
        ({"model": replace(DIT_TINY, frequency_shift=1)}, "use --format diffusers"),
        ({"model": replace(DIT_TINY, conditioning="in_context")}, "adaLN-Zero alone"),
        ({"model": JIT_TINY}, "a JiT file means x0"),
    ],
)
def test_what_a_published_file_cannot_say_is_not_written(change: dict[str, Any], says: str, tmp_path: Path) -> None:
    recipe = replace(Recipe(model=DIT_TINY, denoiser=Meaning(DDPM(), "eps", "index")), **change)
    run = official(recipe, tmp_path / "run", {"ema-0.9999": state(recipe.model)})
    with pytest.raises(DitkitError, match=says):
        export_run(run.folder, "official", tmp_path / "out.pt")
    assert not (tmp_path / "out.pt").exists()


# files that are wrong


def refused(path: Path, says: str, **options: Any) -> None:
    with pytest.raises(DitkitError, match=says) as caught:
        read(path, FORMATS, options={**HEADS, **START, **options})
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


def without(key: str) -> Callable[[dict], None]:
    return lambda weights: weights.pop(key)


def put(key: str, value: Any) -> Callable[[dict], None]:
    return lambda weights: weights.update({key: value})


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (without("blocks.1.mlp.fc2.bias"), r"lacks blocks\.1\.mlp\.fc2\.bias"),
        (put("extra.weight", torch.ones(2)), r"nothing there is called extra\.weight"),
        (put("blocks.5.attn.qkv.weight", torch.ones(2)), "not numbered from 0 on"),
        (put("blocks.1.attn.qkv.bias", torch.ones(47)), r"qkv\.bias is \[47\], where the other tensors need \[48\]"),
        (put("pos_embed", torch.ones(1, 4, 12)), r"pos_embed is \[1, 4, 12\], where .* need \[1, 4, 16\]"),
        (put("pos_embed", torch.ones(1, 5, 16)), "5 places"),
        (put("pos_embed", torch.ones(5)), "should have 3 dimensions"),
        (put("x_embedder.proj.weight", torch.ones(16, 4, 2, 3)), "patches of 2 x 3"),
        (put("x_embedder.proj.weight", torch.ones(16, 0, 2, 2)), "none of them 0"),
        (put("t_embedder.mlp.0.weight", torch.ones(16, 256, dtype=torch.int64)), "holds int64 numbers"),
        (put("t_embedder.mlp.2.bias", torch.full((16,), float("nan"))), r"t_embedder\.mlp\.2\.bias holds NaN"),
        (put("final_layer.linear.bias", torch.full((32,), float("-inf"))), "NaN or infinite"),
        (put("final_layer.linear.weight", torch.ones(24, 16)), r"need \[16, 16\]"),
    ],
)
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_wrong_tensors_are_named(spoil: Callable[[dict], None], says: str, suffix: str, tmp_path: Path) -> None:
    weights = dict(state(DIT_TINY))
    spoil(weights)
    path = tmp_path / f"dit{suffix}"
    (save_file if suffix == ".safetensors" else torch.save)(weights, path)
    refused(path, says)


def test_heads_that_do_not_divide_are_refused(tmp_path: Path) -> None:
    torch.save(state(DIT_TINY), tmp_path / "dit.pt")
    refused(tmp_path / "dit.pt", "not divisible by num_heads 3", num_heads=3)


class Evil:
    """A pickle that would run a command."""

    def __init__(self, command: str, call: Callable[..., Any] = os.system):
        self.command, self.call = command, call

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return self.call, (self.command,)


@pytest.mark.parametrize("call", [os.system, eval, exec, bytearray, __import__], ids=lambda c: c.__name__)
def test_a_pickle_that_would_run_code_runs_none(call: Callable[..., Any], tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    command = f"touch {mark}" if call is os.system else f"__import__('pathlib').Path({str(mark)!r}).touch()"
    for number, saved in enumerate(
        (
            Evil(command, call),
            {"model": state(DIT_TINY), "args": Evil(command, call)},
            {**state(DIT_TINY), "pos_embed": Evil(command, call)},
        )
    ):
        path = tmp_path / f"{number}.pt"
        torch.save(saved, path)
        refused(path, "asks for .*; it was not run")
    assert not mark.exists()


def test_a_namespace_cannot_smuggle_a_method(tmp_path: Path) -> None:
    namespace = argparse.Namespace()
    namespace.__dict__.update({"__class__": 1, "__dict__": {"a": 2}, "__setstate__": "x"})
    torch.save({"model": state(DIT_TINY), "args": namespace}, tmp_path / "dit.pt")
    found = read(tmp_path / "dit.pt", FORMATS, options=HEADS)
    assert found.source.args == {"__class__": 1, "__setstate__": "x"}
    assert type(found.source.args) is dict


def archive(path: Path, program: bytes, records: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> Path:
    """A file as torch.save lays it out, with any content."""
    with zipfile.ZipFile(path, "w", compression) as file:
        file.writestr("x/data.pkl", program)
        file.writestr("x/byteorder", b"little")
        for key, content in records.items():
            file.writestr(f"x/data/{key}", content)
    return path


def program(count: int, shape: tuple[int, ...], stride: tuple[int, ...], offset: int = 0) -> bytes:
    """The pickle of {"w": tensor} with a storage declared to hold `count` floats."""

    class Pickler(pickle.Pickler):
        def persistent_id(self, obj: Any) -> Any:
            return ("storage", torch.FloatStorage, "0", "cpu", count) if isinstance(obj, torch.UntypedStorage) else None

    class Ref:
        def __reduce__(self) -> Any:
            args = (torch.UntypedStorage(0), offset, shape, stride, False, OrderedDict())
            return _rebuild_tensor_v2, args

    buffer = io.BytesIO()
    Pickler(buffer, 2).dump({"w": Ref()})
    return buffer.getvalue()


def test_the_archive_of_the_test_itself_is_a_good_one(tmp_path: Path) -> None:
    path = archive(tmp_path / "x.pt", program(6, (2, 3), (3, 1)), {"0": struct.pack("<6f", *range(6))})
    refused(path, r"holds 1 tensors \(w \[2, 3\], \.\.\.\) of none of the known formats")


@pytest.mark.parametrize(
    ("program", "bytes_"),
    [
        (program(1 << 40, (1 << 40,), (1,)), 24),  # a storage that is declared larger than it is
        (program(6, (1 << 40,), (0,)), 24),  # one number that pretends to be many
        (program(6, (2, 3), (3, 1), offset=1), 24),
        (program(6, (2, 3), (30, 1)), 24),
        (program(6, (2, -3), (3, 1)), 24),
        (program(6, (2, 3), (-3, 1), offset=5), 24),
        (program(6, (2, 3), (3,)), 24),
        (program(6, (2, 3), (3, 1), offset=-1), 24),
        (program(-6, (2, 3), (3, 1)), 24),
        (program(6, (2, 3), (3, 1)), 20),
    ],
)
def test_tensors_that_reach_beyond_their_storage_are_refused(program: bytes, bytes_: int, tmp_path: Path) -> None:
    refused(archive(tmp_path / "x.pt", program, {"0": bytes(bytes_)}), "is damaged")


def test_bombs_are_refused_before_they_are_read(tmp_path: Path) -> None:
    bomb = archive(tmp_path / "a.pt", program(1 << 28, (1 << 28,), (1,)), {"0": bytes(1 << 24)}, zipfile.ZIP_DEFLATED)
    assert bomb.stat().st_size < 1 << 16
    refused(bomb, "compressed or encrypted")
    # one stored record, listed twice as long as the file
    good = archive(tmp_path / "b.pt", program(6, (2, 3), (3, 1)), {"0": bytes(24)})
    raw = bytearray(good.read_bytes())
    at = raw.rindex(b"x/data/0") - 46 + 20
    raw[at : at + 8] = struct.pack("<II", 0x7FFFFFF0, 0x7FFFFFF0)
    good.write_bytes(raw)
    refused(good, "declares 2147483")
    header = struct.pack("<Q", 1 << 60) + b"{}"
    (tmp_path / "c.safetensors").write_bytes(header)
    refused(tmp_path / "c.safetensors", "is damaged or no .safetensors")


@pytest.mark.parametrize(
    "header",
    [
        {key: {"dtype": "F32", "shape": [2], "data_offsets": [at, at + 8]} for key, at in (("a", 0), ("b", 4))},
        {"a": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 8]}},
        {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 80]}},
        {"a": {"dtype": "F99", "shape": [2], "data_offsets": [0, 8]}},
        {"a": {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}},
        {"a": 3},
        [1, 2],
    ],
    ids=["overlap", "huge", "beyond", "dtype", "negative", "number", "list"],
)  # fmt: skip
def test_headers_that_lie_are_refused(header: Any, tmp_path: Path) -> None:
    content = json.dumps(header).encode()
    (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", len(content)) + content + bytes(16))
    refused(tmp_path / "x.safetensors", "is damaged or no .safetensors")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "damaged or no file of torch.save"),
        (b"this is no checkpoint at all", "damaged or no file of torch.save"),
        (pickle.dumps({"w": 1}), "damaged or no file of torch.save"),
    ],
)
def test_other_files_are_no_checkpoints(content: bytes, says: str, tmp_path: Path) -> None:
    (tmp_path / "x.pt").write_bytes(content)
    refused(tmp_path / "x.pt", says)


def test_files_of_other_things_say_what_they_hold(tmp_path: Path) -> None:
    torch.save([1, 2], tmp_path / "list.pt")
    refused(tmp_path / "list.pt", "holds a list, not a dict of tensors")
    torch.save({"epoch": 3}, tmp_path / "dict.pt")
    refused(tmp_path / "dict.pt", "only: epoch")
    torch.save(torch.nn.Linear(2, 3).state_dict(), tmp_path / "linear.pt")
    refused(
        tmp_path / "linear.pt",
        r"2 tensors \(weight \[3, 2\], bias \[3\], \.\.\.\) of none of the known formats: dit, sit",
    )
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as file:
        file.writestr("a/b.txt", "c")
    refused(tmp_path / "x.zip", "holds no data.pkl")
    (tmp_path / "folder").mkdir()
    refused(tmp_path / "folder", "no transformer/config.json")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"num_attention_heads": 3}, "3 heads of 8 channels are not the 16"),
        ({"num_attention_heads": "two"}, "num_attention_heads is 'two'"),
        ({"sample_size": 10**9}, "patches in a row"),
        ({"sample_size": -4}, "sample_size is -4"),
        ({"activation_fn": "geglu"}, "activation_fn is 'geglu'; only 'gelu-approximate' is a DiT"),
        ({"norm_eps": "small"}, "norm_eps is 'small'"),
        ({"norm_eps": -1.0}, "mlp_norm_eps must be above 0"),
    ],
)
def test_settings_of_a_folder_that_cannot_be_are_named(change: dict[str, Any], says: str, tmp_path: Path) -> None:
    folder = diffusers_folder(tmp_path / "folder")
    settings_ = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**settings_, **change}))
    refused(folder, says)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"prediction_type": "flow"}, "prediction_type 'flow'"),
        ({"beta_schedule": "squaredcos_cap_v2"}, "is not supported"),
        ({"trained_betas": [0.1]}, "no trained_betas"),
        ({"num_train_timesteps": 10**12}, "are no schedule"),
        ({"beta_end": 7.0}, "beta_last < 1"),
    ],
)
def test_schedules_that_are_not_known_are_named(change: dict[str, Any], says: str, tmp_path: Path) -> None:
    diffusers_folder(tmp_path / "pipe" / "transformer")
    (tmp_path / "pipe" / "scheduler").mkdir()
    (tmp_path / "pipe" / "scheduler" / "scheduler_config.json").write_text(json.dumps(change))
    refused(tmp_path / "pipe", says)


def test_a_folder_says_its_schedule(tmp_path: Path) -> None:
    diffusers_folder(tmp_path / "pipe" / "transformer")
    (tmp_path / "pipe" / "scheduler").mkdir()
    said = {
        "prediction_type": "v_prediction",
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "beta_end": 0.012,
    }
    (tmp_path / "pipe" / "scheduler" / "scheduler_config.json").write_text(json.dumps(said))
    found = read(tmp_path / "pipe", FORMATS)
    assert found.denoiser == Meaning(DDPM(1000, 0.00085, 0.012, "scaled_linear"), "v", "index")
    assert same(found.weights, {**state(DIT_TINY, 1)})


def test_an_index_cannot_lead_out_of_its_folder(tmp_path: Path) -> None:
    folder = diffusers_folder(tmp_path / "folder")
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    for name in ("../secret.safetensors", "/etc/passwd", 3):
        index.write_text(json.dumps({"weight_map": {"a": name}}))
        refused(folder, "does not say in which files")
    index.write_text(json.dumps({"weight_map": {"a": "diffusion_pytorch_model.safetensors"}}))
    refused(folder, "promises a, which diffusion_pytorch_model.safetensors does not hold")


# fuzzed

MAKERS: dict[str, Callable[[Path], Path]] = {
    "dit.pt": dit_training_file,
    "jit.pth": jit_training_file,
    "bare.pt": lambda path: (torch.save(state(DIT_TINY), path), path)[1],
    "dit.safetensors": lambda path: (save_file(state(DIT_TINY), path), path)[1],
    "jit.safetensors": lambda path: (save_file(state(JIT_TINY, 0, "net."), path), path)[1],
    "adm.safetensors": lambda path: (save_file(state(ADM_TINY), path), path)[1],
    "diffusers": diffusers_folder,
}


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """For each layout the thing to read, and the file of it that will be spoilt."""
    folder = tmp_path_factory.mktemp("good")
    made = {name: make(folder / name) for name, make in MAKERS.items()}
    return {
        name: (path, path / "diffusion_pytorch_model.safetensors" if path.is_dir() else path)
        for name, path in made.items()
    }


def spoilt(data: st.DataObject, raw: bytes) -> bytes:
    """Cut short, with flipped bytes, with bytes put in, or zeros written over; often near an end, where headers are."""
    last = len(raw) - 1
    at = st.integers(0, last) | st.integers(0, min(2000, last)) | st.integers(max(0, last - 4000), last)
    out = bytearray(raw)
    match data.draw(st.sampled_from(["cut", "flip", "insert", "zero", "swap"])):
        case "cut":
            del out[data.draw(at) :]
        case "flip":
            for _ in range(data.draw(st.integers(1, 8))):
                out[data.draw(at)] ^= data.draw(st.integers(1, 255))
        case "insert":
            out[data.draw(at) : 0] = data.draw(st.binary(min_size=1, max_size=40))
        case "zero":
            start = data.draw(at)
            out[start : start + 64] = bytes(64)
        case "swap":
            first, second = data.draw(at), data.draw(at)
            out[first : first + 32], out[second : second + 32] = out[second : second + 32], out[first : first + 32]
    return bytes(out)


@pytest.fixture
def no_code(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the calls that a pickle would make; torch's and Python's unpicklers are not to be used at all."""
    called: list[str] = []
    for module, name in ((pickle, "load"), (pickle, "loads"), (pickle, "Unpickler"), (torch, "load"), (os, "system")):
        monkeypatch.setattr(module, name, lambda *args, name=name, **kwargs: called.append(name))
    return called


def whole(found: Found) -> None:
    """What came is a complete model of its configuration: nothing is half there."""
    wanted = {key: value.shape for key, value in meta(found.config).state_dict().items()}
    assert {key: value.shape for key, value in found.weights.items()} == wanted
    assert all(value.is_floating_point() and bool(value.isfinite().all()) for value in found.weights.values())


@pytest.mark.parametrize("name", MAKERS)
@settings(
    max_examples=125, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True
)
@given(data=st.data())
def test_a_spoilt_file_gives_a_clear_error_or_a_whole_model(
    name: str, data: st.DataObject, good: dict[str, tuple[Path, Path]], no_code: list[str]
) -> None:
    path, file = good[name]
    raw = file.read_bytes()
    try:
        file.write_bytes(spoilt(data, raw))
        try:
            whole(read(path, FORMATS, options={**HEADS, **START}))
        except DitkitError as error:
            said = str(error)
        else:
            said = "a whole model"
    finally:
        file.write_bytes(raw)
    assert "\n" not in said
    assert len(said) < 1000
    assert no_code == []


@pytest.mark.parametrize("name", ["bare.pt", "dit.safetensors", "jit.safetensors", "adm.safetensors", "diffusers"])
@settings(max_examples=65, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True)
@given(data=st.data())
def test_wrong_shapes_dtypes_and_names_give_a_clear_error(
    name: str, data: st.DataObject, good: dict[str, tuple[Path, Path]]
) -> None:
    path, file = good[name]
    raw = file.read_bytes()
    weights: dict[str, Any] = dict(torch.load(path, weights_only=True) if name == "bare.pt" else load_file(file))
    key = data.draw(st.sampled_from(sorted(weights)))
    value = weights[key]
    match data.draw(st.sampled_from(["shape", "drop", "rename", "dtype", "nan", "reshape"])):
        case "shape":
            shape = data.draw(st.lists(st.integers(0, 7), max_size=5).filter(lambda s: s != list(value.shape)))
            weights[key] = torch.ones(shape)
        case "drop":
            del weights[key]
        case "rename":
            weights[data.draw(st.text(max_size=30).filter(lambda n: n not in weights))] = weights.pop(key)
        case "dtype":
            weights[key] = value.to(data.draw(st.sampled_from([torch.int8, torch.int64, torch.bool, torch.uint8])))
        case "nan":
            weights[key] = torch.full_like(value, float("nan"))
        case "reshape":
            weights[key] = value.reshape(1, *value.shape)
    try:
        (torch.save if name == "bare.pt" else save_file)(weights, file)
        with pytest.raises(DitkitError) as caught:
            whole(read(path, FORMATS, options={**HEADS, **START}))
        assert "\n" not in str(caught.value)
    finally:
        file.write_bytes(raw)
