"""Images in folders: one sub-folder for each class, or no sub-folders and no classes."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from ..config import DitkitError, register
from .dataset import Dataset, share
from .images import Images, check_crop

__all__ = ["Folder", "images_below"]

EXTENSIONS = ("png", "jpg", "jpeg", "webp", "bmp", "gif", "tif", "tiff")


def images_below(top: str, entered: Iterable[str] = ()) -> list[str]:
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


def _sorted_files(root: str, paths: Iterable[str], label: int) -> list[File]:
    named = ((os.path.relpath(path, root).replace(os.sep, "/"), path) for path in paths)
    return [File(path, name, label) for name, path in sorted(named)]


def _fingerprint(files: Iterable[File]) -> str:
    """The sha256 of all names and sizes: equal lists of equal files, though not proof of equal contents."""
    lines = (f"{file.name}\0{os.path.getsize(file.path) if os.path.isfile(file.path) else 0}\n" for file in files)
    return hashlib.sha256("".join(lines).encode(errors="surrogateescape")).hexdigest()


@register("data", "folder")
@dataclass(frozen=True)
class Folder:
    """The images of a folder: anywhere below its sub-folders, which are the classes, or all in it, without classes.

    Images are cropped to their central square, `resolution` pixels wide, and what is transparent becomes white.
    `channels` is 3 (RGB) or 1 (greyscale). About the share `holdout` of the files, chosen by name, is held out.
    """

    positional: ClassVar[str] = "path"

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
        check_crop("folder", self.resolution, self.holdout, self.channels)

    def open(self) -> Dataset:
        """Finds the images and checks them: by decoding what fits in MEMORY_GB, else by their headers.

        Raises DitkitError if there is no folder, no image, a class without images, or images in and beside classes.
        """
        files, classes = self._find()
        opened = Images(
            where=f"folder {self.path}",
            names=[file.name for file in files],
            labels=[file.label for file in files],
            classes=classes,
            held=[share(file.name) < self.holdout for file in files],
            encoded=lambda i: files[i].path,
            resolution=self.resolution,
            channels=self.channels,
            flip=self.flip,
        ).open()
        name = Path(os.path.realpath(os.path.expanduser(self.path))).name
        size = f"{self.resolution} x {self.resolution} x {self.channels}"
        return Dataset(
            name=name,
            classes=classes,
            shape=(self.channels, self.resolution, self.resolution),
            train=opened.train,
            heldout=opened.heldout,
            source=f"folder {name}: {opened.good} images, {len(classes)} classes, {opened.held} held out,"
            f" cropped to {size}, sha256 of names and sizes {_fingerprint(files)}",
            broken=opened.broken,
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
            below = {name: images_below(paths[name], above) for name in folders}
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
