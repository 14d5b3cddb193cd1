"""`ditkit compare STUDY`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from ..config import DitkitError

__all__ = ["arguments", "run"]


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "study",
        metavar="STUDY",
        help="backbones, conditioning, manifold, prediction-loss, resolution, scaling, solvers or spaces",
    )
    parser.add_argument(
        "--preset", default="cpu", help="cpu, or full: the paper's settings, for large machines (default: cpu)"
    )
    parser.add_argument(
        "--out", type=Path, help="a folder; one that exists is gone on with (default: runs/STUDY, runs/STUDY-full)"
    )
    parser.add_argument("--seeds", type=int, help="how many seeds, counted from 0 (default: the study's own)")
    parser.add_argument("--report", action="store_true", help="only write the report of what is there")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")


def run(args: argparse.Namespace, rest: Sequence[str]) -> int:
    from dataclasses import replace

    from ..report import figure
    from ..studies import compare, find_study, read_results, write_report

    study = find_study(args.study, args.preset)
    if args.seeds is not None:
        if args.seeds < 1:
            raise DitkitError(f"--seeds must be at least 1, not {args.seeds}")
        study = replace(study, seeds=tuple(range(args.seeds)))
    figure()  # the package that draws the report: better said now than after the work
    out = args.out or Path("runs") / (study.name if study.preset == "cpu" else f"{study.name}-{study.preset}")
    if not args.report and not compare(
        study, out, quiet=args.quiet, say=lambda line: print(line, file=sys.stderr, flush=True)
    ):
        print(f"stopped; the same command goes on from here, --report writes what {out} has so far", file=sys.stderr)
        return 130
    written = write_report(study, out)
    results = read_results(study, out)
    for verdict in study.verdicts(results):
        print(f"{'MISSED' if verdict.holds is False else f'{verdict.word:6}'}  {verdict.text} ({verdict.found})")
    print("written: " + ", ".join(str(path) for path in written))
    return 0
