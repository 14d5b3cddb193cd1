"""Pretrained networks of other libraries, from a folder or by their name on the hub; nothing is fetched unasked."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from .config import DitkitError

__all__ = ["installed", "locate", "pretrained", "tokenizer", "unloadable"]


def installed(package: str) -> Path | None:
    """The folder of an installed package, found without importing it; None if it is missing."""
    spec = importlib.util.find_spec(package)
    return Path(spec.origin).parent if spec is not None and spec.origin else None


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


def pretrained(kind: str, path: str, what: str, extra: str, download: bool, unused: tuple[str, ...] = ()) -> Any:
    """A frozen network of transformers in float32.

    kind: the class that chooses the network's, such as AutoModel. what: for messages, such as "encoder". extra: of
    ditkit, which brings transformers. unused: beginnings of names of tensors that may be missing, as nobody uses them.
    Raises DitkitError without transformers, and for what cannot be loaded or is incomplete.
    """
    # the global generator stays as it was
    with _transformers(path, what, extra, download) as (library, place), torch.random.fork_rng(devices=[]):
        model, found = getattr(library, kind).from_pretrained(
            place,
            local_files_only=not download,
            use_safetensors=True,
            trust_remote_code=False,
            dtype=torch.float32,
            output_loading_info=True,
        )
    absent = [*map(str, found["missing_keys"]), *map(str, found["mismatched_keys"])]  # these would be random
    absent = [name for name in absent if not name.startswith(unused)]
    if absent:
        raise DitkitError(f"the {what} in {path} is incomplete: {min(absent)} is missing, or has another shape")
    return model.eval().requires_grad_(False)


def tokenizer(path: str, what: str, extra: str, download: bool) -> Any:
    """The tokenizer beside a network of transformers. Raises DitkitError as `pretrained`."""
    with _transformers(path, what, extra, download) as (library, place):
        return library.AutoTokenizer.from_pretrained(place, local_files_only=not download, trust_remote_code=False)


@contextmanager
def _transformers(path: str, what: str, extra: str, download: bool) -> Iterator[tuple[Any, str]]:
    """The library, silent, and what it is to be given; what it raises becomes a DitkitError."""
    place = locate(path, what, "transformers")
    try:
        import transformers
        from transformers.utils import logging
    except ImportError:
        raise DitkitError(f"the {what} needs transformers: pip install 'ditkit[{extra}]'") from None
    shown, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield transformers, place
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise unloadable(path, what, download, error) from None
    finally:
        logging.set_verbosity(verbosity)
        if shown:
            logging.enable_progress_bar()
