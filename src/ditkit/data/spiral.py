"""A spiral in a plane of R^d: data of two dimensions in a space of many, JiT's toy (arXiv 2511.13720, section 3)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from ..config import DitkitError, register
from ..rng import Rng
from .dataset import Dataset, InMemory

__all__ = ["Spiral"]

_FIRST, _LAST = 1.5 * math.pi, 4.5 * math.pi  # one and a half turns, as in the Swiss roll


@register("data", "spiral")
@dataclass(frozen=True)
class Spiral:
    """Points on a spiral of one and a half turns, in a plane that lies at random in R^dimension.

    dimension: of the space. radius: distance of the spiral's outer end from the middle. samples: points to train on,
    a tenth as many again are held out. The same for everyone.
    """

    dimension: int = 2
    radius: float = 2.0
    samples: int = 20_000

    def __post_init__(self) -> None:
        if self.dimension < 2 or self.samples < 10 or not self.radius > 0:
            raise DitkitError(
                "data.dimension is at least 2, data.samples at least 10 and data.radius above 0, not "
                f"{self.dimension}, {self.samples} and {self.radius}"
            )

    def basis(self) -> Float[Tensor, "d 2"]:
        """The plane: two orthogonal columns of length 1, from a matrix of normal draws (the identity where d = 2)."""
        if self.dimension == 2:
            return torch.eye(2)
        draws = torch.randn(self.dimension, 2, dtype=torch.float64, generator=Rng(0).generator("plane"))
        return torch.linalg.qr(draws).Q.float()

    def curve(self, share: Float[Tensor, "n"]) -> Float[Tensor, "n 2"]:
        """Points of the spiral in its plane: 0 is the inner end, 1 the outer one."""
        angle = _FIRST + (_LAST - _FIRST) * share
        return (self.radius / _LAST) * angle[:, None] * torch.stack((angle.cos(), angle.sin()), dim=1)

    def distances(self, points: Float[Tensor, "n d"]) -> tuple[Float[Tensor, "n"], Float[Tensor, "n"]]:
        """How far points are from the spiral, within its plane, and from the plane."""
        points, basis = points.double(), self.basis().double()
        inside = points @ basis
        away = (points - inside @ basis.T).norm(dim=1)
        # the curve is 6.5 radii long: of 4,000 points the nearest one is at most 0.0012 radii along it from the foot
        nearest = torch.cdist(inside, self.curve(torch.linspace(0, 1, 4000, dtype=torch.float64)))
        return nearest.amin(1), away

    def open(self) -> Dataset:
        """Computed in a moment; nothing is read."""
        count = self.samples + self.samples // 10
        share = torch.rand(count, dtype=torch.float64, generator=Rng(0).generator("spiral"))
        points = (self.curve(share) @ self.basis().double().T).float()
        rows = torch.arange(count)
        return Dataset(
            name="spiral",
            classes=(),
            shape=(self.dimension,),
            train=InMemory(points, None, rows[: self.samples]),
            heldout=InMemory(points, None, rows[self.samples :]),
            source=f"spiral: {self.samples:,} points, radius {self.radius:g}, in a plane of R^{self.dimension}, seed 0",
        )
