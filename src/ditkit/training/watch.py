"""The monitor of a training: when it looks, for how long, and what it keeps.

monitor.jsonl         one row for each evaluation
monitor.png           the samples nearest to a training sample, each before that one
best/step-00001000/   the averaged weights of the best evaluation before copies begin
"""

from __future__ import annotations

import json
from typing import Any

from ..config import DitkitError
from ..evaluation import Decisions, Observer, decide
from ..files import atomic_write
from ..pipeline import Pipeline
from ..recipe import Monitor
from ..reconstructions import Reconstructions
from ..runs import Run
from ..sheet import rendered

__all__ = ["Watch"]


class Watch:
    """Gives an observer its turns, and never more time than the settings allow.

    What it measures changes no number of the training, and depends on the speed of the machine: an evaluation for which
    there is no time is left out, and one for which there is little draws fewer samples.
    """

    def __init__(self, run: Run, settings: Monitor, observer: Observer, step: int):
        """step: of the checkpoint that the training goes on from; later rows are dropped."""
        self.run, self.settings, self.observer, self.checkpoint = run, settings, observer, step
        self.rows = [row for row in run.watched() if row["step"] <= step]
        if run.monitor.exists():
            atomic_write(run.monitor, "".join(json.dumps(row) + "\n" for row in self.rows))
        run.cut_best(step)
        self.seconds = float(self.rows[-1]["seconds"]) if self.rows else 0.0
        self.said: set[str] = set()

    def due(self, step: int, done: bool = False) -> bool:
        """Whether to look after this step; in the end there is always a look, if there is time for one."""
        return self.settings.budget > 0 and (done or self.settings.due(step))

    def look(self, pipeline: Pipeline | Reconstructions, step: int, elapsed: float, last: bool = False) -> list[str]:
        """Look at the network after a step; what is new is said. elapsed: seconds of training and monitor together."""
        begun = self.observer.clock()
        training = elapsed - self.seconds
        found = self.observer.observe(pipeline, step, self.settings.budget * training - self.seconds, last)
        news: list[str] = []
        if found is not None:
            if found.pairs is not None:
                atomic_write(self.run.folder / "monitor.png", rendered(found.pairs, ".png", 8))
            row = {**found.row, "seconds": round(self.seconds + self.observer.clock() - begun, 3)}
            self.rows.append(row)
            self._write(row)
            decisions = decide(self.rows)
            news = self._news(decisions, row)
        self.seconds += self.observer.clock() - begun
        return news

    def keep(self, weights: dict[str, Any], step: int, recipe: dict[str, Any], state: dict[str, Any]) -> None:
        """Keep the averaged weights of this evaluation if it is the best so far.

        Those of the last checkpoint stay until there is the next: a training that is killed sooner goes on from it.
        """
        begun = self.observer.clock()
        row = self.rows[-1] if self.rows else {}
        if row.get("step") == step and row.get("f_mem") is not None and decide(self.rows).best == step:
            self.run.save(step, recipe, weights, state, where="best")
            self.run.cut_best(self.checkpoint, but=step)
        self.seconds += self.observer.clock() - begun

    def saved(self, step: int) -> None:
        """A checkpoint has been written: only the best weights of all are kept."""
        self.checkpoint = step
        self.run.prune(1, "best")

    def _write(self, row: dict[str, Any]) -> None:
        try:
            with self.run.monitor.open("a") as file:
                file.write(json.dumps(row) + "\n")
        except OSError as error:
            raise DitkitError(f"cannot write {self.run.monitor}: {error.strerror}") from None

    def _news(self, decisions: Decisions, row: dict[str, Any]) -> list[str]:
        """Alarms, once each."""
        news = []
        if decisions.copies is not None and "copies" not in self.said:
            self.said.add("copies")
            news += [line for line in decisions.lines() if line.startswith("copies")]
        if row.get("duplicates") and "duplicates" not in self.said:
            self.said.add("duplicates")
            news.append(
                f"{row['duplicates']:,} of the training samples are equal to others: each is learned as if it were "
                "several, and copied sooner; copies are looked for among the different ones"
            )
        return news
