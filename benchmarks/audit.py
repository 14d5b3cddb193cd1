"""Which planted copies an audit finds, and what it takes for copies though nothing was copied.

    python benchmarks/audit.py

1,000 digits are the training images, 1,000 others the samples, of which a share is replaced by training images, or all
are changed; 1,000 more are held out. Printed is a line of a table for each case.
"""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ditkit.data import Digits
from ditkit.data.dataset import InMemory
from ditkit.evaluation import audit
from ditkit.evaluation.measure import blurred


def cases(train: Tensor, new: Tensor, ones: Tensor) -> dict[str, Tensor]:
    """Samples by the name of what was planted."""

    def planted(count: int) -> Tensor:
        return torch.cat((train[:: len(train) // count][:count], new[::2], new[1::2]))[: len(new)]

    noise = 4 * torch.randn(planted(20).shape, generator=torch.Generator().manual_seed(0))
    half = (train.float() + new.float()) / 2
    return {
        "new digits": new,
        "1% are training images": planted(10),
        "2% are training images": planted(20),
        "5% are training images": planted(50),
        "5%, all with noise of 4 of 255": (planted(50) + noise).round().clamp(0, 255).to(torch.uint8),
        "means of a training and a new digit": half.round().to(torch.uint8),
        "training images moved by a pixel": train.roll(1, -1),
        "new digits, blurred by a pixel": blurred(new),
        "new digits, all of them ones": ones,
    }


def main() -> None:
    data = Digits().open()
    known = data.train.batch(torch.arange(len(data.train)))
    train, new = known.data[::4], known.data[1::4]
    assert known.label is not None
    ones = known.data[2::4][known.label[2::4] == 1]
    rows = torch.arange(len(train))
    parts = {"train": InMemory(train, None, rows), "heldout": InMemory(data.heldout.batch(rows).data, None, rows)}
    chosen = replace(data, **parts)
    with tempfile.TemporaryDirectory() as folder:
        for name, samples in cases(train, new, ones).items():
            np.save(path := Path(folder) / "samples.npy", samples.numpy())
            found = audit(path, chosen, size=32)
            n = found.numbers
            shares = f"{n['f_mem']:.1%} | {n['f_mem_features']:.1%} | {n['c_t']:.1f} | {n['c_t_features']:.1f}"
            print(f"| {name} | {shares} | {n['authentic']:.2f} | {found.verdict.split(':')[0]} |", flush=True)


if __name__ == "__main__":
    main()
