"""Generated images from files: a folder of pictures, or an array as the evaluators of the field exchange them."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from ..config import DitkitError
from ..data import Folder

__all__ = ["read_images"]


def read_images(path: str | Path, shape: tuple[int, ...]) -> UInt8[Tensor, "n c h w"]:
    """All images of a folder, cropped and scaled to this shape [c h w], or of a .npz or .npy file, which have it.

    A .npz holds them as `arr_0` [n h w c] (ADM, DiT); a .npy as [n c h w], as `ditkit sample` writes it, or [n h w c].
    Raises DitkitError for no images, and for an array of another size or type.
    """
    channels, height, width = shape
    path = Path(path)
    if path.is_dir():
        split = Folder(str(path), resolution=height, flip=False, holdout=0.0, channels=channels).open().train
        return torch.cat([split.batch(ids).data for ids in torch.arange(len(split)).split(64)])
    if path.suffix not in (".npz", ".npy"):
        what = "does not exist" if not path.exists() else "is neither a folder of images nor a .npz or .npy file"
        raise DitkitError(f"{path} {what}")
    try:
        found = np.load(path, allow_pickle=False)
        array = found["arr_0"] if path.suffix == ".npz" else found
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise DitkitError(f"{path} holds no images: {error}") from None
    if array.ndim == 4 and array.dtype == np.uint8 and len(array):
        if array.shape[1:] == (height, width, channels):
            return torch.from_numpy(np.ascontiguousarray(array.transpose(0, 3, 1, 2)))
        if array.shape[1:] == (channels, height, width):
            return torch.from_numpy(array)
    raise DitkitError(
        f"{path} holds {array.dtype} {list(array.shape)}, and the training images are bytes of "
        f"{height} x {width} pixels and {channels} channels: read the data at the size of the samples "
        "(--data.resolution)"
    )
