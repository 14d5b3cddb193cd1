"""Data sets: what can be opened, by name or by folder."""

from __future__ import annotations

import os

from ..config import DitkitError, near
from .dataset import Batch, Dataset, Images, Order, Split
from .digits import Digits
from .folder import Folder

__all__ = ["Batch", "Dataset", "Digits", "Folder", "Images", "Order", "Split", "parse"]


def parse(source: str) -> Digits | Folder:
    """The data that a command line names: "digits", or "folder:PATH" ("~" is the home folder).

    Raises DitkitError for anything else.
    """
    kind, _, path = source.partition(":")
    if source == "digits":
        return Digits()
    if kind == "folder" and path:
        return Folder(path=os.path.expanduser(path))
    if os.path.isdir(os.path.expanduser(source)):
        raise DitkitError(f"unknown data {source!r}: for the images of a folder write folder:{source}")
    raise DitkitError(f"unknown data {source!r}: {near(source, ('digits', 'folder:PATH'))}")
