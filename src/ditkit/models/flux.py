"""FLUX.1 and FLUX.2, Black Forest Labs 2024 and 2025 (https://github.com/black-forest-labs/flux and flux2); no paper
describes them, and this follows their released networks.

Patches of a latent and a text first are two streams with weights of their own and one attention, as in MMDiT; then one
sequence, text first, in blocks with attention and MLP side by side. Positions are rotations, along axes of time, row
and column in FLUX.1, and of time, row, column and place in the text in FLUX.2. One vector modulates all: the time, the
guidance scale that the network was distilled to obey, and in FLUX.1 the pooled text of CLIP. FLUX.2 makes shifts,
scales and gates once for all blocks of a kind, has SwiGLU and no biases.

The authors' language: x [b c h w] are latents, of 16 channels in FLUX.1, whose patches of 2 x 2 the network takes
apart, and of 128 in FLUX.2, whose autoencoder has done so; t in [0, 1] with 1 = noise; the output is the velocity from
data to noise on the linear path. cond.scalars["guidance"] is the guidance scale. The text is T5's (FLUX.1) or three
layers of Mistral's side by side (FLUX.2), filled up to 512 tokens: the authors attend to this filling, so its mask is
True; what the mask leaves out is not seen. cond.references, clean latents, join the image's stream with times of their
own: 1, 2, ... in FLUX.1 (Kontext, which was trained with one) and 10, 20, ... in FLUX.2. All samples of a batch have
equally many, of one size.

Parameter names outside the blocks are those of the published checkpoints, but for those within embedders.
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
    Attention,
    DualBlock,
    Edit,
    FinalLayer,
    Mlp,
    ParallelBlock,
    Stream,
    SwiGLU,
    TimestepEmbedder,
    VectorEmbedder,
    adaln,
    axial_angles,
    init_adaln_zero,
    key_mask,
    layer_norm,
    patch_grid,
    patchify,
    rope_table,
    unpatchify,
    visit,
)
from ..rng import Rng
from .registry import ImageConfig, Model, Plan, at_least_one, given_pooled, given_text, instantiate, register_models
from .sizing import Sizing

__all__ = ["Flux", "FluxConfig"]


@register("model", "flux")
@dataclass(frozen=True)
class FluxConfig(ImageConfig):
    """Everything about a FLUX; the defaults are FLUX.1 [dev] at 1024 px."""

    input_size: int | tuple[int, int] = 128
    """Side, or (rows, columns), of the latent. Other sizes are accepted."""
    patch_size: int = 2
    in_channels: int = 16
    hidden_size: int = 3072
    depth: int = 19
    """Blocks of two streams."""
    single_depth: int = 38
    """Blocks of one sequence, after them."""
    num_heads: int = 24
    mlp_ratio: float = 4.0
    text_dim: int = 4096
    """Channels of the text's tokens."""
    pooled_dim: int = 768
    """Channels of the pooled text; 0 = it is given none (FLUX.2)."""
    guidance: bool = True
    """Whether it is given a guidance scale: not FLUX.1 [schnell]."""
    axes: tuple[int, ...] = (16, 56, 56)
    """Channels of a head that turn with time, row, column and, if there is a fourth, with the place in the text."""
    theta: float = 10000.0
    """The base of the frequencies of rotation."""
    reference_step: int = 1
    """The time between one reference and the next; the image has time 0."""
    swiglu: bool = False
    """MLPs are SwiGLU, as wide as `mlp_ratio` says, instead of GELU."""
    bias: bool = True
    """Whether Linears have biases."""
    shared_modulation: bool = False
    """Shifts, scales and gates are made once for all blocks of a kind."""
    frequencies: int = 256
    """Sines and cosines of time and guidance scale."""

    sizing = Sizing(deep=("single_depth",))

    def __post_init__(self) -> None:
        at_least_one(
            self, "patch_size", "in_channels", "hidden_size", "depth", "single_depth", "num_heads", "text_dim",
            "reference_step", "frequencies",
        )  # fmt: skip
        if len(self.axes) not in (3, 4) or any(dim < 2 or dim % 2 for dim in self.axes):
            raise DitkitError(f"model.axes are 3 or 4 even numbers of channels, not {self.axes}")
        if self.pooled_dim < 0:
            raise DitkitError(f"model.pooled_dim is at least 0, not {self.pooled_dim}")

    def example(self, batch: int) -> Conditioning:
        """A text of zeros of the authors' length, and a guidance scale."""
        text = Tokens.zeros(batch, 512, self.text_dim)
        pooled = torch.zeros(batch, self.pooled_dim) if self.pooled_dim else None
        return Conditioning(text=text, pooled=pooled, scalars={"guidance": torch.zeros(batch)} if self.guidance else {})

    def build(self, seed: int = 0) -> Flux:
        """The network with initial weights."""
        return instantiate(Flux, self, seed)


def dual_block(config: FluxConfig) -> DualBlock:
    """Image and text, each with its attention's projections, qk-norm, MLP and, unless it is shared, modulation."""
    dim, hidden, bias = config.hidden_size, int(config.hidden_size * config.mlp_ratio), config.bias

    def stream() -> Stream:
        attn = Attention(dim, config.num_heads, qk_norm="head", bias=bias)
        mlp = SwiGLU(dim, hidden, bias=bias) if config.swiglu else Mlp(dim, hidden, bias=bias)
        return Stream(dim, attn, mlp, modulated=not config.shared_modulation, bias=bias)

    return DualBlock(x_block=stream(), context_block=stream())


def single_block(config: FluxConfig) -> ParallelBlock:
    """Attention and MLP side by side."""
    return ParallelBlock(
        config.hidden_size,
        config.num_heads,
        int(config.hidden_size * config.mlp_ratio),
        gated=config.swiglu,
        bias=config.bias,
        modulated=not config.shared_modulation,
    )


class Flux(Model):
    """FLUX. Raises ValueError for an x that its patches do not tile, and for a text, pooled text or guidance scale that
    is missing, not wanted, or of other channels."""

    plan = Plan(shard=("double_blocks", "single_blocks"))

    def __init__(self, config: FluxConfig):
        super().__init__()
        self.config = config
        dim, bias, features = config.hidden_size, config.bias, config.in_channels * config.patch_size**2
        if dim != config.num_heads * sum(config.axes):
            raise ValueError(
                f"hidden_size {dim} is not num_heads {config.num_heads} x {sum(config.axes)}, the sum of axes"
            )
        self.img_in = nn.Linear(features, dim, bias=bias)
        self.txt_in = nn.Linear(config.text_dim, dim, bias=bias)
        self.time_in = TimestepEmbedder(dim, config.frequencies, bias=bias)
        self.vector_in = VectorEmbedder(config.pooled_dim, dim) if config.pooled_dim else None
        self.guidance_in = TimestepEmbedder(dim, config.frequencies, bias=bias) if config.guidance else None
        if config.shared_modulation:
            self.double_stream_modulation_img = adaln(dim, 6, bias=bias)
            self.double_stream_modulation_txt = adaln(dim, 6, bias=bias)
            self.single_stream_modulation = adaln(dim, 3, bias=bias)
        self.double_blocks = nn.ModuleList(dual_block(config) for _ in range(config.depth))
        self.single_blocks = nn.ModuleList(single_block(config) for _ in range(config.single_depth))
        self.final_layer = FinalLayer(dim, features, layer_norm(dim), bias=bias)

    def init_weights(self, rng: Rng) -> None:
        """adaLN-Zero's start, also of what modulates all blocks; the authors published none."""
        init_adaln_zero(self, rng.generator)
        for name, parameter in self.named_parameters():
            if "stream_modulation" in name:
                nn.init.zeros_(parameter)

    def rope(self, length: int, grids: Sequence[tuple[int, int, int]]) -> Float[Tensor, "1 2 n hd"]:
        """Rotations of the joint sequence: a text of `length`, then grids of patches (time, rows, columns), row by row.

        With three axes the text stays where it is.
        """
        axes = len(self.config.axes)
        places = [torch.zeros(length, axes)]
        if axes == 4:
            places[0][:, 3] = torch.arange(length)
        for time, rows, columns in grids:
            ends = (torch.tensor([time]), torch.arange(rows), torch.arange(columns), torch.zeros(1))
            places.append(torch.cartesian_prod(*(end.float() for end in ends[:axes])))
        positions = torch.cat(places).to(self.img_in.weight.device).unbind(dim=1)
        return rope_table(axial_angles(positions, self.config.axes, self.config.theta))[None]

    def vector(self, cond: Conditioning) -> Float[Tensor, "b d"] | None:
        """What modulates beside the time: pooled text and guidance scale."""
        parts = []
        if self.vector_in is not None:
            parts.append(self.vector_in(given_pooled(cond, self.config.pooled_dim)))
        scale = cond.scalars.get("guidance")
        if (scale is None) == self.config.guidance:
            given = "none was given" if scale is None else "one was given"
            raise ValueError(f'the model has guidance={self.config.guidance} and cond.scalars["guidance"]: {given}')
        if self.guidance_in is not None and scale is not None:
            parts.append(self.guidance_in(1000 * scale))
        return sum(parts[1:], parts[0]) if parts else None

    def prepare(self, cond: Conditioning, shape: Sequence[int], times: Sequence[float] = ()) -> Conditioning:
        """The text's and the references' tokens before the first block, what modulates beside the time, rotations, and
        the mask of keys."""
        config, dtype = self.config, self.img_in.weight.dtype
        text = given_text(cond, config.text_dim)
        static = {"text": self.txt_in(text.values.to(dtype))}
        rows, columns = (side // config.patch_size for side in shape[-2:])
        grids, tokens = [(0, rows, columns)], rows * columns
        if cond.references is not None:
            count = cond.references.shape[1]
            flat = cond.references.flatten(0, 1)
            rows, columns = patch_grid(flat, config.in_channels, config.patch_size)
            grids += [(config.reference_step * (i + 1), rows, columns) for i in range(count)]
            tokens += count * rows * columns
            seen = patchify(flat, config.patch_size, "cp").unflatten(0, (-1, count)).flatten(1, 2)
            static["references"] = self.img_in(seen.to(dtype))
        if (vector := self.vector(cond)) is not None:
            static["vector"] = vector
        rope = self.rope(text.mask.shape[1], grids)
        return cond.with_static(**static, rope=rope, mask=key_mask(text.mask, tokens))

    def forward(
        self, x: Float[Tensor, "b c h w"], t: Float[Tensor, "b"], cond: Conditioning, *, edit: Edit | None = None
    ) -> Float[Tensor, "b c h w"]:
        """t in [0, 1], 1 = noise; the result is the velocity from data to noise."""
        config = self.config
        grid = patch_grid(x, config.in_channels, config.patch_size)
        if "text" not in cond.static:
            cond = self.prepare(cond, x.shape)
        static, b = cond.static, len(x)
        rope, mask = static["rope"][0], static["mask"]
        c = self.time_in(1000 * t)
        if "vector" in static:
            c = c + static["vector"]
        both, single = (c, c), c
        if config.shared_modulation:
            both = (self.double_stream_modulation_img(c), self.double_stream_modulation_txt(c))
            single = self.single_stream_modulation(c)
        image, text = self.img_in(patchify(x, config.patch_size, "cp")), static["text"].expand(b, -1, -1)
        start, n = text.shape[1], image.shape[1]
        if "references" in static:
            image = torch.cat((image, static["references"].expand(b, -1, -1)), dim=1)
        for i, blk in enumerate(self.double_blocks):
            image, text = visit(edit, f"double_blocks.{i}", blk, (image, text), both, rope, mask)
        h = torch.cat((text, image), dim=1)
        for i, blk in enumerate(self.single_blocks):
            h = visit(edit, f"single_blocks.{i}", blk, h, single, rope, mask)
        return unpatchify(self.final_layer(h[:, start : start + n], c), grid, config.patch_size, "cp")


FLUX2 = FluxConfig(
    input_size=64, patch_size=1, in_channels=128, hidden_size=6144, depth=8, single_depth=48, num_heads=48,
    mlp_ratio=3.0, text_dim=15360, pooled_dim=0, axes=(32, 32, 32, 32), theta=2000.0, reference_step=10, swiglu=True,
    bias=False, shared_modulation=True,
)  # fmt: skip
SMALL = {"input_size": 8, "hidden_size": 48, "depth": 2, "single_depth": 3, "num_heads": 3, "text_dim": 64}

# Parameters: 11.90, 11.89 and 32.22 billion.
register_models(
    {
        "flux1_dev": FluxConfig(),
        "flux1_schnell": FluxConfig(guidance=False),
        "flux2_dev": FLUX2,
        "flux1_tiny": replace(FluxConfig(), **SMALL, in_channels=4, pooled_dim=32, axes=(4, 6, 6)),
        "flux2_tiny": replace(FLUX2, **SMALL, in_channels=8, axes=(4, 4, 4, 4)),
    }
)
