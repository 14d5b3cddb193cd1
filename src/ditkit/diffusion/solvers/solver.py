"""The contract of a solver, and the loop over a grid."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, ClassVar, Protocol, runtime_checkable

from torch import Tensor

from ...conditioning import Conditioning
from ...config import DitkitError
from ...rng import Draw
from ..denoiser import Denoise, Startable

__all__ = ["Once", "Solver", "check_grid", "integrate"]


@runtime_checkable
class Solver(Protocol):
    """One step from t to s < t with explicit state.

    A step draws what it needs from `rng` under the name "solver", row by row, so that a sample depends on its own row
    alone; it computes in the dtype of x, with coefficients in float64 on the host.
    """

    order: ClassVar[int]
    """Of the global error on a smooth problem: halving all steps divides it by 2^order. Measured in the tests."""
    nfe: ClassVar[int]
    """Network evaluations a step; 0 = as many as a tolerance asks for."""
    needs: ClassVar[tuple[str, ...]]
    """The spaces in which the prediction is read."""

    def visits(self, t: float, s: float) -> tuple[float, ...]:
        """The times at which the prediction is read in the step from t to s."""
        ...

    def init(self, x: Tensor, times: Sequence[float] = ()) -> Any:
        """The state before the first step. `times` is the grid, for methods that depend on how many steps it has."""
        ...

    def step(self, denoise: Denoise, x: Tensor, t: float, s: float, state: Any, rng: Draw) -> tuple[Tensor, Any]: ...


class Once:
    """A solver that reads the prediction once, at the start of its step, and, unless it says so, keeps no state."""

    order: ClassVar[int] = 1
    nfe: ClassVar[int] = 1

    def visits(self, t: float, s: float) -> tuple[float, ...]:
        return (t,)

    def init(self, x: Tensor, times: Sequence[float] = ()) -> Any:
        return None


def check_grid(denoiser: Startable, solver: Solver, times: Sequence[float], name: str = "this grid") -> None:
    """Raises DitkitError for a grid that does not decrease, or at which the solver cannot read the prediction.

    name: of the grid, for the message.
    """
    if len(times) < 2 or any(s >= t for t, s in pairwise(times)):
        raise DitkitError(f"a grid is at least two decreasing times, and {name} gives {times}")
    visited = {time for t, s in pairwise(times) for time in solver.visits(t, s)}
    denoiser.check(visited, solver.needs, name)


def integrate(
    denoiser: Startable,
    solver: Solver,
    times: Sequence[float],
    x: Tensor,
    cond: Conditioning,
    rng: Draw,
    progress: Callable[[int, Tensor], None] | None = None,
) -> Tensor:
    """Sample: x at times[0] to x at times[-1]. `rng.at(k)` is the randomness of the k-th step.

    `progress(k, x)` is called after each step. Raises DitkitError before the first step for a grid that does not
    decrease or visits a time at which the prediction cannot be read.
    """
    check_grid(denoiser, solver, times)
    denoise = denoiser.start(cond, x.shape, times)
    state = solver.init(x, times)
    for k, (t, s) in enumerate(pairwise(times)):
        x, state = solver.step(denoise, x, t, s, state, rng.at(k))
        if progress is not None:
            progress(k, x)
    return x
