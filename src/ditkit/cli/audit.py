"""`ditkit audit RUN|IMAGES [--train DATA]`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ..config import DitkitError
from .configs import guidance_arguments, guidance_settings, say

__all__ = ["arguments", "run"]


def arguments(parser: argparse.ArgumentParser) -> None:
    """What is not given is as the run's recipe has it."""
    parser.usage = "ditkit audit RUN | ditkit audit IMAGES --train DATA [--data.FIELD VALUE ...] [--out FOLDER]"
    parser.epilog = "The exit status is 3 where signs of copying were found, and 1 for an error."
    parser.add_argument(
        "what", metavar="RUN|IMAGES", type=Path, help="a run, a folder of images, or a .npz or .npy file"
    )
    parser.add_argument("--train", metavar="DATA", help="the training data of images: digits, emoji, folder:PATH")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="of the report (default: RUN/audit, or ./audit)")
    parser.add_argument("--samples", type=int, help="samples to draw from a run (default: 1000)")
    parser.add_argument("--steps", type=int, help="solver steps")
    guidance_arguments(parser)
    parser.add_argument("--batch", type=int, help="samples computed at once")
    parser.add_argument("--seed", type=int, help="seed of the samples (default: 0)")
    parser.add_argument(
        "--sscd", metavar="FILE", default="", help="also compare descriptors: SSCD's sscd_disc_mixup.torchscript.pt"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda")


def run(args: argparse.Namespace, rest: Sequence[str]) -> int:
    from ..evaluation import audit, write_audit
    from ..evaluation.heldout import original
    from ..pipeline import load
    from ..recipe import Recipe, device_of
    from ..report import check_folder
    from ..runs import is_run
    from .configs import named
    from .train import override

    said = {name: getattr(args, name) for name in ("steps", "batch", "samples", "seed")}
    settings = {name: value for name, value in said.items() if value is not None}
    settings |= guidance_settings(args)
    options = {"device": str(device_of(args.device)), "sscd": args.sscd, "say": say}
    if is_run(args.what):
        if args.train is not None or rest:
            raise DitkitError("a run knows its training data: leave out " + (rest[0] if rest else "--train"))
        check_folder(out := args.out or args.what / "audit")
        pipeline = load(args.what, device=args.device)
        data, size = original(pipeline.recipe.data).open(), pipeline.recipe.evaluate.size
        found = audit(pipeline, data, size=size, **options, **settings)
        found = replace(found, title=f"{args.what.resolve().name}, {found.title}")
    else:
        if not args.what.exists():
            raise DitkitError(f"there is no run and there are no images at {args.what}")
        if args.train is None:
            raise DitkitError(f"{args.what} is no run: say what the images' model was trained on, with --train DATA")
        if settings:
            raise DitkitError(f"the images are there already: leave out --{next(iter(settings))}")
        check_folder(out := args.out or Path("audit"))
        if args.what.is_dir() and out.resolve().is_relative_to(args.what.resolve()):
            raise DitkitError(f"the report would lie among the images that it is of: choose --out outside {args.what}")
        recipe = override(
            Recipe(data=named("data", args.train)), rest, f"ditkit audit {args.what} --train {args.train}"
        )
        found = audit(args.what, original(recipe.data).open(), size=recipe.evaluate.size, **options)
    written = write_audit(found, out)
    for what, came, fine in found.verdicts:
        print(f"{'kept  ' if fine else 'MISSED'}  {what} ({came})")
    print(found.verdict)
    print("written: " + ", ".join(str(path) for path in written))
    if not found.passed:
        print("ditkit: there are signs of copying", file=sys.stderr)
        return 3
    return 0
