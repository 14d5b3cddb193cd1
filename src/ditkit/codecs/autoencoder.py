"""Latents of published autoencoders, as DiT, SiT and most of their successors have them: diffusers' classes."""

from __future__ import annotations

import functools
import importlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor

from ..config import DitkitError, near, register
from ..hub import locate, unloadable
from ..rng import Draw
from .codec import Samples, Stateless, draw

__all__ = ["Autoencoder"]


@dataclass(frozen=True)
class _Class:
    """A class of diffusers: where its code is, what its config.json means, and what it leaves out."""

    module: str
    levels: str
    """The entry whose length is the number of resolutions."""
    depth: int
    """The number of resolutions, channels of z and the scale where config.json does not say them."""
    channels: int
    scale: float
    output: str = "latent_dist"
    """The attribute of what `encode` returns; latent_dist is a posterior to draw from."""
    patch: int = 1
    """Latents of patch x patch positions are joined to one, with statistics from the weights."""


_CLASSES = {
    "AutoencoderKL": _Class("autoencoder_kl", "block_out_channels", 1, 4, 0.18215),
    "AutoencoderKLFlux2": _Class("autoencoder_kl_flux2", "block_out_channels", 4, 32, 1.0, patch=2),
    "AutoencoderDC": _Class("autoencoder_dc", "encoder_block_out_channels", 6, 32, 1.0, output="latent"),
    "AutoencoderTiny": _Class("autoencoder_tiny", "encoder_block_out_channels", 4, 4, 1.0, output="latents"),
}


@register("codec", "autoencoder")
@dataclass(frozen=True)
class Autoencoder(Stateless):
    """Images to latents [b channels h/factor w/factor] and back, by AutoencoderKL (Stable Diffusion, SDXL, SD3,
    FLUX.1), AutoencoderKLFlux2, AutoencoderDC (Sana) or AutoencoderTiny of diffusers, in float32.

    Of what the autoencoder says, z, the latents are (z - shift) scale, or (z - mean) scale / std where it has
    statistics of each channel. They bring the latents near standard deviation 1 and are a part of what a network was
    trained on. What is None is as the autoencoder's own file says it and is written into a recipe that is fitted; what
    is given wins. FLUX.2's latents of 2 x 2 positions are joined to one of 128 channels, as its network sees them.
    Encoding draws "codec" where a posterior is sampled.
    """

    positional: ClassVar[str] = "path"
    path: str = "stabilityai/sd-vae-ft-mse"
    """A folder of diffusers (config.json beside the weights), or a name on the hub; empty where none was given for
    imported weights."""
    download: bool = False
    """Let diffusers fetch a hub name that is not in its cache yet."""
    scale: float | None = None
    shift: float | None = None
    channels: int | None = None
    factor: int | None = None
    """Pixels of an image in one latent, along a side."""
    sample: bool = True
    """Encode to a draw from the posterior, as DiT does; False = to its mean. AutoencoderDC and AutoencoderTiny have no
    posterior."""
    means: tuple[float, ...] | None = None
    stds: tuple[float, ...] | None = None
    tiling: bool = False
    """Images larger than the autoencoder was trained on, as overlapping tiles: less memory, other latents."""
    slicing: bool = False
    """One image of a batch at a time: less memory."""

    def __post_init__(self) -> None:
        folder = os.path.abspath(os.path.expanduser(self.path))
        # the same from wherever a run is continued
        if self.path and os.path.isfile(os.path.join(folder, "config.json")):
            object.__setattr__(self, "path", folder)
        given = [v for v in (self.channels, self.factor) if v is not None]
        if (given and min(given) < 1) or (self.scale is not None and not self.scale > 0):
            raise DitkitError(
                f"codec.channels and codec.factor must be at least 1 and codec.scale above 0, not {self.channels}, "
                f"{self.factor} and {self.scale}"
            )
        means, stds = self.means or (), self.stds or ()
        fits = len(means) == len(stds) and (self.channels is None or len(means) in (0, self.channels))
        if not fits or (self.means is None) != (self.stds is None) or not all(std > 0 for std in stds):
            each = "the channels" if self.channels is None else f"the {self.channels} channels"
            raise DitkitError(
                f"codec.means and codec.stds are one number for each of {each}, stds above 0, or none; they are "
                f"{len(means)} and {len(stds)}"
            )
        if self.means and self.shift:
            raise DitkitError(f"a shift of {self.shift} beside means of the channels shifts twice: set codec.shift 0")

    @classmethod
    def older(cls, fields: Mapping[str, Any]) -> dict[str, Any]:
        """Before there were statistics of channels, a run said its scale and shift, and they were all."""
        if fields.get("scale") is not None and not {"means", "stds"} & fields.keys():
            return {**fields, "means": (), "stds": ()}
        return dict(fields)

    @classmethod
    def of(cls, path: str | Path, **fields: Any) -> Self:
        """The codec of a folder or a hub name with all that its files say. Raises DitkitError if it cannot be had."""
        return cls(str(path), **fields).filled()

    @property
    def vocab(self) -> int:
        return 0

    def downsampling(self) -> int:
        factor = self.factor or self.filled().factor
        assert factor is not None
        return factor

    def filled(self) -> Self:
        """With what is None read from the autoencoder's files. Raises DitkitError if there is no such autoencoder."""
        if None not in (self.scale, self.shift, self.channels, self.factor, self.means):
            return self
        kind, said = _class(self.path, self.download)
        try:
            found = _settings(kind, said)
        except (TypeError, ValueError) as error:
            raise DitkitError(f"the config.json of {self.path} is no {said['_class_name']}'s: {error}") from None
        if kind.patch > 1 and self.means is None:
            found |= _statistics(self.path, self.download)
        found = {name: value for name, value in found.items() if getattr(self, name) is None}
        if self.means:
            found["shift"] = 0.0
        if kind.output != "latent_dist":
            found["sample"] = False
        return replace(self, **found)

    def shape(self, sample: tuple[int, ...]) -> tuple[int, ...]:
        """Raises DitkitError for what is no RGB image, or is not tiled by the factor."""
        codec = self.filled()
        assert codec.channels is not None
        assert codec.factor is not None
        if len(sample) != 3 or sample[0] != 3 or sample[1] % codec.factor or sample[2] % codec.factor:
            raise DitkitError(
                f"the codec autoencoder is for images [3 h w] with sides divisible by {codec.factor}, and a sample is "
                f"{list(sample)}: change --data.resolution, or choose another codec"
            )
        return codec.channels, sample[1] // codec.factor, sample[2] // codec.factor

    def fitted(self, data: Samples) -> Self:
        """With all that its files say, so that the recipe says it. Raises DitkitError if they cannot be had."""
        return self.filled()

    @torch.no_grad()
    def encode(self, data: UInt8[Tensor, "b 3 h w"], rng: Draw | None = None) -> Float[Tensor, "b c h/f w/f"]:
        """Without `rng`, the mean of the posterior. Raises DitkitError if the autoencoder cannot be had."""
        return self.drawn(self.moments(data), rng)

    @torch.no_grad()
    def moments(self, data: UInt8[Tensor, "b 3 h w"]) -> Float[Tensor, "b m c h/f w/f"]:
        """Of the autoencoder's own z. Raises DitkitError if the autoencoder cannot be had."""
        _, kind, model = self._ready(data.device)
        found = getattr(model.encode(data.float() / 127.5 - 1), kind.output)
        if kind.output != "latent_dist":
            moments = (found,)
        else:
            moments = (found.mean, found.std) if self.sample else (found.mean,)
        return torch.stack([F.pixel_unshuffle(moment, kind.patch) for moment in moments], 1)

    def drawn(self, moments: Float[Tensor, "b m c h w"], rng: Draw | None = None) -> Float[Tensor, "b c h w"]:
        codec, z = self.filled(), draw(moments, rng)
        assert codec.scale is not None
        assert codec.shift is not None
        if codec.means:
            mean, std = codec._by_channel(z)
            return (z - mean) * codec.scale / std
        return (z - codec.shift) * codec.scale

    @torch.no_grad()
    def decode(self, x0: Float[Tensor, "b c h/f w/f"]) -> UInt8[Tensor, "b 3 h w"]:
        """Clips, and rounds to the nearest byte. Raises DitkitError if the autoencoder cannot be had."""
        codec, kind, model = self._ready(x0.device)
        if codec.means:
            mean, std = codec._by_channel(x0)
            z = x0.float() * std / codec.scale + mean
        else:
            z = x0.float() / codec.scale + codec.shift
        image = model.decode(F.pixel_shuffle(z, kind.patch)).sample
        return ((image * 0.5 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)

    def _by_channel(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation, in the form that goes with z."""
        mean, std = (torch.tensor(v, device=z.device)[:, None, None] for v in (self.means, self.stds))
        return mean, std

    def model(self, device: torch.device | str = "cpu") -> Any:
        """The autoencoder of diffusers in float32, loaded once for each path.

        Raises DitkitError without diffusers, for a path that holds none, and for one of other channels or factor.
        """
        return self._ready(device)[2]

    def _ready(self, device: torch.device | str) -> tuple[Any, _Class, Any]:
        """This codec with all numbers, the class, and the autoencoder."""
        codec = self.filled()
        kind, model = _load(self.path, self.download)
        found = _settings(kind, dict(model.config))
        if (found["channels"], found["factor"]) != (codec.channels, codec.factor):
            raise DitkitError(
                f"the autoencoder {self.path} has {found['channels']} channels and the factor {found['factor']}, "
                f"not {codec.channels} and {codec.factor}: change codec.channels and codec.factor"
            )
        if (model.config.in_channels, model.config.get("out_channels", 3)) != (3, 3):
            raise DitkitError(
                f"the autoencoder {self.path} is for images of {model.config.in_channels} channels, and the codec is "
                "for RGB: choose another"
            )
        if self.tiling and kind.module == "autoencoder_tiny" and (codec.channels, codec.factor) != (4, 8):
            raise DitkitError(
                f"diffusers tiles an AutoencoderTiny only with 4 channels and the factor 8, and {self.path} has "
                f"{codec.channels} and {codec.factor}: set codec.tiling False"
            )
        model.use_tiling, model.use_slicing = self.tiling, self.slicing
        return codec, kind, model.to(device)


def _settings(kind: _Class, said: Mapping[str, Any]) -> dict[str, Any]:
    """Scale, shift, channels, factor and statistics of latents, as a config.json says them."""
    levels = said.get(kind.levels)
    means, stds = (tuple(map(float, said.get(name) or ())) for name in ("latents_mean", "latents_std"))
    return {
        "scale": float(said.get("scaling_factor", kind.scale)),
        "shift": float(said.get("shift_factor") or 0.0),
        "channels": int(said.get("latent_channels", kind.channels)) * kind.patch**2,
        "factor": 2 ** ((kind.depth if levels is None else len(levels)) - 1) * kind.patch,
        "means": means,
        "stds": stds,
    }


def _statistics(path: str, download: bool) -> dict[str, Any]:
    """The statistics of joined latents, which a batch norm without parameters holds."""
    norm = _load(path, download)[1].bn
    return {"means": tuple(norm.running_mean.tolist()), "stds": tuple((norm.running_var + norm.eps).sqrt().tolist())}


def _class(path: str, download: bool) -> tuple[_Class, dict[str, Any]]:
    """The class of an autoencoder and its config.json. Raises DitkitError for a path that holds none that is known."""
    if not path:
        raise DitkitError(
            "no autoencoder is known for these latents: import the weights again with `ditkit import FILE "
            "--autoencoder FOLDER`, the folder vae of the pipeline that they are of"
        )
    folder = Path(path).expanduser()
    if any((folder / name).exists() for name in ("recipe.json", "state.json")):
        raise DitkitError(
            f"{path} is a run of ditkit, and the codec autoencoder is for autoencoders of diffusers: if it was trained "
            f"with `ditkit train autoencoder`, use --codec trained_autoencoder:{path}"
        )
    if not (folder / "config.json").exists() and (folder / "vae" / "config.json").exists():
        raise DitkitError(f"{path} is a whole pipeline of diffusers: give its autoencoder, {path}/vae")
    found = locate(path, "autoencoder", "diffusers")
    try:
        if folder.is_dir():
            said = json.loads((folder / "config.json").read_text())
        else:
            said = _diffusers("autoencoder_kl", "AutoencoderKL").load_config(found, local_files_only=not download)
        name = said["_class_name"]
    except (OSError, ValueError) as error:
        raise unloadable(path, "autoencoder", download, error) from None
    except (KeyError, TypeError):
        raise DitkitError(f"{path} is no autoencoder of diffusers: its config.json names no class") from None
    if name not in _CLASSES:
        raise DitkitError(
            f"{path} is a {name}, and the codec autoencoder reads {', '.join(_CLASSES)}: {near(str(name), _CLASSES)}"
        )
    return _CLASSES[name], dict(said)


def _diffusers(module: str, name: str) -> Any:
    """A class of diffusers. Raises DitkitError without it."""
    try:
        return getattr(importlib.import_module(f"diffusers.models.autoencoders.{module}"), name)
    except (ImportError, AttributeError):
        raise DitkitError(
            f"the codec autoencoder needs diffusers with {name}: pip install 'ditkit[diffusers]'"
        ) from None


@functools.lru_cache(maxsize=2)
def _load(path: str, download: bool) -> tuple[_Class, Any]:
    kind, said = _class(path, download)
    path = locate(path, "autoencoder", "diffusers")
    cls = _diffusers(kind.module, said["_class_name"])
    try:
        model, loaded = cls.from_pretrained(
            path,
            local_files_only=not download,
            low_cpu_mem_usage=False,
            torch_dtype=torch.float32,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError, TypeError) as error:
        raise unloadable(path, "autoencoder", download, error) from None
    if missing := sorted(loaded["missing_keys"]):  # diffusers draws them at random
        raise DitkitError(
            f"cannot load the autoencoder {path}: its file has no {missing[0]}"
            + (f" and {len(missing) - 1} others" if missing[1:] else "")
        )
    return kind, model.eval().requires_grad_(False)
