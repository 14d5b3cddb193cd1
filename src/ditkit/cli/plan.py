"""`ditkit plan MODEL`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from .models import described

__all__ = ["arguments", "run"]


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="a name of `ditkit models`")
    parser.add_argument("--resolution", type=int, help="side of what the model diffuses: pixels, or latents")
    parser.add_argument("--batch", type=int, default=1, help="samples at once (default: 1)")
    parser.add_argument("--dtype", default="bf16", help="bf16 (autocast in training) or fp32 (default: bf16)")


def run(args: argparse.Namespace, rest: Sequence[str]) -> int:
    from ..models import model_config
    from ..plan import cost

    c = cost(model_config(args.model), resolution=args.resolution, batch=args.batch, dtype=args.dtype)
    print(f"{args.model}: input {described(c.shape, c.vocab)}, batch {c.batch}, {c.dtype}")
    millions = f"{c.parameters / 1e6:.1f}M, of which {c.trainable:,} are trained"
    print(f"parameters             {c.parameters:>15,}   ({millions})")
    print(f"compute                {c.gmacs:>15,.2f}   GMACs for one forward pass of one sample")
    print(f"memory for sampling    {c.sampling / 2**30:>15,.2f}   GiB, of which weights {c.weights / 2**30:.2f}")
    print(f"memory for training    {c.training / 2**30:>15,.2f}   GiB with AdamW and one average in float32")
    print(
        "Memory counts tensors, without what an allocator and a driver add, and assumes attention without its matrix."
    )
    return 0
