"""Solvers against diffusers' schedulers: same timesteps, noise and linear network; their coefficients are float32."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_deis_multistep import DEISMultistepScheduler
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
from diffusers.schedulers.scheduling_euler_discrete import EulerDiscreteScheduler
from diffusers.schedulers.scheduling_heun_discrete import HeunDiscreteScheduler
from diffusers.schedulers.scheduling_unipc_multistep import UniPCMultistepScheduler
from torch import Tensor
from torch.testing import assert_close

from ditkit.diffusion import (
    DDIM,
    DDPM,
    DEIS2,
    DEIS3,
    DPMpp2M,
    DPMpp2MSDE,
    DPMpp3M,
    EDMStochasticHeun,
    UniPC2,
    UniPC3,
    integrate,
)
from ditkit.rng import Replay

from ..exact import NOTHING, Started, told

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of numpy, in diffusers

PATH = DDPM()
X = torch.randn(3, 2, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
NOISES = torch.randn(40, 3, 2, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(6))


def eps(x: Tensor, t: float) -> Tensor:
    """Linear in x, and of time."""
    return (0.3 + 0.6 * t) * x + 0.2 * x.roll(1, -1) - 0.1 * t


def ours(solver: Any, times: tuple[float, ...], x: Tensor = X) -> Tensor:
    draws = Replay({"solver": list(NOISES)})
    return integrate(Started(told(PATH, "eps", eps)), solver, times, x, NOTHING, draws)


def theirs(scheduler: Any, n: int, **options: Any) -> tuple[Tensor, tuple[float, ...]]:
    """Their sample, and the times that they visited; the last is the data, or the table's first entry."""
    scheduler.set_timesteps(n)
    x, visited = X, []
    for k, t in enumerate(scheduler.timesteps):
        visited.append((int(t) + 1) / 1000)
        if isinstance(scheduler, DPMSolverMultistepScheduler):
            options["variance_noise"] = NOISES[k]
        x = scheduler.step(eps(x, visited[-1]), t, x, return_dict=False, **options)[0]
    assert_close(x, x.nan_to_num())
    return x, (*visited, 0.0 if float(getattr(scheduler, "sigmas", torch.zeros(1))[-1]) == 0 else 1 / 1000)


# diffusers lowers the order at the end unless told otherwise (DPM-Solver and DEIS on fewer than 15 steps); its third
# order of DPM-Solver++ is the published one; its "bh1" is NaN on a step to sigma = 0, so it ends at the first entry
TABLE = {"beta_start": 1e-4, "beta_end": 2e-2, "beta_schedule": "linear"}
PAIRS: dict[str, tuple[Callable[..., Any], dict[str, Any], Any]] = {
    "dpmpp_2m": (DPMSolverMultistepScheduler, {"solver_order": 2}, DPMpp2M()),
    "dpmpp_3m": (
        DPMSolverMultistepScheduler,
        {"solver_order": 3, "lower_order_final": False},
        DPMpp3M("published"),
    ),
    "dpmpp_3m, lower orders": (
        DPMSolverMultistepScheduler,
        {"solver_order": 3},
        DPMpp3M("published", lower_order_final=True),
    ),
    "dpmpp_2m_sde": (
        DPMSolverMultistepScheduler,
        {"solver_order": 2, "algorithm_type": "sde-dpmsolver++"},
        DPMpp2MSDE(eta=1.0),
    ),
    "unipc_2": (UniPCMultistepScheduler, {"solver_order": 2}, UniPC2(lower_order_final=True)),
    "unipc_2 bh1": (
        UniPCMultistepScheduler,
        {"solver_order": 2, "solver_type": "bh1", "final_sigmas_type": "sigma_min"},
        UniPC2("bh1", lower_order_final=True),
    ),
    "unipc_3": (UniPCMultistepScheduler, {"solver_order": 3}, UniPC3(lower_order_final=True)),
    "unipc_3 bh1": (
        UniPCMultistepScheduler,
        {"solver_order": 3, "solver_type": "bh1", "final_sigmas_type": "sigma_min"},
        UniPC3("bh1", lower_order_final=True),
    ),
    "deis_2": (DEISMultistepScheduler, {"solver_order": 2}, DEIS2(lower_order_final=True)),
    "deis_3": (DEISMultistepScheduler, {"solver_order": 3}, DEIS3(lower_order_final=True)),
    "ddim": (DDIMScheduler, {"clip_sample": False, "timestep_spacing": "trailing"}, DDIM()),
}


@pytest.mark.parametrize("n", [5, 10, 20])
@pytest.mark.parametrize("name", PAIRS)
def test_the_same_timesteps_give_the_same_sample(name: str, n: int) -> None:
    build, settings, solver = PAIRS[name]
    out, times = theirs(build(**TABLE, **settings), n)
    assert_close(ours(solver, times), out, rtol=1e-5, atol=1e-5)


def test_bh1_reaches_the_data_here_and_not_there() -> None:
    scheduler: Any = UniPCMultistepScheduler(**TABLE, solver_order=2, solver_type="bh1")
    scheduler.set_timesteps(5)
    x = X
    for t in scheduler.timesteps:
        x = scheduler.step(eps(x, (int(t) + 1) / 1000), t, x).prev_sample
    assert bool(x.isnan().all())
    times = (*((int(t) + 1) / 1000 for t in scheduler.timesteps), 0.0)
    assert bool(ours(UniPC2("bh1"), times).isfinite().all())


@pytest.mark.parametrize("n", [5, 10, 20])
@pytest.mark.parametrize(
    ("build", "solver"), [(EulerDiscreteScheduler, DDIM()), (HeunDiscreteScheduler, EDMStochasticHeun())], ids=str
)
def test_euler_and_heun_in_the_frame_of_edm(build: Any, solver: Any, n: int) -> None:
    """diffusers' Euler steps sigma in the frame x / alpha: it is DDIM; its Heun is EDM's without churn."""
    scheduler = build(**TABLE, timestep_spacing="trailing")
    scheduler.set_timesteps(n)
    visited = [(int(t) + 1) / 1000 for t in scheduler.timesteps]
    times = (*dict.fromkeys(visited), 0.0)
    x = X / float(PATH(times[0])[0])
    for t, time in zip(scheduler.timesteps, visited, strict=True):
        seen = scheduler.scale_model_input(x, t)
        x = scheduler.step(eps(seen, time), t, x).prev_sample
    assert_close(ours(solver, times), x.double(), rtol=1e-5, atol=1e-5)
