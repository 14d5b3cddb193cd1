"""The captions: 1,700 short English texts, character by character, by discrete diffusion."""

from __future__ import annotations

from ..codecs import Characters
from ..data import Captions
from ..diffusion import GeneralisedKL, Jumps, Mixture, TokenMeaning
from ..models import DDiTConfig
from ..recipe import Recipe, Sample, Train

__all__ = ["captions", "captions_uniform"]


def captions(source: str = "mask") -> Recipe:
    """A DDiT of 1M parameters on masked characters: `ditkit train captions`, then `ditkit sample runs/captions`."""
    return Recipe(
        data=Captions(length=32),
        codec=Characters(),
        model=DDiTConfig(length=32, hidden_size=128, depth=4, num_heads=4, cond_dim=64, drop=0.1),
        denoiser=TokenMeaning(Mixture(source)),
        objective=GeneralisedKL(),
        train=Train(
            steps=3000,
            batch=64,
            lr=2e-3,
            weight_decay=0.05,
            warmup=100,
            cooldown=1500,
            clip=1.0,
            emas=(0.995,),
            sample_every=500,
            checkpoint_every=500,
        ),
        sample=Sample(steps=64, solver=Jumps(), batch=256),
    )


def captions_uniform() -> Recipe:
    """The same from random characters instead of masks: `ditkit train captions_uniform`."""
    return captions("uniform")
