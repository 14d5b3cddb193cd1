"""Kandinsky 5: "Kandinsky 5.0: A Family of Foundation Models for Image and Video Generation", arXiv 2511.14993.

A diffusion transformer on patches of video latents whose text comes in by cross-attention (the authors' CrossDiT). Time
and a pooled text vector make one vector that modulates every block. The text first goes through blocks of its own,
which it modulates too: so the refined text changes with time, and is no work that could be done once per trajectory.

text block     x + gate attn(norm(x)), x + gate mlp(norm(x)): rotations along the text; each norm is scaled and shifted
visual block   x + gate attn(norm(x)), x + gate cross(norm(x), text), x + gate mlp(norm(x)): rotations by frame, row and
               column, qk-norm in both attentions; self-attention may follow a pattern (the releases of 10 s and of high
               resolution use Nabla)
last layer     norm, scaled and shifted, and a Linear

The authors' language: x [b c t h w] are latents (t = 1 for images), time is 1000 times the share of noise, the output
is the velocity from data to noise. Networks of videos see, beside x, the channels of a given latent and a mask (the
first frame, or zeros); in a patch the channel is fastest at the entry and slowest at the exit. Whatever dtype the model
has, time embedding, modulations, norms with their scale and shift, and gates are computed in float32. Here text padding
is masked in the text blocks and in cross-attention, as in the authors' code; diffusers attends to it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..conditioning import Conditioning, Tokens
from ..config import DitkitError, register
from ..layers import (
    AdaLNZeroBlock,
    Attention,
    CrossAttention,
    Edit,
    FinalLayer,
    GatedCrossBlock,
    LayerNorm32,
    Mlp,
    TimestepEmbedder,
    arrange,
    axial_angles,
    init_adaln_zero,
    over_heads,
    patch_grid,
    patchify,
    place_rope,
    rope_table,
    unpatchify,
    visit,
)
from ..rng import Rng
from .registry import Model, Plan, at_least_one, check_pattern, instantiate, register_models
from .sizing import Sizing

__all__ = ["Kandinsky5", "Kandinsky5Config"]

EXAMPLE_TEXT = 256  # tokens to which the authors pad the text of a video


@register("model", "kandinsky5")
@dataclass(frozen=True)
class Kandinsky5Config:
    """Everything about a Kandinsky 5; the defaults are Video Lite on 5 seconds of 512 x 768."""

    input_size: tuple[int, int, int] = (31, 64, 96)
    """Frames, rows and columns of the latents. Other sizes are accepted: positions are computed."""
    patch_size: tuple[int, int, int] = (1, 2, 2)
    in_channels: int = 16
    """Of x alone, and of the output."""
    given_channels: bool = True
    """Whether the channels of a given latent and a mask are joined to x; without `cond.channels` they are zeros."""
    hidden_size: int = 1792
    ff_dim: int = 7168
    time_dim: int = 512
    """Size of the vector of time and pooled text."""
    text_depth: int = 2
    depth: int = 32
    axes: tuple[int, int, int] = (16, 24, 24)
    """Channels of a head that turn by frame, row and column; their sum is the size of a head."""
    text_dim: int = 3584
    """Of the tokens in `cond.text`: Qwen2.5-VL."""
    pooled_dim: int = 768
    """Of the vector in `cond.pooled`: CLIP-L."""
    scale_factor: tuple[float, float, float] = (1.0, 2.0, 2.0)
    """What positions are divided by: 1 2 2 for videos with sides of 480 to 854 pixels, 1 3.16 3.16 above, 1 1 1 for
    images. `cond.scalars["scale_factor"]` [b 3] overrides it, sample by sample."""
    pattern: Any = None
    """Which tiles of x attend to which: Nabla(0.9) in Video Lite of 10 s, 0.7 and 0.8 in Video Pro."""

    sizing = Sizing(wide=("ff_dim",))

    def __post_init__(self) -> None:
        at_least_one(self, "in_channels", "hidden_size", "ff_dim", "time_dim", "depth", "text_dim", "pooled_dim")
        check_pattern(self)
        for name in ("patch_size", "axes"):
            value: Any = getattr(self, name)
            if len(value) != 3 or min(value) < 1:
                raise DitkitError(f"model.{name} is three numbers of at least 1, not {value}")
        if any(d % 2 for d in self.axes) or self.hidden_size % sum(self.axes):
            raise DitkitError(
                f"model.axes {self.axes} must be even and their sum must divide model.hidden_size {self.hidden_size}"
            )
        if len(self.scale_factor) != 3 or not min(self.scale_factor) > 0:
            raise DitkitError(f"model.scale_factor is three numbers above 0, not {self.scale_factor}")
        if self.text_depth < 0:
            raise DitkitError(f"model.text_depth must not be negative, it is {self.text_depth}")

    @property
    def num_heads(self) -> int:
        """Heads of every attention."""
        return self.hidden_size // sum(self.axes)

    @property
    def vocab(self) -> int:
        """0: x is continuous."""
        return 0

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Channels, frames, rows, columns."""
        return self.in_channels, *self.input_size

    @property
    def length(self) -> int:
        """The number of patches."""
        return math.prod(n // p for n, p in zip(self.input_size, self.patch_size, strict=True))

    def fitted(self, shape: tuple[int, ...], classes: int, vocab: int) -> Self:
        """With this size and so many channels. Raises DitkitError for what is no video that patches tile."""
        if vocab or len(shape) != 4:
            what = "tokens" if vocab else f"of shape {list(shape)}"
            raise DitkitError(f"the model kandinsky5 is for videos [c t h w], and what is diffused is {what}")
        channels, *size = shape
        frames, rows, columns = size
        if any(n < 1 or n % p for n, p in zip(size, self.patch_size, strict=True)):
            raise DitkitError(
                f"videos of {frames} x {rows} x {columns} are not tiled by patches of "
                f"{' x '.join(map(str, self.patch_size))}: change the patch size (--model.patch-size) or the resolution"
            )
        return replace(self, in_channels=channels, input_size=(frames, rows, columns))

    def example(self, batch: int) -> Conditioning:
        """As many tokens of text as the authors pad to, a pooled vector and, where they are taken, channels."""
        channels = torch.zeros(batch, self.in_channels + 1, *self.input_size) if self.given_channels else None
        return Conditioning(
            text=Tokens.zeros(batch, EXAMPLE_TEXT, self.text_dim),
            pooled=torch.zeros(batch, self.pooled_dim),
            channels=channels,
        )

    def build(self, seed: int = 0) -> Kandinsky5:
        """The network with initial weights."""
        return instantiate(Kandinsky5, self, seed)


def attention(config: Kandinsky5Config, kind: type[Attention] | type[CrossAttention]) -> Any:
    """Three Linears with bias and a norm of q and k per head, which adds float32's machine epsilon."""
    eps = torch.finfo(torch.float32).eps
    return kind(config.hidden_size, config.num_heads, qk_norm="head", fused=False, eps=eps)


def norm(config: Kandinsky5Config) -> LayerNorm32:
    """Without weights, in float32."""
    return LayerNorm32(config.hidden_size, eps=1e-5)


def text_block(config: Kandinsky5Config) -> AdaLNZeroBlock:
    """A block of the text refiner."""
    mlp = Mlp(config.hidden_size, config.ff_dim, act="gelu", bias=False)
    return AdaLNZeroBlock(
        config.hidden_size, norm(config), attention(config, Attention), norm(config), mlp, config.time_dim, precise=True
    )


def visual_block(config: Kandinsky5Config) -> GatedCrossBlock:
    """A block of the video: self-attention, attention to the text, MLP."""
    return GatedCrossBlock(
        config.hidden_size,
        norm(config),
        attention(config, Attention),
        norm(config),
        attention(config, CrossAttention),
        norm(config),
        Mlp(config.hidden_size, config.ff_dim, act="gelu", bias=False),
        given=config.time_dim,
        precise=True,
    )


def normed_linear(given: int, dim: int) -> nn.Sequential:
    """A Linear and a LayerNorm with weights."""
    return nn.Sequential(nn.Linear(given, dim), nn.LayerNorm(dim, eps=1e-5))


class Kandinsky5(Model):
    """CrossDiT. Raises ValueError for an x that patches, or the tiles of the pattern, do not fill."""

    plan = Plan(shard=("text_blocks", "blocks"))

    def __init__(self, config: Kandinsky5Config):
        super().__init__()
        self.config = config
        dim, patch = config.hidden_size, math.prod(config.patch_size)
        channels = 2 * config.in_channels + 1 if config.given_channels else config.in_channels
        self.x_embedder = nn.Linear(patch * channels, dim)
        self.t_embedder = TimestepEmbedder(config.time_dim, frequencies=dim, precise=True)
        self.text_embedder = normed_linear(config.text_dim, dim)
        self.pooled_embedder = normed_linear(config.pooled_dim, config.time_dim)
        self.text_blocks = nn.ModuleList(text_block(config) for _ in range(config.text_depth))
        self.blocks = nn.ModuleList(visual_block(config) for _ in range(config.depth))
        self.final_layer = FinalLayer(
            dim, patch * config.in_channels, norm(config), given=config.time_dim, precise=True
        )

    def init_weights(self, rng: Rng) -> None:
        """adaLN-Zero's start: every block is the identity, the output is 0."""
        init_adaln_zero(self, rng.generator)

    def rope(self, grid: tuple[int, ...], scale: Float[Tensor, "b 3"]) -> Float[Tensor, "b 2 n hd"]:
        """Rotations of the patches by frame, row and column, divided by each sample's scale factors."""
        axes = torch.meshgrid(*(torch.arange(n, device=scale.device) for n in grid), indexing="ij")
        places = torch.stack([axis.flatten() for axis in axes], dim=-1)
        return place_rope(places / scale[:, None].double(), self.config.axes)

    def prepare(self, cond: Conditioning, shape: Sequence[int], times: Sequence[float] = ()) -> Conditioning:
        """Text before its blocks, the pooled vector, and rotations of text and patches, in the order of the pattern."""
        config, device, dtype = self.config, self.x_embedder.weight.device, self.x_embedder.weight.dtype
        if cond.text is None or cond.pooled is None:
            missing = "text" if cond.text is None else "pooled"
            raise ValueError(
                f"kandinsky5 needs text [b l {config.text_dim}] and a pooled vector [b {config.pooled_dim}]: "
                f"cond.{missing} is missing"
            )
        grid = tuple(n // p for n, p in zip(shape[2:], config.patch_size, strict=True))
        scale = cond.scalars.get("scale_factor")
        scale = torch.tensor([config.scale_factor], device=device) if scale is None else scale
        length = torch.arange(cond.text.mask.shape[1], device=device)
        return cond.with_static(
            text=self.text_embedder(cond.text.values.to(dtype)),
            pooled=self.pooled_embedder(cond.pooled.to(dtype)),
            text_rope=rope_table(axial_angles((length,), (sum(config.axes),)))[None],
            rope=arrange(config.pattern, grid, device).sort(self.rope(grid, scale), dim=2),
        )

    def joined(self, x: Float[Tensor, "b c t h w"], cond: Conditioning) -> Float[Tensor, "b c2 t h w"]:
        """x and, if the model takes them, the given latent and its mask. Raises ValueError that says what is wrong."""
        config, given = self.config, cond.channels
        if not config.given_channels:
            if given is not None:
                raise ValueError("the model has given_channels=False and cond.channels is given: leave it out")
            return x
        wanted = (x.shape[0], config.in_channels + 1, *x.shape[2:])
        if given is None:
            given = x.new_zeros(wanted)
        if given.shape != wanted:
            raise ValueError(
                f"cond.channels is {list(given.shape)}; beside this x it is a latent and a mask, {list(wanted)}"
            )
        return torch.cat((x, given.to(x.dtype)), dim=1)

    def forward(
        self, x: Float[Tensor, "b c t h w"], t: Float[Tensor, "b"], cond: Conditioning, *, edit: Edit | None = None
    ) -> Float[Tensor, "b c t h w"]:
        """t in [0, 1000], 1000 = noise; the result is the velocity from data to noise."""
        config = self.config
        grid = patch_grid(x, config.in_channels, config.patch_size)
        if "rope" not in cond.static:
            cond = self.prepare(cond, x.shape)
        static = cond.static
        assert cond.text is not None
        c = self.t_embedder(t) + static["pooled"]
        real = cond.text.mask[:, None, None]
        text = static["text"]
        for i, blk in enumerate(self.text_blocks):
            text = visit(edit, f"text_blocks.{i}", blk, text, c, static["text_rope"][0], real)
        rope, arranged = over_heads(static["rope"]), arrange(config.pattern, grid, x.device)
        h = arranged.sort(self.x_embedder(patchify(self.joined(x, cond), config.patch_size)))
        for i, blk in enumerate(self.blocks):
            h = visit(edit, f"blocks.{i}", blk, h, c, text, real, rope, arranged.mask)
        return unpatchify(arranged.unsort(self.final_layer(h, c)), grid, config.patch_size, "cp")


# The sizes of the release: Video Lite, Image Lite and Video Pro.
register_models(
    {
        "kandinsky5_lite_video": Kandinsky5Config(),
        "kandinsky5_image": Kandinsky5Config(
            input_size=(1, 128, 128), given_channels=False, hidden_size=2560, ff_dim=10240, depth=50,
            axes=(32, 48, 48), scale_factor=(1.0, 1.0, 1.0),
        ),
        "kandinsky5_pro_video": Kandinsky5Config(
            hidden_size=4096, ff_dim=16384, time_dim=1024, text_depth=4, depth=60, axes=(32, 48, 48)
        ),
        "kandinsky5_tiny": Kandinsky5Config(
            input_size=(3, 16, 16), in_channels=4, hidden_size=96, ff_dim=192, time_dim=64, text_depth=1, depth=4,
            axes=(4, 6, 6), text_dim=32, pooled_dim=16,
        ),
    }
)  # fmt: skip
