"""What tests of solvers share: denoisers known in closed form, exact trajectories, moments, and given randomness."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from ditkit.conditioning import Conditioning
from ditkit.config import lookup
from ditkit.diffusion import Denoise, Denoiser, Path, Prediction, Solver, Time, integrate, log_snr
from ditkit.diffusion.path import as_time
from ditkit.diffusion.space import row
from ditkit.rng import Draw, Replay

NOTHING = Conditioning()
NO_NOISE = Replay({})


class Exact:
    """The posterior means for data from a mixture of Gaussians: the network that training cannot beat.

    `exact.denoiser()` is a Denoiser with it; `exact.denoise(x, t)` reads it directly, in float64 throughout.
    """

    def __init__(
        self,
        path: Path,
        means: Sequence[Sequence[float]],
        stds: Sequence[float],
        weights: Sequence[float],
        prediction: str = "x0",
    ):
        self.path, self.prediction = path, prediction
        self.means = torch.tensor(means, dtype=torch.float64)
        self.stds = torch.tensor(stds, dtype=torch.float64)
        self.weights = torch.tensor(weights, dtype=torch.float64)
        self.calls: list[int] = []
        self.time = 1.0

    def __call__(self, x: Tensor, t: Tensor, cond: Conditioning, *, edit: Any = None) -> Tensor:
        self.calls.append(len(x))
        alpha, sigma = self.path(self.time)
        variance = (alpha * self.stds) ** 2 + sigma**2  # [k]
        off = x[:, None] - alpha * self.means  # [b k d]
        log_p = self.weights.log() - 0.5 * (off.square().sum(-1) / variance + x.shape[1] * variance.log())
        share = log_p.softmax(1)[..., None]
        x0 = (share * (self.means + (alpha * self.stds**2 / variance)[:, None] * off)).sum(1)
        if self.prediction == "x0":
            return x0
        eps = (share * (sigma / variance)[:, None] * off).sum(1)
        a, b = row(self.prediction, self.path, self.time)
        return a * x0 + b * eps

    def log_density(self, x: Tensor) -> Tensor:
        """log p(x0) of data [b d] in nats."""
        off = x[:, None] - self.means
        log_normal = -0.5 * (off / self.stds[:, None]).square().sum(-1)
        log_normal = log_normal - x.shape[1] * (self.stds * (2 * torch.pi) ** 0.5).log()
        return (self.weights.log() + log_normal).logsumexp(1)

    def denoiser(self, t_eps: float = 0.0) -> Denoiser:
        """With this network; it is given time in float64, which a network never gets."""
        exact = self

        class InFloat64(Denoiser):
            def __call__(self, x: Tensor, t: Any, cond: Conditioning, *, edit: Any = None) -> Any:
                exact.time = float(t)
                return super().__call__(x, t, cond, edit=edit)

        return InFloat64(self, self.path, self.prediction, "t", t_eps)

    def denoise(self, x: Tensor, t: Time) -> Prediction:
        self.time = float(t)
        return Prediction(self(x, as_time(t), NOTHING), x, as_time(t), self.path, self.prediction)


def mixture(path: Path, prediction: str = "x0") -> Exact:
    """Two blobs in the plane."""
    return Exact(path, [[-1.0, 0.5], [1.2, -0.3]], [0.4, 0.6], [0.35, 0.65], prediction)


def gaussian(path: Path, mean: float = 0.7, std: float = 0.5, prediction: str = "x0") -> Exact:
    """One on the line."""
    return Exact(path, [[mean]], [std], [1.0], prediction)


def start(n: int = 24, d: int = 2, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(n, d, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def grid(name: str, n: int, path: Path) -> tuple[float, ...]:
    return lookup("grid", name)()(n, path, 0)


def run(solver: Solver, exact: Exact, times: Sequence[float], x: Tensor) -> Tensor:
    return integrate(exact.denoiser(), solver, times, x, NOTHING, NO_NOISE)


def told(path: Path, space: str, opinion: Callable[[Tensor, float], Tensor]) -> Denoise:
    """A trajectory on which `opinion(x, t)` is the prediction in `space`."""
    return lambda x, t: Prediction(opinion(x, float(t)), x, as_time(t), path, space)


class Started:
    """A trajectory as the sampler's denoiser."""

    def __init__(self, denoise: Denoise):
        self.denoise = denoise

    def start(self, cond: Conditioning, shape: Sequence[int], times: Sequence[float]) -> Denoise:
        return self.denoise

    def check(self, visited: Iterable[float], needs: Iterable[str], visitor: str = "") -> None:
        """Refuses nothing."""


def log_snr_grid(path: Path, n: int, first: float = 0.9, last: float = 0.05) -> tuple[float, ...]:
    """n equal steps of log-SNR between two times."""
    high, low = float(log_snr(path, first)), float(log_snr(path, last))
    return tuple(float(path.time(high + (low - high) * k / n)) for k in range(n + 1))


@functools.cache
def true_trajectory(path: Path, times: tuple[float, ...], steps: int) -> tuple[Tensor, ...]:
    """The mixture's trajectories at the given times, by `steps` classical Runge-Kutta steps between two of them."""
    denoise, x = mixture(path).denoise, start()
    found = [x]
    for t, s in itertools.pairwise(times):
        h = (s - t) / steps
        for k in range(steps):
            a, b, c = t + k * h, t + (k + 0.5) * h, t + (k + 1) * h
            k1 = denoise(x, a).velocity
            k2 = denoise(x + h / 2 * k1, b).velocity
            k3 = denoise(x + h / 2 * k2, b).velocity
            x = x + h / 6 * (k1 + 2 * k2 + 2 * k3 + denoise(x + h * k3, c).velocity)
        found.append(x)
    return tuple(found)


class Impulses:
    """Randomness for a batch of 2 + n rows on the line: in step k the noise of row 2 + k is 1 and all other is 0."""

    def __init__(self, steps: int, step: int = 0):
        self.steps, self.step = steps, step

    def at(self, step: int, sample_ids: Tensor | None = None) -> Impulses:
        return Impulses(self.steps, step)

    def __call__(self, name: str, law: Any, shape: Sequence[int] = ()) -> Tensor:
        noise = torch.zeros(2 + self.steps, *shape, dtype=torch.float64)
        noise[2 + self.step] = 1
        return noise


def moments(
    solver: Solver, exact: Exact, times: Sequence[float], variance: float, mean: float = 0.0
) -> tuple[float, float]:
    """Mean and variance of the samples of a solver on Gaussian data, without drawing one.

    The prediction is affine in x, so the result is affine in the first x and in the noise of each step, and one run
    with a row for each gives all coefficients; memory is no obstacle. mean, variance: of the first x.
    """
    n = len(times) - 1
    x = torch.zeros(2 + n, 1, dtype=torch.float64)
    x[1] = 1
    state, rng = solver.init(x, times), Impulses(n)
    draw: Draw
    for k, (t, s) in enumerate(itertools.pairwise(times)):
        draw = rng.at(k)
        x, state = solver.step(exact.denoise, x, t, s, state, draw)
    b = float(x[0])
    a = float(x[1]) - b
    return a * mean + b, a * a * variance + float((x[2:] - b).square().sum())
