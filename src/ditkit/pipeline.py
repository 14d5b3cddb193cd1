"""From weights to samples: codec + conditioner + denoiser + guides + grid + solver."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from jaxtyping import Int, Shaped, UInt8
from torch import Tensor

from .conditioners import text_encoder
from .conditioning import Conditioning, Given, Known
from .config import DitkitError, NotFinite, near, registered_as
from .data import Batch, Dataset, Split, evenly, points, strings
from .diffusion import (
    Autoguidance,
    ClassifierFree,
    Denoiser,
    Guided,
    Reconstruction,
    TokenDenoiser,
    check_grid,
    guide,
    integrate,
    keep,
)
from .given import checked_control, checked_embeddings, checked_known, encoded_known, needed
from .interop import FORMATS, adapted
from .models import Autoencoder, ControlConfig, Model, unadapted
from .recipe import Recipe, Sample, device_of
from .reconstructions import Reconstructions
from .rng import Rng
from .runs import find_run
from .sheet import beside

__all__ = ["Pipeline", "load", "open_run", "trained"]

_NOTHING = Conditioning()


def _joined(cond: Conditioning, parts: Conditioning) -> Conditioning:
    """What a person gives beside what the conditioner makes."""
    names = ("text", "pooled", "audio", "known", "control")
    given = {name: getattr(parts, name) for name in names if getattr(parts, name) is not None}
    return dataclasses.replace(cond, **given, scalars={**cond.scalars, **parts.scalars})


class Pipeline:
    """A trained model with all it takes to sample: `pipeline.sample(label="3", count=16)`."""

    def __init__(self, recipe: Recipe, model: Model, shape: Sequence[int], origin: str = "memory"):
        """shape: of one encoded sample; origin: where the weights come from, for protocols."""
        self.recipe, self.model, self.shape, self.origin = recipe, model.eval(), tuple(shape), origin
        self.denoiser = recipe.denoiser.of(self.model)
        self._loaded: dict[str, Denoiser] = {}

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the classes; empty if the model is given none."""
        return self.recipe.conditioner.classes

    @property
    def captioned(self) -> bool:
        """Whether the model is given captions, which a person writes as prompts."""
        return text_encoder(self.recipe.conditioner) is not None

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def sample(
        self,
        label: str | int | Sequence[str | int] | Tensor | None = None,
        count: int = 16,
        *,
        first: int = 0,
        prompt: str | Sequence[str] | None = None,
        embeddings: Conditioning | None = None,
        negative: Conditioning | None = None,
        known: Known | None = None,
        control: UInt8[Tensor, "*n c h w"] | None = None,
        seed: int = 0,
        progress: Callable[[int, int], None] | None = None,
        **settings: Any,
    ) -> Shaped[Tensor, "n *sample"]:
        """Draw samples, on the CPU and in the form of the data: bytes of images, vectors, code points of texts.

        label: a class by name or number for all samples, one for each, or None for all classes in turn. Sample i
        depends on (seed, i), its label, its prompt and what is known of it alone, not on `count` or on the batch.
        first: the number of the first sample, so that processes can share the work; what is given for each is given for
        these. prompt: what to draw, of a model that was trained with captions: one for all samples or one for each;
        None: the empty one. embeddings: what encoders made of texts or of speech, of a network whose recipe has none:
        text, pooled, audio and scalars, one row for all samples or one for each; negative: the same of the texts that
        guidance turns away from. known: a part of the sample that is given, in the form of the data, for all [*sample]
        or for each [count *sample]; the rest is drawn, and what stands in `known.values` where `known.mask` is False
        changes nothing. Latents are known where all pixels are that the mask has for them. control: a control image in
        the form of the data for all samples, or one for each; without it a ControlNet is its base. settings: fields of
        `Sample` that differ from the recipe's, such as steps=20, guidance=2.0, control_scale=0.8. progress(done, total)
        counts solver steps. Raises DitkitError.
        """
        given: dict[str, Any] = {"first": first, "prompt": prompt, "embeddings": embeddings, "negative": negative}
        given |= {"known": known, "control": control, "seed": seed, "progress": progress}
        return torch.cat(list(self.stream(label, count, **given, **settings)))

    def stream(self, label: Any = None, count: int = 16, **given: Any) -> Iterator[Shaped[Tensor, "b *sample"]]:
        """As `sample`, one batch at a time."""
        for x0 in self.latents(label, count, **given):
            yield self.recipe.codec.decode(x0).cpu()

    def latents(
        self,
        label: str | int | Sequence[str | int] | Tensor | None = None,
        count: int = 16,
        *,
        first: int = 0,
        prompt: str | Sequence[str] | None = None,
        embeddings: Conditioning | None = None,
        negative: Conditioning | None = None,
        known: Known | None = None,
        control: UInt8[Tensor, "*n c h w"] | None = None,
        seed: int = 0,
        progress: Callable[[int, int], None] | None = None,
        **settings: Any,
    ) -> Iterator[Shaped[Tensor, "b *shape"]]:
        """As `stream`, not decoded: what was diffused, where the model is."""
        chosen, times = self.check(**settings)
        labels, texts = self.labels(label, count, first), self.texts(prompt, count)
        away = any(isinstance(g, ClassifierFree) and g.null is None for g in chosen.all_guides())
        strong, weak = checked_embeddings(self.recipe, embeddings, negative, count, away)
        given = None if known is None else checked_known(self.recipe, self.shape, known, count)
        images = None if control is None else checked_control(self.recipe, control, count, self.device)
        total = chosen.steps * -(-count // chosen.batch)
        for number, ids in enumerate(torch.arange(count).split(chosen.batch)):

            def tick(k: int, x: Tensor, done: int = number * chosen.steps) -> None:
                if progress is not None:
                    progress(done + k + 1, total)

            parts = strong.rows(ids)
            if given is not None:
                own = encoded_known(self.recipe, self.shape, given, ids, self.device)
                parts = dataclasses.replace(parts, known=own)
            if images is not None:
                encoded = self.recipe.control(images[ids].to(self.device))
                scalars = {**parts.scalars, "control_scale": torch.full((len(ids),), chosen.control_scale)}
                parts = dataclasses.replace(parts, control=encoded, scalars=scalars)
            read = Given(None if labels is None else labels[ids], None if texts is None else texts[ids])
            yield self._batch(chosen, read, (parts, _joined(parts, weak.rows(ids))), first + ids, times, seed, tick)

    def like(self, split: Split, count: int) -> tuple[Tensor | None, dict[str, Any]]:
        """The labels of so many samples, spread evenly over a split, and what `sample` is given to draw their like:
        their captions or labels, and of a ControlNet their control images.

        Raises DitkitError if control images are wanted that the conditioner does not make.
        """
        batch = split.batch(evenly(split, count))
        given = self.asked(batch)
        if isinstance(self.recipe.model, ControlConfig):
            given["control"] = self.controls(batch.data)
        return batch.label, given

    def asked(self, batch: Batch) -> dict[str, Any]:
        """What `sample` is given to draw the like of a batch: its captions, or its labels; nothing for a model that is
        given neither."""
        if self.captioned:
            return {} if batch.text is None else {"prompt": strings(batch.text)}
        return {"label": batch.label} if self.classes else {}

    def controls(self, images: UInt8[Tensor, "b c h w"]) -> UInt8[Tensor, "b c h w"]:
        """The control images that the conditioner makes of images. Raises DitkitError if it makes none, or if the model
        takes none."""
        make = getattr(self.recipe.conditioner, "control", None) if self.recipe.controlled else None
        if make is None:
            raise DitkitError("this run's conditioner makes no control images of others: give them with --control")
        return make(images)

    def settings(self, **changes: Any) -> Sample:
        """The recipe's sampling settings with changes. Raises DitkitError for an unknown name."""
        known = [f.name for f in dataclasses.fields(Sample)]
        for name in changes:
            if name not in known:
                raise DitkitError(f"sampling has no setting {name!r}: {near(name, known)}")
        if "ema" in changes or "ema_std" in changes:
            raise DitkitError("the weights are chosen when a pipeline is loaded: ditkit.load(run, ema=...)")
        for name in ("interval", "guides"):
            if name in changes:
                changes[name] = tuple(changes[name])
        chosen = dataclasses.replace(self.recipe.sample, **changes)
        away = [registered_as(g)[1] for g in chosen.guides if isinstance(g, ClassifierFree)]
        if away and chosen.guidance != 1:
            raise DitkitError(
                f"guidance {chosen.guidance:g} and {', '.join(away)} both guide away from the null: set guidance to 1, "
                "or name cfg among the guides if you mean their sum"
            )
        if chosen.finish is not None and not chosen.all_guides():
            raise DitkitError("sample.finish is for what guides have done, and there is none: add guidance or a guide")
        if not self.classes and not self.captioned and not needed(self.recipe) and (away or chosen.guidance != 1):
            raise DitkitError(
                "this model is unconditional and cannot be guided by classes: use guidance 1, or a guide that needs no "
                "classes (autoguidance, perturbed_attention, skip_layer)"
            )
        return chosen

    def check(self, **settings: Any) -> tuple[Sample, tuple[float, ...]]:
        """Settings and times of a sampling. Raises DitkitError for settings that cannot work with this model."""
        chosen = self.settings(**settings)
        times = chosen.grid(chosen.steps, self.denoiser.path, self.recipe.model.length)
        check_grid(self.guided(chosen, 1), chosen.solver, times, f"the grid {registered_as(chosen.grid)[1]!r}")
        return chosen, times

    def rehearse(self) -> None:
        """Draw two samples by the first two steps of the recipe's grid and its last, so that what cannot work is said.

        Raises DitkitError.
        """
        chosen, times = self.check()
        few = times if len(times) <= 4 else (*times[:2], *times[-2:])
        read, nothing = Given(self.labels(None, 2)), (_NOTHING, _NOTHING)
        drawn = self._batch(chosen, read, nothing, torch.arange(2), few, 0, lambda k, x: None)
        self.recipe.codec.decode(drawn)

    def sheet(self, data: Dataset) -> tuple[Shaped[Tensor, "n *sample"], int]:
        """What a training shows: eight samples of each class, or 80 or 64, always from the same noise; how many are in
        a row. Of a ControlNet each beside its control image, of held-out data; of a model that is given captions, one
        to each of 64 captions of held-out data."""
        classes = len(self.classes)
        columns = min(classes, 10) or 8
        if self.captioned or isinstance(self.recipe.model, ControlConfig):
            _, given = self.like(data.heldout if len(data.heldout) else data.train, columns * 8)
            samples = self.sample(count=columns * 8, **given)
            return (beside(given["control"], samples), 2 * columns) if "control" in given else (samples, columns)
        return self.sample(None if classes <= 10 else list(range(10)) * 8, columns * 8), columns

    def files(self, data: Dataset) -> dict[str, bytes]:
        """What a training writes beside each checkpoint, by name: nothing."""
        return {}

    def guided(self, chosen: Sample, count: int, parts: Conditioning = _NOTHING) -> Denoiser | TokenDenoiser | Guided:
        """The denoiser with the chosen guides for a batch of `count`, of which weak opinions are given `parts`, too:
        what is known, a control, and the embeddings to turn away from.

        Raises DitkitError for what cannot guide it.
        """
        null = _joined(self.recipe.conditioner.null(count), parts).to(self.device)
        guides = []
        for g in chosen.all_guides():
            if isinstance(g, ClassifierFree) and g.null is None:
                g = dataclasses.replace(g, null=null)
            if isinstance(g, Autoguidance) and isinstance(g.weaker, str):
                g = dataclasses.replace(g, weaker=self._weaker(g.weaker))
            guides.append(g)
        return guide(self.denoiser, *guides, finish=chosen.finish)

    def _weaker(self, run: str) -> Denoiser:
        """The denoiser of another run, loaded once. Raises DitkitError if it is of other samples or classes."""
        if run not in self._loaded:
            if not run:
                raise DitkitError("autoguidance needs the run of a weaker model, as in weaker=runs/small")
            dtype = "bf16" if next(self.model.parameters()).dtype == torch.bfloat16 else "fp32"
            other = load(run, device=str(self.device), dtype=dtype)
            for what, mine, theirs in (
                ("samples of shape", self.shape, other.shape),
                ("the classes", self.classes, other.classes),
            ):
                if mine != theirs:
                    raise DitkitError(f"{run} cannot guide this model: it has {what} {theirs} instead of {mine}")
            self._loaded[run] = other.denoiser
        return self._loaded[run]

    def labels(self, label: Any, count: int, first: int = 0) -> Tensor | None:
        """One class index per sample, from sample `first` on; None for an unconditional model. Raises DitkitError."""
        if count < 1 or first < 0:
            raise DitkitError(f"count must be at least 1, not {count}, and samples are numbered from 0, not {first}")
        if not self.classes:
            if label is not None and self.captioned:
                raise DitkitError("this model is given captions, not classes: write a prompt instead of a label")
            if label is not None:
                raise DitkitError("this model is unconditional: it takes no label")
            return None
        if label is None:
            return torch.arange(first, first + count) % len(self.classes)
        if isinstance(label, Tensor):
            label = label.tolist()
        if not isinstance(label, str) and not isinstance(label, Sequence):
            label = operator.index(label)
        if isinstance(label, str | int):
            label = [label] * count
        if len(label) != count:
            raise DitkitError(f"{len(label)} labels were given for {count} samples: give one, or one for each")
        return self.recipe.conditioner.index(label)

    def texts(self, prompt: str | Sequence[str] | None, count: int) -> Int[Tensor, "n l"] | None:
        """The code points of a prompt for each sample; None without. Raises DitkitError."""
        if prompt is None:
            return None
        if not self.captioned:
            raise DitkitError("this model was trained without captions and takes no prompt")
        written = [prompt] * count if isinstance(prompt, str) else list(prompt)
        if len(written) != count:
            raise DitkitError(f"{len(written)} prompts were given for {count} samples: give one, or one for each")
        if any("\0" in text for text in written):
            raise DitkitError("a prompt holds a character 0")
        return points(written, max(map(len, written)))

    @torch.no_grad()
    def _batch(
        self,
        chosen: Sample,
        read: Given,
        both: tuple[Conditioning, Conditioning],
        ids: Tensor,
        times: Sequence[float],
        seed: int,
        tick: Callable[[int, Tensor], None],
    ) -> Shaped[Tensor, "b *shape"]:
        """both: what a person gives, and what weak opinions are given of it."""
        (parts, weak), conditioner, known = both, self.recipe.conditioner, both[0].known
        cond = conditioner.null(len(ids)) if read.label is None and read.text is None else conditioner(read)
        cond = _joined(cond, parts).to(self.device)
        rng = Rng(seed).at(0, ids.to(self.device))
        x = self.denoiser.prior(rng, self.shape)
        denoiser = self.guided(chosen, len(ids), weak)
        if known is None:
            out = integrate(denoiser, chosen.solver, times, x, cond, rng, tick)
        else:
            out = integrate(keep(denoiser, known), chosen.solver, times, x, cond, rng, tick)
            out = torch.where(known.mask, known.values.to(out), out)
        if not bool(torch.isfinite(out).all()):
            raise NotFinite("sampling gave numbers that are not finite: use more steps or less guidance")
        return out


def trained(recipe: Recipe, model: Model, origin: str = "memory") -> Pipeline | Reconstructions:
    """A trained network with what it is for: a pipeline to sample with, or what an autoencoder reconstructs."""
    if isinstance(recipe.denoiser, Reconstruction):
        return Reconstructions(recipe, cast(Autoencoder, model), origin)
    return Pipeline(recipe, model, recipe.model.shape, origin)


def open_run(
    run_or_checkpoint: str | Path,
    *,
    ema: float | None = None,
    ema_std: float | None = None,
    device: str = "auto",
    dtype: str = "fp32",
    lora: Sequence[str | Path] = (),
    lora_scale: float = 1.0,
) -> Pipeline | Reconstructions:
    """As `load`, also for runs that nothing can be sampled from."""
    checkpoint, recipe = find_run(run_or_checkpoint, ema, ema_std)
    weights, name = checkpoint.chosen(recipe)
    if lora:
        config, weights = unadapted(recipe.model, weights)
        recipe = dataclasses.replace(recipe, model=config)
    for file in lora:
        weights = adapted(file, FORMATS, recipe.model, weights, lora_scale)
        name += f" + {lora_scale:g} {Path(file).name}"
    with torch.device("meta"):
        model = recipe.model.build()
    try:
        model.load_state_dict(weights, assign=True)
    except RuntimeError as error:
        first = str(error).splitlines()[1].strip()
        raise DitkitError(f"{checkpoint.folder}: {name} does not fit the recipe's model: {first}") from None
    if dtype not in ("fp32", "bf16"):
        raise DitkitError(f"the dtype is fp32 or bf16, not {dtype!r}")
    model = model.to(device_of(device), torch.bfloat16 if dtype == "bf16" else torch.float32)
    return trained(recipe, model, f"{checkpoint.folder.name}/{name}")


def load(
    run_or_checkpoint: str | Path,
    *,
    ema: float | None = None,
    ema_std: float | None = None,
    device: str = "auto",
    dtype: str = "fp32",
    lora: str | Path | Sequence[str | Path] = (),
    lora_scale: float = 1.0,
) -> Pipeline:
    """The pipeline of a run folder (its newest checkpoint) or of one checkpoint.

    ema: which averaged weights, None = those of the recipe (the first), 0 = the weights themselves. ema_std: a
    power-function average of this length instead, made from the run's snapshots where it was not tracked. dtype: fp32,
    or bf16 for the network alone (the solver stays in float32). lora: files of adapters as diffusers and peft write
    them, added to the weights with the factor `lora_scale`; of a ControlNet, to those of its base. Raises DitkitError
    for a missing, damaged or foreign folder, for the run of an autoencoder, and for adapters of another network.
    """
    files = (lora,) if isinstance(lora, str | Path) else tuple(lora)
    found = open_run(
        run_or_checkpoint, ema=ema, ema_std=ema_std, device=device, dtype=dtype, lora=files, lora_scale=lora_scale
    )
    if isinstance(found, Reconstructions):
        found.sample()
    return found
