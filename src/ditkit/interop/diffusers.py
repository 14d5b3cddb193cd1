"""What the layouts of diffusers have in common: names that its networks share, and what its settings say."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..config import DitkitError
from .format import integer
from .table import Rule

__all__ = ["VERSION", "dual_stream", "embedder", "head_count"]

VERSION = "0.42.1"
"""Of the diffusers that the written settings are for, and that the tests compare with."""


def embedder(ours: str, theirs: str) -> tuple[Rule, ...]:
    """An embedder of times, sizes or vectors: Linear, SiLU, Linear."""
    return (Rule(f"{ours}.mlp.0.*", (f"{theirs}.linear_1.*",)), Rule(f"{ours}.mlp.2.*", (f"{theirs}.linear_2.*",)))


def dual_stream(ours: str, theirs: str, mlp: tuple[str, str], their_mlp: tuple[str, str]) -> tuple[Rule, ...]:
    """A block of two streams that attend together, the image's first. mlp, their_mlp: the two Linears of an MLP."""
    added = ("add_q_proj", "add_k_proj", "add_v_proj")
    streams = (
        ("x_block", "norm1", ("to_q", "to_k", "to_v"), "norm_", "to_out.0", "ff"),
        ("context_block", "norm1_context", added, "norm_added_", "to_add_out", "ff_context"),
    )
    rules: list[Rule] = []
    for stream, modulation, parts, norm, out, ff in streams:
        own = f"{ours}.{stream}"
        rules += [
            Rule(f"{own}.adaLN_modulation.1.*", (f"{theirs}.{modulation}.linear.*",)),
            Rule(f"{own}.attn.qkv.*", tuple(f"{theirs}.attn.{part}.*" for part in parts)),
            *(Rule(f"{own}.attn.{n}_norm.*", (f"{theirs}.attn.{norm}{n}.*",)) for n in "qk"),
            Rule(f"{own}.attn.proj.*", (f"{theirs}.attn.{out}.*",)),
            *(Rule(f"{own}.mlp.{a}.*", (f"{theirs}.{ff}.{b}.*",)) for a, b in zip(mlp, their_mlp, strict=True)),
        ]
    return tuple(rules)


def head_count(said: Mapping[str, Any], dim: int, of: str, default: tuple[int, int]) -> int:
    """How many `of`attention_heads config.json says; `default`: the class's own, and their size. Raises DitkitError if
    they are not those of the weights."""
    heads = integer(said, f"num_{of}attention_heads", default[0])
    size = integer(said, f"{of}attention_head_dim", default[1])
    if heads * size != dim:
        raise DitkitError(f"transformer/config.json: {heads} heads of {size} channels are not the {dim} of the weights")
    return heads
