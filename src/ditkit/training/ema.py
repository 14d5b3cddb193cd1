"""Averaged weights: several exponential moving averages side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

__all__ = ["Averages"]


class Averages:
    """One float32 copy of the trained weights for each decay: average = decay average + (1 - decay) weights."""

    def __init__(self, model: nn.Module, decays: Sequence[float]):
        self.decays = tuple(decays)
        self.names, self.source = zip(*model.named_parameters(), strict=True)
        self.copies = {decay: [p.detach().clone() for p in self.source] for decay in decays}

    @torch.no_grad()
    def update(self) -> None:
        """After an optimiser step."""
        for decay, copies in self.copies.items():
            torch._foreach_lerp_(copies, list(self.source), 1 - decay)  # pyright: ignore[reportPrivateImportUsage]

    def tensors(self, decay: float) -> dict[str, Tensor]:
        """The averaged weights by name; they go on changing with `update`."""
        return dict(zip(self.names, self.copies[decay], strict=True))

    @torch.no_grad()
    def restore(self, decay: float, tensors: Mapping[str, Tensor]) -> None:
        """Set the average to stored values."""
        for name, copy in zip(self.names, self.copies[decay], strict=True):
            copy.copy_(tensors[name])
