"""What the network predicts against the space of the loss: JiT's table 2 (Li & He 2025, arXiv 2511.13720).

Nine combinations of prediction (x0, eps, velocity) and loss space, on patches that hold far more numbers than the
network is wide, and again with small patches as a control. All nine are the same transform of one output into another,
without further weights; the linear path and JiT's clamp are common to all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..data import Digits, Folder
from ..diffusion import Heun, Linear, LogitNormal, Meaning, Regression, reading
from ..evaluation import measure_kid
from ..models import DiTConfig, JiTConfig
from ..pipeline import load
from ..recipe import Evaluate, Recipe, Sample, Train
from ..recipes.imagenet import IMAGES
from ..recipes.jit import jit_b_16
from ..report import Picture, Section, Table, Value, number, panels
from ..rng import Rng
from ..sheet import sheet
from .study import Cell, Claim, Finding, Results, Study

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["centre_of_times", "prediction_loss", "share_of_batch"]

SPACES = ("x0", "eps", "velocity")
PATCHES = ("large", "small")
BLACK = 8


def prediction_loss(preset: str = "cpu") -> Study:
    """cpu: digits, under a minute a run on two idle cores. full: the paper's JiT-B on ImageNet, a folder `imagenet`.

    In both, the two sizes of patch differ in the resolution of the images, so that there are equally many patches.
    """
    bases = _cpu() if preset == "cpu" else _full()
    cells = tuple(
        Cell(
            _name(patches, prediction, loss),
            replace(
                base,
                denoiser=replace(base.denoiser, prediction=prediction),
                objective=replace(base.objective, loss_space=loss),
            ),
        )
        for patches, base in bases.items()
        for prediction in SPACES
        for loss in SPACES
    )
    question = (
        "Does it matter what the network predicts and where its error is measured? With patches that hold far more "
        "numbers than the network is wide, JiT finds that only the prediction of data works, whatever the loss; with "
        "small patches all nine combinations work."
    )
    return Study("prediction-loss", preset, question, cells, _measure, _present, _CLAIMS)


def _cpu() -> dict[str, Recipe]:
    """Digits reduced to 8 x 8, on patches of 4 x 4; and the same with each pixel repeated 4 x 4, on patches of 16 x 16.

    Both have four patches, and the same images: what differs is that a patch of 16 numbers becomes one of 256, four
    times the width of the network, of which the data still needs 16. The noise grows with the repetition, or averaging
    would undo it (JiT scales the noise with the image, too). So few pixels drown in less noise than JiT's, hence the
    mean -0.8 of logit t; with -1.2 the cells of small patches differ less, and x0 prediction on large ones is worse.
    """
    small = Recipe(
        data=Digits(resolution=8),
        model=DiTConfig(patch_size=4, hidden_size=64, depth=3, num_heads=2, learn_sigma=False),
        denoiser=Meaning(Linear(), prediction="x0", clock="1000t", t_eps=0.05),
        objective=Regression("velocity", LogitNormal(-0.8, 0.8)),
        train=Train(
            steps=1200,
            batch=64,
            lr=2e-3,
            warmup=50,
            cooldown=720,
            emas=(0.99,),
            log_every=50,
            sample_every=0,
            checkpoint_every=600,
            keep=1,
        ),
        sample=Sample(steps=20, solver=Heun(), batch=200),
        evaluate=Evaluate(samples=400, size=64),
    )
    large = replace(
        small,
        data=Digits(resolution=8, repeat=4),
        model=replace(small.model, patch_size=16),
        denoiser=replace(small.denoiser, path=Linear(noise_scale=4.0)),
    )
    return {"large": large, "small": small}


def _full() -> dict[str, Recipe]:
    """JiT-B/16 at 256 px and JiT-B/4 at 64 px, 200 epochs (JiT table 9), with some images held out to compare with."""
    published = jit_b_16("imagenet")
    epoch = IMAGES / published.train.batch
    large = replace(
        published,
        data=Folder(path="imagenet", resolution=256),
        train=replace(
            published.train,
            steps=round(200 * epoch),
            warmup=round(5 * epoch),
            compile=False,
            sample_every=0,
            checkpoint_every=5000,
            keep=1,
        ),
        sample=Sample(steps=50, solver=Heun(), guidance=2.9, batch=128),
        evaluate=Evaluate(samples=50_000, size=224),
    )
    small = replace(large, data=Folder(path="imagenet", resolution=64), model=JiTConfig(patch_size=4))
    return {"large": large, "small": small}


def _name(patches: str, prediction: str, loss: str) -> str:
    return f"{patches}-{prediction}-{loss}"


def _measure(folder: Path, cell: Cell, seed: int) -> Finding:
    found = measure_kid(load(folder, device=cell.recipe.train.device), seed=seed)
    return Finding({k: v for k, v in found.numbers.items() if v is not None}, found.protocol, found.images)


def _kids(results: Results, patches: str, predictions: Sequence[str]) -> list[tuple[float, str]]:
    """KIDs of some cells of a size, with their names, the best first."""
    return sorted(
        (results.mean(_name(patches, s, loss), "kid"), f"{s} with {loss} loss") for s in predictions for loss in SPACES
    )


def _large(results: Results) -> tuple[str, bool]:
    worst, _ = _kids(results, "large", ("x0",))[-1]
    best, name = _kids(results, "large", ("eps", "velocity"))[0]
    found = f"{number(best / worst)} times: {name} {number(best)}, worst x0 cell {number(worst)}"
    return found, worst > 0 and best >= 3 * worst


def _small(results: Results) -> tuple[str, bool]:
    kids = _kids(results, "small", SPACES)
    (low, best), (high, worst) = kids[0], kids[-1]
    found = f"{number(high / low)} times: {worst} {number(high)}, {best} {number(low)}"
    return found, low > 0 and high <= 1.5 * low


_CLAIMS = (
    Claim(
        "large patches: every cell of eps or velocity prediction has at least 3 times the KID of the worst x0 cell",
        _large,
    ),
    Claim("small patches: the largest and the smallest of the nine differ by at most 1.5 times", _small),
)


def _weights(recipe: Recipe, prediction: str) -> tuple[Tensor, Tensor]:
    """100,000 times of training, and the weight gain^2 that the loss gives to an error in a space at each."""
    path, objective = recipe.denoiser.path, recipe.objective
    t = Rng(0).at(0, torch.arange(100_000))("t", objective.times.on(path)).double()
    return t, reading(prediction, objective.loss_space, path, t, recipe.denoiser.t_eps)[1].square()


def share_of_batch(recipe: Recipe) -> Value:
    """The share of a batch that a loss leans on, (sum w)^2 / (n sum w^2)."""
    _, weight = _weights(recipe, recipe.denoiser.prediction)
    return Value(float(weight.mean().square() / weight.square().mean()))


def centre_of_times(recipe: Recipe) -> Value:
    """The mean of logit t under the weight that the loss gives to an error of x0."""
    t, weight = _weights(recipe, "x0")
    return Value(float((weight * t.logit()).mean() / weight.mean()))


def _background(results: Results, columns: Sequence[str], rows: Sequence[str]) -> Section:
    """Noise that a network leaves where nothing is drawn: the KID of digits sees it."""

    def black(name: str) -> Value:
        images = results.samples(name)
        return Value(None if images is None else float((images < BLACK).float().mean()))

    small = next(c.recipe.data for c in results.study.cells if c.name.startswith("small"))
    heldout = small.open().heldout
    real = float((heldout.batch(torch.arange(len(heldout))).data < BLACK).float().mean())
    return Section(
        "The background, small patches",
        (
            f"The share of pixels below {BLACK} of 255 in 100 samples of the first seed; in held-out digits it is "
            f"{number(real)}.",
            Table(
                ("black", *columns),
                tuple((rows[i], *(black(_name("small", s, loss)) for loss in SPACES)) for i, s in enumerate(SPACES)),
            ),
        ),
    )


def _present(results: Results) -> tuple[Section, ...]:
    columns = [f"{loss} loss" for loss in SPACES]
    rows = [f"{prediction} prediction" for prediction in SPACES]

    def section(patches: str) -> Section:
        def draw(axes: Axes, row: int, column: int) -> None:
            images = results.samples(_name(patches, SPACES[row], SPACES[column]))
            if images is not None:
                shown = sheet(images[:30], 6, margin=max(1, images.shape[-1] // 12))
                axes.imshow(shown, cmap="gray", vmin=0, vmax=255, interpolation="nearest")

        model = next(c.recipe for c in results.study.cells if c.name.startswith(patches)).model
        numbers = model.patch_size**2 * (1 if isinstance(results.study.cells[0].recipe.data, Digits) else 3)
        table = Table(
            ("KID", *columns),
            tuple(
                (rows[i], *(results.value(_name(patches, s, loss), "kid") for loss in SPACES))
                for i, s in enumerate(SPACES)
            ),
        )
        said = f"{numbers} numbers in a patch, {model.hidden_size} in the width of the network."
        alt = f"samples with {patches} patches: rows what is predicted, columns the space of the loss"
        return Section(
            f"{patches.capitalize()} patches",
            (said, table, Picture(f"{patches}.png", alt, panels(rows, columns, draw))),
        )

    recipes = {cell.name: cell.recipe for cell in results.study.cells}
    leans = Table(
        ("", *columns),
        (
            *(
                (f"{rows[i]}: share", *(share_of_batch(recipes[_name("small", s, loss)]) for loss in SPACES))
                for i, s in enumerate(SPACES)
            ),
            ("all: centre of logit t", *(centre_of_times(recipes[_name("small", "x0", loss)]) for loss in SPACES)),
        ),
    )
    leaning = (
        "An error of the output becomes one in the space of the loss by a gain that depends on the time, so that a "
        "space is a weight, w = gain^2. Where w varies much, a few samples of a batch carry the gradient: the share "
        "is (sum w)^2 / (n sum w^2). And it moves the loss to other noise levels: the centre is the mean of logit t by "
        "the weight on an error of x0, whatever is predicted. Both over 100,000 times of training."
    )
    first = results.study.cells[0].recipe.data
    background = (_background(results, columns, rows),) if isinstance(first, Digits) else ()
    seconds = Table(
        ("seconds a run", "", *columns),
        tuple(
            (patches, rows[i], *(results.value(_name(patches, s, loss), "seconds") for loss in SPACES))
            for patches in PATCHES
            for i, s in enumerate(SPACES)
        ),
    )
    return (
        *map(section, PATCHES),
        Section("What the loss leans on, small patches", (leaning, leans)),
        *background,
        Section("Time", (seconds,)),
    )
