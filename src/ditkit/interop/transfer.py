"""Weights of one model as the start of another: of other classes, resolution, channels or patches."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from ..config import DitkitError, registered_as
from ..layers import sincos_2d
from ..models import ImageConfig, Model, base_weights

__all__ = ["Change", "Transfer", "patch_matrix", "transfer"]

# fields in which two models may differ, as the tensors that depend on them are resized or begun anew
_MAY_DIFFER = {
    "input_size", "patch_size", "in_channels", "num_classes", "learn_sigma", "attn_drop", "proj_drop", "in_context_len",
    "dropout", "null_label",
}  # fmt: skip


_CONVOLUTIONAL_ENDS = ("input_blocks.0.0.weight", "stem.weight", "out.2.weight", "out.2.bias")


@dataclass(frozen=True)
class Change:
    """A tensor that could not be taken as it is, and what was done."""

    name: str
    before: tuple[int, ...]
    after: tuple[int, ...]
    how: str

    def __str__(self) -> str:
        before, after = ("x".join(map(str, size)) for size in (self.before, self.after))
        return f"{self.name} {f'{before} -> ' if before and before != after else ''}{after}: {self.how}"


@dataclass(frozen=True)
class Transfer:
    """What became of each tensor of the model that begins: loaded, resized, or new; and what was left out."""

    loaded: tuple[str, ...]
    resized: tuple[Change, ...]
    new: tuple[Change, ...]
    left: tuple[str, ...]

    def lines(self) -> list[str]:
        """For a person."""
        found = [f"loaded: {len(self.loaded)} tensors as they are"]
        found += [f"resized: {change}" for change in self.resized]
        found += [f"new: {change}" for change in self.new]
        return found + [f"left out: {name}" for name in self.left]

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


@torch.no_grad()
def transfer(config: Any, weights: Mapping[str, Tensor], model: Model) -> Transfer:
    """Load `weights` of a model of `config` into `model`, which keeps its own where nothing fits.

    Fixed positions are recomputed, learned ones interpolated; patches are resized so that a patch of the new size is
    seen as the old one was (FlexiViT, Beyer et al. 2023 equation 4). Raises DitkitError, and loads nothing, for models
    of different families, width or depth.
    """
    _check(config, model.config)
    state: dict[str, Tensor] = model.state_dict()
    own = {name: state[here] for name, here in base_weights(state).items()}  # adapters begin as they are
    loaded: list[str] = []
    resized: list[Change] = []
    new: list[Change] = []
    result: dict[str, Tensor] = {}
    for name, value in own.items():
        given = weights.get(name)
        if given is None:
            new.append(Change(name, (), tuple(value.shape), "the file has none"))
            continue
        made, how = _fit(name, given, value, config, model)
        if how == "":
            loaded.append(name)
            result[name] = given
            continue
        change = Change(name, tuple(given.shape), tuple(value.shape), how)
        (new if made is None else resized).append(change)
        if made is not None:
            result[name] = made
    for name, value in result.items():
        own[name].copy_(value)
    return Transfer(tuple(loaded), tuple(resized), tuple(new), tuple(sorted(set(weights) - set(own))))


def _check(config: Any, target: Any) -> None:
    kinds = [registered_as(c)[1] for c in (config, target)]
    if kinds[0] != kinds[1]:
        raise DitkitError(f"these are the weights of a {kinds[0]}, and the recipe's model is a {kinds[1]}")
    wrong = [f.name for f in fields(config) if getattr(config, f.name) != getattr(target, f.name)]
    wrong = [name for name in wrong if name not in _MAY_DIFFER]
    if wrong:
        said = ", ".join(f"{name} {getattr(config, name)}, not {getattr(target, name)}" for name in wrong)
        flags = " ".join(f"--model.{name.replace('_', '-')} {getattr(config, name)}" for name in wrong)
        raise DitkitError(f"these are the weights of a {kinds[0]} of {said}: train with {flags}")


def _fit(name: str, given: Tensor, own: Tensor, config: Any, model: Model) -> tuple[Tensor | None, str]:
    """The tensor for `own`, and what was done: nothing said = taken as it is; no tensor = begun anew."""
    target = model.config
    if name in ("y_embedder.embedding_table.weight", "label_emb.weight") and given.shape != own.shape:
        return _labels(given, own, config, target)
    if name in _CONVOLUTIONAL_ENDS and given.shape != own.shape:
        return _ends(given, own, config, target)
    if isinstance(config, ImageConfig):
        found = _fit_patches(name, given, own, config, target)
        if found is not None:
            return found
    if given.shape != own.shape:
        raise DitkitError(f"{name} is {list(given.shape)}, and the recipe's model needs {list(own.shape)}")
    return given, ""


def _labels(given: Tensor, own: Tensor, config: Any, target: Any) -> tuple[Tensor | None, str]:
    """The table of other classes, or of the same ones with a null label or without."""
    had, has = (getattr(c, "null_label", True) for c in (config, target))
    classes = target.num_classes
    if config.num_classes == classes:
        null = given[:classes].mean(0, keepdim=True)
        return torch.cat((given[:classes], null))[: len(own)], (
            "the null label begins as the mean of all classes" if has else "without the null label"
        )
    if not (had and has):
        return None, f"{classes} classes begin anew"
    made = own.clone()
    made[-1] = given[-1]
    return made, f"{classes} classes begin anew, the null label is kept"


def _ends(given: Tensor, own: Tensor, config: Any, target: Any) -> tuple[Tensor | None, str]:
    """The first or last convolution of other channels or patches, or with the variance or without."""
    pixels = [(c.in_channels, getattr(c, "patch_size", 1)) for c in (config, target)]
    if pixels[0] != pixels[1]:
        return None, " instead of ".join(f"{channels} channels of patches of {side}" for channels, side in pixels[::-1])
    if len(own) < len(given):
        return given[: len(own)], "without the variance"
    return torch.cat((given, torch.zeros_like(given))), "the variance begins at 0"


def _fit_patches(name: str, given: Tensor, own: Tensor, config: Any, target: Any) -> tuple[Tensor | None, str] | None:
    """As `_fit`, for tensors of a model of images that depend on its size, channels or patches; None for others."""
    channels = config.in_channels == target.in_channels
    before, after = config.patch_size, target.patch_size
    match name:
        case "pos_embed":
            return _positions(given, own, config.grid, target.grid)
        case "in_context_posemb" if given.shape != own.shape:
            made = F.interpolate(given.transpose(1, 2), size=own.shape[1], mode="linear", align_corners=False)
            return made.transpose(1, 2), "interpolated"
        case "x_embedder.proj.weight" | "x_embedder.proj.bias" | "x_embedder.proj1.weight":
            if not channels:
                return None, f"{target.in_channels} channels instead of {config.in_channels}"
            if name.endswith("weight") and before != after:
                inverse = torch.linalg.pinv(patch_matrix(before, after).T)
                made = (given.double().flatten(2) @ inverse.T).unflatten(2, (after, after))
                return made.to(given.dtype), f"patches of {after} instead of {before}"
        case "final_layer.linear.weight" | "final_layer.linear.bias":
            if not channels:
                return None, f"{target.in_channels} channels instead of {config.in_channels}"
            if given.shape != own.shape:
                return _features(given, own, config, target)
    return None


def _positions(
    given: Float[Tensor, "1 n d"], own: Float[Tensor, "1 m d"], before: tuple[int, int], after: tuple[int, int]
) -> tuple[Tensor, str]:
    if before == after:
        return given, ""
    fixed = sincos_2d(given.shape[2], before, given.device)
    if torch.allclose(given, fixed.to(given.dtype), atol=1e-3):
        return own, "fixed positions, recomputed"
    made = given.transpose(1, 2).unflatten(2, before)
    made = F.interpolate(made, size=after, mode="bicubic", antialias=True)  # a plane stays a plane
    return made.flatten(2).transpose(1, 2), "learned positions, interpolated"


def patch_matrix(before: int, after: int) -> Float[Tensor, "after*after before*before"]:
    """Bilinear resizing of a patch as a matrix, in float64."""
    basis = torch.eye(before * before, dtype=torch.float64).view(-1, 1, before, before)
    resized = F.interpolate(basis, size=(after, after), mode="bilinear", align_corners=False)
    return resized.flatten(1).T


def _features(given: Tensor, own: Tensor, config: Any, target: Any) -> tuple[Tensor, str]:
    """The last layer of another patch, with or without the variance: features are patch, patch, channels."""
    before, after, channels = config.patch_size, target.patch_size, target.in_channels
    made = given.double().unflatten(0, (before * before, -1))
    said = []
    if before != after:
        made = torch.tensordot(patch_matrix(before, after), made, dims=1)
        said.append(f"patches of {after} instead of {before}")
    outputs = own.shape[0] // (after * after)
    if outputs < made.shape[1]:
        made = made[:, :outputs]
        said.append("without the variance")
    elif outputs > made.shape[1]:
        made = torch.cat((made, torch.zeros_like(made[:, : outputs - channels])), dim=1)
        said.append("the variance begins at 0")
    return made.flatten(0, 1).to(given.dtype), ", ".join(said)
