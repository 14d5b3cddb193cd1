"""Times, labels and positions as vectors."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn

from .precision import Linear32

__all__ = [
    "LabelEmbedder",
    "TimestepEmbedder",
    "TokenEmbedder",
    "VectorEmbedder",
    "check_label",
    "positions_2d",
    "sincos_2d",
    "sinusoid",
]


def sinusoid(t: Float[Tensor, "b"], dim: int, shift: int = 0) -> Float[Tensor, "b dim"]:
    """[cos, sin] of t times dim/2 frequencies 10000^(-i / (dim/2 - shift)), cos first.

    shift: with 0 the last frequency stays above 1/10000 (DiT), with 1 it is 1/10000 (DDPM, diffusers' DiT).
    """
    half = dim // 2
    # Arguments are rounded to float32 as everybody does: at t = 999 that moves an angle by up to 6e-5. The functions
    # themselves are taken in float64, for in float32 their last bit differs from one processor to the next.
    exponents = -math.log(10000) * torch.arange(half, dtype=torch.float32, device=t.device) / (half - shift)
    angles = (t.float()[:, None] * exponents.double().exp().float()).double()
    return torch.cat((angles.cos(), angles.sin()), dim=-1).float()


class TimestepEmbedder(nn.Module):
    """A sinusoid of the model's own time, or of another number, then Linear, SiLU, Linear.

    hidden: the width in between, if it is not `dim`. bias: of both Linears. precise: in float32, whatever the model is.
    """

    def __init__(
        self,
        dim: int,
        frequencies: int = 256,
        shift: int = 0,
        hidden: int | None = None,
        bias: bool = True,
        precise: bool = False,
    ):
        super().__init__()
        self.frequencies, self.shift, hidden = frequencies, shift, hidden or dim
        linear = Linear32 if precise else nn.Linear
        first, last = linear(frequencies, hidden, bias=bias), linear(hidden, dim, bias=bias)
        self.mlp = nn.Sequential(first, nn.SiLU(), last)

    def forward(self, t: Float[Tensor, "b"]) -> Float[Tensor, "b d"]:
        return self.mlp(sinusoid(t, self.frequencies, self.shift).to(next(self.mlp.parameters()).dtype))


def check_label(label: Int[Tensor, "b"] | None, classes: int) -> None:
    """Raises ValueError if labels are missing or not wanted."""
    if (label is None) != (classes == 0):
        given = "no label was given" if label is None else "a label was given"
        raise ValueError(f"the model has num_classes={classes} and {given}")


class VectorEmbedder(nn.Module):
    """A vector that is given, such as a pooled text, through Linear, SiLU, Linear."""

    def __init__(self, given: int, dim: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(given, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, vector: Float[Tensor, "b g"]) -> Float[Tensor, "b d"]:
        return self.mlp(vector.to(next(self.mlp.parameters()).dtype))


class LabelEmbedder(nn.Module):
    """A table of `classes` + 1 vectors; the last one, with index `classes`, is the null label."""

    def __init__(self, classes: int, dim: int):
        super().__init__()
        self.classes = classes
        self.embedding_table = nn.Embedding(classes + 1, dim)

    def forward(self, label: Int[Tensor, "b"] | None, batch: int) -> Float[Tensor, "b d"]:
        """Without classes every sample gets the null vector. Raises ValueError if labels are missing or not wanted."""
        check_label(label, self.classes)
        if label is None:
            return self.embedding_table.weight.expand(batch, -1)
        return self.embedding_table(label)


class TokenEmbedder(nn.Embedding):
    """A vector for each of `vocab` kinds of tokens; of probabilities over them the mean vector, with its gradient."""

    def __init__(self, vocab: int, dim: int):
        super().__init__(vocab, dim)

    def forward(self, input: Shaped[Tensor, "b l *v"]) -> Float[Tensor, "b l d"]:
        """input: tokens in integers, or probabilities in floats. Raises ValueError for another shape."""
        soft = input.is_floating_point()
        if input.ndim != 2 + soft or (soft and input.shape[2] != self.num_embeddings):
            raise ValueError(
                f"the model takes tokens [b l] or probabilities [b l {self.num_embeddings}], not {list(input.shape)}"
            )
        return input.to(self.weight.dtype) @ self.weight if soft else super().forward(input)


def sincos_2d(
    dim: int,
    grid: tuple[int, int],
    device: torch.device | None = None,
    *,
    start: float = 0.0,
    step: float | tuple[float, float] = 1.0,
) -> Float[Tensor, "1 n d"]:
    """Fixed positions of a grid of patches: the first half of the channels says the column, the second the row.

    Patches are at `start`, `start` + `step`, ... along both axes; `step` of the rows and of the columns may differ.

    Within each half first all sines, then all cosines, with frequencies 10000^(-i/(dim/4)); float64, then float32.
    The column comes first because MAE built its grid so; DiT and JiT inherited it.
    """
    if dim % 4:
        raise ValueError(f"hidden_size {dim} is not divisible by 4, which 2-D sine-cosine positions need")
    if (torch.get_default_device() if device is None else device).type == "meta":
        return torch.empty(1, grid[0] * grid[1], dim, device="meta")  # the same, but at once
    steps = step if isinstance(step, tuple) else (step, step)
    rows, columns = (
        start + by * torch.arange(n, dtype=torch.float64, device=device) for n, by in zip(grid, steps, strict=True)
    )
    row, column = torch.meshgrid(rows, columns, indexing="ij")
    frequencies = 10000.0 ** (-torch.arange(dim // 4, dtype=torch.float64, device=device) / (dim / 4))
    halves = []
    for position in (column, row):
        angles = position.reshape(-1, 1) * frequencies
        halves += [angles.sin(), angles.cos()]
    return torch.cat(halves, dim=-1).float()[None]


def positions_2d(stored: Float[Tensor, "1 n d"], of: tuple[int, int], grid: tuple[int, int]) -> Float[Tensor, "1 m d"]:
    """The positions that a model stores, which are those `of` one grid; or the fixed ones of another grid."""
    if grid == of:
        return stored
    return sincos_2d(stored.shape[-1], grid, stored.device).to(stored.dtype)
