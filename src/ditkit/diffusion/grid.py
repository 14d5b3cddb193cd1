"""Grids: the decreasing times that a sampler visits, from 1 (noise) to 0 (data), as pure functions.

`grid(n, path, length)` returns n + 1 times; `length` is the number of tokens, for grids that depend on resolution.
"""

from __future__ import annotations

from collections.abc import Callable

from ..config import DitkitError, register_name
from .path import DDPM, Path

__all__ = ["Grid", "ddpm", "ddpm_integer", "uniform"]

Grid = Callable[[int, Path, int], tuple[float, ...]]


def uniform(n: int, path: Path, length: int) -> tuple[float, ...]:
    """Equal steps (JiT, SiT)."""
    _at_least_one(n)
    return tuple(1 - i / n for i in range(n + 1))


def ddpm(n: int, path: Path, length: int) -> tuple[float, ...]:
    """The respacing of DiT's "250": n entries of the table with a fractional stride, both ends kept.

    Raises DitkitError without a DDPM path or for more steps than the table has.
    """
    steps = _table(n, path)
    stride = (steps - 1) / (n - 1) if n > 1 else 1.0
    kept, position = [], 0.0
    for _ in range(n):  # summed, not multiplied, and rounded half to even: the published indices depend on it
        kept.append(round(position))
        position += stride
    return _descending(kept, steps)


def ddpm_integer(n: int, path: Path, length: int) -> tuple[float, ...]:
    """The respacing "ddimN": the smallest whole stride that keeps exactly n entries, starting from the cleanest.

    Raises DitkitError if no whole stride gives n.
    """
    steps = _table(n, path)
    for stride in range(1, steps + 1):
        kept = range(0, steps, stride)
        if len(kept) == n:
            return _descending(kept, steps)
    raise DitkitError(f"no whole stride through {steps} steps keeps exactly {n}: use the grid 'ddpm'")


def _descending(kept: list[int] | range, steps: int) -> tuple[float, ...]:
    return (*((i + 1) / steps for i in reversed(kept)), 0.0)


def _table(n: int, path: Path) -> int:
    _at_least_one(n)
    if not isinstance(path, DDPM):
        raise DitkitError("a DDPM grid needs a DDPM path: use the grid 'uniform'")
    if n > path.steps:
        raise DitkitError(f"{n} steps were asked of a path of {path.steps}: use fewer steps")
    return path.steps


def _at_least_one(n: int) -> None:
    if n < 1:
        raise DitkitError(f"sampling takes at least 1 step, not {n}")


for _grid in (uniform, ddpm, ddpm_integer):
    register_name("grid", _grid.__name__, _grid)
