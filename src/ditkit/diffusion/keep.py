"""Parts of the sample that are given: prompt tokens, the surroundings of a hole, a first frame."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

from ..conditioning import Conditioning, Known
from .denoiser import Prediction, Startable, over
from .path import Time
from .space import regular_row

__all__ = ["Kept", "keep"]

_CLEAR = 1e-6
"""At less noise x does not show, but for rounding, which noise is in it."""


@dataclass(frozen=True)
class _Certain(Prediction):
    """A prediction that is certain where `mask` is True: there x0 is `known` and the noise in x is `noise`."""

    known: Float[Tensor, "b c *space"] | None = None
    noise: Float[Tensor, "b c *space"] | None = None
    mask: Bool[Tensor, "b c *space"] | None = None

    def to(self, space: str) -> Tensor:
        said = super().to(space)
        if self.known is None or self.noise is None or self.mask is None:
            return said
        of_x0, of_eps = regular_row(space, self.path, self.t, self.t_eps)
        return torch.where(self.mask, over(of_x0, said) * self.known + over(of_eps, said) * self.noise, said)


class Kept:
    """A denoiser, guided or not, that knows a part of x0: see `keep`."""

    def __init__(self, denoiser: Startable, known: Known):
        self.denoiser, self.known = denoiser, known

    def check(self, visited: Iterable[float], needs: Iterable[str], visitor: str = "this grid") -> None:
        self.denoiser.check(visited, needs, visitor)

    def start(self, cond: Conditioning, shape: Sequence[int], times: Sequence[float]) -> Callable[[Tensor, Time], Any]:
        denoise = self.denoiser.start(cond, shape, times)
        last: Tensor | None = None  # the noise that was found in x last

        def kept(x: Shaped[Tensor, "b *shape"], t: Time) -> Any:
            nonlocal last
            mask, values = self.known.mask.to(x.device).expand_as(x), self.known.values.to(x).expand_as(x)
            if not x.is_floating_point():
                prediction: Any = denoise(torch.where(mask, values, x), t)
                return replace(prediction, known=mask)
            p = denoise(x, t)
            alpha, sigma = p.path(p.t)
            if bool((sigma > _CLEAR).all()):
                last = (x - over(alpha, x) * values) / over(sigma, x)
            noise = torch.zeros_like(x) if last is None else last
            return _Certain(p.out, p.x, p.t, p.path, p.space, p.t_eps, p.extra, values, noise, mask)

        return kept


def keep(denoiser: Startable, known: Known) -> Kept:
    """The denoiser with a part of x0 given: what is known comes out as it is, and the network samples the rest.

    Tokens are put back before the network sees them, and never jump. In a continuous x the opinion there is that x0 is
    the known value, whatever a guide says, so that every solver follows the path to it; a mask of one channel serves
    all. The last step of a solver that adds noise may leave some of it: put the values back after it, too. A network
    that was trained to be told reads `known` from its conditioning, as all else.
    """
    return Kept(denoiser, known)
