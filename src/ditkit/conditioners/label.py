"""Class labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol, Self, runtime_checkable

import torch
from jaxtyping import Int
from torch import Tensor

from ..conditioning import Conditioning, Given
from ..config import DitkitError, near, register
from ..rng import Draw

__all__ = ["Conditioner", "Label"]


@runtime_checkable
class Conditioner(Protocol):
    """Turns what comes with a batch into a Conditioning; with `rng` it applies training dropout."""

    def __call__(self, batch: Given, rng: Draw | None = None) -> Conditioning: ...

    def null(self, n: int) -> Conditioning:
        """What a weak opinion is given: null is data, as is a negative prompt."""
        ...

    def fitted(self, classes: tuple[str, ...]) -> Self:
        """The conditioner for data of these classes (none where it has no classes)."""
        ...


@register("conditioner", "label")
@dataclass(frozen=True)
class Label:
    """One of the named classes, or nothing when there are none; the null label has the index len(classes).

    drop: the probability that training shows the null label instead, which guidance needs (0.1 in DiT and JiT).
    """

    classes: tuple[str, ...] = ()
    drop: float = 0.1

    def __post_init__(self) -> None:
        if not 0 <= self.drop <= 1:
            raise DitkitError(f"conditioner.drop is a probability, not {self.drop}")

    def __call__(self, batch: Given, rng: Draw | None = None) -> Conditioning:
        """Draws "drop". Raises DitkitError for a label outside the classes."""
        if not self.classes:
            return Conditioning()
        label = batch.label
        if label is None:
            raise DitkitError(f"labels are needed: one of 0..{len(self.classes) - 1} per sample")
        if bool((label < 0).any()) or bool((label >= len(self.classes)).any()):
            wrong = [i for i in label.tolist() if not 0 <= i < len(self.classes)]
            raise DitkitError(f"label {wrong[0]} is out of range: there are the classes 0..{len(self.classes) - 1}")
        cond = Conditioning(label=label)
        if rng is None or self.drop == 0:
            return cond
        keep = rng("drop", "uniform") >= self.drop
        return cond.where(keep.to(label.device), self.null(len(label)).to(label.device))

    def null(self, n: int) -> Conditioning:
        """The null label n times; nothing when there are no classes."""
        return Conditioning(label=torch.full((n,), len(self.classes))) if self.classes else Conditioning()

    def fitted(self, classes: tuple[str, ...]) -> Self:
        """With the names of the classes."""
        return replace(self, classes=classes)

    def index(self, names: Sequence[str | int]) -> Int[Tensor, "b"]:
        """The indices of classes given by name or number. Raises DitkitError, with the near ones, for others."""
        if not self.classes and len(names):
            raise DitkitError(f"the class {names[0]!r} was asked for, and there are no classes")
        found: list[int] = []
        for name in names:
            if isinstance(name, int) or (name not in self.classes and name.removeprefix("-").isdecimal()):
                found.append(int(name))
                if not 0 <= found[-1] < len(self.classes):
                    raise DitkitError(f"label {name} is out of range: the classes are 0..{len(self.classes) - 1}")
            elif name in self.classes:
                found.append(self.classes.index(name))
            else:
                raise DitkitError(f"there is no class {name!r}: {near(name, self.classes)}")
        return torch.tensor(found, dtype=torch.long)
