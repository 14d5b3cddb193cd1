"""Solvers: one step from t to s < t with explicit state, and the loop over a grid.

A solver is a frozen dataclass with `order` (of the global error on a smooth problem), `nfe` (network evaluations a
step), `needs` (the spaces it reads), `init(x, times) -> state` and `step(denoise, x, t, s, state, rng) -> (x, state)`.
"""

from .adaptive import Dopri5, LogLikelihood, log_likelihood
from .exponential import DEIS2, DEIS3, DPMpp2M, DPMpp3M
from .multistep import AB2
from .one_step import DDIM, RK4, Ancestral, Euler, Heun, Midpoint
from .solver import Solver, check_grid, integrate
from .stochastic import DPMpp2MSDE, EDMStochasticHeun, SiTSDE
from .unipc import UniPC2, UniPC3

__all__ = [
    "AB2",
    "DDIM",
    "DEIS2",
    "DEIS3",
    "RK4",
    "Ancestral",
    "DPMpp2M",
    "DPMpp2MSDE",
    "DPMpp3M",
    "Dopri5",
    "EDMStochasticHeun",
    "Euler",
    "Heun",
    "LogLikelihood",
    "Midpoint",
    "SiTSDE",
    "Solver",
    "UniPC2",
    "UniPC3",
    "check_grid",
    "integrate",
    "log_likelihood",
]
