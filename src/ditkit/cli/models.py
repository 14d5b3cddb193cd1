"""`ditkit models`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from ..config import DitkitError

__all__ = ["arguments", "described", "run"]


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("pattern", metavar="GLOB", nargs="?", default="*", help='such as "jit_*_16" (default: all)')


def described(shape: Sequence[int], vocab: int) -> str:
    """The x that a model takes, in words."""
    size = " x ".join(map(str, shape))
    return f"{size} tokens of {vocab} kinds" if vocab else size


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
            count = sum(p.numel() for p in model.parameters()) / 1e6
            print(
                f"{name:<{width}} {count:>8.1f}M parameters, input {described(model.config.shape, model.config.vocab)}"
            )
    return 0
