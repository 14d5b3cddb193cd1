"""Images and videos to tokens and back."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from math import prod
from typing import Literal

from jaxtyping import Float
from torch import Tensor, nn

__all__ = ["BottleneckPatchEmbed", "PatchEmbed", "PatchOrder", "patch_grid", "patchify", "unpatchify"]

PatchOrder = Literal["pc", "cp"]
"""Features of a patch: the channel fastest ("pc"), or the channel slowest ("cp")."""


def patch_grid(x: Tensor, channels: int, patch: int | Sequence[int]) -> tuple[int, ...]:
    """Patches of x [b c *space] along each axis. Raises ValueError that says which option to change.

    patch: its side, for images, or its size along each axis.
    """
    patch = (patch, patch) if isinstance(patch, int) else tuple(patch)
    axes = "h w" if len(patch) == 2 else "t h w" if len(patch) == 3 else "*space"
    if x.ndim != 2 + len(patch) or x.shape[1] != channels:
        raise ValueError(
            f"the model takes [b {channels} {axes}] (in_channels={channels}), x is {list(x.shape)}: change in_channels"
        )
    space = x.shape[2:]
    if any(n % p for n, p in zip(space, patch, strict=True)):
        size, of = " x ".join(map(str, space)), " x ".join(map(str, patch))
        raise ValueError(f"x is {size}, which patches of {of} do not tile: change patch_size or the size of x")
    return tuple(n // p for n, p in zip(space, patch, strict=True))


class PatchEmbed(nn.Module):
    """Non-overlapping patches to tokens with one convolution, row by row (ViT)."""

    def __init__(self, channels: int, patch: int, dim: int):
        super().__init__()
        self.proj = nn.Conv2d(channels, dim, patch, stride=patch)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b n d"]:
        return self.proj(x).flatten(2).transpose(1, 2)


class BottleneckPatchEmbed(nn.Module):
    """Patches to tokens through a low-rank bottleneck without a nonlinearity (JiT section 4.2, figure 4)."""

    def __init__(self, channels: int, patch: int, bottleneck: int, dim: int):
        super().__init__()
        self.proj1 = nn.Conv2d(channels, bottleneck, patch, stride=patch, bias=False)
        self.proj2 = nn.Conv2d(bottleneck, dim, 1)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b n d"]:
        return self.proj2(self.proj1(x)).flatten(2).transpose(1, 2)


def patchify(
    x: Float[Tensor, "b c *space"], patch: int | Sequence[int], order: PatchOrder = "pc"
) -> Float[Tensor, "b n f"]:
    """Patches as tokens, the last axis fastest, without weights; the inverse of `unpatchify`."""
    axes = x.ndim - 2
    patch = (patch,) * axes if isinstance(patch, int) else tuple(patch)
    split = chain.from_iterable((n // p, p) for n, p in zip(x.shape[2:], patch, strict=True))
    x = x.reshape(*x.shape[:2], *split)
    grid, inside = range(2, 2 + 2 * axes, 2), range(3, 3 + 2 * axes, 2)
    features = (*inside, 1) if order == "pc" else (1, *inside)
    return x.permute(0, *grid, *features).flatten(1, axes).flatten(2)


def unpatchify(
    x: Float[Tensor, "b n f"], grid: Sequence[int], patch: int | Sequence[int], order: PatchOrder = "pc"
) -> Float[Tensor, "b c *space"]:
    """Tokens to an image, or to anything of as many axes as the grid has."""
    axes, b = len(grid), x.shape[0]
    patch = (patch,) * axes if isinstance(patch, int) else tuple(patch)
    channels = x.shape[2] // prod(patch)
    first = 1 + axes  # the first axis of the features
    if order == "pc":
        x, channel, inside = x.view(b, *grid, *patch, channels), first + axes, range(first, first + axes)
    else:
        x, channel, inside = x.view(b, *grid, channels, *patch), first, range(first + 1, first + 1 + axes)
    x = x.permute(0, channel, *chain.from_iterable(zip(range(1, 1 + axes), inside, strict=True)))
    return x.reshape(b, channels, *(n * p for n, p in zip(grid, patch, strict=True)))
