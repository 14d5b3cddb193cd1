"""A network with its meaning: what its output stands for, on which path, and how it reads time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Protocol

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..conditioning import Conditioning
from ..config import DitkitError, lookup, register, register_name
from ..rng import Draw
from .path import DDPM, Linear, Path, Time, as_time, log_snr
from .space import Singular, check_space, input_std, reading, regular_row, row

__all__ = ["Denoise", "Denoiser", "Meaning", "Prediction", "Startable"]


def _t(path: Path, t: Tensor) -> Tensor:
    return t


def _one_minus_t(path: Path, t: Tensor) -> Tensor:
    return 1 - t


def _thousand_t(path: Path, t: Tensor) -> Tensor:
    return 1000 * t


def _index(path: Path, t: Tensor) -> Tensor:
    if not isinstance(path, DDPM):
        raise DitkitError(f"the clock 'index' counts the steps of a DDPM path, not of {type(path).__name__}")
    return path.index(t).double()


def _log_sigma(path: Path, t: Tensor) -> Tensor:
    value = -log_snr(path, t) / 8
    if not bool(value.isfinite().all()):
        where = ", ".join(map(str, sorted(set(t[~value.isfinite()].tolist()))))
        raise DitkitError(f"the clock 'log_sigma/4' is infinite at t = {where}: keep grid and times off that end")
    return value


_CLOCKS = {"t": _t, "1-t": _one_minus_t, "1000t": _thousand_t, "index": _index, "log_sigma/4": _log_sigma}
for _name, _clock in _CLOCKS.items():
    register_name("clock", _name, _clock)


def over(coefficient: Tensor, x: Tensor) -> float | Tensor:
    """A coefficient [] or [b] in the form that multiplies x [b ...] in the dtype of x."""
    if coefficient.ndim == 0:
        return float(coefficient)
    return coefficient.to(x.device, x.dtype).view(-1, *[1] * (x.ndim - 1))


@dataclass(frozen=True)
class Prediction:
    """A network's raw output with all it takes to be read in any space.

    out, x: the output and input [b c *space]; t: float64 on the host, [] or [b]; extra: the raw other half of the
    output where the variance is learned.
    """

    out: Float[Tensor, "b c *space"]
    x: Float[Tensor, "b c *space"]
    t: Float[Tensor, "*b"]
    path: Path
    space: str
    t_eps: float = 0.0
    extra: Float[Tensor, "b c *space"] | None = None

    def to(self, space: str) -> Float[Tensor, "b c *space"]:
        """The same opinion in another space. Raises DitkitError at a singular end of time."""
        if space == self.space:
            return self.out
        of_x, of_out = reading(self.space, space, self.path, self.t, self.t_eps)
        return over(of_x, self.x) * self.x + over(of_out, self.x) * self.out

    def gain(self, space: str) -> Float[Tensor, "*b"]:
        """The factor by which an error of the output becomes an error in `space`."""
        return reading(self.space, space, self.path, self.t, self.t_eps)[1]

    def target(self, x0: Tensor, eps: Tensor) -> Float[Tensor, "b c *space"]:
        """What the output should have been; with `t_eps` it is bounded where its space is infinite, as its readings."""
        a, b = regular_row(self.space, self.path, self.t, self.t_eps)
        return over(a, x0) * x0 + over(b, x0) * eps

    def parts(self, x: Tensor) -> list[Prediction]:
        """Of a batch of several opinions on x, each of them."""
        outs = self.out.split(len(x))
        extras = [None] * len(outs) if self.extra is None else self.extra.split(len(x))
        return [replace(self, out=out, x=x, extra=extra) for out, extra in zip(outs, extras, strict=True)]

    def with_out(self, out: Tensor) -> Prediction:
        """The same with another output, such as a guided one."""
        return replace(self, out=out)

    @property
    def x0(self) -> Tensor:
        return self.to("x0")

    @property
    def eps(self) -> Tensor:
        return self.to("eps")

    @property
    def velocity(self) -> Tensor:
        return self.to("velocity")

    @property
    def score(self) -> Tensor:
        return self.to("score")


Denoise = Callable[[Tensor, Time], Prediction]
"""One trajectory: `denoise(x, t)`."""


class Startable(Protocol):
    """What a sampler needs: a denoiser, guided or not."""

    def start(self, cond: Conditioning, shape: Sequence[int], times: Sequence[float]) -> Denoise: ...

    def check(self, visited: Iterable[float], needs: Iterable[str], visitor: str = "this grid") -> None: ...


def prepared(model: Any, cond: Conditioning, shape: Sequence[int], times: Sequence[float]) -> Conditioning:
    """What is given, with what the model computes once for a trajectory; as it is for a model without `prepare`."""
    prepare = getattr(model, "prepare", None)
    return cond if prepare is None else prepare(cond, shape, times)


@register("denoiser", "denoiser")
@dataclass(frozen=True)
class Meaning:
    """The meaning of a network's output, as saved with its weights.

    path; prediction: the space of the output; clock: how the network reads time ("t", "1-t", "1000t", "index" on a
    DDPM path, or EDM's "log_sigma/4" with sigma of the noise over the signal); t_eps: how near a singular end of time a
    reading may come (JiT's clamp; 0 = such ends are refused); scale_input: the network sees x over its standard
    deviation, as in EDM.
    """

    path: Any = Linear()
    prediction: str = "velocity"
    clock: str = "t"
    t_eps: float = 0.0
    scale_input: bool = False

    def __post_init__(self) -> None:
        check_space(self.prediction)
        lookup("clock", self.clock)
        if not 0 <= self.t_eps < 0.5:
            raise DitkitError(f"denoiser.t_eps is a small time in [0, 0.5), not {self.t_eps}")
        if (
            isinstance(self.path, DDPM)
            and abs(self.t_eps * self.path.steps - round(self.t_eps * self.path.steps)) > 1e-3
        ):
            raise DitkitError(
                f"denoiser.t_eps {self.t_eps:g} is no entry of a path of {self.path.steps} steps: use a multiple of "
                f"{1 / self.path.steps:g}"
            )

    vocab: ClassVar[int] = 0

    def fitted(self, vocab: int) -> Meaning:
        """The meaning for tokens of `vocab` kinds, 0 for continuous x. Raises DitkitError for tokens."""
        if vocab:
            raise DitkitError(
                "what is diffused are tokens, and this denoiser is for continuous x: use --denoiser tokens"
            )
        return self

    def of(self, model: Callable[..., Tensor]) -> Denoiser:
        """The network with this meaning."""
        return Denoiser(model, self.path, self.prediction, self.clock, self.t_eps, self.scale_input)


class Denoiser:
    """`denoiser(x, t, cond) -> Prediction`: a network called in ditkit's time, its output labelled with its meaning."""

    def __init__(
        self,
        model: Callable[..., Tensor],
        path: Path,
        prediction: str,
        clock: str,
        t_eps: float = 0.0,
        scale_input: bool = False,
    ):
        check_space(prediction)
        self.model, self.path, self.prediction, self.t_eps = model, path, prediction, t_eps
        self.scale_input = scale_input
        self.clock: Callable[[Path, Tensor], Tensor] = lookup("clock", clock)

    def __call__(self, x: Tensor, t: Time, cond: Conditioning, *, edit: Any = None) -> Prediction:
        """x [b c *space]; t one time or [b], float64 on the host. The network sees x in the dtype of its weights."""
        t = as_time(t)
        clock = self.clock(self.path, t).to(x.device, torch.float32).expand(x.shape[0])
        weight = next(self.model.parameters(), x) if isinstance(self.model, nn.Module) else x
        seen = x / over(input_std(self.path, t), x) if self.scale_input else x
        out = self.model(seen.to(weight.dtype), clock, cond, edit=edit).to(x.dtype)
        extra = None
        if out.shape[1] == 2 * x.shape[1]:
            out, extra = out.chunk(2, dim=1)
        return Prediction(out, x, t, self.path, self.prediction, self.t_eps, extra)

    def prior(self, rng: Draw, shape: Sequence[int]) -> Tensor:
        """x at t = 1, from which sampling starts: one sample of `shape` for each row of `rng`. Draws "prior"."""
        return rng("prior", "normal", shape) * self.path.prior_std

    def start(self, cond: Conditioning, shape: Sequence[int], times: Sequence[float]) -> Denoise:
        """One trajectory: what depends neither on x nor on the step is computed here, once."""
        ready = prepared(self.model, cond, shape, times)
        return lambda x, t: self(x, t, ready)

    def check(self, visited: Iterable[float], needs: Iterable[str], visitor: str = "this grid") -> None:
        """Raises DitkitError if the output cannot be read in a needed space at a visited time, or the clock not told.

        visitor: who goes there, for the message ("the grid 'uniform'").
        """
        visited = set(visited)
        self.check_readings(visited, needs, visitor)
        self.check_clock(visited)

    def check_readings(self, visited: Iterable[float], needs: Iterable[str], visitor: str) -> None:
        """The part of `check` that is about spaces; only the ends of time are looked at."""
        visited = set(visited)
        for space in needs:
            check_space(space)
            for known in (space, self.prediction):
                row(known, self.path, 1.0)  # no table has rates
            for end in sorted({0.0, 1.0} & visited):
                try:
                    reading(self.prediction, space, self.path, end, self.t_eps)
                except Singular:
                    raise DitkitError(
                        f"{self.prediction} prediction cannot be read as {space} at t = {end:g}, which {visitor} "
                        "visits: set denoiser.t_eps above 0, or choose another solver, grid or time sampler"
                    ) from None

    def check_clock(self, visited: Iterable[float]) -> None:
        """Raises DitkitError for times that the path does not have, or at which the network's time is infinite."""
        t = as_time(torch.tensor(sorted(visited), dtype=torch.float64, device="cpu"))
        if len(t):
            self.path(t)
            self.clock(self.path, t)
