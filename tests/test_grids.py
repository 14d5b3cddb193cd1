"""Grids: each against its reference, written here again or taken from diffusers' schedulers."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_edm_euler import EDMEulerScheduler
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler

from ditkit.config import DitkitError, from_json, lookup, names, to_json
from ditkit.diffusion import DDPM, GVP, VE, VP, Linear, Meaning, log_snr
from ditkit.diffusion.grid import SD3, Diffusers, Exponential, Flux, Karras, Leading, SiT, Trailing, Uniform
from ditkit.pipeline import Pipeline
from ditkit.recipe import Recipe, Sample


def grid(name: str, n: int, path: Any) -> tuple[float, ...]:
    return lookup("grid", name)()(n, path, 256)


def published_respacing(n: int, steps: int) -> list[int]:
    """Nichol & Dhariwal: a fractional stride, added up, each place rounded half to even."""
    if n == 1:
        return [0]
    places = np.cumsum(np.concatenate(([0.0], np.full(n - 1, (steps - 1) / (n - 1)))))
    return [int(i) for i in np.rint(places)]


@pytest.mark.parametrize("steps", [1000, 50])
@pytest.mark.parametrize("n", [250, 100, 50, 10, 7, 2, 1, 1000, 999, 334, 29])
def test_the_respaced_table_is_the_published_one(n: int, steps: int) -> None:
    if n > steps:
        with pytest.raises(DitkitError, match=f"{n} steps were asked of a path of {steps}"):
            grid("ddpm", n, DDPM(steps))
        return
    path = DDPM(steps)
    times = grid("ddpm", n, path)
    assert path.index(torch.tensor(times)).tolist() == [*reversed(published_respacing(n, steps)), -1]
    assert len(times) == n + 1
    assert all(t > s for t, s in itertools.pairwise(times))
    if n > 1:
        assert times[0] == 1.0


@pytest.mark.parametrize(("n", "stride"), [(1000, 1), (500, 2), (250, 4), (100, 10), (50, 20), (10, 100), (334, 3)])
def test_whole_strides_start_from_the_cleanest_entry(n: int, stride: int) -> None:
    path = DDPM()
    index = path.index(torch.tensor(grid("ddpm_integer", n, path))).tolist()
    assert index == [*reversed(range(0, 1000, stride)), -1]


@pytest.mark.parametrize("n", [400, 999, 501, 49])
def test_a_count_without_a_whole_stride_is_refused(n: int) -> None:
    assert n not in {len(range(0, 1000, stride)) for stride in range(1, 1000)}
    with pytest.raises(DitkitError, match=f"keeps exactly {n}: use the grid 'ddpm'"):
        grid("ddpm_integer", n, DDPM())


@pytest.mark.parametrize("n", [1, 2, 3, 7, 50, 999])
def test_the_uniform_grid_has_equal_steps_and_both_ends(n: int) -> None:
    times = grid("uniform", n, Linear())
    assert times[0] == 1.0
    assert times[-1] == 0.0
    np.testing.assert_allclose(-np.diff(times), 1 / n, rtol=1e-12)


OF_A_TABLE = ("ddpm", "ddpm_integer", "leading", "trailing")


@pytest.mark.parametrize("name", names("grid"))
@pytest.mark.parametrize("n", [2, 5, 10, 50])
def test_every_grid_is_a_pure_function_that_decreases_to_the_data(name: str, n: int) -> None:
    for path in (DDPM(),) if name in OF_A_TABLE else (Linear(), Linear(2.0), GVP(), VP(), VE()):
        times = grid(name, n, path)
        assert times == grid(name, n, path)
        assert len(times) == n + 1
        assert all(isinstance(t, float) for t in times)
        assert all(t > s for t, s in itertools.pairwise(times))
        assert times[-1] == 0
        assert 0.9 < times[0] <= 1 or name in ("ddpm_integer", "leading")  # these leave the noisiest entries out
    settings = lookup("grid", name)()
    assert from_json(to_json(settings)) == settings


@pytest.mark.parametrize("name", names("grid"))
def test_grids_refuse_what_they_cannot_give(name: str) -> None:
    for n in (0, -1):
        with pytest.raises(DitkitError, match=f"at least 1 step, not {n}"):
            grid(name, n, DDPM())
    if name in OF_A_TABLE:
        with pytest.raises(DitkitError, match="needs a DDPM path: use the grid 'uniform'"):
            grid(name, 10, Linear())


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: Karras(sigma_min=0), "0 < sigma_min < sigma_max, not 0 and 80"),
        (lambda: Exponential(2.0, 1.0), "0 < sigma_min < sigma_max, not 2.0 and 1.0"),
        (lambda: Karras(rho=0), "grid.rho must be above 0"),
        (lambda: SD3(0.0), "grid.shift must be above 0"),
        (lambda: Diffusers(-1.0), "grid.shift must be above 0"),
        (lambda: Flux(base_length=4096), "base_length 4096 must be below grid.max_length"),
        (lambda: SiT(eps=0.5), r"lie in \[0, 0.5\)"),
        (lambda: SiT(last_step=0.04)(1, Linear(), 0), "takes at least 2 steps"),
        (lambda: Leading(offset=20)(50, DDPM(), 0), "offset of 20 leads beyond the 1000 steps"),
        (lambda: Sample(grid="karas"), "unknown grid 'karas': did you mean karras"),
        (lambda: Sample(grid=Linear()), "sample.grid cannot be a path"),
    ],
)
def test_parameters_that_make_no_grid_are_refused(wrong: Any, message: str) -> None:
    with pytest.raises(DitkitError, match=message):
        wrong()


# references


@pytest.mark.parametrize("n", [2, 3, 10, 18, 50])
def test_karras_and_exponential_are_edms(n: int) -> None:
    cases: list[Any] = [("karras", Karras()), ("exponential", Exponential())]
    for name, ours in cases:
        reference: Any = EDMEulerScheduler(sigma_min=0.002, sigma_max=80.0, rho=7.0, sigma_schedule=name)
        reference.set_timesteps(n)
        np.testing.assert_allclose(np.array(ours(n, VE(80.0), 0)) * 80, reference.sigmas.numpy(), rtol=2e-5, atol=1e-9)


@pytest.mark.parametrize("path", [Linear(), Linear(2.0), GVP(), VP()], ids=str)
def test_noise_levels_are_the_same_on_every_path(path: Any) -> None:
    for ours in (Karras(0.01, 50.0), Exponential(0.01, 50.0)):
        there = torch.tensor(ours(12, path, 0)[:-1], dtype=torch.float64)
        edm = torch.tensor(ours(12, VE(80.0), 0)[:-1], dtype=torch.float64)
        torch.testing.assert_close(log_snr(path, there), log_snr(VE(80.0), edm), rtol=1e-9, atol=1e-9)
    steps = log_snr(path, torch.tensor(Exponential(0.01, 50.0)(12, path, 0)[:-1], dtype=torch.float64)).diff()
    torch.testing.assert_close(steps, steps.mean().expand(11), rtol=1e-9, atol=0)


def test_levels_that_the_path_does_not_reach_cannot_repeat_unseen() -> None:
    """The VP path ends at a level of 152: two levels above it fall together, and the sampler refuses the grid."""
    times = Karras(sigma_max=1000.0)(6, VP(), 0)
    assert times[0] == times[1] == 1.0


@pytest.mark.parametrize(("n", "shift"), [(10, 3.0), (28, 3.0), (50, 1.0), (5, 10.0), (16, 0.3)])
def test_diffusers_shift_is_applied_twice_to_its_end_and_sd3s_once(n: int, shift: float) -> None:
    reference: Any = FlowMatchEulerDiscreteScheduler(shift=shift)
    reference.set_timesteps(n)
    np.testing.assert_allclose(Diffusers(shift)(n, Linear(), 0), reference.sigmas.numpy(), rtol=1e-5, atol=1e-7)
    # the published shift, from equal steps that diffusers is given
    reference.set_timesteps(sigmas=[1 - i / n for i in range(n)])
    np.testing.assert_allclose(SD3(shift)(n, Linear(), 0), reference.sigmas.numpy(), rtol=1e-5, atol=1e-7)


def test_a_shift_moves_the_log_snr_by_a_constant_and_shifts_compose() -> None:
    times = torch.tensor(SD3(3.0)(20, Linear(), 0)[1:-1], dtype=torch.float64)
    plain = torch.tensor(Uniform()(20, Linear(), 0)[1:-1], dtype=torch.float64)
    moved = log_snr(Linear(), times) - log_snr(Linear(), plain)
    torch.testing.assert_close(moved, torch.full_like(moved, -2 * math.log(3)), rtol=1e-12, atol=0)
    # LightningDiT's shift of 0.3 runs in a time of its own
    theirs = 1 - plain
    theirs = 0.3 * theirs / (1 + (0.3 - 1) * theirs)
    ours = torch.tensor(SD3(1 / 0.3)(20, Linear(), 0)[1:-1], dtype=torch.float64)
    torch.testing.assert_close(ours, 1 - theirs, rtol=1e-12, atol=0)


@pytest.mark.parametrize(("n", "length"), [(4, 256), (50, 4096), (28, 1024), (10, 9000)])
def test_flux_shifts_by_the_number_of_tokens(n: int, length: int) -> None:
    assert Flux().mu(256) == pytest.approx(0.5)
    assert Flux().mu(4096) == pytest.approx(1.15)
    reference: Any = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    reference.set_timesteps(sigmas=[1 - i / n for i in range(n)], mu=Flux().mu(length))
    np.testing.assert_allclose(Flux()(n, Linear(), length), reference.sigmas.numpy(), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("n", [5, 10, 30, 50, 250, 999])
def test_leading_and_trailing_are_diffusers(n: int) -> None:
    cases: list[Any] = [("leading", Leading(), 0), ("leading", Leading(1), 1), ("trailing", Trailing(), 0)]
    for spacing, ours, offset in cases:
        reference: Any = DDIMScheduler(timestep_spacing=spacing, steps_offset=offset)
        reference.set_timesteps(n)
        assert DDPM().index(torch.tensor(ours(n, DDPM(), 0)[:-1])).tolist() == reference.timesteps.tolist()
    assert Trailing()(n, DDPM(), 0)[0] == 1.0


def test_sit_stays_away_from_the_ends_that_its_prediction_cannot_bear() -> None:
    assert SiT()(4, Linear(), 0) == (1.0, 0.75, 0.5, 0.25, 0.0)
    np.testing.assert_allclose(SiT(1e-3)(2, GVP(), 0), (0.999, 0.5, 0.001), rtol=1e-12)
    np.testing.assert_allclose(SiT(1e-3)(2, VP(), 0), (1.0, 0.5005, 0.001), rtol=1e-12)
    np.testing.assert_allclose(SiT(1e-3, 0.04)(3, Linear(), 0), (0.999, 0.5195, 0.04, 0.0), rtol=1e-12)
    assert len(SiT(1e-3, 0.04)(250, VP(), 0)) == 251


@pytest.mark.parametrize("n", [1, 3, 50])
def test_no_shift_leads_beyond_noise(n: int) -> None:
    """shift / (1 + (shift - 1)) is 1 on paper, and 1 + 2e-16 for a shift of 0.1."""
    for shift in (0.1, 0.3, 1 / 0.3, 0.7, 1.0, 3.0, 7.1, 1e-6, 1e6):
        for times in (SD3(shift)(n, Linear(), 0), Diffusers(shift)(n, Linear(), 0)):
            assert times[0] == pytest.approx(1, abs=1e-9)
            assert all(0 <= t <= 1 for t in times)


def test_a_grid_that_visits_a_singular_end_is_refused_by_name(tiny: Recipe) -> None:
    model = tiny.model.build()
    recipe = Recipe(model=tiny.model, denoiser=Meaning(Linear(), "eps"), conditioner=tiny.conditioner)
    with pytest.raises(DitkitError, match="eps prediction cannot be read as velocity at t = 1, which the grid 'sd3'"):
        Pipeline(recipe, model, (1, 28, 28)).check(grid="sd3")
    Pipeline(recipe, model, (1, 28, 28)).check(grid=SiT(1e-3))
