"""Blocks of several streams, and of attention and MLP side by side."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from .attention import Attention, attend_self
from .modulation import adaln, modulate, over_tokens
from .norms import RMSNorm, layer_norm
from .patterns import Mask
from .rope import rotate

__all__ = ["DualBlock", "ParallelBlock", "Stream"]


class Stream(nn.Module):
    """What one of the two streams of a `DualBlock` has of its own: modulation, projections of the attention, MLP.

    mlp: None where nothing reads the stream after this block. It then has a shift and a scale before the attention
    alone, and leaves the block as it came. attn2: a self-attention of this stream alone, beside the joint one (MMDiT-X
    of Stable Diffusion 3.5 medium). modulated: False where the block is given shifts, scales and gates themselves,
    made once for all blocks (FLUX.2). bias: of the modulation.
    """

    def __init__(
        self,
        dim: int,
        attn: Attention,
        mlp: nn.Module | None,
        attn2: Attention | None = None,
        modulated: bool = True,
        bias: bool = True,
    ):
        super().__init__()
        self.norm1, self.attn, self.attn2 = layer_norm(dim), attn, attn2
        self.norm2, self.mlp = layer_norm(dim), mlp
        self.chunks = 2 if mlp is None else 6 if attn2 is None else 9
        self.adaLN_modulation = adaln(dim, self.chunks, bias=bias) if modulated else None

    def vectors(self, c: Float[Tensor, "b g"]) -> tuple[Float[Tensor, "b d"], ...]:
        """Shift, scale and gate of the joint attention, of the MLP, of the own attention; as far as they are there."""
        return (c if self.adaLN_modulation is None else self.adaLN_modulation(c)).chunk(self.chunks, dim=-1)

    def forward(
        self,
        x: Float[Tensor, "b n d"],
        vectors: tuple[Float[Tensor, "b d"], ...],
        out: Float[Tensor, "b h n hd"],
        identity: Bool[Tensor, "b"] | None = None,
    ) -> Float[Tensor, "b n d"]:
        """The stream after the joint attention; `out` is its share of the result."""
        if self.mlp is None:
            return x
        gate1, shift2, scale2, gate2 = vectors[2:6]
        after = x + over_tokens(gate1) * self.attn.merge(out)
        if self.attn2 is not None:
            shift3, scale3, gate3 = vectors[6:]
            own = self.attn2(modulate(self.norm1(x), shift3, scale3), identity=identity)
            after = after + over_tokens(gate3) * own
        return after + over_tokens(gate2) * self.mlp(modulate(self.norm2(after), shift2, scale2))


class DualBlock(nn.Module):
    """Two streams, image and text, with weights of their own and one attention (MMDiT, Esser et al. 2024, figure 2b).

    x and c are pairs, of the image and of the text. In the joint sequence of `rope` and `mask` the text comes first.
    """

    def __init__(self, x_block: Stream, context_block: Stream):
        super().__init__()
        self.x_block, self.context_block = x_block, context_block

    def forward(
        self,
        x: tuple[Float[Tensor, "b n d"], Float[Tensor, "b l d"]],
        c: tuple[Float[Tensor, "b g"], Float[Tensor, "b g"]],
        rope: Float[Tensor, "2 ... l+n hd"] | None = None,
        mask: Mask | None = None,
        *,
        identity: Bool[Tensor, "b"] | None = None,
    ) -> tuple[Float[Tensor, "b n d"], Float[Tensor, "b l d"]]:
        streams, length = (self.x_block, self.context_block), x[1].shape[1]
        turns = (None, None) if rope is None else (rope[..., length:, :], rope[..., :length, :])
        vectors = [stream.vectors(of) for stream, of in zip(streams, c, strict=True)]
        image, text = (
            stream.attn.project(modulate(stream.norm1(tokens), *of[:2]), turn)
            for stream, tokens, of, turn in zip(streams, x, vectors, turns, strict=True)
        )
        q, k, v = (torch.cat(both, dim=2) for both in zip(text, image, strict=True))
        out = attend_self(q, k, v, mask, identity=identity)
        return (
            self.x_block(x[0], vectors[0], out[:, :, length:], identity),
            self.context_block(x[1], vectors[1], out[:, :, :length], identity),
        )


class ParallelBlock(nn.Module):
    """Attention and MLP side by side on one modulated norm, with one Linear in and one out (Dehghani et al. 2023).

    hidden: width of the MLP. gated: SwiGLU, gate first, instead of GELU in its tanh form. modulated: as in `Stream`.
    """

    def __init__(
        self, dim: int, heads: int, hidden: int, *, gated: bool = False, bias: bool = True, modulated: bool = True
    ):
        super().__init__()
        self.heads, self.gated = heads, gated
        self.norm = layer_norm(dim)
        self.linear1 = nn.Linear(dim, 3 * dim + hidden * (2 if gated else 1), bias=bias)
        self.linear2 = nn.Linear(dim + hidden, dim, bias=bias)
        self.q_norm, self.k_norm = RMSNorm(dim // heads), RMSNorm(dim // heads)
        self.adaLN_modulation = adaln(dim, 3, bias=bias) if modulated else None

    def forward(
        self,
        x: Float[Tensor, "b n d"],
        c: Float[Tensor, "b g"],
        rope: Float[Tensor, "2 ... n hd"],
        mask: Mask | None = None,
        *,
        identity: Bool[Tensor, "b"] | None = None,
    ) -> Float[Tensor, "b n d"]:
        dim = x.shape[-1]
        vectors = c if self.adaLN_modulation is None else self.adaLN_modulation(c)
        shift, scale, gate = vectors.chunk(3, dim=-1)
        qkv, h = self.linear1(modulate(self.norm(x), shift, scale)).tensor_split((3 * dim,), dim=-1)
        q, k, v = qkv.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        q, k = rotate(self.q_norm(q), rope), rotate(self.k_norm(k), rope)
        out = attend_self(q, k, v, mask, identity=identity).transpose(1, 2).flatten(2)
        if self.gated:
            first, value = h.chunk(2, dim=-1)
            h = F.silu(first) * value
        else:
            h = F.gelu(h, approximate="tanh")
        return x + over_tokens(gate) * self.linear2(torch.cat((out, h), dim=-1))
