"""What several studies measure alike of a trained network."""

from __future__ import annotations

from pathlib import Path

from ..evaluation import heldout_loss, measure_kid
from ..pipeline import load
from ..plan import gmacs
from .study import Cell, Finding

__all__ = ["measure_network"]


def measure_network(folder: Path, cell: Cell, seed: int) -> Finding:
    """KID, held-out loss, GMACs and trained parameters of a run, with its samples: what networks are compared by."""
    pipeline = load(folder, device=cell.recipe.train.device)
    found = measure_kid(pipeline, seed=seed)
    model = pipeline.recipe.model
    numbers = {
        **{k: v for k, v in found.numbers.items() if v is not None},
        "loss": heldout_loss(pipeline),
        "gmacs": gmacs(model, model.shape),
        "parameters": float(sum(p.numel() for p in pipeline.model.parameters() if p.requires_grad)),
    }
    protocol = {
        **found.protocol,
        "loss": "the training loss of the averaged weights on at most 1,000 held-out samples, one time and noise each",
        "gmacs": "one forward pass of one sample",
    }
    return Finding(numbers, protocol, found.images)
