"""Image features for distances between sets of images.

They compare runs of ditkit with each other. They are not the published FID, which uses Inception-v3.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor

from ..config import DitkitError
from ..encoders import load_lite0

__all__ = ["Features"]


class Features:
    """Images to the 1280 pooled features of EfficientNet-lite0, seen at `size` x `size` pixels.

    `name`, `sha256` (of the weights file) and `size` are the protocol to store beside any number made from them.
    Raises DitkitError where the weights are not installed.
    """

    name = "efficientnet-lite0"

    def __init__(self, size: int = 96, device: torch.device | str = "cpu"):
        self.size, self.device = size, torch.device(device)
        self.network, self.sha256 = load_lite0(self.device)

    @torch.no_grad()
    def __call__(self, images: UInt8[Tensor, "n c h w"], batch: int = 64) -> Float[Tensor, "n 1280"]:
        """Features in float32 on the CPU. `c` is 3, or 1 (greyscale, repeated). Raises DitkitError for other images."""
        if images.ndim != 4 or images.dtype != torch.uint8 or images.shape[1] not in (1, 3) or len(images) == 0:
            raise DitkitError(
                f"features are of uint8 images [n, 1 or 3, h, w], not {images.dtype} {list(images.shape)}"
            )
        size = (self.size, self.size)
        rows = []
        for chunk in images.split(batch):
            x = (chunk.to(self.device, torch.float32) - 127) / 128
            x = F.interpolate(x, size=size, mode="bicubic", antialias=True).expand(-1, 3, -1, -1)
            x = x.contiguous(memory_format=torch.channels_last)  # 0.6 of the time on CPUs
            rows.append(self.network.features(x).cpu())
        return torch.cat(rows)
