"""Spaces: what a number stands for, as a row `target = a x0 + b eps`, and the determinant algebra between them.

x0 (data), eps (noise), v = alpha eps - sigma x0 (Salimans & Ho 2022), velocity = dx/dt, score = -eps / sigma, and edm,
the F of EDM's preconditioning: x0 = c_skip x + c_out F (Karras et al. 2022 table 1), on any path by its sigma / alpha.

With here = (alpha, sigma) and det(p, q) = p0 q1 - p1 q0, a network's output `out` in space `have` is read in `want` by

    (det(want, have) x + det(here, want) out) / det(here, have)

and an error in `have` becomes an error in `want` by the gain det(here, want) / det(here, have). Both follow from
solving the 2 x 2 system x = alpha x0 + sigma eps, out = a x0 + b eps.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..config import DitkitError, lookup, names, near, register_name
from .path import Path, Time, as_time

__all__ = [
    "DATA_STD",
    "SPACES",
    "Row",
    "Singular",
    "det",
    "infinite_ends",
    "input_std",
    "reading",
    "regular_row",
    "row",
    "singular_ends",
]

Row = tuple[Tensor, Tensor]

DATA_STD = 0.5
"""sigma_data of EDM (Karras et al. 2022 table 1): the standard deviation that its space and input scaling assume."""


def _x0(path: Path, t: Time) -> Row:
    one = torch.ones_like(as_time(t))
    return one, 0 * one


def _eps(path: Path, t: Time) -> Row:
    one = torch.ones_like(as_time(t))
    return 0 * one, one


def _v(path: Path, t: Time) -> Row:
    alpha, sigma = path(t)
    return -sigma, alpha


def _velocity(path: Path, t: Time) -> Row:
    return path.rate(t)


def _score(path: Path, t: Time) -> Row:
    _, sigma = path(t)
    return 0 * sigma, -1 / sigma


def input_std(path: Path, t: Time) -> Tensor:
    """The standard deviation of x_t for data of standard deviation DATA_STD: what EDM divides a network's input by."""
    alpha, sigma = path(t)
    return (sigma.square() + (DATA_STD * alpha).square()).sqrt()


def _edm(path: Path, t: Time) -> Row:
    alpha, sigma = path(t)
    std = input_std(path, t)
    return sigma / (DATA_STD * std), -DATA_STD * alpha / std


_ROWS = {"x0": _x0, "eps": _eps, "v": _v, "velocity": _velocity, "score": _score, "edm": _edm}
for _name, _function in _ROWS.items():
    register_name("space", _name, _function)

SPACES = tuple(names("space"))


def row(space: str, path: Path, t: Time) -> Row:
    """The coefficients (a, b) of a space at time t. A leading "-" turns the sign: "-velocity" is SiT's output."""
    function: Callable[[Path, Time], Row] = lookup("space", space.removeprefix("-"))
    a, b = function(path, t)
    return (-a, -b) if space.startswith("-") else (a, b)


def det(p: Row, q: Row) -> Tensor:
    """p0 q1 - p1 q0."""
    return p[0] * q[1] - p[1] * q[0]


def singular_ends(space: str, path: Path) -> tuple[float, ...]:
    """The ends of time (0.0 data, 1.0 noise) at which x and an output in `space` do not determine x0 and eps."""
    ends = []
    for t in (0.0, 1.0):
        value = float(det(path(t), row(space, path, t)))
        if not math.isfinite(value) or abs(value) < 1e-9:
            ends.append(t)
    return tuple(ends)


def infinite_ends(space: str, path: Path) -> tuple[float, ...]:
    """The ends of time at which a number in `space` is infinite itself (the score of data)."""
    return tuple(t for t in (0.0, 1.0) if not all(math.isfinite(c) for c in row(space, path, t)))


class Singular(DitkitError):
    """An output does not determine what is to be read from it."""


def _away(t: Tensor, ends: tuple[float, ...], t_eps: float) -> Tensor:
    """Times at least `t_eps` away from the given ends."""
    return t.clamp(t_eps if 0.0 in ends else 0.0, 1 - t_eps if 1.0 in ends else 1.0)


def regular_row(space: str, path: Path, t: Time, t_eps: float = 0.0) -> Row:
    """The coefficients of a space, taken `t_eps` away from an end where they are infinite."""
    return row(space, path, _away(as_time(t), infinite_ends(space, path), t_eps))


def reading(have: str, want: str, path: Path, t: Time, t_eps: float = 0.0) -> tuple[Tensor, Tensor]:
    """Coefficients (of x, of out) that read `out`, in space `have`, as `want`; the second is the gain of errors.

    With `t_eps`, the denominator is taken at least `t_eps` away from an end where `have` is singular: this is JiT's
    clamp of 1 / t. A row is taken as far away from an end where it is infinite. Without it both are refused. Where one
    space is a multiple of the other (velocity and -velocity; eps and score), x is not needed and nothing is singular.
    """
    t = as_time(t)
    if have.removeprefix("-") == want.removeprefix("-"):
        return torch.zeros_like(t), torch.full_like(t, 1.0 if have == want else -1.0)
    here = path(t)
    have_row, want_row = (regular_row(space, path, t, t_eps) for space in (have, want))
    away = _away(t, singular_ends(have, path), t_eps)
    below = det(path(away), row(have, path, away)) if t_eps else det(here, have_row)
    multiple = det(want_row, have_row) == 0
    factor = (want_row[0] * have_row[0] + want_row[1] * have_row[1]) / (have_row[0].square() + have_row[1].square())
    of_x = torch.where(multiple, 0.0, det(want_row, have_row) / below)
    of_out = torch.where(multiple, factor, det(here, want_row) / below)
    bad = ~((multiple | (below.abs() > 1e-12)) & of_x.isfinite() & of_out.isfinite())
    if bool(bad.any()):
        raise Singular(
            f"{have} does not determine {want} at t = {sorted(set(t[bad].tolist()))}: "
            "set denoiser.t_eps above 0, or keep the grid and the time sampler away from that end"
        )
    return of_x, of_out


def check_space(space: str) -> None:
    """Raises DitkitError, with the near names, for a space that does not exist."""
    if space.removeprefix("-") not in SPACES:
        raise DitkitError(f"unknown space {space!r}: {near(space, SPACES)}")
