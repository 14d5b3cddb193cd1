"""What a data set is: samples and labels by index, a training and a held-out split, and the order of training.

A sample is what a person would call one: an image (uint8 [c h w]), a video (uint8
[c t h w]), a vector (float32 [d]) or a text (the code points of
its characters, int64 [l], filled up with 0). Codecs turn it into what is diffused.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from jaxtyping import Int, Shaped, UInt8
from torch import Tensor

from ..conditioning import Given, Tokens
from ..rng import Draw, Rng

__all__ = ["Batch", "Dataset", "InMemory", "Order", "Split", "augment", "evenly", "share"]


@dataclass(frozen=True)
class Batch:
    """Samples, their class numbers and their captions; None for data without classes, or without captions."""

    data: Shaped[Tensor, "b *shape"]
    label: Int[Tensor, "b"] | None
    text: Int[Tensor, "b l"] | None = None
    """The code points of captions, filled up with 0."""
    states: Tokens | None = None
    """The captions as a text encoder sees them, where they were prepared."""

    @property
    def given(self) -> Given:
        """What a conditioner reads: labels and captions; where a sample is a text, the text itself (for speech); and
        the samples, of which control images are made."""
        own = self.data if self.data.ndim == 2 and self.data.dtype == torch.int64 else None
        return Given(self.label, own if self.text is None else self.text, self.data, self.states)


class Split(Protocol):
    """A part of a data set. Indices run from 0 to `len(split) - 1`; anything else raises IndexError."""

    def __len__(self) -> int: ...

    def batch(self, indices: Int[Tensor, "b"], rng: Draw | None = None) -> Batch:
        """The samples of these indices: plain, or augmented for training by `rng`, whose rows belong to the indices."""
        ...


def evenly(split: Split, count: int) -> Int[Tensor, "n"]:
    """The indices of so many samples spread evenly over a split, the first among them."""
    return torch.arange(count) * len(split) // count


def augment(images: UInt8[Tensor, "b c h w"], flip: bool, rng: Draw | None) -> UInt8[Tensor, "b c h w"]:
    """The training augmentation: each image mirrored left to right with probability 1/2. Without `rng`, none."""
    if rng is None or not flip:
        return images
    mirrored = rng("flip", "uniform", ()).to(images.device) < 0.5
    if len(mirrored) != len(images):
        raise ValueError(f"{len(mirrored)} draws for {len(images)} images: pass rng.at(step, one id per index)")
    return torch.where(mirrored[:, None, None, None], images.flip(-1), images)


def share(name: str) -> float:
    """A number on [0, 1) that depends on a name alone: samples that are added later move no other to a split."""
    digest = hashlib.blake2b(name.encode(errors="surrogateescape"), digest_size=8).digest()
    return (int.from_bytes(digest, "big") >> 11) * 2.0**-53


@dataclass(frozen=True)
class InMemory:
    """A split that is held in memory: the given rows of a store of samples, which both splits share."""

    data: Shaped[Tensor, "n *shape"]
    labels: Int[Tensor, "n"] | None
    rows: Int[Tensor, "k"]
    flip: bool = False
    texts: Int[Tensor, "n l"] | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, indices: Int[Tensor, "b"], rng: Draw | None = None) -> Batch:
        rows = self.rows[indices]
        label = None if self.labels is None else self.labels[rows]
        text = None if self.texts is None else self.texts[rows]
        return Batch(augment(self.data[rows], self.flip, rng), label, text)


@dataclass(frozen=True)
class Dataset:
    """An opened data set."""

    name: str
    classes: tuple[str, ...]  # empty: without classes
    shape: tuple[int, ...]  # of one sample: [c h w] of an image, [c t h w] of a video, [d] of a vector, [l] of a text
    train: Split
    heldout: Split
    source: str  # one line for the protocol of a measured number: what, how many, which hash
    symbols: str = ""  # the characters that texts are made of, without the filling
    codec: Any = None  # where samples were encoded already: the codec that reads and decodes them
    text_encoder: Any = None  # where captions were encoded already: what did it
    captions: int = 0  # characters of the longest caption; 0: without captions
    broken: Sequence[str] = ()  # "file: reason"; a list that grows where files are read as they are needed

    @property
    def skipped(self) -> tuple[str, ...]:
        """The broken files found so far, each named with the reason, sorted."""
        return tuple(sorted(self.broken))


class Order:
    """The order of training: the data index of each position of an endless stream over `length` images.

    Epoch `position // length` is a permutation that depends on nothing but (seed, epoch, length), so that any process
    can begin anywhere. Raises ValueError for an empty split and for negative positions.
    """

    def __init__(self, rng: Rng, length: int):
        if length < 1:
            raise ValueError("an empty split has no order")
        self.rng, self.length = rng, length
        self._recent: dict[int, Int[Tensor, "length"]] = {}

    def _permutation(self, epoch: int) -> Int[Tensor, "length"]:
        if epoch not in self._recent:
            draws = self.rng.at(epoch, torch.arange(self.length))("order", "uniform", ())
            if len(self._recent) == 2:  # a batch that straddles two epochs needs both
                self._recent.pop(next(iter(self._recent)))
            # stable: 32-bit draws have ties in large sets, and these must not depend on how a machine sorts
            self._recent[epoch] = torch.argsort(draws, stable=True)
        return self._recent[epoch]

    def __call__(self, positions: Int[Tensor, "b"]) -> Int[Tensor, "b"]:
        epochs = torch.div(positions, self.length, rounding_mode="floor")
        indices = torch.empty_like(positions, dtype=torch.int64)
        for epoch in epochs.unique().tolist():
            here = epochs == epoch
            indices[here] = self._permutation(epoch)[positions[here] % self.length]
        return indices
