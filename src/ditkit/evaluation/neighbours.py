"""The nearest training samples of a set that does not fit the memory, found through few numbers of each.

A distance between projections on orthonormal axes is never above the distance itself. So the short vectors say which
training samples cannot be near; the few that can are read again, and their distances measured in full.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from ..config import DitkitError
from ..rng import Rng

__all__ = ["AXES", "MOST", "Index", "Near", "mirrored"]

AXES = 256
"""Numbers that are kept of each sample."""
MOST = 200_000
"""Samples that are kept: 0.2 GB. Of larger sets, so many drawn at random."""
_CANDIDATES = 8
_MEASURED = 64  # candidates where distances are wanted, not decisions alone
_FITTED = 2**25  # numbers of the samples that the axes are found from: 128 MiB
_BLOCK = 2**12  # training samples whose distances are in memory at a time
_SLACK = 1e-3  # a share of the largest norm, by which products of float32 may be wrong


@dataclass(frozen=True)
class Near:
    """The two nearest training samples of each sample, by L2.

    Where only decisions were asked for, those that were nearest when the decision was sure; of copies the first is.
    """

    nearest: Int[Tensor, "n"]
    d1: Float[Tensor, "n"]
    d2: Float[Tensor, "n"]
    copied: Bool[Tensor, "n"]
    """d1 / d2 below the threshold, or d1 = 0."""


def _digest(sample: Tensor) -> bytes:
    equal = (sample + 0).contiguous()  # -0 becomes 0
    return hashlib.blake2b(equal.view(torch.uint8).numpy().tobytes(), digest_size=16).digest()


def mirrored(shape: tuple[int, ...]) -> Callable[[Float[Tensor, "b d"]], Float[Tensor, "b d"]]:
    """What mirrors vectors of images [c h w] left to right."""
    return lambda vectors: vectors.reshape(-1, *shape).flip(-1).flatten(1)


class Index:
    """Distinct training samples as short vectors; it grows as long as there is time for it.

    read: of training samples, by index, what tells equal ones (bytes) and their vectors [b d] as float32. mirror:
    vectors of the same samples mirrored, where training mirrors them; read_mirrored: instead of it, vectors of training
    samples mirrored, of which as many numbers are kept again. Then a sample is as far from a training sample as from
    the nearer of the two, and mirror images of each other are one sample. project: the distances are those of the
    projections, and nothing is read again.
    """

    def __init__(
        self,
        read: Callable[[Int[Tensor, "b"]], tuple[Shaped[Tensor, "b *s"], Float[Tensor, "b d"]]],
        length: int,
        *,
        mirror: Callable[[Float[Tensor, "b d"]], Float[Tensor, "b d"]] | None = None,
        read_mirrored: Callable[[Int[Tensor, "b"]], Float[Tensor, "b d"]] | None = None,
        project: bool = False,
        most: int = MOST,
    ):
        self.read, self.length, self.mirror, self.project = read, length, mirror, project
        self.read_mirrored = read_mirrored
        # one order for everyone; a part of the data is then a fair part
        self.order = torch.argsort(Rng(0).at(0, torch.arange(length))("index", "uniform"), stable=True)[:most]
        self.seen = 0
        self.duplicates = 0
        self._hashes: set[bytes] = set()
        self._axes: Float[Tensor, "d k"] | None = None
        self._rows: list[Tensor] = []
        self._ids: list[int] = []
        self._norm = 0.0

    @property
    def wanted(self) -> int:
        """Samples that it will hold, their duplicates among them."""
        return len(self.order)

    @property
    def complete(self) -> bool:
        return self.seen == self.wanted

    def __len__(self) -> int:
        """Distinct samples that it holds."""
        return len(self._ids)

    @torch.no_grad()
    def extend(self, count: int) -> None:
        """Read so many more samples, or all that are left."""
        ids = self.order[self.seen : self.seen + count]
        if len(ids) == 0:
            return
        raw, versions = self.versions(ids)
        self.seen += len(ids)
        kept = []
        raw, plain, turned = raw.cpu(), versions[0].cpu(), None
        if self.mirror is not None or len(versions) > 1:
            turned = versions[1].cpu() if self.mirror is None else self.mirror(plain)
        for k, sample in enumerate(raw):
            digest = _digest(sample)
            if digest in self._hashes or (turned is not None and _digest(turned[k]) in self._hashes):
                self.duplicates += 1
                continue
            self._hashes.add(digest)
            if turned is not None:
                self._hashes.add(_digest(plain[k]))
            kept.append(k)
        if not self._ids:
            self._begin(versions)
        first = len(self._ids)
        for rows, vectors in zip(self._rows, versions, strict=True):
            short = self.short(vectors[kept]).cpu()
            rows[first : first + len(short)] = short
            self._norm = max(self._norm, *short.norm(dim=1).tolist(), 0.0)
        self._ids += ids[kept].tolist()

    def versions(self, ids: Int[Tensor, "b"]) -> tuple[Shaped[Tensor, "b *s"], list[Float[Tensor, "b d"]]]:
        """What tells equal training samples, and their vectors; mirrored ones, too, where they are read."""
        raw, vectors = self.read(ids)
        found = [vectors] if self.read_mirrored is None else [vectors, self.read_mirrored(ids)]
        return raw, [each.flatten(1).float() for each in found]

    def fitting(self, d: int) -> int:
        """How many samples of d numbers its first part should have, for the axes to be found from them."""
        return min(1024, max(2, _FITTED // d), self.wanted)

    def _begin(self, versions: list[Float[Tensor, "b d"]]) -> None:
        """Choose the axes: the principal ones of the first samples, or all where there are few."""
        vectors = torch.cat([v[k :: len(versions)] for k, v in enumerate(versions)])
        d = vectors.shape[1]
        if d > AXES:
            centred = vectors - vectors.mean(0)
            axes = torch.randn(d, AXES, generator=Rng(0).generator("axes")).to(vectors.device)
            for _ in range(3):  # subspace iteration; where there are fewer samples than axes, the rest is arbitrary
                axes = torch.linalg.qr(centred.T @ (centred @ axes)).Q
            self._axes = axes
        width = d if self._axes is None else self._axes.shape[1]
        # pages of memory that are not written yet are not taken
        self._rows = [torch.empty(self.wanted, width) for _ in versions]

    @property
    def ids(self) -> Int[Tensor, "n"]:
        """Indices of the distinct samples."""
        return torch.tensor(self._ids, dtype=torch.int64)

    @property
    def rows(self) -> Float[Tensor, "n k"]:
        """The short vectors of the distinct samples."""
        return self._rows[0][: len(self)]

    def short(self, vectors: Float[Tensor, "b d"]) -> Float[Tensor, "b k"]:
        """Vectors on the axes that are kept."""
        return vectors if self._axes is None else vectors @ self._axes.to(vectors.device)

    @torch.no_grad()
    def nearest(self, vectors: Float[Tensor, "n d"], ratio: float = 1 / 3, *, distances: bool = False) -> Near:
        """The two nearest, and whether the samples copy the first: d1 / d2 < ratio.

        distances: go on reading until both distances are sure, not only what they decide. What takes more than 8
        readings for a sample, or 64 for its distances, is made of these. Raises DitkitError with fewer than two
        distinct training samples.
        """
        if len(self) < 2:
            raise DitkitError(f"copies are found among at least 2 distinct training samples, and there are {len(self)}")
        vectors = vectors.flatten(1).float()
        seen = [vectors] if self.mirror is None else [vectors, self.mirror(vectors)]
        bounds, places = self._candidates([self.short(v).cpu() for v in seen], _MEASURED if distances else _CANDIDATES)
        count, width = places.shape
        if self.project or self._axes is None:
            short = [self.short(v).cpu() for v in seen]
            columns = [[rows[places[:, k]] for rows in self._rows] for k in range(width)]
            exact = torch.stack([self._apart(short, rows) for rows in columns], dim=1)
            return self._said(exact, places, ratio)
        exact = torch.full((count, width), torch.inf, dtype=torch.float64)
        open_ = torch.ones(count, dtype=torch.bool)
        for k in range(width):
            some = open_.nonzero()[:, 0]
            exact[some, k] = self._measured([v[some.to(v.device)] for v in seen], places[some, k])
            if k == 0:
                continue
            two = exact.topk(2, dim=1, largest=False).values
            after = bounds[:, k + 1] if k + 1 < width else torch.full((count,), torch.inf, dtype=torch.float64)
            if distances:
                open_ &= after < two[:, 1]
            else:
                copy = two[:, 0] < ratio * torch.minimum(two[:, 1], after)
                none = (two[:, 0] >= ratio * two[:, 1]) & (after >= ratio * two[:, 0])
                open_ &= ~(copy | none)
            if not bool(open_.any()):
                break
        return self._said(exact, places, ratio)

    def _said(self, exact: Float[Tensor, "n k"], places: Int[Tensor, "n k"], ratio: float) -> Near:
        two, which = exact.topk(2, dim=1, largest=False)
        first = places.gather(1, which)[:, 0]
        d1, d2 = two.unbind(1)
        return Near(self.ids[first], d1, d2, (d1 < ratio * d2) | (d1 == 0))

    def _candidates(
        self, short: list[Float[Tensor, "n k"]], most: int
    ) -> tuple[Float[Tensor, "n c"], Int[Tensor, "n c"]]:
        """Lower bounds of the distances of the nearest rows, sorted, and their places."""
        count, width = len(short[0]), min(most, len(self))
        best = torch.full((count, width), torch.inf, dtype=torch.float64)
        places = torch.zeros(count, width, dtype=torch.int64)
        slack = _SLACK * max(self._norm, *(float(s.norm(dim=1).max()) for s in short))
        for first in range(0, len(self), _BLOCK):
            last = min(first + _BLOCK, len(self))
            pairs = [(s, rows[first:last]) for s in short for rows in self._rows]
            squared = torch.stack(
                [s.square().sum(1)[:, None] + rows.square().sum(1) - 2 * s @ rows.T for s, rows in pairs]
            ).amin(0)
            found = (squared.clamp(min=0).sqrt() - slack).clamp(min=0).double()
            here = torch.arange(first, last).expand(count, -1)
            best, chosen = torch.cat((best, found), dim=1).topk(width, dim=1, largest=False)
            places = torch.cat((places, here), dim=1).gather(1, chosen)
        return best, places

    def _measured(self, vectors: list[Float[Tensor, "n d"]], places: Int[Tensor, "n"]) -> Float[Tensor, "n"]:
        """Distances in full to the training samples at these places, which are read again."""
        found = []
        for part in torch.arange(len(places)).split(64):
            rows = self.versions(torch.tensor([self._ids[p] for p in places[part].tolist()]))[1]
            found.append(self._apart([v[part.to(v.device)] for v in vectors], rows))
        return torch.cat(found) if found else torch.empty(0, dtype=torch.float64)

    @staticmethod
    def _apart(vectors: list[Float[Tensor, "n d"]], rows: list[Float[Tensor, "n d"]]) -> Float[Tensor, "n"]:
        """L2 of each to its row, in float64; the nearer of the mirrored."""
        apart = [(v.double() - r.to(v.device).double()).square().sum(1).sqrt() for v in vectors for r in rows]
        return torch.stack(apart).amin(0).cpu()
