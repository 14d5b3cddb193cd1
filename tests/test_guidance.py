"""Guidance: the formula, when its pass runs, and what it leaves alone."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from ditkit.conditioning import Conditioning, Tokens
from ditkit.config import DitkitError
from ditkit.diffusion import (
    CFG,
    DDPM,
    Ancestral,
    Guide,
    Heun,
    Linear,
    Meaning,
    Moment,
    Opinion,
    Prediction,
    guide,
    integrate,
)
from ditkit.rng import Rng


class Network:
    """out = x (1 + label) + t, row by row; remembers the labels of every call."""

    def __init__(self, double: bool = False):
        self.double = double
        self.seen: list[list[int]] = []

    def __call__(self, x: Tensor, t: Tensor, cond: Conditioning, *, edit: Any = None) -> Tensor:
        assert cond.label is not None
        assert len(cond.label) == len(x)
        self.seen.append(cond.label.tolist())
        label = cond.label.view(-1, 1, 1, 1).to(x)
        out = x * (1 + label) + t.view(-1, 1, 1, 1).to(x)
        return torch.cat((out, out.sin()), dim=1) if self.double else out


def images(b: int = 3, seed: int = 0) -> Tensor:
    return torch.randn(b, 4, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


LABELS = Conditioning(label=torch.tensor([2, 0, 1]))
NULL = Conditioning(label=torch.tensor([9, 9, 9]))
OTHER = Conditioning(label=torch.tensor([5, 6, 7]))
MEANING = Meaning(Linear(), "velocity")


def opinion(network: Network, x: Tensor, t: float, cond: Conditioning, meaning: Meaning = MEANING) -> Prediction:
    return meaning.of(network)(x, t, cond)


def guided(network: Network, *guides: Guide, meaning: Meaning = MEANING) -> Any:
    x = images()
    return guide(meaning.of(network), *guides).start(LABELS, x.shape, (1.0, 0.0))


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.5, 4.0, -1.0])
def test_classifier_free_guidance_is_weak_plus_scale_times_the_difference(scale: float) -> None:
    network, x = Network(), images()
    strong, weak = (opinion(network, x, 0.4, c).out for c in (LABELS, NULL))
    got = guided(network, CFG(scale, NULL))(x, 0.4)
    assert_close(got.out, weak + scale * (strong - weak), rtol=1e-12, atol=1e-12)
    assert got.x is x
    assert (float(got.t), got.path, got.space) == (0.4, Linear(), "velocity")


def test_strong_and_weak_share_one_batch() -> None:
    network, x = Network(), images()
    guided(network, CFG(3.0, NULL))(x, 0.4)
    assert network.seen == [[2, 0, 1, 9, 9, 9]]


def test_scale_1_runs_no_second_pass_and_is_the_plain_output_bit_for_bit() -> None:
    network, x = Network(), images()
    got = guided(network, CFG(1.0, NULL))(x, 0.4)
    assert network.seen == [[2, 0, 1]]
    assert torch.equal(got.out, opinion(network, x, 0.4, LABELS).out)


def test_without_guides_the_denoiser_is_left_as_it_is() -> None:
    denoiser = MEANING.of(Network())
    assert guide(denoiser) is denoiser


@pytest.mark.parametrize(
    ("interval", "t", "runs"),
    [
        ((0.0, 1.0), 0.0, True),
        ((0.0, 1.0), 1.0, True),
        ((0.0, 0.9), 0.0, True),
        ((0.0, 0.9), 1.0, False),
        ((0.0, 0.9), 0.9, False),
        ((0.0, 0.9), 1 - 0.1, False),
        ((0.0, 0.9), 0.8999, True),
        ((0.2, 1.0), 1.0, True),
        ((0.2, 1.0), 0.2, False),
        ((0.2, 1.0), 0.2001, True),
        ((0.2, 1.0), 0.0, False),
        ((0.3, 0.7), 0.1 + 0.2, False),  # 0.30000000000000004 is the bound
        ((0.3, 0.7), 1 - 0.3, False),
        ((0.3, 0.7), 0.5, True),
        ((0.3, 0.7), 0.71, False),
    ],
)
def test_guidance_acts_strictly_inside_its_interval_whose_ends_0_and_1_belong_to_it(
    interval: tuple[float, float], t: float, runs: bool
) -> None:
    network, x = Network(), images()
    got = guided(network, CFG(3.0, NULL, interval=interval))(x, t)
    plain = opinion(network, x, t, LABELS).out
    assert [len(call) for call in network.seen] == [6 if runs else 3, 3]
    assert torch.equal(got.out, plain) != runs


def test_jits_interval_in_its_own_time() -> None:
    """Guided where t < high and (low == 0 or t > low), t = 1 being data, on its grid of 50 steps."""
    for low, high in ((0.1, 1.0), (0.0, 1.0), (0.3, 0.8), (0.1, 0.5)):
        rule = CFG(2.0, NULL, interval=(1 - high, 1 - low))
        for k in range(50):
            theirs = k / 50
            wanted = theirs < high - 1e-9 and (low == 0 or theirs > low + 1e-9)
            assert (rule.weight(Moment(1 - theirs, Linear(), ())) != 0) == wanted, (low, high, theirs)


def test_only_the_first_channels_are_guided() -> None:
    x = images()
    strong, weak = (opinion(Network(), x, 0.4, c).out for c in (LABELS, NULL))
    for channels in (1, 3, 4, 7):
        got = guided(Network(), CFG(3.0, NULL, channels=channels))(x, 0.4).out
        assert_close(got[:, :channels], (weak + 3 * (strong - weak))[:, :channels], rtol=1e-12, atol=1e-12)
        assert torch.equal(got[:, channels:], strong[:, channels:])


def test_the_variance_is_that_of_the_strong_opinion() -> None:
    network, x = Network(double=True), images()
    got = guided(network, CFG(3.0, NULL))(x, 0.4)
    strong = opinion(network, x, 0.4, LABELS)
    assert got.extra is not None
    assert strong.extra is not None
    assert torch.equal(got.extra, strong.extra)
    assert not torch.equal(got.out, strong.out)


def test_several_guides_add_up_each_in_its_own_interval_and_in_one_batch() -> None:
    network, x = Network(), images()
    one, two = CFG(3.0, NULL, interval=(0.0, 0.6)), CFG(0.5, OTHER, interval=(0.4, 1.0), channels=2)
    denoise = guided(network, one, two)
    for t, labels in (
        (0.5, [2, 0, 1, 9, 9, 9, 5, 6, 7]),
        (0.2, [2, 0, 1, 9, 9, 9]),
        (0.8, [2, 0, 1, 5, 6, 7]),
        (0.5, [2, 0, 1, 9, 9, 9, 5, 6, 7]),
    ):
        network.seen.clear()
        got = denoise(x, t).out
        assert network.seen == [labels]
        strong, a, b = (opinion(Network(), x, t, c).out for c in (LABELS, NULL, OTHER))
        expected = strong + (2.0 * (strong - a) if t < 0.6 else 0)
        change = -0.5 * (strong - b) if t > 0.4 else torch.zeros_like(strong)
        change[:, 2:] = 0
        assert_close(got, expected + change, rtol=1e-12, atol=1e-12)


def test_a_guide_of_ones_own_is_a_rule_a_weight_and_a_weak_opinion() -> None:
    @dataclass(frozen=True)
    class Rescaled(Guide):
        """The direction of guidance, with the length of the strong opinion."""

        def weak(self, strong: Opinion) -> Opinion:
            assert strong.cond.label is not None
            return replace(strong, cond=Conditioning(label=strong.cond.label + 1))

        def weight(self, at: Moment) -> float:
            return self.scale * at.t

        def rule(self, strong: Tensor, weak: Tensor, memory: Any) -> tuple[Tensor, Any]:
            return (strong - weak) * strong.norm() / (strong - weak).norm(), memory

    network, x = Network(), images()
    got = guided(network, Rescaled(1.0))(x, 0.4).out
    assert network.seen == [[2, 0, 1, 3, 1, 2]]
    strong = opinion(network, x, 0.4, LABELS).out
    assert float((got - strong).norm()) == pytest.approx(0.4 * float(strong.norm()))
    network.seen.clear()
    guided(network, Rescaled(1.0))(x, 0.0)
    assert network.seen == [[2, 0, 1]]


@pytest.mark.parametrize("space", ["x0", "eps", "v", "velocity", "score"])
def test_guiding_in_any_space_is_the_same(space: str) -> None:
    """The weights add up to 1 and both opinions see the same x: reading and guiding commute."""
    x, scale = images(), 3.5
    for meaning in (Meaning(Linear(2.0), "x0"), Meaning(Linear(), "-velocity", "1-t"), Meaning(Linear(), "eps")):
        strong, weak = (opinion(Network(), x, 0.4, c, meaning).to(space) for c in (LABELS, NULL))
        got = guided(Network(), CFG(scale, NULL), meaning=meaning)(x, 0.4).to(space)
        assert_close(got, weak + scale * (strong - weak), rtol=1e-10, atol=1e-10)


def test_guidance_adds_no_graph_of_its_own_and_keeps_the_networks() -> None:
    x = images()
    with torch.no_grad():
        assert not guided(Network(), CFG(3.0, NULL, channels=3))(x, 0.4).out.requires_grad
    x.requires_grad_()
    got = guided(Network(), CFG(3.0, NULL, channels=3))(x, 0.4).out
    (gradient,) = torch.autograd.grad(got.sum(), x)
    label = torch.tensor([2.0, 0.0, 1.0], dtype=torch.float64).view(3, 1, 1, 1).expand(3, 4, 2, 2)
    factor = 1 + label
    factor = torch.cat(((factor + 2 * (label - 9))[:, :3], factor[:, 3:]), dim=1)
    assert_close(gradient, factor, rtol=1e-12, atol=0)


def test_rows_of_a_guided_trajectory_are_those_of_each_sample_alone() -> None:
    def sample(index: list[int]) -> Tensor:
        rows = torch.tensor(index)
        denoiser = guide(MEANING.of(Network()), CFG(0.3, NULL.rows(rows), interval=(0.0, 0.8)))
        x = images()[rows]
        return integrate(denoiser, Heun(), (1.0, 0.7, 0.3, 0.0), x, LABELS.rows(rows), Rng(0).at(0, rows))

    whole = sample([0, 1, 2])
    for index in ([0], [2, 1], [1, 1]):
        assert_close(sample(index), whole[index], rtol=1e-12, atol=1e-12)


def test_guided_sampling_runs_as_few_rows_as_its_interval_needs() -> None:
    network = Network()
    x = images()
    denoiser = guide(MEANING.of(network), CFG(2.0, NULL, interval=(0.0, 0.5)))
    integrate(denoiser, Heun(), (1.0, 0.75, 0.5, 0.25, 0.0), x, LABELS, Rng(0).at(0, torch.arange(3)))
    # Heun visits 1, .75 | .75, .5 | .5, .25 | .25
    assert [len(call) for call in network.seen] == [3, 3, 3, 3, 3, 6, 6]


def test_a_guided_ancestral_step_uses_the_learned_variance() -> None:
    network = Network(double=True)
    denoiser = guide(Meaning(DDPM(), "eps", "t").of(network), CFG(2.0, NULL))
    out = integrate(denoiser, Ancestral(), (1.0, 0.5, 0.0), images(), LABELS, Rng(0).at(0, torch.arange(3)))
    assert bool(out.isfinite().all())


def test_a_negative_prompt_may_be_longer_than_the_prompt() -> None:
    def text(length: int, value: float) -> Conditioning:
        return Conditioning(text=Tokens(torch.full((2, length, 1), value), torch.ones(2, length, dtype=torch.bool)))

    def model(x: Tensor, t: Tensor, cond: Conditioning, *, edit: Any = None) -> Tensor:
        assert cond.text is not None
        mean = (cond.text.values[..., 0] * cond.text.mask).sum(1) / cond.text.mask.sum(1)
        return mean.view(-1, 1, 1, 1).expand_as(x)

    x = torch.zeros(2, 1, 2, 2)
    denoise = guide(MEANING.of(model), CFG(3.0, text(7, 1.0))).start(text(4, 2.0), x.shape, ())
    assert_close(denoise(x, 0.5).out, torch.full_like(x, 1 + 3 * (2 - 1)))


@pytest.mark.parametrize("interval", [(0.5, 0.5), (0.7, 0.2), (-0.1, 1.0), (0.0, 1.1), (math.nan, 1.0)])
def test_an_interval_must_be_one(interval: tuple[float, float]) -> None:
    with pytest.raises(DitkitError, match="a guidance interval is"):
        CFG(2.0, NULL, interval=interval)


def test_a_number_of_channels_must_be_one() -> None:
    with pytest.raises(DitkitError, match="guidance on 0 channels"):
        CFG(2.0, NULL, channels=0)


def test_a_null_for_another_number_of_samples_is_refused() -> None:
    fewer, more = NULL.rows(slice(0, 2)), Conditioning(label=torch.full((4,), 9))
    for guides in ([CFG(2.0, fewer)], [CFG(2.0, more)], [CFG(2.0, fewer), CFG(2.0, more)]):
        with pytest.raises(ValueError, match="samples, strong first, for a batch of 3"):
            guided(Network(), *guides)


def test_a_guided_grid_is_checked_like_a_plain_one() -> None:
    denoiser = guide(Meaning(Linear(), "eps").of(Network()), CFG(2.0, NULL))
    with pytest.raises(DitkitError, match="cannot be read as velocity at t = 1"):
        integrate(denoiser, Heun(), (1.0, 0.0), images(), LABELS, Rng(0))
