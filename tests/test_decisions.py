"""What the rows of a monitor say, on rows whose story is known."""

from __future__ import annotations

from typing import Any

import pytest

from ditkit.evaluation import decide

STEPS = (100, 200, 400, 800, 1600, 3200)
KID = (5.0, 2.0, 1.05, 1.0, 1.02, 1.3)
GAP = (0.0, 0.01, 0.02, 0.05, 0.1, 0.3)  # of the first level; its interval is 0.015 to each side
F_MEM = (0.0, 0.0, 0.0, 0.02, 0.2, 0.7)
LOWER = (0.0, 0.0, 0.0, 0.009, 0.12, 0.6)
HELD = (1.0, 0.6, 0.5, 0.55, 0.7, 1.1)


def rows(**changes: tuple[Any, ...]) -> list[dict[str, Any]]:
    columns = {"kid": KID, "gap": GAP, "f_mem": F_MEM, "f_mem_low": LOWER, "heldout_loss": HELD} | changes
    made = []
    for k, step in enumerate(STEPS):
        row: dict[str, Any] = {name: values[k] for name, values in columns.items()}
        gap = row.pop("gap")
        levels = [
            {"t": [0.0, 0.3], "gap": gap, "low": gap - 0.015, "high": gap + 0.015},
            {"t": [0.3, 1.0], "gap": 0.0, "low": -0.01, "high": 0.01},
        ]
        made.append({"step": step, "levels": levels, "floor": 0.0, "samples": 100, "kid_error": 0.01} | row)
    return made


def test_the_window_and_what_ends_it() -> None:
    found = decide(rows())
    assert (found.generalises, found.measure) == (400, "kid")  # 1.05 is within 10% of 1.0
    assert (found.parted, found.level) == (400, (0.0, 0.3))  # at 200 the interval holds 0
    assert found.lowest == 400
    assert found.copies == 1600  # the lower end at 800, 0.009, is not above the floor by 1%
    assert found.best == 800
    assert found.ceiling is None
    assert found.predicted(4) == 6400
    words = "\n".join(found.lines())
    for said in ("generalising since step 400", "part since step 400", "copies", "step 1,600", "3,200", "step 800"):
        assert said in words


def test_a_higher_floor_moves_the_alarm() -> None:
    assert decide([{**row, "floor": 0.15} for row in rows()]).copies == 3200


def test_without_copies_a_bound_is_said() -> None:
    none = (0.0,) * 6
    found = decide(rows(f_mem=none, f_mem_low=none))
    assert (found.copies, found.ceiling, found.predicted(2)) == (None, 0.03, None)
    assert found.best == 800
    assert "no copies up to step 3,200 (f_mem below 3.00%, 95%)" in found.lines()


def test_a_last_look_without_samples_has_searched_nothing() -> None:
    none = (0.0,) * 6
    some = rows(f_mem=none, f_mem_low=none)
    last = {k: v for k, v in some[-1].items() if k not in ("f_mem", "f_mem_low", "samples", "floor")}
    found = decide([*some[:-1], last])
    assert (found.searched, found.last) == (1600, 3200)
    assert "no copies up to step 1,600 (f_mem below 3.00%, 95%)" in found.lines()


def test_some_copies_that_chance_may_have_made_are_neither_alarm_nor_bound() -> None:
    found = decide(rows(f_mem=(0.0, 0.0, 0.0, 0.01, 0.01, 0.01), f_mem_low=(0.0,) * 6))
    assert (found.copies, found.ceiling) == (None, None)


def test_the_losses_part_only_where_they_part_on() -> None:
    assert decide(rows(gap=(0.05, 0.05, 0.0, 0.05, 0.05, 0.0))).parted is None  # never three in a row
    assert decide(rows(gap=(0.05,) * 6)).parted is None  # always apart, and not growing
    assert decide(rows(gap=(-0.1, -0.2, -0.3, -0.4, -0.5, -0.6))).parted is None


def test_rows_of_other_levels_are_not_compared() -> None:
    """As where a run goes on with other settings."""
    some = rows()
    for row in some[:3]:
        row["levels"] = [{"t": [0.0, 1.0], "gap": 0.1, "low": 0.05, "high": 0.2}, *row["levels"]]
    assert decide(some).parted == 800
    assert decide(some[:5]).parted is None


def test_without_features_quality_is_the_held_out_loss() -> None:
    found = decide([{k: v for k, v in row.items() if k != "kid"} for row in rows()])
    assert (found.generalises, found.measure, found.best) == (400, "heldout_loss", 400)


def test_with_losses_alone() -> None:
    found = decide([{k: v for k, v in r.items() if k in ("step", "heldout_loss", "levels")} for r in rows()])
    assert (found.copies, found.ceiling, found.lowest, found.parted) == (None, None, 400, 400)


def test_nothing_decides_nothing() -> None:
    with pytest.raises(ValueError, match="no rows"):
        decide([])


def test_losses_of_other_numbers_of_probes_are_not_compared() -> None:
    rows = [
        {"step": step, "heldout_loss": loss, "probes": probes}
        for step, loss, probes in ((1, 0.1, 32), (2, 0.5, 256), (4, 0.4, 256), (8, 0.2, 77), (16, 0.45, 256))
    ]
    assert (decide(rows).lowest, decide(rows).generalises) == (4, 4)


def test_what_was_never_worse_is_not_called_generalising() -> None:
    grey = decide(rows(kid=(6.46,) * 6))
    assert grey.generalises is None
    assert grey.best is not None
    assert not any(line.startswith("generalising") for line in grey.lines())


def test_copies_are_no_quality() -> None:
    """KID is the better the more is copied; what counts is what came before."""
    found = decide(rows(kid=(5.0, 2.0, 1.5, 1.0, 0.1, 0.01)))
    assert (found.copies, found.generalises, found.best) == (1600, 800, 800)
    late = decide(rows(kid=(None, None, None, None, 0.1, 0.01)))  # features came after the first copies
    assert (late.measure, late.generalises, late.best) == ("heldout_loss", 400, 400)


def test_the_best_is_where_copies_were_looked_for() -> None:
    looked = (0.0, None, None, 0.0, 0.2, 0.7)
    found = decide(rows(f_mem=looked, kid=(None,) * 6))
    assert (found.measure, found.generalises, found.best) == ("heldout_loss", 400, 800)
