"""The small set of layers that every family is built from; no model is named here."""

from .attention import Attention, CrossAttention, QKNorm, attend
from .blocks import (
    AdaLNBlock,
    AdaLNZeroBlock,
    CrossBlock,
    Edit,
    FinalLayer,
    GatedCrossBlock,
    PlainBlock,
    SandwichBlock,
    visit,
)
from .convolution import AttentionBlock, Downsample, GroupNorm, ResBlock, Upsample
from .embeddings import LabelEmbedder, TimestepEmbedder, TokenEmbedder, check_label, positions_2d, sincos_2d, sinusoid
from .init import init_adaln_zero, init_convolutional
from .mlp import Activation, Mlp, SwiGLU
from .modulation import adaln, modulate, over_tokens
from .norms import RMSNorm, layer_norm
from .patches import BottleneckPatchEmbed, PatchEmbed, PatchOrder, patch_grid, patchify, unpatchify
from .patterns import Arrangement, Blocks, Mask, Nabla, Pattern, Rule, SlidingTiles, arrange
from .rope import Pairs, axial_angles, check_heads_2d, check_heads_even, grid_angles, rope_table, rotate

__all__ = [
    "Activation",
    "AdaLNBlock",
    "AdaLNZeroBlock",
    "Arrangement",
    "Attention",
    "AttentionBlock",
    "Blocks",
    "BottleneckPatchEmbed",
    "CrossAttention",
    "CrossBlock",
    "Downsample",
    "Edit",
    "FinalLayer",
    "GatedCrossBlock",
    "GroupNorm",
    "LabelEmbedder",
    "Mask",
    "Mlp",
    "Nabla",
    "Pairs",
    "PatchEmbed",
    "PatchOrder",
    "Pattern",
    "PlainBlock",
    "QKNorm",
    "RMSNorm",
    "ResBlock",
    "Rule",
    "SandwichBlock",
    "SlidingTiles",
    "SwiGLU",
    "TimestepEmbedder",
    "TokenEmbedder",
    "Upsample",
    "adaln",
    "arrange",
    "attend",
    "axial_angles",
    "check_heads_2d",
    "check_heads_even",
    "check_label",
    "grid_angles",
    "init_adaln_zero",
    "init_convolutional",
    "layer_norm",
    "modulate",
    "over_tokens",
    "patch_grid",
    "patchify",
    "positions_2d",
    "rope_table",
    "rotate",
    "sincos_2d",
    "sinusoid",
    "unpatchify",
    "visit",
]
