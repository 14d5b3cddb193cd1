"""Measure a run: quality against held-out data, agreement with the labels, diversity, and copying; bits of texts.

Every number comes with its protocol. The reference is always held-out data: copies of the training set would improve a
distance to the training set.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Int, Shaped, UInt8
from torch import Tensor
from tqdm import tqdm

from ..config import DitkitError, near, to_json
from ..data import Dataset, Split, evenly, strings
from ..models import ControlConfig
from ..pipeline import Pipeline, open_run
from ..recipe import Gate, Sample
from ..reconstructions import Reconstructions
from ..report import provenance
from ..runs import find_checkpoint
from .classifier import train_classifier
from .controlled import edge_agreement
from .distances import Estimate, frechet_distance, kernel_distance
from .features import Features
from .heldout import original
from .memorization import f_mem, within_class_distance
from .reconstruction import measure_reconstructions
from .texts import Nearest, bits_per_character, nearest_texts, ratio, share, unigram_bits, valid

__all__ = [
    "MEANING",
    "Measurement",
    "blurred",
    "codec_kid",
    "draw",
    "evaluate",
    "features_protocol",
    "heldout_features",
    "measure_kid",
    "sampling_protocol",
]

MEANING = {
    "class_accuracy": "share of samples that a classifier, trained on the real data, sees as the class asked for",
    "classifier_accuracy": "the same classifier on held-out real images: what a perfect model could reach",
    "edge_agreement": "F1 of the samples' edges against their control images', within a pixel; 1 = they follow them",
    "edge_agreement_base": "the same without the control: what the classes alone give",
    "kid": "kernel distance (unbiased MMD^2) of samples to held-out images in EfficientNet-lite0 features; 0 = alike",
    "kid_untrained": "the same for the model before training: what doing nothing gives",
    "kid_blurred": "the same for held-out images blurred by one pixel: what a slight loss of sharpness gives",
    "kid_train": "the same for real training images: what a perfect model gives, 0 up to chance",
    "frechet": "Frechet distance in the same features; biased upwards with few samples, so compare only equal counts",
    "diversity": "mean distance between samples of a class, as a share of that between real images; 0 = all the same",
    "f_mem": "share of samples that copy a training image: nearer to it than a third of the way to the next one",
    "f_mem_floor": "the same for held-out real images: what counts as a copy by chance",
    "bits_per_character": "bound on -log2 p of held-out texts, their filling included, over their characters",
    "bits_per_character_train": "the same for training texts: far below, the model knows them by heart",
    "bits_per_character_unigram": "a code of single characters and an end by their frequencies: what no context gives",
    "copies": "share of samples that are a training text",
    "edit_distance": "edits of one character from a sample to the nearest training text, mean",
    "edit_distance_heldout": "the same for held-out texts: what new texts of this kind are away",
    "valid": "share of samples whose words are all in training texts",
    "valid_heldout": "the same for held-out texts: what a perfect model could reach",
    "valid_new": "share of samples that are valid, no copy, and drawn for the first time",
    "distinct": "share of different texts among the samples",
    "psnr": "decibels of held-out images after encoding and decoding, mean over images; more is better",
    "psnr_of_mean": "the same of the mean squared error of all images, in which the worst ones weigh most",
    "psnr_pca": "the same for as many principal components of the same patches: what a linear codec gives",
    "psnr_pca_of_mean": "that of its mean squared error",
    "psnr_gain": "by how much the autoencoder is above the principal components, mean over images",
    "kl": "divergence of the latents' posterior from N(0, 1) in nats for each latent, mean",
    "latent_mean": "of normalised latents of held-out images: the mean furthest from 0 of a channel",
    "latent_std_least": "the smallest standard deviation of a channel; training images have 1",
    "latent_std_most": "the largest one",
    "seconds": "time for training and evaluation together",
    "seconds_training": "time for training",
    "seconds_evaluation": "time for this evaluation",
}


CAPTIONS = "captions of held-out images, spread evenly"


@dataclass(frozen=True)
class Measurement:
    """Numbers by name, how they were obtained, the bounds they should keep, and what was measured.

    images: the samples, also where these are code points of texts; texts: those with the nearest training texts.
    caption: what the images are.
    """

    numbers: dict[str, float | None]
    protocol: dict[str, Any]
    gates: tuple[Gate, ...]
    images: Shaped[Tensor, "n *sample"]
    labels: Int[Tensor, "n"] | None
    texts: tuple[Nearest, ...] = ()
    caption: str = "samples, one row for each class"

    @property
    def missed(self) -> tuple[Gate, ...]:
        """The bounds that were not kept."""
        return tuple(gate for gate in self.gates if not gate.holds(self.numbers))


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
    Raises DitkitError if the data has no held-out part, is of neither images nor texts, or the run cannot be loaded.
    """
    begun = time.perf_counter()
    pipeline = open_run(path, device=device)
    recipe = pipeline.recipe
    for gate in recipe.evaluate.gates:
        for name in (gate.metric, gate.times, gate.plus):
            if name is not None and name not in MEANING:
                raise DitkitError(f"a bound names {name!r}: {near(name, MEANING)}")
    say("reading the data")
    data = original(recipe.data).open()
    named = isinstance(pipeline, Reconstructions) or not pipeline.captioned
    if named and data.classes != pipeline.classes:
        raise DitkitError(f"the data now has the classes {data.classes}, the run was trained on {pipeline.classes}")
    kind = "images" if len(data.shape) == 3 else "texts" if data.symbols else None
    if kind is None:
        raise DitkitError(
            f"{data.name} holds neither images [c h w] nor texts, and `ditkit evaluate` measures only these"
        )
    if len(data.heldout) < 10 or len(data.train) < 10:
        raise DitkitError(
            f"{data.name} has {len(data.train)} training and {len(data.heldout)} held-out {kind}; measuring takes at "
            f"least 10 of each: raise data.holdout when training, or use more {kind}"
        )
    count = recipe.evaluate.samples if samples is None else samples
    if count < 10:
        raise DitkitError(f"measuring takes at least 10 samples, not {count}")
    if isinstance(pipeline, Reconstructions):
        found = _measure_reconstructions(pipeline, data, count, settings, say)
    else:
        measure = _measure_images if kind == "images" else _measure_texts
        found = measure(pipeline, data, count, seed, settings, say)

    numbers = found.numbers
    numbers["seconds_training"] = float(find_checkpoint(path).log["seconds"])
    numbers["seconds_evaluation"] = time.perf_counter() - begun
    numbers["seconds"] = numbers["seconds_training"] + numbers["seconds_evaluation"]
    found.protocol.update(provenance())
    for gate in recipe.evaluate.gates:
        if numbers.get(gate.metric) is None:
            raise DitkitError(f"the recipe bounds {gate.metric}, which this data does not give")
    return found


def _measure_images(
    pipeline: Pipeline, data: Dataset, count: int, seed: int, settings: dict[str, Any], say: Callable[[str], None]
) -> Measurement:
    """All numbers of images but the times."""
    recipe = pipeline.recipe
    features = Features(recipe.evaluate.size, pipeline.device)
    real, real_labels = _samples(data.heldout, len(data.heldout))
    train, train_labels = _samples(data.train, len(data.train))

    say(f"drawing {count} samples")
    chosen = pipeline.settings(**settings)
    labels = pipeline.labels(None, count)
    given: dict[str, Any] = {"label": labels}
    if pipeline.captioned or isinstance(recipe.model, ControlConfig):
        labels, given = pipeline.like(data.heldout, count)
    images = draw(pipeline, given, count, seed, settings)
    numbers: dict[str, float | None] = {}
    protocol = sampling_protocol(pipeline, chosen, count, seed)
    protocol |= {"reference": f"held-out part of {data.source}", "reference_images": len(real)}
    if "prompt" in given:
        protocol["labels"] = CAPTIONS
    if "control" in given:
        say("comparing edges")
        control = given["control"]
        protocol["control"] = "of held-out images, with their labels"
        plain = draw(pipeline, {k: v for k, v in given.items() if k != "control"}, count, seed, settings)
        for name, drawn in (("edge_agreement", images), ("edge_agreement_base", plain)):
            agreement = edge_agreement(pipeline.controls(drawn), control)
            numbers[name], numbers[f"{name}_error"] = agreement.value, agreement.error

    if len(data.classes) > 1 and real_labels is not None and train_labels is not None and labels is not None:
        say("training a classifier on the real data")
        classifier = train_classifier(train, train_labels, len(data.classes))
        numbers["class_accuracy"] = classifier.accuracy(images, labels)
        numbers["classifier_accuracy"] = classifier.accuracy(real, real_labels)
        protocol["classifier"] = "small CNN trained on the training images, seed 0"

    say("comparing features")
    reference = features(real)
    sampled = features(images)
    untrained = draw(_untrained(pipeline), given, count, seed, settings)
    sets = {
        "kid": sampled,
        "kid_untrained": features(untrained),
        "kid_blurred": features(blurred(real)),
        "kid_train": features(_samples(data.train, min(len(train), len(real)))[0]),
    }
    for name, found in sets.items():
        estimate = kernel_distance(found, reference)
        numbers[name], numbers[f"{name}_error"] = estimate.value, estimate.error
    numbers["frechet"] = frechet_distance(sampled, reference)
    protocol["features"] = features_protocol(features)

    say("looking for copies")
    spread, natural = _spread(images, labels), _spread(real, real_labels)
    numbers["diversity"] = spread / natural if spread is not None and natural else None
    copies, floor = f_mem(images, train), f_mem(real, train)
    numbers |= {"f_mem": copies.value, "f_mem_error": copies.error, "f_mem_floor": floor.value}
    protocol["copies"] = f"nearest over second nearest of {len(train)} training images below 1/3, in bytes, L2"
    return Measurement(numbers, protocol, recipe.evaluate.gates, images, labels)


def _measure_reconstructions(
    trained: Reconstructions, data: Dataset, count: int, settings: dict[str, Any], say: Callable[[str], None]
) -> Measurement:
    """All numbers of an autoencoder but the times. Raises DitkitError for settings of a sampling."""
    if settings:
        raise DitkitError(f"an autoencoder draws no samples: leave out {', '.join(sorted(settings))}")
    say("encoding and decoding")
    numbers, protocol, images = measure_reconstructions(trained, data, count)
    caption = "held-out images; through as many principal components; through the autoencoder"
    return Measurement(numbers, protocol, trained.recipe.evaluate.gates, images, None, caption=caption)


def _measure_texts(
    pipeline: Pipeline, data: Dataset, count: int, seed: int, settings: dict[str, Any], say: Callable[[str], None]
) -> Measurement:
    """All numbers of texts but the times."""
    recipe = pipeline.recipe
    train, heldout = (strings(_samples(split, len(split))[0]) for split in (data.train, data.heldout))
    say(f"drawing {count} samples")
    chosen = pipeline.settings(**settings)
    labels = pipeline.labels(None, count)
    samples = draw(pipeline, {"label": labels}, count, seed, settings)
    texts = strings(samples)
    numbers: dict[str, float | None] = {}
    protocol = sampling_protocol(pipeline, chosen, count, seed)
    protocol |= {"reference": f"held-out part of {data.source}", "reference_texts": len(heldout)}

    def add(name: str, found: Estimate) -> None:
        numbers[name], numbers[f"{name}_error"] = found.value, found.error

    say("bounding the likelihood")
    times = recipe.evaluate.times
    for name, split, n in (
        ("bits_per_character", data.heldout, len(heldout)),
        ("bits_per_character_train", data.train, min(len(train), len(heldout))),
    ):
        add(name, bits_per_character(pipeline, split, evenly(split, n), times, seed))
    numbers["bits_per_character_unigram"] = unigram_bits(heldout, train, data.symbols)
    protocol["bits"] = (
        f"generalised KL with one draw of t in each of {times} equal parts of (0.01, 1) for each text, and -log p(x0) "
        "given x at t = 0.01; the standard error is over texts; as many training texts as held-out ones"
    )

    say("looking for copies")
    near = nearest_texts(texts, train)
    known, right = set(train), valid(texts, train)
    fresh = [text not in known and text not in texts[:i] for i, text in enumerate(texts)]
    add("copies", share([text in known for text in texts]))
    add("edit_distance", _mean([n.edits for n in near]))
    add("edit_distance_heldout", _mean([n.edits for n in nearest_texts(heldout, train)]))
    add("valid", share(right))
    add("valid_heldout", share(valid(heldout, train)))
    add("valid_new", share([v and f for v, f in zip(right, fresh, strict=True)]))
    numbers["distinct"] = len(set(texts)) / len(texts)
    protocol["copies"] = f"against {len(train)} training texts; words are what is between single spaces"
    return Measurement(numbers, protocol, recipe.evaluate.gates, samples, labels, tuple(near))


def _mean(values: Sequence[float]) -> Estimate:
    """With its standard error."""
    return ratio(torch.tensor(values, dtype=torch.float64), torch.ones(len(values), dtype=torch.float64))


def measure_kid(pipeline: Pipeline, *, seed: int = 0, **settings: Any) -> Measurement:
    """The kernel distance alone, with the run's own settings or others: what a comparison of many runs needs.

    settings: fields of `Sample`. The reference is read and looked at once in a process. Raises DitkitError as
    `evaluate`.
    """
    size, count = pipeline.recipe.evaluate.size, pipeline.recipe.evaluate.samples
    features, reference, source = heldout_features(original(pipeline.recipe.data), size, str(pipeline.device))
    labels = pipeline.labels(None, count)
    given: dict[str, Any] = {"label": labels}
    if pipeline.captioned:
        labels, given = pipeline.like(original(pipeline.recipe.data).open().heldout, count)
    images = pipeline.sample(count=count, **given, seed=seed, **settings)
    estimate = kernel_distance(features(images), reference)
    protocol = sampling_protocol(pipeline, pipeline.settings(**settings), count, seed)
    protocol |= {"reference": f"held-out part of {source}", "reference_images": len(reference)}
    protocol |= {"features": features_protocol(features), **provenance()}
    if "prompt" in given:
        protocol["labels"] = CAPTIONS
    seen = f"{features.name} {features.sha256[:12]} at {size} px"
    protocol["evaluators"] = {"kid": f"ditkit: {seen}, {protocol['reference']}, {count} samples"}
    return Measurement({"kid": estimate.value, "kid_error": estimate.error}, protocol, (), images, labels)


def codec_kid(pipeline: Pipeline) -> float:
    """The kernel distance of held-out images to themselves after the codec: what a perfect network would give."""
    recipe, data = pipeline.recipe, original(pipeline.recipe.data)
    features, reference, _ = heldout_features(data, recipe.evaluate.size, str(pipeline.device))
    split = data.open().heldout
    images = _samples(split, len(split))[0].to(pipeline.device)
    return kernel_distance(features(recipe.codec.decode(recipe.codec.encode(images)).cpu()), reference).value


@functools.lru_cache(maxsize=4)
def heldout_features(data: Any, size: int, device: str) -> tuple[Features, Tensor, str]:
    """The feature network, the features of all held-out images of a data set, and where these come from.

    Made once in a process. Raises DitkitError for data without 10 held-out images.
    """
    opened = data.open()
    if len(opened.shape) != 3 or len(opened.heldout) < 10:
        raise DitkitError(f"{opened.name} has no 10 held-out images [c h w] to compare samples with")
    features = Features(size, device)
    return features, features(_samples(opened.heldout, len(opened.heldout))[0]), opened.source


def sampling_protocol(pipeline: Pipeline, chosen: Sample, count: int, seed: int) -> dict[str, Any]:
    """How `count` samples were drawn."""
    return {
        "checkpoint": pipeline.origin,
        "samples": count,
        "labels": "classes in turn" if pipeline.classes else "none",
        "sampling": {k: v for k, v in to_json(chosen).items() if k not in ("type", "batch", "ema", "ema_std")},
        "seed": seed,
        "dtype": "float32",
        "device": str(pipeline.device),
    }


def features_protocol(features: Features) -> dict[str, Any]:
    """Which network the features are of, and at which size it sees images."""
    return {"network": features.name, "sha256": features.sha256, "size": features.size}


def draw(pipeline: Pipeline, given: dict[str, Any], count: int, seed: int, settings: dict[str, Any]) -> Tensor:
    """Samples, under a progress bar; given: their labels or captions, control images; settings: fields of `Sample`."""
    with tqdm(unit="step", leave=False, dynamic_ncols=True) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        return pipeline.sample(count=count, **given, seed=seed, progress=progress, **settings)


def _spread(images: Tensor, labels: Tensor | None) -> float | None:
    """Mean distance within a class; None if no class has two images."""
    labels = torch.zeros(len(images), dtype=torch.long) if labels is None else labels
    return within_class_distance(images, labels) if int(labels.bincount().max()) > 1 else None


def _samples(split: Split, count: int) -> tuple[Shaped[Tensor, "n *sample"], Int[Tensor, "n"] | None]:
    """`count` samples spread evenly over a split, with their labels."""
    batch = split.batch(evenly(split, count))
    return batch.data, batch.label


def _untrained(pipeline: Pipeline) -> Pipeline:
    """The same pipeline before its first step."""
    with torch.device(pipeline.device):
        model = pipeline.recipe.model.build(pipeline.recipe.seed)
    return Pipeline(pipeline.recipe, model, pipeline.shape, "untrained")
