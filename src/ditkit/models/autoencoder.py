"""A small convolutional autoencoder that starts as principal components and learns what they leave out.

Encoder: x -> pixels of a patch become channels -> 3 x 3 convolution -> residual blocks (norm, SiLU, convolution, twice;
He et al. 2016, arXiv 1603.05027), at each further level with half the rows and columns: 2 x 2 pixels become channels
(Shi et al. 2016, arXiv 1609.05158), and a 1 x 1 convolution sets the width -> norm, SiLU, convolution -> what is added
to the first principal components of the patches of factor x factor pixels, and the logarithm of a variance: a Gaussian
for each latent (Kingma & Welling 2014, arXiv 1312.6114).

Decoder: the same backwards; its output is added to the image that the components alone would give. Both additions
start at 0, so the first step begins at the best linear autoencoder of patches, and never has to find it. The components
are found from the training images when training begins and then stay. The design is ours. An autoencoder has no time
and is given nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

from jaxtyping import Float
from torch import Tensor, nn

from ..conditioning import Conditioning
from ..config import DitkitError, register
from ..layers import Edit, GroupNorm, PatchComponents, ResBlock, init_convolutional, patch_grid, visit
from ..rng import Rng
from .registry import Model, Plan, TiledConfig, at_least_one, instantiate

__all__ = ["Autoencoder", "AutoencoderConfig"]

LOWEST, HIGHEST = -30.0, 20.0  # of a log-variance, as in latent diffusion (Rombach et al. 2022)


@register("model", "autoencoder")
@dataclass(frozen=True)
class AutoencoderConfig(TiledConfig):
    """Everything about an autoencoder; the defaults are f8c16 with 0.9M parameters."""

    input_size: int | tuple[int, int] = 64
    """Side, or (rows, columns), of the image. Others are accepted, too: no weight depends on it."""
    in_channels: int = 3
    factor: int = 8
    """Pixels of an image in one latent, along a side: a power of two."""
    latent_channels: int = 16
    widths: tuple[int, ...] = (48, 96)
    """Channels of the blocks of each level; the last level is at the resolution of the latents, and each one before it
    at twice that of the next."""
    encoder_depths: tuple[int, ...] = (1, 1)
    """Residual blocks of each level of the encoder."""
    decoder_depths: tuple[int, ...] = (2, 3)
    """Residual blocks of the same levels of the decoder."""
    groups: int = 8
    """Of the norms."""
    log_variance: float = -6.0
    """Of all latents before training."""

    def __post_init__(self) -> None:
        at_least_one(self, "in_channels", "factor", "latent_channels", "groups")
        levels = len(self.widths)
        if not levels or {len(self.encoder_depths), len(self.decoder_depths)} != {levels}:
            raise DitkitError(
                "model.widths, model.encoder_depths and model.decoder_depths have one number for each level, and have "
                f"{levels}, {len(self.encoder_depths)} and {len(self.decoder_depths)}"
            )
        if self.factor % 2 ** (levels - 1):
            raise DitkitError(f"model.factor {self.factor} cannot be halved for {levels} levels: give fewer widths")
        if min(self.widths) < 1 or min(*self.encoder_depths, *self.decoder_depths) < 0:
            raise DitkitError(f"model.widths are at least 1, and depths not negative: {self}")
        if self.latent_channels > self.in_channels * self.factor**2:
            raise DitkitError(
                f"patches of {self.in_channels} x {self.factor} x {self.factor} have no {self.latent_channels} "
                "components: choose fewer model.latent_channels or a larger model.factor"
            )

    @property
    def patch(self) -> int:
        """The side of the patches whose pixels become channels before the first convolution."""
        return self.factor // 2 ** (len(self.widths) - 1)

    @property
    def tile(self) -> int:
        return self.factor

    @property
    def tiled_by(self) -> str:
        return f"latents of {self.factor} pixels: change the factor (--model.factor)"

    @property
    def length(self) -> int:
        """The number of latents."""
        _, height, width = self.shape
        return height * width // self.factor**2

    def build(self, seed: int = 0) -> Autoencoder:
        """The network with initial weights."""
        return instantiate(Autoencoder, self, seed)


class Autoencoder(Model):
    """Encoder and decoder around principal components. Raises ValueError for an x that the factor does not tile."""

    plan = Plan(shard=("encoder", "decoder"))

    def __init__(self, config: AutoencoderConfig):
        super().__init__()
        self.config = config
        widths, groups, latents = config.widths, config.groups, config.latent_channels
        pixels = config.in_channels * config.patch**2

        def blocks(width: int, depth: int) -> list[nn.Module]:
            return [ResBlock(width, width, groups=groups) for _ in range(depth)]

        def head(width: int, outputs: int) -> list[nn.Module]:
            return [GroupNorm(groups, width), nn.SiLU(), nn.Conv2d(width, outputs, 3, padding=1)]

        down: list[nn.Module] = [nn.PixelUnshuffle(config.patch), nn.Conv2d(pixels, widths[0], 3, padding=1)]
        down += blocks(widths[0], config.encoder_depths[0])
        for (wide, narrow), depth in zip(pairwise(widths), config.encoder_depths[1:], strict=True):
            down += [nn.PixelUnshuffle(2), nn.Conv2d(4 * wide, narrow, 1), *blocks(narrow, depth)]
        up: list[nn.Module] = [nn.Conv2d(latents, widths[-1], 3, padding=1)]
        up += blocks(widths[-1], config.decoder_depths[-1])
        for (narrow, wide), depth in zip(pairwise(widths[::-1]), config.decoder_depths[-2::-1], strict=True):
            up += [nn.Conv2d(narrow, 4 * wide, 1), nn.PixelShuffle(2), *blocks(wide, depth)]
        self.components = PatchComponents(config.in_channels, config.factor, latents)
        self.encoder = nn.ModuleList([*down, *head(widths[-1], 2 * latents)])
        self.decoder = nn.ModuleList([*up, *head(widths[0], pixels), nn.PixelShuffle(config.patch)])

    def init_weights(self, rng: Rng) -> None:
        """What the encoder adds to the mean, the decoder to the image and a block to its input are 0; all else follows
        torch's own law. The components are those of a patch's pixels until `meet`."""
        out = self.encoder[-1]
        init_convolutional(self, rng.generator, zero=(out, self.decoder[-2]))
        nn.init.constant_(out.bias.data[self.config.latent_channels :], self.config.log_variance)  # type: ignore[index]
        self.components.reset()

    def meet(self, examples: Iterable[Float[Tensor, "b c h w"]]) -> None:
        """The components of the patches of the examples."""
        self.components.find(examples)

    def encode(
        self, x: Float[Tensor, "b c h w"], *, edit: Edit | None = None
    ) -> tuple[Float[Tensor, "b k h/f w/f"], Float[Tensor, "b k h/f w/f"]]:
        """Mean and log-variance of the latents of images in [-1, 1], in float32."""
        patch_grid(x, self.config.in_channels, self.config.factor)
        h = x
        for i, layer in enumerate(self.encoder):
            h = visit(edit, f"encoder.{i}", layer, h)
        added, log_variance = h.float().chunk(2, dim=1)
        return self.components.project(x) + added, log_variance.clamp(LOWEST, HIGHEST)

    def decode(self, z: Float[Tensor, "b k h/f w/f"], *, edit: Edit | None = None) -> Float[Tensor, "b c h w"]:
        """Images of latents, in float32 and not clipped."""
        h = z
        for i, layer in enumerate(self.decoder):
            h = visit(edit, f"decoder.{i}", layer, h)
        return self.components.unproject(z) + h.float()

    def forward(
        self, x: Float[Tensor, "b c h w"], t: Tensor, cond: Conditioning, *, edit: Edit | None = None
    ) -> Float[Tensor, "b c h w"]:
        """x through the means of its latents; t and cond are not looked at."""
        mean, _ = self.encode(x, edit=edit)
        return self.decode(mean.to(x.dtype), edit=edit)
