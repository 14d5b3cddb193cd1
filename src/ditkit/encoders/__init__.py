"""Encoders: frozen networks that see images, for features to learn from or to measure with."""

from .efficientnet import EfficientNet, EfficientNetLite0, load_lite0
from .encoder import Encoder
from .transformers import Transformers

__all__ = ["EfficientNet", "EfficientNetLite0", "Encoder", "Transformers", "load_lite0"]
