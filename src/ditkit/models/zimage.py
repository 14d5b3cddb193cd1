"""Z-Image: "Z-Image: An Efficient Image Generation Foundation Model with Single-Stream Diffusion Transformer", Z-Image
Team 2025, arXiv 2511.22699, section 4.1.

Patches of a latent and tokens of a caption go through refiners of their own, then as one sequence through one stack of
sandwich blocks: RMS norms before and after attention and MLP, a scale before and a tanh gate after, no shift. The
scales and gates of a block are one Linear of a vector of 256 that only the time makes; the refiners of the caption have
none, see neither image nor time, and so run in `prepare`. Positions are (time, row, column): the caption counts along
the first axis, and the image stands right behind it.

The authors' language: x [b 16 h w] are latents; t in [0, 1] is 1 for clean data, and the network counts it in
thousandths; the output is clean - noise ("-velocity" with the clock "1-t"). cond.text are the next to last states of
Qwen3-4B. Captions, images and references are padded to multiples of 32 by learned tokens that are attended to: that is
the canonical length. What pads a batch beyond it is masked and changes nothing.

Z-Image-Omni also takes images (cond.references, clean latents, and cond.vision, their SigLIP features). Its caption
is cut where images stand in the prompt: cond.scalars["segments"] [b r + 2] holds the lengths of the pieces before each
of the r references, before the image that is made, and after it. What belongs to references is modulated as clean data.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from ..conditioning import Conditioning, Tokens
from ..config import DitkitError, register
from ..layers import (
    Attention,
    Edit,
    FinalLayer,
    RMSNorm,
    SandwichBlock,
    SwiGLU,
    TimestepEmbedder,
    init_adaln_zero,
    layer_norm,
    over_heads,
    patch_grid,
    patchify,
    place_rope,
    refined,
    unpatchify,
    visit,
)
from ..rng import Rng
from .registry import ImageConfig, Model, Plan, at_least_one, given_text, instantiate, register_models

__all__ = ["ZImage", "ZImageConfig"]

MULTIPLE = 32  # sequences are padded to a multiple of so many tokens
GIVEN = 256  # size of the vector of time that modulates the blocks


@register("model", "z_image")
@dataclass(frozen=True)
class ZImageConfig(ImageConfig):
    """Everything about a Z-Image; the defaults are those of the release (30 heads: table 2 of the paper prints 32)."""

    input_size: int | tuple[int, int] = 128
    """Side, or (rows, columns), of the latent. Other sizes are accepted: positions are relative."""
    patch_size: int = 2
    in_channels: int = 16
    hidden_size: int = 3840
    depth: int = 30
    refiner_depth: int = 2
    """Blocks that see the image alone, and as many that see the caption alone."""
    num_heads: int = 30
    axes: tuple[int, int, int] = (32, 48, 48)
    """Channels of a head that turn with time, row and column."""
    theta: float = 256.0
    """Base of the rotations' frequencies."""
    norm_eps: float = 1e-5
    text_dim: int = 2560
    """Size of a token of the caption."""
    text_length: int = 512
    """Tokens of a caption that `ditkit plan` reckons with. Any number is accepted."""
    vision_dim: int = 0
    """Size of the SigLIP features of references (Omni); 0 = the model takes none."""

    def __post_init__(self) -> None:
        at_least_one(
            self, "patch_size", "in_channels", "hidden_size", "depth", "refiner_depth", "num_heads", "text_dim",
            "text_length",
        )  # fmt: skip
        if not self.theta > 1 or not self.norm_eps > 0:
            raise DitkitError(f"model.theta is above 1 and norm_eps above 0, not {self.theta} and {self.norm_eps}")

    def example(self, batch: int) -> Conditioning:
        """Captions of zeros, as long as they get."""
        return Conditioning(text=Tokens.zeros(batch, self.text_length, self.text_dim))

    def build(self, seed: int = 0) -> ZImage:
        """The network with initial weights."""
        return instantiate(ZImage, self, seed)


def block(config: ZImageConfig, modulated: bool = True) -> SandwichBlock:
    """Attention with qk-norm and SwiGLU of 8/3 of the width, without biases; the time's vector goes in as it is."""
    dim, eps = config.hidden_size, config.norm_eps
    return SandwichBlock(
        dim,
        attn=Attention(dim, config.num_heads, qk_norm="head", fused=False, bias=False, eps=1e-5),
        mlp=SwiGLU(dim, int(dim / 3 * 8), bias=False, fused=False),
        given=min(dim, GIVEN) if modulated else None,
        silu=False,
        eps=eps,
    )


class Slots(NamedTuple):
    """A padded sequence of segments. For each slot: its segment, its time, the token in it, whether there is one (or a
    pad), and whether the slot is used at all."""

    segment: Int[Tensor, "b n"]
    time: Int[Tensor, "b n"]
    token: Int[Tensor, "b n"]
    real: Bool[Tensor, "b n"]
    used: Bool[Tensor, "b n"]


class Stream(NamedTuple):
    """Tokens of one kind: their places (time, row, column), which may be attended to, which belong to clean data."""

    place: Int[Tensor, "b n 3"]
    used: Bool[Tensor, "b n"]
    clean: Bool[Tensor, "b n"]


def canonical(n: int) -> int:
    """The length to which n tokens are padded."""
    return n + -n % MULTIPLE


def starts(lengths: Int[Tensor, "b s"]) -> Int[Tensor, "b s"]:
    """Times of the first tokens of segments: from 1 on, two times left free between segments, for an image and for its
    features."""
    return 1 + (lengths + 2).cumsum(1) - (lengths + 2)


def slots(lengths: Int[Tensor, "b s"], total: int, omni: bool) -> Slots:
    """Segments one after another, each padded to its canonical length. Times of pads count on; Omni's stand at 0."""
    full = lengths + -lengths % MULTIPLE
    ends, slot = full.cumsum(1), torch.arange(total, device=lengths.device)
    segment = (slot[:, None] >= ends[:, None]).sum(-1)
    used = segment < lengths.shape[1]
    segment = segment.clamp(max=lengths.shape[1] - 1)

    def of(values: Int[Tensor, "b s"]) -> Int[Tensor, "b n"]:
        return values.gather(1, segment)

    within = slot - of(ends - full)
    real = used & (within < of(lengths))
    token = torch.where(real, of(lengths.cumsum(1) - lengths) + within, 0)
    time = of(starts(lengths)) + within
    return Slots(segment, torch.where(real, time, 0) if omni else time, token, real, used)


def grids(times: Int[Tensor, "b r"], rows: Int[Tensor, "h"], columns: Int[Tensor, "w"], clean: bool) -> Stream:
    """r equal grids of tokens, each at its time, row by row; the pads of each are at the origin."""
    grid = torch.stack(torch.meshgrid(rows, columns, indexing="ij"), dim=-1).flatten(0, 1)
    (b, r), n = times.shape, len(grid)
    place = torch.cat((times[..., None, None].expand(b, r, n, 1), grid.expand(b, r, n, 2)), dim=-1)
    place = F.pad(place, (0, 0, 0, canonical(n) - n)).flatten(1, 2)
    used = torch.ones_like(place[..., 0], dtype=torch.bool)
    return Stream(place, used, used if clean else ~used)


def padded(x: Float[Tensor, "b n d"], token: Float[Tensor, "1 d"]) -> Float[Tensor, "b m d"]:
    """Learned tokens up to the canonical length."""
    b, n, d = x.shape
    return torch.cat((x, token.expand(b, canonical(n) - n, d)), dim=1)


class ZImage(Model):
    """Single-stream text-to-image transformer. Raises ValueError for an x that its patches do not tile."""

    plan = Plan(shard=("noise_refiner", "context_refiner", "blocks"))

    def __init__(self, config: ZImageConfig):
        super().__init__()
        self.config = config
        dim, eps, patch = config.hidden_size, config.norm_eps, config.patch_size
        given = min(dim, GIVEN)
        if dim != config.num_heads * sum(config.axes):
            raise ValueError(
                f"hidden_size {dim} is not num_heads {config.num_heads} x {sum(config.axes)}, the sum of axes"
            )

        def stack(depth: int, modulated: bool) -> nn.ModuleList:
            return nn.ModuleList(block(config, modulated) for _ in range(depth))

        def embedder(size: int) -> nn.Sequential:
            return nn.Sequential(RMSNorm(size, eps), nn.Linear(size, dim))

        self.x_embedder = nn.Linear(patch * patch * config.in_channels, dim)
        self.x_pad_token = nn.Parameter(torch.zeros(1, dim))
        self.t_embedder = TimestepEmbedder(given, hidden=1024)
        self.cap_embedder = embedder(config.text_dim)
        self.cap_pad_token = nn.Parameter(torch.zeros(1, dim))
        self.noise_refiner = stack(config.refiner_depth, True)
        self.context_refiner = stack(config.refiner_depth, False)
        if config.vision_dim:
            self.siglip_embedder = embedder(config.vision_dim)
            self.siglip_pad_token = nn.Parameter(torch.zeros(1, dim))
            self.siglip_refiner = stack(config.refiner_depth, False)
        self.blocks = stack(config.depth, True)
        features = patch * patch * config.in_channels
        self.final_layer = FinalLayer(dim, features, layer_norm(dim), given=given, shift=False)

    def init_weights(self, rng: Rng) -> None:
        """adaLN-Zero's start, and pad tokens from N(0, 0.02^2): how the authors begin is not published."""
        init_adaln_zero(self, rng.generator)
        for name, parameter in self.named_parameters():
            if name.endswith("pad_token"):
                nn.init.normal_(parameter, std=0.02, generator=rng.generator(name))

    def prepare(self, cond: Conditioning, shape: Sequence[int], times: Sequence[float] = ()) -> Conditioning:
        """Refined captions and features, embedded references, rotations of all tokens, and which may be attended to.

        The blocks of `context_refiner` and `siglip_refiner` run here; no edit sees them. Raises DitkitError where the
        caption is missing or does not fit, and for references without the segments between which they stand.
        """
        text, lengths, references = self._captions(cond, shape[0])
        omni, patch = "segments" in cond.scalars, self.config.patch_size
        seen = slots(lengths, canonical(text.values.shape[1]) + MULTIPLE * (lengths.shape[1] - 1), omni)
        values = text.values.gather(1, seen.token[..., None].expand(-1, -1, text.values.shape[2]))
        values = values.masked_fill(~seen.real[..., None], 0).to(self.x_embedder.weight.dtype)
        tokens = torch.where(seen.real[..., None], self.cap_embedder(values), self.cap_pad_token)
        caption = Stream(F.pad(seen.time[..., None], (0, 2)), seen.used, seen.segment < references)
        context = [self._refined(tokens, caption, self.context_refiner)]

        # an image stands behind the pads of the caption, or, in Omni, behind the last token of a segment
        behind = (starts(lengths) + lengths)[:, : references + 1] if omni else seen.used.sum(1, keepdim=True) + 1
        rows, columns = (torch.arange(side // patch, device=lengths.device) for side in shape[-2:])
        images, given = [grids(behind[:, -1:], rows, columns, clean=False)], [caption]
        if references:
            assert cond.references is not None
            rows, columns = (torch.arange(side // patch, device=lengths.device) for side in cond.references.shape[-2:])
            images.append(grids(behind[:, :-1], rows, columns, clean=True))
            tokens = padded(
                self.x_embedder(patchify(cond.references.flatten(0, 1).to(values.dtype), patch)), self.x_pad_token
            )
            cond = cond.with_static(references=tokens.unflatten(0, (-1, references)).flatten(1, 2))
            if cond.vision is not None:
                tokens, features = self._features(cond, behind[:, :-1] + 1)
                given.append(features)
                context.append(self._refined(tokens, features, self.siglip_refiner))
        place, used, clean = (torch.cat(parts, dim=1) for parts in zip(*images, *given, strict=True))
        if omni:
            cond = cond.with_static(clean=clean)
        return cond.with_static(context=torch.cat(context, dim=1), rope=self._rope(place), mask=used)

    def _captions(self, cond: Conditioning, batch: int) -> tuple[Tokens, Int[Tensor, "b s"], int]:
        """The caption, the lengths of its segments, and the number of references."""
        config, text = self.config, given_text(cond, self.config.text_dim, batch)
        segments = cond.scalars.get("segments")
        count = 0 if cond.references is None else cond.references.shape[1]
        if cond.vision is not None and (config.vision_dim != cond.vision.shape[-1] or not count):
            raise DitkitError(
                f"features {list(cond.vision.shape)} are given to {count} references and vision_dim={config.vision_dim}"
            )
        if segments is None and count:
            raise DitkitError('references stand between segments of the caption: give scalars["segments"] [b r + 2]')
        if segments is not None and segments.shape[1] != count + 2:
            raise DitkitError(f"{count} references stand between {count + 2} segments, not {segments.shape[1]}")
        lengths = text.mask.sum(1, keepdim=True) if segments is None else segments.long()
        return text.padded(max(1, text.mask.shape[1])), lengths, count

    def _features(self, cond: Conditioning, times: Int[Tensor, "b r"]) -> tuple[Float[Tensor, "b n d"], Stream]:
        """SigLIP features of references, spread over the rows and columns of the latents; for the image that is made
        there are pads."""
        assert cond.vision is not None
        assert cond.references is not None
        r, (h, w) = cond.vision.shape[1], cond.vision.shape[2:4]
        # authors' code: counted in pixels of the latent, where the image itself is counted in patches
        rows, columns = (
            (torch.arange(n, device=times.device) / max(n - 1, 1) * (side - 1)).long()
            for n, side in zip((h, w), cond.references.shape[-2:], strict=True)
        )
        features = grids(times, rows, columns, clean=True)
        tokens = self.siglip_embedder(cond.vision.flatten(0, 1).flatten(1, 2).to(self.x_embedder.weight.dtype))
        tokens = padded(tokens, self.siglip_pad_token).unflatten(0, (-1, r)).flatten(1, 2)
        pads = self.siglip_pad_token.expand(len(tokens), MULTIPLE, -1)
        place, used = F.pad(features.place, (0, 0, 0, MULTIPLE)), F.pad(features.used, (0, MULTIPLE), value=True)
        return torch.cat((tokens, pads), dim=1), Stream(place, used, F.pad(features.clean, (0, MULTIPLE)))

    def _rope(self, place: Int[Tensor, "b n 3"]) -> Float[Tensor, "b 2 n hd"]:
        return place_rope(place, self.config.axes, self.config.theta)

    def _refined(self, x: Float[Tensor, "b n d"], stream: Stream, blocks: nn.ModuleList) -> Float[Tensor, "b n d"]:
        return refined(blocks, x, over_heads(self._rope(stream.place)), stream.used)

    def forward(
        self, x: Float[Tensor, "b c h w"], t: Float[Tensor, "b"], cond: Conditioning, *, edit: Edit | None = None
    ) -> Float[Tensor, "b c h w"]:
        """t in [0, 1], 1 = data; the result is the velocity from noise to data. Raises DitkitError as `prepare`."""
        config = self.config
        grid = patch_grid(x, config.in_channels, config.patch_size)
        if "context" not in cond.static:
            cond = self.prepare(cond, x.shape)
        static, rope = cond.static, over_heads(cond.static["rope"])
        image = padded(self.x_embedder(patchify(x, config.patch_size)), self.x_pad_token)
        own = c = self.t_embedder(1000 * t)
        if "references" in static:
            image = torch.cat((image, static["references"]), dim=1)
        n = image.shape[1]
        if "clean" in static:
            c = torch.where(
                static["clean"][..., None], self.t_embedder(torch.full_like(t, 1000.0))[:, None], c[:, None]
            )
        first = c[:, :n] if c.ndim == 3 else c
        for i, blk in enumerate(self.noise_refiner):
            image = visit(edit, f"noise_refiner.{i}", blk, image, first, rope[..., :n, :])
        h = torch.cat((image, static["context"]), dim=1)
        for i, blk in enumerate(self.blocks):
            h = visit(edit, f"blocks.{i}", blk, h, c, rope, static["mask"][:, None, None])
        rows, columns = grid
        return unpatchify(self.final_layer(h[:, : rows * columns], own), grid, config.patch_size)


register_models(
    {
        "z_image": ZImageConfig(),
        "z_image_tiny": ZImageConfig(
            input_size=32, in_channels=4, hidden_size=128, depth=4, num_heads=4, axes=(8, 12, 12), text_dim=64,
            text_length=77,
        ),
    }
)  # fmt: skip
