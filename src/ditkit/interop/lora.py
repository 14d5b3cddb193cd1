"""Adapters of low rank under the names that a published layout gives the Linears beside which they lie."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config import DitkitError, registered_as
from ..models import ControlConfig, LoRAConfig, adapters, merged
from .dit import DIFFUSERS
from .format import Format, meta
from .source import open_source
from .table import Pair

__all__ = ["adapted", "find_adapters", "read_adapters", "write_adapters"]

_NAME = re.compile(r"(?:transformer\.|base_model\.model\.)?(.+)\.lora_([AB])(?:\.default)?\.weight")
_PREFIX = "transformer."
_ENDS = (".lora_A.weight", ".lora_B.weight")


def write_adapters(form: Format, config: LoRAConfig, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A and B as diffusers' pipelines and peft name them: `transformer.NAME.lora_A.weight`, and lora_B.

    alpha / rank is multiplied into B, for such files need not say it. Where ours is their q, k and v in one, each of
    theirs gets our A and its own rows of B. Raises DitkitError where the layout has no such place.
    """
    table = _table(form, config.base)
    found: dict[str, Tensor] = {}
    for stem, (a, b) in adapters(weights).items():
        pair, b = table[f"{stem}.weight"], b * config.scale
        if pair.how not in ("same", "fused"):
            raise DitkitError(f"{form.title} has no Linear that is ours alone where {stem} is: choose other targets")
        rows = pair.rows(len(b)) if pair.how == "fused" else [len(b)]
        for name, part in zip(pair.theirs, b.split(rows), strict=True):
            stem_there = _PREFIX + name.removesuffix(".weight")
            found[stem_there + _ENDS[0]] = a.clone()
            found[stem_there + _ENDS[1]] = part.clone()
    return found


def read_adapters(form: Format, base: Any, tensors: Mapping[str, Tensor]) -> tuple[LoRAConfig, dict[str, Tensor]]:
    """The inverse: a configuration, and A and B of each of our Linears by their names in it.

    Where ours is their q, k and v in one, and each has an A of its own, ours has all of them: the rank is the sum.
    Raises DitkitError for names that the layout does not have, and for an A without its B.
    """
    given: dict[str, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        if not (match := _NAME.fullmatch(name)):
            raise DitkitError(f"{name[:100]!r} is no adapter of low rank as diffusers and peft name them")
        given.setdefault(match[1], {})[match[2]] = value
    for name, both in given.items():
        if set(both) != {"A", "B"}:
            raise DitkitError(f"the adapter of {name[:100]} has no lora_{'B' if 'A' in both else 'A'}")
    shapes = {key: tuple(value.shape) for key, value in meta(base).state_dict().items()}
    places: dict[str, list[tuple[str, int, int]]] = {}
    taken: set[str] = set()
    for ours, pair in _table(form, base).items():
        if pair.how not in ("same", "fused") or not ours.endswith(".weight"):
            continue
        rows = pair.rows(shapes[ours][0]) if pair.how == "fused" else [shapes[ours][0]]
        start = 0
        for name, count in zip(pair.theirs, rows, strict=True):
            if (stem := name.removesuffix(".weight")) in given:
                places.setdefault(ours.removesuffix(".weight"), []).append((stem, start, count))
                taken.add(stem)
            start += count
    if unknown := sorted(set(given) - taken):
        raise DitkitError(f"{form.title} has no Linear called {unknown[0][:100]}, beside which an adapter lies")
    rank = max(sum(len(given[stem]["A"]) for stem, _, _ in found) for found in places.values())
    result: dict[str, Tensor] = {}
    for ours, found in places.items():
        height, width = shapes[f"{ours}.weight"]
        a, b, first = torch.zeros(rank, width), torch.zeros(height, rank), 0
        for stem, start, count in found:
            own_a, own_b = given[stem]["A"].float(), given[stem]["B"].float()
            if own_a.shape != (len(own_a), width) or own_b.shape != (count, len(own_a)):
                raise DitkitError(
                    f"the adapter of {stem} is {list(own_a.shape)} and {list(own_b.shape)}, and the Linear there takes "
                    f"{width} and gives {count}"
                )
            a[first : first + len(own_a)] = own_a
            b[start : start + count, first : first + len(own_a)] = own_b
            first += len(own_a)
        result |= {f"{ours}.lora_A.default.weight": a, f"{ours}.lora_B.default.weight": b}
    targets = tuple(sorted({name.rpartition(".")[2] for name in places}))
    return LoRAConfig(base, rank, float(rank), targets), result


def find_adapters(
    path: str | Path, formats: Sequence[Format], base: Any
) -> tuple[LoRAConfig, dict[str, Tensor], Format]:
    """The adapters of a file for a network of the configuration `base`: as `read_adapters`, with the layout whose names
    they have, diffusers' first.

    Raises DitkitError, which names the file, for one that holds none, or those of another network.
    """
    source = open_source(path)
    if not source.adapters:
        raise DitkitError(f"{path} holds no adapters of low rank as diffusers and peft name them (NAME.lora_A.weight)")
    forms = [form for form in formats if isinstance(base, form.model) and not form.part]
    if not forms:
        raise DitkitError(f"{path}: no layout is known for a {registered_as(base)[1]}, whose adapters these should be")
    forms.sort(key=lambda form: not (form is DIFFUSERS or form.diffusers))
    tensors = source.read(next(iter(source.groups.values())))
    refusals: list[DitkitError] = []
    for form in forms:
        try:
            return *read_adapters(form, base, tensors), form
        except DitkitError as error:
            refusals.append(error)
    raise DitkitError(f"{path}: {refusals[0]}")


def adapted(
    path: str | Path, formats: Sequence[Format], config: Any, weights: Mapping[str, Tensor], scale: float = 1.0
) -> dict[str, Tensor]:
    """The weights of a network with the adapters of a file: W + scale B A; of a ControlNet, in its base.

    Raises DitkitError as `find_adapters`.
    """
    if isinstance(config, ControlConfig):
        own = {name.removeprefix("base."): value for name, value in weights.items() if name.startswith("base.")}
        made = adapted(path, formats, config.base, own, scale)
        return {**weights, **{f"base.{name}": value for name, value in made.items()}}
    lora, tensors, _ = find_adapters(path, formats, config)
    scaled = {name: scale * value if ".lora_B." in name else value for name, value in tensors.items()}
    return merged(lora, {**weights, **scaled})


def _table(form: Format, base: Any) -> dict[str, Pair]:
    return {pair.ours: pair for pair in form.pairs(meta(base))}
