"""A person's own images."""

from __future__ import annotations

from ..data import Folder
from ..diffusion import Heun, LogitNormal, Meaning, Regression
from ..models import JiTConfig
from ..recipe import Recipe, Sample, Train

__all__ = ["folder"]


def folder(path: str) -> Recipe:
    """Images of a folder at 64 px, classes = sub-folders or none: `ditkit train folder:PATH --train.steps 2000`.

    A JiT of 6M parameters on patches of 8 x 8 pixels, JiT's own objective. 20,000 steps of 64 images suit some
    thousand images; a GPU takes minutes for them. For a first look on a CPU: --train.steps 500 --data.resolution 32
    --model.patch-size 4.
    """
    return Recipe(
        data=Folder(path=path),
        model=JiTConfig(
            patch_size=8,
            hidden_size=256,
            depth=8,
            num_heads=4,
            bottleneck_dim=64,
            in_context_len=8,
            in_context_start=2,
        ),
        denoiser=Meaning(prediction="x0", clock="1-t", t_eps=0.05),
        objective=Regression("velocity", LogitNormal(0.8, 0.8)),
        train=Train(
            steps=20_000,
            batch=64,
            lr=5e-4,
            warmup=200,
            cooldown=4000,
            clip=1.0,
            emas=(0.999, 0.9999),
            checkpoint_every=500,
        ),
        sample=Sample(steps=30, solver=Heun()),
    )
