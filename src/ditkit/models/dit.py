"""DiT: "Scalable Diffusion Models with Transformers", Peebles & Xie 2022, arXiv 2212.09748.

A plain ViT on patches of a latent, conditioned by adaLN-Zero on the sum of a time and a class vector; the three other
ways of section 3.2 are there to be compared. The authors' language: x [b 4 h w] are latents, t is the step index 0..999
(0 is the least noisy), the output holds the noise and, with `learn_sigma`, as many channels again for the variance.
Parameter names are those of the published checkpoints.

The authors released adaLN-Zero alone. How the other three are built follows from their text and, where it leaves a
choice, from the sizes and costs that they printed for XL/2: cross-attention and in-context end in a plain norm ("final
layer norm (adaptive if using adaLN)"), and parameters are counted without the fixed positions.

SiT (Ma et al. 2024, arXiv 2401.08740) is the same network with the same parameter names, read as another process: its
output is "-velocity" on the linear path, with the clock "1-t". Its checkpoints have `learn_sigma`, too, which wastes
half of the last layer: nothing trains the second half, and nothing reads it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..conditioning import Conditioning
from ..config import DitkitError, near, register
from ..layers import (
    AdaLNBlock,
    AdaLNZeroBlock,
    Attention,
    CrossAttention,
    CrossBlock,
    Edit,
    FinalLayer,
    LabelEmbedder,
    Mlp,
    PatchEmbed,
    PlainBlock,
    TimestepEmbedder,
    init_adaln_zero,
    layer_norm,
    patch_grid,
    positions_2d,
    sincos_2d,
    unpatchify,
    visit,
)
from ..rng import Rng
from .registry import ImageConfig, Model, Plan, at_least_one, instantiate, register_models

__all__ = ["DiT", "DiTConfig"]

CONDITIONING = ("in_context", "cross_attention", "adaln", "adaln_zero")


@register("model", "dit")
@dataclass(frozen=True)
class DiTConfig(ImageConfig):
    """Everything about a DiT; the defaults are DiT-XL/2 on 256 px (DiT tables 1 and 4)."""

    input_size: int | tuple[int, int] = 32
    """Side, or (rows, columns), of the latent. Other sizes are accepted; only this one's positions are stored."""
    patch_size: int = 2
    in_channels: int = 4
    hidden_size: int = 1152
    depth: int = 28
    num_heads: int = 16
    mlp_ratio: float = 4.0
    num_classes: int = 1000
    """0 = unconditional. The null label has the index num_classes."""
    learn_sigma: bool = True
    """Predict the variance too, in as many channels again."""
    frequency_shift: int = 0
    """Frequencies of the time are 10000^(-i / (128 - shift)): 0 in the release, 1 in diffusers' DiT."""
    mlp_norm_eps: float = 1e-6
    """eps of the norm before each MLP: 1e-6 in the release, 1e-5 in diffusers' DiT."""

    conditioning: str = "adaln_zero"
    """How time and class enter a block (DiT figure 3). in_context: as two tokens after those of the image, taken away
    after the last block. cross_attention: as two tokens to which each block attends after its self-attention.
    adaln: their sum gives shifts and scales of the norms. adaln_zero: and gates, which start at 0."""

    def __post_init__(self) -> None:
        at_least_one(self, "patch_size", "in_channels", "hidden_size", "depth", "num_heads")
        if self.frequency_shift not in (0, 1):
            raise DitkitError(f"model.frequency_shift is 0 or 1, not {self.frequency_shift}")
        if not self.mlp_norm_eps > 0:
            raise DitkitError(f"model.mlp_norm_eps must be above 0, not {self.mlp_norm_eps}")
        if self.conditioning not in CONDITIONING:
            raise DitkitError(
                f"unknown model.conditioning {self.conditioning!r}: {near(self.conditioning, CONDITIONING)}"
            )

    @property
    def adaptive(self) -> bool:
        """Whether norms are modulated, and so have no weights of their own."""
        return self.conditioning.startswith("adaln")

    def build(self, seed: int = 0) -> DiT:
        """The network with initial weights."""
        return instantiate(DiT, self, seed)


def block(config: DiTConfig) -> nn.Module:
    """Attention without qk-norm, MLP with the tanh form of GELU; a norm has weights where nothing modulates it."""
    dim = config.hidden_size
    attn, mlp = Attention(dim, config.num_heads), Mlp(dim, int(dim * config.mlp_ratio))
    norm1 = layer_norm(dim, affine=not config.adaptive)
    norm2 = layer_norm(dim, config.mlp_norm_eps, affine=not config.adaptive)
    match config.conditioning:
        case "in_context":
            return PlainBlock(norm1, attn, norm2, mlp)
        case "cross_attention":
            cross = CrossAttention(dim, config.num_heads)
            return CrossBlock(norm1, attn, layer_norm(dim, affine=True), cross, norm2, mlp)
        case "adaln":
            return AdaLNBlock(dim, norm1, attn, norm2, mlp)
        case _:
            return AdaLNZeroBlock(dim, norm1, attn, norm2, mlp)


class DiT(Model):
    """Diffusion transformer. Raises ValueError for an x that its patches do not tile."""

    plan = Plan(shard=("blocks",))

    def __init__(self, config: DiTConfig):
        super().__init__()
        self.config = config
        dim, patch = config.hidden_size, config.patch_size
        out = config.in_channels * (2 if config.learn_sigma else 1)
        self.x_embedder = PatchEmbed(config.in_channels, patch, dim)
        self.t_embedder = TimestepEmbedder(dim, shift=config.frequency_shift)
        self.y_embedder = LabelEmbedder(config.num_classes, dim)
        self.pos_embed = nn.Parameter(sincos_2d(dim, config.grid), requires_grad=False)
        self.blocks = nn.ModuleList(block(config) for _ in range(config.depth))
        norm = layer_norm(dim, affine=not config.adaptive)
        self.final_layer = FinalLayer(dim, patch * patch * out, norm, config.adaptive)

    def init_weights(self, rng: Rng) -> None:
        """adaLN-Zero's start, and the fixed positions."""
        init_adaln_zero(self, rng.generator)
        self.pos_embed.data = sincos_2d(self.config.hidden_size, self.config.grid)

    def prepare(self, cond: Conditioning, shape: Sequence[int], times: Sequence[float] = ()) -> Conditioning:
        """Label vectors and positions."""
        patch = self.config.patch_size
        return cond.with_static(
            label=self.y_embedder(cond.label, shape[0]),
            positions=positions_2d(self.pos_embed, self.config.grid, (shape[-2] // patch, shape[-1] // patch)),
        )

    def forward(
        self, x: Float[Tensor, "b c h w"], t: Float[Tensor, "b"], cond: Conditioning, *, edit: Edit | None = None
    ) -> Float[Tensor, "b o h w"]:
        """t: the step index 0..999. o = 2c with `learn_sigma`: the noise, then the raw variance."""
        config = self.config
        grid = patch_grid(x, config.in_channels, config.patch_size)
        if "label" not in cond.static:
            cond = self.prepare(cond, x.shape)
        time, label = self.t_embedder(t), cond.static["label"]
        h = self.x_embedder(x) + cond.static["positions"]
        n, given = h.shape[1], (time + label,)
        if config.conditioning == "in_context":
            h, given = torch.cat((h, time[:, None], label[:, None]), dim=1), ()
        elif config.conditioning == "cross_attention":
            given = (torch.stack((time, label), dim=1),)
        for i, blk in enumerate(self.blocks):
            h = visit(edit, f"blocks.{i}", blk, h, *given)
        return unpatchify(self.final_layer(h[:, :n], time + label), grid, config.patch_size)


# DiT table 1: the letter is depth and width, the number the patch size.
SIZES = {
    "s": DiTConfig(depth=12, hidden_size=384, num_heads=6),
    "b": DiTConfig(depth=12, hidden_size=768, num_heads=12),
    "l": DiTConfig(depth=24, hidden_size=1024, num_heads=16),
    "xl": DiTConfig(depth=28, hidden_size=1152, num_heads=16),
}
register_models(
    {f"dit_{size}_{patch}": replace(c, patch_size=patch) for size, c in SIZES.items() for patch in (2, 4, 8)}
)
register_models(
    {f"sit_{size}_{patch}": replace(c, patch_size=patch) for size, c in SIZES.items() for patch in (2, 4, 8)}
)
register_models({f"dit_xl_2_{way}": replace(SIZES["xl"], conditioning=way) for way in CONDITIONING[:-1]})
