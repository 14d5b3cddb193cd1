"""Attention under patterns against attention to all: sparsity, error and time on this machine.

python benchmarks/attention_patterns.py --tokens 1024 4096 16384 --rounds 5 --ways gather flex

Each way is timed in pairs with attention to all, in one process, A B A B ...; a line holds medians and the ratio of the
medians, with the smallest and largest ratio of a pair. The time of a pattern has in it what chooses the blocks. q and k
are smooth functions of the position, so that near tiles are alike, as in a video; how sparse Nabla is and how large its
error is are facts about these numbers, not about a trained network.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from ditkit.layers import Blocks, Nabla, SlidingTiles, arrange, attend
from ditkit.layers.patterns import dense, flex, gather

HEADS, HEAD_DIM = 4, 64
GRIDS = {1024: (4, 16, 16), 4096: (4, 32, 32), 16384: (16, 32, 32)}
PATTERNS = {
    "sliding_tiles 3 3 3": SlidingTiles((3, 3, 3)),
    "nabla 0.9, 3 3 3": Nabla(0.9, (3, 3, 3)),
    "nabla 0.5, 3 3 3": Nabla(0.5, (3, 3, 3)),
}
WAYS: dict[str, Callable[[Tensor, Tensor, Tensor, Blocks], Tensor]] = {"gather": gather, "dense": dense, "flex": flex}


def smooth(grid: tuple[int, int, int], seed: int) -> Tensor:
    """[1 h n d]: in each channel a wave of a random low frequency, the same in q and k, and a little noise."""
    generator = torch.Generator().manual_seed(0)
    axes = torch.meshgrid(*(torch.arange(n) / 32 for n in grid), indexing="ij")
    places = torch.stack(axes, dim=-1).view(-1, 3)
    frequencies = 12 * torch.randn(HEADS, 3, HEAD_DIM, generator=generator)
    phases = 6.3 * torch.rand(HEADS, 1, HEAD_DIM, generator=generator)
    noise = torch.randn(HEADS, len(places), HEAD_DIM, generator=generator.manual_seed(seed))
    return (2 * (places @ frequencies + phases).cos() + 0.3 * noise)[None]


def pairs(one: Callable[[], Tensor], other: Callable[[], Tensor], rounds: int) -> tuple[list[float], list[float]]:
    """Seconds of both, in turn; the first round is not counted."""
    times: tuple[list[float], list[float]] = ([], [])
    for turn in range(rounds + 1):
        for run, kept in zip((one, other), times, strict=True):
            begin = time.perf_counter()
            run()
            if turn:
                kept.append(time.perf_counter() - begin)
    return times


def commit() -> str:
    here = Path(__file__).parent
    said = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=here, capture_output=True, text=True)
    return said.stdout.strip() or "unknown"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=list(GRIDS), choices=list(GRIDS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--ways", nargs="+", default=["gather", "dense"], choices=list(WAYS), help="flex compiles for a minute first"
    )
    args = parser.parse_args()
    print(
        f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} thread(s), torch {torch.__version__}"
    )
    print(f"commit {commit()}; {HEADS} heads of {HEAD_DIM}, float32, batch 1, {args.rounds} pairs\n")
    print("| tokens | pattern | way | left out | relative error | all, ms | pattern, ms | faster by | of a pair |")
    print("|---|---|---|---|---|---|---|---|---|")
    with torch.no_grad():
        for tokens in args.tokens:
            for name, pattern in PATTERNS.items():
                arranged = arrange(pattern, GRIDS[tokens])
                q, k, v = (arranged.sort(smooth(GRIDS[tokens], seed), dim=2) for seed in (1, 2, 3))
                mask = arranged.mask
                assert mask is not None
                assert not isinstance(mask, Tensor)

                def blocks(q: Tensor = q, k: Tensor = k, mask: object = mask) -> Blocks:
                    return mask if isinstance(mask, Blocks) else mask.blocks(q, k)  # type: ignore[union-attr]

                full = attend(q, k, v)
                for way_name in args.ways:
                    way = WAYS[way_name]
                    out = way(q, k, v, blocks())
                    error = float((out - full).norm() / full.norm())
                    one, other = pairs(
                        lambda q=q, k=k, v=v: attend(q, k, v),
                        lambda q=q, k=k, v=v, way=way, blocks=blocks: way(q, k, v, blocks()),
                        args.rounds,
                    )
                    ratios = [a / b for a, b in zip(one, other, strict=True)]
                    a, b = statistics.median(one), statistics.median(other)
                    left_out = 1 - float(blocks().kept.float().mean())
                    print(
                        f"| {tokens} | {name} | {way_name} | {left_out:.0%} | {error:.1e} | {a * 1e3:.1f} | "
                        f"{b * 1e3:.1f} | {a / b:.2f} | {min(ratios):.2f} to {max(ratios):.2f} |",
                        flush=True,
                    )


if __name__ == "__main__":
    main()
