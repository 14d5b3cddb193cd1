"""Attention: one function, self-attention in the forms that vision transformers have, and attention to given tokens."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from .norms import RMSNorm
from .patterns import Mask, attend_blocks
from .rope import Pairs, rotate

__all__ = ["Attention", "CrossAttention", "LinearAttention", "QKNorm", "attend", "attend_self", "key_mask"]

QKNorm = Literal["head", "across"] | None
"""RMS norm of q and k: of each head, of all heads as one vector, or none."""


def full_precision(device: torch.device) -> AbstractContextManager[Any]:
    """Without autocast, where there is one."""
    if torch.amp.is_autocast_available(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def attend(
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b g m d"],
    v: Float[Tensor, "b g m d"],
    mask: Mask | None = None,
    dropout: float = 0.0,
) -> Float[Tensor, "b h n d"]:
    """softmax(q k^T / sqrt(d)) v; True in `mask` = may be attended. q and k take the dtype of v.

    With fewer heads of k and v, each serves h / g neighbouring heads of q (grouped queries, Ainslie et al. 2023).
    mask: booleans that fit [b h n m], or blocks of them (patterns.py).
    """
    grouped = q.shape[1] != k.shape[1]
    q, k = q.to(v.dtype), k.to(v.dtype)
    if mask is not None and not isinstance(mask, Tensor):
        if grouped:
            k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        return attend_blocks(q, k, v, mask, dropout)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, enable_gqa=grouped)


def attend_self(
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b g n d"],
    v: Float[Tensor, "b g n d"],
    mask: Mask | None = None,
    dropout: float = 0.0,
    identity: Bool[Tensor, "b"] | None = None,
) -> Float[Tensor, "b h n d"]:
    """`attend` of tokens to themselves. identity: True in the rows of the batch whose attention map is the identity:
    each token sees itself alone (perturbed attention, Ahn et al. 2024)."""
    out = attend(q, k, v, mask, dropout)
    if identity is None:
        return out
    own = v.repeat_interleave(q.shape[1] // v.shape[1], dim=1)
    return torch.where(identity[:, None, None, None], own, out)


def key_mask(given: Bool[Tensor, "b l"], others: int) -> Bool[Tensor, "b 1 1 l+o"]:
    """The keys that every query may attend to: given tokens as their mask says, then `others` that all are real."""
    real = given.new_ones(given.shape[0], others)
    return torch.cat((given, real), dim=1)[:, None, None]


def _split(x: Float[Tensor, "b n d"], heads: int) -> Float[Tensor, "b h n hd"]:
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def _normed(norm: nn.Module, x: Float[Tensor, "b n d"], heads: int, kind: QKNorm) -> Float[Tensor, "b h n hd"]:
    return _split(norm(x), heads) if kind == "across" else norm(_split(x, heads))


def _norm(kind: QKNorm, head_dim: int, heads: int, eps: float) -> nn.Module:
    match kind:
        case None:
            return nn.Identity()
        case "head":
            return RMSNorm(head_dim, eps)
        case "across":
            return RMSNorm(heads * head_dim, eps)
    raise ValueError(f'qk_norm is "head", "across" or None, not {kind!r}')


def _head_dim(dim: int, heads: int, head_dim: int | None) -> int:
    if head_dim is None and dim % heads:
        raise ValueError(f"hidden_size {dim} is not divisible by num_heads {heads}")
    return head_dim or dim // heads


class Attention(nn.Module):
    """Self-attention: q, k, v from one Linear (timm's ViT) or from three, optional norm of q and k, optional RoPE.

    qk_norm: see `QKNorm`; `eps` is that of the norm. out_bias: of the output Linear, if it is not `bias`. kv_heads:
    heads of k and v where they are fewer. head_dim: where it is not dim / heads. pairs: which channels RoPE turns
    together. project_out: False where nothing reads the result, but others attend to these tokens. Joint attention of
    two streams projects each with its own module, attends once, and merges each.
    Raises ValueError for sizes that do not fit together.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        qk_norm: QKNorm = None,
        fused: bool = True,
        bias: bool = True,
        out_bias: bool | None = None,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        eps: float = 1e-6,
        pairs: Pairs = "neighbours",
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        project_out: bool = True,
    ):
        super().__init__()
        head_dim, kv_heads = _head_dim(dim, heads, head_dim), kv_heads or heads
        if heads % kv_heads:
            raise ValueError(f"num_heads {heads} is not divisible by num_kv_heads {kv_heads}")
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, head_dim
        self.qk_norm: QKNorm = qk_norm
        self.pairs: Pairs = pairs
        self.attn_drop = attn_drop
        self.sizes = (heads * head_dim, kv_heads * head_dim, kv_heads * head_dim)
        if fused:
            self.qkv = nn.Linear(dim, sum(self.sizes), bias=bias)
        else:
            self.q, self.k, self.v = (nn.Linear(dim, size, bias=bias) for size in self.sizes)
        self.fused = fused
        self.q_norm = _norm(qk_norm, head_dim, heads, eps)
        self.k_norm = _norm(qk_norm, head_dim, kv_heads, eps)
        out_bias = bias if out_bias is None else out_bias
        self.proj = nn.Linear(heads * head_dim, dim, bias=out_bias) if project_out else nn.Identity()
        self.proj_drop = nn.Dropout(proj_drop)

    def project(
        self, x: Float[Tensor, "b n d"], rope: Float[Tensor, "2 ... n hd"] | None = None
    ) -> tuple[Float[Tensor, "b h n hd"], Float[Tensor, "b g n hd"], Float[Tensor, "b g n hd"]]:
        """q, k and v of each head; q and k are normed, then turned."""
        q, k, v = self.qkv(x).split(self.sizes, dim=-1) if self.fused else (self.q(x), self.k(x), self.v(x))
        q = _normed(self.q_norm, q, self.heads, self.qk_norm)
        k = _normed(self.k_norm, k, self.kv_heads, self.qk_norm)
        if rope is not None:
            q, k = rotate(q, rope, self.pairs), rotate(k, rope, self.pairs)
        return q, k, _split(v, self.kv_heads)

    def merge(self, out: Float[Tensor, "b h n hd"]) -> Float[Tensor, "b n d"]:
        """Heads side by side, and the output Linear."""
        return self.proj_drop(self.proj(out.transpose(1, 2).flatten(2)))

    def forward(
        self,
        x: Float[Tensor, "b n d"],
        rope: Float[Tensor, "2 ... n hd"] | None = None,
        mask: Mask | None = None,
        *,
        identity: Bool[Tensor, "b"] | None = None,
    ) -> Float[Tensor, "b n d"]:
        """mask: True = may be attended. identity: see `attend_self`."""
        q, k, v = self.project(x, rope)
        return self.merge(attend_self(q, k, v, mask, self.attn_drop if self.training else 0.0, identity))


class LinearAttention(Attention):
    """Self-attention whose weights are relu(q) . relu(k) over their sum: its cost grows with n, not with n^2
    (Katharopoulos et al. 2020; Sana, Xie et al. 2024, arXiv 2410.10629, section 2.2). The sums are in float32."""

    def forward(
        self,
        x: Float[Tensor, "b n d"],
        rope: Float[Tensor, "2 ... n hd"] | None = None,
        mask: Mask | None = None,
        *,
        identity: Bool[Tensor, "b"] | None = None,
    ) -> Float[Tensor, "b n d"]:
        """identity: as in `Attention`. Raises ValueError for a mask: the sums are the same for all tokens."""
        if mask is not None:
            raise ValueError("linear attention takes no mask")
        q, k, v = self.project(x, rope)
        with full_precision(x.device):
            q, k, values = q.relu().float(), k.relu().float(), v.float()
            sums, total = k.mT @ values, k.sum(-2).unsqueeze(-1)
            out = ((q @ sums) / (q @ total + 1e-15)).to(v.dtype)
        if identity is not None:
            out = torch.where(identity[:, None, None, None], v, out)
        return self.merge(out)


class CrossAttention(nn.Module):
    """Attention of x to given tokens: q from x; k and v from what is given, from one Linear or from two.

    given: the width of the given tokens, if it is not `dim`. Raises ValueError for sizes that do not fit together.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        given: int | None = None,
        fused: bool = True,
        bias: bool = True,
        out_bias: bool | None = None,
        qk_norm: QKNorm = None,
        head_dim: int | None = None,
        eps: float = 1e-6,
        proj_drop: float = 0.0,
    ):
        super().__init__()
        head_dim = _head_dim(dim, heads, head_dim)
        inner, given = heads * head_dim, given or dim
        self.heads, self.fused = heads, fused
        self.qk_norm: QKNorm = qk_norm
        self.q = nn.Linear(dim, inner, bias=bias)
        if fused:
            self.kv = nn.Linear(given, 2 * inner, bias=bias)
        else:
            self.k, self.v = nn.Linear(given, inner, bias=bias), nn.Linear(given, inner, bias=bias)
        self.q_norm = _norm(qk_norm, head_dim, heads, eps)
        self.k_norm = _norm(qk_norm, head_dim, heads, eps)
        self.proj = nn.Linear(inner, dim, bias=bias if out_bias is None else out_bias)
        self.proj_drop = nn.Dropout(proj_drop)

    def keys(self, given: Float[Tensor, "b m g"]) -> tuple[Float[Tensor, "b h m hd"], Float[Tensor, "b h m hd"]]:
        """Keys and values of given tokens: the same at every step of a trajectory."""
        k, v = self.kv(given).chunk(2, dim=-1) if self.fused else (self.k(given), self.v(given))
        return _normed(self.k_norm, k, self.heads, self.qk_norm), _split(v, self.heads)

    def forward(
        self,
        x: Float[Tensor, "b n d"],
        given: Float[Tensor, "b m g"] | tuple[Float[Tensor, "b h m hd"], Float[Tensor, "b h m hd"]],
        mask: Bool[Tensor, "#b #h #n m"] | None = None,
    ) -> Float[Tensor, "b n d"]:
        """given: tokens, or what `keys` made of them. mask: True = may be attended."""
        k, v = given if isinstance(given, tuple) else self.keys(given)
        q = _normed(self.q_norm, self.q(x), self.heads, self.qk_norm)
        return self.proj_drop(self.proj(attend(q, k, v, mask).transpose(1, 2).flatten(2)))
