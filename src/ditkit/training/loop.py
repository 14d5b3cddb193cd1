"""The training loop, and the only one: data, codec, conditioner, objective, optimiser, averages.

Every random number and the order of the data are pure functions of (seed, step, name, position in the stream), and a
checkpoint holds weights, averages, optimiser and the unfinished log row: a run that was killed and resumed is
bit-identical to one that was not.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..averaging import std_name
from ..codecs import Codec, examples
from ..config import DitkitError, NotFinite, differences, to_json
from ..data import Batch, Dataset, InMemory, Order
from ..diffusion import Denoiser, Objective
from ..evaluation import Observer
from ..files import atomic_write
from ..interop import transfer
from ..models import ControlConfig, Model
from ..pipeline import Pipeline, trained
from ..recipe import Recipe, device_of
from ..reconstructions import Reconstructions
from ..rng import Rng
from ..runs import Checkpoint, Run
from ..sheet import rendered, suffix
from ..start import Start, begin_from
from .ema import Averages
from .log import Log
from .signals import signals
from .watch import Watch

__all__ = ["Trainer", "train"]

_MAY_CHANGE = ("train", "sample", "evaluate")
_FIXED = ("train.batch", "train.ema", "train.precision")


def train(recipe: Recipe, folder: str | Path, *, init: str | Path | None = None, quiet: bool = False) -> bool:
    """Train a recipe in a run folder, from its newest checkpoint if there is one. True if all steps are done.

    init: a run, a checkpoint or a published file whose weights a new run begins with; a run that goes on has them.
    False: SIGTERM or Ctrl-C came, a checkpoint was written, and the same call goes on from there. Raises DitkitError
    for data or a combination that cannot work (before anything is written), for a folder that holds another run, and
    when the disk is full; NotFinite for a loss or gradient that is not finite (the last good checkpoint stays).
    """
    data = recipe.data.open()
    if data.skipped:
        shown = "; ".join(data.skipped[:5]) + ("; ..." if len(data.skipped) > 5 else "")
        print(f"skipped {len(data.skipped)} of the samples: {shown}", file=sys.stderr)
    if len(data.train) == 0:
        raise DitkitError(f"{data.name} has no training samples")
    run = Run(folder)
    checkpoint = run.newest() if run.exists() else None
    start = begin_from(init, recipe) if checkpoint is None and init is not None else None
    recipe = _fitted(recipe, data, checkpoint, start)
    if run.exists():
        _same_run(run, recipe)
    elif found := run.foreign():
        raise DitkitError(f"{run.folder} is not empty and holds no run (but {found[0]}): choose another --out")
    begun = run.begun()
    if isinstance(recipe.model, ControlConfig) and checkpoint is None and init is None:
        raise DitkitError("a branch beside a base that nobody trained learns nothing: give the base's run with --init")
    if checkpoint is not None and init is not None and begun.get("init") != str(init):
        raise DitkitError(
            f"{run.folder} began from {begun.get('init', 'no weights')}: leave out --init to go on with it"
        )
    if checkpoint is not None:
        if checkpoint.state.get("data") != data.source:
            raise DitkitError(
                f"the data has changed since {run.folder} was trained: it was {checkpoint.state.get('data')}, it is "
                f"{data.source}; put it back, or begin another run with --out"
            )
        if checkpoint.step > recipe.train.steps:
            raise DitkitError(
                f"{run.folder} has been trained for {checkpoint.step} steps already: give more in --train.steps"
            )
    trainer = Trainer(recipe, data, checkpoint)
    report = trainer.begin(start) if start is not None else {}
    with run.locked():
        if start is not None:  # the checkpoint before the recipe: a run without one would begin from nothing
            checkpoint = Checkpoint(trainer.save(run))
            run.note({"init": str(init), **report})
        run.begin(recipe)
        run.cut_log(trainer.step, recipe.train.log_every)
        run.cut_snapshots(trainer.step)
        return _steps(trainer, run, checkpoint, quiet)


class Trainer:
    """Model, optimiser and averages, and one optimiser step of them."""

    def __init__(self, recipe: Recipe, data: Dataset, checkpoint: Checkpoint | None = None):
        """Before its first step, or as it was at a checkpoint.

        Raises DitkitError for a combination that cannot work, and for a checkpoint that is damaged or of another model.
        """
        settings = recipe.train
        self.recipe, self.data, self.settings = recipe, data, settings
        self.device = device_of(settings.device)
        with torch.device(self.device):
            self.model: Model = recipe.model.build(recipe.seed)
        if checkpoint is None:  # what a checkpoint holds has met them
            self.model.meet(recipe.codec.encode(part.to(self.device)) for part in examples(data.train))
        self.model.train()
        self.denoiser: Denoiser = recipe.denoiser.of(self.model)
        recipe.objective.check(self.denoiser)
        self.objective: Objective = recipe.objective.learn(self.denoiser, Rng(recipe.seed))
        if isinstance(self.objective, nn.Module):
            self.objective.to(self.device)
        self.optimizer = torch.optim.AdamW(
            self.trained().values(),
            lr=settings.lr,
            betas=settings.betas,
            weight_decay=settings.weight_decay,
            fused=True,
        )
        self.averages = Averages(self.model, settings.emas, settings.ema_stds)
        self.rng = Rng(recipe.seed)
        self.order = Order(self.rng, len(data.train))
        self.step = 0
        self._rehearse()
        if settings.compile:
            for name in self.model.plan.shard:
                for block in self.model.get_submodule(name).children():
                    block.compile()
        self.log_state: dict[str, Any] = {"sums": {}, "count": 0, "seconds": 0.0}
        if checkpoint is not None:
            self._restore(checkpoint)

    @torch.no_grad()
    def _rehearse(self) -> None:
        """One loss and one short sampling of two samples: what cannot work is said before anything is written."""
        recipe, ids = self.recipe, torch.arange(2)
        if recipe.sample.ema and recipe.sample.ema not in self.settings.emas:
            raise DitkitError(f"sample.ema is {recipe.sample.ema}, but train.emas are {self.settings.emas}")
        if recipe.sample.ema_std is not None and recipe.sample.ema_std not in self.settings.ema_stds:
            raise DitkitError(
                f"sample.ema_std is {recipe.sample.ema_std}, but train.ema_stds are {self.settings.ema_stds}; "
                "other lengths are made after training: ditkit sample RUN --ema-std"
            )
        self.pipeline().rehearse()
        batch = self.data.train.batch(torch.zeros_like(ids))
        cond = recipe.given(batch.given, self.device)
        data = batch.data.to(self.device)
        x0 = recipe.codec.encode(data)
        self.model.eval()
        rng = self.rng.at(0, ids.to(self.device))
        self.objective.loss(self.denoiser, x0, cond, rng, self._images(data))
        self.model.train()

    def _images(self, data: Tensor) -> Tensor | None:
        """The data before the codec, for objectives that look at it; there is none where it was prepared."""
        return data if self.data.codec is None else None

    def trained(self) -> dict[str, nn.Parameter]:
        """What the optimiser changes, by name: the network, and under "objective/" what the objective learns."""
        own = self.objective.named_parameters() if isinstance(self.objective, nn.Module) else ()
        named = [*self.model.named_parameters(), *((f"objective/{name}", p) for name, p in own)]
        return {name: p for name, p in named if p.requires_grad}

    def begin(self, start: Start) -> dict[str, Any]:
        """Begin from these weights, averages included; what became of them is printed and returned.

        Raises DitkitError for weights of another family, width or depth.
        """
        try:
            became = transfer(start.config, start.weights, self.model)
        except DitkitError as error:
            raise DitkitError(f"{start.origin}: {error}") from None
        for name in self.averages.names:
            self.averages.restore(name, dict(self.model.named_parameters()))
        lines = [f"begins from {start.origin}", *became.lines()]
        if (old := to_json(start.denoiser)) != (new := to_json(self.recipe.denoiser)):
            lines.append("their output meant something else, and learns anew: " + "; ".join(differences(new, old)))
        print("\n".join(lines), file=sys.stderr)
        return {"origin": start.origin, "lines": lines, **became.to_json()}

    def rate(self, step: int) -> float:
        """The learning rate of a step, counted from 0."""
        s = self.settings
        rise = min(1.0, (step + 1) / s.warmup) if s.warmup else 1.0
        fall = min(1.0, (s.steps - step) / s.cooldown) if s.cooldown else 1.0
        return s.lr * min(rise, fall)

    def positions(self, step: int) -> list[Tensor]:
        """Where in the endless stream of the data the parts of a step's batch are."""
        s = self.settings
        return list(torch.arange(step * s.batch, (step + 1) * s.batch).split(s.batch // s.accumulate))

    def read(self, step: int) -> list[tuple[Tensor, Batch]]:
        """The parts of a step's batch, with their positions."""
        parts = []
        for positions in self.positions(step):
            rng = self.rng.at(step, positions)
            parts.append((positions, self.data.train.batch(self.order(positions), rng)))
        return parts

    def advance(self, parts: list[tuple[Tensor, Batch]]) -> tuple[dict[str, float], float, float]:
        """One optimiser step: mean terms of the loss, norm of the gradient, learning rate.

        Raises NotFinite, before the weights change, for a loss or gradient that is not finite.
        """
        recipe, settings, number = self.recipe, self.settings, self.step + 1
        codec: Codec = recipe.codec
        # the one use of the global generator: dropout inside the network, a function of (seed, step) as all else
        torch.manual_seed(self.rng.at(self.step).generator("dropout").initial_seed())
        sums: dict[str, float] = {}
        for positions, batch in parts:
            rng = self.rng.at(self.step, positions.to(self.device))
            data = batch.data.to(self.device)
            x0 = codec.encode(data, rng)
            cond = recipe.given(batch.given, self.device, self.rng.at(self.step, positions))
            with torch.autocast(self.device.type, torch.bfloat16, enabled=settings.precision == "bf16"):
                loss = self.objective.loss(self.denoiser, x0, cond, rng, self._images(data))
            total, share = loss.total.mean(), len(positions) / settings.batch
            value = float(total.detach())
            if not math.isfinite(value):
                raise NotFinite(f"the loss is {value} at step {number}")
            (total * share).backward()
            for name, term in {"loss": loss.total, **loss.terms, **loss.watched}.items():
                sums[name] = sums.get(name, 0.0) + float(term.detach().mean()) * share
        norm = float(torch.nn.utils.clip_grad_norm_(self.trained().values(), settings.clip or math.inf))
        if not math.isfinite(norm):
            raise NotFinite(f"the norm of the gradient is {norm} at step {number}")
        rate = self.rate(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.averages.update(number)
        self.step = number
        return sums, norm, rate

    def pipeline(self) -> Pipeline | Reconstructions:
        """What the network is for, on the averaged weights that sampling uses; it shares their memory."""
        with torch.device("meta"):
            model = self.recipe.model.build()
        model.load_state_dict(self.sampled()[1], assign=True)
        return trained(self.recipe, model, f"step {self.step}")

    def sampled(self) -> tuple[str, dict[str, Tensor]]:
        """The weights that sampling uses, and their name; they go on changing."""
        name = self.recipe.sample.average(self.recipe.train)
        return name, dict(self.model.state_dict()) if name == "model" else self.averages.tensors(name)

    def save(self, run: Run) -> Path:
        """Write a checkpoint of this step. Raises DitkitError if that fails; older ones stay."""
        names: dict[Tensor, str] = {p: name for name, p in self.trained().items()}
        optimizer = {
            f"{key}.{names[p]}": value for p, slots in self.optimizer.state.items() for key, value in slots.items()
        }
        groups: dict[str, Mapping[str, Tensor]] = {"model": self.model.state_dict(), "optimizer": optimizer}
        for name in self.averages.names:
            groups[name] = self.averages.tensors(name)
        if isinstance(self.objective, nn.Module):
            groups["objective"] = self.objective.state_dict()
        groups |= self.codec()
        state = {"log": self.log_state, "data": self.data.source, "torch": torch.__version__}
        return run.save(self.step, to_json(self.recipe), groups, state)

    def codec(self) -> dict[str, Mapping[str, Tensor]]:
        """The group of what the codec has learned, if it has."""
        learned = self.recipe.codec.state()
        return {"codec": learned} if learned else {}

    def snapshot(self, run: Run) -> None:
        """Store the power-function averages of this step, from which those of other lengths are made afterwards."""
        groups: dict[str, Mapping[str, Tensor]] = {
            name: self.averages.tensors(name) for name in map(std_name, self.settings.ema_stds)
        }
        groups |= self.codec()
        run.save(self.step, to_json(self.recipe), groups, {"log": {}}, where="snapshots")

    def _restore(self, checkpoint: Checkpoint) -> None:
        """Become what the checkpoint was. Raises DitkitError if it is damaged or of another model."""
        self.model.load_state_dict(checkpoint.tensors("model"))
        for name in self.averages.names:
            self.averages.restore(name, checkpoint.tensors(name))
        if isinstance(self.objective, nn.Module):
            self.objective.load_state_dict(checkpoint.tensors("objective"))
        slots = checkpoint.tensors("optimizer")
        for name, parameter in self.trained().items():
            found = {key.split(".", 1)[0]: v for key, v in slots.items() if key.split(".", 1)[1] == name}
            if found:
                self.optimizer.state[parameter] = {
                    key: value.to(parameter.device).clone() for key, value in found.items()
                }
        self.step = checkpoint.step
        self.log_state = checkpoint.state["log"]


def _steps(trainer: Trainer, run: Run, saved: Checkpoint | None, quiet: bool) -> bool:
    """Run the remaining steps; True if all are done, False if a signal came."""
    settings, last = trainer.settings, saved.folder if saved else None
    log = Log(
        run.log,
        every=settings.log_every,
        first=trainer.step,
        total=settings.steps,
        tensorboard=settings.tensorboard,
        quiet=quiet,
    )
    log.state = trainer.log_state
    observer = Observer(trainer.recipe, trainer.data, settings.monitor, trainer.objective)
    watch = Watch(run, settings.monitor, observer, trainer.step)
    with log, signals() as asked, ThreadPoolExecutor(1) as reader:
        ahead: Future[Any] | None = None
        while trainer.step < settings.steps and not asked:
            parts = trainer.read(trainer.step) if ahead is None else ahead.result()
            # only what is slow to read is read ahead: tensor operations in a second thread have a second team of OpenMP
            # threads, whose waiting takes the cores from the first
            if trainer.step + 1 < settings.steps and not isinstance(trainer.data.train, InMemory):
                ahead = reader.submit(trainer.read, trainer.step + 1)
            try:
                terms, norm, rate = trainer.advance(parts)
            except NotFinite as error:
                kept = f"the last good checkpoint is {last}" if last else "there is no checkpoint yet"
                raise NotFinite(f"{error}; {kept}; try a lower --train.lr or --train.clip 1") from None
            log.step(trainer.step, settings.batch, {**terms, "grad_norm": norm}, lr=rate)
            done = trainer.step == settings.steps
            if watch.due(trainer.step, done):
                _look(trainer, watch, log, done)
            trainer.log_state = log.state
            # the sheet first: a kill in between then repeats both, and loses neither
            if settings.sample_every and (trainer.step % settings.sample_every == 0 or done):
                _sheet(trainer, run)
            if settings.snapshot_every and trainer.step % settings.snapshot_every == 0:
                trainer.snapshot(run)
            if trainer.step % settings.checkpoint_every == 0 or done:
                last = _save(trainer, run, watch, log)
        if asked and trainer.step < settings.steps:
            _save(trainer, run, watch, log)
            log.say(f"stopped after step {trainer.step}; go on with: ditkit train {run.folder}")
    return trainer.step == settings.steps


def _look(trainer: Trainer, watch: Watch, log: Log, last: bool) -> None:
    """What the network does to its data at this step; the best weights so far are kept."""
    for line in watch.look(trainer.pipeline(), trainer.step, log.seconds, last):
        log.say(line)
    name, weights = trainer.sampled()
    watch.keep(
        {name: weights} | trainer.codec(),
        trainer.step,
        to_json(trainer.recipe),
        {"log": log.state, "data": trainer.data.source},
    )


def _sheet(trainer: Trainer, run: Run) -> None:
    """What the network can do at this step, as a picture or text."""
    samples, columns = trainer.pipeline().sheet(trainer.data)
    kind = suffix(samples)
    atomic_write(run.folder / "samples" / f"step-{trainer.step:08d}{kind}", rendered(samples, kind, columns))


def _fitted(recipe: Recipe, data: Dataset, checkpoint: Checkpoint | None, start: Start | None) -> Recipe:
    """The recipe for the data. A run that goes on has the codec that it began with, and one that begins with the
    weights of a run of the same codec has that, so that its latents mean the same."""
    if checkpoint is not None and (learned := checkpoint.learned(recipe.codec)):
        try:
            recipe.codec.loaded(learned)
        except DitkitError as error:
            raise DitkitError(f"{checkpoint.folder} is of another codec: {error}; choose another --out") from None
        return recipe.fitted(data, learned)
    if start is not None and start.codec is not None and to_json(start.codec) == to_json(recipe.codec):
        return recipe.fitted(data, start.codec.state())
    return recipe.fitted(data)


def _save(trainer: Trainer, run: Run, watch: Watch, log: Log) -> Path:
    """Write a checkpoint and what belongs beside it, and remove what it replaces."""
    log.sync()
    for name, content in trainer.pipeline().files(trainer.data).items():
        atomic_write(run.folder / name, content)
    saved = trainer.save(run)
    run.prune(trainer.settings.keep)
    watch.saved(trainer.step)
    return saved


def _same_run(run: Run, recipe: Recipe) -> None:
    """Raises DitkitError if the folder holds a run that this recipe cannot continue."""
    for change in differences(to_json(run.recipe()), to_json(recipe)):
        name = change.split(" ")[0]
        if name.split(".")[0] not in _MAY_CHANGE or name.startswith(_FIXED):
            raise DitkitError(
                f"{run.folder} holds a run with another recipe: {change}; choose another --out, or go on with "
                f"that run: ditkit train {run.folder}"
            )
