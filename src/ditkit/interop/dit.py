"""DiT and SiT as their authors publish them, and DiT as diffusers has it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..config import DitkitError
from ..diffusion import DDIM, DDPM, Ancestral, Discrete, Linear, Meaning, Regression, SiTSDE
from ..diffusion.grid import Leading, Respaced
from ..diffusion.grid import SiT as SiTGrid
from ..diffusion.times import Uniform as UniformTimes
from ..layers import sincos_2d
from ..models import DiTConfig
from .diffusers import VERSION
from .format import Format, Shapes, block_count, described, expect, integer, option, published, settings, shape
from .source import Source
from .table import Rule

__all__ = ["DIFFUSERS", "DIT", "SIT", "ddpm_meaning", "diffusers_settings", "side_of", "square"]

_TABLE = "y_embedder.embedding_table.weight"

# what the outputs mean to the authors' programs; their files do not say it
_DIT_MEANING = Meaning(DDPM(), "eps", "index")
_SIT_MEANING = Meaning(Linear(), "-velocity", "1-t")


def square(tokens: int, patch: int, options: Mapping[str, Any]) -> int | tuple[int, int]:
    """The side of the input of so many patches, or what the person says. Raises DitkitError if it is no square."""
    if (given := options.get("input_size")) is not None:
        return given
    side = math.isqrt(tokens)
    if side * side != tokens:
        raise DitkitError(f"pos_embed has {tokens} places, which are no square: give --model.input-size ROWS COLUMNS")
    return side * patch


def side_of(patch: tuple[int, ...], name: str) -> int:
    """The side of a patch. Raises DitkitError for one that is not square."""
    if patch[0] != patch[1]:
        raise DitkitError(f"{name} has patches of {patch[0]} x {patch[1]}, which must be square")
    return patch[0]


def _released(source: Source, shapes: Shapes, options: Mapping[str, Any]) -> DiTConfig:
    """Everything but the number of heads follows from shapes."""
    dim, channels, *patches = shape(shapes, "x_embedder.proj.weight", 4)
    patch = side_of(tuple(patches), "x_embedder.proj.weight")
    depth = block_count(shapes, "blocks.")
    features = shape(shapes, "final_layer.linear.weight", 2)[0]
    heads = getattr(published(DiTConfig, depth=depth, hidden_size=dim), "num_heads", None)
    return DiTConfig(
        input_size=square(shape(shapes, "pos_embed", 3)[1], patch, options),
        patch_size=patch,
        in_channels=channels,
        hidden_size=dim,
        depth=depth,
        num_heads=option(options, "num_heads", heads, "how many heads its attention has"),
        mlp_ratio=shape(shapes, "blocks.0.mlp.fc1.weight", 2)[0] / dim,
        num_classes=shape(shapes, _TABLE, 2)[0] - 1,
        learn_sigma=features == 2 * patch * patch * channels,
    )


def _is_release(shapes: Shapes) -> bool:
    return {"x_embedder.proj.weight", "final_layer.linear.weight", "pos_embed", _TABLE} <= set(shapes)


def _not_released(config: DiTConfig, meaning: Meaning, wanted: Meaning, name: str) -> str | None:
    if described(meaning) != described(wanted):
        return (
            f"a {name} file means {described(wanted)} to whoever reads it, and this model was trained as "
            f"{described(meaning)}"
        )
    if config.conditioning != "adaln_zero":
        return f"the release has adaLN-Zero alone, and this model has the conditioning {config.conditioning}"
    if config.frequency_shift or config.mlp_norm_eps != 1e-6:
        return (
            f"this model has diffusers' constants (frequency_shift {config.frequency_shift}, mlp_norm_eps "
            f"{config.mlp_norm_eps:g}), and whoever reads a release computes with 0 and 1e-06: use --format diffusers"
        )
    return None


def _hybrid(config: DiTConfig, meaning: Meaning) -> Regression:
    steps = meaning.path.steps
    return Regression(meaning.prediction, Discrete(steps), variance="hybrid" if config.learn_sigma else None)


DIT = Format(
    name="dit",
    title="DiT (Peebles & Xie 2022)",
    model=DiTConfig,
    match=_is_release,
    rules=(Rule("*", ("*",)),),
    config=_released,
    denoiser=lambda source, config: _DIT_MEANING,
    refusal=lambda config, meaning: _not_released(config, meaning, _DIT_MEANING, "DiT"),
    # the authors' sample.py; the published FID of XL/2 is with guidance 1.5
    sampling=lambda config: {
        "steps": 250,
        "solver": Ancestral("learned" if config.learn_sigma else "beta"),
        "grid": Respaced(),
        "guidance": 4.0 if config.num_classes else 1.0,
        "channels": 3,
    },
    objective=_hybrid,
    weights={"ema": 0.9999, "model": 0.0},
)

SIT = Format(
    name="sit",
    title="SiT (Ma et al. 2024)",
    model=DiTConfig,
    match=_is_release,
    rules=(Rule("*", ("*",)),),
    config=_released,
    denoiser=lambda source, config: _SIT_MEANING,
    refusal=lambda config, meaning: _not_released(config, meaning, _SIT_MEANING, "SiT"),
    # the authors' sample.py in its mode SDE, from which the published FIDs are; those are with guidance 1.5
    sampling=lambda config: {
        "steps": 250,
        "solver": SiTSDE(diffusion="sigma", norm=1.0, last_step="Mean"),
        "grid": SiTGrid(eps=0.0, last_step=0.04),
        "guidance": 4.0 if config.num_classes else 1.0,
        "channels": 3,
    },
    objective=lambda config, meaning: Regression("velocity", UniformTimes()),
    weights={"ema": 0.9999, "model": 0.0},
)


def _positions(size: tuple[int, ...]) -> Tensor:
    side = math.isqrt(size[1])
    with torch.device("cpu"):
        return sincos_2d(size[2], (side, side))


_SCHEDULES = {"linear": "linear", "scaled_linear": "scaled_linear"}
_PREDICTIONS = {"epsilon": "eps", "sample": "x0", "v_prediction": "v"}
_LARGEST_SIDE = 512  # patches in a row; more than any published latent has, by far


def _diffusers_config(source: Source, shapes: Shapes, options: Mapping[str, Any]) -> DiTConfig:
    """Shapes say most; heads, size and eps come from transformer/config.json."""
    said = settings(source)
    fixed = {
        "norm_type": "ada_norm_zero", "activation_fn": "gelu-approximate", "attention_bias": True,
        "norm_elementwise_affine": False, "dropout": 0.0,
    }  # fmt: skip
    expect(said, fixed, "a DiT")
    dim, channels, *patches = shape(shapes, "pos_embed.proj.weight", 4)
    patch = side_of(tuple(patches), "pos_embed.proj.weight")
    size, heads = integer(said, "sample_size", 32), integer(said, "num_attention_heads", 16)
    if size // patch > _LARGEST_SIDE:
        raise DitkitError(f"transformer/config.json: sample_size {size} would be {size // patch} patches in a row")
    if heads * integer(said, "attention_head_dim", 72) != dim:
        raise DitkitError(
            f"transformer/config.json: {heads} heads of {said.get('attention_head_dim', 72)} channels are not the "
            f"{dim} of the weights"
        )
    eps = said.get("norm_eps", 1e-5)
    if not isinstance(eps, int | float):
        raise DitkitError(f"transformer/config.json: norm_eps is {eps!r}, not a number")
    features = shape(shapes, "proj_out_2.weight", 2)[0]
    return DiTConfig(
        input_size=size,
        patch_size=patch,
        in_channels=channels,
        hidden_size=dim,
        depth=block_count(shapes, "transformer_blocks."),
        num_heads=heads,
        mlp_ratio=shape(shapes, "transformer_blocks.0.ff.net.0.proj.weight", 2)[0] / dim,
        num_classes=shape(shapes, _THEIR_TABLE, 2)[0] - 1,
        learn_sigma=features == 2 * patch * patch * channels,
        frequency_shift=1,
        mlp_norm_eps=float(eps),
    )


def ddpm_meaning(source: Source, config: Any) -> Meaning:
    """What scheduler/scheduler_config.json says; without it, DiT's own."""
    said = source.json("scheduler/scheduler_config.json")
    where = "scheduler/scheduler_config.json"
    prediction, schedule = said.get("prediction_type", "epsilon"), said.get("beta_schedule", "linear")
    if prediction not in _PREDICTIONS or schedule not in _SCHEDULES or said.get("trained_betas") is not None:
        raise DitkitError(
            f"{where}: prediction_type {prediction!r} with beta_schedule {schedule!r} is not supported: known are "
            f"{', '.join(_PREDICTIONS)} with {' or '.join(_SCHEDULES)} and no trained_betas"
        )
    steps, first, last = (
        said.get(name, default)
        for name, default in (("num_train_timesteps", 1000), ("beta_start", 1e-4), ("beta_end", 2e-2))
    )
    if type(steps) is not int or not 2 <= steps <= 1_000_000 or not all(isinstance(b, float) for b in (first, last)):
        raise DitkitError(f"{where}: {steps!r} steps with betas from {first!r} to {last!r} are no schedule")
    path = DDPM(steps, first, last, schedule, bool(said.get("rescale_betas_zero_snr", False)))
    return Meaning(path, _PREDICTIONS[prediction], "index")


def _not_diffusers(config: DiTConfig, meaning: Meaning) -> str | None:
    """Why diffusers' DiTPipeline cannot compute this. The frequencies of time are judged by the exporter."""
    path = meaning.path
    if not isinstance(path, DDPM) or meaning.prediction not in _PREDICTIONS.values() or meaning.clock != "index":
        return f"DiTPipeline knows DDPM tables with eps, x0 or v prediction only, not {described(meaning)}"
    if path.schedule not in _SCHEDULES.values():
        return f"diffusers has no beta_schedule equal to our {path.schedule}"
    if config.conditioning != "adaln_zero":
        return f"DiTTransformer2DModel has adaLN-Zero alone, and this model has the conditioning {config.conditioning}"
    if not isinstance(config.input_size, int):
        return f"DiTTransformer2DModel takes squares only, not {config.input_size[0]} x {config.input_size[1]}"
    if not 1 <= config.num_classes <= 1000:
        return (
            f"DiTPipeline has the null label 1000 built in, which is no null label with {config.num_classes} classes: "
            "it serves 1 to 1000"
        )
    if int(config.hidden_size * config.mlp_ratio) != 4 * config.hidden_size:
        return f"DiTTransformer2DModel has an mlp_ratio of 4, not {config.mlp_ratio:g}"
    return None


_BLOCK = "transformer_blocks.#"
_THEIR_TABLE = "transformer_blocks.0.norm1.emb.class_embedder.embedding_table.weight"

DIFFUSERS = Format(
    name="diffusers",
    title="DiT in diffusers (DiTTransformer2DModel)",
    model=DiTConfig,
    match=lambda shapes: {"pos_embed.proj.weight", "proj_out_2.weight", _THEIR_TABLE} <= set(shapes),
    rules=(
        Rule("pos_embed", (), _positions),
        Rule("x_embedder.proj.*", ("pos_embed.proj.*",)),
        Rule("t_embedder.mlp.0.*", (f"{_BLOCK}.norm1.emb.timestep_embedder.linear_1.*",)),
        Rule("t_embedder.mlp.2.*", (f"{_BLOCK}.norm1.emb.timestep_embedder.linear_2.*",)),
        Rule("y_embedder.*", (f"{_BLOCK}.norm1.emb.class_embedder.*",)),
        Rule("blocks.#.adaLN_modulation.1.*", (f"{_BLOCK}.norm1.linear.*",)),
        Rule("blocks.#.attn.qkv.*", tuple(f"{_BLOCK}.attn1.to_{part}.*" for part in "qkv")),
        Rule("blocks.#.attn.proj.*", (f"{_BLOCK}.attn1.to_out.0.*",)),
        Rule("blocks.#.mlp.fc1.*", (f"{_BLOCK}.ff.net.0.proj.*",)),
        Rule("blocks.#.mlp.fc2.*", (f"{_BLOCK}.ff.net.2.*",)),
        Rule("final_layer.adaLN_modulation.1.*", ("proj_out_1.*",)),
        Rule("final_layer.linear.*", ("proj_out_2.*",)),
    ),
    config=_diffusers_config,
    denoiser=ddpm_meaning,
    refusal=_not_diffusers,
    # what DiTPipeline does unless told otherwise
    sampling=lambda config: {
        "steps": 50,
        "solver": DDIM(),
        "grid": Leading(),
        "guidance": 4.0 if config.num_classes else 1.0,
        "channels": None,
    },
    objective=_hybrid,
)


def diffusers_settings(config: DiTConfig, meaning: Meaning) -> dict[str, dict[str, Any]]:
    """The JSON files of a pipeline's folder, but for the autoencoder's, for what `DIFFUSERS.refusal` lets pass."""
    path = meaning.path
    theirs = {ours: name for name, ours in _PREDICTIONS.items()}
    return {
        "transformer/config.json": {
            "_class_name": "DiTTransformer2DModel",
            "_diffusers_version": VERSION,
            "num_attention_heads": config.num_heads,
            "attention_head_dim": config.hidden_size // config.num_heads,
            "in_channels": config.in_channels,
            "out_channels": config.in_channels * (2 if config.learn_sigma else 1),
            "num_layers": config.depth,
            "sample_size": config.input_size,
            "patch_size": config.patch_size,
            "activation_fn": "gelu-approximate",
            "attention_bias": True,
            "num_embeds_ada_norm": config.num_classes,
            "norm_type": "ada_norm_zero",
            "norm_elementwise_affine": False,
            "norm_eps": config.mlp_norm_eps,
        },
        "scheduler/scheduler_config.json": {
            "_class_name": "DDIMScheduler",
            "_diffusers_version": VERSION,
            "num_train_timesteps": path.steps,
            "beta_start": path.beta_first,
            "beta_end": path.beta_last,
            "beta_schedule": path.schedule,
            "rescale_betas_zero_snr": path.zero_snr,
            "prediction_type": theirs[meaning.prediction],
            "clip_sample": False,
            "set_alpha_to_one": True,
            "steps_offset": 0,
            "timestep_spacing": "leading",
        },
        "model_index.json": {
            "_class_name": "DiTPipeline",
            "_diffusers_version": VERSION,
            "transformer": ["diffusers", "DiTTransformer2DModel"],
            "vae": ["diffusers", "AutoencoderKL"],
            "scheduler": ["diffusers", "DDIMScheduler"],
        },
    }
