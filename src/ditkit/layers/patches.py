"""Images to tokens and back."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn

__all__ = ["BottleneckPatchEmbed", "PatchEmbed", "patch_grid", "unpatchify"]


def patch_grid(x: Tensor, channels: int, patch: int) -> tuple[int, int]:
    """Rows and columns of patches of x [b c h w]. Raises ValueError that says which option to change."""
    if x.ndim != 4 or x.shape[1] != channels:
        raise ValueError(
            f"the model takes [b {channels} h w] (in_channels={channels}), x is {list(x.shape)}: change in_channels"
        )
    h, w = x.shape[2:]
    if h % patch or w % patch:
        raise ValueError(
            f"x is {h} x {w}, which patches of {patch} x {patch} do not tile: change patch_size or the size of x"
        )
    return h // patch, w // patch


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


def unpatchify(x: Float[Tensor, "b n f"], grid: tuple[int, int], patch: int) -> Float[Tensor, "b c h w"]:
    """Tokens of patch * patch * channels features, the channel fastest, to an image."""
    (rows, columns), b = grid, x.shape[0]
    x = x.view(b, rows, columns, patch, patch, -1)
    return x.permute(0, 5, 1, 3, 2, 4).reshape(b, -1, rows * patch, columns * patch)
