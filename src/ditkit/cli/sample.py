"""`ditkit sample RUN`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..config import DitkitError

__all__ = ["arguments", "run"]


def arguments(parser: argparse.ArgumentParser) -> None:
    """What is not given is as the recipe has it."""
    parser.add_argument("run", metavar="RUN", help="a run folder, or one of its checkpoints")
    parser.add_argument(
        "--label", nargs="+", help="a class by name or number, or one for each image (default: all in turn)"
    )
    parser.add_argument("--count", type=int, default=16, help="how many images (default: 16)")
    parser.add_argument("--steps", type=int, help="solver steps")
    parser.add_argument("--guidance", type=float, help="scale of classifier-free guidance, 1 = none")
    parser.add_argument("--interval", type=float, nargs=2, metavar=("LOW", "HIGH"), help="guided where LOW < t < HIGH")
    parser.add_argument("--solver", help="euler, heun, ddim, ddpm")
    parser.add_argument("--seed", type=int, default=0, help="image i depends on the seed, i and its label alone")
    parser.add_argument("--ema", type=float, help="decay of the averaged weights to use, 0 = the weights themselves")
    parser.add_argument("--batch", type=int, help="images computed at once")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda")
    parser.add_argument("--dtype", default="fp32", help="fp32, or bf16 for the network (default: fp32)")
    parser.add_argument(
        "--out", type=Path, default=Path("samples.png"), help="a sheet .png, or a folder for single images"
    )
    parser.add_argument("--columns", type=int, help="images in a row of the sheet")


def run(args: argparse.Namespace, rest: Sequence[str]) -> int:
    if args.out.suffix.lower() not in (".png", ""):
        raise DitkitError(f"--out is a .png file or a folder, not {args.out}")
    if args.columns is not None and args.columns < 1:
        raise DitkitError(f"--columns must be at least 1, not {args.columns}")
    import torch
    from tqdm import tqdm

    from ..pipeline import load
    from ..runs import atomic_write
    from ..sheet import png, sheet

    pipeline = load(args.run, ema=args.ema, device=args.device, dtype=args.dtype)
    names = ("steps", "guidance", "interval", "solver", "batch")
    settings: dict[str, Any] = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    label = None if args.label is None else args.label[0] if len(args.label) == 1 else args.label
    with tqdm(unit="step", leave=False, dynamic_ncols=True) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        batches = pipeline.stream(label, args.count, seed=args.seed, progress=progress, **settings)
        if args.out.suffix:
            images = torch.cat(list(batches))
            atomic_write(args.out, png(sheet(images, args.columns)))
        else:
            for i, image in enumerate(image for batch in batches for image in batch):
                atomic_write(args.out / f"{i:06d}.png", png(sheet(image[None], 1, margin=0)))
    print(f"{args.count} images: {args.out}")
    return 0
