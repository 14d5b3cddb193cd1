"""Evaluators by name. Each is one network, one way to prepare images, one kind of reference and some numbers.

Numbers of different protocols do not compare, whatever they are called. The published evaluators need weights and
statistics that are not here, so what this code makes of them was never held against the published numbers: their
`proof` is empty, and every number of theirs says "unproven".
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from ..config import DitkitError, register, registered_as
from .distances import Estimate, gaussian_distance, kernel_distance
from .intervals import Interval
from .moments import Gaussian, Moments, frechet_of_gaussians
from .networks import (
    CleanInception,
    Clip,
    Dino,
    FidelityInception,
    Lite,
    Network,
    ScriptedInception,
    Seen,
)
from .references import Reference
from .sets import density_coverage, inception_score, precision_recall, vendi_score

__all__ = ["UNPROVEN", "Evaluator", "Number", "identity"]

Number = float | Estimate | Interval
UNPROVEN = "unproven: never held against published numbers"
"""What a protocol's report says of numbers without a proof."""
_INCEPTION = "weights-inception-2015-12-05-6726825d.pth of torch-fidelity"
_SCRIPT = "inception-2015-12-05.pt of NVIDIA, a TorchScript"


@dataclass(frozen=True)
class Evaluator:
    """What the protocols have in common."""

    weights: str = ""
    """The file or folder of the network's weights, where the user has them."""

    table: ClassVar[str] = ""
    """Whose numbers it makes."""
    needs: ClassVar[str] = ""
    """The weights."""
    images: ClassVar[str] = ""
    """How images are prepared."""
    reference: ClassVar[str] = ""
    """What they are compared with."""
    labels: ClassVar[str] = ""
    """The rule by which the published samples' classes were drawn."""
    proof: ClassVar[str] = ""
    """What was shown of its numbers; empty: unproven."""

    @property
    def name(self) -> str:
        return registered_as(self)[1]

    @property
    def status(self) -> str:
        """What stands beside each number: "proven" or "unproven"."""
        return "proven" if self.proof else "unproven"

    def network(self, device: torch.device | str) -> Network:
        """The network. Raises DitkitError where what it needs is missing."""
        raise NotImplementedError

    def measure(self, seen: Seen, reference: Reference) -> dict[str, Number]:
        """The numbers by name, without those that this reference or network cannot give."""
        raise NotImplementedError


def _frechet(rows: Tensor, gaussian: Gaussian) -> float:
    sums = Moments()
    for part in rows.split(4096):
        sums.add(part)
    return frechet_of_gaussians(sums.gaussian(), gaussian)


def identity(protocol: Evaluator, network: Network, reference: Reference, count: int) -> str:
    """What two numbers must have in common to stand in one column: the protocol, the hashes of its network and of its
    reference, and the number of samples."""
    hashes = f"weights {network.sha256[:12]}, reference {reference.sha256[:12]}"
    return f"{protocol.name}: {network.name}, {hashes}, {count} samples"


@register("protocol", "ditkit")
@dataclass(frozen=True)
class Ditkit(Evaluator):
    """ditkit's own, which runs where nothing can be fetched."""

    size: int = 96
    """Side in pixels at which the network sees images."""

    table: ClassVar[str] = "runs of ditkit among each other"
    needs: ClassVar[str] = "nothing: EfficientNet-lite0 installs with ditkit[metrics]"
    images: ClassVar[str] = "bytes, (x - 127) / 128, torch's bicubic filter with antialiasing, not rounded"
    reference: ClassVar[str] = "held-out images"
    labels: ClassVar[str] = "in_turn"
    proof: ClassVar[str] = (
        "the network equalled efficientnet_lite_pytorch 0.1.0 to the last bit, and the metrics are tested against "
        "torchmetrics, prdc and vendi-score to 1e-6"
    )

    def __post_init__(self) -> None:
        if self.weights:
            raise DitkitError("the protocol ditkit takes no weights: its network is installed with ditkit[metrics]")
        if self.size < 32:
            raise DitkitError(f"the protocol ditkit sees images at 32 pixels or more, not {self.size}")

    def network(self, device: torch.device | str) -> Network:
        return Lite(self.size, device)

    def measure(self, seen: Seen, reference: Reference) -> dict[str, Number]:
        found: dict[str, Number] = {"frechet": _frechet(seen.features, reference.gaussian)}
        if reference.seen is not None:
            real = reference.seen.features
            found["kid"] = kernel_distance(seen.features, real)
            found["precision"], found["recall"] = precision_recall(seen.features, real)
            found["density"], found["coverage"] = density_coverage(seen.features, real)
        for name, rows in (("vendi", seen.features), ("vendi_reference", reference.seen and reference.seen.features)):
            # of features that are all zero, as those of a flat image at few pixels, there is no direction
            if rows is not None and bool(rows.any(1).all()):
                found[name] = vendi_score(rows[: len(seen.features)])
        return found


@register("protocol", "jit")
@dataclass(frozen=True)
class Jit(Evaluator):
    """FID and inception score of torch-fidelity, as JiT and what follows it report."""

    table: ClassVar[str] = "JiT (2511.13720) and pixel-space models after it"
    needs: ClassVar[str] = f"{_INCEPTION}; pip install 'ditkit[fidelity]'"
    images: ClassVar[str] = "bytes, 299 px by TensorFlow 1's bilinear filter without antialiasing, (x - 128) / 128"
    reference: ClassVar[str] = "jit_in256_stats.npz of JiT's fid_stats"
    labels: ClassVar[str] = "balanced"

    def network(self, device: torch.device | str) -> Network:
        return FidelityInception(self.weights, device, self.name)

    def measure(self, seen: Seen, reference: Reference) -> dict[str, Number]:
        found: dict[str, Number] = {"fid": _frechet(seen.features, reference.gaussian)}
        if seen.logits is not None and len(seen.logits) >= 10:
            # torch-fidelity shuffles by numpy's generator of 2020 before it cuts ten parts
            order = torch.from_numpy(np.random.RandomState(2020).permutation(len(seen.logits)))
            found["inception_score"] = inception_score(seen.logits[order], splits=10)
        return found


@register("protocol", "adm")
@dataclass(frozen=True)
class Adm(Evaluator):
    """FID, sFID, inception score, precision and recall of ADM's evaluator (Dhariwal & Nichol 2021)."""

    table: ClassVar[str] = "ADM, DiT, SiT, REPA, LightningDiT"
    needs: ClassVar[str] = f"{_INCEPTION} (all five), or {_SCRIPT} (no sFID)"
    images: ClassVar[str] = "bytes, 299 px by TensorFlow 1's bilinear filter without antialiasing, (x - 128) / 128"
    reference: ClassVar[str] = "VIRTUAL_imagenet256_labeled.npz: mu, sigma, mu_s, sigma_s, and arr_0 for the last two"
    labels: ClassVar[str] = "random"

    def network(self, device: torch.device | str) -> Network:
        if self.weights.endswith(".pt"):
            return ScriptedInception(self.weights, device, self.name, classes=True)
        return FidelityInception(self.weights, device, self.name, spatial=True)

    def measure(self, seen: Seen, reference: Reference) -> dict[str, Number]:
        found: dict[str, Number] = {"fid": _frechet(seen.features, reference.gaussian)}
        if seen.spatial is not None and reference.spatial is not None:
            found["sfid"] = _frechet(seen.spatial, reference.spatial)
        n = len(seen.features)
        if seen.logits is not None and (n <= 5000 or n % 5000 == 0):  # parts of 5,000, in order
            found["inception_score"] = inception_score(seen.logits, splits=max(1, n // 5000))
        if reference.seen is not None:
            # in float64; the evaluator's own distances are in half precision
            found["precision"], found["recall"] = precision_recall(seen.features, reference.seen.features)
        return found


@register("protocol", "edm2")
@dataclass(frozen=True)
class Edm2(Evaluator):
    """FID of EDM2's calculate_metrics (Karras et al. 2024)."""

    table: ClassVar[str] = "EDM, EDM2, autoguidance"
    needs: ClassVar[str] = _SCRIPT
    images: ClassVar[str] = "bytes; the network resizes by itself, without antialiasing"
    reference: ClassVar[str] = "img512.pkl of EDM2's dataset-refs, its fid part written as an .npz"
    labels: ClassVar[str] = "random"

    def network(self, device: torch.device | str) -> Network:
        return ScriptedInception(self.weights, device, self.name)

    def measure(self, seen: Seen, reference: Reference) -> dict[str, Number]:
        return {"fid": _frechet(seen.features, reference.gaussian)}


@register("protocol", "edm2_dinov2")
@dataclass(frozen=True)
class Edm2Dinov2(Evaluator):
    """FD-DINOv2 as EDM2's calculate_metrics prepares images for it."""

    table: ClassVar[str] = "EDM2, autoguidance: FD-DINOv2"
    needs: ClassVar[str] = "a folder of facebook/dinov2-large in the layout of the hub; ditkit[encoders]"
    images: ClassVar[str] = "bytes, 224 px by torch's bicubic filter with antialiasing, not rounded; ImageNet's mean"
    reference: ClassVar[str] = "img512.pkl of EDM2's dataset-refs, its fd_dinov2 part written as an .npz"
    labels: ClassVar[str] = "random"

    def network(self, device: torch.device | str) -> Network:
        return Dino(self.weights, device, self.name)

    def measure(self, seen: Seen, reference: Reference) -> dict[str, Number]:
        return {"fd_dinov2": _frechet(seen.features, reference.gaussian)}


@register("protocol", "clean")
@dataclass(frozen=True)
class Clean(Evaluator):
    """FID of clean-fid in its mode "clean" (Parmar et al. 2022)."""

    table: ClassVar[str] = "StyleGAN and few-shot papers that name clean-fid"
    needs: ClassVar[str] = _SCRIPT
    images: ClassVar[str] = "bytes, 299 px by Pillow's bicubic filter with antialiasing, channels in float, not rounded"
    reference: ClassVar[str] = "clean-fid's statistics, an .npz"
    labels: ClassVar[str] = "random"

    def network(self, device: torch.device | str) -> Network:
        return CleanInception(self.weights, device, self.name)

    def measure(self, seen: Seen, reference: Reference) -> dict[str, Number]:
        return {"clean_fid": _frechet(seen.features, reference.gaussian)}


@register("protocol", "cmmd")
@dataclass(frozen=True)
class Cmmd(Evaluator):
    """CMMD: the MMD of CLIP embeddings (Jayasumana et al. 2024)."""

    table: ClassVar[str] = "CMMD (2401.09603), text to image on COCO-30k"
    needs: ClassVar[str] = "a folder of openai/clip-vit-large-patch14-336 in the layout of the hub; ditkit[encoders]"
    images: ClassVar[str] = "bytes, 336 px by the bicubic filter with antialiasing; CLIP's mean"
    reference: ClassVar[str] = "images: statistics are not enough"
    labels: ClassVar[str] = "prompts of COCO"

    def network(self, device: torch.device | str) -> Network:
        return Clip(self.weights, device, self.name)

    def measure(self, seen: Seen, reference: Reference) -> dict[str, Number]:
        if reference.seen is None:
            raise DitkitError("CMMD compares images with images: give a folder, an .npz with arr_0 or a data set")
        return {"cmmd": gaussian_distance(seen.features, reference.seen.features)}


def parts(number: Number) -> tuple[float, float | None, tuple[float, float] | None]:
    """Value, standard error and interval of 95%, of which a number may have one, both or none."""
    if isinstance(number, Interval):
        return number.value, number.error, (number.low, number.high)
    if isinstance(number, Estimate):
        return number.value, number.error, None
    return number, None, None
