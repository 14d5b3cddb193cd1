"""What the monitor of a training costs: time, in paired runs, and memory.

    python benchmarks/monitor.py overhead --steps 2200 --rounds 3
    python benchmarks/monitor.py memory --count 100000 --size 64

overhead: a recipe is trained with the monitor and without, in turns (A B A B) in one process, one thread; printed are
the processor time of whole runs, and the ratio of the two runs of a round. memory: one evaluation with all the time in
the world of a small network on so many made-up images, which are drawn anew whenever they are read; printed is by how
much the largest memory of the process grew, everything included: distances to all training images, features of all of
them, and samples.
"""

from __future__ import annotations

import argparse
import platform
import resource
import statistics
import subprocess
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ditkit.data import Batch, Dataset
from ditkit.evaluation import Observer
from ditkit.models import JiTConfig
from ditkit.pipeline import Pipeline
from ditkit.recipe import Monitor
from ditkit.recipes import digits, find_recipe
from ditkit.rng import Draw, Rng
from ditkit.runs import Run
from ditkit.training import train


@dataclass(frozen=True)
class MadeUp:
    """Smooth random images, each a function of its number."""

    count: int
    size: int
    seed: int

    def __len__(self) -> int:
        return self.count

    def batch(self, indices: Tensor, rng: Draw | None = None) -> Batch:
        waves = Rng(self.seed).at(0, indices)("made up", "normal", (3, 8, 8))
        images = F.interpolate(waves, size=(self.size, self.size), mode="bicubic")
        return Batch((images * 60 + 127).clamp(0, 255).to(torch.uint8), None)


def machine() -> str:
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    cpu = next((line.split(":")[1].strip() for line in info.splitlines() if line.startswith("model name")), "")
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    return f"{cpu or platform.machine()}, 1 thread, torch {torch.__version__}, commit {commit}"


def overhead(name: str, steps: int | None, rounds: int) -> None:
    recipe = find_recipe(name)
    settings = replace(recipe.train, sample_every=0, steps=steps or recipe.train.steps)
    found: dict[str, list[float]] = {"with": [], "without": []}
    for number in range(rounds):
        for kind, monitor in (("with", settings.monitor), ("without", Monitor(budget=0))):
            with tempfile.TemporaryDirectory() as folder:
                begun = time.process_time()
                train(replace(recipe, train=replace(settings, monitor=monitor)), folder, quiet=True)
                found[kind].append(time.process_time() - begun)
                rows = Run(folder).watched()
                if rows:
                    drawn = [row["samples"] for row in rows if "samples" in row]
                    print(f"round {number}: {len(rows)} evaluations, samples {drawn}, seconds {rows[-1]['seconds']}")
    print(f"{name}, {settings.steps} steps, processor time of whole runs, {machine()}")
    for kind, times in found.items():
        print(f"{kind:8s} {statistics.median(times):8.2f} s  [{min(times):.2f}, {max(times):.2f}]")
    ratios = sorted(a / b for a, b in zip(found["with"], found["without"], strict=True))
    print(f"ratio    {statistics.median(ratios):8.4f}    [{ratios[0]:.4f}, {ratios[-1]:.4f}]")


def memory(count: int, size: int) -> None:
    shape = (3, size, size)
    data = Dataset("made up", (), shape, MadeUp(count, size, 0), MadeUp(2000, size, 1), "made up")
    model = JiTConfig(patch_size=8, hidden_size=64, depth=2, num_heads=2, bottleneck_dim=16, in_context_len=0)
    recipe = replace(digits(), model=model)
    recipe = replace(recipe, sample=replace(recipe.sample, guidance=1.0, batch=64)).fitted(data)
    pipeline = Pipeline(recipe, recipe.model.build(0), recipe.model.shape)
    pipeline.sample(count=2)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    begun = time.perf_counter()
    found = Observer(recipe, data, Monitor()).observe(pipeline, 1, 1e9)
    assert found is not None
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    measured = {k: v for k, v in found.row.items() if k in ("indexed", "samples", "f_mem", "f_mem_features", "kid")}
    print(f"{count:,} images of {size} x {size} x 3: {measured}, {time.perf_counter() - begun:.0f} s, {machine()}")
    print(
        f"the largest memory grew by {(after - before) / 1024:.0f} MiB, from {before / 1024:.0f} to {after / 1024:.0f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("overhead", "memory"))
    parser.add_argument("--recipe", default="digits")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--count", type=int, default=100_000)
    parser.add_argument("--size", type=int, default=64)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.what == "overhead":
        overhead(args.recipe, args.steps, args.rounds)
    else:
        memory(args.count, args.size)


if __name__ == "__main__":
    main()
