"""`ditkit sample RUN`."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config import DitkitError
from .configs import guidance_arguments, guidance_settings

if TYPE_CHECKING:
    from torch import Tensor

    from ..conditioning import Known
    from ..pipeline import Pipeline

__all__ = ["arguments", "run"]


def arguments(parser: argparse.ArgumentParser) -> None:
    """What is not given is as the recipe has it."""
    parser.add_argument("run", metavar="RUN", help="a run folder, or one of its checkpoints")
    parser.add_argument(
        "--label", nargs="+", help="a class by name or number, or one for each sample (default: all in turn)"
    )
    parser.add_argument("--count", type=int, default=16, help="how many samples (default: 16)")
    parser.add_argument(
        "--first",
        type=int,
        default=0,
        help="the number of the first sample, to share the work: --count 50 --first 50 is the second half of 100",
    )
    parser.add_argument(
        "--prompt",
        nargs="+",
        metavar="TEXT",
        help="what to draw, of a model that was trained with captions: one for all samples, or one for each; of a "
        "model of texts, how every text begins",
    )
    parser.add_argument(
        "--embeddings",
        type=Path,
        metavar="FILE",
        help="what encoders made of texts or speech, of an imported network that is given it: .safetensors with text, "
        "pooled, negative.text, ... (docs/interop.md)",
    )
    parser.add_argument(
        "--template", metavar="TEXT", help="the whole text with _ for each character to be drawn, as in: 'red ____'"
    )
    parser.add_argument(
        "--known", type=Path, metavar="IMAGE", help="an image of the size that the model draws, for inpainting"
    )
    parser.add_argument(
        "--mask",
        type=Path,
        metavar="IMAGE",
        help="of the same size as --known: what is white in it is drawn, what is black is kept",
    )
    parser.add_argument("--control", type=Path, metavar="IMAGE", help="of a ControlNet, the control image: its edges")
    parser.add_argument(
        "--control-of",
        metavar="IMAGE",
        help="an image whose control image is made; heldout: those of the run's held-out data, which the sheet shows "
        "beside the samples",
    )
    parser.add_argument("--control-scale", type=float, help="strength of the control; 0 = the base alone (default: 1)")
    parser.add_argument("--steps", type=int, help="solver steps")
    guidance_arguments(parser)
    parser.add_argument("--solver", help="how a step is taken: euler, heun, ddim, dpmpp_2m, unipc_3, ...")
    parser.add_argument("--grid", help="which times are visited: uniform, karras, sd3, ...")
    parser.add_argument("--seed", type=int, default=0, help="sample i depends on the seed, i and its label alone")
    parser.add_argument("--ema", type=float, help="decay of the averaged weights to use, 0 = the weights themselves")
    parser.add_argument("--ema-std", type=float, help="length of a power-function average to use, as 0.07")
    parser.add_argument(
        "--lora", nargs="+", default=(), metavar="FILE", help="adapters as diffusers and peft write them, added up"
    )
    parser.add_argument("--lora-scale", type=float, default=1.0, help="their strength (default: 1)")
    parser.add_argument("--batch", type=int, help="samples computed at once")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda")
    parser.add_argument("--dtype", default="fp32", help="fp32, or bf16 for the network (default: fp32)")
    parser.add_argument(
        "--out",
        type=Path,
        help="a file .png, .gif (videos), .txt or .npy (the numbers), or a folder for single samples (default: "
        "samples.png; texts are printed)",
    )
    parser.add_argument("--columns", type=int, help="images in a row of the sheet")


def run(args: argparse.Namespace, rest: Sequence[str]) -> int:
    kind = "" if args.out is None else args.out.suffix.lower()
    if kind not in ("", ".png", ".gif", ".txt", ".npy"):
        raise DitkitError(f"--out is a .png, .gif, .txt or .npy file or a folder, not {args.out}")
    if args.columns is not None and args.columns < 1:
        raise DitkitError(f"--columns must be at least 1, not {args.columns}")
    if (args.known is None) != (args.mask is None):
        raise DitkitError("--known and --mask go together: the mask says which part of the known image is drawn anew")
    if args.control is not None and args.control_of is not None:
        raise DitkitError("give one of --control and --control-of")
    import torch
    from tqdm import tqdm

    from ..files import atomic_write
    from ..given import read_embeddings
    from ..pipeline import load
    from ..sheet import beside, rendered, suffix

    how = {name: getattr(args, name) for name in ("ema", "ema_std", "device", "dtype", "lora", "lora_scale")}
    pipeline = load(args.run, **how)
    names = ("steps", "solver", "grid", "batch", "control_scale")
    given: dict[str, Any] = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    settings = {**given, **guidance_settings(args)}
    label = None if args.label is None else args.label[0] if len(args.label) == 1 else args.label
    with tqdm(unit="step", leave=False, dynamic_ncols=True) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        known = _known(args, pipeline)
        settings |= _control(args, pipeline)
        if label is not None:
            settings["label"] = label
        if pipeline.captioned and args.prompt is not None:
            settings["prompt"] = args.prompt[0] if len(args.prompt) == 1 else args.prompt
        if args.embeddings is not None:
            settings["embeddings"], settings["negative"] = read_embeddings(args.embeddings)
        how = {"first": args.first, "known": known, "seed": args.seed, "progress": progress}
        batches = pipeline.stream(count=args.count, **how, **settings)
        first = next(batches)
        own = suffix(first)
        rendered(first[:1], kind or own)  # what cannot be shown so is said before the rest is drawn
        if args.out is not None and not kind:
            for i, one in enumerate(one for batch in chain((first,), batches) for one in batch):
                atomic_write(args.out / f"{args.first + i:06d}{own}", rendered(one[None], own, 1))
        else:
            samples, columns = torch.cat((first, *batches)), args.columns
            if args.control_of == "heldout" and (kind or own) == ".png":
                samples, columns = (
                    beside(settings["control"], samples),
                    2 * (columns or math.ceil(math.sqrt(args.count / 2))),
                )
            content = rendered(samples, kind or own, columns)
            if args.out is None and own == ".txt":
                bar.close()
                print(content.decode(), end="")
                return 0
            atomic_write(args.out or Path("samples.png"), content)
    print(f"{args.count} samples: {args.out or 'samples.png'}")
    return 0


def _known(args: argparse.Namespace, pipeline: Pipeline) -> Known | None:
    """What is given of the samples. Raises DitkitError for what is not for this model."""
    from ..data import prompt, template

    texts = pipeline.recipe.codec.vocab > 0
    begins = None if pipeline.captioned else args.prompt
    if sum(given is not None for given in (begins, args.template, args.known)) > 1:
        raise DitkitError("give one of --prompt, --template and --known")
    if begins is not None and len(begins) > 1:
        raise DitkitError("every text begins alike: give one --prompt, in quotation marks if it has spaces")
    for name, text, make in (("prompt", begins and begins[0], prompt), ("template", args.template, template)):
        if text is not None:
            if not texts:
                raise DitkitError(f"--{name} is for models of texts, and this one draws {list(pipeline.shape)}")
            return make(text, pipeline.shape[0])
    if args.known is None:
        return None
    if texts or len(pipeline.shape) != 3:
        raise DitkitError(f"--known is for models of images, and this one draws {list(pipeline.shape)}")
    return _picture(args.known, args.mask, pipeline)


def _control(args: argparse.Namespace, pipeline: Pipeline) -> dict[str, Any]:
    """The control images, and labels or captions where these are held-out data's. Raises DitkitError."""
    if args.control is None and args.control_of is None:
        return {}
    controlled = pipeline.recipe.controlled  # that it takes control images
    if args.control_of == "heldout":
        return pipeline.like(pipeline.recipe.data.open().heldout, max(args.count, 1))[1]
    image = _image(args.control or Path(args.control_of), 1 if controlled.base.shape[0] == 1 else 3)
    if args.control is not None:
        return {"control": image}
    return {"control": pipeline.controls(image[None])[0]}


def _image(path: Path, channels: int) -> Tensor:
    """The bytes [c h w] of an image. Raises DitkitError."""
    import torch

    from ..data import Unreadable, read_image

    try:
        return torch.from_numpy(read_image(str(path), None, channels).copy())
    except Unreadable as error:
        raise DitkitError(f"{path}: {error}") from None


def _picture(image: Path, mask: Path, pipeline: Pipeline) -> Known:
    """An image, grey where the model's are, and what is black in its mask. Raises DitkitError."""
    from ..conditioning import Known

    pixels, drawn = _image(image, 3), _image(mask, 1)
    if pixels.shape[1:] != drawn.shape[1:]:
        sizes = [f"{height} x {width}" for height, width in (pixels.shape[1:], drawn.shape[1:])]
        raise DitkitError(f"{image} has {sizes[0]} pixels (height x width) and {mask} {sizes[1]}: give the same size")
    if pipeline.shape == (1, *pixels.shape[1:]):
        pixels = _image(image, 1)
    return Known(pixels, drawn < 128)
