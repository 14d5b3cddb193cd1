"""Data sets: what can be opened, by name or by folder."""

from __future__ import annotations

from .dataset import Batch, Dataset, Images, Order, Split
from .digits import Digits
from .folder import Folder

__all__ = ["Batch", "Dataset", "Digits", "Folder", "Images", "Order", "Split"]
