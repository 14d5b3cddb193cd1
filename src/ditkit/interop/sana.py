"""Sana as its authors publish it, and as diffusers has it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..config import DitkitError
from ..diffusion import DPMpp2M, Euler, Linear, LogitNormal, Meaning, Regression
from ..diffusion.grid import SD3 as Shifted
from ..diffusion.grid import Uniform
from ..models import SanaConfig
from .diffusers import VERSION, embedder, head_count
from .dit import side_of
from .format import Format, Shapes, block_count, described, expect, integer, option, published, settings, shape
from .pixart import diffusers_single, released_single
from .source import Source
from .table import Rule

__all__ = ["DIFFUSERS_SANA", "SANA"]


def _config(shapes: Shapes, names: Mapping[str, str], **rest: Any) -> SanaConfig:
    """What follows from shapes."""
    dim, channels, *patches = shape(shapes, names["patches"], 4)
    patch = side_of(tuple(patches), names["patches"])
    if shape(shapes, names["out"], 2)[0] != patch * patch * channels:
        raise DitkitError(f"{names['out']} makes other channels than the {channels} that go in, which no Sana does")
    return SanaConfig(
        patch_size=patch,
        in_channels=channels,
        hidden_size=dim,
        depth=block_count(shapes, names["blocks"]),
        mlp_ratio=shape(shapes, f"{names['blocks']}0.{names['mlp']}", 4)[0] / 2 / dim,
        text_dim=shape(shapes, names["text"], 2)[1],
        qk_norm=f"{names['blocks']}0.{names['norm']}" in shapes,
        guidance=names["guidance"] in shapes,
        **rest,
    )


_RELEASED = {
    "patches": "x_embedder.proj.weight",
    "blocks": "blocks.",
    "mlp": "mlp.inverted_conv.conv.weight",
    "text": "y_embedder.y_proj.fc1.weight",
    "norm": "attn.q_norm.weight",
    "guidance": "cfg_embedder.mlp.0.weight",
    "out": "final_layer.linear.weight",
}


def _released(source: Source, shapes: Shapes, options: Mapping[str, Any]) -> SanaConfig:
    """Heads are known for the published sizes; self-attention has heads of 32 channels in all of them."""
    dim, depth = shape(shapes, _RELEASED["patches"], 4)[0], block_count(shapes, "blocks.")
    known = published(SanaConfig, depth=depth, hidden_size=dim)
    return _config(
        shapes,
        _RELEASED,
        input_size=options.get("input_size", 32),
        num_heads=option(options, "num_heads", getattr(known, "num_heads", None), "how many heads its attention has"),
        cross_heads=option(
            options, "cross_heads", getattr(known, "cross_heads", None), "how many heads its attention to the text has"
        ),
    )


def _meaning(config: SanaConfig) -> Meaning:
    """Sprint's files, too, hold a velocity on the linear path: its program rotates it to TrigFlow's, with the time
    sin / (sin + cos) of the angle, which is not multiplied by 1000."""
    return Meaning(Linear(), "velocity", "t" if config.guidance else "1000t")


def _refusal(config: SanaConfig, meaning: Meaning) -> str | None:
    wanted = _meaning(config)
    if meaning != wanted:
        return (
            f"whoever reads Sana takes its output for the velocity on the linear path with the clock {wanted.clock}, "
            f"and this model was trained as {described(meaning)}"
        )
    return None


def _sampling(config: SanaConfig) -> dict[str, Any]:
    """The release's flow shift and diffusers' number of steps. Guidance takes the caption to turn away from.

    Sprint: one step, the first of those of its program, which draws fresh noise between two.
    """
    if config.guidance:
        return {"steps": 1, "solver": Euler(), "grid": Uniform(), "guidance": 1.0}
    return {"steps": 20, "solver": DPMpp2M(), "grid": Shifted(3.0), "guidance": 1.0}


def _objective(config: SanaConfig, meaning: Meaning) -> Regression:
    return Regression("velocity", LogitNormal(0.0, 1.0))


SANA = Format(
    name="sana",
    title="Sana (Xie et al. 2024)",
    model=SanaConfig,
    match=lambda shapes: {_RELEASED["text"], "blocks.0.mlp.inverted_conv.conv.weight"} <= set(shapes),
    rules=(
        Rule("guidance_embedder.*", ("cfg_embedder.*",)),
        Rule("y_norm.*", ("attention_y_norm.*",)),
        *(
            Rule(f"blocks.#.mlp.{name}_conv.*", (f"blocks.#.mlp.{name}_conv.conv.*",))
            for name in ("inverted", "depth", "point")
        ),
        *released_single(),
        Rule("*", ("*",)),
    ),
    config=_released,
    denoiser=lambda source, config: _meaning(config),
    refusal=_refusal,
    sampling=_sampling,
    objective=_objective,
    weights={"state_dict_ema": 0.9999, "state_dict": 0.0},
    # the caption that stands for none in the authors' guidance, and positions that nothing reads
    unread=("y_embedder.y_embedding", "pos_embed", "pos_embed_ms"),
)

_DIFFUSERS = {
    "patches": "patch_embed.proj.weight",
    "blocks": "transformer_blocks.",
    "mlp": "ff.conv_inverted.weight",
    "text": "caption_projection.linear_1.weight",
    "norm": "attn1.norm_q.weight",
    "guidance": "time_embed.guidance_embedder.linear_1.weight",
    "out": "proj_out.weight",
}
_FIXED = {
    "attention_bias": False, "norm_elementwise_affine": False, "norm_eps": 1e-6, "dropout": 0.0,
    "interpolation_scale": None, "timestep_scale": 1.0,
}  # fmt: skip


def _from_diffusers(source: Source, shapes: Shapes, options: Mapping[str, Any]) -> SanaConfig:
    said = settings(source)
    expect(said, _FIXED, "a Sana")
    dim, factor = shape(shapes, _DIFFUSERS["patches"], 4)[0], said.get("guidance_embeds_scale", 0.1)
    if said.get("qk_norm") not in (None, "rms_norm_across_heads") or not isinstance(factor, int | float):
        raise DitkitError(
            f"transformer/config.json: qk_norm {said.get('qk_norm')!r} with guidance_embeds_scale {factor!r} is no Sana"
        )
    return _config(
        shapes,
        _DIFFUSERS,
        input_size=integer(said, "sample_size", 32),
        num_heads=head_count(said, dim, "", (70, 32)),
        cross_heads=head_count(said, dim, "cross_", (20, 112)),
        guidance_factor=float(factor),
    )


def _to_diffusers(config: SanaConfig, meaning: Meaning) -> dict[str, dict[str, Any]]:
    """The config.json of a SanaTransformer2DModel."""
    dim = config.hidden_size
    said = {
        "_class_name": "SanaTransformer2DModel",
        "_diffusers_version": VERSION,
        **_FIXED,
        "in_channels": config.in_channels,
        "out_channels": config.in_channels,
        "num_attention_heads": config.num_heads,
        "attention_head_dim": dim // config.num_heads,
        "num_layers": config.depth,
        "num_cross_attention_heads": config.cross_heads,
        "cross_attention_head_dim": dim // config.cross_heads,
        "cross_attention_dim": dim,
        "caption_channels": config.text_dim,
        "mlp_ratio": config.mlp_ratio,
        "sample_size": config.input_size,
        "patch_size": config.patch_size,
        "guidance_embeds": config.guidance,
        "guidance_embeds_scale": config.guidance_factor,
        "qk_norm": "rms_norm_across_heads" if config.qk_norm else None,
    }
    return {"config.json": said}


def _not_diffusers(config: SanaConfig, meaning: Meaning) -> str | None:
    if not isinstance(config.input_size, int):
        rows, columns = config.input_size
        return f"SanaTransformer2DModel takes squares only, not {rows} x {columns}"
    return _refusal(config, meaning)


def _diffusers_rules(config: SanaConfig) -> tuple[Rule, ...]:
    """The embedder of times stands elsewhere where there is one of guidance."""
    times = "time_embed" if config.guidance else "time_embed.emb"
    return (
        Rule("x_embedder.proj.*", ("patch_embed.proj.*",)),
        *embedder("t_embedder", f"{times}.timestep_embedder"),
        *embedder("guidance_embedder", "time_embed.guidance_embedder"),
        Rule("t_block.1.*", ("time_embed.linear.*",)),
        Rule("y_norm.*", ("caption_norm.*",)),
        *(
            Rule(f"blocks.#.mlp.{name}_conv.*", (f"transformer_blocks.#.ff.conv_{name}.*",))
            for name in ("inverted", "depth", "point")
        ),
        *diffusers_single(),
    )


DIFFUSERS_SANA = Format(
    name="diffusers_sana",
    title="Sana in diffusers (SanaTransformer2DModel)",
    model=SanaConfig,
    match=lambda shapes: {"time_embed.linear.weight", "caption_norm.weight", _DIFFUSERS["text"]} <= set(shapes),
    rules=_diffusers_rules,
    config=_from_diffusers,
    denoiser=lambda source, config: _meaning(config),
    refusal=_not_diffusers,
    sampling=_sampling,
    objective=_objective,
    settings=_to_diffusers,
    file="diffusion_pytorch_model.safetensors",
)
