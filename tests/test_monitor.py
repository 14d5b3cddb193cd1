"""The monitor of a training: what it sees in planted cases, what it takes, and that it changes nothing."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ditkit.config import DitkitError
from ditkit.data import Dataset, Digits
from ditkit.data.dataset import InMemory
from ditkit.evaluation import Observer
from ditkit.evaluation.monitor import _interval
from ditkit.evaluation.report import watched
from ditkit.pipeline import Pipeline, load
from ditkit.recipe import Evaluate, Monitor, Recipe, Sample, Train
from ditkit.recipes import digits
from ditkit.report import Picture
from ditkit.runs import Run
from ditkit.training import train
from ditkit.training.watch import Watch

LONG = 1e9
"""Seconds: time for everything."""


def tiny(steps: int = 4, **monitor: Any) -> Recipe:
    recipe = replace(digits(), data=Digits(count=200))
    model = replace(recipe.model, hidden_size=16, depth=1, num_heads=1, bottleneck_dim=4, in_context_start=0)
    settings = Train(
        steps=steps, batch=8, emas=(0.5,), sample_every=0, checkpoint_every=steps, monitor=Monitor(**monitor)
    )
    return replace(recipe, model=model, train=settings, sample=Sample(steps=2, batch=64), evaluate=Evaluate(size=32))


def opened(train: Tensor | None = None, heldout: Tensor | None = None) -> Dataset:
    """Digits; other images instead of some, with the label 0."""
    data = Digits().open()
    if train is None:
        rows = torch.arange(0, len(data.train), 10)
        train = data.train.batch(rows).data
    if heldout is None:
        heldout = data.heldout.batch(torch.arange(0, 1000, 5)).data
    splits = [InMemory(x, torch.zeros(len(x), dtype=torch.long), torch.arange(len(x))) for x in (train, heldout)]
    return replace(data, train=splits[0], heldout=splits[1])


class Planted(Pipeline):
    """A pipeline whose samples are given."""

    def __init__(self, recipe: Recipe, images: Tensor):
        super().__init__(recipe, recipe.model.build(0), recipe.model.shape)
        self.images = images

    def latents(self, label: Any = None, count: int = 16, **settings: Any) -> Iterator[Tensor]:
        for part in self.images[:count].split(64):
            yield self.recipe.codec.encode(part)


def seen(data: Dataset, images: Tensor, **monitor: Any) -> dict[str, Any]:
    """The row of one evaluation with these samples."""
    recipe = tiny(**{"samples": len(images), **monitor}).fitted(data)
    found = Observer(recipe, data, recipe.train.monitor).observe(Planted(recipe, images), 1, LONG)
    assert found is not None
    return found.row


def noisy(images: Tensor, seed: int = 0) -> Tensor:
    noise = 4 * torch.randn(images.shape, generator=torch.Generator().manual_seed(seed))
    return (images + noise).round().clamp(0, 255).to(torch.uint8)


def test_training_images_with_a_little_noise_are_copies_and_others_are_not() -> None:
    data = opened()
    images = data.train.batch(torch.arange(150)).data
    row = seen(data, noisy(images))
    assert row["f_mem"] > 0.95
    assert row["f_mem_low"] > 0.9
    assert seen(data, images)["f_mem_features"] == 1  # noise is not small in features
    others = data.heldout.batch(torch.arange(150)).data
    row = seen(data, others)
    assert row["f_mem"] < 0.01
    assert row["f_mem_features"] < 0.01
    assert row["floor"] < 0.01
    assert (row["indexed"], row["duplicates"]) == (400, 0)
    assert abs(row["kid"]) < 0.2  # held-out images against themselves, as far as 150 of them say


def test_every_image_twice_hides_nothing_and_is_said(tmp_path: Path) -> None:
    images = opened().train.batch(torch.arange(200)).data
    data = opened(torch.cat((images, images)))
    row = seen(data, noisy(images[:100]))
    assert row["f_mem"] > 0.95
    assert (row["indexed"], row["duplicates"]) == (200, 200)
    recipe = tiny(samples=32).fitted(data)
    observer = Observer(recipe, data, recipe.train.monitor)
    watch = Watch(Run(tmp_path), replace(recipe.train.monitor, budget=1e9), observer, 0)
    news = watch.look(Planted(recipe, noisy(images[:32])), 1, 1.0)
    assert any(line.startswith("200 of the training samples are equal to others") for line in news)
    assert any(line.startswith("copies of training samples from step 1") for line in news)
    assert watch.look(Planted(recipe, noisy(images[:32])), 2, 1.0) == []  # once is enough


def test_a_gap_is_one_where_training_and_held_out_samples_differ() -> None:
    plain = seen(opened(), opened().heldout.batch(torch.arange(64)).data)
    assert plain["gap_low"] < 0 < plain["gap_high"]
    assert len(plain["levels"]) == 4
    ends = [level["t"] for level in plain["levels"]]
    assert all(a[1] <= b[0] for a, b in pairwise(ends))
    black = torch.zeros(200, 1, 28, 28, dtype=torch.uint8)
    black[:, 0, 0, :2] = torch.arange(200, dtype=torch.uint8)[:, None]
    apart = seen(opened(heldout=255 - black), black[:64])
    assert apart["gap_high"] < 0 or apart["gap_low"] > 0


@pytest.mark.parametrize(("probes", "levels"), [(2, 0), (8, 1), (17, 2), (100, 7)])
def test_few_losses_are_compared_in_fewer_levels(probes: int, levels: int) -> None:
    """An interval of a few losses would be too narrow, and each is of two draws."""
    row = seen(opened(), opened().heldout.batch(torch.arange(40)).data, probes=probes, levels=7)
    assert [level["t"][0] < level["t"][1] for level in row["levels"]] == [True] * levels


def test_in_bf16_distances_and_features_are_in_float32(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The network alone is in the precision of its training: short vectors that are rounded bound no distance."""
    recipe = tiny(1, budget=1e9, samples=32, probes=32)
    looked: list[Observer] = []
    observe = Observer.observe
    monkeypatch.setattr(Observer, "observe", lambda self, *given: looked.append(self) or observe(self, *given))
    for precision in ("bf16", "fp32"):
        made = replace(recipe, train=replace(recipe.train, precision=precision))
        train(made, tmp_path / precision, quiet=True)
    half, full = looked
    assert half.index is not None
    assert full.index is not None
    assert torch.equal(half.index.rows, full.index.rows)
    assert torch.equal(torch.cat(half.reference), torch.cat(full.reference))
    losses = [Run(tmp_path / name).watched()[0]["train_loss"] for name in ("bf16", "fp32")]
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], rel=0.02)


def test_losses_of_equal_splits_are_equal_and_the_same_each_time() -> None:
    images = opened().train.batch(torch.arange(100)).data
    data = opened(images, images)
    recipe = tiny(probes=100).fitted(data)
    observer = Observer(recipe, data, recipe.train.monitor)
    rows = [observer.observe(Planted(recipe, images[:32]), k, LONG) for k in (1, 2)]
    assert all(found is not None for found in rows)
    first, second = (found.row for found in rows if found is not None)
    assert first["train_loss"] == second["train_loss"]
    # the probes of the two splits are drawn alike, so they are the same images here
    assert (first["train_loss"], first["gap_low"], first["gap_high"]) == (first["heldout_loss"], 0.0, 0.0)


def test_more_noises_of_the_same_probes_are_no_more_probes() -> None:
    gaps, probe = torch.randn(50, generator=torch.Generator().manual_seed(0), dtype=torch.float64), torch.arange(50)
    once = _interval(gaps, probe, 50)
    assert _interval(gaps.repeat(4), probe.repeat(4), 50) == pytest.approx(once)
    assert once[1] - once[0] == pytest.approx(2 * 1.96 * float(gaps.std()) / 50**0.5, rel=0.2)


def test_mirrored_copies_count_where_training_mirrors() -> None:
    data = opened()
    images = data.train.batch(torch.arange(64)).data.flip(-1)
    assert isinstance(data.train, InMemory)
    assert seen(replace(data, train=replace(data.train, flip=True)), images)["f_mem"] > 0.95
    assert seen(data, images)["f_mem"] < 0.2


def test_without_time_nothing_is_looked_at() -> None:
    data = opened()
    recipe = tiny().fitted(data)
    pipeline = Planted(recipe, data.train.batch(torch.arange(64)).data)
    observer = Observer(recipe, data, recipe.train.monitor)
    assert observer.observe(pipeline, 1, 0.0) is None
    assert observer.observe(pipeline, 1, 0.1) is None


def test_when_it_is_due() -> None:
    steps = [step for step in range(1, 70) if Monitor(per_octave=2).due(step)]
    assert steps == [1, 2, 3, 4, 6, 8, 12, 16, 23, 32, 46, 64]


def finished(folder: Path) -> dict[str, bytes]:
    newest = Run(folder).newest()
    assert newest is not None
    return {p.name: p.read_bytes() for p in newest.folder.glob("*.safetensors")}


def test_a_watched_training_is_the_same_training(tmp_path: Path) -> None:
    watched, plain = tmp_path / "watched", tmp_path / "plain"
    train(tiny(6, budget=1e6, samples=32, probes=32), watched, quiet=True)
    train(tiny(6, budget=0.0), plain, quiet=True)
    assert finished(watched) == finished(plain)
    assert not (plain / "monitor.jsonl").exists()
    rows = Run(watched).watched()
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert all(row["f_mem"] == 0 and row["samples"] == 32 for row in rows)
    kept = list((watched / "best").glob("step-*"))
    assert len(kept) == 1
    assert load(kept[0]).sample(count=2).shape == (2, 1, 28, 28)
    assert (watched / "monitor.png").stat().st_size > 500


def test_the_report_of_a_watched_run_shows_what_was_seen(tmp_path: Path) -> None:
    run = Run(tmp_path)
    assert watched(run) is None
    levels = [{"t": [0.0, 0.5], "gap": 0.1, "low": 0.05, "high": 0.2}]
    rows = [
        {"step": step, "train_loss": 0.5, "heldout_loss": 0.6, "levels": levels, "samples": 64, "seconds": 3.25}
        | {"f_mem": f_mem, "f_mem_low": f_mem / 2, "floor": 0.0, "kid": 1.0, "kid_error": 0.1}
        for step, f_mem in ((100, 0.0), (200, 0.1), (400, 0.5))
    ]
    run.monitor.write_text("".join(json.dumps(row) + "\n" for row in rows))
    section = watched(run)
    assert section is not None
    said = [part for part in section.parts if isinstance(part, str)]
    assert any(line.startswith("Copies of training samples from step 200") for line in said)
    assert "3 evaluations took 3.25 seconds of the training." in said
    names = [part.name for part in section.parts if isinstance(part, Picture)]
    assert names == ["monitor-loss.png", "monitor-copies.png", "monitor-kid.png"]


def test_a_run_that_goes_on_drops_the_rows_after_its_checkpoint(tmp_path: Path) -> None:
    recipe = tiny(4, budget=1e6, samples=32, probes=32)
    train(recipe, tmp_path / "run", quiet=True)
    file = tmp_path / "run" / "monitor.jsonl"
    row = json.loads(file.read_text().splitlines()[-1])
    with file.open("a") as log:
        log.write(json.dumps({**row, "step": 7}) + "\n" + '{"step": 8, "cut o')
    (tmp_path / "run" / "best" / "step-00000007").mkdir()
    longer = replace(recipe, train=replace(recipe.train, steps=8, checkpoint_every=8))
    Watch(Run(tmp_path / "run"), recipe.train.monitor, Observer(recipe, opened(), recipe.train.monitor), 4)
    assert all(int(p.name[5:]) <= 4 for p in Run(tmp_path / "run").best())
    train(longer, tmp_path / "run", quiet=True)
    assert [r["step"] for r in Run(tmp_path / "run").watched()] == [1, 2, 3, 4, 5, 6, 7, 8]


class Slow(Planted):
    """On its clock each sample takes two milliseconds, and nothing else any time."""

    now = 0.0

    def latents(self, label: Any = None, count: int = 16, **settings: Any) -> Iterator[Tensor]:
        self.now += 0.002 * count
        yield from super().latents(label, count, **settings)


def test_it_keeps_its_budget(tmp_path: Path) -> None:
    """A training of 1,000 s in steps of 0.1 s, of which a thousandth is the monitor's: 500 samples, all in all."""
    data = opened()
    recipe = tiny(samples=512, probes=64).fitted(data)
    settings = replace(recipe.train.monitor, budget=0.001)
    pipeline = Slow(recipe, data.train.batch(torch.arange(400)).data)
    watch = Watch(Run(tmp_path), settings, Observer(recipe, data, settings, clock=lambda: pipeline.now), 0)
    due = [step for step in range(1, 10_001) if watch.due(step)]
    for step in due:
        watch.look(pipeline, step, 0.1 * step + watch.seconds)
        # the first 32 samples are drawn at a price that is not known yet
        assert watch.seconds <= max(0.001 * 0.1 * step, 32 * 0.002) + 1e-9
    drawn = [(row["step"], row["samples"]) for row in watch.rows if "samples" in row]
    assert drawn[0][1] == 32
    assert 200 < sum(count for _, count in drawn) <= 500
    assert len(watch.rows) < len(due)
    # time for few samples is saved for more of them
    assert all(b >= 2 * a for (a, _), (b, _) in pairwise(drawn))
    assert [count for _, count in drawn] == sorted(count for _, count in drawn)
    assert drawn[-1][1] > 64


class Priced(Observer):
    """On its clock each pair of probes takes ten milliseconds, and nothing else any time."""

    now = 0.0

    def _pairs(self, denoiser: Any, count: int) -> Any:
        self.now += 0.01 * count
        return super()._pairs(denoiser, count)


def test_losses_are_of_no_fewer_probes_than_before() -> None:
    data = opened()
    recipe = tiny(probes=200).fitted(data)
    observer = Priced(recipe, data, recipe.train.monitor, clock=lambda: observer.now)
    pipeline = Planted(recipe, data.train.batch(torch.arange(64)).data)
    rows = [observer.observe(pipeline, step, allowed) for step, allowed in ((1, 3.0), (2, 1.0), (3, 0.7), (4, 9.0))]
    assert [found and found.row.get("probes") for found in rows] == [99, 99, None, 200]


def test_the_last_look_saves_no_time() -> None:
    data = opened()
    recipe = tiny(samples=512, probes=64).fitted(data)
    pipeline = Slow(recipe, data.train.batch(torch.arange(400)).data)
    for last, samples in ((False, None), (True, 64)):
        observer = Observer(recipe, data, recipe.train.monitor, clock=lambda: pipeline.now)
        rows = [observer.observe(pipeline, step, 0.35, end) for step, end in ((10, False), (12, last))]
        assert [found and found.row.get("samples") for found in rows] == [64, samples]


def test_the_best_weights_of_the_last_checkpoint_stay_until_the_next(tmp_path: Path) -> None:
    data = opened()
    recipe = tiny().fitted(data)
    run, observer = Run(tmp_path), Observer(recipe, data, recipe.train.monitor)

    def kept() -> list[int]:
        return [int(path.name[5:]) for path in run.best()]

    def look(watch: Watch, step: int, kid: float) -> None:
        watch.rows.append({"step": step, "kid": kid, "f_mem": 0.0, "f_mem_low": 0.0, "floor": 0.0, "samples": 64})
        watch.keep({"ema": {"weight": torch.zeros(2)}}, step, {}, {"log": {}, "data": ""})

    watch = Watch(run, recipe.train.monitor, observer, 0)
    look(watch, 1, 9.0)
    look(watch, 2, 8.0)
    assert kept() == [2]
    watch.saved(3)
    look(watch, 4, 7.0)
    look(watch, 5, 7.5)
    assert kept() == [2, 4]
    look(watch, 6, 6.0)
    assert kept() == [2, 6]
    Watch(run, recipe.train.monitor, observer, 3)  # killed, and begun again from step 3
    assert kept() == [2]
    look(watch, 7, 5.0)
    watch.saved(8)
    assert kept() == [7]


def test_settings_that_cannot_be() -> None:
    with pytest.raises(DitkitError, match=r"train\.monitor\.budget is a share of the training time, not -1"):
        Monitor(budget=-1)
    with pytest.raises(DitkitError, match=r"train\.monitor\.samples must be at least 1, not 0"):
        Monitor(samples=0)
    with pytest.raises(DitkitError, match=r"train\.monitor cannot be a settings"):
        Train(monitor=Sample())
