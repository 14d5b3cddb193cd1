"""How well samples follow their control images."""

from __future__ import annotations

import torch.nn.functional as F
from jaxtyping import Bool, UInt8
from torch import Tensor

from .distances import Estimate

__all__ = ["edge_agreement"]


def edge_agreement(edges: UInt8[Tensor, "n c h w"], control: UInt8[Tensor, "n c h w"]) -> Estimate:
    """Mean F1 of the edges of samples against those of their control images, with its standard error over samples.

    Precision is the share of the sample's edge pixels that have one of the control's at most one pixel away (of the
    eight neighbours), recall the reverse. Without any edge pixel in one of the two it is 0.
    """
    own, wanted = edges[:, 0] > 0, control[:, 0] > 0
    precision, recall = _near(own, wanted), _near(wanted, own)
    f1 = (2 * precision * recall / (precision + recall).clamp(min=1e-9)).double()
    return Estimate(float(f1.mean()), float(f1.std()) / len(f1) ** 0.5)


def _near(some: Bool[Tensor, "n h w"], others: Bool[Tensor, "n h w"]) -> Tensor:
    """The share of `some` that have one of the others near."""
    wide = F.max_pool2d(others.float()[:, None], 3, stride=1, padding=1)[:, 0]
    count = some.flatten(1).sum(1)
    return (some * wide).flatten(1).sum(1) / count.clamp(min=1)
