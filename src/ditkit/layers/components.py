"""Principal components of patches (Pearson 1901; Hotelling 1933): how they are found, and images through them.

One patch is c x f x f numbers of an image, and z = V^T (patch - mean) / std its first components: each has mean 0 and
standard deviation 1 on the images that it was found from, and the first ones hold the most of the variance.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from .precision import without_autocast

__all__ = ["PatchComponents", "principal_components", "project", "unproject"]

_FLAT = 1e-8
"""A variance, of pixels in [-1, 1], below which a component is the same everywhere but for rounding."""


def principal_components(
    images: Iterable[Float[Tensor, "b c h w"]], factor: int, channels: int
) -> dict[str, Float[Tensor, "..."]]:
    """mean [c f f], components [k c f f] and std [k] of all patches, found in float64; k = channels, f = factor.

    The same images give the same signs. A component that is the same everywhere is not scaled. Raises ValueError if
    there are no images.
    """
    count, total, scatter, patch = 0, torch.zeros(()), torch.zeros(()), (0, factor, factor)
    for part in images:
        patch = (part.shape[1], factor, factor)
        rows = F.pixel_unshuffle(part, factor).double().movedim(1, 3).flatten(0, 2)
        total = total + rows.sum(0)
        scatter = scatter + rows.T @ rows
        count += len(rows)
    if not count:
        raise ValueError("principal components are found from images, and there are none")
    mean = total / count
    variance, vectors = torch.linalg.eigh(scatter / count - torch.outer(mean, mean))  # ascending
    variance, vectors = variance.flip(0)[:channels], vectors.flip(1)[:, :channels].T
    # an eigenvector is one up to its sign: the first entry that is not far below the largest is made positive
    large = (vectors.abs() >= 0.5 * vectors.abs().amax(1, keepdim=True)).int().argmax(1, keepdim=True)
    vectors = vectors * vectors.gather(1, large).sign()
    std = torch.where(variance > _FLAT, variance.clamp(min=_FLAT).sqrt(), 1.0)
    found = {"mean": mean.view(patch), "components": vectors.reshape(-1, *patch), "std": std}
    return {name: value.float().contiguous() for name, value in found.items()}


def project(
    x: Float[Tensor, "b c h w"],
    mean: Float[Tensor, "c f f"],
    components: Float[Tensor, "k c f f"],
    std: Float[Tensor, "k"],
) -> Float[Tensor, "b k h/f w/f"]:
    """The components of the patches of images, in float32."""
    with without_autocast(x):
        patches = F.pixel_unshuffle(x.float(), mean.shape[-1]) - mean.float().flatten()[:, None, None]
        return torch.einsum("bphw,kp->bkhw", patches, components.float().flatten(1) / std.float()[:, None])


def unproject(
    z: Float[Tensor, "b k h/f w/f"],
    mean: Float[Tensor, "c f f"],
    components: Float[Tensor, "k c f f"],
    std: Float[Tensor, "k"],
) -> Float[Tensor, "b c h w"]:
    """The nearest images that these components can make, in float32: the inverse of `project` where they suffice."""
    with without_autocast(z):
        patches = torch.einsum("bkhw,kp->bphw", z.float(), components.float().flatten(1) * std.float()[:, None])
        return F.pixel_shuffle(patches + mean.float().flatten()[:, None, None], mean.shape[-1])


class PatchComponents(nn.Module):
    """Components of patches as weights of a network that no optimiser changes; before `found` they are pixels."""

    def __init__(self, channels: int, factor: int, components: int):
        super().__init__()
        patch = (channels, factor, factor)
        self.mean, self.components, self.std = (
            nn.Parameter(torch.empty(shape), requires_grad=False) for shape in (patch, (components, *patch), components)
        )

    @torch.no_grad()
    def reset(self) -> None:
        """The first numbers of a patch, as they are."""
        self.mean.zero_()
        self.std.fill_(1)
        rows = self.components.flatten(1)
        rows.copy_(torch.eye(*rows.shape))

    @torch.no_grad()
    def find(self, images: Iterable[Float[Tensor, "b c h w"]]) -> None:
        """Those of the patches of these images."""
        for name, value in principal_components(images, self.mean.shape[-1], len(self.std)).items():
            self.get_parameter(name).copy_(value)

    def project(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b k h/f w/f"]:
        return project(x, self.mean, self.components, self.std)

    def unproject(self, z: Float[Tensor, "b k h/f w/f"]) -> Float[Tensor, "b c h w"]:
        return unproject(z, self.mean, self.components, self.std)
