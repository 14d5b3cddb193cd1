"""`ditkit import FILE`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from ..config import DitkitError

__all__ = ["arguments", "run"]

OPTIONS = ("num_heads", "in_context_start", "num_head_channels", "use_new_attention_order", "null_label")
"""What shapes may not tell."""


def arguments(parser: argparse.ArgumentParser) -> None:
    """What is not given follows from the file."""
    parser.add_argument(
        "file",
        metavar="FILE",
        type=Path,
        help=".pt, .pth or .safetensors of DiT, SiT, JiT, ADM or Drax; a folder of diffusers or Drax",
    )
    parser.add_argument(
        "--as", dest="name", metavar="FORMAT", help="dit, sit, jit, adm, diffusers, drax (default: recognised)"
    )
    parser.add_argument(
        "--base",
        metavar="RUN_OR_FILE",
        help="of a file that holds a part, a ControlNet's branch or adapters (LoRA): the network it belongs to",
    )
    parser.add_argument(
        "--model.places",
        dest="places",
        type=int,
        nargs="+",
        help="the blocks of which an unpublished branch has copies",
    )
    parser.add_argument("--weights", metavar="NAME", help="which of the sets in the file (default: its average)")
    parser.add_argument("--out", type=Path, help="the run folder (default: runs/FILE)")
    parser.add_argument(
        "--autoencoder", metavar="FOLDER_OR_NAME", help="an autoencoder of diffusers, for a model of latents"
    )
    parser.add_argument("--model.num-heads", dest="num_heads", type=int, help="where the size is not a published one")
    parser.add_argument("--model.in-context-start", dest="in_context_start", type=int, help="the same, for JiT")
    heads = "the same, for a U-Net that says so instead"
    parser.add_argument("--model.num-head-channels", dest="num_head_channels", type=int, help=heads)
    order = "whether a U-Net, not of a published size, divides q, k and v into heads and not heads into q, k and v"
    parser.add_argument(
        "--model.use-new-attention-order", dest="use_new_attention_order", action="store_true", default=None, help=order
    )
    null = "whether the last label of a U-Net is the null label"
    parser.add_argument("--model.null-label", dest="null_label", action="store_true", default=None, help=null)
    parser.add_argument(
        "--model.input-size",
        dest="input_size",
        type=int,
        nargs="+",
        help="where the input is not square: ROWS COLUMNS; of videos FRAMES ROWS COLUMNS of their latents",
    )
    axes = "channels of a head that turn by each axis, where the heads are not published ones"
    parser.add_argument("--model.axes", dest="axes", type=int, nargs="+", help=axes)


def run(args: argparse.Namespace, rest: Sequence[str]) -> int:
    size = args.input_size
    if size is not None and len(size) > 3:
        raise DitkitError(f"--model.input-size is one side, ROWS COLUMNS, or FRAMES ROWS COLUMNS, not {size}")
    from ..given import needed
    from ..importing import import_file
    from ..parts import import_part

    said = {name: getattr(args, name) for name in OPTIONS}
    said["input_size"] = None if size is None else size[0] if len(size) == 1 else tuple(size)
    said["axes"] = None if args.axes is None else tuple(args.axes)
    said["places"] = args.places
    options = {key: value for key, value in said.items() if value is not None}
    if args.base is not None:
        for option, value in (("--as", args.name), ("--weights", args.weights)):
            if value is not None:
                raise DitkitError(f"a part beside --base is recognised by its names: leave out {option}")
        run, lines = import_part(args.file, args.base, args.out, autoencoder=args.autoencoder, options=options)
    elif args.places is not None:
        raise DitkitError("--model.places is for a ControlNet's branch, whose base is given with --base")
    else:
        run, lines = import_file(
            args.file, args.out, name=args.name, weights=args.weights, autoencoder=args.autoencoder, options=options
        )
    print("\n".join(lines))
    more = " --embeddings FILE" if needed(run.recipe()) else ""
    print(f"imported: {run.folder}\nsample it with: ditkit sample {run.folder}{more}")
    return 0
