"""Training an autoencoder by the same loop: the meaning of its output, and what is minimised.

A network that reconstructs is no denoiser: it has no path, no time and nothing to sample from. It has `encode(x) ->
(mean, log-variance)` of a Gaussian for each latent and `decode(z) -> x`, and is trained as a variational autoencoder
(Kingma & Welling 2014, arXiv 1312.6114, equations 7 to 10) with a small weight on the KL divergence, as latent
diffusion does (Rombach et al. 2022, arXiv 2112.10752, section G).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NoReturn, Protocol, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from ..conditioning import Conditioning
from ..config import DitkitError, register
from ..rng import Draw, Rng
from .objective import Loss
from .posterior import gaussian_kl

__all__ = ["Autoencoding", "Latents", "Reconstruction", "Reconstructor"]


class Latents(Protocol):
    """A network with latents between an encoder and a decoder."""

    encoder: nn.ModuleList

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]: ...

    def decode(self, z: Tensor) -> Tensor: ...


@register("denoiser", "reconstruction")
@dataclass(frozen=True)
class Reconstruction:
    """The meaning of a network that gives back what it is shown: there is nothing else to say."""

    vocab: ClassVar[int] = 0

    def fitted(self, vocab: int) -> Reconstruction:
        """Raises DitkitError for tokens."""
        if vocab:
            raise DitkitError("an autoencoder is for images, and the data are tokens: choose another recipe")
        return self

    def of(self, model: Any) -> Reconstructor:
        """The network with this meaning. Raises DitkitError for one without latents."""
        if not (hasattr(model, "encode") and hasattr(model, "decode")):
            raise DitkitError(
                f"the denoiser reconstruction is for an autoencoder, not {type(model).__name__}: choose another"
            )
        return Reconstructor(model)


class Reconstructor:
    """An autoencoder where a training has its denoiser."""

    def __init__(self, model: Latents):
        self.model = model

    def __call__(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """x through the means of its latents."""
        return self.model.decode(self.model.encode(x)[0])

    def check(self, *args: Any, **needs: Any) -> NoReturn:
        """Raises DitkitError: whoever asks for times and spaces is for a denoiser."""
        raise DitkitError(
            "an autoencoder has no time and no noise, and the objective is for a denoiser: use --objective autoencoding"
        )


@register("objective", "autoencoding")
@dataclass(frozen=True)
class Autoencoding:
    """Squared error of the image that is decoded from a draw of the latents, plus `kl` times their KL divergence.

    The error is the mean over pixels in [-1, 1]; the divergence from N(0, 1) is in nats, the mean over latents. With
    `perceptual` above 0, that times the distance in the feature maps of `features` is added: at each place the squared
    distance of the maps at unit length, mean over places, sum over maps (LPIPS, Zhang et al. 2018, arXiv 1801.03924,
    equation 1, all its weights 1). `alignment` adds its own term. `shift`: before all this each image is moved by up to
    so many pixels either way along both axes, and its edge continued: a small data set then has patches at all offsets.
    """

    kl: float = 1e-4
    perceptual: float = 0.0
    features: Any = None
    """An encoder with feature maps that gradients go through: efficientnet."""
    alignment: Any = None
    """vision: latents that are alike where the features of a frozen encoder are (VA-VAE)."""
    shift: int = 0

    def __post_init__(self) -> None:
        if not (self.kl >= 0 and self.perceptual >= 0 and self.shift >= 0):
            raise DitkitError(
                "objective.kl, objective.perceptual and objective.shift must not be negative, they are "
                f"{self.kl}, {self.perceptual} and {self.shift}"
            )
        if self.perceptual and not hasattr(self.features, "maps"):
            raise DitkitError("objective.perceptual needs an encoder with maps: set --objective.features efficientnet")

    def check(self, denoiser: Any) -> None:
        if not isinstance(denoiser, Reconstructor):
            raise DitkitError(
                "the objective autoencoding is for an autoencoder, not a denoiser: use --denoiser reconstruction"
            )

    def learn(self, denoiser: Any, rng: Rng) -> Any:
        if self.alignment is None:
            return self
        return _Aligned(self, self.alignment, denoiser, rng)

    def loss(self, denoiser: Any, x0: Tensor, cond: Conditioning, rng: Draw, data: Tensor | None = None) -> Loss:
        """Draws "posterior", and "shift". Raises DitkitError where the alignment learns."""
        if self.alignment is not None:
            raise DitkitError("the alignment learns: take the loss of objective.learn(denoiser, rng)")
        terms, nats, _, _ = self.terms(denoiser.model, x0, rng)
        return _loss(terms, nats)

    def terms(
        self, model: Latents, x0: Float[Tensor, "b c h w"], rng: Draw
    ) -> tuple[dict[str, Tensor], Float[Tensor, "b"], Float[Tensor, "b k h w"], Float[Tensor, "b c h w"]]:
        """Terms by name, nats for each latent, the draw of the latents, and the images as they were moved."""
        x = shifted(x0, rng("shift", "uniform", (2,)), self.shift) if self.shift else x0
        mean, log_variance = model.encode(x)
        noise = rng("posterior", "normal", mean.shape[1:]).to(mean)
        z = mean + (0.5 * log_variance).exp() * noise
        y = model.decode(z)
        zero = torch.zeros_like(mean)
        nats = gaussian_kl(mean, log_variance, zero, zero).flatten(1).mean(1)
        terms = {"mse": (y - x).square().flatten(1).mean(1), "kl": self.kl * nats}
        if self.perceptual:
            with torch.no_grad():
                wanted = self.features.maps(x)
            terms["perceptual"] = self.perceptual * perceptual_distance(self.features.maps(y), wanted)
        return terms, nats, z, x


def _loss(terms: Mapping[str, Tensor], nats: Float[Tensor, "b"]) -> Loss:
    return Loss(terms, torch.zeros(len(nats)), {"kl_nats": nats})


def shifted(x: Float[Tensor, "b c h w"], draws: Float[Tensor, "b 2"], most: int) -> Float[Tensor, "b c h w"]:
    """Each image moved by whole pixels in [-most, most], rows and columns; draws are uniform on (0, 1)."""
    height, width = x.shape[2:]
    first: Int[Tensor, "b 2"] = (draws * (2 * most + 1)).long().to(x.device)
    rows = (torch.arange(height, device=x.device) + first[:, :1] - most).clamp(0, height - 1)
    columns = (torch.arange(width, device=x.device) + first[:, 1:] - most).clamp(0, width - 1)
    samples = torch.arange(len(x), device=x.device)[:, None, None]
    return x.movedim(1, 3)[samples, rows[:, :, None], columns[:, None, :]].movedim(3, 1)


def perceptual_distance(found: list[Tensor], wanted: list[Tensor]) -> Float[Tensor, "b"]:
    """Sum over feature maps [b c h w] of the mean over places of the squared distance at unit length."""
    return torch.stack(
        [
            (F.normalize(a.float(), dim=1) - F.normalize(b.float(), dim=1)).square().sum(1).flatten(1).mean(1)
            for a, b in zip(found, wanted, strict=True)
        ]
    ).sum(0)


@register("alignment", "vision")
@dataclass(frozen=True)
class VisionAlignment:
    """The loss of VA-VAE (Yao & Wang 2025, arXiv 2501.01423, section 3.2): latents led by a frozen encoder of images.

    weight * adaptive * (mcos + mdms). mcos: the mean over places of ReLU(1 - cosine_margin - cos(W z, f)), W a learned
    matrix from latents to features (equation 5's marginal cosine similarity). mdms: the mean over pairs of places of
    ReLU(|cos(z_i, z_j) - cos(f_i, f_j)| - distance_margin), the marginal distance matrix similarity. adaptive: the norm
    of the gradient of the reconstruction at the encoder's last convolution over that of mcos + mdms, at most 1e8.

    Not followed: their autoencoder (VQGAN's with a discriminator, f16d32, DINOv2 or MAE; ours is small and sees
    EfficientNet-lite0 unless told otherwise), and their schedule of weights and margins. Here z is the draw of the
    latents, the pairs are compared without W, and with train.accumulate each part has an adaptive weight of its own.
    """

    encoder: Any = None
    """What sees the images; it must be chosen: efficientnet, transformers."""
    weight: float = 0.1
    cosine_margin: float = 0.5
    distance_margin: float = 0.25

    def __post_init__(self) -> None:
        if not self.weight > 0 or not 0 <= self.cosine_margin <= 2 or not 0 <= self.distance_margin <= 2:
            raise DitkitError(
                "alignment.weight must be above 0 and its margins in [0, 2], not "
                f"{self.weight}, {self.cosine_margin} and {self.distance_margin}"
            )

    def distances(
        self, z: Float[Tensor, "b k h w"], seen: Float[Tensor, "b d h w"], features: Float[Tensor, "b d h w"]
    ) -> Float[Tensor, "b"]:
        """mcos + mdms of each sample; seen = W z."""
        cosine = F.cosine_similarity(seen.float(), features.float(), dim=1).flatten(1)
        mcos = F.relu(1 - self.cosine_margin - cosine).mean(1)
        similar = [torch.einsum("bci,bcj->bij", u, u) for u in (_unit(z), _unit(features))]
        mdms = F.relu((similar[0] - similar[1]).abs() - self.distance_margin).flatten(1).mean(1)
        return mcos + mdms


def _unit(x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c n"]:
    return F.normalize(x.float().flatten(2), dim=1)


class _Aligned(nn.Module):
    """Autoencoding with the alignment's matrix."""

    def __init__(self, base: Autoencoding, alignment: VisionAlignment, denoiser: Reconstructor, rng: Rng):
        super().__init__()
        if alignment.encoder is None:
            raise DitkitError("the alignment needs an encoder: set --objective.alignment.encoder efficientnet")
        self.base, self.alignment = base, alignment
        channels = cast(Any, denoiser.model).config.latent_channels
        bound = channels**-0.5
        matrix = torch.empty(alignment.encoder.width, channels, 1, 1)
        nn.init.uniform_(matrix, -bound, bound, generator=rng.generator("alignment"))
        self.matrix = nn.Parameter(matrix)

    def check(self, denoiser: Any) -> None:
        self.base.check(denoiser)

    def learn(self, denoiser: Any, rng: Rng) -> Any:
        return self

    def loss(self, denoiser: Any, x0: Tensor, cond: Conditioning, rng: Draw, data: Tensor | None = None) -> Loss:
        """Adds the term "alignment"."""
        terms, nats, z, x = self.base.terms(denoiser.model, x0, rng)
        with torch.no_grad():
            images = (x * 127.5 + 127.5).clamp(0, 255).round().to(torch.uint8)
            features = self.alignment.encoder(images)
            if features.shape[2:] != z.shape[2:]:
                features = F.interpolate(features, size=z.shape[2:], mode="bilinear", antialias=True)
        found = self.alignment.distances(z, F.conv2d(z, self.matrix), features)
        adaptive = 1.0
        if torch.is_grad_enabled():
            last = denoiser.model.encoder[-1].weight
            error = torch.stack([value for name, value in terms.items() if name != "kl"]).sum(0)
            norms = [torch.autograd.grad(v.mean(), last, retain_graph=True)[0].norm() for v in (error, found)]
            adaptive = float((norms[0] / (norms[1] + 1e-6)).clamp(max=1e8))
        return _loss({**terms, "alignment": self.alignment.weight * adaptive * found}, nats)
