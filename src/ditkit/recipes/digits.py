"""The digits: 5,000 real handwritten digits of 28 x 28 pixels, in pixel space, JiT style."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ..data import Digits
from ..diffusion import Heun, LogitNormal, Meaning, Regression
from ..models import DiTConfig, JiTConfig, ResNetConfig, UNetConfig
from ..recipe import Evaluate, Gate, Recipe, Sample, Train

__all__ = ["demo", "digits", "digits_dit", "digits_resnet", "digits_unet"]


def digits() -> Recipe:
    """A JiT of 0.7M parameters on patches of 4 x 4: `ditkit train digits`.

    About four minutes on two idle cores; then 98% or more of the samples are seen as the class asked for.
    """
    return Recipe(
        data=Digits(),
        model=JiTConfig(
            patch_size=4,
            hidden_size=96,
            depth=4,
            num_heads=3,
            bottleneck_dim=16,
            in_context_len=4,
            in_context_start=1,
        ),
        denoiser=Meaning(prediction="x0", clock="1-t", t_eps=0.05),
        # wider than JiT's 0.8: the flat background of a digit is learned at little noise
        objective=Regression("velocity", LogitNormal(0.8, 1.0)),
        train=Train(
            steps=2200,
            batch=32,
            lr=1e-3,
            warmup=100,
            cooldown=1000,
            emas=(0.99,),
            sample_every=1100,
            checkpoint_every=550,
        ),
        # guidance at little noise roughens the background and no longer changes which digit it is
        sample=Sample(steps=16, solver=Heun(), guidance=2.5, interval=(0.3, 0.9), batch=100),
        evaluate=Evaluate(samples=500, size=64),
    )


def digits_dit() -> Recipe:
    """A DiT of 0.7M parameters on the same pixels, the base of a ControlNet: `ditkit train digits_dit`."""
    recipe = digits()
    return replace(
        recipe,
        model=DiTConfig(patch_size=4, hidden_size=96, depth=4, num_heads=3, learn_sigma=False),
        denoiser=replace(recipe.denoiser, clock="1000t"),
    )


def digits_unet() -> Recipe:
    """A U-Net of 0.5M parameters with levels of 28, 14 and 7 pixels: `ditkit train digits_unet`.

    The second half of the training takes 80 s of one core; the loss falls from 3.24 (first 10 steps)
    to 0.211 (last 50).
    """
    model = UNetConfig(
        model_channels=16,
        channel_mult=(1, 2, 3),
        num_res_blocks=1,
        attention_resolutions=(4,),
        num_head_channels=16,
        norm_groups=8,
        learn_sigma=False,
    )
    return _convolutional(model)


def digits_resnet() -> Recipe:
    """A residual network of 0.4M parameters on squares of 2 x 2 pixels: `ditkit train digits_resnet`.

    The second half of the training takes 53 s of one core; the loss falls from 3.00 (first 10 steps)
    to 0.238 (last 50).
    """
    return _convolutional(ResNetConfig(patch_size=2, channels=64, depth=5, groups=8))


def _convolutional(model: Any) -> Recipe:
    """The digits in 500 steps: a forward pass has 2.8 to 2.9 times the multiply-accumulates of the JiT's, so that the
    whole training has about two thirds of its 2,200 steps'."""
    recipe = digits()
    train = replace(recipe.train, steps=500, warmup=50, cooldown=250, sample_every=500, checkpoint_every=250)
    return replace(recipe, model=model, train=train)


def demo() -> Recipe:
    """The digits with the bounds that `make demo` must keep; about five minutes on two idle cores, all in all.

    Blurring by one pixel is a yardstick for the kernel distance: a model whose samples are further from held-out digits
    than blurred digits are has not learned what strokes look like.
    """
    gates = (
        Gate("classifier_accuracy", "at_least", 0.98),
        Gate("class_accuracy", "at_least", 0.97),
        Gate("kid", "at_most", 0.1, times="kid_untrained"),
        Gate("kid", "at_most", 1.0, times="kid_blurred"),
        Gate("diversity", "at_least", 0.7),
        Gate("f_mem", "at_most", 0.01, plus="f_mem_floor"),
    )
    recipe = digits()
    return replace(recipe, evaluate=replace(recipe.evaluate, gates=gates))
