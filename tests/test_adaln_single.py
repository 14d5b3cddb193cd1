"""What PixArt and Sana are made of: adaLN-single, linear attention, an MLP of neighbours, stretched positions."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close

from ditkit.conditioning import Conditioning, Tokens
from ditkit.config import DitkitError
from ditkit.layers import AdaLNSingleBlock, Attention, CrossAttention, LinearAttention, MixFFN, Mlp, layer_norm
from ditkit.models import PixArtConfig, SanaConfig, create_model

PIXART = PixArtConfig(input_size=8, in_channels=2, hidden_size=24, depth=2, num_heads=2, text_dim=6, position_scale=1.0)
SANA = SanaConfig(input_size=4, in_channels=2, hidden_size=24, depth=2, num_heads=3, cross_heads=2, text_dim=6)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def randomised(module: nn.Module) -> Any:
    """Weights under which nothing is zero."""
    generator = torch.Generator().manual_seed(0)
    for p in module.parameters():
        p.data = 0.3 * torch.randn(p.shape, generator=generator)
    return module.eval()


def given(config: Any, b: int = 2, size: tuple[int, int] = (4, 4)) -> Any:
    text = Tokens(noise(b, 5, config.text_dim, seed=1), torch.ones(b, 5, dtype=torch.bool))
    return noise(b, config.in_channels, *size, seed=2), torch.full((b,), 300.0), Conditioning(text=text)


def test_a_block_is_its_formula() -> None:
    """Six vectors that all blocks share, plus the block's own; the text between, without a norm and a gate."""
    block = randomised(
        AdaLNSingleBlock(12, layer_norm(12), Attention(12, 3), CrossAttention(12, 3), layer_norm(12), Mlp(12, 20))
    )
    x, c, tokens = noise(2, 4, 12), noise(2, 6, 12, seed=1), noise(2, 5, 12, seed=2)
    shift1, scale1, gate1, shift2, scale2, gate2 = (block.scale_shift_table[None] + c)[:, :, None].unbind(1)
    h = x + gate1 * block.attn(F.layer_norm(x, (12,), eps=1e-6) * (1 + scale1) + shift1)
    h = h + block.cross(h, tokens)
    h = h + gate2 * block.mlp(F.layer_norm(h, (12,), eps=1e-6) * (1 + scale2) + shift2)
    assert_close(block(x, c, tokens), h, rtol=1e-5, atol=1e-5)
    assert torch.equal(block(x, c, block.keys(tokens)), block(x, c, tokens))
    seen = (torch.arange(5) < 3)[None, None, None]
    assert_close(block(x, c, tokens, seen), block(x, c, tokens[:, :3]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("norm", [None, "across"])
def test_linear_attention_weighs_by_products_that_are_not_negative(norm: Any) -> None:
    attn = randomised(LinearAttention(12, 3, qk_norm=norm, bias=False, out_bias=True))
    x = noise(2, 7, 12)
    q, k, v = (part.double() for part in attn.project(x))
    weights = q.relu() @ k.relu().mT
    out = (weights / (weights.sum(-1, keepdim=True) + 1e-15)) @ v
    expected = out.transpose(1, 2).flatten(2) @ attn.proj.weight.double().T + attn.proj.bias.double()
    assert_close(attn(x).double(), expected, rtol=1e-5, atol=1e-5)
    # where nothing is positive, nothing is attended, and nothing is divided by zero
    with torch.no_grad():
        attn.qkv.weight[:12] = 0
    assert_close(attn(x), attn.proj.bias.expand_as(x))
    with pytest.raises(ValueError, match="takes no mask"):
        attn(x, mask=torch.ones(7, 7, dtype=torch.bool))


def test_linear_attention_sums_in_float32_also_under_autocast() -> None:
    """1 + 2^-9 is 1 in bfloat16: a sum of many values would lose all of it."""
    attn: Any = LinearAttention(4, 1, bias=False, out_bias=False)
    with torch.no_grad():
        attn.qkv.weight.copy_(torch.cat((torch.eye(4), torch.eye(4), torch.eye(4))))
        attn.proj.weight.copy_(torch.eye(4))
    x = torch.ones(1, 3000, 4)
    x[:, 0] = 5
    with torch.autocast("cpu", torch.bfloat16):
        out = attn(x)
    weights = x.double() @ x.double().mT
    assert_close(out.double(), (weights @ x.double()) / weights.sum(-1, keepdim=True), rtol=4e-3, atol=0)


def test_the_mlp_of_neighbours_is_its_formula() -> None:
    """Each channel of the hidden layer is convolved by itself; value first, gate second; no bias at the end."""
    mlp = randomised(MixFFN(3, 4))
    x = noise(2, 6, 3)
    hidden = F.silu(x @ mlp.inverted_conv.weight[:, :, 0, 0].T + mlp.inverted_conv.bias).view(2, 2, 3, 8)
    padded = F.pad(hidden, (0, 0, 1, 1, 1, 1))
    summed = mlp.depth_conv.bias.expand(2, 2, 3, 8).clone()
    for i in range(3):
        for j in range(3):
            summed += padded[:, i : i + 2, j : j + 3] * mlp.depth_conv.weight[:, 0, i, j]
    value, gate = summed.flatten(1, 2).chunk(2, dim=-1)
    expected = (value * gate / (1 + (-gate).exp())) @ mlp.point_conv.weight[:, :, 0, 0].T
    assert_close(mlp(x, (2, 3)), expected, rtol=1e-5, atol=1e-5)
    assert mlp.point_conv.bias is None


def test_positions_cover_the_same_range_on_every_grid() -> None:
    """A row of a grid of twice as many rows is half a step; scale 2 halves all steps; the column comes first."""
    model: Any = PIXART.build()
    _, _, cond = given(PIXART)

    def positions(model: Any, rows: int, columns: int) -> Tensor:
        return model.prepare(cond, (2, 2, rows, columns)).static["positions"].view(rows // 2, columns // 2, 24)

    own = positions(model, 8, 8)
    tall = positions(model, 16, 8)
    assert_close(tall[::2], own, rtol=1e-6, atol=1e-6)
    assert not torch.allclose(tall[1], own[1], atol=1e-2)
    angle = torch.tensor([0.0, 1.0, 2.0, 3.0])
    assert_close(own[0, :, 0], angle.sin())  # channel 0: the sine of the column
    assert_close(own[:, 0, 12], angle.sin())  # channel 12: of the row
    half = replace(PIXART, position_scale=2.0).build()
    assert_close(positions(half, 8, 8)[::2, ::2], own[:2, :2], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("config", [PIXART, SANA, replace(SANA, qk_norm=True)], ids=["pixart", "sana", "sprint"])
def test_attention_can_be_the_identity_in_some_rows(config: Any) -> None:
    """Each token then sees itself alone: what the attention gives is its own value."""
    model: Any = randomised(config.build())
    inputs, rows = given(config, 3), torch.tensor([True, False, True])

    def identity(site: str, block: nn.Module, x: Any, *args: Any) -> Any:
        return block(x, *args, identity=rows)

    def values(site: str, block: Any, x: Tensor, *args: Any) -> Any:
        real = block.attn.forward
        block.attn.forward = lambda y, **_: block.attn.merge(block.attn.project(y)[2])
        try:
            return block(x, *args)
        finally:
            block.attn.forward = real

    out, plain, alone = (model(*inputs, edit=edit) for edit in (identity, None, values))
    assert_close(out[rows], alone[rows], rtol=1e-5, atol=1e-5)
    assert torch.equal(out[~rows], plain[~rows])
    assert not torch.allclose(out[rows], plain[rows], rtol=1e-2)


def test_sizes_and_guidance_are_embedded_as_times_are() -> None:
    """Alpha: height, width and aspect ratio, a third of the vector each. Sprint: a tenth of the guidance scale."""
    alpha: Any = randomised(replace(PIXART, sizes=True).build())
    x, t, cond = given(PIXART)
    scalars = {"resolution": torch.tensor([[512.0, 768.0], [64.0, 32.0]]), "aspect_ratio": torch.tensor([[0.7], [2.0]])}
    ready = alpha.prepare(replace(cond, scalars=scalars), x.shape)
    height, width = (alpha.size_embedder(scalars["resolution"][:, i]) for i in (0, 1))
    ratio = alpha.ratio_embedder(scalars["aspect_ratio"][:, 0])
    assert_close(ready.static["size"], torch.cat((height, width, ratio), dim=1))
    flat = replace(cond, scalars={**scalars, "aspect_ratio": scalars["aspect_ratio"][:, 0]})
    assert torch.equal(alpha(x, t, flat), alpha(x, t, ready))
    for name in scalars:
        with pytest.raises(DitkitError, match=rf'give cond\.scalars\["{name}"\] \[b \d\]'):
            alpha(x, t, replace(cond, scalars={key: value for key, value in scalars.items() if key != name}))
    sprint: Any = randomised(replace(SANA, guidance=True).build())
    x, t, cond = given(SANA)
    ready = sprint.prepare(replace(cond, scalars={"guidance": torch.tensor([4.5, 1.0])}), x.shape)
    assert_close(ready.static["guidance"], sprint.guidance_embedder(torch.tensor([0.45, 0.1])))
    with pytest.raises(DitkitError, match=r'give cond\.scalars\["guidance"\]'):
        sprint(x, t, cond)


@pytest.mark.parametrize("config", [PIXART, SANA], ids=["pixart", "sana"])
def test_initial_weights(config: Any) -> None:
    """As PixArt's authors: tables N(0, 1 / width), cross-attention and output 0, N(0, .02) beside the blocks."""
    config = replace(config, hidden_size=96)
    model = config.build(seed=3)
    for key, p in model.named_parameters():
        p = p.detach()
        if key.endswith("scale_shift_table"):
            assert float(p.std()) == pytest.approx(96**-0.5, rel=0.2), key
        elif key.endswith("bias") or "cross.proj" in key or key.startswith("final_layer.linear"):
            assert not p.any(), key
        elif key.startswith(("t_embedder", "t_block", "y_embedder")):
            assert float(p.std()) == pytest.approx(0.02, rel=0.1), key
        elif "norm" in key:
            assert bool((p == 0.01).all()), key  # of the caption
        else:
            rows = p.flatten(1)
            bound = (6 / (10 if "depth_conv" in key else sum(rows.shape))) ** 0.5
            assert 0.9 * bound < float(rows.abs().max()) <= bound, key
    assert not model(*given(config)).any()


def test_sana_has_no_positions_but_its_convolutions() -> None:
    """Without them an image that is turned around gives the output turned around."""
    model: Any = randomised(SANA.build())
    x, t, cond = given(SANA)
    assert not torch.allclose(model(x.flip(2, 3), t, cond), model(x, t, cond).flip(2, 3), atol=1e-3)
    with torch.no_grad():
        for block in model.blocks:
            block.mlp.depth_conv.weight[:, :, [0, 0, 0, 1, 1, 2, 2, 2], [0, 1, 2, 0, 2, 0, 1, 2]] = 0
    assert_close(model(x.flip(2, 3), t, cond), model(x, t, cond).flip(2, 3), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "change", "says"),
    [
        ("pixart_tiny", {"num_heads": 5}, "hidden_size 96 is not divisible by num_heads 5"),
        ("pixart_tiny", {"hidden_size": 64, "sizes": True}, "64 is not divisible by 3"),
        ("pixart_tiny", {"position_scale": 0.0}, "position_scale must be above 0"),
        ("sana_tiny", {"cross_heads": 7}, "hidden_size 96 is not divisible by num_heads 7"),
        ("sana_tiny", {"text_dim": 0}, "text_dim must be at least 1"),
    ],
)
def test_sizes_that_cannot_be_built_are_refused(name: str, change: dict[str, Any], says: str) -> None:
    with pytest.raises(DitkitError, match=says):
        create_model(name, **change)
