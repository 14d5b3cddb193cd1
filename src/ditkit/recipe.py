"""The recipe: one frozen dataclass that says everything about a run."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from . import encoders, models  # noqa: F401  the registry must know all of them before a recipe is read
from .averaging import decay_name, exponent, std_name
from .codecs import Pixels
from .conditioners import Label, text_encoder
from .conditioning import Conditioning, Given
from .config import DitkitError, differences, from_json, lookup, register, registered_as, to_json
from .data import Dataset, Digits
from .diffusion import CFG, Heun, LogitNormal, Meaning, Regression
from .diffusion.grid import Uniform as UniformGrid
from .rng import Draw

__all__ = ["Evaluate", "Gate", "Monitor", "Recipe", "Sample", "Train", "device_of"]


@register("settings", "monitor")
@dataclass(frozen=True)
class Monitor:
    """How a training is watched for copies of its data: losses and samples at steps 1, 2, 4, ... and between them."""

    budget: float = 0.05
    """Share of the time of the training that this may take; 0 = no monitor."""
    per_octave: int = 4
    """Evaluations while the number of steps doubles."""
    probes: int = 256
    """Training and held-out samples whose losses are compared."""
    levels: int = 4
    """Parts of the levels of noise that training draws, in which they are compared."""
    samples: int = 512
    """The most samples that are drawn at a time; fewer where the budget has no room for them."""
    steps: int = 20
    """Solver steps of these samples, if the recipe has not fewer."""

    def __post_init__(self) -> None:
        if not self.budget >= 0:
            raise DitkitError(f"train.monitor.budget is a share of the training time, not {self.budget}")
        for name in ("per_octave", "probes", "levels", "samples", "steps"):
            if getattr(self, name) < 1:
                raise DitkitError(f"train.monitor.{name} must be at least 1, not {getattr(self, name)}")

    def due(self, step: int) -> bool:
        """Whether there is an evaluation after this step, counted from 1."""
        return (
            int(self.per_octave * math.log2(step) + 1e-9) > int(self.per_octave * math.log2(step - 1) + 1e-9)
            if step > 1
            else step == 1
        )


@register("settings", "train")
@dataclass(frozen=True)
class Train:
    """How the weights are found. One step sees `batch` samples, in `accumulate` parts."""

    steps: int = 20_000
    batch: int = 64
    accumulate: int = 1
    """Parts into which a batch is cut to fit the memory; the result is the same up to rounding."""
    lr: float = 2e-4
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.0
    warmup: int = 0
    """Steps over which the learning rate rises linearly from 0."""
    cooldown: int = 0
    """Steps at the end over which the learning rate falls linearly to 0."""
    clip: float = 0.0
    """Largest gradient norm; 0 = no clipping."""
    precision: str = "fp32"
    """fp32, or bf16: autocast over float32 master weights."""
    emas: tuple[float, ...] = (0.9999,)
    """Decays of the averaged weights kept side by side; the first is what sampling uses."""
    ema_stds: tuple[float, ...] = ()
    """Lengths of power-function averages (EDM2), as shares of the training: 0.05 0.10. Without emas sampling uses the
    first."""
    snapshot_every: int = 0
    """Steps between stored snapshots of the power-function averages, from which one of any length is made afterwards;
    0 = none. They are not pruned."""
    compile: bool = False
    """Compile each block with torch.compile."""
    log_every: int = 10
    """Steps per row of log.jsonl; a row holds means over them."""
    sample_every: int = 1000
    """Steps between sample sheets; 0 = none."""
    checkpoint_every: int = 1000
    keep: int = 2
    """Number of newest checkpoints to keep."""
    tensorboard: bool = False
    """Write the log for tensorboard, too."""
    monitor: Any = Monitor()
    """Whether the network copies its data: what is looked at, and how much time this may take."""
    device: str = "auto"
    """auto (the first GPU, or else the CPU), cpu, cuda, cuda:1."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "accumulate", "log_every", "checkpoint_every", "keep"):
            if getattr(self, name) < 1:
                raise DitkitError(f"train.{name} must be at least 1, not {getattr(self, name)}")
        if self.batch % self.accumulate:
            raise DitkitError(f"train.batch {self.batch} cannot be cut into train.accumulate {self.accumulate} parts")
        if not self.lr > 0 or not all(0 <= b < 1 for b in self.betas):
            raise DitkitError(f"train.lr must be above 0 and train.betas in [0, 1), not {self.lr} and {self.betas}")
        for name in ("weight_decay", "warmup", "cooldown", "clip", "sample_every", "snapshot_every"):
            if not getattr(self, name) >= 0:
                raise DitkitError(f"train.{name} must not be negative, it is {getattr(self, name)}")
        if self.precision not in ("fp32", "bf16"):
            raise DitkitError(f"train.precision is fp32 or bf16, not {self.precision!r}")
        if not (self.emas or self.ema_stds) or not all(0 <= d < 1 for d in self.emas) or _twice(self.emas):
            raise DitkitError(f"train.emas are different decays in [0, 1), at least one, not {self.emas}")
        for std in self.ema_stds:
            exponent(std)
        if not isinstance(self.monitor, Monitor):
            raise DitkitError(f"train.monitor cannot be a {registered_as(self.monitor)[0]}")
        if _twice(self.ema_stds):
            raise DitkitError(f"train.ema_stds are different lengths, not {self.ema_stds}")
        if self.snapshot_every and not self.ema_stds:
            raise DitkitError("train.snapshot_every stores power-function averages: set train.ema_stds 0.05 0.1, too")

    @property
    def averages(self) -> tuple[str, ...]:
        """The names of all averages."""
        return (*map(decay_name, self.emas), *map(std_name, self.ema_stds))


def _twice(values: tuple[float, ...]) -> bool:
    return len(set(values)) < len(values)


@register("settings", "sample")
@dataclass(frozen=True)
class Sample:
    """How samples are drawn, unless said otherwise. Solver, grid and finish may be given by their names alone."""

    steps: int = 50
    solver: Any = Heun()
    """How a step is taken."""
    grid: Any = UniformGrid()
    """The times that are visited."""
    guidance: float = 1.0
    """Scale of classifier-free guidance; 1 = none."""
    interval: tuple[float, float] = (0.0, 1.0)
    """Guided where low < t < high, t = 1 being noise."""
    channels: int | None = None
    """Guide only the first channels (DiT: 3 of 4)."""
    guides: tuple[Any, ...] = ()
    """Other guides, which add up: apg, autoguidance, cfg, cfg_pp, cfg_zero_star, perturbed_attention, skip_layer."""
    finish: Any = None
    """rescale: what is done with the sum of all guides."""
    ema: float | None = None
    """Which of the averaged weights; None = the first, 0 = the weights themselves."""
    ema_std: float | None = None
    """The length of a power-function average instead."""
    batch: int = 64
    control_scale: float = 1.0
    """Strength of a ControlNet where a control image is given; 0 = its base alone."""

    def __post_init__(self) -> None:
        for name in ("solver", "grid", "finish"):
            if isinstance(getattr(self, name), str):
                object.__setattr__(self, name, lookup(name, getattr(self, name))())
        configs = [("solver", self.solver), ("grid", self.grid), *(("guides", g) for g in self.guides)]
        for name, config in [*configs, *([("finish", self.finish)] if self.finish is not None else [])]:
            kind = registered_as(config)[0]
            if kind != name.removesuffix("s"):
                raise DitkitError(f"sample.{name} cannot be a {kind}")
        if not isinstance(self.steps, int) or self.steps < 1:
            raise DitkitError(f"sampling takes at least 1 step, not {self.steps}")
        if self.batch < 1:
            raise DitkitError(f"sample.batch must be at least 1, not {self.batch}")
        if self.ema_std is not None:
            exponent(self.ema_std)
            if self.ema is not None:
                raise DitkitError("choose averaged weights by their decay (ema) or by their length (ema_std), not both")
        # what CFG accepts, said before anything is trained
        CFG(self.guidance, interval=self.interval, channels=self.channels)

    def all_guides(self) -> tuple[Any, ...]:
        """Plain guidance, where its scale is not 1, and the others."""
        plain = CFG(self.guidance, interval=self.interval, channels=self.channels)
        return self.guides if self.guidance == 1 else (plain, *self.guides)

    def average(self, train: Train) -> str:
        """The name of the weights to sample with: "ema-0.9999", "ema-std-0.05", or "model" for those not averaged."""
        if self.ema_std is not None:
            return std_name(self.ema_std)
        if self.ema is None:
            return train.averages[0]
        return decay_name(self.ema) if self.ema else "model"


@register("settings", "gate")
@dataclass(frozen=True)
class Gate:
    """A bound that a run must keep: `metric` at least or at most `bound`, or `bound` times or plus another metric."""

    metric: str
    relation: str
    """at_least or at_most"""
    bound: float
    times: str | None = None
    """The bound is multiplied by this metric."""
    plus: str | None = None
    """This metric is added to the bound."""

    def __post_init__(self) -> None:
        if self.relation not in ("at_least", "at_most"):
            raise DitkitError(f"a bound is at_least or at_most, not {self.relation!r}")

    def limit(self, numbers: dict[str, Any]) -> float:
        """The bound as a number."""
        return self.bound * (numbers[self.times] if self.times else 1.0) + (numbers[self.plus] if self.plus else 0.0)

    def holds(self, numbers: dict[str, Any]) -> bool:
        """Whether the bound is kept; a NaN keeps none."""
        value, limit = numbers[self.metric], self.limit(numbers)
        return value >= limit if self.relation == "at_least" else value <= limit

    def __str__(self) -> str:
        bound = (
            f"{self.bound:g}" + (f" x {self.times}" if self.times else "") + (f" + {self.plus}" if self.plus else "")
        )
        return f"{self.metric} {'>=' if self.relation == 'at_least' else '<='} {bound}"


@register("settings", "evaluate")
@dataclass(frozen=True)
class Evaluate:
    """How a run is measured."""

    samples: int = 1000
    size: int = 96
    """Side in pixels to which images are scaled for the feature network."""
    gates: tuple[Gate, ...] = ()
    """Bounds that must be kept for the evaluation to succeed."""
    times: int = 32
    """Draws of the time for each text when its likelihood is bounded."""

    def __post_init__(self) -> None:
        if self.samples < 10 or self.size < 32 or self.times < 1:
            raise DitkitError(
                "evaluate.samples must be at least 10, evaluate.size 32, evaluate.times 1; not "
                f"{self.samples}, {self.size}, {self.times}"
            )


@register("recipe", "recipe")
@dataclass(frozen=True)
class Recipe:
    """Everything about a run; saved as JSON in the run folder and in each checkpoint."""

    data: Any = Digits()
    """The samples."""
    codec: Any = Pixels()
    """From the data to the tensor that is diffused, and back."""
    conditioner: Any = Label()
    """What the network is given."""
    model: Any = models.JiTConfig()
    """The network."""
    denoiser: Any = Meaning(prediction="x0", clock="1-t", t_eps=0.05)
    """What the network's output means."""
    objective: Any = Regression(times=LogitNormal(0.8, 0.8))
    """What training minimises."""
    train: Train = Train()
    """How the weights are found."""
    sample: Sample = Sample()
    """How samples are drawn."""
    evaluate: Evaluate = Evaluate()
    """How a run is measured."""
    seed: int = 0
    """All randomness of the run."""

    def __post_init__(self) -> None:
        kinds = {"train": "settings", "sample": "settings", "evaluate": "settings"}
        for field in fields(self):
            if field.name != "seed":
                kind = registered_as(getattr(self, field.name))[0]
                if kind != kinds.get(field.name, field.name):
                    raise DitkitError(f"{field.name} cannot be a {kind}")

    def fitted(self, data: Dataset, learned: Mapping[str, Tensor] | None = None) -> Recipe:
        """The recipe for this data: each part takes its shape, classes or symbols from it.

        learned: what the codec has learned already, and does not learn anew. Data that is prepared brings the codec of
        its latents, and captions that are encoded already were encoded by this recipe's encoder. Raises DitkitError for
        parts that do not go together.
        """
        if data.codec is not None:
            codec = self._prepared(data)
        else:
            codec = (self.codec.loaded(learned) if learned else self.codec).fitted(data)
        shape = codec.shape(data.shape)
        denoiser = self.denoiser.fitted(codec.vocab)
        model = self.model.fitted(shape, len(data.classes), denoiser.vocab)
        conditioner = self.conditioner.fitted(data.classes)
        if text_encoder(conditioner) is not None:
            self._reads(conditioner, model, data)
        return replace(self, codec=codec, conditioner=conditioner, model=model, denoiser=denoiser)

    def given(self, batch: Given, device: torch.device | str = "cpu", rng: Draw | None = None) -> Conditioning:
        """What the network is given with a batch: what the conditioner makes, control images encoded as the data is.

        With `rng`, training dropout. Raises DitkitError for control images that the model cannot take.
        """
        cond = self.conditioner(batch, rng).to(device)
        return cond if cond.control is None else replace(cond, control=self.control(cond.control))

    def control(self, images: UInt8[Tensor, "b c h w"]) -> Float[Tensor, "b n *space"]:
        """Control images in the form of the data, as the model takes them. Raises DitkitError if it takes none."""
        return self.controlled.filled(self.codec.encode(images))

    @property
    def controlled(self) -> models.ControlConfig:
        """The model, which takes control images. Raises DitkitError if it does not."""
        if not isinstance(self.model, models.ControlConfig):
            name = registered_as(self.model)[1]
            raise DitkitError(f"the model {name} takes no control image: train a ControlNet of it (docs/control.md)")
        return self.model

    def _reads(self, conditioner: Any, model: Any, data: Dataset) -> None:
        """Raises DitkitError unless there are captions, and a model that takes them as the encoder sees them."""
        mine, theirs = text_encoder(conditioner), data.text_encoder
        if not data.captions:
            raise DitkitError(f"the conditioner text reads captions, and {data.name} has none: choose other data")
        if model.example(1).text is None:
            name = registered_as(model)[1]
            raise DitkitError(
                f"the model {name} reads no text: choose one that does, such as mmdit_tiny or pixart_tiny"
            )
        if theirs is not None and mine is not None and not mine.same(theirs):
            told = differences(to_json(theirs), to_json(mine), "conditioner.encoder")
            raise DitkitError(f"the captions of {data.name} were prepared with another text encoder: {'; '.join(told)}")

    def _prepared(self, data: Dataset) -> Any:
        """The codec of prepared data, if it is this recipe's, or if the recipe says none (pixels)."""
        mine, inner = to_json(getattr(self.codec, "inner", self.codec)), to_json(data.codec.inner)
        said = {name: value for name, value in mine.items() if value is not None}  # None is for the files to say
        if mine != to_json(Pixels()) and said != {name: inner.get(name) for name in said}:
            said = differences(said, {name: inner.get(name) for name in said}, "codec")[0]
            raise DitkitError(
                f"{data.name} was prepared with another codec: {said}; leave out --codec, or prepare it with this one"
            )
        return data.codec

    def to_json(self) -> str:
        """The recipe as indented JSON."""
        return json.dumps(to_json(self), indent=1) + "\n"

    @staticmethod
    def from_json(text: str, where: str = "recipe.json") -> Recipe:
        """The inverse of `to_json`. Raises DitkitError that names `where`."""
        try:
            value = json.loads(text)
        except json.JSONDecodeError as error:
            raise DitkitError(f"{where} is not JSON: {error}") from None
        recipe = from_json(value, where)
        if not isinstance(recipe, Recipe):
            raise DitkitError(f"{where} does not hold a recipe")
        return recipe


def device_of(name: str) -> torch.device:
    """A device by name; "auto" is the first GPU, or else the CPU. Raises DitkitError if it is not there.

    Only these two kinds: randomness is computed in float64 where the model is, which others do not have.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        if device.type in ("cpu", "cuda"):
            torch.empty(1, device=device)
            return device
        problem = "only cpu and cuda are supported"
    except (RuntimeError, AssertionError) as error:
        problem = str(error).splitlines()[0]
    raise DitkitError(f"the device {name!r} cannot be used: {problem}")
