"""What is given to a network: labels, text, audio, references, control, known parts.

`Conditioning` is frozen and batch-first. Padding and masks of token sequences live here and nowhere else.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

__all__ = ["Conditioning", "Given", "Known", "Tokens", "cat", "strings"]

_INNER = "\u2400"  # the picture of a 0, for a model that goes on after it


@dataclass(frozen=True)
class Tokens:
    """A batch of token sequences, padded at the end: real tokens first, `mask` True where a token is real."""

    values: Float[Tensor, "b l d"]
    mask: Bool[Tensor, "b l"]

    def __post_init__(self) -> None:
        if self.mask.dtype != torch.bool or self.values.shape[:2] != self.mask.shape:
            raise ValueError(
                f"tokens {tuple(self.values.shape)} need a boolean mask of {tuple(self.values.shape[:2])}, "
                f"not {self.mask.dtype} {tuple(self.mask.shape)}"
            )

    @classmethod
    def zeros(cls, batch: int, length: int, channels: int) -> Tokens:
        """So many tokens of zeros in each sample, all of them real."""
        return cls(torch.zeros(batch, length, channels), torch.ones(batch, length, dtype=torch.bool))

    def padded(self, length: int) -> Tokens:
        """The same tokens, padded with masked zeros to `length`. Raises ValueError if there are more."""
        extra = length - self.mask.shape[1]
        if extra < 0:
            raise ValueError(f"{self.mask.shape[1]} tokens cannot be padded to {length}")
        if extra == 0:
            return self
        return Tokens(
            torch.nn.functional.pad(self.values, (0, 0, 0, extra)), torch.nn.functional.pad(self.mask, (0, extra))
        )


@dataclass(frozen=True)
class Given:
    """What comes with a batch of data, before a conditioner has read it; a person who samples gives the same."""

    label: Int[Tensor, "b"] | None = None
    text: Int[Tensor, "b l"] | None = None
    """Code points, filled up with 0."""
    data: Shaped[Tensor, "b *sample"] | None = None
    """The samples themselves, in training: control images are made of them."""
    states: Tokens | None = None
    """The text as an encoder sees it, where that was prepared."""


def strings(rows: Iterable[Int[Tensor, "l"]]) -> list[str]:
    """The texts of code points: the filling at the end goes, a 0 inside is shown as \u2400."""
    return ["".join(map(chr, row.tolist())).rstrip("\0").replace("\0", _INNER) for row in rows]


@dataclass(frozen=True)
class Known:
    """Parts of the sample that are given: an inpainting mask, a first frame, prompt tokens. True in `mask` = known."""

    values: Tensor
    mask: Bool[Tensor, "b *shape"]


@dataclass(frozen=True)
class Conditioning:
    """All that is given for a batch; every field is optional and batch-first.

    label: class indices. text, audio: token sequences. pooled: one vector per sample. references: clean latents.
    vision: features of the references by an encoder of images. control: control images or latents. known: given parts
    of the sample. channels: joined to x by the model.
    scalars: named numbers per sample (guidance, size, scale factors).
    static: what `model.prepare` computed because it does not depend on x; a leading dimension of 1 serves all rows.
    """

    label: Int[Tensor, "b"] | None = None
    text: Tokens | None = None
    pooled: Float[Tensor, "b d"] | None = None
    audio: Tokens | None = None
    references: Float[Tensor, "b r c *space"] | None = None
    vision: Float[Tensor, "b r h w d"] | None = None
    control: Float[Tensor, "b c *space"] | None = None
    known: Known | None = None
    channels: Float[Tensor, "b c *space"] | None = None
    scalars: Mapping[str, Float[Tensor, "b *n"]] = field(default_factory=dict)
    static: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def count(self) -> int | None:
        """The number of samples; None where nothing is given."""
        for name in (f.name for f in dataclasses.fields(self) if f.name not in ("scalars", "static")):
            value = getattr(self, name)
            if value is not None:
                return len(value if isinstance(value, Tensor) else value.values)
        return next((len(v) for v in self.scalars.values()), None)

    def rows(self, index: slice | Tensor) -> Conditioning:
        """The given rows, in the given order."""

        def pick(x: Tensor) -> Tensor:
            return x[index]

        chosen = _zip(lambda ts: pick(ts[0]), dataclasses.replace(self, static={}))
        static = {k: v if v.shape[0] == 1 else pick(v) for k, v in self.static.items()}
        return dataclasses.replace(chosen, static=static)

    def where(self, keep: Bool[Tensor, "b"], other: Conditioning) -> Conditioning:
        """Row by row, this conditioning where `keep` is True and `other` elsewhere (label dropout, mixed batches)."""
        _refuse_static(self, other)

        def choose(pair: Sequence[Tensor]) -> Tensor:
            return torch.where(keep.view(-1, *[1] * (pair[0].ndim - 1)), pair[0], pair[1])

        return _zip(choose, self, other)

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Conditioning:
        """On another device; floating point values also in another dtype."""

        def move(x: Tensor) -> Tensor:
            return x.to(device, dtype if dtype is not None and x.is_floating_point() else x.dtype)

        moved = _zip(lambda ts: move(ts[0]), dataclasses.replace(self, static={}))
        return dataclasses.replace(moved, static={k: move(v) for k, v in self.static.items()})

    def with_static(self, **static: Tensor) -> Conditioning:
        """The same, with further prepared tensors."""
        return dataclasses.replace(self, static={**self.static, **static})


def cat(conds: Sequence[Conditioning]) -> Conditioning:
    """Several batches as one; token sequences are padded to the longest. Prepare after joining, not before."""
    _refuse_static(*conds)
    return _zip(lambda tensors: torch.cat(tuple(tensors)), *conds)


def _refuse_static(*conds: Conditioning) -> None:
    if any(c.static for c in conds):
        raise ValueError("join conditionings first and prepare the result: prepared tensors belong to one batch")


def _zip(combine: Callable[[Sequence[Tensor]], Tensor], *conds: Conditioning) -> Conditioning:
    """Apply `combine` to the corresponding tensors of conditionings that have the same fields."""

    def merge(name: str, values: Sequence[Any]) -> Any:
        if all(v is None for v in values):
            return None
        if any(v is None for v in values):
            raise ValueError(f"some conditionings have {name!r} and others do not: they cannot be joined")
        first = values[0]
        if isinstance(first, Tokens):
            length = max(v.mask.shape[1] for v in values)
            values = [v.padded(length) for v in values]
        if isinstance(first, Tokens | Known):
            return type(first)(combine([v.values for v in values]), combine([v.mask for v in values]))
        return combine(values)

    fields = {
        f.name: merge(f.name, [getattr(c, f.name) for c in conds])
        for f in dataclasses.fields(Conditioning)
        if f.name not in ("scalars", "static")
    }
    keys = {k for c in conds for k in c.scalars}
    scalars = {k: merge(f"scalars[{k}]", [c.scalars.get(k) for c in conds]) for k in sorted(keys)}
    return Conditioning(**fields, scalars=scalars)
