"""Every guide against its paper's formula, written here again, and against diffusers' guiders where they have it."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path as FilePath
from typing import Any, cast

import pytest
import torch
from diffusers.guiders.adaptive_projected_guidance import AdaptiveProjectedGuidance, MomentumBuffer
from diffusers.guiders.auto_guidance import AutoGuidance
from diffusers.guiders.classifier_free_guidance import ClassifierFreeGuidance
from diffusers.guiders.classifier_free_zero_star_guidance import ClassifierFreeZeroStarGuidance
from diffusers.guiders.perturbed_attention_guidance import PerturbedAttentionGuidance
from diffusers.guiders.skip_layer_guidance import SkipLayerGuidance
from torch import Tensor
from torch.testing import assert_close

from ditkit.conditioning import Conditioning
from ditkit.config import DitkitError, from_json, lookup, names, to_json
from ditkit.diffusion import (
    APG,
    CFG,
    CFGPP,
    DDIM,
    DDPM,
    VP,
    Autoguidance,
    CFGZeroStar,
    Denoiser,
    Euler,
    Guide,
    Heun,
    Linear,
    Meaning,
    Moment,
    PerturbedAttention,
    Rescale,
    SkipLayer,
    guide,
    integrate,
)
from ditkit.diffusion.solvers import Dopri5
from ditkit.models import DiTConfig, JiTConfig, Model
from ditkit.pipeline import Pipeline, load
from ditkit.recipe import Recipe, Sample
from ditkit.rng import Rng
from ditkit.training import train

from .conftest import Command, randomise

close = lambda a, b: assert_close(a, b, rtol=1e-10, atol=1e-10)  # noqa: E731
GRID = (1.0, 0.85, 0.7, 0.5, 0.3, 0.1, 0.0)
LABELS, NULL = Conditioning(label=torch.tensor([2, 0, 1])), Conditioning(label=torch.tensor([9, 9, 9]))
VELOCITY = Meaning(Linear(), "velocity")


class Network:
    """A smooth function of x, t and the label, row by row; remembers the labels of every call."""

    def __init__(self, seed: int = 0):
        self.mix = torch.randn(10, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) / 4
        self.seen: list[list[int]] = []

    def __call__(self, x: Tensor, t: Tensor, cond: Conditioning, *, edit: Any = None) -> Tensor:
        assert cond.label is not None
        self.seen.append(cond.label.tolist())
        mixed = torch.einsum("bij,bj->bi", self.mix[cond.label], x.flatten(1))
        return (mixed.sin() + t.view(-1, 1).to(x)).view_as(x)


def images(seed: int = 0) -> Tensor:
    return torch.randn(3, 4, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def opinions(t: float, x: Tensor, meaning: Meaning = VELOCITY, space: str = "velocity") -> tuple[Tensor, Tensor]:
    """Strong and weak, each in a pass of its own."""
    strong, weak = (meaning.of(Network())(x, t, cond).to(space) for cond in (LABELS, NULL))
    return strong, weak


# against diffusers, step by step along one trajectory


def beside(
    guider: Any, *guides: Guide, finish: Any = None, weak: Callable[[float, Tensor], dict[str, Tensor]] | None = None
) -> None:
    """Our guided output and the guider's are equal in every step of a grid."""
    denoise = guide(VELOCITY.of(Network()), *guides, finish=finish).start(LABELS, (3, 4, 2, 2), GRID)
    for k, t in enumerate(GRID[:-1]):
        x = images(k)
        strong, null = opinions(t, x)
        guider.set_state(step=k, num_inference_steps=len(GRID) - 1, timestep=torch.tensor(t))
        others = {"pred_uncond": null} if weak is None else weak(t, x)
        assert_close(denoise(x, t).out, guider.forward(strong, **others).pred, rtol=1e-6, atol=1e-6)


WINDOWS = [(0.0, 1.0), (0.2, 0.7), (0.5, 1.0), (0.0, 0.16), (0.4, 0.4)]


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("scale", [1.0, 0.5, 3.0])
def test_cfg_is_diffusers_in_both_conventions(scale: float, window: tuple[float, float]) -> None:
    start, stop = window
    ours = CFG(scale, NULL, fractions=window)
    beside(ClassifierFreeGuidance(scale, start=start, stop=stop), ours)
    beside(ClassifierFreeGuidance(scale - 1, use_original_formulation=True, start=start, stop=stop), ours)


@pytest.mark.parametrize("phi", [0.3, 0.7, 1.0])
def test_rescale_is_diffusers(phi: float) -> None:
    beside(
        ClassifierFreeGuidance(4.0, guidance_rescale=phi, start=0.2), CFG(4.0, NULL, fractions=(0.2, 1.0)),
        finish=Rescale(phi),
    )  # fmt: skip


@pytest.mark.parametrize("zero_init", [0, 1, 3])
@pytest.mark.parametrize("window", WINDOWS)
def test_cfg_zero_star_is_diffusers(zero_init: int, window: tuple[float, float]) -> None:
    guider = ClassifierFreeZeroStarGuidance(3.0, zero_init_steps=zero_init, start=window[0], stop=window[1])
    beside(guider, CFGZeroStar(3.0, NULL, zero_init=zero_init, fractions=window))


@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("threshold", [0.0, 0.5, 100.0])
@pytest.mark.parametrize("momentum", [None, -0.5, 0.3])
def test_apg_is_diffusers_on_the_networks_output(eta: float, threshold: float, momentum: float | None) -> None:
    """diffusers' "original formulation" with scale w - 1 is the paper's with w; its default is another formula."""
    guider = AdaptiveProjectedGuidance(
        3.0, momentum, threshold, eta=eta, use_original_formulation=True, start=0.2, stop=0.9
    )
    guider.momentum_buffer = None if momentum is None else MomentumBuffer(momentum)
    ours = APG(4.0, NULL, eta=eta, threshold=threshold, momentum=momentum or 0.0, space=None, fractions=(0.2, 0.9))
    beside(guider, ours)


def test_autoguidance_is_diffusers() -> None:
    other = Network(5)
    guider = AutoGuidance(2.5, auto_guidance_layers=[0], dropout=0.1)
    beside(
        guider,
        Autoguidance(2.5, VELOCITY.of(other)),
        weak=lambda t, x: {"pred_uncond": VELOCITY.of(other)(x, t, LABELS).out},
    )


class Blocks(Model):
    """Two residual blocks in the form that edits need; the second gives out."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = torch.nn.ModuleList(Block(i) for i in range(3))

    def forward(self, x: Tensor, t: Tensor, cond: Conditioning, *, edit: Any = None) -> Tensor:
        assert cond.label is not None
        h = x + t.view(-1, 1, 1, 1).to(x) + cond.label.view(-1, 1, 1, 1)
        for i, block in enumerate(self.blocks):
            h = block(h) if edit is None else edit(f"blocks.{i}", block, h)
        return h


class Block(torch.nn.Module):
    def __init__(self, i: int):
        super().__init__()
        self.factor = torch.nn.Parameter(torch.tensor(0.3 + i, dtype=torch.float64))

    def forward(self, x: Tensor, *, identity: Tensor | None = None) -> Tensor:
        mixed = x.roll(1, dims=-1)  # stands for attention: it mixes places
        if identity is not None:
            mixed = torch.where(identity.view(-1, 1, 1, 1), x, mixed)
        return x + (self.factor * mixed).sin()


@pytest.mark.parametrize("kind", ["perturbed_attention", "skip_layer"])
def test_perturbed_passes_are_combined_as_in_diffusers(kind: str) -> None:
    """Beside plain guidance diffusers adds s (strong - weak): s is our scale - 1. Its window leaves out its first step,
    too: (1/6, 5/6) there is [2/6, 5/6) here."""
    denoiser, x = VELOCITY.of(Blocks()), images()
    if kind == "skip_layer":
        guider: Any = SkipLayerGuidance(3.0, 2.8, 1 / 6, 5 / 6, skip_layer_guidance_layers=[1])
        ours: Guide = SkipLayer(3.8, ("blocks.1",), fractions=(2 / 6, 5 / 6))
    else:
        guider = PerturbedAttentionGuidance(3.0, 2.8, 1 / 6, 5 / 6, perturbed_guidance_layers=[1])
        ours = PerturbedAttention(3.8, ("blocks.1",), fractions=(2 / 6, 5 / 6))

    def perturb(site: str, block: Any, h: Tensor) -> Tensor:
        if site != "blocks.1":
            return block(h)
        return h if kind == "skip_layer" else block(h, identity=torch.ones(3, dtype=torch.bool))

    denoise = guide(denoiser, CFG(3.0, NULL), ours).start(LABELS, x.shape, GRID)
    for k, t in enumerate(GRID[:-1]):
        guider.set_state(step=k, num_inference_steps=6, timestep=torch.tensor(t))
        strong, null = (denoiser(x, t, cond).out for cond in (LABELS, NULL))
        skip = denoiser(x, t, LABELS, edit=perturb).out
        assert not torch.allclose(skip, strong)
        close(denoise(x, t).out, guider.forward(strong, null, skip).pred)


def test_a_window_of_steps_is_diffusers_for_every_number_of_steps() -> None:
    for n, start, stop in itertools.product(range(1, 41, 3), (0.0, 0.1, 0.29, 0.57, 0.9), (0.0, 0.29, 0.58, 0.99, 1.0)):
        if start <= stop:
            times = tuple(1 - i / n for i in range(n + 1))
            guider: Any = ClassifierFreeGuidance(2.0, start=start, stop=stop)
            ours = CFG(2.0, fractions=(start, stop))
            for k in range(n):
                guider.set_state(step=k, num_inference_steps=n, timestep=torch.tensor(0))
                assert (ours.weight(Moment(times[k], Linear(), times)) != 0) == guider._is_cfg_enabled()


def test_a_moment_knows_the_step_that_it_belongs_to() -> None:
    def step(t: float) -> tuple[int, float]:
        at = Moment(t, Linear(), GRID)
        return at.step, at.next

    assert [step(t)[0] for t in GRID] == [0, 1, 2, 3, 4, 5, 5]
    assert step(0.7) == (2, 0.5)
    assert step(0.7 - 1e-12) == (2, 0.5)
    assert step(0.6) == (2, 0.5)
    assert step(0.05) == (5, 0.0)
    assert step(1.1) == (0, 0.85)
    with pytest.raises(DitkitError, match="give its times"):
        CFG(2.0, NULL, fractions=(0.0, 0.5)).weight(Moment(0.5, Linear(), ()))


# against the papers, written here again


def test_cfg_zero_star_fits_the_weak_opinion_to_the_strong() -> None:
    """The factor is the least squares solution of each sample, and the first K steps do not move x."""
    x, t = images(), 0.5
    strong, weak = opinions(t, x)
    columns = zip(weak.flatten(1)[..., None], strong.flatten(1)[..., None], strict=True)
    factors = torch.stack([torch.linalg.lstsq(w, s).solution for w, s in columns])
    fitted = weak * factors.view(-1, 1, 1, 1)
    network = Network()
    denoiser = guide(VELOCITY.of(network), CFGZeroStar(3.0, NULL, zero_init=2))
    got = denoiser.start(LABELS, x.shape, GRID)(x, t).out
    assert_close(got, fitted + 3 * (strong - fitted), rtol=1e-6, atol=1e-6)
    network.seen.clear()
    seen = []
    integrate(denoiser, Euler(), GRID, x, LABELS, Rng(0), lambda k, y: seen.append(y))
    assert torch.equal(seen[0], x)
    assert torch.equal(seen[1], x)
    assert not torch.equal(seen[2], x)
    assert len(network.seen) == 4


def test_apg_is_the_papers_algorithm_on_x0() -> None:
    """Momentum, threshold, projection, in this order, and memory of one trajectory."""
    rule = APG(5.0, NULL, eta=0.3, threshold=1.5, momentum=-0.6)
    denoiser = guide(VELOCITY.of(Network()), rule)
    for _ in range(2):  # the second trajectory remembers nothing of the first
        denoise, average = denoiser.start(LABELS, (3, 4, 2, 2), GRID), torch.zeros(3, 16, dtype=torch.float64)
        for k, t in enumerate(GRID[:-1]):
            x = images(k)
            strong, weak = (o.flatten(1) for o in opinions(t, x, space="x0"))
            average = (strong - weak) - 0.6 * average
            expected = []
            for c, d in zip(strong, average, strict=True):
                d = d * min(1.0, 1.5 / float(d.norm()))
                unit = c / c.norm()
                parallel = (d @ unit) * unit
                expected.append(c + 4 * (d - parallel + 0.3 * parallel))
            close(denoise(x, t).x0.flatten(1), torch.stack(expected))


@pytest.mark.parametrize("scale", [0.0, 0.4, 0.6, 1.0])
@pytest.mark.parametrize(
    ("meaning", "times"),
    [
        (Meaning(DDPM(), "eps", "t"), (1.0, 0.8, 0.55, 0.3, 0.1, 0.0)),
        (Meaning(VP(), "eps", "t"), (1.0, 0.8, 0.55, 0.3, 0.1, 0.0)),
        (Meaning(Linear(2.0), "velocity", "t"), (0.95, 0.8, 0.55, 0.3, 0.1, 0.0)),
        (Meaning(Linear(), "velocity", "t"), GRID),
    ],
    ids=["ddpm", "vp", "linear 2", "linear"],
)
def test_cfg_pp_is_the_papers_step(scale: float, meaning: Meaning, times: tuple[float, ...]) -> None:
    """x_s = alpha_s x0_guided + sigma_s eps_null (Chung et al. 2024, algorithm 2)."""
    x = images()
    expected = x
    denoiser = meaning.of(Network())
    for t, s in itertools.pairwise(times):
        strong, weak = denoiser(expected, t, LABELS), denoiser(expected, t, NULL)
        alpha, sigma = (float(c) for c in meaning.path(s))
        expected = alpha * (weak.x0 + scale * (strong.x0 - weak.x0)) + sigma * weak.eps if alpha or sigma else weak.x0
    guided = guide(denoiser, CFGPP(scale, NULL))
    close(integrate(guided, DDIM(), times, x, LABELS, Rng(0)), expected)
    if isinstance(meaning.path, Linear):
        close(integrate(guided, Euler(), times, x, LABELS, Rng(0)), expected)


def test_autoguidance_asks_each_network_once_and_reads_the_weaker_in_the_strongs_space() -> None:
    x, t = images(), 0.4
    strong, weaker = Network(), Network(7)
    weak_denoiser = Meaning(Linear(), "x0", "1-t", 0.05).of(weaker)
    denoise = guide(VELOCITY.of(strong), Autoguidance(2.2, weak_denoiser), CFG(1.5, NULL)).start(LABELS, x.shape, GRID)
    got = denoise(x, t)
    assert strong.seen == [[2, 0, 1, 9, 9, 9]]
    assert weaker.seen == [[2, 0, 1]]
    a, null = (VELOCITY.of(Network())(x, t, cond).x0 for cond in (LABELS, NULL))
    b = Meaning(Linear(), "x0", "1-t", 0.05).of(Network(7))(x, t, LABELS).x0
    close(got.x0, a + 1.2 * (a - b) + 0.5 * (a - null))


def test_a_pass_that_no_guide_needs_is_not_run_for_each_network() -> None:
    strong, weaker = Network(), Network(7)
    guides = (Autoguidance(2.0, VELOCITY.of(weaker), interval=(0.0, 0.4)), CFG(2.0, NULL, fractions=(0.5, 1.0)))
    integrate(guide(VELOCITY.of(strong), *guides), Euler(), GRID, images(), LABELS, Rng(0))
    assert [len(labels) for labels in strong.seen] == [3, 3, 3, 6, 6, 6]
    assert [len(labels) for labels in weaker.seen] == [3, 3]


def test_two_guides_that_ask_the_same_share_the_pass() -> None:
    network, x = Network(), images()
    one, two = CFG(3.0, NULL, interval=(0.0, 0.6)), APG(2.0, NULL)
    got = guide(VELOCITY.of(network), one, two).start(LABELS, x.shape, GRID)(x, 0.5)
    assert network.seen == [[2, 0, 1, 9, 9, 9]]
    strong, alone = (guide(VELOCITY.of(Network()), *g).start(LABELS, x.shape, GRID)(x, 0.5).out for g in ([], [two]))
    close(got.out, alone + 2 * (strong - opinions(0.5, x)[1]))


# composition


def all_guides(weaker: Denoiser | None = None) -> list[Guide]:
    weaker = weaker or VELOCITY.of(Network(7))
    return [
        CFG(2.0, NULL, interval=(0.0, 0.9)),
        APG(3.0, NULL, threshold=2.0),
        CFGZeroStar(1.7, NULL, zero_init=0),
        CFGPP(0.4, NULL),
        Autoguidance(1.5, weaker, fractions=(0.0, 0.8)),
    ]


def test_guides_add_up_in_any_order() -> None:
    """Each rule sees the strong opinion, not what other guides made of it; each in its own space."""
    x, t, guides = images(), 0.5, all_guides()

    def change(*chosen: Guide) -> Tensor:
        return guide(VELOCITY.of(Network()), *chosen).start(LABELS, x.shape, GRID)(x, t).out - opinions(t, x)[0]

    together = change(*guides)
    close(together, sum(change(g) for g in guides))
    close(change(*reversed(guides)), together)
    close(change(*guides[2:], *guides[:2]), together)


@pytest.mark.parametrize("path", [Linear(), VP()], ids=["linear", "vp"])
@pytest.mark.parametrize("rule", [APG(3.0, NULL), CFGZeroStar(3.0, NULL, zero_init=0)], ids=["apg", "zero star"])
def test_a_rule_works_in_its_space_whatever_the_network_predicts(rule: Guide, path: Any) -> None:
    x, t = images(), 0.6
    said = Meaning(path, "x0").of(Network())

    def translated(space: str) -> Callable[..., Tensor]:
        """The same opinion, predicted in another space."""
        return lambda x, t, cond, edit=None: said(x, float(t[0]), cond).to(space)

    wanted = guide(said, rule).start(LABELS, x.shape, GRID)(x, t).x0
    for space in ("eps", "velocity", "-velocity", "v", "edm"):
        exact = lambda path, t: t  # noqa: E731  (the clock is float32, and these are compared in float64)
        other = Meaning(path, space).of(translated(space))
        other.clock = exact
        got = guide(other, rule).start(LABELS, x.shape, GRID)(x, t).x0
        assert_close(got, wanted, rtol=1e-6, atol=1e-6)
    plain = guide(said, replace(cast(Any, rule), space=None)).start(LABELS, x.shape, GRID)(x, t).x0
    if cast(Any, rule).space != "x0":
        assert not torch.allclose(plain, wanted, rtol=1e-3)


def test_a_rule_is_silent_where_its_space_does_not_see_the_network() -> None:
    network, x = Network(), images()
    denoise = guide(VELOCITY.of(network), APG(3.0, NULL)).start(LABELS, x.shape, GRID)
    assert torch.equal(denoise(x, 0.0).out, opinions(0.0, x)[0])
    assert network.seen == [[2, 0, 1]]


def test_rescale_in_another_space_and_only_where_a_guide_acts() -> None:
    x = images()
    finish = Rescale(1.0, space="x0")
    denoise = guide(VELOCITY.of(Network()), CFG(6.0, NULL, interval=(0.0, 0.6)), finish=finish).start(
        LABELS, x.shape, GRID
    )
    strong = opinions(0.5, x, space="x0")[0]
    close(denoise(x, 0.5).x0.flatten(1).std(1), strong.flatten(1).std(1))
    assert torch.equal(denoise(x, 0.7).out, opinions(0.7, x)[0])
    zeros = torch.zeros(2, 3, 4)
    assert torch.equal(Rescale(1.0)(zeros, zeros), zeros)


# perturbed blocks of real networks


def real(family: str) -> tuple[Denoiser, tuple[int, ...]]:
    if family == "dit":
        config: Any = DiTConfig(input_size=8, hidden_size=24, depth=3, num_heads=3, num_classes=9)
        return Meaning(DDPM(), "eps", "index").of(randomise(config.build())), (4, 8, 8)
    config = JiTConfig(
        input_size=16, patch_size=4, hidden_size=24, depth=4, num_heads=3, num_classes=9, bottleneck_dim=7,
        in_context_len=3, in_context_start=2,
    )  # fmt: skip
    return Meaning(Linear(), "x0", "1-t", 0.05).of(randomise(config.build())), (3, 16, 16)


def edited(denoiser: Denoiser, x: Tensor, t: float, cond: Conditioning, guide: Any) -> Tensor:
    """The weak opinion of a perturbing guide in a pass of its own."""

    def edit(site: str, block: Any, h: Tensor, *args: Any) -> Tensor:
        if site not in guide.blocks:
            return block(h, *args)
        if isinstance(guide, SkipLayer):
            return h
        return block(h, *args, identity=torch.ones(len(h), dtype=torch.bool))

    return denoiser(x, t, cond, edit=edit).out


@pytest.mark.parametrize("family", ["dit", "jit"])
def test_perturbed_rows_of_one_batch_equal_separate_passes(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    denoiser, shape = real(family)
    x = torch.randn(3, *shape, generator=torch.Generator().manual_seed(1))
    pag, slg = PerturbedAttention(3.0, ("blocks.1", "blocks.2")), SkipLayer(2.0, ("blocks.0", "blocks.2"))
    both = replace(pag, scale=1.5, blocks=("blocks.2",), interval=(0.0, 0.6))
    rows: list[int] = []
    forward = denoiser.model.forward  # type: ignore[attr-defined]
    monkeypatch.setattr(denoiser.model, "forward", lambda x, *a, **k: (rows.append(len(x)), forward(x, *a, **k))[1])
    denoise = guide(denoiser, CFG(2.5, NULL), pag, slg, both).start(LABELS, x.shape, (1.0, 0.8, 0.5, 0.0))
    with torch.no_grad():
        for t, count in ((0.8, 12), (0.5, 15), (0.8, 12)):
            rows.clear()
            got = denoise(x, t).out
            assert rows == [count]
            strong, null = (denoiser(x, t, cond).out for cond in (LABELS, NULL))
            expected = strong + 1.5 * (strong - null)
            for g in (pag, slg, both)[: count // 3 - 2]:
                weak = edited(denoiser, x, t, LABELS, g)
                assert not torch.allclose(weak, strong, rtol=1e-2)
                expected = expected + (g.scale - 1) * (strong - weak)
            assert_close(got, expected, rtol=2e-4, atol=2e-4)


def test_perturbation_guides_a_model_without_classes() -> None:
    config = DiTConfig(input_size=8, hidden_size=24, depth=3, num_heads=3, num_classes=0, learn_sigma=False)
    denoiser = Meaning(Linear(), "velocity").of(randomise(config.build()))
    x, g = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1)), PerturbedAttention(3.0, ("blocks.1",))
    with torch.no_grad():
        got = guide(denoiser, g).start(Conditioning(), x.shape, GRID)(x, 0.5).out
        strong = denoiser(x, 0.5, Conditioning()).out
        assert_close(got, strong + 2 * (strong - edited(denoiser, x, 0.5, Conditioning(), g)), rtol=1e-4, atol=1e-4)


def test_compiled_blocks_stay_compiled_and_give_the_same() -> None:
    """No more variants than with and without the identity, however many trajectories are started."""
    denoiser, shape = real("jit")
    x = torch.randn(3, *shape, generator=torch.Generator().manual_seed(1))
    guides = (CFG(2.0, NULL), PerturbedAttention(3.0, ("blocks.1",)), SkipLayer(2.0, ("blocks.2",)))

    def sample() -> Tensor:
        return integrate(guide(denoiser, *guides), Euler(), (1.0, 0.5, 0.0), x, LABELS, Rng(0))

    compiled: list[int] = []

    def backend(graph: Any, inputs: Any) -> Any:
        compiled.append(1)
        return graph.forward

    with torch.no_grad():
        plain = sample()
        torch._dynamo.reset()
        for block in cast(Any, denoiser.model).blocks:
            block.compile(backend=backend)
        assert_close(sample(), plain, rtol=1e-5, atol=1e-5)
        first = len(compiled)
        assert first > 0
        for _ in range(3):
            sample()
        assert len(compiled) == first
    torch._dynamo.reset()


def test_threads_that_share_a_network_do_not_disturb_each_other() -> None:
    denoiser, shape = real("jit")
    x = torch.randn(3, *shape, generator=torch.Generator().manual_seed(1))
    kinds: list[tuple[Guide, ...]] = [
        (PerturbedAttention(3.0, ("blocks.1",)),), (SkipLayer(2.0, ("blocks.1",)),), (CFG(3.0, NULL),), (),
    ]  # fmt: skip

    @torch.no_grad()
    def sample(guides: tuple[Guide, ...]) -> Tensor:
        return integrate(guide(denoiser, *guides), Heun(), GRID, x, LABELS, Rng(0))

    wanted = [sample(guides) for guides in kinds]
    found: list[Tensor | None] = [None] * len(kinds)

    def work(i: int) -> None:
        found[i] = sample(kinds[i])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(kinds))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for a, b in zip(found, wanted, strict=True):
        assert a is not None
        assert torch.equal(a, b)


# every solver; rows of a batch; trajectories


def solvers() -> list[Any]:
    """Every registered solver for continuous x."""
    found = []
    for name in names("solver"):
        cls = lookup("solver", name)
        if set(getattr(cls, "needs", ("tokens",))) <= {"x0", "eps", "v", "velocity", "score"}:
            found.append(pytest.param(cls(variance="posterior") if name == "ddpm" else cls(), id=name))
    return found


@pytest.mark.parametrize("solver", solvers())
def test_every_solver_takes_every_guide_and_no_image_knows_its_batch_or_an_earlier_one(solver: Any) -> None:
    denoiser = Meaning(VP(), "v").of(Network())
    times = (0.95, 0.8, 0.6, 0.4, 0.2, 0.05)

    def sample(rows: list[int], kept: dict[str, Any]) -> Tensor:
        index = torch.tensor(rows)
        null = NULL.rows(index)
        guides: list[Guide] = [
            CFG(1.5, null, interval=(0.0, 0.9)),
            APG(2.0, null, threshold=2.0, momentum=-0.5),
            CFGZeroStar(1.5, null, zero_init=1),
            CFGPP(0.3, null),
            Autoguidance(1.5, Meaning(VP(), "eps").of(Network(7))),
        ]
        guided = kept.setdefault(f"{len(rows)}", guide(denoiser, *guides, finish=Rescale(0.5)))
        return integrate(guided, solver, times, images()[index], LABELS.rows(index), Rng(0).at(0, index))

    kept: dict[str, Any] = {}
    whole = sample([0, 1, 2], kept)
    assert bool(whole.isfinite().all())
    assert_close(sample([0, 1, 2], kept), whole, rtol=0, atol=0)
    if isinstance(solver, Dopri5):  # its step control looks at the whole batch, as its docstring says
        return
    for rows in ([0], [2, 1]):
        assert_close(sample(rows, {}), whole[rows], rtol=1e-6, atol=1e-6)


# recipes, the pipeline and the command line


EXAMPLES: list[Any] = [
    CFG(2.0, channels=3, interval=(0.1, 0.9)),
    CFGPP(0.6),
    CFGZeroStar(3.0, zero_init=2, fractions=(0.0, 0.5)),
    APG(4.0, eta=0.1, threshold=3.0, momentum=0.0, space=None),
    Autoguidance(2.0, "runs/small"),
    PerturbedAttention(3.0, ("blocks.1",)),
    SkipLayer(3.0, ("blocks.1", "blocks.2")),
]


def test_every_guide_is_saved_with_a_recipe() -> None:
    assert {type(g) for g in EXAMPLES} == {lookup("guide", name) for name in names("guide")}
    recipe = Recipe(sample=Sample(guides=tuple(EXAMPLES), finish=Rescale(0.4, "x0")))
    again = Recipe.from_json(recipe.to_json())
    assert again == recipe
    assert from_json(to_json(EXAMPLES[3])) == EXAMPLES[3]
    with pytest.raises(TypeError, match="Conditioning"):
        to_json(CFG(2.0, NULL))


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: CFG(float("nan")), "the scale of a guide"),
        (lambda: SkipLayer(2.0, ("blocks.1",), fractions=(0.0, 1.5)), "0 <= start <= stop <= 1"),
        (lambda: SkipLayer(2.0, ("blocks.1",), fractions=(-0.1, 1.0)), "0 <= start <= stop <= 1"),
        (lambda: SkipLayer(2.0, ("blocks.1",), fractions=(0.6, 0.5)), "0 <= start <= stop <= 1"),
        (lambda: PerturbedAttention(2.0, interval=(0.9, 0.1)), "interval"),
        (lambda: APG(2.0, space="x1"), "unknown space 'x1'"),
        (lambda: APG(2.0, momentum=1.0), "momentum"),
        (lambda: APG(2.0, threshold=-1.0), "threshold"),
        (lambda: CFGZeroStar(2.0, zero_init=-1), "zero_init"),
        (lambda: CFGZeroStar(2.0, space="x1"), "unknown space 'x1'"),
        (lambda: Rescale(1.5), "phi"),
        (lambda: Rescale(space="x1"), "unknown space 'x1'"),
        (lambda: Sample(guides=(Heun(),)), "sample.guides cannot be a solver"),
        (lambda: Sample(finish=Heun()), "sample.finish cannot be a solver"),
        (lambda: Sample(finish="rescael"), "did you mean rescale"),
    ],
)
def test_what_cannot_be_is_refused(make: Callable[[], Any], says: str) -> None:
    with pytest.raises(DitkitError, match=says):
        make()


def test_a_guide_that_cannot_guide_this_denoiser_is_refused_before_it_is_started() -> None:
    jit, _ = real("jit")
    cases: list[tuple[Denoiser, Guide, str]] = [
        (jit, SkipLayer(2.0, ("block.2",)), "JiT has no block 'block.2': did you mean blocks."),
        (jit, PerturbedAttention(2.0, ("blocks.7",)), "JiT has no block 'blocks.7'"),
        (jit, PerturbedAttention(2.0), "name them"),
        (jit, Autoguidance(2.0, "runs/small"), "needs a weaker denoiser"),
        (jit, Autoguidance(2.0, Meaning(Linear(2.0)).of(Network())), "walks another path"),
        (real("dit")[0], CFGZeroStar(2.0, NULL), "a DDPM path has none"),
    ]
    for denoiser, g, says in cases:
        with pytest.raises(DitkitError, match=says):
            guide(denoiser, g)

    class NoAttention(Model):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = torch.nn.ModuleList([torch.nn.Linear(2, 2)])

    guide(VELOCITY.of(NoAttention()), SkipLayer(2.0, ("blocks.0",)))
    with pytest.raises(DitkitError, match="cannot be the identity: use skip_layer"):
        guide(VELOCITY.of(NoAttention()), PerturbedAttention(2.0, ("blocks.0",)))
    with pytest.raises(DitkitError, match="never came to blocks"):
        guide(VELOCITY.of(Network()), SkipLayer(2.0, ("blocks.0",))).start(LABELS, (3, 4, 2, 2), GRID)(images(), 0.5)
    with pytest.raises(DitkitError, match="cfg needs a null"):
        guide(VELOCITY.of(Network()), CFG(2.0)).start(LABELS, (3, 4, 2, 2), GRID)


def test_the_space_of_a_rule_is_checked_on_the_grid() -> None:
    with pytest.raises(DitkitError, match="has no rates"):
        guide(real("dit")[0], CFGZeroStar(2.0, NULL, zero_init=0)).check((1.0,), ("x0",))
    velocity = Meaning(Linear(), "velocity").of(Network())
    guide(velocity, Autoguidance(2.0, Meaning(Linear(), "x0").of(Network()))).check((1.0, 0.5), ("velocity",))
    with pytest.raises(DitkitError, match="eps prediction cannot be read as velocity at t = 1"):
        guide(velocity, Autoguidance(2.0, Meaning(Linear(), "eps").of(Network()))).check((1.0,), ("velocity",))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> FilePath:
    """Two short runs, one with a smaller network, and one on another path."""
    from ditkit.recipe import Train
    from ditkit.recipes import digits

    from .conftest import TINY

    folder = tmp_path_factory.mktemp("runs")
    settings = Train(steps=4, batch=8, lr=1e-2, emas=(0.5,), log_every=2, sample_every=0, checkpoint_every=4)
    recipe = replace(digits(), model=TINY, train=settings, sample=Sample(steps=3, batch=8))
    train(recipe, folder / "run", quiet=True)
    train(replace(recipe, model=replace(TINY, hidden_size=16), seed=1), folder / "small", quiet=True)
    other = replace(recipe, denoiser=replace(recipe.denoiser, path=Linear(2.0)))
    train(other, folder / "path", quiet=True)
    return folder


def test_the_pipeline_gives_guides_what_they_need(runs: FilePath) -> None:
    pipeline, weaker = load(runs / "run"), load(runs / "small")
    plain = pipeline.sample(count=3, steps=4)
    assert torch.equal(
        pipeline.sample(count=3, steps=4, guidance=3.0), pipeline.sample(count=3, steps=4, guides=[CFG(3.0)])
    )
    for g in (
        APG(4.0),
        CFGPP(0.7),
        CFGZeroStar(3.0),
        PerturbedAttention(9.0, ("blocks.0",)),
        SkipLayer(9.0, ("blocks.1",)),
    ):
        assert not torch.equal(pipeline.sample(count=3, steps=4, guides=[g]), plain), g
    by_name = pipeline.sample(count=3, steps=4, guides=[Autoguidance(3.0, str(runs / "small"))])
    assert torch.equal(by_name, pipeline.sample(count=3, steps=4, guides=[Autoguidance(3.0, weaker.denoiser)]))
    assert not torch.equal(by_name, plain)
    # image 1 of a batch is image 1 alone
    guides = [APG(4.0), PerturbedAttention(2.0, ("blocks.0",)), Autoguidance(2.0, str(runs / "small"))]
    many = pipeline.sample(label=[3, 1, 2], count=3, steps=4, guides=guides, finish="rescale")
    few = pipeline.sample(label=[3, 1], count=2, steps=4, guides=guides, finish="rescale", batch=1)
    assert int((many[:2].int() - few.int()).abs().max()) <= 1


def test_what_a_pipeline_refuses(runs: FilePath) -> None:
    pipeline = load(runs / "run")
    cases: list[tuple[dict[str, Any], str]] = [
        ({"guidance": 2.0, "guides": [APG(2.0)]}, "both guide away from the null"),
        ({"finish": "rescale"}, "there is none"),
        ({"guides": [Autoguidance(2.0, str(runs / "nowhere"))]}, "there is no run"),
        ({"guides": [Autoguidance(2.0)]}, "needs the run of a weaker model"),
        ({"guides": [Autoguidance(2.0, str(runs / "path"))]}, "walks another path"),
        ({"guides": [SkipLayer(2.0, ("blocks.9",))]}, "no block 'blocks.9'"),
    ]
    for settings, says in cases:
        with pytest.raises(DitkitError, match=says):
            pipeline.check(**settings)
    bare = replace(pipeline.recipe, conditioner=replace(pipeline.recipe.conditioner, classes=()))
    bare = replace(bare, model=replace(bare.model, num_classes=0))
    free = Pipeline(bare, bare.model.build(), pipeline.shape)
    free.check(guides=[PerturbedAttention(2.0, ("blocks.0",))])
    for settings in ({"guides": [APG(2.0)]}, {"guidance": 2.0}):
        with pytest.raises(DitkitError, match="unconditional and cannot be guided by classes"):
            free.check(**settings)
    with pytest.raises(DitkitError, match="has the classes"):
        free.check(guides=[Autoguidance(2.0, str(runs / "small"))])


def test_guides_on_the_command_line(runs: FilePath, ditkit: Command) -> None:
    run, small = runs / "run", runs / "small"
    for words in (
        ("--guides", "apg", "scale=4", "eta=0.2", "interval=0.1,0.9", "--finish", "rescale", "phi=0.5"),
        ("--guides", "cfg", "scale=2", "skip_layer", "scale=2", "blocks=blocks.1", "fractions=0,0.5"),
        ("--guidance", "2", "--guides", "perturbed_attention", "scale=2", "blocks=blocks.0,blocks.1"),
        ("--autoguide", small),
    ):
        done = ditkit("sample", run, "--count", "2", "--steps", "2", *words)
        assert done.returncode == 0, done.stderr
    for words, says in (
        (("--guides", "apg"), "the guide apg needs a scale"),
        (("--guides", "agp", "scale=2"), "unknown guide 'agp': did you mean apg?"),
        (("--guides", "scale=2"), "belongs to no guide"),
        (("--guides", "apg", "scale=x"), "must be float"),
        (("--guides", "apg", "scael=2"), "did you mean scale"),
        (("--guides", "skip_layer", "scale=2", "blocks=block.1"), "did you mean blocks.1"),
        (("--guides", "cfg", "scale=2", "fractions=0,2"), "0 <= start <= stop <= 1"),
        (("--guides", "cfg", "scale=2", "--finish", "rescale", "rescale"), "one name"),
        (("--autoguide", runs / "nowhere"), "there is no run or checkpoint"),
    ):
        done = ditkit("sample", run, "--count", "2", "--steps", "2", *words)
        assert done.returncode == 1
        assert says in done.stderr, done.stderr


def test_guides_of_a_recipe_on_the_command_line(ditkit: Command, tmp_path: FilePath) -> None:
    from .conftest import TINY_FLAGS

    words = ("train", "digits", "--out", "run", *TINY_FLAGS, "--train.steps", "1", "--quiet")
    done = ditkit(
        *words, "--sample.guides", "apg", "scale=3", "skip_layer", "scale=2", "blocks=blocks.1",
        "--sample.guidance", "1", "--sample.finish", "rescale", "--sample.guides.0.eta", "0.5",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    recipe = Recipe.from_json((tmp_path / "run" / "recipe.json").read_text())
    assert recipe.sample.guides == (APG(3, eta=0.5), SkipLayer(2, ("blocks.1",)))
    assert recipe.sample.finish == Rescale()
    for wrong, says in (
        (("--sample.guides", "apg", "scale=3"), "both guide away from the null"),
        (("--sample.guides",), "takes names and fields"),
        (("--sample.guides", "skip_layer", "scale=2", "blocks=blocks.9"), "no block 'blocks.9'"),
    ):
        done = ditkit(*[w if w != "run" else "other" for w in words], *wrong)
        assert done.returncode == 1
        assert says in done.stderr, done.stderr
    assert not (tmp_path / "other").exists()
