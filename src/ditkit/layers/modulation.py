"""Adaptive layer norm: a vector per sample becomes shifts, scales and gates (Perez et al. 2018; DiT section 3.2)."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn

__all__ = ["adaln", "modulate"]


def adaln(dim: int, chunks: int, given: int | None = None) -> nn.Sequential:
    """SiLU and a Linear to `chunks` vectors of size `dim`; zero-initialised by the model for adaLN-Zero.

    given: the size of the vector that they come from, if it is not `dim`.
    """
    return nn.Sequential(nn.SiLU(), nn.Linear(given or dim, chunks * dim))


def modulate(
    x: Float[Tensor, "b n d"], shift: Float[Tensor, "b d"], scale: Float[Tensor, "b d"]
) -> Float[Tensor, "b n d"]:
    """x (1 + scale) + shift, the same for all tokens of a sample."""
    return x * (1 + scale[:, None]) + shift[:, None]
