"""Blocks that several families share, against their formulas."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close

from ditkit.layers import Attention, CrossAttention, GatedCrossBlock, Mlp, axial_angles, layer_norm, rope_table


def gated_cross(norm_tokens: bool = True) -> GatedCrossBlock:
    """Width 12 in 3 heads, a conditioning of 5 and tokens of 7, with weights under which nothing is zero."""
    block = GatedCrossBlock(
        12,
        norm1=layer_norm(12),
        attn=Attention(12, 3),
        norm_cross=layer_norm(12, affine=True),
        cross=CrossAttention(12, 3, given=7),
        norm2=layer_norm(12),
        mlp=Mlp(12, 20),
        norm_tokens=layer_norm(7, affine=True) if norm_tokens else None,
        given=5,
    )
    generator = torch.Generator().manual_seed(0)
    for p in block.parameters():
        p.data = 0.4 * torch.randn(p.shape, generator=generator)
    return block.eval()


def given(b: int = 2, n: int = 4, m: int = 6) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return tuple(torch.randn(shape, generator=generator) for shape in ((b, n, 12), (b, 5), (b, m, 7)))  # type: ignore[return-value]


@pytest.mark.parametrize("norm_tokens", [True, False])
def test_a_gated_cross_block_is_its_formula(norm_tokens: bool) -> None:
    block, (x, c, tokens) = gated_cross(norm_tokens), given()
    linear = block.adaLN_modulation[1]
    assert isinstance(linear, nn.Linear)
    vectors = (F.silu(c) @ linear.weight.T + linear.bias).view(2, 3, 3, 1, 12)
    expected = x
    normed = tokens if block.norm_tokens is None else block.norm_tokens(tokens)
    branches = (
        (block.norm1, block.attn),
        (block.norm_cross, lambda h: block.cross(h, normed)),
        (block.norm2, block.mlp),
    )
    for i, (norm, branch) in enumerate(branches):
        shift, scale, gate = vectors[:, i].unbind(1)
        expected = expected + gate * branch(norm(expected) * (1 + scale) + shift)
    assert_close(block(x, c, tokens), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(block(x, c, block.keys(tokens)), block(x, c, tokens))
    per_token = c[:, None].expand(-1, 4, -1)
    assert_close(block(x, per_token, tokens), expected, rtol=1e-5, atol=1e-5)


def test_each_mask_of_a_gated_cross_block_is_as_if_what_it_hides_were_not_there() -> None:
    block, (x, c, tokens) = gated_cross(), given()
    seen = (torch.arange(6) < 4)[None, None, None]
    assert_close(block(x, c, tokens, seen), block(x, c, tokens[:, :4]), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(block(x, c, tokens, seen), block(x, c, tokens), atol=1e-3)
    own = (torch.arange(4) < 3)[None, None, None]
    out = block(x, c, tokens, mask=own)[:, :3]
    assert_close(out, block(x[:, :3], c, tokens), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(out, block(x, c, tokens)[:, :3], atol=1e-3)


def test_a_gated_cross_block_turns_its_own_tokens_and_may_look_at_each_alone() -> None:
    block, (x, c, tokens) = gated_cross(), given()
    plain = block(x, c, tokens)
    rope = rope_table(axial_angles((torch.arange(4),), (4,)))
    assert not torch.allclose(block(x, c, tokens, rope=rope), plain, atol=1e-3)
    rows = torch.tensor([True, False])
    out = block(x, c, tokens, identity=rows)
    assert torch.equal(out[1], plain[1])
    assert_close(out[0], block(x, c, tokens, mask=torch.eye(4, dtype=torch.bool)[None, None])[0], rtol=1e-5, atol=1e-5)


def test_a_gated_cross_block_without_modulation_is_the_identity() -> None:
    block, (x, c, tokens) = gated_cross(), given()
    for p in block.adaLN_modulation.parameters():
        nn.init.zeros_(p)
    assert torch.equal(block(x, c, tokens), x)
