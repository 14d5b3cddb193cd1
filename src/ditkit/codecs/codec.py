"""What a codec is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Protocol, Self, runtime_checkable

from jaxtyping import Float, Int, Shaped
from torch import Tensor

from ..rng import Draw, Rng

__all__ = ["EXAMPLES", "Codec", "Posterior", "Samples", "Stateless", "draw", "examples"]

EXAMPLES = 4096
"""The most training samples that components and statistics are found from; of more, this many are drawn."""


class Part(Protocol):
    """A part of a data set, by index; what a batch of it holds are its samples, `data`."""

    def __len__(self) -> int: ...

    def batch(self, indices: Int[Tensor, "b"]) -> Any: ...


def examples(
    part: Part, most: int = EXAMPLES, at_once: int = 64, name: str = "codec"
) -> Iterator[Shaped[Tensor, "b *sample"]]:
    """Samples of a part in batches, not augmented: all of them, or `most`, by the draw of that name, the same for
    everyone."""
    for indices in Rng(0).some(name, len(part), most).split(at_once):
        yield part.batch(indices).data


class Samples(Protocol):
    """What a codec sees of an opened data set."""

    @property
    def symbols(self) -> str:
        """The characters that texts are made of; none where the data is no text."""
        ...

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one sample."""
        ...

    @property
    def train(self) -> Part: ...


@runtime_checkable
class Codec(Protocol):
    """Data <-> the tensor that is diffused, x0: floats [b c *space] or [b d], or tokens (int64 [b l]).

    A codec is a frozen configuration. One that learns, of the data or elsewhere, has it in a field made by
    `config.learned()`; every checkpoint stores its `state()`, and whoever reads a run gets the codec back by
    `loaded(state)`. A configuration may say in the class variable `positional` which field VALUE sets in the words
    `--codec NAME:VALUE`, and in `instead` what to give where there are no such words for it.
    """

    @property
    def vocab(self) -> int:
        """How many different tokens there are; 0 where x0 is continuous."""
        ...

    def downsampling(self) -> int:
        """Pixels of an image in one latent, along a side; 1 where there is no such. Raises DitkitError where a file
        says it that cannot be read."""
        ...

    def encode(self, data: Shaped[Tensor, "b *sample"], rng: Draw | None = None) -> Shaped[Tensor, "b *shape"]: ...

    def decode(self, x0: Shaped[Tensor, "b *shape"]) -> Shaped[Tensor, "b *sample"]: ...

    def shape(self, sample: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of one encoded sample of data of shape `sample`. Raises DitkitError for data of another kind."""
        ...

    def fitted(self, data: Samples) -> Self:
        """The codec for this data: it takes from it what it does not say, and learns what it has not learned yet.

        Raises DitkitError for data of another kind.
        """
        ...

    def state(self) -> dict[str, Tensor]:
        """What it has learned; empty for a codec that learns nothing."""
        ...

    def loaded(self, state: Mapping[str, Tensor]) -> Self:
        """The codec that has learned this; the inverse of `state`. Raises DitkitError for what another has learned."""
        ...


@runtime_checkable
class Posterior(Protocol):
    """The two halves of an encoding that draws from a Gaussian: what the data says, and the draw from it.

    `codec.encode(data, rng)` is `codec.drawn(codec.moments(data), rng)`, so that moments can be stored and drawn from
    in every epoch anew.
    """

    def moments(self, data: Shaped[Tensor, "b *sample"]) -> Float[Tensor, "b m *shape"]:
        """The mean, and where it draws the standard deviation: m = 1 or 2."""
        ...

    def drawn(self, moments: Float[Tensor, "b m *shape"], rng: Draw | None = None) -> Float[Tensor, "b *shape"]:
        """Without `rng`, what the mean stands for. Draws "codec" where m = 2."""
        ...


def draw(moments: Float[Tensor, "b m *shape"], rng: Draw | None) -> Float[Tensor, "b *shape"]:
    """The mean; with a standard deviation (m = 2) and `rng`, a draw of the Gaussian ("codec")."""
    z = moments[:, 0]
    if moments.shape[1] == 2 and rng is not None:
        z = z + moments[:, 1] * rng("codec", "normal", z.shape[1:]).to(z)
    return z


class Stateless:
    """What codecs have in common that learn nothing, and that leave images their size if they do not say otherwise."""

    def downsampling(self) -> int:
        return 1

    def fitted(self, data: Samples) -> Self:
        return self

    def state(self) -> dict[str, Tensor]:
        return {}

    def loaded(self, state: Mapping[str, Tensor]) -> Self:
        return self
