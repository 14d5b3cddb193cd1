"""Weights of one model as the start of another: of other classes, resolution, channels or patches."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from ..config import DitkitError, registered_as
from ..layers import PatchOrder, sincos_2d
from ..models import Control, ControlConfig, MMDiTConfig, Model, base_weights

__all__ = ["Change", "Transfer", "patch_matrix", "transfer"]

# fields in which two models may differ, as the tensors that depend on them are resized or begun anew
_RESIZED = {
    "input_size", "patch_size", "in_channels", "num_classes", "learn_sigma", "in_context_len", "null_label",
    "given_channels", "position_size",
}  # fmt: skip
# on which no tensor depends
_FREE = {
    "attn_drop", "proj_drop", "dropout", "drop", "length", "text_length", "audio_length", "position_scale",
    "scale_factor", "pattern",
}  # fmt: skip
_SAID = ("position_scale", "scale_factor", "pattern")
"""Of these, what changes the output of the same weights."""

_CONVOLUTIONAL_ENDS = ("input_blocks.0.0.weight", "stem.weight", "out.2.weight", "out.2.bias")
_FIRST: dict[str, tuple[str, PatchOrder]] = {
    "x_embedder.proj.weight": ("x_embedder.proj.bias", "cp"),  # a convolution
    "x_embedder.proj1.weight": ("", "cp"),
    "x_embedder.weight": ("x_embedder.bias", "pc"),
    "img_in.weight": ("img_in.bias", "cp"),
}
"""Weights of layers that see patches: their biases, and the order of a patch's features there."""
_SLOWEST_CHANNEL = {"flux", "kandinsky5"}
"""Networks whose last layer has the features of a patch in the order "cp", not "pc"."""


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
    said: tuple[str, ...] = ()
    """What else is to be known: how a ControlNet's branch begins, what computes something else with the same weights.
    """

    def lines(self) -> list[str]:
        """For a person."""
        found = [f"loaded: {len(self.loaded)} tensors as they are"]
        found += [f"resized: {change}" for change in self.resized]
        found += [f"new: {change}" for change in self.new]
        found += [f"left out: {name}" for name in self.left]
        return found + list(self.said)

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


@torch.no_grad()
def transfer(config: Any, weights: Mapping[str, Tensor], model: Model, at: str = "") -> Transfer:
    """Load `weights` of a model of `config` into `model`, which keeps its own where nothing fits.

    Fixed positions are recomputed, learned ones interpolated (of Stable Diffusion 3 cropped); patches are resized so
    that a patch of the new size is seen as the old one was (FlexiViT, Beyer et al. 2023 equation 4). Weights of a plain
    network are those of a ControlNet's base; its branch then begins anew, as copies of the blocks that were loaded
    (Zhang et al. 2023 section 3.1). at: where in a recipe's model this one is, for messages. Raises DitkitError, and
    loads nothing, for models of different families, width or depth.
    """
    if isinstance(model, Control):
        return _under_branch(config, weights, model)
    _check(config, model.config, at)
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
    said = [
        f"{name} {getattr(config, name)} -> {getattr(model.config, name)}, with the same weights"
        for name in _SAID
        if getattr(config, name, None) != getattr(model.config, name, None)
    ]
    left = tuple(sorted(set(weights) - set(own)))
    return Transfer(tuple(loaded), tuple(resized), tuple(new), left, tuple(said))


def _under_branch(config: Any, weights: Mapping[str, Tensor], model: Control) -> Transfer:
    """As `transfer`, for a network with a branch, of weights with the same branch or without one."""
    whole = isinstance(config, ControlConfig)
    if whole:
        said = [f.name for f in fields(config) if f.name != "base"]
        wrong = [name for name in said if getattr(config, name) != getattr(model.config, name)]
        if wrong:
            was, now = (getattr(c, wrong[0]) for c in (config, model.config))
            raise DitkitError(
                f"these are the weights of a ControlNet with {wrong[0]} {was}, and the recipe's has {now}"
            )
    plain = {name.removeprefix("base."): value for name, value in weights.items() if not name.startswith("control.")}
    found = transfer(config.base if whole else config, plain, model.base, "base.")
    blocks = f"the blocks {', '.join(map(str, model.config.places))} of the base, beside which it changes nothing yet"
    model.restart()
    if not whole:
        return replace(found, said=(*found.said, f"the branch begins as copies of {blocks}"))
    own = {f"control.{name}": value for name, value in model.control.state_dict().items()}
    for name, value in own.items():
        value.copy_(weights[name])
    return replace(found, loaded=(*found.loaded, *own))


def _check(config: Any, target: Any, at: str = "") -> None:
    """at: where in the recipe's model the network is."""
    kinds = [registered_as(c)[1] for c in (config, target)]
    if kinds[0] != kinds[1]:
        raise DitkitError(f"these are the weights of a {kinds[0]}, and the recipe's model is a {kinds[1]}")
    wrong = [f.name for f in fields(config) if getattr(config, f.name) != getattr(target, f.name)]
    wrong = [name for name in wrong if name not in _RESIZED | _FREE]
    if wrong:
        said = ", ".join(f"{name} {getattr(config, name)}, not {getattr(target, name)}" for name in wrong)
        flags = " ".join(f"--model.{at}{name.replace('_', '-')} {getattr(config, name)}" for name in wrong)
        raise DitkitError(f"these are the weights of a {kinds[0]} of {said}: train with {flags}")


def _fit(name: str, given: Tensor, own: Tensor, config: Any, model: Model) -> tuple[Tensor | None, str]:
    """The tensor for `own`, and what was done: nothing said = taken as it is; no tensor = begun anew."""
    target = model.config
    if name in ("y_embedder.embedding_table.weight", "label_emb.weight") and given.shape != own.shape:
        return _labels(given, own, config, target)
    if name in _CONVOLUTIONAL_ENDS and given.shape != own.shape:
        return _ends(given, own, config, target)
    found = _fit_positions(name, given, own, config, model)
    if found is None and hasattr(config, "patch_size"):
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


def _fit_positions(
    name: str, given: Tensor, own: Tensor, config: Any, model: Model
) -> tuple[Tensor | None, str] | None:
    """As `_fit`, for learned or stored positions; None for other tensors."""
    if name == "in_context_posemb" and given.shape != own.shape:
        made = F.interpolate(given.transpose(1, 2), size=own.shape[1], mode="linear", align_corners=False)
        return made.transpose(1, 2), "interpolated"
    if name != "pos_embed":
        return None
    if isinstance(config, MMDiTConfig):
        return _table(given, own, config, model.config)
    return _positions(given, own, config.grid, model.config.grid)


def _table(given: Tensor, own: Tensor, config: MMDiTConfig, target: MMDiTConfig) -> tuple[Tensor, str]:
    """Stable Diffusion 3's table, of which an image takes the middle: the paper's (section 5.3.2) is recomputed, for it
    depends on the size; another one, which a published file brings, is kept, or its middle."""
    if (config.grid, config.position_size) == (target.grid, target.position_size):
        return given, ""
    if torch.allclose(given, config.positions().to(given), atol=1e-3):
        return own, "fixed positions, recomputed"
    before, after = config.position_size, target.position_size
    if before < after:
        raise DitkitError(
            f"these weights bring a table of positions of {before} x {before}, which cannot grow to {after} x {after}: "
            f"train with --model.position-size {before}"
        )
    first = (before - after) // 2
    rows = slice(first, first + after)
    made = given.unflatten(1, (before, before))[:, rows, rows].flatten(1, 2)
    return made, "" if before == after else "the middle of the table of positions"


def _fit_patches(name: str, given: Tensor, own: Tensor, config: Any, target: Any) -> tuple[Tensor | None, str] | None:
    """As `_fit`, for the layers that see patches and make them; None for others."""
    kind, weight = registered_as(config)[1], name.endswith("weight")
    first = name in _FIRST or name in {bias for bias, _ in _FIRST.values()}
    if not first and name not in ("final_layer.linear.weight", "final_layer.linear.bias"):
        return None
    if config.in_channels != target.in_channels:
        return None, f"{target.in_channels} channels instead of {config.in_channels}"
    if given.shape == own.shape and config.patch_size == target.patch_size:
        return given, ""
    if first:
        return _embedder(given, own, config, target, _FIRST[name][1]) if weight else (given, "")
    return _features(given, own, config, target, "cp" if kind in _SLOWEST_CHANNEL else "pc")


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


def _sides(config: Any) -> tuple[int, ...]:
    """The size of a patch along each axis."""
    return (config.patch_size,) * 2 if isinstance(config.patch_size, int) else config.patch_size


def _spread(x: Tensor, sides: tuple[int, ...], order: PatchOrder) -> Float[Tensor, "n c f s"]:
    """Features [n f] of patches by channel, frame and pixel, whatever their order."""
    frames, pixels = prod(sides[:-2]), prod(sides[-2:])
    if order == "pc":
        return x.unflatten(1, (frames, pixels, -1)).permute(0, 3, 1, 2)
    return x.unflatten(1, (-1, frames, pixels))


def _joined(x: Float[Tensor, "n c f s"], order: PatchOrder) -> Tensor:
    """The inverse of `_spread`."""
    return (x.permute(0, 2, 3, 1) if order == "pc" else x).flatten(1)


def _matrix(before: tuple[int, ...], after: tuple[int, ...]) -> Tensor:
    """`patch_matrix` of square patches. Raises DitkitError for others."""
    if before[:-2] != after[:-2] or before[-1] != before[-2] or after[-1] != after[-2]:
        said = " x ".join(map(str, before))
        raise DitkitError(f"these are the weights of patches of {said}: train with --model.patch-size {said}")
    return patch_matrix(before[-1], after[-1])


def _counted(
    x: Float[Tensor, "n c f s"], channels: int, what: str, begins: str
) -> tuple[Float[Tensor, "n k f s"], list[str]]:
    """With so many channels: the last ones, which are `what`, left out or of zeros; and what became of them."""
    if channels < x.shape[1]:
        return x[:, :channels], [f"without {what}"]
    if channels > x.shape[1]:
        return F.pad(x, (0, 0, 0, 0, 0, channels - x.shape[1])), [f"{what} {begins} at 0"]
    return x, []


def _embedder(given: Tensor, own: Tensor, config: Any, target: Any, order: PatchOrder) -> tuple[Tensor, str]:
    """The layer that sees patches, for another patch, or with further channels or without."""
    before, after, said = _sides(config), _sides(target), []
    made = _spread(given.double().flatten(1), before, order)
    if before != after:
        made = made @ torch.linalg.pinv(_matrix(before, after).T).T
        said.append(f"patches of {target.patch_size} instead of {config.patch_size}")
    made, also = _counted(made, own.flatten(1).shape[1] // prod(after), "the given channels", "begin")
    said += also
    return _joined(made, order).view(own.shape).to(given.dtype), ", ".join(said)


def _features(given: Tensor, own: Tensor, config: Any, target: Any, order: PatchOrder) -> tuple[Tensor, str]:
    """The layer that makes patches, for another patch, with the variance or without."""
    before, after, said = _sides(config), _sides(target), []
    made = _spread(given.double().view(len(given), -1).T, before, order)
    if before != after:
        made = made @ _matrix(before, after).T
        said.append(f"patches of {target.patch_size} instead of {config.patch_size}")
    made, also = _counted(made, own.shape[0] // prod(after), "the variance", "begins")
    said += also
    return _joined(made, order).T.reshape(own.shape).to(given.dtype), ", ".join(said)
