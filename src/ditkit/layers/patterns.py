"""Attention patterns: which tokens of a 2-D or 3-D grid attend to which others, block by block.

A pattern is a frozen configuration. `arrange` applies it to a grid of tokens once in a forward pass: it gives the order
in which the tokens of a tile are neighbours, so that a tile is a block, and a mask in that order, which `attend` takes
where it takes a boolean mask. The mask of `Nabla` is a rule: it is formed from q and k in every attention.

Three ways to compute attention under `Blocks`, equal within rounding, are chosen by what runs where: FlexAttention,
compiled, on CUDA; on a CPU without gradients the kept blocks are gathered; a dense mask everywhere else.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ..config import DitkitError, register

__all__ = [
    "Arrangement",
    "Blocks",
    "Mask",
    "Nabla",
    "Pattern",
    "Rule",
    "SlidingTiles",
    "arrange",
    "attend_blocks",
]


def _beside(n: int, count: int, size: int, before: int) -> tuple[int, int]:
    """Of n tokens, how many are ahead of the blocks, and how many after. Raises ValueError if there are fewer."""
    if n < before + count * size:
        raise ValueError(
            f"attention of {n} tokens under a pattern of {count} blocks of {size} after {before}: "
            "a pattern needs all tokens of its grid, so nothing may drop them"
        )
    return before, n - before - count * size


@dataclass(frozen=True)
class Blocks:
    """A mask of attention of tokens to themselves, in blocks of `size` tokens: True in `kept` = may be attended.

    Tokens ahead of the blocks, `before` many, and those after the last block (class tokens, text) attend to all and are
    attended by all. keys: which keys are real, as a mask of text says; all if it is None.
    """

    kept: Bool[Tensor, "#b #h i i"]
    size: int
    before: int = 0
    keys: Bool[Tensor, "b n"] | None = None

    @property
    def count(self) -> int:
        """The number of blocks."""
        return self.kept.shape[-1]

    def beside(self, n: int) -> tuple[int, int]:
        """Of n tokens, how many are ahead of the blocks, and how many after. Raises ValueError if there are fewer."""
        return _beside(n, self.count, self.size, self.before)

    def dense(self, n: int) -> Bool[Tensor, "#b #h n n"]:
        """The same for each pair of n tokens."""
        first, last = self.beside(n)
        mask = self.kept.repeat_interleave(self.size, dim=-1).repeat_interleave(self.size, dim=-2)
        mask = F.pad(mask, (first, last, first, last), value=True)
        return mask if self.keys is None else mask & self.keys[:, None, None]


Choice: TypeAlias = Callable[[Float[Tensor, "b h i s d"], Float[Tensor, "b h i s d"]], Bool[Tensor, "b h i i"]]
"""Which blocks of keys each block of queries keeps, from q and k in blocks."""


@dataclass(frozen=True)
class Rule:
    """Blocks that follow from q and k, which are normed and rotated; the other fields are those of `Blocks`."""

    choose: Choice
    count: int
    size: int
    before: int = 0
    keys: Bool[Tensor, "b n"] | None = None

    def blocks(self, q: Float[Tensor, "b h n d"], k: Float[Tensor, "b h n d"]) -> Blocks:
        """The blocks for these q and k. No gradient flows through the choice."""
        _beside(q.shape[2], self.count, self.size, self.before)
        inside = slice(self.before, self.before + self.count * self.size)
        with torch.no_grad():
            kept = self.choose(*(x[:, :, inside].unflatten(2, (self.count, self.size)) for x in (q, k)))
        return Blocks(kept, self.size, self.before, self.keys)


Mask: TypeAlias = Tensor | Blocks | Rule
"""What says which keys a query attends to; a tensor holds booleans and fits [b h n m]."""


@runtime_checkable
class Pattern(Protocol):
    """A configuration of which tiles of a grid attend to which. tile: frames, rows and columns of tokens in a block."""

    @property
    def tile(self) -> tuple[int, int, int]: ...

    def kept(self, tiles: tuple[int, int, int], device: torch.device | None = None) -> Bool[Tensor, "1 1 i i"] | Choice:
        """Which tiles attend to which, for so many along each axis."""
        ...


def _check(config: Any, names: tuple[str, ...]) -> None:
    for name in names:
        value = getattr(config, name)
        if value is not None and (len(value) != 3 or min(value) < 1):
            raise DitkitError(f"pattern.{name} is three numbers of at least 1, not {value}")


def _near(
    tiles: tuple[int, int, int], window: tuple[int, int, int], device: torch.device | None
) -> Bool[Tensor, "1 1 i i"]:
    axes = torch.meshgrid(*(torch.arange(n, device=device) for n in tiles), indexing="ij")
    near = [(a.reshape(-1, 1) - a.reshape(1, -1)).abs() <= w // 2 for a, w in zip(axes, window, strict=True)]
    return torch.stack(near).all(dim=0)[None, None]


@register("pattern", "sliding_tiles")
@dataclass(frozen=True)
class SlidingTiles:
    """Each tile attends to the tiles around it (sliding tile attention, Zhang et al. 2025, arXiv 2502.04507).

    window: how many tiles of frames, rows and columns it sees, its own in the middle; an even number counts as the next
    odd one, and at the border the window is cut.
    """

    window: tuple[int, int, int] = (11, 3, 3)
    tile: tuple[int, int, int] = (1, 8, 8)

    def __post_init__(self) -> None:
        _check(self, ("window", "tile"))

    def kept(self, tiles: tuple[int, int, int], device: torch.device | None = None) -> Bool[Tensor, "1 1 i i"]:
        """The tiles within half a window along each axis."""
        return _near(tiles, self.window, device)


@register("pattern", "nabla")
@dataclass(frozen=True)
class Nabla:
    """Neighbourhood adaptive block-level attention (Mikhailov et al. 2025, arXiv 2507.13546), as Kandinsky 5 has it.

    The means of q and of k over each tile give a small attention map for each head. In each of its rows the smallest
    entries are dropped as long as they sum to less than 1 - mass. Sliding tiles of `window` are kept besides, unless it
    is None.
    """

    mass: float = 0.9
    window: tuple[int, int, int] | None = (11, 3, 3)
    tile: tuple[int, int, int] = (1, 8, 8)

    def __post_init__(self) -> None:
        _check(self, ("window", "tile"))
        if not 0 <= self.mass <= 1:
            raise DitkitError(f"pattern.mass is a share of attention from 0 to 1, not {self.mass:g}")

    def kept(self, tiles: tuple[int, int, int], device: torch.device | None = None) -> Choice:
        """From q and k to the tiles that each head keeps."""
        return functools.partial(self._choose, None if self.window is None else _near(tiles, self.window, device))

    def _choose(
        self, near: Bool[Tensor, "1 1 i i"] | None, q: Float[Tensor, "b h i s d"], k: Float[Tensor, "b h i s d"]
    ) -> Bool[Tensor, "b h i i"]:
        shares = (q.float().mean(3) @ k.float().mean(3).mT / q.shape[-1] ** 0.5).softmax(dim=-1)
        ascending, places = shares.sort(dim=-1, stable=True)
        kept = ascending.cumsum(dim=-1) >= 1 - self.mass
        kept[..., -1] = True  # the largest, though rounding may leave the sum below 1
        kept = torch.empty_like(kept).scatter_(-1, places, kept)
        return kept if near is None else kept | near


@dataclass(frozen=True)
class Arrangement:
    """The tokens of a grid in the order of a pattern: `mask` is for tokens in that order, None attends to all."""

    mask: Mask | None = None
    order: Int[Tensor, "n"] | None = None

    def sort(self, x: Tensor, dim: int = 1) -> Tensor:
        """Tokens of the grid, row by row, in the order of the pattern."""
        return x if self.order is None else x.index_select(dim, self.order)

    def unsort(self, x: Tensor, dim: int = 1) -> Tensor:
        """The inverse of `sort`."""
        return x if self.order is None else x.index_select(dim, self.order.argsort())


def arrange(
    pattern: Pattern | None,
    grid: tuple[int, ...],
    device: torch.device | None = None,
    *,
    before: int = 0,
    keys: Bool[Tensor, "b n"] | None = None,
) -> Arrangement:
    """A pattern on a grid of tokens: [rows, columns] or [frames, rows, columns]. Without one nothing moves.

    before, keys: of `Blocks`, for a grid that is attended with other tokens beside it. Raises ValueError if tiles do
    not fill the grid.
    """
    if pattern is None:
        return Arrangement(None if keys is None else keys[:, None, None])
    whole = (1,) * (3 - len(grid)) + tuple(grid)
    if any(n % t for n, t in zip(whole, pattern.tile, strict=True)):
        raise ValueError(
            f"a grid of {' x '.join(map(str, grid))} tokens is not filled by tiles of "
            f"{' x '.join(map(str, pattern.tile))} (frames, rows, columns): change the size of x or pattern.tile"
        )
    frames, rows, columns = (n // t for n, t in zip(whole, pattern.tile, strict=True))
    kept, size = pattern.kept((frames, rows, columns), device), math.prod(pattern.tile)
    if isinstance(kept, Tensor):
        mask = Blocks(kept, size, before, keys)
    else:
        mask = Rule(kept, frames * rows * columns, size, before, keys)
    t, h, w = pattern.tile
    places = torch.arange(math.prod(whole), device=device).view(frames, t, rows, h, columns, w)
    return Arrangement(mask, places.permute(0, 2, 4, 1, 3, 5).flatten())


def attend_blocks(
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b h n d"],
    v: Float[Tensor, "b h n d"],
    mask: Blocks | Rule,
    dropout: float = 0.0,
) -> Float[Tensor, "b h n d"]:
    """Attention under a mask of blocks, by the fastest exact way that there is; a query without keys gives zeros."""
    blocks = mask if isinstance(mask, Blocks) else mask.blocks(q, k)
    if q.is_cuda and not dropout and runs_in_flex(q, blocks):
        return flex(q, k, v, blocks)
    recorded = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    real = type(q) is Tensor and not torch.compiler.is_compiling()  # the gather asks for numbers, not only for shapes
    if q.device.type == "cpu" and real and not recorded and not dropout:
        return gather(q, k, v, blocks)
    return dense(q, k, v, blocks, dropout)


def dense(q: Tensor, k: Tensor, v: Tensor, blocks: Blocks, dropout: float = 0.0) -> Tensor:
    """With a mask for each pair of tokens: no faster than attention to all, and it has gradients everywhere."""
    return F.scaled_dot_product_attention(q, k, v, blocks.dense(q.shape[2]), dropout_p=dropout)


GATHERED = 1 << 22  # numbers of keys that one call of `gather` copies: 16 MB in float32


def gather(q: Tensor, k: Tensor, v: Tensor, blocks: Blocks) -> Tensor:
    """The keys and values that a block of queries keeps, side by side; blocks that keep as many share one attention."""
    b, h, n, d = q.shape
    first, last = blocks.beside(n)
    count, size = blocks.count, blocks.size
    inside = slice(first, n - last)
    rows = blocks.kept.expand(b, h, -1, -1).reshape(b * h * count, count)
    head = torch.arange(b * h).repeat_interleave(count)
    places = rows.to(torch.uint8).argsort(dim=-1, descending=True, stable=True)
    lengths = rows.sum(dim=-1)

    def split(x: Float[Tensor, "b h n c"]) -> tuple[Float[Tensor, "bh i s c"], Float[Tensor, "bh m c"]]:
        x = x.flatten(0, 1)
        return x[:, inside].unflatten(1, (count, size)), torch.cat((x[:, :first], x[:, n - last :]), dim=1)

    (keys, more_keys), (values, more_values) = split(k), split(v)
    queries = split(q)[0].flatten(0, 1)
    real = None if blocks.keys is None else split(blocks.keys[:, None, :, None].expand(-1, h, -1, -1))
    inner = torch.zeros_like(queries)

    def chosen(blocked: Tensor, others: Tensor, part: Tensor, length: int) -> Tensor:
        of = head[part]
        return torch.cat((blocked[of[:, None], places[part, :length]].flatten(1, 2), others[of]), dim=1)[:, None]

    for length in lengths.unique().tolist():
        total = length * size + first + last
        if total == 0:
            continue
        for part in (lengths == length).nonzero()[:, 0].split(max(1, GATHERED // (total * d))):
            mask = None if real is None else chosen(*real, part, length).mT
            inner[part] = F.scaled_dot_product_attention(
                queries[part, None], chosen(keys, more_keys, part, length), chosen(values, more_values, part, length),
                mask,
            )[:, 0]  # fmt: skip
    out = inner.view(b, h, count * size, d)
    if not first + last:
        return out
    everywhere = None if blocks.keys is None else blocks.keys[:, None, None]
    around = torch.cat((q[:, :, :first], q[:, :, n - last :]), dim=2)
    around = F.scaled_dot_product_attention(around, k, v, everywhere)
    return torch.cat((around[:, :, :first], out, around[:, :, first:]), dim=2)


@functools.cache
def _compiled(device: str) -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    # for a CPU its kernel of unknown lengths is no valid C++ (torch 2.13): one for each length
    return torch.compile(flex_attention, dynamic=False if device == "cpu" else None)


def runs_in_flex(q: Tensor, blocks: Blocks) -> bool:
    """Whether FlexAttention's kernels take such blocks: of 64 tokens or a multiple, with no token beside them."""
    return blocks.size % 64 == 0 and blocks.keys is None and q.shape[2] == blocks.count * blocks.size


def flex(q: Tensor, k: Tensor, v: Tensor, blocks: Blocks, compiled: bool = True) -> Tensor:
    """FlexAttention that skips what is not kept. Eagerly it computes everything and only then masks."""
    from torch.nn.attention.flex_attention import BlockMask, flex_attention

    kept, size = blocks.kept, blocks.size
    many_b, many_h = kept.shape[0] > 1, kept.shape[1] > 1

    def mask_mod(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        # the kernels skip by the lists below; eager FlexAttention reads nothing but this function
        return kept[b if many_b else 0, h if many_h else 0, i // size, j // size]

    counts = kept.sum(dim=-1).to(torch.int32)
    places = kept.to(torch.uint8).argsort(dim=-1, descending=True, stable=True).to(torch.int32)
    # all kept blocks are whole; the list of partial ones is a tensor of its own, for one tensor in two places does not
    # compile for a CPU (torch 2.13)
    nothing, nowhere = torch.zeros_like(counts), torch.zeros_like(places)
    mask = BlockMask.from_kv_blocks(nothing, nowhere, counts, places, BLOCK_SIZE=size, mask_mod=mask_mod)
    run = _compiled(q.device.type) if compiled and not torch.compiler.is_compiling() else flex_attention
    out = run(q, k, v, block_mask=mask)
    assert isinstance(out, Tensor)
    return out
