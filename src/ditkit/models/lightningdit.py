"""LightningDiT: "Reconstruction vs. Generation", Yao, Yang & Wang 2025, arXiv 2501.01423.

DiT with what language models have brought since: rotary positions (beside the fixed ones), SwiGLU, RMSNorm with
weights, and qk-norm on request; on single latents (patch 1) of an autoencoder with 32 channels at a 16th of the
resolution. The authors' language: x [b 32 h w] are latents, t in [0, 1] with t = 0 noise and t = 1 data, the output is
the velocity from noise to data. Parameter names are those of the published checkpoints, whose buffers
`feat_rope.freqs_cos` and `feat_rope.freqs_sin` are computed here and not stored.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from ..conditioning import Conditioning
from ..config import register
from ..layers import (
    AdaLNZeroBlock,
    Attention,
    Edit,
    FinalLayer,
    LabelEmbedder,
    PatchEmbed,
    RMSNorm,
    SwiGLU,
    TimestepEmbedder,
    arrange,
    check_heads_2d,
    grid_angles,
    init_adaln_zero,
    patch_grid,
    positions_2d,
    rope_table,
    sincos_2d,
    unpatchify,
    visit,
)
from ..rng import Rng
from .registry import ImageConfig, Model, Plan, at_least_one, check_pattern, instantiate, register_models

__all__ = ["LightningDiT", "LightningDiTConfig"]


@register("model", "lightningdit")
@dataclass(frozen=True)
class LightningDiTConfig(ImageConfig):
    """Everything about a LightningDiT; the defaults are LightningDiT-XL/1 on 256 px."""

    input_size: int | tuple[int, int] = 16
    """Side, or (rows, columns), of the latent. Other sizes are accepted; only this one's positions are stored."""
    patch_size: int = 1
    in_channels: int = 32
    hidden_size: int = 1152
    depth: int = 28
    num_heads: int = 16
    mlp_ratio: float = 4.0
    """The SwiGLU is two thirds as wide, so that it costs as much as an MLP of this ratio."""
    qk_norm: bool = False
    """RMS norm of q and k per head: off in the release; it keeps a long training in bf16 from diverging."""
    num_classes: int = 1000
    """0 = unconditional. The null label has the index num_classes."""
    pattern: Any = None
    """Which tiles of the image attend to which (sliding_tiles, nabla); None = all, as in the release."""

    def __post_init__(self) -> None:
        at_least_one(self, "patch_size", "in_channels", "hidden_size", "depth", "num_heads")
        check_pattern(self)

    def build(self, seed: int = 0) -> LightningDiT:
        """The network with initial weights."""
        return instantiate(LightningDiT, self, seed)


def block(config: LightningDiTConfig) -> AdaLNZeroBlock:
    """RMSNorm with weights, attention with rotary positions, SwiGLU."""
    dim = config.hidden_size
    return AdaLNZeroBlock(
        dim,
        norm1=RMSNorm(dim),
        attn=Attention(dim, config.num_heads, qk_norm="head" if config.qk_norm else None),
        norm2=RMSNorm(dim),
        mlp=SwiGLU(dim, int(2 / 3 * int(dim * config.mlp_ratio))),
    )


class LightningDiT(Model):
    """DiT with rotary positions, SwiGLU and RMSNorm. Raises ValueError for an x that its patches do not tile."""

    plan = Plan(shard=("blocks",))

    def __init__(self, config: LightningDiTConfig):
        super().__init__()
        self.config = config
        dim, patch = config.hidden_size, config.patch_size
        check_heads_2d(dim, config.num_heads)
        self.x_embedder = PatchEmbed(config.in_channels, patch, dim)
        self.t_embedder = TimestepEmbedder(dim)
        self.y_embedder = LabelEmbedder(config.num_classes, dim)
        self.pos_embed = nn.Parameter(sincos_2d(dim, config.grid), requires_grad=False)
        self.blocks = nn.ModuleList(block(config) for _ in range(config.depth))
        self.final_layer = FinalLayer(dim, patch * patch * config.in_channels, RMSNorm(dim))

    def init_weights(self, rng: Rng) -> None:
        """adaLN-Zero's start, and the fixed positions."""
        init_adaln_zero(self, rng.generator)
        self.pos_embed.data = sincos_2d(self.config.hidden_size, self.config.grid)

    def rope(self, grid: tuple[int, int]) -> Float[Tensor, "1 2 n hd"]:
        """Rotations of the patches, row angles before column."""
        head_dim = self.config.hidden_size // self.config.num_heads
        return rope_table(grid_angles(grid, head_dim, self.pos_embed.device))[None]

    def prepare(self, cond: Conditioning, shape: Sequence[int], times: Sequence[float] = ()) -> Conditioning:
        """Label vectors, positions, and rotations in the order of the pattern."""
        patch = self.config.patch_size
        grid = (shape[-2] // patch, shape[-1] // patch)
        arranged = arrange(self.config.pattern, grid, self.pos_embed.device)
        return cond.with_static(
            label=self.y_embedder(cond.label, shape[0]),
            positions=positions_2d(self.pos_embed, self.config.grid, grid),
            rope=arranged.sort(self.rope(grid), dim=2),
        )

    def forward(
        self, x: Float[Tensor, "b c h w"], t: Float[Tensor, "b"], cond: Conditioning, *, edit: Edit | None = None
    ) -> Float[Tensor, "b c h w"]:
        """t in [0, 1], 1 = data; the result is the velocity from noise to data."""
        config = self.config
        grid = patch_grid(x, config.in_channels, config.patch_size)
        if "label" not in cond.static:
            cond = self.prepare(cond, x.shape)
        c = self.t_embedder(t) + cond.static["label"]
        arranged = arrange(config.pattern, grid, x.device)
        h = arranged.sort(self.x_embedder(x) + cond.static["positions"])
        for i, blk in enumerate(self.blocks):
            h = visit(edit, f"blocks.{i}", blk, h, c, cond.static["rope"][0], arranged.mask)
        return unpatchify(self.final_layer(arranged.unsort(h), c), grid, config.patch_size)


# The sizes of the authors' code: the letter is depth and width, the number the patch size.
SIZES = {
    "b": LightningDiTConfig(depth=12, hidden_size=768, num_heads=12),
    "l": LightningDiTConfig(depth=24, hidden_size=1024, num_heads=16),
    "xl": LightningDiTConfig(),
    "1p0b": LightningDiTConfig(depth=24, hidden_size=1536, num_heads=24),
}
register_models(
    {
        f"lightningdit_{size}_{patch}": replace(SIZES[size], patch_size=patch)
        for patch, sizes in {1: ("b", "xl", "1p0b"), 2: ("b", "l", "xl")}.items()
        for size in sizes
    }
)
