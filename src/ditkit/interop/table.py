"""Names of tensors, theirs and ours: one reversible table for each published layout."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..config import DitkitError

__all__ = ["Pair", "Rule", "pairs", "read_table", "their_shapes", "write_table"]


@dataclass(frozen=True)
class Rule:
    """Our name and theirs. `#` is the number of a block, `*` any end of a name; both stand for the same on each side.

    Several of their names: ours is their concatenation (a fused q, k, v). Theirs has a `#` and ours has none: they keep
    a copy in each block. None of theirs: it is not in their files, and `value` computes it from the shape. A `part`:
    theirs is the concatenation of several of ours, of which this is number `part` (their fused q, k, v). rows: those of
    each of several, where they are not equal (q, k, v and an MLP in one). swapped: theirs has its first and second half
    in the other order (scale before shift).
    """

    ours: str
    theirs: tuple[str, ...]
    value: Callable[[tuple[int, ...]], Tensor] | None = None
    part: int | None = None
    rows: tuple[int, ...] = ()
    swapped: bool = False


@dataclass(frozen=True)
class Pair:
    """One of our tensors, and theirs that hold it: `how` is same, swapped, fused, part, copies or computed."""

    ours: str
    theirs: tuple[str, ...]
    how: str
    rule: Rule

    def rows(self, ours: int) -> list[int]:
        """How many rows of ours each of theirs has, where ours is their concatenation."""
        return list(self.rule.rows) or [ours // len(self.theirs)] * len(self.theirs)


def pairs(rules: Iterable[Rule], names: Iterable[str]) -> list[Pair]:
    """What the rules say about all of our names; the first rule that fits counts. Raises KeyError if none does."""
    names = list(names)
    blocks = sorted({int(m[1]) for name in names if (m := re.match(r"blocks\.(\d+)\.", name))})
    return [_pair(tuple(rules), name, blocks) for name in names]


def _pair(rules: tuple[Rule, ...], name: str, blocks: list[int]) -> Pair:
    for rule in rules:
        pattern = re.escape(rule.ours).replace(r"\#", r"(?P<block>\d+)").replace(r"\*", r"(?P<rest>.*)")
        found = re.fullmatch(pattern, name)
        if not found:
            continue
        parts = found.groupdict()
        theirs = tuple(t.replace("*", parts.get("rest", "*")) for t in rule.theirs)
        if "block" in parts:
            theirs = tuple(t.replace("#", parts["block"]) for t in theirs)
        if any("#" in t for t in theirs):
            return Pair(name, tuple(t.replace("#", str(i)) for t in theirs for i in blocks), "copies", rule)
        alone = "swapped" if rule.swapped else "same" if rule.part is None else "part"
        how = "computed" if not theirs else "fused" if len(theirs) > 1 else alone
        return Pair(name, theirs, how, rule)
    raise KeyError(name)


def _shared(table: Iterable[Pair]) -> dict[str, list[str]]:
    """Theirs that are made of parts, each with ours in order."""
    parts: dict[str, list[tuple[int, str]]] = {}
    for pair in table:
        if pair.how == "part":
            assert pair.rule.part is not None
            parts.setdefault(pair.theirs[0], []).append((pair.rule.part, pair.ours))
    return {name: [ours for _, ours in sorted(found)] for name, found in parts.items()}


def their_shapes(table: Sequence[Pair], ours: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """The shapes of their tensors, by name, from those of ours."""
    found: dict[str, tuple[int, ...]] = {}
    for pair in table:
        shape = ours[pair.ours]
        fused = [(rows, *shape[1:]) for rows in pair.rows(shape[0])] if pair.how == "fused" else None
        found |= zip(pair.theirs, fused or [shape] * len(pair.theirs), strict=True)
    for name, parts in _shared(table).items():
        found[name] = (sum(ours[part][0] for part in parts), *ours[parts[0]][1:])
    return found


def _swapped(x: Tensor) -> Tensor:
    first, second = x.chunk(2)
    return torch.cat((second, first))


def read_table(table: Sequence[Pair], tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> dict:
    """Our tensors from theirs; `shapes` are ours. Raises DitkitError where copies in the blocks differ."""
    found: dict[str, Tensor] = {}
    for name, parts in _shared(table).items():
        found |= zip(parts, tensors[name].split([shapes[part][0] for part in parts]), strict=True)
    for pair in table:
        given = [tensors[name] for name in pair.theirs]
        if pair.how == "fused":
            found[pair.ours] = torch.cat(given)
        elif pair.how == "swapped":
            found[pair.ours] = _swapped(given[0])
        elif pair.how == "computed":
            assert pair.rule.value is not None
            found[pair.ours] = pair.rule.value(shapes[pair.ours])
        elif pair.how != "part":
            for name, other in zip(pair.theirs[1:], given[1:], strict=True):
                if not torch.equal(given[0], other):
                    raise DitkitError(
                        f"{name} differs from {pair.theirs[0]}: each block has an embedder of its own there, and here "
                        "all share one; they were trained apart, and cannot be imported"
                    )
            found[pair.ours] = given[0]
    return found


def write_table(table: Sequence[Pair], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Their tensors from ours: the inverse of `read_table`."""
    found = {name: torch.cat([tensors[part] for part in parts]) for name, parts in _shared(table).items()}
    for pair in table:
        ours = tensors[pair.ours]
        if pair.how == "fused":
            found |= zip(pair.theirs, (part.clone() for part in ours.split(pair.rows(len(ours)))), strict=True)
        elif pair.how == "swapped":
            found[pair.theirs[0]] = _swapped(ours)
        elif pair.how == "copies":
            found |= {name: ours.clone() for name in pair.theirs}
        elif pair.how == "same":
            found[pair.theirs[0]] = ours
    return found
