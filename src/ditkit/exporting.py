"""A run becomes a published checkpoint."""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from .codecs import Autoencoder, Pixels
from .conditioning import Conditioning
from .config import DitkitError, registered_as
from .diffusion import Linear, Meaning
from .files import atomic_write
from .interop import (
    DIFFUSERS,
    FORMATS,
    JIT,
    Format,
    diffusers_settings,
    fill,
    meta,
    write_adapters,
)
from .models import LoRAConfig, Model, unadapted
from .recipe import Recipe
from .runs import Checkpoint, find_run

__all__ = ["export_run"]

_TABLE = "y_embedder.embedding_table.weight"


def export_run(
    run: str | Path,
    form: str,
    out: str | Path,
    *,
    ema: float | None = None,
    ema_std: float | None = None,
    approximate: bool = False,
) -> list[str]:
    """Write the weights of a run, or of a checkpoint, as published ones; lines that say what was written.

    form: "official" (DiT, SiT, JiT, ADM, PixArt, Sana: .pt, .pth or .safetensors; Kandinsky 5: .safetensors; Drax: a
    folder), "diffusers" (the folder of a DiTPipeline; of families that read a text that of the transformer) or "lora"
    (only the adapters of a run that has some; .safetensors). ema, ema_std: as in `load`. approximate: write a DiT with
    the release's time frequencies for diffusers, which computes others. Raises DitkitError for what the layout cannot
    express, and for an `out` that exists.
    """
    out = Path(out)
    if out.exists():
        raise DitkitError(f"{out} exists already: choose another --out")
    checkpoint, recipe = find_run(run, ema, ema_std)
    weights, name = checkpoint.chosen(recipe)
    if form == "lora":
        return _adapters(recipe.model, recipe.denoiser, weights, name, out)
    config, weights = unadapted(recipe.model, weights)
    recipe = replace(recipe, model=config)
    if form == "official":
        return _official(checkpoint, recipe, weights, name, out)
    if form == "diffusers":
        return _diffusers(recipe, weights, out, approximate)
    raise DitkitError(f"--format is lora, official or diffusers, not {form!r}")


def _able(forms: list[Format], config: Any, meaning: Any) -> Format:
    """Of several layouts of a family the first that can say this model, or the first, whose refusal says why not."""
    return next((form for form in forms if form.refusal(config, meaning) is None), forms[0])


def _adapters(config: Any, meaning: Any, weights: dict[str, Tensor], name: str, out: Path) -> list[str]:
    """Only the adapters, under diffusers' names where it has this network."""
    if not isinstance(config, LoRAConfig):
        raise DitkitError("this run has no adapters: train it with --lora RANK")
    if out.suffix != ".safetensors":
        raise DitkitError(f"adapters are written as a .safetensors file, not as {out}")
    forms = [form for form in FORMATS if isinstance(config.base, form.model)]
    if not forms:
        raise DitkitError(f"no layout is known for a {type(config.base).__name__.removesuffix('Config')}")
    form = _able([form for form in forms if form is DIFFUSERS or form.diffusers] or forms, config.base, meaning)
    tensors = write_adapters(form, config, weights)
    atomic_write(out, lambda path: save_file(tensors, path, {"format": "pt"}))
    return [f"adapters of rank {config.rank}, {name}, as of {form.title}: {len(tensors)} tensors", f"written: {out}"]


def _official(checkpoint: Checkpoint, recipe: Recipe, tensors: dict[str, Tensor], name: str, out: Path) -> list[str]:
    """tensors: the weights that are exported; name: what they are called."""
    own = [form for form in FORMATS if form is not DIFFUSERS and (form.official or not form.diffusers)]
    kinds = [form for form in own if isinstance(recipe.model, form.model)]
    if not kinds:
        raise DitkitError(f"a {type(recipe.model).__name__.removesuffix('Config')} was never published by its authors")
    refusals = [form.refusal(recipe.model, recipe.denoiser) for form in kinds]
    if None not in refusals:
        flow = isinstance(recipe.denoiser.path, Linear)
        raise DitkitError(refusals[-1 if flow else 0] or "")
    chosen = kinds[refusals.index(None)]
    model = meta(recipe.model)
    weights = chosen.write(model, tensors)
    if chosen.settings is not None and not chosen.official:
        held = f"{chosen.file}, with its settings"
        atomic_write(out, lambda folder: fill(chosen, recipe.model, recipe.denoiser, weights, folder))
    elif out.suffix == ".safetensors":
        held = "a bare state dict"
        atomic_write(out, lambda path: save_file(weights, path))
    elif chosen is JIT:
        # what JiT's loader wants: three state dicts; args say what it computes with
        own = "model" if "model" in checkpoint.groups else name
        second = next((g for g in checkpoint.groups if "ema" in g and g != name), name)
        model_, ema2 = (
            weights
            if group == name
            else chosen.write(model, unadapted(checkpoint.recipe.model, checkpoint.tensors(group))[1])
            for group in (own, second)
        )
        args = argparse.Namespace(
            img_size=recipe.model.input_size,
            class_num=recipe.model.num_classes,
            noise_scale=recipe.denoiser.path.noise_scale,
            t_eps=recipe.denoiser.t_eps,
            attn_dropout=recipe.model.attn_drop,
            proj_dropout=recipe.model.proj_drop,
            in_context_start=recipe.model.in_context_start,
        )
        held = f"model = {own}, model_ema1 = {name}, model_ema2 = {second}"
        saved = {"model": model_, "model_ema1": weights, "model_ema2": ema2, "args": args}
        atomic_write(out, lambda path: torch.save(saved, path))
    else:
        held = "a bare state dict"
        atomic_write(out, lambda path: torch.save(weights, path))
    return [f"{chosen.title}, {name} of {checkpoint.folder}: {len(weights)} tensors ({held})", f"written: {out}"]


def _transformer(form: Format, recipe: Recipe, weights: dict[str, Tensor], out: Path) -> list[str]:
    """The folder of a transformer alone, for a family whose text encoders ditkit does not hold."""
    if refusal := form.refusal(recipe.model, recipe.denoiser):
        raise DitkitError(refusal)
    tensors = form.write(meta(recipe.model), weights)
    atomic_write(out, lambda folder: fill(form, recipe.model, recipe.denoiser, tensors, folder))
    return [
        f"{form.title}: {len(tensors)} tensors, the transformer alone, without text encoder, autoencoder and scheduler",
        f"written: {out}",
    ]


def _diffusers(recipe: Recipe, weights: dict[str, Tensor], out: Path, approximate: bool) -> list[str]:
    config, meaning, codec = recipe.model, recipe.denoiser, recipe.codec
    if not isinstance(config, DIFFUSERS.model):
        forms = [form for form in FORMATS if form.diffusers and isinstance(config, form.model)]
        if forms:
            return _transformer(_able(forms, config, meaning), recipe, weights, out)
        raise DitkitError(
            f"diffusers has no pipeline for a {type(config).__name__.removesuffix('Config')}: use --format official"
        )
    if refusal := DIFFUSERS.refusal(config, meaning):
        raise DitkitError(refusal)
    if not isinstance(codec, Autoencoder):
        does = "it works on pixels" if isinstance(codec, Pixels) else f"its codec is {registered_as(codec)[1]}"
        raise DitkitError(f"DiTPipeline decodes latents with an AutoencoderKL, and this run has none: {does}")
    codec = codec if codec.shift else codec.filled()
    if codec.shift:
        raise DitkitError(f"DiTPipeline does not know a shift of latents, and this run's codec has {codec.shift}")
    if codec.means:
        raise DitkitError("DiTPipeline does not know statistics of channels, and this run's codec has them")
    if (kind := type(codec.model()).__name__) != "AutoencoderKL":
        raise DitkitError(f"DiTPipeline decodes latents with an AutoencoderKL, and this run's codec is an {kind}")
    lines = []
    if config.frequency_shift != 1:
        if not approximate:
            raise DitkitError(
                "diffusers computes other time frequencies (model.frequency_shift 1) than this model was trained with "
                "(0): train with --model.frequency-shift 1, or accept the difference with --approximate"
            )
        lines.append(f"approximate: {_distance(config, meaning, weights)}")
    rows, null = weights[_TABLE].split([config.num_classes, 1])
    padding = 1000 - config.num_classes
    if padding:
        lines.append(f"the label table has {padding} rows more, equal to the null label, which is number 1000 there")
    weights = {**weights, _TABLE: torch.cat((rows, null.expand(padding, -1), null))}
    config = replace(config, num_classes=1000)
    tensors = DIFFUSERS.write(meta(config), weights)
    settings = diffusers_settings(config, meaning)
    settings["model_index.json"]["id2label"] = {str(i): name for i, name in enumerate(recipe.conditioner.classes)}

    def fill(folder: Path) -> None:
        folder.mkdir(parents=True)
        _copy_autoencoder(codec, folder / "vae")
        for name, content in settings.items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(json.dumps(content, indent=2) + "\n")
        contiguous = {name: value.contiguous() for name, value in tensors.items()}
        save_file(contiguous, folder / "transformer" / "diffusion_pytorch_model.safetensors", {"format": "pt"})

    atomic_write(out, fill)
    return [
        *lines,
        f"DiTPipeline with {len(tensors)} tensors, the codec's autoencoder and a DDIMScheduler",
        f"written: {out}",
    ]


def _copy_autoencoder(codec: Autoencoder, target: Path) -> None:
    """The codec's autoencoder with the codec's scale; a folder's files as they are."""
    source = Path(codec.path).expanduser()
    if source.is_dir():
        target.mkdir()
        for file in (source / "config.json", *source.glob("diffusion_pytorch_model*")):
            shutil.copyfile(file, target / file.name)
    else:
        codec.model().save_pretrained(target)
    settings = json.loads((target / "config.json").read_text())
    settings["scaling_factor"] = codec.scale
    (target / "config.json").write_text(json.dumps(settings, indent=2) + "\n")


@torch.no_grad()
def _distance(config: Any, meaning: Meaning, weights: Mapping[str, Tensor]) -> str:
    """How far the output moves with diffusers' frequencies, measured on noise at four times."""
    models: list[Model] = []
    for shift in (0, 1):
        model = meta(replace(config, frequency_shift=shift))
        model.load_state_dict(dict(weights), assign=True)
        models.append(model.eval())
    steps = meaning.path.steps
    times = torch.tensor([0, steps // 3, 2 * steps // 3, steps - 1], dtype=torch.float32)
    x = torch.randn(4, *config.shape, generator=torch.Generator().manual_seed(0))
    cond = Conditioning(label=torch.arange(4) % config.num_classes)
    ours, theirs = (model(x, times, cond) for model in models)
    return (
        f"on noise at the steps {times.int().tolist()} the output moves by up to {(ours - theirs).abs().max():.2g}, "
        f"with a standard deviation of {ours.std():.2g}"
    )
