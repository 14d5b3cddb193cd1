"""What samples are compared with: published statistics, read from their files, or images, seen once and kept."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from ..config import DitkitError
from ..files import atomic_write, cache_folder, sha256
from .moments import Gaussian, Moments
from .networks import Network, Seen
from .sources import DAMAGED, Images, images_of

__all__ = ["Reference", "look", "read_statistics", "reference_of_images"]


@dataclass(frozen=True)
class Reference:
    """Statistics of features, and where the images are there what the network says of them."""

    source: str
    sha256: str
    gaussian: Gaussian
    spatial: Gaussian | None = None
    seen: Seen | None = None


def look(network: Network, images: Images, batch: int = 64, what: str = "images") -> Seen:
    """What a network says of all images, batch by batch; grey ones as RGB. Raises DitkitError for no images."""
    parts = []
    with tqdm(total=images.count, unit="image", desc=f"looking at {what}", leave=False, dynamic_ncols=True) as bar:
        for part in images.batches(batch):
            if part.dtype != torch.uint8 or part.ndim != 4 or part.shape[1] not in (1, 3):
                raise DitkitError(f"images are uint8 [n, 1 or 3, h, w], not {part.dtype} {list(part.shape)}")
            parts.append(network(part.expand(-1, 3, -1, -1).contiguous()))
            bar.update(len(part))
    if not parts:
        raise DitkitError(f"there are no images to look at: {images.source}")
    return Seen.cat(parts)


def _moments(rows: Tensor) -> Gaussian:
    sums = Moments()
    for part in rows.split(4096):
        sums.add(part)
    return sums.gaussian()


def reference_of_images(network: Network, images: Images, cache: str = "") -> Reference:
    """The reference that images are, kept in the cache with its hashes: the same pixels are looked at once.

    cache: the folder, by default the one of `cache_folder`. Raises DitkitError where it cannot be written.
    """
    said = {"network": network.name, "weights_sha256": network.sha256, "images_sha256": images.sha256}
    said["count"] = str(images.count)
    name = f"{network.sha256[:16]}-{images.sha256[:16]}-{_slug(network.name)}"
    path = cache_folder(cache) / "statistics" / f"{name}.safetensors"
    kept = _kept(path, said)
    if kept is None:
        seen = look(network, images, what="the reference")
        kept = {"features": seen.features}
        for part, rows in (("", seen.features), ("spatial_", seen.spatial)):
            if rows is not None:
                gaussian = _moments(rows)
                kept |= {f"{part}mean": gaussian.mean, f"{part}covariance": gaussian.covariance}
        atomic_write(path, lambda file: save_file({k: v.contiguous() for k, v in kept.items()}, file))
        content = {**said, "source": images.source, "file_sha256": sha256(path)}
        atomic_write(path.with_suffix(".json"), json.dumps(content, indent=1) + "\n")
    spatial = None
    if "spatial_mean" in kept:
        spatial = Gaussian(kept["spatial_mean"], kept["spatial_covariance"], images.count)
    gaussian = Gaussian(kept["mean"], kept["covariance"], images.count)
    return Reference(images.source, images.sha256, gaussian, spatial, Seen(kept["features"]))


def _slug(name: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in name)


def _kept(path: Path, said: dict[str, str]) -> dict[str, Tensor] | None:
    """What the cache has of just these images and weights; None if it has nothing, or something damaged."""
    try:
        content = json.loads(path.with_suffix(".json").read_text())
        right = all(content.get(k) == v for k, v in said.items()) and content["file_sha256"] == sha256(path)
        return load_file(path) if right else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError):
        return None


def read_statistics(path: str | Path, network: Network) -> Reference:
    """Published statistics from a file.

    An .npz with mu and sigma, as JiT, clean-fid, EDM and TTUR have them, and ADM with mu_s and sigma_s besides, whose
    arr_0 are the images that precision and recall are against; or a .safetensors with mean and covariance, or mu and
    sigma. Raises DitkitError for a pickle, which is a program, for what is missing, and for features of another width.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise DitkitError(f"there is no file {path}")
    if path.suffix in (".pkl", ".pickle"):
        raise DitkitError(
            f"{path} is a pickle, which is a program and not read here; where you trust it, write the arrays of one "
            "metric as: numpy.savez('reference.npz', mu=ref['fid']['mu'], sigma=ref['fid']['sigma'])"
        )
    arrays = _arrays(path)

    def gaussian(end: str) -> Gaussian | None:
        for mean, covariance in (("mu", "sigma"), ("mean", "covariance")):
            if f"{mean}{end}" in arrays and f"{covariance}{end}" in arrays:
                try:
                    return Gaussian(arrays[f"{mean}{end}"], arrays[f"{covariance}{end}"])
                except DitkitError as error:
                    raise DitkitError(f"{path}: {error}") from None
        return None

    found = gaussian("")
    if found is None:
        raise DitkitError(f"{path} holds no mu and sigma; it has {', '.join(sorted(arrays)) or 'nothing'}")
    images = images_of(path) if "arr_0" in arrays else None
    seen = look(network, images, what="the reference") if images else None
    return Reference(f"statistics of {path.name}", sha256(path), found, gaussian("_s"), seen)


def _arrays(path: Path) -> dict[str, Tensor]:
    """The arrays of a file but the pixels, of which only the name. Raises DitkitError for one that cannot be read."""
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        if path.suffix != ".npz":
            raise DitkitError(f"{path}: statistics are read from .npz and .safetensors files")
        with np.load(path, allow_pickle=False) as file:
            numbers = {k: torch.from_numpy(file[k]) for k in file.files if k in _NAMES}
            return numbers | {k: torch.empty(0) for k in file.files if k not in _NAMES}
    except (*DAMAGED, TypeError, SafetensorError) as error:
        if isinstance(error, DitkitError):
            raise
        raise DitkitError(f"{path} cannot be read as statistics: {error}") from None


_NAMES = frozenset({"mu", "sigma", "mu_s", "sigma_s", "mean", "covariance"})
