"""Recipes: plain functions that return a Recipe. Each says its command, its time and what to expect."""

from __future__ import annotations

from collections.abc import Callable

from ..config import DitkitError, near
from ..recipe import Recipe
from .captions import captions, captions_uniform
from .digits import demo, digits
from .folder import folder

__all__ = ["captions", "captions_uniform", "demo", "digits", "find_recipe", "folder"]

_NAMED: dict[str, Callable[[], Recipe]] = {
    "digits": digits,
    "demo": demo,
    "captions": captions,
    "captions_uniform": captions_uniform,
}


def find_recipe(name: str) -> Recipe:
    """The recipe of a name, or of folder:PATH. Raises DitkitError, with the near names, for an unknown one."""
    kind, _, path = name.partition(":")
    if kind == "folder" and path:
        return folder(path)
    if name in _NAMED:
        return _NAMED[name]()
    raise DitkitError(f"unknown recipe {name!r}: {near(name, [*_NAMED, 'folder:PATH'])}")
