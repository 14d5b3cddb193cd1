"""`ditkit evaluate RUN`, and `ditkit evaluate RUN|IMAGES --protocol NAME`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config import DitkitError, names
from .configs import guidance_arguments, guidance_settings, named, say

if TYPE_CHECKING:
    from ..data import Dataset

__all__ = ["arguments", "run"]


def arguments(parser: argparse.ArgumentParser) -> None:
    """What is not given is as the recipe has it."""
    parser.add_argument(
        "run",
        metavar="RUN_OR_IMAGES",
        type=Path,
        help="a run folder; its report is written into it. With --protocol also a folder of images, or an .npz with "
        "arr_0",
    )
    parser.add_argument(
        "--protocol",
        metavar="NAME",
        help="measure as a published evaluator does: ditkit, jit, adm, edm2, edm2_dinov2, clean, cmmd "
        "(docs/protocols.md)",
    )
    parser.add_argument(
        "--reference",
        metavar="FILE_OR_DATA",
        help="of a protocol: statistics (.npz, .safetensors), images (a folder, an .npz with arr_0), or a data set "
        "by name, of which the held-out part (default: that of the run's data)",
    )
    parser.add_argument("--weights", default="", metavar="FILE", help="of a protocol: the weights of its network")
    parser.add_argument(
        "--labels", help="of a protocol: in_turn, balanced or random classes (default: as the protocol's papers)"
    )
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="of a protocol: where the report goes")
    parser.add_argument("--samples", type=int, help="how many samples to draw, or images to take")
    parser.add_argument("--steps", type=int, help="solver steps")
    guidance_arguments(parser)
    parser.add_argument("--solver", help="how a step is taken: euler, heun, ddim, dpmpp_2m, unipc_3, ...")
    parser.add_argument("--batch", type=int, help="samples computed at once")
    parser.add_argument("--seed", type=int, help="seed of the samples (default: 0)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda")


def run(args: argparse.Namespace, rest: Sequence[str]) -> int:
    settings = {name: getattr(args, name) for name in ("steps", "solver", "batch") if getattr(args, name) is not None}
    settings |= guidance_settings(args)
    return _as_the_recipe(args, settings) if args.protocol is None else _by_protocol(args, settings)


def _by_protocol(args: argparse.Namespace, settings: dict[str, Any]) -> int:
    """Measure a run or images by a protocol, print the numbers and write a report."""
    from ..evaluation import find_protocol, images_of, judge, judge_run, write_judgement
    from ..report import check_folder
    from ..runs import is_run

    protocol = find_protocol(args.protocol, args.weights)
    how = {"device": args.device, "say": say}
    out = args.out
    if args.out is not None:
        check_folder(args.out)
    if is_run(args.run):
        reference = None if args.reference is None else _reference(args.reference)
        drawn = {"samples": args.samples, "labels": args.labels, "seed": args.seed or 0}
        found = judge_run(args.run, protocol, reference, **drawn, **how, **settings)
        out = out or args.run / "protocols" / protocol.name
    else:
        if settings or args.labels or args.seed is not None:
            raise DitkitError(f"{args.run} is no run: images are measured as they are, without settings of a sampling")
        if args.reference is None:
            raise DitkitError("images are compared with something: give --reference FILE_OR_DATA")
        found = judge(protocol, images_of(args.run, args.samples), _reference(args.reference), **how)
    print(f"protocol {found.identity}")
    for name in found.numbers:
        print(f"{name:<20} {found.value(name)}")
    print(found.protocol["status"])
    if out is not None:
        print("written: " + ", ".join(str(path) for path in write_judgement(found, out)))
    return 0


def _reference(text: str) -> str | Dataset:
    """A path, or the data set of that name. Raises DitkitError for neither."""
    if Path(text).expanduser().exists():
        return text
    from .. import recipes  # noqa: F401  every kind of data is registered
    from ..evaluation.heldout import original

    if text.partition(":")[0] in names("data"):
        return original(named("data", text)).open()
    raise DitkitError(f"--reference {text}: there is no such file, and no such data set ({', '.join(names('data'))})")


def _as_the_recipe(args: argparse.Namespace, settings: dict[str, Any]) -> int:
    """Measure a run by what its recipe says, write its report, and hold it to its bounds."""
    for name in ("reference", "weights", "labels", "out"):
        if getattr(args, name):
            raise DitkitError(f"--{name} belongs to a protocol: name one with --protocol")
    from ..evaluation import MEANING, bounds, curve, evaluate, write_report
    from ..report import number
    from ..runs import Run

    folder = Run(args.run)
    folder.recipe()  # the report needs a run, not only a checkpoint
    curve(folder.rows())  # and the package that draws it: better said now than after the work
    found = evaluate(args.run, samples=args.samples, seed=args.seed or 0, device=args.device, say=say, **settings)
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
