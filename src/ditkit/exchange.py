"""Published checkpoints and runs: import one as a run, export a run as one."""

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

from .averaging import decay_name
from .codecs import Autoencoder, Pixels, TokenIds
from .conditioners import Label, RandomText
from .conditioning import Conditioning
from .config import DitkitError, registered_as, to_json
from .data import Elsewhere
from .diffusion import Linear, Meaning
from .files import atomic_write
from .interop import (
    ADM,
    DIFFUSERS,
    FORMATS,
    JIT,
    SIT,
    Format,
    Found,
    diffusers_settings,
    fill,
    meta,
    read,
    size_name,
    write_adapters,
)
from .models import LoRAConfig, Model, UNetConfig, unadapted
from .recipe import Recipe, Sample, Train
from .runs import Checkpoint, Run, find_run

__all__ = ["export_run", "import_file", "imported", "new_run", "write_run"]

_TABLE = "y_embedder.embedding_table.weight"
"""Stands for an autoencoder that did not come with a model."""


# import


def import_file(
    path: str | Path,
    out: str | Path | None = None,
    *,
    name: str | None = None,
    weights: str | None = None,
    autoencoder: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> tuple[Run, list[str]]:
    """Make a run of a published checkpoint; the run, and lines that say what was found.

    name: the format, None = recognised by names and shapes. weights: which of the sets in the file. autoencoder: a
    folder or hub name for models of latents. options: what shapes do not tell, such as {"num_heads": 6}. Raises
    DitkitError for a file that is not whole and right, and for a folder that is not empty.
    """
    run = new_run(path, out)
    recipe, groups, lines = imported(path, name=name, weights=weights, autoencoder=autoencoder, options=options)
    write_run(run, recipe, groups, lines)
    return run, lines


def new_run(path: str | Path, out: str | Path | None) -> Run:
    """The run that a file becomes, in runs/ by its name. Raises DitkitError for a folder that is not empty."""
    path = Path(path)
    run = Run(out if out is not None else Path("runs") / (path.stem or path.resolve().name))
    if run.foreign():
        raise DitkitError(f"{run.folder} is not empty: choose another --out")
    return run


def write_run(run: Run, recipe: Recipe, groups: Mapping[str, Mapping[str, Tensor]], lines: list[str]) -> None:
    """Write it with one checkpoint, of no step."""
    state = {"log": {"sums": {}, "count": 0, "seconds": 0.0}, "data": None, "torch": torch.__version__}
    with run.locked():
        run.save(0, to_json(recipe), groups, {**state, "imported": lines})
        run.begin(recipe)


def imported(
    path: str | Path,
    *,
    name: str | None = None,
    weights: str | None = None,
    autoencoder: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> tuple[Recipe, dict[str, Mapping[str, Tensor]], list[str]]:
    """A published checkpoint as a recipe, with the one group of weights that it samples with; and what was found."""
    found = read(path, FORMATS, name=name, weights=weights, options=options).whole()
    codec = _codec(found, autoencoder)
    group = decay_name(found.decay) if found.decay else "model"
    recipe = Recipe(
        data=Elsewhere(str(path)),
        codec=codec,
        conditioner=_conditioner(found),
        model=found.config,
        denoiser=found.denoiser,
        objective=found.format.objective(found.config, found.denoiser),
        train=Train(emas=(found.decay or 0.9999,)),
        sample=Sample(**found.format.sampling(found.config), ema=None if found.decay else 0.0),
    )
    return recipe, {group: found.weights}, _said(found, codec)


def _said(found: Found, codec: Any) -> list[str]:
    config, meaning = found.config, found.denoiser
    family = "sit" if found.format is SIT else ""
    size = size_name(config, family) or "no published size"
    count = sum(value.numel() for value in found.weights.values())
    average = f"an average of decay {found.decay}" if found.decay else "taken as the weights themselves"
    if config.vocab:
        takes = f"input {config.length} tokens of {config.vocab} kinds"
        means = f"means tokens on {meaning.path}, clock {meaning.clock}"
    else:
        kind = "pixels" if isinstance(codec, Pixels) else f"latents of {codec.path or 'an autoencoder'}"
        number = getattr(config, "num_classes", 0)
        takes = f"input {' x '.join(map(str, config.shape))} ({kind}), {number or 'no'} classes"
        means = f"means {meaning.prediction} on {meaning.path}, clock {meaning.clock}, t_eps {meaning.t_eps:g}"
    network = f"{count / 1e6:.1f}M parameters in {len(found.weights)} tensors, {_described(config)}"
    lines = [
        f"{found.format.title}: {size}, {network}",
        takes,
        f"weights {found.group!r}: {average}",
        means,
    ]
    if len(found.source.groups) > 1:
        lines.append(f"the file also holds {', '.join(g for g in found.source.groups if g != found.group)}: --weights")
    if found.alike:
        lines.append(f"{' and '.join(found.alike)} has the same names and shapes: if it is that, say --as")
    if isinstance(codec, Autoencoder) and not codec.path:
        lines.append(
            f"its latents have {codec.channels} channels and are not Stable Diffusion's: to sample, give its own "
            "autoencoder, the folder vae of its pipeline, with --autoencoder"
        )
    elif isinstance(codec, Autoencoder) and not codec.download and not Path(codec.path).exists():
        lines.append(
            f"nothing was downloaded: to sample, get {codec.path} (hf download {codec.path}), or --autoencoder"
        )
    if _reads(config):
        lines.append(
            "it reads a text, and no encoder of texts is here: ditkit sample gives it one random token instead, the "
            "same for all samples"
        )
    return lines


def _described(config: Any) -> str:
    """The sizes of a network."""
    if isinstance(config, UNetConfig):
        widths = ", ".join(str(config.width(level)) for level in range(len(config.channel_mult)))
        return f"levels of {widths} channels with {config.num_res_blocks} residual blocks each"
    said = f"depth {config.depth}, width {config.hidden_size}, {config.num_heads} heads"
    return said if config.vocab else f"{said}, patches of {config.patch_size}"


def _codec(found: Found, autoencoder: str | None) -> Any:
    """Pixels for JiT and ADM, the numbers of tokens where it is made of them; otherwise the autoencoder that is given,
    that lies in the folder, or, of 4 channels, Stable Diffusion's; of others none that could be named."""
    if found.config.vocab:
        if autoencoder is not None:
            raise DitkitError(f"a {found.format.name} works on tokens: leave out --autoencoder")
        return TokenIds(found.config.vocab)
    if found.format in (JIT, ADM):
        if autoencoder is not None:
            raise DitkitError(f"{found.format.title} works on pixels: leave out --autoencoder")
        return Pixels()
    channels, video = found.config.in_channels, found.format.video
    fields: dict[str, Any] = {}
    if video and found.config.shape[1] == 1:
        # Kandinsky 5 does not shift FLUX.1's latents, whatever the file says
        fields = {"shift": 0.0, "one_frame": True}
    inside = None if found.source.folder is None else found.source.folder / "vae"
    if autoencoder is None and (inside is None or not inside.is_dir()):
        if channels != 4 or video:
            return Autoencoder("", channels=channels, **fields)
        return Autoencoder(scale=0.18215, shift=0.0, channels=channels, factor=8, means=(), stds=())
    folder = Path(autoencoder).expanduser() if autoencoder is not None else inside
    assert folder is not None
    if not folder.exists():
        return Autoencoder(str(autoencoder), download=True, channels=channels, **fields)
    codec = Autoencoder.of(folder.resolve())
    makes, draws = codec.frames is not None, video and not fields
    if makes != draws:
        kinds = ("images", "videos")
        raise DitkitError(
            f"{folder} is an autoencoder of {kinds[makes]}, and the model draws {kinds[draws]}: give its own with "
            "--autoencoder"
        )
    codec = replace(codec, **fields)
    if codec.channels != channels:
        raise DitkitError(
            f"{folder} makes latents of {codec.channels} channels, and the model takes {channels}: give its own with "
            "--autoencoder"
        )
    return codec


def _reads(config: Any) -> bool:
    """Whether a network is given a text."""
    return hasattr(config, "text_dim")


def _conditioner(found: Found) -> Label:
    """The classes; of a network that reads a text what stands in for one."""
    if _reads(found.config):
        return RandomText(width=found.config.text_dim, pooled=getattr(found.config, "pooled_dim", 0))
    return Label(_classes(found))


def _classes(found: Found) -> tuple[str, ...]:
    """The names that the folder gives its classes, else their numbers."""
    count = getattr(found.config, "num_classes", 0)
    named = found.source.json("model_index.json").get("id2label")
    named = named if isinstance(named, dict) else {}
    return tuple(str(named.get(str(i), i)) for i in range(count))


# export


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
