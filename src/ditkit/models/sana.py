"""Sana: "Efficient High-Resolution Image Synthesis with Linear Diffusion Transformers", Xie et al. 2024, arXiv
2410.10629; and "Sana-Sprint", Chen et al. 2025, arXiv 2503.09641.

PixArt's block with three changes that make its cost linear in the number of tokens: self-attention with the weights
relu(q) . relu(k), an MLP that sees neighbours through a 3 x 3 convolution, and therefore no positions; on latents of an
autoencoder at a 32nd of the resolution (DC-AE, 32 channels), without patches. The caption, by Gemma 2, goes through an
MLP and an RMS norm. The authors' language: x [b 32 h w] are latents, t in [0, 1000] with t = 0 data, the output is the
velocity from data to noise. `cond.text` has a mask: what is masked is not attended.

Sprint adds RMS norms of q and k across all heads, in both attentions, and a vector of the guidance scale,
`cond.scalars["guidance"]` [b]; what its output means (the angle of TrigFlow) is another matter.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..conditioning import Conditioning, Tokens
from ..config import DitkitError, register
from ..layers import (
    AdaLNSingleBlock,
    AdaLNSingleFinal,
    CrossAttention,
    Edit,
    LinearAttention,
    MixFFN,
    Mlp,
    PatchEmbed,
    RMSNorm,
    TimestepEmbedder,
    adaln,
    init_adaln_single,
    keys_for,
    keys_in,
    layer_norm,
    patch_grid,
    unpatchify,
    visit,
)
from ..rng import Rng
from .registry import ImageConfig, Model, Plan, at_least_one, given_text, instantiate, register_models
from .sizing import Sizing

__all__ = ["Sana", "SanaConfig"]


@register("model", "sana")
@dataclass(frozen=True)
class SanaConfig(ImageConfig):
    """Everything about a Sana; the defaults are Sana 1.6B on 1024 px."""

    input_size: int | tuple[int, int] = 32
    """Side, or (rows, columns), of the latent. Other sizes are accepted: there are no positions."""
    patch_size: int = 1
    in_channels: int = 32
    hidden_size: int = 2240
    depth: int = 20
    num_heads: int = 70
    """Of self-attention: heads of 32 channels in all published sizes."""
    cross_heads: int = 20
    """Of the attention to the caption."""
    mlp_ratio: float = 2.5
    text_dim: int = 2304
    """Channels of the caption's tokens: those of Gemma 2 with 2B parameters."""
    text_length: int = 300
    """Tokens of a caption, to count costs; any number is accepted."""
    qk_norm: bool = False
    """RMS norm of q and k across all heads (Sprint)."""
    guidance: bool = False
    """Whether it sees the guidance scale (Sprint)."""
    guidance_factor: float = 0.1
    """The guidance scale is multiplied by this before its sinusoid."""

    sizing = Sizing(heads=("num_heads", "cross_heads"))

    def __post_init__(self) -> None:
        at_least_one(self, "patch_size", "in_channels", "hidden_size", "depth", "num_heads", "cross_heads", "text_dim")

    def example(self, batch: int) -> Conditioning:
        """A caption of the full length, and the guidance scale where it is seen."""
        text = Tokens.zeros(batch, self.text_length, self.text_dim)
        return Conditioning(text=text, scalars={"guidance": torch.zeros(batch)} if self.guidance else {})

    def build(self, seed: int = 0) -> Sana:
        """The network with initial weights."""
        return instantiate(Sana, self, seed)


def block(config: SanaConfig) -> AdaLNSingleBlock:
    """Linear attention without biases of q, k and v; cross-attention with; the MLP of neighbours."""
    dim, norm = config.hidden_size, "across" if config.qk_norm else None
    return AdaLNSingleBlock(
        dim,
        norm1=layer_norm(dim),
        attn=LinearAttention(dim, config.num_heads, qk_norm=norm, bias=False, out_bias=True, eps=1e-5),
        cross=CrossAttention(dim, config.cross_heads, qk_norm=norm, eps=1e-5),
        norm2=layer_norm(dim),
        mlp=MixFFN(dim, int(dim * config.mlp_ratio)),
    )


class Sana(Model):
    """Linear diffusion transformer. Raises ValueError for an x that its patches do not tile, and a missing text."""

    plan = Plan(shard=("blocks",))

    def __init__(self, config: SanaConfig):
        super().__init__()
        self.config = config
        dim, patch = config.hidden_size, config.patch_size
        self.x_embedder = PatchEmbed(config.in_channels, patch, dim)
        self.t_embedder = TimestepEmbedder(dim)
        self.guidance_embedder = TimestepEmbedder(dim) if config.guidance else None
        self.t_block = adaln(dim, 6)
        self.y_embedder = Mlp(dim, dim, given=config.text_dim)
        self.y_norm = RMSNorm(dim, 1e-5)
        self.blocks = nn.ModuleList(block(config) for _ in range(config.depth))
        self.final_layer = AdaLNSingleFinal(dim, patch * patch * config.in_channels, layer_norm(dim))

    def init_weights(self, rng: Rng) -> None:
        """adaLN-single's start; the norm of the caption starts at 0.01."""
        init_adaln_single(self, rng.generator)
        nn.init.constant_(self.y_norm.weight, 0.01)

    def prepare(self, cond: Conditioning, shape: Sequence[int], times: Sequence[float] = ()) -> Conditioning:
        """Keys and values of the caption for every block, and the vector of the guidance scale."""
        text = given_text(cond, self.config.text_dim).values.to(self.y_embedder.fc1.weight.dtype)
        text = self.y_norm(self.y_embedder(text))
        static = keys_for(self.blocks, text)
        if self.guidance_embedder is not None:
            if "guidance" not in cond.scalars:
                raise DitkitError('the model sees the guidance scale: give cond.scalars["guidance"] [b]')
            scale = cond.scalars["guidance"].flatten() * self.config.guidance_factor
            static["guidance"] = self.guidance_embedder(scale)
        return cond.with_static(**static)

    def forward(
        self, x: Float[Tensor, "b c h w"], t: Float[Tensor, "b"], cond: Conditioning, *, edit: Edit | None = None
    ) -> Float[Tensor, "b c h w"]:
        """t in [0, 1000], 0 = data; the result is the velocity from data to noise."""
        config = self.config
        rows, columns = patch_grid(x, config.in_channels, config.patch_size)
        if "keys.0" not in cond.static:
            cond = self.prepare(cond, x.shape)
        static, mask = cond.static, given_text(cond, config.text_dim).mask[:, None, None]
        time = self.t_embedder(t)
        if "guidance" in static:
            time = time + static["guidance"]
        c, h = self.t_block(time).unflatten(1, (6, -1)), self.x_embedder(x)
        for i, blk in enumerate(self.blocks):
            h = visit(edit, f"blocks.{i}", blk, h, c, keys_in(static, i), mask, (rows, columns))
        return unpatchify(self.final_layer(h, time), (rows, columns), config.patch_size)


# table 1 of the paper and the released configurations; Sprint has the same two sizes
LARGE = SanaConfig()
SMALL = replace(LARGE, hidden_size=1152, depth=28, num_heads=36, cross_heads=16)
register_models(
    {
        "sana_600m": SMALL,
        "sana_1600m": LARGE,
        "sana_sprint_600m": replace(SMALL, qk_norm=True, guidance=True),
        "sana_sprint_1600m": replace(LARGE, qk_norm=True, guidance=True),
        "sana_tiny": SanaConfig(
            input_size=8,
            in_channels=8,
            hidden_size=96,
            depth=4,
            num_heads=6,
            cross_heads=4,
            text_dim=64,
            text_length=20,
        ),
    }
)
