"""Z-Image as its authors and diffusers publish it (the same names), and as one file for ComfyUI."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ..config import DitkitError
from ..diffusion import Euler, Linear, LogitNormal, Meaning, Regression
from ..diffusion.grid import SD3
from ..models import ZImageConfig
from .diffusers import VERSION
from .format import Format, Shapes, block_count, described, option, published, shape
from .source import Source
from .table import Rule

__all__ = ["Z_IMAGE", "Z_IMAGE_COMFY", "sandwich_rules", "sandwich_sizes", "z_image_settings"]

# the output is clean - noise in a time that runs from noise to data; the files do not say it
_MEANING = Meaning(Linear(), "-velocity", "1-t")


def sandwich_rules(ours: str, theirs: str, fused: bool = False) -> tuple[Rule, ...]:
    """A block in the names of Z-Image's authors; `fused`: as in one-file checkpoints, which join q, k and v."""
    attention = f"{theirs}.attention"
    qkv = tuple(
        Rule(f"{ours}.attn.{name}.*", (f"{attention}.qkv.*",), part=i)
        if fused
        else Rule(f"{ours}.attn.{name}.*", (f"{attention}.to_{name}.*",))
        for i, name in enumerate("qkv")
    )
    return (
        *qkv,
        Rule(f"{ours}.attn.proj.*", (f"{attention}.out.*" if fused else f"{attention}.to_out.0.*",)),
        Rule(f"{ours}.attn.q_norm.*", (f"{attention}.q_norm.*" if fused else f"{attention}.norm_q.*",)),
        Rule(f"{ours}.attn.k_norm.*", (f"{attention}.k_norm.*" if fused else f"{attention}.norm_k.*",)),
        # theirs is w2(silu(w1) * w3)
        Rule(f"{ours}.mlp.w1.*", (f"{theirs}.feed_forward.w1.*",)),
        Rule(f"{ours}.mlp.w2.*", (f"{theirs}.feed_forward.w3.*",)),
        Rule(f"{ours}.mlp.w3.*", (f"{theirs}.feed_forward.w2.*",)),
        Rule(f"{ours}.attn_norm1.*", (f"{theirs}.attention_norm1.*",)),
        Rule(f"{ours}.attn_norm2.*", (f"{theirs}.attention_norm2.*",)),
        Rule(f"{ours}.mlp_norm1.*", (f"{theirs}.ffn_norm1.*",)),
        Rule(f"{ours}.mlp_norm2.*", (f"{theirs}.ffn_norm2.*",)),
        Rule(f"{ours}.adaLN_modulation.*", (f"{theirs}.adaLN_modulation.*",)),
    )


def _rules(embedder: str, final: str, fused: bool) -> tuple[Rule, ...]:
    refiners = ("noise_refiner.#", "context_refiner.#", "siglip_refiner.#")
    return (
        *sandwich_rules("blocks.#", "layers.#", fused),
        *(rule for name in refiners for rule in sandwich_rules(name, name, fused)),
        Rule("x_embedder.*", (f"{embedder}.*",)),
        Rule("final_layer.*", (f"{final}.*",)),
        Rule("*", ("*",)),
    )


def sandwich_sizes(shapes: Shapes, embedder: str, q_norm: str) -> dict[str, int]:
    """What shapes say of a stack of sandwich blocks on patches of 2 x 2, by the fields of a configuration."""
    dim, features = shape(shapes, f"{embedder}.weight", 2)
    head = shape(shapes, q_norm, 1)[0]
    if dim % head or features % 4:
        raise DitkitError(f"{embedder}.weight is {[dim, features]}, which are no heads of {head} and patches of 2 x 2")
    return {
        "in_channels": features // 4,
        "hidden_size": dim,
        "depth": block_count(shapes, "layers."),
        "refiner_depth": block_count(shapes, "noise_refiner."),
        "num_heads": dim // head,
    }


def _config(source: Source, shapes: Shapes, options: Mapping[str, Any], embedder: str, q_norm: str) -> ZImageConfig:
    """What shapes say; how a head divides is known for the release, or said by config.json."""
    sizes, said = sandwich_sizes(shapes, embedder, q_norm), source.settings()
    known = published(ZImageConfig, depth=sizes["depth"], hidden_size=sizes["hidden_size"])
    axes = said.get("axes_dims", getattr(known, "axes", None))
    return ZImageConfig(
        **sizes,
        axes=tuple(option(options, "axes", axes, "how its heads divide into time, row and column")),
        theta=float(said.get("rope_theta", 256.0)),
        norm_eps=float(said.get("norm_eps", 1e-5)),
        text_dim=shape(shapes, "cap_embedder.0.weight", 1)[0],
        vision_dim=shape(shapes, "siglip_embedder.0.weight", 1)[0] if "siglip_embedder.0.weight" in shapes else 0,
    )


def _refusal(config: ZImageConfig, meaning: Meaning) -> str | None:
    if replace(meaning, t_eps=0.0) != _MEANING:
        return (
            "a Z-Image file means -velocity on a linear path with the clock 1-t to whoever reads it, and this model "
            f"was trained as {described(meaning)}"
        )
    if config.patch_size != 2:
        return f"Z-Image's files have patches of 2 x 2 in their names, and this model has {config.patch_size}"
    return None


def _sampling(config: ZImageConfig) -> dict[str, Any]:
    """The scheduler of the release. Guidance takes the caption to turn away from, which is the person's to say."""
    return {"steps": 50, "solver": Euler(), "grid": SD3(3.0), "guidance": 1.0}


_EMBEDDER, _Q_NORM = "all_x_embedder.2-1", "layers.0.attention.norm_q.weight"

Z_IMAGE = Format(
    name="z_image",
    title="Z-Image (Z-Image Team 2025)",
    model=ZImageConfig,
    match=lambda shapes: {f"{_EMBEDDER}.weight", "cap_embedder.0.weight", _Q_NORM} <= set(shapes),
    rules=_rules(_EMBEDDER, "all_final_layer.2-1", False),
    config=lambda source, shapes, options: _config(source, shapes, options, _EMBEDDER, _Q_NORM),
    denoiser=lambda source, config: _MEANING,
    refusal=_refusal,
    sampling=_sampling,
    objective=lambda config, meaning: Regression("velocity", LogitNormal()),
    settings=lambda config, meaning: {"config.json": z_image_settings(config)},
    file="diffusion_pytorch_model.safetensors",
)

_FUSED_Q_NORM = "layers.0.attention.q_norm.weight"

Z_IMAGE_COMFY = Format(
    name="z_image_comfy",
    title="Z-Image in one file, as ComfyUI reads it",
    model=ZImageConfig,
    match=lambda shapes: {"x_embedder.weight", "cap_pad_token", "layers.0.attention.qkv.weight"} <= set(shapes),
    rules=_rules("x_embedder", "final_layer", True),
    config=lambda source, shapes, options: _config(source, shapes, options, "x_embedder", _FUSED_Q_NORM),
    denoiser=lambda source, config: _MEANING,
    refusal=_refusal,
    sampling=_sampling,
    objective=lambda config, meaning: Regression("velocity", LogitNormal()),
    prefix="model.diffusion_model.",
    unread=("norm_final.weight",),
)


def z_image_settings(config: ZImageConfig) -> dict[str, Any]:
    """config.json of the transformer in diffusers, for what `Z_IMAGE.refusal` lets pass."""
    # the table of rotations there ends at axes_lens, and a longer caption is an error
    return {
        "_class_name": "ZImageTransformer2DModel",
        "_diffusers_version": VERSION,
        "all_patch_size": [2],
        "all_f_patch_size": [1],
        "in_channels": config.in_channels,
        "dim": config.hidden_size,
        "n_layers": config.depth,
        "n_refiner_layers": config.refiner_depth,
        "n_heads": config.num_heads,
        "n_kv_heads": config.num_heads,
        "norm_eps": config.norm_eps,
        "qk_norm": True,
        "cap_feat_dim": config.text_dim,
        "siglip_feat_dim": config.vision_dim or None,
        "rope_theta": config.theta,
        "t_scale": 1000.0,
        "axes_dims": list(config.axes),
        "axes_lens": [1536, 512, 512],
    }
