"""ControlNets as branches: Zhang, Rao & Agrawala 2023, arXiv 2302.05543, in the form of VACE (Jiang et al. 2025, arXiv
2503.07598), which Z-Image's Union ControlNets have.

Copies of some blocks of a frozen base run on the tokens of a control image. The first begins with the base's own
tokens, c = before_proj(c) + x; each goes on from the one before it, and what `after_proj` makes of its tokens, the
hint, is added to the base's tokens behind the block of which it is the copy. Both projections begin at zero: a new
branch changes nothing. Text tokens, where the base has them in its sequence or in a second stream, go along with the
control's.

All is one forward of the base: the branch is an edit, and each block of the base runs once. An outer edit sees blocks
of the base as "base.blocks.3" and those of the branch as "control.layers.blocks.1".

A base with refiners of the image (Z-Image) has three ways of treating control tokens before its main blocks:

plain        blocks of the branch's own, which see the control alone (Union 1)
hints        a second stack, begun with the base's tokens, whose hints are added behind the refiners (Union 2.1)
double_pass  as `hints`, but with the main stack: all of its copies run twice, over the image's tokens at the refiners
             and over the whole sequence at the blocks. Union 2.0 was trained so by mistake; its file also holds a
             second stack, which nothing uses.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..conditioning import Conditioning
from ..config import DitkitError, near, register, registered_as
from ..layers import Edit, patchify, visit
from ..rng import Rng
from .registry import Model, Plan, at_least_one, instantiate, register_models
from .sizing import Sizing
from .zimage import ZImageConfig, padded

__all__ = ["Control", "ControlConfig"]

BASES = {"dit": "blocks", "lightningdit": "blocks", "lumina2": "blocks", "mmdit": "joint_blocks", "z_image": "blocks"}
"""Networks that can be controlled: image tokens come first in what goes through the blocks of this name."""
REFINERS = ("none", "plain", "hints", "double_pass")


@register("model", "control")
@dataclass(frozen=True)
class ControlConfig:
    """A base and its branch; the defaults are Z-Image's Union ControlNet 1."""

    base: Any = ZImageConfig()
    """The network that is controlled, frozen."""
    places: tuple[int, ...] = (0, 5, 10, 15, 20, 25)
    """The blocks of the base that have copies, the first among them."""
    control_channels: int = 16
    """Channels of cond.control. Union 2: 16 of the control's latent, 1 mask (1 = to be kept) and 16 of the latent of
    the image where it is kept, zeros where nothing is given."""
    refiner: str = "plain"
    """none, plain, hints or double_pass, see above; none for a base without refiners of the image."""

    sizing = Sizing(deep=("places",))

    def __post_init__(self) -> None:
        at_least_one(self, "control_channels")
        if self.refiner not in REFINERS:
            raise DitkitError(f"unknown model.refiner {self.refiner!r}: {near(self.refiner, REFINERS)}")
        name, depth = registered_as(self.base)[1], getattr(self.base, "depth", 0)
        if name not in BASES:
            raise DitkitError(f"the model control takes no base {name}: {near(name, BASES)}")
        if not self.places or self.places[0] != 0 or self.places != tuple(sorted(set(self.places))):
            raise DitkitError(f"model.places are numbers of blocks, rising from 0, not {self.places}")
        if self.places[-1] >= depth:
            raise DitkitError(f"model.places end at {self.places[-1]}, and the base has the blocks 0 to {depth - 1}")
        refined = getattr(self.base, "refiner_depth", 0)
        if self.refiner != "none" and not refined:
            raise DitkitError(f"the base {name} has no refiners: model.refiner is none, not {self.refiner}")
        if self.refiner == "double_pass" and len(self.places) < refined:
            raise DitkitError(f"{refined} refiners take hints of as many copies, and there are {len(self.places)}")

    @property
    def stack(self) -> str:
        """What the base calls its main blocks."""
        return BASES[registered_as(self.base)[1]]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one x."""
        return self.base.shape

    @property
    def length(self) -> int:
        """How many tokens the base's blocks see of such an x."""
        return self.base.length

    @property
    def vocab(self) -> int:
        """0: x is continuous."""
        return 0

    @property
    def num_classes(self) -> int:
        """Of the base; 0 where it has none."""
        return getattr(self.base, "num_classes", 0)

    def fitted(self, shape: tuple[int, ...], classes: int, vocab: int) -> Self:
        """The base fitted, with the same branch; a control of the channels of x goes on having them."""
        base = self.base.fitted(shape, classes, vocab)
        alike = self.control_channels == self.base.shape[0]
        return dataclasses.replace(self, base=base, control_channels=shape[0] if alike else self.control_channels)

    def filled(self, image: Float[Tensor, "b c h w"]) -> Float[Tensor, "b n h w"]:
        """An encoded control image as a control: further channels, of what is not given, are zeros.

        Raises DitkitError for one of more channels.
        """
        more = self.control_channels - image.shape[1]
        if more < 0:
            raise DitkitError(
                f"control images have {image.shape[1]} channels once they are encoded, and the model takes "
                f"{self.control_channels}: change model.control_channels"
            )
        return torch.nn.functional.pad(image, (0, 0, 0, 0, 0, more))

    def example(self, batch: int) -> Conditioning:
        """As the base's own, and a control of zeros."""
        control = torch.zeros(batch, self.control_channels, *self.base.shape[1:])
        return dataclasses.replace(self.base.example(batch), control=control)

    def build(self, seed: int = 0) -> Control:
        """The base with its initial weights and a branch that changes nothing yet."""
        return instantiate(Control, self, seed)


class Copies(nn.Module):
    """Copies of blocks, in the order in which they run, with their projections."""

    def __init__(self, blocks: Iterable[nn.Module], dim: int):
        super().__init__()
        self.blocks = nn.ModuleList(map(copy.deepcopy, blocks))
        self.before_proj = nn.Linear(dim, dim)
        self.after_proj = nn.ModuleList(nn.Linear(dim, dim) for _ in self.blocks)


class Branch(nn.Module):
    """What a ControlNet has beside its base: an embedding of patches and copies of blocks."""

    def __init__(self, config: ControlConfig, base: nn.Module):
        super().__init__()
        dim, patch = config.base.hidden_size, config.base.patch_size
        self.x_embedder = nn.Linear(patch * patch * config.control_channels, dim)
        blocks: Any = base.get_submodule(config.stack)
        self.layers = Copies([blocks[place] for place in config.places], dim)
        self.refiner: Any = None
        if config.refiner in ("plain", "hints"):
            refiners: Any = base.get_submodule("noise_refiner")
            self.refiner = copy.deepcopy(refiners) if config.refiner == "plain" else Copies(refiners, dim)


class Control(Model):
    """A frozen base, controlled by a branch. Raises ValueError for a control that is not of the size of x."""

    def __init__(self, config: ControlConfig):
        super().__init__()
        self.config = config
        self.base: Model = config.base.build()
        self.control = Branch(config, self.base)
        self.base.requires_grad_(False)
        self.plan = Plan(  # type: ignore[misc]
            shard=(*(f"base.{name}" for name in self.base.plan.shard), "control.layers.blocks")
        )

    def init_weights(self, rng: Rng) -> None:
        """The base as it begins alone, and a branch that changes nothing."""
        self.base.init_weights(rng)
        embedder = self.control.x_embedder
        nn.init.xavier_uniform_(embedder.weight, generator=rng.generator("control.x_embedder"))
        nn.init.zeros_(embedder.bias)
        self.restart()

    @torch.no_grad()
    def restart(self) -> None:
        """Copy the base's blocks as they are now, and set the projections to zero: after weights of a base were loaded,
        before a training of the branch begins."""
        blocks: Any = self.base.get_submodule(self.config.stack)
        stacks = [(self.control.layers, [blocks[place] for place in self.config.places])]
        refiner = self.control.refiner
        if refiner is not None:
            refiners: Any = self.base.get_submodule("noise_refiner")
            stacks.append((refiner, list(refiners)))
        for stack, originals in stacks:
            copies = stack.blocks if isinstance(stack, Copies) else stack
            for own, original in zip(copies, originals, strict=True):
                own.load_state_dict(original.state_dict())
            if isinstance(stack, Copies):
                for projection in (stack.before_proj, *stack.after_proj):
                    for parameter in projection.parameters():
                        parameter.zero_()

    def prepare(self, cond: Conditioning, shape: Sequence[int], times: Sequence[float] = ()) -> Conditioning:
        """What the base prepares, and the tokens of the control. Raises ValueError if it does not fit x."""
        cond = self.base.prepare(cond, shape, times)
        if cond.control is None:
            return cond
        channels = self.config.control_channels
        if cond.control.shape[1:] != (channels, *shape[-2:]):
            raise ValueError(
                f"the model takes a control [b {channels} {shape[-2]} {shape[-1]}] (control_channels={channels}, rows "
                f"and columns of x), and was given {list(cond.control.shape)}: change control_channels or its size"
            )
        if cond.references is not None:
            raise ValueError("a base with references is not controlled: leave out cond.references or cond.control")
        embedder = self.control.x_embedder
        tokens = embedder(patchify(cond.control.to(embedder.weight.dtype), self.config.base.patch_size))
        pad = getattr(self.base, "x_pad_token", None)
        return cond.with_static(control=tokens if pad is None else padded(tokens, pad))

    def forward(
        self, x: Float[Tensor, "b c h w"], t: Float[Tensor, "b"], cond: Conditioning, *, edit: Edit | None = None
    ) -> Float[Tensor, "b o h w"]:
        """As the base, controlled by cond.control [b c h w] where it is given; scalars["control_scale"] [b] multiplies
        the hints, 1 if it is not given."""
        if cond.control is not None and "control" not in cond.static:
            cond = self.prepare(cond, x.shape)
        return self.base(x, t, cond, edit=_Pass(self, cond, edit))


class _Pass:
    """The edit of one forward: the branch beside the base."""

    def __init__(self, model: Control, cond: Conditioning, edit: Edit | None):
        self.config, self.control, self.edit = model.config, model.control, edit
        self.c: Any = cond.static.get("control")
        scale = cond.scalars.get("control_scale")
        self.scale = None if scale is None else scale.view(-1, 1, 1)

    def __call__(self, site: str, block: nn.Module, x: Any, /, *args: Any) -> Any:
        hint, (stack, _, number) = None, site.rpartition(".")
        if self.c is not None and stack == "noise_refiner":
            hint = self.refine(int(number), x, args)
        elif self.c is not None and stack == self.config.stack:
            hint = self.follow(int(number), x, args)
        out = visit(self.edit, f"base.{site}", block, x, *args)
        if hint is None:
            return out
        hint = hint if self.scale is None else (self.scale * hint).to(hint.dtype)
        return (out[0] + hint, *out[1:]) if isinstance(out, tuple) else out + hint

    def refine(self, i: int, x: Tensor, args: tuple[Any, ...]) -> Tensor | None:
        """The hint of refiner i, if it has one."""
        refiner = self.control.refiner
        if self.config.refiner == "none":
            return None
        if self.config.refiner == "plain":
            for j, blk in enumerate(refiner if i == 0 else ()):
                self.c = visit(self.edit, f"control.refiner.{j}", blk, self.c, *args)
            return None
        name, copies = ("refiner", refiner) if self.config.refiner == "hints" else ("layers", self.control.layers)
        if i == 0:
            self.c = copies.before_proj(self.c) + x
        hint = self.advance(name, copies, i, args)
        if i == self.config.base.refiner_depth - 1:
            for j in range(i + 1, len(copies.blocks)):
                self.advance(name, copies, j, args)
        return hint

    def follow(self, i: int, x: Any, args: tuple[Any, ...]) -> Tensor | None:
        """The hint of block i, if it has a copy."""
        copies = self.control.layers
        if i == 0 and isinstance(x, tuple):
            self.c = (copies.before_proj(self.c) + x[0], *x[1:])
        elif i == 0:
            self.c = copies.before_proj(torch.cat((self.c, x[:, self.c.shape[1] :]), dim=1)) + x
        if i not in self.config.places:
            return None
        return self.advance("layers", copies, self.config.places.index(i), args)

    def advance(self, name: str, copies: Copies, j: int, args: tuple[Any, ...]) -> Tensor:
        """Run copy j and make its hint."""
        self.c = visit(self.edit, f"control.{name}.blocks.{j}", copies.blocks[j], self.c, *args)
        return copies.after_proj[j](self.c[0] if isinstance(self.c, tuple) else self.c)


_TINY = ZImageConfig(
    input_size=32, in_channels=4, hidden_size=96, depth=4, num_heads=4, axes=(8, 8, 8), text_dim=64, text_length=77
)

# alibaba-pai's Z-Image-Turbo-Fun-Controlnet-Union, in its four versions
register_models(
    {
        "z_image_control_1": ControlConfig(),
        "z_image_control_2_0": ControlConfig(places=tuple(range(0, 30, 2)), control_channels=33, refiner="double_pass"),
        "z_image_control_2_1": ControlConfig(places=tuple(range(0, 30, 2)), control_channels=33, refiner="hints"),
        "z_image_control_2_1_lite": ControlConfig(places=(0, 10, 20), control_channels=33, refiner="hints"),
        "control_tiny": ControlConfig(base=_TINY, places=(0, 2), control_channels=9, refiner="hints"),
    }
)
