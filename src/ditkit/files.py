"""Files that are written whole or not at all, and the folder for what can be made again."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # Windows has no such lock
    fcntl = None

from safetensors import SafetensorError

from .config import DitkitError

__all__ = ["TEMPORARY", "atomic_write", "cache_folder", "held", "reason", "sha256", "sync"]

TEMPORARY = ".writing-"
"""How the names of files and folders begin that are not finished."""


def sync(path: Path) -> None:
    """Make a file, or the names in a folder, survive a crash of the machine."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: Path) -> str:
    """The hash of a file's content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def reason(error: BaseException) -> str:
    """What went wrong, in a few words."""
    return getattr(error, "strerror", None) or str(error)


def atomic_write(path: Path, content: str | bytes | Callable[[Path], Any]) -> None:
    """Write under a temporary name, fsync, rename: `path` holds the old content or the new, never a part.

    content: what a file is to hold, or a function that makes the file, or the folder, at the path it is given. Raises
    DitkitError if it cannot be written; the old file then stays, and nothing half-written.
    """
    temporary = path.with_name(f"{TEMPORARY}{os.getpid()}-{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if callable(content):
            content(temporary)
        else:
            temporary.write_bytes(content.encode() if isinstance(content, str) else content)
        for file in (*temporary.rglob("*"), temporary):
            sync(file)
        temporary.replace(path)
        sync(path.parent)
    except (OSError, RuntimeError, SafetensorError) as error:  # a full disk, as Python, torch and safetensors say it
        raise DitkitError(f"cannot write {path}: {reason(error)}") from None
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        with contextlib.suppress(OSError):
            temporary.unlink()


@contextlib.contextmanager
def held(path: Path) -> Iterator[bool]:
    """Hold a file for this process, if no other one does: whether it is held. A kill lets go of it.

    Raises DitkitError if the file cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("w")
    except OSError as error:
        raise DitkitError(f"cannot write {path}: {reason(error)}") from None
    with file:
        free = True
        if fcntl is not None:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                free = False
        yield free


def cache_folder(given: str = "") -> Path:
    """Where files are kept that can be made again: `given`, or $DITKIT_CACHE, or the platform's folder for such."""
    chosen = given or os.environ.get("DITKIT_CACHE", "")
    if chosen:
        return Path(chosen).expanduser()
    if sys.platform == "win32":
        local = os.environ.get("LOCALAPPDATA")
        return (Path(local) if local else Path.home() / "AppData" / "Local") / "ditkit" / "cache"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "ditkit"
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "ditkit"  # the XDG rule: else ignored
