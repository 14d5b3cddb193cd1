"""Conditioners: what comes with the data, as what is given to the network."""

from .features import RandomSpeech, RandomText
from .label import Conditioner, Label

__all__ = ["Conditioner", "Label", "RandomSpeech", "RandomText"]
