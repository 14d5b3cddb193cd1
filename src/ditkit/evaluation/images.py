"""Generated images from files, in the form of the images that a model was trained on."""

from __future__ import annotations

from pathlib import Path

import torch
from jaxtyping import UInt8
from torch import Tensor

from ..config import DitkitError
from ..data import Folder
from .sources import images_of

__all__ = ["read_images"]


def read_images(path: str | Path, shape: tuple[int, ...]) -> UInt8[Tensor, "n c h w"]:
    """All images of a folder, cropped and scaled to this shape [c h w], or of a file as `images_of` reads it, which
    have it already. Raises DitkitError for no images, and for those of another size."""
    channels, height, width = shape
    if Path(path).expanduser().is_dir():
        split = Folder(str(path), resolution=height, flip=False, holdout=0.0, channels=channels).open().train
        return torch.cat([split.batch(ids).data for ids in torch.arange(len(split)).split(64)])
    found = images_of(path)
    images = torch.cat(list(found.batches(64)))
    if tuple(images.shape[1:]) != shape:
        raise DitkitError(
            f"{found.source} are {list(images.shape[1:])}, and the training images are {[channels, height, width]}: "
            "read the data at the size of the samples (--data.resolution)"
        )
    return images
