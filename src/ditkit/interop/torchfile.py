"""Files of `torch.save`, read as data.

Such a file is a zip of raw storages and of a pickle that says which tensor is which part of which storage. A pickle is
a program for a machine that may call any function by its name. The machine here has the same instructions and calls
nothing: a name stands for a record, or the file is refused. There is no way to an import, a call or an attribute, so
a file can run no code; `torch.load(weights_only=True)`, besides, trusts the sizes that the pickle declares.
"""

from __future__ import annotations

import math
import pickletools
import struct
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config import DitkitError

__all__ = ["Namespace", "StoredTensor", "load_tensors", "read_object"]

_LARGEST_PICKLE = 64 << 20
_DTYPES = {
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
_BROKEN = (
    zipfile.BadZipFile, OSError, ValueError, TypeError, KeyError, IndexError, AttributeError, EOFError, RuntimeError,
    NotImplementedError, OverflowError, MemoryError, RecursionError, struct.error,
)  # fmt: skip


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies in the file: storage `key` of `count` numbers, and the part of it that the tensor is."""

    key: str
    dtype: torch.dtype
    count: int
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


class Namespace(dict[str, Any]):
    """What was an argparse.Namespace, as a dict."""


def read_object(path: Path) -> Any:
    """The object that was saved: dicts, lists, tuples, numbers, strings, `StoredTensor` and `Namespace`.

    Raises DitkitError for a file that is damaged, compressed, or asks for anything else.
    """
    try:
        with _archive(path) as archive:
            folder = _folder(archive, path)
            info = archive.getinfo(f"{folder}data.pkl")
            if info.file_size > _LARGEST_PICKLE:
                raise DitkitError(f"{path}: its table of contents of {info.file_size} bytes is no checkpoint's")
            order = f"{folder}byteorder"
            if order in archive.namelist() and archive.read(order) != b"little":
                raise DitkitError(f"{path} was written by a big-endian machine, which is not supported")
            saved = _run(archive.read(info), path)
            sizes = {i.filename.removeprefix(f"{folder}data/"): i.file_size for i in archive.infolist()}
    except DitkitError:
        raise
    except _BROKEN as error:
        raise _damaged(path, error) from None
    for stored in _tensors(saved):
        _check(stored, sizes, path)
    return saved


def load_tensors(path: Path, wanted: Mapping[str, StoredTensor]) -> dict[str, Tensor]:
    """The tensors of `read_object`. Raises DitkitError for a damaged file."""
    storages: dict[str, Tensor] = {}
    found = {}
    try:
        with _archive(path) as archive:
            folder = _folder(archive, path)
            for name, stored in wanted.items():
                if stored.key not in storages:
                    raw = bytearray(archive.read(f"{folder}data/{stored.key}"))  # the zip's checksum is verified
                    empty = torch.empty(0, dtype=stored.dtype)
                    storages[stored.key] = torch.frombuffer(raw, dtype=stored.dtype) if raw else empty
                found[name] = storages[stored.key].as_strided(stored.shape, stored.stride, stored.offset)
    except _BROKEN as error:
        raise _damaged(path, error) from None
    return found


def _damaged(path: Path, error: BaseException) -> DitkitError:
    said = ascii(str(getattr(error, "strerror", None) or error))[1:-1] or type(error).__name__
    said = said if len(said) <= 160 else f"{said[:160]}..."  # some errors quote the file itself
    return DitkitError(f"{path} is damaged or no file of torch.save: {said}; get it again")


def _archive(path: Path) -> zipfile.ZipFile:
    """The zip, if what it declares can be true: stored as it is, and no larger than the file."""
    archive = zipfile.ZipFile(path)
    declared = 0
    for info in archive.infolist():
        declared += info.file_size
        if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size or info.flag_bits & 1:
            archive.close()
            raise DitkitError(f"{path}: {info.filename} is compressed or encrypted, which torch.save never does")
    if declared > path.stat().st_size:
        archive.close()
        raise DitkitError(f"{path} declares {declared} bytes of content, and has {path.stat().st_size} in all")
    return archive


def _folder(archive: zipfile.ZipFile, path: Path) -> str:
    """The one folder of the zip, with its slash."""
    found = [name.removesuffix("data.pkl") for name in archive.namelist() if name.count("/") == 1]
    found = [name for name in found if name.endswith("/") and f"{name}data.pkl" in archive.namelist()]
    if len(found) != 1:
        raise DitkitError(f"{path} is a zip, but none of torch.save: it holds no data.pkl")
    return found[0]


def _check(stored: StoredTensor, sizes: Mapping[str, int], path: Path) -> None:
    """Raises DitkitError unless the tensor lies inside its storage, and the storage is as large as declared."""
    whole = (stored.count, stored.offset, *stored.shape, *stored.stride)
    if len(stored.shape) != len(stored.stride) or not all(type(n) is int and n >= 0 for n in whole):
        raise DitkitError(f"{path} is damaged: a tensor of the shape {stored.shape} and the strides {stored.stride}")
    numel = math.prod(stored.shape)
    last = stored.offset + sum((n - 1) * s for n, s in zip(stored.shape, stored.stride, strict=True)) if numel else 0
    actual = sizes.get(stored.key)
    if actual != stored.count * stored.dtype.itemsize or last >= max(stored.count, 1) or numel > stored.count:
        raise DitkitError(
            f"{path} is damaged: a tensor of the shape {stored.shape} does not fit the {actual or 0} bytes of storage "
            f"{stored.key!r}"
        )


def _tensors(saved: Any) -> Iterable[StoredTensor]:
    """All tensors of an object; one that contains itself is walked once."""
    seen, waiting = set(), [saved]
    while waiting:
        value = waiting.pop()
        if isinstance(value, StoredTensor):
            yield value
        elif isinstance(value, dict | list | tuple) and id(value) not in seen:
            seen.add(id(value))
            waiting.extend(value.values() if isinstance(value, dict) else value)


class _Name(str):
    """A name that the pickle would import."""


class _Mark:
    """Where a list of arguments begins on the stack."""


def _run(program: bytes, path: Path) -> Any:
    """Run the pickle on a machine that calls nothing."""
    stack: list[Any] = []
    memo: dict[Any, Any] = {}

    def above() -> list[Any]:
        """What lies above the last mark, which is taken off as well."""
        at = max(i for i, value in enumerate(stack) if isinstance(value, _Mark))
        taken = stack[at + 1 :]
        del stack[at:]
        return taken

    def put(target: Any, items: list[Any]) -> None:
        if not isinstance(target, dict):
            raise ValueError("items were set on what is no dict")
        target.update(zip(items[::2], items[1::2], strict=True))

    for opcode, arg, _ in pickletools.genops(program):
        match opcode.name:
            case "PROTO" | "FRAME":
                pass
            case "STOP":
                break
            case "MARK":
                stack.append(_Mark())
            case "EMPTY_DICT":
                stack.append({})
            case "EMPTY_LIST":
                stack.append([])
            case "EMPTY_TUPLE":
                stack.append(())
            case "NONE" | "NEWTRUE" | "NEWFALSE":
                stack.append({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[opcode.name])
            case (
                "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINFLOAT" | "BINUNICODE" | "SHORT_BINUNICODE"
                | "BINUNICODE8" | "BINBYTES" | "SHORT_BINBYTES"
            ):  # fmt: skip
                stack.append(arg)
            case "BINPUT" | "LONG_BINPUT":
                memo[arg] = stack[-1]
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[arg])
            case "TUPLE":
                stack.append(tuple(above()))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                count = int(opcode.name[-1])
                taken = tuple(stack[len(stack) - count :])
                del stack[len(stack) - count :]
                stack.append(taken)
            case "APPEND":
                value = stack.pop()
                _list(stack[-1]).append(value)
            case "APPENDS":
                taken = above()
                _list(stack[-1]).extend(taken)
            case "SETITEM":
                value, key = stack.pop(), stack.pop()
                put(stack[-1], [key, value])
            case "SETITEMS":
                taken = above()
                put(stack[-1], taken)
            case "GLOBAL" | "STACK_GLOBAL":
                if opcode.name == "STACK_GLOBAL":
                    last, first = stack.pop(), stack.pop()
                    arg = f"{first} {last}"
                stack.append(_known(str(arg).replace(" ", "."), path))
            case "BINPERSID":
                stack.append(_storage(stack.pop()))
            case "REDUCE" | "NEWOBJ":
                args, name = stack.pop(), stack.pop()
                stack.append(_record(name, args))
            case "BUILD":
                state, target = stack.pop(), stack[-1]
                if isinstance(target, Namespace):
                    put(target, [x for pair in dict(state).items() for x in pair])
                elif not isinstance(target, dict | StoredTensor):  # attributes of a state dict say nothing about it
                    raise ValueError("a state was set on what has none")
            case name:
                raise ValueError(f"the instruction {name}, which torch.save does not write")
    if len(stack) != 1:
        raise ValueError("the pickle ends in the middle")
    return stack[0]


def _list(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise ValueError("items were appended to what is no list")
    return value


_PATHS = ("Path", "PosixPath", "WindowsPath", "PurePath", "PurePosixPath", "PureWindowsPath")
_KNOWN = {
    "collections.OrderedDict",
    "torch._utils._rebuild_tensor_v2",
    "torch._utils._rebuild_parameter",
    "torch.Size",
    "torch.device",
    "argparse.Namespace",
    *(f"torch.{name}" for name in _DTYPES),
    *(str(dtype) for dtype in _DTYPES.values()),
    *(f"{module}.{name}" for module in ("pathlib", "pathlib._local") for name in _PATHS),
}


def _known(name: str, path: Path) -> _Name:
    """The name as a word. Raises DitkitError for one that weights do not need."""
    if name not in _KNOWN:
        raise DitkitError(
            f"{path}: its pickle asks for {ascii(name)[1:-1]:.100}, which no file of weights needs; it was not run. If "
            "you trust the file, save its state dict alone with torch.save"
        )
    return _Name(name)


def _storage(pid: Any) -> tuple[str, torch.dtype, int]:
    kind, name, key, _, count = pid
    if kind != "storage" or not isinstance(name, _Name) or not isinstance(key, str) or type(count) is not int:
        raise ValueError(f"a storage described as {pid!r:.200}")
    return key, _DTYPES[name.removeprefix("torch.")], count


def _record(name: Any, args: Any) -> Any:
    """What a call would have made, as data."""
    if not isinstance(name, _Name) or not isinstance(args, tuple):
        raise ValueError("a call of what is no name")
    match str(name):
        case "collections.OrderedDict":
            return dict(*args)
        case "argparse.Namespace":
            return Namespace()
        case "torch._utils._rebuild_tensor_v2":
            (key, dtype, count), offset, shape, stride = args[:4]
            return StoredTensor(key, dtype, count, offset, tuple(shape), tuple(stride))
        case "torch._utils._rebuild_parameter":
            return args[0]
        case "torch.Size":
            return tuple(args[0])
        case "torch.device":
            return ":".join(str(arg) for arg in args)
        case path if path.startswith("pathlib"):
            return "/".join(str(arg) for arg in args)
    raise ValueError(f"a call of {name}")
