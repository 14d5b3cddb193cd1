"""MMDiT: "Scaling Rectified Flow Transformers for High-Resolution Image Synthesis", Esser et al. 2024, arXiv
2403.03206: Stable Diffusion 3 and 3.5.

Two streams of tokens, patches of a latent and a text, each with its own weights (modulation, projections, MLP), meet in
one attention. Time and the pooled text of two CLIP encoders modulate both (adaLN-Zero). After the last block nobody
reads the text, so there it only gives keys and values. 3.5 norms q and k; its medium size (MMDiT-X) also lets the image
attend to itself alone in the first blocks, with a modulation of its own.

The authors' language: x [b 16 h w] are latents, t in 0..1000 with 0 = data, the output is the velocity from data to
noise on the linear path. The text is CLIP's tokens followed by T5's, each filled up to 77 in the paper. The authors
attend to this filling, so it belongs to the text and its mask is True; what the mask leaves out is not seen. Parameter
names are those of the published checkpoints, but for `ln_q` and `ln_k`, which are `q_norm` and `k_norm` here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..conditioning import Conditioning, Tokens
from ..config import DitkitError, register
from ..layers import (
    Attention,
    DualBlock,
    Edit,
    FinalLayer,
    Mlp,
    PatchEmbed,
    Stream,
    TimestepEmbedder,
    VectorEmbedder,
    init_adaln_zero,
    key_mask,
    layer_norm,
    patch_grid,
    sincos_2d,
    unpatchify,
    visit,
)
from ..rng import Rng
from .registry import ImageConfig, Model, Plan, at_least_one, given_pooled, given_text, instantiate, register_models
from .sizing import Sizing

__all__ = ["MMDiT", "MMDiTConfig"]


@register("model", "mmdit")
@dataclass(frozen=True)
class MMDiTConfig(ImageConfig):
    """Everything about an MMDiT; the defaults are Stable Diffusion 3 medium at 1024 px."""

    input_size: int | tuple[int, int] = 128
    """Side, or (rows, columns), of the latent. Other sizes are accepted, up to `position_size` patches."""
    patch_size: int = 2
    in_channels: int = 16
    hidden_size: int = 1536
    depth: int = 24
    num_heads: int = 24
    mlp_ratio: float = 4.0
    qk_norm: bool = False
    """RMS norm of q and k per head: Stable Diffusion 3.5."""
    self_attention: int = 0
    """In so many of the first blocks the image also attends to itself alone: 13 in 3.5 medium."""
    text_dim: int = 4096
    """Channels of the text's tokens: those of T5-XXL, to which CLIP's are filled up."""
    pooled_dim: int = 2048
    """Channels of the pooled text: two CLIP encoders."""
    position_size: int = 192
    """Patches in a row, and in a column, of the table of positions; an image takes its middle."""

    sizing = Sizing(deep=("self_attention",))

    def __post_init__(self) -> None:
        at_least_one(self, "patch_size", "in_channels", "hidden_size", "depth", "num_heads", "text_dim", "pooled_dim")
        if not 0 <= self.self_attention <= self.depth:
            raise DitkitError(f"model.self_attention is 0 to depth ({self.depth}), not {self.self_attention}")
        if max(self.grid) > self.position_size:
            patches = " x ".join(map(str, self.grid))
            raise DitkitError(
                f"model.input_size {self.input_size} has {patches} patches, and the table of positions has "
                f"{self.position_size} in a row: raise model.position_size"
            )

    def example(self, batch: int) -> Conditioning:
        """A text of zeros, as long as in the paper: 77 tokens of CLIP and 77 of T5."""
        text = Tokens.zeros(batch, 154, self.text_dim)
        return Conditioning(text=text, pooled=torch.zeros(batch, self.pooled_dim))

    def positions(self) -> Float[Tensor, "1 m d"]:
        """The table of section 5.3.2, "Positional Encodings for Varying Aspect Ratios": an image of `input_size` spans
        0 to 16 whatever its resolution, the rest lies around it. A published file brings its own table."""
        size, side = self.position_size, max(self.grid)
        step = 16 / side
        return sincos_2d(self.hidden_size, (size, size), start=-step * ((size - side) // 2), step=step)

    def build(self, seed: int = 0) -> MMDiT:
        """The network with initial weights."""
        return instantiate(MMDiT, self, seed)


def block(config: MMDiTConfig, i: int) -> DualBlock:
    """Block `i`: the same two streams, but for the image's own attention in the first and no text after the last."""
    dim, last = config.hidden_size, i == config.depth - 1

    def attention(project_out: bool = True) -> Attention:
        norm = "head" if config.qk_norm else None
        return Attention(dim, config.num_heads, qk_norm=norm, project_out=project_out)

    def mlp() -> Mlp:
        return Mlp(dim, int(dim * config.mlp_ratio))

    own = attention() if i < config.self_attention else None
    return DualBlock(
        x_block=Stream(dim, attention(), mlp(), own),
        context_block=Stream(dim, attention(not last), None if last else mlp()),
    )


class MMDiT(Model):
    """Multimodal diffusion transformer. Raises ValueError for an x that its patches do not tile or its positions do not
    reach, and for a text that is missing or of other channels."""

    plan = Plan(shard=("joint_blocks",))

    def __init__(self, config: MMDiTConfig):
        super().__init__()
        self.config = config
        dim, patch = config.hidden_size, config.patch_size
        self.x_embedder = PatchEmbed(config.in_channels, patch, dim)
        self.t_embedder = TimestepEmbedder(dim)
        self.y_embedder = VectorEmbedder(config.pooled_dim, dim)
        self.context_embedder = nn.Linear(config.text_dim, dim)
        self.pos_embed = nn.Parameter(config.positions(), requires_grad=False)
        self.joint_blocks = nn.ModuleList(block(config, i) for i in range(config.depth))
        self.final_layer = FinalLayer(dim, patch * patch * config.in_channels, layer_norm(dim))

    def init_weights(self, rng: Rng) -> None:
        """adaLN-Zero's start, and the table of positions."""
        init_adaln_zero(self, rng.generator)
        self.pos_embed.data = self.config.positions()

    def cropped(self, grid: Sequence[int]) -> Float[Tensor, "1 n d"]:
        """Positions of a grid of patches: the middle of the table. Raises ValueError if it is too small."""
        size = self.config.position_size
        if max(grid) > size:
            raise ValueError(
                f"x has {' x '.join(map(str, grid))} patches and the table of positions {size} x {size}: raise "
                "position_size or make x smaller"
            )
        top, left = ((size - n) // 2 for n in grid)
        table = self.pos_embed.unflatten(1, (size, size))
        return table[:, top : top + grid[0], left : left + grid[1]].flatten(1, 2)

    def prepare(self, cond: Conditioning, shape: Sequence[int], times: Sequence[float] = ()) -> Conditioning:
        """The text's tokens before the first block, the pooled vector, positions, and the mask of keys."""
        text = given_text(cond, self.config.text_dim)
        grid = [n // self.config.patch_size for n in shape[2:]]
        return cond.with_static(
            text=self.context_embedder(text.values.to(self.context_embedder.weight.dtype)),
            pooled=self.y_embedder(given_pooled(cond, self.config.pooled_dim)),
            positions=self.cropped(grid),
            mask=key_mask(text.mask, grid[0] * grid[1]),
        )

    def forward(
        self, x: Float[Tensor, "b c h w"], t: Float[Tensor, "b"], cond: Conditioning, *, edit: Edit | None = None
    ) -> Float[Tensor, "b c h w"]:
        """t in 0..1000; the result is the velocity from data to noise."""
        config = self.config
        grid = patch_grid(x, config.in_channels, config.patch_size)
        if "text" not in cond.static:
            cond = self.prepare(cond, x.shape)
        c, mask = self.t_embedder(t) + cond.static["pooled"], cond.static["mask"]
        image, text = self.x_embedder(x) + cond.static["positions"], cond.static["text"].expand(len(x), -1, -1)
        for i, blk in enumerate(self.joint_blocks):
            image, text = visit(edit, f"joint_blocks.{i}", blk, (image, text), (c, c), None, mask)
        return unpatchify(self.final_layer(image, c), grid, config.patch_size)


# Parameters, without the table of positions: 2.03, 8.06 and 2.24 billion.
register_models(
    {
        "sd3_medium": MMDiTConfig(),
        "sd35_large": MMDiTConfig(hidden_size=2432, depth=38, num_heads=38, qk_norm=True),
        "sd35_medium": MMDiTConfig(qk_norm=True, self_attention=13, position_size=384),
        "mmdit_tiny": MMDiTConfig(
            input_size=16, in_channels=4, hidden_size=96, depth=4, num_heads=4, qk_norm=True, self_attention=2,
            text_dim=64, pooled_dim=32, position_size=16,
        ),
    }
)  # fmt: skip
