"""Images to be measured, at their own size and batch by batch: of a folder, an array, a split of a data set, samples.

50,000 images of 256 x 256 are 10 GB: they are gone through and not held.
"""

from __future__ import annotations

import hashlib
import tokenize
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from ..config import DitkitError
from ..data import Split, Unreadable, evenly, images_below, read_image
from ..data.folder import EXTENSIONS
from ..files import reason

__all__ = [
    "DAMAGED",
    "Images",
    "has_images",
    "image_files",
    "image_of",
    "images_in_memory",
    "images_of",
    "images_of_split",
]

DAMAGED = (
    OSError, EOFError, KeyError, ValueError, RuntimeError, NotImplementedError, SyntaxError, tokenize.TokenError,
    zlib.error, zipfile.BadZipFile,
)  # fmt: skip
"""What zipfile and numpy raise for files that are cut off, encrypted, or no arrays."""


@dataclass
class Images:
    """So many images of one size that can be gone through again; `source` says for a protocol what they are."""

    source: str
    count: int
    batches: Callable[[int], Iterator[UInt8[Tensor, "b c h w"]]]
    """Called with the number of images in a batch; yields uint8 of 1 or 3 channels."""
    _sha256: str = field(default="", init=False)

    @property
    def sha256(self) -> str:
        """The hash of the pixels in their order, and of the shape of an image; found by one pass and kept."""
        if not self._sha256:
            digest = hashlib.sha256()
            for i, batch in enumerate(self.batches(64)):
                if i == 0:
                    digest.update(str(list(batch.shape[1:])).encode())
                digest.update(batch.contiguous().numpy().tobytes())
            self._sha256 = digest.hexdigest()
        return self._sha256


def has_images(path: Path) -> bool:
    """Whether a path is images rather than a file of statistics: a folder, an .npy, or an .npz with arr_0 and no mu."""
    if path.is_dir() or path.suffix == ".npy":
        return True
    return path.suffix == ".npz" and "arr_0" in (names := _members(path)) and "mu" not in names


def _members(path: Path) -> list[str]:
    """The names of the arrays of an .npz. Raises DitkitError for another file."""
    try:
        with zipfile.ZipFile(path) as archive:
            return [name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")]
    except (OSError, zipfile.BadZipFile) as error:
        raise DitkitError(f"{path} is no .npz that can be read: {error}") from None


def images_of(path: str | Path, most: int | None = None) -> Images:
    """The images of a folder, sorted by path, arr_0 [n h w c] of an .npz, or an .npy [n c h w] as `ditkit sample`
    writes it; at most the first so many.

    Raises DitkitError where there are none, and while they are read for images of different sizes or broken ones.
    """
    path = Path(path).expanduser()
    if most is not None and most < 1:
        raise DitkitError(f"at least 1 image is measured, not {most}")
    if path.is_dir():
        files = image_files(path)[:most]
        return Images(f"{len(files)} images of the folder {path.name}", len(files), lambda size: _files(files, size))
    if path.suffix == ".npz" and path.is_file():
        if "arr_0" not in _members(path):
            raise DitkitError(f"{path} has no arr_0, which samples in an .npz are called")
        with _array(path) as (shape, _):
            count = min(shape[0], shape[0] if most is None else most)
        return Images(f"{count} images of {path.name}", count, lambda size: _rows(path, count, size))
    if path.suffix == ".npy" and path.is_file():
        array = _mapped(path)
        count = min(len(array), len(array) if most is None else most)
        return Images(
            f"{count} images of {path.name}",
            count,
            lambda size: (torch.from_numpy(array[i : min(i + size, count)].copy()) for i in range(0, count, size)),
        )
    raise DitkitError(f"{path} is neither a folder of images nor an .npz with arr_0, nor an .npy")


def image_files(folder: Path) -> list[Path]:
    """The images in and below a folder, sorted by path; links are followed. Raises DitkitError where there are none."""
    try:
        files = sorted(map(Path, images_below(str(folder))))
    except OSError as error:
        raise DitkitError(f"cannot list {error.filename}: {reason(error)}") from None
    if not files:
        raise DitkitError(f"{folder} holds no images ({' '.join(EXTENSIONS)})")
    return files


def image_of(file: Path, resolution: int | None, channels: int) -> UInt8[np.ndarray, "c h w"]:
    """The pixels of an image as `read_image` gives them. Raises DitkitError for a broken one."""
    try:
        return read_image(str(file), resolution, channels)
    except Unreadable as error:
        raise DitkitError(f"{file}: {error}: mend the file, or remove it") from None


def _mapped(path: Path) -> np.ndarray:
    """An .npy without its content in memory. Raises DitkitError for what is no uint8 images."""
    try:
        array = np.lib.format.open_memmap(path, mode="r")
    except DAMAGED as error:
        raise DitkitError(f"{path} is no .npy that can be read: {error}") from None
    _check(f"{path}", array.dtype, array.shape, 1)
    return array


def _check(what: str, dtype: np.dtype[Any], shape: tuple[int, ...], axis: int) -> None:
    """Raises DitkitError for an array that is no uint8 images with 1 or 3 channels on this axis."""
    if len(shape) == 4 and shape[axis] in (1, 3) and dtype == np.uint8 and min(shape) > 0:
        return
    layout = "[n, h, w, 1 or 3]" if axis == 3 else "[n, 1 or 3, h, w]"
    hint = ""
    if len(shape) == 4 and shape[axis] not in (1, 3) and shape[4 - axis] in (1, 3):
        hint = f": save numpy.transpose(images, {(0, 2, 3, 1) if axis == 3 else (0, 3, 1, 2)})"
    elif dtype.kind == "f":
        hint = ": save them as bytes, scaled to 0..255 and rounded"
    raise DitkitError(f"{what} must be uint8 images {layout}, not {dtype} {list(shape)}{hint}")


def images_in_memory(images: UInt8[Tensor, "n c h w"], source: str) -> Images:
    """Samples that are there."""
    return Images(source, len(images), lambda size: iter(images.split(size)))


def images_of_split(split: Split, source: str, most: int | None = None) -> Images:
    """The images of a split in their order, or so many spread evenly over it. Raises DitkitError for no images."""
    count = min(len(split), len(split) if most is None else most)
    if count < 1:
        raise DitkitError(f"there are no images: {source}")
    indices = evenly(split, count)

    def batches(size: int) -> Iterator[Tensor]:
        return (split.batch(part).data for part in indices.split(size))

    return Images(f"{count} images: {source}", count, batches)


def _files(files: list[Path], size: int) -> Iterator[Tensor]:
    shape = None
    for first in range(0, len(files), size):
        read = []
        for file in files[first : first + size]:
            read.append(torch.from_numpy(image_of(file, None, 3)))
            shape = shape or read[-1].shape
            if read[-1].shape != shape:
                sizes = [f"{h} x {w}" for _, h, w in (shape, read[-1].shape)]
                raise DitkitError(
                    f"{file} has {sizes[1]} pixels and {files[0].name} {sizes[0]}: give images of one size"
                )
        yield torch.stack(read)


@contextmanager
def _array(path: Path) -> Iterator[tuple[tuple[int, ...], IO[bytes]]]:
    """arr_0 of an .npz, opened: its shape, and what reads its bytes.

    Raises DitkitError for what is no uint8 images, also where that shows only while it is read.
    """
    try:
        with zipfile.ZipFile(path) as archive, archive.open("arr_0.npy") as file:
            version = np.lib.format.read_magic(file)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, by_columns, dtype = read(file)
            _check(f"{path}: arr_0", dtype, shape, 3)
            if by_columns:
                raise DitkitError(f"{path}: arr_0 is in Fortran's order: save numpy.ascontiguousarray(images)")
            yield shape, file
    except DAMAGED as error:
        if isinstance(error, DitkitError):
            raise
        raise DitkitError(f"{path}: arr_0 cannot be read: {error}") from None


def _rows(path: Path, count: int, size: int) -> Iterator[Tensor]:
    with _array(path) as (shape, file):
        for first in range(0, count, size):
            n = min(size, count - first)
            content = file.read(n * int(np.prod(shape[1:])))
            images = np.frombuffer(content, np.uint8)
            if len(images) != n * int(np.prod(shape[1:])):
                raise DitkitError(f"{path}: arr_0 is cut off: it should hold {shape[0]} images")
            yield torch.from_numpy(images.reshape(n, *shape[1:]).transpose(0, 3, 1, 2).copy())
