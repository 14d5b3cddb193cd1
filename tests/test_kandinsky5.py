"""Kandinsky 5: sizes, what it sees, masks, scale factors, channels, patterns, precision, the door into its forward."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.testing import assert_close

from ditkit.conditioning import Conditioning, Tokens, cat
from ditkit.config import DitkitError, from_json, to_json
from ditkit.diffusion import CFG, Linear, Meaning, guide
from ditkit.layers import Linear32, Nabla, SlidingTiles
from ditkit.models import Kandinsky5, Kandinsky5Config, create_model, model_config
from ditkit.plan import cost

TINY = Kandinsky5Config(
    input_size=(3, 8, 12), in_channels=4, hidden_size=48, ff_dim=96, time_dim=32, text_depth=2, depth=3, axes=(4, 6, 6),
    text_dim=20, pooled_dim=12,
)  # fmt: skip
SITES = ["text_blocks.0", "text_blocks.1", "blocks.0", "blocks.1", "blocks.2"]


def build(**changes: Any) -> Kandinsky5:
    """Weights under which nothing is zero."""
    model = replace(TINY, **changes).build()
    generator = torch.Generator().manual_seed(0)
    for name, p in model.named_parameters():
        one = 1.0 if "norm" in name or name.endswith("embedder.1.weight") else 0.0
        p.data = one + 0.1 * torch.randn(p.shape, generator=generator)
    return model.eval()


def inputs(
    b: int = 2, length: int = 7, size: tuple[int, int, int] = (3, 8, 12), config: Kandinsky5Config = TINY
) -> tuple[Tensor, Tensor, Conditioning]:
    """x, times, and a conditioning with texts of different lengths."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(b, config.in_channels, *size, generator=generator)
    values = torch.randn(b, length, config.text_dim, generator=generator)
    mask = torch.arange(length) < length - 2 * torch.arange(b)[:, None] % length
    cond = Conditioning(
        text=Tokens(values, mask),
        pooled=torch.randn(b, config.pooled_dim, generator=generator),
        channels=torch.randn(b, config.in_channels + 1, *size, generator=generator) if config.given_channels else None,
    )
    return x, 1000 * torch.rand(b, generator=generator), cond


# sizes and shapes


@pytest.mark.parametrize(
    ("name", "parameters", "tensors"),
    [
        ("kandinsky5_lite_video", 2_007_702_848, 814),
        ("kandinsky5_image", 6_022_080_576, 1246),
        ("kandinsky5_pro_video", 19_311_325_248, 1514),
    ],
)
def test_the_published_sizes(name: str, parameters: int, tensors: int) -> None:
    """Exactly those of the released networks: 2.008, 6.022 and 19.311 billion."""
    with torch.device("meta"):
        model = create_model(name)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert len(model.state_dict()) == tensors


def test_the_heads_of_the_releases() -> None:
    heads = {"lite_video": 28, "image": 20, "pro_video": 32}
    assert {name: model_config(f"kandinsky5_{name}").num_heads for name in heads} == heads  # type: ignore[attr-defined]
    assert sum(p.numel() for p in create_model("kandinsky5_tiny").parameters()) < 3_000_000


@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("size", [(1, 2, 2), (3, 8, 12), (5, 4, 14)])
def test_the_output_has_the_shape_of_x(size: tuple[int, int, int], given: bool) -> None:
    model = build(given_channels=given)
    out = model(*inputs(3, 5, size, model.config))
    assert out.shape == (3, 4, *size)
    assert out.dtype == torch.float32
    assert bool(out.isfinite().all())


def test_patches_in_time_work_too() -> None:
    model = build(patch_size=(3, 2, 4))
    assert model(*inputs()).shape == (2, 4, 3, 8, 12)


def test_every_parameter_gets_a_finite_gradient() -> None:
    model = build()
    model(*inputs(3)).square().mean().backward()
    for name, p in model.named_parameters():
        assert p.grad is not None, name
        assert bool(p.grad.isfinite().all()), name
        assert bool(p.grad.any()), name


def test_a_new_network_says_nothing_and_its_blocks_are_the_identity() -> None:
    model = TINY.build()

    def same(site: str, block: nn.Module, x: Tensor, *args: Any) -> Tensor:
        assert torch.equal(block(x, *args), x)
        return x

    assert not bool(model(*inputs(), edit=same).any())


# what it sees


def test_every_input_matters_everywhere() -> None:
    model = build()
    x, t, cond = inputs(1)
    assert cond.text is not None
    assert cond.channels is not None
    assert cond.pooled is not None
    values, channels, pooled = (y.clone().requires_grad_() for y in (cond.text.values, cond.channels, cond.pooled))
    x.requires_grad_()
    out = model(x, t, replace(cond, text=Tokens(values, cond.text.mask), channels=channels, pooled=pooled))
    for pixel in (out[0, 0, 0, 0, 0], out[0, -1, -1, -1, -1]):
        for gradient in torch.autograd.grad(pixel, (x, values, channels, pooled), retain_graph=True):
            assert bool((gradient != 0).all())
    assert bool((model(x, t + 100, cond) != out).all())


def test_padding_and_a_longer_neighbour_change_nothing() -> None:
    """No output and no gradient, though the pads hold numbers."""
    model = build()
    x, t, cond = inputs(2)
    assert cond.text is not None
    assert cond.text.mask.sum(1).tolist() == [7, 5]
    weight = torch.randn(x.shape[1:], generator=torch.Generator().manual_seed(4))

    def run(*args: Any) -> tuple[Tensor, dict[str, Tensor]]:
        model.zero_grad()
        out = model(*args)
        (out[-1] * weight).sum().backward()
        found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        return out[-1].detach(), found

    index = torch.tensor([1])
    one = cond.rows(index)
    assert one.text is not None
    short = replace(one, text=Tokens(one.text.values[:, :5], one.text.mask[:, :5]))
    junk = Tokens(torch.cat((one.text.values, torch.full((1, 9, 20), 50.0)), 1), one.text.padded(16).mask)
    wanted, gradients = run(x[index], t[index], short)
    for given in ((x[index], t[index], one), (x[index], t[index], replace(one, text=junk)), (x, t, cond)):
        out, found = run(*given)
        assert_close(out, wanted, rtol=1e-5, atol=1e-5)
        for name, gradient in gradients.items():
            assert_close(found[name], gradient, rtol=1e-4, atol=1e-5, msg=name)


def test_no_text_at_all_is_finite() -> None:
    model = build()
    x, t, cond = inputs(1)
    assert cond.text is not None
    out = model(x, t, replace(cond, text=Tokens(cond.text.values, torch.zeros_like(cond.text.mask))))
    assert bool(out.isfinite().all())
    out.square().mean().backward()
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None)


def test_positions_are_divided_by_the_scale_factors_of_each_sample() -> None:
    """A sample with scale factors of its own is the sample of a model that has them; equal ones change nothing."""
    model = build()
    x, t, cond = inputs(2)
    own = torch.tensor([[1.0, 2.0, 2.0], [2.0, 3.16, 1.5]])
    out = model(x, t, replace(cond, scalars={"scale_factor": own}))
    assert_close(out[0], model(x, t, cond)[0], rtol=1e-5, atol=1e-5)
    other = replace(TINY, scale_factor=(2.0, 3.16, 1.5)).build().eval()
    other.load_state_dict(model.state_dict())
    assert_close(out[1], other(x, t, cond)[1], rtol=1e-5, atol=1e-5)
    assert (out[1] - model(x, t, cond)[1]).abs().max() > 1e-3
    same = replace(cond, scalars={"scale_factor": own[:1].expand(2, 3)})
    assert_close(model(x, t, same), model(x, t, cond), rtol=1e-6, atol=1e-6)
    # and it is a division: twice the factors, every second row
    table = model.rope((2, 3, 4), torch.tensor([[1.0, 1.0, 1.0]]))
    halved = model.rope((3, 5, 7), torch.tensor([[2.0, 2.0, 2.0]]))
    spread = halved.unflatten(2, (3, 5, 7))[:, :, ::2, ::2, ::2].flatten(2, 4)
    assert_close(table, spread)


def test_without_channels_they_are_zeros() -> None:
    model = build()
    x, t, cond = inputs()
    none = replace(cond, channels=None)
    assert cond.channels is not None
    zeros = replace(cond, channels=torch.zeros_like(cond.channels))
    assert torch.equal(model(x, t, none), model(x, t, zeros))
    assert (model(x, t, cond) - model(x, t, none)).abs().max() > 1e-3


def test_a_sample_does_not_see_its_batch_and_batches_can_be_joined() -> None:
    model = build()
    x, t, cond = inputs(4)
    whole = model(x, t, cond)
    index = torch.tensor([3, 0])
    assert_close(model(x[index], t[index], cond.rows(index)), whole[index], rtol=1e-5, atol=1e-5)
    parts = cat([cond.rows(slice(0, 1)), cond.rows(slice(1, 4))])
    assert_close(model(x, t, parts), whole, rtol=1e-5, atol=1e-5)


# prepare and edit


@pytest.mark.parametrize("scalars", [{}, {"scale_factor": torch.tensor([[1.0, 2.0, 2.0], [1.0, 1.0, 3.0]])}])
@pytest.mark.parametrize("pattern", [None, Nabla(0.5, None, (1, 2, 2))])
def test_prepared_work_changes_nothing(scalars: dict[str, Tensor], pattern: Any) -> None:
    model = build(pattern=pattern)
    x, t, cond = inputs(2)
    cond = replace(cond, scalars=scalars)
    ready = model.prepare(cond, x.shape, (1.0, 0.5))
    assert {"text", "pooled", "rope", "text_rope"} == set(ready.static)
    assert torch.equal(model(x, t, ready), model(x, t, cond))
    assert torch.equal(model(x, t / 2, ready), model(x, t / 2, cond))  # the text blocks see the time
    index = torch.tensor([1])
    assert_close(model(x[index], t[index], ready.rows(index)), model(x, t, cond)[index], rtol=1e-5, atol=1e-5)
    model(x, t, ready).square().mean().backward()
    assert model.text_embedder[0].weight.grad is not None


def test_a_guided_trajectory_equals_single_calls() -> None:
    model = build()
    x, _, cond = inputs(2)
    denoiser = Meaning(Linear(), "velocity", "1000t").of(model)
    assert cond.text is not None
    null = replace(cond, text=Tokens(cond.text.values[:, :1], cond.text.mask[:, :1]), pooled=torch.zeros(2, 12))
    guided = guide(denoiser, CFG(5.0, null)).start(cond, x.shape, (1.0, 0.5, 0.0))
    for t in (1.0, 0.5):
        strong, weak = denoiser(x, t, cond).out, denoiser(x, t, null).out
        assert_close(guided(x, t).out, weak + 5 * (strong - weak), rtol=1e-4, atol=1e-4)


def test_the_door_opens_at_every_block() -> None:
    model, seen, given = build(), [], inputs()

    def watch(site: str, block: nn.Module, x: Any, *args: Any) -> Any:
        seen.append(site)
        assert model.get_submodule(site) is block
        return block(x, *args)

    assert torch.equal(model(*given, edit=watch), model(*given))
    assert seen == SITES
    assert {site.split(".")[0] for site in seen} == set(model.plan.shard)
    for skipped in SITES:
        out = model(*given, edit=lambda site, block, x, *args, s=skipped: x if site == s else block(x, *args))
        assert (out - model(*given)).abs().max() > 1e-4


@pytest.mark.parametrize("site", ["text_blocks.1", "blocks.1"])
def test_attention_can_be_the_identity_in_some_rows(site: str) -> None:
    model, given, rows = build(), inputs(3), torch.tensor([True, False, True])

    def identity(name: str, block: nn.Module, x: Tensor, *args: Any) -> Tensor:
        return block(x, *args, identity=rows) if name == site else block(x, *args)

    out, plain = model(*given, edit=identity), model(*given)
    assert torch.equal(out[1], plain[1])
    assert (out[rows] - plain[rows]).abs().amax((1, 2, 3, 4)).min() > 1e-4
    # the value of each token itself, through the output Linear
    changed = copy.deepcopy(model)
    attn: Any = changed.get_submodule(f"{site}.attn")
    attn.forward = lambda x, *_, identity=None: attn.merge(attn.project(x)[2])
    assert_close(out[rows], changed(*given)[rows], rtol=1e-5, atol=1e-5)


# patterns


@pytest.mark.parametrize("pattern", [Nabla(1.0, None, (1, 2, 2)), SlidingTiles((99, 99, 99), (3, 2, 3))])
def test_a_pattern_that_keeps_everything_changes_nothing(pattern: Any) -> None:
    plain, model = build(), build(pattern=pattern)
    given = inputs()
    with torch.no_grad():
        assert_close(model(*given), plain(*given), rtol=1e-5, atol=1e-5)
    assert_close(model(*given), plain(*given), rtol=1e-5, atol=1e-5)
    scaled = replace(given[2], scalars={"scale_factor": torch.tensor([[1.0, 2.0, 2.0], [1.0, 1.0, 3.0]])})
    assert_close(model(*given[:2], scaled), plain(*given[:2], scaled), rtol=1e-5, atol=1e-5)


def test_a_sparse_pattern_trains_and_samples_with_the_same_numbers() -> None:
    model = build(pattern=Nabla(0.4, (1, 1, 1), (1, 2, 3)))
    given = inputs()
    out = model(*given)
    with torch.no_grad():
        assert_close(model(*given), out, rtol=1e-5, atol=1e-5)
    assert (out - build()(*given)).abs().max() > 1e-4
    out.square().mean().backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in model.parameters())


# precision


def test_the_islands_stay_in_float32_when_the_model_does_not() -> None:
    """Weights of time embedding and modulations are those from before the cast, bit for bit; modulated norms, gates
    and times are computed in float32."""
    model = build()
    low = copy.deepcopy(model).bfloat16()
    state = model.state_dict()
    kept = {name for name, value in low.state_dict().items() if value.dtype == torch.float32}
    assert kept == {name for name in state if "adaLN_modulation" in name or name.startswith("t_embedder")}
    assert all(torch.equal(low.state_dict()[name], state[name]) for name in kept)
    assert {type(m) for name, m in low.named_modules() if name.endswith("adaLN_modulation.1")} == {Linear32}
    seen: dict[str, torch.dtype] = {}

    def note(name: str) -> Any:
        return lambda module, given, out: seen.update({name: out.dtype})

    for name in ("blocks.0.norm1", "blocks.0.norm_cross", "blocks.0.adaLN_modulation", "blocks.0.attn", "final_layer"):
        low.get_submodule(name).register_forward_hook(note(name))
    x, t, cond = inputs(2)
    out = low(x.bfloat16(), t, cond)
    assert out.dtype == torch.bfloat16
    assert list(seen.values()).count(torch.float32) == 3
    assert seen["blocks.0.attn"] == seen["final_layer"] == torch.bfloat16
    exact = model(x, t, cond)
    assert float((out.float() - exact).detach().norm() / exact.detach().norm()) < 0.05
    assert torch.equal(low(x.bfloat16(), t, low.prepare(cond, x.shape)), out)


def test_times_near_each_other_are_told_apart_in_bf16() -> None:
    """999 and 1000 are one number in bfloat16."""
    low = build().bfloat16()
    x, _, cond = inputs(1)
    low_x = x.bfloat16()
    c: list[Tensor] = [low.t_embedder(torch.tensor([t])) for t in (999.0, 1000.0)]
    assert c[0].dtype == torch.float32
    assert (c[0] - c[1]).abs().max() > 1e-3
    assert not torch.equal(low(low_x, torch.tensor([999.0]), cond), low(low_x, torch.tensor([1000.0]), cond))


def test_autocast_runs_forward_and_backward() -> None:
    model = build()
    given = inputs()
    exact = model(*given)
    seen: list[torch.dtype] = []
    model.get_submodule("blocks.1.adaLN_modulation").register_forward_hook(lambda m, i, out: seen.append(out.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        out = model(*given)
    assert seen == [torch.float32]
    assert float((out.float() - exact).detach().norm() / exact.detach().norm()) < 0.05
    out.float().square().mean().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())


def test_in_float64_nothing_is_rounded_to_float32() -> None:
    model = build()
    x, t, cond = inputs()
    double = copy.deepcopy(model).double()
    out = double(x.double(), t, cond.to("cpu", torch.float64))
    assert out.dtype == torch.float64
    assert {p.dtype for p in double.parameters()} == {torch.float64}
    assert_close(out.float(), model(x, t, cond), rtol=1e-4, atol=1e-4)


# files, costs, errors


def test_the_same_seed_builds_the_same_model_and_files_keep_it(tmp_path: Any) -> None:
    before = torch.random.get_rng_state()
    one, two, other = TINY.build(3), TINY.build(3), TINY.build(4)
    assert torch.equal(torch.random.get_rng_state(), before)
    for (name, p), q in zip(one.named_parameters(), two.parameters(), strict=True):
        assert torch.equal(p, q), name
        assert bool(p.isfinite().all()), name
    assert not torch.equal(one.x_embedder.weight, other.x_embedder.weight)
    save_file(build().state_dict(), tmp_path / "model.safetensors")
    other.load_state_dict(load_file(tmp_path / "model.safetensors"))
    assert torch.equal(other.eval()(*inputs()), build()(*inputs()))


def test_configurations_are_saved_with_their_pattern() -> None:
    config = replace(TINY, pattern=Nabla(0.7))
    assert from_json(to_json(config)) == config
    assert config.shape == (4, 3, 8, 12)
    assert config.length == 3 * 4 * 6


def test_a_plan_counts_the_cost() -> None:
    small = replace(TINY, input_size=(2, 8, 8))
    found = cost(small, batch=2, dtype="bf16")
    assert found.parameters == sum(p.numel() for p in small.build().parameters())
    low = small.build().bfloat16()  # modulations and time embedding stay in float32
    assert found.weights == sum(p.nbytes for p in low.parameters()) > 2 * found.parameters
    sparse = cost(replace(small, pattern=Nabla(tile=(1, 2, 2))), resolution=16)
    assert sparse.shape == (4, 2, 16, 16)
    assert sparse.gmacs > found.gmacs > 0


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"axes": (4, 6, 5)}, "must be even"),
        ({"axes": (4, 6, 8)}, "must divide model.hidden_size 48"),
        ({"hidden_size": 0}, "model.hidden_size must be at least 1"),
        ({"patch_size": (1, 0, 2)}, "model.patch_size is three numbers of at least 1"),
        ({"scale_factor": (1.0, 0.0, 1.0)}, "model.scale_factor is three numbers above 0"),
        ({"text_depth": -1}, "model.text_depth must not be negative"),
    ],
)
def test_sizes_that_cannot_be_built_are_refused(change: dict[str, Any], says: str) -> None:
    with pytest.raises(DitkitError, match=says):
        replace(TINY, **change)


def test_what_does_not_fit_is_refused() -> None:
    model = build()
    x, t, cond = inputs()
    with pytest.raises(ValueError, match=r"\[b 4 t h w\] \(in_channels=4\).*change in_channels"):
        model(torch.cat((x, x), 1), t, cond)
    with pytest.raises(ValueError, match="3 x 7 x 12, which patches of 1 x 2 x 2 do not tile: change patch_size"):
        model(x[:, :, :, :7], t, cond)
    with pytest.raises(ValueError, match=r"cond\.pooled is missing"):
        model(x, t, replace(cond, pooled=None))
    with pytest.raises(ValueError, match=r"text \[b l 20\].*cond\.text is missing"):
        model.prepare(replace(cond, text=None), x.shape)
    assert cond.channels is not None
    with pytest.raises(ValueError, match=r"a latent and a mask, \[2, 5, 3, 8, 12\]"):
        model(x, t, replace(cond, channels=cond.channels[:, :4]))
    with pytest.raises(ValueError, match="given_channels=False"):
        build(given_channels=False)(x, t, cond)
    with pytest.raises(ValueError, match="not filled by tiles of 1 x 8 x 8"):
        build(pattern=Nabla())(x, t, cond)
    with pytest.raises(DitkitError, match=r"videos \[c t h w\], and what is diffused is of shape \[3, 8, 8\]"):
        TINY.fitted((3, 8, 8), 0, 0)
    with pytest.raises(DitkitError, match="3 x 7 x 8 are not tiled"):
        TINY.fitted((4, 3, 7, 8), 0, 0)
    assert TINY.fitted((8, 5, 6, 4), 0, 0) == replace(TINY, in_channels=8, input_size=(5, 6, 4))
