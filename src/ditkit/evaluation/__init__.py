"""Metrics and their protocols, and the report of a run."""

from .classifier import Classifier, train_classifier
from .decisions import Decisions, decide
from .distances import Estimate, frechet_distance, kernel_distance
from .features import Features
from .heldout import heldout_loss, mean_loss
from .measure import (
    MEANING,
    Measurement,
    codec_kid,
    evaluate,
    features_protocol,
    heldout_features,
    measure_kid,
    sampling_protocol,
)
from .memorization import FMem, f_mem, memorized, within_class_distance
from .monitor import Observation, Observer
from .report import bounds, curve, write_report
from .texts import Nearest, nearest_texts

__all__ = [
    "MEANING",
    "Classifier",
    "Decisions",
    "Estimate",
    "FMem",
    "Features",
    "Measurement",
    "Nearest",
    "Observation",
    "Observer",
    "bounds",
    "codec_kid",
    "curve",
    "decide",
    "evaluate",
    "f_mem",
    "features_protocol",
    "frechet_distance",
    "heldout_features",
    "heldout_loss",
    "kernel_distance",
    "mean_loss",
    "measure_kid",
    "memorized",
    "nearest_texts",
    "sampling_protocol",
    "train_classifier",
    "within_class_distance",
    "write_report",
]
