"""Data sets: what can be opened, by name or by folder."""

from __future__ import annotations

from .captions import Captions
from .dataset import Batch, Dataset, InMemory, Order, Split, evenly
from .digits import Digits
from .elsewhere import Elsewhere
from .emoji import Emoji
from .folder import Folder, images_below
from .hugging_face import HuggingFace
from .images import Unreadable, read_image
from .moving_digits import MovingDigits
from .prepared import Prepared
from .spiral import Spiral
from .text import points, prompt, strings, template
from .twins import Twins

__all__ = [
    "Batch",
    "Captions",
    "Dataset",
    "Digits",
    "Elsewhere",
    "Emoji",
    "Folder",
    "HuggingFace",
    "InMemory",
    "MovingDigits",
    "Order",
    "Prepared",
    "Spiral",
    "Split",
    "Twins",
    "Unreadable",
    "evenly",
    "images_below",
    "points",
    "prompt",
    "read_image",
    "strings",
    "template",
]
