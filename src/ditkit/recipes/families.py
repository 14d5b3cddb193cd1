"""A recipe for each family at a size that trains on any machine: `ditkit train mmdit_tiny`.

They are not meant to draw well but to be trained whole, as the family's own meaning has it and on its own kind of
input: pictures and clips are real, texts and speech are random vectors in place of an encoder. 200 steps each; how far
the loss falls is tested (tests/test_families.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from ..codecs import Characters
from ..conditioners import Label, RandomSpeech, RandomText
from ..data import Captions, Digits, MovingDigits
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

_TRAIN = Train(
    steps=200, batch=16, lr=1e-3, warmup=20, clip=1.0, emas=(0.95,), log_every=10, sample_every=0, checkpoint_every=100
)


def _flow(name: str, meaning: Meaning, **overrides: Any) -> Recipe:
    """Digits of 16 x 16 by flow matching; their classes as texts where the network is given text."""
    model: Any = model_config(name, **overrides)
    texts = RandomText(width=model.text_dim, pooled=getattr(model, "pooled_dim", 0)) if _reads(model) else Label()
    return Recipe(
        data=Digits(resolution=16),
        conditioner=texts,
        model=model,
        denoiser=meaning,
        objective=Regression("velocity", LogitNormal()),
        train=_TRAIN,
        sample=Sample(steps=20, solver=Euler(), guidance=2.0, batch=100),
    )


def _table(name: str, variance: str | None) -> Recipe:
    """Digits of 16 x 16 by the noise on the table of 1000 steps."""
    return replace(
        _flow(name, Meaning(DDPM(), "eps", "index")),
        objective=Regression("eps", Discrete(1000), variance=variance),
        sample=Sample(
            steps=50, solver=Ancestral("learned" if variance else "posterior"), grid=Respaced(), guidance=2.0, batch=100
        ),
    )


def _reads(model: Any) -> bool:
    return hasattr(model, "text_dim")


def mmdit_tiny() -> Recipe:
    """Stable Diffusion 3.5: two streams, some blocks with a second attention; and a pooled text."""
    return _flow("mmdit_tiny", Meaning(prediction="velocity", clock="1000t"))


def flux1_tiny() -> Recipe:
    """FLUX.1 without the guidance scale, which is for a network that was distilled."""
    return _flow("flux1_tiny", Meaning(prediction="velocity", clock="t"), guidance=False)


def flux2_tiny() -> Recipe:
    """FLUX.2 without the guidance scale."""
    return _flow("flux2_tiny", Meaning(prediction="velocity", clock="t"), guidance=False)


def z_image_tiny() -> Recipe:
    """Z-Image: the velocity with its sign turned, on a clock that is 1 for data."""
    return _flow("z_image_tiny", Meaning(prediction="-velocity", clock="1-t"))


def lumina2_tiny() -> Recipe:
    """Lumina-Image 2.0, whose sign and clock are Z-Image's."""
    return _flow("lumina2_tiny", Meaning(prediction="-velocity", clock="1-t"))


def kandinsky5_tiny() -> Recipe:
    """Kandinsky 5 on clips of moving digits."""
    recipe = _flow("kandinsky5_tiny", Meaning(prediction="velocity", clock="1000t"))
    return replace(recipe, data=MovingDigits(frames=4, resolution=16, digit=10))


def sana_tiny() -> Recipe:
    """Sana, whose tokens are single pixels here: of digits of 8 x 8."""
    return replace(_flow("sana_tiny", Meaning(prediction="velocity", clock="1000t")), data=Digits(resolution=8))


def pixart_tiny() -> Recipe:
    """PixArt: the noise on the table of 1000 steps, and the variance."""
    return _table("pixart_tiny", "hybrid")


def resnet_tiny() -> Recipe:
    """The plain residual network."""
    return _flow("resnet_tiny", Meaning(prediction="velocity", clock="1000t"))


def unet_tiny() -> Recipe:
    """ADM's U-Net: the noise, on the table of 1000 steps."""
    return _table("unet_tiny", None)


def drax_tiny() -> Recipe:
    """Drax on captions that are spelled aloud, with the middle distribution that it learns."""
    return Recipe(
        data=Captions(length=16),
        codec=Characters(),
        conditioner=RandomSpeech(width=64),
        model=model_config("drax_tiny"),
        denoiser=TokenMeaning(Mixture("uniform"), clock="1-t"),
        objective=DraxLoss(width=64, heads=4),
        train=_TRAIN,
        sample=Sample(steps=16, solver=Jumps(temperature=0.1), batch=100),
    )


FAMILIES: dict[str, Callable[[], Recipe]] = {
    recipe.__name__: recipe
    for recipe in (
        mmdit_tiny,
        flux1_tiny,
        flux2_tiny,
        z_image_tiny,
        lumina2_tiny,
        kandinsky5_tiny,
        pixart_tiny,
        sana_tiny,
        resnet_tiny,
        unet_tiny,
        drax_tiny,
    )
}
