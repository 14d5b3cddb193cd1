"""Images, or samples of a run, measured by a protocol."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..config import DitkitError, lookup, to_json
from ..data import Dataset
from ..models import ControlConfig
from ..pipeline import Pipeline, load
from ..recipe import device_of
from ..report import Listing, Report, Section, Table, Value, provenance, write
from .heldout import original
from .labels import RULES, labels_by
from .measure import CAPTIONS, draw, sampling_protocol
from .networks import Network
from .protocols import UNPROVEN, Evaluator, Number, identity, parts
from .references import Reference, look, read_statistics, reference_of_images
from .sources import Images, has_images, images_in_memory, images_of, images_of_split

__all__ = ["Judgement", "find_protocol", "judge", "judge_run", "write_judgement"]


@dataclass(frozen=True)
class Judgement:
    """Numbers of one protocol; `identity` is what they have in common with those that they may be compared with."""

    name: str
    numbers: Mapping[str, Number]
    identity: str
    status: str
    protocol: Mapping[str, Any]

    def value(self, number: str) -> Value:
        """A number as it stands in a table. Raises KeyError for one that was not measured."""
        value, error, _ = parts(self.numbers[number])
        note = "" if self.status == "proven" else self.status
        return Value(value, error, note, self.identity)


def find_protocol(name: str, weights: str = "") -> Evaluator:
    """The protocol of that name. Raises DitkitError that lists the near names."""
    return lookup("protocol", name)(weights=weights)


def judge(
    protocol: Evaluator,
    images: Images,
    reference: str | Path | Dataset | Images,
    *,
    device: str = "auto",
    cache: str = "",
    say: Callable[[str], None] = lambda line: None,
) -> Judgement:
    """Measure images by a protocol.

    reference: a file of statistics, a folder or an .npz of images, or the held-out images of a data set. cache: where
    what a network sees of reference images is kept. say: gets a line when something begins. Raises DitkitError for
    what the protocol lacks, and for images that do not compare.
    """
    return _judged(protocol, protocol.network(device_of(device)), images, reference, cache, say)


def _judged(
    protocol: Evaluator,
    network: Network,
    images: Images,
    reference: str | Path | Dataset | Images,
    cache: str,
    say: Callable[[str], None],
) -> Judgement:
    """As `judge`, with a network that is there."""
    say("looking at the reference")
    against = _reference(network, reference, cache)
    say(f"looking at {images.source}")
    seen = look(network, images, what="the images")
    say("computing the numbers")
    numbers = dict(protocol.measure(seen, against))
    how = {
        "protocol": to_json(protocol),
        "table": protocol.table,
        "preparation": protocol.images,
        "network": network.name,
        "weights_sha256": network.sha256,
        "reference": against.source,
        "reference_sha256": against.sha256,
        "images": images.source,
        "images_count": len(seen.features),
        "status": f"proven: {protocol.proof}" if protocol.proof else UNPROVEN,
        **provenance(),
    }
    one = identity(protocol, network, against, len(seen.features))
    return Judgement(protocol.name, numbers, one, protocol.status, how)


def _reference(network: Network, reference: str | Path | Dataset | Images, cache: str) -> Reference:
    if isinstance(reference, Dataset):
        if len(reference.shape) != 3:
            raise DitkitError(f"{reference.name} holds no images [c h w] to compare with")
        reference = images_of_split(reference.heldout, f"held-out part of {reference.source}")
    elif not isinstance(reference, Images):
        path = Path(reference).expanduser()
        if path.exists() and not has_images(path):
            return read_statistics(path, network)
        reference = images_of(path)
    return reference_of_images(network, reference, cache)


def judge_run(
    run: str | Path,
    protocol: Evaluator,
    reference: str | Path | Dataset | Images | None = None,
    *,
    samples: int | None = None,
    labels: str | None = None,
    seed: int = 0,
    device: str = "auto",
    cache: str = "",
    say: Callable[[str], None] = lambda line: None,
    **settings: Any,
) -> Judgement:
    """Draw samples of a run and measure them.

    reference: as `judge`, by default the held-out part of the run's data. samples: how many, by default the recipe's.
    labels: one of `RULES`, by default the protocol's; a model of captions is given those of held-out images, and a
    ControlNet control images of these, with their labels. settings: fields of `Sample`. Raises DitkitError as `judge`,
    and for a model that draws no images.
    """
    pipeline = load(run, device=device)
    network = protocol.network(device_of(device))  # what it lacks is said before anything is drawn
    if len(pipeline.shape) != 3:
        raise DitkitError(f"protocols measure images, and this model draws what has the shape {list(pipeline.shape)}")
    rule = labels or (protocol.labels if protocol.labels in RULES else "in_turn")
    count = pipeline.recipe.evaluate.samples if samples is None else samples
    asked = labels_by(rule, len(pipeline.classes), count, seed)
    controlled = isinstance(pipeline.recipe.model, ControlConfig)
    like = pipeline.captioned or controlled
    own = original(pipeline.recipe.data).open() if reference is None or like else None
    against = own if reference is None else reference
    assert against is not None
    given: dict[str, Any] = {"label": asked}
    if like and own is not None:
        if not len(own.heldout):
            raise DitkitError(f"{own.name} has no held-out images, whose captions or control images are drawn after")
        _, given = pipeline.like(own.heldout, count)
    say(f"drawing {count} samples")
    images = _drawn(pipeline, given, count, seed, settings)
    found = _judged(protocol, network, images, against, cache, say)
    drawn = sampling_protocol(pipeline, pipeline.settings(**settings), count, seed)
    drawn["labels"] = CAPTIONS if pipeline.captioned else RULES[rule] if asked is not None else "none"
    if controlled:
        drawn |= {"control": "of held-out images", "labels": "those of these images"}
    return Judgement(found.name, found.numbers, found.identity, found.status, {**found.protocol, **drawn})


def _drawn(pipeline: Pipeline, given: dict[str, Any], count: int, seed: int, settings: dict[str, Any]) -> Images:
    """Samples in memory. Raises DitkitError for a model that draws no images."""
    drawn = draw(pipeline, given, count, seed, settings)
    if drawn.ndim != 4 or drawn.dtype != torch.uint8:
        raise DitkitError(f"protocols measure images, and this model draws {drawn.dtype} {list(drawn.shape[1:])}")
    return images_in_memory(drawn, f"{count} samples of {pipeline.origin}, seed {seed}")


def write_judgement(found: Judgement, folder: Path) -> list[Path]:
    """Write report.html, report.md and report.json into a folder; the paths, the page first. Raises DitkitError."""
    rows, data = [], {}
    for name, number in found.numbers.items():
        value, error, interval = parts(number)
        data[name] = {"value": value, "error": error, "interval": interval}
        rows.append((name, found.value(name), _interval(interval), found.status))
    sections = (
        Section("Numbers", (Table(("number", "value", "95%", "status"), tuple(rows)), found.identity)),
        Section("Protocol", (Listing(found.protocol),)),
    )
    content = {"numbers": data, "identity": found.identity, "status": found.status, "protocol": found.protocol}
    return write(Report(f"{found.name}: {found.protocol['images']}", sections, content), folder)


def _interval(interval: tuple[float, float] | None) -> str:
    return "" if interval is None else f"{interval[0]:.4g} to {interval[1]:.4g}"
