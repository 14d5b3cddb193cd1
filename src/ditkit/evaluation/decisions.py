"""What the rows of a monitor say: since when a network generalises, when the losses part, and when it copies.

Bonnaire et al. 2025 (arXiv 2505.17638): good samples come at a time tau_gen that does not depend on the number n of
training samples, copies at a time tau_mem that grows with n. Between them lies the window in which to stop.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["CONSECUTIVE", "MARGIN", "WITHIN", "Decisions", "decide"]

WITHIN = 0.1
"""Quality this near to its best is as good as the best: a share of it."""
MARGIN = 0.01
"""Copies begin where the lower end of the interval of f_mem is above the upper end of its floor's by this."""
CONSECUTIVE = 3
"""The losses part where they do in so many evaluations, one after the other."""

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Decisions:
    """Steps at which something was first seen; None for what was not (yet)."""

    generalises: int | None
    """The first quality within 10% of the best before `copies`, or within its standard error; None where the first of
    all is: what was never worse says nothing of when it became good."""
    measure: str
    """By what quality is measured: "kid", or "heldout_loss" where there are no features."""
    parted: int | None
    """The first of three evaluations in which the held-out loss is above the training loss at a level of noise, each
    time with the whole interval, by a larger share of it than at the first look, and by more at the third than at the
    first."""
    level: tuple[float, float] | None
    """That level: its times t, from and to; 1 is noise."""
    lowest: int | None
    """The lowest held-out loss: a cautious place to stop."""
    copies: int | None
    """The first f_mem whose interval lies above that of the floor by 1%."""
    best: int | None
    """The best quality before `copies`, among the evaluations in which these were looked for."""
    last: int
    """The last evaluation."""
    searched: int | None
    """The last evaluation with samples."""
    ceiling: float | None
    """No copy among so many samples: f_mem is below 3 over their number (95%). None where copies were seen."""

    def predicted(self, times: float) -> float | None:
        """The step at which copies are to be expected with `times` as many samples: tau_mem grows as n."""
        return None if self.copies is None else self.copies * times

    def lines(self) -> list[str]:
        """The decisions in words, each with its rule."""
        quality = "KID to held-out data" if self.measure == "kid" else "held-out loss"
        said = []
        if self.generalises is not None:
            said.append(f"generalising since step {self.generalises:,} ({quality} within {WITHIN:.0%} of its best)")
        if self.parted is not None and self.level is not None:
            low, high = self.level
            at = f", at t from {low:.2f} to {high:.2f}" if low < high else ""
            said.append(
                f"training and held-out loss part since step {self.parted:,}{at} "
                f"({CONSECUTIVE} evaluations in a row, 95%)"
            )
        if self.lowest is not None and self.lowest < self.last:
            said.append(f"the held-out loss was lowest at step {self.lowest:,}: a cautious place to stop")
        if self.copies is not None:
            said.append(
                f"copies of training samples from step {self.copies:,} (f_mem above its floor by {MARGIN:.0%}, 95%); "
                f"with twice the data to be expected at about step {2 * self.copies:,} (tau_mem ~ n)"
            )
        elif self.ceiling is not None and self.searched is not None:
            said.append(f"no copies up to step {self.searched:,} (f_mem below {self.ceiling:.2%}, 95%)")
        if self.best is not None:
            said.append(f"best in the window: step {self.best:,} ({quality})")
        return said


def decide(rows: Sequence[Row]) -> Decisions:
    """Read the rows of a monitor, in the order of their steps. Raises ValueError where there are none.

    A row has "step", and what was measured of "heldout_loss", "levels" (each "t", "gap", "low", "high"), "kid"
    with "kid_error", and "f_mem" with "f_mem_low", "floor", "floor_high" and "samples".
    """
    if not rows:
        raise ValueError("there are no rows to decide by")
    sampled = [row for row in rows if row.get("f_mem") is not None]
    copies = next((r["step"] for r in sampled if r["f_mem_low"] > r.get("floor_high", r["floor"]) + MARGIN), None)
    losses = _alike([row for row in rows if row.get("heldout_loss") is not None])
    parted, level = _parted(rows)
    # copies have a good quality, too
    before, kid = ([r for r in some if copies is None or r["step"] < copies] for some in (losses, rows))
    kid = [row for row in kid if row.get("kid") is not None]
    measure, judged = ("kid", kid) if kid else ("heldout_loss", before)
    window = [row for row in judged if row.get("f_mem") is not None]
    seen = sampled[-1]["samples"] if sampled and sampled[-1]["f_mem"] == 0 else None
    return Decisions(
        generalises=_generalises(judged, measure),
        measure=measure,
        parted=parted,
        level=level,
        lowest=min(losses, key=lambda row: row["heldout_loss"])["step"] if losses else None,
        copies=copies,
        best=min(window, key=lambda row: row[measure])["step"] if window else None,
        last=rows[-1]["step"],
        searched=sampled[-1]["step"] if sampled else None,
        ceiling=None if seen is None or copies is not None else 3 / seen,
    )


def _alike(rows: Sequence[Row]) -> list[Row]:
    """Those of the most probes: means over other numbers of them do not compare."""
    most = max((row.get("probes", 0) for row in rows), default=0)
    return [row for row in rows if row.get("probes", 0) == most]


def _generalises(rows: Sequence[Row], measure: str) -> int | None:
    """The first row whose quality is as good as the best, if one before it was worse."""
    if not rows:
        return None
    best = min(rows, key=lambda row: row[measure])
    slack = max(WITHIN * abs(best[measure]), best.get(f"{measure}_error") or 0.0)
    first = next(row["step"] for row in rows if row[measure] <= best[measure] + slack)
    return first if first > rows[0]["step"] else None


def _parted(rows: Sequence[Row]) -> tuple[int | None, tuple[float, float] | None]:
    """Where the losses part first, and at which level of noise."""
    having = [row for row in rows if row.get("levels")]
    for first in range(len(having) - CONSECUTIVE + 1):
        some = having[first : first + CONSECUTIVE]
        if len({len(row["levels"]) for row in some}) > 1:  # the settings were changed between them
            continue
        for k, level in enumerate(some[0]["levels"]):
            levels = [row["levels"][k] for row in some]
            begun = _difference(having[0]["levels"], k) if len(having[0]["levels"]) == len(some[0]["levels"]) else 0.0
            apart = all(each["low"] > begun * abs(each.get("train", 0.0)) for each in levels)
            if apart and levels[-1]["gap"] > levels[0]["gap"]:
                return some[0]["step"], (level["t"][0], level["t"][1])
    return None, None


def _difference(levels: Sequence[Row], k: int) -> float:
    """By which share of the training loss the held-out samples are harder at a level, if they are: before anything was
    learned by heart they differ because they are others."""
    train = abs(levels[k].get("train", 0.0))
    return max(0.0, levels[k]["gap"]) / train if train else 0.0
