"""What a guide is, and how a guided trajectory runs: one batch per network, and no pass whose weight is zero.

    guided = strong + sum over guides of (scale - 1) rule(strong, weak)

A linear rule (strong - weak) gives the same in every space. A rule that is not linear names the space in which it
works; its direction is carried into the space of the network's output by the gain between the two, so that guides that
work in different spaces still add up.

Of tokens the logits are guided, by rules that do not see a number added to the logits of a token: those are
log-probabilities, p(x0 | x_t) being proportional to strong^scale weak^(1 - scale) for one guide.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ...conditioning import Conditioning, cat
from ...config import DitkitError
from ..denoiser import Denoise, Denoiser, Prediction, prepared
from ..discrete import TokenDenoiser
from ..path import Path, Time, as_time
from ..space import reading

__all__ = ["Finish", "Guide", "Guided", "Moment", "Opinion", "guide"]

_MARGIN = 1e-9
"""A time that equals a bound, or a time of the grid, up to rounding is taken to be on it."""


@dataclass(frozen=True)
class Moment:
    """When a prediction is asked for: the time, and the path and the grid that the trajectory walks (n + 1 times)."""

    t: float
    path: Path
    times: tuple[float, ...]

    @property
    def steps(self) -> int:
        """The number of steps. Raises DitkitError for a trajectory without a grid."""
        if len(self.times) < 2:
            raise DitkitError("this guide counts the steps of a grid: give its times to denoiser.start")
        return len(self.times) - 1

    @property
    def step(self) -> int:
        """The step to which t belongs, from 0: the one that begins at t, or within which t lies."""
        after = bisect_left(self.times, -self.t + _MARGIN, key=lambda time: -time)
        return min(max(after - 1, 0), self.steps - 1)

    @property
    def begin(self) -> float:
        """Where the step begins."""
        return self.times[self.step]

    @property
    def next(self) -> float:
        """Where the step ends."""
        return self.times[self.step + 1]


@dataclass(frozen=True)
class Opinion:
    """Who is asked, what is given, and which blocks are perturbed (by name, "blocks.3")."""

    denoiser: Denoiser
    cond: Conditioning
    identity: tuple[str, ...] = ()
    """Blocks whose self-attention map is the identity."""
    skipped: tuple[str, ...] = ()
    """Blocks that give back what they were given."""

    def same(self, other: Opinion) -> bool:
        """Whether both are certain to say the same, so that one is asked for both."""
        return (
            self.denoiser is other.denoiser
            and self.cond is other.cond
            and (self.identity, self.skipped) == (other.identity, other.skipped)
        )


@dataclass(frozen=True)
class Guide:
    """One weak opinion and what to do with it; the base of all guides.

    A guide is a configuration: what it remembers of a trajectory is given to `rule` and handed back by it.
    """

    scale: float
    """1 = none: the weight of the rule is scale - 1."""
    interval: tuple[float, float] = field(default=(0.0, 1.0), kw_only=True)
    """Acts where low < t < high, t = 1 being noise; the ends 0 and 1 are included, other bounds are not
    (Kynkaanniemi et al. 2024; JiT's [0.1, 1] is (0, 0.9) here)."""
    fractions: tuple[float, float] = field(default=(0.0, 1.0), kw_only=True)
    """Acts in the steps from int(start n) up to, not including, int(stop n) of n (diffusers' start and stop)."""

    def __post_init__(self) -> None:
        if not math.isfinite(self.scale):
            raise DitkitError(f"the scale of a guide is a number, not {self.scale}")
        low, high = self.interval
        if not 0 <= low < high <= 1:
            raise DitkitError(f"a guidance interval is 0 <= low < high <= 1 (t = 1 is noise), not {self.interval}")
        start, stop = self.fractions
        if not 0 <= start <= stop <= 1:
            raise DitkitError(f"fractions of the steps are 0 <= start <= stop <= 1, not {self.fractions}")

    @property
    def rule_space(self) -> str | None:
        """The space in which the rule works; None = that of the network's output (any, if the rule is linear)."""
        return None

    @property
    def guides_tokens(self) -> bool:
        """Whether the rule has a meaning for logits: strong - weak does, norms and projections do not."""
        return False

    def check(self, denoiser: Denoiser, visited: Sequence[float]) -> None:
        """Raises DitkitError if this denoiser cannot be guided so, or not at a time that is visited."""

    def weak(self, strong: Opinion) -> Opinion:
        """The weak opinion beside a strong one."""
        raise NotImplementedError

    def acts(self, at: Moment) -> bool:
        """Whether the interval and the fractions include this moment."""
        low, high = self.interval
        if not ((low == 0 or at.t > low + _MARGIN) and (high == 1 or at.t < high - _MARGIN)):
            return False
        if self.fractions == (0.0, 1.0):
            return True
        start, stop = (int(fraction * at.steps) for fraction in self.fractions)
        return start <= at.step < stop

    def weight(self, at: Moment) -> float:
        """The factor of the rule; where it is 0 the weak pass is not run."""
        return self.scale - 1 if self.acts(at) else 0.0

    def holds_still(self, at: Moment) -> bool:
        """Whether x must not move at this moment: the velocity is 0 whatever any opinion is, and no pass is run."""
        return False

    def init(self) -> Any:
        """What is remembered at the start of a trajectory."""
        return None

    def rule(
        self, strong: Float[Tensor, "b c *space"], weak: Float[Tensor, "b c *space"], memory: Any
    ) -> tuple[Float[Tensor, "b c *space"], Any]:
        """The direction in which the strong opinion is moved, row by row, and what is remembered from now on."""
        return strong - weak, memory


@runtime_checkable
class Finish(Protocol):
    """What is done with the sum of all guides."""

    @property
    def space(self) -> str | None:
        """The space in which it works; None = that of the network's output."""
        ...

    def __call__(
        self, strong: Float[Tensor, "b c *space"], guided: Float[Tensor, "b c *space"]
    ) -> Float[Tensor, "b c *space"]:
        """The finished opinion, row by row."""
        ...


class _Perturbation:
    """The edit that perturbs blocks in some rows of a batch and runs the others as they are."""

    def __init__(self, opinions: Sequence[Opinion], b: int, device: torch.device):
        self.identity = self._masks([o.identity for o in opinions], b, device)
        self.skipped = self._masks([o.skipped for o in opinions], b, device)
        self.missing = {*self.identity, *self.skipped}

    @staticmethod
    def _masks(blocks: Sequence[tuple[str, ...]], b: int, device: torch.device) -> dict[str, Bool[Tensor, "b"]]:
        """For every block that is named, the rows of the opinions that name it."""
        return {
            site: torch.tensor([site in names for names in blocks], device=device).repeat_interleave(b)
            for site in {name for names in blocks for name in names}
        }

    def __call__(self, site: str, block: Any, x: Any, *args: Any) -> Any:
        self.missing.discard(site)
        identity, skipped = self.identity.get(site), self.skipped.get(site)
        out = block(x, *args) if identity is None else block(x, *args, identity=identity)
        return out if skipped is None else _choose(skipped, x, out)


def _choose(rows: Bool[Tensor, "b"], x: Any, out: Any) -> Any:
    """The rows of x where True, of out elsewhere; blocks of two streams give tuples of tensors."""
    if isinstance(out, tuple):
        return tuple(_choose(rows, *pair) for pair in zip(x, out, strict=True))
    return torch.where(rows.view(-1, *[1] * (out.ndim - 1)), x, out)


class _Network:
    """The opinions that are asked of one network, prepared together and run as one batch."""

    def __init__(self, denoiser: Denoiser, opinions: dict[int, Opinion], shape: Sequence[int], times: Sequence[float]):
        """opinions by their number in the trajectory; shape: of the batch of one opinion."""
        self.denoiser, self.opinions, self.b = denoiser, opinions, shape[0]
        given = cat([opinion.cond for opinion in opinions.values()])
        self.ready = prepared(denoiser.model, given, (self.b * len(opinions), *shape[1:]), times)
        # the prepared rows and the edit of every set of opinions that is asked, made once
        self.subsets: dict[tuple[int, ...], tuple[Conditioning, _Perturbation | None]] = {}

    def __call__(self, x: Tensor, t: Time, wanted: set[int]) -> dict[int, Prediction]:
        """The opinions on x [b c *space] that are wanted, by number."""
        asked = tuple(number for number in self.opinions if number in wanted)
        if not asked:
            return {}
        if asked not in self.subsets:
            self.subsets[asked] = self._subset(asked, x.device)
        cond, edit = self.subsets[asked]
        prediction: Any = self.denoiser(torch.cat([x] * len(asked)), t, cond, edit=edit)
        if edit is not None and edit.missing:
            raise DitkitError(
                f"{type(self.denoiser.model).__name__} never came to {', '.join(sorted(edit.missing))}: "
                "it has no such block to perturb"
            )
        return dict(zip(asked, prediction.parts(x), strict=True))

    def _subset(self, asked: tuple[int, ...], device: torch.device) -> tuple[Conditioning, _Perturbation | None]:
        places = [list(self.opinions).index(number) for number in asked]
        index = torch.cat([torch.arange(self.b) + self.b * place for place in places])
        opinions = [self.opinions[number] for number in asked]
        perturbed = any(opinion.identity or opinion.skipped for opinion in opinions)
        return self.ready.rows(index.to(device)), _Perturbation(opinions, self.b, device) if perturbed else None


class Guided:
    """A denoiser whose trajectories are guided."""

    denoiser: Any  # of continuous x or of tokens

    def __init__(self, denoiser: Denoiser | TokenDenoiser, guides: Sequence[Guide], finish: Finish | None = None):
        """Raises DitkitError for a guide that cannot guide this denoiser."""
        self.denoiser, self.guides, self.finish = denoiser, tuple(guides), finish
        if denoiser.prediction == "logits":
            wrong = [type(g).__name__ for g in (*guides, finish) if not getattr(g, "guides_tokens", g is None)]
            if wrong:
                raise DitkitError(
                    f"{wrong[0]} cannot guide tokens as it is set: use cfg without channels, autoguidance, "
                    "perturbed_attention or skip_layer, and no finish"
                )
        for g in self.guides:
            g.check(self.denoiser, ())

    def check(self, visited: Iterable[float], needs: Iterable[str], visitor: str = "this grid") -> None:
        """Raises DitkitError if what the solver or a rule reads is singular at a visited time."""
        visited = tuple(visited)
        spaces = {g.rule_space for g in self.guides} | {self.finish.space if self.finish else None}
        self.denoiser.check(visited, (*needs, *sorted(space for space in spaces if space is not None)), visitor)
        for g in self.guides:
            g.check(self.denoiser, visited)

    def start(self, cond: Conditioning, shape: Sequence[int], times: Sequence[float]) -> Denoise:
        """The strong rows come first in their batch, then those of each weak opinion.

        Raises ValueError for a weak opinion on another number of samples.
        """
        b, path, times = shape[0], self.denoiser.path, tuple(times)
        opinions, weak_of = [Opinion(self.denoiser, cond)], []
        for g in self.guides:
            weak = g.weak(opinions[0])
            known = [i for i, opinion in enumerate(opinions) if weak.same(opinion)]
            weak_of.append(known[0] if known else len(opinions))
            if not known:
                opinions.append(weak)
        if any(opinion.cond.count not in (b, None) for opinion in opinions):
            raise ValueError(
                f"opinions on {[o.cond.count for o in opinions]} samples, strong first, for a batch of {b}"
            )
        denoisers = list({id(o.denoiser): o.denoiser for o in opinions}.values())
        networks = [
            _Network(d, {i: o for i, o in enumerate(opinions) if o.denoiser is d}, shape, times) for d in denoisers
        ]
        memories = [g.init() for g in self.guides]

        def denoise(x: Tensor, t: Time) -> Prediction:
            at = Moment(float(t), path, times)
            if any(g.holds_still(at) for g in self.guides):
                return Prediction(torch.zeros_like(x), x, as_time(t), path, "velocity", self.denoiser.t_eps)
            weights = [self._weight(g, at) for g in self.guides]
            active = [i for i, weight in enumerate(weights) if weight != 0]
            wanted = {0, *(weak_of[i] for i in active)}
            said: dict[int, Prediction] = {}
            for network in networks:
                said.update(network(x, t, wanted))
            strong = guided = said[0]
            for i in active:
                space = self.guides[i].rule_space or strong.space
                weak = strong.with_out(said[weak_of[i]].to(strong.space))
                direction, memories[i] = self.guides[i].rule(strong.to(space), weak.to(space), memories[i])
                guided = _moved(guided, space, weights[i], direction)
            if self.finish is None or not active:
                return guided
            space = self.finish.space or strong.space
            before = guided.to(space)
            return _moved(guided, space, 1.0, self.finish(strong.to(space), before) - before)

        return denoise

    def _weight(self, g: Guide, at: Moment) -> float:
        """The weight of a guide; 0 also at a time at which its space does not depend on the network (x0 at t = 0)."""
        weight, denoiser = g.weight(at), self.denoiser
        if weight == 0 or g.rule_space is None:
            return weight
        _, gain = reading(denoiser.prediction, g.rule_space, denoiser.path, at.t, denoiser.t_eps)
        return weight if float(gain) != 0 else 0.0


def _moved(prediction: Prediction, space: str, weight: float, direction: Tensor) -> Prediction:
    """The prediction moved by weight times a direction in a space: through the gain from its own output to there."""
    gain = 1.0 if space == prediction.space else float(prediction.gain(space))
    return prediction.with_out(prediction.out + (weight / gain) * direction)


def guide(
    denoiser: Denoiser | TokenDenoiser, *guides: Guide, finish: Finish | None = None
) -> Denoiser | TokenDenoiser | Guided:
    """The denoiser, of tokens, too, with guides, and what is done with their sum; without guides, the denoiser itself.

    Raises DitkitError for a guide that cannot guide this denoiser.
    """
    return Guided(denoiser, guides, finish) if guides else denoiser
