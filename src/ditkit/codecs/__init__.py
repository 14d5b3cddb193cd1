"""Codecs: data to the tensor that is diffused, and back."""

from .codec import Codec
from .pixels import Pixels
from .vectors import Vectors

__all__ = ["Codec", "Pixels", "Vectors"]
