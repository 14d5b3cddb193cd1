"""Every model that reads a text: masks, shapes, gradients, seeds, files, and the one door into the forward."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.testing import assert_close

from ditkit.conditioning import Conditioning, Tokens, cat
from ditkit.config import DitkitError, from_json, to_json
from ditkit.diffusion import CFG, Linear, Meaning, guide
from ditkit.layers import DualBlock, FinalLayer, ParallelBlock, Stream, axial_angles, rope_table, sincos_2d
from ditkit.models import FluxConfig, MMDiTConfig, Model, PixArtConfig, SanaConfig, create_model, model_config
from ditkit.plan import cost

from .conftest import randomise

TINY: dict[str, Any] = {
    "mmdit": MMDiTConfig(
        input_size=(4, 6), in_channels=3, hidden_size=24, depth=3, num_heads=3, text_dim=10, pooled_dim=7,
        position_size=5,
    ),
    "mmdit of 3.5 medium": MMDiTConfig(
        input_size=4, patch_size=1, in_channels=2, hidden_size=16, depth=3, num_heads=2, text_dim=6, pooled_dim=5,
        position_size=8, qk_norm=True, self_attention=2,
    ),
    "flux": FluxConfig(
        input_size=(4, 6), in_channels=3, hidden_size=48, depth=2, single_depth=2, num_heads=3, text_dim=10,
        pooled_dim=7, axes=(4, 6, 6),
    ),
    "flux without guidance": FluxConfig(
        input_size=4, in_channels=2, hidden_size=16, depth=1, single_depth=3, num_heads=1, text_dim=6, pooled_dim=5,
        axes=(4, 6, 6), guidance=False, swiglu=True,
    ),
    "flux2": FluxConfig(
        input_size=4, patch_size=1, in_channels=5, hidden_size=48, depth=2, single_depth=2, num_heads=3, mlp_ratio=3.0,
        text_dim=10, pooled_dim=0, axes=(4, 4, 4, 4), theta=2000.0, reference_step=10, swiglu=True, bias=False,
        shared_modulation=True,
    ),
    "pixart": PixArtConfig(
        input_size=(4, 6), in_channels=3, hidden_size=24, depth=3, num_heads=3, text_dim=10, position_scale=0.5
    ),
    "pixart that sees sizes": PixArtConfig(
        input_size=4, patch_size=1, in_channels=2, hidden_size=12, depth=2, num_heads=2, text_dim=6, sizes=True,
        learn_sigma=False,
    ),
    "sana": SanaConfig(
        input_size=(4, 6), in_channels=3, hidden_size=24, depth=3, num_heads=2, cross_heads=3, text_dim=10
    ),
    "sana sprint": SanaConfig(
        input_size=4, patch_size=2, in_channels=2, hidden_size=16, depth=3, num_heads=4, cross_heads=2, text_dim=6,
        qk_norm=True, guidance=True,
    ),
}  # fmt: skip
SINGLE = [name for name in TINY if name.startswith(("pixart", "sana"))]  # also tested in test_adaln_single.py
CLOCKS = {FluxConfig: "t"}
STD = {FluxConfig: 0.12}  # of random weights, where 0.2 makes outputs that are larger than tolerances suppose

# what nothing reads, and no gradient reaches: the query of the text in the last block of two streams
UNREAD = re.compile(r"joint_blocks\.2\.context_block\.attn\.q_norm\.weight")

# published sizes: parameters that are trained, as diffusers' networks of the published configurations have them
COUNTS = {
    "sd3_medium": 2_028_328_000, "sd35_large": 8_056_627_520, "sd35_medium": 2_243_171_520,
    "pixart_alpha": 611_349_152, "pixart_alpha_512": 610_856_096, "pixart_sigma": 610_856_096,
    "pixart_sigma_512": 610_856_096, "pixart_sigma_256": 610_856_096, "sana_600m": 591_747_872,
    "sana_1600m": 1_604_462_752, "sana_sprint_600m": 593_501_216, "sana_sprint_1600m": 1_610_237_472,
    "flux1_dev": 11_901_408_320, "flux1_schnell": 11_891_178_560, "flux2_dev": 32_223_281_152,
}  # fmt: skip
SMALL = ("mmdit_tiny", "flux1_tiny", "flux2_tiny", "pixart_tiny", "sana_tiny")


def given(config: Any, b: int = 2, tiles: tuple[int, int] | None = None, length: int = 5) -> Any:
    """x, t and all that the model takes; row i has `length` - i tokens of text, at least one."""
    generator = torch.Generator().manual_seed(1)
    rows, columns = config.grid if tiles is None else tiles
    size = (rows * config.patch_size, columns * config.patch_size)
    x = torch.randn(b, config.in_channels, *size, generator=generator)
    t = torch.rand(b, generator=generator)
    shapes = config.example(b)
    values = torch.randn(b, length, shapes.text.values.shape[-1], generator=generator)
    mask = torch.arange(length) < (length - torch.arange(b)).clamp(min=1)[:, None]
    cond = Conditioning(
        text=Tokens(values, mask),
        pooled=None if shapes.pooled is None else torch.randn(shapes.pooled.shape, generator=generator),
        scalars={name: 1 + torch.rand(of.shape, generator=generator) for name, of in shapes.scalars.items()},
    )
    return x, t, cond


def shape_of(config: Any, x: Tensor) -> tuple[int, ...]:
    """Of the output: x and, where it is learned, the variance."""
    return (len(x), x.shape[1] * (2 if getattr(config, "learn_sigma", False) else 1), *x.shape[2:])


def text_of(cond: Conditioning) -> Tokens:
    assert cond.text is not None
    return cond.text


@pytest.fixture(params=TINY)
def tiny(request: pytest.FixtureRequest) -> tuple[Model, Any]:
    config = TINY[request.param]
    return randomise(config.build(), std=STD.get(type(config), 0.2)), config


@pytest.mark.parametrize("name", COUNTS)
def test_published_sizes(name: str) -> None:
    with torch.device("meta"):
        model = create_model(name)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == COUNTS[name]


@pytest.mark.parametrize("name", SMALL)
def test_small_sizes(name: str) -> None:
    config = model_config(name)
    model = config.build()
    assert sum(p.numel() for p in model.parameters()) < 3e6
    x, t, cond = given(config)
    assert model(x, t, cond).shape == shape_of(config, x)
    planned = cost(config, dtype="fp32")
    assert planned.training > planned.sampling > planned.weights > 0


@pytest.mark.parametrize("b", [1, 3])
@pytest.mark.parametrize("tiles", [(1, 1), (2, 3), (5, 1)])
def test_the_output_has_the_shape_of_x(tiny: tuple[Model, Any], tiles: tuple[int, int], b: int) -> None:
    model, config = tiny
    x, t, cond = given(config, b, tiles)
    out = model(x, t, cond)
    assert out.shape == shape_of(config, x)
    assert bool(out.isfinite().all())


def test_every_trainable_parameter_gets_a_finite_gradient(tiny: tuple[Model, Any]) -> None:
    model, config = tiny
    model(*given(config, 3)).square().mean().backward()
    for name, p in model.named_parameters():
        assert (p.grad is not None) == p.requires_grad, name
        if p.grad is not None:
            assert bool(p.grad.isfinite().all()), name
            assert bool(p.grad.any()) != bool(UNREAD.fullmatch(name)), name


def test_a_sample_does_not_see_its_batch(tiny: tuple[Model, Any]) -> None:
    model, config = tiny
    x, t, cond = given(config, 5)
    whole = model(x, t, cond)
    for index in (torch.tensor([3]), torch.tensor([4, 0])):
        assert_close(model(x[index], t[index], cond.rows(index)), whole[index], rtol=1e-5, atol=1e-5)


def test_every_input_matters_everywhere(tiny: tuple[Model, Any]) -> None:
    """Each output pixel sees each input pixel, each channel of each real token of the text, time, vectors, numbers."""
    model, config = tiny
    x, t, cond = given(config, 2)
    leaves = [x, text_of(cond).values, *([] if cond.pooled is None else [cond.pooled])]
    for leaf in leaves:
        leaf.requires_grad_()
    out = model(x, t, cond)
    real = text_of(cond).mask[..., None]
    for pixel in (out[1, 0, 0, 0], out[1, -1, -1, -1]):
        of_x, of_text, *rest = torch.autograd.grad(pixel, leaves, retain_graph=True)
        assert bool((of_x[1] != 0).all())
        assert torch.equal(of_text[1] != 0, real[1].expand_as(of_text[1]))  # and of the masked ones nothing
        assert all(bool((of[1] != 0).all()) for of in rest)
        assert not any(bool(of[0].any()) for of in (of_x, of_text, *rest))
    assert bool((model(x, t + 0.3, cond) != out).all())
    for name, value in cond.scalars.items():
        assert bool((model(x, t, replace(cond, scalars={**cond.scalars, name: value + 0.5})) != out).all())


def test_positions_tell_equal_patches_apart(tiny: tuple[Model, Any]) -> None:
    model, config = tiny
    p = config.patch_size
    x, t, cond = given(config, 1, (2, 3))
    x = x[:, :, :p, :p].repeat(1, 1, 2, 3)
    out = model(x, t, cond).unfold(2, p, p).unfold(3, p, p).flatten(2, 3)
    for i in range(6):
        for j in range(i):
            assert not torch.allclose(out[:, :, i], out[:, :, j], atol=1e-5)


# masks


def gradients(model: Model, x: Tensor, t: Tensor, cond: Conditioning) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    out = model(x, t, cond)
    out.square().sum().backward()
    return out.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("extra", [1, 7])
def test_padding_changes_neither_an_output_nor_a_gradient(tiny: tuple[Model, Any], extra: int) -> None:
    """Whatever stands in the padding."""
    model, config = tiny
    x, t, cond = given(config, 3)
    out, before = gradients(model, x, t, cond)
    text = text_of(cond).padded(5 + extra)
    junk = 50 * torch.randn(text.values.shape, generator=torch.Generator().manual_seed(3))
    text = Tokens(torch.where(text.mask[..., None], text.values, junk), text.mask)
    padded, after = gradients(model, x, t, replace(cond, text=text))
    assert_close(padded, out, rtol=1e-5, atol=1e-5)
    for name, value in before.items():
        assert_close(after[name], value, rtol=1e-4, atol=1e-5 * max(1.0, float(value.abs().max())), msg=name)


def test_a_longer_neighbour_changes_nothing(tiny: tuple[Model, Any]) -> None:
    model, config = tiny
    x, t, short = given(config, 2, length=2)
    _, _, long = given(config, 2, length=9)
    both = model(torch.cat((x, x)), torch.cat((t, t)), cat([short, long]))
    assert_close(both[:2], model(x, t, short), rtol=1e-5, atol=1e-5)
    assert_close(both[2:], model(x, t, long), rtol=1e-5, atol=1e-5)


def test_the_mask_is_read(tiny: tuple[Model, Any]) -> None:
    model, config = tiny
    x, t, cond = given(config, 1)
    out = model(x, t, cond)
    mask = text_of(cond).mask.clone()
    mask[:, -1] = False
    fewer = model(x, t, replace(cond, text=replace(text_of(cond), mask=mask)))
    assert not torch.allclose(fewer, out, atol=1e-5)
    cut = Tokens(text_of(cond).values[:, :-1], mask[:, :-1])
    assert_close(model(x, t, replace(cond, text=cut)), fewer, rtol=1e-5, atol=1e-5)
    none = model(x, t, replace(cond, text=replace(text_of(cond), mask=mask & False)))
    assert bool(none.isfinite().all())


# seeds, memory and files


@pytest.mark.parametrize("name", TINY)
def test_the_same_seed_builds_the_same_model_and_leaves_the_global_generator_alone(name: str) -> None:
    before = torch.get_rng_state()
    one = TINY[name].build(seed=7).state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    same, other = TINY[name].build(seed=7).state_dict(), TINY[name].build(seed=8).state_dict()
    assert all(torch.equal(one[k], same[k]) for k in one)
    drawn = [k for k in one if k != "pos_embed" and one[k].unique().numel() > 1]
    assert all(not torch.equal(one[k], other[k]) for k in drawn)
    firsts = [float(one[k].flatten()[0]) for k in drawn]
    assert len(set(firsts)) == len(firsts) > 8


@pytest.mark.parametrize("name", TINY)
def test_no_weight_is_memory_that_nobody_wrote(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = nn.Module.to_empty

    def to_empty(self: nn.Module, **kwargs: Any) -> nn.Module:
        real(self, **kwargs)
        with torch.no_grad():
            for p in (*self.parameters(), *self.buffers()):
                p.fill_(float("nan"))
        return self

    monkeypatch.setattr(nn.Module, "to_empty", to_empty)
    model = TINY[name].build()
    assert all(bool(value.isfinite().all()) for value in model.state_dict().values())


@pytest.mark.parametrize("name", [name for name in TINY if name not in SINGLE])
def test_initial_weights(name: str) -> None:
    """Xavier for what is linear, 0 for what modulates, N(0, 0.02^2) for the MLPs of times and vectors."""
    heads = TINY[name].num_heads * (48 // TINY[name].hidden_size)
    config = replace(TINY[name], hidden_size=48, num_heads=heads)
    model = config.build(seed=3)
    gated = [m for m in model.modules() if isinstance(m, Stream | ParallelBlock | FinalLayer)]
    assert len(gated) >= config.depth
    for key, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            assert module.bias is None or not module.bias.any()
            rows = module.weight.detach().flatten(1)
            if "modulation" in key or key.startswith("final_layer"):
                assert not rows.any(), key
            elif ".mlp." in key and "block" not in key:
                assert float(rows.std()) == pytest.approx(0.02, rel=0.1), key
            else:
                bound = (6 / sum(rows.shape)) ** 0.5
                assert 0.9 * bound < float(rows.abs().max()) <= bound, key
        elif "norm" in key:
            assert all(bool((p == 1).all()) for p in module.parameters()), key
    # a new network says nothing yet, and its blocks are the identity
    x, t, cond = given(config)
    taps: list[tuple[Any, Any]] = []

    def tap(site: str, block: nn.Module, h: Any, *args: Any) -> Any:
        taps.append((h, block(h, *args)))
        return taps[-1][1]

    assert not model(x, t, cond, edit=tap).any()
    for before, after in taps:
        for one, two in zip(before, after, strict=True):
            assert torch.equal(one, two)


def test_a_state_dict_survives_safetensors_bit_for_bit(tiny: tuple[Model, Any], tmp_path: Path) -> None:
    model, config = tiny
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    other = config.build(seed=99).eval()
    x, t, cond = given(config)
    assert not torch.equal(other(x, t, cond), model(x, t, cond))
    other.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=True)
    assert torch.equal(other(x, t, cond), model(x, t, cond))
    assert copy.deepcopy(model).state_dict().keys() == model.state_dict().keys()
    assert from_json(to_json(config)) == config


# prepare and edit


@pytest.mark.parametrize("tiles", [None, (2, 3)])
def test_prepared_work_changes_nothing(tiny: tuple[Model, Any], tiles: tuple[int, int] | None) -> None:
    model, config = tiny
    x, t, cond = given(config, 3, tiles)
    ready = model.prepare(cond, x.shape, (1.0, 0.5))
    assert ready.static
    assert all(value.shape[0] in (1, 3) for value in ready.static.values())
    assert torch.equal(model(x, t, ready), model(x, t, cond))
    assert torch.equal(model(x, t / 2, ready), model(x, t / 2, cond))
    index = torch.tensor([2, 0])
    assert_close(model(x[index], t[index], ready.rows(index)), model(x, t, cond)[index], rtol=1e-5, atol=1e-5)
    # what is given once serves all rows
    one = model.prepare(cond.rows(slice(1)), (1, *x.shape[1:]))
    expected = model(x, t, cond.rows(torch.zeros(3, dtype=torch.long)))
    assert_close(model(x, t, one), expected, rtol=1e-5, atol=1e-5)


def test_gradients_also_flow_through_prepared_work(tiny: tuple[Model, Any]) -> None:
    model, config = tiny
    x, t, cond = given(config)
    _, plain = gradients(model, x, t, cond)
    _, prepared = gradients(model, x, t, model.prepare(cond, x.shape))
    assert plain.keys() == prepared.keys()
    assert all(torch.equal(plain[name], prepared[name]) for name in plain)


def test_a_trajectory_equals_single_calls(tiny: tuple[Model, Any]) -> None:
    """Also where the negative text is longer."""
    model, config = tiny
    x, _, cond = given(config, 2)
    _, _, null = given(config, 2, length=8)
    denoiser = Meaning(Linear(), "velocity", CLOCKS.get(type(config), "1000t")).of(model)
    denoise = denoiser.start(cond, x.shape, (1.0, 0.5, 0.0))
    guided = guide(denoiser, CFG(2.0, null)).start(cond, x.shape, (1.0, 0.5, 0.0))
    for t in (1.0, 0.5):
        strong, weak = denoiser(x, t, cond).out, denoiser(x, t, null).out
        assert torch.equal(denoise(x, t).out, strong)
        assert_close(guided(x, t).out, weak + 2 * (strong - weak), rtol=1e-4, atol=1e-5)


def test_sites_are_the_blocks_names_in_order(tiny: tuple[Model, Any]) -> None:
    model, config = tiny
    visited: list[str] = []

    def watch(site: str, block: nn.Module, x: Any, *args: Any) -> Any:
        visited.append(site)
        assert model.get_submodule(site) is block
        return block(x, *args)

    inputs = given(config)
    assert torch.equal(model(*inputs, edit=watch), model(*inputs))
    lists: list[Any] = [model.get_submodule(name) for name in model.plan.shard]
    expected = [f"{name}.{i}" for name, blocks in zip(model.plan.shard, lists, strict=True) for i in range(len(blocks))]
    assert visited == expected


def test_an_edit_can_skip_a_block_and_put_features_back(tiny: tuple[Model, Any]) -> None:
    model, config = tiny
    inputs, taps = given(config), {}
    sites: list[str] = []

    def tap(site: str, block: nn.Module, x: Any, *args: Any) -> Any:
        sites.append(site)
        taps[site] = block(x, *args)
        return taps[site]

    out = model(*inputs, edit=tap)
    for skipped in sites:
        less = model(*inputs, edit=lambda site, block, x, *args, s=skipped: x if site == s else block(x, *args))
        assert not torch.allclose(less, out, atol=1e-5), skipped
    replay = model(*inputs, edit=lambda site, block, x, *args: taps[site])
    assert torch.equal(replay, out)


@pytest.mark.parametrize("name", [name for name in TINY if name not in SINGLE])
def test_attention_can_be_the_identity_in_some_rows(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if every token of these rows were masked from all but itself; the other rows do not change by a bit."""
    model, config = randomise(TINY[name].build()), TINY[name]
    inputs, rows = given(config, 3), torch.tensor([True, False, True])
    real = torch.nn.functional.scaled_dot_product_attention

    for kind in {type(m) for m in model.modules() if isinstance(m, DualBlock | ParallelBlock)}:

        def identity(site: str, block: nn.Module, x: Any, *args: Any, kind: type = kind) -> Any:
            return block(x, *args, identity=rows) if isinstance(block, kind) else block(x, *args)

        def diagonal(site: str, block: nn.Module, x: Any, *args: Any, kind: type = kind) -> Any:
            def alone(q: Tensor, k: Tensor, v: Tensor, *rest: Any, **others: Any) -> Tensor:
                return real(q, k, v, torch.eye(q.shape[2], dtype=torch.bool))

            with monkeypatch.context() as patch:
                if isinstance(block, kind):
                    patch.setattr("ditkit.layers.attention.F.scaled_dot_product_attention", alone)
                return block(x, *args)

        out, plain, masked = (model(*inputs, edit=edit) for edit in (identity, None, diagonal))
        assert_close(out[rows], masked[rows], rtol=1e-5, atol=1e-5)
        assert torch.equal(out[~rows], plain[~rows])
        assert not torch.allclose(out[rows], plain[rows], rtol=1e-2)


# types


def test_a_pure_bf16_model_runs(tiny: tuple[Model, Any]) -> None:
    model, config = tiny
    x, t, cond = given(config, 2, (2, 3))
    exact = model(x, t, cond)
    low = copy.deepcopy(model).bfloat16()
    out = low(x.bfloat16(), t, cond)
    assert out.dtype == torch.bfloat16
    assert float((out.float() - exact).detach().norm() / exact.detach().norm()) < 0.1
    assert torch.equal(low(x.bfloat16(), t, low.prepare(cond, x.shape)), out)


def test_autocast_runs_forward_and_backward(tiny: tuple[Model, Any]) -> None:
    model, config = tiny
    x, t, cond = given(config)
    exact = model(x, t, cond)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(x, t, cond)
    assert float((out.float() - exact).detach().norm() / exact.detach().norm()) < 0.1
    out.float().square().mean().backward()
    assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in model.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("name", TINY)
def test_a_compiled_block_equals_the_plain_one(name: str) -> None:
    torch.compiler.reset()  # or sizes of the model before become symbols, which torch 2.13 cannot sort in convolutions
    model = randomise(TINY[name].build(), std=STD.get(type(TINY[name]), 0.2))
    inputs = given(TINY[name])
    plain = model(*inputs)
    for lists in model.plan.shard:
        blocks: Any = model.get_submodule(lists)
        for block in blocks:
            block.compile()
    assert_close(model(*inputs), plain, rtol=1e-5, atol=1e-5)


# errors


def test_errors_say_what_is_missing_or_which_option_to_change(tiny: tuple[Model, Any]) -> None:
    model, config = tiny
    x, t, cond = given(config)
    wide = replace(text_of(cond), values=torch.zeros(2, 5, 99))
    wrong: list[tuple[Callable[[], Any], str]] = [
        (lambda: model(torch.cat((x, x), dim=1), t, cond), "change in_channels"),
        (lambda: model(x, t, replace(cond, text=None)), "takes a text, .* and none was given"),
        (lambda: model(x, t, replace(cond, text=wide)), r"text_dim=\d+.*\[2, 5, 99\]: change text_dim"),
    ]
    if config.patch_size > 1:
        wrong.append((lambda: model(x[..., :-1], t, cond), "do not tile: change patch_size or the size of x"))
    if cond.pooled is not None:
        wrong.append((lambda: model(x, t, replace(cond, pooled=None)), "takes a pooled text .* and none was given"))
        other = replace(cond, pooled=torch.zeros(2, 99))
        wrong.append((lambda: model(x, t, other), r"pooled_dim=\d+.*\[2, 99\]: change pooled_dim"))
    if isinstance(config, FluxConfig):
        scalars = {} if config.guidance else {"guidance": torch.ones(2)}
        says = rf"guidance={config.guidance} .*: {'none' if config.guidance else 'one'} was given"
        wrong.append((lambda: model(x, t, replace(cond, scalars=scalars)), says))
    for call, says in wrong:
        with pytest.raises(ValueError, match=says) as caught:
            call()
        assert "\n" not in str(caught.value)


def test_a_configuration_fits_latents_and_refuses_what_it_cannot_be(tiny: tuple[Model, Any]) -> None:
    _, config = tiny
    p = config.patch_size
    fitted = config.fitted((8, 3 * p, 2 * p), 0, 0)
    assert (fitted.shape, fitted.length) == ((8, 3 * p, 2 * p), 6)
    assert config.fitted((8, 3 * p, 2 * p), 3, 0) == fitted  # its conditioner makes texts of classes
    with pytest.raises(DitkitError, match="what is diffused is tokens"):
        config.fitted((8,), 0, 5)


@pytest.mark.parametrize(
    ("name", "change", "says"),
    [
        ("mmdit", {"num_heads": 5}, "hidden_size 24 is not divisible by num_heads 5"),
        ("mmdit", {"text_dim": 0}, "model.text_dim must be at least 1, not 0"),
        ("mmdit", {"self_attention": 4}, r"self_attention is 0 to depth \(3\), not 4"),
        ("mmdit", {"input_size": 12}, "has 6 x 6 patches, .* has 5 in a row: raise model.position_size"),
        ("flux", {"num_heads": 2}, "hidden_size 48 is not num_heads 2 x 16, the sum of axes"),
        ("flux", {"axes": (4, 5, 7)}, r"axes are 3 or 4 even numbers of channels, not \(4, 5, 7\)"),
        ("flux", {"axes": (8, 8)}, r"axes are 3 or 4 even numbers of channels, not \(8, 8\)"),
        ("flux2", {"pooled_dim": -1}, "pooled_dim is at least 0, not -1"),
        ("flux2", {"single_depth": 0}, "single_depth must be at least 1, not 0"),
    ],
)
def test_sizes_that_cannot_be_built_are_refused(name: str, change: dict[str, Any], says: str) -> None:
    with pytest.raises(DitkitError, match=says):
        replace(TINY[name], **change).build()


# FLUX alone


@pytest.fixture(params=["flux", "flux2"])
def flux(request: pytest.FixtureRequest) -> tuple[Any, Any]:
    config = TINY[request.param]
    return randomise(config.build(), std=STD.get(type(config), 0.2)), config


def test_references_of_any_size_are_seen_and_their_text_is_masked(flux: tuple[Any, Any]) -> None:
    model, config = flux
    p = config.patch_size
    x, t, cond = given(config, 2, (2, 3))
    plain = model(x, t, cond)
    for count, rows, columns in ((1, 2, 3), (2, 1, 4)):
        shape = (2, count, config.in_channels, rows * p, columns * p)
        seen = torch.randn(shape, generator=torch.Generator().manual_seed(4)).requires_grad_()
        wider = replace(cond, references=seen)
        out = model(x, t, wider)
        assert out.shape == x.shape
        assert not torch.allclose(out, plain, atol=1e-3)
        (of_seen,) = torch.autograd.grad(out[1, 0, 0, 0], seen)
        assert bool((of_seen[1] != 0).all())
        assert not of_seen[0].any()
        longer = replace(wider, text=text_of(cond).padded(11))
        assert_close(model(x, t, longer), out, rtol=1e-5, atol=1e-5)
        assert torch.equal(model(x, t, model.prepare(wider, x.shape)), out)
        assert_close(model(x[1:], t[1:], wider.rows(slice(1, 2))), out[1:], rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match=f"in_channels={config.in_channels}.*change in_channels"):
        model(x, t, replace(cond, references=torch.zeros(2, 1, 9, 2 * p, 2 * p)))


def test_text_and_references_have_places_of_their_own(flux: tuple[Any, Any]) -> None:
    """(time, row, column, place in the text): the text counts in the last alone, a reference stands at its time."""
    model, config = flux
    axes = len(config.axes)
    table = model.rope(3, [(0, 2, 2), (2 * config.reference_step, 1, 3)])[0]
    places = [(0, 0, 0, i) for i in range(3)]
    places += [(0, 0, 0, 0), (0, 0, 1, 0), (0, 1, 0, 0), (0, 1, 1, 0)]
    places += [(2 * config.reference_step, 0, i, 0) for i in range(3)]
    positions = [torch.tensor(axis) for axis in list(zip(*places, strict=True))[:axes]]
    assert torch.equal(table, rope_table(axial_angles(positions, config.axes, config.theta)))


def test_modulation_is_made_once_or_by_each_block() -> None:
    def names(name: str) -> set[str]:
        with torch.device("meta"):
            model = TINY[name].build()
        return {key.rsplit(".", 2)[0] for key, _ in model.named_parameters() if "modulation" in key}

    streams = {f"double_blocks.{i}.{s}.adaLN_modulation" for i in (0, 1) for s in ("x_block", "context_block")}
    assert names("flux") == {
        *streams,
        *(f"single_blocks.{i}.adaLN_modulation" for i in (0, 1)),
        "final_layer.adaLN_modulation",
    }
    shared = {"double_stream_modulation_img", "double_stream_modulation_txt", "single_stream_modulation"}
    assert names("flux2") == {*shared, "final_layer.adaLN_modulation"}


# MMDiT alone


def test_an_image_takes_the_middle_of_the_positions() -> None:
    """Rows and columns of the table around its middle; an image of input_size spans 0 to 16 (section 5.3.2)."""
    config = replace(TINY["mmdit"], input_size=8, position_size=8)
    model: Any = config.build()
    table = model.pos_embed[0].view(8, 8, 24)
    assert torch.equal(model.cropped((4, 4))[0], table[2:6, 2:6].flatten(0, 1))
    assert torch.equal(model.cropped((3, 5))[0], table[2:5, 1:6].flatten(0, 1))
    assert_close(model.cropped((4, 4)), sincos_2d(24, (4, 4), step=4.0), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match=r"x has 9 x 2 patches and the table of positions 8 x 8: raise position_size"):
        model(*given(config, 1, (9, 2)))


def test_only_the_first_blocks_have_an_own_attention_and_the_last_has_no_text() -> None:
    with torch.device("meta"):
        model: Any = create_model("sd35_medium")
    blocks = list(model.joint_blocks)
    assert [b.x_block.attn2 is not None for b in blocks] == [True] * 13 + [False] * 11
    assert [b.context_block.mlp is None for b in blocks] == [False] * 23 + [True]
    assert all(b.context_block.attn2 is None for b in blocks)
    assert [b.x_block.adaLN_modulation[1].out_features // 1536 for b in blocks] == [9] * 13 + [6] * 11
