"""Named sizes, how a model is built, and what it declares about parallelism."""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, Self, TypeVar, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..conditioning import Conditioning, Tokens
from ..config import DitkitError, lookup, names, near, register_name, registered_as
from ..layers import Edit, Pattern
from ..rng import Rng

__all__ = [
    "ImageConfig",
    "Model",
    "ModelConfig",
    "Plan",
    "TiledConfig",
    "TokenConfig",
    "at_least_one",
    "check_pattern",
    "create_model",
    "given_pooled",
    "given_text",
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

    def meet(self, examples: Iterable[Tensor]) -> None:
        """What it takes from training samples, as they are diffused, before its first step; by default nothing."""

    def prepare(self, cond: Conditioning, shape: Sequence[int], times: Sequence[float] = ()) -> Conditioning:
        """What depends neither on x nor on the step, computed once for x of `shape`; by default nothing does."""
        return cond

    def forward(self, x: Tensor, t: Tensor, cond: Conditioning, *, edit: Edit | None = None) -> Tensor:
        raise NotImplementedError


@runtime_checkable
class ModelConfig(Protocol):
    """A frozen dataclass that says everything about a network and builds it."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one x: [c h w] of an image, [d] of a vector, [l] of a text."""
        ...

    @property
    def length(self) -> int:
        """How many tokens the blocks see of such an x: some grids depend on it."""
        ...

    @property
    def vocab(self) -> int:
        """How many kinds of tokens x is made of; 0 where x is continuous."""
        ...

    def fitted(self, shape: tuple[int, ...], classes: int, vocab: int) -> Self:
        """The same for such an x (`vocab` as above) and so many classes. Raises DitkitError if it cannot be."""
        ...

    def example(self, batch: int) -> Conditioning:
        """A conditioning of the shapes that the model takes, all zeros: to count what a forward pass costs."""
        ...

    def build(self, seed: int = 0) -> Model: ...


def _label(config: Any, batch: int) -> Conditioning:
    """A label for each sample, if there are classes."""
    return Conditioning(label=torch.zeros(batch, dtype=torch.long) if getattr(config, "num_classes", 0) else None)


class TiledConfig:
    """What the configurations of models of images [c h w] share, whose sides are multiples of `tile`.

    A model that is given text has no field num_classes: its conditioner turns classes into text.
    """

    input_size: int | tuple[int, int]
    in_channels: int

    @property
    def tile(self) -> int:
        """The side of the squares that must tile an image."""
        raise NotImplementedError

    @property
    def tiled_by(self) -> str:
        """These squares in words, and the option to change, for a message."""
        raise NotImplementedError

    @property
    def vocab(self) -> int:
        """0: x is continuous."""
        return 0

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, rows, columns."""
        size = self.input_size
        return self.in_channels, *((size, size) if isinstance(size, int) else size)

    def example(self, batch: int) -> Conditioning:
        """A label for each sample, if there are classes."""
        return _label(self, batch)

    def fitted(self, shape: tuple[int, ...], classes: int, vocab: int) -> Self:
        """With this size and so many channels and classes. Raises DitkitError if the image is not tiled."""
        if vocab or len(shape) != 3:
            what = "tokens" if vocab else f"of shape {list(shape)}"
            raise DitkitError(
                f"the model is for images [c h w], and what is diffused is {what}: choose another --model"
            )
        channels, height, width = shape
        if min(height, width) < 1 or height % self.tile or width % self.tile:
            raise DitkitError(f"images of {height} x {width} are not tiled by {self.tiled_by} or the resolution")
        size = height if height == width else (height, width)
        changes: dict[str, Any] = {"in_channels": channels, "input_size": size}
        if "num_classes" in (f.name for f in dataclasses.fields(self)):  # type: ignore[arg-type]
            changes["num_classes"] = classes
        return dataclasses.replace(self, **changes)  # type: ignore[type-var]


class ImageConfig(TiledConfig):
    """What the configurations of models on patches of images share."""

    patch_size: int

    @property
    def tile(self) -> int:
        """The side of a patch."""
        return self.patch_size

    @property
    def tiled_by(self) -> str:
        return f"patches of {self.patch_size}: change the patch size (--model.patch-size)"

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        _, height, width = self.shape
        return height // self.patch_size, width // self.patch_size

    @property
    def length(self) -> int:
        """The number of patches."""
        rows, columns = self.grid
        return rows * columns


class TokenConfig:
    """What the configurations of models on tokens share: how they are fitted to an x [l]."""

    length: int
    vocab: int

    @property
    def shape(self) -> tuple[int]:
        """The number of tokens."""
        return (self.length,)

    def example(self, batch: int) -> Conditioning:
        """A label for each sample, if there are classes."""
        return _label(self, batch)

    def fitted(self, shape: tuple[int, ...], classes: int, vocab: int) -> Self:
        """With this length, vocabulary and number of classes. Raises DitkitError for what are not tokens, and for
        classes where the model has none."""
        name = registered_as(self)[1]
        if vocab == 0 or len(shape) != 1:
            raise DitkitError(f"the model {name} is for tokens, and what is diffused is {list(shape)}: choose another")
        changes: dict[str, Any] = {"length": shape[0], "vocab": vocab}
        if hasattr(self, "num_classes"):
            changes["num_classes"] = classes
        elif classes:
            raise DitkitError(f"the model {name} takes no classes, and the data has {classes}: choose another")
        return dataclasses.replace(self, **changes)  # type: ignore[type-var]


def given_text(cond: Conditioning, channels: int, batch: int | None = None) -> Tokens:
    """The text's tokens. Raises DitkitError if there is none, or of other channels than `text_dim`, or, where `batch`
    is given, not one for each sample."""
    if cond.text is None:
        raise DitkitError(f"the model takes a text, tokens [b l {channels}], and none was given")
    if cond.text.values.shape[-1] != channels:
        raise DitkitError(
            f"the model takes a text [b l {channels}] (text_dim={channels}), and was given "
            f"{list(cond.text.values.shape)}: change text_dim"
        )
    if batch is not None and len(cond.text.values) != batch:
        raise DitkitError(f"x has {batch} samples, and texts were given for {len(cond.text.values)}: give one for each")
    return cond.text


def given_pooled(cond: Conditioning, channels: int) -> Float[Tensor, "b d"]:
    """The pooled text. Raises DitkitError if there is none, or of other channels than `pooled_dim`."""
    if cond.pooled is None:
        raise DitkitError(f"the model takes a pooled text [b {channels}], and none was given")
    if cond.pooled.shape[-1] != channels:
        raise DitkitError(
            f"the model takes a pooled text [b {channels}] (pooled_dim={channels}), and was given "
            f"{list(cond.pooled.shape)}: change pooled_dim"
        )
    return cond.pooled


M = TypeVar("M", bound=Model)


def at_least_one(config: Any, *fields: str) -> None:
    """Raises DitkitError for a size below 1."""
    for field in fields:
        if getattr(config, field) < 1:
            raise DitkitError(f"model.{field} must be at least 1, not {getattr(config, field)}")


def check_pattern(config: Any) -> None:
    """Raises DitkitError for a `pattern` that is neither None nor a pattern of attention."""
    pattern = config.pattern
    if pattern is not None and not isinstance(pattern, Pattern):
        known = ", ".join(names("pattern"))
        raise DitkitError(f"model.pattern is None or a pattern of attention ({known}), not {pattern!r}")


class _Unwritten(TorchFunctionMode):
    """No initial values: on `meta` there is nothing to write, and torch takes a second to find that out."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (Tensor.normal_, Tensor.uniform_) or getattr(func, "__module__", "") == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


def instantiate(cls: type[M], config: Any, seed: int) -> M:
    """Build on `meta`, then give memory and initial weights on torch's default device; on `meta` leave it there.

    torch's global generator is not touched, and no weight is initialised twice. Raises DitkitError for sizes that do
    not fit together.
    """
    device = torch.get_default_device()
    try:
        with torch.device("meta"), _Unwritten():
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
