"""Drax's training: a path through a middle distribution that is learned beside the denoiser (arXiv 2510.04162)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from ..conditioning import Conditioning
from ..config import DitkitError, register
from ..rng import Draw, Rng
from .discrete import TokenDenoiser, require_tokens
from .objective import Loss
from .times import Uniform
from .token_path import DraxPath, soften

__all__ = ["DraxLoss"]


@register("objective", "drax")
@dataclass(frozen=True)
class DraxLoss:
    """-log p(x0 | x_t) of the denoiser plus -log p_mid(x0) of the middle distribution, means over tokens (section 3.3).

    x_t is drawn from Drax's three-way path by Gumbel-softmax, so that both terms teach the middle; tokens that are
    known stay as they are. The network of the middle is the model's (`Drax.middle`), and is needed in training only:
    one samples on the denoiser's own two-way path, whose source is uniform, too.
    """

    p: float = 2.0
    q: float = 2 / 3
    """Powers of the path: see the path drax."""
    temperature: float = 1.0
    """Of Gumbel-softmax; the paper does not print it."""
    hard: bool = False
    """Show the network one-hot vectors with the gradients of the soft ones (straight-through)."""
    width: int = 448
    """Of the middle's network."""
    heads: int = 7
    times: Any = field(default_factory=Uniform)

    def __post_init__(self) -> None:
        DraxPath(self.p, self.q)
        if not self.temperature > 0 or self.width < 1 or self.heads < 1 or self.width % self.heads:
            raise DitkitError(
                "objective.temperature is above 0, and objective.width a multiple of objective.heads, not "
                f"{self.temperature}, {self.width} and {self.heads}"
            )

    def check(self, denoiser: Any) -> None:
        """Raises DitkitError for what is not tokens, for another source, and for a model without a middle."""
        require_tokens(denoiser)
        if denoiser.path.mask is not None:
            raise DitkitError(
                "Drax's source is uniform, and the denoiser's is the mask: set denoiser.path.source uniform"
            )
        if not hasattr(denoiser.model, "middle"):
            name = type(denoiser.model).__name__
            raise DitkitError(f"the objective drax learns a middle distribution, which a {name} does not have")

    def learn(self, denoiser: Any, rng: Rng) -> _Learned:
        """With the network of the middle distribution."""
        return _Learned(self, denoiser, rng)

    def loss(
        self, denoiser: TokenDenoiser, x0: Int[Tensor, "b l"], cond: Conditioning, rng: Draw, data: Any = None
    ) -> Loss:
        raise DitkitError("drax learns a middle distribution: take the loss of objective.learn(denoiser, rng)")


class _Learned(nn.Module):
    """The objective with the network of the middle distribution."""

    def __init__(self, objective: DraxLoss, denoiser: TokenDenoiser, rng: Rng):
        super().__init__()
        self.objective = objective
        self.middle: nn.Module = denoiser.model.middle(objective.width, objective.heads, rng)  # type: ignore[attr-defined]

    def check(self, denoiser: Any) -> None:
        self.objective.check(denoiser)

    def learn(self, denoiser: Any, rng: Rng) -> _Learned:
        return self

    def loss(
        self, denoiser: TokenDenoiser, x0: Int[Tensor, "b l"], cond: Conditioning, rng: Draw, data: Any = None
    ) -> Loss:
        """Terms "cross_entropy" and "middle". Draws "t" and "noise"."""
        own = self.objective
        path = DraxPath(own.p, own.q).fitted(denoiser.path.vocab)
        t = rng("t", own.times.on(path)).double().cpu()
        logs: Float[Tensor, "b l v"] = torch.log_softmax(self.middle(cond, x0.shape[1]).float(), dim=-1)
        x = soften(path, x0, t, rng, own.temperature, logs.exp(), own.hard)
        if cond.known is not None:
            x = torch.where(cond.known.mask[..., None], F.one_hot(x0, path.vocab).to(x), x)
        prediction = denoiser(x, t, cond)
        terms = {"cross_entropy": prediction.log_probabilities(), "middle": logs}
        return Loss({name: -p.gather(-1, x0[..., None]).squeeze(-1).mean(1) for name, p in terms.items()}, t)
