"""The learning rates of the study backbones: each network with each of some rates, by held-out loss.

python benchmarks/backbone_rates.py [--task digits] [--steps 300] [--rates 1e-3 2e-3 4e-3] [--networks resnet unet ...]
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path

from ditkit.config import NotFinite
from ditkit.evaluation import heldout_loss
from ditkit.pipeline import load
from ditkit.studies import find_study
from ditkit.training import train

SEED = 100
"""None of the study's own."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", default="digits", choices=("digits", "twins"))
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-3, 2e-3, 4e-3])
    parser.add_argument("--networks", nargs="+", help="some of them (default: all)")
    args = parser.parse_args()
    print("| network | " + " | ".join(f"{rate:g}" for rate in args.rates) + " |", flush=True)
    for cell in find_study("backbones").cells:
        task, name = cell.name.split("-")
        if task != args.task or (args.networks and name not in args.networks):
            continue
        losses = []
        for rate in args.rates:
            short = replace(
                cell.recipe.train,
                steps=args.steps,
                lr=rate,
                cooldown=args.steps // 2,
                checkpoint_every=args.steps,
                keep=1,
            )
            with tempfile.TemporaryDirectory() as folder:
                try:
                    train(replace(cell.recipe, train=short, seed=SEED), Path(folder) / "run", quiet=True)
                    losses.append(f"{heldout_loss(load(Path(folder) / 'run')):.4f}")
                except NotFinite:
                    losses.append("diverged")
        print(f"| {name} | " + " | ".join(losses) + " |", flush=True)


if __name__ == "__main__":
    main()
