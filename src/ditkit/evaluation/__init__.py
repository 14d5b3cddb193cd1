"""Metrics and their protocols, and the report of a run."""

from .audit import Audit, audit, write_audit
from .classifier import Classifier, train_classifier
from .decisions import Decisions, decide
from .distances import Estimate, frechet_distance, gaussian_distance, kernel_distance
from .features import Features
from .heldout import heldout_loss, mean_loss
from .intervals import Interval, bootstrap_mean
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
from .moments import Gaussian, Moments, frechet_of_gaussians
from .monitor import Observation, Observer
from .report import bounds, curve, write_report
from .sets import density_coverage, inception_score, precision_recall, vendi_score
from .texts import Nearest, nearest_texts

__all__ = [
    "MEANING",
    "Audit",
    "Classifier",
    "Decisions",
    "Estimate",
    "FMem",
    "Features",
    "Gaussian",
    "Interval",
    "Measurement",
    "Moments",
    "Nearest",
    "Observation",
    "Observer",
    "audit",
    "bootstrap_mean",
    "bounds",
    "codec_kid",
    "curve",
    "decide",
    "density_coverage",
    "evaluate",
    "f_mem",
    "features_protocol",
    "frechet_distance",
    "frechet_of_gaussians",
    "gaussian_distance",
    "heldout_features",
    "heldout_loss",
    "inception_score",
    "kernel_distance",
    "mean_loss",
    "measure_kid",
    "memorized",
    "nearest_texts",
    "precision_recall",
    "sampling_protocol",
    "train_classifier",
    "vendi_score",
    "within_class_distance",
    "write_audit",
    "write_report",
]
