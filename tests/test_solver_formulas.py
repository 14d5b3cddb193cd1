"""What a step must give, from formulas derived here anew: problems that a method solves exactly, its paper's equations.

Each check is also what the mutation test (test_solver_mutations.py) runs on altered solvers.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.polynomial import Polynomial
from torch import Tensor
from torch.testing import assert_close

from ditkit.config import DitkitError
from ditkit.diffusion import (
    AB2,
    DDIM,
    DDPM,
    DEIS2,
    DEIS3,
    GVP,
    RK4,
    VE,
    VP,
    Ancestral,
    Denoise,
    DPMpp2M,
    DPMpp2MSDE,
    DPMpp3M,
    EDMStochasticHeun,
    Euler,
    Heun,
    Linear,
    Midpoint,
    Path,
    SiTSDE,
    UniPC2,
    UniPC3,
    log_likelihood,
    log_snr,
    posterior,
)
from ditkit.diffusion.solvers.adaptive import Rademacher
from ditkit.diffusion.solvers.exponential import moment
from ditkit.rng import Replay, Rng

from .exact import NO_NOISE, NOTHING, Exact, gaussian, told

PATHS: tuple[Path, ...] = (Linear(), VP(), GVP())
UNEVEN = (0.9, 0.78, 0.6, 0.47, 0.3, 0.22)
X = torch.tensor([[0.3, -1.2], [0.9, 0.4], [-0.5, 2.0]], dtype=torch.float64)
SCALES = torch.tensor([[1.0, -0.4], [0.7, 1.9], [-1.3, 0.2]], dtype=torch.float64)

equal: Callable[..., None] = lambda a, b: assert_close(a, b, rtol=1e-9, atol=1e-10)  # noqa: E731
CHECKS: dict[str, list[Callable[[], None]]] = {}


def checks(*solvers: str) -> Callable[[Callable[[], None]], Callable[[], None]]:
    """The mutation test runs this check on these solvers."""

    def decorate(check: Callable[[], None]) -> Callable[[], None]:
        for solver in solvers:
            CHECKS.setdefault(solver, []).append(check)
        return check

    return decorate


def walk(
    solver: Any, denoise: Denoise, times: Sequence[float], x: Tensor, truth: Sequence[Tensor] = (), rng: Any = NO_NOISE
) -> tuple[Tensor, Any]:
    """x and the state after the last time; at the first times x is put where it truly is, and so is a remembered x."""
    state = solver.init(x, times)
    for k, (t, s) in enumerate(itertools.pairwise(times)):
        if k < len(truth):
            x = truth[k]
            if k and hasattr(state, "x"):
                state = replace(state, x=truth[k - 1])
        x, state = solver.step(denoise, x, t, s, state, rng.at(k))
    return x, state


def lam(path: Path, t: float) -> float:
    return float(log_snr(path, t)) / 2


def integral(function: Callable[[np.ndarray], np.ndarray], low: float, high: float) -> float:
    """By 60 Gauss-Legendre points."""
    nodes, weights = np.polynomial.legendre.leggauss(60)
    return float((weights * function(low + (high - low) * (nodes + 1) / 2)).sum() * (high - low) / 2)


def ab(path: Path, t: float) -> tuple[float, float]:
    alpha, sigma = path(t)
    return float(alpha), float(sigma)


# Runge-Kutta and Adams-Bashforth


@checks("Euler", "Heun", "Midpoint", "RK4")
def test_a_runge_kutta_step_on_a_linear_problem_is_the_exponential_series() -> None:
    """velocity = c x: a step multiplies by 1 + z + ... + z^p / p!, z = c (s - t), for methods with p stages."""
    for solver, p in ((Euler(), 1), (Heun(), 2), (Midpoint(), 2), (RK4(), 4)):
        denoise = told(Linear(), "velocity", lambda x, t: -1.7 * x)
        out, _ = walk(solver, denoise, (0.8, 0.45), X)
        z = -1.7 * (0.45 - 0.8)
        equal(out, X * sum(z**k / math.factorial(k) for k in range(p + 1)))


@checks("Euler", "Heun", "Midpoint", "RK4", "AB2")
def test_a_velocity_that_is_a_polynomial_of_time_is_integrated_exactly() -> None:
    """Of a degree below the order; for RK4 up to 3, which fixes the places and weights of its stages."""
    for solver, degree, warm in (
        (Euler(), 0, 0),
        (Heun(), 1, 0),
        (Midpoint(), 1, 0),
        (RK4(), 3, 0),
        (AB2(), 1, 1),
    ):
        velocity = Polynomial([0.7, -2.0, 1.5, 3.0][: degree + 1])
        denoise = told(Linear(), "velocity", lambda x, t, velocity=velocity: float(velocity(t)) * SCALES)
        truth = [X + (float(velocity.integ()(t)) - float(velocity.integ()(UNEVEN[0]))) * SCALES for t in UNEVEN]
        out, _ = walk(solver, denoise, UNEVEN, X, truth[: warm + 1])
        equal(out, truth[-1])


@checks("Heun")
def test_heun_reaches_the_data_with_eulers_step() -> None:
    denoise = told(Linear(), "velocity", lambda x, t: -1.7 * x * t)
    equal(walk(Heun(), denoise, (0.4, 0.0), X)[0], X + 0.4 * 1.7 * 0.4 * X)


@checks("AB2")
def test_adams_bashforth_starts_with_eulers_step() -> None:
    denoise = told(Linear(), "velocity", lambda x, t: -1.7 * x)
    equal(walk(AB2(), denoise, (0.8, 0.45), X)[0], X * (1 + 1.7 * 0.35))


# exponential integrators


@checks("DPMpp2M", "DPMpp3M", "DEIS2", "DEIS3", "UniPC2", "UniPC3", "DPMpp2MSDE")
def test_the_moments_are_integrals() -> None:
    for h, k in itertools.product((1e-4, 0.3, -0.3, 0.999, 1.001, 4.0, -4.0, 30.0), range(4)):
        if abs(h) < 20:
            truth = integral(lambda u, h=h, k=k: np.exp(u - h) * (u / h) ** k, 0, h)
        else:  # from its asymptotic series, which ends: exp(-h) is nothing
            truth = sum((-1 / h) ** j * math.factorial(k) / math.factorial(k - j) for j in range(k + 1))
        assert moment(h, k) == pytest.approx(truth, rel=1e-12 if abs(h) < 1 else 1e-10)
    assert moment(math.inf, 0) == 1


def x0_trajectory(path: Path, x0: Polynomial, times: Sequence[float], x: Tensor) -> list[Tensor]:
    """Where x goes when the predicted x0 is SCALES times a polynomial of lambda."""
    found = [x]
    for t, s in itertools.pairwise(times):
        lower, upper = lam(path, t), lam(path, s)
        (_, sigma_t), (alpha, sigma) = ab(path, t), ab(path, s)
        gain = alpha * integral(lambda u, upper=upper: np.exp(u - upper) * x0(u), lower, upper)
        found.append(sigma / sigma_t * found[-1] + gain * SCALES)
    return found


@checks("DPMpp3M", "UniPC3")
def test_methods_of_order_3_are_exact_for_a_parabola_of_lambda() -> None:
    """Whatever the steps; the one corrected by UniPC-3 even for a cubic."""
    for path in PATHS:
        x0 = Polynomial([0.4, -0.3, 0.8])
        denoise = told(path, "x0", lambda x, t, path=path, x0=x0: float(x0(lam(path, t))) * SCALES)
        truth = x0_trajectory(path, x0, UNEVEN, X)
        for solver in (DPMpp3M(), UniPC3(), UniPC3("bh1")):
            equal(walk(solver, denoise, UNEVEN, X, truth[:3])[0], truth[-1])
        x0 = Polynomial([0.4, -0.3, 0.8, 0.5])
        denoise = told(path, "x0", lambda x, t, path=path, x0=x0: float(x0(lam(path, t))) * SCALES)
        truth = x0_trajectory(path, x0, UNEVEN, X)
        for solver in (UniPC3(), UniPC3("bh1")):
            equal(walk(solver, denoise, UNEVEN, X, truth[:4])[1].x, truth[-2])


@checks("UniPC2")
def test_unipc_2_corrects_exactly_for_a_parabola_of_lambda() -> None:
    for path, variant in itertools.product(PATHS, ("bh1", "bh2")):
        x0 = Polynomial([0.4, -0.3, 0.8])
        denoise = told(path, "x0", lambda x, t, path=path, x0=x0: float(x0(lam(path, t))) * SCALES)
        truth = x0_trajectory(path, x0, UNEVEN, X)
        equal(walk(UniPC2(variant), denoise, UNEVEN, X, truth[:3])[1].x, truth[-2])


def opinions(path: Path, times: Sequence[float]) -> tuple[Denoise, list[Tensor]]:
    """An x0 that is told at each time, and without any form."""
    values = [SCALES * math.sin(3 * k + 1) + X * math.cos(k) for k in range(len(times))]
    return told(path, "x0", lambda x, t: values[times.index(t)]), values


@checks("UniPC2", "UniPC3")
def test_the_first_steps_of_unipc_as_published() -> None:
    """Zhao et al. 2023 algorithms 5 and 6 with data prediction; one divided difference alone has the weight 1/2."""
    times = UNEVEN[:3]
    for path, solver in itertools.product(PATHS, (UniPC2(), UniPC2("bh1"), UniPC3(), UniPC3("bh1"))):
        denoise, (m0, m1, _) = opinions(path, times)
        (_, s0), (a1, s1), (a2, s2) = (ab(path, t) for t in times)
        h1, h2 = (lam(path, s) - lam(path, t) for t, s in itertools.pairwise(times))
        b1, b2 = (h if solver.variant == "bh1" else 1 - math.exp(-h) for h in (h1, h2))
        predicted = s1 / s0 * X + a1 * (1 - math.exp(-h1)) * m0
        equal(walk(solver, denoise, times[:2], X)[0], predicted)
        corrected = predicted + a1 * b1 * 0.5 * (m1 - m0)
        out = s2 / s1 * corrected + a2 * (1 - math.exp(-h2)) * m1 + a2 * b2 * 0.5 * (m0 - m1) / (-h1 / h2)
        equal(walk(solver, denoise, times, X)[0], out)


@checks("DPMpp2M", "DPMpp3M", "DPMpp2MSDE")
def test_dpm_solver_2m_as_published() -> None:
    """Lu et al. 2022 algorithm 2: D = (1 + 1 / 2r) x0 - 1 / 2r x0_before, r = h_before / h; also how 3M warms up."""
    times = UNEVEN[:3]
    for path, solver in itertools.product(PATHS, (DPMpp2M(), DPMpp3M(), DPMpp2MSDE(eta=0))):
        denoise, (m0, m1, _) = opinions(path, times)
        (_, s0), (a1, s1), (a2, s2) = (ab(path, t) for t in times)
        h1, h2 = (lam(path, s) - lam(path, t) for t, s in itertools.pairwise(times))
        first = s1 / s0 * X - a1 * math.expm1(-h1) * m0
        d = (1 + h2 / (2 * h1)) * m1 - h2 / (2 * h1) * m0
        equal(walk(solver, denoise, times, X)[0], s2 / s1 * first - a2 * math.expm1(-h2) * d)


@checks("DPMpp3M")
def test_dpm_solver_3m_as_its_authors_compute_it() -> None:
    """With the second difference D1_0 - D1_1 over r0 + r1, in the place of the second derivative, twice as large."""
    times = UNEVEN[:4]
    for path in PATHS:
        denoise, (m2, m1, m0, _) = opinions(path, times)
        before = walk(DPMpp2M(), denoise, times[:3], X)[0]
        h2, h1, h = (lam(path, s) - lam(path, t) for t, s in itertools.pairwise(times))
        r0, r1 = h1 / h, h2 / h
        d10, d11 = (m0 - m1) / r0, (m1 - m2) / r1
        d1, d2 = d10 + r0 / (r0 + r1) * (d10 - d11), (d10 - d11) / (r0 + r1)
        phi1 = math.expm1(-h)
        phi2 = phi1 / h + 1
        phi3 = phi2 / h - 0.5
        (_, s_t), (a, s) = ab(path, times[2]), ab(path, times[3])
        out = s / s_t * before - a * phi1 * m0 + a * phi2 * d1 - a * phi3 * d2
        equal(walk(DPMpp3M("published"), denoise, times, X)[0], out)


@checks("DEIS2", "DEIS3")
def test_deis_is_exact_for_a_polynomial_eps() -> None:
    """Of lambda, or of time for tAB-DEIS; the integral over time is taken over lambda here."""
    for path, (kind, degree), variable in itertools.product(PATHS, ((DEIS2, 1), (DEIS3, 2)), ("log_rho", "t")):
        eps = Polynomial([0.4, -0.9, 2.1][: degree + 1])

        def of_lambda(u: np.ndarray, path: Path = path, eps: Any = eps, variable: str = variable) -> np.ndarray:
            return eps(u if variable == "log_rho" else path.time(torch.as_tensor(2 * u)).numpy())

        denoise = told(path, "eps", lambda x, t, path=path, f=of_lambda: float(f(np.array(lam(path, t)))) * SCALES)
        truth = [X]
        for t, s in itertools.pairwise(UNEVEN):
            gain = integral(lambda u, f=of_lambda: -np.exp(-u) * f(u), lam(path, t), lam(path, s))
            alpha_t, alpha = ab(path, t)[0], ab(path, s)[0]
            truth.append(alpha / alpha_t * truth[-1] + alpha * gain * SCALES)
        solver = kind(variable)
        equal(walk(solver, denoise, UNEVEN, X, truth[: degree + 1])[0], truth[-1])
        first = walk(solver, denoise, UNEVEN[:2], X)[0]  # of order 1, and so DDIM
        equal(first, walk(DDIM(), denoise, UNEVEN[:2], X)[0])


EXPONENTIAL: tuple[Any, ...] = (
    *(DPMpp2M(), DPMpp3M(), DPMpp2MSDE(eta=0), DEIS2(), DEIS2("t"), DEIS3(), DEIS3("t")),
    *(UniPC2(), UniPC2("bh1"), UniPC3(), UniPC3("bh1"), EDMStochasticHeun()),
)


@checks("DPMpp2M", "DPMpp3M", "DEIS2", "DEIS3", "UniPC2", "UniPC3", "DPMpp2MSDE", "EDMStochasticHeun")
def test_both_ends_of_time_are_exact_for_a_constant_x0() -> None:
    """From alpha = 0, where log-SNR is -infinite, to sigma = 0, where it is infinite, and in one step from one to the
    other. x0 changes at the first time only, so that nothing of it may be left after the second."""
    for path, solver in itertools.product((Linear(), Linear(2.0), GVP()), EXPONENTIAL):
        # v is regular everywhere: with x = alpha x0 + sigma eps it is alpha eps - sigma x0
        def v(x: Tensor, t: float, path: Path = path) -> Tensor:
            alpha, sigma = ab(path, t)
            return alpha * (x - alpha * SCALES) / sigma - sigma * SCALES

        noise = X * path.prior_std
        denoise = told(path, "v", v)
        for t in (0.8, 0.3):
            alpha, sigma = ab(path, t)
            eps = noise / ab(path, 1.0)[1]
            equal(walk(solver, denoise, (1.0, t), noise)[0], alpha * SCALES + sigma * eps)
            equal(walk(solver, denoise, (1.0, 0.9, 0.85, t), noise)[0], alpha * SCALES + sigma * eps)
        equal(walk(solver, denoise, (1.0, 0.0), noise)[0], SCALES)
        equal(walk(solver, denoise, (1.0, 0.6, 0.4, 0.0), noise)[0], SCALES)


@checks("DPMpp2M", "DPMpp3M", "DEIS2", "DEIS3", "UniPC2", "UniPC3", "DPMpp2MSDE")
def test_the_step_to_the_data_is_the_prediction_whatever_was_said_before() -> None:
    times = (0.9, 0.6, 0.4, 0.0)
    for path, solver in itertools.product(PATHS, EXPONENTIAL):
        denoise, values = opinions(path, times)
        equal(walk(solver, denoise, times, X)[0], values[2])


@checks("DPMpp2M", "DPMpp3M", "DEIS2", "DEIS3", "UniPC2", "UniPC3", "DPMpp2MSDE")
def test_lower_orders_at_the_end() -> None:
    """With `lower_order_final` the last step has order 1, the one before 2: on a grid of fewer than 15 steps, or always
    (UniPC)."""
    pairs = ((DPMpp2M, DPMpp2M), (DPMpp3M, DPMpp2M), (DEIS2, DEIS2), (DEIS3, DEIS2), (UniPC2, UniPC2), (UniPC3, UniPC2))
    for path, steps, (kind, second) in itertools.product(PATHS[:2], (4, 14, 15), (*pairs, (DPMpp2MSDE, DPMpp2M))):
        lowered = steps < 15 or kind in (UniPC2, UniPC3)
        extra: dict[str, Any] = {"eta": 0.0} if kind is DPMpp2MSDE else {}
        times = tuple(float(t) for t in np.linspace(0.9, 0.2, steps + 1))
        denoise, values = opinions(path, times)
        solver: Any = kind(lower_order_final=True, **extra)
        before, x, state = X, X, solver.init(X, times)
        for t, s in itertools.pairwise(times):
            before, remembered = x, state
            x, state = solver.step(denoise, x, t, s, state, NO_NOISE)
            if s == times[-2]:
                plain = second() if lowered else kind(**extra)
                equal(x, plain.step(denoise, before, t, s, remembered, NO_NOISE)[0])
        before = getattr(state, "x", before)  # corrected
        (_, sigma_t), (alpha, sigma) = ab(path, times[-2]), ab(path, times[-1])
        first_order = (
            sigma / sigma_t * before - alpha * math.expm1(lam(path, times[-2]) - lam(path, times[-1])) * values[-2]
        )
        assert torch.allclose(x, first_order, rtol=1e-9, atol=1e-10) == lowered


# DDIM, DDPM and the stochastic solvers

Z = torch.tensor([[0.2, -0.7], [1.4, 0.1], [-0.9, -1.1]], dtype=torch.float64)
ONE_NOISE = Replay({"solver": Z})


@checks("DDIM", "Ancestral")
def test_ddim_and_ddpm_as_published() -> None:
    """Song et al. 2020 equations 12 and 16, Ho et al. 2020 equation 7, in alpha and sigma."""
    for path, (t, s) in itertools.product((*PATHS, DDPM()), ((0.8, 0.6), (0.3, 0.1))):
        (a_t, s_t), (a, sigma) = ab(path, t), ab(path, s)
        x0, eps = (X - s_t * SCALES) / a_t, SCALES
        denoise = told(path, "eps", lambda x, t: SCALES)
        beta = 1 - (a_t / a) ** 2 if path in (VP(), GVP(), DDPM()) else s_t**2 - (a_t / a * sigma) ** 2
        posterior_std = sigma / s_t * math.sqrt(beta)
        for eta in (0.0, 0.6, 1.0):
            std = eta * posterior_std
            wanted = a * x0 + math.sqrt(sigma**2 - std**2) * eps + std * Z
            equal(walk(DDIM(eta), denoise, (t, s), X, rng=ONE_NOISE)[0], wanted)
        mean = a_t / a * sigma**2 / s_t**2 * X + a * beta / s_t**2 * x0
        for variance, std in (("posterior", posterior_std), ("beta", math.sqrt(beta))):
            equal(walk(Ancestral(variance), denoise, (t, s), X, rng=ONE_NOISE)[0], mean + std * Z)


@checks("Ancestral")
def test_a_learned_variance_lies_between_its_bounds_in_logarithms() -> None:
    path, t, s = VP(), 0.5, 0.4
    q = posterior(path, t, s)
    for raw, log_std in ((-1.0, 0.5 * q.variance.log()), (1.0, 0.5 * q.beta.log()), (0.4, None)):
        denoise = told(path, "eps", lambda x, t: SCALES)
        with_variance = lambda x, t, raw=raw, d=denoise: replace(d(x, t), extra=torch.full_like(x, raw))  # noqa: E731
        if log_std is None:
            log_std = 0.5 * (0.7 * q.beta.log() + 0.3 * q.variance.log())
        out = walk(Ancestral(), with_variance, (t, s), X, rng=ONE_NOISE)[0]
        still = walk(Ancestral(), with_variance, (t, s), X, rng=Replay({"solver": torch.zeros_like(Z)}))[0]
        equal(out - still, float(log_std.exp()) * Z)


def constant_x0(path: Path) -> Denoise:
    return told(path, "x0", lambda x, t: 0 * x + 0.7)


@checks("DPMpp2MSDE", "EDMStochasticHeun")
def test_a_constant_x0_keeps_its_law() -> None:
    """Where the data are one point, 0.7, every x_t ~ N(0.7 alpha, sigma^2): a step must keep it, whatever its noise."""
    solvers: list[Any] = [DPMpp2MSDE(eta) for eta in (0.0, 0.5, 1.0, 1.7)]
    solvers += [EDMStochasticHeun(churn) for churn in (0.0, 0.4, 1.0, 40.0)]
    for path, solver in itertools.product((*PATHS, DDPM()), solvers):
        times = (0.9, 0.7, 0.4, 0.2)
        for stop in (2, 3, 4):
            alpha, sigma = ab(path, times[0])
            rows, state = torch.zeros(stop + 1, 1, dtype=torch.float64), None
            # the first rows: the mean, a deviation of x, the noise of each step
            x = 0.7 * alpha + rows
            x[1] += sigma
            state = solver.init(x, times)
            for k, (t, s) in enumerate(itertools.pairwise(times[:stop])):
                z = torch.zeros(stop + 1, 1, dtype=torch.float64)
                z[2 + k] = 1
                x, state = solver.step(constant_x0(path), x, t, s, state, Replay({"solver": z}))
            alpha, sigma = ab(path, times[stop - 1])
            assert float(x[0]) == pytest.approx(0.7 * alpha, rel=1e-9)
            assert float((x[1:] - x[0]).square().sum()) == pytest.approx(sigma**2, rel=1e-9)
            if solver in (DPMpp2MSDE(0.0), EDMStochasticHeun(0.0)):
                assert float((x[2:] - x[0]).abs().max()) == 0


@checks("DPMpp2MSDE")
def test_the_noise_of_dpm_solver_sde_is_that_of_the_reverse_sde() -> None:
    """Lu et al. 2022 equation 21 with eta = 1 (its posterior is DDPM's), and the second term of 2M."""
    times = UNEVEN[:3]
    for path in PATHS:
        denoise, (m0, m1, _) = opinions(path, times)
        (_, s0), (a1, s1), (a2, s2) = (ab(path, t) for t in times)
        h1, h2 = (lam(path, s) - lam(path, t) for t, s in itertools.pairwise(times))
        first = (
            s1 / s0 * math.exp(-h1) * X + a1 * (1 - math.exp(-2 * h1)) * m0 + s1 * math.sqrt(1 - math.exp(-2 * h1)) * Z
        )
        q = posterior(path, times[0], times[1])
        equal(first, float(q.of_x) * X + float(q.of_x0) * m0 + math.sqrt(float(q.variance)) * Z)
        equal(walk(DPMpp2MSDE(), denoise, times[:2], X, rng=ONE_NOISE)[0], first)
        d = m1 + h2 / (2 * h1) * (m1 - m0)
        out = (
            s2 / s1 * math.exp(-h2) * first
            + a2 * (1 - math.exp(-2 * h2)) * d
            + s2 * math.sqrt(1 - math.exp(-2 * h2)) * Z
        )
        equal(walk(DPMpp2MSDE(), denoise, times, X, rng=ONE_NOISE)[0], out)


@checks("EDMStochasticHeun")
def test_edms_sampler_as_published() -> None:
    """Karras et al. 2022 algorithm 2, in the frame x / alpha; exact, without churn, for an eps linear in sigma."""
    for path, (t, s) in itertools.product(PATHS, ((0.8, 0.6), (0.3, 0.1))):

        def eps(x: Tensor, t: float, path: Path = path) -> Tensor:
            alpha, sigma = ab(path, t)
            return (0.4 + 1.5 * sigma / alpha) * SCALES + 0.3 * x

        denoise = told(path, "eps", eps)
        rho_t, rho_s = (ab(path, u)[1] / ab(path, u)[0] for u in (t, s))
        for churn, low, high, factor in (
            (0.0, 0.0, None, 1.0),
            (0.3, 0.0, None, 1.1),
            (9.0, 0.0, None, 0.9),
        ):
            solver = EDMStochasticHeun(churn, low, high, factor)
            gamma = min(churn / 2, math.sqrt(2) - 1)
            hat = (1 + gamma) * rho_t
            t_hat = float(path.time(-2 * math.log(hat)))
            y = X / ab(path, t)[0] + math.sqrt(hat**2 - rho_t**2) * factor * Z
            d = eps(y * ab(path, t_hat)[0], t_hat)
            euler = y + (rho_s - hat) * d
            out = y + (rho_s - hat) * (d + eps(euler * ab(path, s)[0], s)) / 2
            x, _ = solver.step(denoise, X, t, s, solver.init(X, (t, s, s / 2)), ONE_NOISE)
            equal(x, out * ab(path, s)[0])
        for low, high in ((1.001 * rho_t, None), (0.0, 0.999 * rho_t)):  # outside of the range there is no churn
            solver = EDMStochasticHeun(0.3, low, high)
            x, _ = solver.step(denoise, X, t, s, solver.init(X, (t, s, s / 2)), NO_NOISE)
            equal(x, walk(EDMStochasticHeun(), denoise, (t, s), X)[0])
        for low, high in ((rho_t, None), (0.0, rho_t)):  # its ends are inside
            solver = EDMStochasticHeun(0.3, low, high)
            x, _ = solver.step(denoise, X, t, s, solver.init(X, (t, s, s / 2)), ONE_NOISE)
            assert float((x - walk(EDMStochasticHeun(), denoise, (t, s), X)[0]).abs().max()) > 1e-3
        equal(
            walk(EDMStochasticHeun(9.0), denoise, (0.1, 0.0), X, rng=Replay({"solver": 0 * Z}))[0], _edm_last(path, eps)
        )
        # no time is noisier than t = 1, and none is reached that is noisier
        walk(EDMStochasticHeun(9.0), told(path, "v", lambda x, t: SCALES + x), (1.0, 0.6), X * path.prior_std)
    late = EDMStochasticHeun(9.0)
    x, _ = late.step(told(VE(), "eps", lambda x, t: 0 * x), X, 0.99, 0.6, late.init(X, (0.99, 0.6)), ONE_NOISE)
    equal(x, X + 80 * math.sqrt(1 - 0.99**2) * Z)


def _edm_last(path: Path, eps: Callable[[Tensor, float], Tensor]) -> Tensor:
    """A churned step from t = 0.1 to the data, with the noise 0: the x0 predicted at the raised level."""
    hat = math.sqrt(2) * ab(path, 0.1)[1] / ab(path, 0.1)[0]
    t_hat = float(path.time(-2 * math.log(hat)))
    alpha, sigma = ab(path, t_hat)
    x = X / ab(path, 0.1)[0] * alpha
    return (x - sigma * eps(x, t_hat)) / alpha


SIT_FORMS: dict[str, Callable[[Path, float, float], float]] = {
    # in SiT's time u = 1 - t, with n the norm
    "constant": lambda path, u, n: n,
    "sigma": lambda path, u, n: n * ab(path, 1 - u)[1],
    "linear": lambda path, u, n: n * (1 - u),
    "decreasing": lambda path, u, n: 0.25 * (n * math.cos(math.pi * u) + 1) ** 2,
    "increasing-decreasing": lambda path, u, n: n * math.sin(math.pi * u) ** 2,
    # alpha' / alpha sigma^2 - sigma sigma', derived from log-SNR by central differences
    "SBDM": lambda path, u, n: n * ab(path, 1 - u)[1] ** 2 * (lam(path, 1 - u - 1e-5) - lam(path, 1 - u + 1e-5)) / 2e-5,
}


@checks("SiTSDE")
def test_sits_step_as_published() -> None:
    """Euler-Maruyama in SiT's time u = 1 - t: x + (v + w score) du + sqrt(2 w du) z; and each kind of last step."""
    for path, (form, w), norm, t in itertools.product(PATHS, SIT_FORMS.items(), (1.0, 0.6), (0.35, 0.8)):
        denoise = told(path, "eps", lambda x, t: SCALES + 0.2 * x)
        said = denoise(X, t)
        score, v = -(SCALES + 0.2 * X) / ab(path, t)[1], -said.velocity
        for s in (t - 0.25, 0.0):
            du, diffusion = t - s, w(path, 1 - t, norm)
            drifted = X + (v + diffusion * score) * du
            noisy = drifted + math.sqrt(2 * diffusion * du) * Z
            ends = {"Mean": drifted, "Tweedie": said.x0, "Euler": X + v * du, None: noisy}
            for last, end in ends.items():
                out = walk(SiTSDE(form, norm, last), denoise, (t, s), X, rng=ONE_NOISE)[0]
                assert_close(out, end if s == 0 else noisy, rtol=1e-7, atol=1e-7)


# the likelihood


@checks("log_likelihood")
def test_the_likelihood_of_a_gaussian_is_its_density() -> None:
    """Its flow multiplies by a number, so that any Rademacher probe gives the divergence exactly."""
    x0 = torch.tensor([[-1.0, 0.3, 0.1], [0.7, 0.7, 0.2], [2.5, 0.1, -0.4]], dtype=torch.float64)
    for prediction, law, scale in (("velocity", "rademacher", 1.0), ("v", "rademacher", 2.0)):
        exact = Exact(Linear(scale), [[0.7, 0.2, -0.1]], [0.5], [1.0], prediction)
        rng = Rng(0).at(0, torch.arange(3))
        ends = (0.0, 1.0) if prediction == "velocity" else (1e-6, 1.0)
        found = log_likelihood(
            exact.denoiser(), x0, NOTHING, rng, prior_std=scale, law=law, probes=2, ends=ends, rtol=1e-7, atol=1e-7
        )
        assert_close(found.nats, exact.log_density(x0), rtol=1e-5, atol=2e-5)
        bits = -exact.log_density(x0) / math.log(2) / 3
        assert_close(found.bits_per_dim(), bits, rtol=1e-5, atol=2e-5)
        assert_close(found.bits_per_dim(2 / 256), bits + 7, rtol=1e-5, atol=2e-5)
        assert found.nfe == len(exact.calls)


@checks("log_likelihood")
def test_what_the_likelihood_refuses_and_how_its_probes_fall() -> None:
    assert Rademacher()(torch.tensor([0.001, 0.499, 0.501, 0.999])).tolist() == [-1, -1, 1, 1]
    denoiser, rng = gaussian(Linear(), prediction="v").denoiser(), Rng(0).at(0, torch.arange(3))
    refused: tuple[tuple[dict[str, Any], str], ...] = (
        ({"law": "cauchy"}, "'rademacher' or 'normal', not 'cauchy'"),
        ({"probes": 0}, "at least 1 probe"),
        ({"ends": (0.0, 1.005)}, "ends 0 <= low < high <= 1"),
        ({"ends": (0.5, 0.5)}, "ends 0 <= low < high <= 1"),
    )
    for settings, message in refused:
        with pytest.raises(DitkitError, match=message):
            log_likelihood(denoiser, X, NOTHING, rng, **settings)
    with pytest.raises(DitkitError, match="cannot be read"):
        log_likelihood(gaussian(Linear(), prediction="x0").denoiser(), X, NOTHING, rng)
