"""Paths, spaces, denoisers, objectives, grids, solvers and guides; knows no layer and no model."""

from .denoiser import Denoise, Denoiser, Meaning, Prediction
from .grid import Grid
from .guidance import CFG, Guide, Guided, guide
from .objective import Discrete, LogitNormal, Loss, MinSNR, Objective, Regression, TimeSampler, Uniform
from .path import DDPM, Linear, Path, Time, log_snr
from .posterior import Posterior, posterior
from .solvers import DDIM, Ancestral, Euler, Heun, Solver, check_grid, integrate
from .space import SPACES, det, reading, row, singular_ends

__all__ = [
    "CFG",
    "DDIM",
    "DDPM",
    "SPACES",
    "Ancestral",
    "Denoise",
    "Denoiser",
    "Discrete",
    "Euler",
    "Grid",
    "Guide",
    "Guided",
    "Heun",
    "Linear",
    "LogitNormal",
    "Loss",
    "Meaning",
    "MinSNR",
    "Objective",
    "Path",
    "Posterior",
    "Prediction",
    "Regression",
    "Solver",
    "Time",
    "TimeSampler",
    "Uniform",
    "check_grid",
    "det",
    "guide",
    "integrate",
    "log_snr",
    "posterior",
    "reading",
    "row",
    "singular_ends",
]
