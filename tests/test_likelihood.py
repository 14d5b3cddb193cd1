"""The likelihood under the ODE, against densities that are known."""

from __future__ import annotations

import sys

import pytest
import torch
from torch.testing import assert_close

from ditkit.conditioning import Conditioning
from ditkit.config import DitkitError
from ditkit.diffusion import CFG, GVP, VP, Dopri5, Linear, Meaning, Path, guide, log_likelihood
from ditkit.rng import Rng

from .exact import NO_NOISE, NOTHING, Exact, gaussian, mixture, start


def line(path: Path) -> Exact:
    return Exact(path, [[-1.0], [1.2]], [0.4, 0.6], [0.35, 0.65], "velocity")


@pytest.mark.parametrize("path", [Linear(), Linear(2.0), GVP()], ids=str)
def test_a_mixture_on_the_line_has_its_density(path: Path) -> None:
    """In one dimension the divergence is the derivative, which any Rademacher probe gives exactly."""
    x0 = torch.linspace(-2.5, 3, 12, dtype=torch.float64)[:, None]
    rng = Rng(0).at(0, torch.arange(12))
    exact = line(path)
    found = log_likelihood(exact.denoiser(), x0, NOTHING, rng, prior_std=path.prior_std, rtol=1e-6, atol=1e-8)
    assert_close(found.nats, exact.log_density(x0), rtol=0, atol=1e-4)


def test_a_vp_path_ends_in_the_prior_up_to_its_last_signal() -> None:
    """alpha(1) = 0.0066, so that N(0, 1) is the law at t = 1 only nearly."""
    exact = gaussian(VP(), prediction="x0")
    x0 = torch.linspace(-1, 2, 7, dtype=torch.float64)[:, None]
    rng = Rng(0).at(0, torch.arange(7))
    found = log_likelihood(exact.denoiser(), x0, NOTHING, rng, ends=(1e-4, 1.0), rtol=1e-6, atol=1e-8)
    assert_close(found.nats, exact.log_density(x0), rtol=0, atol=2e-2)


@pytest.mark.parametrize("law", ["rademacher", "normal"])
def test_hutchinsons_estimate_has_the_density_as_its_mean(law: str) -> None:
    """On a mixture in the plane: 400 samples of probes of two points, within four standard errors of the truth."""
    exact = mixture(Linear(), "velocity")
    points = torch.tensor([[0.3, 0.4], [-1.0, 0.9]], dtype=torch.float64)
    x0 = points.repeat_interleave(400, 0)
    rng = Rng(3).at(0, torch.arange(800))
    found = log_likelihood(exact.denoiser(), x0, NOTHING, rng, law=law, rtol=1e-5, atol=1e-7).nats.view(2, 400)
    error = found.std(1) / 20
    assert bool((error > 1e-4).all())
    assert bool(((found.mean(1) - exact.log_density(points)).abs() < 4 * error).all())
    # four probes have half of its spread
    four = log_likelihood(exact.denoiser(), x0, NOTHING, rng, law=law, probes=4, rtol=1e-5, atol=1e-7)
    assert_close(four.nats.view(2, 400).std(1) / found.std(1), torch.full((2,), 0.5).double(), rtol=0, atol=0.12)


def test_probes_belong_to_their_samples_and_a_network_gets_no_gradient() -> None:
    weight = torch.nn.Parameter(torch.tensor(0.3, dtype=torch.float64))

    class Network(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = weight

        def forward(self, x: torch.Tensor, t: torch.Tensor, cond: Conditioning, *, edit: object = None) -> torch.Tensor:
            return torch.tanh(x.roll(1, 1) + x) * self.weight

    denoiser, x0 = Meaning().of(Network()), start(6, 4)
    whole = log_likelihood(denoiser, x0, NOTHING, Rng(1).at(0, torch.arange(6)), rtol=1e-8, atol=1e-10).nats
    part = log_likelihood(denoiser, x0[4:], NOTHING, Rng(1).at(0, torch.tensor([4, 5])), rtol=1e-8, atol=1e-10).nats
    assert_close(part, whole[4:], rtol=1e-6, atol=1e-6)
    other = log_likelihood(denoiser, x0, NOTHING, Rng(2).at(0, torch.arange(6)), rtol=1e-8, atol=1e-10).nats
    assert float((other - whole).abs().max()) > 1e-3
    assert weight.grad is None
    assert not whole.requires_grad
    with torch.no_grad():
        assert_close(
            log_likelihood(denoiser, x0, NOTHING, Rng(1).at(0, torch.arange(6)), rtol=1e-8, atol=1e-10).nats, whole
        )
    # a guided opinion has a likelihood, too
    guided = guide(denoiser, CFG(2.0, NOTHING))
    assert bool(log_likelihood(guided, x0, NOTHING, Rng(1).at(0, torch.arange(6))).nats.isfinite().all())


def test_without_torchdiffeq_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchdiffeq", None)
    with pytest.raises(DitkitError, match=r"pip install 'ditkit\[ode\]'"):
        Dopri5().step(mixture(Linear()).denoise, start(), 0.9, 0.1, None, NO_NOISE)
