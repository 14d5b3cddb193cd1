"""JiT as published: Li & He 2025, arXiv 2511.13720: the clean image predicted from raw pixels, velocity loss.

AdamW (0.9, 0.95) with a rate of 5e-5 for each 256 images of a batch, that is 2e-4 at 1024; 5 epochs of warm-up, then
constant; 600 epochs, bf16, averages 0.9999 and 0.9996. Sampling: 50 Heun steps, guidance where the authors' t is
above 0.1. The paper chose the guidance scale (1 to 4 in steps of 0.1) and the average ({0.9996, 0.9998, 0.9999}) for
each model with 8,000 samples; the scales here are those of the authors' README, as an imported checkpoint has them.
Their noise grows with the image: twice at 512 px.
"""

from __future__ import annotations

from ..codecs import Pixels
from ..conditioners import Label
from ..diffusion import Linear, LogitNormal, Meaning, Regression
from ..interop import JIT
from ..recipe import Recipe, Sample, Train
from .imagenet import EVALUATE, IMAGES, imagenet, sized

__all__ = ["jit_b_16", "jit_b_32", "jit_g_16", "jit_g_32", "jit_h_16", "jit_h_32", "jit_l_16", "jit_l_32"]

BATCH = 1024
EPOCH = IMAGES // BATCH
"""Steps of an epoch; the last, smaller batch is dropped."""


def _jit(path: str, size: str, epochs: int = 600) -> Recipe:
    model = sized(f"jit_{size}")
    return Recipe(
        data=imagenet(path, model.input_size),
        codec=Pixels(),
        conditioner=Label(drop=0.1),
        model=model,
        denoiser=Meaning(Linear(noise_scale=model.input_size / 256), prediction="x0", clock="1-t", t_eps=0.05),
        objective=Regression("velocity", LogitNormal(mean=0.8, std=0.8)),
        train=Train(
            steps=epochs * EPOCH,
            batch=BATCH,
            lr=5e-5 * BATCH / 256,
            betas=(0.9, 0.95),
            warmup=5 * EPOCH,
            precision="bf16",
            emas=(0.9999, 0.9996),
            compile=True,
            log_every=100,
            sample_every=40 * EPOCH,
            checkpoint_every=5 * EPOCH,
        ),
        sample=Sample(**JIT.sampling(model), ema=0.9999, batch=32),
        evaluate=EVALUATE,
    )


def jit_b_16(path: str) -> Recipe:
    """JiT-B/16 at 256 px: `ditkit train jit_b_16:PATH`. FID-50K 3.66 (IS 275.1); 4.37 after 200 epochs."""
    return _jit(path, "b_16")


def jit_b_32(path: str) -> Recipe:
    """JiT-B/32 at 512 px: `ditkit train jit_b_32:PATH`. FID-50K 4.02 (IS 271.0); 4.64 after 200 epochs."""
    return _jit(path, "b_32")


def jit_l_16(path: str) -> Recipe:
    """JiT-L/16 at 256 px: `ditkit train jit_l_16:PATH`. FID-50K 2.36 (IS 298.5); 2.79 after 200 epochs."""
    return _jit(path, "l_16")


def jit_l_32(path: str) -> Recipe:
    """JiT-L/32 at 512 px: `ditkit train jit_l_32:PATH`. FID-50K 2.53 (IS 299.9); 3.06 after 200 epochs."""
    return _jit(path, "l_32")


def jit_h_16(path: str) -> Recipe:
    """JiT-H/16 at 256 px: `ditkit train jit_h_16:PATH`. FID-50K 1.86 (IS 303.4); 2.29 after 200 epochs."""
    return _jit(path, "h_16")


def jit_h_32(path: str) -> Recipe:
    """JiT-H/32 at 512 px: `ditkit train jit_h_32:PATH`. FID-50K 1.94 (IS 309.1); 2.51 after 200 epochs."""
    return _jit(path, "h_32")


def jit_g_16(path: str) -> Recipe:
    """JiT-G/16 at 256 px: `ditkit train jit_g_16:PATH`. FID-50K 1.82 (IS 292.6); 2.15 after 200 epochs.

    In the paper only, stopped early at about 320 epochs; its guidance scale is not published: this one is H's.
    """
    return _jit(path, "g_16", epochs=320)


def jit_g_32(path: str) -> Recipe:
    """JiT-G/32 at 512 px: `ditkit train jit_g_32:PATH`. FID-50K 1.78 (IS 306.8); 2.11 after 200 epochs.

    In the paper only, stopped early at about 320 epochs; its guidance scale is not published: this one is H's.
    """
    return _jit(path, "g_32", epochs=320)
