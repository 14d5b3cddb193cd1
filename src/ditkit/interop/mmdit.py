"""MMDiT (Stable Diffusion 3 and 3.5) as Stability AI publishes it, and as diffusers has it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ..config import DitkitError
from ..diffusion import Euler, Linear, LogitNormal, Meaning, Regression
from ..diffusion.grid import SD3 as Shifted
from ..models import MMDiTConfig
from .diffusers import VERSION, dual_stream, embedder, head_count
from .dit import side_of
from .format import Format, Shapes, block_count, described, integer, option, published, settings, shape
from .source import Source
from .table import Rule

__all__ = ["DIFFUSERS_SD3", "SD3"]

_MEANING = Meaning(Linear(), "velocity", "1000t")


def _refusal(config: MMDiTConfig, meaning: Meaning) -> str | None:
    if meaning != _MEANING:
        return (
            "whoever reads Stable Diffusion 3 takes its output for the velocity on the linear path with the clock "
            f"1000t, and this model was trained as {described(meaning)}"
        )
    return None


def _sampling(config: MMDiTConfig) -> dict[str, Any]:
    """What diffusers' pipeline does unless told otherwise."""
    return {"steps": 28, "solver": Euler(), "grid": Shifted(3.0), "guidance": 7.0}


def _objective(config: MMDiTConfig, meaning: Meaning) -> Regression:
    """The best of the paper's table 1: velocity with logit-normal times."""
    return Regression("velocity", LogitNormal(0.0, 1.0))


def _config(shapes: Shapes, names: Mapping[str, str], heads: Any, size: Any) -> MMDiTConfig:
    """Everything but heads and size follows from shapes; `heads` is a function of width and depth, size None = 128."""
    dim, channels, *patches = shape(shapes, names["patches"], 4)
    patch = side_of(tuple(patches), names["patches"])
    depth = block_count(shapes, names["blocks"])
    places = shape(shapes, names["positions"], 3)[1]
    side = math.isqrt(places)
    if side * side != places:
        raise DitkitError(f"{names['positions']} has {places} places, which are no square")
    own = [i for i in range(depth) if f"{names['blocks']}{i}.{names['own']}" in shapes]
    if own != list(range(len(own))):
        raise DitkitError(f"the blocks {own} let the image attend to itself; supported are the first ones alone")
    features = shape(shapes, names["out"], 2)[0]
    if features != patch * patch * channels:
        raise DitkitError(f"{names['out']} makes {features} features, not the {patch * patch * channels} of a patch")
    return MMDiTConfig(
        input_size=min(128, side * patch) if size is None else size,
        patch_size=patch,
        in_channels=channels,
        hidden_size=dim,
        depth=depth,
        num_heads=heads(dim, depth),
        mlp_ratio=shape(shapes, f"{names['blocks']}0.{names['mlp']}", 2)[0] / dim,
        qk_norm=f"{names['blocks']}0.{names['norm']}" in shapes,
        self_attention=len(own),
        text_dim=shape(shapes, names["text"], 2)[1],
        pooled_dim=shape(shapes, names["pooled"], 2)[1],
        position_size=side,
    )


_STABILITY = {
    "patches": "x_embedder.proj.weight",
    "positions": "pos_embed",
    "text": "context_embedder.weight",
    "pooled": "y_embedder.mlp.0.weight",
    "out": "final_layer.linear.weight",
    "blocks": "joint_blocks.",
    "own": "x_block.attn2.qkv.weight",
    "mlp": "x_block.mlp.fc1.weight",
    "norm": "x_block.attn.ln_q.weight",
}


def _released(source: Source, shapes: Shapes, options: Mapping[str, Any]) -> MMDiTConfig:
    def heads(dim: int, depth: int) -> int:
        norm = f"joint_blocks.0.{_STABILITY['norm']}"
        guess = dim // shape(shapes, norm, 1)[0] if norm in shapes else None
        known = published(MMDiTConfig, depth=depth, hidden_size=dim)
        return option(options, "num_heads", guess or getattr(known, "num_heads", None), "how many heads it has")

    return _config(shapes, _STABILITY, heads, options.get("input_size"))


SD3 = Format(
    name="sd3",
    title="Stable Diffusion 3 (Esser et al. 2024)",
    model=MMDiTConfig,
    match=lambda shapes: {"joint_blocks.0.x_block.attn.qkv.weight", "pos_embed"} <= set(shapes),
    rules=(
        *(
            Rule(f"joint_blocks.#.{stream}.{attn}.{ours}_norm.*", (f"joint_blocks.#.{stream}.{attn}.ln_{ours}.*",))
            for stream in ("x_block", "context_block")
            for attn in ("attn", "attn2")
            for ours in "qk"
        ),
        Rule("*", ("*",)),
    ),
    config=_released,
    denoiser=lambda source, config: _MEANING,
    refusal=_refusal,
    sampling=_sampling,
    objective=_objective,
    prefix="model.diffusion_model.",
    within="model.diffusion_model.",
)


_DIFFUSERS = {
    "patches": "pos_embed.proj.weight",
    "positions": "pos_embed.pos_embed",
    "text": "context_embedder.weight",
    "pooled": "time_text_embed.text_embedder.linear_1.weight",
    "out": "proj_out.weight",
    "blocks": "transformer_blocks.",
    "own": "attn2.to_q.weight",
    "mlp": "ff.net.0.proj.weight",
    "norm": "attn.norm_q.weight",
}


def _from_diffusers(source: Source, shapes: Shapes, options: Mapping[str, Any]) -> MMDiTConfig:
    said = settings(source)
    if (norm := said.get("qk_norm")) not in (None, "rms_norm"):
        raise DitkitError(f"transformer/config.json: qk_norm is {norm!r}; supported is 'rms_norm', or none")

    def heads(dim: int, depth: int) -> int:
        return head_count(said, dim, "", (18, 64))

    return _config(shapes, _DIFFUSERS, heads, integer(said, "sample_size", 128))


def _to_diffusers(config: MMDiTConfig, meaning: Meaning) -> dict[str, dict[str, Any]]:
    """The config.json of an SD3Transformer2DModel."""
    settings = {
        "_class_name": "SD3Transformer2DModel",
        "_diffusers_version": VERSION,
        "sample_size": max(config.shape[1:]),
        "patch_size": config.patch_size,
        "in_channels": config.in_channels,
        "out_channels": config.in_channels,
        "num_layers": config.depth,
        "attention_head_dim": config.hidden_size // config.num_heads,
        "num_attention_heads": config.num_heads,
        "joint_attention_dim": config.text_dim,
        "caption_projection_dim": config.hidden_size,
        "pooled_projection_dim": config.pooled_dim,
        "pos_embed_max_size": config.position_size,
        "dual_attention_layers": list(range(config.self_attention)),
        "qk_norm": "rms_norm" if config.qk_norm else None,
    }
    return {"config.json": settings}


def _not_diffusers(config: MMDiTConfig, meaning: Meaning) -> str | None:
    if int(config.hidden_size * config.mlp_ratio) != 4 * config.hidden_size:
        return f"SD3Transformer2DModel has an mlp_ratio of 4, not {config.mlp_ratio:g}"
    return _refusal(config, meaning)


def _diffusers_rules(config: MMDiTConfig) -> tuple[Rule, ...]:
    """Theirs scales before it shifts where nothing is gated: before the output, and the text of the last block."""
    ours, theirs, last = "joint_blocks.#", "transformer_blocks.#", config.depth - 1
    rules = [
        Rule("pos_embed", ("pos_embed.pos_embed",)),
        Rule("x_embedder.proj.*", ("pos_embed.proj.*",)),
        Rule("context_embedder.*", ("context_embedder.*",)),
        Rule(
            f"joint_blocks.{last}.context_block.adaLN_modulation.1.*",
            (f"transformer_blocks.{last}.norm1_context.linear.*",),
            swapped=True,
        ),
        Rule("final_layer.adaLN_modulation.1.*", ("norm_out.linear.*",), swapped=True),
        Rule("final_layer.linear.*", ("proj_out.*",)),
    ]
    return (
        *rules,
        *embedder("t_embedder", "time_text_embed.timestep_embedder"),
        *embedder("y_embedder", "time_text_embed.text_embedder"),
        *dual_stream(ours, theirs, ("fc1", "fc2"), ("net.0.proj", "net.2")),
        Rule(f"{ours}.x_block.attn2.qkv.*", tuple(f"{theirs}.attn2.to_{part}.*" for part in "qkv")),
        *(Rule(f"{ours}.x_block.attn2.{n}_norm.*", (f"{theirs}.attn2.norm_{n}.*",)) for n in "qk"),
        Rule(f"{ours}.x_block.attn2.proj.*", (f"{theirs}.attn2.to_out.0.*",)),
    )


DIFFUSERS_SD3 = Format(
    name="diffusers_sd3",
    title="Stable Diffusion 3 in diffusers (SD3Transformer2DModel)",
    model=MMDiTConfig,
    match=lambda shapes: {"pos_embed.pos_embed", "transformer_blocks.0.attn.add_q_proj.weight"} <= set(shapes),
    rules=_diffusers_rules,
    config=_from_diffusers,
    denoiser=lambda source, config: _MEANING,
    refusal=_not_diffusers,
    sampling=_sampling,
    objective=_objective,
    settings=_to_diffusers,
    file="diffusion_pytorch_model.safetensors",
)
