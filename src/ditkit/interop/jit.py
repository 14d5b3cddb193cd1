"""JiT as its authors publish it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ..config import DitkitError
from ..diffusion import Heun, Linear, LogitNormal, Meaning, Regression
from ..diffusion.grid import Uniform
from ..models import JiTConfig
from .dit import side_of, square
from .format import Format, Shapes, block_count, described, option, published, shape
from .source import Source
from .table import Rule

__all__ = ["JIT"]


def _config(source: Source, shapes: Shapes, options: Mapping[str, Any]) -> JiTConfig:
    """Everything but the block where the class tokens join follows from shapes."""
    bottleneck, channels, *patches = shape(shapes, "x_embedder.proj1.weight", 4)
    patch = side_of(tuple(patches), "x_embedder.proj1.weight")
    dim = shape(shapes, "x_embedder.proj2.weight", 4)[0]
    depth = block_count(shapes, "blocks.")
    head = shape(shapes, "blocks.0.attn.q_norm.weight", 1)[0]
    if dim % head:
        raise DitkitError(f"q_norm is for heads of {head} channels, which do not divide {dim}")
    length = shape(shapes, "in_context_posemb", 3)[1] if "in_context_posemb" in shapes else 0
    start = 0
    if length:
        known = published(JiTConfig, depth=depth, hidden_size=dim)
        guess = getattr(known, "in_context_start", source.args.get("in_context_start"))
        start = option(options, "in_context_start", guess, "before which block the class tokens join")
    return JiTConfig(
        input_size=square(shape(shapes, "pos_embed", 3)[1], patch, options),
        patch_size=patch,
        in_channels=channels,
        hidden_size=dim,
        depth=depth,
        num_heads=dim // head,
        mlp_ratio=_ratio(shape(shapes, "blocks.0.mlp.w12.weight", 2)[0], dim),
        proj_drop=_number(source, "proj_dropout", 0.0),
        attn_drop=_number(source, "attn_dropout", 0.0),
        num_classes=shape(shapes, "y_embedder.embedding_table.weight", 2)[0] - 1,
        bottleneck_dim=bottleneck,
        in_context_len=length,
        in_context_start=start,
    )


def _number(source: Source, name: str, default: float) -> float:
    """A number that was saved beside the weights. Raises DitkitError if it is none."""
    value = source.args.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise DitkitError(f"its args say {name} = {value!r}, which is no number")
    return float(value)


def _ratio(width: int, dim: int) -> float:
    """The mlp_ratio whose SwiGLU is half of `width` wide. Raises DitkitError if there is none."""
    hidden, odd = divmod(width, 2)
    for ratio in (4.0, hidden * 1.5 / dim, (hidden + 0.5) * 1.5 / dim, (hidden * 1.5 + 1) / dim):
        if not odd and int(int(dim * ratio) * 2 / 3) == hidden:
            return ratio
    raise DitkitError(f"w12 has {width} rows, which are no SwiGLU of {dim} channels")


def _meaning(source: Source, config: JiTConfig) -> Meaning:
    """The noise grows with the image: by its side over 256, unless the file says (JiT section 4.3)."""
    size = config.input_size
    scale = size / 256 if size in (256, 512, 1024) and isinstance(size, int) else 1.0
    scale = _number(source, "noise_scale", scale)
    if scale <= 0:
        raise DitkitError(f"its args say noise_scale = {scale}, which must be above 0")
    return Meaning(Linear(scale), "x0", "1-t", _number(source, "t_eps", 0.05))


def _refusal(config: JiTConfig, meaning: Meaning) -> str | None:
    if config.pattern is not None:
        return f"the release attends to all patches, and this model was trained with the pattern {config.pattern}"
    wanted = Meaning(meaning.path, "x0", "1-t", meaning.t_eps)
    if meaning != wanted or not isinstance(meaning.path, Linear):
        return (
            "a JiT file means x0 on a linear path with the clock 1-t to whoever reads it, and this model was trained "
            f"as {described(meaning)}"
        )
    return None


# JiT's README: the scale for each width and patch. G's is not published, and has H's
_GUIDANCE = {
    (768, 16): 3.0, (768, 32): 3.0, (1024, 16): 2.4, (1024, 32): 2.5, (1280, 16): 2.2, (1280, 32): 2.3,
    (1664, 16): 2.2, (1664, 32): 2.3,
}  # fmt: skip


def _sampling(config: JiTConfig) -> dict[str, Any]:
    """50 Heun steps; guidance where the authors' t is above 0.1, with the scale of the size (2.4 for another one)."""
    scale = _GUIDANCE.get((config.hidden_size, config.patch_size), 2.4)
    return {
        "steps": 50,
        "solver": Heun(),
        "grid": Uniform(),
        "guidance": scale if config.num_classes else 1.0,
        "interval": (0.0, 0.9),
    }


JIT = Format(
    name="jit",
    title="JiT (Li & He 2025)",
    model=JiTConfig,
    match=lambda shapes: {"x_embedder.proj1.weight", "x_embedder.proj2.weight", "pos_embed"} <= set(shapes),
    rules=(Rule("*", ("*",)),),
    config=_config,
    denoiser=_meaning,
    refusal=_refusal,
    sampling=_sampling,
    objective=lambda config, meaning: Regression("velocity", LogitNormal(0.8, 0.8)),
    weights={"model_ema1": 0.9999, "model_ema2": 0.9996, "model": 0.0},
    prefix="net.",
)
