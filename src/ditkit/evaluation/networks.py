"""Networks that protocols see images with, from files that the user has. Nothing is fetched."""

from __future__ import annotations

import hashlib
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from ..config import DitkitError
from ..encoders import Transformers
from ..encoders.transformers import MEAN, STD
from ..files import sha256
from ..hub import pretrained
from .features import Features

__all__ = [
    "SSCD",
    "CleanInception",
    "Clip",
    "Dino",
    "FidelityInception",
    "Lite",
    "Network",
    "ScriptedInception",
    "Seen",
]

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class Seen:
    """What a network says of images, in float32 on the CPU: features, and where it has them the features at places
    that sFID is of, and logits of classes."""

    features: Float[Tensor, "n d"]
    spatial: Float[Tensor, "n s"] | None = None
    logits: Float[Tensor, "n c"] | None = None

    @staticmethod
    def cat(parts: list[Seen]) -> Seen:
        def join(name: str) -> Tensor | None:
            found = [getattr(part, name) for part in parts]
            return None if found[0] is None else torch.cat(found)

        return Seen(torch.cat([part.features for part in parts]), join("spatial"), join("logits"))


class Network(Protocol):
    """Images of 3 channels to what it says of them; `name` and `sha256`, of its weights, are part of a protocol."""

    name: str
    sha256: str

    def __call__(self, images: UInt8[Tensor, "n 3 h w"]) -> Seen: ...


class Lite:
    """EfficientNet-lite0, which installs with ditkit[metrics]."""

    def __init__(self, size: int, device: torch.device | str):
        self.network = Features(size, device)
        self.name, self.sha256 = f"{self.network.name} at {size} px", self.network.sha256

    def __call__(self, images: UInt8[Tensor, "n 3 h w"]) -> Seen:
        return Seen(self.network(images))


class FidelityInception:
    """Inception-v3 of the package torch-fidelity, with its weights in a file; it resizes as TensorFlow 1 does.

    spatial: also the first 7 channels of the 1 x 1 branch of its block 6d, which TensorFlow's graph calls mixed_6/conv,
    flattened as [h w c]. Raises DitkitError without the package, and for a file that holds anything but tensors.
    """

    name = "inception-v3 of torch-fidelity"

    def __init__(self, path: str, device: torch.device | str, protocol: str, spatial: bool = False):
        file = _file(path, protocol, "weights-inception-2015-12-05-6726825d.pth")
        try:
            from torch_fidelity import FeatureExtractorInceptionV3  # pyright: ignore[reportMissingImports]
        except (ImportError, RuntimeError) as error:  # RuntimeError: a torchvision that does not fit this torch
            raise DitkitError(
                f"the protocol {protocol} needs torch-fidelity and a torchvision that fits torch "
                f"{torch.__version__}: pip install 'ditkit[fidelity]' ({str(error).splitlines()[0]})"
            ) from None
        try:
            safe = file.suffix == ".safetensors"
            tensors = load_file(file) if safe else torch.load(file, map_location="cpu", weights_only=True)
            clean = io.BytesIO()  # the package unpickles its weights, so it gets a copy that is nothing but tensors
            torch.save(dict(tensors), clean)
            clean.seek(0)
            network = FeatureExtractorInceptionV3("inception", ["2048", "logits_unbiased"], clean)
        except Exception as error:  # what is no such file fails in many ways
            raise DitkitError(
                f"{file} does not hold the weights of torch-fidelity's Inception-v3: {_first(error)}"
            ) from None
        self.network, self.device, self.sha256 = network.to(device), device, sha256(file)
        self._places: list[Tensor] = []
        if spatial:
            self.name += ", with places"  # what is kept of a reference without them would leave out sFID
            self.network.Mixed_6d.branch1x1.register_forward_hook(lambda m, x, out: self._places.append(out[:, :7]))

    @torch.no_grad()
    def __call__(self, images: UInt8[Tensor, "n 3 h w"]) -> Seen:
        features, logits = self.network(images.to(self.device))
        spatial = self._places.pop().movedim(1, 3).flatten(1).float().cpu() if self._places else None
        return Seen(features.float().cpu(), spatial, logits.float().cpu())


class ScriptedInception:
    """NVIDIA's TorchScript of the TensorFlow Inception of 2015; it resizes by itself, as that graph does.

    Raises DitkitError for a file that is no TorchScript, and for one that does not answer as this network does.
    """

    name = "inception-2015-12-05.pt"

    def __init__(self, path: str, device: torch.device | str, protocol: str, classes: bool = False):
        file = _file(path, protocol, "inception-2015-12-05.pt")
        self.network = _scripted(file, device)
        self.file, self.device, self.classes, self.sha256 = file, device, classes, sha256(file)

    @torch.no_grad()
    def __call__(self, images: UInt8[Tensor, "n 3 h w"]) -> Seen:
        try:
            features = self.features(images.to(self.device)).float().cpu().flatten(1)
            if not self.classes:
                return Seen(features)
            shares = self.network(images.to(self.device), no_output_bias=True)
        except (RuntimeError, AttributeError) as error:
            raise DitkitError(f"{self.file} does not answer as {self.name} does: {_first(error)}") from None
        # probabilities; their logarithms are logits, and one that underflows counts nothing
        return Seen(features, logits=shares.double().clamp(min=1e-300).log().cpu())

    def features(self, images: UInt8[Tensor, "n 3 h w"]) -> Tensor:
        return self.network(images, return_features=True)


class CleanInception(ScriptedInception):
    """The same network as clean-fid uses it: each channel is resized by Pillow in float, bicubic with antialiasing, and
    not rounded to bytes (Parmar et al. 2022, arXiv:2104.11222)."""

    name = "inception-2015-12-05.pt after Pillow's bicubic filter"

    def features(self, images: UInt8[Tensor, "n 3 h w"]) -> Tensor:
        resized = torch.from_numpy(np.stack([[_resized(channel) for channel in image] for image in images.cpu()]))
        return self.network.layers((resized.to(images.device) - 128) / 128)


def _resized(channel: Tensor, side: int = 299) -> np.ndarray:
    image = Image.fromarray(channel.numpy().astype(np.float32))
    return np.asarray(image.resize((side, side), Image.Resampling.BICUBIC)).clip(0, 255)


class Dino:
    """The class token of a DINOv2 of transformers after its last norm, at 224 px by torch's bicubic filter with
    antialiasing, without rounding; a folder in the layout of the hub.

    Raises DitkitError for a folder without such a model.
    """

    def __init__(self, path: str, device: torch.device | str, protocol: str):
        folder = _folder(path, protocol, "facebook/dinov2-large")
        self.network, self.device = Transformers(str(folder), 224).model(device), device
        self.name, self.sha256 = f"{type(self.network).__name__} of transformers at 224 px", _weights(folder)

    @torch.no_grad()
    def __call__(self, images: UInt8[Tensor, "n 3 h w"]) -> Seen:
        x = _scaled(images.to(self.device), 224, MEAN, STD)
        return Seen(self.network(pixel_values=x).last_hidden_state[:, 0].float().cpu())


class Clip:
    """Image embeddings of a CLIP of transformers, of length 1; images are scaled to its size by the bicubic filter with
    antialiasing, as jax.image.resize does.

    Raises DitkitError for a folder without such a model.
    """

    def __init__(self, path: str, device: torch.device | str, protocol: str):
        folder = _folder(path, protocol, "openai/clip-vit-large-patch14-336")
        network = pretrained("CLIPVisionModelWithProjection", str(folder), "CLIP", "encoders", download=False)
        self.network = network.to(device)
        self.size, self.device = int(network.config.image_size), device
        self.name, self.sha256 = f"CLIP of transformers at {self.size} px", _weights(folder)

    @torch.no_grad()
    def __call__(self, images: UInt8[Tensor, "n 3 h w"]) -> Seen:
        x = _scaled(images.to(self.device), self.size, CLIP_MEAN, CLIP_STD)
        return Seen(F.normalize(self.network(pixel_values=x).image_embeds.float(), dim=1).cpu())


class SSCD:
    """Descriptors of images for finding copies, of length 1 (Pizzi et al. 2022, arXiv:2202.10261), from the authors'
    TorchScript, which sees images with the shorter side at 288 px; `similar` is the cosine above which a sample is
    called a copy in Somepalli et al. 2023 (arXiv:2212.03860).

    Raises DitkitError for a file that is no TorchScript, and for one that does not answer with descriptors.
    """

    side = 288
    similar = 0.5

    def __init__(self, path: str, device: torch.device | str):
        file = Path(path).expanduser()
        if not file.is_file():
            raise DitkitError(f"there is no file {path}: SSCD needs its authors' sscd_disc_mixup.torchscript.pt")
        self.network, self.device = _scripted(file, device), device
        self.name, self.sha256 = f"{file.name} at {self.side} px", sha256(file)

    @torch.no_grad()
    def __call__(self, images: UInt8[Tensor, "n c h w"]) -> Seen:
        if images.shape[1] == 1:
            images = images.expand(-1, 3, -1, -1)
        by = self.side / min(images.shape[2:])
        size = (round(images.shape[2] * by), round(images.shape[3] * by))
        try:
            found = self.network(_scaled(images.to(self.device), size, MEAN, STD, "bilinear"))
            if found.ndim != 2 or len(found) != len(images) or not bool(found.isfinite().all()):
                raise RuntimeError(f"{list(found.shape)} for {len(images)} images")
        except (RuntimeError, AttributeError) as error:
            raise DitkitError(f"{self.name} does not answer with one descriptor an image: {_first(error)}") from None
        return Seen(F.normalize(found.float(), dim=1).cpu())


def _scripted(file: Path, device: torch.device | str) -> Any:
    """A network in TorchScript. Raises DitkitError for another file."""
    try:
        # TorchScript is a program, too, but of a language that reaches neither files nor Python
        return torch.jit.load(str(file), map_location=device).eval()
    except (RuntimeError, ValueError) as error:
        raise DitkitError(f"{file} is no TorchScript that can be loaded: {_first(error)}") from None


def _first(error: Exception) -> str:
    """The first line of what an error says."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def _scaled(
    images: Tensor,
    size: int | tuple[int, int],
    mean: tuple[float, ...],
    std: tuple[float, ...],
    mode: str = "bicubic",
) -> Float[Tensor, "n 3 h w"]:
    size = (size, size) if isinstance(size, int) else size
    x = F.interpolate(images.float(), size=size, mode=mode, antialias=True) / 255
    shift, scale = (torch.tensor(v, device=x.device)[:, None, None] for v in (mean, std))
    return (x - shift) / scale


def _file(path: str, protocol: str, published: str) -> Path:
    """The file of weights. Raises DitkitError that says which one is needed."""
    if not path:
        raise DitkitError(f"the protocol {protocol} needs the file {published}: give it with --weights FILE")
    file = Path(path).expanduser()
    if not file.is_file():
        raise DitkitError(f"there is no file {path}: the protocol {protocol} needs {published} with --weights FILE")
    return file


def _folder(path: str, protocol: str, published: str) -> Path:
    """The folder of a model in the layout of the hub. Raises DitkitError that says which one is needed."""
    folder = Path(path or "?").expanduser()
    if not (folder / "config.json").is_file():
        found = f"{path} holds no config.json" if path else "none was given"
        raise DitkitError(
            f"the protocol {protocol} needs a folder with {published} in the layout of the hub (config.json, "
            f"model.safetensors): give it with --weights FOLDER ({found})"
        )
    return folder


def _weights(folder: Path) -> str:
    """The hash of a model's configuration and all its files of tensors."""
    files = [folder / "config.json", *sorted(folder.glob("*.safetensors"))]
    return hashlib.sha256("".join(f"{file.name} {sha256(file)}\n" for file in files).encode()).hexdigest()
