"""Named randomness: the published bits, pure rows, and good statistics."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ditkit.config import DitkitError
from ditkit.diffusion import Discrete, LogitNormal, Uniform
from ditkit.rng import Draw, Law, Replay, Rng, philox

LAWS: dict[str, str | Law] = {
    "uniform": "uniform",
    "normal": "normal",
    "times/uniform": Uniform(),
    "times/logit_normal": LogitNormal(0.8, 0.8),
    "times/discrete": Discrete(1000),
}


def rows(n: int, first: int = 0) -> Tensor:
    return torch.arange(first, first + n)


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and bool((a == b).all())


# the bits


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_philox_gives_the_known_answers_of_random123(counter: str, key: str, expected: str) -> None:
    words = [torch.tensor([int(w, 16)]) for w in counter.split()]
    k0, k1 = (int(w, 16) for w in key.split())
    assert [f"{int(w):08x}" for w in philox(words, (k0, k1))] == expected.split()


def one_philox(counter: list[int], key: list[int]) -> list[int]:
    """Philox4x32-10 in Python's whole numbers, from the paper."""
    c, k = list(counter), list(key)
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(p1 >> 32) ^ c[1] ^ k[0], p1 & 0xFFFFFFFF, (p0 >> 32) ^ c[3] ^ k[1], p0 & 0xFFFFFFFF]
        k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return c


word = st.integers(0, 2**32 - 1)


@given(st.lists(word, min_size=4, max_size=4), st.lists(word, min_size=2, max_size=2))
@settings(deadline=None)
def test_philox_equals_whole_number_arithmetic(counter: list[int], key: list[int]) -> None:
    got = philox([torch.tensor([c]) for c in counter], (key[0], key[1]))
    assert [int(w) for w in got] == one_philox(counter, key)


# a row is a pure function of (seed, step, name, sample id)


@pytest.mark.parametrize("shape", [(), (1,), (3,), (4,), (7,), (3, 5), (1, 28, 28), (1, 3, 17)])
@pytest.mark.parametrize("law", LAWS)
def test_a_row_does_not_depend_on_its_batch(law: str, shape: tuple[int, ...]) -> None:
    whole = Rng(3).at(5, rows(67))("noise", LAWS[law], shape)
    assert whole.shape == (67, *shape)
    for size in (*range(1, 20), 31, 33, 63, 65, 66):  # every tail of every vector width
        assert same_bits(Rng(3).at(5, rows(size))("noise", LAWS[law], shape), whole[:size]), size
    order = torch.randperm(67, generator=torch.Generator().manual_seed(0))
    assert same_bits(Rng(3).at(5, rows(67)[order])("noise", LAWS[law], shape), whole[order])
    some = torch.tensor([66, 2, 2, 40, 0])
    assert same_bits(Rng(3).at(5, some)("noise", LAWS[law], shape), whole[some])
    # a tensor that is not contiguous, and one of 32 bits
    assert same_bits(Rng(3).at(5, rows(134)[::2])("noise", LAWS[law], shape)[:30], _every_second(law, shape)[:30])
    assert same_bits(Rng(3).at(5, rows(67).int())("noise", LAWS[law], shape), whole)


def _every_second(law: str, shape: tuple[int, ...]) -> Tensor:
    return Rng(3).at(5, rows(67) * 2)("noise", LAWS[law], shape)


@pytest.mark.parametrize("law", LAWS)
def test_time_of_a_sample_is_the_same_bit_for_bit_alone_and_among_many(law: str) -> None:
    """Many rows of one number: an elementary function that rounds differently in a vector's tail shows here."""
    n = 20_011
    whole = Rng(1).at(0, rows(n))("t", LAWS[law])
    for size in (1, 3, 7):
        parts = [Rng(1).at(0, part)("t", LAWS[law]) for part in rows(n).split(size)[:400]]
        assert same_bits(torch.cat(parts), whole[: sum(len(p) for p in parts)]), size


def test_the_number_of_threads_changes_nothing() -> None:
    before = torch.get_num_threads()
    try:
        drawn = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            drawn.append(Rng(1).at(0, rows(64))("noise", "normal", (3, 33, 33)))
    finally:
        torch.set_num_threads(before)
    assert same_bits(drawn[0], drawn[1])
    assert same_bits(drawn[0], drawn[2])


def test_the_bits_do_not_change_between_versions() -> None:
    """Written down on purpose: other bits break the replay of every run that was ever saved."""
    draws = Rng(1).at(2, torch.tensor([3]))("noise", "uniform", (3,))
    key = int.from_bytes(hashlib.blake2b(b"1/noise", digest_size=8).digest(), "little")
    words = one_philox([0, 2, 3, 0], [key & 0xFFFFFFFF, key >> 32])
    uniform = [(w + 0.5) / 2**32 for w in words]
    assert draws.tolist() == [uniform[:3]]
    # Box-Muller: the first half of the words are radii, the second half angles; all cosines, then all sines
    radii = [math.sqrt(-2 * math.log(u)) for u in uniform[:2]]
    angles = [2 * math.pi * u for u in uniform[2:]]
    expected = [r * f(a) for f in (math.cos, math.sin) for r, a in zip(radii, angles, strict=True)]
    normal = Rng(1).at(2, torch.tensor([3]))("noise", "normal", (3,))
    assert normal.tolist() == torch.tensor([expected[:3]], dtype=torch.float64).float().tolist()


@pytest.mark.parametrize(
    "other",
    [
        lambda: Rng(2).at(0, rows(4))("noise", "uniform", (4,)),
        lambda: Rng(-1).at(0, rows(4))("noise", "uniform", (4,)),
        lambda: Rng(1 + 2**32).at(0, rows(4))("noise", "uniform", (4,)),
        lambda: Rng(1 + 2**64).at(0, rows(4))("noise", "uniform", (4,)),
        lambda: Rng(1).at(1, rows(4))("noise", "uniform", (4,)),
        lambda: Rng(1).at(2**32 - 1, rows(4))("noise", "uniform", (4,)),
        lambda: Rng(1).at(0, rows(4))("t", "uniform", (4,)),
        lambda: Rng(1).at(0, rows(4))("noise ", "uniform", (4,)),
        lambda: Rng(1).at(0, rows(4, 4))("noise", "uniform", (4,)),
        lambda: Rng(1).at(0, rows(4, 2**32))("noise", "uniform", (4,)),
        lambda: Rng(1).at(0, rows(4, 2**62))("noise", "uniform", (4,)),
    ],
)
def test_another_seed_step_name_or_id_shares_no_number(other: Callable[[], Tensor]) -> None:
    here = Rng(1).at(0, rows(4))("noise", "uniform", (4,))
    assert not set(here.flatten().tolist()) & set(other().flatten().tolist())


def test_numbers_come_back_as_often_as_chance_has_it() -> None:
    draws = Rng(0).at(0, rows(400))("noise", "uniform", (3000,))
    coincidences = draws.numel() - len(draws.unique())
    assert 168 - 60 < coincidences < 168 + 60  # 1.2 million among 2^32 values: 168 pairs, give or take 13


@pytest.mark.parametrize("ids", [[-1], [-(2**40)], [2**63 - 1], [-(2**63)]])
def test_extreme_ids_stay_in_range(ids: list[int]) -> None:
    bits = Rng(0).at(0, torch.tensor(ids)).bits("noise", 4000)
    assert int(bits.min()) >= 0
    assert int(bits.max()) < 2**32
    assert int(bits.max()) > 2**31


def test_a_step_must_fit_its_counter() -> None:
    for step in (-1, 2**32):
        with pytest.raises(ValueError, match="32 bits"):
            Rng(0).at(step)


def test_rows_need_ids_and_laws_need_a_base() -> None:
    with pytest.raises(ValueError, match="sample ids"):
        Rng(0)("noise", "normal", (3,))
    with pytest.raises(ValueError, match="based on"):
        Rng(0).at(0, rows(2))("noise", "gaussian", (3,))


def test_ids_stay_when_only_the_step_changes() -> None:
    rng = Rng(0).at(0, rows(3))
    assert same_bits(rng.at(7)("noise", "normal", (2,)), Rng(0).at(7, rows(3))("noise", "normal", (2,)))


def test_nothing_for_nobody() -> None:
    assert Rng(0).at(0, rows(0))("noise", "normal", (3, 2)).shape == (0, 3, 2)
    assert Rng(0).at(0, rows(0))("t", "uniform").shape == (0,)
    assert Rng(0).at(0, rows(3))("noise", "normal", (0, 2)).shape == (3, 0, 2)


# statistics


def kolmogorov(draws: Tensor, cdf: Callable[[Tensor], Tensor]) -> float:
    """sqrt(n) times the greatest distance of the distribution functions; above 1.95 with probability 0.001."""
    ordered = cdf(draws.flatten().double().sort().values)
    n = len(ordered)
    steps = torch.arange(n + 1, dtype=torch.float64) / n
    return float(torch.maximum((ordered - steps[:-1]).abs().max(), (steps[1:] - ordered).abs().max())) * math.sqrt(n)


def near_zero(value: Tensor | float, count: int, sigmas: float = 4.5) -> bool:
    return abs(float(value)) < sigmas / math.sqrt(count)


def test_normal_draws_are_normal() -> None:
    x = Rng(11).at(0, rows(1000))("noise", "normal", (501,))
    n = x.numel()
    assert x.dtype == torch.float32
    assert kolmogorov(x, torch.special.ndtr) < 1.95
    assert near_zero(x.double().mean(), n)
    assert near_zero((x.double().var() - 1) / math.sqrt(2), n)
    assert near_zero(x.double().pow(3).mean() / math.sqrt(15), n)
    assert near_zero((x.double().pow(4).mean() - 3) / math.sqrt(96), n)
    # the tails are there
    assert 4.2 < float(x.abs().max()) < 6.8


def test_uniform_draws_are_uniform_and_never_reach_the_ends() -> None:
    u = Rng(12).at(0, rows(1000))("drop", "uniform", (500,))
    assert u.dtype == torch.float64
    assert kolmogorov(u, lambda x: x) < 1.95
    assert near_zero((u.mean() - 0.5) * math.sqrt(12), u.numel())
    assert near_zero((u.var() - 1 / 12) * math.sqrt(180), u.numel())
    assert float(u.min()) > 0
    assert float(u.max()) < 1


class Extremes(Rng):
    """All words at an end of their range."""

    def __init__(self, value: int):
        super().__init__(0, 0, rows(2))
        self.value = value

    def bits(self, name: str, words: int) -> Tensor:
        return torch.full((2, words), self.value)


@pytest.mark.parametrize("value", [0, 2**32 - 1])
def test_the_most_extreme_bits_give_finite_numbers_inside_the_interval(value: int) -> None:
    u = Extremes(value)("drop", "uniform", (4,))
    assert bool(((u > 0) & (u < 1)).all())
    assert bool(Extremes(value)("noise", "normal", (4,)).isfinite().all())
    times = Extremes(value)("t", Discrete(1000))
    assert bool(((times >= 1 / 1000) & (times <= 1)).all())


def correlation(a: Tensor, b: Tensor) -> Tensor:
    return torch.corrcoef(torch.stack((a.flatten().double(), b.flatten().double())))[0, 1]


@pytest.mark.parametrize("law", ["normal", "uniform"])
def test_neighbours_are_uncorrelated(law: str) -> None:
    def draw(seed: int = 0, step: int = 0, first: int = 0, name: str = "noise") -> Tensor:
        return Rng(seed).at(step, rows(400, first))(name, law, (250,))

    here, n = draw(), 100_000
    others = [draw(seed=1), draw(step=1), draw(first=1), draw(name="solver"), draw(first=2**32), draw(step=2**16)]
    for other in others:
        assert near_zero(correlation(here, other), n)
        assert near_zero(correlation(here.square(), other.square()), n)
    # within a row, and between the two halves of Box-Muller
    for lag in (1, 2, 4, 125):
        assert near_zero(correlation(here[:, :-lag], here[:, lag:]), n // 2)
        assert near_zero(correlation(here[:, :-lag].abs(), here[:, lag:].abs()), n // 2)


def test_the_first_number_of_each_row_is_uniform_over_ids_and_over_steps() -> None:
    over_ids = Rng(4).at(0, rows(50_000))("t", "uniform")
    over_steps = torch.cat([Rng(4).at(k, rows(1))("t", "uniform") for k in range(3000)])
    assert kolmogorov(over_ids, lambda x: x) < 1.95
    assert kolmogorov(over_steps, lambda x: x) < 1.95


# the global generator, and private ones


def test_the_global_generator_is_neither_used_nor_changed() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = Rng(0).at(0, rows(4))("noise", "normal", (9,))
    weights = torch.randn(3, generator=Rng(0).generator("weights"))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert same_bits(Rng(0).at(0, rows(4))("noise", "normal", (9,)), first)
    assert same_bits(torch.randn(3, generator=Rng(0).generator("weights")), weights)


def test_private_generators_differ_by_seed_step_and_name() -> None:
    generators = [Rng(0), Rng(1), Rng(0).at(1)]
    seeds = {g.generator(name).initial_seed() for g in generators for name in ("a", "b")}
    assert len(seeds) == 6


# replay


def test_replay_gives_what_it_was_given() -> None:
    noise = torch.arange(6.0).view(2, 3)
    steps = [torch.full((2, 3), float(k)) for k in range(4)]
    replay: Draw = Replay({"noise": noise, "solver": steps})
    assert replay("noise", "normal", (3,)) is noise
    assert replay.at(3, rows(2))("noise", "normal", (3,)) is noise
    assert [replay.at(k)("solver", "normal", (3,)) is steps[k] for k in range(4)] == [True] * 4
    assert Replay({"t": torch.ones(2)})("t", LogitNormal()).tolist() == [1, 1]


def test_replay_refuses_other_names_and_shapes() -> None:
    replay = Replay({"noise": torch.zeros(2, 3), "solver": [torch.zeros(2, 3)]})
    with pytest.raises(DitkitError, match=r"nothing to replay under 'nois'.*did you mean noise"):
        replay("nois", "normal", (3,))
    with pytest.raises(DitkitError, match=r"rows of shape \(3,\), asked for \(4,\)"):
        replay("noise", "normal", (4,))
    with pytest.raises(DitkitError, match=r"'solver'.*1 step"):
        replay.at(1)("solver", "normal", (3,))
