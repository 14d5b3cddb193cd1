"""ControlNets as branches: nothing changes at the start, the base runs once, what sees what, the one door, files."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.testing import assert_close

from ditkit.conditioning import Conditioning, Tokens
from ditkit.config import DitkitError, from_json, to_json
from ditkit.diffusion import CFG, Linear, Meaning, guide
from ditkit.models import (
    Control,
    ControlConfig,
    DiTConfig,
    JiTConfig,
    LightningDiTConfig,
    Lumina2Config,
    MMDiTConfig,
    ZImageConfig,
    create_model,
)
from ditkit.plan import gmacs

Z_IMAGE = ZImageConfig(
    input_size=(8, 12), in_channels=4, hidden_size=32, depth=4, refiner_depth=2, num_heads=2, axes=(4, 6, 6),
    text_dim=12, text_length=20,
)  # fmt: skip
LUMINA = Lumina2Config(
    input_size=(8, 12), in_channels=4, hidden_size=48, depth=3, refiner_depth=1, num_heads=4, kv_heads=2,
    mlp_hidden=80, axes=(4, 4, 4), text_dim=12, text_length=20,
)  # fmt: skip
DIT = DiTConfig(input_size=(8, 12), hidden_size=24, depth=4, num_heads=3, num_classes=5)
TINY: dict[str, ControlConfig] = {
    "plain": ControlConfig(Z_IMAGE, places=(0, 2), control_channels=4),
    "double_pass": ControlConfig(Z_IMAGE, places=(0, 1, 3), control_channels=9, refiner="double_pass"),
    "hints": ControlConfig(Z_IMAGE, places=(0, 3), control_channels=9, refiner="hints"),
    "z_image none": ControlConfig(Z_IMAGE, places=(0, 1), control_channels=4, refiner="none"),
    "lumina2": ControlConfig(LUMINA, places=(0, 1), control_channels=3, refiner="hints"),
    "mmdit": ControlConfig(
        MMDiTConfig(
            input_size=(8, 12), in_channels=4, hidden_size=24, depth=4, num_heads=3, self_attention=1, text_dim=12,
            pooled_dim=5, position_size=8,
        ),
        places=(0, 1, 3), control_channels=3, refiner="none",
    ),
    "dit": ControlConfig(DIT, places=(0, 2), control_channels=3, refiner="none"),
    "dit in context": ControlConfig(
        replace(DIT, conditioning="in_context"), places=(0, 1, 2, 3), control_channels=3, refiner="none"
    ),
    "lightningdit": ControlConfig(
        LightningDiTConfig(input_size=(8, 12), in_channels=4, hidden_size=24, depth=3, num_heads=3, num_classes=5),
        places=(0, 1), control_channels=1, refiner="none",
    ),
}  # fmt: skip


def build(name: str) -> Control:
    """A base under which nothing is zero, and a fresh branch of it."""
    model = TINY[name].build()
    generator = torch.Generator().manual_seed(0)
    for key, p in model.base.named_parameters():
        if "pos_embed" not in key:
            p.data = 0.1 * torch.randn(p.shape, generator=generator) + ("norm" in key)
    model.restart()
    return model.eval()


def trained(name: str) -> Control:
    """The same, with projections that are not zero."""
    model = build(name)
    generator = torch.Generator().manual_seed(1)
    for key, p in model.control.named_parameters():
        if "_proj" in key and "attn" not in key:
            p.data = 0.1 * torch.randn(p.shape, generator=generator)
    return model


@pytest.fixture(params=TINY)
def model(request: pytest.FixtureRequest) -> Control:
    return trained(request.param)


def given(config: ControlConfig, b: int = 2) -> tuple[Tensor, Tensor, Conditioning]:
    generator = torch.Generator().manual_seed(2)
    base = config.base
    x = torch.randn(b, *base.shape, generator=generator)
    cond = Conditioning(control=torch.randn(b, config.control_channels, *base.shape[1:], generator=generator))
    if getattr(base, "text_dim", 0):
        mask = torch.arange(20) < torch.tensor([3 + 17 * i for i in range(b)])[:, None]
        cond = replace(cond, text=Tokens(torch.randn(b, 20, 12, generator=generator), mask))
        if getattr(base, "pooled_dim", 0):
            cond = replace(cond, pooled=torch.randn(b, base.pooled_dim, generator=generator))
    else:
        cond = replace(cond, label=torch.arange(b) % 6)
    return x, torch.rand(b, generator=generator), cond


def alone(model: Control, x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
    return model.base(x, t, replace(cond, control=None, scalars={}))


# nothing changes at the start


@pytest.mark.parametrize("name", TINY)
def test_a_fresh_branch_gives_the_base_bit_for_bit(name: str) -> None:
    model = build(name)
    x, t, cond = given(model.config)
    assert torch.equal(model(x, t, cond), alone(model, x, t, cond))
    # and it can learn: the projections get gradients, the base none
    model(x, t, cond).square().sum().backward()
    first = model.control.layers.after_proj[0]
    assert isinstance(first, nn.Linear)
    assert first.weight.grad is not None
    assert bool(first.weight.grad.any())
    assert all(p.grad is None for p in model.base.parameters())


def test_without_control_or_at_scale_0_it_is_the_base_bit_for_bit(model: Control) -> None:
    x, t, cond = given(model.config, 3)
    base = alone(model, x, t, cond)
    controlled = model(x, t, cond)
    assert not torch.allclose(controlled, base, atol=1e-3)
    assert torch.equal(model(x, t, replace(cond, control=None)), base)
    assert torch.equal(model(x, t, replace(cond, scalars={"control_scale": torch.zeros(3)})), base)
    assert torch.equal(model(x, t, replace(cond, scalars={"control_scale": torch.ones(3)})), controlled)
    mixed = model(x, t, replace(cond, scalars={"control_scale": torch.tensor([1.0, 0.0, 0.5])}))
    assert_close(mixed[0], controlled[0], rtol=1e-5, atol=1e-5)
    assert torch.equal(mixed[1], base[1])
    assert not torch.allclose(mixed[2], controlled[2], atol=1e-4)


@pytest.mark.parametrize("name", TINY)
def test_the_branch_begins_as_copies_of_the_base(name: str) -> None:
    """Also of weights that the base was given later, once it is restarted."""
    config = TINY[name]
    model, base = config.build(seed=5), config.base.build(seed=5)
    assert all(torch.equal(model.base.get_parameter(key), p) for key, p in base.named_parameters())
    other = trained(name)
    other.base.load_state_dict(base.state_dict())
    other.restart()
    for made in (model, other):
        for j, place in enumerate(config.places):
            own = made.get_submodule(f"control.layers.blocks.{j}").state_dict()
            original = base.get_submodule(f"{config.stack}.{place}").state_dict()
            assert all(torch.equal(own[key], p) for key, p in original.items())
        if config.refiner in ("plain", "hints"):
            stack = "control.refiner" if config.refiner == "plain" else "control.refiner.blocks"
            own = made.get_submodule(stack).state_dict()
            assert all(torch.equal(own[key], p) for key, p in base.get_submodule("noise_refiner").state_dict().items())


# one forward


def test_each_block_of_the_base_runs_once_and_the_copies_as_often_as_they_should(model: Control) -> None:
    config, runs = model.config, Counter[str]()
    lists = {"blocks", "joint_blocks", "noise_refiner", "context_refiner", "refiner"}
    for name, module in model.named_modules():
        parts = name.split(".")
        if parts[-1].isdigit() and parts[-2] in lists:

            def count(module: nn.Module, args: Any, kwargs: Any, name: str = name) -> None:
                runs[name] += 1

            module.register_forward_pre_hook(count, with_kwargs=True)
    model(*given(config))
    base = {name: n for name, n in runs.items() if name.startswith("base.")}
    stacks = [config.stack, *(("noise_refiner", "context_refiner") if hasattr(config.base, "refiner_depth") else ())]
    assert set(base) == {f"base.{s}.{i}" for s in stacks for i in range(len(model.get_submodule(f"base.{s}")))}  # type: ignore[arg-type]
    assert set(base.values()) == {1}
    twice = 2 if config.refiner == "double_pass" else 1
    assert {n for name, n in runs.items() if "control.layers" in name} == {twice}
    refiners = {name: n for name, n in runs.items() if "control.refiner" in name}
    assert len(refiners) == (config.base.refiner_depth if config.refiner in ("plain", "hints") else 0)
    assert set(refiners.values()) <= {1}


def test_the_outer_edit_sees_all_blocks_by_their_names(model: Control) -> None:
    config, seen = model.config, []

    def watch(site: str, block: nn.Module, x: Any, *args: Any) -> Any:
        assert model.get_submodule(site) is block
        seen.append(site)
        return block(x, *args)

    args = given(config)
    assert torch.equal(model(*args, edit=watch), model(*args))
    assert {f"base.{config.stack}.{i}" for i in range(config.base.depth)} <= set(seen)
    assert {f"control.layers.blocks.{j}" for j in range(len(config.places))} <= set(seen)
    assert all(any(site.startswith(f"{name}.") for name in model.plan.shard) or "refiner" in site for site in seen)
    # attention of copies can be the identity in some rows, as that of any block
    rows = torch.tensor([True, False])

    def identity(site: str, block: nn.Module, x: Any, *rest: Any) -> Any:
        return block(x, *rest, identity=rows) if site == "control.layers.blocks.0" else block(x, *rest)

    out, plain = model(*args, edit=identity), model(*args)
    assert torch.equal(out[1], plain[1])
    assert not torch.allclose(out[0], plain[0], atol=1e-4)


def test_the_control_reaches_every_pixel_and_every_weight_of_the_branch(model: Control) -> None:
    x, t, cond = given(model.config)
    assert cond.control is not None
    control = cond.control.clone().requires_grad_()
    out = model(x, t, replace(cond, control=control))
    for pixel in (out[0, 0, 0, 0], out[0, -1, -1, -1]):
        (gradient,) = torch.autograd.grad(pixel, control, retain_graph=True)
        assert bool((gradient[0] != 0).all())
        assert not bool(gradient[1].any())
    out.square().sum().backward()
    for name, p in model.named_parameters():
        if name.startswith("base."):
            assert p.grad is None, name
        else:
            assert p.grad is not None, name
            assert bool(p.grad.any()), name


@pytest.mark.parametrize("name", ["plain", "double_pass", "hints", "lumina2", "mmdit"])
def test_masked_text_changes_nothing(name: str) -> None:
    model = trained(name)
    x, t, cond = given(model.config)
    assert cond.text is not None
    index = torch.tensor([0])
    text = Tokens(cond.text.values[:1, :3], cond.text.mask[:1, :3])
    short = replace(cond.rows(index), text=text)
    assert_close(model(x[:1], t[:1], short), model(x, t, cond)[:1], rtol=1e-5, atol=1e-5)
    longer = replace(short, text=text.padded(90))
    assert_close(model(x[:1], t[:1], longer), model(x[:1], t[:1], short), rtol=1e-5, atol=1e-5)


def test_prepared_work_changes_nothing(model: Control) -> None:
    x, t, cond = given(model.config, 3)
    ready = model.prepare(cond, x.shape, (1.0, 0.5))
    assert "control" in ready.static
    assert torch.equal(model(x, t, ready), model(x, t, cond))
    assert torch.equal(model(x, t / 2, ready), model(x, t / 2, cond))
    index = torch.tensor([2, 0])
    assert_close(model(x[index], t[index], ready.rows(index)), model(x, t, cond)[index], rtol=1e-5, atol=1e-5)


def test_a_branch_learns_and_its_base_stays() -> None:
    """To do what another branch of the same base does: the error falls to a third in 40 steps."""
    model, teacher = build("dit"), trained("dit")
    before = {name: p.clone() for name, p in model.base.named_parameters()}
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    x, t, cond = given(model.config, 4)
    target = teacher(x, t, cond).detach()
    errors = []
    for _ in range(40):
        loss = (model(x, t, cond) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        errors.append(float(loss.detach()))
    assert errors[-1] < errors[0] / 3
    assert all(torch.equal(p, before[name]) for name, p in model.base.named_parameters())


def test_it_runs_in_bfloat16(model: Control) -> None:
    x, t, cond = given(model.config)
    cond = replace(cond, scalars={"control_scale": torch.tensor([0.5, 1.0])})
    expected = model(x, t, cond).detach()
    out = model.bfloat16()(x.bfloat16(), t, cond).detach()
    assert out.dtype == torch.bfloat16
    assert float((out.float() - expected).abs().mean()) < 0.1 * float(expected.std())


def test_it_can_be_guided() -> None:
    model = trained("dit")
    x, _, cond = given(model.config)
    x = x[:, :4]
    denoiser = Meaning(Linear(), "velocity", "1000t").of(model)
    null = replace(cond, label=torch.full((2,), 5))
    guided = guide(denoiser, CFG(2.0, null)).start(cond, x.shape, (1.0, 0.5, 0.0))
    strong, weak = denoiser(x, 0.5, cond).out, denoiser(x, 0.5, null).out
    assert_close(guided(x, 0.5).out, weak + 2 * (strong - weak), rtol=1e-4, atol=1e-4)


# files, sizes, mistakes


def test_weights_and_configuration_survive_files(model: Control, tmp_path: Path) -> None:
    config = model.config
    assert from_json(to_json(config)) == config
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    other = config.build(seed=9).eval()
    other.load_state_dict(load_file(tmp_path / "model.safetensors"))
    assert torch.equal(other(*given(config)), model(*given(config)))
    assert config.fitted((4, 16, 8), 5, 0).base == config.base.fitted((4, 16, 8), 5, 0)


def test_a_plan_counts_the_branch() -> None:
    config = TINY["dit"]
    with torch.device("meta"):
        model = config.build()
    count = sum(p.numel() for p in model.control.parameters())
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == count
    assert gmacs(config, config.shape) > 1.3 * gmacs(config.base, config.shape)


def test_the_small_one_is_small() -> None:
    with torch.device("meta"):
        assert sum(p.numel() for p in create_model("control_tiny").parameters()) < 3_000_000


def test_mistakes_say_what_to_change() -> None:
    def fails(match: str, **changes: Any) -> None:
        with pytest.raises(DitkitError, match=match):
            replace(TINY["hints"], **changes)

    fails(r"unknown model.refiner 'hint': did you mean hints\?", refiner="hint")
    fails(r"rising from 0, not \(1, 2\)", places=(1, 2))
    fails(r"rising from 0, not \(0, 2, 1\)", places=(0, 2, 1))
    fails(r"rising from 0, not \(\)", places=())
    fails("end at 4, and the base has the blocks 0 to 3", places=(0, 4))
    fails("takes no base jit", base=JiTConfig())
    fails("dit has no refiners: model.refiner is none, not hints", base=DIT)
    fails("2 refiners take hints of as many copies, and there are 1", places=(0,), refiner="double_pass")
    model = trained("hints")
    x, t, cond = given(model.config)
    for control in (cond.control[:, :3], cond.control[..., :8], cond.control[:, :, None]):  # type: ignore[index]
        with pytest.raises(ValueError, match=r"control \[b 9 8 12\].*was given .*change control_channels or its size"):
            model(x, t, replace(cond, control=control))
    references = torch.zeros(2, 1, 4, 8, 12)
    segments = {"segments": torch.tensor([[1.0, 1.0, 1.0]] * 2)}
    with pytest.raises(ValueError, match=r"leave out cond\.references or cond\.control"):
        model(x, t, replace(cond, references=references, scalars=segments))
