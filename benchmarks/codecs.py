"""What comes back of held-out images through a codec that is fitted to the training images.

python benchmarks/codecs.py --codecs pca factor=4 channels=16 pca factor=8 channels=64 --picture codecs.png

PSNR is 10 log10(255^2 / error) of the mean squared error of an image in bytes, and a line holds its mean over the
images and that of all errors together; then the numbers that stand for an image, and the seconds of fitting and of
encoding and decoding one image. The picture has the images in its first row and what each codec makes of them below.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import torch

import ditkit.recipe  # noqa: F401  the registry must know all names
from ditkit.cli.configs import read
from ditkit.config import lookup, to_json
from ditkit.evaluation.reconstruction import psnr, squared_errors
from ditkit.sheet import png, sheet

PCA = [f"pca factor={f} channels={c}" for f, c in ((4, 4), (4, 8), (4, 16), (4, 48), (8, 16), (8, 32), (8, 64))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="emoji", help="a data set that opens by its name")
    parser.add_argument("--codecs", nargs="+", metavar="NAME FIELD=VALUE", default=" ".join(PCA).split())
    parser.add_argument("--picture", type=Path, help="write a PNG of the first images and what comes back of them")
    parser.add_argument("--columns", type=int, default=12, help="images in the picture")
    args = parser.parse_args()
    data = lookup("data", args.data)().open()
    heldout = data.heldout.batch(torch.arange(len(data.heldout))).data
    print(f"{len(heldout)} held-out images of {data.source}\n")
    print("| codec | latents | numbers | PSNR | of all | fitted in s | ms per image |\n|---|---|---|---|---|---|---|")
    shown = [heldout[:: max(1, len(heldout) // args.columns)][: args.columns]]
    for codec in read("codec", args.codecs):
        begin = time.perf_counter()
        codec = codec.fitted(data)
        fitted = time.perf_counter()
        back = torch.cat([codec.decode(codec.encode(part)) for part in heldout.split(32)])
        done = time.perf_counter()
        error, size = squared_errors(back, heldout), math.prod(data.shape)
        each, whole = psnr(error, size), psnr(error.mean(), size)
        shape = codec.shape(data.shape)
        words = " ".join(f"{k}={v}" for k, v in to_json(codec).items() if k not in ("type", "samples"))
        share = math.prod(shape) / math.prod(data.shape)
        ratios = "exact | exact" if torch.equal(back, heldout) else f"{float(each.mean()):.1f} | {float(whole):.1f}"
        print(
            f"| {to_json(codec)['type'].partition('/')[2]} {words} | {' x '.join(map(str, shape))} | {share:.1%} | "
            f"{ratios} | {fitted - begin:.1f} | {1000 * (done - fitted) / len(heldout):.2f} |",
            flush=True,
        )
        shown.append(back[:: max(1, len(heldout) // args.columns)][: args.columns])
    if args.picture is not None:
        args.picture.write_bytes(png(sheet(torch.cat(shown), args.columns)))
        print(f"\nwritten: {args.picture}")


if __name__ == "__main__":
    main()
