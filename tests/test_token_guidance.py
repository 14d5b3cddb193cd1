"""Guidance of tokens: the logits are guided, against laws that are known by a formula."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from ditkit.codecs import Characters
from ditkit.conditioning import Conditioning, Given, Known
from ditkit.config import DitkitError
from ditkit.data import Dataset, InMemory, points, strings
from ditkit.diffusion import (
    APG,
    CFG,
    CFGPP,
    Autoguidance,
    CFGZeroStar,
    CrossEntropy,
    Jumps,
    Linear,
    Meaning,
    Mixture,
    PerturbedAttention,
    Rescale,
    SkipLayer,
    TokenDenoiser,
    TokenMeaning,
    guide,
    integrate,
    keep,
)
from ditkit.diffusion.grid import Uniform
from ditkit.models import DDiT, DDiTConfig
from ditkit.pipeline import Pipeline
from ditkit.recipe import Recipe, Sample
from ditkit.rng import Rng

from .conftest import randomised
from .test_discrete import MIXTURES, SYMBOLS, Exact, chain, distance, exact_marginal, joint, likelihoods, named

uniform = Uniform()


def laws(seed: int = 0) -> Tensor:
    """Of the one symbol of two classes and of nothing [3 5]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.softmax(1.5 * torch.randn(3, SYMBOLS, generator=generator, dtype=torch.float64), dim=-1)


def sharpened(strong: Tensor, weak: Tensor, scale: float) -> Tensor:
    """strong^scale weak^(1 - scale), normalised: what guidance of log-probabilities is, by definition."""
    found = strong**scale * weak ** (1 - scale)
    return found / found.sum(-1, keepdim=True)


def labels(label: int, n: int) -> Conditioning:
    return Conditioning(label=torch.full((n,), label))


class ByClass:
    """The network that knows: two symbols, independent, of the class's law. To each logit of a token it adds a number
    that means nothing."""

    def __init__(self, path: Mixture):
        self.path, self.rows = path, []

    def __call__(self, x: Tensor, t: Tensor, cond: Conditioning, *, edit: Any = None) -> Tensor:
        assert cond.label is not None
        self.rows.append(cond.label)
        posterior = likelihoods(self.path, x, 1 - t.double()) * laws()[cond.label][:, None]
        logits = posterior.clamp(min=1e-300).log() + 3.0 * cond.label[:, None, None] + x[..., None]
        return torch.nn.functional.pad(logits, (0, self.path.vocab - SYMBOLS), value=50.0)  # the mask's must not matter


@named
@pytest.mark.parametrize("scale", [0.0, 1.0, 2.5])
def test_independent_tokens_have_the_sharpened_law_on_every_path(path: Mixture, scale: float) -> None:
    """The likelihood of x_t cancels in strong^scale weak^(1 - scale): what remains is the posterior for sharpened data,
    so that all marginals are known, from the exact transition matrices of the solver."""
    n = path.vocab**2
    guided = guide(TokenDenoiser(ByClass(path), path), CFG(scale, labels(2, n)))
    times = uniform(1000, Linear(), 2)
    denoise: Any = guided.start(labels(1, n), (n, 2), times)
    found = chain(path, lambda x, t, s: denoise(x, t).transition(s), exact_marginal(path, 1.0), times)
    law = sharpened(laws()[1], laws()[2], scale)
    data = law[:, None] * law
    assert distance(found[500], exact_marginal(path, times[500], data)) < 0.01
    assert distance(found[-1], data) < (1e-5 if path.mask is not None else 0.01)
    if scale != 1:
        assert distance(found[-1], laws()[1][:, None] * laws()[1]) > 0.1


def test_dependent_tokens_are_guided_one_after_the_other() -> None:
    """With masks and many steps: the first symbol from its guided law, the second from its guided law given that, in
    either order. Nothing is the mixture of both classes."""
    path, scale, n = MIXTURES[1], 2.0, 36
    classes = torch.stack((joint(), joint().flip(0).T.contiguous()))
    data = torch.cat((classes, classes.mean(0, keepdim=True)))

    def network(x: Tensor, t: Tensor, cond: Conditioning, *, edit: Any = None) -> Tensor:
        assert cond.label is not None
        found = torch.empty(len(x), 2, path.vocab, dtype=torch.float64)
        for label in cond.label.unique():
            rows = cond.label == label
            found[rows] = Exact(path, data[label])(x[rows], t[rows], cond)
        return found

    times = uniform(1000, Linear(), 2)
    denoise: Any = guide(TokenDenoiser(network, path), CFG(scale, labels(2, n))).start(labels(0, n), (n, 2), times)
    found = chain(path, lambda x, t, s: denoise(x, t).transition(s), exact_marginal(path, 1.0), times)[-1]

    def in_order(strong: Tensor, weak: Tensor) -> Tensor:
        first = sharpened(strong.sum(1), weak.sum(1), scale)
        then = sharpened(strong / strong.sum(1, keepdim=True), weak / weak.sum(1, keepdim=True), scale)
        return first[:, None] * then

    wanted = 0.5 * (in_order(data[0], data[2]) + in_order(data[0].T, data[2].T).T)
    assert distance(found, wanted) < 0.01
    assert distance(found, data[0]) > 0.1


def knowing(scale: float = 1.0) -> DDiT:
    """A DDiT with two classes whose logits are the laws above, for every x and time: the shift of its last norm,
    which the label makes, is read off by the last Linear."""
    config = DDiTConfig(length=2, vocab=6, hidden_size=8, depth=1, num_heads=2, cond_dim=3, num_classes=2, drop=0.0)
    model = config.build().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        assert model.y_embedder is not None
        model.y_embedder.embedding_table.weight.copy_(20 * torch.eye(3))
        seen = torch.nn.functional.silu(torch.tensor(20.0))
        shift, last = (model.get_parameter(f"final_layer.{n}.weight") for n in ("adaLN_modulation.1", "linear"))
        shift[:SYMBOLS].copy_(scale * laws().log().T / seen)
        last[:SYMBOLS, :SYMBOLS].copy_(torch.eye(SYMBOLS))
    return model


def drawn(guided: Any, label: int, n: int = 8_000, steps: int = 4, known: Known | None = None) -> Tensor:
    times = uniform(steps, Linear(), 2)
    rng = Rng(1).at(0, torch.arange(n))
    x = torch.full((n, 2), 5)
    with torch.no_grad():
        return integrate(guided if known is None else keep(guided, known), Jumps(), times, x, labels(label, n), rng)


def agree(tokens: Tensor, law: Tensor) -> None:
    """Every count within five standard deviations."""
    counts = torch.nn.functional.one_hot(tokens.flatten(), SYMBOLS).double().mean(0)
    error = (law * (1 - law) / tokens.numel()).sqrt()
    assert bool(((counts - law).abs() < 5 * error).all()), (counts, law)


@pytest.mark.parametrize("scale", [1.0, 0.0, 2.0, 4.0])
@pytest.mark.parametrize("label", [0, 1])
def test_a_ddit_with_classes_draws_from_the_guided_law(scale: float, label: int) -> None:
    n, denoiser = 8_000, TokenMeaning(Mixture(vocab=6)).of(knowing())
    found = drawn(guide(denoiser, CFG(scale, labels(2, n))), label)
    agree(found, sharpened(laws()[label], laws()[2], scale))


def test_an_interval_guides_the_tokens_that_are_drawn_in_it() -> None:
    """With masks a token is drawn once, in a step from t to s with probability 1 - exp(-(t - s) / t)."""
    n, denoiser = 8_000, TokenMeaning(Mixture(vocab=6)).of(knowing())
    found = drawn(guide(denoiser, CFG(4.0, labels(2, n), interval=(0.5, 1.0))), 0)
    still = torch.exp(torch.tensor(-0.25 / 1.0 - 0.25 / 0.75, dtype=torch.float64))
    agree(found, (1 - still) * sharpened(laws()[0], laws()[2], 4.0) + still * laws()[0])


def test_what_is_kept_is_not_moved_by_a_guide() -> None:
    n, denoiser = 2000, TokenMeaning(Mixture(vocab=6)).of(knowing())
    known = Known(torch.tensor([[3, 0]]), torch.tensor([[True, False]]))
    found = drawn(guide(denoiser, CFG(3.0, labels(2, n))), 0, n, known=known)
    assert bool((found[:, 0] == 3).all())
    agree(found[:, 1], sharpened(laws()[0], laws()[2], 3.0))


@pytest.mark.parametrize(("scale", "passes"), [(1.0, 1), (3.0, 2), (0.0, 2)])
def test_the_null_is_asked_beside_the_class_and_only_where_it_counts(scale: float, passes: int) -> None:
    network = ByClass(MIXTURES[1])
    guided = guide(TokenDenoiser(network, MIXTURES[1]), CFG(scale, labels(2, 4), interval=(0.3, 1.0)))
    drawn(guided, 1, 4, steps=5)
    wanted = [1] * 4 + [2] * 4 * (passes - 1)
    assert [rows.tolist() for rows in network.rows] == [wanted] * 4 + [[1] * 4]  # the last step begins at t = 0.2


def test_a_weaker_model_guides_tokens() -> None:
    """Its law is strong^2 weak^-1 where the weak one has half of the logits: strong^1.5."""
    meaning = TokenMeaning(Mixture(vocab=6))
    found = drawn(guide(meaning.of(knowing()), Autoguidance(2.0, weaker=meaning.of(knowing(0.5)))), 0)
    agree(found, sharpened(laws()[0], torch.ones(SYMBOLS, dtype=torch.float64), 1.5))


@pytest.mark.parametrize("perturbed", [SkipLayer, PerturbedAttention])
def test_a_perturbed_pass_guides_tokens_without_classes(perturbed: Any) -> None:
    """The logits are strong + 2 (strong - weak), with the weak ones from the model itself."""
    config = DDiTConfig(length=6, vocab=6, hidden_size=16, depth=2, num_heads=2, cond_dim=8, drop=0.0)
    model = randomised(config).double()
    denoiser = TokenMeaning(Mixture(vocab=6)).of(model)
    x = torch.tensor([[5, 1, 5, 5, 2, 5], [5, 5, 5, 0, 5, 3]])
    asked: Any = guide(denoiser, perturbed(3.0, blocks=("blocks.1",))).start(Conditioning(), (2, 6), (1.0, 0.0))
    flags = torch.ones(2, dtype=torch.bool)

    def edit(site: str, block: Any, h: Any, *args: Any) -> Any:
        if site != "blocks.1":
            return block(h, *args)
        return h if perturbed is SkipLayer else block(h, *args, identity=flags)

    with torch.no_grad():
        strong, weak = (denoiser(x, 0.5, Conditioning(), edit=e).out for e in (None, edit))
        assert_close(asked(x, 0.5).out, strong + 2 * (strong - weak), rtol=1e-12, atol=1e-12)
    assert float((strong - weak).abs().max()) > 1e-3


def test_rules_that_have_no_meaning_for_logits_are_refused() -> None:
    denoiser, null = TokenMeaning(Mixture(vocab=6)).of(knowing()), labels(2, 2)
    for wrong in (APG(2.0, null), APG(2.0, null, space=None), CFGPP(0.5, null), CFGZeroStar(2.0, null, zero_init=0)):
        with pytest.raises(DitkitError, match=f"{type(wrong).__name__} cannot guide tokens"):
            guide(denoiser, wrong)
    with pytest.raises(DitkitError, match="CFG cannot guide tokens as it is set: use cfg without channels"):
        guide(denoiser, CFG(2.0, null, channels=1))
    with pytest.raises(DitkitError, match="Rescale cannot guide tokens"):
        guide(denoiser, CFG(2.0, null), finish=Rescale())
    continuous = Meaning().of(lambda x, t, cond, edit=None: x)
    with pytest.raises(DitkitError, match="another path"):
        guide(denoiser, Autoguidance(2.0, weaker=continuous))
    with pytest.raises(DitkitError, match="another path"):
        guide(continuous, Autoguidance(2.0, weaker=denoiser))


def two_kinds() -> Dataset:
    """Texts of two letters: mostly a in the first class, mostly c in the second, independent within a class."""
    probabilities = {"a": (7, 1), "b": (2, 2), "c": (1, 7)}
    texts, classes = [], []
    for label, (x, y) in itertools.product((0, 1), itertools.product("abc", repeat=2)):
        times = probabilities[x][label] * probabilities[y][label]
        texts += [x + y] * times
        classes += [label] * times
    split = InMemory(points(texts, 2), torch.tensor(classes), torch.arange(len(texts)))
    return Dataset("two kinds", ("first", "second"), (2,), split, split, "a table", symbols="abc")


@pytest.mark.slow
def test_a_trained_ddit_is_guided_to_the_law_of_the_formula() -> None:
    """Through the pipeline: labels, their dropout, the null label. Nothing is the mixture, in which letters depend on
    each other; the law is that of one letter guided after the other, as above."""
    data = two_kinds()
    recipe = Recipe(
        codec=Characters(),
        model=DDiTConfig(hidden_size=16, depth=1, num_heads=2, cond_dim=16, drop=0.0),
        denoiser=TokenMeaning(),
        objective=CrossEntropy(),
        sample=Sample(steps=32, solver=Jumps(), batch=4096),
    ).fitted(data)
    recipe = replace(recipe, conditioner=replace(recipe.conditioner, drop=0.3))
    model = recipe.model.build()
    denoiser, optimiser = recipe.denoiser.of(model), torch.optim.Adam(model.parameters(), 1e-2)
    for step in range(300):
        rng = Rng(0).at(step, torch.arange(256))
        rows = (rng("order", "uniform") * len(data.train)).long()
        batch = data.train.batch(rows)
        cond = recipe.conditioner(Given(batch.label), rng)
        loss = recipe.objective.loss(denoiser, recipe.codec.encode(batch.data), cond, rng).total.mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        for group in optimiser.param_groups:
            group["lr"] = 1e-2 * (1 - step / 300)
    pipeline = Pipeline(recipe, model, recipe.model.shape)

    def law(**settings: Any) -> Tensor:
        found = strings(pipeline.sample("first", 4096, **settings))
        return torch.tensor([[found.count(x + y) for y in "abc"] for x in "abc"], dtype=torch.float64) / len(found)

    first, second = (torch.tensor(p, dtype=torch.float64) / 10 for p in ((7, 2, 1), (1, 2, 7)))
    strong = first[:, None] * first
    weak = 0.5 * (strong + second[:, None] * second)
    one = sharpened(strong.sum(1), weak.sum(1), 3.0)
    wanted = one[:, None] * sharpened(strong / strong.sum(1, keepdim=True), weak / weak.sum(1, keepdim=True), 3.0)
    wanted = 0.5 * (wanted + wanted.T)

    def away(p: Tensor, q: Tensor) -> float:
        return 0.5 * float((p - q).abs().sum())

    assert away(law(), strong) < 0.05
    assert away(law(guidance=3.0), wanted) < 0.05
    assert away(strong, wanted) > 0.2
    with pytest.raises(DitkitError, match="APG cannot guide tokens"):
        next(pipeline.stream("first", 2, guides=(APG(2.0),)))
