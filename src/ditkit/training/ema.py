"""Averaged weights, several side by side: with fixed decays, and power-function averages."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from ..averaging import decay_name, power_decay, std_name

__all__ = ["Averages"]


class Averages:
    """Float32 copies of the weights, each moved after a step: average = beta average + (1 - beta) weights.

    decays: fixed betas. stds: lengths of power-function averages, whose beta grows with the step. They are known by the
    names of their files: "ema-0.9999", "ema-std-0.05".
    """

    def __init__(self, model: nn.Module, decays: Sequence[float], stds: Sequence[float] = ()):
        self.keys, self.source = zip(*model.named_parameters(), strict=True)
        self.beta: dict[str, Callable[[int], float]] = {decay_name(d): lambda step, d=d: d for d in decays}
        self.beta |= {std_name(s): lambda step, s=s: power_decay(s, step) for s in stds}
        self.copies = {name: [p.detach().clone() for p in self.source] for name in self.beta}

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.copies)

    @torch.no_grad()
    def update(self, step: int) -> None:
        """After an optimiser step, counted from 1."""
        for name, copies in self.copies.items():
            share = 1 - self.beta[name](step)
            torch._foreach_lerp_(copies, list(self.source), share)  # pyright: ignore[reportPrivateImportUsage]

    def tensors(self, name: str) -> dict[str, Tensor]:
        """The averaged weights of a name; they go on changing with `update`."""
        return dict(zip(self.keys, self.copies[name], strict=True))

    @torch.no_grad()
    def restore(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Set an average to stored values."""
        for key, copy in zip(self.keys, self.copies[name], strict=True):
            copy.copy_(tensors[key])
