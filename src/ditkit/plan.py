"""What a model will cost, before anyone spends money: parameters, multiply-accumulates, memory.

Nothing is computed and no weight is allocated: the model runs on shapes alone.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from .config import DitkitError
from .models import ModelConfig

__all__ = ["Cost", "at_resolution", "cost", "gmacs", "peak_bytes"]


C = TypeVar("C", bound=ModelConfig)


@dataclass(frozen=True)
class Cost:
    """Counts for a model at a size. Memory is in bytes and leaves out what an allocator and a driver add."""

    parameters: int
    trainable: int
    gmacs: float
    """Billions of multiply-accumulates of one forward pass of one sample: linear layers, convolutions and both products
    of attention."""
    shape: tuple[int, ...]
    vocab: int
    batch: int
    dtype: str
    weights: int
    """The weights in the dtype of sampling."""
    sampling: int
    """Weights and the largest sum of what lives at once in one forward pass of the batch."""
    training: int
    """Float32 weights, gradients, two AdamW moments and one average, and what lives at once in a training step."""


def _x(config: ModelConfig, batch: int, shape: tuple[int, ...]) -> Tensor:
    return torch.zeros(batch, *shape, dtype=torch.long) if config.vocab else torch.empty(batch, *shape)


def gmacs(config: ModelConfig, shape: tuple[int, ...]) -> float:
    """Billions of multiply-accumulates of one forward pass of one sample of `shape`."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        config.build()(_x(config, 1, shape), torch.empty(1), config.example(1))
    return counter.get_total_flops() / 2e9


class _Live(TorchDispatchMode):
    """Follows the memory of every tensor that an operation returns, until nothing holds it."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known: set[int] = set()

    def forget(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, Tensor):
                storage = x.untyped_storage()
                key, size = storage._cdata, storage.nbytes()
                if key not in self.known and key not in given:
                    self.known.add(key)
                    self.now += size
                    weakref.finalize(storage, self.forget, key, size)
        self.peak = max(self.peak, self.now)
        return out


def peak_bytes(function: Callable[[], Any]) -> int:
    """The most memory that tensors made by `function` take at one time, in bytes."""
    with _Live() as live:
        function()
    return live.peak


def at_resolution(config: C, resolution: int | None) -> C:
    """The model on squares of this side, in the units that it diffuses; None: on its own shape.

    Raises DitkitError for a resolution that patches do not tile, and for models that have none.
    """
    shape = config.shape
    if resolution is not None:
        if config.vocab or len(shape) < 3:
            raise DitkitError(f"a model of {'tokens' if config.vocab else 'vectors'} has no resolution")
        shape = (*shape[:-2], resolution, resolution)
    return config.fitted(shape, getattr(config, "num_classes", 0), config.vocab)


def cost(config: ModelConfig, *, resolution: int | None = None, batch: int = 1, dtype: str = "bf16") -> Cost:
    """The cost of a model on inputs of `resolution` (its own by default), in the units that the model diffuses.

    dtype: "bf16" samples with a network in bfloat16 and trains under autocast, "fp32" does both in float32. Memory
    assumes attention that does not keep the matrix of weights. Raises DitkitError for a resolution that patches do not
    tile.
    """
    if dtype not in ("bf16", "fp32"):
        raise DitkitError(f"the dtype is bf16 or fp32, not {dtype!r}")
    if batch < 1:
        raise DitkitError(f"the batch is at least 1, not {batch}")
    config = at_resolution(config, resolution)
    shape = config.shape
    with torch.device("meta"):
        model = config.build()
    count = sum(p.numel() for p in model.parameters())
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    sampling, training = _memory(config, shape, batch, dtype)
    # some layers keep their weights in float32
    weights = sum(p.nbytes for p in (model.bfloat16() if dtype == "bf16" else model).parameters())
    return Cost(
        parameters=count,
        trainable=trainable,
        gmacs=gmacs(config, shape),
        shape=shape,
        vocab=config.vocab,
        batch=batch,
        dtype=dtype,
        weights=weights,
        sampling=weights + sampling,
        # master weights, two moments and an average beside what the step itself makes, which has the gradients
        training=count * 4 + trainable * 12 + training,
    )


def _memory(config: ModelConfig, shape: tuple[int, ...], batch: int, dtype: str) -> tuple[int, int]:
    """Bytes alive at once in a forward pass for sampling, and in a forward and backward pass for training."""
    low = dtype == "bf16"
    with torch.device("meta"):
        model = config.build()
    kinds = {name: p.dtype for name, p in (model.bfloat16() if low else model).named_parameters()}
    with FakeTensorMode():
        weights = {name: torch.empty(p.shape, requires_grad=p.requires_grad) for name, p in model.named_parameters()}
        x, t, given = _x(config, batch, shape), torch.empty(batch), config.example(batch)

        def step() -> None:
            with torch.autocast("cpu", torch.bfloat16, enabled=low):
                out = functional_call(model, weights, (x, t, given))
            out.float().square().mean().backward()

        training = peak_bytes(step)
        if low:
            weights = {name: w.detach().to(kinds[name]) for name, w in weights.items()}
            x = x if config.vocab else x.bfloat16()
        with torch.no_grad():
            sampling = peak_bytes(lambda: functional_call(model, weights, (x, t, given)))
    return sampling, training
