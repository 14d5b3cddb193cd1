"""Layers that compute in float32 inside a network of lower precision."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, Self

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

__all__ = ["LayerNorm32", "Linear32", "without_autocast"]


def _at_least_float32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def without_autocast(x: Tensor) -> Any:
    """A context in which the device of x does not lower precisions by itself."""
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext()


class Linear32(nn.Linear):
    """A Linear that computes in float32 and gives float32, also under autocast; its weights stay float32 when the model
    around it is cast to a lower precision."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        def keep(x: Tensor) -> Tensor:
            moved = fn(x)
            return moved if moved.dtype == _at_least_float32(moved.dtype) else x.to(moved.device)

        return super()._apply(keep, recurse)

    def forward(self, input: Float[Tensor, "... i"]) -> Float[Tensor, "... o"]:
        dtype = _at_least_float32(self.weight.dtype)
        with without_autocast(input):
            bias = None if self.bias is None else self.bias.to(dtype)
            return F.linear(input.to(dtype), self.weight.to(dtype), bias)


class LayerNorm32(nn.LayerNorm):
    """A LayerNorm without weights that gives float32, for a modulation that is to see more than the model's dtype."""

    def __init__(self, dim: int, eps: float = 1e-6):
        super().__init__(dim, eps=eps, elementwise_affine=False)

    def forward(self, input: Float[Tensor, "... d"]) -> Float[Tensor, "... d"]:
        return super().forward(input.to(_at_least_float32(input.dtype)))
