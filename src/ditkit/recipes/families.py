"""A recipe for each family at a size that trains on any machine: `ditkit train z_image_tiny`.

They are not meant to draw well but to be trained whole, as the family's own meaning has it and on its own kind of
input: pictures and clips are real, texts and speech are random vectors in place of an encoder. 200 steps each; how far
the loss falls is tested, and told in docs/families.md.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from ..codecs import Characters
from ..conditioners import Label, RandomSpeech, RandomText
from ..data import Captions, Digits
from ..diffusion import (
    DDPM,
    Ancestral,
    Discrete,
    DraxLoss,
    Euler,
    Jumps,
    LogitNormal,
    Meaning,
    Mixture,
    Regression,
    TokenMeaning,
)
from ..diffusion.grid import Respaced
from ..models import model_config
from ..recipe import Recipe, Sample, Train

__all__ = ["FAMILIES"]


def _train(**changes: Any) -> Train:
    settings = {
        "steps": 200, "batch": 16, "lr": 1e-3, "warmup": 20, "clip": 1.0, "emas": (0.95,), "log_every": 10,
        "sample_every": 0, "checkpoint_every": 100,
    }  # fmt: skip
    return Train(**{**settings, **changes})


def _digits(name: str, meaning: Meaning, conditioner: Any, **changes: Any) -> Recipe:
    """Digits of 16 x 16 by flow matching, guided as the family is."""
    return Recipe(
        data=Digits(resolution=16),
        conditioner=conditioner,
        model=model_config(name),
        denoiser=meaning,
        objective=Regression("velocity", LogitNormal()),
        train=_train(**changes),
        sample=Sample(steps=20, solver=Euler(), guidance=2.0, batch=100),
    )


def z_image_tiny() -> Recipe:
    """Z-Image: the velocity with its sign turned, on a clock that is 1 for data."""
    return _digits("z_image_tiny", Meaning(prediction="-velocity", clock="1-t"), RandomText(width=64))


def unet_tiny() -> Recipe:
    """ADM's U-Net: the noise on the table of 1000 steps."""
    return replace(
        _digits("unet_tiny", Meaning(DDPM(), "eps", "index"), Label()),
        objective=Regression("eps", Discrete(1000)),
        sample=Sample(steps=50, solver=Ancestral("posterior"), grid=Respaced(), guidance=2.0, batch=100),
    )


def resnet_tiny() -> Recipe:
    """The plain residual network."""
    return _digits("resnet_tiny", Meaning(prediction="velocity", clock="1000t"), Label())


def drax_tiny() -> Recipe:
    """Drax on spelled captions, with its middle distribution."""
    return Recipe(
        data=Captions(length=16),
        codec=Characters(),
        conditioner=RandomSpeech(width=64),
        model=model_config("drax_tiny"),
        denoiser=TokenMeaning(Mixture("uniform"), clock="1-t"),
        objective=DraxLoss(width=64, heads=4),
        train=_train(),
        sample=Sample(steps=16, solver=Jumps(temperature=0.1), batch=100),
    )


FAMILIES: dict[str, Callable[[], Recipe]] = {
    recipe.__name__: recipe for recipe in (z_image_tiny, unet_tiny, resnet_tiny, drax_tiny)
}
