"""Images in folders: one sub-folder for each class, or no sub-folders and no classes."""

from __future__ import annotations

import hashlib
import os
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int, UInt8
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from tqdm import tqdm

from ..config import DitkitError, register
from ..rng import Draw
from .dataset import Batch, Dataset, InMemory, augment, share

__all__ = ["Folder", "LazyImages", "Unreadable", "centre_crop", "read_image"]

EXTENSIONS = ("png", "jpg", "jpeg", "webp", "bmp", "gif", "tif", "tiff")
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")  # a renamed file must not reach Pillow's other decoders
MEMORY_GB = 2.0  # GiB of pixels up to which a folder is decoded once, when it is opened
ELONGATED = 100  # a longer image would take gigabytes to enlarge, of which the crop keeps next to nothing


class Unreadable(Exception):
    """Why a file cannot be used, in a few words."""


@contextmanager
def _opened(path: str) -> Iterator[Image.Image]:
    """An image with a sound header. Raises Unreadable, also for what goes wrong while the caller decodes it."""
    try:
        if not os.path.isfile(path):  # a named pipe would block for ever
            raise Unreadable("not a file, or a link that leads nowhere")
        if os.path.getsize(path) == 0:
            raise Unreadable("an empty file")
        with Image.open(path, formats=FORMATS) as image:
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


def read_image(path: str, resolution: int | None, channels: int) -> UInt8[np.ndarray, "c h w"]:
    """The pixels of a file: upright, on white, in 3 channels (RGB) or 1, centre-cropped unless `resolution` is None.

    Raises Unreadable.
    """
    with _opened(path) as image:
        flat = _flatten(image, channels)
        pixels = np.array(flat if resolution is None else centre_crop(flat, resolution))
    return pixels.reshape(*pixels.shape[:2], channels).transpose(2, 0, 1)


def _check_header(path: str) -> None:
    with _opened(path):
        pass


def _images_below(top: str, entered: Iterable[str]) -> list[str]:
    """The files in and below a folder that have the extension of an image; what is hidden is left out.

    Links are followed, but no folder is entered twice, nor one of `entered`: a link back up would never end.
    """
    found, seen, waiting = [], set(entered), [top]
    while waiting:
        folder = waiting.pop()
        real = os.path.realpath(folder)
        if real in seen:
            continue
        seen.add(real)
        for name in sorted(os.listdir(folder)):
            path = os.path.join(folder, name)
            if name.startswith("."):
                continue
            if os.path.isdir(path):
                waiting.append(path)
            elif _is_image(name):
                found.append(path)
    return found


def _is_image(name: str) -> bool:
    return name.lower().endswith(tuple("." + extension for extension in EXTENSIONS))


@dataclass(frozen=True)
class File:
    """A file that should be an image."""

    path: str
    name: str  # relative to the folder, with "/" on every system
    label: int


def _reasons(files: Sequence[File], read: Callable[[int], object]) -> list[str | None]:
    """Calls `read(i)` for every file, in threads: the line "name: reason" for each that is Unreadable, else None."""

    def attempt(i: int) -> str | None:
        try:
            read(i)
        except Unreadable as error:
            return f"{files[i].name}: {error}"
        return None

    pool = ThreadPoolExecutor()
    try:
        lines = pool.map(attempt, range(len(files)))
        return list(tqdm(lines, desc="reading images", total=len(files), unit="image", delay=1, leave=False))
    finally:
        pool.shutdown(cancel_futures=True)  # Ctrl-C waits for the images in work and not for all that are queued


def _sorted_files(root: str, paths: Iterable[str], label: int) -> list[File]:
    named = ((os.path.relpath(path, root).replace(os.sep, "/"), path) for path in paths)
    return [File(path, name, label) for name, path in sorted(named)]


def _fingerprint(files: Iterable[File]) -> str:
    """The sha256 of all names and sizes: equal lists of equal files, though not proof of equal contents."""
    lines = (f"{file.name}\0{os.path.getsize(file.path) if os.path.isfile(file.path) else 0}\n" for file in files)
    return hashlib.sha256("".join(lines).encode(errors="surrogateescape")).hexdigest()


class LazyImages:
    """A split that is read from its files batch by batch, for what is larger than memory.

    A file that turns out broken is warned about, added to `broken` and replaced by the next good one of the split.
    Raises DitkitError when the split, or a class in training, has no readable image left.
    """

    def __init__(self, data: Folder, files: Sequence[File], classes: Sequence[str], broken: list[str], training: bool):
        self.data, self.files, self.classes, self.broken, self.training = data, files, classes, broken, training
        self._bad: set[int] = set()
        self._left = Counter(file.label for file in files)
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(thread_name_prefix="images")

    def __len__(self) -> int:
        return len(self.files)

    def batch(self, indices: Int[Tensor, "b"], rng: Draw | None = None) -> Batch:
        wanted = torch.arange(len(self))[indices].tolist()
        images = np.empty((len(wanted), self.data.channels, self.data.resolution, self.data.resolution), np.uint8)
        labels = np.empty(len(wanted), np.int64)

        def read(row: int) -> None:
            images[row], labels[row] = self._read(wanted[row])

        list(self._pool.map(read, range(len(wanted))))
        flip = self.training and self.data.flip
        label = torch.from_numpy(labels) if self.classes else None
        return Batch(augment(torch.from_numpy(images), flip, rng), label)

    def _read(self, index: int) -> tuple[UInt8[np.ndarray, "c h w"], int]:
        """Pixels and label of the first readable file from `index` on, round the end of the split."""
        for i in chain(range(index, len(self)), range(index)):
            if i in self._bad:
                continue
            try:
                return self.data.read(self.files[i]), self.files[i].label
            except Unreadable as error:
                self._exclude(i, f"{self.files[i].name}: {error}")
        raise DitkitError(f"folder {self.data.path}: none of {len(self)} images can be read ({self.broken[-1]})")

    def _exclude(self, index: int, line: str) -> None:
        label = self.files[index].label
        with self._lock:
            if index in self._bad:  # two threads found it
                return
            self._bad.add(index)
            self._left[label] -= 1
            self.broken.append(line)
        warnings.warn(f"folder {self.data.path}: skipped {line}", stacklevel=2)
        if self.training and self.classes and not self._left[label]:
            raise _no_image_of(self.data.path, self.classes[label], line)


def _no_image_of(path: str, label: str, line: str | None) -> DitkitError:
    return DitkitError(
        f"folder {path}: no image of class {label!r} can be read ({line}): mend the files or remove the sub-folder"
    )


@register("data", "folder")
@dataclass(frozen=True)
class Folder:
    """The images of a folder: anywhere below its sub-folders, which are the classes, or all in it, without classes.

    Images are cropped to their central square, `resolution` pixels wide, and what is transparent becomes white.
    `channels` is 3 (RGB) or 1 (greyscale). About the share `holdout` of the files, chosen by name, is held out.
    """

    path: str
    resolution: int = 64
    flip: bool = True
    holdout: float = 0.1
    channels: int = 3

    def __post_init__(self) -> None:
        if not self.path:
            raise DitkitError("data folder: no path was given; write folder:PATH")
        # a run must find its images again from wherever it is continued
        object.__setattr__(self, "path", os.path.abspath(os.path.expanduser(self.path)))
        if self.resolution < 1:
            raise DitkitError(f"data folder: resolution must be at least 1 pixel, not {self.resolution}")
        if not 0 <= self.holdout < 1:
            raise DitkitError(f"data folder: holdout is a share of at least 0 and below 1, not {self.holdout}")
        if self.channels not in (1, 3):
            raise DitkitError(f"data folder: channels must be 3 (RGB) or 1 (greyscale), not {self.channels}")

    def read(self, file: File) -> UInt8[np.ndarray, "c h w"]:
        """The pixels of one file. Raises Unreadable."""
        return read_image(file.path, self.resolution, self.channels)

    def open(self) -> Dataset:
        """Finds the images and checks them: by decoding what fits in MEMORY_GB, else by their headers.

        Raises DitkitError if there is no folder, no image, a class without images, or images in and beside classes.
        """
        files, classes = self._find()
        store = None
        if len(files) * self.channels * self.resolution**2 <= MEMORY_GB * 2**30:
            store = np.empty((len(files), self.channels, self.resolution, self.resolution), np.uint8)

        def check(i: int) -> None:
            if store is None:
                _check_header(files[i].path)
            else:
                store[i] = self.read(files[i])

        reasons = _reasons(files, check)
        broken = [line for line in reasons if line is not None]
        good = [i for i, line in enumerate(reasons) if line is None]
        held = [i for i in good if share(files[i].name) < self.holdout]
        training = [i for i in good if share(files[i].name) >= self.holdout]
        self._require_all(files, classes, reasons, training)

        if store is None:
            train = LazyImages(self, [files[i] for i in training], classes, broken, training=True)
            heldout = LazyImages(self, [files[i] for i in held], classes, broken, training=False)
        else:
            images = torch.from_numpy(store)
            labels = torch.tensor([file.label for file in files]) if classes else None
            train = InMemory(images, labels, torch.tensor(training), self.flip)
            heldout = InMemory(images, labels, torch.tensor(held, dtype=torch.int64))
        name = Path(os.path.realpath(os.path.expanduser(self.path))).name
        size = f"{self.resolution} x {self.resolution} x {self.channels}"
        return Dataset(
            name=name,
            classes=classes,
            shape=(self.channels, self.resolution, self.resolution),
            train=train,
            heldout=heldout,
            source=f"folder {name}: {len(good)} images, {len(classes)} classes, {len(held)} held out,"
            f" cropped to {size}, sha256 of names and sizes {_fingerprint(files)}",
            broken=broken,
        )

    def _find(self) -> tuple[list[File], tuple[str, ...]]:
        """All candidates, sorted by class and name, and the names of the classes."""
        root = os.path.expanduser(self.path)
        if not os.path.isdir(root):
            problem = "is a file, not a folder" if os.path.exists(root) else "does not exist"
            raise DitkitError(f"folder {self.path} {problem}: give a folder of images, or of one sub-folder per class")
        real = Path(os.path.realpath(root))
        above = [str(real), *map(str, real.parents)]
        try:
            paths = {name: os.path.join(root, name) for name in sorted(os.listdir(root)) if not name.startswith(".")}
            # a link back up is no class
            folders = [n for n, path in paths.items() if os.path.isdir(path) and os.path.realpath(path) not in above]
            below = {name: _images_below(paths[name], above) for name in folders}
        except OSError as error:
            raise DitkitError(f"folder {self.path}: cannot list {error.filename}: {error.strerror}") from None
        loose = [path for name, path in paths.items() if _is_image(name) and not os.path.isdir(path)]
        empty = [name for name in folders if not below[name]]
        if not loose and len(empty) == len(folders):
            raise DitkitError(
                f"folder {self.path} holds no images: put them into it, or into one sub-folder per class"
                f" ({' '.join(EXTENSIONS)})"
            )
        if loose and len(empty) < len(folders):
            raise DitkitError(
                f"folder {self.path} is mislabelled: {os.path.basename(loose[0])} lies beside the class folders:"
                " move it into one of them, or away"
            )
        if loose:
            return _sorted_files(root, loose, 0), ()
        if empty:
            raise DitkitError(
                f"folder {self.path}: the class folder {empty[0]!r} holds no images: remove it, or add images"
                f" ({' '.join(EXTENSIONS)})"
            )
        files = [file for label, name in enumerate(folders) for file in _sorted_files(root, below[name], label)]
        return files, tuple(folders)

    def _require_all(
        self, files: Sequence[File], classes: Sequence[str], reasons: Sequence[str | None], training: Sequence[int]
    ) -> None:
        """Raises DitkitError unless each class, or the folder without classes, keeps an image for training."""
        readable = Counter(file.label for file, line in zip(files, reasons, strict=True) if line is None)
        if not readable:
            raise DitkitError(f"folder {self.path}: none of its {len(files)} images can be read ({reasons[0]})")
        trained = Counter(files[i].label for i in training)
        for label in range(max(1, len(classes))):
            if not readable[label]:
                line = next(line for file, line in zip(files, reasons, strict=True) if file.label == label)
                raise _no_image_of(self.path, classes[label], line)
            if not trained[label]:
                where = f"class {classes[label]!r}" if classes else "the folder"
                raise DitkitError(
                    f"folder {self.path}: no training image is left in {where}, all {readable[label]} are held out:"
                    " add images, or lower holdout (0 holds nothing out)"
                )
