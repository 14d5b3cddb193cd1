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
    budget = parser.add_mutually_exclusive_group()
    budget.add_argument(
        "--match-gmacs",
        type=float,
        metavar="X",
        help="the same family with X GMACs: width and, if needed, depth are changed",
    )
    budget.add_argument("--match-params", type=float, metavar="X", help="the same with X parameters, as in 33e6")
    parser.add_argument(
        "--tolerance", type=float, default=0.05, help="share by which a match may miss X (default: 0.05)"
    )


def run(args: argparse.Namespace, rest: Sequence[str]) -> int:
    from ..budget import match
    from ..config import differences, to_json
    from ..models import model_config
    from ..plan import at_resolution, cost

    config = model_config(args.model)
    if args.match_gmacs is not None or args.match_params is not None:
        named = at_resolution(config, args.resolution)
        config = match(named, named.shape, gmacs=args.match_gmacs, params=args.match_params, tolerance=args.tolerance)
        print(f"matched: {'; '.join(differences(to_json(named), to_json(config))) or 'nothing had to change'}")
    c = cost(config, resolution=args.resolution, batch=args.batch, dtype=args.dtype)
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
