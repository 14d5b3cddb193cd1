"""Codecs: data to the tensor that is diffused, and back."""

from .pixels import Codec, Pixels

__all__ = ["Codec", "Pixels"]
