"""The run folder: what is in it, how it is written so that nothing is ever half there, and how it is read.

recipe.json                     the recipe, fitted to the data
init.json                       the weights it began with, if any, and what became of each tensor
log.jsonl                       one row per `log_every` steps
checkpoints/step-00001000/      model, averages, optimizer .safetensors, codec .safetensors where it learned something,
                                state.json with their sizes and hashes
snapshots/step-00001000/        power-function averages, from which those of other lengths are made; never pruned
samples/step-00001000.png       sample sheets
monitor.jsonl, monitor.png      what the monitor saw: a row for each evaluation; the samples nearest to training samples
best/step-00001000/             averaged weights of the monitor's best evaluation
report.html, report.json, ...   what `ditkit evaluate` writes
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from .averaging import reconstruction, std_name
from .config import DitkitError, registered_as
from .files import TEMPORARY, atomic_write, held, reason, sha256, sync
from .recipe import Recipe

__all__ = ["Checkpoint", "Run", "find_checkpoint", "find_run", "is_run"]

FORMAT = 2
"""The number of what a checkpoint holds and how; 1 = those that have none."""
_CHANGED = {
    "model/ddit": (2, "58941a0", "its rotations turned neighbouring channels, and now they turn the halves of a head"),
}
"""Networks that compute something else with the same weights since a format; the commit, and what it changed."""
LARGEST_RESIDUAL = 0.1
"""The largest share of a profile that may be missing from a combination of others."""


class Checkpoint:
    """One complete checkpoint. Tensors are read when asked for, and checked against the hash in state.json."""

    def __init__(self, folder: Path):
        """Raises DitkitError for no checkpoint, one of another ditkit, and files that are missing or truncated."""
        self.folder = folder
        try:
            self.state: dict[str, Any] = json.loads((folder / "state.json").read_text())
            files = {str(name): (int(size), str(digest)) for name, (size, digest) in self.state["files"].items()}
            self.step, self.log = int(self.state["step"]), dict(self.state["log"])
            model = self.state["recipe"]["model"]
            kind, written = str(model.get("base", model)["type"]), int(self.state.get("format", 1))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise DitkitError(f"{folder} is not a checkpoint: state.json: {reason(error)}") from None
        if written > FORMAT:
            raise DitkitError(f"{folder} is of the format {written} of a newer ditkit, and this one knows {FORMAT}")
        since, commit, why = _CHANGED.get(kind, (0, "", ""))
        if written < since:
            raise DitkitError(
                f"{folder} is a {kind.removeprefix('model/')} of an older ditkit: {why}; train it again (if it was "
                f'trained since commit {commit}, write "format": {since} into its state.json)'
            )
        for name, (size, _) in files.items():
            path = folder / name
            actual = path.stat().st_size if path.exists() else None
            if actual != size:
                found = "is missing" if actual is None else f"has {actual} bytes instead of {size}"
                raise DitkitError(f"the checkpoint {folder} is damaged: {name} {found}; delete it to use an older one")

    @property
    def recipe(self) -> Recipe:
        """The recipe as it was when the checkpoint was written, the codec with what it had learned."""
        recipe = Recipe.from_json(json.dumps(self.state["recipe"]), f"{self.folder / 'state.json'}")
        learned = self.learned(recipe.codec)
        try:
            return replace(recipe, codec=recipe.codec.loaded(learned)) if learned else recipe
        except DitkitError as error:
            raise DitkitError(f"the checkpoint {self.folder} is damaged: its codec: {error}") from None

    def learned(self, codec: Any) -> dict[str, Tensor]:
        """What the codec of this name has learned; empty if it learns nothing, or if the checkpoint has another."""
        if "codec" not in self.groups or self.state["recipe"]["codec"]["type"] != "/".join(registered_as(codec)):
            return {}
        return self.tensors("codec")

    @property
    def emas(self) -> tuple[float, ...]:
        """Decays of the averaged weights that are stored."""
        return tuple(float(n) for n in self._averages() if not n.startswith("std-"))

    @property
    def stds(self) -> tuple[float, ...]:
        """Lengths of the power-function averages that are stored."""
        return tuple(float(n.removeprefix("std-")) for n in self._averages() if n.startswith("std-"))

    def _averages(self) -> list[str]:
        files = self.state["files"]
        return [n.removeprefix("ema-").removesuffix(".safetensors") for n in files if n.startswith("ema-")]

    def average(self, std: float) -> tuple[dict[str, Tensor], str]:
        """The power-function average of any length at this step, and what it was made from.

        One that was tracked is read; another is made from this checkpoint's and the snapshots of its run before it.
        Raises DitkitError if none are stored, or if what is stored cannot come near that length.
        """
        if std in self.stds:
            return self.tensors(std_name(std)), std_name(std)
        if not self.stds:
            raise DitkitError(
                f"{self.folder} holds no power-function averages, from which one of another length could be made: "
                "train with --train.ema-stds 0.05 0.1 --train.snapshot-every STEPS"
            )
        folders = [p for p in Run(self.folder.parent.parent).snapshots() if step_of(p) < self.step]
        stored = [(s, length) for s in (*map(Checkpoint, folders), self) for length in s.stds]
        factors, missing = reconstruction([(s.step, length) for s, length in stored], (self.step, std))
        if missing > LARGEST_RESIDUAL:
            raise DitkitError(
                f"the averages of {self.folder} and the {len(folders)} snapshots before it do not add up to one of the "
                f"length {std}: {missing:.0%} of its profile would be missing; choose a length nearer to {self.stds}, "
                "or train with more snapshots (--train.snapshot-every)"
            )
        total: dict[str, Tensor] = {}
        for (source, length), factor in zip(stored, factors.tolist(), strict=True):
            for key, value in source.tensors(std_name(length)).items():
                part = value.double() * factor
                total[key] = part if key not in total else total[key].add_(part)
        made = {key: value.float() for key, value in total.items()}
        return made, f"{std_name(std)} made from {len(stored)} averages, {missing:.2%} missing"

    @property
    def groups(self) -> tuple[str, ...]:
        """Names for `tensors`."""
        return tuple(n.removesuffix(".safetensors") for n in self.state["files"])

    def chosen(self, recipe: Recipe) -> tuple[dict[str, Tensor], str]:
        """The weights that a recipe samples with, and their name or what they were made from.

        Raises DitkitError for a decay that is not there, and for a length as `average` does.
        """
        sample = recipe.sample
        if sample.ema_std is not None:
            return self.average(sample.ema_std)
        if sample.ema and sample.ema not in self.emas:
            raise DitkitError(f"{self.folder} has averaged weights of the decays {self.emas}, not {sample.ema}")
        name = sample.average(recipe.train)
        return self.tensors(name), name

    def tensors(self, name: str) -> dict[str, Tensor]:
        """The tensors of "model", "ema-0.9999", "optimizer" or "codec". Raises DitkitError for corrupt files."""
        path = self.folder / f"{name}.safetensors"
        if path.name not in self.state["files"]:
            raise DitkitError(f"the checkpoint {self.folder} holds no {path.name}")
        if sha256(path) != self.state["files"][path.name][1]:
            raise DitkitError(
                f"the checkpoint {self.folder} is damaged: {path.name} does not have the content that was written; "
                "delete it to use an older one"
            )
        try:
            return load_file(path)
        except (SafetensorError, OSError) as error:
            raise DitkitError(f"cannot read {path}: {reason(error)}") from None


class Run:
    """A run folder."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)

    @property
    def log(self) -> Path:
        return self.folder / "log.jsonl"

    @property
    def monitor(self) -> Path:
        return self.folder / "monitor.jsonl"

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the run for this process; a kill lets go of it. Raises DitkitError if another process trains it."""
        with held(self.folder / ".lock") as mine:
            if not mine:
                raise DitkitError(f"another process is training {self.folder}: wait for it, or stop it")
            yield

    def foreign(self) -> list[str]:
        """Names in the folder that are neither a run's nor the leftovers of a crash."""
        if not self.folder.exists():
            return []
        if not self.folder.is_dir():
            return [self.folder.name]
        return [p.name for p in self.folder.iterdir() if p.name != ".lock" and not p.name.startswith(TEMPORARY)]

    def exists(self) -> bool:
        """Whether the folder holds a run."""
        return (self.folder / "recipe.json").is_file()

    def recipe(self) -> Recipe:
        """The fitted recipe. Raises DitkitError if the folder holds no run."""
        path = self.folder / "recipe.json"
        if not self.folder.exists():
            raise DitkitError(f"there is no run at {self.folder}")
        try:
            return Recipe.from_json(path.read_text(), str(path))
        except (OSError, UnicodeDecodeError) as error:
            raise DitkitError(f"{self.folder} is not a run: {path.name}: {reason(error)}") from None

    def begin(self, recipe: Recipe) -> None:
        """Make the folder and write the recipe; leftovers of a crash are removed."""
        atomic_write(self.folder / "recipe.json", recipe.to_json())
        for leftover in (p for where in (".", "checkpoints", "snapshots", "best") for p in self._leftovers(where)):
            if leftover.is_dir():
                shutil.rmtree(leftover)
            else:
                leftover.unlink()

    def note(self, begun: Mapping[str, Any]) -> None:
        """Write with which weights the run began, and what became of them."""
        atomic_write(self.folder / "init.json", json.dumps(begun, indent=1) + "\n")

    def begun(self) -> dict[str, Any]:
        """What `note` wrote; empty for a run that began from nothing. Raises DitkitError for a damaged file."""
        path = self.folder / "init.json"
        try:
            return dict(json.loads(path.read_text())) if path.exists() else {}
        except (OSError, ValueError, TypeError) as error:
            raise DitkitError(f"{path} is damaged: {reason(error)}") from None

    def _leftovers(self, where: str) -> list[Path]:
        return list((self.folder / where).glob(f"{TEMPORARY}*"))

    def checkpoints(self) -> list[Path]:
        """Folders of finished checkpoints, oldest first."""
        return self._saved("checkpoints")

    def snapshots(self) -> list[Path]:
        """Folders of finished snapshots of power-function averages, oldest first."""
        return self._saved("snapshots")

    def _saved(self, where: str) -> list[Path]:
        return sorted((self.folder / where).glob("step-*"))

    def newest(self) -> Checkpoint | None:
        """The newest complete checkpoint, None before the first. Raises DitkitError if it is damaged."""
        found = self.checkpoints()
        return Checkpoint(found[-1]) if found else None

    def save(
        self,
        step: int,
        recipe: Mapping[str, Any],
        groups: Mapping[str, Mapping[str, Tensor]],
        state: Mapping[str, Any],
        where: str = "checkpoints",
    ) -> Path:
        """Write a checkpoint, or a snapshot, under a temporary name, fsync everything, rename.

        Raises DitkitError if that fails (a full disk); older checkpoints stay whole and the attempt is removed.
        """
        final = self.folder / where / f"step-{step:08d}"
        if final.exists():
            return final
        temporary = final.with_name(f"{TEMPORARY}{os.getpid()}-{final.name}")
        try:
            temporary.mkdir(parents=True)
            files = {}
            for name, tensors in groups.items():
                path = temporary / f"{name}.safetensors"
                save_file({key: value.detach().contiguous() for key, value in tensors.items()}, path)
                sync(path)
                files[path.name] = (path.stat().st_size, sha256(path))
            content = {"format": FORMAT, "step": step, "files": files, **state, "recipe": recipe}
            atomic_write(temporary / "state.json", json.dumps(content, indent=1) + "\n")
            sync(temporary)
            temporary.rename(final)
            sync(final.parent)
        except (OSError, SafetensorError, DitkitError) as error:
            shutil.rmtree(temporary, ignore_errors=True)
            older = self.checkpoints()
            kept = f"the last good checkpoint is {older[-1]}" if older else "there is no earlier checkpoint"
            raise DitkitError(
                f"cannot write the checkpoint of step {step} in {final.parent}: {reason(error)}; {kept}"
            ) from None
        return final

    def prune(self, keep: int, where: str = "checkpoints") -> None:
        """Remove all but the newest checkpoints, or best weights."""
        _remove(self._saved(where)[:-keep])

    def cut_snapshots(self, step: int) -> None:
        """Remove the snapshots after a step: what comes there next need not be what came there before."""
        _remove([p for p in self.snapshots() if step_of(p) > step])

    def best(self) -> list[Path]:
        """Folders of the monitor's best weights: those of all evaluations last, before them the last checkpoint's."""
        return self._saved("best")

    def cut_best(self, step: int, but: int | None = None) -> None:
        """Remove the best weights after a step, but those of one, as the monitor's rows after it are dropped."""
        _remove([p for p in self.best() if step_of(p) > step and step_of(p) != but])

    def rows(self) -> list[dict[str, Any]]:
        """The log, without a last line that a kill cut off."""
        return _lines(self.log)

    def watched(self) -> list[dict[str, Any]]:
        """What the monitor saw, in the same way."""
        return _lines(self.monitor)

    def cut_log(self, step: int, every: int) -> None:
        """Drop the rows after a step, the short row that ended a run of fewer steps, and a line that a kill cut off."""
        if self.log.exists():
            kept = [json.dumps(row) + "\n" for row in self.rows() if row["step"] <= step and row["step"] % every == 0]
            atomic_write(self.log, "".join(kept))


def _lines(file: Path) -> list[dict[str, Any]]:
    """The rows of a file that has one in each line, up to one that is cut off."""
    rows = []
    if file.exists():
        for line in file.read_text().splitlines():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                break
    return rows


def is_run(folder: Path) -> bool:
    """Whether a folder is a run, or one checkpoint of a run."""
    return folder.is_dir() and ((folder / "recipe.json").exists() or (folder / "state.json").exists())


def step_of(folder: Path) -> int:
    """The step in the name of a checkpoint or snapshot. Raises DitkitError for a name without one."""
    number = folder.name.removeprefix("step-")
    if not number.isdecimal():
        raise DitkitError(f"{folder} is no checkpoint of a run: move it elsewhere")
    return int(number)


def _remove(folders: Iterable[Path]) -> None:
    """Each folder loses its name first, so that it is never half there."""
    for folder in folders:
        doomed = folder.with_name(f"{TEMPORARY}{folder.name}")
        folder.rename(doomed)
        shutil.rmtree(doomed)


def find_checkpoint(path: str | Path) -> Checkpoint:
    """The checkpoint meant by a run folder (its newest) or a checkpoint folder. Raises DitkitError if there is none."""
    folder = Path(path)
    if not folder.exists():
        raise DitkitError(f"there is no run or checkpoint at {folder}")
    if (folder / "state.json").exists() or not (folder / "recipe.json").exists():
        return Checkpoint(folder)
    newest = Run(folder).newest()
    if newest is None:
        raise DitkitError(f"the run {folder} has no checkpoint yet: train it first")
    return newest


def find_run(path: str | Path, ema: float | None = None, ema_std: float | None = None) -> tuple[Checkpoint, Recipe]:
    """The checkpoint meant by a path, and its recipe; of a run, with how to sample and measure as the run has it now.

    ema, ema_std: other averaged weights than the recipe's, by their decay (0 = the weights themselves) or their length.
    """
    checkpoint = find_checkpoint(path)
    recipe = checkpoint.recipe
    if Run(path).exists():  # how to sample and measure may have been changed since the checkpoint
        now = Run(path).recipe()
        recipe = replace(recipe, sample=now.sample, evaluate=now.evaluate)
    if ema is not None or ema_std is not None:
        recipe = replace(recipe, sample=replace(recipe.sample, ema=ema, ema_std=ema_std))
    return checkpoint, recipe
