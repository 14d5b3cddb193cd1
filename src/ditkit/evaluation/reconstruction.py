"""Measure an autoencoder: what comes back of held-out images, and what its latents are like."""

from __future__ import annotations

import math
from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from ..config import DitkitError
from ..data import Dataset, evenly
from ..diffusion.posterior import gaussian_kl
from ..reconstructions import Reconstructions

__all__ = ["measure_reconstructions", "psnr", "squared_errors"]

_AT_ONCE = 64
SHOWN = 60
"""Images in the report's picture, in rows of ten: the originals, their components, their reconstructions."""


def squared_errors(a: UInt8[Tensor, "n c h w"], b: UInt8[Tensor, "n c h w"]) -> Float[Tensor, "n"]:
    """The mean squared difference of each image, in bytes and float64."""
    return (a.double() - b.double()).square().flatten(1).mean(1)


def psnr(error: Tensor, numbers: int) -> Tensor:
    """Peak signal-to-noise ratio in dB of mean squared errors of bytes: 10 log10(255^2 / error).

    An image of `numbers` numbers without any error counts as if one of them were wrong by one.
    """
    return 10 * torch.log10(255**2 / error.clamp(min=1 / numbers))


@torch.no_grad()
def measure_reconstructions(
    trained: Reconstructions, data: Dataset, count: int
) -> tuple[dict[str, float | None], dict[str, Any], UInt8[Tensor, "n c h w"]]:
    """Numbers, protocol, and images to show, of at most `count` held-out images, spread evenly.

    Raises DitkitError for fewer than 10.
    """
    count = min(count, len(data.heldout))
    if count < 10:
        raise DitkitError(
            f"an autoencoder is measured on at least 10 held-out images, and there are {count}: hold out more of the "
            "data (--data.holdout), before it is trained"
        )
    mean, std = (v[:, None, None] for v in trained.statistics(data.train))
    chosen = evenly(data.heldout, count)
    errors: dict[str, list[Tensor]] = {"psnr": [], "psnr_pca": []}
    nats, latents, shown = [], [], []
    for part in chosen.split(_AT_ONCE):
        images = data.heldout.batch(part).data
        z, log_variance = trained.encode(images)
        found = {"psnr": trained.decode(z), "psnr_pca": trained.linear(images)}
        for name, other in found.items():
            errors[name].append(squared_errors(images, other))
        zero = torch.zeros_like(z)
        nats.append(gaussian_kl(z, log_variance, zero, zero).double().flatten(1).mean(1).cpu())
        latents.append(((z.cpu() - mean) / std).movedim(1, 3).flatten(0, 2))
        for rows in torch.arange(len(images)).split(10):
            if sum(map(len, shown)) < 3 * SHOWN and len(rows) == 10:
                shown += [images[rows], found["psnr_pca"][rows], found["psnr"][rows]]
    numbers: dict[str, float | None] = {}
    size = math.prod(data.shape)
    each = {name: psnr(torch.cat(parts), size) for name, parts in errors.items()}
    for name, parts in errors.items():
        numbers[name] = float(each[name].mean())
        numbers[f"{name}_error"] = float(each[name].std() / count**0.5)
        numbers[f"{name}_of_mean"] = float(psnr(torch.cat(parts).mean(), size))
    numbers["psnr_gain"] = float((each["psnr"] - each["psnr_pca"]).mean())
    numbers["kl"] = float(torch.cat(nats).mean())
    rows = torch.cat(latents)
    means, stds = rows.mean(0), rows.std(0)
    numbers |= {
        "latent_mean": float(means.abs().max()),
        "latent_std_least": float(stds.min()),
        "latent_std_most": float(stds.max()),
    }
    protocol = {
        "checkpoint": trained.origin,
        "reference": f"held-out part of {data.source}",
        "reference_images": count,
        "psnr": "of bytes after rounding, for each image, then the mean; _of_mean: of the mean squared error of all",
        "latents": "means of the posterior, normalised by channel with the statistics of the training images",
        "latent_means": [round(float(v), 4) for v in means],
        "latent_stds": [round(float(v), 4) for v in stds],
        "training_means": [round(float(v), 4) for v in mean.flatten()],
        "training_stds": [round(float(v), 4) for v in std.flatten()],
        "dtype": "float32",
        "device": str(trained.device),
    }
    return numbers, protocol, torch.cat(shown)
