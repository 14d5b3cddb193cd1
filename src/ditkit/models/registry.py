"""Named sizes, how a model is built, and what it declares about parallelism."""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor, nn

from ..conditioning import Conditioning
from ..config import DitkitError, lookup, names, near, register_name
from ..layers import Edit
from ..rng import Rng

__all__ = [
    "Model",
    "ModelConfig",
    "Plan",
    "at_least_one",
    "create_model",
    "instantiate",
    "list_models",
    "model_config",
    "register_models",
]


@dataclass(frozen=True)
class Plan:
    """How a model may be divided: `shard` names its lists of equal blocks (compiled, and sharded, one by one)."""

    shard: tuple[str, ...]


class Model(nn.Module):
    """The contract of a network: single device, in its authors' time, sign and shapes.

    `forward(x, t, cond, *, edit=None)` takes [b c *space] and gives [b c *space], or twice the channels where the
    variance is learned. `prepare` fills `cond.static` with what does not depend on x; it never changes a result.
    """

    plan: ClassVar[Plan]
    config: Any

    def init_weights(self, rng: Rng) -> None:
        """Set every parameter, as a pure function of the seed of `rng`."""
        raise NotImplementedError

    def prepare(self, cond: Conditioning, shape: Sequence[int], times: Sequence[float] = ()) -> Conditioning:
        """What depends neither on x nor on the step, computed once for x of `shape`; by default nothing does."""
        return cond

    def forward(self, x: Tensor, t: Tensor, cond: Conditioning, *, edit: Edit | None = None) -> Tensor:
        raise NotImplementedError


@runtime_checkable
class ModelConfig(Protocol):
    """A frozen dataclass that says everything about a network and builds it."""

    def build(self, seed: int = 0) -> Model: ...


M = TypeVar("M", bound=Model)


def at_least_one(config: Any, *fields: str) -> None:
    """Raises DitkitError for a size below 1."""
    for field in fields:
        if getattr(config, field) < 1:
            raise DitkitError(f"model.{field} must be at least 1, not {getattr(config, field)}")


def instantiate(cls: type[M], config: Any, seed: int) -> M:
    """Build on `meta`, then give memory and initial weights on torch's default device; on `meta` leave it there.

    torch's global generator is not touched, and no weight is initialised twice. Raises DitkitError for sizes that do
    not fit together.
    """
    device = torch.get_default_device()
    try:
        with torch.device("meta"):
            model = cls(config)
    except ValueError as error:
        raise DitkitError(f"{cls.__name__} cannot be built: {error}") from None
    if device.type == "meta":
        return model
    with torch.device("cpu"):
        model.to_empty(device="cpu")
        model.init_weights(Rng(seed))
    return model.to(device)


def register_models(sizes: Mapping[str, ModelConfig]) -> None:
    """Give names to configurations."""
    for name, config in sizes.items():
        register_name("size", name, config)


def list_models(pattern: str = "*") -> list[str]:
    """The names of all models that match a glob such as "jit_*_16"."""
    return fnmatch.filter(names("size"), pattern)


def model_config(name: str, **overrides: Any) -> ModelConfig:
    """The configuration of a named model, with some fields replaced. Unknown names and fields list the near ones."""
    if name not in names("size"):
        raise DitkitError(f"unknown model {name!r}: {near(name, names('size'))}")
    config = lookup("size", name)
    known = [f.name for f in dataclasses.fields(config)]
    for key in overrides:
        if key not in known:
            raise DitkitError(f"{name} has no option {key!r}: {near(key, known)}")
    return dataclasses.replace(config, **overrides)


def create_model(name: str, *, seed: int = 0, **overrides: Any) -> Model:
    """Build a named model with initial weights: `create_model("dit_s_2", num_classes=10)`.

    Under `with torch.device("meta")` it takes no memory.
    """
    return model_config(name, **overrides).build(seed)
