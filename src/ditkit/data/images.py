"""Encoded images, read by number: decoded upright on white, cropped, checked, and split for training."""

from __future__ import annotations

import io
import os
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch
from jaxtyping import Int, UInt8
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from tqdm import tqdm

from ..config import DitkitError
from ..rng import Draw
from .dataset import Batch, InMemory, Split, augment

__all__ = ["Images", "LazyImages", "Opened", "Unreadable", "centre_crop", "check_crop", "read_image"]

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")  # a renamed file must not reach Pillow's other decoders
MEMORY_GB = 2.0  # GiB of pixels up to which images are decoded once, when they are opened
ELONGATED = 100  # a longer image would take gigabytes to enlarge, of which the crop keeps next to nothing


class Unreadable(Exception):
    """Why an image cannot be used, in a few words."""


@contextmanager
def _opened(source: str | bytes) -> Iterator[Image.Image]:
    """An image with a sound header. Raises Unreadable, also for what goes wrong while the caller decodes it."""
    try:
        if isinstance(source, str) and not os.path.isfile(source):  # a named pipe would block for ever
            raise Unreadable("not a file, or a link that leads nowhere")
        if not (os.path.getsize(source) if isinstance(source, str) else source):
            raise Unreadable("an empty file")
        with Image.open(source if isinstance(source, str) else io.BytesIO(source), formats=FORMATS) as image:
            if max(image.size) > ELONGATED * min(image.size):
                raise Unreadable(f"{image.width} x {image.height} pixels are too elongated to be cropped")
            # early Pillows read a 16-bit PNG as I; whatever else is in I or F does not say what its white is
            if image.mode == "F" or (image.mode == "I" and image.format != "PNG"):
                raise Unreadable("pixels of 32 bits have no agreed white: save it with 8 or 16 bits")
            yield image
    except Unreadable:
        raise
    except UnidentifiedImageError:
        raise Unreadable("not an image of the accepted formats") from None
    # on foreign bytes the decoders raise nearly everything: OSError, SyntaxError, struct.error, IndexError...
    except Exception as error:
        raise Unreadable(" ".join(str(error).split()) or type(error).__name__) from error


def _flatten(image: Image.Image, channels: int) -> Image.Image:
    """8-bit RGB or greyscale, upright, on white."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16-bit greyscale: the high byte, as Pillow itself does for 16-bit colour
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        white.alpha_composite(image.convert("RGBA"))
        image = white
    return image.convert("L" if channels == 1 else "RGB")


def centre_crop(image: Image.Image, resolution: int) -> Image.Image:
    """The central square of an image, `resolution` pixels wide.

    As ADM prepares its images (Dhariwal and Nichol 2021, guided-diffusion, `center_crop_arr`), on which DiT and most
    of its successors are trained and measured: halve with a box filter while the short side stays large enough, resize
    with the bicubic filter to a short side of `resolution`, crop.
    """
    while min(image.size) >= 2 * resolution:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = resolution / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - resolution) // 2, (image.height - resolution) // 2
    return image.crop((left, top, left + resolution, top + resolution))


def read_image(source: str | bytes, resolution: int | None, channels: int) -> UInt8[np.ndarray, "c h w"]:
    """The pixels of an image: upright, on white, in 3 channels (RGB) or 1, centre-cropped unless `resolution` is None.

    source: the path of a file, or the bytes of one. Raises Unreadable.
    """
    with _opened(source) as image:
        flat = _flatten(image, channels)
        pixels = np.array(flat if resolution is None else centre_crop(flat, resolution))
    return pixels.reshape(*pixels.shape[:2], channels).transpose(2, 0, 1)


def check_crop(data: str, resolution: int, holdout: float, channels: int) -> None:
    """Raises DitkitError, which begins with the name of the data, for settings that no image can be read with."""
    if resolution < 1:
        raise DitkitError(f"data {data}: resolution must be at least 1 pixel, not {resolution}")
    if not 0 <= holdout < 1:
        raise DitkitError(f"data {data}: holdout is a share of at least 0 and below 1, not {holdout}")
    if channels not in (1, 3):
        raise DitkitError(f"data {data}: channels must be 3 (RGB) or 1 (greyscale), not {channels}")


@dataclass(frozen=True)
class Opened:
    """Images that were checked, in two splits."""

    train: Split
    heldout: Split
    good: int  # readable images
    held: int  # of which are held out
    broken: list[str]  # "name: reason"; grows where images are read as they are needed


@dataclass(frozen=True)
class Images:
    """Encoded images, by number, and how they are read. All sequences have one entry for each image."""

    where: str  # what they are, for messages: "folder pets"
    names: Sequence[str]
    labels: Sequence[int]  # all 0 without classes
    classes: Sequence[str]
    held: Sequence[bool]  # whether an image is held out
    encoded: Callable[[int], str | bytes]  # a path or the bytes of a file; may raise Unreadable
    resolution: int
    channels: int
    flip: bool
    texts: Callable[[Sequence[int]], Int[Tensor, "b l"]] | None = None  # the captions of images, as code points
    remove: str = "remove the sub-folder"  # how a class without images is got rid of
    whole: str = "the folder"  # where an image is missing, without classes

    def __len__(self) -> int:
        return len(self.names)

    def read(self, i: int) -> UInt8[np.ndarray, "c h w"]:
        """The pixels of one image. Raises Unreadable."""
        return read_image(self.encoded(i), self.resolution, self.channels)

    def open(self) -> Opened:
        """Checks all images: by decoding what fits in MEMORY_GB, else by their headers, and splits what is readable.

        Raises DitkitError unless each class, or all images without classes, keep one for training.
        """
        store = None
        if len(self) * self.channels * self.resolution**2 <= MEMORY_GB * 2**30:
            store = np.empty((len(self), self.channels, self.resolution, self.resolution), np.uint8)

        def check(i: int) -> None:
            if store is None:
                with _opened(self.encoded(i)):
                    pass
            else:
                store[i] = self.read(i)

        reasons = self._reasons(check)
        broken = [line for line in reasons if line is not None]
        good = [i for i, line in enumerate(reasons) if line is None]
        held = [i for i in good if self.held[i]]
        training = [i for i in good if not self.held[i]]
        self._require_all(reasons, training)
        if store is None:
            train = LazyImages(self, training, broken, training=True)
            heldout = LazyImages(self, held, broken, training=False)
        else:
            images = torch.from_numpy(store)
            labels = torch.tensor(self.labels) if self.classes else None
            texts = None if self.texts is None else self.texts(range(len(self)))
            train = InMemory(images, labels, torch.tensor(training), self.flip, texts)
            heldout = InMemory(images, labels, torch.tensor(held, dtype=torch.int64), texts=texts)
        return Opened(train, heldout, len(good), len(held), broken)

    def _reasons(self, read: Callable[[int], object]) -> list[str | None]:
        """Calls `read(i)` for all, in threads: the line "name: reason" for each that is Unreadable, else None."""

        def attempt(i: int) -> str | None:
            try:
                read(i)
            except Unreadable as error:
                return f"{self.names[i]}: {error}"
            return None

        pool = ThreadPoolExecutor()
        try:
            lines = pool.map(attempt, range(len(self)))
            return list(tqdm(lines, desc="reading images", total=len(self), unit="image", delay=1, leave=False))
        finally:
            pool.shutdown(cancel_futures=True)  # Ctrl-C waits for the images in work and not for all that are queued

    def no_image_of(self, label: int, line: str) -> DitkitError:
        """The error to raise where all images of a class are broken; line: the name and reason of one."""
        return DitkitError(
            f"{self.where}: no image of class {self.classes[label]!r} can be read ({line}): mend the files or"
            f" {self.remove}"
        )

    def _require_all(self, reasons: Sequence[str | None], training: Sequence[int]) -> None:
        """Raises DitkitError unless each class, or all without classes, keeps an image for training."""
        readable = Counter(label for label, line in zip(self.labels, reasons, strict=True) if line is None)
        if not readable:
            raise DitkitError(f"{self.where}: none of its {len(self)} images can be read ({reasons[0]})")
        trained = Counter(self.labels[i] for i in training)
        for label in range(max(1, len(self.classes))):
            if not readable[label]:
                line = next(line for own, line in zip(self.labels, reasons, strict=True) if own == label)
                raise self.no_image_of(label, line or "")
            if not trained[label]:
                where = f"class {self.classes[label]!r}" if self.classes else self.whole
                raise DitkitError(
                    f"{self.where}: no training image is left in {where}, all {readable[label]} are held out:"
                    " add images, or lower holdout (0 holds nothing out)"
                )


class LazyImages:
    """A split that is read batch by batch, for what is larger than memory.

    An image that turns out broken is warned about, added to `broken` and replaced by the next good one of the split.
    Raises DitkitError when the split, or a class in training, has no readable image left.
    """

    def __init__(self, images: Images, rows: Sequence[int], broken: list[str], training: bool):
        self.images, self.rows, self.broken, self.training = images, rows, broken, training
        self._bad: set[int] = set()
        self._left = Counter(images.labels[row] for row in rows)
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(thread_name_prefix="images")

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, indices: Int[Tensor, "b"], rng: Draw | None = None) -> Batch:
        wanted = torch.arange(len(self))[indices].tolist()
        own = self.images
        pixels = np.empty((len(wanted), own.channels, own.resolution, own.resolution), np.uint8)
        found = [0] * len(wanted)

        def read(position: int) -> None:
            pixels[position], found[position] = self._read(wanted[position])

        list(self._pool.map(read, range(len(wanted))))
        flip = self.training and own.flip
        label = torch.tensor([own.labels[row] for row in found], dtype=torch.int64) if own.classes else None
        text = None if own.texts is None else own.texts(found)
        return Batch(augment(torch.from_numpy(pixels), flip, rng), label, text)

    def _read(self, index: int) -> tuple[UInt8[np.ndarray, "c h w"], int]:
        """Pixels and number of the first readable image from `index` on, round the end of the split."""
        for i in chain(range(index, len(self)), range(index)):
            if i in self._bad:
                continue
            try:
                return self.images.read(self.rows[i]), self.rows[i]
            except Unreadable as error:
                self._exclude(i, f"{self.images.names[self.rows[i]]}: {error}")
        raise DitkitError(f"{self.images.where}: none of {len(self)} images can be read ({self.broken[-1]})")

    def _exclude(self, index: int, line: str) -> None:
        label = self.images.labels[self.rows[index]]
        with self._lock:
            if index in self._bad:  # two threads found it
                return
            self._bad.add(index)
            self._left[label] -= 1
            self.broken.append(line)
        warnings.warn(f"{self.images.where}: skipped {line}", stacklevel=2)
        if self.training and self.images.classes and not self._left[label]:
            raise self.images.no_image_of(label, line)
