"""The training loop, its averages and its log."""

from .ema import Averages
from .log import WALL_CLOCK, Log
from .loop import Trainer, train

__all__ = ["WALL_CLOCK", "Averages", "Log", "Trainer", "train"]
