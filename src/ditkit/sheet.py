"""Many images as one picture."""

from __future__ import annotations

import io
import math

from jaxtyping import UInt8
from PIL import Image
from torch import Tensor

__all__ = ["png", "sheet"]


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


def png(picture: Image.Image) -> bytes:
    """The picture as the bytes of a PNG file."""
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()
