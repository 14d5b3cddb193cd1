"""`ditkit models`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from ..config import DitkitError

__all__ = ["arguments", "run"]


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("pattern", metavar="GLOB", nargs="?", default="*", help='such as "jit_*_16" (default: all)')


def run(args: argparse.Namespace, rest: Sequence[str]) -> int:
    import torch

    from ..models import create_model, list_models

    found = list_models(args.pattern)
    if not found:
        raise DitkitError(f"no model matches {args.pattern!r}: `ditkit models` lists all")
    width = max(12, *map(len, found))
    with torch.device("meta"):
        for name in found:
            model = create_model(name)
            size, channels = model.config.input_size, model.config.in_channels
            count = sum(p.numel() for p in model.parameters()) / 1e6
            print(f"{name:<{width}} {count:>8.1f}M parameters, input {channels} x {size} x {size}")
    return 0
