"""Coloured emoji of 64 x 64 pixels, in pixel space and in latent space: the codec is the only difference; and from
captions."""

from __future__ import annotations

from dataclasses import replace

from ..codecs import Pca
from ..conditioners import Text, TextEncoder
from ..data import Emoji
from ..diffusion import Heun, LogitNormal, Meaning, Regression
from ..models import JiTConfig, MMDiTConfig
from ..recipe import Evaluate, Recipe, Sample, Train

__all__ = ["emoji_captions", "emoji_latents", "emoji_pixels"]


def emoji_pixels() -> Recipe:
    """A JiT on patches of 8 x 8 pixels: `ditkit train emoji_pixels`."""
    return Recipe(
        data=Emoji(flip=True),
        model=JiTConfig(
            patch_size=8,
            hidden_size=192,
            depth=8,
            num_heads=4,
            bottleneck_dim=48,
            in_context_len=4,
            in_context_start=2,
        ),
        denoiser=Meaning(prediction="x0", clock="1-t", t_eps=0.05),
        objective=Regression("velocity", LogitNormal(0.8, 0.8)),
        train=Train(
            steps=3000,
            batch=32,
            lr=1e-3,
            warmup=100,
            cooldown=1500,
            clip=1.0,
            emas=(0.99,),
            sample_every=500,
            checkpoint_every=500,
        ),
        sample=Sample(steps=25, solver=Heun(), guidance=2.0, interval=(0.1, 1.0), batch=60),
        evaluate=Evaluate(samples=500, size=64),
    )


def emoji_latents() -> Recipe:
    """The same network on principal components of 4 x 4 pixels, in patches of as many pixels: `ditkit train
    emoji_latents`."""
    recipe = emoji_pixels()
    return replace(recipe, codec=Pca(factor=4, channels=16), model=replace(recipe.model, patch_size=2))


def emoji_captions() -> Recipe:
    """An MMDiT on the same latents, which is given the caption instead of the category: `ditkit train emoji_captions`.

    Captions are encoded by all-MiniLM-L6-v2; the longest has 12 tokens. `ditkit prepare emoji_captions --out FOLDER`
    encodes drawings and captions once.
    """
    recipe = emoji_latents()
    return replace(
        recipe,
        conditioner=Text(TextEncoder(length=16)),
        model=MMDiTConfig(
            input_size=16,
            patch_size=2,
            hidden_size=192,
            depth=8,
            num_heads=4,
            qk_norm=True,
            text_dim=384,
            pooled_dim=384,
            position_size=16,
        ),
        denoiser=replace(recipe.denoiser, clock="1000t"),
    )
