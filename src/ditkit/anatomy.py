"""What the blocks of a model do, read off the model as it runs: for the page of families and its pictures.

A forward pass on shapes alone is watched: modules as they are called, and the functions between them that a drawing of
a block shows (attention, nonlinearities, modulation, gates, residual sums).
"""

from __future__ import annotations

import ast
import inspect
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from . import layers
from .models import ModelConfig
from .report import figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Anatomy", "Part", "anatomy", "drawing", "used_layers"]


@dataclass
class Part:
    """A module or a function in the order of its call, with what was called inside."""

    name: str
    """Of the module within its block; empty for a function."""
    label: str
    kind: str
    """block, module, linear, norm, attention, activation, modulation, rotation, sum"""
    parts: list[Part] = field(default_factory=list)

    def walk(self) -> Iterator[Part]:
        """This part and all inside, in order."""
        yield self
        for part in self.parts:
            yield from part.walk()

    def text(self, depth: int = 0) -> str:
        """As indented lines."""
        own = "  " * depth + (f"{self.name}: " if self.name else "") + self.label
        return "\n".join([own, *(part.text(depth + 1) for part in self.parts)])


@dataclass(frozen=True)
class Anatomy:
    """The kinds of blocks of a model in the order of their first call, and how many there are of each."""

    blocks: tuple[tuple[str, int, Part], ...]
    """The list that a block is of ("double_blocks"), how many there are, the first."""


def anatomy(config: ModelConfig) -> Anatomy:
    """The blocks of a model. Nothing is computed: the model runs on shapes alone."""
    first: dict[tuple[str, str], Part] = {}
    count: dict[tuple[str, str], int] = {}

    def watch(site: str, block: nn.Module, x: Any, *args: Any, **kwargs: Any) -> Any:
        with _Watch(block, (x, *args)) as seen:
            out = block(x, *args, **kwargs)
        # blocks that do the same at another width are of one kind
        key = (re.sub(r"\.\d+(\.|$)", r".#\1", site), re.sub(r"\d+", "#", seen.root.text()))
        first.setdefault(key, seen.root)
        count[key] = count.get(key, 0) + 1
        return out

    with torch.device("meta"), torch.no_grad():
        model = config.build().eval()
        x = torch.zeros(1, *config.shape, dtype=torch.long) if config.vocab else torch.empty(1, *config.shape)
        model(x, torch.empty(1), config.example(1), edit=watch)
    return Anatomy(tuple((site.removesuffix(".#"), count[site, text], part) for (site, text), part in first.items()))


_ACTIVATIONS = {
    F.gelu: "GELU", F.silu: "SiLU", F.relu: "ReLU", torch.relu: "ReLU", F.sigmoid: "sigmoid", torch.sigmoid: "sigmoid",
}  # fmt: skip
_PRODUCTS = (torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__)
_SUMS = (torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__)
_TAKEN = (Tensor.__getitem__, Tensor.unsqueeze, Tensor.float, Tensor.to, Tensor.type_as)


class _Watch(TorchFunctionMode):
    """Follows one call of a block."""

    def __init__(self, block: nn.Module, given: Sequence[Any]):
        super().__init__()
        self.root = Part("", type(block).__name__, "block")
        self.stack = [self.root]
        # what a tensor is, by identity; the tensors are kept, so that no other gets the same
        self.meaning: dict[int, str] = {}
        self.kept: list[Any] = []
        leaves = [x for x in tree_leaves(tuple(given)) if isinstance(x, Tensor)]
        streams = tree_leaves(given[0])
        self.widths = {x.shape[-1] for x in streams if isinstance(x, Tensor) and x.ndim == 3}
        self.maps = any(isinstance(x, Tensor) and x.ndim == 4 for x in streams)
        for x in leaves:
            if x.ndim >= 3 and x.shape[0] == 2 and x.is_floating_point() and not any(x is s for s in streams):
                self._mean(x, "rotation")
        self.handles: list[Any] = []
        for name, module in block.named_modules():
            if name and not isinstance(module, nn.ModuleList | nn.Identity | nn.Dropout):
                self.handles.append(module.register_forward_pre_hook(self._enter(name)))
                self.handles.append(module.register_forward_hook(self._leave))

    def __exit__(self, *error: Any) -> None:
        for handle in self.handles:
            handle.remove()
        super().__exit__(*error)

    def _mean(self, x: Any, what: str) -> None:
        self.meaning[id(x)] = what
        self.kept.append(x)

    def _enter(self, name: str) -> Callable[..., None]:
        def enter(module: nn.Module, args: Any) -> None:
            label, kind = _described(module)
            part = Part(name, label, kind)
            self.stack[-1].parts.append(part)
            self.stack.append(part)

        return enter

    def _leave(self, module: nn.Module, args: Any, out: Any) -> None:
        self.stack.pop()

    def _note(self, label: str, kind: str) -> None:
        parts = self.stack[-1].parts
        if not (parts and parts[-1].label == label and kind == "rotation"):  # q and k are turned one after the other
            parts.append(Part("", label, kind))

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = [self.meaning.get(id(a)) for a in args]
        if self.stack[-1].kind in ("norm", "activation"):  # said by the module's name
            return out
        if func is F.scaled_dot_product_attention:
            self._note(_attention(args, kwargs or {}), "attention")
        elif func in _ACTIVATIONS:
            form = ", tanh form" if (kwargs or {}).get("approximate") == "tanh" else ""
            self._note(_ACTIVATIONS[func] + form, "activation")
        elif func in (torch.tanh, Tensor.tanh):
            self._mean(out, "tanh gate")
        elif func in _TAKEN and given[0] is not None and isinstance(out, Tensor):
            self._mean(out, given[0])
        elif func in _SUMS and any(isinstance(a, int | float) and a == 1 for a in args[:2]):
            self._mean(out, "1 + scale")
        elif func in _PRODUCTS and all(isinstance(a, Tensor) for a in args[:2]):
            self._product(args, given, out)
        elif func in _SUMS and all(isinstance(a, Tensor) for a in args[:2]):
            self._sum(args, out)
        return out

    def _product(self, args: Any, given: Sequence[str | None], out: Tensor) -> None:
        if "rotation" in given[:2]:
            self._note("RoPE", "rotation")
        elif "1 + scale" in given[:2]:
            self._note("× (1 + scale)", "modulation")
        elif "tanh gate" in given[:2]:
            self._note("× tanh gate", "modulation")
        elif out.shape[-1] in self.widths and _for_all_tokens(args):
            self._note("× gate", "modulation")
        elif args[0].shape == args[1].shape and out.ndim == 3:
            self._note("× value", "activation")

    def _sum(self, args: Any, out: Tensor) -> None:
        maps = self.maps and out.ndim == 4
        if not maps and (out.ndim != 3 or out.shape[-1] not in self.widths):
            return
        if args[0].shape == args[1].shape:
            self._note("+ residual", "sum")
        elif (maps and 1 == args[1].shape[-1] == args[1].shape[-2]) or _for_all_tokens(args):
            self._note("+ shift", "modulation")


def _for_all_tokens(args: Sequence[Tensor]) -> bool:
    """Whether one of two tensors [b n d] is the same vector for all tokens."""
    return args[0].ndim == args[1].ndim == 3 and 1 in (args[0].shape[1], args[1].shape[1])


def _described(module: nn.Module) -> tuple[str, str]:
    kind = type(module).__name__
    if isinstance(module, nn.Linear):
        bias = "" if module.bias is not None else ", no bias"
        return f"Linear {module.in_features} → {module.out_features}{bias}", "linear"
    if isinstance(module, nn.Conv2d):
        size = " x ".join(map(str, module.kernel_size))
        depthwise = ", depthwise" if module.groups == module.in_channels > 1 else ""
        return f"Conv {size}, {module.in_channels} → {module.out_channels}{depthwise}", "linear"
    if "Norm" in kind:
        weight = getattr(module, "weight", None)
        bias = getattr(module, "bias", None)
        return f"{kind}{'' if weight is None else ', weight' if bias is None else ', weight and bias'}", "norm"
    if isinstance(module, layers.LinearAttention):
        return f"{kind}: relu(q) relu(k)ᵀ v / Σ, {module.heads} heads of {module.head_dim}", "attention"
    if isinstance(module, nn.SiLU | nn.GELU | nn.ReLU):
        return kind, "activation"
    return kind, "module"


def _attention(args: Any, kwargs: Any) -> str:
    q, k = args[0], args[1]
    heads = f"{q.shape[1]} heads of {q.shape[-1]}"
    if q.shape[1] != k.shape[1]:
        heads += f", {k.shape[1]} of keys and values"
    return f"softmax(q kᵀ / √d) v, {heads}"


def used_layers(config: ModelConfig) -> set[str]:
    """The layers, modules and functions, that a family is made of: those that its file imports or its model holds."""
    with torch.device("meta"):
        model = config.build()
    held = {type(module).__name__ for module in model.modules()}
    tree = ast.parse(inspect.getsource(sys.modules[type(model).__module__]))
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module == "layers"]
    return (held | {alias.name for node in imports for alias in node.names}) & set(layers.__all__)


_END = Part("", "", "end")  # of a frame, in a drawing


def _height(part: Part) -> float:
    """In rows; a frame ends a little below what is in it."""
    return 1 + sum(map(_height, part.parts)) + (0.25 if part.parts else 0)


_FILL = {
    "linear": "#dbe7f6", "norm": "#fdf3cf", "attention": "#d7efdd", "activation": "#fbe0d3", "modulation": "#eadcf4",
    "rotation": "#d5eef0", "sum": "#e6e6e6", "module": "#ffffff", "block": "#ffffff",
}  # fmt: skip


def drawing(blocks: Sequence[tuple[str, int, Part]], title: str) -> Figure:
    """Each kind of block as a column of boxes, from top to bottom in the order of the calls.

    Raises DitkitError without matplotlib.
    """
    across = min(4, len(blocks))
    lines = [blocks[i : i + across] for i in range(0, len(blocks), across)]
    heights = [max(sum(map(_height, part.parts)) for _, _, part in line) for line in lines]
    picture = figure(4.2 * across, 0.34 * (sum(heights) + 1.5 * len(lines) + 1))
    from matplotlib.patches import FancyBboxPatch

    picture.suptitle(title)
    grid = picture.add_gridspec(len(lines), across, height_ratios=heights)
    for at, (site, count, part) in enumerate(blocks):
        axes = picture.add_subplot(grid[at // across, at % across])
        axes.set(xlim=(0, 10), ylim=(-heights[at // across], 0))
        axes.axis("off")
        axes.set_title(f"{site} x {count}: {part.label}", fontsize=10)
        waiting, top = [(inner, 0.1) for inner in reversed(part.parts)], 0.0
        while waiting:
            part, left = waiting.pop()
            if part is _END:
                top += 0.25
                continue
            height = _height(part)
            axes.add_patch(
                FancyBboxPatch(
                    (left, 0.12 - top - height),
                    10 - 2 * left,
                    height - 0.24,
                    boxstyle="round,pad=0.02,rounding_size=0.15",
                    facecolor=_FILL[part.kind],
                    edgecolor="#8a8a8a",
                    linewidth=0.8,
                )
            )
            name = part.name.rpartition(".")[2]
            said = f"{name}: {part.label}" if name else part.label
            axes.text(left + 0.15, -top - 0.5, said, fontsize=7, va="center")
            top += 1
            if part.parts:
                waiting.append((_END, left))
                waiting += [(inner, left + 0.25) for inner in reversed(part.parts)]
    return picture
