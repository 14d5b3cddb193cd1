"""Discrete diffusion through the same contracts: a denoiser of tokens, its predictions, objectives and solver.

The network gives for each token of x_t the logits of what it was at t = 0. All else follows from the path: rates of
jumping, the exact law of a solver's step, the bound on the likelihood.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn

from ..conditioning import Conditioning
from ..config import DitkitError, lookup, register
from ..rng import Draw, Rng
from .denoiser import prepared
from .objective import Loss
from .path import Time, as_time
from .solvers.solver import Once
from .times import Uniform
from .token_path import DraxPath, Mixture, TokenPath, components, corrupt, jumps, noise, pick

__all__ = [
    "CrossEntropy",
    "GeneralisedKL",
    "Jumps",
    "TokenDenoiser",
    "TokenMeaning",
    "TokenPrediction",
    "likelihood_bound",
]

_FLOOR = 1e-9  # the divergence-free rate is infinite at t = 1, where it only replaces noise by noise


@dataclass(frozen=True)
class TokenPrediction:
    """A network's logits with all it takes to read them as rates and steps: the kin of `Prediction`.

    out: logits of x0, of which those of the mask are ignored; x: the tokens that the network saw, or probabilities
    [b l v]; t: float64 on the host, [] or [b]; middle: the given distribution of Drax's path; known: tokens that are
    given and stay.

    Where the source is the mask, a token that is not masked is that of x0 (MDLM's "carry-over", Sahoo et al. 2024
    section 3.2.3).
    """

    out: Float[Tensor, "b l v"]
    x: Shaped[Tensor, "b l *v"]
    t: Float[Tensor, "*b"]
    path: TokenPath
    middle: Float[Tensor, "*#b_l v"] | None = None
    known: Bool[Tensor, "b l"] | None = None

    @property
    def space(self) -> str:
        """Of `out`: logits, which are log-probabilities up to a number for each token."""
        return "logits"

    def to(self, space: str) -> Tensor:
        """The logits. Raises DitkitError for a space of continuous x."""
        if space != self.space:
            raise DitkitError(f"tokens have no {space}, only logits")
        return self.out

    def parts(self, x: Tensor) -> list[TokenPrediction]:
        """Of a batch of several opinions on x, each of them."""
        return [replace(self, out=out, x=x) for out in self.out.split(len(x))]

    def with_out(self, out: Tensor) -> TokenPrediction:
        """The same with other logits, such as guided ones."""
        return replace(self, out=out)

    def log_probabilities(self, temperature: float = 1.0) -> Float[Tensor, "b l v"]:
        """log p(x0 | x_t), token by token, the logits divided by `temperature`."""
        logits, mask = self.out, self.path.mask
        if mask is not None:
            nothing = torch.arange(logits.shape[-1], device=logits.device) == mask
            logits = logits.masked_fill(nothing, -torch.inf)
        logs = torch.log_softmax(logits / temperature, dim=-1)
        certain = self.known
        if mask is not None and self.x.ndim == 2:
            kept = self.x != mask
            certain = kept if certain is None else certain | kept
        if certain is None:
            return logs
        point = torch.zeros_like(logs).masked_fill(~self._here(), -torch.inf)
        return torch.where(certain[..., None], point, logs)

    @property
    def probabilities(self) -> Float[Tensor, "b l v"]:
        """p(x0 | x_t), token by token."""
        return self.log_probabilities().exp()

    def rates(self, temperature: float = 1.0, divergence_free: float = 0.0) -> Float[Tensor, "b l v"]:
        """u(y | x): how often the token x becomes y, per unit of time towards the data; 0 at y = x.

        With `divergence_free` = a, tokens are also replaced by draws from p_t(. | x0) at the rate
        a kappa' / (kappa (1 - kappa)), kappa the weight of the data: that leaves the marginals as they are, and lets
        the sampler change what it has decided (the `div_free` of flow_matching's Euler solver; Gat et al. 2024 3.3).
        """
        to_data, to_others = self._targets(divergence_free)
        rates = to_data * self.log_probabilities(temperature).exp() + to_others
        return rates.masked_fill(self._here() | self._stays(), 0.0)

    @property
    def velocity(self) -> Float[Tensor, "b l v"]:
        """The velocity of the probability of each token, dp/dt in ditkit's time, if x is where it is with certainty."""
        rates = self.rates()
        return torch.where(self._here(), rates.sum(-1, keepdim=True), -rates)

    def transition(self, s: float, temperature: float = 1.0, divergence_free: float = 0.0) -> Float[Tensor, "b l v"]:
        """The exact law of an Euler step from t to s < t, token by token: what the solver draws from.

        Of a step that draws x0 from p(x0 | x_t), jumps with probability 1 - exp(-h sum_y u(y | x, x0)), h = t - s, to y
        in proportion to u, and at s = 0 takes x0: with u = A delta_x0 + B the sum over x0 has a closed form.
        """
        p = self.log_probabilities(temperature).exp()
        if s == 0:
            return p
        here = self._here()
        h = (self.t - s).to(p).view(-1, 1, 1)
        to_data, to_others = self._targets(divergence_free)
        to_others = to_others.expand_as(p).masked_fill(here, 0.0)
        leave = to_others.sum(-1, keepdim=True)  # the rate of leaving x if x0 = x; with `to_data` if it is another
        stay = p.masked_fill(~here, 0.0).sum(-1, keepdim=True)

        def share(rate: Tensor) -> Tensor:
            """(1 - exp(-h rate)) / rate, h at 0."""
            safe = rate.clamp(min=torch.finfo(rate.dtype).tiny)
            return torch.where(rate > 0, -torch.expm1(-h * safe) / safe, h.expand_as(rate))

        other, same = share(to_data + leave), share(leave)
        moved = p * to_data * other + to_others * ((1 - stay) * other + stay * same)
        moved = moved.masked_fill(here | self._stays(), 0.0)
        return torch.where(here, 1 - moved.sum(-1, keepdim=True), moved).clamp(min=0)

    def bound(self, x0: Int[Tensor, "b l"]) -> Float[Tensor, "b l"]:
        """The generalised KL of each token, in nats: with t uniform, its mean bounds -log p(x0) / l from above.

        sum over y != x of u(y | x, x0) log(u(y | x, x0) / u(y | x)) - u(y | x, x0) + u(y | x), u(y | x) being the
        network's. On a two-way path it is -kappa' / (1 - kappa) (p(x) - delta + (1 - delta) log p(x0)) with delta = 1
        where x = x0 (Shaul et al. 2024, arXiv 2412.03487; the loss of flow_matching).
        """
        logs, wrong = self.log_probabilities(), (self.x != x0).to(self.out)
        to_data, to_others = self._targets(0.0)
        surplus = 1 - logs.gather(-1, self.x[..., None]).squeeze(-1).exp() - wrong
        if not isinstance(self.path, DraxPath):
            return to_data.squeeze(-1) * (surplus - wrong * logs.gather(-1, x0[..., None]).squeeze(-1))
        p = logs.exp()
        truth = to_data * F.one_hot(x0, p.shape[-1]) + to_others
        guess = (to_data * p + to_others).clamp(min=torch.finfo(p.dtype).tiny)
        terms = (torch.xlogy(truth, truth) - truth * guess.log()).masked_fill(self._here(), 0.0)
        return to_data.squeeze(-1) * surplus + terms.sum(-1)

    def _targets(self, divergence_free: float) -> tuple[Float[Tensor, "#b 1 1"], Float[Tensor, "*#b_l v"]]:
        """A, the rate of jumps to a draw of x0, and B, those to each token whatever x0 is."""
        like = self.out
        to_data, *rest = (rate.to(like).view(-1, 1, 1) for rate in jumps(self.path, self.t))
        if divergence_free:
            weights, slopes = self.path(self.t), self.path.rate(self.t)
            data = weights[0]
            extra = (-divergence_free * slopes[0] / (data.clamp(min=_FLOOR) * (1 - data))).to(like).view(-1, 1, 1)
            first, *others = (w.to(like).view(-1, 1, 1) for w in weights)
            to_data = to_data + extra * first
            rest = [rate + extra * w for rate, w in zip(rest, others, strict=True)]
        spread = like.new_zeros(1, 1, like.shape[-1])
        for rate, distribution in zip(rest, components(self.path, like, self.middle), strict=True):
            spread = spread + rate * distribution
        return to_data, spread

    def _here(self) -> Bool[Tensor, "b l v"]:
        """True at the token x. Raises ValueError where x are probabilities."""
        if self.x.ndim != 2:
            raise ValueError("a prediction of soft tokens has no rates: x are probabilities")
        return F.one_hot(self.x, self.out.shape[-1]).bool()

    def _stays(self) -> Tensor:
        """True, [b l 1], where x is given."""
        return torch.zeros_like(self.x, dtype=torch.bool)[..., None] if self.known is None else self.known[..., None]


@register("denoiser", "tokens")
@dataclass(frozen=True)
class TokenMeaning:
    """The meaning of a network's logits, as saved with its weights: the kin of `Meaning`.

    path: a mixture, or Drax's. clock: how the network reads time; in the literature 0 is noise.
    """

    path: Any = Mixture()
    clock: str = "1-t"

    def __post_init__(self) -> None:
        if not isinstance(self.path, TokenPath):
            raise DitkitError(f"tokens need the path mixture or drax, not {type(self.path).__name__}")
        lookup("clock", self.clock)

    @property
    def vocab(self) -> int:
        return self.path.vocab

    def fitted(self, vocab: int) -> TokenMeaning:
        """The meaning for tokens of `vocab` kinds. Raises DitkitError for 0, which says that x is continuous."""
        if vocab == 0:
            raise DitkitError("what is diffused is continuous, and this denoiser is for tokens: choose another")
        return replace(self, path=self.path.fitted(vocab))

    def of(self, model: Callable[..., Tensor]) -> TokenDenoiser:
        """The network with this meaning."""
        return TokenDenoiser(model, self.path, self.clock)


class TokenDenoiser:
    """`denoiser(x, t, cond) -> TokenPrediction`: a network called in ditkit's time, its logits with their path."""

    prediction: ClassVar[str] = "logits"
    t_eps: ClassVar[float] = 0.0

    def __init__(self, model: Callable[..., Tensor], path: TokenPath, clock: str = "1-t"):
        self.model, self.path = model, path
        self.clock: Callable[[Any, Tensor], Tensor] = lookup("clock", clock)

    def __call__(
        self, x: Tensor, t: Time, cond: Conditioning, *, edit: Any = None, middle: Tensor | None = None
    ) -> TokenPrediction:
        """x: tokens [b l] or probabilities [b l v]; t one time or [b], float64 on the host."""
        t = as_time(t)
        clock = self.clock(self.path, t).to(x.device, torch.float32).expand(x.shape[0])
        if x.is_floating_point() and isinstance(self.model, nn.Module):
            x = x.to(next(self.model.parameters(), x).dtype)
        out = self.model(x, clock, cond, edit=edit)
        return TokenPrediction(out if out.dtype == torch.float64 else out.float(), x, t, self.path, middle)

    def prior(self, rng: Draw, shape: Sequence[int]) -> Int[Tensor, "b l"]:
        """x at t = 1: tokens of the source. Draws "prior"."""
        return noise(self.path, rng("prior", "uniform", shape))

    def start(self, cond: Conditioning, shape: Sequence[int], times: Sequence[float]) -> Callable[[Tensor, Time], Any]:
        """One trajectory: what depends neither on x nor on the step is computed here, once."""
        ready = prepared(self.model, cond, shape, times)
        return lambda x, t: self(x, t, ready)

    def check(self, visited: Iterable[float], needs: Iterable[str], visitor: str = "this grid") -> None:
        """Raises DitkitError for what reads a space, which tokens do not have, and where rates are infinite."""
        for need in needs:
            if need not in ("jumps", self.prediction):
                raise DitkitError(
                    f"tokens have no {need}: use the solver jumps and the objective cross_entropy or generalised_kl"
                )
            if isinstance(self.path, DraxPath):
                raise DitkitError(
                    "a middle distribution is given in training only: sample with the path mixture (source uniform)"
                )


@register("objective", "cross_entropy")
@dataclass(frozen=True)
class CrossEntropy:
    """-log p(x0 | x_t), mean over all tokens (Gat et al. 2024 equation 25)."""

    times: Any = Uniform()

    def check(self, denoiser: Any) -> None:
        require_tokens(denoiser)

    def learn(self, denoiser: Any, rng: Rng) -> CrossEntropy:
        return self

    def loss(
        self, denoiser: TokenDenoiser, x0: Int[Tensor, "b l"], cond: Conditioning, rng: Draw, data: Any = None
    ) -> Loss:
        """Draws "t" and "noise"."""
        prediction = _look(self.times, denoiser, x0, cond, rng)
        logs = prediction.log_probabilities().gather(-1, x0[..., None]).squeeze(-1)
        return Loss({"cross_entropy": -logs.mean(1)}, prediction.t)


@register("objective", "generalised_kl")
@dataclass(frozen=True)
class GeneralisedKL:
    """The bound on -log p(x0) in nats per token, `TokenPrediction.bound`; one it is only with uniform times."""

    times: Any = Uniform()

    def check(self, denoiser: Any) -> None:
        require_tokens(denoiser)

    def learn(self, denoiser: Any, rng: Rng) -> GeneralisedKL:
        return self

    def loss(
        self, denoiser: TokenDenoiser, x0: Int[Tensor, "b l"], cond: Conditioning, rng: Draw, data: Any = None
    ) -> Loss:
        """Draws "t" and "noise"."""
        prediction = _look(self.times, denoiser, x0, cond, rng)
        return Loss({"generalised_kl": prediction.bound(x0).mean(1)}, prediction.t)


def likelihood_bound(
    denoiser: TokenDenoiser, x0: Int[Tensor, "b l"], cond: Conditioning, rng: Draw, times: int = 32, last: float = 0.01
) -> Float[Tensor, "b"]:
    """An unbiased estimate of a bound on -log p(x0) from above, in nats, for each sample with all of its tokens.

    The bound is that of a sampler with many small steps down to t = `last` and one from there to the data: the integral
    of `TokenPrediction.bound` from `last` to 1, by one draw in each of `times` equal parts, and -log p(x0 | x_last). A
    network that doubts a right token at t = 0 makes the integral down to 0 infinite on a uniform path. Draws "t" and
    "noise" from `rng.at(k)`, k up to `times`. Raises DitkitError for what is not for tokens.
    """
    require_tokens(denoiser)
    total = torch.zeros(len(x0), dtype=torch.float64, device=x0.device)
    for k in range(times):
        draw = rng.at(k)
        t = last + (1 - last) * (k + draw("t", "uniform").double().cpu()) / times
        prediction = denoiser(corrupt(denoiser.path, x0, t, draw), t, cond)
        total += (1 - last) / times * prediction.bound(x0).sum(1)
    prediction = denoiser(corrupt(denoiser.path, x0, last, rng.at(times)), last, cond)
    return total - prediction.log_probabilities().gather(-1, x0[..., None]).squeeze(-1).sum(1)


def require_tokens(denoiser: Any) -> None:
    if not isinstance(denoiser, TokenDenoiser):
        raise DitkitError("this objective is for tokens, and what is diffused is continuous: use objective regression")
    if isinstance(denoiser.path, DraxPath):
        raise DitkitError("Drax's path needs a middle distribution, which this objective does not have")


def _look(times: Any, denoiser: TokenDenoiser, x0: Tensor, cond: Conditioning, rng: Draw) -> TokenPrediction:
    """The network's opinion on a corrupted x0."""
    t = rng("t", times.on(denoiser.path)).double().cpu()
    return denoiser(corrupt(denoiser.path, x0, t, rng), t, cond)


@register("solver", "jumps")
@dataclass(frozen=True)
class Jumps(Once):
    """Euler steps of the jump process: each token is drawn from `TokenPrediction.transition` (Gat et al. 2024).

    temperature: the logits are divided by it. divergence_free: see `TokenPrediction.rates`. The last step takes x0.
    """

    needs: ClassVar[tuple[str, ...]] = ("jumps",)
    temperature: float = 1.0
    divergence_free: float = 0.0

    def __post_init__(self) -> None:
        if not self.temperature > 0 or not self.divergence_free >= 0:
            raise DitkitError(
                f"solver.temperature is above 0 and solver.divergence_free not below 0, not {self.temperature} and "
                f"{self.divergence_free}"
            )

    def step(
        self, denoise: Callable[[Tensor, Time], Any], x: Int[Tensor, "b l"], t: float, s: float, state: None, rng: Draw
    ) -> tuple[Tensor, None]:
        """Draws "solver"."""
        prediction: TokenPrediction = denoise(x, t)
        law = prediction.transition(s, self.temperature, self.divergence_free)
        return pick(law, rng("solver", "uniform", x.shape[1:]).to(x.device)), None
