"""Studies: controlled comparisons that papers made, as one command, derived from recipes, with their reports."""

from __future__ import annotations

from collections.abc import Callable

from ..config import DitkitError, near
from .backbones import backbones
from .conditioning import conditioning
from .manifold import manifold
from .memorization import memorization
from .prediction_loss import prediction_loss
from .resolution import resolution
from .runner import compare, read_results, write_report
from .scaling import scaling
from .solvers import solvers
from .spaces import spaces
from .study import Cell, Claim, Finding, Results, Study, Verdict

__all__ = [
    "PRESETS",
    "Cell",
    "Claim",
    "Finding",
    "Results",
    "Study",
    "Verdict",
    "compare",
    "find_study",
    "read_results",
    "write_report",
]

PRESETS = ("cpu", "full")

_NAMED: dict[str, Callable[[str], Study]] = {
    "backbones": backbones,
    "conditioning": conditioning,
    "manifold": manifold,
    "memorization": memorization,
    "prediction-loss": prediction_loss,
    "resolution": resolution,
    "scaling": scaling,
    "solvers": solvers,
    "spaces": spaces,
}


def find_study(name: str, preset: str = "cpu") -> Study:
    """The study of a name. Raises DitkitError, with the near names, for an unknown study or preset."""
    if name not in _NAMED:
        raise DitkitError(f"unknown study {name!r}: {near(name, _NAMED)}")
    if preset not in PRESETS:
        raise DitkitError(f"unknown preset {preset!r}: {near(preset, PRESETS)}")
    return _NAMED[name](preset)
