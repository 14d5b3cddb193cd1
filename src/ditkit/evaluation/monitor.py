"""What a training does to its data, seen while it runs: losses on training and held-out samples, copies, quality.

Each evaluation takes the time that it is given, and measures as much as fits: first the losses, then more of the
training samples for the search of copies, then samples of the network. Averaged weights, fixed noise: an evaluation
differs from the one before it by the training alone, and by how many samples there was time for.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float, Int, Shaped, UInt8
from torch import Tensor

from ..codecs import Pixels
from ..config import DitkitError, NotFinite
from ..data import Dataset
from ..diffusion import Objective
from ..models import ControlConfig
from ..pipeline import Pipeline
from ..recipe import Monitor, Recipe
from ..reconstructions import Reconstructions
from ..rng import Replay, Rng
from ..shards import mirrors
from .distances import kernel_distance
from .features import Features
from .intervals import percentiles
from .memorization import FMem, share_of
from .neighbours import Index, Near, mirrored

__all__ = ["Observation", "Observer"]

_DRAWS = 2  # times and noises for each probe
_LEAST = 32  # pairs of probes, and samples, below which nothing is said where there are more
_OF_A_LEVEL = 16  # losses; the bootstrap's interval of fewer is too narrow
_ENOUGH = 256  # samples; while there is time for fewer, it is saved until the number of steps has doubled
_FLOOR = 512  # held-out samples that are looked for among the training samples
_REFERENCE = 512  # held-out images that samples are compared with
_AT_ONCE = 64
_PATIENCE = 0.2  # seconds; with less not even prices are measured


@dataclass
class Observation:
    """One evaluation: the row for the log, and the samples nearest to a training sample, each before that one."""

    row: dict[str, Any]
    pairs: UInt8[Tensor, "k c h w"] | None = None


@dataclass
class _Prices:
    """Seconds for one unit of each kind of work, as last measured."""

    clock: Callable[[], float]
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def measure(self, kind: str, units: int) -> Iterator[None]:
        begun = self.clock()
        yield
        self.seconds[kind] = (self.clock() - begun) / max(units, 1)

    def room(self, kind: str, left: float) -> int:
        """How many units fit; 0 for work of unknown price."""
        price = self.seconds.get(kind)
        return 0 if price is None or left <= 0 else int(min(left / max(price, 1e-9), 1e9))


class Observer:
    """Looks at one training; what it has read and measured stays for the next look."""

    def __init__(
        self,
        recipe: Recipe,
        data: Dataset,
        settings: Monitor,
        objective: Objective | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ):
        """recipe: fitted to the data. objective: with what it has learned; by default the recipe's. clock: seconds."""
        self.recipe, self.data, self.settings = recipe, data, settings
        self.objective: Objective = recipe.objective if objective is None else objective
        self.device = torch.device("cpu")
        self.clock, self.prices = clock, _Prices(clock)
        counts = [min(settings.probes, len(data.train), len(data.heldout))] * 2
        self.compared = counts[0] >= 2
        if not self.compared:  # training samples alone, which say what a pass of the network takes
            counts = [min(settings.probes, len(data.train)), 0]
        rng = Rng(recipe.seed)
        self.probes = [
            rng.some("probe", len(split), count)
            for split, count in zip((data.train, data.heldout), counts, strict=True)
            if count
        ]
        self.labelled = rng.some("labels", len(data.train), settings.samples)
        continuous = recipe.model.vocab == 0 and not isinstance(recipe.model, ControlConfig)
        self.mirrors = mirrors(data.train)
        self.index = self._index() if continuous else None
        self.floor: dict[str, FMem] = {}
        self.probed = 0  # pairs of probes at the last look
        self.sampled = 0  # the last step with samples
        self.features: Features | None = None
        self.of_training: Index | None = None
        self.reference: list[Float[Tensor, "b d"]] = []
        self.pictures = continuous and (data.codec is not None or (len(data.shape) == 3 and data.shape[0] in (1, 3)))

    def observe(
        self, pipeline: Pipeline | Reconstructions, step: int, allowed: float, last: bool = False
    ) -> Observation | None:
        """Look at the network after a step, for about so many seconds; None where there is no time for anything.

        last: there is no later look for which time could be saved.
        """
        end = self.clock() + allowed
        self.device = pipeline.device
        plain = isinstance(pipeline, Pipeline)
        draws = self.index is not None and plain
        denoiser = pipeline.denoiser if plain else self.recipe.denoiser.of(pipeline.model)
        if allowed < _PATIENCE or not (draws or self.compared):
            return None
        self._price(denoiser)
        samples = self._least(pipeline) if draws else 0.0
        if end - self.clock() < samples + _LEAST * self.prices.seconds["probe"]:
            return None
        row = self._losses(denoiser, end, samples, 0.35 if draws else 1.0) if self.compared else {}
        if row is None:
            return None
        found = Observation({"step": step, **row})
        if draws and self.index is not None and isinstance(pipeline, Pipeline):
            self._read_more(self.index, "row", end, 0.5)
            if self.index.complete and self.index.duplicates:
                found.row["duplicates"] = self.index.duplicates
            if self.index.complete and len(self.index) >= 2:
                try:
                    self._sampled(pipeline, found, end, last)
                except NotFinite:
                    found.row["samples"] = 0  # early in a training with few solver steps
        return found if len(found.row) > 1 else None

    @torch.no_grad()
    def _price(self, denoiser: Any) -> None:
        """Measure what a pair of probes takes, once."""
        count = min(8, len(self.probes[0]))
        if "probe" not in self.prices.seconds:
            for _ in range(2):  # the first time is slower than the next: memory is taken, code is loaded
                with self.prices.measure("probe", count):
                    self._pairs(denoiser, count)

    def _as_trained(self) -> torch.autocast:
        """The precision of the training, for the network; distances and features are in their own."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.recipe.train.precision == "bf16")

    # losses

    @torch.no_grad()
    def _losses(self, denoiser: Any, end: float, kept: float, part: float) -> dict[str, Any] | None:
        """Losses of training and held-out samples with the same times and noises, by level of noise.

        They take a part of the time that is left, and leave what is kept for samples; or what the fewest pairs need.
        Nothing with time for fewer pairs than before, whose means would not compare; None with time for none.
        """
        wanted = min(len(probes) for probes in self.probes)
        left = end - self.clock()
        least = min(_LEAST, wanted)
        if self.prices.room("probe", left) < least:
            return None
        count = min(wanted, max(least, self.prices.room("probe", min(part * left, left - kept)), self.probed))
        if self.prices.room("probe", left) < count:
            return {}
        self.probed = count
        with self.prices.measure("probe", count):
            train, heldout, t, probe = self._pairs(denoiser, count)
        order = torch.argsort(t, stable=True)
        levels = min(self.settings.levels, len(order) // _OF_A_LEVEL, len(t.unique()))
        rows = []
        for places in order.tensor_split(levels) if levels else ():
            gap = heldout[places] - train[places]
            low, high = _interval(gap, probe[places], count)
            rows.append(
                {
                    "t": [float(t[places].min()), float(t[places].max())],
                    "train": float(train[places].mean()),
                    "heldout": float(heldout[places].mean()),
                    "gap": float(gap.mean()),
                    "low": low,
                    "high": high,
                }
            )
        low, high = _interval(heldout - train, probe, count)
        return {
            "probes": count,
            "train_loss": float(train.mean()),
            "heldout_loss": float(heldout.mean()),
            "gap_low": low,
            "gap_high": high,
            "levels": rows,
        }

    def _pairs(
        self, denoiser: Any, count: int
    ) -> tuple[Float[Tensor, "m"], Float[Tensor, "m"], Float[Tensor, "m"], Int[Tensor, "m"]]:
        """The losses of training and of held-out samples, the times at which they were taken, the same in both, and
        which of the probes each is of. Without held-out probes both are of the training samples."""
        losses, times, probe = [], torch.empty(0), torch.empty(0)
        for split, probes in zip((self.data.train, self.data.heldout), self.probes, strict=False):
            found, at, of = [], [], []
            for places in torch.arange(count).split(_AT_ONCE):
                batch = split.batch(probes[places])
                cond = self.recipe.given(batch.given, self.device)
                data = batch.data.to(self.device)
                draws = [Rng(self.recipe.seed).at(draw, places.to(self.device)) for draw in range(_DRAWS)]
                x0 = self.recipe.codec.encode(data, draws[0])  # where training draws latents, one draw of them
                for rng in draws:
                    images = data if self.data.codec is None else None
                    with self._as_trained():
                        loss = self.objective.loss(denoiser, x0, cond, rng, images)
                    found.append(loss.total.double().cpu())
                    at.append(loss.t.double().cpu())
                    of.append(places)
            losses.append(torch.cat(found))
            times, probe = torch.cat(at), torch.cat(of)
        return losses[0], losses[-1], times, probe

    # copies and quality

    def _least(self, pipeline: Pipeline | Reconstructions) -> float:
        """Seconds of the fewest samples."""
        price = self.prices.seconds["probe"]
        steps = min(self.settings.steps, pipeline.recipe.sample.steps)
        # before any was drawn: a sample takes two passes a step, and a probe two draws in each split
        guess = price / (len(self.probes) * _DRAWS) * 2 * steps
        return _LEAST * self.prices.seconds.get("sample", guess)

    def _vectors(self, ids: Int[Tensor, "b"]) -> tuple[Shaped[Tensor, "b *s"], Float[Tensor, "b d"]]:
        data = self.data.train.batch(ids).data
        return data, self._encoded(data)

    def _encoded(self, data: Shaped[Tensor, "b *s"]) -> Float[Tensor, "b d"]:
        return self.recipe.codec.encode(data.to(self.device)).flatten(1)

    def _index(self) -> Index:
        """Of the training samples, as they are and mirrored where training mirrors them."""
        count = len(self.data.train)
        if self.mirrors and isinstance(self.recipe.codec, Pixels):
            return Index(self._vectors, count, mirror=mirrored(self.data.shape))
        # latents of a mirrored image are no function of its own
        again = (lambda ids: self._encoded(self._mirrored(ids))) if self.mirrors else None
        return Index(self._vectors, count, read_mirrored=again)

    def _mirrored(self, ids: Int[Tensor, "b"]) -> Shaped[Tensor, "b *s"]:
        """Training samples as training mirrors them."""
        return self.data.train.batch(ids, Replay({"flip": torch.zeros(len(ids))})).data

    def _read_more(self, index: Index, kind: str, end: float, part: float) -> None:
        """Read more training samples, for a part of the time that is left."""
        if index.complete:
            return
        stop = self.clock() + part * (end - self.clock())
        if kind not in self.prices.seconds:
            with self.prices.measure(kind, 8):
                index.versions(index.order[:8])
        while not index.complete:
            first = len(index) == 0
            count = index.fitting(index.read(index.order[:1])[1].shape[1]) if first else _AT_ONCE
            if self.prices.room(kind, stop - self.clock()) < min(count, index.wanted - index.seen):
                return
            with self.prices.measure(kind, min(count, index.wanted - index.seen)):
                index.extend(count)

    @torch.no_grad()
    def _sampled(self, pipeline: Pipeline, found: Observation, end: float, last: bool) -> None:
        """Draw as many samples as there is time for, look for copies, and compare with held-out data."""
        assert self.index is not None
        first = "sample" not in self.prices.seconds
        count = min(_LEAST, self.settings.samples) if first else self._affordable(end - self.clock())
        saving = count < min(_ENOUGH, self.settings.samples) and found.row["step"] < 2 * self.sampled and not last
        if count == 0 or saving:
            return
        self.sampled = found.row["step"]
        x0, near = self._drawn(pipeline, self.index, count)
        if first and (more := self._affordable(end - self.clock())) > count:
            count = more
            x0, near = self._drawn(pipeline, self.index, count)
        if "pixels" not in self.floor:
            ids = Rng(self.recipe.seed).some("floor", len(self.data.heldout), _FLOOR).split(_AT_ONCE)
            heldout = [self._encoded(self.data.heldout.batch(part).data) for part in ids if len(part)]
            self.floor["pixels"] = _floor(self.index, heldout)
        found.row |= {
            "samples": count,
            "indexed": len(self.index),
            "duplicates": self.index.duplicates,
            **_shares("", near.copied, self.floor["pixels"]),
        }
        if not self.pictures:
            return
        images = pipeline.recipe.codec.decode(x0).cpu()
        if images.ndim != 4 or images.dtype != torch.uint8:
            return
        chosen = torch.argsort(near.d1 / near.d2)[:8]
        theirs = self._images(self.data.train.batch(near.nearest[chosen]).data)
        found.pairs = torch.stack((images[chosen], theirs), dim=1).flatten(0, 1)
        self._compared(images, found, end)

    def _drawn(self, pipeline: Pipeline, index: Index, count: int) -> tuple[Float[Tensor, "n *shape"], Near]:
        """So many samples, with labels or captions of training samples, and what is near to them."""
        asked = pipeline.asked(self.data.train.batch(self.labelled[torch.arange(count) % len(self.labelled)]))
        steps = min(self.settings.steps, pipeline.recipe.sample.steps)
        with self.prices.measure("sample", count):
            with self._as_trained():
                x0 = torch.cat(list(pipeline.latents(**asked, count=count, seed=self.recipe.seed, steps=steps)))
            return x0, index.nearest(x0.flatten(1))

    def _affordable(self, left: float) -> int:
        """How many samples there is time for: a power of two, or all; 0 if not even for the fewest."""
        most = self.settings.samples
        least = min(_LEAST, most)
        if self.prices.room("sample", left) < least:
            return 0
        # what is left over is for features
        count = min(most, max(least, self.prices.room("sample", 0.7 * left if self.pictures else left)))
        return count if count == most else 2 ** (count.bit_length() - 1)

    def _images(self, data: Shaped[Tensor, "b *s"]) -> UInt8[Tensor, "b c h w"]:
        """What a person would see of these samples; of latents, what they decode to, as samples are decoded."""
        if isinstance(self.recipe.codec, Pixels):
            return data
        return self.recipe.codec.decode(self.recipe.codec.encode(data.to(self.device))).cpu()

    def _compared(self, images: UInt8[Tensor, "n c h w"], found: Observation, end: float) -> None:
        """Distance to held-out images, and copies, in features; each once all that it needs has been read."""
        if self.features is None:
            try:
                self.features = Features(self.recipe.evaluate.size, self.device)
            except DitkitError:  # the weights are an extra
                self.pictures = False
                return
            seen = self.features
            again = (lambda ids: seen(self._images(self._mirrored(ids)))) if self.mirrors else None
            self.of_training = Index(self._features_of, len(self.data.train), read_mirrored=again, project=True)
        assert self.of_training is not None
        ids = Rng(self.recipe.seed).some("reference", len(self.data.heldout), _REFERENCE)
        while (done := sum(len(part) for part in self.reference)) < len(ids):
            part = ids[done : done + _AT_ONCE]
            if self.prices.room("feature", end - self.clock()) < len(part) and "feature" in self.prices.seconds:
                return
            with self.prices.measure("feature", len(part)):
                self.reference.append(self.features(self._images(self.data.heldout.batch(part).data)))
        if self.prices.room("feature", end - self.clock()) < len(images):
            return
        with self.prices.measure("feature", len(images)):
            features = self.features(images)
        if len(ids) >= 10:
            distance = kernel_distance(features, torch.cat(self.reference))
            found.row |= {"kid": distance.value, "kid_error": distance.error}
        self._read_more(self.of_training, "feature of training", end, 1.0)
        if self.of_training.complete and len(self.of_training) >= 2:
            if "features" not in self.floor:
                self.floor["features"] = _floor(self.of_training, self.reference)
            copied = self.of_training.nearest(features).copied
            found.row |= _shares("_features", copied, self.floor["features"])

    def _features_of(self, ids: Int[Tensor, "b"]) -> tuple[Shaped[Tensor, "b *s"], Float[Tensor, "b d"]]:
        assert self.features is not None
        data = self.data.train.batch(ids).data
        return data, self.features(self._images(data))


def _floor(index: Index, heldout: list[Float[Tensor, "b d"]]) -> FMem:
    """The share of held-out samples that seem copied; 0 where there are none."""
    return share_of(index.nearest(torch.cat(heldout)[:_FLOOR]).copied) if heldout else FMem(0.0, 0.0, 0.0, 0.0, 0)


def _shares(name: str, copied: Bool[Tensor, "n"], floor: FMem) -> dict[str, Any]:
    """f_mem with its interval, and the floor with its upper end and the number of held-out samples it is of."""
    share = share_of(copied)
    return {
        f"f_mem{name}": share.value,
        f"f_mem{name}_low": share.low,
        f"f_mem{name}_high": share.high,
        f"floor{name}": floor.value,
        f"floor{name}_high": floor.high,
        f"floor{name}_samples": floor.samples,
    }


def _interval(
    values: Float[Tensor, "m"], probe: Int[Tensor, "m"], count: int, resamples: int = 1000
) -> tuple[float, float]:
    """The bootstrap's 95% interval of the mean of paired differences; what is drawn again are the probes, each with all
    of its differences."""
    sums = torch.zeros(count, dtype=torch.float64).index_add(0, probe, values)
    sizes = torch.zeros(count, dtype=torch.float64).index_add(0, probe, torch.ones_like(values))
    chosen = torch.randint(count, (resamples, count), generator=Rng(0).generator("bootstrap"))
    return percentiles(sums[chosen].sum(1) / sizes[chosen].sum(1).clamp(min=1))
