"""Many samples as one file that shows them: a picture, a plot, a text."""

from __future__ import annotations

import io
import math

import numpy as np
import torch
from jaxtyping import Float, Shaped, UInt8
from PIL import Image, ImageDraw
from torch import Tensor

from .config import DitkitError
from .data import strings

__all__ = ["SUFFIXES", "beside", "plot", "png", "rendered", "sheet", "suffix"]

SUFFIXES = (".png", ".gif", ".txt", ".npy")


def suffix(samples: Shaped[Tensor, "n *sample"]) -> str:
    """The kind of file that shows such samples: .txt for texts, .png for images, videos and vectors."""
    return ".txt" if _is_text(samples) else ".png"


def rendered(samples: Shaped[Tensor, "n *sample"], kind: str, columns: int | None = None) -> bytes:
    """The samples as the content of a file of this kind.

    .png: a sheet of images, the frames of each video in a row, or a plot of the first two coordinates of vectors. .gif:
    a sheet of videos that move. .txt: texts, one in a line. .npy: the
    numbers themselves. Raises DitkitError for samples that cannot be shown so.
    """
    buffer = io.BytesIO()
    if kind == ".npy":
        np.save(buffer, samples.numpy(), allow_pickle=False)
        return buffer.getvalue()
    if kind == ".txt" and _is_text(samples):
        return "".join(line + "\n" for line in strings(samples)).encode()
    if kind == ".png" and samples.ndim == 4:
        return png(sheet(samples, columns, margin=0 if len(samples) == 1 else 2))
    if kind == ".png" and samples.ndim == 5:
        frames = samples.shape[2]
        return png(sheet(samples.transpose(1, 2).flatten(0, 1), frames, margin=1))
    if kind == ".gif" and samples.ndim == 5:
        first, *rest = (sheet(frame, columns) for frame in samples.unbind(2))
        first.save(buffer, "GIF", save_all=True, append_images=rest, duration=125, loop=0)
        return buffer.getvalue()
    if kind == ".png" and samples.ndim == 2 and samples.is_floating_point():
        return png(plot(samples))
    raise DitkitError(f"such samples cannot be shown as {kind}: use {suffix(samples)}, or .npy for the numbers")


def _is_text(samples: Tensor) -> bool:
    return samples.ndim == 2 and not samples.is_floating_point()


def plot(points: Float[Tensor, "n d"], side: int = 512) -> Image.Image:
    """The first two coordinates of vectors as dots, the larger range filling the picture; the second one points up."""
    xy = torch.stack((points[:, 0], points[:, min(1, points.shape[1] - 1)]), dim=1).double()
    low, high = xy.amin(0), xy.amax(0)
    span = max(float((high - low).max()), 1e-9)
    picture = Image.new("RGB", (side, side), "white")
    draw = ImageDraw.Draw(picture)
    for u, v in ((xy - (low + high) / 2) / span).tolist():
        across, down = side * (0.5 + 0.9 * u), side * (0.5 - 0.9 * v)
        draw.ellipse((across - 2, down - 2, across + 2, down + 2), fill="#1f4e9e")
    return picture


def sheet(images: UInt8[Tensor, "n c h w"], columns: int | None = None, margin: int = 2) -> Image.Image:
    """Images row by row on white; without `columns`, about as many rows as columns. Small images are enlarged.

    One channel is shown as grey, more than three only in their first three.
    """
    n, c, h, w = images.shape
    columns = min(columns or math.ceil(math.sqrt(n)), n)
    rows = -(-n // columns)
    mode, shown = ("L", images[:, 0]) if c < 3 else ("RGB", images[:, :3].permute(0, 2, 3, 1))
    picture = Image.new(
        mode, (columns * (w + margin) + margin, rows * (h + margin) + margin), 255 if c < 3 else "white"
    )
    for i, image in enumerate(shown.contiguous().numpy()):
        place = (margin + (i % columns) * (w + margin), margin + (i // columns) * (h + margin))
        picture.paste(Image.fromarray(image), place)
    enlarge = max(1, 48 // max(h, w))
    return picture.resize((picture.width * enlarge, picture.height * enlarge), Image.Resampling.NEAREST)


def beside(first: UInt8[Tensor, "n c h w"], second: UInt8[Tensor, "n c h w"]) -> UInt8[Tensor, "2n c h w"]:
    """Pairs of images, one behind the other: for a sheet with an even number of columns."""
    return torch.stack((first, second), dim=1).flatten(0, 1)


def png(picture: Image.Image) -> bytes:
    """The picture as the bytes of a PNG file."""
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()
