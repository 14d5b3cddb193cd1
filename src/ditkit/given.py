"""What a person gives of the samples themselves: known parts and control images, checked before anything is drawn."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Int, UInt8
from torch import Tensor

from .conditioning import Known
from .config import DitkitError
from .recipe import Recipe

__all__ = ["checked_control", "checked_known", "encoded_known"]

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
