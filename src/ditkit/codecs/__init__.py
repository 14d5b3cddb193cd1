"""Codecs: data to the tensor that is diffused, and back."""

from .autoencoder import Autoencoder
from .characters import Characters
from .codec import Codec
from .pixels import Pixels
from .token_ids import TokenIds
from .vectors import Vectors

__all__ = ["Autoencoder", "Characters", "Codec", "Pixels", "TokenIds", "Vectors"]
