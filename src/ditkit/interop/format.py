"""What a published layout is, and how a file of it becomes a model: everything is checked before anything is read."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from ..config import DitkitError, lookup, names, near
from ..diffusion import Meaning, TokenMeaning
from ..models import Model, ModelConfig
from .source import Entries, Entry, Source, open_source
from .table import Pair, Rule, pairs, read_table, their_shapes, write_table

__all__ = [
    "Format",
    "Found",
    "Shapes",
    "block_count",
    "described",
    "expect",
    "fill",
    "integer",
    "meta",
    "option",
    "published",
    "read",
    "save",
    "settings",
    "shape",
    "size_name",
]

Shapes = Mapping[str, tuple[int, ...]]

_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


@dataclass(frozen=True)
class Format:
    """One published layout, both ways.

    match: whether these names are of the layout. rules: their names and ours, of a configuration if they depend on it.
    config: the model's configuration from shapes, what was saved beside them, and what the person says. denoiser: what
    the output means. refusal: why a model with a meaning cannot be written in this layout, None if it can. model: the
    class of the configuration. weights: the groups that a file may hold, the best first, with their decays of averaging
    (0 = the weights themselves). prefix: what their names begin with. within: what they begin with in a file that holds
    other networks too. unread: names, with `*` for any end, of tensors that a file may hold beside and that the
    authors' network does not compute with. sampling, objective: the authors' own, for an imported run's recipe.
    part: what our names begin with that a file holds, where it holds a part of the model (a ControlNet's branch).
    constants: tensors of theirs that follow from the configuration; where a file has them, they must agree. settings:
    the JSON files of a folder, by their names in it, and file: where in it the weights are; none for a single file.
    official: of a folder of diffusers, whether the authors' own file is its weights alone. video: whether the network
    is of videos.
    """

    name: str
    title: str
    model: type
    match: Callable[[Shapes], bool]
    rules: tuple[Rule, ...] | Callable[[Any], tuple[Rule, ...]]
    config: Callable[[Source, Shapes, Mapping[str, Any]], ModelConfig]
    denoiser: Callable[[Source, Any], Meaning | TokenMeaning]
    refusal: Callable[[Any, Any], str | None]
    sampling: Callable[[Any], dict[str, Any]]
    objective: Callable[[Any, Any], Any]
    weights: Mapping[str, float] = field(default_factory=dict)
    prefix: str = ""
    within: str = ""
    unread: tuple[str, ...] = ()
    part: str = ""
    constants: Callable[[Any], Mapping[str, Tensor]] = lambda config: {}
    settings: Callable[[Any, Any], dict[str, dict[str, Any]]] | None = None
    file: str = ""
    official: bool = False
    video: bool = False

    @property
    def diffusers(self) -> bool:
        """Whether it is the folder of a transformer in diffusers."""
        return self.file == "diffusion_pytorch_model.safetensors"

    def pairs(self, model: Model) -> list[Pair]:
        """The table of a model."""
        rules = self.rules if isinstance(self.rules, tuple) else self.rules(model.config)
        return pairs(rules, [name for name in model.state_dict() if name.startswith(self.part)])

    def entries(self, group: Entries) -> dict[str, Entry]:
        """What is the network's in a file: names without the prefix where all have it, or those within others."""
        for prefix, every in ((self.prefix, all), (self.within, any)):
            if prefix and every(key.startswith(prefix) for key in group):
                return {key.removeprefix(prefix): entry for key, entry in group.items() if key.startswith(prefix)}
        return dict(group)

    def write(self, model: Model, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors of a model under their names."""
        written = {**write_table(self.pairs(model), tensors), **self.constants(model.config)}
        return {self.prefix + name: value for name, value in written.items()}


@dataclass(frozen=True)
class Found:
    """What a file holds: weights under our names, in half precision where the file is, the model's configuration, and
    what its output means."""

    path: Path
    format: Format
    group: str
    config: Any
    denoiser: Any
    weights: Mapping[str, Tensor]
    source: Source
    alike: tuple[str, ...] = ()
    """Names of other formats that have the same names and shapes."""

    @property
    def decay(self) -> float:
        """Decay of the average that these weights are; 0 if they are none, or the file does not say so."""
        return self.format.weights.get(self.group, 0.0)

    def whole(self) -> Found:
        """The same. Raises DitkitError where the file holds a part of a model."""
        if self.format.part:
            raise DitkitError(
                f"{self.path} holds the branch of a {self.format.title} without its base: give that, too, with --base "
                "RUN_OR_FILE"
            )
        return self


def read(
    path: str | Path,
    formats: Sequence[Format],
    *,
    name: str | None = None,
    weights: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Found:
    """The weights of a published file. `formats`: those that are known, `name`: the one to take, None = recognised.

    weights: which group of the file. options: what shapes do not tell, such as {"num_heads": 6}. Raises DitkitError
    that names the file and what is wrong: nothing is returned unless every tensor is there and is right.
    """
    source = open_source(path)
    form, alike = _recognise(source, formats, name)
    group = source.group(weights, tuple(form.weights))
    entries = form.entries(source.groups[group])
    shapes = {key: entry.shape for key, entry in entries.items()}
    if not form.match(shapes):
        raise DitkitError(f"{path}: the weights {group!r} are not those of a {form.name}; take others with --weights")
    size = (options or {}).get("input_size")
    if size is not None and (1 if isinstance(size, int) else len(size)) not in ((3,) if form.video else (1, 2)):
        wanted = "FRAMES ROWS COLUMNS of the latents" if form.video else "one side, or ROWS COLUMNS"
        raise DitkitError(f"{path} is a {form.name}, whose --model.input-size is {wanted}, not {size}")
    try:
        config = form.config(source, shapes, options or {})
        meaning = form.denoiser(source, config)
        model = meta(config)
    except DitkitError as error:
        raise DitkitError(f"{path}: {error}") from None
    table = form.pairs(model)
    ours = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    wanted = their_shapes(table, ours)
    constants = {name: value for name, value in form.constants(config).items() if name in entries}
    wanted |= {name: tuple(value.shape) for name, value in constants.items()}
    _check(path, form, entries, wanted)
    numbers = source.read({name: entries[name] for name in wanted})
    _finite(path, numbers)
    _constant(path, numbers, constants)
    try:
        tensors = read_table(table, numbers, ours)
    except DitkitError as error:
        raise DitkitError(f"{path}: {error}") from None
    # half precision stays: a file of a large model fills the memory once, and in .safetensors none until it is used
    tensors = {
        key: value.to(torch.float32 if value.dtype == torch.float64 else value.dtype).contiguous()
        for key, value in tensors.items()
    }
    return Found(Path(path), form, group, config, meaning, tensors, source, alike)


def _recognise(source: Source, formats: Sequence[Format], name: str | None) -> tuple[Format, tuple[str, ...]]:
    known = [form.name for form in formats]
    if name is not None and name not in known:
        raise DitkitError(f"unknown format {name!r}: {near(name, known)}")
    fits = [
        form
        for form in formats
        if any(
            form.match({key: entry.shape for key, entry in form.entries(group).items()})
            for group in source.groups.values()
        )
    ]
    if not fits and source.adapters:
        raise DitkitError(
            f"{source.path} holds adapters of low rank, not a network: draw with them by ditkit sample RUN --lora "
            "FILE, or merge them into their network by ditkit import FILE --base RUN_OR_FILE"
        )
    if not fits:
        group = max(source.groups.values(), key=len)
        shown = ", ".join(f"{_some([key])} {list(entry.shape)}" for key, entry in list(group.items())[:3])
        raise DitkitError(
            f"{source.path} holds {len(group)} tensors ({shown}, ...) of none of the known formats: {', '.join(known)}"
        )
    chosen = [form for form in fits if form.name == name] if name else fits[:1]
    if not chosen:
        raise DitkitError(f"{source.path} is not of the format {name}: its names are those of {fits[0].name}")
    return chosen[0], tuple(form.name for form in fits if form is not chosen[0])


def _some(names: Sequence[str]) -> str:
    """The first names, and how many more; a file may call its tensors anything, so they are cut and made printable."""
    shown = [ascii(name)[1:-1][:100] for name in names[:3]]
    return ", ".join(shown) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _check(path: str | Path, form: Format, entries: Entries, wanted: Shapes) -> None:
    """Raises DitkitError for tensors that are missing, unexpected, of another shape, or no floating point numbers."""
    if missing := sorted(set(wanted) - set(entries)):
        raise DitkitError(f"{path} is no complete {form.name}: it lacks {_some(missing)}")
    unexpected = sorted(
        name for name in entries if not any(fnmatchcase(name, known) for known in (*wanted, *form.unread))
    )
    if unexpected:
        raise DitkitError(f"{path} is no {form.name} as published: nothing there is called {_some(unexpected)}")
    for name, size in wanted.items():
        if entries[name].shape != size:
            raise DitkitError(
                f"{path}: {name} is {list(entries[name].shape)}, where the other tensors need {list(size)}"
            )
        if entries[name].dtype not in _FLOATS:
            kind = str(entries[name].dtype).removeprefix("torch.")
            raise DitkitError(f"{path}: {name} holds {kind} numbers; weights are float32, float16, bfloat16 or float64")


def _finite(path: str | Path, tensors: Mapping[str, Tensor]) -> None:
    bad = [name for name, value in tensors.items() if not bool(torch.isfinite(value.float()).all())]
    if bad:
        raise DitkitError(f"{path}: {_some(sorted(bad))} holds NaN or infinite numbers: the training had broken down")


def _constant(path: str | Path, tensors: Mapping[str, Tensor], constants: Mapping[str, Tensor]) -> None:
    for name, value in constants.items():
        if not torch.allclose(tensors[name].float(), value.float(), rtol=1e-2, atol=0):  # bfloat16 keeps 8 bits
            raise DitkitError(f"{path}: {name} is not what this model computes: it was trained with other constants")


def save(form: Format, model: Model, meaning: Meaning | TokenMeaning, path: str | Path) -> None:
    """Write the weights of a model in a published layout: a .safetensors file, or a folder of weights and settings.

    Raises DitkitError for what the layout cannot say, and for a path that exists.
    """
    path = Path(path)
    if path.exists():
        raise DitkitError(f"{path} exists already: choose another")
    if refusal := form.refusal(model.config, meaning):
        raise DitkitError(refusal)
    fill(form, model.config, meaning, form.write(model, model.state_dict()), path)


def fill(form: Format, config: Any, meaning: Any, weights: Mapping[str, Tensor], path: Path) -> None:
    """Make the file, or the folder with its settings, of weights under their names."""
    if form.settings is not None:
        path.mkdir(parents=True)
        for name, content in form.settings(config, meaning).items():
            (path / name).write_text(json.dumps(content, indent=2) + "\n")
    save_file({name: value.contiguous() for name, value in weights.items()}, path / form.file, {"format": "pt"})


def meta(config: Any) -> Model:
    """The network without memory."""
    with torch.device("meta"):
        return config.build()


def described(meaning: Meaning) -> str:
    """A meaning in the words of a refusal."""
    return f"{meaning.prediction} on {meaning.path} with the clock {meaning.clock}"


def shape(shapes: Shapes, name: str, dims: int) -> tuple[int, ...]:
    """A shape of so many dimensions, none of them 0. Raises DitkitError."""
    if name not in shapes:
        raise DitkitError(f"it lacks {name}")
    found = shapes[name]
    if len(found) != dims or min(found) < 1:
        raise DitkitError(f"{name} is {list(found)}, which should have {dims} dimensions, none of them 0")
    return found


def settings(source: Source) -> dict[str, Any]:
    """The config.json of a folder's transformer. Raises DitkitError for a file without its folder."""
    if source.folder is None:
        raise DitkitError(
            f"{source.path}: give the folder, not the file: its config.json says how many heads there are"
        )
    return source.settings()


def expect(settings: Mapping[str, Any], values: Mapping[str, Any], what: str) -> None:
    """Raises DitkitError where the config.json of a transformer says anything else."""
    for name, value in values.items():
        if settings.get(name, value) != value:
            raise DitkitError(f"transformer/config.json: {name} is {settings[name]!r}; only {value!r} is {what}")


def integer(settings: Mapping[str, Any], name: str, default: int) -> int:
    """A number of at least 1 in the config.json of a transformer. Raises DitkitError."""
    value = settings.get(name, default)
    if type(value) is not int or value < 1:
        raise DitkitError(f"transformer/config.json: {name} is {value!r}, not a number of at least 1")
    return value


def block_count(shapes: Shapes, stem: str) -> int:
    """The number of blocks `stem`0, `stem`1, ... Raises DitkitError if they are not numbered so."""
    numbers = {key[len(stem) :].split(".")[0] for key in shapes if key.startswith(stem)}
    if not numbers or numbers != {str(i) for i in range(len(numbers))}:
        raise DitkitError(f"{stem}* are not numbered from 0 on: {_some(sorted(numbers))}")
    return len(numbers)


def published(kind: type, **sizes: Any) -> Any | None:
    """A published configuration of these sizes, None if there is none."""
    return next((config for _, config in _published(kind) if _agrees(config, sizes)), None)


def _published(kind: type) -> list[tuple[str, Any]]:
    return [(name, lookup("size", name)) for name in names("size") if isinstance(lookup("size", name), kind)]


def _agrees(config: Any, values: Mapping[str, Any]) -> bool:
    return all(getattr(config, key) == value for key, value in values.items())


_SIZE = (
    "depth", "hidden_size", "num_heads", "patch_size", "conditioning", "bottleneck_dim", "in_context_start",
    "model_channels", "channel_mult", "num_res_blocks", "attention_resolutions",
    "self_attention", "places", "control_channels", "refiner",
)  # fmt: skip


def size_name(config: Any, family: str = "") -> str | None:
    """The name of a published size such as dit_xl_2; `family` is preferred where several share a size."""
    own = {f.name for f in fields(config)}
    wanted = {key: getattr(config, key) for key in _SIZE if key in own}
    found = [name for name, other in _published(type(config)) if _agrees(other, wanted)]
    return min(found, key=lambda name: not name.startswith(f"{family}_"), default=None)


def option(options: Mapping[str, Any], name: str, guess: Any, what: str) -> Any:
    """What the person says, else what follows from a published size. Raises DitkitError that asks for the option."""
    value = options.get(name, guess)
    if value is None:
        flag = name.replace("_", "-")
        raise DitkitError(f"this is no published size, and a file does not say {what}: give --model.{flag}")
    return value
