"""DDiT: sizes, what it sees, soft tokens, the door into its forward."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.testing import assert_close

from ditkit.conditioning import Conditioning
from ditkit.config import DitkitError
from ditkit.models import DDiT, DDiTConfig, create_model

TINY = DDiTConfig(length=7, vocab=11, hidden_size=24, depth=3, num_heads=3, cond_dim=16, num_classes=4)


def build(**changes: Any) -> DDiT:
    """Weights under which nothing is zero."""
    model = replace(TINY, **changes).build()
    generator = torch.Generator().manual_seed(0)
    for name, p in model.named_parameters():
        if "norm" not in name:
            p.data = 0.2 * torch.randn(p.shape, generator=generator)
    return model.eval()


def inputs(b: int = 2, length: int = 7) -> tuple[Tensor, Tensor, Conditioning]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randint(0, 11, (b, length), generator=generator)
    return x, torch.rand(b, generator=generator), Conditioning(label=(torch.arange(b) + 3) % 5)


@pytest.mark.parametrize(("name", "blocks"), [("ddit_s", 92_132_352), ("ddit_m", 321_183_744)])
def test_the_published_sizes(name: str, blocks: int) -> None:
    """SEDD small and medium are said to have 90M and 320M parameters besides the vectors of the tokens."""
    with torch.device("meta"):
        model: Any = create_model(name)
    assert sum(p.numel() for p in model.blocks.parameters()) == blocks


def test_the_output_are_logits_and_starts_at_zero() -> None:
    x, t, cond = inputs(3)
    assert build()(x, t, cond).shape == (3, 7, 11)
    assert not bool(TINY.build()(x, t, cond).any())


def test_every_parameter_gets_a_finite_gradient() -> None:
    model = build()
    x, t, cond = inputs(40)
    model(x, t, cond).square().mean().backward()
    for name, p in model.named_parameters():
        assert p.grad is not None, name
        assert bool(p.grad.isfinite().all()), name
        assert bool(p.grad.any()), name


def test_one_hot_tokens_are_tokens() -> None:
    model = build()
    x, t, cond = inputs()
    assert_close(model(F.one_hot(x, 11).float(), t, cond), model(x, t, cond), rtol=1e-5, atol=1e-5)


def test_every_token_sees_every_other_the_time_and_the_class() -> None:
    model = build()
    x, t, cond = inputs(1)
    soft = F.one_hot(x, 11).float().requires_grad_()
    out = model(soft, t, cond)
    for place in (0, 6):
        (gradient,) = torch.autograd.grad(out[0, place, 0], soft, retain_graph=True)
        assert bool((gradient != 0).all())
    assert bool((model(x, t + 0.3, cond) != out).all())
    assert bool((model(x, t, Conditioning(label=torch.tensor([1]))) != out).all())


def test_positions_are_relative_and_tell_equal_tokens_apart() -> None:
    model = build()
    _, t, cond = inputs(1)
    out = model(torch.tensor([[3, 3, 3, 5]]), t, cond)
    for i, j in ((0, 1), (1, 2), (0, 2)):
        assert not torch.allclose(out[:, i], out[:, j], atol=1e-5)
    still = model.prepare(cond, (1, 4))
    plain = still.static["rope"].clone()
    plain[:, 0], plain[:, 1] = 1, 0
    unturned = model(torch.tensor([[3, 3, 3, 5]]), t, still.with_static(rope=plain))
    assert_close(unturned[:, 0], unturned[:, 1], rtol=1e-5, atol=1e-5)


def test_rotations_turn_the_two_halves_of_a_head() -> None:
    """As in SEDD's and flow_matching's networks: channels i and i + 4 of a head of 8 are one complex number."""
    model = build()
    given: list[tuple[Tensor, Tensor]] = []

    def watch(site: str, block: nn.Module, x: Any, c: Tensor, rope: Tensor) -> Any:
        attn: Any = block.get_submodule("attn")
        given.append((x, attn.project(x, rope)[0]))
        assert torch.equal(attn.project(x)[0][:, :, 0], given[-1][1][:, :, 0])  # place 0 is not turned
        q = torch.complex(*attn.project(x)[0].double().chunk(2, dim=-1))
        angle = torch.arange(7.0).double()[:, None] * 10000.0 ** (-torch.arange(4).double() / 4)
        turned = q * torch.polar(torch.ones_like(angle), angle)
        assert_close(given[-1][1].double(), torch.cat((turned.real, turned.imag), dim=-1), rtol=1e-5, atol=1e-5)
        return block(x, c, rope)

    model(*inputs(), edit=watch)
    assert len(given) == 3


def test_a_sample_does_not_see_its_batch_and_prepared_work_changes_nothing() -> None:
    model = build()
    x, t, cond = inputs(5)
    whole = model(x, t, cond)
    index = torch.tensor([4, 0])
    assert_close(model(x[index], t[index], cond.rows(index)), whole[index], rtol=1e-5, atol=1e-5)
    ready = model.prepare(cond, x.shape)
    assert torch.equal(model(x, t, ready), whole)
    assert_close(model(x[index], t[index], ready.rows(index)), whole[index], rtol=1e-5, atol=1e-5)


def test_the_door_opens_at_every_block() -> None:
    model, seen = build(), []

    def edit(site: str, block: nn.Module, x: Any, *args: Any) -> Any:
        seen.append(site)
        assert model.get_submodule(site) is block
        return block(x, *args)

    assert torch.equal(model(*inputs(), edit=edit), model(*inputs()))
    assert seen == ["blocks.0", "blocks.1", "blocks.2"]


def test_dropout_is_between_the_blocks_and_only_in_training() -> None:
    model = build(drop=0.5)
    given = inputs()
    assert torch.equal(model(*given), model(*given))
    model.train()
    assert not torch.equal(model(*given), model(*given))


def test_the_same_seed_builds_the_same_model_and_files_keep_it(tmp_path: Any) -> None:
    before = torch.random.get_rng_state()
    one, two, other = TINY.build(3), TINY.build(3), TINY.build(4)
    assert torch.equal(torch.random.get_rng_state(), before)
    for (name, p), q in zip(one.named_parameters(), two.parameters(), strict=True):
        assert torch.equal(p, q), name
        assert bool(p.isfinite().all()), name
    assert not torch.equal(one.x_embedder.weight, other.x_embedder.weight)
    assert float(one.x_embedder.weight.detach().abs().max()) <= 24**-0.5
    save_file(one.state_dict(), tmp_path / "model.safetensors")
    other.load_state_dict(load_file(tmp_path / "model.safetensors"))
    assert torch.equal(other.x_embedder.weight, one.x_embedder.weight)


def test_without_classes_no_label_is_given() -> None:
    x, t, cond = inputs()
    model = build(num_classes=0)
    assert model(x, t, Conditioning()).shape == (2, 7, 11)
    with pytest.raises(ValueError, match="a label was given"):
        model(x, t, cond)
    with pytest.raises(ValueError, match="no label was given"):
        build()(x, t, Conditioning())


def test_what_does_not_fit_is_refused() -> None:
    x, t, cond = inputs()
    with pytest.raises(ValueError, match=r"tokens \[b l\] or probabilities \[b l 11\]"):
        build()(torch.rand(2, 7, 12), t, cond)
    with pytest.raises(ValueError, match="takes tokens"):
        build()(x[..., None], t, cond)
    with pytest.raises(DitkitError, match="even"):
        replace(TINY, hidden_size=9).build()
    with pytest.raises(DitkitError, match="is for tokens"):
        TINY.fitted((3, 8, 8), 0, 0)
    with pytest.raises(DitkitError, match=r"model\.vocab must be at least 1"):
        DDiTConfig(vocab=0)
