"""Lumina-Image 2.0: "Lumina-Image 2.0: A Unified and Efficient Image Generative Framework", Qin et al. 2025, arXiv
2503.21758.

Patches of a latent and tokens of a caption go through refiners of their own, then as one sequence through one stack of
sandwich blocks: RMS norms before and after attention and MLP, a scale before and a tanh gate after, no shift. Queries
have three times as many heads as keys and values. The refiners of the caption are not modulated, see neither image nor
time, and so run in `prepare`. Positions are (time, row, column): the caption counts along the first axis from 0 on, and
the image stands right behind its last token.

The authors' language: x [b 16 h w] are latents of FLUX.1's autoencoder; t in [0, 1] is 1 for clean data, and goes into
the sinusoid as it is; the output is clean - noise ("-velocity" with the clock "1-t"). cond.text are the last but one
states of Gemma-2-2B. The text mask is honoured: padding and longer neighbours change nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ..conditioning import Conditioning, Tokens
from ..config import DitkitError, register
from ..layers import (
    Attention,
    Edit,
    FinalLayer,
    RMSNorm,
    SandwichBlock,
    SwiGLU,
    TimestepEmbedder,
    init_adaln_zero,
    layer_norm,
    over_heads,
    patch_grid,
    patchify,
    place_rope,
    refined,
    unpatchify,
    visit,
)
from ..rng import Rng
from .registry import ImageConfig, Model, Plan, at_least_one, given_text, instantiate, register_models
from .sizing import Sizing

__all__ = ["Lumina2", "Lumina2Config"]

GIVEN = 1024  # largest size of the vector of time that modulates the blocks


@register("model", "lumina2")
@dataclass(frozen=True)
class Lumina2Config(ImageConfig):
    """Everything about a Lumina-Image 2.0; the defaults are those of the release."""

    input_size: int | tuple[int, int] = 128
    """Side, or (rows, columns), of the latent. Other sizes are accepted: positions are relative."""
    patch_size: int = 2
    in_channels: int = 16
    hidden_size: int = 2304
    depth: int = 26
    refiner_depth: int = 2
    """Blocks that see the image alone, and as many that see the caption alone."""
    num_heads: int = 24
    kv_heads: int = 8
    """Heads of keys and values; each serves as many neighbouring heads of queries."""
    mlp_hidden: int = 9216
    axes: tuple[int, int, int] = (32, 32, 32)
    """Channels of a head that turn with time, row and column."""
    norm_eps: float = 1e-5
    text_dim: int = 2304
    """Size of a token of the caption."""
    text_length: int = 256
    """Tokens of a caption that `ditkit plan` reckons with. Any number is accepted."""

    sizing = Sizing(heads=("num_heads", "kv_heads"), wide=("mlp_hidden",))

    def __post_init__(self) -> None:
        at_least_one(
            self, "patch_size", "in_channels", "hidden_size", "depth", "refiner_depth", "num_heads", "kv_heads",
            "mlp_hidden", "text_dim", "text_length",
        )  # fmt: skip
        if not self.norm_eps > 0:
            raise DitkitError(f"model.norm_eps is above 0, not {self.norm_eps}")

    def example(self, batch: int) -> Conditioning:
        """Captions of zeros, as long as they get."""
        return Conditioning(text=Tokens.zeros(batch, self.text_length, self.text_dim))

    def build(self, seed: int = 0) -> Lumina2:
        """The network with initial weights."""
        return instantiate(Lumina2, self, seed)


def block(config: Lumina2Config, modulated: bool = True) -> SandwichBlock:
    """Attention of grouped queries with qk-norm, and SwiGLU, without biases."""
    dim = config.hidden_size
    return SandwichBlock(
        dim,
        attn=Attention(
            dim, config.num_heads, qk_norm="head", fused=False, bias=False, kv_heads=config.kv_heads, eps=1e-5
        ),
        mlp=SwiGLU(dim, config.mlp_hidden, bias=False, fused=False),
        given=min(dim, GIVEN) if modulated else None,
        eps=config.norm_eps,
    )


class Lumina2(Model):
    """Single-stream text-to-image transformer. Raises ValueError for an x that its patches do not tile."""

    plan = Plan(shard=("noise_refiner", "context_refiner", "blocks"))

    def __init__(self, config: Lumina2Config):
        super().__init__()
        self.config = config
        dim, patch = config.hidden_size, config.patch_size
        if dim != config.num_heads * sum(config.axes):
            raise ValueError(
                f"hidden_size {dim} is not num_heads {config.num_heads} x {sum(config.axes)}, the sum of axes"
            )

        def stack(depth: int, modulated: bool) -> nn.ModuleList:
            return nn.ModuleList(block(config, modulated) for _ in range(depth))

        features, given = patch * patch * config.in_channels, min(dim, GIVEN)
        self.x_embedder = nn.Linear(features, dim)
        self.t_embedder = TimestepEmbedder(given)
        self.cap_embedder = nn.Sequential(RMSNorm(config.text_dim, config.norm_eps), nn.Linear(config.text_dim, dim))
        self.noise_refiner = stack(config.refiner_depth, True)
        self.context_refiner = stack(config.refiner_depth, False)
        self.blocks = stack(config.depth, True)
        self.final_layer = FinalLayer(dim, features, layer_norm(dim), given=given, shift=False)

    def init_weights(self, rng: Rng) -> None:
        """adaLN-Zero's start."""
        init_adaln_zero(self, rng.generator)

    def prepare(self, cond: Conditioning, shape: Sequence[int], times: Sequence[float] = ()) -> Conditioning:
        """Refined captions, rotations of all tokens, and which may be attended to.

        The blocks of `context_refiner` run here; no edit sees them. Raises DitkitError where the caption is missing or
        does not fit.
        """
        config, patch = self.config, self.config.patch_size
        text = given_text(cond, config.text_dim, shape[0])
        values = text.values.masked_fill(~text.mask[..., None], 0).to(self.x_embedder.weight.dtype)
        device, (b, length) = text.mask.device, text.mask.shape
        caption = F.pad(torch.arange(length, device=device)[:, None], (0, 2)).expand(b, -1, -1)
        rope = place_rope(caption, config.axes)
        context = refined(self.context_refiner, self.cap_embedder(values), over_heads(rope), text.mask)

        grid = torch.meshgrid(*(torch.arange(side // patch, device=device) for side in shape[-2:]), indexing="ij")
        image = torch.stack(grid, dim=-1).flatten(0, 1).expand(b, -1, -1)
        behind = text.mask.sum(1)[:, None, None].expand(b, image.shape[1], 1)
        place = torch.cat((torch.cat((behind, image), dim=-1), caption), dim=1)
        used = F.pad(text.mask, (image.shape[1], 0), value=True)
        return cond.with_static(context=context, rope=place_rope(place, config.axes), mask=used)

    def forward(
        self, x: Float[Tensor, "b c h w"], t: Float[Tensor, "b"], cond: Conditioning, *, edit: Edit | None = None
    ) -> Float[Tensor, "b c h w"]:
        """t in [0, 1], 1 = data; the result is the velocity from noise to data. Raises DitkitError as `prepare`."""
        config = self.config
        grid = patch_grid(x, config.in_channels, config.patch_size)
        if "context" not in cond.static:
            cond = self.prepare(cond, x.shape)
        static, rope = cond.static, over_heads(cond.static["rope"])
        image, c = self.x_embedder(patchify(x, config.patch_size)), self.t_embedder(t)
        n = image.shape[1]
        for i, blk in enumerate(self.noise_refiner):
            image = visit(edit, f"noise_refiner.{i}", blk, image, c, rope[..., :n, :])
        h = torch.cat((image, static["context"]), dim=1)
        for i, blk in enumerate(self.blocks):
            h = visit(edit, f"blocks.{i}", blk, h, c, rope, static["mask"][:, None, None])
        return unpatchify(self.final_layer(h[:, :n], c), grid, config.patch_size)


register_models(
    {
        "lumina2": Lumina2Config(),
        "lumina2_tiny": Lumina2Config(
            input_size=32, in_channels=4, hidden_size=144, depth=4, num_heads=6, kv_heads=2, mlp_hidden=384,
            axes=(8, 8, 8), text_dim=64, text_length=77,
        ),
    }
)  # fmt: skip
