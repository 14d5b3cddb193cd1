"""PixArt as its authors publish it, and as diffusers has it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..config import DitkitError
from ..diffusion import DDPM, Discrete, DPMpp2M, Meaning, Regression
from ..diffusion.grid import Trailing
from ..models import PixArtConfig
from .diffusers import VERSION, embedder, head_count
from .dit import ddpm_meaning, side_of
from .format import Format, Shapes, block_count, described, expect, integer, option, published, settings, shape
from .source import Source
from .table import Rule

__all__ = ["DIFFUSERS_PIXART", "PIXART", "diffusers_single", "released_single"]

_MEANING = Meaning(DDPM(), "eps", "index")


def released_single() -> tuple[Rule, ...]:
    """What PixArt's and Sana's authors call differently, where both have it."""
    return (
        *(Rule(f"y_embedder.{name}.*", (f"y_embedder.y_proj.{name}.*",)) for name in ("fc1", "fc2")),
        *(Rule(f"blocks.#.cross.{name}.*", (f"blocks.#.cross_attn.{name}_linear.*",)) for name in ("q", "kv")),
        Rule("blocks.#.cross.*", ("blocks.#.cross_attn.*",)),
    )


def diffusers_single() -> tuple[Rule, ...]:
    """What PixArt and Sana share in diffusers' names."""
    block = "transformer_blocks.#"
    return (
        *(Rule(f"y_embedder.fc{i}.*", (f"caption_projection.linear_{i}.*",)) for i in (1, 2)),
        Rule("blocks.#.scale_shift_table", (f"{block}.scale_shift_table",)),
        Rule("blocks.#.attn.qkv.*", tuple(f"{block}.attn1.to_{part}.*" for part in "qkv")),
        Rule("blocks.#.cross.q.*", (f"{block}.attn2.to_q.*",)),
        Rule("blocks.#.cross.kv.*", tuple(f"{block}.attn2.to_{part}.*" for part in "kv")),
        *(
            Rule(f"blocks.#.{ours}.{part}_norm.*", (f"{block}.{theirs}.norm_{part}.*",))
            for ours, theirs in (("attn", "attn1"), ("cross", "attn2"))
            for part in "qk"
        ),
        Rule("blocks.#.attn.proj.*", (f"{block}.attn1.to_out.0.*",)),
        Rule("blocks.#.cross.proj.*", (f"{block}.attn2.to_out.0.*",)),
        Rule("final_layer.scale_shift_table", ("scale_shift_table",)),
        Rule("final_layer.linear.*", ("proj_out.*",)),
    )


def _config(shapes: Shapes, names: Mapping[str, str], **rest: Any) -> PixArtConfig:
    """What follows from shapes."""
    dim, channels, *patches = shape(shapes, names["patches"], 4)
    patch = side_of(tuple(patches), names["patches"])
    return PixArtConfig(
        patch_size=patch,
        in_channels=channels,
        hidden_size=dim,
        depth=block_count(shapes, names["blocks"]),
        mlp_ratio=shape(shapes, f"{names['blocks']}0.{names['mlp']}", 2)[0] / dim,
        text_dim=shape(shapes, names["text"], 2)[1],
        sizes=names["size"] in shapes,
        learn_sigma=shape(shapes, names["out"], 2)[0] == 2 * patch * patch * channels,
        **rest,
    )


_RELEASED = {
    "patches": "x_embedder.proj.weight",
    "blocks": "blocks.",
    "mlp": "mlp.fc1.weight",
    "text": "y_embedder.y_proj.fc1.weight",
    "size": "csize_embedder.mlp.0.weight",
    "out": "final_layer.linear.weight",
}
_NULL = "y_embedder.y_embedding"


def _released(source: Source, shapes: Shapes, options: Mapping[str, Any]) -> PixArtConfig:
    """The size of the image is not in the file: alpha of 512 px and Sigma of 1024 px, unless it sees sizes."""
    dim, depth = shape(shapes, _RELEASED["patches"], 4)[0], block_count(shapes, "blocks.")
    heads = getattr(published(PixArtConfig, depth=depth, hidden_size=dim), "num_heads", None)
    length = shapes[_NULL][0] if len(shapes.get(_NULL, ())) == 2 else 300
    guess = 64 if length == 120 and _RELEASED["size"] not in shapes else 128
    size = options.get("input_size", guess)
    return _config(
        shapes,
        _RELEASED,
        input_size=size,
        num_heads=option(options, "num_heads", heads, "how many heads its attention has"),
        text_length=length,
        position_scale=(size if isinstance(size, int) else max(size)) / 64,
    )


def _refusal(config: PixArtConfig, meaning: Meaning) -> str | None:
    if meaning != _MEANING:
        return (
            "whoever reads PixArt takes its output for eps on the DDPM table with the clock index, and this model was "
            f"trained as {described(meaning)}"
        )
    return None


def _objective(config: PixArtConfig, meaning: Meaning) -> Regression:
    steps = meaning.path.steps
    return Regression(meaning.prediction, Discrete(steps), variance="hybrid" if config.learn_sigma else None)


def _sampling(config: PixArtConfig) -> dict[str, Any]:
    """As many steps as in diffusers' pipeline. Guidance takes the caption to turn away from, the person's to say."""
    return {"steps": 20, "solver": DPMpp2M(), "grid": Trailing(), "guidance": 1.0}


PIXART = Format(
    name="pixart",
    title="PixArt (Chen et al. 2023, 2024)",
    model=PixArtConfig,
    match=lambda shapes: (
        {_RELEASED["text"], "blocks.0.cross_attn.kv_linear.weight", "blocks.0.mlp.fc1.weight"} <= set(shapes)
    ),
    rules=(
        Rule("size_embedder.*", ("csize_embedder.*",)),
        Rule("ratio_embedder.*", ("ar_embedder.*",)),
        *released_single(),
        Rule("*", ("*",)),
    ),
    config=_released,
    denoiser=lambda source, config: _MEANING,
    refusal=_refusal,
    sampling=_sampling,
    objective=_objective,
    weights={"state_dict_ema": 0.9999, "state_dict": 0.0},
    # the caption that stands for none in the authors' guidance, and positions, which are computed
    unread=(_NULL, "pos_embed"),
)

_DIFFUSERS = {
    "patches": "pos_embed.proj.weight",
    "blocks": "transformer_blocks.",
    "mlp": "ff.net.0.proj.weight",
    "text": "caption_projection.linear_1.weight",
    "size": "adaln_single.emb.resolution_embedder.linear_1.weight",
    "out": "proj_out.weight",
}
_FIXED = {
    "norm_type": "ada_norm_single", "activation_fn": "gelu-approximate", "attention_bias": True,
    "norm_elementwise_affine": False, "norm_eps": 1e-6, "dropout": 0.0, "attention_type": "default",
}  # fmt: skip


def _from_diffusers(source: Source, shapes: Shapes, options: Mapping[str, Any]) -> PixArtConfig:
    said = settings(source)
    expect(said, _FIXED, "a PixArt")
    size, scale = integer(said, "sample_size", 128), said.get("interpolation_scale")
    scale = max(size // 64, 1) if scale is None else scale
    if not isinstance(scale, int | float):
        raise DitkitError(f"transformer/config.json: interpolation_scale is {scale!r}, not a number")
    sizes = _DIFFUSERS["size"] in shapes
    dim = shape(shapes, _DIFFUSERS["patches"], 4)[0]
    return _config(
        shapes,
        _DIFFUSERS,
        input_size=size,
        num_heads=head_count(said, dim, "", (16, 72)),
        text_length=120 if sizes else 300,
        position_scale=float(scale),
    )


def _to_diffusers(config: PixArtConfig, meaning: Meaning) -> dict[str, dict[str, Any]]:
    """The config.json of a PixArtTransformer2DModel."""
    dim = config.hidden_size
    said = {
        "_class_name": "PixArtTransformer2DModel",
        "_diffusers_version": VERSION,
        **_FIXED,
        "num_attention_heads": config.num_heads,
        "attention_head_dim": dim // config.num_heads,
        "in_channels": config.in_channels,
        "out_channels": config.in_channels * (2 if config.learn_sigma else 1),
        "num_layers": config.depth,
        "cross_attention_dim": dim,
        "sample_size": config.input_size,
        "patch_size": config.patch_size,
        "interpolation_scale": config.position_scale,
        "use_additional_conditions": config.sizes,
        "caption_channels": config.text_dim,
    }
    return {"config.json": said}


def _not_diffusers(config: PixArtConfig, meaning: Meaning) -> str | None:
    if not isinstance(config.input_size, int):
        rows, columns = config.input_size
        return f"PixArtTransformer2DModel takes squares only, not {rows} x {columns}"
    if int(config.hidden_size * config.mlp_ratio) != 4 * config.hidden_size:
        return f"PixArtTransformer2DModel has an mlp_ratio of 4, not {config.mlp_ratio:g}"
    return _refusal(config, meaning)


DIFFUSERS_PIXART = Format(
    name="diffusers_pixart",
    title="PixArt in diffusers (PixArtTransformer2DModel)",
    model=PixArtConfig,
    match=lambda shapes: {"adaln_single.linear.weight", "pos_embed.proj.weight", _DIFFUSERS["text"]} <= set(shapes),
    rules=(
        Rule("x_embedder.proj.*", ("pos_embed.proj.*",)),
        *embedder("t_embedder", "adaln_single.emb.timestep_embedder"),
        *embedder("size_embedder", "adaln_single.emb.resolution_embedder"),
        *embedder("ratio_embedder", "adaln_single.emb.aspect_ratio_embedder"),
        Rule("t_block.1.*", ("adaln_single.linear.*",)),
        Rule("blocks.#.mlp.fc1.*", ("transformer_blocks.#.ff.net.0.proj.*",)),
        Rule("blocks.#.mlp.fc2.*", ("transformer_blocks.#.ff.net.2.*",)),
        *diffusers_single(),
    ),
    config=_from_diffusers,
    denoiser=ddpm_meaning,
    refusal=_not_diffusers,
    sampling=_sampling,
    objective=_objective,
    unread=("pos_embed.pos_embed", "caption_projection.y_embedding"),
    settings=_to_diffusers,
    file="diffusion_pytorch_model.safetensors",
)
