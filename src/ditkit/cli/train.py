"""`ditkit train RECIPE`."""

from __future__ import annotations

import argparse
import contextlib
import io
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config import DitkitError
from .configs import named, read

if TYPE_CHECKING:
    from ..recipe import Recipe

__all__ = ["arguments", "run"]

FROM_DATA = (
    *("--model.input-size", "--model.in-channels", "--model.num-classes", "--model.length", "--model.vocab"),
    *("--conditioner.classes", "--conditioner.encoder.sha256", "--codec.symbols", "--denoiser.path.vocab"),
)


def arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of the command; every field of the recipe is an option besides."""
    parser.usage = "ditkit train RECIPE [--out DIR] [--init FILE_OR_RUN] [--FIELD VALUE ...]"
    parser.epilog = "Every field of the recipe is an option: `ditkit train digits --train.steps 2000 --model.depth 8`; "
    parser.epilog += (
        "`ditkit train digits --fields` lists them. A configuration is chosen by name: --sample.solver euler."
    )
    parser.add_argument(
        "recipe",
        metavar="RECIPE",
        help="digits, demo, folder:PATH, hf:NAME, control:RUN (a ControlNet of that run), autoencoder, a published one "
        "such as dit_xl_2:PATH, or a run to go on with",
    )
    parser.add_argument(
        "--out", type=Path, help="the run folder; one that exists is gone on with (default: runs/RECIPE)"
    )
    parser.add_argument(
        "--init", metavar="FILE_OR_RUN", help="begin with the weights of a run or a published checkpoint"
    )
    parser.add_argument(
        "--lora", type=int, metavar="RANK", help="train adapters of this rank; the weights stay as --init"
    )
    parser.add_argument(
        "--lora-targets", nargs="+", metavar="NAME", help="last names of the Linears that get adapters (attention's)"
    )
    parser.add_argument("--fields", action="store_true", help="list the fields of the recipe and their values")
    parser.add_argument("--quiet", action="store_true", help="no progress bar; alarms go to stderr")


def run(args: argparse.Namespace, rest: Sequence[str]) -> int:
    from ..recipes import find_recipe
    from ..runs import Run
    from ..training import train

    out = args.out
    old = Run(args.recipe)
    if old.exists():
        if out is not None and out != old.folder:
            raise DitkitError("a run goes on in its own folder: leave out --out")
        recipe, out = old.recipe(), old.folder
    else:
        recipe = find_recipe(args.recipe)
        kind, _, path = args.recipe.partition(":")
        name = Path(path).expanduser().resolve().name
        out = out or Path("runs") / (
            name if kind in ("folder", "hf") else f"{name}_control" if kind == "control" else kind
        )
        if kind == "control" and args.init is None:
            args.init = path
    recipe = override(recipe, ["--help"] if args.fields else rest, f"ditkit train {args.recipe}")
    recipe = _adapted(recipe, args, new=not old.exists())
    if train(recipe, out, init=args.init, quiet=args.quiet):
        print(f"trained: {out}\n{_next(recipe, out)}")
    return 0


def _next(recipe: Recipe, out: Path) -> str:
    """What can be done with a trained run."""
    from ..diffusion import Reconstruction

    if isinstance(recipe.denoiser, Reconstruction):
        use = f"ditkit train RECIPE --codec trained_autoencoder:{out}"
        return f"measure it with: ditkit evaluate {out}\nuse its latents with: {use}"
    return f"sample it with: ditkit sample {out}"


def _adapted(recipe: Recipe, args: argparse.Namespace, new: bool) -> Recipe:
    """The recipe with adapters, if they are asked for. Raises DitkitError for adapters of nothing."""
    from dataclasses import replace

    from ..models import LoRAConfig

    if args.lora is None:
        if args.lora_targets is not None:
            raise DitkitError("--lora-targets needs --lora RANK")
        return recipe
    if not new:
        raise DitkitError("a run goes on with the adapters that it has: leave out --lora")
    if args.init is None:
        raise DitkitError("adapters beside weights that nobody trained learn nothing: give the weights with --init")
    targets = LoRAConfig.targets if args.lora_targets is None else tuple(args.lora_targets)
    return replace(recipe, model=LoRAConfig(recipe.model, args.lora, float(args.lora), targets))


def override(recipe: Recipe, words: Sequence[str], prog: str) -> Recipe:
    """The recipe with options from the command line. Raises DitkitError, in one line, for wrong ones."""
    from dataclasses import replace

    import tyro

    from ..data import Prepared

    given, words = list(words), list(words)
    before, recipe = recipe, _choose(_guides(recipe, words), words)
    for word in words:
        if word.split("=")[0].replace("_", "-") in FROM_DATA:
            raise DitkitError(f"{word} follows from the data and cannot be set; --data.resolution sets the size")
    if words == ["--help"]:
        print("Configurations that are chosen by name, and what they are now:")
        print("".join(f"  --{path} {value}  (known: {known})\n" for path, value, known in _chosen(recipe)))
    for i in range(len(words) - 1, 0, -1):
        if re.match(r"-[a-z]", words[i]) and words[i - 1].startswith("--"):  # the space "-velocity" is no option
            words[i - 1 : i + 1] = [f"{words[i - 1]}={words[i]}"]
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            # what a configuration learned is no option
            config = (tyro.conf.SuppressFixed,)
            recipe = tyro.cli(type(recipe), default=recipe, args=words, prog=prog, config=config)
    except SystemExit as stop:
        if not stop.code:
            raise
        raise DitkitError(_one_line(said.getvalue())) from None
    if isinstance(recipe.data, Prepared):
        recipe = replace(recipe, codec=_of_shards(recipe, given))
    return recipe if _says(given, "--model", "--model.patch-size") else _same_patches(before, recipe)


def _of_shards(recipe: Recipe, given: Sequence[str]) -> Any:
    """The codec of prepared data; one that was asked for beside it is left to be compared when the recipe is fitted.

    Raises DitkitError for pixels where the shards hold none: in a recipe they stand for no codec being said.
    """
    from ..codecs import Pixels
    from ..config import registered_as

    own = recipe.data.codec()
    if not any(re.match(r"--codec\b", word) for word in given):
        return own
    if isinstance(recipe.codec, Pixels) and not isinstance(own.inner, Pixels):
        raise DitkitError(
            f"{recipe.data.path} has a codec of its own, {registered_as(own.inner)[1]}, and --codec asks for pixels: "
            "leave out --codec, or --data prepared"
        )
    return recipe.codec


def _says(words: Sequence[str], *options: str) -> bool:
    return any(word.partition("=")[0].replace("_", "-") in options for word in words)


def _same_patches(before: Recipe, after: Recipe) -> Recipe:
    """With another codec, the patches that cover as many pixels as before, if there are such."""
    from dataclasses import replace

    from ..config import registered_as

    patch = getattr(before.model, "patch_size", None)
    if registered_as(before.codec) == registered_as(after.codec) or not isinstance(patch, int):
        return after
    try:
        old, new = (recipe.codec.downsampling() for recipe in (before, after))
    except DitkitError:  # the one that was chosen is read again when the recipe is fitted, the other need not be here
        return after
    pixels = patch * old
    if pixels % new or pixels == patch * new:
        return after
    print(f"model.patch_size is {pixels // new}: a patch covers {pixels} x {pixels} pixels as before", file=sys.stderr)
    return replace(after, model=replace(after.model, patch_size=pixels // new))


def _guides(recipe: Recipe, words: list[str]) -> Recipe:
    """Apply `--sample.guides apg scale=4 ...`, up to the next option, and take these words out of the list."""
    from dataclasses import replace

    if "--sample.guides" not in words:
        return recipe
    first = words.index("--sample.guides")
    last = next((i for i, word in enumerate(words) if i > first and word.startswith("--")), len(words))
    guides = read("guide", words[first + 1 : last])
    if not guides:
        raise DitkitError("--sample.guides takes names and fields, as in --sample.guides apg scale=4")
    del words[first:last]
    return replace(recipe, sample=replace(recipe.sample, guides=guides))


def _choose(recipe: Any, words: list[str]) -> Any:
    """Apply `--sample.solver euler`, `--codec autoencoder:PATH` and the like, which replace a whole configuration.

    The words that were understood are taken out of the list.
    """
    from dataclasses import is_dataclass, replace

    from ..config import lookup, names, registered_as

    def put(node: Any, path: Sequence[str], name: str) -> Any:
        field, rest = path[0].replace("-", "_"), path[1:]
        value = getattr(node, field)
        if rest:
            return replace(node, **{field: put(value, rest, name)})
        kind = field if value is None else registered_as(value)[0]
        if name == "None" and _optional(node, field):
            return replace(node, **{field: None})
        if kind == "model" and name in names("size"):
            return replace(node, **{field: lookup("size", name)})
        return replace(node, **{field: named(kind, name)})

    options = [(word.partition("=")[0][2:].split("."), i) for i, word in enumerate(words) if word.startswith("--")]
    taken: list[tuple[int, int]] = []
    for path, i in sorted(options, key=lambda o: len(o[0])):  # an inner choice is one within what an outer one chose
        node: Any = recipe
        for part in path[:-1]:
            node = getattr(node, part.replace("-", "_"), None)
        field = path[-1].replace("-", "_")
        # a field that holds a configuration, or may hold one and now holds None
        if (
            is_dataclass(node)
            and hasattr(node, field)
            and (is_dataclass(getattr(node, field)) or _optional(node, field))
        ):
            value = words[i].partition("=")[2]
            recipe = put(recipe, path, value or (words[i + 1] if i + 1 < len(words) else ""))
            taken.append((i, 1 if value else 2))
    for i, count in sorted(taken, reverse=True):
        del words[i : i + count]
    return recipe


def _optional(node: Any, field: str) -> bool:
    """Whether a field may hold a configuration of its name, or None."""
    from dataclasses import fields

    from ..config import lookup, names

    configurations = any(isinstance(lookup(field, name), type) for name in names(field))  # spaces are functions
    return configurations and any(f.name == field and f.default is None for f in fields(node))


def _chosen(node: Any, path: str = "") -> Iterator[tuple[str, str, str]]:
    """Option, present name and known names of every configuration inside a recipe that has a choice."""
    from dataclasses import fields, is_dataclass

    from ..config import names, registered_as

    for field in fields(node):
        value = getattr(node, field.name)
        if is_dataclass(value):
            kind, name = registered_as(value)
            known = names(kind) + (names("size") if kind == "model" else [])
            if len(known) > 1 and kind != "settings":
                yield (path + field.name).replace("_", "-"), name, ", ".join(known)
            yield from _chosen(value, f"{path}{field.name}.")


def _one_line(message: str) -> str:
    """tyro's framed message without its frame."""
    text = " ".join(re.sub(r"[╭╮╰╯│─]+", " ", message).split())
    text = re.sub(r"^(Parsing error|Unrecognized options|Value error|Error parsing \S+:?) (?=\S)", "", text)
    return re.sub(r"For full helptext.*", "", text).strip() + " (see: ditkit train RECIPE --fields)"
