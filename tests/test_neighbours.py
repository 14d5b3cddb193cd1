"""Nearest training samples through short vectors, against all distances in full."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ditkit.config import DitkitError
from ditkit.evaluation import memorized
from ditkit.evaluation.neighbours import AXES, Index


def index(train: Tensor, **options: object) -> tuple[Index, list[int]]:
    """An index of all rows, and a list of how many were read at a time."""
    reads: list[int] = []

    def read(ids: Tensor) -> tuple[Tensor, Tensor]:
        reads.append(len(ids))
        return train[ids], train[ids]

    made = Index(read, len(train), **options)  # pyright: ignore[reportArgumentType]
    made.extend(made.fitting(train.shape[1]))
    while not made.complete:
        made.extend(100)
    return made, reads


def images(count: int, d: int, seed: int) -> Tensor:
    """Rows whose variance falls from axis to axis, as that of images does, in a turned frame."""
    generator = torch.Generator().manual_seed(seed)
    frame = torch.linalg.qr(torch.randn(d, d, generator=torch.Generator().manual_seed(0))).Q
    return (torch.randn(count, d, generator=generator) / torch.arange(1, d + 1)) @ frame


def queries(train: Tensor, d: int) -> Tensor:
    """Others, copies with little noise, exact copies, and some whose two distances are about a third of each other."""
    near = train[:40] + 0.1 * images(40, d, 5)
    between = train[50:90] + torch.linspace(0.15, 0.35, 40)[:, None] * (train[150:190] - train[50:90])
    return torch.cat((images(60, d, 9), near, train[40:50], between))


@pytest.mark.parametrize("d", [20, AXES, 700])
def test_decisions_and_copies_are_those_of_all_distances(d: int) -> None:
    train = images(500, d, 1)
    made, reads = index(train)
    asked = queries(train, d)
    read_before = len(reads)
    found, exact = made.nearest(asked), memorized(asked, train)
    assert bool((found.copied == exact.memorized).all())
    assert 30 < int(exact.memorized.sum()) < 100
    assert bool((found.nearest == exact.nearest)[exact.memorized].all())
    torch.testing.assert_close(found.d1[exact.memorized], exact.d1[exact.memorized].double(), rtol=1e-6, atol=1e-6)
    assert (len(reads) > read_before) == (d > AXES)  # few numbers are kept whole
    if d > AXES:
        assert sum(reads[read_before:]) < 5 * len(asked)


@pytest.mark.parametrize("mirrored", [False, True])
def test_distances_are_those_of_all_where_they_are_asked_for(mirrored: bool) -> None:
    """Of rows whose variance falls slowly, short vectors leave many that may be the second nearest."""
    slowly = torch.arange(1, 701) ** 0.6
    train, others = (torch.randn(n, 700, generator=torch.Generator().manual_seed(n)) / slowly for n in (600, 50))
    half = torch.ones(700)
    half[::2] = -1

    def turned(vectors: Tensor) -> Tensor:
        return vectors * half

    made, reads = index(train, mirror=turned if mirrored else None)
    found = made.nearest(others, distances=True)
    assert reads
    apart = torch.cdist(others.double(), train.double())
    if mirrored:
        apart = torch.minimum(apart, torch.cdist(turned(others).double(), train.double()))
    two, which = apart.topk(2, largest=False)
    assert torch.equal(found.nearest, which[:, 0])
    torch.testing.assert_close(torch.stack((found.d1, found.d2), dim=1), two)
    quick = made.nearest(others)
    assert bool((quick.d2 > two[:, 1] + 1e-6).any())  # what decides is less than the distances


def test_equal_samples_are_one() -> None:
    train = images(300, 30, 2)
    made, _ = index(torch.cat((train, train, train[:50])))
    assert (len(made), made.duplicates, made.complete) == (300, 350, True)
    assert bool(made.nearest(train + 0.001).copied.all())
    assert not bool(made.nearest(images(100, 30, 3)).copied.any())


def test_a_mirrored_copy_is_one_where_training_mirrors() -> None:
    train = images(200, 400, 4)
    turned = train[:30].flip(1) + 0.001 * images(30, 400, 6)
    assert not bool(index(train)[0].nearest(turned).copied.any())
    found = index(train, mirror=lambda v: v.flip(1))[0].nearest(torch.cat((turned, train[:30])))
    assert bool(found.copied.all())
    assert found.nearest.tolist() == [*range(30)] * 2


def test_a_symmetric_training_sample_does_not_hide_its_copy() -> None:
    train = images(100, 40, 7)
    train[3] = train[3] + train[3].flip(0)
    found = index(train, mirror=lambda v: v.flip(1))[0].nearest(train[3:4] + 1e-4)
    assert bool(found.copied.all())


def test_a_training_sample_beside_its_mirror_image_does_not_hide_its_copy() -> None:
    train = images(100, 40, 7)
    made, _ = index(torch.cat((train, train.flip(1))), mirror=lambda v: v.flip(1))
    assert (len(made), made.duplicates) == (100, 100)
    asked = torch.cat((train[:10], train[10:20].flip(1), train[20:30] + 1e-4))
    assert bool(made.nearest(asked).copied.all())
    assert not bool(made.nearest(images(50, 40, 9)).copied.any())


@pytest.mark.parametrize("d", [3, 300])
@pytest.mark.parametrize("kind", ["bytes", "constant", "offset", "clusters"])
def test_decisions_on_degenerate_data_are_those_of_all_distances(kind: str, d: int) -> None:
    """Few values and many ties; an axis without variance; far from the origin; tight groups that hide their copies."""
    generator = torch.Generator().manual_seed(d)
    train = torch.randn(300, d, generator=generator)
    if kind == "bytes":
        train = (train * 2).round().clamp(-2, 2)
        train[100:150] = train[:50]
    elif kind == "constant":
        train[:, 0] = 5.0
    elif kind == "offset":
        train += 100
    else:
        train = train[:60].repeat_interleave(5, dim=0) + 0.01 * train
    between = train[:60] + torch.linspace(0, 0.5, 60)[:, None] * (train[60:120] - train[:60])
    asked = torch.cat((train[::7], between, train[::9] + 0.05 * torch.randn(34, d, generator=generator)))
    found, exact = index(train)[0].nearest(asked), memorized(asked, train)
    assert torch.equal(found.copied, exact.memorized)
    assert 0 < int(exact.memorized.sum()) < len(asked)
    whole = index(train)[0].nearest(asked, distances=True)
    torch.testing.assert_close(whole.d1, exact.d1, rtol=1e-9, atol=1e-9)


def test_a_part_of_the_data_is_a_drawn_part() -> None:
    train = images(1000, 10, 8)
    made, _ = index(train, most=300)
    assert (len(made), made.wanted) == (300, 300)
    chosen = made.order.sort().values
    assert 300 < float(chosen.double().mean()) < 700
    assert len(chosen.unique()) == 300
    assert torch.equal(index(train, most=300)[0].order, made.order)


def test_projections_alone_read_nothing_again() -> None:
    train = images(400, 600, 1)
    made, reads = index(train, project=True)
    before = len(reads)
    assert bool(made.nearest(train[:20] + 0.01 * images(20, 600, 2)).copied.all())
    assert not bool(made.nearest(images(50, 600, 3)).copied.any())
    assert len(reads) == before


def test_one_sample_has_no_second() -> None:
    with pytest.raises(DitkitError, match="at least 2 distinct training samples, and there are 1"):
        index(images(1, 10, 0).expand(5, -1))[0].nearest(images(3, 10, 1))
