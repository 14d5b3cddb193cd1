"""A person's own images: of a folder, or of a data set of the package datasets."""

from __future__ import annotations

from dataclasses import replace

from ..data import Folder, HuggingFace
from ..diffusion import Heun, LogitNormal, Meaning, Regression
from ..models import JiTConfig
from ..recipe import Recipe, Sample, Train

__all__ = ["folder", "hugging_face"]


def folder(path: str) -> Recipe:
    """Images of a folder at 64 px, classes = sub-folders or none: `ditkit train folder:PATH --train.steps 2000`.

    A JiT of 4M parameters on patches of 8 x 8 pixels with JiT's own objective, small enough for a laptop. With a GPU
    and more images make it larger: --model.hidden-size 384 --model.num-heads 6 --model.depth 12.
    """
    return Recipe(
        data=Folder(path=path),
        model=JiTConfig(
            patch_size=8,
            hidden_size=192,
            depth=6,
            num_heads=3,
            bottleneck_dim=64,
            in_context_len=4,
            in_context_start=2,
        ),
        denoiser=Meaning(prediction="x0", clock="1-t", t_eps=0.05),
        objective=Regression("velocity", LogitNormal(0.8, 0.8)),
        train=Train(
            steps=10_000,
            batch=64,
            lr=5e-4,
            warmup=200,
            cooldown=2000,
            clip=1.0,
            emas=(0.99, 0.999, 0.9999),
            sample_every=500,
            checkpoint_every=500,
        ),
        sample=Sample(steps=30, solver=Heun(), batch=32),
    )


def hugging_face(path: str) -> Recipe:
    """The same for a data set of the package datasets: `ditkit train hf:NAME --data.download`, or hf:FOLDER."""
    return replace(folder("."), data=HuggingFace(path=path))
