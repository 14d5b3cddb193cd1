"""The one door at work: what acceleration and control need is written here as edits, and no model knows of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from ditkit.conditioning import Conditioning, Tokens
from ditkit.models import DiTConfig, JiTConfig, Kandinsky5Config, Lumina2Config, Model, ZImageConfig

from .conftest import randomised


@dataclass(frozen=True)
class Case:
    """A family: its configuration, its main list of blocks, and from which block on the tokens stay the same."""

    config: Any
    stack: str
    given: Callable[[], Conditioning]
    steady: int = 0


def text(width: int) -> Tokens:
    """Texts of three and of five tokens."""
    values = torch.randn(2, 5, width, generator=torch.Generator().manual_seed(4))
    return Tokens(values, torch.arange(5) < torch.tensor([[3], [5]]))


CASES = {
    "dit": Case(
        DiTConfig(input_size=8, hidden_size=24, depth=5, num_heads=3, num_classes=5),
        "blocks",
        lambda: Conditioning(label=torch.tensor([1, 5])),
    ),
    "jit": Case(
        JiTConfig(
            input_size=16, patch_size=4, hidden_size=24, depth=5, num_heads=3, num_classes=5, bottleneck_dim=8,
            in_context_len=3, in_context_start=1,
        ),
        "blocks",
        lambda: Conditioning(label=torch.tensor([1, 5])),
        steady=1,
    ),
    "z_image": Case(
        ZImageConfig(
            input_size=16, in_channels=2, hidden_size=32, depth=5, refiner_depth=1, num_heads=2, axes=(4, 6, 6),
            text_dim=12,
        ),
        "blocks",
        lambda: Conditioning(text=text(12)),
    ),
    "lumina2": Case(
        Lumina2Config(
            input_size=8, in_channels=4, hidden_size=48, depth=5, refiner_depth=1, num_heads=4, kv_heads=2,
            mlp_hidden=80, axes=(4, 4, 4), text_dim=12,
        ),
        "blocks",
        lambda: Conditioning(text=text(12)),
    ),
    "kandinsky5": Case(
        Kandinsky5Config(
            input_size=(2, 8, 8), in_channels=2, given_channels=False, hidden_size=32, ff_dim=64, time_dim=16,
            text_depth=1, depth=5, axes=(4, 6, 6), text_dim=12, pooled_dim=6,
        ),
        "blocks",
        lambda: Conditioning(text=text(12), pooled=torch.randn(2, 6, generator=torch.Generator().manual_seed(3))),
    ),
}  # fmt: skip


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> tuple[Case, Model, tuple[Any, ...]]:
    found = CASES[request.param]
    x = torch.randn(2, *found.config.shape, generator=torch.Generator().manual_seed(0))
    return found, randomised(found.config), (x, torch.tensor([0.3, 0.8]), found.given())


def sites(case: Case, model: Model) -> list[str]:
    return [f"{case.stack}.{i}" for i in range(len(model.get_submodule(case.stack)))]  # type: ignore[arg-type]


def plain(model: Model, given: tuple[Any, ...]) -> tuple[Tensor, dict[str, tuple[Tensor, Tensor]]]:
    """The output, and what went into and came out of each block."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def watch(site: str, block: nn.Module, x: Tensor, *args: Any) -> Tensor:
        seen[site] = (x, block(x, *args))
        return seen[site][1]

    return model(*given, edit=watch), seen


class FirstBlockCache:
    """Where the residual of the first block has hardly moved since the last step, so have those of the others."""

    def __init__(self, stack: list[str], threshold: float):
        self.first, *_, self.last = stack
        self.stack, self.threshold = set(stack), threshold
        self.before: Tensor | None = None
        self.rest: Tensor | None = None
        self.ran: list[str] = []

    def __call__(self, site: str, block: nn.Module, x: Tensor, *args: Any) -> Tensor:
        if site not in self.stack:
            return block(x, *args)
        if site == self.first:
            self.ran.append(site)
            out = block(x, *args)
            residual = out - x
            moved = (
                1.0
                if self.before is None
                else float((residual - self.before).detach().norm() / self.before.detach().norm())
            )
            self.skip, self.before, self.start = self.rest is not None and moved < self.threshold, residual, out
            return out
        if self.skip:
            assert self.rest is not None
            return x + self.rest if site == self.last else x
        self.ran.append(site)
        out = block(x, *args)
        if site == self.last:
            self.rest = out[:, -self.start.shape[1] :] - self.start
        return out


def test_a_residual_cache_runs_the_first_block_alone_where_nothing_moved(
    case: tuple[Case, Model, tuple[Any, ...]],
) -> None:
    family, model, (x, t, cond) = case
    stack = sites(family, model)[family.steady :]
    near = x + 1e-4 * torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    never, cache = FirstBlockCache(stack, 0.0), FirstBlockCache(stack, 0.05)
    for again in (x, near):
        assert torch.equal(model(again, t, cond, edit=never), model(again, t, cond))
    assert torch.equal(model(x, t, cond, edit=cache), model(x, t, cond))
    ran, exact = len(cache.ran), model(near, t, cond)
    close = model(near, t, cond, edit=cache)
    assert cache.ran[ran:] == stack[:1]
    assert 0 < float((close - exact).abs().max()) < 1e-2 * float(exact.std())
    far = torch.randn(x.shape, generator=torch.Generator().manual_seed(2))
    assert torch.equal(model(far, t, cond, edit=cache), model(far, t, cond))


def some(arg: Any, n: int, keep: Tensor) -> Any:
    """What a block gets besides n tokens, for some of them: rows of rotations, columns of masks; all else as it is."""
    if not isinstance(arg, Tensor) or arg.ndim < 2:
        return arg
    axis = -1 if arg.dtype == torch.bool else -2
    return arg.index_select(arg.ndim + axis, keep) if arg.shape[axis] == n else arg


def route(first: str, last: str, keep: Tensor) -> Callable[..., Tensor]:
    """Only some tokens go through the blocks from `first` to `last`; the others join again unchanged (TREAD)."""
    state: dict[str, Any] = {}

    def edit(site: str, block: nn.Module, x: Tensor, *args: Any) -> Tensor:
        if site == first:
            state["all"] = x
        if "all" not in state:
            return block(x, *args)
        n = state["all"].shape[1]
        out = block(x[:, keep] if site == first else x, *(some(arg, n, keep) for arg in args))
        if site != last:
            return out
        whole = state.pop("all").clone()
        whole[:, keep] = out
        return whole

    return edit


def test_tokens_are_routed_around_blocks(case: tuple[Case, Model, tuple[Any, ...]]) -> None:
    family, model, given = case
    stack = sites(family, model)
    first, last, after = stack[family.steady + 1], stack[-2], stack[-1]
    out, seen = plain(model, given)
    n = seen[first][0].shape[1]
    assert torch.equal(model(*given, edit=route(first, last, torch.arange(n))), out)
    keep = torch.arange(0, n, 2)
    inner, entered = route(first, last, keep), {}

    def watch(site: str, block: nn.Module, x: Tensor, *args: Any) -> Tensor:
        entered[site] = x
        return inner(site, block, x, *args)

    routed = model(*given, edit=watch)
    away = torch.tensor([i for i in range(n) if i % 2])
    assert torch.equal(entered[after][:, away], seen[first][0][:, away])  # they went past
    assert not torch.allclose(entered[after][:, keep], seen[first][0][:, keep])
    assert routed.shape == out.shape
    assert not torch.allclose(routed, out)
    # the tokens that went through did so as if there were no others
    alone = seen[first][0][:, keep]
    for site in stack[stack.index(first) : stack.index(last) + 1]:
        alone = model.get_submodule(site)(alone, *_args(model, given, site, keep, n))
    assert_close(entered[after][:, keep], alone, rtol=1e-5, atol=1e-5)


def _args(model: Model, given: tuple[Any, ...], site: str, keep: Tensor, n: int) -> list[Any]:
    """What a block gets besides tokens, for some of them."""
    found: list[Any] = []

    def watch(here: str, block: nn.Module, x: Tensor, *args: Any) -> Tensor:
        if here == site:
            found.extend(args)
        return block(x, *args)

    model(*given, edit=watch)
    return [some(a, n, keep) for a in found]


def test_hints_are_added_behind_blocks_and_at_scale_0_change_nothing(
    case: tuple[Case, Model, tuple[Any, ...]],
) -> None:
    family, model, given = case
    stack = sites(family, model)[family.steady :]
    out, seen = plain(model, given)
    hints = {
        site: torch.randn(seen[site][1].shape, generator=torch.Generator().manual_seed(i))
        for i, site in enumerate(stack[::2])
    }

    def control(scale: float) -> Callable[..., Tensor]:
        def edit(site: str, block: nn.Module, x: Tensor, *args: Any) -> Tensor:
            entered[site] = x
            h = block(x, *args)
            return h + scale * hints[site] if site in hints else h

        return edit

    entered: dict[str, Tensor] = {}
    assert torch.equal(model(*given, edit=control(0.0)), out)
    controlled = model(*given, edit=control(0.5))
    assert not torch.allclose(controlled, out)
    assert_close(entered[stack[1]], seen[stack[0]][1] + 0.5 * hints[stack[0]])
