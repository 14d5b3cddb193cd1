"""Generated images from files, in the form of the images that a model was trained on."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from ..config import DitkitError
from .sources import image_files, image_of, images_of

__all__ = ["read_images"]


def read_images(path: str | Path, shape: tuple[int, ...]) -> UInt8[Tensor, "n c h w"]:
    """All images in and below a folder, cropped and scaled to this shape [c h w] if it is a square, or of a file as
    `images_of` reads it, which have it already. Raises DitkitError for no images, broken ones, and those of another
    size."""
    channels, height, width = shape
    folder = Path(path).expanduser()
    if folder.is_dir():
        files, side = image_files(folder), height if height == width else None
        with ThreadPoolExecutor() as pool:
            read = list(pool.map(lambda file: image_of(file, side, channels), files))
        for file, pixels in zip(files, read, strict=True):
            _check(f"{file} is", pixels.shape, shape)
        return torch.from_numpy(np.stack(read))
    found = images_of(folder)
    images = torch.cat(list(found.batches(64)))
    _check(f"{found.source} are", tuple(images.shape[1:]), shape)
    return images


def _check(what: str, found: tuple[int, ...], shape: tuple[int, ...]) -> None:
    if found != shape:
        raise DitkitError(
            f"{what} {list(found)}, and the training images are {list(shape)}: read the data as the samples are "
            "(--data.resolution, --data.channels), or scale the samples"
        )
