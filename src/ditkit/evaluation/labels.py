"""Which class each sample is of: the rules by which published samples were drawn, which move FID by themselves."""

from __future__ import annotations

import torch
from jaxtyping import Int
from torch import Tensor

from ..config import DitkitError, near
from ..rng import Rng

__all__ = ["RULES", "labels_by"]

RULES = {
    "in_turn": "classes in turn",
    "balanced": "exactly as many of each class, class after class",
    "random": "uniform random, from each image's own seed",
}


def labels_by(rule: str, classes: int, count: int, seed: int = 0, first: int = 0) -> Int[Tensor, "n"] | None:
    """Classes of the samples from `first` on, of `count` that are drawn in all; None where there are no classes.

    in_turn: sample i is of class i mod K. balanced: the first N / K are of class 0, and so on, as JiT draws; so N must
    be a multiple of K. random: from (seed, i) alone, as EDM2's; DiT draws as many from its batches' generator. Raises
    DitkitError for another rule, and for a count that cannot be balanced.
    """
    if rule not in RULES:
        raise DitkitError(f"there is no label rule {rule!r}: {near(rule, RULES)}")
    if count < 1:
        raise DitkitError(f"at least 1 sample is drawn, not {count}")
    if not classes:
        return None
    ids = torch.arange(first, count)
    if rule == "in_turn":
        return ids % classes
    if rule == "random":
        return (Rng(seed).at(0, ids)("label", "uniform") * classes).long()
    if count % classes:
        raise DitkitError(f"{count} samples cannot be balanced over {classes} classes: draw a multiple of {classes}")
    return ids // (count // classes)
