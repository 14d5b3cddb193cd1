"""Frozen configuration, its JSON form, and the registry that gives names to both.

Every configuration is a frozen dataclass registered as `kind/name` ("model/dit"). Its JSON is a plain object with
that name under "type": a file names registry entries, never import paths, so reading one runs no foreign code.

What a configuration learns of data is a field made by `learned()`. It is no part of what the configuration says: not of
its JSON, its equality or its options, and is stored as tensors beside the weights.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol, TypeVar, Union, get_args, get_origin, get_type_hints, runtime_checkable

__all__ = [
    "DitkitError",
    "NotFinite",
    "differences",
    "from_json",
    "learned",
    "lookup",
    "names",
    "near",
    "register",
    "register_name",
    "registered_as",
    "said",
    "to_json",
]

T = TypeVar("T")


class DitkitError(ValueError):
    """What a person can cause and mend: one line that says what was wrong, where, and what to do."""


class NotFinite(DitkitError):
    """A loss, its gradient or a sample is infinite or not a number: what was asked for is possible, and diverged."""


_entries: dict[str, dict[str, Any]] = {}


def register_name(kind: str, name: str, entry: Any) -> None:
    """Make `entry` known as `kind/name`. Raises if the name is taken."""
    entries = _entries.setdefault(kind, {})
    if name in entries:
        raise ValueError(f"{kind}/{name} is registered twice: {entries[name]} and {entry}")
    entries[name] = entry


def register(kind: str, name: str) -> Callable[[type[T]], type[T]]:
    """Class decorator: a frozen dataclass that JSON files may name as `kind/name`."""

    def decorate(cls: type[T]) -> type[T]:
        if not dataclasses.is_dataclass(cls) or not cls.__dataclass_params__.frozen:  # type: ignore[attr-defined]
            raise TypeError(f"{cls.__name__} must be a frozen dataclass to be registered as {kind}/{name}")
        register_name(kind, name, cls)
        cls._registered_as = f"{kind}/{name}"  # type: ignore[attr-defined]
        return cls

    return decorate


def names(kind: str) -> list[str]:
    """All names registered under a kind, sorted."""
    return sorted(_entries.get(kind, {}))


def near(name: str, known: Iterable[str]) -> str:
    """The end of an error message about an unknown name: the near ones, or all when there are few."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=4, cutoff=0.5)
    if close:
        # beside a name that is nearly right, those that only look a little alike are noise
        likeness = [difflib.SequenceMatcher(None, other, name).ratio() for other in close]
        close = [other for other, ratio in zip(close, likeness, strict=True) if ratio >= 0.75 * likeness[0]]
        return "did you mean " + " or ".join(close) + "?"
    return "known: " + ", ".join(known[:12]) + (", ..." if len(known) > 12 else "")


def lookup(kind: str, name: str) -> Any:
    """The entry registered as `kind/name`. Raises DitkitError that lists the near names."""
    if kind not in _entries:
        raise DitkitError(f"unknown kind {kind!r} of {kind}/{name}: {near(kind, _entries)}")
    entries = _entries[kind]
    if name not in entries:
        raise DitkitError(f"unknown {kind} {name!r}: {near(name, entries)}")
    return entries[name]


def registered_as(config: Any) -> tuple[str, str]:
    """Kind and name of a configuration. Raises TypeError if its class is not registered itself."""
    found = vars(type(config)).get("_registered_as")  # its own name, not that of a parent class
    if found is None:
        raise TypeError(f"{type(config).__name__} is not registered and cannot be saved")
    kind, _, name = found.partition("/")
    return kind, name


def learned() -> Any:
    """A field of a frozen configuration for what it learned of data, tensors by name; None before it has."""
    return dataclasses.field(default=None, repr=False, compare=False, metadata={"learned": True})


def said(config: Any) -> list[dataclasses.Field[Any]]:
    """The fields of a configuration or its class, without what it learned."""
    return [f for f in dataclasses.fields(config) if not f.metadata.get("learned")]


def to_json(value: Any) -> Any:
    """A configuration as JSON values, without what it learned; the inverse of `from_json`."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        kind, name = registered_as(value)
        fields = {f.name: to_json(getattr(value, f.name)) for f in said(value)}
        return {"type": f"{kind}/{name}", **fields}
    if isinstance(value, tuple):
        return [to_json(v) for v in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"a configuration holds numbers, strings, tuples and configurations, not {type(value).__name__}")


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value read from JSON has the type that its field declares."""
    origin, args = get_origin(hint), get_args(hint)
    if hint is Any:
        return True
    if origin in (Union, types.UnionType):
        return any(_fits(value, h) for h in args)
    if origin is tuple:
        if not isinstance(value, tuple):
            return False
        kinds = args[:1] * len(value) if args[-1] is Ellipsis else args
        return len(value) == len(kinds) and all(map(_fits, value, kinds))
    if isinstance(value, bool):
        return hint is bool
    return isinstance(value, (int, float) if hint is float else hint)


@runtime_checkable
class Older(Protocol):
    """A configuration for which an absent field of an older file does not mean its default."""

    @classmethod
    def older(cls, fields: Mapping[str, Any]) -> dict[str, Any]:
        """The fields of a file with those that it was written before."""
        ...


def from_json(value: Any, where: str = "configuration") -> Any:
    """The configuration that a JSON value describes; lists become tuples, absent fields take their defaults, or what
    its class calls `older`.

    Raises DitkitError for an unknown type or field and for a value of the wrong type; `where` names the source.
    """
    if isinstance(value, list):
        return tuple(from_json(v, where) for v in value)
    if not isinstance(value, dict):
        return value
    kind, _, name = str(value.get("type", "")).partition("/")
    if not name:
        raise DitkitError(f'{where}: an object without "type" (such as "model/dit")')
    cls = lookup(kind, name)
    if not isinstance(cls, type):
        raise DitkitError(f"{where}: {kind}/{name} is a name, not a type with fields")
    known = {f.name for f in said(cls)}
    hints = get_type_hints(cls)
    fields = {}
    for key, raw in value.items():
        if key == "type":
            continue
        if key not in known:
            raise DitkitError(f"{where}: {kind}/{name} has no field {key!r}: {near(key, known)}")
        fields[key] = from_json(raw, where)
        if not _fits(fields[key], hints[key]):
            hint = hints[key]
            wanted = hint.__name__ if isinstance(hint, type) else str(hint)
            raise DitkitError(f"{where}: {kind}/{name}.{key} must be {wanted}, not {raw!r}")
    if issubclass(cls, Older):
        fields = cls.older(fields)
    try:
        return cls(**fields)
    except (TypeError, ValueError) as error:
        raise DitkitError(f"{where}: {kind}/{name}: {error}") from None


def differences(old: Any, new: Any, name: str = "") -> list[str]:
    """How two configurations, as JSON values, differ: "model.depth is 4, not 8" for each field."""
    if isinstance(old, dict) and isinstance(new, dict) and old.get("type") == new.get("type"):
        keys = sorted({*old, *new})
        return [d for k in keys for d in differences(old.get(k), new.get(k), f"{name}.{k}" if name else k)]
    if old == new:
        return []
    old, new = (v.get("type") if isinstance(v, dict) else v for v in (old, new))
    return [f"{name} is {old}, not {new}"]
