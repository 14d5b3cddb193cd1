"""Initial weights as a pure function of (seed, parameter name)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

from torch import Generator, nn

from .blocks import (
    AdaLNSingleBlock,
    AdaLNSingleFinal,
    AdaLNZeroBlock,
    FinalLayer,
    GatedCrossBlock,
    SandwichBlock,
)
from .convolution import AttentionBlock, ResBlock
from .embeddings import LabelEmbedder, TimestepEmbedder, VectorEmbedder
from .norms import RMSNorm
from .streams import ParallelBlock, Stream

__all__ = ["init_adaln_single", "init_adaln_zero", "init_convolutional"]

_FROM_ZERO = (AdaLNZeroBlock, GatedCrossBlock, SandwichBlock, Stream, ParallelBlock, FinalLayer)
"""Modules whose modulation starts at 0."""


def init_adaln_zero(model: nn.Module, generator: Callable[[str], Generator]) -> None:
    """The initial weights of DiT, which its successors kept.

    Xavier uniform for every Linear and for convolutions seen as Linears, biases 0, norms 1; N(0, .02) for label
    tables and the MLPs of times and vectors; 0 for the modulations of gated blocks and of the output, and for the
    output itself, so that each gated block starts as the identity. The modulations of blocks without gates are Linears
    as all others.
    `generator` gives a private generator for a name.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            rows = module.weight.data.flatten(1)
            if isinstance(module, nn.Conv2d) and module.groups > 1:  # each group is a Linear
                bound = math.sqrt(6 / (rows.shape[1] + rows.shape[0] // module.groups))
                nn.init.uniform_(rows, -bound, bound, generator=generator(name))
            else:
                nn.init.xavier_uniform_(rows, generator=generator(name))
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, RMSNorm | nn.LayerNorm) and module.weight is not None:
            nn.init.ones_(module.weight)
            if isinstance(module, nn.LayerNorm) and module.bias is not None:
                nn.init.zeros_(module.bias)
    for name, module in model.named_modules():
        if isinstance(module, TimestepEmbedder | VectorEmbedder | LabelEmbedder):
            for key, weight in module.named_parameters():
                if key.endswith("weight"):
                    nn.init.normal_(weight, std=0.02, generator=generator(f"{name}.{key}"))
        if isinstance(module, _FROM_ZERO) and module.adaLN_modulation is not None:
            nn.init.zeros_(module.adaLN_modulation[-1].weight)  # type: ignore[arg-type]
        if isinstance(module, FinalLayer):
            nn.init.zeros_(module.linear.weight)


def init_adaln_single(model: nn.Module, generator: Callable[[str], Generator]) -> None:
    """The initial weights of PixArt-alpha, which its successors kept: those of DiT, and

    N(0, 1 / width) for the tables of blocks and of the last layer; 0 for the outputs of cross-attentions; N(0, .02) for
    the shared modulation (`t_block`) and the MLP of the text (`y_embedder`). Blocks do not start as the identity.
    """
    init_adaln_zero(model, generator)
    for name, module in model.named_modules():
        if isinstance(module, AdaLNSingleBlock | AdaLNSingleFinal):
            table = module.scale_shift_table
            nn.init.normal_(table, std=table.shape[1] ** -0.5, generator=generator(f"{name}.scale_shift_table"))
        if isinstance(module, AdaLNSingleBlock):
            nn.init.zeros_(module.cross.proj.weight)  # type: ignore[union-attr, arg-type]
        if isinstance(module, AdaLNSingleFinal):
            nn.init.zeros_(module.linear.weight)
        if isinstance(module, nn.Linear) and name.split(".")[0] in ("t_block", "y_embedder"):
            nn.init.normal_(module.weight, std=0.02, generator=generator(f"{name}.weight"))


def init_convolutional(model: nn.Module, generator: Callable[[str], Generator], zero: Iterable[nn.Module] = ()) -> None:
    """The initial weights of ADM: torch's own law, and 0 for the last layer of each block, which so starts as its skip.

    Weights and biases of convolutions and Linears are uniform within 1 / sqrt(inputs), norms 1 and 0, label tables
    N(0, 1). zero: further layers that start as 0. `generator` gives a private generator for a name.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d):
            bound = module.weight[0].numel() ** -0.5
            for key, weight in module.named_parameters():
                nn.init.uniform_(weight, -bound, bound, generator=generator(f"{name}.{key}"))
        elif isinstance(module, nn.GroupNorm):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, generator=generator(f"{name}.weight"))
    last = [module.out_layers[-1] for module in model.modules() if isinstance(module, ResBlock)]
    last += [module.proj_out for module in model.modules() if isinstance(module, AttentionBlock)]
    for module in (*last, *zero):
        for weight in module.parameters():
            nn.init.zeros_(weight)
