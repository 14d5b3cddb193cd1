"""Parts of the sample that are given: prompt tokens, the surroundings of a hole, a first frame."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Shaped
from torch import Tensor

from ..conditioning import Conditioning, Known
from .denoiser import Prediction, Startable
from .path import Time

__all__ = ["Kept", "keep"]


@dataclass(frozen=True)
class _Certain(Prediction):
    """A prediction whose x0 is given where `mask` is True: there every space is read from `values`, without a clamp."""

    values: Tensor | None = None
    mask: Bool[Tensor, "b *shape"] | None = None

    def to(self, space: str) -> Tensor:
        said = super().to(space)
        if self.values is None or self.mask is None:
            return said
        known = Prediction(self.values, self.x, self.t, self.path, "x0").to(space)
        return torch.where(self.mask, known, said)


class Kept:
    """A denoiser, guided or not, that knows a part of x0: see `keep`."""

    def __init__(self, denoiser: Startable, known: Known):
        self.denoiser, self.known = denoiser, known

    def check(self, visited: Iterable[float], needs: Iterable[str], visitor: str = "this grid") -> None:
        self.denoiser.check(visited, needs, visitor)

    def start(self, cond: Conditioning, shape: Sequence[int], times: Sequence[float]) -> Callable[[Tensor, Time], Any]:
        denoise = self.denoiser.start(cond, shape, times)

        def kept(x: Shaped[Tensor, "b *shape"], t: Time) -> Any:
            mask, values = self.known.mask.to(x.device), self.known.values.to(x)
            if not x.is_floating_point():
                prediction: Any = denoise(torch.where(mask, values, x), t)
                return replace(prediction, known=mask)
            p = denoise(x, t)
            mask = mask.expand_as(x)
            return _Certain(p.out, p.x, p.t, p.path, p.space, p.t_eps, p.extra, values.expand_as(x), mask)

        return kept


def keep(denoiser: Startable, known: Known) -> Kept:
    """The denoiser with a part of x0 given: what is known comes out as it is, and the network samples the rest.

    Tokens are put back before the network sees them, and never jump. In a continuous x the opinion there is that x0 is
    the known value, so that every solver follows the path to it; a mask of one channel serves all. A network that was
    trained to be told reads `known` from its conditioning, as all else.
    """
    return Kept(denoiser, known)
