"""SiT as published: Ma et al. 2024, arXiv 2401.08740: DiT's network on the linear path, with velocity prediction.

The authors' network has `learn_sigma`, which wastes half of the last layer, and so has this one: their checkpoints
load. All else is as in DiT: AdamW 1e-4, batch 256, EMA 0.9999, float32. Sampling: 250 steps of Euler-Maruyama with
the diffusion sigma(t), the last of length 0.04 without noise, as an imported checkpoint has it.
"""

from __future__ import annotations

from dataclasses import replace

from ..conditioners import Label
from ..diffusion import Linear, Meaning, Regression, Uniform
from ..interop import SIT
from ..recipe import Recipe, Sample, Train
from .imagenet import EVALUATE, imagenet, latents, sized

__all__ = ["sit_b_2", "sit_l_2", "sit_s_2", "sit_xl_2", "sit_xl_2_512"]


def _sit(path: str, size: str, steps: int = 400_000, resolution: int = 256, guidance: float = 1.0) -> Recipe:
    model = sized(f"sit_{size}", input_size=resolution // 8)
    return Recipe(
        data=imagenet(path, resolution),
        codec=latents("ema"),
        conditioner=Label(drop=0.1),
        model=model,
        denoiser=Meaning(Linear(), prediction="-velocity", clock="1-t"),
        objective=Regression("velocity", Uniform()),
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
        sample=replace(
            Sample(**SIT.sampling(model), batch=32), guidance=guidance, channels=3 if guidance != 1 else None
        ),
        evaluate=EVALUATE,
    )


def sit_s_2(path: str) -> Recipe:
    """SiT-S/2 at 256 px, 400K steps: `ditkit train sit_s_2:PATH`."""
    return _sit(path, "s_2")


def sit_b_2(path: str) -> Recipe:
    """SiT-B/2 at 256 px, 400K steps: `ditkit train sit_b_2:PATH`.

    FID-50K 34.8 with the ODE and 33.6 with an SDE of the optimal diffusion (33.0 with its best norm), unguided.
    """
    return _sit(path, "b_2")


def sit_l_2(path: str) -> Recipe:
    """SiT-L/2 at 256 px, 400K steps: `ditkit train sit_l_2:PATH`."""
    return _sit(path, "l_2")


def sit_xl_2(path: str) -> Recipe:
    """SiT-XL/2 at 256 px, 7M steps (1400 epochs): `ditkit train sit_xl_2:PATH`.

    FID-50K 2.06 with guidance 1.5 and the SDE, 2.15 with the ODE; 8.3 unguided (SDE). 17.2 after 400K steps, unguided.
    """
    return _sit(path, "xl_2", steps=7_000_000, guidance=1.5)


def sit_xl_2_512(path: str) -> Recipe:
    """SiT-XL/2 at 512 px, 3M steps: `ditkit train sit_xl_2_512:PATH`. FID-50K 2.62 with guidance 1.5 and the SDE."""
    return _sit(path, "xl_2", steps=3_000_000, resolution=512, guidance=1.5)
