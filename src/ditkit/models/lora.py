"""LoRA (Hu et al. 2021, arXiv 2106.09685) on any family: frozen weights W, trained B A of low rank beside them.

A network with adapters is a model as any other: its configuration wraps that of the network, so that training,
checkpoints, averages and sampling know nothing of it. The adapters are peft's.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..conditioning import Conditioning
from ..config import DitkitError, near, register
from ..rng import Rng
from .dit import DiTConfig
from .registry import Model

__all__ = ["LoRAConfig", "adapters", "base_weights", "merged", "unadapted"]

_BASE, _A, _B = ".base_layer.", ".lora_A.default.weight", ".lora_B.default.weight"


@register("model", "lora")
@dataclass(frozen=True)
class LoRAConfig:
    """A network with adapters: W + (alpha / rank) B A in the Linears whose names end in one of `targets`."""

    base: Any = DiTConfig()
    """The network."""
    rank: int = 16
    alpha: float = 16.0
    """The adapters are scaled by alpha / rank."""
    targets: tuple[str, ...] = ("qkv", "q", "k", "v", "kv", "proj")
    """Last parts of the names of Linears; a convolution with such a name is left alone."""
    dropout: float = 0.0
    """Of what goes into the adapters."""

    def __post_init__(self) -> None:
        if self.rank < 1 or not self.alpha > 0 or not 0 <= self.dropout < 1:
            raise DitkitError(
                "model lora: rank is at least 1, alpha above 0 and dropout in [0, 1), not "
                f"{self.rank}, {self.alpha:g} and {self.dropout:g}"
            )
        if isinstance(self.base, LoRAConfig):
            raise DitkitError("model lora: the network has adapters already; merge them first (ditkit export)")

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one x."""
        return self.base.shape

    @property
    def length(self) -> int:
        """How many tokens the blocks see of such an x."""
        return self.base.length

    @property
    def vocab(self) -> int:
        """How many kinds of tokens x is made of; 0 where x is continuous."""
        return self.base.vocab

    @property
    def num_classes(self) -> int:
        """Of the network; 0 where it has none."""
        return getattr(self.base, "num_classes", 0)

    def fitted(self, shape: tuple[int, ...], classes: int, vocab: int) -> Self:
        """The network fitted, with the same adapters."""
        return dataclasses.replace(self, base=self.base.fitted(shape, classes, vocab))

    def example(self, batch: int) -> Conditioning:
        """As the network's own."""
        return self.base.example(batch)

    def build(self, seed: int = 0) -> Model:
        """The network with its initial weights and adapters that change nothing yet: A as peft begins it, B = 0.

        Raises DitkitError if peft is missing, and for targets that no Linear is called.
        """
        try:
            from peft import LoraConfig, inject_adapter_in_model
        except ImportError:
            raise DitkitError("adapters need peft: pip install 'ditkit[lora]'") from None
        model = self.base.build(seed)
        linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
        adapted = [name for name in linear if name.split(".")[-1] in self.targets]
        if not adapted:
            known = sorted({name.split(".")[-1] for name in linear})
            raise DitkitError(f"no Linear of the model is called {self.targets[0]!r}: {near(self.targets[0], known)}")
        alpha: Any = self.alpha  # peft says int, and divides it by the rank
        settings = LoraConfig(r=self.rank, lora_alpha=alpha, target_modules=adapted, lora_dropout=self.dropout)
        inject_adapter_in_model(settings, model, low_cpu_mem_usage=True)
        device = next(model.parameters()).device
        rng = Rng(seed)
        for name, parameter in list(model.named_parameters()):
            parameter.requires_grad = name.endswith((_A, _B))
            if parameter.requires_grad and device.type != "meta":
                _place(model, name, _start(name, parameter, rng).to(device))
        return model


def _start(name: str, parameter: Tensor, rng: Rng) -> Tensor:
    value = torch.zeros(parameter.shape, device="cpu")
    if name.endswith(_A):
        nn.init.kaiming_uniform_(value, a=math.sqrt(5), generator=rng.generator(name))
    return value


def _place(model: nn.Module, name: str, value: Tensor) -> None:
    module, _, last = name.rpartition(".")
    setattr(model.get_submodule(module), last, nn.Parameter(value))


def base_weights(names: Mapping[str, Any]) -> dict[str, str]:
    """Of the names of a network with adapters those of the network itself: {its own name: the name here}."""
    return {name.replace(_BASE, "."): name for name in names if not name.endswith((_A, _B))}


def adapters(weights: Mapping[str, Tensor]) -> dict[str, tuple[Float[Tensor, "r i"], Float[Tensor, "o r"]]]:
    """A and B of each adapted Linear, by its name in the network."""
    stems = [name.removesuffix(_A) for name in weights if name.endswith(_A)]
    return {stem: (weights[stem + _A], weights[stem + _B]) for stem in stems}


@torch.no_grad()
def merged(config: LoRAConfig, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a network that does the same without adapters: W + (alpha / rank) B A."""
    result = {own: weights[here] for own, here in base_weights(weights).items()}
    for stem, (a, b) in adapters(weights).items():
        own = result[f"{stem}.weight"]
        result[f"{stem}.weight"] = (own.double() + config.scale * b.double() @ a.double()).to(own.dtype)
    return result


def unadapted(config: Any, weights: Mapping[str, Tensor]) -> tuple[Any, dict[str, Tensor]]:
    """A configuration and weights without adapters: merged where there are some, as they are where there are none."""
    return (config.base, merged(config, weights)) if isinstance(config, LoRAConfig) else (config, dict(weights))
