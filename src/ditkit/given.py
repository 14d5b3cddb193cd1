"""What a person gives: known parts, control images, what encoders made elsewhere; checked before anything is drawn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Int, UInt8
from torch import Tensor

from .conditioning import Conditioning, Known, Tokens
from .config import DitkitError, near
from .interop import open_source
from .recipe import Recipe

__all__ = [
    "checked_control",
    "checked_embeddings",
    "checked_known",
    "encoded_known",
    "needed",
    "read_embeddings",
]

_HOW = {
    "image": "give bytes [c h w] and a mask, on the command line --known IMAGE --mask MASK",
    "video": "give bytes [c t h w] and a mask",
    "text": "give code points [l] and a mask, on the command line --prompt or --template",
    "vector": "give floats [d] and a mask",
}


def _broadcasts(mask: Sequence[int], values: Sequence[int]) -> bool:
    """Whether a mask serves values: the same size, or 1, for samples and channels; the same size everywhere else."""
    first = 2 if len(values) > 2 else 1
    same = all(m in (1, v) for m, v in zip(mask[:first], values[:first], strict=True))
    return same and tuple(mask[first:]) == tuple(values[first:])


def checked_known(recipe: Recipe, shape: Sequence[int], known: Known, count: int) -> Known:
    """What is known, one row for all samples or one for each; shape: of one encoded sample.

    Raises DitkitError for what does not fit.
    """
    values, mask = known.values, known.mask
    tokens, rank = recipe.codec.vocab > 0, len(shape)
    kinds = {(False, 4): "video", (False, 3): "image", (False, 1): "vector", (True, 1): "text"}
    if (tokens, rank) not in kinds:
        raise DitkitError(f"this model draws {list(shape)}, of which no part can be given")
    wants, bytewise = kinds[tokens, rank], values.dtype == torch.uint8
    fits = (values.is_floating_point(), bytewise) == (wants == "vector", wants in ("image", "video"))
    if not fits or values.ndim not in (rank, rank + 1):
        raise DitkitError(
            f"what is known is {str(values.dtype).removeprefix('torch.')} {list(values.shape)}, and this model "
            f"draws {wants}s: {_HOW[wants]}"
        )
    if values.ndim == rank:
        values, mask = values[None], mask[None]
    try:
        own = recipe.codec.shape(tuple(values.shape[1:]))
    except DitkitError:
        own = None
    if own != tuple(shape):
        empty = torch.zeros(1, *shape, dtype=torch.long if tokens else torch.float32)
        size, drawn = list(values.shape[1:]), list(recipe.codec.decode(empty).shape[1:])
        raise DitkitError(f"the known {wants} is {size}, and this model draws {drawn}: give one of that size")
    if wants == "video" and own != tuple(values.shape[1:]):
        raise DitkitError("parts of videos can be given where pixels are diffused, and this model has latents")
    if mask.dtype != torch.bool or mask.ndim != values.ndim or not _broadcasts(mask.shape, values.shape):
        raise DitkitError(
            f"the mask of what is known is {str(mask.dtype).removeprefix('torch.')} {list(mask.shape)}, and the "
            f"{wants} {list(values.shape)}: it is boolean (True = known) and of the same size"
        )
    if len(values) not in (1, count):
        raise DitkitError(f"{len(values)} known parts were given for {count} samples: give one, or one for each")
    neutral = 128 if bytewise else 0
    values = torch.where(mask, values, torch.tensor(neutral, dtype=values.dtype))
    if not bool(torch.isfinite(values).all()):
        raise DitkitError("what is known holds numbers that are not finite")
    if tokens:
        recipe.codec.encode(values)  # an unknown character is said before anything is drawn
    return Known(values, mask.expand_as(values))


@torch.no_grad()
def encoded_known(
    recipe: Recipe, shape: Sequence[int], known: Known, ids: Int[Tensor, "b"], device: torch.device
) -> Known:
    """What is known of these samples, as it is diffused."""
    rows = slice(None) if len(known.values) == 1 else ids
    x0, mask = recipe.codec.encode(known.values[rows].to(device)), known.mask[rows].to(device)
    if x0.shape[1:] != mask.shape[1:]:  # latents: known where no pixel is unknown
        unknown = (~mask).any(1, keepdim=True).float()
        mask = F.adaptive_max_pool2d(unknown, x0.shape[2:]) == 0
    whole = (len(ids), *shape)
    return Known(x0.expand(whole), mask.expand(whole))


@torch.no_grad()
def checked_control(
    recipe: Recipe, images: UInt8[Tensor, "*b c h w"], count: int, device: torch.device
) -> UInt8[Tensor, "b c h w"]:
    """A control image for each sample. Raises DitkitError for images that do not fit, and for another model."""
    shape = recipe.controlled.shape
    many = images if images.ndim == 4 else images[None]
    rows = 1 if images.ndim == 3 else count
    drawn = list(recipe.codec.decode(torch.zeros(1, *shape, device=device)).shape[1:])
    if images.dtype != torch.uint8 or list(many.shape) != [rows, *drawn]:
        raise DitkitError(
            f"control images are bytes {drawn}, one for all samples or one for each of the {count}, and these are "
            f"{str(images.dtype).removeprefix('torch.')} {list(images.shape)}"
        )
    return many.expand(count, -1, -1, -1)


# what encoders made that are not here

_SEQUENCES = ("text", "audio")
_MADE = (*_SEQUENCES, "pooled")


def needed(recipe: Recipe) -> str:
    """What a person has to give since no conditioner makes it, such as "text [n 154 4096], pooled [n 2048]".

    n is the number of samples; the second of three numbers counts tokens, and any number of them is right. Empty where
    nothing is missing, as in all that was trained here.
    """
    return _said(_needed(recipe))


def _said(wanted: Mapping[str, Tensor]) -> str:
    return ", ".join(f"{name} [{' '.join(map(str, ('n', *v.shape[1:])))}]" for name, v in wanted.items())


def _needed(recipe: Recipe) -> dict[str, Tensor]:
    """Zeros in the shape of each."""
    takes, made = recipe.model.example(1), recipe.conditioner.null(1)
    return {name: value for name, value in _tensors(takes).items() if name not in _tensors(made)}


def _tensors(cond: Conditioning) -> dict[str, Tensor]:
    """By their names in a file, without masks."""
    made = {name: getattr(cond, name) for name in _MADE if getattr(cond, name) is not None}
    tensors = {name: v.values if isinstance(v, Tokens) else v for name, v in made.items()}
    return tensors | {f"scalars.{name}": value for name, value in cond.scalars.items()}


def read_embeddings(path: str | Path) -> tuple[Conditioning, Conditioning | None]:
    """What encoders made, and what they made of the texts to turn away from, None if the file does not have it.

    The file (.safetensors) holds tensors by the names of fields: text [n l d], text.mask [n l] where some texts are
    shorter (True or 1 = a token), pooled [n d], audio and audio.mask, scalars.guidance [n] and other numbers; and the
    same with negative. before. Raises DitkitError for a damaged file, and for one that holds something else.
    """
    source = open_source(path)
    tensors = source.read(next(iter(source.groups.values())))
    known = (*_MADE, *(f"{name}.mask" for name in _SEQUENCES))
    for name in tensors:
        if (bare := name.removeprefix("negative.")) not in known and not bare.startswith("scalars."):
            raise DitkitError(f"{path} holds {name}, which is none of embeddings: {near(bare, known)}")
    negative = {name.removeprefix("negative."): v for name, v in tensors.items() if name.startswith("negative.")}
    given = {name: v for name, v in tensors.items() if not name.startswith("negative.")}
    return _read(given, path, ""), _read(negative, path, "negative.") if negative else None


def _read(tensors: Mapping[str, Tensor], path: str | Path, prefix: str) -> Conditioning:
    made: dict[str, Any] = {name: tensors.get(name) for name in _MADE}
    for name in _SEQUENCES:
        values, mask = tensors.get(name), tensors.get(f"{name}.mask")
        if values is not None and mask is None:
            mask = torch.ones(values.shape[:2])
        if values is None or mask is None or values.ndim != 3 or mask.shape != values.shape[:2]:
            if values is None and mask is None:
                continue
            shapes = ["missing" if value is None else list(value.shape) for value in (values, mask)]
            raise DitkitError(
                f"{path}: {prefix}{name} is {shapes[0]} and {prefix}{name}.mask {shapes[1]}; give [n l d] and [n l]"
            )
        made[name] = Tokens(values, mask.bool())
    scalars = {name.removeprefix("scalars."): v for name, v in tensors.items() if name.startswith("scalars.")}
    return Conditioning(**made, scalars=scalars)


def checked_embeddings(
    recipe: Recipe, given: Conditioning | None, negative: Conditioning | None, count: int, away: bool
) -> tuple[Conditioning, Conditioning]:
    """What encoders made, a row for each sample, and what guidance turns away from; empty where a conditioner makes it.

    given, negative: one row for all samples or one for each; numbers that `negative` does not say are as given. away:
    whether guidance turns away from it. Raises DitkitError for what is missing, not wanted, or does not fit.
    """
    wanted = _needed(recipe)
    if not wanted:
        if given is not None or negative is not None:
            raise DitkitError("this model is given what its conditioner makes: leave out embeddings")
        return Conditioning(), Conditioning()
    said = _said(wanted)
    if given is None:
        raise DitkitError(
            f"this network is given {said}, and no encoder that makes it is here: compute it with the authors' and "
            "give it, ditkit sample RUN --embeddings FILE or pipeline.sample(embeddings=...) (docs/interop.md)"
        )
    strong = _checked(given, wanted, said, count, "")
    if negative is None:
        if away:
            raise DitkitError(
                "guidance turns away from a text, and none was given: add the embeddings of the negative prompt "
                "(negative=..., in the file negative.text and so on), or set guidance to 1"
            )
        return strong, strong
    negative = replace(negative, scalars={**given.scalars, **negative.scalars})
    return strong, _checked(negative, wanted, said, count, "negative.")


def _checked(cond: Conditioning, wanted: Mapping[str, Tensor], said: str, count: int, prefix: str) -> Conditioning:
    """In float32."""
    tensors = _tensors(cond)
    rest = [f.name for f in fields(cond) if f.name not in (*_MADE, "scalars", "static")]
    others = [name for name in rest if getattr(cond, name) is not None]
    for name in (*others, *sorted(tensors.keys() ^ wanted.keys())):
        does = "do not hold" if name in wanted else "hold"
        raise DitkitError(f"the embeddings {does} {prefix}{name}: this network is given {said}")
    for name, value in tensors.items():
        free = 2 if name in _SEQUENCES else 1
        fits = value.ndim == wanted[name].ndim and value.shape[free:] == wanted[name].shape[free:]
        if not fits or not value.is_floating_point():
            kind = str(value.dtype).removeprefix("torch.")
            raise DitkitError(f"{prefix}{name} is {kind} {list(value.shape)}: this network is given {said}")
        if len(value) not in (1, count):
            raise DitkitError(
                f"{prefix}{name} is of {len(value)} samples, and {count} are drawn: give one, or one for each"
            )
        if not bool(torch.isfinite(value.float()).all()):
            raise DitkitError(f"{prefix}{name} holds numbers that are not finite")

    def rows(value: Tensor) -> Tensor:
        return value.expand(count, *value.shape[1:])

    made: dict[str, Any] = {name: rows(value.float()) for name, value in tensors.items() if name in _MADE}
    for name in made.keys() & set(_SEQUENCES):
        mask = getattr(cond, name).mask
        if not mask.any(1).all() or (mask[:, 1:] & ~mask[:, :-1]).any():
            raise DitkitError(f"{prefix}{name}.mask has padding before tokens, or no token: tokens come first")
        made[name] = Tokens(made[name], rows(mask))
    return Conditioning(**made, scalars={name: rows(value.float()) for name, value in cond.scalars.items()})
