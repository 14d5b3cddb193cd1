"""Named, counter-based randomness: every row is a pure function of (seed, step, name, sample id).

Resume, replay, per-image seeds and independence of batch size and of the number of processes are then one fact.
The bits are Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3", table 2 and section 5.4),
computed with tensor operations on any device. Normals are Box-Muller in float64, rounded to float32: the rounding hides
the last-bit differences between vectorised, scalar and GPU elementary functions.

The only use of torch's global generator in ditkit is dropout inside a network.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .config import DitkitError, near

__all__ = ["Draw", "Law", "Replay", "Rng", "philox"]


@runtime_checkable
class Law(Protocol):
    """A distribution, as a function of uniform draws on (0, 1) or of standard normal draws, which `base` says.

    Elementary functions differ in the last bit of float64 between vectors and scalars: a law that uses them rounds its
    result to float32, or a row would depend on its batch.
    """

    @property
    def base(self) -> str: ...

    def __call__(self, draws: Tensor, /) -> Tensor: ...


class Draw(Protocol):
    """What `Rng` and `Replay` have in common."""

    def __call__(self, name: str, law: str | Law, shape: Sequence[int] = ()) -> Tensor: ...

    def at(self, step: int, sample_ids: Tensor | None = None) -> Draw: ...


def _multiply(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a 32 x 32 bit product; int64 would overflow, so the constant goes in 16-bit halves."""
    high, low = (a >> 16) * b, (a & 0xFFFF) * b
    middle = (low >> 16) + (high & 0xFFFF)
    return (high >> 16) + (middle >> 16), ((middle & 0xFFFF) << 16) | (low & 0xFFFF)


def philox(counter: Sequence[Tensor], key: tuple[int, int], rounds: int = 10) -> tuple[Tensor, ...]:
    """Philox4x32: four words of 32 random bits (in int64) for each 128-bit counter, given as four int64 words."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(rounds):
        high0, low0 = _multiply(0xD2511F53, c0)
        high1, low1 = _multiply(0xCD9E8D57, c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return c0, c1, c2, c3


def _key(seed: int, name: str) -> int:
    return int.from_bytes(hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest(), "little")


class Rng:
    """`rng.at(step, sample_ids)(name, law, shape)` draws one row per sample id.

    `law` is "uniform" (float64 on the open interval (0, 1)), "normal" (float32) or a `Law`, which gets one of the two
    as float64. Names used by ditkit: t, noise, prior, solver, probe0, drop, flip, codec, order.
    """

    def __init__(self, seed: int, step: int = 0, sample_ids: Int[Tensor, "b"] | None = None):
        self.seed, self.step, self.sample_ids = seed, step, sample_ids

    def at(self, step: int, sample_ids: Int[Tensor, "b"] | None = None) -> Rng:
        """The randomness of one step. Without `sample_ids`, those of this Rng stay."""
        if not 0 <= step < 1 << 32:
            raise ValueError(f"a step must fit 32 bits, not {step}")
        return Rng(self.seed, step, self.sample_ids if sample_ids is None else sample_ids)

    def generator(self, name: str) -> torch.Generator:
        """A private sequential generator on the CPU for what has no rows, such as initial weights."""
        return torch.Generator().manual_seed(_key(self.seed, f"{name}@{self.step}") >> 1)

    def some(self, name: str, length: int, most: int) -> Int[Tensor, "k"]:
        """At most so many of `length` indices, sorted; each is drawn by a number that depends on it alone."""
        draws = self.at(self.step, torch.arange(length))(name, "uniform")
        return torch.argsort(draws, stable=True)[:most].sort().values

    def bits(self, name: str, words: int) -> Int[Tensor, "b words"]:
        """`words` words of 32 random bits for each row."""
        if self.sample_ids is None:
            raise ValueError("draw rows from rng.at(step, sample_ids): this Rng has no sample ids")
        ids = self.sample_ids.to(torch.int64)[:, None]
        key = _key(self.seed, name)
        blocks = torch.arange((words + 3) // 4, device=ids.device)[None, :]
        zero = torch.zeros_like(ids + blocks)
        counter = (blocks + zero, zero + self.step, (ids & 0xFFFFFFFF) + zero, (ids >> 32 & 0xFFFFFFFF) + zero)
        out = philox(counter, (key & 0xFFFFFFFF, key >> 32))
        return torch.stack(out, dim=-1).flatten(1)[:, :words]

    def __call__(self, name: str, law: str | Law, shape: Sequence[int] = ()) -> Float[Tensor, "b *shape"]:
        base = law if isinstance(law, str) else law.base
        count = math.prod(shape)
        if base == "uniform":
            draws = (self.bits(name, count).double() + 0.5) * 2.0**-32
        elif base == "normal":
            pairs = (self.bits(name, count + count % 2).double() + 0.5) * 2.0**-32
            u1, u2 = pairs.chunk(2, dim=1)
            radius, angle = torch.sqrt(-2 * torch.log(u1)), 2 * math.pi * u2
            draws = torch.cat((radius * torch.cos(angle), radius * torch.sin(angle)), dim=1)[:, :count].float()
        else:
            raise ValueError(f"a law is based on 'uniform' or 'normal', not {base!r}")
        draws = draws.reshape(len(draws), *shape)
        return draws if isinstance(law, str) else law(draws.double())


class Replay:
    """Given tensors in the place of random ones: `Replay({name: tensor})`, or a sequence of tensors, one per step.

    Satisfies the contract of `Rng`; what it returns is taken as drawn from the law that was asked for.
    """

    def __init__(self, values: Mapping[str, Tensor | Sequence[Tensor]], step: int = 0):
        self.values, self.step = values, step

    def at(self, step: int, sample_ids: Tensor | None = None) -> Replay:
        return Replay(self.values, step)

    def __call__(self, name: str, law: str | Law, shape: Sequence[int] = ()) -> Tensor:
        if name not in self.values:
            raise DitkitError(f"nothing to replay under {name!r}: {near(name, self.values)}")
        value = self.values[name]
        if not isinstance(value, Tensor):
            if self.step >= len(value):
                raise DitkitError(f"{name!r} is replayed for {len(value)} step(s), step {self.step} was asked for")
            value = value[self.step]
        if tuple(value.shape[1:]) != tuple(shape):
            raise DitkitError(f"replayed {name!r} has rows of shape {tuple(value.shape[1:])}, asked for {tuple(shape)}")
        return value
