"""What the shards of a prepared data set hold: which samples are in which, and the bytes of each."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Shaped
from safetensors.torch import save
from torch import Tensor

from .codecs import Codec, Latents, Posterior
from .conditioners import TextEncoder, text_encoder
from .conditioning import strings
from .config import DitkitError, to_json
from .data import Dataset, Split
from .data.prepared import CODEC, FORMAT, places
from .recipe import Recipe, device_of
from .rng import Draw

__all__ = ["Job", "Task", "file_entry", "mirrors", "packed"]


@dataclass(frozen=True)
class Task:
    """One shard: samples first..last-1 of a split."""

    split: str
    file: str
    first: int
    last: int


@dataclass(frozen=True)
class Job:
    """What is encoded, and the index of it without its shards."""

    data: Dataset
    codec: Codec
    index: dict[str, Any]
    device: torch.device
    encoder: TextEncoder | None = None
    """Of captions."""

    @classmethod
    def planned(cls, recipe: Recipe, data: Dataset, codec: Codec, dtype: str, shard: int, batch: int) -> Job:
        """Raises DitkitError for data and codecs that cannot be prepared."""
        if codec.vocab:
            raise DitkitError(f"{data.name} is encoded to tokens, which are as small as the data: train on it as it is")
        if not len(data.train):
            raise DitkitError(f"{data.name} has no training samples")
        device = device_of(recipe.train.device)
        codec.shape(data.shape)
        one = data.train.batch(torch.zeros(1, dtype=torch.int64))
        encoder = text_encoder(recipe.conditioner)
        if encoder is not None:
            if one.text is None:
                raise DitkitError(f"the conditioner text reads captions, and {data.name} has none: choose another")
            encoder = encoder.noted()
        if not isinstance(codec, Posterior) and (drawn := _draws(lambda rng: codec.encode(one.data.to(device), rng))):
            raise DitkitError(f"the codec draws {drawn[0]!r} and does not say from what: it cannot be prepared")
        _, moments, *latent = _moments(codec, one.data.to(device)).shape
        mirrors = _mirrors(data.train, data.name)
        splits = {}
        for name, split in (("train", data.train), ("heldout", data.heldout)):
            versions = 2 if mirrors and name == "train" else 1
            arrays = {"latents": {"dtype": dtype, "shape": [versions, moments, *latent]}}
            if one.label is not None:
                arrays["label"] = {"dtype": "int64", "shape": []}
            if one.text is not None:
                arrays["text"] = {"dtype": "int32", "shape": list(one.text.shape[1:])}
            if encoder is not None:
                arrays["states"] = {"dtype": dtype, "shape": [encoder.length, encoder.width]}
                arrays["tokens"] = {"dtype": "int32", "shape": []}
            splits[name] = {"count": len(split), "arrays": arrays, "shards": []}
        learned = codec.state()
        index = {
            "format": FORMAT,
            "complete": False,
            "name": data.name,
            "source": data.source,
            "classes": list(data.classes),
            "captions": data.captions,
            "data": to_json(recipe.data),
            "codec": to_json(Latents(codec, tuple(data.shape), moments)),
            "learned": file_entry(CODEC, packed(learned)) if learned else None,
            "text_encoder": None if encoder is None else to_json(encoder),
            "dtype": dtype,
            "shard": shard,
            "batch": batch,
            "splits": splits,
        }
        return cls(data, codec, index, device, encoder)

    @property
    def tasks(self) -> list[Task]:
        """All shards, in order."""
        size = self.index["shard"]
        return [
            Task(name, f"{name}-{number:05d}.bin", first, min(first + size, part["count"]))
            for name, part in self.index["splits"].items()
            for number, first in enumerate(range(0, part["count"], size))
        ]

    @torch.no_grad()
    def content(self, task: Task, tick: Callable[[int], Any]) -> bytearray:
        """The bytes of a shard; tick(n) after each n samples. Raises DitkitError for what float16 cannot hold."""
        arrays = self.index["splits"][task.split]["arrays"]
        where, size = places(arrays, task.last - task.first)
        content = bytearray(size)
        whole = {
            name: np.frombuffer(content, np.uint8)[a:b].view(arrays[name]["dtype"]).reshape(-1, *arrays[name]["shape"])
            for name, (a, b) in where.items()
        }
        split: Split = self.data.train if task.split == "train" else self.data.heldout
        for first in range(task.first, task.last, self.index["batch"]):
            ids = torch.arange(first, min(first + self.index["batch"], task.last))
            rows = slice(first - task.first, first - task.first + len(ids))
            found = split.batch(ids)
            images = found.data.to(self.device)
            versions = [images, images.flip(-1)][: arrays["latents"]["shape"][0]]
            for version, data in enumerate(versions):
                moments = _moments(self.codec, data).float().cpu().numpy()
                said = f"latents of samples {first}..{int(ids[-1])} of the {task.split} split"
                _rounded(whole["latents"][rows, version], moments, said)
            for name, values in (("label", found.label), ("text", found.text)):
                if values is not None:
                    whole[name][rows] = values.numpy()
            if self.encoder is not None and found.text is not None:
                tokens = self.encoder(strings(found.text))
                whole["tokens"][rows] = tokens.mask.sum(1).numpy()
                said = f"states of the captions {first}..{int(ids[-1])} of the {task.split} split"
                _rounded(whole["states"][rows, : tokens.mask.shape[1]], tokens.values.numpy(), said)
            tick(len(ids))
        return content


def _rounded(place: np.ndarray, values: np.ndarray, said: str) -> None:
    """Write numbers into a part of a shard. Raises DitkitError for what its type cannot hold."""
    with np.errstate(over="ignore"):
        place[...] = values
    if not np.isfinite(place).all():
        largest = float(np.abs(values).max())
        raise DitkitError(
            f"{said} are as large as {largest:g}, which {place.dtype} cannot hold: choose --dtype float32"
        )


def _moments(codec: Codec, data: Shaped[Tensor, "b *sample"]) -> Float[Tensor, "b m *latent"]:
    return codec.moments(data) if isinstance(codec, Posterior) else codec.encode(data)[:, None]


class _Asking:
    """Draws that remember what was asked for; each is everywhere the same number."""

    def __init__(self, count: int, value: float):
        self.count, self.value, self.names = count, value, list[str]()

    def at(self, step: int, sample_ids: Tensor | None = None) -> _Asking:
        return self

    def __call__(self, name: str, law: Any, shape: Sequence[int] = ()) -> Tensor:
        self.names.append(name)
        return torch.full((self.count, *shape), self.value)


def _draws(run: Callable[[Draw], Any], value: float = 0.5) -> list[str]:
    """The names of the draws that an operation on one sample asks for."""
    asking = _Asking(1, value)
    run(asking)
    return asking.names


def mirrors(split: Split) -> bool:
    """Whether training mirrors the images of a split, or reads latents of mirrored ones."""
    return "flip" in _draws(lambda rng: split.batch(torch.zeros(1, dtype=torch.int64), rng))


def _mirrors(split: Split, name: str) -> bool:
    """Whether training mirrors images left to right. Raises DitkitError for another augmentation."""
    one = torch.zeros(1, dtype=torch.int64)
    names = _draws(lambda rng: split.batch(one, rng))
    if not names:
        return False
    mirrored = split.batch(one, _Asking(1, 0.0)).data
    if names != ["flip"] or not torch.equal(mirrored, split.batch(one).data.flip(-1)):
        raise DitkitError(f"{name} is augmented by {', '.join(names)}; only mirroring left to right can be prepared")
    return True


def packed(learned: Mapping[str, Tensor]) -> bytes:
    return save({name: value.cpu().contiguous() for name, value in learned.items()})


def file_entry(file: str, content: bytes | bytearray) -> dict[str, Any]:
    return {"file": file, "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
