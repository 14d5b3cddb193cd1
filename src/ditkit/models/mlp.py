"""The MLP of JiT's toy experiment: Li & He 2025, arXiv 2511.13720, section 3 and appendix B.

Points of R^d, not images: a chain of Linear and ReLU that sees the point and a few waves of its time.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace
from typing import Self

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ..conditioning import Conditioning
from ..config import DitkitError, register
from ..layers import Edit, visit
from ..rng import Rng
from .registry import Model, Plan, at_least_one, instantiate

__all__ = ["MLP", "MLPConfig"]


@register("model", "mlp")
@dataclass(frozen=True)
class MLPConfig:
    """Everything about an MLP on vectors; the defaults are those of the paper's toy."""

    dimension: int = 2
    """Of a point."""
    hidden_size: int = 256
    depth: int = 5
    """Linear layers, with a ReLU between two of them."""
    waves: int = 4
    """Time is given as t and as cosine and sine of pi 2^k t for so many k."""

    def __post_init__(self) -> None:
        at_least_one(self, "dimension", "hidden_size", "waves")
        if self.depth < 2:
            raise DitkitError(f"model.depth is at least 2 in an MLP, not {self.depth}")

    @property
    def shape(self) -> tuple[int]:
        """Of a point."""
        return (self.dimension,)

    @property
    def length(self) -> int:
        """A point is one token."""
        return 1

    @property
    def vocab(self) -> int:
        """0: x is continuous."""
        return 0

    def example(self, batch: int) -> Conditioning:
        """Nothing is given."""
        return Conditioning()

    def fitted(self, shape: tuple[int, ...], classes: int, vocab: int) -> Self:
        """With this dimension. Raises DitkitError for anything but points without classes."""
        if vocab or len(shape) != 1 or classes:
            what = "tokens" if vocab else f"of shape {list(shape)}" + (f" with {classes} classes" if classes else "")
            raise DitkitError(f"the model mlp is for vectors without classes, and what is diffused is {what}")
        return replace(self, dimension=shape[0])

    def build(self, seed: int = 0) -> MLP:
        """The network with initial weights."""
        return instantiate(MLP, self, seed)


class MLP(Model):
    """Linear, ReLU, ..., Linear, of the point and the waves of its time (raw t in [0, 1])."""

    plan = Plan(shard=("layers",))

    def __init__(self, config: MLPConfig):
        super().__init__()
        self.config = config
        first, last = config.dimension + 1 + 2 * config.waves, config.dimension
        widths = [first, *[config.hidden_size] * (config.depth - 1), last]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(widths))

    def init_weights(self, rng: Rng) -> None:
        """He's normal weights for ReLU, small ones for the output, biases 0."""
        for name, layer in self.named_modules():
            if isinstance(layer, nn.Linear):
                gain = 0.1 if layer is self.layers[-1] else math.sqrt(2)
                std = gain / math.sqrt(layer.in_features)
                nn.init.normal_(layer.weight, std=std, generator=rng.generator(name))
                nn.init.zeros_(layer.bias)

    def forward(
        self, x: Float[Tensor, "b d"], t: Float[Tensor, "b"], cond: Conditioning, *, edit: Edit | None = None
    ) -> Float[Tensor, "b d"]:
        """t: raw, in [0, 1]; cond: nothing is read from it. Raises ValueError for points of another dimension."""
        if x.ndim != 2 or x.shape[1] != self.config.dimension:
            raise ValueError(f"the model is for points of dimension {self.config.dimension}, not {tuple(x.shape)}")
        angles = math.pi * t[:, None] * 2.0 ** torch.arange(self.config.waves, device=t.device, dtype=t.dtype)
        h = torch.cat((x, t[:, None].to(x), angles.cos().to(x), angles.sin().to(x)), dim=1)
        for i, layer in enumerate(self.layers):
            h = visit(edit, f"layers.{i}", layer, F.relu(h) if i else h)
        return h
