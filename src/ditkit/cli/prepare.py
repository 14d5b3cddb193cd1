"""`ditkit prepare RECIPE --out FOLDER`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..config import DitkitError

if TYPE_CHECKING:
    from ..recipe import Recipe

__all__ = ["arguments", "run"]


def arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of the command; every field of the recipe is an option besides."""
    parser.usage = "ditkit prepare RECIPE_OR_DATA --out FOLDER [--codec NAME] [--FIELD VALUE ...] | --verify FOLDER"
    parser.epilog = "Train on it with: ditkit train RECIPE --data prepared:FOLDER. The same command goes on with a "
    parser.epilog += "folder that was interrupted, and mends one that was damaged."
    parser.add_argument(
        "recipe",
        metavar="RECIPE_OR_DATA",
        nargs="?",
        help="a recipe, whose data is encoded by its codec, or the name of a data set: emoji",
    )
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="the folder of the shards")
    parser.add_argument("--dtype", default="float16", help="of the latents: float16 or float32 (default: float16)")
    parser.add_argument("--shard", type=int, default=1024, metavar="N", help="samples in a shard (default: 1024)")
    parser.add_argument("--batch", type=int, default=16, metavar="N", help="samples encoded at a time (default: 16)")
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="processes of one thread (default: 1)")
    parser.add_argument("--verify", type=Path, metavar="FOLDER", help="compare a folder with its hashes, and end")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")


def run(args: argparse.Namespace, rest: Sequence[str]) -> int:
    if args.verify is not None:
        if args.recipe is not None or args.out is not None or rest:
            raise DitkitError("--verify FOLDER stands alone")
        return _verify(args.verify)
    if args.recipe is None or args.out is None:
        raise DitkitError("say what to prepare and where: ditkit prepare RECIPE_OR_DATA --out FOLDER")
    from ..data import Prepared
    from ..prepare import prepare
    from .train import override

    recipe = override(_recipe(args.recipe), rest, f"ditkit prepare {args.recipe}")
    sizes = {name: getattr(args, name) for name in ("dtype", "shard", "batch", "workers", "quiet")}
    if not prepare(recipe, args.out, **sizes):
        print("stopped; the same command goes on from the last whole shard", file=sys.stderr)
        return 130
    index = Prepared(str(args.out)).index()
    shards = [shard for part in index["splits"].values() for shard in part["shards"]]
    counts = " + ".join(f"{part['count']:,} {name}" for name, part in index["splits"].items())
    size = sum(shard["bytes"] for shard in shards) / 1e6
    print(f"prepared: {args.out}: {counts} samples, {len(shards)} shards, {size:,.1f} MB")
    print(f"train on it with: ditkit train RECIPE --data prepared:{args.out}")
    return 0


def _recipe(name: str) -> Recipe:
    """A recipe by its name, or one of the data set of that name. Raises DitkitError for neither."""
    from ..config import names
    from ..recipe import Recipe
    from ..recipes import find_recipe
    from .configs import named

    try:
        return find_recipe(name)
    except DitkitError:
        if name.partition(":")[0] not in names("data"):
            raise
    return Recipe(data=named("data", name))


def _verify(folder: Path) -> int:
    from ..data.prepared import damaged

    wrong = damaged(folder)
    for line in wrong:
        print(line)
    if wrong:
        raise DitkitError(f"{len(wrong)} of the files of {folder} are wrong: repeat the command that prepared it")
    print(f"{folder}: every shard is as it was written")
    return 0
