"""Reading shuffled latents: shards of `ditkit prepare` against one .npy file for each.

    python benchmarks/latent_reading.py

10,000 latents of 4 x 32 x 32 in float16, in batches of 64 in the order of a training, from a warm file cache. Both
ways are timed in one process, in turns (A B A B), one thread; a round reads every latent once. What is measured is the
processor time of the process, that of the kernel included: from a warm cache nothing waits for a disk, and other
programs on the machine take no part in it (--wall measures what a clock shows). Printed are the medians over the
rounds, their range, and the ratio round by round.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ditkit.data import Order
from ditkit.data.prepared import Shards, places
from ditkit.rng import Rng

SHAPE = (4, 32, 32)
BATCH = 64


def write_shards(folder: Path, latents: np.ndarray, size: int) -> Shards:
    """The latents as `ditkit prepare` writes them, with labels."""
    arrays = {"latents": {"dtype": "float16", "shape": [1, 1, *SHAPE]}, "label": {"dtype": "int64", "shape": []}}
    shards = []
    for number, first in enumerate(range(0, len(latents), size)):
        part = latents[first : first + size]
        where, length = places(arrays, len(part))
        content = bytearray(length)
        content[slice(*where["latents"])] = part.tobytes()
        name = f"train-{number:05d}.bin"
        (folder / name).write_bytes(content)
        shards.append({"file": name, "count": len(part)})
    return Shards(folder, shards, arrays, size)


def read_files(folder: Path, indices: Tensor) -> Tensor:
    """A batch of latents that have a file each."""
    return torch.from_numpy(np.stack([np.load(folder / f"{i:06d}.npy") for i in indices.tolist()]))


def seconds(read: Callable[[Tensor], object], batches: list[Tensor], clock: Callable[[], float]) -> float:
    """The time of one round, by sample."""
    begun = clock()
    for indices in batches:
        read(indices)
    return (clock() - begun) / sum(map(len, batches))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--shard", type=int, default=1024, help="samples in a shard, as in ditkit prepare")
    parser.add_argument("--wall", action="store_true")
    args = parser.parse_args()
    clock = time.perf_counter if args.wall else time.process_time
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        latents = np.random.default_rng(0).normal(size=(args.count, *SHAPE)).astype(np.float16)
        split = write_shards(folder, latents, args.shard)
        for i, latent in enumerate(latents):
            np.save(folder / f"{i:06d}.npy", latent)
        order = Order(Rng(0), args.count)
        batches = list(order(torch.arange(args.count)).split(BATCH))
        assert torch.equal(split.batch(batches[0]).data, read_files(folder, batches[0]))
        shards, files = [], []
        for number in range(args.rounds + 1):
            one = seconds(split.batch, batches, clock)
            other = seconds(lambda indices: read_files(folder, indices), batches, clock)
            if number:  # the first round warms the caches
                shards.append(one)
                files.append(other)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    cpu = next((line.split(":")[1].strip() for line in info.splitlines() if line.startswith("model name")), "")
    print(f"{args.count:,} latents {list(SHAPE)} float16, batch {BATCH}, {args.rounds} rounds, shards of {args.shard}")
    print("wall clock" if args.wall else "processor time", end=", ")
    print(f"{cpu or platform.machine()}, 1 thread, torch {torch.__version__}, numpy {np.__version__}, commit {commit}")
    for name, times in (("shards", shards), ("one .npy each", files)):
        low, middle, high = (1e6 * f(times) for f in (min, statistics.median, max))
        print(f"{name:14s} {middle:8.2f} us a latent  [{low:.2f}, {high:.2f}]")
    ratios = sorted(b / a for a, b in zip(shards, files, strict=True))
    print(f"{'ratio':14s} {statistics.median(ratios):8.1f} [{ratios[0]:.1f}, {ratios[-1]:.1f}]")


if __name__ == "__main__":
    main()
