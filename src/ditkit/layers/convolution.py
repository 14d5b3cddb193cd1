"""Residual blocks of convolutions, their changes of resolution, and attention between the pixels of a feature map.

The parts of ADM (Dhariwal & Nichol 2021, arXiv 2105.05233, section 3), with the parameter names of its release; a plain
residual network is built from the same block.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from .attention import attend

__all__ = ["AttentionBlock", "Downsample", "GroupNorm", "ResBlock", "Upsample"]


class GroupNorm(nn.GroupNorm):
    """Group normalisation (Wu & He 2018) with learned weights, in float32 whatever the input is; eps 1e-5."""

    def __init__(self, groups: int, channels: int):
        if channels % groups:
            raise ValueError(f"{channels} channels are not divisible by the {groups} groups of their norm")
        super().__init__(groups, channels)

    def forward(self, input: Float[Tensor, "b c *space"]) -> Float[Tensor, "b c *space"]:
        weight, bias = self.weight.float(), self.bias.float()
        return F.group_norm(input.float(), self.num_groups, weight, bias, self.eps).to(input.dtype)


class Upsample(nn.Module):
    """Twice the rows and columns by repeating pixels, then a 3 x 3 convolution if `conv`."""

    def __init__(self, channels: int, conv: bool):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1) if conv else nn.Identity()

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c 2h 2w"]:
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))


class Downsample(nn.Module):
    """Half the rows and columns: a 3 x 3 convolution of stride 2 if `conv`, otherwise the mean of 2 x 2 pixels."""

    def __init__(self, channels: int, conv: bool):
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1) if conv else nn.AvgPool2d(2)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h/2 w/2"]:
        return self.op(x)


class ResBlock(nn.Module):
    """x + conv(SiLU(norm(conv(SiLU(norm(x)))))), pre-activated; a vector `emb` per sample enters at the second norm.

    emb: numbers of that vector; with 0 the block is given none.

    modulated: the second norm becomes norm(h) (1 + scale) + shift, scale and shift being Linears of SiLU(emb) (FiLM,
    Perez et al. 2018; ADM's "adaptive group normalization", section 3.1); otherwise one Linear is added before the
    norm (DDPM). resample: "up" or "down", of h before its first convolution and of x, without weights of its own
    (BigGAN; ADM section 3). Where the widths differ, x goes through a 1 x 1 convolution.
    """

    def __init__(
        self,
        channels: int,
        out_channels: int,
        emb: int = 0,
        *,
        dropout: float = 0.0,
        modulated: bool = True,
        resample: str | None = None,
        groups: int = 32,
    ):
        super().__init__()
        self.modulated = modulated
        self.keeps_shape = channels == out_channels and resample is None
        change = {"up": Upsample, "down": Downsample}
        self.resample = nn.Identity() if resample is None else change[resample](channels, conv=False)
        self.in_layers = nn.Sequential(
            GroupNorm(groups, channels), nn.SiLU(), nn.Conv2d(channels, out_channels, 3, padding=1)
        )
        given = out_channels * (2 if modulated else 1)
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(emb, given)) if emb else None
        self.out_layers = nn.Sequential(
            GroupNorm(groups, out_channels),
            nn.SiLU(),
            nn.Dropout(dropout),
            nn.Conv2d(out_channels, out_channels, 3, padding=1),
        )
        same = channels == out_channels
        self.skip_connection = nn.Identity() if same else nn.Conv2d(channels, out_channels, 1)

    def forward(self, x: Float[Tensor, "b c h w"], emb: Float[Tensor, "b e"] | None = None) -> Float[Tensor, "b o H W"]:
        norm, act, conv = self.in_layers
        h = conv(self.resample(act(norm(x))))
        given = None if self.emb_layers is None else self.emb_layers(emb)[:, :, None, None]
        norm, *rest = self.out_layers
        if given is None:
            h = norm(h)
        elif self.modulated:
            scale, shift = given.chunk(2, dim=1)
            h = norm(h) * (1 + scale) + shift
        else:
            h = norm(h + given)
        for layer in rest:
            h = layer(h)
        return self.skip_connection(self.resample(x)) + h


class AttentionBlock(nn.Module):
    """x + proj(attention(norm(x))) between all pixels, without positions.

    split_first: rows of `qkv` are all of q, then k, then v, and each is divided into heads; otherwise they are the
    heads, and each is divided into q, k, v (ADM's older order, which most of its checkpoints have).
    """

    def __init__(self, channels: int, heads: int, *, split_first: bool = False, groups: int = 32):
        super().__init__()
        if heads < 1 or channels % heads:
            raise ValueError(f"{channels} channels are not divisible by {heads} heads of attention")
        self.heads, self.split_first = heads, split_first
        self.norm = GroupNorm(groups, channels)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.proj_out = nn.Conv1d(channels, channels, 1)

    def forward(
        self, x: Float[Tensor, "b c h w"], *, identity: Bool[Tensor, "b"] | None = None
    ) -> Float[Tensor, "b c h w"]:
        """identity: True in the rows of the batch whose attention map is the identity: each pixel sees itself alone."""
        qkv = self.qkv(self.norm(x).flatten(2))
        if self.split_first:
            q, k, v = qkv.unflatten(1, (3, self.heads, -1)).transpose(-1, -2).unbind(1)
        else:
            q, k, v = qkv.unflatten(1, (self.heads, 3, -1)).transpose(-1, -2).unbind(2)
        out = attend(q, k, v)
        if identity is not None:
            out = torch.where(identity[:, None, None, None], v, out)
        out = self.proj_out(out.transpose(-1, -2).flatten(1, 2))
        return x + out.view_as(x)
