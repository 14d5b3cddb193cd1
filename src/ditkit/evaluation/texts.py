"""What is measured of texts: bits per character, copies of training texts, and words that exist."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from jaxtyping import Int
from torch import Tensor

from ..data import Split, points, strings
from ..diffusion import likelihood_bound
from ..pipeline import Pipeline
from ..rng import Rng
from .distances import Estimate

__all__ = ["Nearest", "bits_per_character", "nearest_texts", "ratio", "share", "unigram_bits", "valid"]


@dataclass(frozen=True)
class Nearest:
    """A text, the nearest of others, and how many edits are between them."""

    text: str
    nearest: str
    edits: int


def nearest_texts(texts: Sequence[str], others: Sequence[str]) -> list[Nearest]:
    """For each text the first of the others with the least edit distance (Levenshtein 1966): the number of insertions,
    deletions and replacements of one character. Raises ValueError where there are no others."""
    if not others:
        raise ValueError("there are no texts to be near to")
    lengths = torch.tensor([len(other) for other in others])
    table = points(others, max(1, int(lengths.max())))
    found: dict[str, tuple[str, int]] = {}
    for length, group in groupby(sorted(set(texts), key=len), key=len):
        same = list(group)
        for first in range(0, len(same), 64):
            block = same[first : first + 64]
            edits, index = _edits(points(block, max(1, length)), length, table, lengths).min(1)
            for text, j, e in zip(block, index.tolist(), edits.tolist(), strict=True):
                found[text] = others[int(j)], int(e)
    return [Nearest(text, *found[text]) for text in texts]


def _edits(a: Int[Tensor, "n l"], length: int, b: Int[Tensor, "m k"], lengths: Int[Tensor, "m"]) -> Int[Tensor, "n m"]:
    """Edit distances of n texts of one length to m texts, row by row of the usual table, for all pairs at once."""
    shape = (len(a), len(b))
    row = [torch.full(shape, j, dtype=torch.int16) for j in range(b.shape[1] + 1)]
    for i in range(length):
        new = [torch.full(shape, i + 1, dtype=torch.int16)]
        for j in range(b.shape[1]):
            replaced = row[j] + (a[:, i, None] != b[None, :, j]).to(torch.int16)
            new.append(torch.minimum(replaced, torch.minimum(row[j + 1], new[j]) + 1))
        row = new
    return torch.stack(row).gather(0, lengths.expand(1, *shape))[0]


@torch.no_grad()
def bits_per_character(pipeline: Pipeline, split: Split, indices: Int[Tensor, "n"], times: int, seed: int) -> Estimate:
    """The bound on -log2 p of texts, the filling after them included, over the number of their characters, with the
    standard error over texts (`likelihood_bound` with so many times for each)."""
    recipe, bits, characters = pipeline.recipe, [], []
    for ids in torch.arange(len(indices)).split(recipe.sample.batch):
        batch = split.batch(indices[ids])
        cond = recipe.given(batch.given, pipeline.device)
        x0, rng = recipe.codec.encode(batch.data.to(pipeline.device)), Rng(seed).at(0, ids.to(pipeline.device))
        bits.append(likelihood_bound(pipeline.denoiser, x0, cond, rng, times).cpu() / math.log(2))
        characters += [len(text) for text in strings(batch.data)]
    return ratio(torch.cat(bits), torch.tensor(characters, dtype=torch.float64))


def ratio(parts: Tensor, sizes: Tensor) -> Estimate:
    """sum of parts over sum of sizes, with the standard error of such a ratio (by its derivatives)."""
    value, n = float(parts.sum() / sizes.sum()), len(parts)
    spread = float((parts - value * sizes).square().sum()) * n / max(1, n - 1)
    return Estimate(value, spread**0.5 / float(sizes.sum()))


def unigram_bits(texts: Sequence[str], train: Sequence[str], symbols: str) -> float:
    """Bits per character of a code of single characters and an end, by how often each is in `train`, plus one."""
    counts = Counter("".join(train))
    total = sum(counts.values()) + len(train) + len(symbols) + 1
    cost = {c: -math.log2((counts[c] + 1) / total) for c in symbols}
    end = -math.log2((len(train) + 1) / total)
    return sum(end + sum(cost[c] for c in text) for text in texts) / sum(map(len, texts))


def valid(texts: Sequence[str], train: Sequence[str]) -> list[bool]:
    """Whether all words of a text, what is between single spaces, are in a training text, and there is one."""
    words = {word for text in train for word in text.split(" ")} - {""}
    return [all(word in words for word in text.split(" ")) for text in texts]


def share(flags: Sequence[bool]) -> Estimate:
    """The share of True, with its binomial standard error."""
    p = sum(flags) / len(flags)
    return Estimate(p, (p * (1 - p) / len(flags)) ** 0.5)
