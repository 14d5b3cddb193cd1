"""PixArt: "PixArt-alpha", Chen et al. 2023, arXiv 2310.00426, and "PixArt-Sigma", Chen et al. 2024, arXiv 2403.04692.

DiT's network on a text: between self-attention and MLP each block attends to the caption, without a norm and without a
gate; shifts, scales and gates of all blocks are six vectors that one Linear makes of the time, plus a table of each
block's own (adaLN-single). The authors' language: x [b 4 h w] are latents, t is the step index 0..999, the output holds
the noise and, with `learn_sigma`, as many channels again for the variance. `cond.text` is the caption by T5-XXL (120
tokens in alpha, 300 in Sigma) with its mask: what is masked is not attended. Alpha at 1024 px also sees the size of the
image, `cond.scalars["resolution"]` [b 2] (height and width in pixels) and `cond.scalars["aspect_ratio"]` [b 1].

Positions are sines and cosines of the patches' places, stretched so that a larger grid covers the same range: they are
computed, not stored. Sigma's model of 2048 px also averages keys and values of neighbours, which is not here.
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
    Attention,
    CrossAttention,
    Edit,
    Mlp,
    PatchEmbed,
    TimestepEmbedder,
    adaln,
    init_adaln_single,
    keys_for,
    keys_in,
    layer_norm,
    patch_grid,
    sincos_2d,
    unpatchify,
    visit,
)
from ..rng import Rng
from .registry import ImageConfig, Model, Plan, at_least_one, given_text, instantiate, register_models

__all__ = ["PixArt", "PixArtConfig"]


@register("model", "pixart")
@dataclass(frozen=True)
class PixArtConfig(ImageConfig):
    """Everything about a PixArt; the defaults are PixArt-Sigma on 1024 px."""

    input_size: int | tuple[int, int] = 128
    """Side, or (rows, columns), of the latent. Other sizes are accepted: positions cover the same range."""
    patch_size: int = 2
    in_channels: int = 4
    hidden_size: int = 1152
    depth: int = 28
    num_heads: int = 16
    mlp_ratio: float = 4.0
    text_dim: int = 4096
    """Channels of the caption's tokens."""
    text_length: int = 300
    """Tokens of a caption, to count costs; any number is accepted."""
    position_scale: float = 2.0
    """A step from patch to patch is 1 / position_scale: 0.5 for 256 px, 1 for 512 px, 2 for 1024 px."""
    sizes: bool = False
    """Whether it sees the size of the image (alpha on 1024 px)."""
    learn_sigma: bool = True
    """Predict the variance too, in as many channels again."""

    def __post_init__(self) -> None:
        at_least_one(self, "patch_size", "in_channels", "hidden_size", "depth", "num_heads", "text_dim")
        if not self.position_scale > 0:
            raise DitkitError(f"model.position_scale must be above 0, not {self.position_scale}")

    def example(self, batch: int) -> Conditioning:
        """A caption of the full length, and the sizes where they are seen."""
        text = Tokens.zeros(batch, self.text_length, self.text_dim)
        scalars = {"resolution": torch.zeros(batch, 2), "aspect_ratio": torch.zeros(batch, 1)} if self.sizes else {}
        return Conditioning(text=text, scalars=scalars)

    def build(self, seed: int = 0) -> PixArt:
        """The network with initial weights."""
        return instantiate(PixArt, self, seed)


def block(config: PixArtConfig) -> AdaLNSingleBlock:
    """Attention without qk-norm, MLP with the tanh form of GELU."""
    dim, heads = config.hidden_size, config.num_heads
    return AdaLNSingleBlock(
        dim,
        norm1=layer_norm(dim),
        attn=Attention(dim, heads),
        cross=CrossAttention(dim, heads),
        norm2=layer_norm(dim),
        mlp=Mlp(dim, int(dim * config.mlp_ratio)),
    )


class PixArt(Model):
    """Text-to-image transformer. Raises ValueError for an x that its patches do not tile, and for a missing text."""

    plan = Plan(shard=("blocks",))

    def __init__(self, config: PixArtConfig):
        super().__init__()
        self.config = config
        dim, patch = config.hidden_size, config.patch_size
        if config.sizes and dim % 3:
            raise ValueError(f"hidden_size {dim} is not divisible by 3, which three sizes of an image need")
        out = config.in_channels * (2 if config.learn_sigma else 1)
        self.x_embedder = PatchEmbed(config.in_channels, patch, dim)
        self.t_embedder = TimestepEmbedder(dim)
        self.size_embedder = TimestepEmbedder(dim // 3) if config.sizes else None
        self.ratio_embedder = TimestepEmbedder(dim // 3) if config.sizes else None
        self.t_block = adaln(dim, 6)
        self.y_embedder = Mlp(dim, dim, given=config.text_dim)
        self.blocks = nn.ModuleList(block(config) for _ in range(config.depth))
        self.final_layer = AdaLNSingleFinal(dim, patch * patch * out, layer_norm(dim))

    def init_weights(self, rng: Rng) -> None:
        """adaLN-single's start."""
        init_adaln_single(self, rng.generator)

    def prepare(self, cond: Conditioning, shape: Sequence[int], times: Sequence[float] = ()) -> Conditioning:
        """Positions, keys and values of the caption for every block, and the vector of the image's size."""
        config = self.config
        text = self.y_embedder(given_text(cond, config.text_dim).values.to(self.y_embedder.fc1.weight.dtype))
        static = keys_for(self.blocks, text)
        grid = (shape[-2] // config.patch_size, shape[-1] // config.patch_size)
        rows, columns = (base / (n * config.position_scale) for base, n in zip(config.grid, grid, strict=True))
        positions = sincos_2d(config.hidden_size, grid, text.device, step=(rows, columns)).to(text.dtype)
        if self.size_embedder is not None and self.ratio_embedder is not None:
            resolution, ratio = (self._scalar(cond, *what) for what in (("resolution", 2), ("aspect_ratio", 1)))
            size = self.size_embedder(resolution.flatten()).view(len(resolution), -1)
            static["size"] = torch.cat((size, self.ratio_embedder(ratio.flatten())), dim=1)
        return cond.with_static(**static, positions=positions)

    def _scalar(self, cond: Conditioning, name: str, count: int) -> Float[Tensor, "b n"]:
        if name not in cond.scalars or cond.scalars[name].numel() != count * len(cond.scalars[name]):
            raise DitkitError(f'the model sees the size of the image: give cond.scalars["{name}"] [b {count}]')
        return cond.scalars[name].view(-1, count)

    def forward(
        self, x: Float[Tensor, "b c h w"], t: Float[Tensor, "b"], cond: Conditioning, *, edit: Edit | None = None
    ) -> Float[Tensor, "b o h w"]:
        """t: the step index 0..999. o = 2c with `learn_sigma`: the noise, then the raw variance."""
        config = self.config
        grid = patch_grid(x, config.in_channels, config.patch_size)
        if "positions" not in cond.static:
            cond = self.prepare(cond, x.shape)
        static, mask = cond.static, given_text(cond, config.text_dim).mask[:, None, None]
        time = self.t_embedder(t)
        if "size" in static:
            time = time + static["size"]
        c = self.t_block(time).unflatten(1, (6, -1))
        h = self.x_embedder(x) + static["positions"]
        for i, blk in enumerate(self.blocks):
            h = visit(edit, f"blocks.{i}", blk, h, c, keys_in(static, i), mask)
        return unpatchify(self.final_layer(h, time), grid, config.patch_size)


# One network; what differs is the size of the image and how the captions are cut (alpha: 120 tokens).
SIGMA = PixArtConfig()
register_models(
    {
        "pixart_alpha_512": replace(SIGMA, input_size=64, position_scale=1.0, text_length=120),
        "pixart_alpha": replace(SIGMA, text_length=120, sizes=True),
        "pixart_sigma_256": replace(SIGMA, input_size=32, position_scale=0.5),
        "pixart_sigma_512": replace(SIGMA, input_size=64, position_scale=1.0),
        "pixart_sigma": SIGMA,
        "pixart_tiny": PixArtConfig(
            input_size=16, hidden_size=96, depth=4, num_heads=4, text_dim=64, text_length=20, position_scale=1.0
        ),
    }
)
