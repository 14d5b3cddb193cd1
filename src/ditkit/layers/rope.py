"""Rotary position embedding (Su et al. 2021) over any number of axes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

__all__ = ["Pairs", "axial_angles", "check_heads_2d", "check_heads_even", "grid_angles", "rope_table", "rotate"]

Pairs = Literal["neighbours", "halves"]
"""Which channels of a head turn together: 2i and 2i + 1, or i and i + d/2."""


def axial_angles(
    positions: Sequence[Float[Tensor, "*b n"]], dims: Sequence[int], theta: float = 10000.0
) -> Float[Tensor, "*b n half"]:
    """Rotation angles in float64: for each axis its positions times theta^(-2i/dim), the axes side by side."""
    angles = []
    for position, dim in zip(positions, dims, strict=True):
        frequencies = theta ** (-torch.arange(0, dim, 2, dtype=torch.float64, device=position.device) / dim)
        angles.append(position.double()[..., None] * frequencies)
    return torch.cat(angles, dim=-1)


def check_heads_even(dim: int, heads: int) -> None:
    """Raises ValueError for heads that cannot be turned along one axis; what does not divide is another error."""
    if dim % heads == 0 and dim // heads % 2:
        raise ValueError(
            f"hidden_size {dim} in num_heads {heads} gives heads of {dim // heads} channels, "
            "which the rotation needs even"
        )


def check_heads_2d(dim: int, heads: int) -> None:
    """Raises ValueError for heads that cannot be turned by rows and columns; what does not divide is another error."""
    if dim % heads == 0 and dim // heads % 4:
        raise ValueError(
            f"hidden_size {dim} in num_heads {heads} gives heads of {dim // heads} channels, "
            "which the rotation by rows and columns needs divisible by 4"
        )


def grid_angles(grid: tuple[int, int], head_dim: int, device: torch.device | None = None) -> Float[Tensor, "n half"]:
    """Angles of a grid of patches, row by row: the first half turns with the row, the second with the column."""
    row, column = torch.meshgrid(*(torch.arange(n, device=device) for n in grid), indexing="ij")
    return axial_angles((row.flatten(), column.flatten()), (head_dim // 2, head_dim // 2))


def rope_table(angles: Float[Tensor, "... n half"], pairs: Pairs = "neighbours") -> Float[Tensor, "2 ... n d"]:
    """cos and sin of the angles in float32, each repeated for the two channels of its pair."""
    table = torch.stack((angles.cos(), angles.sin()))
    return (table.repeat_interleave(2, dim=-1) if pairs == "neighbours" else torch.cat((table, table), dim=-1)).float()


def place_rope(place: Shaped[Tensor, "b n a"], dims: Sequence[int], theta: float = 10000.0) -> Float[Tensor, "b 2 n d"]:
    """Rotations of tokens that stand at places of their own in each sample; batch-first, as they are prepared."""
    return rope_table(axial_angles(place.unbind(-1), dims, theta)).transpose(0, 1)


def over_heads(rope: Float[Tensor, "b 2 n d"]) -> Float[Tensor, "2 b 1 n d"]:
    """Rotations of each sample in the form that attention takes."""
    return rope.transpose(0, 1)[:, :, None]


def rotate(
    x: Float[Tensor, "b h n d"], table: Float[Tensor, "2 ... n d"], pairs: Pairs = "neighbours"
) -> Float[Tensor, "b h n d"]:
    """Turn pairs of channels as complex numbers: (x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin).

    table: [2 n d], or [2 b 1 n d] where each sample has its own positions.
    """
    if pairs == "neighbours":
        turned = torch.stack((-x[..., 1::2], x[..., 0::2]), dim=-1).flatten(-2)
    else:
        first, second = x.chunk(2, dim=-1)
        turned = torch.cat((-second, first), dim=-1)
    return (x * table[0] + turned * table[1]).to(x.dtype)
