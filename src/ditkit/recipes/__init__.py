"""Recipes: plain functions that return a Recipe. Each says its command, its time and what to expect."""

from __future__ import annotations

from collections.abc import Callable

from ..config import DitkitError, near
from ..recipe import Recipe
from . import dit, jit, lightningdit, repa, sit
from .autoencoder import autoencoder
from .captions import captions, captions_uniform
from .control import control
from .digits import demo, digits, digits_dit, digits_resnet, digits_unet
from .emoji import emoji_captions, emoji_latents, emoji_pixels
from .families import FAMILIES
from .folder import folder, hugging_face

__all__ = [
    "FAMILIES",
    "PUBLISHED",
    "autoencoder",
    "captions",
    "captions_uniform",
    "control",
    "demo",
    "digits",
    "digits_dit",
    "digits_resnet",
    "digits_unet",
    "emoji_captions",
    "emoji_latents",
    "emoji_pixels",
    "find_recipe",
    "folder",
    "hugging_face",
]

_NAMED: dict[str, Callable[[], Recipe]] = {
    "digits": digits,
    "digits_dit": digits_dit,
    "digits_unet": digits_unet,
    "digits_resnet": digits_resnet,
    "autoencoder": autoencoder,
    "demo": demo,
    "captions": captions,
    "captions_uniform": captions_uniform,
    "emoji_captions": emoji_captions,
    "emoji_latents": emoji_latents,
    "emoji_pixels": emoji_pixels,
    **FAMILIES,
}

PUBLISHED: dict[str, Callable[[str], Recipe]] = {
    name: getattr(module, name) for module in (dit, sit, jit, repa, lightningdit) for name in module.__all__
}
"""The recipes of papers, which are given the folder of ImageNet's training images."""


_OF_A_PATH: dict[str, Callable[[str], Recipe]] = {
    "folder": folder,
    "hf": hugging_face,
    "autoencoder": autoencoder,
    "control": control,
}


def find_recipe(name: str) -> Recipe:
    """The recipe of a name, of folder:PATH, hf:NAME, control:RUN, or of a published one with its images: dit_xl_2:PATH.

    Raises DitkitError, with the near names, for an unknown one.
    """
    kind, colon, path = name.partition(":")
    if kind in _OF_A_PATH and path:
        return _OF_A_PATH[kind](path)
    if kind in PUBLISHED:
        if not path:
            raise DitkitError(f"the recipe {kind} needs the folder of ImageNet's training images: write {kind}:PATH")
        return PUBLISHED[kind](path)
    if name in _NAMED:
        return _NAMED[name]()
    known = PUBLISHED if colon else [*_NAMED, *PUBLISHED]
    raise DitkitError(f"unknown recipe {kind!r}: {near(kind, [*known, 'folder:PATH', 'hf:NAME', 'control:RUN'])}")
