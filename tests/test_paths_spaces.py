"""Paths, spaces and the determinant algebra between them; the posterior and the learned variance."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from ditkit.conditioning import Conditioning
from ditkit.config import DitkitError, lookup, names
from ditkit.diffusion import (
    DDPM,
    GVP,
    SPACES,
    VE,
    VP,
    Denoiser,
    DraxPath,
    Linear,
    Meaning,
    Mixture,
    Path,
    Prediction,
    det,
    log_snr,
    posterior,
    reading,
    row,
    singular_ends,
)
from ditkit.diffusion.posterior import gaussian_kl, learned_log_variance, quantised_nll

PATHS: dict[str, Any] = {
    "linear": Linear(),
    "linear scaled": Linear(2.5),
    "gvp": GVP(),
    "vp": VP(),
    "ve": VE(),
    "ddpm": DDPM(),
    "ddpm short": DDPM(8, 0.05, 0.4),
    "ddpm cosine": DDPM(schedule="cosine"),
    "ddpm scaled": DDPM(1000, 0.00085, 0.012, "scaled_linear"),
    "ddpm zero": DDPM(1000, 0.00085, 0.012, "scaled_linear", zero_snr=True),
}
TABLE = tuple(name for name in PATHS if name.startswith("ddpm"))
# noise_scale makes a space of its own nowhere: every path must know all of these, or refuse by a DitkitError
ALL = (*SPACES, *(f"-{space}" for space in SPACES))


def spaces_of(path: str) -> tuple[str, ...]:
    return tuple(s for s in ALL if not (path in TABLE and s.endswith("velocity")))


def inside(path: Any) -> Tensor:
    """Times away from both ends."""
    if isinstance(path, DDPM):
        return torch.tensor([1, path.steps // 4, path.steps // 2, path.steps - 1], dtype=torch.float64) / path.steps
    return torch.tensor([1e-3, 0.2, 0.5, 0.9, 0.999], dtype=torch.float64)


def draw(n: int, seed: int = 0, *shape: int) -> Tensor:
    return torch.randn(n, *(shape or (3, 4)), dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def prediction(path: Path, space: str, t: Tensor, t_eps: float = 0.0) -> tuple[Prediction, Tensor, Tensor]:
    """A prediction whose output is exactly right, with its x0 and eps."""
    n = len(t) if t.ndim else 2
    x0, eps = draw(n, 1), draw(n, 2)
    alpha, sigma = (c.view(-1, 1, 1) for c in path(t))
    right = Prediction(torch.zeros_like(x0), alpha * x0 + sigma * eps, t, path, space, t_eps)
    return right.with_out(right.target(x0, eps)), x0, eps


def test_every_registered_path_is_tested() -> None:
    tokens = {Mixture, DraxPath}  # these are tested in test_discrete.py
    assert {type(p) for p in PATHS.values()} == {lookup("path", name) for name in names("path")} - tokens


# the algebra


@pytest.mark.parametrize(("name", "have"), [(name, have) for name in PATHS for have in spaces_of(name)])
def test_an_exact_output_gives_back_x0_and_eps_through_every_space(name: str, have: str) -> None:
    path = PATHS[name]
    right, x0, eps = prediction(path, have, inside(path))
    assert _relative(right.x0, x0) < 1e-9
    assert _relative(right.eps, eps) < 1e-9
    for want in spaces_of(name):
        read = right.to(want)
        a, b = (c.view(-1, 1, 1) for c in row(want, path, right.t))
        assert _relative(read, a * x0 + b * eps) < 1e-9
        again = Prediction(read, right.x, right.t, path, want)
        assert _relative(again.to(have), right.out) < 1e-9
        assert _relative(again.x0, x0) < 1e-9


def _relative(got: Tensor, right: Tensor) -> float:
    """The largest error of a row, relative to the row."""
    return float(((got - right).flatten(1).norm(dim=1) / right.flatten(1).norm(dim=1)).max())


@pytest.mark.parametrize(("name", "have"), [(name, have) for name in PATHS for have in spaces_of(name)])
def test_the_gain_is_the_ratio_of_errors(name: str, have: str) -> None:
    path = PATHS[name]
    right, _, _ = prediction(path, have, inside(path))
    wrong = right.with_out(right.out + 1.0)
    for want in spaces_of(name):
        ratio = (wrong.to(want) - right.to(want)).mean((1, 2))
        assert_close(wrong.gain(want), ratio, rtol=1e-5, atol=1e-8)


@given(st.floats(1e-4, 1 - 1e-4), st.sampled_from(ALL), st.sampled_from(ALL), st.floats(0.5, 4))
@settings(deadline=None, max_examples=200)
def test_gains_compose(t: float, have: str, want: str, scale: float) -> None:
    """The gain there and back is 1, and by way of a third space it is the product."""
    path = Linear(scale)
    there, back = reading(have, want, path, t), reading(want, have, path, t)
    assert_close(there[1] * back[1], torch.ones((), dtype=torch.float64), rtol=1e-9, atol=0)
    via = reading("v", want, path, t)[1] * reading(have, "v", path, t)[1]
    assert_close(via, there[1], rtol=1e-9, atol=0)


def test_the_same_space_is_the_output_itself() -> None:
    right, _, _ = prediction(Linear(), "eps", torch.tensor([0.0, 1.0], dtype=torch.float64))
    assert right.eps is right.out
    assert right.gain("eps").tolist() == [1, 1]


@pytest.mark.parametrize("name", PATHS)
def test_rows_say_what_the_words_mean(name: str) -> None:
    path = PATHS[name]
    t = inside(path)
    (alpha, sigma), zero, one = path(t), torch.zeros_like(t), torch.ones_like(t)
    expected = {"x0": (one, zero), "eps": (zero, one), "v": (-sigma, alpha), "score": (zero, -1 / sigma)}
    # Karras et al. 2022 equation 8: F = (x0 - c_skip x) / c_out of x / alpha, at the noise level sigma / alpha
    level = sigma / alpha
    skip, out = 0.25 / (level**2 + 0.25), level * 0.5 / (level**2 + 0.25).sqrt()
    for got, right in zip(row("edm", path, t), ((1 - skip) / out, -skip * level / out), strict=True):
        assert_close(got, right, rtol=1e-9, atol=1e-12)
    for space, (a, b) in expected.items():
        got, turned = row(space, path, t), row(f"-{space}", path, t)
        assert_close(torch.stack(got), torch.stack((a, b)), rtol=0, atol=0)
        assert_close(torch.stack(turned), -torch.stack(got), rtol=0, atol=0)


@pytest.mark.parametrize("name", [n for n in PATHS if n not in TABLE])
def test_rates_are_the_slopes_of_the_path_and_velocity_is_dx_dt(name: str) -> None:
    path = PATHS[name]
    # the VP path bends without bound towards the data: only there the difference is no better than h^2 / t^2 = 1e-4
    t, h = inside(path), 1e-5
    up, down = path(t + h), path(t - h)
    for rate, (high, low) in zip(path.rate(t), zip(up, down, strict=True), strict=True):
        assert_close(rate, (high - low) / (2 * h), rtol=1e-4 if name == "vp" else 1e-8, atol=1e-8)
    right, x0, eps = prediction(path, "velocity", t)
    high = up[0].view(-1, 1, 1) * x0 + up[1].view(-1, 1, 1) * eps
    low = down[0].view(-1, 1, 1) * x0 + down[1].view(-1, 1, 1) * eps
    assert_close(right.velocity, (high - low) / (2 * h), rtol=1e-4 if name == "vp" else 1e-7, atol=1e-7)
    assert_close(right.to("-velocity"), -right.velocity, rtol=0, atol=0)


def test_a_table_has_no_rates() -> None:
    with pytest.raises(DitkitError, match="has no rates"):
        DDPM().rate(0.5)
    for have, want in (("eps", "velocity"), ("velocity", "eps")):
        with pytest.raises(DitkitError, match="has no rates"):
            reading(have, want, DDPM(), 0.5)


@pytest.mark.parametrize("space", ["", "-", "--eps", "x", "Eps", "eps ", "noise"])
def test_unknown_spaces_are_refused(space: str) -> None:
    with pytest.raises(DitkitError, match="unknown space"):
        Meaning(prediction=space)
    with pytest.raises(DitkitError, match="unknown space"):
        row(space, Linear(), 0.5)


def test_a_batch_of_times_equals_its_times_one_by_one() -> None:
    path = Linear(1.7)
    right, _, _ = prediction(path, "x0", inside(path))
    for want in ALL:
        whole = right.to(want)
        for i, t in enumerate(right.t):
            one = Prediction(right.out[i : i + 1], right.x[i : i + 1], t, path, "x0")
            assert_close(one.to(want), whole[i : i + 1], rtol=1e-13, atol=1e-13)
    # in float32 the two agree bit for bit
    single = dataclasses.replace(right, out=right.out.float(), x=right.x.float())
    whole = single.velocity
    for i, t in enumerate(right.t):
        one = Prediction(single.out[i : i + 1], single.x[i : i + 1], t, path, "x0")
        assert torch.equal(one.velocity, whole[i : i + 1])
        assert one.velocity.dtype == torch.float32


# singular ends


@pytest.mark.parametrize(
    ("name", "space", "ends"),
    [
        ("linear", "x0", (0.0,)),
        ("linear", "eps", (1.0,)),
        ("linear", "v", ()),
        ("linear", "velocity", ()),
        ("linear", "-velocity", ()),
        ("linear", "score", (0.0, 1.0)),
        ("linear scaled", "velocity", ()),
        ("ddpm", "x0", (0.0,)),
        ("ddpm", "eps", ()),  # alpha(1) of the published table is 0.006, not 0
        ("ddpm", "v", ()),
        ("ddpm zero", "eps", (1.0,)),
        ("ddpm zero", "v", ()),
        ("gvp", "x0", (0.0,)),
        ("gvp", "eps", (1.0,)),
        ("gvp", "velocity", ()),
        ("vp", "eps", ()),
        ("vp", "velocity", (0.0,)),  # d sigma / dt is infinite there
        ("vp", "v", ()),
        ("ve", "eps", ()),  # the signal is never gone
        ("ve", "x0", (0.0,)),
        ("ve", "velocity", ()),
        *((path, "edm", ()) for path in PATHS),
    ],
)
def test_singular_ends(name: str, space: str, ends: tuple[float, ...]) -> None:
    assert singular_ends(space, PATHS[name]) == ends


@pytest.mark.parametrize(
    ("have", "want", "end"),
    [
        ("x0", "eps", 0.0),
        ("x0", "velocity", 0.0),
        ("x0", "v", 0.0),
        ("x0", "score", 0.0),
        ("eps", "x0", 1.0),
        ("eps", "velocity", 1.0),
        ("eps", "v", 1.0),
        ("score", "x0", 1.0),
        ("score", "x0", 0.0),
        ("score", "velocity", 0.0),
        # here the number that is wanted is infinite itself
        ("eps", "score", 0.0),
        ("v", "score", 0.0),
        ("velocity", "score", 0.0),
    ],
)
def test_a_singular_reading_is_refused_and_with_t_eps_finite(have: str, want: str, end: float) -> None:
    path = Linear()
    for t in (end, torch.tensor([0.5, end])):
        with pytest.raises(DitkitError, match=rf"at t = \[{end}\].*t_eps"):
            reading(have, want, path, t)
        assert all(bool(c.isfinite().all()) for c in reading(have, want, path, t, 0.01))
    # at t_eps itself, where the clamp begins, and further inside it has no effect
    t = abs(end - 0.01)
    for time in (t, abs(end - 0.3)):
        assert_close(reading(have, want, path, time, 0.01), reading(have, want, path, time), rtol=1e-12, atol=1e-12)
    # nearer to the end than t_eps the gain grows no more
    gains = [abs(float(reading(have, want, path, abs(end - d), 0.01)[1])) for d in (0.0, 0.004, 0.01)]
    assert max(gains) <= gains[2] * 1.03


def test_regular_readings_at_the_ends_are_exact() -> None:
    for have, end in itertools.product(("v", "velocity"), (0.0, 1.0)):
        right, x0, eps = prediction(Linear(3.0), have, torch.tensor(end, dtype=torch.float64))
        assert_close(right.x0, x0, rtol=1e-12, atol=1e-12)
        assert_close(right.eps, eps, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("t_eps", [0.02, 0.05, 0.3])
@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_the_clamp_is_jits_formula_in_its_own_time(t_eps: float, scale: float) -> None:
    theirs = torch.tensor([0.0, 0.3, 0.69, 0.9, 0.949, 0.95, 0.951, 0.99, 1.0], dtype=torch.float64)
    x0, eps, out = draw(9, 1), draw(9, 2), draw(9, 3)
    t = theirs.view(-1, 1, 1)
    z = t * x0 + (1 - t) * scale * eps
    v_pred = (out - z) / (1 - t).clamp(min=t_eps)
    v = (x0 - z) / (1 - t).clamp(min=t_eps)
    ours = Prediction(out, z, 1 - theirs, Linear(scale), "x0", t_eps)
    assert_close(ours.to("-velocity"), v_pred, rtol=1e-12, atol=1e-12)
    loss = (v - v_pred).square().mean((1, 2))
    assert_close((out - x0).square().mean((1, 2)) * ours.gain("velocity").square(), loss, rtol=1e-12, atol=1e-15)


def identity(x: Tensor, t: Tensor, cond: Conditioning, *, edit: Any = None) -> Tensor:
    return x


@pytest.mark.parametrize(
    ("meaning", "visited", "needs", "refused"),
    [
        (Meaning(Linear(), "x0"), (1.0, 0.5, 0.0), ("velocity",), True),
        (Meaning(Linear(), "x0"), (1.0, 0.5), ("velocity",), False),
        (Meaning(Linear(), "x0"), (1.0, 0.0), ("x0",), False),
        (Meaning(Linear(), "x0", t_eps=0.05), (1.0, 0.0), ("velocity",), False),
        (Meaning(Linear(), "eps"), (1.0, 0.5), ("velocity",), True),
        (Meaning(Linear(), "eps"), (1.0, 0.5), ("eps",), False),
        (Meaning(Linear(), "eps"), (1.0, 0.5), ("x0", "eps"), True),
        (Meaning(Linear(), "velocity"), (1.0, 0.0), ("x0", "eps", "v"), False),
        (Meaning(Linear(), "velocity"), (1.0, 0.0), ("score",), True),
        (Meaning(DDPM(), "eps", "index"), (1.0, 0.5), ("x0", "eps"), False),
    ],
)
def test_a_denoiser_is_checked_before_it_is_used(
    meaning: Meaning, visited: tuple[float, ...], needs: tuple[str, ...], refused: bool
) -> None:
    denoiser = meaning.of(identity)
    if refused:
        with pytest.raises(
            DitkitError, match=r"prediction cannot be read as \w+ at t = \d, which the grid 'so' visits"
        ):
            denoiser.check(visited, needs, "the grid 'so'")
        with pytest.raises(DitkitError):
            [reading(meaning.prediction, space, meaning.path, t) for space in needs for t in visited]
    else:
        denoiser.check(visited, needs)
        for space, t in itertools.product(needs, visited):
            coefficients = reading(meaning.prediction, space, meaning.path, t, meaning.t_eps)
            assert all(math.isfinite(c) for c in coefficients)


def test_a_multiple_of_the_output_is_read_where_x_says_nothing_new() -> None:
    """-velocity is the velocity, and the score is eps over sigma, at singular ends too."""
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
    for path in (Linear(), GVP(), VP(), VE()):
        for have, want in (("velocity", "-velocity"), ("-score", "score"), ("-x0", "x0"), ("-eps", "-eps")):
            of_x, of_out = reading(have, want, path, ends)
            assert of_x.tolist() == [0, 0]
            assert of_out.tolist() == [1 if have == want else -1] * 2
    for path in (Linear(2.0), GVP(), DDPM(1000, 0.00085, 0.012, "scaled_linear", zero_snr=True)):
        said, _, eps = prediction(path, "eps", torch.ones(3, dtype=torch.float64))
        assert_close(said.score, -eps / path.prior_std, rtol=1e-12, atol=0)
        said, _, eps = prediction(path, "score", torch.ones(3, dtype=torch.float64))
        assert_close(said.eps, eps, rtol=1e-12, atol=0)
        Meaning(path, "eps").of(identity).check((1.0,), ("score",))
    Meaning(VP(), "-velocity").of(identity).check((1.0, 0.0), ("velocity",))
    with pytest.raises(DitkitError, match="score does not determine eps at t = "):
        reading("score", "eps", Linear(), 0.0)


def test_where_nothing_is_left_of_the_data_alpha_is_0() -> None:
    for path in (Linear(2.0), GVP(), DDPM(zero_snr=True)):
        assert float(path(1.0)[0]) == 0
        assert float(log_snr(path, 1.0)) == -math.inf
    assert float(GVP()(1.0)[1]) == 1


@pytest.mark.parametrize(("name", "space"), [("linear scaled", "score"), ("vp", "velocity"), ("ddpm", "-score")])
def test_with_t_eps_what_should_have_been_said_is_bounded_as_its_readings_are(name: str, space: str) -> None:
    path = PATHS[name]
    t = torch.tensor([0.001, 0.02, 0.05, 0.5], dtype=torch.float64)
    said, x0, eps = prediction(path, space, t, t_eps=0.05)
    a, b = (c.view(-1, 1, 1) for c in row(space, path, t.clamp(min=0.05)))
    assert_close(said.out, a * x0 + b * eps, rtol=1e-12, atol=0)
    assert bool(prediction(path, space, torch.zeros(2, dtype=torch.float64), 0.05)[0].out.isfinite().all())
    if space != "velocity":
        assert_close(said.eps, eps, rtol=1e-12, atol=0)


def test_t_eps_on_a_table_is_an_entry_of_it() -> None:
    Meaning(DDPM(), "x0", "index", t_eps=0.05)
    with pytest.raises(DitkitError, match=r"t_eps 0.0333 is no entry of a path of 1000 steps: use a multiple of 0.001"):
        Meaning(DDPM(), "x0", "index", t_eps=0.0333)


def test_a_time_is_found_within_0_and_1_for_any_noise_level() -> None:
    for path in PATHS.values():
        t = path.time(torch.tensor([-1e4, -745.0, -80.0, -10.4, 0.0, 80.0, 1e4], dtype=torch.float64))
        assert bool(((t >= 0) & (t <= 1)).all()), path


@pytest.mark.parametrize(
    ("meaning", "times", "says"),
    [
        (Meaning(DDPM(), "v"), (1.0, 0.7495, 0.5), r"has no entry at t = 0\.7495: use the grid 'ddpm'"),
        (Meaning(Linear(), "v", "log_sigma/4"), (1.0, 0.5), r"'log_sigma/4' is infinite at t = 1\.0: keep grid"),
        (Meaning(Linear(), "v", "index"), (0.9, 0.5), "the clock 'index' counts the steps of a DDPM path"),
    ],
)
def test_times_that_a_path_or_a_clock_does_not_have_are_refused_before_sampling(
    meaning: Meaning, times: tuple[float, ...], says: str
) -> None:
    with pytest.raises(DitkitError, match=says):
        meaning.of(identity).check(times, ("v",))


# clocks


@pytest.mark.parametrize(
    ("clock", "path", "t", "read"),
    [
        ("t", Linear(), 0.25, 0.25),
        ("1-t", Linear(), 0.25, 0.75),
        ("1000t", Linear(), 0.25, 250.0),
        ("index", DDPM(), 1.0, 999.0),
        ("index", DDPM(), 0.001, 0.0),
        ("index", DDPM(), 0.25, 249.0),
        ("index", DDPM(8), 0.25, 1.0),
        ("log_sigma/4", VE(80.0), 0.25, math.log(20) / 4),
        ("log_sigma/4", Linear(), 0.75, math.log(3) / 4),
    ],
)
def test_a_network_reads_its_own_clock_in_float32(clock: str, path: Any, t: float, read: float) -> None:
    seen = []

    def model(x: Tensor, t: Tensor, cond: Conditioning, *, edit: Any = None) -> Tensor:
        seen.append(t)
        return x

    denoiser = Meaning(path, "eps", clock).of(model)
    x = torch.zeros(3, 1, 2, 2)
    denoiser(x, t, Conditioning())
    denoiser(x, torch.full((3,), t), Conditioning())
    for times in seen:
        assert times.dtype == torch.float32
        assert times.tolist() == pytest.approx([read] * 3, rel=1e-7)


def test_the_noise_level_of_clean_data_has_no_logarithm() -> None:
    with pytest.raises(DitkitError, match=r"'log_sigma/4' is infinite at t = 0.0"):
        Meaning(VE(), "edm", "log_sigma/4").of(identity)(torch.zeros(1, 1, 2, 2), 0.0, Conditioning())


@pytest.mark.parametrize("name", PATHS)
def test_edm_scales_what_the_network_sees_and_what_it_says_to_unit_variance(name: str) -> None:
    """Karras et al. 2022 section 5: with data of standard deviation 0.5, input and target have variance 1."""
    path = PATHS[name]
    seen = []

    def model(x: Tensor, t: Tensor, cond: Conditioning, *, edit: Any = None) -> Tensor:
        seen.append(x)
        return x

    denoiser = Meaning(path, "edm", "t", scale_input=True).of(model)
    x0, eps = 0.5 * draw(200, 1, 2, 20, 20), draw(200, 2, 2, 20, 20)
    for t in inside(path):
        alpha, sigma = path(t)
        said = denoiser(alpha * x0 + sigma * eps, t, Conditioning())
        assert float(seen[-1].std()) == pytest.approx(1, abs=0.01)
        assert float(said.target(x0, eps).std()) == pytest.approx(1, abs=0.01)
        # c_skip x + c_out F(c_in x) in the VE frame, with F the identity here
        level, scaled = sigma / alpha, (alpha * x0 + sigma * eps) / alpha
        norm = (level**2 + 0.25).sqrt()
        assert_close(said.x0, 0.25 / norm**2 * scaled + 0.5 * level / norm * scaled / norm, rtol=1e-9, atol=1e-9)


def test_the_index_clock_needs_a_table_and_clocks_have_near_names() -> None:
    with pytest.raises(DitkitError, match="'index' counts the steps of a DDPM path"):
        Meaning(Linear(), "eps", "index").of(identity)(torch.zeros(1, 1, 2, 2), 0.5, Conditioning())
    with pytest.raises(DitkitError, match=r"unknown clock '1000-t'.*1000t"):
        Meaning(clock="1000-t")


def test_twice_the_channels_are_the_output_and_its_variance() -> None:
    def model(x: Tensor, t: Tensor, cond: Conditioning, *, edit: Any = None) -> Tensor:
        return torch.cat((x, -x), dim=1)

    x = draw(2, 0, 3, 4, 4).float()
    got = Denoiser(model, Linear(), "eps", "t")(x, 0.5, Conditioning())
    assert torch.equal(got.out, x)
    assert got.extra is not None
    assert torch.equal(got.extra, -x)
    assert Denoiser(identity, Linear(), "eps", "t")(x, 0.5, Conditioning()).extra is None


# paths


def test_a_time_is_refused_outside_its_interval() -> None:
    for path in PATHS.values():
        for t in (-0.1, 1.1, torch.tensor([0.5, 1.125])):
            with pytest.raises(ValueError, match=r"lies in \[0, 1\]"):
                path(t)


@pytest.mark.parametrize("name", PATHS)
def test_a_path_runs_from_data_to_noise(name: str) -> None:
    path = PATHS[name]
    alpha, sigma = path(torch.tensor([0.0, *inside(path).tolist(), 1.0]))
    assert (float(alpha[0]), float(sigma[0])) == (1, 0)
    assert bool((alpha.diff() < 0).all()) or name == "ve"
    assert bool((sigma.diff() > 0).all())
    assert alpha.dtype == sigma.dtype == torch.float64
    if name in ("vp", "gvp", *TABLE):
        assert_close(alpha**2 + sigma**2, torch.ones_like(alpha), rtol=1e-14, atol=0)
    # sampling starts from what x is at t = 1: exactly so where alpha is 0 there, or for data of variance 1
    assert path.prior_std == pytest.approx(1.0 if name in ("vp", *TABLE) else float(sigma[-1]), abs=1e-12)
    assert (float(alpha[-1]) < 1e-15) == (name in ("linear", "linear scaled", "gvp", "ddpm zero"))
    assert path(0.5)[0].shape == ()


def test_the_vp_path_is_sits_and_songs() -> None:
    """alpha as an integral of beta; SiT's formula in its own time."""
    path, t = VP(0.1, 20.0), torch.linspace(0, 1, 2001, dtype=torch.float64)
    beta = 0.1 + (20 - 0.1) * t
    integral = torch.cumulative_trapezoid(beta, t)  # of a line: exact
    assert_close(path(t)[0][1:], torch.exp(-integral / 2), rtol=1e-12, atol=0)
    theirs = 1 - t
    assert_close(
        path(t)[0].log(), -0.25 * (1 - theirs) ** 2 * (20 - 0.1) - 0.5 * (1 - theirs) * 0.1, rtol=1e-12, atol=1e-15
    )
    with pytest.raises(DitkitError, match="0 < beta_min < beta_max"):
        VP(2.0, 1.0)
    with pytest.raises(DitkitError, match="positive noise level, not 0"):
        VE(0)


def test_the_tables_are_those_of_their_papers() -> None:
    # Nichol & Dhariwal 2021: betas from the ratios of cos^2, cut at 0.999
    level = [math.cos((i / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(1001)]
    betas = [min(1 - b / a, 0.999) for a, b in itertools.pairwise(level)]
    np.testing.assert_allclose(DDPM(schedule="cosine").table[1:], np.cumprod(1 - np.array(betas)), rtol=1e-9)
    # Rombach et al. 2022: linear in the root of beta
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    plain = np.cumprod(1 - betas)
    np.testing.assert_allclose(PATHS["ddpm scaled"].table[1:], plain, rtol=1e-10)
    # Lin et al. 2024 algorithm 1
    root = np.sqrt(plain)
    zero = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
    np.testing.assert_allclose(PATHS["ddpm zero"].table[1:], zero, rtol=1e-10, atol=1e-16)
    assert float(PATHS["ddpm zero"](1.0)[0]) == 0
    with pytest.raises(DitkitError, match=r"unknown schedule 'cosin'.*did you mean cosine"):
        DDPM(schedule="cosin")
    wrongs: list[dict[str, Any]] = [
        {"steps": 0},
        {"beta_first": 0.0},
        {"beta_last": 1.0},
        {"beta_first": 0.1, "beta_last": 0.01},
    ]
    for wrong in wrongs:
        with pytest.raises(DitkitError, match="a DDPM path needs"):
            DDPM(**wrong)


@pytest.mark.parametrize("name", PATHS)
def test_time_is_the_inverse_of_log_snr(name: str) -> None:
    path = PATHS[name]
    t = inside(path)
    assert_close(path.time(log_snr(path, t)), t, rtol=1e-12, atol=1e-12)
    assert float(path.time(float(log_snr(path, 0.5)))) == pytest.approx(0.5, abs=1e-12)
    assert float(path.time(log_snr(path, torch.tensor(1.0)))) == pytest.approx(1.0, abs=1e-12)
    assert float(path.time(-math.inf)) == 1.0
    assert float(path.time(-1e4)) == (0.999 if name == "ddpm zero" else 1.0)  # the last entry is infinitely far
    first = 1 / path.steps if isinstance(path, DDPM) else 0.0
    assert float(path.time(math.inf)) == first
    assert float(path.time(1e4)) == first
    assert path.time(torch.zeros(2, 3)).shape == (2, 3)


def published_tables(steps: int, first: float, last: float, kept: list[int] | None = None) -> dict[str, np.ndarray]:
    """Ho et al. 2020 in numpy, with betas respaced to the kept steps as Nichol & Dhariwal do it."""
    cumulative = np.cumprod(1.0 - np.linspace(first, last, steps, dtype=np.float64))
    if kept is not None:
        before, betas = 1.0, []
        for i in kept:
            betas.append(1 - cumulative[i] / before)
            before = cumulative[i]
    else:
        betas = np.linspace(first, last, steps, dtype=np.float64)
    betas = np.array(betas)
    alphas = 1 - betas
    bar = np.cumprod(alphas)
    previous = np.append(1.0, bar[:-1])
    return {
        "bar": bar,
        "beta": betas,
        "variance": betas * (1 - previous) / (1 - bar),
        "of_x0": betas * np.sqrt(previous) / (1 - bar),
        "of_x": (1 - previous) * np.sqrt(alphas) / (1 - bar),
    }


@pytest.mark.parametrize(("steps", "first", "last"), [(1000, 1e-4, 2e-2), (50, 1e-3, 0.2)])
def test_the_table_is_the_published_one(steps: int, first: float, last: float) -> None:
    path, tables = DDPM(steps, first, last), published_tables(steps, first, last)
    t = torch.arange(1, steps + 1) / steps  # float32: accepted
    assert path.index(t).tolist() == list(range(steps))
    alpha, sigma = path(t)
    np.testing.assert_allclose(alpha.numpy() ** 2, tables["bar"], rtol=1e-12)
    np.testing.assert_allclose(sigma.numpy() ** 2, 1 - tables["bar"], rtol=1e-9)
    assert path.index(0.0) == -1


@pytest.mark.parametrize("t", [0.5005, 1e-4, 0.99951, torch.tensor([0.1, 0.12345])])
def test_between_the_entries_of_a_table_there_is_nothing(t: float | Tensor) -> None:
    with pytest.raises(DitkitError, match="table of 1000 steps and has no entry at"):
        DDPM()(t)


def test_a_table_made_under_another_device_does_not_stay_there() -> None:
    path = DDPM(13, 0.01, 0.1)
    with torch.device("meta"):
        path(1.0)
    with torch.inference_mode():
        DDPM(14, 0.01, 0.1)(1.0)
    assert path(1.0)[0].device.type == "cpu"
    scale = torch.ones((), requires_grad=True)
    (DDPM(14, 0.01, 0.1)(1.0)[0] * scale).backward()


# the step back


@pytest.mark.parametrize(("n", "name"), [(None, "ddpm"), (250, "ddpm"), (7, "ddpm"), (3, "ddpm short")])
def test_the_posterior_is_that_of_the_published_tables_also_respaced(n: int | None, name: str) -> None:
    path = PATHS[name]
    grid = lookup("grid", "ddpm")()(n or path.steps, path, 0)
    times = torch.tensor(grid[::-1], dtype=torch.float64)
    kept = path.index(times[1:]).tolist()
    tables = published_tables(path.steps, path.beta_first, path.beta_last, kept)
    q = posterior(path, times[1:], times[:-1])
    for key in ("beta", "variance", "of_x0", "of_x"):
        np.testing.assert_allclose(getattr(q, key).numpy(), tables[key], rtol=1e-8, atol=1e-14, err_msg=key)


@pytest.mark.parametrize("name", PATHS)
def test_a_step_forward_and_its_posterior_are_one_joint_law(name: str) -> None:
    """q(x_t | x_s) q(x_s | x0) = q(x_s | x_t, x0) q(x_t | x0): compare means and covariances of (x_s, x_t)."""
    path = PATHS[name]
    t, s = inside(path)[2:4].flip(0)
    (at, st_), (as_, ss), q = path(t), path(s), posterior(path, t, s)
    assert_close(q.of_x * at + q.of_x0, as_, rtol=1e-12, atol=1e-12)  # mean of x_s for x0 = 1
    covariance = at / as_ * ss**2
    assert_close(q.of_x * st_**2, covariance, rtol=1e-12, atol=1e-12)
    assert_close(q.variance + q.of_x**2 * st_**2, ss**2, rtol=1e-12, atol=1e-12)
    assert_close(q.beta + (at / as_ * ss) ** 2, st_**2, rtol=1e-12, atol=1e-12)
    assert 0 < float(q.variance) < float(q.beta)


def test_the_last_step_has_no_variance() -> None:
    for path in PATHS.values():
        q = posterior(path, 1 / path.steps if isinstance(path, DDPM) else 0.1, 0.0)
        assert float(q.variance) == 0
        assert float(q.of_x) == 0
        assert float(q.of_x0) == pytest.approx(1, abs=1e-15)


def test_the_learned_variance_runs_between_its_limits() -> None:
    raw = torch.tensor([-1.0, 0.0, 1.0, -3.0], dtype=torch.float64)
    low, high = math.log(0.01), math.log(0.04)
    expected = torch.tensor([0.01, 0.02, 0.04, 0.0025], dtype=torch.float64)  # geometric, and not clipped
    assert_close(learned_log_variance(raw, low, high).exp(), expected, rtol=1e-12, atol=0)
    rows = learned_log_variance(raw.view(4, 1), torch.full((4, 1), low), torch.full((4, 1), high))
    assert_close(rows[:, 0].exp(), expected, rtol=1e-6, atol=0)


def test_the_kl_of_gaussians_is_its_integral() -> None:
    x = torch.linspace(-30, 30, 200_001, dtype=torch.float64)

    def log_density(mean: float, log_var: float) -> Tensor:
        return -0.5 * (math.log(2 * math.pi) + log_var + (x - mean) ** 2 / math.exp(log_var))

    for m1, v1, m2, v2 in ((0.0, 0.0, 0.0, 0.0), (0.3, -0.5, -0.2, 0.4), (1.0, 1.0, 0.0, -1.0)):
        p, q = log_density(m1, v1), log_density(m2, v2)
        integral = torch.trapezoid(p.exp() * (p - q), x)
        got = gaussian_kl(*(torch.tensor(v, dtype=torch.float64) for v in (m1, v1, m2, v2)))
        assert_close(got, integral, rtol=1e-8, atol=1e-10)


@given(st.floats(-1.2, 1.2), st.floats(-5, 1))
@settings(deadline=None, max_examples=60)
def test_the_probabilities_of_all_256_values_sum_to_one(mean: float, log_std: float) -> None:
    values = torch.arange(256, dtype=torch.float64) / 127.5 - 1
    nll = quantised_nll(values, torch.full_like(values, mean), torch.full_like(values, log_std))
    assert float(nll.neg().exp().sum()) == pytest.approx(1, abs=1e-9)


def test_the_probability_of_a_value_is_the_gaussian_of_its_bin() -> None:
    """The tanh form of the distribution function is within 3e-4 of the true one."""
    values = torch.arange(256, dtype=torch.float64) / 127.5 - 1
    mean, std = 0.1, 0.2
    nll = quantised_nll(values, torch.full_like(values, mean), torch.full_like(values, math.log(std)))
    edges = torch.cat((torch.tensor([-math.inf]), values[:-1] + 1 / 255, torch.tensor([math.inf]))).double()
    true = torch.special.ndtr((edges - mean) / std).diff()
    assert_close(nll.neg().exp().cumsum(0), true.cumsum(0), rtol=0, atol=5e-4)
    # far from every value there is a floor, and no infinity
    far = quantised_nll(torch.tensor([-1.0, 0.0, 1.0]), torch.tensor([9.0, 9.0, -9.0]), torch.full((3,), -4.0))
    assert_close(far, torch.full((3,), -math.log(1e-12)), rtol=1e-6, atol=0)


def test_the_determinant() -> None:
    assert det((torch.tensor(1.0), torch.tensor(2.0)), (torch.tensor(3.0), torch.tensor(5.0))) == -1
