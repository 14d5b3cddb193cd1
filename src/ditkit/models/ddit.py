"""DDiT: the diffusion transformer on tokens of "Discrete Diffusion Modeling by Estimating the Ratios of the Data
Distribution" (SEDD), Lou, Meng & Ermon 2023, arXiv 2310.16834; also the network of MDLM, Sahoo et al. 2024, and, with
audio added, of Drax.

A bidirectional transformer with rotary positions, LayerNorm without bias and adaLN-Zero on a narrow time vector, as in
DiT. The network's language: x [b l] are tokens, or [b l v] probabilities of them; t is what the `clock` makes it (SEDD
gives the logarithm of the noise, flow_matching and Drax their time from 0 = noise to 1 = data); the output [b l v] are
logits of the clean tokens. Rotations turn the two halves of a head, as SEDD's and flow_matching's do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from ..conditioning import Conditioning
from ..config import register
from ..layers import (
    AdaLNZeroBlock,
    Attention,
    Edit,
    FinalLayer,
    LabelEmbedder,
    Mlp,
    TimestepEmbedder,
    TokenEmbedder,
    axial_angles,
    check_heads_even,
    init_adaln_zero,
    layer_norm,
    rope_table,
    visit,
)
from ..rng import Rng
from .registry import Model, Plan, TokenConfig, at_least_one, instantiate, register_models

__all__ = ["DDiT", "DDiTConfig"]


@register("model", "ddit")
@dataclass(frozen=True)
class DDiTConfig(TokenConfig):
    """Everything about a DDiT; the defaults are SEDD small on the vocabulary of GPT-2 and a mask."""

    length: int = 1024
    """Tokens of a sample. Other lengths are accepted: positions are relative."""
    vocab: int = 50258
    """Kinds of tokens, the mask among them."""
    hidden_size: int = 768
    depth: int = 12
    num_heads: int = 12
    mlp_ratio: float = 4.0
    cond_dim: int = 128
    """Size of the vector of time, and class, that modulates the blocks."""
    num_classes: int = 0
    """0 = unconditional. The null label has the index num_classes."""
    drop: float = 0.1
    """Dropout after attention and MLP."""

    def __post_init__(self) -> None:
        at_least_one(self, "length", "vocab", "hidden_size", "depth", "num_heads", "cond_dim")

    def build(self, seed: int = 0) -> DDiT:
        """The network with initial weights."""
        return instantiate(DDiT, self, seed)


def block(config: DDiTConfig) -> AdaLNZeroBlock:
    """LayerNorm without bias, attention without bias and qk-norm, MLP with the tanh form of GELU."""
    dim = config.hidden_size
    return AdaLNZeroBlock(
        dim,
        norm1=layer_norm(dim, eps=1e-5, affine=True, bias=False),
        attn=Attention(dim, config.num_heads, proj_drop=config.drop, bias=False, pairs="halves"),
        norm2=layer_norm(dim, eps=1e-5, affine=True, bias=False),
        mlp=Mlp(dim, int(dim * config.mlp_ratio), config.drop),
        given=config.cond_dim,
    )


class DDiT(Model):
    """Discrete diffusion transformer. Raises ValueError for sizes that do not fit together and for another x."""

    plan = Plan(shard=("blocks",))

    def __init__(self, config: DDiTConfig):
        super().__init__()
        self.config = config
        dim, given = config.hidden_size, config.cond_dim
        check_heads_even(dim, config.num_heads)
        self.x_embedder = TokenEmbedder(config.vocab, dim)
        self.t_embedder = TimestepEmbedder(given)
        self.y_embedder = LabelEmbedder(config.num_classes, given) if config.num_classes else None
        self.blocks = nn.ModuleList(block(config) for _ in range(config.depth))
        norm = layer_norm(dim, eps=1e-5, affine=True, bias=False)
        self.final_layer = FinalLayer(dim, config.vocab, norm, given=given)

    def init_weights(self, rng: Rng) -> None:
        """adaLN-Zero's start, and token vectors uniform in +-1 / sqrt(hidden_size)."""
        init_adaln_zero(self, rng.generator)
        bound = self.config.hidden_size**-0.5
        nn.init.uniform_(self.x_embedder.weight, -bound, bound, generator=rng.generator("x_embedder"))

    def prepare(self, cond: Conditioning, shape: Sequence[int], times: Sequence[float] = ()) -> Conditioning:
        """Label vectors and rotations. Raises ValueError if labels are missing or not wanted."""
        if self.y_embedder is not None:
            cond = cond.with_static(label=self.y_embedder(cond.label, shape[0]))
        elif cond.label is not None:
            raise ValueError("the model has num_classes=0 and a label was given")
        positions = torch.arange(shape[1], device=self.x_embedder.weight.device)
        angles = axial_angles((positions,), (self.config.hidden_size // self.config.num_heads,))
        return cond.with_static(rope=rope_table(angles, "halves")[None])

    def forward(
        self, x: Shaped[Tensor, "b l *v"], t: Float[Tensor, "b"], cond: Conditioning, *, edit: Edit | None = None
    ) -> Float[Tensor, "b l v"]:
        """x: tokens, or probabilities in floats. The result are logits."""
        h = self.x_embedder(x)
        if "rope" not in cond.static:
            cond = self.prepare(cond, x.shape)
        c = self.t_embedder(t)
        if "label" in cond.static:
            c = c + cond.static["label"]
        for i, blk in enumerate(self.blocks):
            h = visit(edit, f"blocks.{i}", blk, h, c, cond.static["rope"][0])
        return self.final_layer(h, c)


# SEDD's two published sizes
register_models(
    {
        "ddit_s": DDiTConfig(depth=12, hidden_size=768, num_heads=12),
        "ddit_m": DDiTConfig(depth=24, hidden_size=1024, num_heads=16),
    }
)
