"""The small set of layers that every family is built from; no model is named here."""

from .attention import Attention, CrossAttention, attend
from .blocks import AdaLNBlock, AdaLNZeroBlock, CrossBlock, Edit, FinalLayer, PlainBlock, visit
from .embeddings import LabelEmbedder, TimestepEmbedder, positions_2d, sincos_2d, sinusoid
from .init import init_adaln_zero
from .mlp import Mlp, SwiGLU
from .modulation import adaln, modulate
from .norms import RMSNorm, layer_norm
from .patches import BottleneckPatchEmbed, PatchEmbed, patch_grid, unpatchify
from .rope import axial_angles, check_heads_2d, grid_angles, rope_table, rotate

__all__ = [
    "AdaLNBlock",
    "AdaLNZeroBlock",
    "Attention",
    "BottleneckPatchEmbed",
    "CrossAttention",
    "CrossBlock",
    "Edit",
    "FinalLayer",
    "LabelEmbedder",
    "Mlp",
    "PatchEmbed",
    "PlainBlock",
    "RMSNorm",
    "SwiGLU",
    "TimestepEmbedder",
    "adaln",
    "attend",
    "axial_angles",
    "check_heads_2d",
    "grid_angles",
    "init_adaln_zero",
    "layer_norm",
    "modulate",
    "patch_grid",
    "positions_2d",
    "rope_table",
    "rotate",
    "sincos_2d",
    "sinusoid",
    "unpatchify",
    "visit",
]
