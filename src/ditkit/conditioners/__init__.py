"""Conditioners: what comes with the data, as what is given to the network."""

from .edges import Edges
from .features import RandomSpeech, RandomText
from .label import Conditioner, Label
from .text import Text, TextEncoder, text_encoder

__all__ = ["Conditioner", "Edges", "Label", "RandomSpeech", "RandomText", "Text", "TextEncoder", "text_encoder"]
