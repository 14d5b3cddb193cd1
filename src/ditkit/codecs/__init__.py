"""Codecs: data to the tensor that is diffused, and back."""

from .characters import Characters
from .codec import Codec
from .pixels import Pixels
from .vectors import Vectors

__all__ = ["Characters", "Codec", "Pixels", "Vectors"]
