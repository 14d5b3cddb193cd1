"""Pretrained networks of other libraries, from a folder or by their name on the hub; nothing is fetched unasked."""

from __future__ import annotations

from pathlib import Path

from .config import DitkitError

__all__ = ["locate", "unloadable"]


def locate(path: str, what: str, library: str) -> str:
    """What `from_pretrained` of a library is to be given: a folder that is there, or a name on the hub as it is.

    what: for the message, such as "autoencoder". Raises DitkitError for a folder without config.json.
    """
    local = Path(path).expanduser()
    if (local / "config.json").is_file():
        return str(local)
    if local.exists() or path.startswith((".", "/", "~")):
        raise DitkitError(f"the {what} {path} is no folder of {library}: it holds no config.json")
    return path


def unloadable(path: str, what: str, download: bool, error: Exception) -> DitkitError:
    """The error to raise where a library could not load what `locate` found; says how to fetch what is not here."""
    said = str(error).strip().splitlines() or [type(error).__name__]
    advice = "" if Path(path).expanduser().exists() or download else f"; fetch it once with `hf download {path}`"
    return DitkitError(f"cannot load the {what} {path}: {said[0]}{advice}")
