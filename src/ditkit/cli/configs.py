"""Configurations as words of the command line: NAME FIELD=VALUE ... for each, as in `apg scale=4 eta=0.2`."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from typing import Any, get_origin, get_type_hints

from ..config import DitkitError, from_json, lookup, names, near, said

__all__ = ["guidance_arguments", "guidance_settings", "named", "read", "say"]


def named(kind: str, text: str) -> Any:
    """The configuration that NAME or NAME:VALUE describes; VALUE is the field that its class calls `positional`.

    Raises DitkitError for an unknown name, a value that does not fit, and a name that needs more.
    """
    name, colon, value = text.partition(":")
    cls = lookup(kind, name)
    field: str = getattr(cls, "positional", "")
    if colon and not field:
        raise DitkitError(f"the {kind} {name} takes no value: write {name} instead of {text}")
    if colon and not value:
        raise DitkitError(f"the {kind} {name} needs its {field}: write {name}:{field.upper()}")
    fields = {}
    if colon:
        fields[field] = value if get_type_hints(cls)[field] is str else _value(value)
    missing = [f.name for f in said(cls) if f.name not in fields and _required(f)]
    if missing == [field]:
        raise DitkitError(f"the {kind} {name} needs its {field}: write {name}:{field.upper()}")
    if missing:
        instead = getattr(cls, "instead", f"it needs its {' and '.join(missing)}, which the command line cannot say")
        raise DitkitError(f"the {kind} {name} is not chosen by its name alone: {instead}")
    return from_json({"type": f"{kind}/{name}", **fields}, "the command line")


def _required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def read(kind: str, words: Sequence[str]) -> tuple[Any, ...]:
    """The configurations that the words describe; a word without "=" begins the next. VALUE: a number, a name, or
    several with commas between them. Raises DitkitError, with the near names, for what does not exist or fit."""
    found: list[tuple[str, dict[str, Any]]] = []
    for word in words:
        field, equals, text = word.partition("=")
        if not equals:
            lookup(kind, word)
            found.append((word, {}))
        elif not found:
            raise DitkitError(f"{word} belongs to no {kind}: name one before it ({', '.join(names(kind))})")
        else:
            name, fields = found[-1]
            known = [f.name for f in said(lookup(kind, name))]
            if field not in known:
                raise DitkitError(f"the {kind} {name} has no field {field!r}: {near(field, known)}")
            parts = [_value(part) for part in text.split(",")]
            several = get_origin(get_type_hints(lookup(kind, name))[field]) is tuple or len(parts) > 1
            fields[field] = parts if several else parts[0]
    for name, fields in found:
        for field in said(lookup(kind, name)):
            if _required(field) and field.name not in fields:
                raise DitkitError(f"the {kind} {name} needs a {field.name}, as in: {name} {field.name}=2")
    return from_json([{"type": f"{kind}/{name}", **fields} for name, fields in found], "the command line")


def _value(text: str) -> Any:
    """A number, true, false or null as in JSON; anything else is a name."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        return text
    return value if value is None or isinstance(value, bool | int | float) else text


def guidance_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of commands that sample."""
    parser.add_argument("--guidance", type=float, help="scale of classifier-free guidance, 1 = none")
    parser.add_argument("--interval", type=float, nargs=2, metavar=("LOW", "HIGH"), help="guided where LOW < t < HIGH")
    parser.add_argument(
        "--guides",
        nargs="+",
        metavar="NAME FIELD=VALUE",
        help="other guides, which add up: apg scale=4 skip_layer scale=2 blocks=blocks.2 (docs/guidance.md lists them)",
    )
    parser.add_argument("--autoguide", metavar="RUN", help="guide away from a weaker model, with scale 2")
    parser.add_argument("--finish", nargs="+", metavar="NAME FIELD=VALUE", help="after all guides: rescale phi=0.7")


def say(line: str) -> None:
    """What begins, for a person who waits: on stderr, beside what a command prints."""
    print(f"{line} ...", file=sys.stderr, flush=True)


def guidance_settings(args: argparse.Namespace) -> dict[str, Any]:
    """What was given of these options, as settings of a sampling."""
    settings: dict[str, Any] = {}
    for name in ("guidance", "interval"):
        if getattr(args, name) is not None:
            settings[name] = getattr(args, name)
    words = [*(args.guides or ()), *(("autoguidance", "scale=2", f"weaker={args.autoguide}") if args.autoguide else ())]
    if words:
        settings["guides"] = read("guide", words)
    if args.finish:
        found = read("finish", args.finish)
        if len(found) != 1:
            raise DitkitError(f"--finish takes one name, not {len(found)}")
        settings["finish"] = found[0]
    return settings
