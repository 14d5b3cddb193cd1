"""Lumina-Image 2.0 as diffusers publishes it, and as its authors and ComfyUI do, in one file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ..diffusion import Euler, Linear, LogitNormal, Meaning, Regression
from ..diffusion.grid import Flux
from ..models import Lumina2Config
from .diffusers import VERSION, embedder
from .format import Format, Shapes, described, option, published, shape
from .source import Source
from .table import Rule
from .zimage import sandwich_rules, sandwich_sizes

__all__ = ["LUMINA2", "LUMINA2_OFFICIAL", "lumina2_settings"]

# the output is clean - noise in a time that runs from noise to data; the files do not say it
_MEANING = Meaning(Linear(), "-velocity", "1-t")


def _block_rules(ours: str, theirs: str, modulated: bool) -> tuple[Rule, ...]:
    """A block in the names of diffusers; the norm before attention is within its modulation, where there is one."""
    return (
        *(Rule(f"{ours}.attn.{name}.*", (f"{theirs}.attn.to_{name}.*",)) for name in "qkv"),
        *(Rule(f"{ours}.attn.{name}_norm.*", (f"{theirs}.attn.norm_{name}.*",)) for name in "qk"),
        Rule(f"{ours}.attn.proj.*", (f"{theirs}.attn.to_out.0.*",)),
        # theirs is linear_2(silu(linear_1) * linear_3)
        Rule(f"{ours}.mlp.w1.*", (f"{theirs}.feed_forward.linear_1.*",)),
        Rule(f"{ours}.mlp.w2.*", (f"{theirs}.feed_forward.linear_3.*",)),
        Rule(f"{ours}.mlp.w3.*", (f"{theirs}.feed_forward.linear_2.*",)),
        Rule(f"{ours}.attn_norm1.*", (f"{theirs}.norm1.norm.*" if modulated else f"{theirs}.norm1.*",)),
        Rule(f"{ours}.attn_norm2.*", (f"{theirs}.norm2.*",)),
        Rule(f"{ours}.mlp_norm1.*", (f"{theirs}.ffn_norm1.*",)),
        Rule(f"{ours}.mlp_norm2.*", (f"{theirs}.ffn_norm2.*",)),
        Rule(f"{ours}.adaLN_modulation.1.*", (f"{theirs}.norm1.linear.*",)),
    )


def _known(sizes: Mapping[str, Any]) -> Any:
    return published(Lumina2Config, depth=sizes["depth"], hidden_size=sizes["hidden_size"])


_AXES = "how its heads divide into time, row and column"


def _config(source: Source, shapes: Shapes, options: Mapping[str, Any]) -> Lumina2Config:
    """What shapes say; how a head divides is known for the release, or said by config.json."""
    sizes = sandwich_sizes(shapes, "x_embedder", "layers.0.attn.norm_q.weight")
    dim = sizes["hidden_size"]
    said = source.settings()
    axes = said.get("axes_dim_rope", getattr(_known(sizes), "axes", None))
    return Lumina2Config(
        **sizes,
        kv_heads=shape(shapes, "layers.0.attn.to_k.weight", 2)[0] * sizes["num_heads"] // dim,
        mlp_hidden=shape(shapes, "layers.0.feed_forward.linear_1.weight", 2)[0],
        axes=tuple(option(options, "axes", axes, _AXES)),
        norm_eps=float(said.get("norm_eps", 1e-5)),
        text_dim=shape(shapes, "time_caption_embed.caption_embedder.0.weight", 1)[0],
    )


def _official_config(source: Source, shapes: Shapes, options: Mapping[str, Any]) -> Lumina2Config:
    sizes = sandwich_sizes(shapes, "x_embedder", "layers.0.attention.q_norm.weight")
    dim = sizes["hidden_size"]
    keys = (shape(shapes, "layers.0.attention.qkv.weight", 2)[0] - dim) // 2
    return Lumina2Config(
        **sizes,
        kv_heads=keys * sizes["num_heads"] // dim,
        mlp_hidden=shape(shapes, "layers.0.feed_forward.w1.weight", 2)[0],
        axes=tuple(option(options, "axes", getattr(_known(sizes), "axes", None), _AXES)),
        text_dim=shape(shapes, "cap_embedder.0.weight", 1)[0],
    )


def _refusal(config: Lumina2Config, meaning: Meaning) -> str | None:
    if replace(meaning, t_eps=0.0) != _MEANING:
        return (
            "a Lumina-Image 2.0 file means -velocity on a linear path with the clock 1-t to whoever reads it, and this "
            f"model was trained as {described(meaning)}"
        )
    if config.patch_size != 2:
        return f"Lumina-Image 2.0 is read with patches of 2 x 2, and this model has {config.patch_size}"
    return None


def _sampling(config: Lumina2Config) -> dict[str, Any]:
    """diffusers' pipeline. Guidance takes the caption to turn away from, which is the person's to say."""
    return {"steps": 30, "solver": Euler(), "grid": Flux(), "guidance": 1.0}


_TIME, _FINAL = "time_caption_embed.timestep_embedder", "norm_out"

LUMINA2 = Format(
    name="lumina2",
    title="Lumina-Image 2.0 in diffusers (Qin et al. 2025)",
    model=Lumina2Config,
    match=lambda shapes: {"x_embedder.weight", f"{_TIME}.linear_1.weight", "layers.0.norm1.norm.weight"} <= set(shapes),
    rules=(
        *_block_rules("blocks.#", "layers.#", True),
        *_block_rules("noise_refiner.#", "noise_refiner.#", True),
        *_block_rules("context_refiner.#", "context_refiner.#", False),
        *embedder("t_embedder", _TIME),
        Rule("cap_embedder.*", ("time_caption_embed.caption_embedder.*",)),
        Rule("final_layer.adaLN_modulation.1.*", (f"{_FINAL}.linear_1.*",)),
        Rule("final_layer.linear.*", (f"{_FINAL}.linear_2.*",)),
        Rule("*", ("*",)),
    ),
    config=_config,
    denoiser=lambda source, config: _MEANING,
    refusal=_refusal,
    sampling=_sampling,
    objective=lambda config, meaning: Regression("velocity", LogitNormal()),
    settings=lambda config, meaning: {"config.json": lumina2_settings(config)},
    file="diffusion_pytorch_model.safetensors",
)

LUMINA2_OFFICIAL = Format(
    name="lumina2_official",
    title="Lumina-Image 2.0 in one file, as its authors and ComfyUI have it",
    model=Lumina2Config,
    match=lambda shapes: (
        {"x_embedder.weight", "layers.0.attention.qkv.weight"} <= set(shapes) and "cap_pad_token" not in shapes
    ),
    rules=(
        *sandwich_rules("blocks.#", "layers.#", fused=True),
        *(rule for name in ("noise_refiner.#", "context_refiner.#") for rule in sandwich_rules(name, name, fused=True)),
        Rule("*", ("*",)),
    ),
    config=_official_config,
    denoiser=lambda source, config: _MEANING,
    refusal=_refusal,
    sampling=_sampling,
    objective=lambda config, meaning: Regression("velocity", LogitNormal()),
    prefix="model.diffusion_model.",
    unread=("norm_final.weight",),
)


def lumina2_settings(config: Lumina2Config) -> dict[str, Any]:
    """config.json of the transformer in diffusers, for what `LUMINA2.refusal` lets pass."""
    dim, hidden = config.hidden_size, config.mlp_hidden
    plain = hidden == -(4 * dim // -256) * 256
    return {
        "_class_name": "Lumina2Transformer2DModel",
        "_diffusers_version": VERSION,
        "sample_size": max(config.shape[1:]),
        "patch_size": 2,
        "in_channels": config.in_channels,
        "hidden_size": dim,
        "num_layers": config.depth,
        "num_refiner_layers": config.refiner_depth,
        "num_attention_heads": config.num_heads,
        "num_kv_heads": config.kv_heads,
        # its MLP is 4 times as wide as the model, times a factor, rounded up to a multiple
        "multiple_of": 256 if plain else 1,
        "ffn_dim_multiplier": None if plain else (hidden + 0.5) / (4 * dim),
        "norm_eps": config.norm_eps,
        "scaling_factor": 1.0,
        "axes_dim_rope": list(config.axes),
        "axes_lens": [300, 512, 512],
        "cap_feat_dim": config.text_dim,
    }
