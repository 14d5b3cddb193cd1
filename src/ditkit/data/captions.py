"""1,900 short English texts that install with a package, the names of the emoji: `pip install 'ditkit[data]'`."""

from __future__ import annotations

import hashlib
import importlib.util
import json
from dataclasses import dataclass
from pathlib import Path

import torch

from ..config import DitkitError, register
from ..rng import Rng
from .dataset import Dataset, InMemory
from .text import points

__all__ = ["Captions"]

SHA256 = "68d0dc4ac61ccb49c1335809ffb963bcca0fdb4a7e04278ff597125a2b043122"  # emoji.json of emoji 2.16.0
HELD_OUT = 0.1
SKIN_TONES = range(0x1F3FB, 0x1F400)


def _read() -> bytes:
    # find_spec does not import emoji
    spec = importlib.util.find_spec("emoji")
    file = Path(spec.origin).parent / "unicode_codes/emoji.json" if spec and spec.origin else None
    if file is None or not file.is_file():
        raise DitkitError(
            "data captions: the package emoji, which holds the texts, is missing: pip install 'ditkit[data]'"
        )
    content = file.read_bytes()
    found = hashlib.sha256(content).hexdigest()
    if found != SHA256:
        raise DitkitError(
            f"data captions: {file} is not the file of emoji 2.16.0 (sha256 {found[:12]}..., not {SHA256[:12]}...):"
            " pip install --force-reinstall --no-deps emoji==2.16.0"
        )
    return content


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
        texts = [text for text in _texts(_read()) if len(text) <= self.length]
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
