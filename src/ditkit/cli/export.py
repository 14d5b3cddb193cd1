"""`ditkit export RUN`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

__all__ = ["arguments", "run"]


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="a run folder, or one of its checkpoints")
    parser.add_argument(
        "--format",
        required=True,
        help="official (of DiT, SiT, JiT, Drax), diffusers (a DiTPipeline) or lora (a run's adapters alone)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        help="official: a file .pt, .pth or .safetensors, of Drax a folder; diffusers: a folder; lora: .safetensors",
    )
    parser.add_argument("--ema", type=float, help="decay of the averaged weights to use, 0 = the weights themselves")
    parser.add_argument("--ema-std", type=float, help="length of a power-function average to use, as 0.07")
    parser.add_argument(
        "--approximate",
        action="store_true",
        help="accept that diffusers computes other time frequencies, and say how far",
    )


def run(args: argparse.Namespace, rest: Sequence[str]) -> int:
    from ..exporting import export_run

    lines = export_run(
        args.run, args.format, args.out, ema=args.ema, ema_std=args.ema_std, approximate=args.approximate
    )
    print("\n".join(lines))
    return 0
