"""Adaptive layer norm: a vector per sample becomes shifts, scales and gates (Perez et al. 2018; DiT section 3.2)."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn

from .precision import Linear32

__all__ = ["adaln", "modulate", "over_tokens"]


def adaln(
    dim: int, chunks: int, given: int | None = None, bias: bool = True, silu: bool = True, precise: bool = False
) -> nn.Sequential:
    """SiLU and a Linear to `chunks` vectors of size `dim`; zero-initialised by the model for adaLN-Zero.

    given: the size of the vector that they come from, if it is not `dim`. silu: whether the SiLU is there. precise: in
    float32, whatever the model is.
    """
    linear = (Linear32 if precise else nn.Linear)(given or dim, chunks * dim, bias=bias)
    return nn.Sequential(nn.SiLU(), linear) if silu else nn.Sequential(linear)


def over_tokens(vector: Float[Tensor, "b *n d"]) -> Float[Tensor, "b #n d"]:
    """A vector per sample as one for all of its tokens; vectors per token stay as they are."""
    return vector[:, None] if vector.ndim == 2 else vector


def modulate(
    x: Float[Tensor, "b n d"], shift: Float[Tensor, "b *n d"] | None, scale: Float[Tensor, "b *n d"]
) -> Float[Tensor, "b n d"]:
    """x (1 + scale) + shift: the same for all tokens of a sample, or for each token its own."""
    x = x * (1 + over_tokens(scale))
    return x if shift is None else x + over_tokens(shift)
