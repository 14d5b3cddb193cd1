"""The training loss on samples that training does not see."""

from __future__ import annotations

import torch

from ..pipeline import Pipeline
from ..rng import Rng

__all__ = ["heldout_loss"]


@torch.no_grad()
def heldout_loss(pipeline: Pipeline, samples: int = 1000) -> float:
    """The loss of the averaged weights on at most so many held-out samples, one time and noise each.

    Times and noise belong to the samples: networks with one objective and one codec are given the same.
    """
    recipe, split, rng = pipeline.recipe, pipeline.recipe.data.open().heldout, Rng(0)
    total, count = 0.0, min(samples, len(split))
    for ids in torch.arange(count).split(100):
        batch, draws = split.batch(ids), rng.at(0, ids.to(pipeline.device))
        cond = recipe.given(batch.given, pipeline.device)
        x0 = recipe.codec.encode(batch.data.to(pipeline.device), draws)
        total += float(recipe.objective.loss(pipeline.denoiser, x0, cond, draws).total.sum())
    return total / count
