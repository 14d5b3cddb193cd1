"""How time and class enter a block: DiT's four ways at one cost (Peebles & Xie 2022, arXiv 2212.09748, figure 5).

As two tokens among those of the image, as two tokens to attend to, as shifts and scales of the norms, or as these with
gates that start at 0. The paper gives all four the same width and depth, where attending costs 16% more; the small
preset takes that away from its depth.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from ..data import Digits, Folder
from ..diffusion import Heun, LogitNormal, Meaning, Regression
from ..models import DiTConfig
from ..recipe import Evaluate, Recipe, Sample, Train
from ..recipes.dit import STEPS, dit_xl_2
from ..recipes.imagenet import latents
from ..report import Picture, Section, Table, Value, number, panels
from ..sheet import sheet
from .measured import measure_network
from .study import Cell, Claim, Results, Study

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["conditioning"]

ORDER = ("adaln_zero", "adaln", "cross_attention", "in_context")
"""From the best to the worst in the paper: FID-50K 19.47, 25.21, 26.14, 35.24 (XL/2, 400K steps, no guidance)."""


def conditioning(preset: str = "cpu") -> Study:
    """cpu: digits, GMACs within 5%. full: the paper's DiT-XL/2, 400K steps, on ImageNet in a folder `imagenet`."""
    cells = _cpu() if preset == "cpu" else _full()
    question = (
        "A network must be told the time and the class. DiT compares four ways, and finds adaLN-Zero best, then adaLN, "
        "cross-attention, and in-context tokens last, although the last costs no less. Is it so at equal compute?"
    )
    seeds = (0, 1) if preset == "cpu" else (0,)
    return Study("conditioning", preset, question, cells, measure_network, _present, _CLAIMS, seeds)


DEPTHS = {"adaln_zero": 13, "adaln": 13, "cross_attention": 11, "in_context": 12}
"""Blocks of equal GMACs within 5% on 16 tokens, of which two more are an eighth."""


def _cpu() -> tuple[Cell, ...]:
    """Digits reduced to 8 x 8, 16 tokens of 4 pixels, unguided."""
    base = Recipe(
        data=Digits(resolution=8),
        model=DiTConfig(patch_size=2, hidden_size=32, num_heads=2, learn_sigma=False),
        denoiser=Meaning(prediction="x0", clock="1000t", t_eps=0.05),
        objective=Regression("velocity", LogitNormal(-0.8, 0.8)),
        train=Train(
            steps=1000,
            batch=64,
            lr=2e-3,
            warmup=50,
            cooldown=600,
            emas=(0.99,),
            log_every=50,
            sample_every=0,
            checkpoint_every=500,
            keep=1,
        ),
        sample=Sample(steps=20, solver=Heun(), batch=200),
        evaluate=Evaluate(samples=400, size=64),
    )
    return tuple(
        Cell(way, replace(base, model=replace(base.model, conditioning=way, depth=DEPTHS[way]))) for way in ORDER
    )


def _full() -> tuple[Cell, ...]:
    """As published, with some images held out to compare with."""
    published = dit_xl_2("imagenet")
    base = replace(
        published,
        data=Folder(path="imagenet", resolution=256, flip=True),
        codec=latents("mse"),
        train=replace(published.train, steps=STEPS, sample_every=0, keep=1),
        sample=replace(published.sample, guidance=1.0, channels=None),
        evaluate=Evaluate(samples=50_000, size=224),
    )
    return tuple(Cell(way, replace(base, model=replace(base.model, conditioning=way))) for way in ORDER)


def _ordered(results: Results, name: str) -> list[tuple[float, str]]:
    return sorted((results.mean(way, name), way) for way in ORDER)


def _claims(name: str, what: str) -> tuple[Claim, ...]:
    def best(results: Results) -> tuple[str, bool]:
        (low, first), (second, after) = _ordered(results, name)[:2]
        return f"{first} {number(low)}, then {after} {number(second)}", first == ORDER[0]

    def order(results: Results) -> tuple[str, bool]:
        found = _ordered(results, name)
        return ", ".join(f"{way} {number(value)}" for value, way in found), tuple(way for _, way in found) == ORDER

    return (
        Claim(f"adaln_zero has the lowest {what}", best),
        Claim(f"{what}: the order is the paper's, from the best: {', '.join(ORDER)}", order),
    )


_CLAIMS = (*_claims("kid", "KID"), *_claims("loss", "held-out loss"))


def _present(results: Results) -> tuple[Section, ...]:
    def row(cell: Cell) -> tuple[str | Value, ...]:
        measured = (results.value(cell.name, name) for name in ("kid", "loss", "gmacs", "parameters", "seconds"))
        return (cell.name, str(cell.recipe.model.depth), *measured)

    head = ("conditioning", "blocks", "KID", "held-out loss", "GMACs", "parameters", "seconds a run")
    table = Table(head, tuple(row(cell) for cell in results.study.cells))

    def draw(axes: Axes, row: int, column: int) -> None:
        images = results.samples(ORDER[column])
        if images is not None:
            shown = sheet(images[:60], 10, margin=max(1, images.shape[-1] // 12))
            axes.imshow(shown, cmap="gray", vmin=0, vmax=255, interpolation="nearest")

    picture = panels([""], list(ORDER), draw, side=3.2)
    return (
        Section(
            "Four ways",
            (
                "GMACs are of one forward pass of one sample. Samples are drawn without guidance.",
                table,
                Picture("samples.png", "samples of the four networks of the first seed", picture),
            ),
        ),
    )
