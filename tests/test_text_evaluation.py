"""What is measured of texts: the bound against exact enumeration, edits, copies, words, and the report."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from ditkit.conditioning import Conditioning
from ditkit.config import DitkitError, from_json, to_json
from ditkit.data import Captions, strings
from ditkit.diffusion import Jumps, Mixture, TokenDenoiser, likelihood_bound
from ditkit.evaluation import evaluate, nearest_texts
from ditkit.evaluation.texts import bits_per_character, ratio, share, unigram_bits, valid
from ditkit.models import DDiTConfig
from ditkit.pipeline import Pipeline
from ditkit.recipe import Evaluate, Gate, Sample, Train
from ditkit.recipes import captions
from ditkit.rng import Rng
from ditkit.training import train

from .conftest import Command, randomised
from .test_discrete import MIXTURES, chain, exact_marginal, likelihoods, states, told, wrong

# --------------------------------------------------------------------------------------------------------- bits


def expected_bound(path: Mixture, network: Any, last: float, n: int = 1000) -> torch.Tensor:
    """The bound of each x0 [5 5] by its definition: midpoints in t, all x_t, then the last step at once."""
    t = (last + (1 - last) * (torch.arange(n, dtype=torch.float64) + 0.5) / n).repeat_interleave(path.vocab**2)
    x = states(path.vocab).repeat(n, 1)
    total = torch.zeros(5, 5, dtype=torch.float64)
    law, prediction = likelihoods(path, x, t), told(path, x, 0.5, network)
    prediction = replace(prediction, out=network(x, 1 - t, Conditioning()), t=t)
    at_last = told(path, states(path.vocab), last, network)
    law_last = likelihoods(path, at_last.x, torch.full((len(at_last.x),), last, dtype=torch.float64))
    for a in range(5):
        for b in range(5):
            pair = torch.tensor([[a, b]])
            weight, possible = law[:, 0, a] * law[:, 1, b] * (1 - last) / n, law[:, 0, a] * law[:, 1, b] > 0
            cost = prediction.bound(pair.expand(len(x), -1)).sum(1)
            total[a, b] = (weight * cost)[possible].sum()
            logs = at_last.log_probabilities().gather(-1, pair.expand(len(at_last.x), -1)[..., None]).sum((1, 2))
            weight = law_last[:, 0, a] * law_last[:, 1, b]
            total[a, b] -= (weight * logs)[weight > 0].sum()
    return total


@pytest.mark.parametrize("path", MIXTURES[:2], ids=str)
@pytest.mark.parametrize("last", [0.01, 0.2])
def test_the_estimate_is_unbiased_for_the_bound_and_that_is_above_the_likelihood(path: Mixture, last: float) -> None:
    n, x0, network = 4000, (1, 3), wrong(path)
    rng = Rng(0).at(0, torch.arange(n))
    with torch.no_grad():
        denoiser = TokenDenoiser(network, path)
        found = likelihood_bound(denoiser, torch.tensor([x0]).expand(n, -1), Conditioning(), rng, 8, last)
    bound = expected_bound(path, network, last)
    error = float(found.std()) / n**0.5
    assert abs(float(found.mean()) - float(bound[x0])) < 4 * error + 2e-3
    assert error < 0.05 * float(bound[x0])
    # the sampler whose bound it is: many small steps down to `last`, one from there
    times = (*(1 - (1 - last) * k / 200 for k in range(201)), 0.0)
    law = chain(path, lambda x, t, s: told(path, x, t, network).transition(s), exact_marginal(path, 1.0), times)[-1]
    gap = bound + law[:5, :5].log()
    assert bool((gap > -5e-3).all())
    if path.mask is not None and last == 0.01:  # masks hide nothing but what they are: nothing is lost
        assert_close(bound, -network.data.log(), rtol=5e-3, atol=5e-3)


def test_a_network_that_doubts_what_is_right_has_a_finite_bound() -> None:
    """On a uniform path the integral down to 0 would be infinite, and its estimates without a mean."""
    path = MIXTURES[0]

    def doubting(x: torch.Tensor, t: torch.Tensor, cond: Conditioning, *, edit: Any = None) -> torch.Tensor:
        return 3.0 * torch.nn.functional.one_hot(x, 5).double()

    n, x0 = 20_000, torch.tensor([[1, 3]])
    found = []
    for times in (4, 32):
        rng = Rng(times).at(0, torch.arange(n))
        bounds = likelihood_bound(TokenDenoiser(doubting, path), x0.expand(n, -1), Conditioning(), rng, times)
        found.append((float(bounds.mean()), float(bounds.std()) / n**0.5))
    (few, error_few), (many, error_many) = found
    assert abs(few - many) < 4 * math.hypot(error_few, error_many)
    assert error_many < 0.01 * many


def test_the_bound_of_a_text_is_its_own_and_a_ratio_has_the_error_of_many_trials() -> None:
    recipe = replace(captions(), model=DDiTConfig(hidden_size=16, depth=1, num_heads=2, cond_dim=8))
    data = Captions().open()
    recipe = replace(recipe.fitted(data), sample=Sample(steps=2, solver=Jumps(), batch=7))
    pipeline = Pipeline(recipe, randomised(recipe.model), recipe.model.shape)
    few, other = (
        bits_per_character(Pipeline(r, pipeline.model, pipeline.shape), data.heldout, torch.arange(20), 3, 0)
        for r in (recipe, replace(recipe, sample=replace(recipe.sample, batch=20)))
    )
    assert few.value == pytest.approx(other.value, rel=1e-5)
    assert few.error == pytest.approx(other.error, rel=1e-4)
    flat = DDiTConfig(hidden_size=16, depth=1, num_heads=2, cond_dim=8, vocab=recipe.model.vocab, length=32).build()
    untrained = bits_per_character(Pipeline(recipe, flat.eval(), (32,)), data.heldout, torch.arange(208), 16, 0)
    characters = sum(map(len, strings(data.heldout.batch(torch.arange(208)).data)))
    exact = 208 * 32 * math.log2(80) / characters  # a fresh network takes all 80 kinds for equally likely
    assert abs(untrained.value - exact) < 4 * untrained.error + 1e-3 * exact

    generator = torch.Generator().manual_seed(0)
    trials = []
    for _ in range(300):
        sizes = torch.randint(1, 30, (100,), generator=generator).double()
        trials.append(ratio(sizes * 2 + torch.randn(100, generator=generator) * sizes.sqrt(), sizes))
    values = torch.tensor([t.value for t in trials])
    assert float(values.std()) == pytest.approx(trials[0].error, rel=0.2)


def test_a_code_of_single_characters() -> None:
    train, symbols = ["ab", "a"], "abc"
    cost = {"a": -math.log2(3 / 9), "b": -math.log2(2 / 9), "c": -math.log2(1 / 9), "end": -math.log2(3 / 9)}
    assert unigram_bits(["ca", "b"], train, symbols) == pytest.approx((sum(cost.values()) + cost["end"]) / 3)


# --------------------------------------------------------------------------------------------- copies and words


def levenshtein(a: str, b: str) -> int:
    """From the definition."""
    if not a or not b:
        return len(a) + len(b)
    return min(levenshtein(a[1:], b[1:]) + (a[0] != b[0]), 1 + levenshtein(a[1:], b), 1 + levenshtein(a, b[1:]))


def test_edits_are_those_of_the_definition() -> None:
    generator = torch.Generator().manual_seed(0)

    def word() -> str:
        n = int(torch.randint(0, 7, (), generator=generator))
        return "".join("abc"[int(torch.randint(0, 3, (), generator=generator))] for _ in range(n))

    texts, others = [word() for _ in range(40)], [word() for _ in range(15)]
    for found in nearest_texts(texts, others):
        distances = [levenshtein(found.text, other) for other in others]
        assert found.edits == min(distances)
        assert found.nearest == others[distances.index(found.edits)]
    assert [n.text for n in nearest_texts(texts, others)] == texts
    assert nearest_texts(["kitten", "", "cat"], ["sitting", "cat", "cat"])[0].edits == 3
    assert [n.edits for n in nearest_texts(["", "cat"], ["cat"])] == [3, 0]
    assert nearest_texts(["abc"], [""])[0].edits == 3
    with pytest.raises(ValueError, match="no texts"):
        nearest_texts(["a"], [])


def test_words_and_shares() -> None:
    train = ["red heart", "a cat (big)"]
    texts = ["red cat", "heart", "red  cat", "", "red ", "big", "a (big) heart", "re heart"]
    assert valid(texts, train) == [True, True, False, False, False, False, True, False]
    found = share([True, False, False, False])
    assert (found.value, found.error) == (0.25, pytest.approx((0.25 * 0.75 / 4) ** 0.5))


# ------------------------------------------------------------------------------------------------------- report


def run(folder: Path, **evaluation: Any) -> Path:
    recipe = replace(
        captions(),
        model=DDiTConfig(hidden_size=16, depth=1, num_heads=2, cond_dim=8),
        train=Train(steps=2, batch=8, emas=(0.9,), log_every=1, sample_every=0, checkpoint_every=2),
        sample=Sample(steps=4, solver=Jumps(), batch=64),
        evaluate=Evaluate(samples=20, times=2, **evaluation),
    )
    train(recipe, folder, quiet=True)
    return folder


def test_a_report_of_texts(ditkit: Command, tmp_path: Path) -> None:
    folder = run(tmp_path / "run", gates=(Gate("bits_per_character", "at_most", 1.0),))
    done = ditkit("evaluate", folder)
    assert done.returncode == 1
    assert "bounds missed: bits_per_character <= 1" in done.stderr.splitlines()[-1]
    report = json.loads((folder / "report.json").read_text())
    names = (
        "bits_per_character bits_per_character_error bits_per_character_train bits_per_character_unigram copies "
        "edit_distance edit_distance_heldout valid valid_heldout valid_new distinct seconds protocol recipe"
    )
    assert set(names.split()) <= set(report)
    assert not {"kid", "f_mem", "class_accuracy"} & set(report)
    assert report["protocol"]["reference_texts"] == 208
    assert "in each of 2 equal parts" in report["protocol"]["bits"]
    assert report["protocol"]["samples"] == 20
    for name in ("bits_per_character", "valid_heldout", "copies"):
        assert name in done.stdout
    assert 3 < report["bits_per_character_unigram"] < 6
    assert 0.1 < report["valid_heldout"] < 1
    page = (folder / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 1
    assert "nearest training text" in page
    assert "nearest training text" in (folder / "report.md").read_text()
    assert not (folder / "samples.png").exists()
    again = evaluate(folder, seed=0)
    assert again.numbers["bits_per_character"] == report["bits_per_character"]
    assert [n.text for n in again.texts] == strings(again.images)


def test_numbers_of_images_cannot_bound_texts(tmp_path: Path) -> None:
    with pytest.raises(DitkitError, match="the recipe bounds kid, which this data does not give"):
        evaluate(run(tmp_path / "run", gates=(Gate("kid", "at_most", 1.0),)))
    with pytest.raises(DitkitError, match=r"evaluate\.times 1; not"):
        Evaluate(times=0)
    assert from_json(to_json(Evaluate(times=5))) == Evaluate(times=5)


def test_the_bound_is_for_tokens() -> None:
    with pytest.raises(DitkitError, match="is for tokens"):
        likelihood_bound(lambda x, t, c: x, torch.zeros(1, 2), Conditioning(), Rng(0))  # type: ignore[arg-type]
