"""Backbones on equal terms: a residual network, a U-Net, DiT on pixels and on latents, and JiT, at equal compute.

All see the same samples in the same order, with the same prediction, loss, times, steps, batch, averages and sampler,
and take the same multiply-accumulates a sample within 5%, so that every point of a training is at equal training
compute (three forward passes a sample). Two tasks: digits of a class that is given, and twins, two digits of one class
at the two ends of a picture, which ask for a view from one end to the other.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from ..codecs import Pca
from ..data import Digits, Folder, Twins
from ..diffusion import AB2, Heun, LogitNormal, Meaning, Regression
from ..evaluation import Classifier, codec_kid, heldout_loss, measure_kid, train_classifier
from ..guarded import network
from ..models import DiTConfig, JiTConfig, ResNetConfig, UNetConfig
from ..pipeline import Pipeline, load
from ..plan import cost, gmacs
from ..recipe import Evaluate, Recipe, Sample, Train
from ..recipes.imagenet import latents
from ..report import Line, Picture, Section, Table, Value, lines, number, panels
from ..rng import Rng
from ..runs import Run, step_of
from ..sheet import sheet
from .study import Cell, Claim, Finding, Results, Study

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["BUDGETS", "NETWORKS", "agreement", "backbones", "far_share"]

BUDGETS = {"digits": 0.0142, "twins": 0.0190}
"""GMACs of a forward pass of one sample, which every network meets within 5%: about those of the smallest U-Net."""
POINTS = 4
"""Checkpoints of a training that are measured, at equal distances."""
NETWORKS: dict[str, Any] = {
    "resnet": ResNetConfig(patch_size=2, channels=28, depth=5, groups=4),
    "resnet_far": ResNetConfig(patch_size=4, channels=40, depth=10, groups=4),
    "unet": UNetConfig(
        model_channels=8,
        channel_mult=(1, 2, 2),
        num_res_blocks=1,
        attention_resolutions=(4,),
        num_heads=2,
        num_head_channels=0,
        norm_groups=4,
        learn_sigma=False,
    ),
    "dit": DiTConfig(patch_size=4, hidden_size=72, depth=4, num_heads=2, learn_sigma=False),
    "jit": JiTConfig(
        patch_size=4,
        hidden_size=72,
        depth=4,
        num_heads=2,
        bottleneck_dim=16,
        in_context_len=4,
        in_context_start=1,
    ),
    "latent_dit": DiTConfig(patch_size=1, hidden_size=72, depth=4, num_heads=2, learn_sigma=False),
}
"""What `match` of ditkit.budget makes of each family at the budgets (tests/test_studies.py)."""
RATE = 4e-3
"""The same for all, after the same small sweep for each (benchmarks/backbone_rates.py; docs/studies.md has it)."""
DIGITS = ("resnet", "unet", "dit", "jit", "latent_dit")
TWINS = ("resnet", "resnet_far", "unet", "dit", "jit", "latent_dit")
PIXELS = ("resnet", "unet", "dit", "jit")


def backbones(preset: str = "cpu") -> Study:
    """cpu: digits of 28 px and twins of 16 x 64. full: images of 256 px in a folder `imagenet`, at the compute of
    DiT-B/2, 400K steps of 256; without twins."""
    cells = _cpu() if preset == "cpu" else _full()
    question = (
        "Which backbone draws best at equal training compute: a residual network, a U-Net, a transformer on pixels "
        "(DiT, JiT) or on latents? And which of them can make two ends of a picture agree?"
    )
    return Study("backbones", preset, question, cells, _measure, _present, _claims(preset), (0, 1))


def _cpu() -> tuple[Cell, ...]:
    base = Recipe(
        denoiser=Meaning(prediction="x0", clock="1000t", t_eps=0.05),
        objective=Regression("velocity", LogitNormal(0.8, 1.0)),
        train=Train(
            steps=1200,
            batch=32,
            lr=RATE,
            warmup=50,
            cooldown=600,
            emas=(0.99,),
            log_every=25,
            sample_every=0,
            checkpoint_every=1200 // POINTS,
            keep=POINTS,
        ),
        # one evaluation of the network a step
        sample=Sample(steps=20, solver=AB2(), batch=128),
        evaluate=Evaluate(samples=512, size=64),
    )
    tasks = (("digits", Digits(), DIGITS), ("twins", Twins(), TWINS))
    return tuple(_cell(replace(base, data=data), task, name) for task, data, names in tasks for name in names)


def _cell(base: Recipe, task: str, name: str) -> Cell:
    """Each network speaks its authors' time; all else is the same."""
    recipe = replace(base, model=NETWORKS[name])
    if name == "jit":
        recipe = replace(recipe, denoiser=replace(base.denoiser, clock="1-t"))
    if name == "latent_dit":
        recipe = replace(recipe, codec=Pca(factor=4, channels=8))
    return Cell(f"{task}-{name}", recipe)


def _full() -> tuple[Cell, ...]:
    """23 GMACs: DiT-B/2 on latents of 32 x 32, and the others sized to it on pixels."""
    base = Recipe(
        data=Folder(path="imagenet", resolution=256, flip=True),
        denoiser=Meaning(prediction="x0", clock="1000t", t_eps=0.05),
        objective=Regression("velocity", LogitNormal(0.8, 1.0)),
        train=Train(
            steps=400_000,
            batch=256,
            lr=1e-4,
            warmup=5000,
            precision="bf16",
            sample_every=0,
            checkpoint_every=400_000 // POINTS,
            keep=POINTS,
        ),
        sample=Sample(steps=50, solver=Heun(), batch=64),
        evaluate=Evaluate(samples=50_000, size=224),
    )
    b: dict[str, Any] = {"hidden_size": 768, "depth": 12, "num_heads": 12}
    networks = {
        "resnet": ResNetConfig(patch_size=8, channels=192, depth=32),
        "unet": UNetConfig(
            model_channels=48,
            channel_mult=(1, 1, 1, 2, 3),
            num_res_blocks=1,
            attention_resolutions=(16,),
            num_head_channels=16,
            norm_groups=16,
            learn_sigma=False,
        ),
        "dit": DiTConfig(patch_size=16, learn_sigma=False, **b),
        "jit": JiTConfig(depth=11),
        "latent_dit": DiTConfig(learn_sigma=False, **b),
    }
    cells = {name: replace(base, model=model) for name, model in networks.items()}
    cells["jit"] = replace(cells["jit"], denoiser=replace(base.denoiser, clock="1-t"))
    cells["latent_dit"] = replace(cells["latent_dit"], codec=latents("mse"))
    return tuple(Cell(f"digits-{name}", recipe) for name, recipe in cells.items())


def _measure(folder: Path, cell: Cell, seed: int) -> Finding:
    numbers: dict[str, float] = {}
    pipeline = found = None
    for path in Run(folder).checkpoints():  # the newest one is the last
        pipeline = load(path, device=cell.recipe.train.device)
        found = measure_kid(pipeline, seed=seed)
        numbers[f"kid_at_{step_of(path)}"] = found.numbers["kid"] or 0.0
    assert pipeline is not None
    assert found is not None
    model, train = pipeline.recipe.model, pipeline.recipe.train
    per_sample = gmacs(model, model.shape)
    numbers |= {name: value for name, value in found.numbers.items() if value is not None}
    numbers |= {
        "loss": heldout_loss(pipeline),
        "gmacs": per_sample,
        "training_tflop": 6e-3 * per_sample * train.steps * train.batch,
        "parameters": float(sum(p.numel() for p in pipeline.model.parameters() if p.requires_grad)),
        "training_seconds": float(Run(folder).rows()[-1]["seconds"]),
        "planned_mib": cost(model, batch=train.batch, dtype="fp32").training / 2**20,
        "far_share": far_share(pipeline),
    }
    if seed == 0 and train.batch <= 64:
        taken = network(model, train.batch, training=True, limit=4 * 2**30)
        numbers["measured_mib"] = taken.bytes / 2**20
    if pipeline.recipe.codec.__class__ is Pca:
        numbers["kid_codec"] = codec_kid(pipeline)
    numbers |= _seen(cell.recipe.data, found.images, found.labels)
    protocol = {
        **found.protocol,
        "loss": "the training loss of the averaged weights on 1,000 held-out samples, one time and noise each; of "
        "latents it is in latents, and compares with no other",
        "training_tflop": "two operations a multiply-accumulate, a backward pass as two forward ones",
        "planned_mib": "weights, gradients, moments, an average and what a step holds, by shapes alone",
        "measured_mib": "resident memory that three training steps add to a process that has loaded everything",
        "far_share": "of the squared gradient of x0 at a third of the width, middle row, by x at t = 0.5: the share in "
        "the last third of the columns, mean of 64 held-out samples",
    }
    return Finding(numbers, protocol, found.images)


@functools.lru_cache(maxsize=2)
def _classifier(side: int) -> Classifier:
    data = Digits(resolution=side).open()
    batch = data.train.batch(torch.arange(len(data.train)))
    assert batch.label is not None
    return train_classifier(batch.data, batch.label, 10)


def _seen(data: Any, images: Tensor, labels: Tensor | None) -> dict[str, float]:
    """What a classifier of single digits sees: the class asked for; or the same class at both ends."""
    if isinstance(data, Digits):
        assert labels is not None
        return {"class_accuracy": _classifier(data.resolution).accuracy(images, labels)}
    if isinstance(data, Twins):
        real = _all(data)
        classifier = _classifier(data.side)
        return {
            **agreement(classifier, data, images),
            "agreement_real": agreement(classifier, data, real)["agreement"],
        }
    return {}


def _all(data: Twins) -> Tensor:
    split = data.open().heldout
    return split.batch(torch.arange(len(split))).data


class Sees(Protocol):
    """Something that tells the classes of images."""

    def predict(self, images: Tensor) -> Tensor: ...


def agreement(classifier: Sees, data: Twins, pictures: UInt8[Tensor, "n 1 s w"]) -> dict[str, float]:
    """In which share of pictures both ends show one class; and in which they would by chance, with these classes at
    each end: a network that always draws one class agrees, too."""
    left, right = map(classifier.predict, data.ends(pictures))
    shares = [
        end.bincount(minlength=int(max(left.max(), right.max())) + 1).double() / len(end) for end in (left, right)
    ]
    return {"agreement": float((left == right).double().mean()), "agreement_chance": float(shares[0] @ shares[1])}


def far_share(pipeline: Pipeline, samples: int = 64) -> float:
    """How much of what a network draws at one end depends on the other end: of the squared gradient of its x0 at the
    place a sixth from the left, in the middle row, the share that is of the last third of the columns of x.

    At t = 0.5, over held-out samples. All pixels at once would give 1/3. Norms whose means go over the whole picture
    are a view of it, too, which is why convolutions alone do not decide.
    """
    recipe, split, rng = pipeline.recipe, pipeline.recipe.data.open().heldout, Rng(0)
    ids = torch.arange(min(samples, len(split)))
    draws, batch = rng.at(0, ids.to(pipeline.device)), split.batch(ids)
    x0 = recipe.codec.encode(batch.data.to(pipeline.device), draws)
    cond = recipe.given(batch.given, pipeline.device)
    t = torch.full((len(ids),), 0.5, device=x0.device)
    alpha, sigma = recipe.denoiser.path(t[0].double())
    x = (float(alpha) * x0 + float(sigma) * draws("noise", "normal", x0.shape[1:])).detach().requires_grad_()
    with torch.enable_grad():
        out = pipeline.denoiser(x, t, cond).x0
        out[:, :, out.shape[2] // 2, out.shape[3] // 6].sum().backward()
    assert x.grad is not None
    return _last_third(x.grad)


def _last_third(gradient: Float[Tensor, "b c h w"]) -> float:
    columns = gradient.double().square().sum((1, 2))
    share = columns[:, -(columns.shape[1] // 3) :].sum(1) / columns.sum(1)
    return float(share.mean())


def _claims(preset: str) -> tuple[Claim, ...]:
    def lowest(name: str, cells: Sequence[str], best: str) -> Claim:
        def judge(results: Results) -> tuple[str, bool]:
            found = sorted((results.mean(f"digits-{c}", name), c) for c in cells)
            return ", ".join(f"{c} {number(v)}" for v, c in found), found[0][1] == best

        return Claim(f"digits: of the networks on pixels {best} has the lowest {WORDS[name]}", judge)

    def transformers(results: Results) -> tuple[str, bool]:
        a, b = (results.mean(f"digits-{c}", "kid") for c in ("dit", "jit"))
        return f"dit {number(a)}, jit {number(b)}", max(a, b) <= 1.5 * min(a, b)

    def latent(results: Results) -> tuple[str, bool]:
        a, b = (results.mean(f"digits-{c}", "kid") for c in ("latent_dit", "dit"))
        return f"latent_dit {number(a)}, dit {number(b)}", a < b

    def above(results: Results, cell: str) -> float:
        return results.mean(f"twins-{cell}", "agreement") - results.mean(f"twins-{cell}", "agreement_chance")

    def blind(results: Results) -> tuple[str, bool]:
        return number(above(results, "resnet")), above(results, "resnet") <= 0.15

    def seeing(results: Results) -> tuple[str, bool]:
        found = {c: above(results, c) for c in TWINS if c != "resnet"}
        return ", ".join(f"{c} {number(v)}" for c, v in found.items()), min(found.values()) >= 0.3

    def reach(results: Results) -> tuple[str, bool]:
        found = {c: results.mean(f"twins-{c}", "far_share") for c in TWINS}
        said = ", ".join(f"{c} {number(v)}" for c, v in found.items())
        return said, found["resnet"] < 0.01 <= min(v for c, v in found.items() if c != "resnet")

    claims = (
        lowest("kid", PIXELS, "unet"),
        lowest("loss", PIXELS, "unet"),
        Claim("digits: the KIDs of dit and jit are within 1.5 times of each other", transformers),
        Claim("digits: latent_dit has a lower KID than dit", latent),
    )
    twins = (
        Claim(
            "twins: resnet, which sees 24 pixels around a pixel where the digits are 48 apart, agrees at both ends in "
            "at most 0.15 more of the samples than by chance",
            blind,
        ),
        Claim("twins: every other network, resnet_far with its 88 pixels among them, in at least 0.3 more", seeing),
        Claim("twins: 1% or more of the gradient comes from the far end in every network but resnet", reach),
    )
    return claims if preset == "full" else (*claims, *twins)


WORDS = {"kid": "KID", "loss": "held-out loss"}


def _present(results: Results) -> tuple[Section, ...]:
    tasks = dict.fromkeys(cell.name.split("-")[0] for cell in results.study.cells)
    return tuple(_task(results, task) for task in tasks)


def _task(results: Results, task: str) -> Section:
    cells = [cell for cell in results.study.cells if cell.name.startswith(f"{task}-")]
    names = [cell.name.split("-")[1] for cell in cells]
    columns = {
        "kid": "KID",
        "class_accuracy": "class accuracy",
        "agreement": "agreement",
        "agreement_chance": "by chance",
        "agreement_real": "of real ones",
        "far_share": "gradient from the far end",
        "loss": "held-out loss",
    }
    costs = {
        "gmacs": "GMACs",
        "training_tflop": "TFLOP of training",
        "training_seconds": "seconds of training",
        "parameters": "parameters",
        "planned_mib": "MiB planned",
        "measured_mib": "MiB measured",
    }
    shown = {k: v for k, v in columns.items() if any(results.values(cell.name, k) for cell in cells)}

    def table(chosen: dict[str, str]) -> Table:
        rows = ((name, *(results.value(cell.name, k) for k in chosen)) for name, cell in zip(names, cells, strict=True))
        return Table((task, *chosen.values()), tuple(rows))

    curves = []
    for name, cell in zip(names, cells, strict=True):
        every, steps = cell.recipe.train.checkpoint_every, cell.recipe.train.steps
        values = [(s, results.value(cell.name, f"kid_at_{s}")) for s in range(every, steps + 1, every)]
        per_step = results.value(cell.name, "training_tflop").value
        known = [(s, v) for s, v in values if v.value is not None]
        if known and per_step:
            flops = [per_step * s / steps for s, _ in known]
            heights = [v.value or 0.0 for _, v in known]
            curves.append(Line(name, flops, heights, [v.error or 0.0 for _, v in known]))

    def draw(axes: Axes, row: int, column: int) -> None:
        images = results.samples(cells[column].name)
        if images is not None:
            wide = images.shape[-1] > 2 * images.shape[-2]
            drawn = sheet(images[:20] if wide else images[:30], 2 if wide else 5, margin=2)
            axes.imshow(drawn, cmap="gray", vmin=0, vmax=255, interpolation="nearest")

    pictures = [Picture(f"{task}.png", f"samples of {task}, network by network", panels([""], names, draw))]
    if curves:
        plot = lines(curves, "TFLOP of training", "KID", log_y=True)
        pictures.insert(0, Picture(f"{task}-kid.png", f"KID against training compute, {task}", plot))
    codec = [v for v in (_codec(results, cell.name) for cell in cells) if v]
    return Section(task.capitalize(), (table(shown), *pictures, table(costs), *codec))


def _codec(results: Results, cell: str) -> str:
    value: Value = results.value(cell, "kid_codec")
    return f"Held-out images that only pass through the codec of {cell} have a KID of {value}." if value.value else ""
