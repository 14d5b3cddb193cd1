"""What is done with the sum of all guides."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...config import DitkitError, register
from ..space import check_space

__all__ = ["Rescale"]


@register("finish", "rescale")
@dataclass(frozen=True)
class Rescale:
    """The guided opinion with the standard deviation of the strong one (Lin et al. 2023, 2305.08891, section 3.4).

    phi is the share of the rescaled in the result; the deviation is of each sample.
    """

    phi: float = 0.7
    space: str | None = None
    """Where the deviation is measured. None = the space of the network's output, as published."""

    def __post_init__(self) -> None:
        if not 0 <= self.phi <= 1:
            raise DitkitError(f"finish.phi is a share in [0, 1], not {self.phi}")
        if self.space is not None:
            check_space(self.space)

    def __call__(self, strong: Tensor, guided: Tensor) -> Tensor:
        dims = tuple(range(1, guided.ndim))
        wanted, found = strong.std(dims, keepdim=True), guided.std(dims, keepdim=True)
        factor = torch.where(found > 0, wanted / found, 1.0)  # a network before its first step says the same everywhere
        return guided * (self.phi * factor + 1 - self.phi)
