"""The weights that a training begins with: of a run, of a checkpoint, of a published file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from .interop import FORMATS, read
from .models import ControlConfig, LoRAConfig, unadapted
from .recipe import Recipe
from .runs import find_run, is_run

__all__ = ["Start", "begin_from"]


@dataclass(frozen=True)
class Start:
    """Weights to begin with: where they come from, the configuration they are of, what their output means, and of a run
    the codec of its samples."""

    origin: str
    config: Any
    denoiser: Any
    weights: Mapping[str, Tensor]
    codec: Any = None


def begin_from(path: str | Path, recipe: Recipe) -> Start:
    """The weights of a run, a checkpoint of one, or a published file. Raises DitkitError.

    What a file does not say (the number of heads) is taken to be as in the recipe.
    """
    folder = Path(path)
    if is_run(folder):
        checkpoint, before = find_run(folder)
        weights, name = checkpoint.chosen(before)
        config, weights = unadapted(before.model, weights)
        return Start(f"{name} of {checkpoint.folder}", config, before.denoiser, weights, before.codec)
    asked = ("num_heads", "in_context_start", "num_head_channels", "use_new_attention_order")
    model = recipe.model.base if isinstance(recipe.model, LoRAConfig | ControlConfig) else recipe.model
    options = {key: getattr(model, key) for key in asked if hasattr(model, key)}
    found = read(path, FORMATS, options=options).whole()
    return Start(f"{found.group} of {path} ({found.format.title})", found.config, found.denoiser, found.weights)
