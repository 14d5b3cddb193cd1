"""Vision transformers of the package transformers, such as DINOv2."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from ..config import DitkitError, register
from ..hub import pretrained
from .encoder import as_images

__all__ = ["Transformers"]

# ImageNet's, which DINO and DINOv2 were trained with
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@register("encoder", "transformers")
@dataclass(frozen=True)
class Transformers:
    """The patch tokens of a vision transformer after its last norm; REPA's is DINOv2-B at 224 px, 16 x 16 tokens.

    Tokens before those of the patches (class, registers) are left out.
    """

    path: str = "facebook/dinov2-base"
    """A folder in the layout of the hub (config.json beside model.safetensors), or a name on the hub."""
    size: int = 224
    """Side in pixels to which images are scaled; REPA takes 7/8 of the training resolution."""
    download: bool = False
    """Let transformers fetch a hub name that is not in its cache yet."""

    def __post_init__(self) -> None:
        if self.size < 1:
            raise DitkitError(f"encoder.size must be at least 1, not {self.size}")

    @property
    def width(self) -> int:
        return int(self.model().config.hidden_size)

    @torch.no_grad()
    def __call__(self, images: UInt8[Tensor, "b c h w"]) -> Float[Tensor, "b z rows columns"]:
        """Raises DitkitError if the model cannot be had, or if its patches do not tile the images."""
        model = self.model(images.device)
        patch = int(model.config.patch_size)
        if self.size % patch:
            raise DitkitError(f"encoder.size {self.size} is not tiled by the patches of {patch} of {self.path}")
        mean, std = (torch.tensor(v, device=images.device)[:, None, None] for v in (MEAN, STD))
        tokens = model(pixel_values=(as_images(images, self.size) / 255 - mean) / std).last_hidden_state
        side = self.size // patch
        if tokens.shape[1] < side * side:
            raise DitkitError(f"{self.path} gives {tokens.shape[1]} tokens for {side} x {side} patches: no encoder")
        return tokens[:, -side * side :].transpose(1, 2).unflatten(2, (side, side))

    def model(self, device: torch.device | str = "cpu") -> Any:
        """The network in float32, loaded once for each path.

        Raises DitkitError without transformers, or for a path that holds no vision transformer.
        """
        return _load(self.path, self.download).to(device)


@functools.lru_cache(maxsize=2)
def _load(path: str, download: bool) -> Any:
    model = pretrained("AutoModel", path, "encoder", "encoders", download)
    if not hasattr(model.config, "patch_size") or not hasattr(model.config, "hidden_size"):
        raise DitkitError(f"{path} is no vision transformer: its config.json has no patch_size or hidden_size")
    return model
