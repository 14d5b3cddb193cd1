"""What several tests share: a small recipe that trains in seconds, a folder of images, and the command line."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from ditkit.cli import main
from ditkit.models import JiTConfig, Model
from ditkit.recipe import Evaluate, Recipe, Sample, Train
from ditkit.recipes import digits
from ditkit.training import Trainer

os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("DITKIT_CACHE", str(Path(tempfile.gettempdir()) / "ditkit-tests"))  # nothing in a home folder

TINY = JiTConfig(
    patch_size=7, hidden_size=32, depth=2, num_heads=2, bottleneck_dim=8, in_context_len=2, in_context_start=1
)
TINY_FLAGS = [
    *("--model.patch-size", "7", "--model.hidden-size", "32", "--model.depth", "2", "--model.num-heads", "2"),
    *("--model.bottleneck-dim", "8", "--model.in-context-len", "2", "--model.in-context-start", "1"),
    *("--train.batch", "8", "--sample.steps", "3", "--train.sample-every", "0"),
]


@pytest.fixture
def tiny() -> Recipe:
    """The digits with a model of 50,000 parameters and short training."""
    return replace(
        digits(),
        model=TINY,
        train=Train(steps=6, batch=8, lr=1e-3, emas=(0.9, 0.99), log_every=2, sample_every=0, checkpoint_every=3),
        sample=Sample(steps=3, batch=8),
        evaluate=Evaluate(samples=20, size=32),
    )


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes of twenty 16 x 16 colour pictures, one of them broken."""
    folder = tmp_path_factory.mktemp("pictures")
    generator = torch.Generator().manual_seed(0)
    for name, hue in {"red": 0, "blue": 2}.items():
        (folder / name).mkdir()
        for i in range(20):
            pixels = torch.randint(0, 60, (16, 16, 3), generator=generator, dtype=torch.uint8)
            pixels[..., hue] += 150
            Image.fromarray(pixels.numpy()).save(folder / name / f"{i:02d}.png")
    (folder / "red" / "broken.png").write_bytes(b"this is no picture")
    return folder


def randomise(model: Model, seed: int = 0, std: float = 0.2) -> Model:
    """Weights under which nothing is zero, unlike fresh ones; those of norms lie around 1, and fixed positions stay."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            *_, module, kind = ("", *name.split("."))
            middle = 1 if "norm" in module and kind == "weight" else 0
            parameter.data = middle + std * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def randomised(config: Any, seed: int = 0) -> Model:
    """A network with such weights; small ones, so that deep networks do not saturate."""
    return randomise(config.build(), seed, 0.08)


def losses(recipe: Recipe, steps: int, std: float = 0.0) -> list[tuple[float, float]]:
    """Loss and norm of the gradient, step by step; with `std` of weights under which nothing is zero."""
    trainer = Trainer(recipe.fitted(data := recipe.data.open()), data)
    if std:
        mode = trainer.model.training
        randomise(trainer.model, std=std).train(mode)
    found = []
    for step in range(steps):
        terms, norm, _ = trainer.advance(trainer.read(step))
        found.append((terms["loss"], norm))
    return found


def tiny_autoencoder(folder: Path) -> Path:
    """A random AutoencoderKL of 4 channels and factor 2, in hub layout, whose decoder does not saturate."""
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    with torch.random.fork_rng():
        torch.manual_seed(0)
        sizes: dict[str, Any] = {
            "down_block_types": ("DownEncoderBlock2D",) * 2,
            "up_block_types": ("UpDecoderBlock2D",) * 2,
            "block_out_channels": (8, 16),
            "latent_channels": 4,
            "norm_num_groups": 4,
            "sample_size": 16,
        }
        model = AutoencoderKL(**sizes)
    model.save_pretrained(folder)
    return folder


Command = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def ditkit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Command:
    """Run the command line in this process, in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def run(*words: str | Path) -> subprocess.CompletedProcess[str]:
        capfd.readouterr()
        try:
            status = main([str(word) for word in words])
        except SystemExit as stop:
            status = int(stop.code or 0)
        return subprocess.CompletedProcess(words, status, *capfd.readouterr())

    return run


@pytest.fixture
def ditkit_process(tmp_path: Path) -> Command:
    """Run the command line in a fresh process, in an empty folder."""

    def run(*words: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "ditkit", *map(str, words)]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, **options)

    return run
