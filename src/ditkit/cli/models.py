"""`ditkit models`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from ..config import DitkitError

__all__ = ["arguments", "described", "run"]


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("pattern", metavar="GLOB", nargs="?", default="*", help='such as "jit_*_16" (default: all)')
    parser.add_argument(
        "--families", type=Path, metavar="DIR", help="write the page of all families, with pictures of their blocks"
    )
    parser.add_argument("--draw", type=Path, metavar="FILE", help="draw the blocks of one model, as .png")


def described(shape: Sequence[int], vocab: int) -> str:
    """The x that a model takes, in words."""
    size = " x ".join(map(str, shape))
    return f"{size} tokens of {vocab} kinds" if vocab else size


def run(args: argparse.Namespace, rest: Sequence[str]) -> int:
    if args.families is not None:
        from ..families import write_page

        print(f"written: {write_page(args.families)}")
        return 0
    import torch

    from ..models import create_model, list_models

    found = list_models(args.pattern)
    if not found:
        raise DitkitError(f"no model matches {args.pattern!r}: `ditkit models` lists all")
    if args.draw is not None:
        return draw(found, args.draw)
    width = max(12, *map(len, found))
    with torch.device("meta"):
        for name in found:
            model = create_model(name)
            count = sum(p.numel() for p in model.parameters()) / 1e6
            print(
                f"{name:<{width}} {count:>8.1f}M parameters, input {described(model.config.shape, model.config.vocab)}"
            )
    return 0


def draw(found: Sequence[str], out: Path) -> int:
    """Write the picture of a model's blocks. Raises DitkitError if more than one model matches."""
    from ..anatomy import anatomy, drawing
    from ..files import atomic_write
    from ..models import model_config
    from ..report import drawn

    if len(found) > 1:
        raise DitkitError(f"--draw is for one model, and {len(found)} match: {', '.join(found[:3])}, ...")
    if out.suffix.lower() != ".png":
        raise DitkitError(f"--draw writes a .png file, not {out}")
    atomic_write(out, drawn(drawing(anatomy(model_config(found[0])).blocks, found[0])))
    print(f"blocks of {found[0]}: {out}")
    return 0
