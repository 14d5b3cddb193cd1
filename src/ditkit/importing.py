"""A published checkpoint becomes a run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .averaging import decay_name
from .codecs import Autoencoder, Pixels, TokenIds
from .conditioners import Label
from .config import DitkitError, to_json
from .data import Elsewhere
from .given import needed
from .interop import (
    ADM,
    FORMATS,
    JIT,
    SIT,
    Found,
    read,
    size_name,
)
from .models import UNetConfig
from .recipe import Recipe, Sample, Train
from .runs import Run

__all__ = ["import_file", "imported", "new_run", "write_run"]


def import_file(
    path: str | Path,
    out: str | Path | None = None,
    *,
    name: str | None = None,
    weights: str | None = None,
    autoencoder: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> tuple[Run, list[str]]:
    """Make a run of a published checkpoint; the run, and lines that say what was found.

    name: the format, None = recognised by names and shapes. weights: which of the sets in the file. autoencoder: a
    folder or hub name for models of latents. options: what shapes do not tell, such as {"num_heads": 6}. Raises
    DitkitError for a file that is not whole and right, and for a folder that is not empty.
    """
    run = new_run(path, out)
    recipe, groups, lines = imported(path, name=name, weights=weights, autoencoder=autoencoder, options=options)
    write_run(run, recipe, groups, lines)
    return run, lines


def new_run(path: str | Path, out: str | Path | None) -> Run:
    """The run that a file becomes, in runs/ by its name. Raises DitkitError for a folder that is not empty."""
    path = Path(path)
    run = Run(out if out is not None else Path("runs") / (path.stem or path.resolve().name))
    if run.foreign():
        raise DitkitError(f"{run.folder} is not empty: choose another --out")
    return run


def write_run(run: Run, recipe: Recipe, groups: Mapping[str, Mapping[str, Tensor]], lines: list[str]) -> None:
    """Write it with one checkpoint, of no step."""
    state = {"log": {"sums": {}, "count": 0, "seconds": 0.0}, "data": None, "torch": torch.__version__}
    with run.locked():
        run.save(0, to_json(recipe), groups, {**state, "imported": lines})
        run.begin(recipe)


def imported(
    path: str | Path,
    *,
    name: str | None = None,
    weights: str | None = None,
    autoencoder: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> tuple[Recipe, dict[str, Mapping[str, Tensor]], list[str]]:
    """A published checkpoint as a recipe, with the one group of weights that it samples with; and what was found."""
    found = read(path, FORMATS, name=name, weights=weights, options=options).whole()
    codec = _codec(found, autoencoder)
    group = decay_name(found.decay) if found.decay else "model"
    recipe = Recipe(
        data=Elsewhere(str(path)),
        codec=codec,
        conditioner=Label(_classes(found)),
        model=found.config,
        denoiser=found.denoiser,
        objective=found.format.objective(found.config, found.denoiser),
        train=Train(emas=(found.decay or 0.9999,)),
        sample=Sample(**found.format.sampling(found.config), ema=None if found.decay else 0.0),
    )
    return recipe, {group: found.weights}, _said(found, recipe)


def _said(found: Found, recipe: Recipe) -> list[str]:
    config, meaning, codec = found.config, found.denoiser, recipe.codec
    family = "sit" if found.format is SIT else ""
    size = size_name(config, family) or "no published size"
    count = sum(value.numel() for value in found.weights.values())
    average = f"an average of decay {found.decay}" if found.decay else "taken as the weights themselves"
    if config.vocab:
        takes = f"input {config.length} tokens of {config.vocab} kinds"
        means = f"means tokens on {meaning.path}, clock {meaning.clock}"
    else:
        kind = "pixels" if isinstance(codec, Pixels) else f"latents of {codec.path or 'an autoencoder'}"
        number = getattr(config, "num_classes", 0)
        takes = f"input {' x '.join(map(str, config.shape))} ({kind}), {number or 'no'} classes"
        means = f"means {meaning.prediction} on {meaning.path}, clock {meaning.clock}, t_eps {meaning.t_eps:g}"
    network = f"{count / 1e6:.1f}M parameters in {len(found.weights)} tensors, {_described(config)}"
    lines = [
        f"{found.format.title}: {size}, {network}",
        takes,
        f"weights {found.group!r}: {average}",
        means,
    ]
    if len(found.source.groups) > 1:
        lines.append(f"the file also holds {', '.join(g for g in found.source.groups if g != found.group)}: --weights")
    if found.alike:
        lines.append(f"{' and '.join(found.alike)} has the same names and shapes: if it is that, say --as")
    if isinstance(codec, Autoencoder) and not codec.path:
        lines.append(
            f"its latents have {codec.channels} channels and are not Stable Diffusion's: to sample, give its own "
            "autoencoder, the folder vae of its pipeline, with --autoencoder"
        )
    elif isinstance(codec, Autoencoder) and not codec.download and not Path(codec.path).exists():
        lines.append(
            f"nothing was downloaded: to sample, get {codec.path} (hf download {codec.path}), or --autoencoder"
        )
    if missing := needed(recipe):
        lines.append(
            f"it is given {missing}, and no encoder that makes it is here: ditkit sample takes it with --embeddings "
            "FILE (docs/interop.md)"
        )
    return lines


def _described(config: Any) -> str:
    """The sizes of a network."""
    if isinstance(config, UNetConfig):
        widths = ", ".join(str(config.width(level)) for level in range(len(config.channel_mult)))
        return f"levels of {widths} channels with {config.num_res_blocks} residual blocks each"
    said = f"depth {config.depth}, width {config.hidden_size}, {config.num_heads} heads"
    return said if config.vocab else f"{said}, patches of {config.patch_size}"


def _codec(found: Found, autoencoder: str | None) -> Any:
    """Pixels for JiT and ADM, the numbers of tokens where it is made of them; otherwise the autoencoder that is given,
    that lies in the folder, or, of 4 channels, Stable Diffusion's; of others none that could be named."""
    if found.config.vocab:
        if autoencoder is not None:
            raise DitkitError(f"a {found.format.name} works on tokens: leave out --autoencoder")
        return TokenIds(found.config.vocab)
    if found.format in (JIT, ADM):
        if autoencoder is not None:
            raise DitkitError(f"{found.format.title} works on pixels: leave out --autoencoder")
        return Pixels()
    channels, video = found.config.in_channels, found.format.video
    fields: dict[str, Any] = {}
    if video and found.config.shape[1] == 1:
        # Kandinsky 5 does not shift FLUX.1's latents, whatever the file says
        fields = {"shift": 0.0, "one_frame": True}
    inside = None if found.source.folder is None else found.source.folder / "vae"
    if autoencoder is None and (inside is None or not inside.is_dir()):
        if channels != 4 or video:
            return Autoencoder("", channels=channels, **fields)
        return Autoencoder(scale=0.18215, shift=0.0, channels=channels, factor=8, means=(), stds=())
    folder = Path(autoencoder).expanduser() if autoencoder is not None else inside
    assert folder is not None
    if not folder.exists():
        return Autoencoder(str(autoencoder), download=True, channels=channels, **fields)
    codec = Autoencoder.of(folder.resolve())
    makes, draws = codec.frames is not None, video and not fields
    if makes != draws:
        kinds = ("images", "videos")
        raise DitkitError(
            f"{folder} is an autoencoder of {kinds[makes]}, and the model draws {kinds[draws]}: give its own with "
            "--autoencoder"
        )
    codec = replace(codec, **fields)
    if codec.channels != channels:
        raise DitkitError(
            f"{folder} makes latents of {codec.channels} channels, and the model takes {channels}: give its own with "
            "--autoencoder"
        )
    return codec


def _classes(found: Found) -> tuple[str, ...]:
    """The names that the folder gives its classes, else their numbers."""
    count = getattr(found.config, "num_classes", 0)
    named = found.source.json("model_index.json").get("id2label")
    named = named if isinstance(named, dict) else {}
    return tuple(str(named.get(str(i), i)) for i in range(count))
