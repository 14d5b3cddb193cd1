"""`ditkit evaluate RUN`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from .configs import guidance_arguments, guidance_settings

__all__ = ["arguments", "run"]


def arguments(parser: argparse.ArgumentParser) -> None:
    """What is not given is as the recipe has it."""
    parser.add_argument("run", metavar="RUN", type=Path, help="a run folder; its report is written into it")
    parser.add_argument("--samples", type=int, help="how many samples to draw")
    parser.add_argument("--steps", type=int, help="solver steps")
    guidance_arguments(parser)
    parser.add_argument("--solver", help="how a step is taken: euler, heun, ddim, dpmpp_2m, unipc_3, ...")
    parser.add_argument("--batch", type=int, help="samples computed at once")
    parser.add_argument("--seed", type=int, default=0, help="seed of the samples")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda")


def run(args: argparse.Namespace, rest: Sequence[str]) -> int:
    from ..evaluation import MEANING, bounds, curve, evaluate, write_report
    from ..report import number
    from ..runs import Run

    folder = Run(args.run)
    folder.recipe()  # the report needs a run, not only a checkpoint
    curve(folder.rows())  # and the package that draws it: better said now than after the work
    names = ("steps", "solver", "batch")
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    settings = {**given, **guidance_settings(args)}
    found = evaluate(
        args.run,
        samples=args.samples,
        seed=args.seed,
        device=args.device,
        say=lambda line: print(f"{line} ...", file=sys.stderr, flush=True),
        **settings,
    )
    written = write_report(folder, found)
    for name, meaning in MEANING.items():
        if name in found.numbers:
            print(f"{name:<26} {number(found.numbers[name]):>10}   {meaning}")
    for bound, came, kept in bounds(found):
        print(f"{'kept  ' if kept else 'MISSED'}  {bound} ({came})")
    print("written: " + ", ".join(str(path) for path in written))
    if found.missed:
        print(f"ditkit: bounds missed: {'; '.join(str(gate) for gate in found.missed)}", file=sys.stderr)
        return 1
    return 0
