"""Codecs: data to the tensor that is diffused, and back."""

from .autoencoder import Autoencoder
from .characters import Characters
from .codec import Codec, Posterior, Samples, Stateless, examples
from .latents import Latents
from .pca import Pca
from .pixels import Pixels
from .token_ids import TokenIds
from .trained import TrainedAutoencoder
from .vectors import Vectors

__all__ = [
    "Autoencoder",
    "Characters",
    "Codec",
    "Latents",
    "Pca",
    "Pixels",
    "Posterior",
    "Samples",
    "Stateless",
    "TokenIds",
    "TrainedAutoencoder",
    "Vectors",
    "examples",
]
