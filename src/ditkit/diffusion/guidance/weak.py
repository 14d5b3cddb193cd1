"""Guides away from a weaker model: another network, or the same one with some of its blocks perturbed."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from ...config import DitkitError, near, register, registered_as
from ..denoiser import Denoiser
from ..discrete import TokenDenoiser
from .guided import Guide, Opinion

__all__ = ["Autoguidance", "PerturbedAttention", "SkipLayer"]


@register("guide", "autoguidance")
@dataclass(frozen=True)
class Autoguidance(Guide):
    """Away from a smaller or less trained network on the same conditioning (Karras et al. 2024, 2406.02507).

    weak + scale (strong - weak); the weak network has a batch of its own, and may predict in another space.
    """

    weaker: Any = ""
    """The weak denoiser. In a recipe: a run folder or a checkpoint."""

    @property
    def guides_tokens(self) -> bool:
        return True

    def check(self, denoiser: Denoiser, visited: Sequence[float]) -> None:
        if not isinstance(self.weaker, Denoiser | TokenDenoiser):
            raise DitkitError(f"the guide autoguidance needs a weaker denoiser, not {self.weaker!r}")
        if self.weaker.path != denoiser.path:
            raise DitkitError(f"the weaker model walks another path: {self.weaker.path} instead of {denoiser.path}")
        self.weaker.check(visited, (denoiser.prediction,))

    def weak(self, strong: Opinion) -> Opinion:
        return replace(strong, denoiser=self.weaker)


@register("guide", "perturbed_attention")
@dataclass(frozen=True)
class PerturbedAttention(Guide):
    """Away from itself with the identity as attention map in some blocks (Ahn et al. 2024, 2403.17377).

    The paper's s is scale - 1. Needs no null: it guides unconditional models, too.
    """

    blocks: tuple[str, ...] = ()
    """Names of the blocks, such as blocks.6; the middle ones in the paper."""

    @property
    def guides_tokens(self) -> bool:
        return True

    def check(self, denoiser: Denoiser, visited: Sequence[float]) -> None:
        _check_blocks(self, denoiser, self.blocks, attention=True)

    def weak(self, strong: Opinion) -> Opinion:
        return replace(strong, identity=self.blocks)


@register("guide", "skip_layer")
@dataclass(frozen=True)
class SkipLayer(Guide):
    """Away from itself with some blocks left out (STG, Hyung et al. 2024, 2411.18664; Stable Diffusion 3.5's SLG).

    Their scales are scale - 1. SD3.5: blocks 7, 8, 9, scale 3.8, fractions (0.01, 0.2).
    """

    blocks: tuple[str, ...] = ()
    """Names of the blocks, such as blocks.7."""

    @property
    def guides_tokens(self) -> bool:
        return True

    def check(self, denoiser: Denoiser, visited: Sequence[float]) -> None:
        _check_blocks(self, denoiser, self.blocks, attention=False)

    def weak(self, strong: Opinion) -> Opinion:
        return replace(strong, skipped=self.blocks)


def _check_blocks(guide: Guide, denoiser: Denoiser, blocks: Sequence[str], attention: bool) -> None:
    """Raises DitkitError, with the near names, for blocks that the network does not have.

    attention: they must be able to run with the identity in place of their attention map.
    """
    name, model = registered_as(guide)[1], denoiser.model
    if not blocks:
        raise DitkitError(f"the guide {name} perturbs blocks: name them, as in blocks=blocks.2,blocks.3")
    if not isinstance(model, nn.Module):
        return
    known = {
        f"{parent}.{child}".removeprefix("."): block
        for parent, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        for child, block in module.named_children()
    }
    for block in blocks:
        if block not in known:
            raise DitkitError(f"the guide {name}: {type(model).__name__} has no block {block!r}: {near(block, known)}")
        if attention and "identity" not in inspect.signature(known[block].forward).parameters:
            raise DitkitError(f"the guide {name}: the attention of {block!r} cannot be the identity: use skip_layer")
        if not attention and not getattr(known[block], "keeps_shape", True):
            raise DitkitError(f"the guide {name}: {block!r} changes the shape of x and cannot be left out")
