"""Parts of networks as published: a ControlNet's branch, adapters of low rank; with a base they become a run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from .conditioners import Edges
from .config import DitkitError
from .importing import imported, new_run, write_run
from .interop import FORMATS, adapted, open_source, read, size_name
from .models import ControlConfig, unadapted
from .recipe import Recipe
from .runs import Run, find_run, is_run

__all__ = ["import_part"]


def import_part(
    path: str | Path,
    base: str | Path,
    out: str | Path | None = None,
    *,
    autoencoder: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> tuple[Run, list[str]]:
    """Make a run of a part and its base; the run, and lines that say what was found.

    path: a file with the branch of a ControlNet, whose control image is encoded as the base's data is, or with adapters
    of low rank, which are merged into the base: W + B A. base: a run, a checkpoint, or a published file. autoencoder
    and options are as in `import_file`, of the base; options["places"] are the blocks of which the branch has copies.
    Raises DitkitError for a file that is neither, for a base that does not fit, and for a folder that is not empty.
    """
    run = new_run(path, out)
    source, given = open_source(path), dict(options or {})
    places = given.pop("places", None)
    recipe, weights, lines = _base(base, autoencoder, given)
    if source.adapters:
        weights = adapted(path, FORMATS, recipe.model, weights)
        count = sum(name.endswith("lora_A.weight") for group in source.groups.values() for name in group)
        lines.append(f"with the adapters of {path} beside {count} Linears, merged into it")
    else:
        known: dict[str, Any] = {"base": recipe.model, **({} if places is None else {"places": tuple(places)})}
        found = read(path, FORMATS, options=known)
        if not found.format.part:
            raise DitkitError(f"{path} holds a whole {found.format.title}: import it without --base")
        config = found.config
        weights = {**{f"base.{name}": value for name, value in weights.items()}, **found.weights}
        recipe = replace(recipe, model=config, conditioner=Edges(recipe.conditioner))
        blocks = ", ".join(map(str, config.places))
        lines.append(
            f"{found.format.title}: {size_name(config) or 'no published size'}, copies of the blocks {blocks}, "
            f"control of {config.control_channels} channels, refiner {config.refiner}"
        )
    learned = recipe.codec.state()
    write_run(run, recipe, {"model": weights, **({"codec": learned} if learned else {})}, lines)
    return run, lines


def _base(
    base: str | Path, autoencoder: str | None, options: Mapping[str, Any]
) -> tuple[Recipe, dict[str, Tensor], list[str]]:
    """The recipe of the base, its weights, and where they are from. Raises DitkitError."""
    folder = Path(base)
    if is_run(folder):
        if autoencoder is not None:
            raise DitkitError(f"{base} is a run, which has its codec: leave out --autoencoder")
        checkpoint, recipe = find_run(folder)
        weights, name = checkpoint.chosen(recipe)
        config, weights = unadapted(recipe.model, weights)
        recipe, lines = replace(recipe, model=config), [f"base: {name} of {checkpoint.folder}"]
    else:
        recipe, groups, lines = imported(base, autoencoder=autoencoder, options=options)
        weights = dict(next(iter(groups.values())))
        lines[0] = f"base: {lines[0]}"
    if isinstance(recipe.model, ControlConfig):
        raise DitkitError(f"{base} is a ControlNet already: give the run of its base")
    return replace(recipe, sample=replace(recipe.sample, ema=0.0, ema_std=None)), weights, lines
