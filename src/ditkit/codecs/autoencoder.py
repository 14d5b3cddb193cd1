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
    frames: int | None = None
    """Frames of a video in one latent where config.json does not say it; None = the class is for images."""


_CLASSES = {
    "AutoencoderKL": _Class("autoencoder_kl", "block_out_channels", 1, 4, 0.18215),
    "AutoencoderKLFlux2": _Class("autoencoder_kl_flux2", "block_out_channels", 4, 32, 1.0, patch=2),
    "AutoencoderDC": _Class("autoencoder_dc", "encoder_block_out_channels", 6, 32, 1.0, output="latent"),
    "AutoencoderTiny": _Class("autoencoder_tiny", "encoder_block_out_channels", 4, 4, 1.0, output="latents"),
    "AutoencoderKLHunyuanVideo": _Class(
        "autoencoder_kl_hunyuan_video", "block_out_channels", 4, 16, 0.476986, frames=4
    ),
}


@register("codec", "autoencoder")
@dataclass(frozen=True)
class Autoencoder(Stateless):
    """Images to latents [b channels h/factor w/factor] and back, by AutoencoderKL (Stable Diffusion, SDXL, SD3,
    FLUX.1), AutoencoderKLFlux2, AutoencoderDC (Sana) or AutoencoderTiny of diffusers; videos of 1 + frames k frames to
    latents [b channels 1+k h/factor w/factor] by AutoencoderKLHunyuanVideo (Kandinsky 5); in float32.

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
    frames: int | None = None
    """Frames of a video in one latent, after the first frame, which has its own; None for images."""
    one_frame: bool = False
    """Latents of an image as those of a video of one frame, [channels 1 h w], as Kandinsky 5's network of images takes
    them."""
    sample: bool = True
    """Encode to a draw from the posterior, as DiT does; False = to its mean. AutoencoderDC and AutoencoderTiny have no
    posterior."""
    means: tuple[float, ...] | None = None
    stds: tuple[float, ...] | None = None
    tiling: bool = False
    """Images larger than the autoencoder was trained on, as overlapping tiles: less memory, other latents. Videos of
    more than 16 frames are cut along time in any case, as in diffusers."""
    slicing: bool = False
    """One image or video of a batch at a time: less memory."""

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
        if self.frames is not None and (self.frames < 1 or self.one_frame):
            raise DitkitError(
                f"codec.frames is at least 1, of an autoencoder of videos, and codec.one_frame is for one of images: "
                f"they are {self.frames} and {self.one_frame}"
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
        """Raises DitkitError for what is no RGB image, or video where it is for those, or is not tiled by the factor or
        by the frames."""
        codec = self.filled()
        assert codec.channels is not None
        assert codec.factor is not None
        colours, *inner, height, width = sample if len(sample) > 2 else (0, 0, 0)
        if colours != 3 or len(inner) != (codec.frames is not None) or height % codec.factor or width % codec.factor:
            kind = "images [3 h w]" if codec.frames is None else "videos [3 t h w]"
            raise DitkitError(
                f"the codec autoencoder is for {kind} with sides divisible by {codec.factor}, and a sample is "
                f"{list(sample)}: change --data.resolution, or choose another codec"
            )
        time = (1,) if codec.one_frame else ()
        if codec.frames is not None:
            latents, rest = divmod(inner[0] - 1, codec.frames)
            if rest:
                below = inner[0] - rest
                raise DitkitError(
                    f"the autoencoder {self.path} is for videos of 1 + {codec.frames} k frames, and a video has "
                    f"{inner[0]}: give {below} or {below + codec.frames}"
                )
            time = (1 + latents,)
        return codec.channels, *time, height // codec.factor, width // codec.factor

    def fitted(self, data: Samples) -> Self:
        """With all that its files say, so that the recipe says it. Raises DitkitError if they cannot be had."""
        return self.filled()

    @torch.no_grad()
    def encode(self, data: UInt8[Tensor, "b 3 *t h w"], rng: Draw | None = None) -> Float[Tensor, "b c *k h/f w/f"]:
        """Without `rng`, the mean of the posterior. Raises DitkitError as `shape`, and if there is no autoencoder."""
        return self.drawn(self.moments(data), rng)

    @torch.no_grad()
    def moments(self, data: UInt8[Tensor, "b 3 *t h w"]) -> Float[Tensor, "b m c *k h/f w/f"]:
        """Of the autoencoder's own z. Raises DitkitError as `shape`, and if there is no autoencoder."""
        codec, kind, model = self._ready(data.device)
        codec.shape(tuple(data.shape[1:]))
        found = getattr(model.encode(data.float() / 127.5 - 1), kind.output)
        if kind.output != "latent_dist":
            moments = (found,)
        else:
            moments = (found.mean, found.std) if self.sample else (found.mean,)
        stacked = torch.stack([F.pixel_unshuffle(moment, kind.patch) for moment in moments], 1)
        return stacked.unsqueeze(3) if self.one_frame else stacked

    def drawn(self, moments: Float[Tensor, "b m c *k h w"], rng: Draw | None = None) -> Float[Tensor, "b c *k h w"]:
        codec, z = self.filled(), draw(moments, rng)
        assert codec.scale is not None
        assert codec.shift is not None
        if codec.means:
            mean, std = codec._by_channel(z)
            return (z - mean) * codec.scale / std
        return (z - codec.shift) * codec.scale

    @torch.no_grad()
    def decode(self, x0: Float[Tensor, "b c *k h/f w/f"]) -> UInt8[Tensor, "b 3 *t h w"]:
        """Clips, and rounds to the nearest byte. Raises DitkitError if the autoencoder cannot be had."""
        codec, kind, model = self._ready(x0.device)
        if codec.means:
            mean, std = codec._by_channel(x0)
            z = x0.float() * std / codec.scale + mean
        else:
            z = x0.float() / codec.scale + codec.shift
        image = model.decode(F.pixel_shuffle(z.squeeze(2) if self.one_frame else z, kind.patch)).sample
        return ((image * 0.5 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)

    def _by_channel(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation, in the form that goes with z."""
        each = (-1, *(1,) * (z.ndim - 2))
        mean, std = (torch.tensor(v, device=z.device).view(each) for v in (self.means, self.stds))
        return mean, std

    def model(self, device: torch.device | str = "cpu") -> Any:
        """The autoencoder of diffusers in float32, loaded once for each path.

        Raises DitkitError without diffusers, for a path that holds none, and for one of other channels, factor or
        frames.
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
        if found["frames"] != codec.frames:
            made = "images" if found["frames"] is None else f"videos of {found['frames']} frames in one latent"
            raise DitkitError(f"the autoencoder {self.path} is for {made}: set codec.frames {found['frames']}")
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
    """Scale, shift, channels, factor, frames and statistics of latents, as a config.json says them."""
    levels = said.get(kind.levels)
    factor = 2 ** ((kind.depth if levels is None else len(levels)) - 1) * kind.patch
    video = kind.frames is not None
    means, stds = (tuple(map(float, said.get(name) or ())) for name in ("latents_mean", "latents_std"))
    return {
        "scale": float(said.get("scaling_factor", kind.scale)),
        "shift": float(said.get("shift_factor") or 0.0),
        "channels": int(said.get("latent_channels", kind.channels)) * kind.patch**2,
        "factor": int(said.get("spatial_compression_ratio", factor)) if video else factor,
        "frames": int(said.get("temporal_compression_ratio", kind.frames)) if video else None,
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
