"""Conditioners: what comes with the data, as what is given to the network."""

from .label import Conditioner, Label

__all__ = ["Conditioner", "Label"]
