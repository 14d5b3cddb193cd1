"""Attention patterns: their definitions, written out as loops; the ways to compute them; gradients."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from typing import Any, cast

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from ditkit.conditioning import Conditioning
from ditkit.config import DitkitError, from_json, to_json
from ditkit.diffusion import Linear, Meaning
from ditkit.interop import JIT
from ditkit.layers import Attention
from ditkit.layers.patterns import (
    Blocks,
    Nabla,
    Pattern,
    Rule,
    SlidingTiles,
    arrange,
    attend_blocks,
    dense,
    flex,
    gather,
    runs_in_flex,
)
from ditkit.models import JiTConfig, LightningDiTConfig, Model

close = pytest.approx
WAYS: dict[str, Callable[..., Tensor]] = {
    "dense": dense,
    "gather": gather,
    "eager flex": lambda *args: flex(*args, compiled=False),
    "chosen": attend_blocks,
}


def labelled(name: str) -> Callable[[str], str]:
    return lambda text: f"{name}: {text}"


def qkv(b: int, h: int, n: int, d: int = 8, seed: int = 0, spread: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(b, h, n, d, generator=generator, dtype=torch.float64) for _ in range(3))
    return spread * q, spread * k, v  # in float64, where rounding hides nothing


def slow(q: Tensor, k: Tensor, v: Tensor, allowed: Callable[[int, int, int, int], bool]) -> Tensor:
    """Attention, query by query."""
    out = torch.zeros_like(v)
    b, h, n, d = q.shape
    for row, head, i in product(range(b), range(h), range(n)):
        keys = [j for j in range(n) if allowed(row, head, i, j)]
        if keys:
            out[row, head, i] = (k[row, head, keys] @ q[row, head, i] / d**0.5).softmax(0) @ v[row, head, keys]
    return out


def some_blocks(b: int, h: int, count: int, share: float, seed: int = 1) -> Tensor:
    return torch.rand(b, h, count, count, generator=torch.Generator().manual_seed(seed)) < share


# the order of tokens


def test_tiles_follow_each_other_and_tokens_within_them() -> None:
    order = arrange(SlidingTiles((1, 1, 1), (1, 2, 3)), (2, 4, 6)).order
    assert order is not None
    expected = [
        (t * 4 + row) * 6 + column
        for t in range(2)
        for top, left in product((0, 2), (0, 3))
        for row, column in product(range(top, top + 2), range(left, left + 3))
    ]
    assert order.tolist() == expected
    # several frames in a tile
    order = arrange(SlidingTiles((1, 1, 1), (2, 1, 2)), (4, 1, 4)).order
    assert order is not None
    assert order.tolist() == [0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15]


@pytest.mark.parametrize("grid", [(4, 6), (3, 4, 6)])
def test_what_is_sorted_comes_back(grid: tuple[int, ...]) -> None:
    arranged = arrange(Nabla(tile=(1, 2, 2)), grid)
    x = torch.randn(2, math.prod(grid), 3)
    there = arranged.sort(x)
    assert not torch.equal(there, x)
    assert torch.equal(arranged.unsort(there), x)
    assert torch.equal(arranged.unsort(arranged.sort(x.mT, 2), dim=2), x.mT)


def test_without_a_pattern_nothing_moves_and_a_mask_of_keys_stays() -> None:
    nothing = arrange(None, (4, 6))
    x = torch.randn(2, 24, 3)
    assert nothing.sort(x) is x
    assert nothing.unsort(x) is x
    assert nothing.mask is None
    keys = torch.rand(2, 24) > 0.5
    mask = arrange(None, (4, 6), keys=keys).mask
    assert isinstance(mask, Tensor)
    assert torch.equal(mask, keys[:, None, None])


# sliding tiles


@pytest.mark.parametrize("window", [(1, 1, 1), (3, 1, 5), (2, 4, 3), (11, 3, 3)])
@pytest.mark.parametrize("grid", [(3, 6, 8), (1, 10, 2), (8, 6)])
def test_sliding_tiles_are_those_within_half_a_window(window: tuple[int, int, int], grid: tuple[int, ...]) -> None:
    """Token by token, in the order of the grid: the mask of tokens put back is what their coordinates say."""
    pattern = SlidingTiles(window, (1, 2, 2))
    arranged = arrange(pattern, grid)
    assert isinstance(arranged.mask, Blocks)
    n = math.prod(grid)
    mask = arranged.unsort(arranged.unsort(arranged.mask.dense(n)[0], dim=1), dim=2)[0]
    places = list(product(*(range(side) for side in ((1,) * (3 - len(grid)) + grid))))
    for i, (t, row, column) in enumerate(places):
        for j, (s, other_row, other_column) in enumerate(places):
            near = (
                abs(t - s) <= window[0] // 2
                and abs(row // 2 - other_row // 2) <= window[1] // 2
                and abs(column // 2 - other_column // 2) <= window[2] // 2
            )
            assert bool(mask[i, j]) == near, (i, j)


# Nabla


def nabla_by_hand(q: Tensor, k: Tensor, size: int, mass: float) -> list[set[int]]:
    """For one head, which blocks each block keeps: drop the smallest shares while all dropped sum to < 1 - mass."""
    blocks = range(len(q) // size)
    mean_q = [q[i * size : (i + 1) * size].double().mean(0) for i in blocks]
    mean_k = [k[i * size : (i + 1) * size].double().mean(0) for i in blocks]
    kept = []
    for i in blocks:
        scores = [math.exp(float(mean_q[i] @ mean_k[j]) / q.shape[1] ** 0.5) for j in blocks]
        shares = {j: score / sum(scores) for j, score in zip(blocks, scores, strict=True)}
        dropped, total = set(), 0.0
        for j in sorted(shares, key=lambda j: shares[j]):
            total += shares[j]
            if total < 1 - mass:
                dropped.add(j)
        kept.append(set(blocks) - dropped)
    return kept


@pytest.mark.parametrize("mass", [0.2, 0.5, 0.9])
@pytest.mark.parametrize("window", [None, (3, 1, 1)])
def test_nabla_against_a_slow_loop(mass: float, window: tuple[int, int, int] | None) -> None:
    """In each sample and head its own blocks; the result is attention to the tokens of those blocks."""
    grid, tile = (3, 4, 4), (1, 2, 2)
    q, k, v = qkv(2, 3, 48, spread=2.0)
    arranged = arrange(Nabla(mass, window, tile), grid)
    assert isinstance(arranged.mask, Rule)
    kept = arranged.mask.blocks(q, k).kept
    expected = {
        (b, h, i): blocks
        for b, h in product(range(2), range(3))
        for i, blocks in enumerate(nabla_by_hand(q[b, h], k[b, h], 4, mass))
    }
    places = list(product(range(3), range(2), range(2)))
    if window:
        for (_, _, i), blocks in expected.items():
            blocks |= {j for j in range(12) if places[i][1:] == places[j][1:] and abs(places[i][0] - places[j][0]) <= 1}
    for (b, h, i), blocks in expected.items():
        assert set(kept[b, h, i].nonzero()[:, 0].tolist()) == blocks, (b, h, i)
    assert len({frozenset(blocks) for blocks in expected.values()}) > 12  # heads and samples differ
    assert 0.05 < float(kept.float().mean()) < 0.95
    out = slow(q, k, v, lambda b, h, i, j: j // 4 in expected[b, h, i // 4])
    for name, way in WAYS.items():
        assert_close(way(q, k, v, arranged.mask.blocks(q, k)), out, rtol=1e-6, atol=1e-6, msg=labelled(name))
    assert_close(attend_blocks(q, k, v, arranged.mask), out, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("window", [None, (11, 3, 3)])
def test_nabla_that_keeps_all_mass_is_dense(window: tuple[int, int, int] | None) -> None:
    """On the grid of the paper, tiles of 8 x 8: the same numbers as attention to all."""
    arranged = arrange(Nabla(1.0, window), (2, 16, 24))
    q, k, v = qkv(1, 2, 768)
    assert isinstance(arranged.mask, Rule)
    assert bool(arranged.mask.blocks(q, k).kept.all())
    full = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    for way in WAYS.values():
        assert_close(way(q, k, v, arranged.mask.blocks(q, k)), full, rtol=1e-6, atol=1e-6)


def test_nabla_never_leaves_a_block_without_keys() -> None:
    """With mass 0 the largest share alone is kept, whichever way its sum is rounded."""
    rule = arrange(Nabla(0.0, None, (1, 1, 1)), (20, 20)).mask
    assert isinstance(rule, Rule)
    q, k, _ = qkv(2, 2, 400, spread=0.1)
    kept = rule.blocks(q, k).kept
    assert bool((kept.sum(-1) == 1).all())
    assert torch.equal(kept.float().argmax(-1), (q.float() @ k.float().mT).argmax(-1))


def test_nabla_chooses_in_float32() -> None:
    """The shares of many blocks are far below the spacing of bfloat16 near 1, where a running sum would stand still."""
    rule = arrange(Nabla(0.9, None, (1, 1, 1)), (1, 1000)).mask
    assert isinstance(rule, Rule)
    q, k, _ = qkv(1, 1, 1000, spread=0.02)
    kept = rule.blocks(q.bfloat16(), k.bfloat16()).kept.float().mean()
    assert float(kept) == close(0.9, abs=0.01)  # nearly equal shares


# the ways to compute it


def test_all_ways_agree_in_float32() -> None:
    q, k, v = (x.float() for x in qkv(2, 3, 768))
    rule = arrange(Nabla(0.5, (1, 1, 1)), (3, 16, 16)).mask
    assert isinstance(rule, Rule)
    blocks = rule.blocks(q, k)
    assert float(blocks.kept.float().mean()) < 1
    for way in WAYS.values():
        assert_close(way(q, k, v, blocks), dense(q, k, v, blocks), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("b", "h"), [(1, 1), (2, 1), (1, 3), (2, 3)])
@pytest.mark.parametrize("share", [0.2, 1.0])
def test_all_ways_agree_whatever_is_shared_by_samples_and_heads(b: int, h: int, share: float) -> None:
    q, k, v = qkv(2, 3, 24)
    blocks = Blocks(some_blocks(b, h, 6, share), 4)
    out = slow(q, k, v, lambda row, head, i, j: bool(blocks.kept[row % b, head % h, i // 4, j // 4]))
    for name, way in WAYS.items():
        assert_close(way(q, k, v, blocks), out, rtol=1e-6, atol=1e-6, msg=labelled(name))


def test_a_query_without_keys_gives_zeros() -> None:
    q, k, v = qkv(1, 2, 20)
    kept = some_blocks(1, 2, 5, 0.5)
    kept[0, 1, 3] = False
    for way in WAYS.values():
        out = way(q, k, v, Blocks(kept, 4))
        assert not bool(out[0, 1, 12:16].any())
        assert bool(out[0, 0, 12:16].all())


@pytest.mark.parametrize(("before", "after"), [(3, 0), (0, 2), (3, 2)])
@pytest.mark.parametrize("masked", [False, True])
def test_tokens_beside_the_grid_see_all_and_are_seen(before: int, after: int, masked: bool) -> None:
    """And a mask of keys takes text away from everybody, but not from the choice of blocks."""
    grid, inside = (4, 6), 24
    n = before + inside + after
    q, k, v = qkv(2, 3, n, spread=2.0)
    keys = torch.ones(2, n, dtype=torch.bool)
    keys[0, :2] = keys[1, -1] = not masked
    arranged = arrange(Nabla(0.4, None, (1, 2, 2)), grid, before=before, keys=keys if masked else None)
    alone = arrange(Nabla(0.4, None, (1, 2, 2)), grid).mask
    assert isinstance(arranged.mask, Rule)
    assert isinstance(alone, Rule)
    part = slice(before, before + inside)
    kept = alone.blocks(q[:, :, part], k[:, :, part]).kept
    assert 0 < float(kept.float().mean()) < 1

    def allowed(row: int, head: int, i: int, j: int) -> bool:
        both = all(before <= m < before + inside for m in (i, j))
        near = not both or bool(kept[row, head, (i - before) // 4, (j - before) // 4])
        return near and bool(keys[row, j])

    out = slow(q, k, v, allowed)
    for name in ("dense", "gather", "chosen"):
        assert_close(WAYS[name](q, k, v, arranged.mask.blocks(q, k)), out, rtol=1e-6, atol=1e-6, msg=labelled(name))
    assert not runs_in_flex(q, arranged.mask.blocks(q, k))


def test_gathering_in_many_small_parts_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = qkv(2, 3, 40)
    blocks = Blocks(some_blocks(2, 3, 10, 0.4), 4)
    whole = gather(q, k, v, blocks)
    monkeypatch.setattr("ditkit.layers.patterns.GATHERED", 1)
    assert_close(gather(q, k, v, blocks), whole, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("pattern", [Nabla(0.5, (1, 1, 1), (1, 2, 2)), SlidingTiles((3, 1, 3), (1, 2, 2))])
def test_gradients_are_those_of_the_masked_attention(pattern: Any) -> None:
    """In float64, against autograd through a softmax that is written out; with gradients the chosen way has them."""
    arranged = arrange(pattern, (3, 4, 4))
    given = [x.requires_grad_() for x in qkv(2, 3, 48)]
    q, k, v = given
    blocks = arranged.mask if isinstance(arranged.mask, Blocks) else arranged.mask.blocks(q, k)  # type: ignore[union-attr]
    weight = torch.randn(2, 3, 48, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    scores = (q @ k.mT / 8**0.5).masked_fill(~blocks.dense(48), -math.inf)
    wanted = torch.autograd.grad((scores.softmax(-1) @ v * weight).sum(), given)
    for way in (attend_blocks, dense, gather):
        mask = arranged.mask if way is attend_blocks else blocks
        found = torch.autograd.grad((way(q, k, v, mask) * weight).sum(), given)  # type: ignore[arg-type]
        for a, b in zip(found, wanted, strict=True):
            assert_close(a, b, rtol=1e-6, atol=1e-8)


def test_the_way_is_chosen_by_what_it_can_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """The gather serves inference alone: with gradients, dropout, or shapes without numbers it is the dense mask."""
    taken = []

    def spy(name: str) -> Callable[..., Tensor]:
        real = WAYS[name]

        def run(*args: Any) -> Tensor:
            taken.append(name)
            return real(*args)

        return run

    for name in ("dense", "gather"):
        monkeypatch.setattr(f"ditkit.layers.patterns.{name}", spy(name))
    q, k, v = qkv(1, 1, 16)
    blocks = Blocks(some_blocks(1, 1, 4, 0.5), 4)
    attend_blocks(q, k, v, blocks)
    attend_blocks(q.requires_grad_(), k, v, blocks)
    with torch.no_grad():
        attend_blocks(q, k, v, blocks)
    attend_blocks(q.detach(), k, v, blocks, 0.5)
    nothing = q.detach().to("meta")
    empty = attend_blocks(nothing, nothing, nothing, Blocks(blocks.kept.to("meta"), 4))
    assert taken == ["gather", "dense", "gather", "dense", "dense"]
    assert empty.shape == q.shape


def test_eager_flex_reads_the_mask_function() -> None:
    """Without one it ignores the lists of blocks and attends to all; that is why `flex` always gives one."""
    from torch.nn.attention.flex_attention import BlockMask, flex_attention

    q, k, v = qkv(1, 1, 256)
    kept = torch.eye(4, dtype=torch.bool)[None, None]
    out = dense(q, k, v, Blocks(kept, 64))
    assert_close(flex(q, k, v, Blocks(kept, 64), compiled=False), out, rtol=1e-6, atol=1e-6)
    counts = kept.sum(-1).to(torch.int32)
    places = kept.int().argsort(-1, descending=True).to(torch.int32)
    ignored: Any = flex_attention(
        q, k, v, block_mask=BlockMask.from_kv_blocks(torch.zeros_like(counts), places, counts, places, BLOCK_SIZE=64)
    )
    assert not torch.allclose(ignored, out, atol=1e-2)


@pytest.mark.slow
def test_compiled_flex_agrees() -> None:
    """One mask for all heads, and one for each, for more than one length, on whatever device there is."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for shape, count in (((1, 1), 8), ((2, 2), 8), ((2, 2), 12)):
        q, k, v = (x.float().to(device) for x in qkv(2, 2, 64 * count, d=64))
        kept = some_blocks(*shape, count, 0.4) | torch.eye(count, dtype=torch.bool)
        blocks = Blocks(kept.to(device), 64)
        assert runs_in_flex(q, blocks)
        with torch.no_grad():
            assert_close(flex(q, k, v, blocks), dense(q, k, v, blocks), rtol=1e-5, atol=1e-5)


# in modules and models


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_attention_takes_a_pattern_where_it_takes_a_mask(kv_heads: int) -> None:
    """Also where heads share keys: each head of q chooses its own blocks."""
    attn = Attention(32, 4, qk_norm="head", kv_heads=kv_heads)
    x = torch.randn(2, 48, 32, generator=torch.Generator().manual_seed(0))
    arranged = arrange(Nabla(0.3, None, (1, 2, 2)), (3, 4, 4))
    assert isinstance(arranged.mask, Rule)
    q, k, _ = attn.project(x)
    blocks = arranged.mask.blocks(q, k.repeat_interleave(4 // kv_heads, dim=1))
    assert float(blocks.kept.float().mean()) < 1
    with torch.no_grad():
        assert_close(attn(x, mask=arranged.mask), attn(x, mask=blocks.dense(48)), rtol=1e-5, atol=1e-6)
        assert_close(attn(x, mask=blocks), attn(x, mask=blocks.dense(48)), rtol=1e-5, atol=1e-6)


SMALL: dict[str, Any] = {
    "lightningdit": LightningDiTConfig(
        input_size=(16, 24), in_channels=4, hidden_size=24, depth=3, num_heads=3, num_classes=5
    ),
    "jit": JiTConfig(
        input_size=(32, 48), patch_size=2, in_channels=3, hidden_size=24, depth=3, num_heads=3, num_classes=5,
        bottleneck_dim=8, in_context_len=3, in_context_start=1,
    ),
}  # fmt: skip


def tiny(name: str, pattern: Any) -> tuple[Model, Tensor, Tensor, Conditioning]:
    config = replace(SMALL[name], pattern=pattern)
    generator = torch.Generator().manual_seed(0)
    model = config.build()
    for key, p in model.named_parameters():
        if p.requires_grad and "norm" not in key:
            p.data = 0.2 * torch.randn(p.shape, generator=generator)
    x = torch.randn(2, *config.shape, generator=generator)
    return model.eval(), x, torch.tensor([0.3, 0.7]), Conditioning(label=torch.tensor([1, 5]))


@pytest.mark.parametrize("name", SMALL)
def test_a_model_whose_pattern_keeps_everything_is_dense(name: str) -> None:
    """The order of tokens is nobody else's business: outputs, and what is prepared, are those of the plain model."""
    plain, x, t, cond = tiny(name, None)
    for pattern in (Nabla(1.0), SlidingTiles((1, 99, 99))):
        model, *_ = tiny(name, pattern)
        assert_close(model(x, t, cond), plain(x, t, cond), rtol=1e-5, atol=1e-5)
        ready = model.prepare(cond, x.shape)
        assert torch.equal(model(x, t, ready), model(x, t, cond))
        with torch.no_grad():
            assert_close(model(x, t, cond), plain(x, t, cond), rtol=1e-5, atol=1e-5)


def test_a_model_with_one_tile_around_each_is_a_model_of_each_tile() -> None:
    """With absolute positions and rotations taken away, tiles that see only themselves are images of their own."""
    model, x, t, cond = tiny("lightningdit", SlidingTiles((1, 1, 1)))
    plain, *_ = tiny("lightningdit", None)
    with torch.no_grad():
        model.get_parameter("pos_embed").zero_()
    ready = model.prepare(cond, x.shape)
    still = torch.ones_like(ready.static["rope"])
    still[:, 1] = 0
    out = model(x, t, ready.with_static(rope=still))
    for row, column in product(range(2), range(3)):
        part = x[..., 8 * row : 8 * row + 8, 8 * column : 8 * column + 8]
        alone = plain.prepare(cond, part.shape)
        alone = alone.with_static(rope=still[:, :, :64], positions=torch.zeros_like(alone.static["positions"]))
        there = out[..., 8 * row : 8 * row + 8, 8 * column : 8 * column + 8]
        assert_close(there, plain(part, t, alone), rtol=1e-5, atol=1e-5)


def test_class_tokens_see_all_patches_and_carry_them_to_others() -> None:
    """Tiles that see only themselves learn of each other once the class tokens have joined, two blocks later."""
    model, x, t, cond = tiny("jit", SlidingTiles((1, 1, 1)))
    x.requires_grad_()

    def reach(edit: Any) -> Tensor:
        (gradient,) = torch.autograd.grad(model(x, t, cond, edit=edit)[0, 0, 0, 0], x)
        return gradient[0].abs().sum(0) > 0

    assert bool(reach(None).all())
    own = reach(lambda site, block, h, *args: h if site == "blocks.1" else block(h, *args))
    expected = torch.zeros_like(own)
    expected[:16, :16] = True
    assert torch.equal(own, expected)


@pytest.mark.parametrize("name", SMALL)
def test_every_parameter_gets_its_gradient_under_a_pattern(name: str) -> None:
    model, *given = tiny(name, Nabla(0.3, (1, 1, 1)))
    model(*given).square().mean().backward()
    for key, p in model.named_parameters():
        if p.requires_grad:
            assert p.grad is not None, key
            assert bool(p.grad.any()), key
    assert model.config == from_json(to_json(model.config))


def test_the_release_of_jit_knows_no_pattern() -> None:
    meaning = Meaning(Linear(), "x0", "1-t", 0.05)
    assert JIT.refusal(SMALL["jit"], meaning) is None
    refusal = JIT.refusal(replace(SMALL["jit"], pattern=SlidingTiles()), meaning)
    assert refusal is not None
    assert "the pattern SlidingTiles(window=(11, 3, 3)" in refusal


# errors and files


def test_patterns_are_saved_by_their_names() -> None:
    for pattern in (Nabla(0.7, None, (1, 4, 4)), SlidingTiles((5, 3, 3))):
        assert isinstance(pattern, Pattern)
        assert from_json(to_json(pattern)) == pattern
    assert to_json(Nabla())["type"] == "pattern/nabla"


@pytest.mark.parametrize(
    ("build", "says"),
    [
        (lambda: Nabla(1.5), "pattern.mass is a share of attention from 0 to 1, not 1.5"),
        (lambda: Nabla(window=(0, 1, 1)), r"pattern.window is three numbers of at least 1, not \(0, 1, 1\)"),
        (lambda: SlidingTiles(tile=(1, 8, -8)), r"pattern.tile is three numbers of at least 1"),
        (lambda: JiTConfig(pattern="nabla"), r"None or a pattern of attention \(nabla, sliding_tiles\), not 'nabla'"),
        (lambda: SlidingTiles(window=cast(Any, (1, 3))), r"pattern.window is three numbers"),
    ],
)
def test_wrong_settings_are_refused(build: Callable[[], Any], says: str) -> None:
    with pytest.raises(DitkitError, match=says):
        build()


def test_a_grid_that_tiles_do_not_fill_is_refused() -> None:
    with pytest.raises(ValueError, match=r"3 x 8 x 12 tokens is not filled by tiles of 1 x 8 x 8 .*change the size"):
        arrange(Nabla(), (3, 8, 12))
    with pytest.raises(ValueError, match="12 x 8 tokens"):
        arrange(SlidingTiles(), (12, 8))


def test_dropped_tokens_are_noticed() -> None:
    """Routing takes tokens away: a pattern then has no meaning."""
    for pattern in (Nabla(tile=(1, 2, 2)), SlidingTiles(tile=(1, 2, 2))):
        mask = arrange(pattern, (4, 4)).mask
        assert isinstance(mask, Blocks | Rule)
        with pytest.raises(ValueError, match="12 tokens under a pattern of 4 blocks of 4"):
            attend_blocks(*qkv(1, 1, 12), mask)
