"""Z-Image's Union ControlNets as their authors (alibaba-pai) and diffusers publish them: a branch without its base."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..config import DitkitError
from ..diffusion import Meaning
from ..models import ControlConfig, ZImageConfig
from .diffusers import VERSION
from .format import Format, Shapes, block_count, option, published, shape
from .source import Source
from .table import Rule
from .zimage import Z_IMAGE, sandwich_rules

__all__ = ["Z_IMAGE_CONTROL", "z_image_control_settings"]

_EMBEDDER, _REFINER = "control_all_x_embedder.2-1", "control_noise_refiner."

# by the number of copies, for all published versions
_PLACES = {6: (0, 5, 10, 15, 20, 25), 15: tuple(range(0, 30, 2)), 3: (0, 10, 20)}


def _rules(ours: str, theirs: str) -> tuple[Rule, ...]:
    """A stack of copies with its projections."""
    return (
        *sandwich_rules(f"{ours}.blocks.#", f"{theirs}.#"),
        Rule(f"{ours}.before_proj.*", (f"{theirs}.0.before_proj.*",)),
        Rule(f"{ours}.after_proj.#.*", (f"{theirs}.#.after_proj.*",)),
    )


def _config(source: Source, shapes: Shapes, options: Mapping[str, Any]) -> ControlConfig:
    """The version, from names, shapes and one tensor; the base is the published one of this width, or the person's."""
    dim, features = shape(shapes, f"{_EMBEDDER}.weight", 2)
    known = published(ZImageConfig, hidden_size=dim)
    base = option(options, "base", known, "what its base is")
    count = block_count(shapes, "control_layers.")
    if base.hidden_size != dim or features % 4:
        raise DitkitError(
            f"{_EMBEDDER}.weight is {[dim, features]}, which is not made for patches of 2 x 2 and a base of width "
            f"{base.hidden_size}"
        )
    return ControlConfig(
        base=base,
        places=tuple(option(options, "places", _PLACES.get(count), "which blocks its copies are of")),
        control_channels=features // 4,
        refiner=options.get("refiner") or _refiner(source, shapes),
    )


def _refiner(source: Source, shapes: Shapes) -> str:
    """Union 2.0 and 2.1 have the same names and shapes: the stack that 2.0 never used is as it began, at zero."""
    if not any(name.startswith(_REFINER) for name in shapes):
        return "double_pass"  # diffusers leaves the unused stack out
    name = f"{_REFINER}0.before_proj.weight"
    if name not in shapes:
        return "plain"
    entries = next(group for group in source.groups.values() if name in group)
    return "hints" if bool(source.read({name: entries[name]})[name].any()) else "double_pass"


def _refusal(config: ControlConfig, meaning: Meaning) -> str | None:
    if not isinstance(config.base, ZImageConfig):
        return f"a Union ControlNet's base is a Z-Image, and this one's is a {type(config.base).__name__}"
    if config.refiner == "none":
        return "a Union ControlNet treats its tokens beside the refiners, and this model has refiner none"
    return Z_IMAGE.refusal(config.base, meaning)


Z_IMAGE_CONTROL = Format(
    name="z_image_control",
    title="Union ControlNet of Z-Image",
    model=ControlConfig,
    match=lambda shapes: {f"{_EMBEDDER}.weight", "control_layers.0.before_proj.weight"} <= set(shapes),
    rules=(
        *_rules("control.layers", "control_layers"),
        *_rules("control.refiner", "control_noise_refiner"),
        *sandwich_rules("control.refiner.#", "control_noise_refiner.#"),
        Rule("control.x_embedder.*", (f"{_EMBEDDER}.*",)),
    ),
    config=_config,
    denoiser=lambda source, config: Z_IMAGE.denoiser(source, config.base),
    refusal=_refusal,
    sampling=lambda config: Z_IMAGE.sampling(config.base),
    objective=Z_IMAGE.objective,
    part="control.",
    unread=(f"{_REFINER}*",),
)


def z_image_control_settings(config: ControlConfig) -> dict[str, Any]:
    """config.json of diffusers' ZImageControlNetModel, for what `Z_IMAGE_CONTROL.refusal` lets pass."""
    base = config.base
    refiner = {"plain": None, "double_pass": "control_layers", "hints": "control_noise_refiner"}[config.refiner]
    return {
        "_class_name": "ZImageControlNetModel",
        "_diffusers_version": VERSION,
        "control_layers_places": list(config.places),
        "control_refiner_layers_places": None if refiner is None else list(range(base.refiner_depth)),
        "control_in_dim": config.control_channels,
        "add_control_noise_refiner": refiner,
        "all_patch_size": [2],
        "all_f_patch_size": [1],
        "dim": base.hidden_size,
        "n_refiner_layers": base.refiner_depth,
        "n_heads": base.num_heads,
        "n_kv_heads": base.num_heads,
        "norm_eps": base.norm_eps,
        "qk_norm": True,
    }
