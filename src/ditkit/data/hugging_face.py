"""Data sets of the package datasets: a name on the Hugging Face hub, or a folder in the layout of one."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from jaxtyping import Int
from torch import Tensor

from ..config import DitkitError, near, register
from .dataset import Dataset, share
from .images import Images, Unreadable, check_crop
from .text import points

__all__ = ["HuggingFace"]

IMAGE = ("image", "images", "img", "picture", "photo", "jpg", "jpeg", "png", "webp")
LABEL = ("label", "labels", "class", "category", "cls")
CAPTION = ("caption", "captions", "text", "prompt", "description", "txt")
HELD_OUT = ("validation", "valid", "val", "dev", "test")
INTEGERS = tuple(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64))
STRINGS = ("string", "large_string")


@register("data", "hf")
@dataclass(frozen=True)
class HuggingFace:
    """Images of a data set of the package datasets, with classes and captions where it has them.

    path: its name on the hub (owner/name), a folder of parquet files or of images as on the hub, or what
    `save_to_disk` wrote. Rows are read from Arrow files on the disk by their number. Images are read as those of a
    folder. Nothing is fetched unless `download` is set.
    """

    positional: ClassVar[str] = "path"
    path: str
    resolution: int = 64
    flip: bool = True
    holdout: float = 0.1
    """Share of the rows, chosen by their number, that is held out where the data set has no split for it."""
    channels: int = 3
    image: str = ""
    """Column of the images; found by its type and the usual names where none is given, as are the next two."""
    label: str | None = ""
    """Column of the classes; None: without classes."""
    caption: str | None = ""
    """Column of the captions; of a list the first is taken. None: without captions."""
    characters: int = 256
    """Characters after which a caption is cut."""
    split: str = "train"
    heldout_split: str | None = ""
    """Held-out split; "": one called validation, valid, val, dev or test. None, or where there is none: `holdout`."""
    subset: str = ""
    """Which data set of several that share a name (datasets calls it the configuration)."""
    revision: str = ""
    """Branch, tag or commit on the hub; a commit stays the same when the data set is changed there."""
    download: bool = False
    """Fetch from the hub what is not in the cache."""
    cache: str = ""
    """Folder for Arrow files; else that of datasets (the environment variable HF_DATASETS_CACHE)."""
    streaming: bool = False
    """Refused: a stream has no row numbers, so its order could not depend on seed and step alone."""

    def __post_init__(self) -> None:
        if not self.path:
            raise DitkitError("data hf: no data set was given; write hf:NAME or hf:FOLDER")
        if self.streaming:
            raise DitkitError(
                "data hf: a stream cannot be read in an order that depends on seed and step alone, nor be gone on"
                " with: leave out streaming; rows are read from files on the disk and need no memory for the set"
            )
        # a run must find its folder again from wherever it is continued
        if self._begins_as_folder or Path(self.path).exists():
            object.__setattr__(self, "path", os.path.abspath(os.path.expanduser(self.path)))
        check_crop("hf", self.resolution, self.holdout, self.channels)
        if self.characters < 1:
            raise DitkitError(f"data hf: characters must be at least 1, not {self.characters}")

    @property
    def _begins_as_folder(self) -> bool:
        return self.path.startswith((".", "/", "~")) or os.path.isabs(self.path)

    def open(self) -> Dataset:
        """Finds splits and columns, and checks the images: by decoding what fits in memory, else by their headers.

        Raises DitkitError if the package is missing, if the data set is neither here nor may be fetched, for splits
        and columns that it does not have, and as `Folder.open` for images that cannot be read.
        """
        try:
            import datasets
        except ImportError:
            raise DitkitError("data hf: the package datasets is missing: pip install 'ditkit[hf]'") from None
        rows, first, count, second = self._rows(self._loaded(datasets), datasets)
        image, label, caption = _columns(self, rows.features, datasets)
        if isinstance(rows.features[image], datasets.Image):
            rows = rows.cast_column(image, datasets.Image(decode=False))

        def name(i: int) -> str:
            return f"{first}[{i}]" if i < count else f"{second}[{i - count}]"

        names = [name(i) for i in range(len(rows))]
        labels, classes = _classes(self, rows, label, names)
        texts, longest = _captions(self, rows, caption)
        pictures = rows.select_columns([image])
        opened = Images(
            where=f"data set {self.path}",
            names=names,
            labels=labels,
            classes=classes,
            # without a split of its own, by the number of the row: rows that come after it move no other
            held=[i >= count if second else share(str(i)) < self.holdout for i in range(len(rows))],
            encoded=lambda i: _encoded(pictures[i][image]),
            resolution=self.resolution,
            channels=self.channels,
            flip=self.flip,
            texts=texts,
            remove="leave them out of the data set",
            whole=f"the split {first}",
        ).open()
        size = f"{self.resolution} x {self.resolution} x {self.channels}"
        splits = f"{first} and {second}" if second else first
        where = Path(self.path).name if self._begins_as_folder else self.path
        captions = f", captions of at most {longest} characters" if longest else ""
        return Dataset(
            name=Path(self.path).name,
            classes=classes,
            shape=(self.channels, self.resolution, self.resolution),
            train=opened.train,
            heldout=opened.heldout,
            source=f"data set {where} ({splits}): {opened.good} images, {len(classes)} classes{captions},"
            f" {opened.held} held out, cropped to {size}, sha256 of labels, captions and sizes"
            f" {_fingerprint(rows, image, labels, classes, caption)}",
            captions=longest,
            broken=opened.broken,
        )

    def _loaded(self, datasets: Any) -> Mapping[str, Any]:
        """All splits by name. Raises DitkitError for what is not here or cannot be loaded."""
        local = self._begins_as_folder
        if local and not os.path.isdir(self.path):
            problem = "is a file, not a folder" if os.path.exists(self.path) else "does not exist"
            raise DitkitError(f"data set {self.path} {problem}: give a folder of parquet files or images, or a name")
        try:
            with _offline(not self.download):
                if local and any((Path(self.path) / file).exists() for file in ("dataset_dict.json", "state.json")):
                    found = datasets.load_from_disk(self.path)
                else:
                    found = datasets.load_dataset(
                        self.path,
                        self.subset or None,
                        revision=self.revision or None,
                        cache_dir=os.path.expanduser(self.cache) or None,
                    )
        # what a foreign file or the network can raise is anything
        except Exception as error:
            said = " ".join((str(error).strip() or type(error).__name__).split())
            if not local and not self.download and isinstance(error, ConnectionError | FileNotFoundError):
                raise DitkitError(
                    f"the data set {self.path} is neither a folder nor in the cache of datasets, and nothing is"
                    " fetched unasked: add --data.download"
                ) from None
            raise DitkitError(f"cannot load the data set {self.path}: {said}") from None
        return found if isinstance(found, dict) else {self.split: found}

    def _rows(self, found: Mapping[str, Any], datasets: Any) -> tuple[Any, str, int, str]:
        """The rows for training, followed by those of the held-out split; name and length of the one, name of the
        other, "" without one. Raises DitkitError for a split that is missing, empty or of other columns."""
        for option, split in (("split", self.split), ("heldout-split", self.heldout_split)):
            if split and split not in found:
                raise DitkitError(
                    f"the data set {self.path} has no split {split!r}; it has {', '.join(found)}: choose by"
                    f" --data.{option}"
                )
        second = self.heldout_split or ""
        if self.heldout_split == "":
            second = next((split for split in HELD_OUT if split in found and split != self.split), "")
        if second == self.split:
            raise DitkitError(f"data hf: the split {second} cannot be both trained on and held out")
        train = found[self.split]
        if not len(train):
            raise DitkitError(f"the data set {self.path} has no rows in its split {self.split}")
        if not second:
            return train, self.split, len(train), ""
        try:
            both = datasets.concatenate_datasets([train, found[second].cast(train.features)])
        except Exception:
            raise DitkitError(
                f"the data set {self.path} has other columns in {second} than in {self.split}: choose another"
                " --data.heldout-split, or None to hold out a share"
            ) from None
        return both, self.split, len(train), second


@contextmanager
def _offline(wanted: bool) -> Iterator[None]:
    """Without the network, if wanted. The environment variable is read once, by whatever imported the hub first."""
    from datasets import config
    from huggingface_hub import constants

    before = config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE
    if wanted:
        config.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE = before


def _columns(data: HuggingFace, features: Mapping[str, Any], datasets: Any) -> tuple[str, str | None, str | None]:
    """The columns of images, labels and captions. Raises DitkitError, with all columns, for what is not clear."""

    def dtype(feature: Any) -> str:
        return feature.dtype if isinstance(feature, datasets.Value) else ""

    def image(feature: Any) -> bool:
        packed = isinstance(feature, dict) and dtype(feature.get("bytes")) in ("binary", "large_binary")
        return isinstance(feature, datasets.Image) or packed or dtype(feature) in ("binary", "large_binary")

    def label(feature: Any) -> bool:
        return isinstance(feature, datasets.ClassLabel) or dtype(feature) in ("bool", *INTEGERS, *STRINGS)

    def caption(feature: Any) -> bool:
        inner = feature.feature if isinstance(feature, datasets.List | datasets.LargeList) else feature
        return dtype(inner) in STRINGS

    def kind(feature: Any) -> str:
        return dtype(feature) or type(feature).__name__

    listed = ", ".join(f"{name} ({kind(feature)})" for name, feature in features.items())

    def column(
        option: str, given: str, fits: Callable[[Any], bool], typed: type | None, usual: Sequence[str]
    ) -> str | None:
        if given:
            if given not in features:
                raise DitkitError(
                    f"the data set {data.path} has no column {given!r}: {near(given, features)} (its columns: {listed})"
                )
            if not fits(features[given]):
                raise DitkitError(
                    f"column {given!r} of the data set {data.path} cannot be its {option}: it is"
                    f" {kind(features[given])} (its columns: {listed})"
                )
            return given
        sure = [name for name, feature in features.items() if typed is not None and isinstance(feature, typed)]
        lower = {name.lower(): name for name in features}
        named = [lower[name] for name in usual if name in lower and fits(features[lower[name]])]
        found = [name for name in named if name in sure] or (sure or named)
        if len(sure) > 1 and found == sure:
            raise DitkitError(
                f"the data set {data.path} has several columns that may be its {option}: choose by --data.{option}"
                f" ({', '.join(sure)}; its columns: {listed})"
            )
        return found[0] if found else None

    images = column("image", data.image, image, datasets.Image, IMAGE)
    if images is None:
        raise DitkitError(
            f"the data set {data.path} has no column of images: name it by --data.image (its columns: {listed})"
        )
    labels = None if data.label is None else column("label", data.label, label, datasets.ClassLabel, LABEL)
    captions = None if data.caption is None else column("caption", data.caption, caption, None, CAPTION)
    return images, labels, captions


def _classes(data: HuggingFace, rows: Any, column: str | None, names: Sequence[str]) -> tuple[list[int], tuple]:
    """The class numbers of rows, all 0 without classes, and the names of the classes that occur, in order.

    Raises DitkitError for a row without a label.
    """
    if column is None:
        return [0] * len(rows), ()
    values = list(rows.select_columns([column])[:][column])
    called = getattr(rows.features[column], "names", None)
    for i, value in enumerate(values):
        if value is None or (called is not None and not 0 <= value < len(called)):
            raise DitkitError(
                f"the data set {data.path} has no label in {names[i]} (column {column}): choose another"
                " --data.heldout-split, or --data.label None for no classes"
            )
    known = sorted(set(values))
    number = {value: i for i, value in enumerate(known)}
    return [number[value] for value in values], tuple(called[v] if called else str(v) for v in known)


def _captions(
    data: HuggingFace, rows: Any, column: str | None
) -> tuple[Callable[[Sequence[int]], Int[Tensor, "b l"]] | None, int]:
    """What reads the captions of rows, and the characters of the longest; None and 0 without captions."""
    if column is None:
        return None, 0
    written = rows.select_columns([column])
    longest = max(min(len(_text(value)), data.characters) for batch in written.iter(10_000) for value in batch[column])
    if not longest:
        raise DitkitError(f"the data set {data.path} has only empty captions in {column}: use --data.caption None")

    def texts(wanted: Sequence[int]) -> Int[Tensor, "b l"]:
        if not len(wanted):
            return torch.zeros(0, longest, dtype=torch.int64)
        return points([_text(value)[:longest] for value in written[list(wanted)][column]], longest)

    return texts, longest


def _text(value: str | Sequence[str] | None) -> str:
    """A caption, the first of several; "" where there is none. A 0 ends texts and goes."""
    first = value if isinstance(value, str) else next(iter(value or ()), None)
    return (first or "").replace("\0", "")


def _encoded(value: Mapping[str, Any] | bytes | None) -> str | bytes:
    """Bytes or path of an image as datasets stores it. Raises Unreadable where there is none."""
    source = value
    if isinstance(value, Mapping):
        source = value["bytes"] if value["bytes"] is not None else value.get("path")
    if not isinstance(source, str | bytes):
        raise Unreadable("no image in this row")
    return source


def _fingerprint(rows: Any, image: str, labels: Sequence[int], classes: Sequence[str], caption: str | None) -> str:
    """The sha256 of labels, captions and the sizes of images: equal for equal rows, wherever they are stored, though
    not proof of equal contents."""
    import pyarrow
    import pyarrow.compute

    compute: Any = pyarrow.compute  # its functions are made when it is imported, which no type checker sees

    digest = hashlib.sha256(repr((tuple(classes), caption is not None)).encode())
    columns = [image] if caption is None else [image, caption]
    numbers = iter(labels)
    for batch in rows.select_columns(columns).with_format("arrow").iter(1000):
        column = batch.column(image).combine_chunks()
        paths = [None] * len(column)
        if pyarrow.types.is_struct(column.type):
            names = [column.type.field(i).name for i in range(column.type.num_fields)]
            if "path" in names:
                paths = column.field("path").to_pylist()
            column = column.field("bytes")
        sizes = compute.binary_length(column).to_pylist()  # the bytes themselves are not read
        written = [None] * len(column) if caption is None else batch.column(caption).to_pylist()
        for size, path, text in zip(sizes, paths, written, strict=True):
            if size is None:
                size = os.path.getsize(path) if path is not None and os.path.isfile(path) else 0
            digest.update(f"{next(numbers)}\0{size}\0{_text(text)}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()
