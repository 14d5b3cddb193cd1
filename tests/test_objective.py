"""The training loss: loss spaces are weights, the variance learns alone, and times come from the published laws."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from ditkit.conditioning import Conditioning
from ditkit.config import DitkitError, lookup, names
from ditkit.diffusion import (
    DDPM,
    GVP,
    P2,
    VE,
    VP,
    Cosmap,
    Denoiser,
    Discrete,
    Likelihood,
    Linear,
    LogitNormal,
    LogNormal,
    LogVariance,
    Loss,
    Meaning,
    MinSNR,
    Mode,
    Objective,
    Regression,
    TimeSampler,
    Uniform,
    log_snr,
    posterior,
)
from ditkit.rng import Replay, Rng

NOTHING = Conditioning()


class Affine(nn.Module):
    """A small network without structure: out = w x + u t + c, twice the channels on request."""

    def __init__(self, channels: int = 3, double: bool = False):
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        self.conv = nn.Conv2d(channels, channels * (2 if double else 1), 1, dtype=torch.float64)
        for p in self.parameters():
            p.data = torch.randn(p.shape, dtype=torch.float64, generator=generator)

    def forward(self, x: Tensor, t: Tensor, cond: Conditioning, *, edit: Any = None) -> Tensor:
        return self.conv(x.double()) + 0.3 * t.double().view(-1, 1, 1, 1)


def batch(n: int, path: Any, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """x0, noise, and times that suit the path."""
    generator = torch.Generator().manual_seed(seed)
    x0, noise = (torch.randn(n, 3, 4, 4, dtype=torch.float64, generator=generator) for _ in range(2))
    u = torch.rand(n, dtype=torch.float64, generator=generator)
    t = (torch.floor(u * path.steps) + 1) / path.steps if isinstance(path, DDPM) else u
    return x0, noise, t


def losses(objective: Regression, denoiser: Denoiser, x0: Tensor, noise: Tensor, t: Tensor) -> Loss:
    return objective.loss(denoiser, x0, NOTHING, Replay({"t": t, "noise": noise}))


# loss spaces


@pytest.mark.parametrize("loss_space", ["x0", "eps", "v", "velocity", "-velocity", "score", "edm"])
@pytest.mark.parametrize("predicts", ["x0", "eps", "v", "velocity", "-velocity", "edm"])
def test_the_loss_is_the_squared_error_in_its_space(predicts: str, loss_space: str) -> None:
    """Against the definition: read both the output and the truth in the loss space, and subtract."""
    path = Linear(1.5)
    x0, noise, t = batch(6, path)
    t = 0.05 + 0.9 * t
    denoiser = Meaning(path, predicts, "t").of(Affine())
    got = losses(Regression(loss_space), denoiser, x0, noise, t)
    alpha, sigma = (c.view(-1, 1, 1, 1) for c in path(t))
    read = denoiser(alpha * x0 + sigma * noise, t, NOTHING)
    truth = read.with_out(read.target(x0, noise)).to(loss_space)
    assert_close(got.terms["mse"], (read.to(loss_space) - truth).square().mean((1, 2, 3)), rtol=1e-9, atol=1e-12)
    assert set(got.terms) == {"mse"}
    assert_close(got.total, got.terms["mse"], rtol=0, atol=0)
    assert torch.equal(got.t, t)


def test_jits_loss_is_the_weighted_error_of_the_image() -> None:
    """mean((v - v_pred)^2) with 1 / max(1 - t, .05), in JiT's time, where t = 1 is data."""
    theirs = torch.tensor([0.0, 0.2, 0.5, 0.9, 0.95, 0.97, 1.0], dtype=torch.float64)
    x0, noise, _ = batch(7, Linear())
    network = Affine()
    got = losses(
        Regression("velocity", LogitNormal(0.8, 0.8)),
        Meaning(Linear(), "x0", "1-t", t_eps=0.05).of(network),
        x0,
        noise,
        1 - theirs,
    )
    t = theirs.view(-1, 1, 1, 1)
    error = (network(t * x0 + (1 - t) * noise, theirs, NOTHING) - x0).square().mean((1, 2, 3))
    assert_close(got.total, error / (1 - theirs).clamp(min=0.05) ** 2, rtol=1e-6, atol=0)  # the clock is float32


def test_noise_scale_scales_the_noise_and_not_its_draw() -> None:
    x0, noise, t = batch(4, Linear())
    network = Affine()
    seen = []
    network.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    losses(Regression("x0"), Meaning(Linear(3.0), "x0").of(network), x0, noise, t)
    c = t.view(-1, 1, 1, 1)
    assert_close(seen[0], (1 - c) * x0 + 3 * c * noise, rtol=1e-12, atol=1e-12)


def test_min_snr_is_the_smaller_of_snr_and_gamma() -> None:
    path = DDPM()
    x0, noise, t = batch(64, path)
    t[:2] = torch.tensor([0.001, 1.0])
    denoiser = Meaning(path, "eps", "t").of(Affine())
    plain = losses(Regression("eps", Discrete()), denoiser, x0, noise, t).total
    weighted = losses(Regression("x0", Discrete(), MinSNR(5.0)), denoiser, x0, noise, t).total
    alpha, sigma = path(t)
    snr = alpha**2 / sigma**2
    # Hang et al. 2023: on the error of eps the weight is min(SNR, gamma) / SNR
    assert_close(weighted, plain * snr.clamp(max=5.0) / snr, rtol=1e-9, atol=0)
    assert float(snr.min()) < 5 < float(snr.max())
    with pytest.raises(DitkitError, match="min_snr is defined on the error of x0"):
        Regression("eps", Discrete(), MinSNR()).check(denoiser)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_loss_is_one_float_per_sample(dtype: torch.dtype) -> None:
    def model(x: Tensor, t: Tensor, cond: Conditioning, *, edit: Any = None) -> Tensor:
        return x.to(dtype)

    denoiser = Meaning(Linear(), "velocity").of(model)
    x0 = torch.ones(5, 2, 3, 3)
    loss = Regression().loss(denoiser, x0, NOTHING, Rng(0).at(3, torch.arange(5)))
    assert loss.total.shape == (5,)
    assert loss.total.dtype == torch.float32
    assert loss.t.dtype == torch.float64


def test_a_sample_has_the_same_loss_in_any_batch() -> None:
    denoiser = Meaning(Linear(), "x0", t_eps=0.05).of(Affine())
    x0 = batch(8, Linear())[0].float()
    objective = Regression("velocity", LogitNormal(0.8, 0.8))
    ids = torch.arange(100, 108)
    whole = objective.loss(denoiser, x0, NOTHING, Rng(1).at(7, ids))
    for index in (torch.tensor([3]), torch.tensor([7, 0, 2])):
        part = objective.loss(denoiser, x0[index], NOTHING, Rng(1).at(7, ids[index]))
        assert torch.equal(part.t, whole.t[index])
        assert_close(part.total, whole.total[index], rtol=1e-6, atol=0)


# the learned variance


def hybrid(steps: int = 1000, double: bool = True) -> tuple[Regression, Denoiser, DDPM]:
    path = DDPM(steps)
    denoiser = Meaning(path, "eps", "index").of(Affine(double=double))
    return Regression("eps", Discrete(steps), variance="hybrid"), denoiser, path


def test_the_bound_teaches_only_the_variance_and_the_error_only_the_mean() -> None:
    objective, denoiser, path = hybrid()
    x0, noise, t = batch(8, path)
    t[:2] = torch.tensor([0.001, 0.002])  # the decoder's step and the one above
    loss = losses(objective, denoiser, x0, noise, t)
    assert set(loss.terms) == {"mse", "vb"}
    assert isinstance(denoiser.model, Affine)
    weight = denoiser.model.conv.weight
    for row in range(8):  # each sample by itself, the decoder's too
        (of_bound,) = torch.autograd.grad(loss.terms["vb"][row], weight, retain_graph=True)
        (of_error,) = torch.autograd.grad(loss.terms["mse"][row], weight, retain_graph=True)
        assert not of_bound[:3].any()
        assert bool(of_bound[3:].any())
        assert bool(of_error[:3].any())
        assert not of_error[3:].any()


def test_the_bound_is_the_divergence_of_the_two_steps_back_in_bits() -> None:
    """With the true mean and a variance at a limit, the KL of two Gaussians of known variances."""
    path = DDPM()
    x0, noise, _ = batch(5, path)
    t = torch.tensor([0.002, 0.01, 0.3, 0.7, 1.0], dtype=torch.float64)
    for raw, limit in ((-1.0, "variance"), (1.0, "beta")):

        def model(x: Tensor, t: Tensor, cond: Conditioning, *, edit: Any = None, raw: float = raw) -> Tensor:
            return torch.cat((noise, torch.full_like(noise, raw)), dim=1)

        loss = losses(hybrid()[0], Meaning(path, "eps", "index").of(model), x0, noise, t)
        q = posterior(path, t, t - 0.001)
        ratio = q.variance / getattr(q, limit)
        assert_close(loss.terms["vb"], 0.5 * (ratio - 1 - ratio.log()) / math.log(2), rtol=1e-6, atol=1e-9)
        assert_close(loss.terms["mse"], torch.zeros(5, dtype=torch.float64), rtol=0, atol=1e-20)


def test_the_first_step_of_the_table_has_a_finite_bound_also_from_times_in_float32() -> None:
    for steps in (1000, 100, 70, 3):  # 1/100 rounded to float32 lies below 1/100
        objective, denoiser, path = hybrid(steps)
        x0, noise, _ = batch(1, path)
        exact = losses(objective, denoiser, x0, noise, torch.tensor([1 / steps], dtype=torch.float64))
        rounded = losses(objective, denoiser, x0, noise, torch.tensor([1 / steps]))
        assert bool(exact.total.isfinite().all())
        assert_close(rounded.terms["vb"], exact.terms["vb"], rtol=1e-6, atol=1e-6)


def test_a_variance_that_is_not_predicted_cannot_be_taught() -> None:
    objective, denoiser, path = hybrid(double=False)
    x0, noise, t = batch(2, path)
    with pytest.raises(DitkitError, match=r"model\.learn_sigma=True"):
        losses(objective, denoiser, x0, noise, t)


# refusals, before training starts


@pytest.mark.parametrize(
    ("objective", "meaning", "says"),
    [
        (
            Regression("velocity", Uniform()),
            Meaning(Linear(), "x0"),
            "x0 prediction cannot be read as velocity at t = 0, which the time sampler 'uniform' visits",
        ),
        (
            Regression("velocity", Uniform()),
            Meaning(Linear(), "eps"),
            "eps prediction cannot be read as velocity at t = 1",
        ),
        (Regression("score", Uniform()), Meaning(Linear(), "velocity"), "cannot be read as score at t = 0"),
        (Regression("velocity", Discrete()), Meaning(Linear(), "eps"), "cannot be read as velocity at t = 1"),
        (Regression("eps", Uniform()), Meaning(DDPM(), "eps", "index"), "needs the time sampler discrete"),
        (Regression("eps", Discrete(100)), Meaning(DDPM(), "eps", "index"), "needs the time sampler discrete"),
        (Regression("eps", LogitNormal()), Meaning(DDPM(100), "eps", "index"), "of 100 steps needs"),
        (Regression("velocity", Discrete()), Meaning(DDPM(), "eps", "index"), "has no rates"),
        (Regression("eps", variance="hybrid"), Meaning(Linear(), "eps"), "needs a DDPM path"),
    ],
)
def test_what_cannot_be_trained_is_refused(objective: Regression, meaning: Meaning, says: str) -> None:
    with pytest.raises(DitkitError, match=says):
        objective.check(meaning.of(Affine()))


@pytest.mark.parametrize(
    ("objective", "meaning"),
    [
        (Regression("velocity", LogitNormal(0.8, 0.8)), Meaning(Linear(), "x0", "1-t", 0.05)),
        (Regression("velocity", LogitNormal()), Meaning(Linear(), "x0")),
        (Regression("velocity", Uniform()), Meaning(Linear(), "-velocity", "1-t")),
        (Regression("velocity", Uniform()), Meaning(Linear(), "x0", t_eps=0.05)),
        (Regression("x0", Uniform()), Meaning(Linear(), "x0")),
        (Regression("v", Uniform()), Meaning(Linear(), "velocity")),
        (Regression("eps", Discrete(), variance="hybrid"), Meaning(DDPM(), "eps", "index")),
        (Regression("x0", Discrete(), MinSNR()), Meaning(DDPM(), "v", "index")),
    ],
)
def test_what_can_be_trained_is_not(objective: Objective, meaning: Meaning) -> None:
    denoiser = meaning.of(Affine(double=True))
    objective.check(denoiser)
    x0 = batch(64, meaning.path)[0].float()
    loss = objective.loss(denoiser, x0, NOTHING, Rng(0).at(0, torch.arange(64)))
    assert bool(loss.total.isfinite().all())


def test_unknown_words_are_refused() -> None:
    with pytest.raises(DitkitError, match=r"unknown space 'veloctiy'.*velocity"):
        Regression("veloctiy")
    with pytest.raises(DitkitError, match="None or 'hybrid'"):
        Regression(variance="learned")


# time samplers


def draw(law: Any, n: int = 200_000) -> Tensor:
    return Rng(9).at(0, torch.arange(n))("t", law)


def test_logit_normal_is_jits_law_in_its_own_time() -> None:
    """logit of JiT's t = 1 - ours is normal with mean -0.8 and deviation 0.8."""
    t = draw(LogitNormal(0.8, 0.8))
    theirs = torch.logit(1 - t)
    n = len(t)
    assert float(theirs.mean()) == pytest.approx(-0.8, abs=4.5 * 0.8 / math.sqrt(n))
    assert float(theirs.std()) == pytest.approx(0.8, abs=4.5 * 0.8 / math.sqrt(2 * n))
    ordered = torch.special.ndtr((theirs.sort().values + 0.8) / 0.8)
    grid = (torch.arange(n) + 0.5) / n
    assert float((ordered - grid).abs().max()) * math.sqrt(n) < 1.95
    # the facts page: the median is .31, and E[1 / max(1 - t, .05)^2] = 2.96
    assert float((1 - t).median()) == pytest.approx(0.31, abs=0.003)
    assert float(t.clamp(min=0.05).pow(-2).mean()) == pytest.approx(2.96, abs=0.05)
    assert t.dtype == torch.float64


@pytest.mark.parametrize("steps", [1, 3, 10, 1000])
def test_discrete_times_are_all_entries_of_the_table_and_no_others(steps: int) -> None:
    path = DDPM(steps)
    index = path.index(draw(Discrete(steps)))
    counts = torch.bincount(index, minlength=steps).double()
    assert len(counts) == steps
    expected = 200_000 / steps
    assert float((counts - expected).abs().max()) <= 5 * math.sqrt(expected)
    chi2 = float(((counts - expected) ** 2 / expected).sum())
    assert chi2 <= steps - 1 + 4 * math.sqrt(2 * steps)
    # the least and the greatest uniform numbers
    edges = Discrete(steps)(torch.tensor([0.5, 2**32 - 0.5], dtype=torch.float64) / 2**32)
    assert edges.tolist() == [1 / steps, 1.0]


def distance(t: Tensor, cdf: Any) -> float:
    """Kolmogorov's, times the root of n: above 1.95 with probability .001."""
    ordered = cdf(t.sort().values)
    return float((ordered - (torch.arange(len(t)) + 0.5) / len(t)).abs().max()) * math.sqrt(len(t))


@pytest.mark.parametrize("scale", [-1.0, 0.0, 0.81, 1.29, 1.75])
def test_mode_is_the_published_law(scale: float) -> None:
    """Esser et al. 2024 equation 20: f(u) falls from 1 to 0, so P(t < f(u)) = 1 - u; its derivative is the density."""
    u = torch.linspace(0, 1, 4001, dtype=torch.float64)
    f = 1 - u - scale * (torch.cos(math.pi / 2 * u) ** 2 - 1 + u)
    cdf = torch.from_numpy(np.interp(draw(Mode(scale)).sort().values.numpy(), f.flip(0), 1 - u.flip(0)))
    n = len(cdf)
    assert float((cdf - (torch.arange(n) + 0.5) / n).abs().max()) * math.sqrt(n) < 1.95
    for wrong in (-1.01, 1.76):
        with pytest.raises(DitkitError, match="or t would turn back"):
            Mode(wrong)


def test_cosmap_is_the_published_law() -> None:
    """Equation 21: the density is 2 / (pi - 2 pi t + 2 pi t^2)."""
    t = draw(Cosmap())
    assert distance(t, lambda t: 2 / math.pi * torch.atan(2 * t - 1) + 0.5) < 1.95
    # and the log-SNR of the linear path is that of the cosine path at a uniform time
    u = torch.tensor([0.1, 0.4, 0.8], dtype=torch.float64)
    assert_close(log_snr(Linear(), Cosmap()(u)), log_snr(GVP(), u), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("path", [VE(), Linear(), Linear(2.0), GVP(), VP()], ids=str)
def test_log_normal_is_edms_law_of_the_noise_level_on_any_path(path: Any) -> None:
    level = -log_snr(path, draw(LogNormal(-1.2, 1.2).on(path))) / 2
    assert distance(level, lambda level: torch.special.ndtr((level + 1.2) / 1.2)) < 1.95
    beyond = LogNormal(30.0, 0.1).on(path)(torch.zeros(3, dtype=torch.float64))
    assert beyond.tolist() == pytest.approx([1.0] * 3, abs=1e-6)


def test_uniform_between_bounds() -> None:
    t = draw(Uniform(0.2, 0.7))
    assert distance(t, lambda t: (t - 0.2) / 0.5) < 1.95
    assert (Uniform(0.1, 1.0).ends, Uniform(0.0, 0.9).ends, Uniform(0.1, 0.9).ends) == ((1.0,), (0.0,), ())
    for low, high in ((0.5, 0.5), (-0.1, 1.0), (0.0, 1.1)):
        with pytest.raises(DitkitError, match="0 <= low < high <= 1"):
            Uniform(low, high)
    # SiT's score and VP models are trained inside these bounds, and refused outside of them
    Regression("velocity", Uniform(1e-3, 0.999)).check(Meaning(Linear(), "eps").of(Affine()))
    Regression("velocity", Uniform(1e-5, 1.0)).check(Meaning(VP(), "eps").of(Affine()))
    with pytest.raises(DitkitError, match="at t = 0, which the time sampler 'uniform' visits"):
        Regression("velocity", Uniform()).check(Meaning(VP(), "eps").of(Affine()))


def test_samplers_say_which_ends_they_reach() -> None:
    assert Uniform().ends == (0.0, 1.0)
    assert Mode().ends == (0.0, 1.0)
    assert Cosmap().ends == (0.0, 1.0)
    assert LogitNormal().ends == ()
    assert LogNormal().ends == ()
    assert Discrete().ends == (1.0,)
    for name in names("times"):
        law = lookup("times", name)()
        assert isinstance(law, TimeSampler)
        t = draw(law.on(Linear()), 50_000)
        assert t.dtype == torch.float64
        assert bool(((t > 0) & (t <= 1)).all())


@pytest.mark.parametrize("law", [Mode(), Mode(-0.9), Cosmap(), LogitNormal(), LogitNormal(3.0, 5.0)], ids=str)
def test_what_is_rounded_to_float32_does_not_reach_the_ends(law: Any) -> None:
    """At t = 1 some networks' time is infinite: a run would end there, at the same step each time it goes on."""
    draws = torch.tensor([2.0**-33, 2.0**-30, 0.5, 1 - 2.0**-30, 1 - 2.0**-33], dtype=torch.float64)
    t = law(torch.special.ndtri(draws) if law.base == "normal" else draws)
    assert bool(((t > 0) & (t < 1)).all())
    assert torch.equal(t, t.float().double())
    assert law.atoms == ()


@pytest.mark.parametrize(
    ("objective", "meaning", "says"),
    [
        (
            Regression("score"),
            Meaning(Linear(), "score"),
            "a loss in score is infinite at t = 0, which the time sampler",
        ),
        (Regression(), Meaning(VP(), "velocity"), "a loss in velocity is infinite at t = 0, which the time sampler"),
        (Regression("eps", weighting=Likelihood()), Meaning(GVP(), "v"), "likelihood is infinite at t = 0, which the"),
        (
            Regression("eps", Discrete(), Likelihood()),
            Meaning(Linear(), "v"),
            "likelihood is infinite at t = 1, which the time sampler 'discrete' visits: choose one that stays inside",
        ),
        (
            Regression("v", Discrete()),
            Meaning(Linear(), "v", "log_sigma/4"),
            "clock 'log_sigma/4' is infinite at t = 1.0",
        ),
        (
            Regression("eps", Discrete(), variance="hybrid"),
            Meaning(DDPM(zero_snr=True), "eps", "index"),
            "cannot be read as x0 at t = 1, which the time sampler 'discrete' visits",
        ),
    ],
)
def test_what_would_fail_at_some_later_step_is_refused_at_once(
    objective: Regression, meaning: Meaning, says: str
) -> None:
    with pytest.raises(DitkitError, match=says):
        objective.check(meaning.of(Affine(double=True)))


def test_with_t_eps_a_loss_of_the_score_is_bounded_near_data() -> None:
    x0, noise, _ = batch(4, Linear())
    t = torch.tensor([0.0, 1e-6, 1e-3, 0.05], dtype=torch.float64)
    for space in ("score", "eps"):
        objective = Regression(space, Uniform())
        denoiser = Meaning(Linear(), "score", t_eps=0.05).of(Affine())
        objective.check(denoiser)
        error = losses(objective, denoiser, x0, noise, t).total
        assert float(error.detach().max()) < 50 * (0.05**-2 if space == "score" else 1)


def test_the_learned_variance_of_pure_noise_is_a_number() -> None:
    """At alpha = 0 the log-SNR is infinite; it counts as 40, as do all that are larger."""
    path = DDPM(1000, 0.00085, 0.012, "scaled_linear", zero_snr=True)
    denoiser, objective = Meaning(path, "v", "index").of(Affine()), Regression("v", Discrete(), LogVariance(8))
    learned: Any = objective.learn(denoiser, Rng(0))
    torch.nn.init.ones_(learned.weight)
    x0, noise, _ = batch(2, Linear())
    t = torch.ones(2, dtype=torch.float64)
    assert bool(learned.loss(denoiser, x0, NOTHING, Replay({"t": t, "noise": noise})).total.isfinite().all())
    near = learned.log_variance(Linear(), torch.tensor([1e-12, 1 - 1e-12, 0.0, 1.0], dtype=torch.float64))
    assert_close(near[:2], near[2:], rtol=0, atol=0)


def test_the_direction_of_a_vector_is_one_angle() -> None:
    x0, noise = (torch.randn(5, 3, generator=torch.Generator().manual_seed(i)) for i in range(2))
    t = torch.linspace(0.1, 0.9, 5, dtype=torch.float64)
    model: Any = lambda x, t, cond, edit=None: x.flip(1)  # noqa: E731
    x = (1 - t).float()[:, None] * x0 + t.float()[:, None] * noise
    found = losses(Regression(direction=2.0), Meaning(Linear(), "velocity").of(model), x0, noise, t).terms["direction"]
    assert_close(found, 2 * (1 - torch.cosine_similarity(x.flip(1), noise - x0)), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("make", "says"), [
    (lambda: MinSNR(0.0), "gamma must be above 0"), (lambda: P2(-1.0), "must not be negative"),
    (lambda: P2(k=0.0), "k above 0"),
])  # fmt: skip
def test_weightings_that_would_be_zero_or_infinite_are_refused(make: Any, says: str) -> None:
    with pytest.raises(DitkitError, match=says):
        make()


# weightings


@pytest.mark.parametrize("path", [Linear(), Linear(1.5), GVP(), VP(), VE()], ids=str)
def test_weightings_are_their_papers(path: Any) -> None:
    x0, noise, t = batch(6, path)
    t = 0.05 + 0.9 * t
    network = Affine()
    alpha, sigma = path(t)
    rate_alpha, rate_sigma = path.rate(t)
    c = [v.view(-1, 1, 1, 1) for v in (alpha, sigma)]
    error = (network(c[0] * x0 + c[1] * noise, t.float(), NOTHING) - noise).square().mean((1, 2, 3))
    denoiser = Meaning(path, "eps").of(network)
    # Choi et al. 2022: on the error of eps, 1 / (k + SNR)^gamma
    got = losses(Regression("eps", weighting=P2(0.5, 2.0)), denoiser, x0, noise, t).total
    assert_close(got, error / (2 + alpha**2 / sigma**2) ** 0.5, rtol=1e-9, atol=0)
    # SiT, in its own time, where rates have the other sign: drift_var = (alpha' / alpha) sigma^2 - sigma sigma'
    drift = (-rate_alpha / alpha) * sigma**2 + sigma * rate_sigma
    got = losses(Regression("eps", weighting=Likelihood()), denoiser, x0, noise, t).total
    assert_close(got, error * drift / sigma**2, rtol=1e-9, atol=0)
    got = losses(Regression("velocity"), denoiser, x0, noise, t).total
    assert_close(got, error * (drift / sigma) ** 2, rtol=1e-9, atol=0)


@pytest.mark.parametrize("name", names("weighting"))
def test_a_weighting_of_another_space_is_refused(name: str) -> None:
    weighting = lookup("weighting", name)()
    denoiser = Meaning(Linear(), "v").of(Affine())
    if isinstance(weighting, LogVariance):
        Regression("v", weighting=weighting).check(denoiser)
        return
    with pytest.raises(DitkitError, match=f"defined on the error of {weighting.space}: set objective.loss_space to"):
        Regression("v", weighting=weighting).check(denoiser)
    Regression(weighting.space, Uniform(0.1, 0.9), weighting).check(denoiser)


def test_edms_loss_is_the_plain_error_of_its_network() -> None:
    """Karras et al. 2022: lambda(sigma) c_out^2 = 1, so their weight on x0 is the loss space edm."""
    path = VE()
    x0, noise, t = batch(5, path)
    sigma = 80 * t
    prediction = Meaning(path, "x0", "t").of(Affine())
    plain = losses(Regression("x0"), prediction, x0, noise, t).total
    assert_close(
        losses(Regression("edm"), prediction, x0, noise, t).total,
        plain * (sigma**2 + 0.25) / (0.5 * sigma) ** 2,
        rtol=1e-9,
        atol=0,
    )


# what an objective learns


def test_a_learned_variance_finds_the_error_of_each_noise_level() -> None:
    """error / e^u + u is least at u = log error: of errors that depend on the level, u becomes the logarithm."""
    path = Linear()

    def model(x: Tensor, t: Tensor, cond: Conditioning, *, edit: Any = None) -> Tensor:
        return torch.zeros_like(x)

    denoiser = Meaning(path, "velocity").of(model)
    plain = Regression("x0", Uniform(0.1, 0.9), LogVariance(64))
    with pytest.raises(DitkitError, match=r"take the loss of objective.learn"):
        plain.loss(denoiser, torch.zeros(2, 1, 2, 2), NOTHING, Rng(0).at(0, torch.arange(2)))
    learned = plain.learn(denoiser, Rng(0))
    assert isinstance(learned, nn.Module)
    assert isinstance(learned, Objective)
    assert learned.learn(denoiser, Rng(1)) is learned
    first = learned.loss(denoiser, torch.zeros(4, 1, 2, 2), NOTHING, Rng(0).at(0, torch.arange(4)))
    assert_close(first.total, first.watched["error"], rtol=0, atol=0)  # u = 0
    optimizer = torch.optim.Adam(learned.parameters(), lr=0.05)
    for step in range(300):
        rng = Rng(0).at(step, torch.arange(256))
        optimizer.zero_grad()
        # x0 = 0: the velocity is the noise, and its error as x0 is t^2
        learned.loss(denoiser, torch.zeros(256, 4, 2, 2), NOTHING, rng).total.mean().backward()
        optimizer.step()
    t = torch.linspace(0.15, 0.85, 8, dtype=torch.float64)
    assert_close(learned.log_variance(path, t).detach().double(), 2 * t.log(), rtol=0, atol=0.3)  # type: ignore[operator]


def test_what_learns_nothing_is_itself() -> None:
    objective = Regression()
    assert objective.learn(Meaning().of(Affine()), Rng(0)) is objective


def test_the_direction_is_the_angle_over_channels() -> None:
    """1 - cos for each place, by hand; it adds a term and leaves the others as they are, to the last bit."""
    path = Linear()
    x0, noise, t = batch(5, path)
    denoiser = Meaning(path, "-velocity", "1-t").of(Affine())
    plain = losses(Regression(), denoiser, x0, noise, t)
    both = losses(Regression(direction=0.5), denoiser, x0, noise, t)
    assert set(both.terms) == {"mse", "direction"}
    assert torch.equal(both.terms["mse"], plain.terms["mse"])
    wanted = []
    for i in range(5):
        x = (1 - t[i]) * x0[i] + t[i] * noise[i]
        out = denoiser(x[None], t[i : i + 1], NOTHING).out[0]
        target = x0[i] - noise[i]
        places = [
            1 - float(out[:, r, c] @ target[:, r, c] / out[:, r, c].norm() / target[:, r, c].norm())
            for r in range(4)
            for c in range(4)
        ]
        wanted.append(0.5 * sum(places) / 16)
    assert_close(both.terms["direction"].double(), torch.tensor(wanted, dtype=torch.float64), rtol=1e-5, atol=1e-6)
    with pytest.raises(DitkitError, match="direction must not be negative"):
        Regression(direction=-1)
