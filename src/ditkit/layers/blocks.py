"""Transformer blocks made of the layers, and the one door into a forward."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from .attention import CrossAttention
from .modulation import adaln, modulate, over_tokens
from .norms import RMSNorm
from .patterns import Mask

__all__ = [
    "AdaLNBlock",
    "AdaLNSingleBlock",
    "AdaLNSingleFinal",
    "AdaLNZeroBlock",
    "CrossBlock",
    "Edit",
    "FinalLayer",
    "GatedCrossBlock",
    "PlainBlock",
    "SandwichBlock",
    "keys_for",
    "keys_in",
    "refined",
    "visit",
]


class Edit(Protocol):
    """A function that runs a block, changes what goes in or comes out, runs it elsewhere, or not at all.

    `site` is the block's name in the state dict ("blocks.3"). The identity is `lambda site, block, x, *args:
    block(x, *args)`. Guidance by perturbation, control, caching, routing and feature taps are edits.

    A block with self-attention takes `identity=`, a boolean for each row of the batch: where it is True the map of its
    self-attention is the identity. It is data, not another module: nothing is patched, and a compiled block stays
    compiled.
    """

    def __call__(self, site: str, block: nn.Module, x: Any, /, *args: Any) -> Any: ...


def visit(edit: Edit | None, site: str, block: nn.Module, x: Any, *args: Any) -> Any:
    """Run a block through the edit, if there is one."""
    return block(x, *args) if edit is None else edit(site, block, x, *args)


class PlainBlock(nn.Module):
    """The pre-norm block of a plain vision transformer (Dosovitskiy et al. 2021): nothing but tokens goes in."""

    def __init__(self, norm1: nn.Module, attn: nn.Module, norm2: nn.Module, mlp: nn.Module):
        super().__init__()
        self.norm1, self.attn, self.norm2, self.mlp = norm1, attn, norm2, mlp

    def forward(
        self, x: Float[Tensor, "b n d"], *, identity: Bool[Tensor, "b"] | None = None
    ) -> Float[Tensor, "b n d"]:
        x = x + self.attn(self.norm1(x), identity=identity)
        return x + self.mlp(self.norm2(x))


class CrossBlock(nn.Module):
    """A plain block with a cross-attention to given tokens between its two halves (DiT figure 3)."""

    def __init__(
        self,
        norm1: nn.Module,
        attn: nn.Module,
        norm_cross: nn.Module,
        cross: nn.Module,
        norm2: nn.Module,
        mlp: nn.Module,
    ):
        super().__init__()
        self.norm1, self.attn, self.norm_cross, self.cross = norm1, attn, norm_cross, cross
        self.norm2, self.mlp = norm2, mlp

    def forward(
        self,
        x: Float[Tensor, "b n d"],
        given: Float[Tensor, "b m g"],
        given_mask: Bool[Tensor, "#b #h #n m"] | None = None,
        *,
        identity: Bool[Tensor, "b"] | None = None,
    ) -> Float[Tensor, "b n d"]:
        """given_mask: which of the given tokens may be attended."""
        x = x + self.attn(self.norm1(x), identity=identity)
        x = x + self.cross(self.norm_cross(x), given, given_mask)
        return x + self.mlp(self.norm2(x))


class AdaLNBlock(nn.Module):
    """Attention and MLP, each modulated by the conditioning and not gated (DiT section 3.2, adaLN)."""

    def __init__(self, dim: int, norm1: nn.Module, attn: nn.Module, norm2: nn.Module, mlp: nn.Module):
        super().__init__()
        self.norm1, self.attn, self.norm2, self.mlp = norm1, attn, norm2, mlp
        self.adaLN_modulation = adaln(dim, 4)

    def forward(
        self, x: Float[Tensor, "b n d"], c: Float[Tensor, "b d"], *, identity: Bool[Tensor, "b"] | None = None
    ) -> Float[Tensor, "b n d"]:
        shift1, scale1, shift2, scale2 = self.adaLN_modulation(c).chunk(4, dim=-1)
        x = x + self.attn(modulate(self.norm1(x), shift1, scale1), identity=identity)
        return x + self.mlp(modulate(self.norm2(x), shift2, scale2))


class AdaLNZeroBlock(nn.Module):
    """Attention and MLP, each modulated before and gated after by the conditioning (DiT figure 3, adaLN-Zero).

    given: the size of the conditioning, if it is not `dim`. precise: modulation and gates in float32, whatever the
    model is; the norms, which are given, decide for themselves.
    """

    def __init__(
        self,
        dim: int,
        norm1: nn.Module,
        attn: nn.Module,
        norm2: nn.Module,
        mlp: nn.Module,
        given: int | None = None,
        precise: bool = False,
    ):
        super().__init__()
        self.norm1, self.attn, self.norm2, self.mlp = norm1, attn, norm2, mlp
        self.adaLN_modulation = adaln(dim, 6, given, precise=precise)

    def forward(
        self,
        x: Float[Tensor, "b n d"],
        c: Float[Tensor, "b *n g"],
        rope: Float[Tensor, "2 ... n hd"] | None = None,
        mask: Mask | None = None,
        *,
        identity: Bool[Tensor, "b"] | None = None,
    ) -> Float[Tensor, "b n d"]:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).chunk(6, dim=-1)
        y = modulate(self.norm1(x), shift1, scale1).to(x.dtype)
        x = (x + over_tokens(gate1) * self.attn(y, rope, mask, identity=identity)).to(x.dtype)
        y = modulate(self.norm2(x), shift2, scale2).to(x.dtype)
        return (x + over_tokens(gate2) * self.mlp(y)).to(x.dtype)


class GatedCrossBlock(nn.Module):
    """Self-attention, attention to given tokens and MLP, each modulated before and gated after by the conditioning
    (Kandinsky 5, arXiv 2511.14993; Drax, arXiv 2510.04162).

    cross: takes tokens, or the keys and values that its `keys` made of them. norm_tokens: the norm of the given tokens,
    where each block has one. given, precise: as for `AdaLNZeroBlock`.
    """

    def __init__(
        self,
        dim: int,
        norm1: nn.Module,
        attn: nn.Module,
        norm_cross: nn.Module,
        cross: CrossAttention,
        norm2: nn.Module,
        mlp: nn.Module,
        norm_tokens: nn.Module | None = None,
        given: int | None = None,
        precise: bool = False,
    ):
        super().__init__()
        self.norm1, self.attn, self.norm_cross, self.norm_tokens = norm1, attn, norm_cross, norm_tokens
        self.cross, self.norm2, self.mlp = cross, norm2, mlp
        self.adaLN_modulation = adaln(dim, 9, given, precise=precise)

    def keys(self, tokens: Float[Tensor, "b m g"]) -> tuple[Float[Tensor, "b h m hd"], Float[Tensor, "b h m hd"]]:
        """Keys and values of the given tokens: the same at every step of a trajectory."""
        return self.cross.keys(tokens if self.norm_tokens is None else self.norm_tokens(tokens))

    def forward(
        self,
        x: Float[Tensor, "b n d"],
        c: Float[Tensor, "b *n g"],
        tokens: Float[Tensor, "b m g"] | tuple[Float[Tensor, "b h m hd"], Float[Tensor, "b h m hd"]],
        tokens_mask: Bool[Tensor, "#b #h #n m"] | None = None,
        rope: Float[Tensor, "2 ... n hd"] | None = None,
        mask: Mask | None = None,
        *,
        identity: Bool[Tensor, "b"] | None = None,
    ) -> Float[Tensor, "b n d"]:
        """tokens: what is given, or what `keys` made of it. The masks say which tokens, and which x, may be attended.
        The chunks of the modulation are shift, scale and gate of self-attention, of cross-attention and of the MLP."""
        if not isinstance(tokens, tuple):
            tokens = self.keys(tokens)
        shift1, scale1, gate1, *cross, shift2, scale2, gate2 = self.adaLN_modulation(c).chunk(9, dim=-1)
        shift, scale, gate = cross
        y = modulate(self.norm1(x), shift1, scale1).to(x.dtype)
        x = (x + over_tokens(gate1) * self.attn(y, rope, mask, identity=identity)).to(x.dtype)
        y = modulate(self.norm_cross(x), shift, scale).to(x.dtype)
        x = (x + over_tokens(gate) * self.cross(y, tokens, tokens_mask)).to(x.dtype)
        y = modulate(self.norm2(x), shift2, scale2).to(x.dtype)
        return (x + over_tokens(gate2) * self.mlp(y)).to(x.dtype)


class SandwichBlock(nn.Module):
    """Attention and MLP, each between two RMS norms, scaled by 1 + scale before and gated by a tanh after.

    x + tanh(gate) norm(attn(norm(x) (1 + scale))), then the same with the MLP; nothing is shifted (Lumina-Image 2.0,
    Qin et al. 2025, arXiv 2503.21758; Z-Image, arXiv 2511.22699, section 4.1).
    given: the size of the conditioning; None = no modulation, and `c` is None. silu: whether it goes through a SiLU.
    """

    def __init__(
        self, dim: int, attn: nn.Module, mlp: nn.Module, given: int | None = None, silu: bool = True, eps: float = 1e-5
    ):
        super().__init__()
        self.attn_norm1, self.attn_norm2 = RMSNorm(dim, eps), RMSNorm(dim, eps)
        self.mlp_norm1, self.mlp_norm2 = RMSNorm(dim, eps), RMSNorm(dim, eps)
        self.attn, self.mlp = attn, mlp
        self.adaLN_modulation = None if given is None else adaln(dim, 4, given, silu=silu)

    def forward(
        self,
        x: Float[Tensor, "b n d"],
        c: Float[Tensor, "b *n g"] | None,
        rope: Float[Tensor, "2 ... n hd"] | None = None,
        mask: Mask | None = None,
        *,
        identity: Bool[Tensor, "b"] | None = None,
    ) -> Float[Tensor, "b n d"]:
        if self.adaLN_modulation is None:
            x = x + self.attn_norm2(self.attn(self.attn_norm1(x), rope, mask, identity=identity))
            return x + self.mlp_norm2(self.mlp(self.mlp_norm1(x)))
        scale1, gate1, scale2, gate2 = self.adaLN_modulation(c).chunk(4, dim=-1)
        y = self.attn(modulate(self.attn_norm1(x), None, scale1), rope, mask, identity=identity)
        x = x + over_tokens(gate1.tanh()) * self.attn_norm2(y)
        y = self.mlp(modulate(self.mlp_norm1(x), None, scale2))
        return x + over_tokens(gate2.tanh()) * self.mlp_norm2(y)


def refined(
    blocks: Iterable[nn.Module],
    x: Float[Tensor, "b n d"],
    rope: Float[Tensor, "2 b 1 n hd"],
    used: Bool[Tensor, "b n"],
) -> Float[Tensor, "b n d"]:
    """Tokens after blocks without modulation, which see those that are used."""
    # in a row where none is used all see each other, for a softmax needs something; the result is not used either
    mask = (used | ~used.any(1, keepdim=True))[:, None, None]
    for block in blocks:
        x = block(x, None, rope, mask)
    return x


def keys_for(blocks: Iterable[nn.Module], tokens: Float[Tensor, "b m g"]) -> dict[str, Tensor]:
    """Keys and values of given tokens in each block that attends to them, as `prepare` keeps them: see `keys_in`."""
    kept: dict[str, Tensor] = {}
    for i, block in enumerate(blocks):
        kept[f"keys.{i}"], kept[f"values.{i}"] = block.keys(tokens)  # type: ignore[operator]
    return kept


def keys_in(static: Mapping[str, Tensor], i: int) -> tuple[Float[Tensor, "b h m hd"], Float[Tensor, "b h m hd"]]:
    """Those of block i."""
    return static[f"keys.{i}"], static[f"values.{i}"]


class AdaLNSingleBlock(nn.Module):
    """Self-attention and MLP, modulated and gated by six vectors that all blocks share plus a table of the block's own
    (adaLN-single); between the two, attention to given tokens, without a norm and without a gate (PixArt-alpha, Chen et
    al. 2023, arXiv 2310.00426, section 2.3 and figure 4; Sana)."""

    def __init__(
        self, dim: int, norm1: nn.Module, attn: nn.Module, cross: CrossAttention, norm2: nn.Module, mlp: nn.Module
    ):
        super().__init__()
        self.norm1, self.attn, self.cross, self.norm2, self.mlp = norm1, attn, cross, norm2, mlp
        self.scale_shift_table = nn.Parameter(torch.empty(6, dim))

    def keys(self, tokens: Float[Tensor, "b m g"]) -> tuple[Float[Tensor, "b h m hd"], Float[Tensor, "b h m hd"]]:
        """Keys and values of the given tokens: the same at every step of a trajectory."""
        return self.cross.keys(tokens)

    def forward(
        self,
        x: Float[Tensor, "b n d"],
        c: Float[Tensor, "b 6 d"],
        tokens: Float[Tensor, "b m g"] | tuple[Float[Tensor, "b h m hd"], Float[Tensor, "b h m hd"]],
        tokens_mask: Bool[Tensor, "#b #h #n m"] | None = None,
        grid: tuple[int, int] | None = None,
        *,
        identity: Bool[Tensor, "b"] | None = None,
    ) -> Float[Tensor, "b n d"]:
        """tokens: what is given, or what `keys` made of it. grid: rows and columns, for an MLP that sees neighbours."""
        shift1, scale1, gate1, shift2, scale2, gate2 = (self.scale_shift_table + c).unbind(1)
        x = x + over_tokens(gate1) * self.attn(modulate(self.norm1(x), shift1, scale1), identity=identity)
        x = x + self.cross(x, tokens, tokens_mask)
        y = modulate(self.norm2(x), shift2, scale2)
        return x + over_tokens(gate2) * (self.mlp(y) if grid is None else self.mlp(y, grid))


class AdaLNSingleFinal(nn.Module):
    """The last layer of adaLN-single: a norm, shifted and scaled by the time vector plus a table, and a Linear."""

    def __init__(self, dim: int, features: int, norm: nn.Module):
        super().__init__()
        self.norm_final = norm
        self.scale_shift_table = nn.Parameter(torch.empty(2, dim))
        self.linear = nn.Linear(dim, features)

    def forward(self, x: Float[Tensor, "b n d"], t: Float[Tensor, "b d"]) -> Float[Tensor, "b n f"]:
        shift, scale = (self.scale_shift_table + t[:, None]).unbind(1)
        return self.linear(modulate(self.norm_final(x), shift, scale))


class FinalLayer(nn.Module):
    """A norm, modulated unless it is not `adaptive`, and a Linear to the features of a patch or a token.

    given: the size of the conditioning, if it is not `dim`. shift: False = the modulation only scales.
    precise: as for `AdaLNZeroBlock`.
    """

    def __init__(
        self,
        dim: int,
        features: int,
        norm: nn.Module,
        adaptive: bool = True,
        given: int | None = None,
        shift: bool = True,
        bias: bool = True,
        precise: bool = False,
    ):
        super().__init__()
        self.norm_final = norm
        self.linear = nn.Linear(dim, features, bias=bias)
        self.shift = shift
        self.adaLN_modulation = adaln(dim, 2 if shift else 1, given, bias, precise=precise) if adaptive else None

    def forward(self, x: Float[Tensor, "b n d"], c: Float[Tensor, "b *n g"]) -> Float[Tensor, "b n f"]:
        y = self.norm_final(x)
        if self.adaLN_modulation is not None:
            vectors = self.adaLN_modulation(c)
            shift, scale = vectors.chunk(2, dim=-1) if self.shift else (None, vectors)
            y = modulate(y, shift, scale).to(x.dtype)
        return self.linear(y)
