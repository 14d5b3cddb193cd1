"""Paths of tokens from data to noise: x_t is, token by token, a draw from a mixture whose weights depend on time.

Time runs as everywhere from t = 0 (data) to t = 1 (noise); the literature's time is 1 - t. A path gives the weights of
its components, the data first and the source last, in float64 on the host. Gat et al. 2024, "Discrete Flow Matching",
arXiv 2407.15595; the three-way mixture is Drax's, Navon et al. 2025, arXiv 2510.04162.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol, Self, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from ..config import DitkitError, register
from ..rng import Draw
from .path import Time, as_time

__all__ = [
    "DraxPath",
    "Gumbel",
    "Mixture",
    "TokenPath",
    "components",
    "corrupt",
    "jumps",
    "marginal",
    "noise",
    "pick",
    "soften",
]


_NO_SNR = "tokens have no signal-to-noise ratio: use the grid uniform and a time sampler that is a law of t"


@runtime_checkable
class TokenPath(Protocol):
    """The schedule of a mixture."""

    @property
    def vocab(self) -> int:
        """How many kinds of tokens x has, the mask among them."""
        ...

    @property
    def mask(self) -> int | None:
        """The token that stands for nothing and is never data: the last one, where the source is made of it."""
        ...

    def __call__(self, t: Time, /) -> tuple[Tensor, ...]:
        """The weights of data, (middle,) source at t: they are not negative and sum to 1."""
        ...

    def rate(self, t: Time, /) -> tuple[Tensor, ...]:
        """The derivatives of the weights with respect to t."""
        ...

    def time(self, log_snr: Time, /) -> Tensor:
        """Raises DitkitError: what asks for it is for continuous x."""
        ...

    def fitted(self, symbols: int) -> Self:
        """The path for data of so many kinds of tokens."""
        ...


@register("path", "mixture")
@dataclass(frozen=True)
class Mixture:
    """Data with weight (1 - t)^power, else the source: "uniform" over all tokens, or "mask", one token more.

    The polynomial schedules of Gat et al. 2024; power 1 is that of masked diffusion (MDLM, Sahoo et al. 2024, with
    alpha = 1 - t). vocab: all kinds of tokens with the mask, 0 = those of the data.
    """

    source: str = "mask"
    power: float = 1.0
    vocab: int = 0

    def __post_init__(self) -> None:
        if self.source not in ("uniform", "mask"):
            raise DitkitError(f"the source of tokens is 'uniform' or 'mask', not {self.source!r}")
        if not self.power >= 1:
            raise DitkitError(f"the power of a schedule is at least 1 (its rate is finite), not {self.power}")

    @property
    def mask(self) -> int | None:
        return self.vocab - 1 if self.source == "mask" else None

    def __call__(self, t: Time) -> tuple[Tensor, Tensor]:
        log_data = self.power * torch.log1p(-as_time(t))
        return torch.exp(log_data), -torch.expm1(log_data)

    def rate(self, t: Time) -> tuple[Tensor, Tensor]:
        slope = self.power * (1 - as_time(t)) ** (self.power - 1)
        return -slope, slope

    def time(self, log_snr: Time) -> Tensor:
        raise DitkitError(_NO_SNR)

    def fitted(self, symbols: int) -> Self:
        """With the vocabulary of the data, and the mask."""
        return replace(self, vocab=symbols + (self.source == "mask"))


@register("path", "drax")
@dataclass(frozen=True)
class DraxPath:
    """Drax's three-way mixture (appendix C.1): in its time tau = 1 - t, with s = 1 - tau^p and r = tau^q,

    tau^p of the data, r s of the middle, (1 - r) s of a uniform source. The middle distribution is given with the data
    (a network's guess at what the audio says); the middle weighs most at tau = (q / (p + q))^(1/p).
    """

    p: float = 2.0
    q: float = 2 / 3
    vocab: int = 0

    def __post_init__(self) -> None:
        if not (self.p > 0 and self.q > 0):
            raise DitkitError(f"the powers of Drax's path are above 0, not {self.p} and {self.q}")

    @property
    def mask(self) -> None:
        return None

    def __call__(self, t: Time) -> tuple[Tensor, Tensor, Tensor]:
        tau = 1 - as_time(t)
        data, r = tau**self.p, tau**self.q
        return data, r * (1 - data), (1 - r) * (1 - data)

    def rate(self, t: Time) -> tuple[Tensor, Tensor, Tensor]:
        """That of the middle is infinite at t = 1 where q < 1."""
        tau = 1 - as_time(t)
        data, r = tau**self.p, tau**self.q
        d_data, d_r = self.p * tau ** (self.p - 1), self.q * tau ** (self.q - 1)
        return -d_data, -(d_r * (1 - data) - r * d_data), d_r * (1 - data) + (1 - r) * d_data

    def time(self, log_snr: Time) -> Tensor:
        raise DitkitError(_NO_SNR)

    def fitted(self, symbols: int) -> Self:
        """With the vocabulary of the data."""
        return replace(self, vocab=symbols)


@dataclass(frozen=True)
class Gumbel:
    """The standard Gumbel law -log(-log u): the argmax of log p + Gumbel draws is a draw from p."""

    @property
    def base(self) -> str:
        return "uniform"

    def __call__(self, draws: Tensor) -> Tensor:
        return -torch.log(-torch.log(draws)).float()


def jumps(path: TokenPath, t: Time) -> tuple[Tensor, ...]:
    """How often, per unit of time towards the data, a token is replaced by a draw from each component.

    The rates a_j = w_j' - w_j w_k' / w_k of Gat et al. 2024 (equation 16, derivatives in their time), where k is the
    source, the component that decays fastest; its own rate is 0. On a two-way path the rate of the data is
    kappa' / (1 - kappa). Infinite at t = 0, where nothing is left to be replaced.
    """
    weights, slopes = path(t), path.rate(t)
    decay = slopes[-1] / weights[-1]
    towards = [w * decay - slope for w, slope in zip(weights[:-1], slopes[:-1], strict=True)]
    return (*towards, torch.zeros_like(decay))


def components(
    path: TokenPath, like: Tensor, middle: Float[Tensor, "*#b_l v"] | None = None
) -> tuple[Float[Tensor, "*#b_l v"], ...]:
    """The distributions over tokens of all components but the data, on the device and in the dtype of `like`.

    Raises DitkitError if the path has a middle distribution and none is given, or the other way round.
    """
    _check_middle(path, middle)
    if path.mask is None:
        source = like.new_full((path.vocab,), 1 / path.vocab)
    else:
        source = F.one_hot(torch.tensor(path.mask, device=like.device), path.vocab).to(like)
    return (source,) if middle is None else (middle.to(like), source)


def _check_middle(path: TokenPath, middle: Tensor | None) -> None:
    if (middle is not None) != isinstance(path, DraxPath):
        have = "no middle distribution was given" if middle is None else "a middle distribution was given"
        raise DitkitError(f"the path {type(path).__name__} and {have}: Drax's path needs one, a mixture takes none")


def _weights(path: TokenPath, t: Time, like: Tensor) -> list[Tensor]:
    """The weights [b 1 1], or [1 1 1] for one time, on the device and in the dtype of `like`."""
    return [w.to(like).view(-1, 1, 1) for w in path(t)]


def marginal(
    path: TokenPath, x0: Int[Tensor, "b l"], t: Time, middle: Tensor | None = None, dtype: torch.dtype = torch.float32
) -> Float[Tensor, "b l v"]:
    """p_t(x | x0): the distribution of each token at time t, [] or [b]."""
    data = F.one_hot(x0, path.vocab).to(dtype)
    first, *rest = _weights(path, t, data)
    mixed = first * data
    for weight, distribution in zip(rest, components(path, data, middle), strict=True):
        mixed = mixed + weight * distribution
    return mixed


def pick(probabilities: Float[Tensor, "b l v"], draws: Float[Tensor, "b l"]) -> Int[Tensor, "b l"]:
    """A token from each distribution, by its cumulative sums and a uniform draw; what has probability 0 never comes."""
    sums = probabilities.cumsum(-1)
    total = sums[..., -1:]
    below = torch.nextafter(total, torch.zeros_like(total))  # a draw that rounds to 1 must not fall off the end
    wanted = torch.minimum(draws.to(sums)[..., None] * total, below)
    return torch.searchsorted(sums, wanted, right=True).squeeze(-1)


def corrupt(
    path: TokenPath, x0: Int[Tensor, "b l"], t: Time, rng: Draw, middle: Tensor | None = None
) -> Int[Tensor, "b l"]:
    """x_t given x0. Draws "noise"."""
    _check_middle(path, middle)
    component, which = rng("noise", "uniform", (2, *x0.shape[1:])).to(x0.device).unbind(1)
    weights = [w.to(component.device).view(-1, 1) for w in path(t)]
    x = noise(path, which)
    if middle is not None:
        x = torch.where(component < weights[0] + weights[1], pick(middle.expand(*x0.shape, -1), which), x)
    return torch.where(component < weights[0], x0, x)


def soften(
    path: TokenPath,
    x0: Int[Tensor, "b l"],
    t: Time,
    rng: Draw,
    temperature: float,
    middle: Tensor | None = None,
    hard: bool = False,
) -> Shaped[Tensor, "b l v"]:
    """x_t given x0 as probabilities, by Gumbel-softmax (Jang et al. 2017), through which gradients reach `middle`.

    Its argmax is a draw from the path. hard: that draw as a one-hot vector, with the gradient of the soft one
    (straight-through), which is what a network sees when it samples. Draws "noise". Raises DitkitError for a
    temperature of 0 or below.
    """
    if not temperature > 0:
        raise DitkitError(f"the temperature of Gumbel-softmax is above 0, not {temperature}")
    mixed = marginal(path, x0, t, middle)
    gumbel = rng("noise", Gumbel(), mixed.shape[1:]).to(mixed)
    soft = torch.softmax((mixed.clamp(min=torch.finfo(mixed.dtype).tiny).log() + gumbel) / temperature, dim=-1)
    if not hard:
        return soft
    return F.one_hot(soft.argmax(-1), path.vocab).to(soft) + soft - soft.detach()


def noise(path: TokenPath, draws: Float[Tensor, "b l"]) -> Int[Tensor, "b l"]:
    """Tokens of the source, given uniform draws."""
    if path.mask is not None:
        return torch.full(draws.shape, path.mask, device=draws.device)
    return (draws * path.vocab).long()
