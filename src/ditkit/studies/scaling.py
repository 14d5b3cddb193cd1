"""Quality against compute: DiT in four sizes and three sizes of patch (Peebles & Xie 2022, arXiv 2212.09748, figure 8).

The paper finds that what counts is the compute of a forward pass, wherever it is spent: a larger network and smaller
patches are worth the same. All networks see as many samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

from ..data import Digits, Folder
from ..diffusion import AB2, LogitNormal, Meaning, Regression
from ..models import DiTConfig, model_config
from ..recipe import Evaluate, Recipe, Sample, Train
from ..recipes.dit import STEPS, dit_xl_2
from ..recipes.imagenet import latents
from ..report import Line, Picture, Section, Table, Value, lines, number
from .laws import power_law
from .measured import measure_network
from .study import Cell, Claim, Results, Study

__all__ = ["scaling"]

SIZES = ("s", "b", "l", "xl")
SMALL = {"s": (24, 2, 1), "b": (40, 3, 2), "l": (64, 4, 2), "xl": (96, 4, 3)}
"""Width, depth and heads of the cpu preset."""
PATCHES = {"cpu": (7, 4, 2), "full": (8, 4, 2)}


def scaling(preset: str = "cpu") -> Study:
    """cpu: digits of 28 px, 1,000 steps. full: the paper's twelve, 400K steps each, on ImageNet in a folder."""
    cells = _cpu() if preset == "cpu" else _full()
    question = (
        "Does the quality of a DiT follow from its compute alone, whether this goes into a larger network or into more "
        "and smaller patches, and is it a power law?"
    )
    seeds = (0, 1) if preset == "cpu" else (0,)
    return Study("scaling", preset, question, cells, measure_network, _present, _claims(PATCHES[preset]), seeds)


def _cpu() -> tuple[Cell, ...]:
    base = Recipe(
        data=Digits(),
        denoiser=Meaning(prediction="x0", clock="1000t", t_eps=0.05),
        objective=Regression("velocity", LogitNormal(0.8, 1.0)),
        train=Train(
            steps=1000,
            batch=32,
            lr=2e-3,
            warmup=50,
            cooldown=500,
            emas=(0.99,),
            log_every=25,
            sample_every=0,
            checkpoint_every=500,
            keep=1,
        ),
        sample=Sample(steps=20, solver=AB2(), batch=128),
        evaluate=Evaluate(samples=512, size=64),
    )
    cells = []
    for size, (width, depth, heads) in SMALL.items():
        for patch in PATCHES["cpu"]:
            model = DiTConfig(
                patch_size=patch, hidden_size=width, depth=depth, num_heads=heads, learn_sigma=False, num_classes=10
            )
            cells.append(Cell(_name(size, patch), replace(base, model=model)))
    return tuple(cells)


def _full() -> tuple[Cell, ...]:
    published = dit_xl_2("imagenet")
    base = replace(
        published,
        data=Folder(path="imagenet", resolution=256, flip=True),
        codec=latents("mse"),
        train=replace(published.train, steps=STEPS, sample_every=0, keep=1),
        sample=replace(published.sample, guidance=1.0, channels=None),
        evaluate=Evaluate(samples=50_000, size=224),
    )
    return tuple(
        Cell(_name(size, patch), replace(base, model=model_config(f"dit_{size}_{patch}")))
        for size in SIZES
        for patch in PATCHES["full"]
    )


def _name(size: str, patch: int) -> str:
    return f"{size}-{patch}"


def _points(results: Results, name: str) -> dict[float, list[float]]:
    found = {}
    for cell in results.study.cells:
        compute, values = results.value(cell.name, "gmacs").value, results.values(cell.name, name)
        if compute and values and min(values) > 0:
            found[compute] = values
    return found


def _claims(patches: tuple[int, ...]) -> tuple[Claim, ...]:
    def law(name: str, what: str) -> Claim:
        def judge(results: Results) -> tuple[str, bool]:
            for cell in results.study.cells:
                results.mean(cell.name, name)  # none may be missing
            fit = power_law(_points(results, name))
            said = f"{number(fit.exponent)}, {number(fit.low)} to {number(fit.high)}; {fit.explained:.0%} explained"
            return said, fit.high < 0 and fit.explained >= 0.8

        text = f"{what} falls as a power of GMACs: an exponent below 0 (95%), which explains at least 80% in logarithms"
        return Claim(text, judge)

    def falls(pairs: Sequence[tuple[str, str]], text: str) -> Claim:
        def judge(results: Results) -> tuple[str, bool]:
            wrong = [f"{a} to {b}" for a, b in pairs if results.mean(b, "loss") >= results.mean(a, "loss")]
            return f"{len(pairs) - len(wrong)} of {len(pairs)}" + (
                f", not {', '.join(wrong)}" if wrong else ""
            ), not wrong

        return Claim(text, judge)

    larger = [(_name(a, p), _name(b, p)) for p in patches for a, b in pairwise(SIZES)]
    smaller = [(_name(s, a), _name(s, b)) for s in SIZES for a, b in pairwise(patches)]
    return (
        law("loss", "held-out loss"),
        law("kid", "KID"),
        falls(larger, "every larger network has a lower held-out loss at the same patches"),
        falls(smaller, "every size has a lower held-out loss with smaller patches"),
    )


def _present(results: Results) -> tuple[Section, ...]:
    patches = PATCHES[results.study.preset]
    names = {"gmacs": "GMACs", "parameters": "parameters", "loss": "held-out loss", "kid": "KID", "seconds": "seconds"}
    rows = tuple((cell.name, *(results.value(cell.name, k) for k in names)) for cell in results.study.cells)
    parts: list[Table | Picture | str] = [Table(("size-patch", *names.values()), rows)]
    for name in ("loss", "kid"):
        points = _points(results, name)
        if len(points) >= 3:
            fit = power_law(points)
            parts.append(
                f"{names[name]} = {number(fit.factor)} GMACs^({Value(fit.exponent, fit.error)}): the interval of the "
                f"exponent is {number(fit.low)} to {number(fit.high)}, {fit.explained:.0%} of the variance of the "
                "logarithm is explained. The error is the bootstrap's over networks and seeds."
            )
        curves = []
        for patch in patches:
            values = {
                compute: results.value(_name(size, patch), name)
                for size in SIZES
                if (compute := results.value(_name(size, patch), "gmacs").value)
            }
            known = {x: v for x, v in values.items() if v.value and v.value > 0}
            if known:
                heights = [v.value or 0.0 for v in known.values()]
                errors = [v.error or 0.0 for v in known.values()]
                curves.append(Line(f"patches of {patch}", list(known), heights, errors))
        if curves:
            plot = lines(curves, "GMACs of a forward pass", names[name], log_x=True, log_y=True)
            parts.append(Picture(f"{name}.png", f"{names[name]} against GMACs, log-log", plot))
    return (Section("Twelve networks", tuple(parts)),)
