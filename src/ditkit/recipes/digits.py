"""The digits: 5,000 real handwritten digits of 28 x 28 pixels, in pixel space, JiT style."""

from __future__ import annotations

from dataclasses import replace

from ..conditioners import Label
from ..data import Digits
from ..diffusion import Heun, LogitNormal, Meaning, Regression
from ..models import JiTConfig
from ..recipe import Evaluate, Gate, Recipe, Sample, Train

__all__ = ["demo", "digits"]

GATES = (
    Gate("classifier_accuracy", "at_least", 0.98),
    Gate("class_accuracy", "at_least", 0.97),
    Gate("kid", "at_most", 0.1, times="kid_untrained"),
    Gate("kid", "at_most", 1.0, times="kid_blurred"),
    Gate("diversity", "at_least", 0.7),
    Gate("f_mem", "at_most", 0.01, plus="f_mem_floor"),
)


def digits() -> Recipe:
    """A JiT of 0.9M parameters."""
    return Recipe(
        data=Digits(),
        conditioner=Label(drop=0.1),
        model=JiTConfig(
            patch_size=4,
            hidden_size=128,
            depth=4,
            num_heads=4,
            bottleneck_dim=16,
            in_context_len=4,
            in_context_start=1,
        ),
        denoiser=Meaning(prediction="x0", clock="1-t", t_eps=0.05),
        objective=Regression("velocity", LogitNormal(0.8, 0.8)),
        train=Train(
            steps=1000,
            batch=64,
            lr=1e-3,
            warmup=50,
            cooldown=400,
            emas=(0.99, 0.995),
            sample_every=500,
            checkpoint_every=500,
        ),
        sample=Sample(steps=20, solver=Heun(), guidance=2.0, interval=(0.0, 0.9)),
    )


def demo() -> Recipe:
    """The digits in about five minutes on two cores, measured, with the bounds that `make demo` must keep."""
    return replace(digits(), evaluate=Evaluate(samples=500, gates=GATES))
