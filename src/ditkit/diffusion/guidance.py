"""Guides: strong and weak opinions combined, guided = strong + sum over guides of weight rule(strong, weak).

A guide says what its weak opinion is given. Opinions of the same network share one batch; where the weight of a guide
is zero, its pass is not run.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from ..conditioning import Conditioning, cat
from ..config import DitkitError
from .denoiser import Denoise, Denoiser, Prediction
from .path import Time

__all__ = ["CFG", "Guide", "Guided", "guide"]


@runtime_checkable
class Guide(Protocol):
    """One weak opinion and what to do with it."""

    def weak(self, cond: Conditioning) -> Conditioning:
        """What the weak opinion is given."""
        ...

    def weight(self, t: float) -> float:
        """The factor of the rule at time t; 0 = the weak pass is not run."""
        ...

    def rule(self, strong: Tensor, weak: Tensor) -> Tensor:
        """The direction in which the strong opinion is moved, in the space of the network's output."""
        ...


@dataclass(frozen=True)
class CFG:
    """Classifier-free guidance (Ho & Salimans 2022): weak + scale (strong - weak); scale 1 = no guidance.

    null: the conditioning of the weak opinion, one row per sample (a null label, a negative prompt).
    interval: guided where low < t < high in ditkit's time; the ends 0 and 1 are included, other bounds are not
    (Kynkaanniemi et al. 2024; JiT's [0.1, 1] is (0, 0.9) here).
    channels: only the first ones are guided, the others keep the strong opinion (DiT: 3 of 4). None = all.
    """

    scale: float
    null: Conditioning
    interval: tuple[float, float] = (0.0, 1.0)
    channels: int | None = None

    def __post_init__(self) -> None:
        low, high = self.interval
        if not 0 <= low < high <= 1:
            raise DitkitError(f"a guidance interval is 0 <= low < high <= 1 (t = 1 is noise), not {self.interval}")
        if self.channels is not None and self.channels < 1:
            raise DitkitError(f"guidance on {self.channels} channels: use at least 1, or none for all")

    def weak(self, cond: Conditioning) -> Conditioning:
        return self.null

    def weight(self, t: float) -> float:
        low, high = self.interval
        margin = 1e-9  # a grid's time that equals a bound up to rounding lies on it, and bounds are outside
        inside = (low == 0 or t > low + margin) and (high == 1 or t < high - margin)
        return self.scale - 1 if inside else 0.0

    def rule(self, strong: Tensor, weak: Tensor) -> Tensor:
        difference = strong - weak
        if self.channels is not None:
            difference = difference.clone()
            difference[:, self.channels :] = 0
        return difference


class Guided:
    """A denoiser whose trajectories are guided."""

    def __init__(self, denoiser: Denoiser, guides: Sequence[Guide]):
        self.denoiser, self.guides = denoiser, tuple(guides)

    def check(self, visited: Iterable[float], needs: Iterable[str], visitor: str = "this grid") -> None:
        self.denoiser.check(visited, needs, visitor)

    def start(self, cond: Conditioning, shape: Sequence[int], times: Sequence[float]) -> Denoise:
        """The strong rows come first in the batch, then those of each guide; all are prepared together.

        Raises ValueError for a weak opinion on another number of samples.
        """
        b = shape[0]
        opinions = [cond, *(g.weak(cond) for g in self.guides)]
        if any(opinion.count not in (b, None) for opinion in opinions):
            raise ValueError(f"opinions on {[o.count for o in opinions]} samples, strong first, for a batch of {b}")
        given = cat(opinions)
        model = self.denoiser.model
        prepare = getattr(model, "prepare", None)
        rows = (b * (1 + len(self.guides)), *shape[1:])
        ready = given if prepare is None else prepare(given, rows, times)
        # the prepared rows of every set of active guides, cut once
        subsets: dict[tuple[int, ...], Conditioning] = {}

        def denoise(x: Tensor, t: Time) -> Prediction:
            weights = [g.weight(float(t)) for g in self.guides]
            active = tuple(i for i, w in enumerate(weights) if w != 0)
            if active not in subsets:
                index = torch.cat([torch.arange(b) + b * i for i in (0, *(i + 1 for i in active))])
                subsets[active] = ready.rows(index.to(x.device))
            prediction = self.denoiser(torch.cat([x] * (1 + len(active))), t, subsets[active])
            strong, *weak = prediction.out.split(b)
            out = strong
            for i, opinion in zip(active, weak, strict=True):
                out = out + weights[i] * self.guides[i].rule(strong, opinion)
            extra = None if prediction.extra is None else prediction.extra[:b]
            return Prediction(out, x, prediction.t, prediction.path, prediction.space, prediction.t_eps, extra)

        return denoise


def guide(denoiser: Denoiser, *guides: Guide) -> Denoiser | Guided:
    """The denoiser with guides; without any, the denoiser itself."""
    return Guided(denoiser, guides) if guides else denoiser
