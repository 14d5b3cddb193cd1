"""What a training copies in its course: the snapshots of a run, looked at one by one."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ..data import Digits
from ..evaluation import (
    Classifier,
    Decisions,
    decide,
    f_mem,
    features_protocol,
    heldout_features,
    kernel_distance,
    mean_loss,
    sampling_protocol,
    train_classifier,
)
from ..pipeline import load
from ..plan import gmacs
from ..recipe import device_of
from ..runs import Run, step_of
from .laws import crossing
from .study import Cell, Finding

__all__ = ["GOOD", "LEVELS", "PER_OCTAVE", "dense", "measure_copies", "seen_live", "times_of"]

PER_OCTAVE = 5
LEVELS = (0.02, 0.10, 0.25)
"""Shares of copies at which tau_mem is read; the first, where copies begin, is meant where none is named."""
GOOD = 0.8
"""Samples are good where so many of them are seen as the class that was asked for, as a share of held-out images."""
CLASSIFIER = {"steps": 800}
"""How long that is trained which sees classes."""
FALL = 0.9
"""Share of the whole fall of KID that is done at the tau_gen of KID."""


def dense(steps: Sequence[int], per_octave: int = PER_OCTAVE) -> list[int]:
    """Of steps, rising, those nearest to a grid of so many in each doubling; the last one among them."""
    chosen = set()
    for k in range(math.ceil(per_octave * math.log2(steps[-1] / steps[0])) + 1):
        wanted = steps[-1] * 2 ** (-k / per_octave)
        chosen.add(min(steps, key=lambda s, w=wanted: abs(s - w)))
    return sorted(chosen)


def measure_copies(folder: Path, cell: Cell, seed: int) -> Finding:
    """Copies, quality and losses at the snapshots of a run, and the times that they say; the last samples."""
    recipe, run = cell.recipe, Run(folder)
    data, device = recipe.data.open(), str(device_of(recipe.train.device))
    train = data.train.batch(torch.arange(len(data.train)))
    heldout = data.heldout.batch(torch.arange(len(data.heldout))).data
    features, reference, source = heldout_features(recipe.data, recipe.evaluate.size, device)
    count, floor = recipe.evaluate.samples, f_mem(heldout, train.data).value
    labels = None if train.label is None else train.label[torch.arange(count) % len(train.label)]
    losses = min(len(data.train), len(data.heldout))
    classifier, ceiling = _classifier(replace(recipe.data, count=0))
    folders = {step_of(path): path for path in run.snapshots()}
    rows, images, pipeline = [], None, None
    for step in dense(sorted(folders)):
        pipeline = load(folders[step], device=device)
        images = pipeline.sample(labels, count, seed=seed)
        copies, distance = f_mem(images, train.data), kernel_distance(features(images), reference)
        rows.append(
            {
                "step": step,
                "train_loss": mean_loss(pipeline, data.train, losses),
                "heldout_loss": mean_loss(pipeline, data.heldout, losses),
                "samples": count,
                "f_mem": copies.value,
                "f_mem_low": copies.low,
                "f_mem_high": copies.high,
                "floor": floor,
                "accuracy": 0.0 if labels is None else classifier.accuracy(images, labels) / ceiling,
                "kid": distance.value,
                "kid_error": distance.error,
            }
        )
    assert pipeline is not None
    model = pipeline.recipe.model
    numbers = {
        "gmacs": gmacs(model, model.shape),
        "parameters": float(sum(p.numel() for p in pipeline.model.parameters() if p.requires_grad)),
        **times_of(rows),
        **seen_live(rows, run.watched()),
    }
    protocol = {
        **sampling_protocol(pipeline, pipeline.settings(), count, seed),
        "checkpoint": f"snapshots/{run.snapshots()[-1].name.split('-')[0]}-*, {pipeline.origin.split('/')[-1]}",
        "labels": "those of training images",
        "reference": f"held-out part of {source}",
        "reference_images": len(reference),
        "features": features_protocol(features),
        "accuracy": "share of samples that a small CNN, trained on all 4,000 training images, sees as the class asked "
        f"for, over that of held-out images, {ceiling:.3f}",
        "copies": f"nearest over second nearest of {len(data.train)} training images below 1/3, in bytes, L2",
        "losses": f"{losses} training and held-out images, one time and noise each, the same for both",
        "evaluations": f"{PER_OCTAVE} in each doubling of the number of steps, {len(rows)} in all",
    }
    series = {name: [float(row[name]) for row in rows] for name in rows[0] if name != "samples"}
    return Finding(numbers, protocol, images, series=series)


@functools.lru_cache(maxsize=1)
def _classifier(config: Digits) -> tuple[Classifier, float]:
    """A classifier of all training images, and its accuracy on held-out ones."""
    data = config.open()
    train, heldout = (split.batch(torch.arange(len(split))) for split in (data.train, data.heldout))
    assert train.label is not None
    assert heldout.label is not None
    classifier = train_classifier(train.data, train.label, len(data.classes), **CLASSIFIER)
    return classifier, classifier.accuracy(heldout.data, heldout.label)


def times_of(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """tau_mem and tau_gen, and what stopping early gives, from measurements at many steps; what is not there is left
    out.

    tau_mem: where f_mem comes to a level, on straight lines over log step. tau_gen: where as many samples as are wanted
    are seen as their class; tau_gen_kid: where so much of the fall of KID, from its highest value on, is done. window:
    the best KID before the first copies, by the monitor's rule for these. lowest: the lowest held-out loss.
    """
    steps, copies, kids = ([float(row[name]) for row in rows] for name in ("step", "f_mem", "kid"))
    found: dict[str, float | None] = {
        f"tau_mem_{round(100 * level)}": crossing(steps, copies, level) for level in LEVELS
    }
    top = kids.index(max(kids))
    falls = [kids[top] - kid for kid in kids[top:]]
    found["tau_gen"] = crossing(steps, [float(row["accuracy"]) for row in rows], GOOD)
    found["tau_gen_kid"] = crossing(steps[top:], falls, FALL * max(falls)) if max(falls) > 0 else None
    decided = decide(rows)
    before = [row for row in rows if decided.copies is None or row["step"] < decided.copies]
    shown = {
        "lowest": min(rows, key=lambda row: row["heldout_loss"]),
        "window": min(before, key=lambda row: row["kid"], default=None),
        "last": rows[-1],
    }
    for name, row in shown.items():
        if row is not None:
            found |= {f"{name}_{what}": float(row[what]) for what in ("step", "kid", "accuracy", "f_mem")}
    return {name: value for name, value in found.items() if value is not None}


def seen_live(rows: Sequence[Mapping[str, Any]], live: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """What the monitor of the training saw: tau_mem as `times_of` reads it, and the step at which copies begin by its
    rule; this densely, too."""
    seen: dict[str, Decisions] = {"dense": decide(rows)} | ({"live": decide(live)} if live else {})
    found = {f"{name}_copies": float(d.copies) for name, d in seen.items() if d.copies is not None}
    drawn = [(float(row["step"]), float(row["f_mem"])) for row in live if row.get("f_mem") is not None]
    for level in LEVELS:
        at = crossing([step for step, _ in drawn], [share for _, share in drawn], level)
        found |= {} if at is None else {f"live_tau_mem_{round(100 * level)}": at}
    return found
