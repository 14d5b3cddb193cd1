"""Measure a run: quality against held-out data, agreement with the labels, diversity, and copying.

Every number comes with its protocol. The reference is always held-out data: copies of the training set would improve a
distance to the training set.
"""

from __future__ import annotations

import platform
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Int, UInt8
from torch import Tensor

from ..config import DitkitError, to_json
from ..data import Split
from ..pipeline import Pipeline, load
from ..recipe import Gate
from ..runs import Run, find_checkpoint
from .classifier import train_classifier
from .distances import frechet_distance, kernel_distance
from .efficientnet import Features
from .memorization import f_mem, within_class_distance

__all__ = ["MEANING", "Measurement", "blurred", "evaluate"]

MEANING = {
    "class_accuracy": "share of samples that a classifier, trained on the real data, sees as the class asked for",
    "classifier_accuracy": "the same classifier on held-out real images: what a perfect model could reach",
    "kid": "kernel distance (unbiased MMD^2) of samples to held-out images in EfficientNet-lite0 features; 0 = alike",
    "kid_untrained": "the same for the model before training: what doing nothing gives",
    "kid_blurred": "the same for held-out images blurred by one pixel: what a slight loss of sharpness gives",
    "kid_train": "the same for real training images: what a perfect model gives, 0 up to chance",
    "frechet": "Frechet distance in the same features; biased upwards with few samples, so compare only equal counts",
    "diversity": "mean distance between samples of a class, as a share of that between real images; 0 = all the same",
    "f_mem": "share of samples that copy a training image: nearer to it than a third of the way to the next one",
    "f_mem_floor": "the same for held-out real images: what counts as a copy by chance",
    "seconds": "time for training and evaluation together",
    "seconds_training": "time for training",
    "seconds_evaluation": "time for this evaluation",
}


@dataclass(frozen=True)
class Measurement:
    """Numbers by name, how they were obtained, the bounds that were missed, and the images measured."""

    numbers: dict[str, float | None]
    protocol: dict[str, Any]
    missed: tuple[Gate, ...]
    images: UInt8[Tensor, "n c h w"]
    labels: Int[Tensor, "n"] | None


def blurred(images: UInt8[Tensor, "n c h w"], sigma: float = 1.0) -> UInt8[Tensor, "n c h w"]:
    """Gaussian blur of `sigma` pixels, rounded to bytes; borders are continued."""
    radius = round(4 * sigma)
    offsets = torch.arange(-radius, radius + 1, dtype=torch.float32)
    weights = torch.exp(-(offsets**2) / (2 * sigma**2))
    weights = (weights / weights.sum()).expand(images.shape[1], 1, -1)
    x = F.pad(images.float(), (radius,) * 4, mode="replicate")
    x = F.conv2d(x, weights[:, :, None, :], groups=images.shape[1])
    x = F.conv2d(x, weights[:, :, :, None], groups=images.shape[1])
    return x.round().clamp(0, 255).to(torch.uint8)


def evaluate(
    path: str | Path,
    *,
    samples: int | None = None,
    seed: int = 0,
    device: str = "auto",
    say: Callable[[str], None] = lambda line: None,
    **settings: Any,
) -> Measurement:
    """Measure a run's newest checkpoint, or one checkpoint, with the recipe's settings or others.

    samples: how many to draw, classes in turn. settings: fields of `Sample`. say: gets a line when something begins.
    Raises DitkitError if the data has no held-out images, or the run cannot be loaded.
    """
    begun = time.perf_counter()
    pipeline = load(path, device=device)
    recipe = pipeline.recipe
    say("reading the data")
    data = recipe.data.open()
    if data.classes != pipeline.classes:
        raise DitkitError(f"the data now has the classes {data.classes}, the run was trained on {pipeline.classes}")
    if len(data.heldout) < 10 or len(data.train) < 10:
        raise DitkitError(
            f"{data.name} has {len(data.train)} training and {len(data.heldout)} held-out images; measuring takes at "
            "least 10 of each: raise data.holdout when training, or use more images"
        )
    count = recipe.evaluate.samples if samples is None else samples
    if count < 10:
        raise DitkitError(f"measuring takes at least 10 samples, not {count}")
    real, real_labels = _images(data.heldout, len(data.heldout))
    train, train_labels = _images(data.train, len(data.train))

    say(f"drawing {count} samples")
    chosen = pipeline.settings(**settings)
    labels = pipeline.labels(None, count)
    images = pipeline.sample(labels, count, seed=seed, **settings)
    numbers: dict[str, float | None] = {}
    protocol: dict[str, Any] = {
        "checkpoint": pipeline.origin,
        "reference": f"held-out part of {data.source}",
        "reference_images": len(real),
        "samples": count,
        "labels": "classes in turn" if pipeline.classes else "none",
        "sampling": {k: v for k, v in to_json(chosen).items() if k not in ("type", "batch", "ema")},
        "seed": seed,
        "dtype": "float32",
        "device": str(pipeline.device),
    }

    if len(data.classes) > 1 and real_labels is not None and train_labels is not None and labels is not None:
        say("training a classifier on the real data")
        classifier = train_classifier(train, train_labels, len(data.classes))
        numbers["class_accuracy"] = classifier.accuracy(images, labels)
        numbers["classifier_accuracy"] = classifier.accuracy(real, real_labels)
        protocol["classifier"] = "small CNN trained on the training images, seed 0"

    say("comparing features")
    features = Features(recipe.evaluate.size, pipeline.device)
    reference = features(real)
    sampled = features(images)
    untrained = _untrained(pipeline).sample(labels, count, seed=seed, **settings)
    sets = {
        "kid": sampled,
        "kid_untrained": features(untrained),
        "kid_blurred": features(blurred(real)),
        "kid_train": features(_images(data.train, min(len(train), len(real)))[0]),
    }
    for name, found in sets.items():
        estimate = kernel_distance(found, reference)
        numbers[name], numbers[f"{name}_error"] = estimate.value, estimate.error
    numbers["frechet"] = frechet_distance(sampled, reference)
    protocol["features"] = {"network": features.name, "sha256": features.sha256, "size": features.size}

    say("looking for copies")
    everything = torch.zeros(max(len(images), len(real)), dtype=torch.long)
    spread = within_class_distance(images, everything[: len(images)] if labels is None else labels)
    natural = within_class_distance(real, everything[: len(real)] if real_labels is None else real_labels)
    numbers["diversity"] = spread / natural if natural > 0 else None
    copies, floor = f_mem(images, train), f_mem(real, train)
    numbers |= {"f_mem": copies.value, "f_mem_error": copies.error, "f_mem_floor": floor.value}
    protocol["copies"] = f"nearest over second nearest of {len(train)} training images below 1/3, in bytes, L2"

    rows = Run(find_checkpoint(path).folder.parents[1]).rows()
    numbers["seconds_training"] = rows[-1]["seconds"] if rows else 0.0
    numbers["seconds_evaluation"] = time.perf_counter() - begun
    numbers["seconds"] = numbers["seconds_training"] + numbers["seconds_evaluation"]
    protocol["versions"] = {"torch": torch.__version__, "python": platform.python_version(), "commit": _commit()}
    protocol["machine"] = f"{platform.machine()}, {torch.get_num_threads()} threads"
    for gate in recipe.evaluate.gates:
        if numbers.get(gate.metric) is None:
            raise DitkitError(f"the recipe bounds {gate.metric}, which this data does not give")
    missed = tuple(gate for gate in recipe.evaluate.gates if not gate.holds(numbers))
    return Measurement(numbers, protocol, missed, images, labels)


def _images(split: Split, count: int) -> tuple[UInt8[Tensor, "n c h w"], Int[Tensor, "n"] | None]:
    """`count` images spread evenly over a split, with their labels."""
    batch = split.batch(torch.arange(count) * len(split) // count)
    return batch.images, batch.label


def _untrained(pipeline: Pipeline) -> Pipeline:
    """The same pipeline before its first step."""
    with torch.device(pipeline.device):
        model = pipeline.recipe.model.build(pipeline.recipe.seed)
    return Pipeline(pipeline.recipe, model, pipeline.shape, "untrained")


def _commit() -> str | None:
    """The commit of the source that is running, with "+" if it was changed; None outside a checkout."""
    here = Path(__file__).parent
    try:
        commit, status = (
            subprocess.run(["git", "-C", here, *words], capture_output=True, text=True, check=True, timeout=10).stdout
            for words in (["rev-parse", "--short=12", "HEAD"], ["status", "--porcelain", "--", here.parent])
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return commit.strip() + ("+" if status.strip() else "")
