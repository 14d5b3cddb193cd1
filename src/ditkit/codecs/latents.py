"""What another codec made of the data, read from shards instead of computed in every step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

from jaxtyping import Float, Shaped
from torch import Tensor

from ..config import DitkitError, register
from ..rng import Draw
from .codec import Posterior, Samples

__all__ = ["Latents"]


@register("codec", "latents")
@dataclass(frozen=True)
class Latents:
    """Stored moments of a codec to its latents, with the draw that encoding the data itself makes; decodes as it does.

    Data is [b *shape] where the codec draws nothing, and [b 2 *shape], mean and standard deviation, where it draws.
    Bytes are data before it was encoded, such as the known part of an image, and are encoded.
    """

    instead: ClassVar[str] = "its latents are what `ditkit prepare` writes, and come with --data prepared:FOLDER"
    inner: Any
    """The codec that made the latents."""
    sample: tuple[int, ...]
    """The shape of a sample before it was encoded."""
    moments: int = 1

    def __post_init__(self) -> None:
        if self.moments not in (1, 2):
            raise DitkitError(f"codec latents: moments is 1 (mean) or 2 (and standard deviation), not {self.moments}")

    @property
    def vocab(self) -> int:
        return self.inner.vocab

    def downsampling(self) -> int:
        return self.inner.downsampling()

    def shape(self, sample: tuple[int, ...]) -> tuple[int, ...]:
        """Raises DitkitError for what are neither such latents nor samples that could be encoded to them."""
        latent = self.inner.shape(self.sample)
        stored = latent if self.moments == 1 else (self.moments, *latent)
        if sample not in (stored, self.sample):
            raise DitkitError(
                f"the codec latents reads prepared samples {list(stored)}, and a sample is {list(sample)}: give "
                "--data prepared:FOLDER, or choose another --codec"
            )
        return latent

    def fitted(self, data: Samples) -> Self:
        """The same. Raises DitkitError for other data than was prepared."""
        self.shape(data.shape)
        return self

    def encode(self, data: Shaped[Tensor, "b *stored"], rng: Draw | None = None) -> Float[Tensor, "b *shape"]:
        if not data.is_floating_point():
            return self.inner.encode(data, rng)
        moments = (data if self.moments > 1 else data[:, None]).float()
        return self.inner.drawn(moments, rng) if isinstance(self.inner, Posterior) else moments[:, 0]

    def decode(self, x0: Float[Tensor, "b *shape"]) -> Shaped[Tensor, "b *sample"]:
        return self.inner.decode(x0)

    def state(self) -> dict[str, Tensor]:
        """What the codec that made the latents had learned."""
        return self.inner.state()

    def loaded(self, state: Mapping[str, Tensor]) -> Self:
        return replace(self, inner=self.inner.loaded(state))
