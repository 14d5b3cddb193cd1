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
from .embeddings import LabelEmbedder, TimestepEmbedder, TokenEmbedder, positions_2d, sincos_2d, sinusoid
from .init import init_adaln_zero
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
    "Blocks",
    "BottleneckPatchEmbed",
    "CrossAttention",
    "CrossBlock",
    "Edit",
    "FinalLayer",
    "GatedCrossBlock",
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
    "Rule",
    "SandwichBlock",
    "SlidingTiles",
    "SwiGLU",
    "TimestepEmbedder",
    "TokenEmbedder",
    "adaln",
    "arrange",
    "attend",
    "axial_angles",
    "check_heads_2d",
    "check_heads_even",
    "grid_angles",
    "init_adaln_zero",
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
