"""What the size of a network is: which fields of its configuration are widths and depths, and how they go together."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, TypeVar

from ..config import DitkitError, registered_as

__all__ = ["Sizing", "resized", "size", "width_unit"]

C = TypeVar("C")
HEAD = 4
"""Channels of a head are a multiple of this: rotations by rows and columns take pairs of pairs."""


@dataclass(frozen=True)
class Sizing:
    """The fields that make a network wide and deep; one that a configuration does not have does not count.

    A family that calls them otherwise, or has more of them, declares its own: the class variable `sizing` of its
    configuration.
    """

    width: str = "hidden_size"
    """Channels of the network."""
    wide: tuple[str, ...] = ()
    """Sizes in proportion to the width."""
    heads: tuple[str, ...] = ("num_heads",)
    """Numbers of heads, in proportion to the width: a head keeps its size."""
    divisors: tuple[str, ...] = ()
    """Numbers that divide the width, such as groups of norms."""
    axes: str = "axes"
    """Channels of a head by what they turn with: such heads have no other size."""
    depth: str = "depth"
    """Number of blocks."""
    deep: tuple[str, ...] = ()
    """Other numbers and places of blocks, in proportion to the depth."""
    inside: str = "base"
    """The network that this one adds to: its size is the size."""


def _sizing(config: Any) -> Sizing:
    return getattr(type(config), "sizing", Sizing())


def _core(config: Any) -> Any:
    """The network that has the width and the depth: `config`, or what is inside of it."""
    return getattr(config, _sizing(config).inside, config)


def size(config: Any) -> tuple[int, int]:
    """Width and depth of a network of any family. Raises DitkitError for one that has no one width and depth."""
    core = _core(config)
    if not {_sizing(core).width, _sizing(core).depth} <= _fields(core):
        raise DitkitError(f"the model {registered_as(core)[1]} has no one width and depth that could be changed")
    return getattr(core, _sizing(core).width), getattr(core, _sizing(core).depth)


def _heads(config: Any) -> dict[str, int]:
    return {name: getattr(config, name) for name in _sizing(config).heads if name in _fields(config)}


def _fields(config: Any) -> set[str]:
    return {field.name for field in dataclasses.fields(config)}


def width_unit(config: Any, *, exact: bool) -> int:
    """What a width of the family is a multiple of; with `exact`, so that heads keep their size, otherwise about."""
    core = _core(config)
    sizing, heads = _sizing(core), _heads(core)
    named = sum(getattr(core, sizing.axes, ()))
    units = [2, *(getattr(core, name) or 1 for name in sizing.divisors), named or 1]
    if heads:
        units.append(size(core)[0] // math.gcd(*heads.values()) if exact or named else HEAD)
    return math.lcm(*units)


def resized(config: C, width: int, depth: int) -> C:
    """The network with another width and depth and the same proportions. Raises DitkitError where they do not fit."""
    sizing = _sizing(config)
    old_width, old_depth = size(config)
    changes: dict[str, Any] = {}
    if _core(config) is config:
        changes = {sizing.width: width, sizing.depth: depth}
        changes |= {name: max(1, round(getattr(config, name) * width / old_width)) for name in sizing.wide}
        changes |= {name: _divided(width, old_width / count) for name, count in _heads(config).items()}
    else:
        changes[sizing.inside] = resized(_core(config), width, depth)
    for name in sizing.deep:
        old: Any = getattr(config, name)
        scaled = [round(n * depth / old_depth) for n in (old if isinstance(old, tuple) else (old,))]
        changes[name] = tuple(scaled) if isinstance(old, tuple) else scaled[0]
    return dataclasses.replace(config, **changes)  # type: ignore[type-var]


def _divided(width: int, head: float) -> int:
    """Into how many heads of about `head` channels a width is divided. Raises DitkitError for no such number."""
    fits = [n for n in range(1, width + 1) if width % n == 0 and (width == n * head or width // n % HEAD == 0)]
    best = min(fits, key=lambda n: abs(math.log(width / n / head)), default=1)
    if not 2 / 3 <= width / best / head <= 3 / 2:
        raise DitkitError(f"a width of {width} is not divided into heads of about {head:g} channels")
    return best
