"""Guides: a strong and weak opinions combined, guided = strong + sum over guides of (scale - 1) rule(strong, weak)."""

from .classifier_free import APG, CFG, CFGPP, CFGZeroStar, ClassifierFree
from .finish import Rescale
from .guided import Finish, Guide, Guided, Moment, Opinion, guide
from .weak import Autoguidance, PerturbedAttention, SkipLayer

__all__ = [
    "APG",
    "CFG",
    "CFGPP",
    "Autoguidance",
    "CFGZeroStar",
    "ClassifierFree",
    "Finish",
    "Guide",
    "Guided",
    "Moment",
    "Opinion",
    "PerturbedAttention",
    "Rescale",
    "SkipLayer",
    "guide",
]
