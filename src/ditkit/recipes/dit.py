"""DiT as published: Peebles & Xie 2022, arXiv 2212.09748, class-conditional ImageNet in the latents of f8 autoencoders.

The noise on DDPM's table of 1000 steps, a learned variance, AdamW with a constant rate of 1e-4, batch 256, EMA
0.9999, float32. Sampling: 250 ancestral steps. The paper's models were trained in JAX on TPUs; its authors' PyTorch
code comes to an FID of 18.1 instead of 19.5 for XL/2 at 400K steps. On one A100 fast-DiT reports 0.43 steps of XL/2 a
second with gradient checkpointing, and 0.84 with mixed precision and stored latents as well.
"""

from __future__ import annotations

from ..conditioners import Label
from ..diffusion import DDPM, Ancestral, Discrete, Meaning, Regression
from ..diffusion.grid import Respaced
from ..recipe import Recipe, Sample, Train
from .imagenet import EVALUATE, imagenet, latents, sized

__all__ = [
    "dit_b_2",
    "dit_b_4",
    "dit_b_8",
    "dit_l_2",
    "dit_l_4",
    "dit_l_8",
    "dit_s_2",
    "dit_s_4",
    "dit_s_8",
    "dit_xl_2",
    "dit_xl_2_512",
    "dit_xl_4",
    "dit_xl_8",
]

STEPS = 400_000
"""Of the paper's comparison of sizes."""


def _dit(path: str, size: str, steps: int = STEPS, resolution: int = 256, guidance: float = 1.0) -> Recipe:
    """Guided samples have the ft-EMA decoder and guidance on 3 of 4 channels, as the paper's final tables; unguided
    ones have ft-MSE, as its comparison of sizes."""
    final = guidance != 1
    return Recipe(
        data=imagenet(path, resolution),
        codec=latents("ema" if final else "mse"),
        conditioner=Label(drop=0.1),
        model=sized(f"dit_{size}", input_size=resolution // 8),
        denoiser=Meaning(DDPM(1000, 1e-4, 2e-2), prediction="eps", clock="index"),
        objective=Regression("eps", Discrete(1000), variance="hybrid"),
        train=Train(
            steps=steps,
            batch=256,
            lr=1e-4,
            betas=(0.9, 0.999),
            emas=(0.9999,),
            log_every=100,
            sample_every=50_000,
            checkpoint_every=10_000,
        ),
        sample=Sample(
            steps=250, solver=Ancestral(), grid=Respaced(), guidance=guidance, channels=3 if final else None, batch=32
        ),
        evaluate=EVALUATE,
    )


def dit_s_8(path: str) -> Recipe:
    """DiT-S/8 at 256 px: `ditkit train dit_s_8:PATH`. FID-50K 153.60 after 400K steps, unguided."""
    return _dit(path, "s_8")


def dit_s_4(path: str) -> Recipe:
    """DiT-S/4 at 256 px: `ditkit train dit_s_4:PATH`. 400K steps."""
    return _dit(path, "s_4")


def dit_s_2(path: str) -> Recipe:
    """DiT-S/2 at 256 px: `ditkit train dit_s_2:PATH`. FID-50K 68.40 after 400K steps, unguided."""
    return _dit(path, "s_2")


def dit_b_8(path: str) -> Recipe:
    """DiT-B/8 at 256 px: `ditkit train dit_b_8:PATH`. 400K steps."""
    return _dit(path, "b_8")


def dit_b_4(path: str) -> Recipe:
    """DiT-B/4 at 256 px: `ditkit train dit_b_4:PATH`. FID-50K 68.38 after 400K steps, unguided."""
    return _dit(path, "b_4")


def dit_b_2(path: str) -> Recipe:
    """DiT-B/2 at 256 px: `ditkit train dit_b_2:PATH`. FID-50K 43.47 after 400K steps, unguided."""
    return _dit(path, "b_2")


def dit_l_8(path: str) -> Recipe:
    """DiT-L/8 at 256 px: `ditkit train dit_l_8:PATH`. 400K steps."""
    return _dit(path, "l_8")


def dit_l_4(path: str) -> Recipe:
    """DiT-L/4 at 256 px: `ditkit train dit_l_4:PATH`. 400K steps."""
    return _dit(path, "l_4")


def dit_l_2(path: str) -> Recipe:
    """DiT-L/2 at 256 px: `ditkit train dit_l_2:PATH`. FID-50K 23.33 after 400K steps, unguided."""
    return _dit(path, "l_2")


def dit_xl_8(path: str) -> Recipe:
    """DiT-XL/8 at 256 px: `ditkit train dit_xl_8:PATH`. 400K steps."""
    return _dit(path, "xl_8")


def dit_xl_4(path: str) -> Recipe:
    """DiT-XL/4 at 256 px: `ditkit train dit_xl_4:PATH`. 400K steps."""
    return _dit(path, "xl_4")


def dit_xl_2(path: str) -> Recipe:
    """DiT-XL/2 at 256 px, 7M steps (1400 epochs): `ditkit train dit_xl_2:PATH`.

    FID-50K 2.27 (sFID 4.60, IS 278.24, precision .83, recall .57) with guidance 1.5 on 3 of 4 channels; 9.62 unguided.
    On the way: 19.47 after 400K steps, 10.67 after 2.35M, unguided.
    """
    return _dit(path, "xl_2", steps=7_000_000, guidance=1.5)


def dit_xl_2_512(path: str) -> Recipe:
    """DiT-XL/2 at 512 px, 3M steps: `ditkit train dit_xl_2_512:PATH`.

    FID-50K 3.04 (IS 240.82) with guidance 1.5 on 3 of 4 channels; 12.03 unguided.
    """
    return _dit(path, "xl_2", steps=3_000_000, resolution=512, guidance=1.5)
