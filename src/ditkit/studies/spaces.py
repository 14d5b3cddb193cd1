"""Where one diffuses and what one predicts: pixels or latents, x0, eps or velocity.

JiT's argument (Li & He 2025, arXiv 2511.13720) is about numbers in a patch: noise and velocity fill all of them, the
data does not. Latents are one way out, prediction of x0 is the other. The same network and the same number of tokens
here: patches of pixels that hold more numbers than the network is wide, or a few of their principal components.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..codecs import Pca
from ..data import Digits
from ..evaluation import codec_kid, measure_kid
from ..pipeline import load
from ..recipe import Evaluate, Recipe
from ..recipes.imagenet import latents
from ..report import Picture, Section, Table, number, panels
from ..sheet import sheet
from .prediction_loss import SPACES, prediction_loss
from .study import Cell, Claim, Finding, Results, Study

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["spaces"]

DIFFUSED = ("pixel", "latent")


def spaces(preset: str = "cpu") -> Study:
    """cpu: digits, the network of prediction-loss made narrower. full: ImageNet in a folder, JiT-B/16 on pixels and the
    same network with patches of 2 on latents of 32 x 32."""
    large = next(c.recipe for c in prediction_loss(preset).cells if c.name == "large-x0-velocity")
    bases = _cpu(large) if preset == "cpu" else _full(large)
    cells = tuple(
        Cell(f"{space}-{prediction}", replace(base, denoiser=replace(base.denoiser, prediction=prediction)))
        for space, base in bases.items()
        for prediction in SPACES
    )
    question = (
        "Does the choice of what is predicted matter as much on latents as on pixels? Where a patch of pixels holds "
        "more numbers than the network is wide, only x0 should work; on latents of the same patches all three should."
    )
    return Study("spaces", preset, question, cells, _measure, _present, _CLAIMS)


def _cpu(large: Recipe) -> dict[str, Recipe]:
    """16 tokens: patches of 7 x 7 pixels, 49 numbers for a network of 32, or 12 components of each."""
    pixel = replace(
        large,
        data=Digits(),
        model=replace(large.model, patch_size=7, hidden_size=32, depth=4),
        denoiser=replace(large.denoiser, path=type(large.denoiser.path)()),
        train=replace(large.train, steps=1500, cooldown=750, checkpoint_every=750),
        evaluate=Evaluate(samples=400, size=64),
    )
    latent = replace(pixel, codec=Pca(factor=7, channels=12), model=replace(pixel.model, patch_size=1))
    return {"pixel": pixel, "latent": latent}


def _full(large: Recipe) -> dict[str, Recipe]:
    latent = replace(large, codec=latents("mse"), model=replace(large.model, patch_size=2, input_size=32))
    return {"pixel": large, "latent": latent}


def _measure(folder: Path, cell: Cell, seed: int) -> Finding:
    pipeline = load(folder, device=cell.recipe.train.device)
    found = measure_kid(pipeline, seed=seed)
    numbers = {k: v for k, v in found.numbers.items() if v is not None}
    if cell.name.startswith("latent"):
        numbers["kid_codec"] = codec_kid(pipeline)
    return Finding(numbers, found.protocol, found.images)


def _kids(results: Results, space: str) -> dict[str, float]:
    return {p: results.mean(f"{space}-{p}", "kid") for p in SPACES}


def _said(kids: dict[str, float]) -> str:
    return ", ".join(f"{p} {number(v)}" for p, v in kids.items())


def _pixels(results: Results) -> tuple[str, bool]:
    kids = _kids(results, "pixel")
    return _said(kids), min(kids["eps"], kids["velocity"]) >= 2 * kids["x0"]


def _latents(results: Results) -> tuple[str, bool]:
    kids = _kids(results, "latent")
    return _said(kids), max(kids.values()) <= 2 * min(kids.values())


def _best(results: Results) -> tuple[str, bool]:
    best = {space: min(_kids(results, space).values()) for space in DIFFUSED}
    return _said(best), best["latent"] < best["pixel"]


_CLAIMS = (
    Claim("pixels: eps and velocity prediction have at least twice the KID of x0", _pixels),
    Claim("latents: the KIDs of all three are within 2 times of each other", _latents),
    Claim("the best on latents has a lower KID than the best on pixels", _best),
)


def _present(results: Results) -> tuple[Section, ...]:
    def draw(axes: Axes, row: int, column: int) -> None:
        images = results.samples(f"{DIFFUSED[row]}-{SPACES[column]}")
        if images is not None:
            shown = sheet(images[:30], 6, margin=2)
            axes.imshow(shown, cmap="gray", vmin=0, vmax=255, interpolation="nearest")

    rows = tuple((space, *(results.value(f"{space}-{p}", "kid") for p in SPACES)) for space in DIFFUSED)
    codec = results.value("latent-x0", "kid_codec")
    said = (f"Held-out images that only pass through the codec have a KID of {codec}.",) if codec.value else ()
    picture = Picture(
        "samples.png", "rows: pixels, latents; columns: x0, eps, velocity", panels(DIFFUSED, SPACES, draw)
    )
    return (Section("Pixels and latents", (Table(("KID", *SPACES), rows), *said, picture)),)
