"""Attention: one function, the self-attention module of plain vision transformers, and attention to given tokens."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from .norms import RMSNorm
from .rope import rotate

__all__ = ["Attention", "CrossAttention", "attend"]


def attend(
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b h m d"],
    v: Float[Tensor, "b h m d"],
    mask: Bool[Tensor, "#b #h #n m"] | None = None,
    dropout: float = 0.0,
) -> Float[Tensor, "b h n d"]:
    """softmax(q k^T / sqrt(d)) v; True in `mask` = may be attended. q and k take the dtype of v."""
    return F.scaled_dot_product_attention(q.to(v.dtype), k.to(v.dtype), v, attn_mask=mask, dropout_p=dropout)


class Attention(nn.Module):
    """Self-attention with fused q, k, v as in timm's ViT: optional RMS norm of q and k per head, optional RoPE."""

    def __init__(
        self,
        dim: int,
        heads: int,
        qk_norm: bool = False,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        bias: bool = True,
    ):
        super().__init__()
        if dim % heads:
            raise ValueError(f"hidden_size {dim} is not divisible by num_heads {heads}")
        self.heads, self.attn_drop = heads, attn_drop
        self.qkv = nn.Linear(dim, 3 * dim, bias=bias)
        self.q_norm = RMSNorm(dim // heads) if qk_norm else nn.Identity()
        self.k_norm = RMSNorm(dim // heads) if qk_norm else nn.Identity()
        self.proj = nn.Linear(dim, dim, bias=bias)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(
        self,
        x: Float[Tensor, "b n d"],
        rope: Float[Tensor, "2 n hd"] | None = None,
        *,
        identity: Bool[Tensor, "b"] | None = None,
    ) -> Float[Tensor, "b n d"]:
        """identity: True in the rows of the batch whose attention map is the identity: each token sees itself alone
        (perturbed attention, Ahn et al. 2024)."""
        b, n, d = x.shape
        q, k, v = self.qkv(x).view(b, n, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            q, k = rotate(q, rope), rotate(k, rope)
        out = attend(q, k, v, dropout=self.attn_drop if self.training else 0.0)
        if identity is not None:
            out = torch.where(identity[:, None, None, None], v, out)
        return self.proj_drop(self.proj(out.transpose(1, 2).reshape(b, n, d)))


class CrossAttention(nn.Module):
    """Attention of x to given tokens of the same width: q from x, fused k and v from what is given."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        if dim % heads:
            raise ValueError(f"hidden_size {dim} is not divisible by num_heads {heads}")
        self.heads = heads
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Float[Tensor, "b n d"], given: Float[Tensor, "b m d"]) -> Float[Tensor, "b n d"]:
        b, n, d = x.shape
        q = self.q(x).view(b, n, self.heads, d // self.heads).transpose(1, 2)
        k, v = self.kv(given).view(b, given.shape[1], 2, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        return self.proj(attend(q, k, v).transpose(1, 2).reshape(b, n, d))
