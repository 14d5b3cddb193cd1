"""Generated images from files, in the form of the images that a model was trained on."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from ..config import DitkitError
from .sources import image_files, image_of, images_of

__all__ = ["COLOUR", "Read", "read_images"]

COLOUR = 16
"""The difference of the channels of a pixel, in bytes, up to which it is grey: JPEG rounds."""


@dataclass(frozen=True)
class Read:
    """Images with the names of their files, or their numbers, and how many of them were cropped or scaled."""

    pixels: UInt8[Tensor, "n c h w"]
    names: tuple[str, ...]
    changed: int = 0


def read_images(path: str | Path, shape: tuple[int, ...]) -> Read:
    """All images in and below a folder, cropped and scaled to this shape [c h w] if it is a square, or of a file as
    `images_of` reads it, which have it already. Raises DitkitError for no images, broken ones, those of another size,
    and coloured ones where the shape is grey."""
    channels, height, width = shape
    folder = Path(path).expanduser()
    if not folder.exists():
        raise DitkitError(f"there is no run and there are no images at {path}")
    if folder.is_dir():
        files, side = image_files(folder), height if height == width else None

        def read(file: Path) -> tuple[UInt8[np.ndarray, "c h w"], bool]:
            whole = image_of(file, None, 3)
            if channels == 1 and int(np.ptp(whole, axis=0).max()) > COLOUR:
                raise DitkitError(f"{file} is in colour, and the training images are grey")
            fits = whole.shape[1:] == (height, width)
            return (whole[:channels] if fits else image_of(file, side, channels)), not fits

        with ThreadPoolExecutor() as pool:
            found = list(pool.map(read, files))
        for file, (pixels, _) in zip(files, found, strict=True):
            _check(f"{file} is", pixels.shape, shape)
        names = tuple(str(file.relative_to(folder)) for file in files)
        return Read(torch.from_numpy(np.stack([pixels for pixels, _ in found])), names, sum(c for _, c in found))
    images = images_of(folder)
    pixels = torch.cat(list(images.batches(64)))
    _check(f"{images.source} are", tuple(pixels.shape[1:]), shape)
    return Read(pixels, tuple(map(str, range(len(pixels)))))


def _check(what: str, found: tuple[int, ...], shape: tuple[int, ...]) -> None:
    if found != shape:
        raise DitkitError(
            f"{what} {list(found)}, and the training images are {list(shape)}: read the data as the samples are (such "
            "as --data.resolution 64, if the data can be), or scale the samples"
        )
