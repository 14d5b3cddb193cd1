"""The training loss on samples, such as those that training does not see."""

from __future__ import annotations

from typing import Any

import torch

from ..data import Prepared, Split, evenly
from ..pipeline import Pipeline
from ..rng import Rng

__all__ = ["heldout_loss", "mean_loss", "original"]


def heldout_loss(pipeline: Pipeline, samples: int = 1000) -> float:
    """The loss of the averaged weights on at most so many held-out samples, one time and noise each."""
    return mean_loss(pipeline, pipeline.recipe.data.open().heldout, samples)


@torch.no_grad()
def mean_loss(pipeline: Pipeline, split: Split, samples: int = 1000) -> float:
    """The loss of the averaged weights on at most so many samples, spread evenly over a split, one time and noise each.

    Times and noise belong to the place among them: networks with one objective and one codec are given the same, and so
    are two splits of which as many samples are taken.
    """
    recipe, rng = pipeline.recipe, Rng(0)
    total, count = 0.0, min(samples, len(split))
    for ids, places in zip(evenly(split, count).split(100), torch.arange(count).split(100), strict=True):
        batch, draws = split.batch(ids), rng.at(0, places.to(pipeline.device))
        cond = recipe.given(batch.given, pipeline.device)
        x0 = recipe.codec.encode(batch.data.to(pipeline.device), draws)
        total += float(recipe.objective.loss(pipeline.denoiser, x0, cond, draws).total.sum())
    return total / count


def original(data: Any) -> Any:
    """The data that samples are compared with: of prepared latents, the images that they were made of."""
    return data.original() if isinstance(data, Prepared) else data
