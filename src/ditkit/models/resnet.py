"""A plain residual network of convolutions: the baseline that transformers and U-Nets are compared with.

A 3 x 3 convolution to `channels`; `depth` residual blocks at one resolution (norm, SiLU, convolution, twice; He et al.
2016, arXiv 1603.05027), none of them with attention; a norm and a convolution to the output. Time and class are added
to one vector, which scales and shifts the second norm of each block (FiLM, Perez et al. 2018). With `patch_size` above
1 the pixels of a patch become channels first, and are put back last (Shi et al. 2016). The design is ours, and so is
what its time means: any clock will do. A pixel sees 2 depth + 2 pixels around it through convolutions, and all others
through the means of the norms alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ..conditioning import Conditioning
from ..config import register
from ..layers import (
    Edit,
    GroupNorm,
    LabelEmbedder,
    ResBlock,
    TimestepEmbedder,
    init_convolutional,
    patch_grid,
    visit,
)
from ..rng import Rng
from .registry import ImageConfig, Model, Plan, at_least_one, instantiate, register_models
from .sizing import Sizing

__all__ = ["ResNet", "ResNetConfig"]


@register("model", "resnet")
@dataclass(frozen=True)
class ResNetConfig(ImageConfig):
    """Everything about a residual network; the defaults are resnet_b."""

    input_size: int | tuple[int, int] = 32
    """Side, or (rows, columns), of the image. Others are accepted, too: no weight depends on it."""
    in_channels: int = 3
    patch_size: int = 1
    """Side of the squares of pixels that become channels before the first convolution."""
    channels: int = 256
    depth: int = 16
    groups: int = 32
    """Of the norms."""
    num_classes: int = 10
    """0 = unconditional. The null label has the index num_classes."""

    sizing = Sizing(width="channels", divisors=("groups",))

    def __post_init__(self) -> None:
        at_least_one(self, "in_channels", "patch_size", "channels", "depth", "groups")

    def build(self, seed: int = 0) -> ResNet:
        """The network with initial weights."""
        return instantiate(ResNet, self, seed)


class ResNet(Model):
    """Residual network of convolutions. Raises ValueError for an x that its patches do not tile."""

    plan = Plan(shard=("blocks",))

    def __init__(self, config: ResNetConfig):
        super().__init__()
        self.config = config
        width, pixels = config.channels, config.in_channels * config.patch_size**2
        self.stem = nn.Conv2d(pixels, width, 3, padding=1)
        self.t_embedder = TimestepEmbedder(width)
        self.y_embedder = LabelEmbedder(config.num_classes, width)
        self.blocks = nn.ModuleList(ResBlock(width, width, width, groups=config.groups) for _ in range(config.depth))
        self.out = nn.Sequential(GroupNorm(config.groups, width), nn.SiLU(), nn.Conv2d(width, pixels, 3, padding=1))

    def init_weights(self, rng: Rng) -> None:
        """What a block adds, its scales and shifts, and the output are 0; all else follows torch's own law."""
        films = [b.emb_layers for b in self.blocks if isinstance(b, ResBlock) and b.emb_layers is not None]
        init_convolutional(self, rng.generator, zero=(self.out[-1], *films))

    def prepare(self, cond: Conditioning, shape: Sequence[int], times: Sequence[float] = ()) -> Conditioning:
        """Label vectors."""
        return cond.with_static(label=self.y_embedder(cond.label, shape[0]))

    def forward(
        self, x: Float[Tensor, "b c h w"], t: Float[Tensor, "b"], cond: Conditioning, *, edit: Edit | None = None
    ) -> Float[Tensor, "b c h w"]:
        """t: any time."""
        config = self.config
        patch_grid(x, config.in_channels, config.patch_size)
        if "label" not in cond.static:
            cond = self.prepare(cond, x.shape)
        emb = self.t_embedder(t) + cond.static["label"]
        h = self.stem(F.pixel_unshuffle(x, config.patch_size))
        for i, block in enumerate(self.blocks):
            h = visit(edit, f"blocks.{i}", block, h, emb)
        return F.pixel_shuffle(self.out(h), config.patch_size)


register_models(
    {
        "resnet_tiny": ResNetConfig(channels=64, depth=6),
        "resnet_s": ResNetConfig(channels=128, depth=12),
        "resnet_b": ResNetConfig(),
        "resnet_l": ResNetConfig(channels=384, depth=24),
    }
)
