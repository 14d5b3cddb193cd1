"""Metrics and their protocols, and the report of a run."""

from .audit import Audit, audit, write_audit
from .classifier import Classifier, train_classifier
from .decisions import Decisions, decide
from .distances import Estimate, frechet_distance, gaussian_distance, kernel_distance
from .features import Features
from .heldout import heldout_loss, mean_loss
from .intervals import Interval, bootstrap_mean
from .judge import Judgement, find_protocol, judge, judge_run, write_judgement
from .labels import RULES, labels_by
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
from .protocols import Evaluator, identity
from .references import Reference, read_statistics, reference_of_images
from .report import bounds, curve, write_report
from .sets import density_coverage, inception_score, precision_recall, vendi_score
from .sources import Images, images_in_memory, images_of, images_of_split
from .texts import Nearest, nearest_texts

__all__ = [
    "MEANING",
    "RULES",
    "Audit",
    "Classifier",
    "Decisions",
    "Estimate",
    "Evaluator",
    "FMem",
    "Features",
    "Gaussian",
    "Images",
    "Interval",
    "Judgement",
    "Measurement",
    "Moments",
    "Nearest",
    "Observation",
    "Observer",
    "Reference",
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
    "find_protocol",
    "frechet_distance",
    "frechet_of_gaussians",
    "gaussian_distance",
    "heldout_features",
    "heldout_loss",
    "identity",
    "images_in_memory",
    "images_of",
    "images_of_split",
    "inception_score",
    "judge",
    "judge_run",
    "kernel_distance",
    "labels_by",
    "mean_loss",
    "measure_kid",
    "memorized",
    "nearest_texts",
    "precision_recall",
    "read_statistics",
    "reference_of_images",
    "sampling_protocol",
    "train_classifier",
    "vendi_score",
    "within_class_distance",
    "write_audit",
    "write_judgement",
    "write_report",
]
