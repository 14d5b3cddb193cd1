"""Does a finished model give out its training data? What a person needs to sign it off.

Every number about samples stands beside the same number of held-out images, which nobody copied.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from ..codecs import examples
from ..config import DitkitError
from ..data import Dataset, Split
from ..models import ControlConfig
from ..pipeline import Pipeline
from ..report import Listing, Report, Section, Table, Value, number, provenance, write
from ..rng import Rng
from ..shards import mirrors
from .copying import authentic, copy_test, most_similar
from .decisions import MARGIN
from .distances import kernel_distance
from .features import Features
from .images import read_images
from .measure import features_protocol, sampling_protocol
from .memorization import memorized, share_of
from .neighbours import Index, Near, mirrored
from .networks import SSCD
from .pairs import Pairs, pairs_of
from .protocols import UNPROVEN

__all__ = ["Audit", "audit", "write_audit"]

SHOWN = 32
"""The samples nearest to training images that a report shows."""
THRESHOLD = -3.0
"""C_T below this is a sign of copying: three standard deviations of one cell, if nothing were copied, and more of the
mean over cells."""
_COPIES = {
    "f_mem": "f_mem in pixels",
    "f_mem_features": "f_mem in features",
    "sscd_copies": f"SSCD's descriptors (cosine above {SSCD.similar:g})",
}
_FEATURED = 10_000  # training images whose features are taken
_AT_ONCE = 64
_MANY = 1024  # images whose vectors are in memory at a time


@dataclass(frozen=True)
class Audit:
    """What was found: numbers, how they were obtained, verdicts (what, found, whether in order), the nearest pairs."""

    title: str
    numbers: dict[str, float]
    protocol: dict[str, Any]
    verdicts: tuple[tuple[str, str, bool], ...]
    nearest: Pairs
    similar: Pairs | None = None
    """The same by SSCD's descriptors, where their network was given."""

    @property
    def passed(self) -> bool:
        """Whether nothing was found."""
        return all(fine for _, _, fine in self.verdicts)

    @property
    def verdict(self) -> str:
        """What was found, in a sentence: a few copies are said, even where they are too few to fail."""
        if not self.passed:
            if all(fine for _, _, fine in self.verdicts[:-1]):
                return (
                    "There are signs of copying, by C_T alone: samples are nearer to training images than held-out "
                    "ones are, as samples of fewer kinds or blurred ones are, too: look at the pairs."
                )
            return "There are signs of copying: look at the pairs."
        for name, how in _COPIES.items():
            found, floor = self.numbers.get(name, 0.0), self.numbers.get(f"{name}_floor", 0.0)
            if found > floor:
                return (
                    f"The bounds are kept, and yet {found:.2%} of the samples are copies by {how}, against "
                    f"{floor:.2%} of held-out images: look at the pairs."
                )
        return "Nothing was found."


def audit(
    what: Pipeline | str | Path,
    data: Dataset,
    *,
    samples: int = 1000,
    seed: int = 0,
    size: int = 96,
    device: str = "cpu",
    sscd: str = "",
    say: Callable[[str], None] = lambda line: None,
    **settings: Any,
) -> Audit:
    """Compare samples of a pipeline, or images in files, with the data that the model was trained on.

    Held-out images that are training images, too, are left out. Where training mirrors images, each sample and each
    held-out image is turned as it is nearer to its nearest training image. settings: fields of `Sample`. size: side in
    pixels at which features see images. sscd: the file of a network for finding copies (`SSCD`). say: gets a line when
    something begins. Raises DitkitError for data of anything but images, too few of them, and a ControlNet, whose
    samples are near what their control images are of.
    """
    begun = time.perf_counter()
    descriptor = SSCD(sscd, device) if sscd else None
    if len(data.shape) != 3 or data.shape[0] not in (1, 3):
        raise DitkitError(f"{data.name} holds no images [1 or 3, h, w], and an audit is of images")
    _enough(len(data.heldout), data.name)
    protocol: dict[str, Any] = {"training_data": data.source}
    if data.skipped:
        protocol["unreadable_training_data"] = list(data.skipped)
    if isinstance(what, Pipeline):
        title = what.origin
        if isinstance(what.recipe.model, ControlConfig):
            raise DitkitError(
                "a ControlNet draws what its control images are of, which is no copying: audit its base, or a folder "
                "of images that it drew"
            )
        if what.classes and data.classes != what.classes:
            raise DitkitError(f"the data now has the classes {data.classes}, the run was trained on {what.classes}")
        _least(samples)
        say(f"drawing {samples} samples")
        some = Rng(0).some("labels", len(data.train), samples)
        asked = what.asked(data.train.batch(some[torch.arange(samples) % len(some)]))
        images = what.sample(**asked, count=samples, seed=seed, **settings)
        protocol |= sampling_protocol(what, what.settings(**settings), samples, seed)
        names = tuple(map(str, range(samples)))
        protocol["labels"] = f"{next(iter(asked))}s of training images" if asked else "none"
    else:
        title = Path(what).name
        say("reading the images")
        read = read_images(what, data.shape)
        images, names = read.pixels, read.names
        protocol["images"] = title
        if read.changed:
            say(f"{read.changed} of {len(names)} images were cropped or scaled to {list(data.shape)}")
            protocol["cropped_or_scaled"] = read.changed
    _least(len(images))
    protocol["samples"] = len(images)
    held = torch.cat(list(examples(data.heldout, max(1000, len(images)), name="audit")))

    say(f"looking for copies among {len(data.train):,} training images")
    flip = mirrors(data.train)
    index = Index(lambda ids: _pair(data.train, ids), len(data.train), mirror=mirrored(data.shape) if flip else None)
    index.extend(index.fitting(images[0].numel()))
    while not index.complete:
        index.extend(_AT_ONCE)
    near, floor_near = _nearest(index, images), _nearest(index, held)
    known = floor_near.d1 == 0
    if bool(known.any()):
        held, floor_near = held[~known], Near(*(getattr(floor_near, f.name)[~known] for f in fields(Near)))
        _enough(len(held), f"without {int(known.sum())} that are training images, too, {data.name}")
    if flip:
        images = _turned(images, data.train, near.nearest)
        held = _turned(held, data.train, floor_near.nearest)
    copies, floor = share_of(near.copied), share_of(floor_near.copied)
    own = _own(index, data.train, near.nearest), _own(index, data.train, floor_near.nearest)
    real = (authentic(n.d1, n.nearest, o) for n, o in zip((near, floor_near), own, strict=True))
    shares = [share_of(part) for part in real]
    numbers = {
        "f_mem": copies.value,
        "f_mem_low": copies.low,
        "f_mem_high": copies.high,
        "f_mem_floor": floor.value,
        "authentic": shares[0].value,
        "authentic_error": shares[0].error,
        "authentic_heldout": shares[1].value,
        "duplicates": float(index.duplicates),
        "heldout_known": float(known.sum()),
    }
    protocol["copies"] = f"d1 / d2 below 1/3 of {len(index):,} different training images" + (
        ", or their mirror images" if flip else ""
    )
    protocol["heldout"] = len(held)

    say("comparing features")
    features = Features(size, device)
    sampled, reference = features(images), features(held)
    different = index.ids[:_FEATURED].sort().values  # as the index draws them; the second of two would hide copies
    train = torch.cat([features(data.train.batch(ids).data) for ids in different.split(_AT_ONCE)])
    seen, seen_floor = (share_of(memorized(part, train).memorized) for part in (sampled, reference))
    numbers |= {
        "f_mem_features": seen.value,
        "f_mem_features_low": seen.low,
        "f_mem_features_high": seen.high,
        "f_mem_features_floor": seen_floor.value,
    }
    for name, other in (("kid_train", train), ("kid_heldout", reference)):
        estimate = kernel_distance(sampled, other)
        numbers |= {name: estimate.value, f"{name}_error": estimate.error}
    drawn, new = (torch.cat([index.short(_vectors(part)) for part in all_.split(_MANY)]) for all_ in (images, held))
    tests = {"c_t": copy_test(drawn, new, index.rows), "c_t_features": copy_test(sampled, reference, train)}
    numbers |= {name: test.value for name, test in tests.items()}
    protocol["features"] = features_protocol(features) | {"training": len(train)}
    for name, test in tests.items():
        protocol[name] = f"64 components, {test.cells} of {test.all_cells} cells, with {test.samples} of the samples"

    more = None
    if descriptor is not None:
        say("comparing descriptors")
        found, more = _described(descriptor, images, names, held, data.train, different)
        numbers |= found
        protocol["sscd"] = {
            "network": descriptor.name,
            "sha256": descriptor.sha256,
            "training": len(different),
            "status": UNPROVEN,
        }

    ratios = near.d1 / near.d2.clamp(min=torch.finfo(near.d2.dtype).tiny)  # two training images may be equally near
    order = torch.argsort(ratios)[:SHOWN]
    pairs = pairs_of(images, names, data.train, order, near.nearest[order], "d1 / d2", ratios[order])
    numbers["seconds"] = time.perf_counter() - begun
    return Audit(
        title,
        numbers,
        protocol | provenance(),
        _verdicts(numbers, len(images)),
        pairs,
        more,
    )


def _described(
    network: SSCD, images: Tensor, names: tuple[str, ...], held: Tensor, train: Split, ids: Int[Tensor, "k"]
) -> tuple[dict[str, float], Pairs]:
    """What descriptors say of samples, of held-out images the same, and the most similar pairs."""
    sampled, reference = (torch.cat([network(x).features for x in part.split(_AT_ONCE)]) for part in (images, held))
    known = torch.cat([network(train.batch(part).data).features for part in ids.split(_AT_ONCE)])
    (cosine, which), (usual, _) = (most_similar(part, known) for part in (sampled, reference))
    copies = share_of(cosine > network.similar)
    numbers = {
        "sscd_copies": copies.value,
        "sscd_copies_low": copies.low,
        "sscd_copies_high": copies.high,
        "sscd_copies_floor": float((usual > network.similar).double().mean()),
        "sscd_95": float(cosine.quantile(0.95)),
        "sscd_95_heldout": float(usual.quantile(0.95)),
    }
    order = torch.argsort(cosine, descending=True)[:SHOWN]
    return numbers, pairs_of(images, names, train, order, ids[which[order]], "cosine", cosine[order])


def _share(n: dict[str, float], name: str, samples: int) -> str:
    """A share of copies with its interval; of none what can be said."""
    if n[name] == 0:
        return f"none among {samples:,} samples: below {min(1.0, 3 / samples):.2%}"
    return f"{n[name]:.2%} of {samples:,} samples, {n[f'{name}_low']:.2%} to {n[f'{name}_high']:.2%}"


def _verdicts(numbers: dict[str, float], samples: int) -> tuple[tuple[str, str, bool], ...]:
    """What must hold of a model that copies nothing."""
    n = numbers
    copies = tuple(
        (
            f"copies by {how}: the lower end (95%) is at most {MARGIN:.0%} above their share of held-out images",
            f"{_share(n, name, samples)}; held-out {n[f'{name}_floor']:.2%}",
            n[f"{name}_low"] <= n[f"{name}_floor"] + MARGIN,
        )
        for name, how in _COPIES.items()
        if name in n
    )
    return (
        *copies,
        (
            f"C_T is above {THRESHOLD:g}: samples are no nearer to training images than held-out ones are",
            f"{number(n['c_t'])} in pixels, {number(n['c_t_features'])} in features",
            min(n["c_t"], n["c_t_features"]) > THRESHOLD,
        ),
    )


_MEANING = {
    "f_mem": "share of samples that copy: nearer to a training image than a third of the way to the next one",
    "f_mem_floor": "the same of held-out images: what counts as a copy by chance",
    "f_mem_features": "f_mem in features",
    "f_mem_features_floor": "the same of held-out images",
    "sscd_copies": "share of samples whose descriptor is similar to that of a training image: moved, recoloured, cut",
    "sscd_copies_floor": "the same of held-out images",
    "sscd_95": "the cosine with the most similar training image that 5% of the samples exceed",
    "sscd_95_heldout": "the same of held-out images",
    "c_t": "copy test of Meehan et al. in pixels; far below 0 = nearer to training data than held-out data is",
    "c_t_features": "the same in features",
    "authentic": "share of samples further from their nearest training image than this is from its own nearest one",
    "authentic_heldout": "the same of held-out images: what is to be expected",
    "kid_train": "kernel distance of samples to training images, in features",
    "kid_heldout": "the same to held-out images; much larger than to training images = overfitted",
    "duplicates": "training images that are equal to others, or mirror images of others where training mirrors",
    "heldout_known": "held-out images that are training images, too: they are left out of everything above",
}


def write_audit(found: Audit, folder: Path) -> list[Path]:
    """Write audit's report.html, .md, .json and picture into a folder; the paths, the page first."""
    rows = tuple(
        (name, Value(found.numbers[name], found.numbers.get(f"{name}_error")), meaning)
        for name, meaning in _MEANING.items()
        if name in found.numbers
    )
    limits = (
        "Copies are looked for pixel by pixel and in features: parts of training images, and what was moved or "
        "recoloured, may pass, unless descriptors of a network for finding copies are compared, too (--sscd). What was "
        "not drawn was not seen: with no copy among n samples the share is below 3 / n. C_T alone also falls where "
        "samples are of fewer kinds than held-out images, or blurred."
    )
    more = found.similar and found.similar.shown("similar.png", "whose descriptor is most similar")
    sections = (
        Section("Verdict", (found.verdict, Table(("what must hold", "what came", ""), found.verdicts), limits)),
        Section("Numbers", (Table(("number", "value", "what it means"), rows),)),
        Section(
            "The samples nearest to training images",
            found.nearest.shown("nearest.png", "nearest to it"),
        ),
        *(() if more is None else (Section("The samples most similar to training images, by SSCD", more),)),
        Section("Protocol", (Listing(found.protocol),)),
    )
    data = {**found.numbers, "passed": found.passed, "nearest": found.nearest.rows(), "protocol": found.protocol}
    data |= {} if found.similar is None else {"similar": found.similar.rows()}
    return write(Report(f"Audit of {found.title}", sections, data), folder)


def _vectors(images: UInt8[Tensor, "n c h w"]) -> Float[Tensor, "n d"]:
    return images.flatten(1).float()


def _least(count: int) -> None:
    """Raises DitkitError for too few images."""
    if count < 20:
        raise DitkitError(f"an audit takes at least 20 images, not {count}")


def _enough(count: int, what: str) -> None:
    """Raises DitkitError for too few held-out images."""
    if count < 20:
        raise DitkitError(f"{what} has {count} held-out images; an audit compares with at least 20: raise holdout")


def _nearest(index: Index, images: UInt8[Tensor, "n c h w"]) -> Near:
    """The two nearest training images of each image."""
    parts = [index.nearest(_vectors(some), distances=True) for some in images.split(_MANY)]
    return Near(*(torch.cat([getattr(part, f.name) for part in parts]) for f in fields(Near)))


def _turned(images: UInt8[Tensor, "n c h w"], split: Split, nearest: Int[Tensor, "n"]) -> UInt8[Tensor, "n c h w"]:
    """Each image mirrored where that is nearer to its nearest training image."""
    parts = []
    for some, ids in zip(images.split(_MANY), nearest.split(_MANY), strict=True):
        train = split.batch(ids).data.float()
        apart, mirror = ((x.float() - train).square().sum((1, 2, 3)) for x in (some, some.flip(-1)))
        parts.append(torch.where((mirror < apart)[:, None, None, None], some.flip(-1), some))
    return torch.cat(parts)


def _pair(split: Split, ids: Int[Tensor, "b"]) -> tuple[Tensor, Tensor]:
    images = split.batch(ids).data
    return images, _vectors(images)


def _own(index: Index, split: Split, nearest: Int[Tensor, "n"]) -> Float[Tensor, "n"]:
    """The distance of training images to the nearest other one."""
    ids, inverse = nearest.unique(return_inverse=True)
    found = torch.cat([index.nearest(_pair(split, part)[1], distances=True).d2 for part in ids.split(256)])
    return found[inverse]
