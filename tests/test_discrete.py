"""Tokens: paths, predictions, objectives and the solver against exact enumeration of two tokens of five symbols."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close

from ditkit.conditioning import Conditioning, Known
from ditkit.config import DitkitError, from_json, to_json
from ditkit.diffusion import (
    CrossEntropy,
    DraxPath,
    Euler,
    GeneralisedKL,
    Gumbel,
    Heun,
    Jumps,
    Linear,
    LogitNormal,
    LogNormal,
    Meaning,
    Mixture,
    Regression,
    TokenDenoiser,
    TokenMeaning,
    TokenPath,
    TokenPrediction,
    check_grid,
    corrupt,
    integrate,
    jumps,
    keep,
    marginal,
    pick,
    soften,
)
from ditkit.diffusion.grid import Karras
from ditkit.diffusion.grid import Uniform as UniformGrid
from ditkit.rng import Replay, Rng

SYMBOLS = 5
uniform = UniformGrid()
MIXTURES = [
    Mixture("uniform").fitted(SYMBOLS),
    Mixture("mask").fitted(SYMBOLS),
    Mixture("uniform", power=2.0).fitted(SYMBOLS),
    Mixture("mask", power=3.0).fitted(SYMBOLS),
]
MIDDLE = torch.softmax(torch.randn(2, 5, generator=torch.Generator().manual_seed(7), dtype=torch.float64), dim=-1)
named = pytest.mark.parametrize("path", MIXTURES, ids=lambda p: f"{p.source}-{p.power:g}")


def joint() -> Tensor:
    """Probabilities [5 5] of two tokens that depend on each other."""
    generator = torch.Generator().manual_seed(3)
    return torch.softmax(2.0 * torch.randn(SYMBOLS**2, generator=generator, dtype=torch.float64), 0).view(5, 5)


def states(vocab: int) -> Tensor:
    """All states [vocab^2 2] of two tokens."""
    return torch.tensor(list(itertools.product(range(vocab), repeat=2)))


def likelihoods(path: TokenPath, x: Tensor, t: Tensor) -> Tensor:
    """p_t(x | x0) of each token of x [b 2], for every x0 [b 2 5], at the times t [b]; from the definition."""
    weights = [w.view(-1, 1, 1) for w in path(t)]
    source = torch.full(x.shape, 1 / path.vocab) if path.mask is None else x == path.mask
    found = weights[0] * (x[..., None] == torch.arange(SYMBOLS)) + weights[-1] * source.double()[..., None]
    if len(weights) == 3:
        found = found + weights[1] * MIDDLE.gather(1, x.T).T[..., None]
    return found


def token_laws(path: TokenPath, t: float) -> Tensor:
    """p_t(x | x0) of each of the two tokens [2 5 vocab]."""
    x = torch.arange(path.vocab)[:, None].expand(-1, 2)
    return likelihoods(path, x, torch.full((path.vocab,), t, dtype=torch.float64)).permute(1, 2, 0)


def exact_marginal(path: TokenPath, t: float, data: Tensor | None = None) -> Tensor:
    """p_t of both tokens [vocab vocab]."""
    laws = token_laws(path, t)
    return torch.einsum("ab,ax,by->xy", joint() if data is None else data, laws[0], laws[1])


class Exact(torch.nn.Module):
    """The network that knows: log p(x0 of each token | both tokens of x_t) for data of a given joint law.

    It reads the literature's time. A token whose x0 is given in `cond.known` is taken as that.
    """

    def __init__(self, path: TokenPath, data: Tensor | None = None):
        super().__init__()
        self.path, self.data = path, joint() if data is None else data

    def forward(self, x: Tensor, t: Tensor, cond: Conditioning, *, edit: Any = None) -> Tensor:
        first, second = likelihoods(self.path, x, 1 - t.double()).unbind(1)
        if cond.known is not None:
            given, mask = F.one_hot(cond.known.values, SYMBOLS).to(first), cond.known.mask
            first = torch.where(mask[:, :1], given[:, 0], first)
            second = torch.where(mask[:, 1:], given[:, 1], second)
        posterior = self.data * first[:, :, None] * second[:, None, :]
        logs = torch.stack((posterior.sum(2), posterior.sum(1)), dim=1).clamp(min=1e-300).log()
        return F.pad(logs, (0, self.path.vocab - SYMBOLS), value=0.0)  # the mask's logit must not matter


def wrong(path: TokenPath) -> Exact:
    """The network that knows all about other data."""
    return Exact(path, joint().flip(0).T.contiguous())


def told(path: TokenPath, x: Tensor, t: float, network: Any = None) -> TokenPrediction:
    """The prediction at a time that float32 does not round."""
    network = network or Exact(path)
    clock = torch.full((len(x),), 1 - t, dtype=torch.float64)
    middle = MIDDLE if isinstance(path, DraxPath) else None
    return TokenPrediction(network(x, clock, Conditioning()), x, torch.tensor(t, dtype=torch.float64), path, middle)


def chain(
    path: TokenPath,
    law: Callable[[Tensor, float, float], Tensor],
    start: Tensor,
    times: tuple[float, ...],
) -> list[Tensor]:
    """The exact distributions [vocab vocab] of a sampler that draws both tokens from `law(x, t, s)` [b 2 vocab]."""
    p, all_states, found = start.flatten(), states(path.vocab), [start]
    for t, s in itertools.pairwise(times):
        probabilities = law(all_states, t, s)
        assert_close(probabilities.sum(-1), torch.ones(len(all_states), 2, dtype=torch.float64))
        matrix = torch.einsum("nx,ny->nxy", probabilities[:, 0], probabilities[:, 1]).flatten(1)
        p = p @ matrix
        found.append(p.view(path.vocab, path.vocab))
    return found


def distance(p: Tensor, q: Tensor) -> float:
    """Total variation; the smaller table has no mask."""
    extra = p.shape[0] - q.shape[0]
    return 0.5 * float((p - F.pad(q, (0, extra, 0, extra))).abs().sum())


# --------------------------------------------------------------------------------------------------------- paths


@pytest.mark.parametrize("path", [*MIXTURES, DraxPath(vocab=5), DraxPath(3.0, 1.5, 5)], ids=str)
def test_weights_sum_to_one_and_their_rates_are_derivatives(path: TokenPath) -> None:
    t = torch.linspace(0, 1, 101, dtype=torch.float64)
    weights = torch.stack(path(t))
    assert_close(weights.sum(0), torch.ones(101, dtype=torch.float64), rtol=0, atol=1e-15)
    assert bool((weights >= 0).all())
    assert_close(weights[:, 0], torch.eye(len(weights), dtype=torch.float64)[0])  # t = 0: data
    assert_close(weights[:, -1], torch.eye(len(weights), dtype=torch.float64)[-1])  # t = 1: source
    inside, h = t[1:-1], 1e-6
    numeric = (torch.stack(path(inside + h)) - torch.stack(path(inside - h))) / (2 * h)
    assert_close(torch.stack(path.rate(inside)), numeric, rtol=1e-7, atol=1e-7)


def test_drax_has_the_weights_of_its_paper() -> None:
    """p = 2, q = 2/3: the middle weighs most, about 0.47, half way; s and r as in appendix C.1."""
    t = torch.linspace(0, 1, 1001, dtype=torch.float64)
    tau = 1 - t
    data, middle, source = DraxPath(vocab=5)(t)
    assert_close(data, tau**2)
    assert_close(middle, tau ** (2 / 3) * (1 - tau**2))
    assert_close(source, (1 - tau ** (2 / 3)) * (1 - tau**2))
    assert float(tau[middle.argmax()]) == pytest.approx(0.5, abs=1e-3)
    assert float(middle.max()) == pytest.approx(0.4725, abs=1e-4)


def test_a_small_time_is_not_rounded_away() -> None:
    assert float(Mixture("uniform", 2.0, 5)(1e-12)[1]) == pytest.approx(2e-12, rel=1e-9)


@named
def test_x_t_has_the_marginal_of_the_path(path: Mixture) -> None:
    """100,000 draws at one time; every count within five standard deviations."""
    n, t = 100_000, 0.37
    x0 = torch.tensor([[1, 3]]).expand(n, -1)
    law = token_laws(path, t)
    assert_close(marginal(path, x0[:1], t, dtype=torch.float64)[0], torch.stack((law[0, 1], law[1, 3])))
    x = corrupt(path, x0, torch.full((n,), t, dtype=torch.float64), Rng(0).at(0, torch.arange(n)))
    _counts(F.one_hot(x, path.vocab).double().mean(0), torch.stack((law[0, 1], law[1, 3])), n)


def _counts(found: Tensor, wanted: Tensor, n: int) -> None:
    error = (wanted * (1 - wanted) / n).sqrt()
    assert bool(((found - wanted).abs() <= 5 * error).all()), (found, wanted)


def test_x_t_of_drax_has_the_three_way_marginal() -> None:
    n, t, path = 100_000, 0.6, DraxPath(vocab=5)
    x0 = torch.tensor([[1, 3]]).expand(n, -1)
    law = token_laws(path, t)
    x = corrupt(path, x0, t, Rng(0).at(0, torch.arange(n)), MIDDLE)
    _counts(F.one_hot(x, 5).double().mean(0), torch.stack((law[0, 1], law[1, 3])), n)


@pytest.mark.parametrize("temperature", [0.1, 1.0, 3.0])
@pytest.mark.parametrize("path", [Mixture("uniform", vocab=5), Mixture("mask", vocab=6), DraxPath(vocab=5)], ids=str)
def test_the_argmax_of_gumbel_softmax_has_the_marginal_whatever_the_temperature(
    path: TokenPath, temperature: float
) -> None:
    n, t = 100_000, 0.6
    x0 = torch.tensor([[1, 3]]).expand(n, -1)
    middle = MIDDLE if isinstance(path, DraxPath) else None
    law = token_laws(path, t)
    soft = soften(path, x0, t, Rng(1).at(0, torch.arange(n)), temperature, middle)
    assert_close(soft.sum(-1), torch.ones(n, 2), rtol=1e-5, atol=1e-5)
    _counts(F.one_hot(soft.argmax(-1), path.vocab).double().mean(0), torch.stack((law[0, 1], law[1, 3])), n)


@pytest.mark.parametrize("hard", [False, True])
def test_gradients_reach_the_middle_distribution(hard: bool) -> None:
    """The soft draw's gradient is that of finite differences; the hard one is a one-hot vector with the same."""
    path, x0, rng = DraxPath(vocab=5), torch.tensor([[1, 3]]), Rng(1).at(0, torch.arange(1))
    logits = torch.randn(2, 5, generator=torch.Generator().manual_seed(0)).requires_grad_()
    toward = torch.arange(5.0)

    def score(values: Tensor, hard: bool = False) -> Tensor:
        return (soften(path, x0, 0.6, rng, 0.7, torch.softmax(values, -1), hard) * toward).sum()

    x = soften(path, x0, 0.6, rng, 0.7, torch.softmax(logits, -1), hard)
    (gradient,) = torch.autograd.grad((x * toward).sum(), logits)
    numeric = torch.zeros(2, 5)
    for i, j in itertools.product(range(2), range(5)):
        step = torch.zeros(2, 5)
        step[i, j] = 1e-2
        numeric[i, j] = (score(logits.detach() + step) - score(logits.detach() - step)) / 2e-2
    assert bool((gradient != 0).any())
    assert_close(gradient, numeric, rtol=2e-2, atol=2e-3)
    if hard:
        assert torch.equal(x.detach().sort(-1).values, torch.tensor([0.0, 0, 0, 0, 1]).expand(1, 2, 5))


def test_a_law_of_gumbel_draws_has_its_mean_and_variance() -> None:
    draws = Rng(0).at(0, torch.arange(200_000))("noise", Gumbel()).double()
    assert float(draws.mean()) == pytest.approx(0.5772, abs=0.015)
    assert float(draws.var()) == pytest.approx(1.6449, abs=0.03)


# ------------------------------------------------------------------------------------------------- rates and steps


@pytest.mark.parametrize("path", [*MIXTURES, DraxPath(vocab=5)], ids=str)
@pytest.mark.parametrize("divergence_free", [0.0, 2.0])
@pytest.mark.parametrize("t", [0.9, 0.5, 0.13])
def test_the_rates_move_the_exact_marginals(path: TokenPath, divergence_free: float, t: float) -> None:
    """The Kolmogorov equation: what flows in minus what flows out is the derivative of p_t, for all states of both."""
    x, h = states(path.vocab), 1e-6
    rates = told(path, x, t).rates(divergence_free=divergence_free)
    assert bool((rates >= 0).all())
    p = exact_marginal(path, t)
    change = torch.zeros_like(p)
    for row, (a, b) in enumerate(x.tolist()):
        for y in range(path.vocab):
            for into, rate in (((y, b), rates[row, 0, y]), ((a, y), rates[row, 1, y])):
                change[into] += p[a, b] * rate
                change[a, b] -= p[a, b] * rate
    numeric = (exact_marginal(path, t - h) - exact_marginal(path, t + h)) / (2 * h)
    assert_close(change, numeric, rtol=1e-6, atol=1e-7)


@named
def test_the_velocity_is_the_derivative_of_the_probability_in_time(path: Mixture) -> None:
    x = states(path.vocab)
    prediction = told(path, x, 0.4)
    assert_close(prediction.velocity.sum(-1), torch.zeros(len(x), 2, dtype=torch.float64), rtol=0, atol=1e-12)
    h = 1e-7
    moved = (prediction.transition(0.4 - h) - F.one_hot(x, path.vocab)) / -h
    assert_close(prediction.velocity, moved, rtol=1e-5, atol=1e-5)


@named
@pytest.mark.parametrize("divergence_free", [0.0, 1.0])
def test_the_step_is_the_rule_written_out(path: Mixture, divergence_free: float) -> None:
    """Draw x0, jump with probability 1 - exp(-h sum u), then in proportion to u: summed over x0 by hand."""
    t, s, x = 0.7, 0.55, states(path.vocab)
    prediction = told(path, x, t, wrong(path))
    p = prediction.probabilities
    (k, _), (dk, _) = ([float(v) for v in values] for values in (path(t), path.rate(t)))
    source = [1 / 5] * 5 if path.mask is None else [0.0] * 5 + [1.0]
    wanted = torch.zeros(len(x), 2, path.vocab, dtype=torch.float64)
    for row, i, x0 in itertools.product(range(len(x)), range(2), range(path.vocab)):
        here = int(x[row, i])
        u = torch.zeros(path.vocab, dtype=torch.float64)
        u[x0] += -dk / (1 - k)
        for y in range(path.vocab):
            u[y] += divergence_free * -dk / (k * (1 - k)) * ((1 - k) * source[y] + k * (y == x0))
        u[here] = 0
        total = float(u.sum())
        leave = 1 - torch.exp(torch.tensor(-(t - s) * total, dtype=torch.float64))
        wanted[row, i, here] += p[row, i, x0] * (1 - leave)
        if total > 0:
            wanted[row, i] += p[row, i, x0] * leave * u / total
    assert_close(prediction.transition(s, divergence_free=divergence_free), wanted.detach())
    assert torch.equal(prediction.transition(0.0), p)


CASES = [(path, a) for path in MIXTURES for a in (0.0, 1.0)]


@pytest.mark.parametrize(("path", "divergence_free"), CASES, ids=lambda v: v if isinstance(v, float) else str(v))
def test_a_thousand_steps_give_the_data_and_every_marginal_on_the_way(path: Mixture, divergence_free: float) -> None:
    """From the exact transition matrices of the step rule, not from samples."""
    times = uniform(1000, Linear(), 2)

    def law(x: Tensor, t: float, s: float) -> Tensor:
        return told(path, x, t).transition(s, 1.0, divergence_free)

    found = chain(path, law, exact_marginal(path, 1.0), times)
    worst = max(distance(p, exact_marginal(path, t)) for p, t in zip(found, times, strict=True))
    assert worst < 0.01
    assert distance(found[-1], joint()) < 0.01


def test_a_thousand_steps_through_drax_middle_give_the_data() -> None:
    """With a given middle distribution the three-way path is sampled like any other, from where rates are finite."""
    path, times = DraxPath(vocab=5), tuple(0.999 * (1 - i / 1000) for i in range(1001))
    found = chain(path, lambda x, t, s: told(path, x, t).transition(s), exact_marginal(path, 0.999), times)
    assert max(distance(p, exact_marginal(path, t)) for p, t in zip(found, times, strict=True)) < 0.01
    assert distance(found[-1], joint()) < 0.01


@pytest.mark.parametrize("divergence_free", [0.0, 1.0])
@pytest.mark.parametrize(
    ("path", "informed"), [(MIXTURES[0], True), (MIXTURES[1], True), (MIXTURES[1], False)], ids=str
)
def test_kept_tokens_give_the_conditional_law(path: Mixture, divergence_free: float, informed: bool) -> None:
    """The first token is given. With masks a network need not be told: what is not masked is certain.

    On a uniform path it must be: to a network that is not told, a token may be noise.
    """
    n = path.vocab**2
    known = Known(torch.full((n, 2), 2), torch.tensor([True, False]).expand(n, 2))
    denoiser = keep(TokenDenoiser(Exact(path), path), known)
    denoise = denoiser.start(Conditioning(known=known if informed else None), (n, 2), (1.0, 0.0))
    times = uniform(1000, Linear(), 2)
    found = chain(
        path,
        lambda x, t, s: denoise(x, t).transition(s, 1.0, divergence_free),
        exact_marginal(path, 1.0),
        times,
    )
    target = torch.zeros(5, 5, dtype=torch.float64)
    target[2] = joint()[2] / joint()[2].sum()
    assert distance(found[-1], target) < 0.01


@named
def test_temperature_sharpens_what_is_drawn(path: Mixture) -> None:
    x = states(path.vocab)
    prediction = told(path, x, 0.5)
    cold = prediction.transition(0.0, temperature=0.5)
    wanted = prediction.probabilities**2
    assert_close(cold, wanted / wanted.sum(-1, keepdim=True))
    assert bool((prediction.transition(0.3, 0.01) - prediction.transition(0.3)).abs().max() > 0.01)


def test_the_solver_draws_from_the_transition() -> None:
    n, path, t, s = 50_000, MIXTURES[0], 0.6, 0.4
    x = torch.tensor([[1, 3]]).expand(n, -1)
    denoise = TokenDenoiser(Exact(path), path).start(Conditioning(), x.shape, (t, s))
    solver = Jumps(divergence_free=0.5)
    after, _ = solver.step(denoise, x, t, s, None, Rng(0).at(3, torch.arange(n)))
    _counts(F.one_hot(after, 5).double().mean(0), denoise(x[:1], t).transition(s, 1.0, 0.5)[0], n)


def test_a_draw_never_takes_what_has_probability_zero() -> None:
    law = torch.tensor([0.0, 0.3, 0.0, 0.7, 0.0]).expand(3, 1, -1)
    draws = torch.tensor([[2.0**-33], [0.5], [1 - 2.0**-33]], dtype=torch.float64)
    assert pick(law, draws).tolist() == [[1], [3], [3]]


def test_sampling_is_a_function_of_seed_and_sample_alone() -> None:
    path = MIXTURES[0]
    denoiser = TokenDenoiser(Exact(path), path)

    def sample(ids: Tensor) -> Tensor:
        rng = Rng(5).at(0, ids)
        times = uniform(20, Linear(), 2)
        return integrate(denoiser, Jumps(), times, denoiser.prior(rng, (2,)), Conditioning(), rng)

    whole = sample(torch.arange(64))
    assert torch.equal(sample(torch.tensor([9, 40])), whole[[9, 40]])
    assert len(whole.unique(dim=0)) > 5
    assert int(whole.max()) < 5


@named
def test_x_at_the_end_of_noise_is_the_source(path: Mixture) -> None:
    n = 50_000
    x = TokenDenoiser(Exact(path), path).prior(Rng(0).at(0, torch.arange(n)), (2,))
    law = exact_marginal(path, 1.0)
    _counts(F.one_hot(x, path.vocab).double().mean(0), torch.stack((law.sum(1), law.sum(0))), n)


# --------------------------------------------------------------------------------------------------- likelihood


def quadrature(path: Mixture, network: Any, n: int = 2000) -> Tensor:
    """The exact bound of each x0 [5 5] in nats, over both tokens: the definition, state by state, midpoints in t."""
    t = ((torch.arange(n, dtype=torch.float64) + 0.5) / n).repeat_interleave(path.vocab**2)
    x = states(path.vocab).repeat(n, 1)
    law = likelihoods(path, x, t)
    rates = TokenPrediction(network(x, 1 - t, Conditioning()), x, t, path).rates()
    scale = -path.rate(t)[0] / (1 - path(t)[0])
    costs = []
    for token in (0, 1):
        for x0 in range(5):  # u(y | x, x0) is `scale` at y = x0, if that is not x
            to_x0 = torch.where(x[:, token] == x0, 1.0, rates[:, token, x0])
            cost = torch.where(x[:, token] == x0, 0.0, scale * (scale.log() - to_x0.log()) - scale)
            costs.append(torch.where(law[:, token, x0] > 0, cost + rates[:, token].sum(-1), 0.0))
    first, second = torch.stack(costs).view(2, 5, -1)
    weight = law[:, 0, :, None] * law[:, 1, None, :] / n
    return torch.einsum("bij,ib->ij", weight, first) + torch.einsum("bij,jb->ij", weight, second)


@pytest.mark.parametrize("path", MIXTURES[:3], ids=str)
def test_the_generalised_kl_is_its_definition(path: Mixture) -> None:
    """The closed form against sum u log(u / u') - u + u' for a wrong network, for every x0 and x_t."""
    for t in (0.95, 0.5, 0.05):
        x = states(path.vocab)
        prediction = told(path, x, t, wrong(path))
        rates, scale = prediction.rates(), jumps(path, t)[0]
        for a in range(5):
            here = x == a
            possible = here | (x == path.mask) if path.mask is not None else torch.ones_like(here)
            term = torch.where(here, 0.0, scale * (scale.log() - rates[..., a].log()) - scale)
            found = prediction.bound(torch.full((len(x), 2), a))
            assert_close(found[possible], (rates.sum(-1) + term)[possible])


@pytest.mark.parametrize("network", [Exact, wrong])
@pytest.mark.parametrize("path", [MIXTURES[1], MIXTURES[3]], ids=str)
def test_with_masks_the_bound_is_the_exact_likelihood(path: Mixture, network: Any) -> None:
    """The masked hide nothing but what they are, so the integral of the generalised KL is -log p(x0) itself."""
    assert_close(quadrature(path, network(path)), -network(path).data.log(), rtol=2e-3, atol=2e-3)


def test_on_a_uniform_path_the_bound_is_above_the_likelihood_of_the_sampler() -> None:
    """The likelihood from the transition matrices of 1,000 steps, which is that of the data the network knows."""
    path = MIXTURES[0]
    times, network = uniform(1000, Linear(), 2), wrong(path)
    found = chain(path, lambda x, t, s: told(path, x, t, network).transition(s), exact_marginal(path, 1.0), times)
    assert distance(found[-1], network.data) < 0.01
    gap = quadrature(path, network) + found[-1].log()
    assert bool((gap > 0).all())


@pytest.mark.parametrize("path", MIXTURES[:2], ids=str)
def test_the_objective_is_an_unbiased_estimate_of_the_bound(path: Mixture) -> None:
    n, x0 = 40_000, (1, 3)
    denoiser = TokenDenoiser(wrong(path), path)
    with torch.no_grad():
        rng = Rng(0).at(0, torch.arange(n))
        loss = GeneralisedKL().loss(denoiser, torch.tensor([x0]).expand(n, -1), Conditioning(), rng).total * 2
    wanted = float(quadrature(path, wrong(path))[x0])
    error = float(loss.std()) / n**0.5
    assert abs(float(loss.mean()) - wanted) < 4 * error
    assert error < 0.03 * wanted


@named
def test_cross_entropy_is_that_of_the_posterior(path: Mixture) -> None:
    denoiser, x0 = TokenDenoiser(Exact(path), path), torch.tensor([[1, 3]])
    which = torch.tensor([[[0.0, 1 - 2.0**-33], [0.1, 0.1]]], dtype=torch.float64)  # the first token is data
    rng = Replay({"t": torch.tensor([0.4], dtype=torch.float64), "noise": which})
    loss = CrossEntropy().loss(denoiser, x0, Conditioning(), rng)
    x = torch.tensor([[1, 0 if path.mask is None else path.mask]])
    wanted = -told(path, x, 0.4).log_probabilities()[0, [0, 1], [1, 3]].mean()
    assert_close(loss.terms["cross_entropy"][0], wanted, rtol=1e-6, atol=1e-9)


def test_the_bound_of_drax_is_the_definition() -> None:
    path, t, x = DraxPath(vocab=5), 0.6, states(5)
    prediction = told(path, x, t, wrong(path))
    data, middle, _ = (float(a) for a in jumps(path, t))
    rates = prediction.rates()
    for a in range(5):
        wanted = torch.zeros(len(x), 2, dtype=torch.float64)
        for row, i, y in itertools.product(range(len(x)), range(2), range(5)):
            if y != int(x[row, i]):
                u = data * (y == a) + middle * MIDDLE[i, y]
                guess = rates[row, i, y].detach()
                wanted[row, i] += u * torch.log(u / guess) - u + guess
        assert_close(prediction.bound(torch.full((len(x), 2), a)).detach(), wanted)


# --------------------------------------------------------------------------------------------- kept continuous x


@pytest.mark.parametrize("solver", [Euler(), Heun()], ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("t_eps", [0.0, 0.05])
def test_known_pixels_come_out_as_they_are_and_the_rest_is_sampled(solver: Any, t_eps: float) -> None:
    """Also under JiT's clamp, which would leave noise in them."""
    values = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mask = torch.zeros(2, 1, 4, 4, dtype=torch.bool)
    mask[..., :2] = True
    meaning = Meaning(Linear(), prediction="x0", clock="1-t", t_eps=t_eps or 1e-6)
    denoiser = meaning.of(lambda x, t, cond, edit=None: 0.3 * x + 0.1)
    rng = Rng(0).at(0, torch.arange(2))
    x = rng("prior", "normal", (3, 4, 4)).double()
    times = uniform(40, Linear(), 16)
    plain = integrate(denoiser, solver, times, x, Conditioning(), rng)
    kept = integrate(keep(denoiser, Known(values, mask)), solver, times, x, Conditioning(), rng)
    assert_close(torch.where(mask, kept, 0.0), torch.where(mask, values, 0.0), rtol=0, atol=1e-9)
    assert_close(torch.where(mask, 0.0, kept), torch.where(mask, 0.0, plain))


# ------------------------------------------------------------------------------------------------- mistakes, JSON


def test_json() -> None:
    for meaning in (TokenMeaning(), TokenMeaning(Mixture("uniform", 2.0, 9), "t"), TokenMeaning(DraxPath(vocab=4))):
        assert from_json(to_json(meaning)) == meaning
    for config in (CrossEntropy(), GeneralisedKL(), Jumps(0.5, 2.0)):
        assert from_json(to_json(config)) == config


def test_what_does_not_go_together_is_said() -> None:
    tokens = TokenMeaning(Mixture(vocab=6)).of(Exact(MIXTURES[1]))
    pixels = Meaning().of(lambda x, t, cond, edit=None: x)
    with pytest.raises(DitkitError, match="tokens have no velocity"):
        check_grid(tokens, Euler(), (1.0, 0.0))
    with pytest.raises(DitkitError, match="tokens have no velocity"):
        Regression().check(tokens)  # type: ignore[arg-type]
    with pytest.raises(DitkitError, match="jumps"):
        check_grid(pixels, Jumps(), (1.0, 0.0))
    with pytest.raises(DitkitError, match="jumps"):
        check_grid(replace(Meaning(), prediction="x0", t_eps=0.05).of(lambda x, t, cond, edit=None: x), Jumps(), (1, 0))
    for objective in (CrossEntropy(), GeneralisedKL()):
        objective.check(tokens)
        with pytest.raises(DitkitError, match="use objective regression"):
            objective.check(pixels)
    with pytest.raises(DitkitError, match="sample with the path mixture"):
        check_grid(TokenMeaning(DraxPath(vocab=5)).of(Exact(DraxPath(vocab=5))), Jumps(), (1.0, 0.0))
    with pytest.raises(DitkitError, match="needs one"):
        corrupt(DraxPath(vocab=5), torch.tensor([[1, 2]]), 0.5, Rng(0).at(0, torch.arange(1)))
    with pytest.raises(DitkitError, match="takes none"):
        corrupt(Mixture(vocab=6), torch.tensor([[1, 2]]), 0.5, Rng(0).at(0, torch.arange(1)), MIDDLE)
    with pytest.raises(DitkitError, match="above 0"):
        soften(Mixture(vocab=6), torch.tensor([[1, 2]]), 0.5, Rng(0).at(0, torch.arange(1)), 0.0)
    with pytest.raises(DitkitError, match="tokens need the path"):
        TokenMeaning(Linear())
    with pytest.raises(DitkitError, match="use the grid uniform"):
        Karras()(10, Mixture(vocab=6), 2)  # type: ignore[arg-type]
    with pytest.raises(DitkitError, match="'uniform' or 'mask'"):
        Mixture("masked")
    with pytest.raises(DitkitError, match="at least 1"):
        Mixture(power=0.5)
    with pytest.raises(DitkitError, match="above 0"):
        Jumps(temperature=0)
    with pytest.raises(DitkitError, match="choose another"):
        TokenMeaning().fitted(0)
    with pytest.raises(DitkitError, match="--denoiser tokens"):
        Meaning().fitted(5)


@pytest.mark.parametrize("objective", [CrossEntropy, GeneralisedKL])
def test_a_law_of_the_noise_level_is_refused_for_tokens(objective: Any) -> None:
    """Tokens have no noise level: the path says so, and it is the path that a time sampler asks."""

    def model(x: Tensor, t: Tensor, cond: Conditioning, *, edit: Any = None) -> Tensor:
        return torch.zeros(*x.shape, 6)

    denoiser = TokenMeaning(Mixture(vocab=6)).of(model)
    x0, rng = torch.zeros(2, 3, dtype=torch.long), Rng(0).at(0, torch.arange(2))
    with pytest.raises(DitkitError, match="tokens have no signal-to-noise ratio: use the grid uniform and a time"):
        objective(LogNormal()).loss(denoiser, x0, Conditioning(), rng)
    assert bool(objective(LogitNormal()).loss(denoiser, x0, Conditioning(), rng).total.isfinite().all())
