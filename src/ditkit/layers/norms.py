"""Normalisation."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

__all__ = ["RMSNorm", "layer_norm"]


class RMSNorm(nn.Module):
    """Root mean square norm with a learned weight (Zhang & Sennrich 2019), in float32 whatever the input is.

    The result is cast back after the multiplication with the weight, as JiT and LightningDiT do.
    """

    def __init__(self, dim: int, eps: float = 1e-6):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Float[Tensor, "... d"]) -> Float[Tensor, "... d"]:
        y = x.float()
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.eps)
        return (y * self.weight).to(x.dtype)


def layer_norm(dim: int, eps: float = 1e-6, affine: bool = False, bias: bool = True) -> nn.LayerNorm:
    """LayerNorm: without weights where adaLN modulates it (DiT), with them in a plain transformer; `bias` if affine."""
    return nn.LayerNorm(dim, eps=eps, elementwise_affine=affine, bias=bias)
