"""ADM's U-Net: "Diffusion Models Beat GANs on Image Synthesis", Dhariwal & Nichol 2021, arXiv 2105.05233.

A stem of one convolution; then levels of `num_res_blocks` residual blocks, each level at half the resolution of the one
before and `channel_mult` times as wide as `model_channels`; two residual blocks with attention between them; then the
levels backwards, one block more in each, every block fed with its input joined with what the block of the same place
in the first half gave. Residual blocks at the `attention_resolutions` are followed by attention between all pixels.
Time and class are added to one vector, which scales and shifts the second norm of each residual block. The authors'
language: x [b 3 h w] in [-1, 1], t is the step index 0..999 (0 is the least noisy), the output holds the noise and,
with `learn_sigma`, as many channels again for the variance. Parameter names are those of the published checkpoints.

The authors' class-conditional models know no null label: they are guided by a classifier. With `null_label` the table
has a row more, as in all other models here, and classifier-free guidance is possible.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from ..conditioning import Conditioning
from ..config import DitkitError, register
from ..layers import (
    AttentionBlock,
    Downsample,
    Edit,
    GroupNorm,
    ResBlock,
    Upsample,
    check_label,
    init_convolutional,
    patch_grid,
    sinusoid,
    visit,
)
from ..rng import Rng
from .registry import Model, Plan, TiledConfig, at_least_one, instantiate, register_models
from .sizing import Sizing

__all__ = ["UNet", "UNetConfig"]


@register("model", "unet")
@dataclass(frozen=True)
class UNetConfig(TiledConfig):
    """Everything about a U-Net; the defaults are ADM's on ImageNet 256 px (table 11) with a null label besides."""

    input_size: int | tuple[int, int] = 256
    """Side, or (rows, columns), of the image. Others are accepted, too: no weight depends on it."""
    in_channels: int = 3
    model_channels: int = 256
    channel_mult: tuple[float, ...] = (1, 1, 2, 2, 4, 4)
    """Width of each level over model_channels; between two levels the resolution is halved."""
    num_res_blocks: int = 2
    attention_resolutions: tuple[int, ...] = (8, 16, 32)
    """Where there is attention, as factors of down-sampling: at 256 px these are 32, 16 and 8 pixels."""
    num_heads: int = 4
    num_head_channels: int = 64
    """Channels of a head; 0 = num_heads heads at each width."""
    num_heads_upsample: int = 0
    """Heads in the second half, where num_head_channels is 0; 0 = num_heads."""
    use_new_attention_order: bool = False
    """Whether q, k and v are divided into heads, or (False, most checkpoints) heads into q, k and v."""
    use_scale_shift_norm: bool = True
    """Time and class scale and shift the second norm of a residual block; otherwise they are added before it."""
    resblock_updown: bool = True
    """Residual blocks change the resolution; otherwise a convolution alone does."""
    conv_resample: bool = True
    """Whether what changes the resolution, if it is no residual block, has a convolution at all."""
    dropout: float = 0.0
    """Before the last convolution of each residual block."""
    norm_groups: int = 32
    num_classes: int = 1000
    """0 = unconditional."""
    null_label: bool = True
    """The table has a null label, with the index num_classes. False as published, without classifier-free guidance."""
    learn_sigma: bool = True
    """Predict the variance too, in as many channels again."""

    sizing = Sizing(
        width="model_channels", heads=(), divisors=("norm_groups", "num_head_channels"), depth="num_res_blocks"
    )

    def __post_init__(self) -> None:
        at_least_one(self, "in_channels", "model_channels", "num_res_blocks", "norm_groups")
        if not self.channel_mult or min(self.channel_mult) <= 0:
            raise DitkitError(f"model.channel_mult is one positive factor for each level, not {self.channel_mult}")
        levels = [2**level for level in range(len(self.channel_mult))]
        if wrong := sorted(set(self.attention_resolutions) - set(levels)):
            raise DitkitError(
                f"model.attention_resolutions are factors of down-sampling, one of {levels} with the "
                f"{len(levels)} levels of channel_mult, not {wrong[0]}"
            )
        if self.model_channels % 2:
            raise DitkitError(f"model.model_channels must be even, for sines and cosines of t: {self.model_channels}")
        if not self.num_head_channels and self.num_heads < 1:
            raise DitkitError("model.num_heads or model.num_head_channels must be at least 1")

    @property
    def tile(self) -> int:
        """By how much the last level is smaller than the image."""
        return 2 ** (len(self.channel_mult) - 1)

    @property
    def tiled_by(self) -> str:
        return (
            f"{self.tile} x {self.tile} pixels, one pixel of the last of {len(self.channel_mult)} levels: "
            "change the levels (--model.channel-mult)"
        )

    @property
    def length(self) -> int:
        """The number of pixels."""
        _, height, width = self.shape
        return height * width

    def width(self, level: int) -> int:
        """Channels of a level, 0 being the first."""
        return int(self.model_channels * self.channel_mult[level])

    def heads(self, channels: int, up: bool) -> int:
        """Heads of the attention of so many channels, in the second half if `up`."""
        if self.num_head_channels:
            if channels % self.num_head_channels:
                raise ValueError(f"{channels} channels are not divisible by num_head_channels {self.num_head_channels}")
            return channels // self.num_head_channels
        return (self.num_heads_upsample or self.num_heads) if up else self.num_heads

    def build(self, seed: int = 0) -> UNet:
        """The network with initial weights."""
        return instantiate(UNet, self, seed)


class Stage(nn.Sequential):
    """What lies between two places where the halves of the network are joined: what the edit visits."""

    def __init__(self, *layers: nn.Module):
        super().__init__(*layers)
        self.keeps_shape = all(getattr(layer, "keeps_shape", isinstance(layer, AttentionBlock)) for layer in layers)

    def forward(self, x: Float[Tensor, "b c h w"], emb: Float[Tensor, "b e"]) -> Float[Tensor, "b o H W"]:  # type: ignore[override]
        return self.run(x, emb, None)

    def run(self, x: Tensor, emb: Tensor, identity: Tensor | None) -> Tensor:
        for layer in self:
            if isinstance(layer, ResBlock):
                x = layer(x, emb)
            else:
                x = layer(x, identity=identity) if isinstance(layer, AttentionBlock) else layer(x)
        return x


class AttentionStage(Stage):
    """A stage with attention, whose map can be the identity."""

    def forward(  # type: ignore[override]
        self, x: Float[Tensor, "b c h w"], emb: Float[Tensor, "b e"], *, identity: Bool[Tensor, "b"] | None = None
    ) -> Float[Tensor, "b o H W"]:
        return self.run(x, emb, identity)


def stage(*layers: nn.Module | None) -> Stage:
    """A stage of the layers that there are."""
    found = [layer for layer in layers if layer is not None]
    attentive = any(isinstance(layer, AttentionBlock) for layer in found)
    return AttentionStage(*found) if attentive else Stage(*found)


def residual(config: UNetConfig, channels: int, level: int, resample: str | None = None) -> ResBlock:
    """From so many channels to those of a level."""
    return ResBlock(
        channels,
        config.width(level),
        4 * config.model_channels,
        dropout=config.dropout,
        modulated=config.use_scale_shift_norm,
        resample=resample,
        groups=config.norm_groups,
    )


def resampling(config: UNetConfig, level: int, way: str) -> nn.Module:
    """What leads "down" or "up" from a level, without a change of width."""
    channels = config.width(level)
    if config.resblock_updown:
        return residual(config, channels, level, way)
    return Downsample(channels, config.conv_resample) if way == "down" else Upsample(channels, config.conv_resample)


def attention(config: UNetConfig, level: int, up: bool = False) -> AttentionBlock:
    """Attention at a level, in the second half if `up`."""
    channels = config.width(level)
    order = config.use_new_attention_order
    return AttentionBlock(channels, config.heads(channels, up), split_first=order, groups=config.norm_groups)


def attended(config: UNetConfig, level: int, up: bool = False) -> AttentionBlock | None:
    """The same where the level has attention."""
    return attention(config, level, up) if 2**level in config.attention_resolutions else None


class UNet(Model):
    """ADM's U-Net. Raises ValueError for an x that the levels do not divide, and for impossible widths."""

    plan = Plan(shard=("input_blocks", "middle_block", "output_blocks"))

    def __init__(self, config: UNetConfig):
        super().__init__()
        self.config = config
        self.emb = 4 * config.model_channels
        first = nn.Linear(config.model_channels, self.emb)
        self.time_embed = nn.Sequential(first, nn.SiLU(), nn.Linear(self.emb, self.emb))
        rows = config.num_classes + config.null_label
        self.label_emb = nn.Embedding(rows, self.emb) if config.num_classes else None
        levels = range(len(config.channel_mult))
        bottom = levels[-1]
        channels = config.width(0)
        stages, skips = [stage(nn.Conv2d(config.in_channels, channels, 3, padding=1))], [channels]
        for level in levels:
            for _ in range(config.num_res_blocks):
                stages.append(stage(residual(config, channels, level), attended(config, level)))
                channels = config.width(level)
                skips.append(channels)
            if level != bottom:
                stages.append(stage(resampling(config, level, "down")))
                skips.append(channels)
        self.input_blocks = nn.ModuleList(stages)
        middle = residual(config, channels, bottom), attention(config, bottom), residual(config, channels, bottom)
        self.middle_block = nn.ModuleList(middle)
        stages = []
        for level in reversed(levels):
            for i in range(config.num_res_blocks + 1):
                last = i == config.num_res_blocks and level > 0
                block = residual(config, channels + skips.pop(), level)
                up = resampling(config, level, "up") if last else None
                stages.append(stage(block, attended(config, level, up=True), up))
                channels = config.width(level)
        self.output_blocks = nn.ModuleList(stages)
        out = config.in_channels * (2 if config.learn_sigma else 1)
        self.out = nn.Sequential(
            GroupNorm(config.norm_groups, channels), nn.SiLU(), nn.Conv2d(channels, out, 3, padding=1)
        )

    def init_weights(self, rng: Rng) -> None:
        """ADM's start: the output, and what each block adds to its skip, is 0."""
        init_convolutional(self, rng.generator, zero=(self.out[-1],))

    def prepare(self, cond: Conditioning, shape: Sequence[int], times: Sequence[float] = ()) -> Conditioning:
        """Label vectors; raises DitkitError for a null label where there is none."""
        check_label(cond.label, self.config.num_classes)
        if cond.label is None or self.label_emb is None:
            return cond.with_static(label=next(self.time_embed.parameters()).new_zeros(1, self.emb))
        try:
            return cond.with_static(label=self.label_emb(cond.label))
        except IndexError:
            last = self.label_emb.num_embeddings - 1
            raise DitkitError(
                f"the model has the labels 0..{last}{'' if self.config.null_label else ' and no null label'}: guide "
                "it without one, or train it with --model.null-label (or with --conditioner.drop 0)"
            ) from None

    def forward(
        self, x: Float[Tensor, "b c h w"], t: Float[Tensor, "b"], cond: Conditioning, *, edit: Edit | None = None
    ) -> Float[Tensor, "b o h w"]:
        """t: the step index 0..999. o = 2c with `learn_sigma`: the noise, then the raw variance."""
        config = self.config
        height, width = patch_grid(x, config.in_channels, 1)
        if height % config.tile or width % config.tile:
            raise ValueError(
                f"x is {height} x {width}, which {len(config.channel_mult)} levels, and so squares of {config.tile} x "
                f"{config.tile}, do not tile: change channel_mult or the size of x"
            )
        if "label" not in cond.static:
            cond = self.prepare(cond, x.shape)
        label = cond.static["label"]
        emb = self.time_embed(sinusoid(t, config.model_channels).to(label.dtype)) + label
        h, skips = x, []
        for i, block in enumerate(self.input_blocks):
            h = visit(edit, f"input_blocks.{i}", block, h, emb)
            skips.append(h)
        for i, block in enumerate(self.middle_block):
            given = (emb,) if isinstance(block, ResBlock) else ()
            h = visit(edit, f"middle_block.{i}", block, h, *given)
        for i, block in enumerate(self.output_blocks):
            h = visit(edit, f"output_blocks.{i}", block, torch.cat((h, skips.pop()), dim=1), emb)
        return self.out(h)


# ADM table 11, and the flags of the authors' README.
_ADM = UNetConfig(null_label=False)
register_models(
    {
        "adm_64": replace(
            _ADM,
            input_size=64,
            model_channels=192,
            channel_mult=(1, 2, 3, 4),
            num_res_blocks=3,
            attention_resolutions=(2, 4, 8),
            use_new_attention_order=True,
            dropout=0.1,
        ),
        "adm_128": replace(
            _ADM, input_size=128, channel_mult=(1, 1, 2, 3, 4), attention_resolutions=(4, 8, 16), num_head_channels=0
        ),
        "adm_256": _ADM,
        "adm_256_uncond": replace(_ADM, num_classes=0),
        "adm_512": replace(
            _ADM,
            input_size=512,
            channel_mult=(0.5, 1, 1, 2, 2, 4, 4),
            attention_resolutions=(16, 32, 64),
        ),
        "unet_tiny": UNetConfig(
            input_size=32,
            model_channels=32,
            channel_mult=(1, 2, 2),
            num_res_blocks=1,
            attention_resolutions=(4,),
            num_head_channels=32,
            norm_groups=8,
            num_classes=10,
            learn_sigma=False,
        ),
    }
)
