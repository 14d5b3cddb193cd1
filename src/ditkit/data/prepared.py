"""Data sets that were encoded once by `ditkit prepare`: shards of raw arrays, read through memory maps.

index.json            what was encoded, by which codec, and for each shard its size and hash
codec.safetensors     what the codec had learned, if it had
train-00000.bin ...   shards of the training split, then heldout-00000.bin ... of the held-out one

A shard of n samples is one array after another, in the index's order, as raw little-endian numbers [n *shape]; each
array begins at a multiple of 64 bytes. "latents" has the shape [versions, moments, *latent]: the image and, where
training mirrors, its mirror image; mean and, where the codec draws, standard deviation. "label" and "text" are there
where the data has classes and captions; where captions were encoded, "states" [tokens, width], and "tokens", how many
of them are real.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Int, Shaped
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ..conditioning import Tokens
from ..config import DitkitError, from_json, register
from ..files import reason, sha256
from ..rng import Draw
from .dataset import Batch, Dataset

__all__ = ["CODEC", "FORMAT", "INDEX", "Prepared", "Shards", "damaged", "places", "problem"]

INDEX, CODEC = "index.json", "codec.safetensors"
FORMAT = 1
_ALIGNED = 64


def places(arrays: Mapping[str, Any], count: int) -> tuple[dict[str, tuple[int, int]], int]:
    """Where the arrays of a shard of `count` samples begin and end, in bytes, and how long the shard is."""
    found, end = {}, 0
    for name, array in arrays.items():
        start = -(-end // _ALIGNED) * _ALIGNED
        end = start + count * np.dtype(array["dtype"]).itemsize * math.prod(array["shape"])
        found[name] = (start, end)
    return found, end


def problem(folder: Path, file: Mapping[str, Any], hashed: bool = True) -> str | None:
    """What is wrong with a file of the index, in a few words; None if nothing is. hashed: compare its hash, too."""
    path = folder / file["file"]
    if not path.is_file():
        return "is missing"
    if (size := path.stat().st_size) != file["bytes"]:
        return f"has {size:,} bytes instead of {file['bytes']:,}"
    if hashed and sha256(path) != file["sha256"]:
        return "has another content than when it was written"
    return None


class Shards:
    """A split whose samples lie in shards of `size` samples each, the last one of fewer."""

    def __init__(self, folder: Path, shards: Sequence[Mapping[str, Any]], arrays: Mapping[str, Any], size: int):
        self.arrays, self.size = arrays, size
        self._count = sum(shard["count"] for shard in shards)
        self._versions, self._moments, *self._latent = arrays["latents"]["shape"]
        maps = [self._mapped(folder / shard["file"], shard["count"]) for shard in shards]
        self._maps = {name: [shard[name] for shard in maps] for name in arrays}
        self._labels = None
        if "label" in arrays:
            self._labels = torch.from_numpy(np.frombuffer(bytearray().join(self._maps["label"]), np.int64))

    def _mapped(self, path: Path, count: int) -> dict[str, memoryview]:
        """The bytes of the arrays of a shard."""
        where, end = places(self.arrays, count)
        # torch keeps no descriptor open for its map, as np.memmap does: there may be more shards than descriptors
        content = memoryview(torch.from_file(str(path), shared=False, size=end, dtype=torch.uint8).numpy().data)
        return {name: content[start:stop] for name, (start, stop) in where.items()}

    def __len__(self) -> int:
        return self._count

    def batch(self, indices: Int[Tensor, "b"], rng: Draw | None = None) -> Batch:
        """Stored moments, [b *latent] or [b 2 *latent]; mirrored in training where the data is, by the same draws."""
        wanted = indices.numpy()
        if len(wanted) and not 0 <= int(wanted.min()) <= int(wanted.max()) < self._count:
            raise IndexError(f"the split has the samples 0..{self._count - 1}, not {wanted.min()}..{wanted.max()}")
        shard, row = np.divmod(wanted, self.size)
        version: np.ndarray | int = 0
        if self._versions == 2 and rng is not None:
            mirrored = rng("flip", "uniform", ()) < 0.5
            if len(mirrored) != len(wanted):
                raise ValueError(f"{len(mirrored)} draws for {len(wanted)} images: pass rng.at(step, one id per index)")
            version = mirrored.cpu().numpy()
        moments = [self._moments] if self._moments > 1 else []
        return Batch(
            self._gathered("latents", shard, row * self._versions + version).view(len(wanted), *moments, *self._latent),
            None if self._labels is None else self._labels[indices],
            self._gathered("text", shard, row).long() if "text" in self.arrays else None,
            self._states(shard, row) if "states" in self.arrays else None,
        )

    def _states(self, shard: np.ndarray, row: np.ndarray) -> Tokens:
        """Encoded captions, as long as the longest of them."""
        count = self._gathered("tokens", shard, row)
        mask = torch.arange(max(count.flatten().tolist(), default=0)) < count
        values = self._gathered("states", shard, row).view(len(row), *self.arrays["states"]["shape"])
        return Tokens(values[:, : mask.shape[1]].float(), mask)

    def _gathered(self, name: str, shard: np.ndarray, row: np.ndarray) -> Shaped[Tensor, "b numbers"]:
        """Rows of an array, copied out of the maps; those of latents are all versions of all samples.

        To join pieces of bytes is the fastest way: 1.1 microseconds for a latent of 8 KiB, of which the copy itself
        takes 0.9; assigning them row by row takes 1.4, np.take shard by shard copies twice.
        """
        maps, kind = self._maps[name], np.dtype(self.arrays[name]["dtype"])
        numbers = math.prod(self.arrays[name]["shape"]) // (self._versions if name == "latents" else 1)
        size = numbers * kind.itemsize
        starts = (row * size).tolist()
        pieces = [maps[s][start : start + size] for s, start in zip(shard.tolist(), starts, strict=True)]
        return torch.from_numpy(np.frombuffer(bytearray().join(pieces), kind).reshape(len(row), numbers))


@register("data", "prepared")
@dataclass(frozen=True)
class Prepared:
    """What `ditkit prepare` wrote: latents of a data set, its labels and its captions, encoded ones, too, in shards.

    Sizes are compared when it is opened, and with `check` the hashes, too.
    """

    positional: ClassVar[str] = "path"
    path: str
    check: bool = False

    def __post_init__(self) -> None:
        if not self.path:
            raise DitkitError("data prepared: no folder was given; write prepared:FOLDER")
        # a run must find it again from wherever it is continued
        object.__setattr__(self, "path", os.path.abspath(os.path.expanduser(self.path)))

    @property
    def folder(self) -> Path:
        return Path(self.path)

    def index(self) -> dict[str, Any]:
        """The index. Raises DitkitError where there is none, where it is not finished, or of a newer format."""
        index = read_index(self.folder)
        if index is None:
            raise DitkitError(f"{self.path} holds no prepared data: ditkit prepare RECIPE --out FOLDER makes it")
        if not index["complete"]:
            raise DitkitError(f"{self.path} is not finished: go on with the `ditkit prepare` that made it")
        return index

    def codec(self) -> Any:
        """The codec that reads the shards, with what it had learned. Raises DitkitError as `index`, or if damaged."""
        return read_codec(self.folder, self.index())

    def original(self) -> Any:
        """The configuration of the data that was encoded."""
        return from_json(self.index()["data"], str(self.folder / INDEX))

    def open(self) -> Dataset:
        """Maps the shards; nothing is read but labels. Raises DitkitError for what is missing or damaged."""
        index = self.index()
        for file in files(index):
            wrong = problem(self.folder, file, self.check)
            if wrong is not None:
                raise DitkitError(
                    f"{self.folder / file['file']} {wrong}: repeat the `ditkit prepare` that made it, which mends it"
                )
        codec = read_codec(self.folder, index)
        split = {
            name: Shards(self.folder, part["shards"], part["arrays"], index["shard"])
            for name, part in index["splits"].items()
        }
        _, moments, *latent = index["splits"]["train"]["arrays"]["latents"]["shape"]
        return Dataset(
            name=index["name"],
            classes=tuple(index["classes"]),
            shape=tuple(latent) if moments == 1 else (moments, *latent),
            train=split["train"],
            heldout=split["heldout"],
            source=f"{index['source']}; encoded in {index['dtype']}, sha256 of the index {sha256(self.folder / INDEX)}",
            codec=codec,
            captions=index["captions"],
            text_encoder=read_text_encoder(self.folder, index),
        )


def read_index(folder: Path) -> dict[str, Any] | None:
    """The index of a folder, finished or not; None where there is none. Raises DitkitError for one of another kind."""
    path = folder / INDEX
    try:
        index = json.loads(path.read_text())
        if index["format"] != FORMAT:
            raise DitkitError(f"{path} is of the format {index['format']}, and this ditkit knows {FORMAT}")
        if not {"complete", "splits", "codec", "shard"} <= set(index):
            raise KeyError("splits")
    except FileNotFoundError:
        return None
    except DitkitError:
        raise
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DitkitError(f"{path} is no index of prepared data: {reason(error)}") from None
    return index


def read_codec(folder: Path, index: Mapping[str, Any]) -> Any:
    """The codec of an index, with what it had learned. Raises DitkitError if that is missing or damaged."""
    codec = from_json(index["codec"], str(folder / INDEX))
    if index["learned"] is None:
        return codec
    path = folder / CODEC
    wrong = problem(folder, index["learned"])
    if wrong is not None:
        raise DitkitError(f"{path} {wrong}: it cannot be mended; prepare into another --out")
    try:
        return codec.loaded(load_file(path))
    except (OSError, SafetensorError) as error:
        raise DitkitError(f"cannot read {path}: {reason(error)}") from None


def read_text_encoder(folder: Path, index: Mapping[str, Any]) -> Any:
    """The configuration of what encoded the captions; None where they were not encoded."""
    found = index.get("text_encoder")
    return None if found is None else from_json(found, str(folder / INDEX))


def files(index: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """All files that a finished index names."""
    learned = [index["learned"]] if index["learned"] is not None else []
    return [*learned, *(shard for part in index["splits"].values() for shard in part["shards"])]


def damaged(path: str | Path) -> list[str]:
    """Compares sizes and hashes of a finished folder: "train-00002.bin is missing" for each file that is wrong."""
    data = Prepared(str(path))
    found = ((file["file"], problem(data.folder, file)) for file in files(data.index()))
    return [f"{name} {wrong}" for name, wrong in found if wrong is not None]
