"""What is given: joining, choosing and masking batches; labels; and the bytes that become a tensor."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ditkit.codecs import Codec, Pixels
from ditkit.conditioners import Conditioner, Label
from ditkit.conditioning import Conditioning, Given, Known, Tokens, cat
from ditkit.config import DitkitError
from ditkit.layers import attend
from ditkit.rng import Replay, Rng


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
        vision=draw(2, 3, 2, 2, 5),
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
    empty = {f.name for f in dataclasses.fields(given) if f.name != "static" and getattr(given, f.name) is None}
    assert not empty
    assert len(leaves(given)) == 14


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
    with pytest.raises(ValueError, match=r"4 tokens.*3"):
        text.padded(3)


@pytest.mark.parametrize(
    "mask",
    [torch.ones(2, 3), torch.ones(2, 3, dtype=torch.long), torch.ones(2, 4, dtype=torch.bool), torch.ones(2) > 0],
)
def test_a_mask_must_fit(mask: Tensor) -> None:
    with pytest.raises(ValueError, match="boolean mask"):
        Tokens(torch.zeros(2, 3, 4), mask)


@pytest.mark.parametrize(
    "name", [f.name for f in dataclasses.fields(Conditioning) if f.name not in ("scalars", "static")]
)
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


def test_the_number_of_samples_is_known_from_any_field() -> None:
    full = everything(3, 0)
    for field in dataclasses.fields(full):
        if field.name != "static":
            alone = Conditioning(**{field.name: getattr(full, field.name)})
            assert alone.count == 3, field.name
    assert Conditioning().with_static(table=torch.ones(1)).count is None


def test_nothing_given_stays_nothing() -> None:
    assert not leaves(cat([Conditioning(), Conditioning()]))
    assert not leaves(Conditioning().rows(torch.arange(2)).to("cpu", torch.bfloat16))


# labels

PETS = ("cat", "dog", "7", "horse")


def labels(n: int, seed: int = 0) -> Tensor:
    return torch.randint(0, len(PETS), (n,), generator=torch.Generator().manual_seed(seed))


def test_the_null_label_comes_after_the_classes() -> None:
    null = Label(PETS).null(3).label
    assert null is not None
    assert null.tolist() == [4, 4, 4]
    assert null.dtype == torch.int64
    assert isinstance(Label(), Conditioner)


def test_labels_are_dropped_as_often_as_asked_and_row_by_row() -> None:
    n, given = 20_000, labels(20_000)
    rng = Rng(3).at(5, torch.arange(n))
    for drop in (0.1, 0.5):
        label = Label(PETS, drop)(Given(given), rng).label
        assert label is not None
        dropped = label == 4
        assert float(dropped.double().mean()) == pytest.approx(drop, abs=4.5 * (drop * (1 - drop) / n) ** 0.5)
        assert torch.equal(label[~dropped], given[~dropped])
        part = Label(PETS, drop)(Given(given[[7, 3]]), Rng(3).at(5, torch.tensor([7, 3]))).label
        assert part is not None
        assert part.tolist() == label[[7, 3]].tolist()
    edge = Label(PETS, 0.25)(Given(given[:3]), Replay({"drop": torch.tensor([0.2499, 0.25, 0.2501])})).label
    assert edge is not None
    assert edge.tolist() == [4, *given[1:3].tolist()]


def test_labels_are_not_dropped_outside_training_nor_against_the_will() -> None:
    given, rng = labels(100), Rng(0).at(0, torch.arange(100))
    for cond in (Label(PETS, 0.9)(Given(given)), Label(PETS, 0.0)(Given(given), rng)):
        assert cond.label is given
    everything_dropped = Label(PETS, 1.0)(Given(given), rng).label
    assert everything_dropped is not None
    assert bool((everything_dropped == 4).all())


@pytest.mark.parametrize("wrong", [[-1], [4], [0, 1, 400]])
def test_labels_outside_the_classes_are_refused(wrong: list[int]) -> None:
    with pytest.raises(DitkitError, match=rf"label {wrong[-1]} is out of range: there are the classes 0\.\.3"):
        Label(PETS)(Given(torch.tensor(wrong)))


def test_labels_are_needed_where_there_are_classes_and_not_elsewhere() -> None:
    with pytest.raises(DitkitError, match="labels are needed"):
        Label(PETS)(Given(None))
    for cond in (Label()(Given(None)), Label()(Given(labels(3))), Label()(Given(labels(3)), Rng(0)), Label().null(3)):
        assert cond == Conditioning()


def test_classes_are_found_by_name_first_and_by_number() -> None:
    label = Label(PETS)
    assert label.index(["dog", 0, "3", "7", "horse"]).tolist() == [1, 0, 3, 2, 3]
    assert label.index([]).dtype == torch.int64


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("hrose", "no class 'hrose': did you mean horse"),
        ("", "no class ''"),
        ("\u00b2", "no class"),  # a digit, but no number
        ("--3", "no class '--3'"),
        ("1.0", "no class '1.0'"),
        ("4", r"label 4 is out of range: the classes are 0\.\.3"),
        (-1, "label -1 is out of range"),
        ("-1", "label -1 is out of range"),
    ],
)
def test_unknown_classes_are_refused(name: str | int, says: str) -> None:
    with pytest.raises(DitkitError, match=says):
        Label(PETS).index([name])


@pytest.mark.parametrize("name", [0, "0", "cat"])
def test_without_classes_no_class_can_be_named(name: str | int) -> None:
    with pytest.raises(DitkitError, match="there are no classes"):
        Label().index([name])


@pytest.mark.parametrize("drop", [-0.1, 1.1, float("nan")])
def test_dropping_needs_a_probability(drop: float) -> None:
    with pytest.raises(DitkitError, match="is a probability"):
        Label(PETS, drop)


# pixels


def test_every_byte_comes_back() -> None:
    data = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    x0 = Pixels().encode(data)
    assert (float(x0.min()), float(x0.max()), x0.dtype) == (-1, 1, torch.float32)
    assert torch.equal(Pixels().decode(x0), data)
    assert torch.equal(Pixels().decode(x0.double()), data)
    assert isinstance(Pixels(), Codec)
    assert Pixels().shape((3, 28, 32)) == (3, 28, 32)


def test_decoding_clips_and_rounds_to_the_nearest_byte() -> None:
    values = torch.tensor([-1e9, -1.01, -1.0, 1.0, 1.5, 1e9]).view(1, 1, 1, 6)
    assert Pixels().decode(values).flatten().tolist() == [0, 0, 0, 255, 255, 255]
    near = (torch.tensor([10.4, 10.6, 200.49, 200.51]) / 127.5 - 1).view(1, 1, 2, 2)
    assert Pixels().decode(near).flatten().tolist() == [10, 11, 200, 201]
