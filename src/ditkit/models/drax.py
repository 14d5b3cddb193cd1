"""Drax: "Speech Recognition with Discrete Flow Matching", Navon et al. 2025, arXiv 2510.04162: the decoder.

DDiT's block with attention to encoded speech between its two halves: LayerNorm without bias, self-attention with rotary
positions, cross-attention to the audio through a norm of its own and without positions, MLP with the tanh form of GELU;
each is modulated by a narrow vector of time, and gated. The authors' language: x [b l] are tokens of Whisper's
vocabulary, or [b l v] probabilities of them; t in [0, 1] with t = 0 noise and t = 1 data; `cond.audio` is what
Whisper's encoder gave (1500 frames of 1280 channels); `cond.known.mask` says which tokens are given (the prompt), in
two learned vectors that are added to the tokens'. The output [b l v] are logits of the clean tokens. Audio without
meaning, for guidance and in a tenth of the training, is all zeros.

The middle distribution of the training's path (section 3.2) is a network beside this one: `Drax.middle`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from ..conditioning import Conditioning, Tokens
from ..config import DitkitError, register
from ..layers import (
    Attention,
    CrossAttention,
    CrossBlock,
    Edit,
    FinalLayer,
    GatedCrossBlock,
    Mlp,
    TimestepEmbedder,
    TokenEmbedder,
    axial_angles,
    check_heads_even,
    init_adaln_zero,
    keys_for,
    keys_in,
    layer_norm,
    rope_table,
    visit,
)
from ..rng import Rng
from .registry import Model, Plan, TokenConfig, at_least_one, instantiate, register_models

__all__ = ["Drax", "DraxConfig", "DraxMiddle"]


@register("model", "drax")
@dataclass(frozen=True)
class DraxConfig(TokenConfig):
    """Everything about Drax's decoder; the defaults are those of drax-v1."""

    length: int = 144
    """Tokens of a sample (the most in the paper's sampling). Other lengths are accepted: positions are relative."""
    vocab: int = 51866
    """Kinds of tokens: those of whisper-large-v3."""
    hidden_size: int = 1280
    depth: int = 16
    num_heads: int = 20
    mlp_ratio: float = 4.0
    cond_dim: int = 128
    """Size of the vector of time that modulates the blocks. The paper does not print it; with 128 both published
    parameter counts come out."""
    audio_dim: int = 1280
    """Channels of the encoded audio."""
    audio_length: int = 1500
    """Frames of the encoded audio, to count costs; any number is accepted."""
    drop: float = 0.1
    """Dropout after both attentions and the MLP."""

    def __post_init__(self) -> None:
        at_least_one(self, "length", "vocab", "hidden_size", "depth", "num_heads", "cond_dim", "audio_dim")

    def example(self, batch: int) -> Conditioning:
        """Audio of the full length."""
        return Conditioning(audio=Tokens.zeros(batch, self.audio_length, self.audio_dim))

    def build(self, seed: int = 0) -> Drax:
        """The network with initial weights."""
        return instantiate(Drax, self, seed)


def norm(dim: int) -> nn.LayerNorm:
    """LayerNorm with weights and without bias."""
    return layer_norm(dim, eps=1e-5, affine=True, bias=False)


def block(config: DraxConfig) -> GatedCrossBlock:
    """Attentions without bias and qk-norm."""
    dim, heads, drop = config.hidden_size, config.num_heads, config.drop
    return GatedCrossBlock(
        dim,
        norm1=norm(dim),
        attn=Attention(dim, heads, fused=False, bias=False, pairs="halves", proj_drop=drop),
        norm_cross=norm(dim),
        cross=CrossAttention(dim, heads, fused=False, bias=False, proj_drop=drop),
        norm2=norm(dim),
        mlp=Mlp(dim, int(dim * config.mlp_ratio), drop),
        norm_tokens=norm(dim),
        given=config.cond_dim,
    )


class Drax(Model):
    """Drax's decoder. Raises ValueError for sizes that do not fit together, another x, and missing or other audio."""

    plan = Plan(shard=("blocks",))

    def __init__(self, config: DraxConfig):
        super().__init__()
        self.config = config
        dim = config.hidden_size
        check_heads_even(dim, config.num_heads)
        self.x_embedder = TokenEmbedder(config.vocab, dim)
        self.known_embedder = nn.Embedding(2, dim)
        self.t_embedder = TimestepEmbedder(config.cond_dim)
        self.audio_embedder = nn.Sequential(nn.Linear(config.audio_dim, dim), nn.GELU(), nn.Linear(dim, dim))
        self.blocks = nn.ModuleList(block(config) for _ in range(config.depth))
        self.final_layer = FinalLayer(dim, config.vocab, norm(dim), given=config.cond_dim)

    def init_weights(self, rng: Rng) -> None:
        """adaLN-Zero's start, and the release's standard normal vectors of tokens."""
        init_adaln_zero(self, rng.generator)
        for name in ("x_embedder", "known_embedder"):
            nn.init.normal_(self.get_parameter(f"{name}.weight"), generator=rng.generator(name))

    def prepare(self, cond: Conditioning, shape: Sequence[int], times: Sequence[float] = ()) -> Conditioning:
        """Keys and values of the audio for every block, the vectors of what is known, and rotations."""
        audio = self.audio_embedder(_audio(cond, self.config.audio_dim).to(self.x_embedder.weight.dtype))
        static = keys_for(self.blocks, audio)
        if cond.known is not None:
            static["known"] = self.known_embedder(cond.known.mask.long())
        positions = torch.arange(shape[1], device=audio.device)
        angles = axial_angles((positions,), (self.config.hidden_size // self.config.num_heads,))
        return cond.with_static(**static, rope=rope_table(angles, "halves")[None])

    def forward(
        self, x: Shaped[Tensor, "b l *v"], t: Float[Tensor, "b"], cond: Conditioning, *, edit: Edit | None = None
    ) -> Float[Tensor, "b l v"]:
        """x: tokens, or probabilities in floats; t in [0, 1], 1 = data. The result are logits."""
        h = self.x_embedder(x)
        if "rope" not in cond.static:
            cond = self.prepare(cond, x.shape)
        assert cond.audio is not None
        static, mask = cond.static, cond.audio.mask[:, None, None]
        if "known" in static:
            h = h + static["known"]
        c = self.t_embedder(t)
        for i, blk in enumerate(self.blocks):
            h = visit(edit, f"blocks.{i}", blk, h, c, keys_in(static, i), mask, static["rope"][0])
        return self.final_layer(h, c)

    def middle(self, width: int, heads: int, rng: Rng) -> DraxMiddle:
        """A network for the middle distribution of the training's path, with initial weights."""
        head = DraxMiddle(self.config, width, heads)
        head.init_weights(rng)
        return head


def _audio(cond: Conditioning, width: int) -> Float[Tensor, "b m d"]:
    """The encoded audio. Raises DitkitError if there is none, or of another width."""
    if cond.audio is None:
        raise DitkitError(f"the model listens to audio: give cond.audio, Tokens of [b m {width}]")
    if cond.audio.values.ndim != 3 or cond.audio.values.shape[2] != width:
        raise DitkitError(f"the audio is [b m {width}], not {list(cond.audio.values.shape)}: change audio_dim")
    return cond.audio.values


class DraxMiddle(nn.Module):
    """p_mid(token | audio) of the three-way path, needed in training only (section 3.2, appendix C.1).

    The paper: one transformer block and a projection to the vocabulary on what the encoder gave, 28M parameters. It
    does not say how frames become tokens; here a learned vector for each place attends to the frames. With a width of
    448 and the sizes of drax-v1 it has 27.3M parameters.
    """

    def __init__(self, config: DraxConfig, width: int, heads: int):
        super().__init__()
        self.audio_dim = config.audio_dim
        self.places = nn.Embedding(config.length, width)
        self.block = CrossBlock(
            norm(width),
            Attention(width, heads, bias=False),
            norm(width),
            CrossAttention(width, heads, given=config.audio_dim, bias=False),
            norm(width),
            Mlp(width, 4 * width),
        )
        self.norm = norm(width)
        self.linear = nn.Linear(width, config.vocab)

    def init_weights(self, rng: Rng) -> None:
        """As those of the decoder; the projection starts at 0, which is the uniform distribution."""
        init_adaln_zero(self, lambda name: rng.generator(f"middle.{name}"))
        nn.init.normal_(self.places.weight, generator=rng.generator("middle.places"))
        nn.init.zeros_(self.linear.weight)

    def forward(self, cond: Conditioning, length: int) -> Float[Tensor, "b l v"]:
        """Logits of the first `length` tokens. Raises DitkitError for more tokens than places, or without audio."""
        audio = _audio(cond, self.audio_dim)
        assert cond.audio is not None
        if length > self.places.num_embeddings:
            raise DitkitError(
                f"the middle distribution has {self.places.num_embeddings} places and {length} tokens were asked for: "
                "change model.length"
            )
        x = self.places.weight[:length].expand(len(audio), -1, -1)
        return self.linear(self.norm(self.block(x, audio, cond.audio.mask[:, None, None])))


# table 1: 16 layers, and the fast variant with 4
register_models(
    {
        "drax": DraxConfig(),
        "drax_flash": replace(DraxConfig(), depth=4),
        "drax_tiny": DraxConfig(
            length=16, vocab=256, hidden_size=96, depth=3, num_heads=4, cond_dim=32, audio_dim=64, audio_length=50
        ),
    }
)
