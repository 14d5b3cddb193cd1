"""Images to be measured, at their own size and batch by batch: of a folder, an array, a split of a data set, samples.

50,000 images of 256 x 256 are 10 GB: they are gone through and not held.
"""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from ..config import DitkitError
from ..data import Split, Unreadable, evenly, read_image
from ..data.folder import EXTENSIONS

__all__ = ["Images", "has_images", "images_in_memory", "images_of", "images_of_split"]


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
            return [name.removesuffix(".npy") for name in archive.namelist()]
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
        endings = {f".{ending}" for ending in EXTENSIONS}
        files = sorted(p for p in path.rglob("*") if p.suffix.lower() in endings and not p.name.startswith("."))
        if not files:
            raise DitkitError(f"{path} holds no images ({' '.join(EXTENSIONS)})")
        files = files[:most]
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


def _mapped(path: Path) -> np.ndarray:
    """An .npy without its content in memory. Raises DitkitError for what is no uint8 images."""
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise DitkitError(f"{path} is no .npy that can be read: {error}") from None
    if array.dtype != np.uint8 or array.ndim != 4 or array.shape[1] not in (1, 3) or not len(array):
        raise DitkitError(f"{path} must be uint8 images [n, 1 or 3, h, w], not {array.dtype} {list(array.shape)}")
    return array


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
            try:
                read.append(torch.from_numpy(read_image(str(file), None, 3)))
            except Unreadable as error:
                raise DitkitError(f"{file}: {error}") from None
            shape = shape or read[-1].shape
            if read[-1].shape != shape:
                sizes = [f"{h} x {w}" for _, h, w in (shape, read[-1].shape)]
                raise DitkitError(
                    f"{file} has {sizes[1]} pixels and {files[0].name} {sizes[0]}: give images of one size"
                )
        yield torch.stack(read)


class _array:
    """arr_0 of an .npz, opened: its shape, and what reads its bytes. Raises DitkitError for what is no uint8 images."""

    def __init__(self, path: Path):
        self.path = path

    def __enter__(self) -> tuple[tuple[int, ...], IO[bytes]]:
        self.archive = zipfile.ZipFile(self.path)
        file = self.archive.open("arr_0.npy")
        try:
            version = np.lib.format.read_magic(file)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, by_columns, dtype = read(file)
        except ValueError as error:
            raise DitkitError(f"{self.path}: arr_0 cannot be read: {error}") from None
        if dtype != np.uint8 or by_columns or len(shape) != 4 or shape[3] not in (1, 3) or not shape[0]:
            raise DitkitError(f"{self.path}: arr_0 must be uint8 images [n, h, w, 1 or 3], not {dtype} {list(shape)}")
        return shape, file

    def __exit__(self, *error: object) -> None:
        self.archive.close()


def _rows(path: Path, count: int, size: int) -> Iterator[Tensor]:
    with _array(path) as (shape, file):
        for first in range(0, count, size):
            n = min(size, count - first)
            content = file.read(n * int(np.prod(shape[1:])))
            images = np.frombuffer(content, np.uint8).reshape(n, *shape[1:])
            yield torch.from_numpy(images.transpose(0, 3, 1, 2).copy())
