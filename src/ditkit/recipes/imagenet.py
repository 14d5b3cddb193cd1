"""What the published recipes share: the images of ImageNet, and how long an epoch of them is."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ..codecs import Autoencoder
from ..data import Folder
from ..models import model_config
from ..recipe import Evaluate

__all__ = ["EVALUATE", "IMAGES", "imagenet", "latents", "sized"]

IMAGES = 1_281_167
"""Training images of ImageNet-1K."""

EVALUATE = Evaluate(samples=50_000)
"""The number of samples of a published FID; see docs/recipes.md for what else such a number takes."""


def imagenet(path: str, resolution: int) -> Folder:
    """The training images below `path`, one folder a class; all of them are trained on, half of them mirrored."""
    return Folder(path, resolution=resolution, flip=True, holdout=0.0)


def latents(decoder: str) -> Autoencoder:
    """Stable Diffusion's autoencoder, whose decoder is "mse" or "ema"; latents are draws, scaled by 0.18215."""
    path = f"stabilityai/sd-vae-ft-{decoder}"
    return Autoencoder(path, scale=0.18215, shift=0.0, channels=4, factor=8, sample=True, means=(), stds=())


def sized(name: str, **changes: Any) -> Any:
    """The configuration of a named model, with changes."""
    return replace(model_config(name), **changes)  # type: ignore[type-var]
