"""What is given: joining, choosing and masking batches."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ditkit.conditioning import Conditioning, Known, Tokens, cat
from ditkit.layers import attend


def tokens(lengths: list[int], width: int | None = None, seed: int = 0, d: int = 4) -> Tokens:
    """Random token sequences of the given lengths, with rubbish in the padding."""
    n = max(lengths) if width is None else width
    values = torch.randn(len(lengths), n, d, generator=torch.Generator().manual_seed(seed))
    return Tokens(values, torch.arange(n)[None] < torch.tensor(lengths)[:, None])


def everything(b: int, seed: int, length: int = 5) -> Conditioning:
    """A conditioning with all its fields."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(b, *shape, generator=generator)

    return Conditioning(
        label=torch.randint(0, 10, (b,), generator=generator),
        text=tokens([max(1, length - i) for i in range(b)], length, seed),
        pooled=draw(6),
        audio=tokens([length] * b, length, seed + 1),
        references=draw(2, 3, 4, 4),
        control=draw(3, 4, 4),
        known=Known(draw(3, 4, 4), draw(3, 4, 4) > 0),
        channels=draw(1, 4, 4),
        scalars={"guidance": draw(), "size": draw(2)},
    )


def leaves(cond: Conditioning) -> dict[str, Tensor]:
    """Every tensor of a conditioning, by name."""
    found: dict[str, Tensor] = {}
    for field in dataclasses.fields(cond):
        value = getattr(cond, field.name)
        if isinstance(value, Tokens | Known):
            found |= {f"{field.name}.values": value.values, f"{field.name}.mask": value.mask}
        elif isinstance(value, Tensor):
            found[field.name] = value
        elif value is not None:
            found |= {f"{field.name}.{key}": v for key, v in value.items()}
    return found


def equal(a: Conditioning, b: Conditioning) -> bool:
    x, y = leaves(a), leaves(b)
    return x.keys() == y.keys() and all(x[k].dtype == y[k].dtype and torch.equal(x[k], y[k]) for k in x)


def test_every_field_is_in_the_example() -> None:
    given = everything(2, 0)
    empty = {f.name for f in dataclasses.fields(given) if not f.name == "static" and getattr(given, f.name) is None}
    assert not empty
    assert len(leaves(given)) == 13


def test_joined_batches_come_apart_again() -> None:
    a, b = everything(2, 0), everything(3, 1)
    both = cat([a, b])
    assert equal(both.rows(slice(0, 2)), a)
    assert equal(both.rows(slice(2, 5)), b)
    assert equal(both.rows(torch.arange(2, 5)), b)
    assert equal(cat([a]), a)


def test_rows_take_any_order_and_repeat() -> None:
    given = everything(4, 0)
    index = torch.tensor([3, 0, 0, 2, 1])
    picked = leaves(given.rows(index))
    for name, value in leaves(given).items():
        assert torch.equal(picked[name], value[index]), name
    assert equal(given.rows(torch.tensor([True, False, True, False])), given.rows(torch.tensor([0, 2])))


def test_where_chooses_row_by_row_in_every_field() -> None:
    a, b = everything(4, 0), everything(4, 1)
    keep = torch.tensor([True, False, False, True])
    chosen = leaves(a.where(keep, b))
    for name, value in leaves(a).items():
        assert torch.equal(chosen[name][keep], value[keep]), name
        assert torch.equal(chosen[name][~keep], leaves(b)[name][~keep]), name
    assert equal(a.where(torch.ones(4, dtype=torch.bool), b), a)
    assert equal(a.where(torch.zeros(4, dtype=torch.bool), b), b)


@given(st.lists(st.lists(st.integers(0, 6), min_size=1, max_size=3), min_size=1, max_size=4))
@settings(deadline=None, max_examples=60)
def test_text_of_mixed_lengths_keeps_its_real_tokens_and_gains_only_masked_zeros(batches: list[list[int]]) -> None:
    parts = [tokens(lengths, seed=i) for i, lengths in enumerate(batches)]
    text = cat([Conditioning(text=part) for part in parts]).text
    assert text is not None
    assert text.mask.sum(1).tolist() == [n for lengths in batches for n in lengths]
    width, start = max(max(lengths) for lengths in batches), 0
    assert text.mask.shape[1] == width
    for part in parts:
        b, n = part.mask.shape
        mine, mask = text.values[start : start + b], text.mask[start : start + b]
        assert torch.equal(mine[:, :n], part.values)
        assert torch.equal(mask[:, :n], part.mask)
        assert not mask[:, n:].any()
        assert not mine[:, n:].any()
        start += b


def test_where_pads_the_shorter_text() -> None:
    a, b = Conditioning(text=tokens([2, 3])), Conditioning(text=tokens([6, 1], seed=1))
    text = a.where(torch.tensor([True, False]), b).text
    assert text is not None
    assert text.mask.sum(1).tolist() == [2, 1]
    assert text.mask.shape[1] == 6


def test_padding_adds_nothing_to_attention() -> None:
    """Attention over a sequence alone equals attention over it among longer ones, whatever the padding holds."""
    short = tokens([3], d=8)
    joined = cat([Conditioning(text=short), Conditioning(text=tokens([9], seed=1, d=8))]).text
    assert joined is not None
    q = torch.randn(2, 1, 5, 8, generator=torch.Generator().manual_seed(3))
    alone = attend(q[:1], short.values[:, None], short.values[:, None], mask=short.mask[:, None, None])
    for rubbish in (0.0, 1e4):
        values = torch.where(joined.mask[..., None], joined.values, rubbish)
        among = attend(q, values[:, None], values[:, None], mask=joined.mask[:, None, None])
        torch.testing.assert_close(among[:1], alone, rtol=1e-6, atol=1e-6)


def test_tokens_cannot_be_padded_to_fewer() -> None:
    text = tokens([4, 2])
    assert text.padded(4) is text
    with pytest.raises(ValueError, match="4 tokens.*3"):
        text.padded(3)


@pytest.mark.parametrize(
    "mask", [torch.ones(2, 3), torch.ones(2, 3, dtype=torch.long), torch.ones(2, 4, dtype=torch.bool), torch.ones(2) > 0]
)
def test_a_mask_must_fit(mask: Tensor) -> None:
    with pytest.raises(ValueError, match="boolean mask"):
        Tokens(torch.zeros(2, 3, 4), mask)


@pytest.mark.parametrize("name", [f.name for f in dataclasses.fields(Conditioning) if f.name not in ("scalars", "static")])
def test_a_field_that_only_one_batch_has_is_refused(name: str) -> None:
    full = everything(2, 0)
    without = dataclasses.replace(full, **{name: None})
    with pytest.raises(ValueError, match=f"'{name}'"):
        cat([full, without])
    with pytest.raises(ValueError, match=f"'{name}'"):
        without.where(torch.tensor([True, False]), full)


def test_a_scalar_that_only_one_batch_has_is_refused() -> None:
    a = Conditioning(scalars={"guidance": torch.ones(2)})
    b = Conditioning(scalars={"guidance": torch.ones(2), "size": torch.ones(2)})
    with pytest.raises(ValueError, match="size"):
        cat([a, b])
    with pytest.raises(ValueError, match="guidance"):
        cat([Conditioning(), a])


def test_prepared_tensors_are_not_joined_nor_mixed() -> None:
    plain = Conditioning(label=torch.arange(2))
    ready = plain.with_static(table=torch.ones(2, 3))
    for refused in (lambda: cat([plain, ready]), lambda: cat([ready])):
        with pytest.raises(ValueError, match="prepare the result"):
            refused()
    keep = torch.tensor([True, False])
    with pytest.raises(ValueError, match="prepare the result"):
        plain.where(keep, ready)
    with pytest.raises(ValueError, match="prepare the result"):
        ready.where(keep, plain)


def test_prepared_rows_follow_and_shared_ones_stay() -> None:
    own, shared = torch.arange(6.0).view(3, 2), torch.arange(4.0).view(1, 4)
    ready = Conditioning(label=torch.arange(3)).with_static(own=own).with_static(shared=shared)
    picked = ready.rows(torch.tensor([2, 2, 0, 1]))
    assert torch.equal(picked.static["own"], own[[2, 2, 0, 1]])
    assert picked.static["shared"] is shared
    assert torch.equal(ready.static["own"], own)


def test_moving_changes_the_type_of_floats_only() -> None:
    given = everything(2, 0).with_static(table=torch.ones(2, 3), index=torch.arange(2))
    moved = leaves(given.to("cpu", torch.bfloat16))
    for name, value in leaves(given).items():
        wanted = torch.bfloat16 if value.is_floating_point() else value.dtype
        assert moved[name].dtype == wanted, name
    assert equal(given.to("cpu"), given)
    meta = leaves(given.to("meta"))
    assert {v.device.type for v in meta.values()} == {"meta"}
    assert len(meta) == len(leaves(given))


def test_nothing_given_stays_nothing() -> None:
    assert not leaves(cat([Conditioning(), Conditioning()]))
    assert not leaves(Conditioning().rows(torch.arange(2)).to("cpu", torch.bfloat16))
