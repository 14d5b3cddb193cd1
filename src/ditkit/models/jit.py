"""JiT: "Back to Basics: Let Denoising Generative Models Denoise", Li & He 2025, arXiv 2511.13720.

A plain transformer on large raw-pixel patches that predicts the clean image: a low-rank patch embedding, RMSNorm,
SwiGLU, qk-norm, rotary positions, and copies of the class vector as in-context tokens from a middle block on. The
authors' language: x [b 3 h w] in [-1, 1], t in [0, 1] with t = 0 noise and t = 1 data, the output is the image.
Parameter names are those of the published checkpoints.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..conditioning import Conditioning
from ..config import register
from ..layers import (
    AdaLNZeroBlock,
    Attention,
    BottleneckPatchEmbed,
    Edit,
    FinalLayer,
    LabelEmbedder,
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
from .sizing import Sizing

__all__ = ["JiT", "JiTConfig"]


@register("model", "jit")
@dataclass(frozen=True)
class JiTConfig(ImageConfig):
    """Everything about a JiT; the defaults are JiT-B/16 on 256 px (JiT table 9)."""

    input_size: int | tuple[int, int] = 256
    """Side, or (rows, columns), of the image. Other sizes are accepted; only this one's positions are stored."""
    patch_size: int = 16
    in_channels: int = 3
    hidden_size: int = 768
    depth: int = 12
    num_heads: int = 12
    mlp_ratio: float = 4.0
    """The SwiGLU is two thirds as wide, so that it costs as much as an MLP of this ratio."""
    attn_drop: float = 0.0
    """Dropout of attention weights, in the middle half of the blocks."""
    proj_drop: float = 0.0
    """Dropout after attention and inside the SwiGLU, in the middle half of the blocks."""
    num_classes: int = 1000
    """0 = unconditional. The null label has the index num_classes."""
    bottleneck_dim: int = 128
    in_context_len: int = 32
    in_context_start: int = 4
    """The block before which the in-context class tokens join."""
    pattern: Any = None
    """Which tiles of the image attend to which (sliding_tiles, nabla), class tokens to all; None = all, as in the
    release."""

    sizing = Sizing(deep=("in_context_start",))

    def __post_init__(self) -> None:
        at_least_one(self, "patch_size", "in_channels", "hidden_size", "depth", "num_heads", "bottleneck_dim")
        check_pattern(self)

    def build(self, seed: int = 0) -> JiT:
        """The network with initial weights."""
        return instantiate(JiT, self, seed)


def block(config: JiTConfig, index: int) -> AdaLNZeroBlock:
    """RMSNorm, attention with qk-norm, SwiGLU; dropout only in the middle half of the network."""
    dim = config.hidden_size
    quarter = config.depth // 4
    middle = quarter <= index < 3 * quarter
    attn_drop, proj_drop = (config.attn_drop, config.proj_drop) if middle else (0.0, 0.0)
    return AdaLNZeroBlock(
        dim,
        norm1=RMSNorm(dim),
        attn=Attention(dim, config.num_heads, qk_norm="head", attn_drop=attn_drop, proj_drop=proj_drop),
        norm2=RMSNorm(dim),
        mlp=SwiGLU(dim, int(int(dim * config.mlp_ratio) * 2 / 3), proj_drop),
    )


class JiT(Model):
    """Just image Transformer. Raises ValueError for an x that its patches do not tile, and for impossible sizes."""

    plan = Plan(shard=("blocks",))

    def __init__(self, config: JiTConfig):
        super().__init__()
        self.config = config
        dim, patch = config.hidden_size, config.patch_size
        check_heads_2d(dim, config.num_heads)
        if config.in_context_len and not 0 <= config.in_context_start < config.depth:
            raise ValueError(
                f"in_context_start {config.in_context_start} is no block of a depth {config.depth} network, "
                "so the class tokens would never join: change it, or set in_context_len to 0"
            )
        self.x_embedder = BottleneckPatchEmbed(config.in_channels, patch, config.bottleneck_dim, dim)
        self.t_embedder = TimestepEmbedder(dim)
        self.y_embedder = LabelEmbedder(config.num_classes, dim)
        self.pos_embed = nn.Parameter(sincos_2d(dim, config.grid), requires_grad=False)
        if config.in_context_len:
            self.in_context_posemb = nn.Parameter(torch.empty(1, config.in_context_len, dim))
        self.blocks = nn.ModuleList(block(config, i) for i in range(config.depth))
        self.final_layer = FinalLayer(dim, patch * patch * config.in_channels, RMSNorm(dim))

    def init_weights(self, rng: Rng) -> None:
        """adaLN-Zero's start, the fixed positions, and N(0, .02) for the positions of the in-context tokens."""
        init_adaln_zero(self, rng.generator)
        self.pos_embed.data = sincos_2d(self.config.hidden_size, self.config.grid)
        if self.config.in_context_len:
            nn.init.normal_(self.in_context_posemb, std=0.02, generator=rng.generator("in_context_posemb"))

    def rope(self, grid: tuple[int, int]) -> Float[Tensor, "1 2 m hd"]:
        """Rotations: first the in-context tokens, which stay unrotated, then the patches, row angles before column, in
        the order of the pattern."""
        angles = grid_angles(grid, self.config.hidden_size // self.config.num_heads, self.pos_embed.device)
        angles = arrange(self.config.pattern, grid, self.pos_embed.device).sort(angles, dim=0)
        return rope_table(torch.cat((angles.new_zeros(self.config.in_context_len, angles.shape[1]), angles)))[None]

    def prepare(self, cond: Conditioning, shape: Sequence[int], times: Sequence[float] = ()) -> Conditioning:
        """Label vectors, positions and rotations."""
        patch = self.config.patch_size
        grid = (shape[-2] // patch, shape[-1] // patch)
        return cond.with_static(
            label=self.y_embedder(cond.label, shape[0]),
            positions=positions_2d(self.pos_embed, self.config.grid, grid),
            rope=self.rope(grid),
        )

    def forward(
        self, x: Float[Tensor, "b c h w"], t: Float[Tensor, "b"], cond: Conditioning, *, edit: Edit | None = None
    ) -> Float[Tensor, "b c h w"]:
        """t in [0, 1], 1 = data; the result is the clean image."""
        config = self.config
        grid = patch_grid(x, config.in_channels, config.patch_size)
        if "label" not in cond.static:
            cond = self.prepare(cond, x.shape)
        label, rope = cond.static["label"], cond.static["rope"][0]
        c = self.t_embedder(t) + label
        arranged = arrange(config.pattern, grid, x.device)
        h, mask = arranged.sort(self.x_embedder(x) + cond.static["positions"]), arranged.mask
        extra = 0
        for i, blk in enumerate(self.blocks):
            if i == config.in_context_start and config.in_context_len:
                extra = config.in_context_len
                h = torch.cat((label[:, None] + self.in_context_posemb, h), dim=1)
                mask = arrange(config.pattern, grid, x.device, before=extra).mask
            h = visit(edit, f"blocks.{i}", blk, h, c, rope[:, config.in_context_len - extra :], mask)
        return unpatchify(self.final_layer(arranged.unsort(h[:, extra:]), c), grid, config.patch_size)


# JiT table 9: the letter is depth and width, the number the patch size, for images of 16 x 16 patches.
SIZES = {
    "b": JiTConfig(depth=12, hidden_size=768, num_heads=12),
    "l": JiTConfig(depth=24, hidden_size=1024, num_heads=16, in_context_start=8),
    "h": JiTConfig(depth=32, hidden_size=1280, num_heads=16, bottleneck_dim=256, in_context_start=10, proj_drop=0.2),
    "g": JiTConfig(depth=40, hidden_size=1664, num_heads=16, bottleneck_dim=256, in_context_start=10, proj_drop=0.2),
}
register_models(
    {
        f"jit_{size}_{patch}": replace(c, patch_size=patch, input_size=16 * patch)
        for size, c in SIZES.items()
        for patch in (16, 32)
    }
)
