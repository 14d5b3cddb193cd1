"""What training says: rows of log.jsonl always, tensorboard when asked, a progress bar for the person."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tqdm import tqdm

from ..config import DitkitError

__all__ = ["WALL_CLOCK", "Log"]

WALL_CLOCK = ("time", "seconds", "samples_per_second")
"""Fields of a row that depend on the machine; all others are the same in every run of a recipe."""


class Log:
    """Collects the terms of each step and writes their means every `every` steps."""

    def __init__(self, path: Path, *, every: int, first: int, total: int, tensorboard: bool, quiet: bool):
        """first, total: steps done so far and in all. Raises DitkitError if tensorboard is asked for and not there."""
        self.every, self.total = every, total
        self.sums: dict[str, float] = {}
        self.count = 0
        self.before, self.begun = 0.0, time.perf_counter()
        self.board = _board(path.parent / "tensorboard", first) if tensorboard else None
        try:
            self.file = path.open("a")
        except OSError as error:
            raise DitkitError(f"cannot write {path}: {error.strerror}") from None
        self.bar = tqdm(total=total, initial=first, unit="step", disable=quiet, dynamic_ncols=True, smoothing=0.05)
        self._since, self._samples = time.perf_counter(), 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.bar.close()
        with contextlib.suppress(OSError):  # a full disk has been said already; closing would try to write again
            self.file.close()
        if self.board is not None:
            self.board.close()

    @property
    def state(self) -> dict[str, Any]:
        """The unfinished row and the seconds of training so far, for a checkpoint."""
        return {"sums": dict(self.sums), "count": self.count, "seconds": self.seconds}

    @state.setter
    def state(self, state: dict[str, Any]) -> None:
        self.sums, self.count, self.before = dict(state["sums"]), state["count"], state["seconds"]

    @property
    def seconds(self) -> float:
        """Time spent on the run, over all its parts."""
        return round(self.before + time.perf_counter() - self.begun, 2)

    def step(self, step: int, samples: int, terms: dict[str, float], **now: float) -> None:
        """After step number `step`: `samples` seen in it, `terms` to be averaged, and values as they are `now`."""
        self._samples += samples
        self.count += 1
        for name, value in terms.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
        self.bar.update()
        last = step == self.total
        if step % self.every and not last:
            return
        speed = self._samples / max(time.perf_counter() - self._since, 1e-9)
        self._since, self._samples = time.perf_counter(), 0
        row = {"step": step, **{name: total / self.count for name, total in self.sums.items()}, **now}
        if step % self.every == 0:  # the short row of a last step is no row for a run that goes on
            self.sums, self.count = {}, 0
        self.bar.set_postfix_str(f"loss {row['loss']:.4f}, {speed:.0f} samples/s")
        try:
            clock = {"samples_per_second": round(speed, 1), "seconds": self.seconds, "time": round(time.time(), 2)}
            self.file.write(json.dumps({**row, **clock}) + "\n")
            self.file.flush()
        except OSError as error:
            raise DitkitError(f"cannot write {self.file.name}: {error.strerror}") from None
        if self.board is not None:
            for name, value in row.items():
                if name != "step":
                    self.board.add_scalar(name, value, step)

    def sync(self) -> None:
        """Make the rows survive a crash of the machine; a checkpoint must not be newer than its log."""
        os.fsync(self.file.fileno())

    def say(self, line: str) -> None:
        """A line above the progress bar; where there is none, among the errors."""
        if self.bar.disable:
            print(line, file=sys.stderr, flush=True)
        else:
            self.bar.write(line)


def _board(folder: Path, first: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise DitkitError("train.tensorboard needs tensorboard: pip install 'ditkit[tensorboard]'") from None
    return SummaryWriter(str(folder), purge_step=first + 1)
