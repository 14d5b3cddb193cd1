"""Layers that families share, in every form that they have, against formulas written out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from ditkit.layers import (
    Attention,
    CrossAttention,
    Mlp,
    SwiGLU,
    attend,
    axial_angles,
    modulate,
    patch_grid,
    patchify,
    rope_table,
    rotate,
    unpatchify,
)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def softmax_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return scores.softmax(-1) @ v


def test_grouped_queries_share_the_keys_of_their_neighbours() -> None:
    q, k, v = randn(2, 6, 5, 4), randn(2, 2, 7, 4, seed=1), randn(2, 2, 7, 4, seed=2)
    mask = torch.rand(2, 1, 5, 7, generator=torch.Generator().manual_seed(3)) > 0.3
    mask[..., 0] = True
    for head in range(6):
        expected = softmax_attention(q[:, head], k[:, head // 3], v[:, head // 3], mask[:, 0])
        assert_close(attend(q, k, v, mask)[:, head], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("qk_norm", [None, "head", "across"])
@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("pairs", ["neighbours", "halves"])
def test_one_linear_or_three_are_the_same_attention(qk_norm: Any, kv_heads: int, pairs: Any) -> None:
    fused = Attention(24, 4, qk_norm=qk_norm, kv_heads=kv_heads, pairs=pairs, head_dim=8)
    three = Attention(24, 4, qk_norm=qk_norm, kv_heads=kv_heads, pairs=pairs, head_dim=8, fused=False)
    state = fused.state_dict()
    for end in ("weight", "bias"):
        parts = state.pop(f"qkv.{end}").split(fused.sizes)
        state |= {f"{name}.{end}": part for name, part in zip("qkv", parts, strict=True)}
    three.load_state_dict(state)
    x, rope = randn(2, 5, 24), rope_table(axial_angles((torch.arange(5),), (8,)), pairs)
    mask = torch.tensor([True, True, False, True, True]).view(1, 1, 1, 5)
    identity = torch.tensor([True, False])
    assert_close(fused(x, rope, mask, identity=identity), three(x, rope, mask, identity=identity))
    q, k, v = three.project(x, rope)
    out = softmax_attention(q, k.repeat_interleave(4 // kv_heads, 1), v.repeat_interleave(4 // kv_heads, 1), mask)
    assert_close(three(x, rope, mask), three.merge(out), rtol=1e-5, atol=1e-6)
    own = three.merge(v.repeat_interleave(4 // kv_heads, 1))
    assert_close(three(x, rope, mask, identity=identity)[0], own[0])


def test_the_norm_of_q_and_k_is_of_a_head_or_of_all_of_them() -> None:
    x = randn(2, 5, 24)
    for kind, axis in (("head", -1), ("across", (1, -1))):
        attn = Attention(24, 4, qk_norm=kind, fused=False)  # type: ignore[arg-type]
        plain = attn.k(x).unflatten(-1, (4, 6)).transpose(1, 2)
        expected = plain * (plain.square().mean(axis, keepdim=True) + 1e-6).rsqrt()
        assert_close(attn.project(x)[1], expected, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="qk_norm is"):
        Attention(24, 4, qk_norm="token")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="num_heads 4 is not divisible by num_kv_heads 3"):
        Attention(24, 4, kv_heads=3)


@pytest.mark.parametrize("fused", [True, False])
def test_cross_attention_takes_tokens_or_their_keys_and_sees_only_what_the_mask_allows(fused: bool) -> None:
    cross = CrossAttention(24, 4, given=10, fused=fused, qk_norm="head")
    x, given = randn(2, 5, 24), randn(2, 7, 10, seed=1)
    mask = torch.arange(7) < torch.tensor([[7], [4]])
    out = cross(x, given, mask[:, None, None])
    assert_close(out, cross(x, cross.keys(given), mask[:, None, None]))
    assert_close(out[1:], cross(x[1:], given[1:, :4]), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(out[1:], cross(x[1:], given[1:]), atol=1e-3)


def test_halves_turn_channel_i_with_channel_i_plus_half() -> None:
    x, position = randn(1, 2, 3, 8), torch.tensor([0, 4, 9])
    table = rope_table(axial_angles((position,), (8,)), "halves")
    angle = position[:, None].double() * 10000.0 ** (-torch.arange(4).double() / 4)
    turned = torch.complex(x[..., :4].double(), x[..., 4:].double()) * torch.polar(torch.ones_like(angle), angle)
    expected = torch.cat((turned.real, turned.imag), dim=-1)
    assert_close(rotate(x, table, "halves").double(), expected, rtol=1e-5, atol=1e-6)


def test_each_sample_can_have_its_own_positions() -> None:
    x, positions = randn(2, 3, 5, 8), torch.tensor([[0, 1, 2, 3, 4], [7, 3, 1, 0, 2]])
    table = rope_table(axial_angles((positions, positions), (4, 4)))[:, :, None]
    for i in range(2):
        own = rope_table(axial_angles((positions[i], positions[i]), (4, 4)))
        assert torch.equal(rotate(x, table)[i : i + 1], rotate(x[i : i + 1], own))


@pytest.mark.parametrize("patch", [(2, 2), (1, 2, 3), (3,)])
@pytest.mark.parametrize("order", ["pc", "cp"])
def test_features_of_a_patch_are_in_the_order_that_is_said(patch: Sequence[int], order: Any) -> None:
    grid = (2, 3, 4)[: len(patch)]
    space = [g * p for g, p in zip(grid, patch, strict=True)]
    x = randn(2, 5, *space)
    tokens = patchify(x, patch, order)
    assert patch_grid(x, 5, patch) == grid
    assert torch.equal(unpatchify(tokens, grid, patch, order), x)
    index = torch.tensor(list(torch.ones(grid).nonzero().tolist()))  # of each token, the last axis fastest
    for n, at in enumerate(index.tolist()):
        part = x[(slice(None), slice(None), *(slice(i * p, (i + 1) * p) for i, p in zip(at, patch, strict=True)))]
        expected = part.flatten(1) if order == "cp" else part.movedim(1, -1).flatten(1)
        assert torch.equal(tokens[:, n], expected)


def test_a_shape_that_patches_do_not_tile_is_refused_with_what_to_change() -> None:
    with pytest.raises(ValueError, match=r"x is 3 x 4 x 5, which patches of 1 x 2 x 2 do not tile: change patch_size"):
        patch_grid(randn(1, 4, 3, 4, 5), 4, (1, 2, 2))
    with pytest.raises(ValueError, match=r"takes \[b 4 t h w\] \(in_channels=4\), x is \[1, 4, 4, 6\]"):
        patch_grid(randn(1, 4, 4, 6), 4, (1, 2, 2))


def test_modulation_is_per_sample_or_per_token() -> None:
    x, shift, scale = randn(2, 3, 4), randn(2, 4, seed=1), randn(2, 4, seed=2)
    expected = x * (1 + scale.view(2, 1, 4)) + shift.view(2, 1, 4)
    assert torch.equal(modulate(x, shift, scale), expected)
    assert torch.equal(modulate(x, shift[:, None].expand(2, 3, 4), scale[:, None].expand(2, 3, 4)), expected)
    assert torch.equal(modulate(x, None, scale), x * (1 + scale.view(2, 1, 4)))


def test_mlps_in_their_other_forms() -> None:
    x = 3 * randn(5, 6)
    exact, silu = Mlp(6, 7, act="gelu", bias=False), Mlp(6, 7, act="silu")
    h = x @ exact.fc1.weight.T
    assert_close(exact(x), 0.5 * h * (1 + torch.erf(h / 2**0.5)) @ exact.fc2.weight.T, rtol=1e-5, atol=1e-6)
    h = x @ silu.fc1.weight.T + silu.fc1.bias
    assert_close(silu(x), (h * h.sigmoid()) @ silu.fc2.weight.T + silu.fc2.bias, rtol=1e-5, atol=1e-6)
    fused, two = SwiGLU(6, 7, bias=False), SwiGLU(6, 7, bias=False, fused=False)
    gate, value = fused.w12.weight.chunk(2)
    two.load_state_dict({"w1.weight": gate, "w2.weight": value, "w3.weight": fused.w3.weight})
    assert_close(fused(x), two(x))
