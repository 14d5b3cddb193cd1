"""Random vectors where an encoder of text or speech would be: to train and test networks that are given one."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..conditioning import Conditioning, Given, Tokens
from ..config import DitkitError, register
from ..rng import Draw, Rng
from .label import Label

__all__ = ["RandomSpeech", "RandomText"]


def _vectors(name: str, ids: Int[Tensor, "n"], shape: tuple[int, ...]) -> Float[Tensor, "n *shape"]:
    """The vectors that belong to these numbers, the same in every run."""
    return Rng(0).at(0, ids)(name, "normal", shape)


@register("conditioner", "random_text")
@dataclass(frozen=True)
class RandomText(Label):
    """Each class as a text of its own: fixed random tokens, and a pooled vector. It knows no language.

    It has what networks meet in real texts: lengths that differ (from `shortest` to `longest` tokens, class by class),
    padding and its mask, and a null, which is a text of one token and a pooled vector of zeros.
    """

    width: int = 64
    """Of a token."""
    pooled: int = 0
    """Size of the pooled vector; 0 = none."""
    shortest: int = 2
    longest: int = 6

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.width < 1 or self.pooled < 0 or not 1 <= self.shortest <= self.longest:
            raise DitkitError(
                "conditioner random_text: width is at least 1, pooled at least 0 and shortest from 1 to longest, not "
                f"{self.width}, {self.pooled}, {self.shortest} and {self.longest}"
            )

    def __call__(self, batch: Given, rng: Draw | None = None) -> Conditioning:
        """Draws "drop". Raises DitkitError for a label outside the classes, and for data without classes."""
        if not self.classes:
            raise DitkitError("conditioner random_text makes texts of classes, and the data has none: choose another")
        label = Label(self.classes, self.drop)(batch, rng).label
        assert label is not None
        return self._texts(label)

    def null(self, n: int) -> Conditioning:
        """The text of one token n times."""
        return self._texts(torch.full((n,), len(self.classes)))

    def _texts(self, label: Int[Tensor, "b"]) -> Conditioning:
        given, null = label.cpu(), label.cpu() == len(self.classes)
        length = self.shortest + given % (self.longest - self.shortest + 1)
        length = torch.where(null, 1, length)
        values = _vectors("text", given, (self.longest, self.width))
        mask = torch.arange(self.longest) < length[:, None]
        pooled = None
        if self.pooled:
            pooled = torch.where(null[:, None], 0.0, _vectors("pooled", given, (self.pooled,))).to(label.device)
        text = Tokens((values * mask[..., None]).to(label.device), mask.to(label.device))
        return Conditioning(text=text, pooled=pooled)


@register("conditioner", "random_speech")
@dataclass(frozen=True)
class RandomSpeech:
    """Each text spelled aloud: every character as `frames` fixed random vectors, with noise. It is no real speech.

    The network has to find out which vectors belong to which character and where they are, as in recognition. drop:
    the probability that training gives nothing but one frame of zeros, which is the null, too.
    """

    width: int = 64
    """Of a frame."""
    frames: int = 2
    """Of a character."""
    noise: float = 0.1
    """Standard deviation of what is added to the vectors in training; their own is 1."""
    drop: float = 0.1

    def __post_init__(self) -> None:
        if self.width < 1 or self.frames < 1 or self.noise < 0 or not 0 <= self.drop <= 1:
            raise DitkitError(
                "conditioner random_speech: width and frames are at least 1, noise is not negative and drop a "
                f"probability, not {self.width}, {self.frames}, {self.noise} and {self.drop}"
            )

    @property
    def classes(self) -> tuple[str, ...]:
        """None: it is given the text."""
        return ()

    def __call__(self, batch: Given, rng: Draw | None = None) -> Conditioning:
        """Draws "noise in speech" and "drop". Raises DitkitError where there is no text."""
        if batch.text is None:
            raise DitkitError("conditioner random_speech speaks texts, and none is given: choose data of texts")
        text = batch.text
        symbols, where = text.cpu().unique(return_inverse=True)
        spoken = _vectors("speech", symbols, (self.frames, self.width))[where].flatten(1, 2)
        if rng is not None and self.noise:
            spoken = spoken + self.noise * rng("noise in speech", "normal", tuple(spoken.shape[1:])).cpu()
        mask = (text.cpu() != 0).repeat_interleave(self.frames, dim=1)
        mask[:, 0] = True  # an empty text is a silence of one frame
        audio = Tokens((spoken * mask[..., None]).to(text.device), mask.to(text.device))
        cond = Conditioning(audio=audio)
        if rng is None or self.drop == 0:
            return cond
        keep = rng("drop", "uniform") >= self.drop
        return cond.where(keep.to(text.device), self.null(len(text)).to(text.device))

    def null(self, n: int) -> Conditioning:
        """One frame of zeros n times."""
        return Conditioning(audio=Tokens.zeros(n, 1, self.width))

    def fitted(self, classes: tuple[str, ...]) -> Self:
        """The same: it knows no classes."""
        return replace(self)
