"""Guides away from the null: the weak opinion is the same network's, given nothing (or a negative prompt)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ...config import DitkitError, register, registered_as
from ..denoiser import Denoiser
from ..path import DDPM
from ..space import check_space
from .guided import Guide, Moment, Opinion

__all__ = ["APG", "CFG", "CFGPP", "CFGZeroStar", "ClassifierFree"]


@dataclass(frozen=True)
class ClassifierFree(Guide):
    """The base of the guides away from the null."""

    null: Any = None
    """The conditioning of the weak opinion, one row per sample: a null label, a negative prompt. None in a recipe: the
    null of its conditioner."""

    def weak(self, strong: Opinion) -> Opinion:
        """Raises DitkitError without a null."""
        if self.null is None:
            raise DitkitError(f"the guide {registered_as(self)[1]} needs a null, the conditioning of its weak opinion")
        return replace(strong, cond=self.null)


@register("guide", "cfg")
@dataclass(frozen=True)
class CFG(ClassifierFree):
    """Classifier-free guidance: weak + scale (strong - weak) (Ho & Salimans 2022, in Imagen's form: 1 = none)."""

    channels: int | None = None
    """Only the first ones are guided, the others keep the strong opinion (DiT: 3 of 4). None = all."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.channels is not None and self.channels < 1:
            raise DitkitError(f"guidance on {self.channels} channels: use at least 1, or none for all")

    @property
    def guides_tokens(self) -> bool:
        return self.channels is None

    def rule(self, strong: Tensor, weak: Tensor, memory: Any) -> tuple[Tensor, Any]:
        difference = strong - weak
        if self.channels is not None:
            difference = difference.clone()
            difference[:, self.channels :] = 0
        return difference, memory


@register("guide", "cfg_pp")
@dataclass(frozen=True)
class CFGPP(CFG):
    """CFG++ (Chung et al. 2024, 2406.08070): x0 is guided, and renoised with the eps of the null.

    scale is its lambda, from 0 to 1; here 1 is not none. DDIM's step with it, alpha_s x0_guided + sigma_s eps_null, is
    DDIM's step with plain guidance of the scale

        lambda / (1 - (sigma_s alpha_t) / (alpha_s sigma_t)),

    since x0 and eps of one opinion are tied by x. So it is a guide whose scale depends on the step from t to s: its
    prediction is of one x, every solver is right about it, and the alpha of flow paths is in the formula. With ddim
    (eta 0), and with euler on a linear path, it is the paper's method exactly. That scale grows with the number of
    steps.
    """

    @property
    def guides_tokens(self) -> bool:
        return False  # its scale is made of alpha and sigma

    def weight(self, at: Moment) -> float:
        if not self.acts(at):
            return 0.0
        s = at.next
        if at.t <= s:
            return self.scale - 1
        # from the beginning of the step: within it, where some solvers look too, the rest of the step tends to nothing
        (alpha_t, sigma_t), (alpha_s, sigma_s) = ((float(c) for c in at.path(time)) for time in (at.begin, s))
        return self.scale * alpha_s * sigma_t / (alpha_s * sigma_t - sigma_s * alpha_t) - 1


@register("guide", "cfg_zero_star")
@dataclass(frozen=True)
class CFGZeroStar(ClassifierFree):
    """CFG-Zero* (Fan et al. 2025, 2503.18886): the null's opinion is scaled to fit before it is used.

    Its factor is s = <strong, weak> / |weak|^2, for each sample: s weak + scale (strong - s weak).
    """

    zero_init: int = 1
    """In the first steps x is held still and no pass is run."""
    space: str | None = "velocity"
    """Where the fit is made. None = the space of the network's output."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.zero_init < 0:
            raise DitkitError(f"guide.zero_init is a number of steps, not {self.zero_init}")
        if self.space is not None:
            check_space(self.space)

    @property
    def rule_space(self) -> str | None:
        return self.space

    def check(self, denoiser: Denoiser, visited: Sequence[float]) -> None:
        if self.zero_init and isinstance(denoiser.path, DDPM):
            raise DitkitError(
                "the guide cfg_zero_star holds the velocity at 0 in its first steps, and a DDPM path has none: "
                "set zero_init to 0 and space to eps, or use another guide"
            )

    def holds_still(self, at: Moment) -> bool:
        return self.zero_init > 0 and at.step < self.zero_init

    def rule(self, strong: Tensor, weak: Tensor, memory: Any) -> tuple[Tensor, Any]:
        s = _inner(strong, weak) / (_inner(weak, weak) + 1e-8)
        return strong - s.to(weak.dtype) * weak, memory


@register("guide", "apg")
@dataclass(frozen=True)
class APG(ClassifierFree):
    """Adaptive projected guidance (Sadat et al. 2024, 2410.02416): strong + (scale - 1) of the projected difference.

    The difference gathers momentum, is shortened to the threshold, and its part parallel to the strong opinion, which
    saturates colours, is multiplied by eta. All norms are of one sample; memory is of one trajectory.

    The paper's table 10 has a threshold and a momentum for each model: 15 and -0.5 for Stable Diffusion XL, and a
    smaller threshold for smaller latents. The momentum is the default here; the threshold depends on the size of x, and
    there is none unless it is said. The guider of diffusers (0.42) has no momentum, eta 1 and a threshold of 15 unless
    told otherwise, and works on the network's output (`space=None`).
    """

    eta: float = 0.0
    """Factor of the parallel part; 1 = plain guidance."""
    threshold: float = 0.0
    """The largest norm of the difference, r in the paper; 0 = any."""
    momentum: float = -0.5
    """beta in the paper: what came before counts so much in the next prediction; negative = away from it, 0 = none.
    The default is the paper's for Stable Diffusion XL."""
    space: str | None = "x0"
    """Where it works: x0 in the paper. None = the space of the network's output, as in diffusers."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not -1 < self.momentum < 1:
            raise DitkitError(f"guide.momentum is between -1 and 1, not {self.momentum}")
        if not self.threshold >= 0:
            raise DitkitError(f"guide.threshold is a norm, 0 = any, not {self.threshold}")
        if self.space is not None:
            check_space(self.space)

    @property
    def rule_space(self) -> str | None:
        return self.space

    def rule(self, strong: Tensor, weak: Tensor, memory: Any) -> tuple[Tensor, Any]:
        difference = strong - weak
        if self.momentum:
            difference = memory = difference if memory is None else difference + self.momentum * memory
        if self.threshold:
            norm = _inner(difference, difference).sqrt()
            difference = difference * (self.threshold / norm).clamp(max=1).to(difference.dtype)
        share = _inner(difference, strong) / _inner(strong, strong).clamp(min=1e-24)
        return difference + (self.eta - 1) * share.to(strong.dtype) * strong, memory


def _inner(a: Tensor, b: Tensor) -> Tensor:
    """The inner product of each sample, in float64, in a shape that multiplies the samples."""
    return torch.linalg.vecdot(a.double().flatten(1), b.double().flatten(1)).view(-1, *[1] * (a.ndim - 1))
