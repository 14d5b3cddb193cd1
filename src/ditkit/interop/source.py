"""A published file or folder, opened: names, shapes and settings are known, and no number has been read."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..config import DitkitError, near
from .torchfile import Namespace, StoredTensor, load_tensors, read_object

__all__ = ["Entry", "Source", "open_source", "read_json"]

_SAFETENSORS = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class Entry:
    """One tensor of a file, unread."""

    shape: tuple[int, ...]
    dtype: torch.dtype | str
    where: Any = None


Entries = Mapping[str, Entry]


@dataclass(frozen=True)
class Source:
    """groups: sets of weights by the name that the file gives them, "weights" where there is only one.

    args: plain settings that were saved beside. folder: a folder of diffusers, which has its settings in JSON.
    """

    path: Path
    groups: Mapping[str, Entries]
    read: Callable[[Entries], dict[str, Tensor]]
    args: Mapping[str, Any] = field(default_factory=dict)
    folder: Path | None = None

    def group(self, wanted: str | None, preferred: tuple[str, ...]) -> str:
        """The name of the weights to take. Raises DitkitError, with the near names, if they are not there."""
        if wanted is None:
            return next((name for name in preferred if name in self.groups), next(iter(self.groups)))
        if wanted not in self.groups:
            raise DitkitError(f"{self.path} holds no weights {wanted!r}: {near(wanted, self.groups)}")
        return wanted

    @property
    def adapters(self) -> bool:
        """Whether it holds adapters of low rank as diffusers and peft name them."""
        return any(
            name.endswith((".lora_A.weight", ".lora_A.default.weight")) for g in self.groups.values() for name in g
        )

    def settings(self) -> dict[str, Any]:
        """The config.json of the transformer in a folder of diffusers; empty for a file."""
        if self.folder is None:
            return {}
        inner = self.path / "transformer"
        return read_json((inner if inner.is_dir() else self.path) / "config.json")

    def json(self, name: str) -> dict[str, Any]:
        """A JSON file of the folder, such as "scheduler/scheduler_config.json"; empty if it is not there."""
        if self.folder is None or not (self.folder / name).exists():
            return {}
        return read_json(self.folder / name)


def open_source(path: str | Path) -> Source:
    """Open .pt, .pth, .bin (torch.save), .safetensors, or a folder of diffusers (a pipeline's, or its transformer's).

    The kind is told by the content, not by the name. Raises DitkitError for what is none of these, or damaged.
    """
    path = Path(path)
    if not path.exists():
        raise DitkitError(f"there is no file {path}")
    if path.is_dir():
        return _folder(path)
    try:
        with path.open("rb") as file:
            start = file.read(9)
    except OSError as error:
        raise DitkitError(f"cannot read {path}: {error.strerror}") from None
    if start[8:9] == b"{" or path.suffix == ".safetensors":
        entries = _safetensors(path)
        return Source(path, {"weights": entries}, _reader)
    return _torch(path)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises DitkitError."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise DitkitError(f"{path} is not JSON: {getattr(error, 'strerror', None) or error}") from None
    if not isinstance(found, dict):
        raise DitkitError(f"{path} does not hold a JSON object")
    return found


def _reader(entries: Entries) -> dict[str, Tensor]:
    """Tensors of .safetensors files; `where` is the file and the name there."""
    found: dict[str, Tensor] = {}
    for path in dict.fromkeys(entry.where[0] for entry in entries.values()):
        try:
            with safe_open(path, "pt") as file:
                here = {key: entry.where[1] for key, entry in entries.items() if entry.where[0] == path}
                found |= {key: file.get_tensor(name) for key, name in here.items()}
        except (SafetensorError, OSError, ValueError, RuntimeError) as error:
            raise DitkitError(f"cannot read {path}: {error}") from None
    return found


def _safetensors(path: Path) -> dict[str, Entry]:
    """Names and shapes; safetensors itself checks that the header fits the file and that no tensors overlap."""
    try:
        with safe_open(path, "pt") as file:
            slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
            kinds = {key: str(part.get_dtype()) for key, part in slices.items()}
            return {
                key: Entry(tuple(part.get_shape()), _SAFETENSORS.get(kinds[key], kinds[key]), (path, key))
                for key, part in slices.items()
            }
    except (SafetensorError, OSError, ValueError, RuntimeError, MemoryError) as error:
        raise DitkitError(f"{path} is damaged or no .safetensors file: {ascii(str(error))[1:-1]:.160}") from None


def _torch(path: Path) -> Source:
    """Groups of a torch.save file: the state dict itself, or the dicts of tensors that it holds."""
    saved = read_object(path)
    if not isinstance(saved, dict):
        raise DitkitError(f"{path} holds a {type(saved).__name__}, not a dict of tensors")
    groups = {"weights": saved, **saved} if _weights(saved) else saved
    kept = {
        str(name): {key: Entry(t.shape, t.dtype, t) for key, t in group.items()}
        for name, group in groups.items()
        if _weights(group)
    }
    if not kept:
        shown = ", ".join(ascii(key).strip("'")[:60] for key in list(saved)[:6])
        raise DitkitError(f"{path} holds no dict of tensors, only: {shown or 'nothing'}")
    args = saved.get("args", {})
    plain = (int, float, str, bool, type(None))
    args = {str(k): v for k, v in args.items() if isinstance(v, plain)} if isinstance(args, Namespace | dict) else {}

    def read(entries: Entries) -> dict[str, Tensor]:
        return load_tensors(path, {key: entry.where for key, entry in entries.items()})

    return Source(path, kept, read, args)


def _weights(value: Any) -> bool:
    """Whether this is a state dict."""
    if not isinstance(value, dict) or not value:
        return False
    return all(isinstance(key, str) and isinstance(item, StoredTensor) for key, item in value.items())


def _folder(path: Path) -> Source:
    """A folder of diffusers: transformer/config.json with .safetensors, in shards or not, or with .bin beside it; or
    one of Drax: config.json with decoder.safetensors."""
    if (path / "decoder.safetensors").is_file():
        return Source(path, {"weights": _safetensors(path / "decoder.safetensors")}, _reader, folder=path)
    inner = path / "transformer" if (path / "transformer").is_dir() else path
    if not (inner / "config.json").is_file():
        if (path / "recipe.json").is_file() or (path / "state.json").is_file():
            raise DitkitError(f"{path} is a run of ditkit already: use it as it is")
        raise DitkitError(f"{path} is no folder of diffusers: it holds no transformer/config.json")
    base = "diffusion_pytorch_model"
    root = path if inner != path else path.parent
    if (index := inner / f"{base}.safetensors.index.json").is_file():
        named = read_json(index).get("weight_map")
        if not isinstance(named, dict) or not all(isinstance(n, str) and Path(n).name == n for n in named.values()):
            raise DitkitError(f"{index} does not say in which files beside it the tensors are")
        entries: dict[str, Entry] = {}
        for name in sorted(set(named.values())):
            entries |= _safetensors(inner / name)
        if missing := sorted(set(named) - set(entries)):
            raise DitkitError(f"{index} promises {missing[0]}, which {named[missing[0]]} does not hold")
        return Source(path, {"weights": entries}, _reader, folder=root)
    if (single := inner / f"{base}.safetensors").is_file():
        return Source(path, {"weights": _safetensors(single)}, _reader, folder=root)
    if (pickled := inner / f"{base}.bin").is_file():
        old = _torch(pickled)
        return Source(path, old.groups, old.read, folder=root)
    raise DitkitError(f"{inner} holds no {base}.safetensors: get the folder again")
