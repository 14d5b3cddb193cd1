"""Every model: published sizes, shapes, gradients, seeds, files, and the one door into the forward."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.testing import assert_close

from ditkit.conditioning import Conditioning
from ditkit.config import DitkitError, lookup, names
from ditkit.diffusion import CFG, Linear, Meaning, guide
from ditkit.layers import (
    Attention,
    BottleneckPatchEmbed,
    FinalLayer,
    Mlp,
    PatchEmbed,
    RMSNorm,
    SwiGLU,
    axial_angles,
    patch_grid,
    rope_table,
    rotate,
    sincos_2d,
    unpatchify,
)
from ditkit.models import (
    AutoencoderConfig,
    ControlConfig,
    DDiTConfig,
    DiT,
    DiTConfig,
    DraxConfig,
    FluxConfig,
    JiT,
    JiTConfig,
    Kandinsky5Config,
    LightningDiTConfig,
    LoRAConfig,
    Lumina2Config,
    MLPConfig,
    MMDiTConfig,
    Model,
    ModelConfig,
    PixArtConfig,
    ResNetConfig,
    SanaConfig,
    UNetConfig,
    ZImageConfig,
    create_model,
    list_models,
    model_config,
)
from ditkit.plan import gmacs

from .conftest import randomise

TINY: dict[str, Any] = {
    "dit": DiTConfig(input_size=8, patch_size=2, hidden_size=24, depth=3, num_heads=3, num_classes=5),
    "dit without variance": DiTConfig(
        input_size=(4, 8), patch_size=4, in_channels=3, hidden_size=16, depth=2, num_heads=2, num_classes=5,
        learn_sigma=False,
    ),
    **{
        f"dit {way}": DiTConfig(
            input_size=8, patch_size=2, hidden_size=24, depth=3, num_heads=3, num_classes=5, conditioning=way
        )
        for way in ("in_context", "cross_attention", "adaln")
    },
    "jit": JiTConfig(
        input_size=16, patch_size=4, hidden_size=24, depth=4, num_heads=3, num_classes=5, bottleneck_dim=7,
        in_context_len=3, in_context_start=2,
    ),
    "jit without tokens": JiTConfig(
        input_size=(8, 16), patch_size=4, in_channels=1, hidden_size=16, depth=2, num_heads=2, num_classes=5,
        bottleneck_dim=4, in_context_len=0, in_context_start=0,
    ),
    "lightningdit": LightningDiTConfig(
        input_size=4, in_channels=8, hidden_size=24, depth=3, num_heads=3, num_classes=5
    ),
    "lightningdit with qk-norm": LightningDiTConfig(
        input_size=(4, 8), patch_size=2, in_channels=3, hidden_size=16, depth=2, num_heads=2, num_classes=5,
        qk_norm=True,
    ),
}  # fmt: skip
"""Transformers, whose blocks are blocks.0, blocks.1, ... of one width."""
CONVOLUTIONAL: dict[str, Any] = {
    "unet": UNetConfig(
        input_size=8, model_channels=8, channel_mult=(1, 2), num_res_blocks=1, attention_resolutions=(2,),
        num_head_channels=4, norm_groups=4, num_classes=5,
    ),
    "unet of the older parts": UNetConfig(
        input_size=(8, 4), in_channels=2, model_channels=8, channel_mult=(1, 1.5, 2), num_res_blocks=2,
        attention_resolutions=(1, 4), num_heads=2, num_head_channels=0, num_heads_upsample=4, norm_groups=4,
        use_new_attention_order=True, use_scale_shift_norm=False, resblock_updown=False, num_classes=5,
        learn_sigma=False,
    ),
    "resnet": ResNetConfig(input_size=8, channels=12, depth=3, groups=3, num_classes=5),
    "resnet on patches": ResNetConfig(
        input_size=(4, 8), in_channels=2, patch_size=2, channels=8, depth=2, groups=2, num_classes=5
    ),
}  # fmt: skip
ALL = {**TINY, **CONVOLUTIONAL}


def inputs(config: Any, b: int = 2, size: tuple[int, int] | None = None, seed: int = 1) -> Any:
    """x, t and labels, among them the null label."""
    generator = torch.Generator().manual_seed(seed)
    own = config.input_size if isinstance(config.input_size, tuple) else (config.input_size,) * 2
    x = torch.randn(b, config.in_channels, *(size or own), generator=generator)
    t = torch.rand(b, generator=generator)
    label = (torch.arange(b) + 4) % (config.num_classes + 1) if config.num_classes else None
    return x, t, Conditioning(label=label)


def build(name: str, **changes: Any) -> tuple[Model, Any]:
    config = dataclasses.replace(ALL[name], **changes)
    return randomise(config.build()), config


@pytest.fixture(params=TINY)
def transformer(request: pytest.FixtureRequest) -> tuple[Model, Any]:
    return build(request.param)


@pytest.fixture(params=ALL)
def tiny(request: pytest.FixtureRequest) -> tuple[Model, Any]:
    return build(request.param)


def test_every_family_has_a_tiny_one() -> None:
    """Of those on images with classes; the others are tested in files of their own and with the studies."""
    assert {type(c) for c in ALL.values()} == {lookup("model", name) for name in names("model")} - {
        AutoencoderConfig,
        ControlConfig,
        DDiTConfig,
        DraxConfig,
        Kandinsky5Config,
        FluxConfig,
        LoRAConfig,
        Lumina2Config,
        MLPConfig,
        MMDiTConfig,
        PixArtConfig,
        SanaConfig,
        ZImageConfig,
    }


# the published sizes

# DiT table 1 and its appendix, JiT table 9 and counts of the authors' code
DIT = {
    "dit_s_8": ("33.1", "0.36"), "dit_s_4": ("32.9", "1.41"), "dit_s_2": ("33.0", "6.06"),
    "dit_b_8": ("130.9", "1.42"), "dit_b_4": ("130.5", "5.57"), "dit_b_2": ("130.5", "23.01"),
    "dit_l_8": ("458.6", "5.01"), "dit_l_4": ("458.1", "19.70"), "dit_l_2": ("458.1", "80.7"),
    "dit_xl_8": ("675.7", "7.39"), "dit_xl_4": ("675.1", "29.04"), "dit_xl_2": ("675.1", "118.62"),
}  # fmt: skip
JIT = {
    "jit_b_16": (131_320_320, 131_123_712, "25.2"),
    "jit_b_32": (133_387_008, 133_190_400, "25.75"),
    "jit_l_16": (459_139_808, 458_877_664, "87.9"),
    "jit_l_32": (461_796_320, 461_534_176, "88.6"),
    "jit_h_16": (952_842_048, 952_514_368, "182"),
    "jit_h_32": (956_383_296, 956_055_616, "182.9"),
}
# DiT section 5 and figure 5: parameters and Gflops of XL/2 by conditioning; parameters are those that are trained
WAYS = {
    "dit_xl_2_in_context": ("449", 119.37),
    "dit_xl_2_cross_attention": ("598", 137.62),
    "dit_xl_2_adaln": ("600", 118.56),
    "dit_xl_2": ("675", 118.64),
}
# the sizes of the authors' code; the paper says 675M, and the name of the largest 1.0B; the rest is counted here
LIGHTNING = {
    "lightningdit_b_1": ("131", "23.01"), "lightningdit_xl_1": ("675", "118.63"),
    "lightningdit_1p0b_1": ("1029", "179.15"), "lightningdit_b_2": ("131", "5.57"),
    "lightningdit_l_2": ("458", "19.70"), "lightningdit_xl_2": ("675", "29.05"),
}  # fmt: skip
# ADM table 11, that of the model without classes from its embedding, and the Gflops that DiT's section 5.1 says
ADM = {
    "adm_64": ("296", None), "adm_128": ("422", None), "adm_256": ("554", 1120), "adm_256_uncond": ("553", 1120),
    "adm_512": ("559", 1983),
}  # fmt: skip
# counted here
RESNET = {
    "resnet_tiny": ("0.5196", "0.4566"), "resnet_s": ("4.00", "3.63"), "resnet_b": ("21.15", "19.34"),
    "resnet_l": ("71.13", "65.26"),
}  # fmt: skip
# in the paper only: "2B", 383 and 384 Gflops
PAPER = {"jit_g_16": 383, "jit_g_32": 384}


def counts(name: str) -> tuple[int, int]:
    with torch.device("meta"):
        parameters = list(create_model(name).parameters())
    return sum(p.numel() for p in parameters), sum(p.numel() for p in parameters if p.requires_grad)


def own_gmacs(name: str) -> float:
    config: Any = model_config(name)
    return gmacs(config, (config.in_channels, config.input_size, config.input_size))


def as_printed(value: float, printed: str) -> str:
    return f"{value:.{len(printed.partition('.')[2])}f}"


def test_every_name_is_in_a_table() -> None:
    sit = {name.replace("dit", "sit"): name for name in DIT}
    # test_control.py, test_ddit.py, test_drax.py, test_kandinsky5.py, test_single_stream.py, test_text_models.py,
    # test_unet.py
    elsewhere = {
        "ddit_s",
        "ddit_m",
        "drax",
        "drax_flash",
        "drax_tiny",
        "lumina2",
        "lumina2_tiny",
        "flux1_dev",
        "flux1_schnell",
        "flux1_tiny",
        "flux2_dev",
        "flux2_tiny",
        "mmdit_tiny",
        "pixart_alpha",
        "pixart_alpha_512",
        "pixart_sigma",
        "pixart_sigma_256",
        "pixart_sigma_512",
        "pixart_tiny",
        "sana_600m",
        "sana_1600m",
        "sana_sprint_600m",
        "sana_sprint_1600m",
        "sana_tiny",
        "sd3_medium",
        "sd35_large",
        "sd35_medium",
        "z_image",
        "z_image_tiny",
        "unet_tiny",
        *list_models("kandinsky5_*"),
        *list_models("*control_*"),
    }
    assert set(list_models()) == {*DIT, *sit, *WAYS, *JIT, *PAPER, *LIGHTNING, *ADM, *RESNET, *elsewhere}
    assert all(model_config(name) == model_config(same) for name, same in sit.items())  # one network, two processes


@pytest.mark.parametrize("name", DIT)
def test_dit_has_the_published_size_and_cost(name: str) -> None:
    parameters, macs = DIT[name]
    total, trainable = counts(name)
    assert as_printed(total / 1e6, parameters) == parameters
    config: Any = model_config(name)
    assert total - trainable == (32 // config.patch_size) ** 2 * config.hidden_size
    assert as_printed(own_gmacs(name), macs) == macs


@pytest.mark.parametrize("name", WAYS)
def test_each_way_of_conditioning_has_the_published_size_and_cost(name: str) -> None:
    """Products alone make 0.013 to 0.019 Gflops less than is printed for each of the four; one operation for each
    number that goes through a norm of the plain block and the last, 57 x 256 x 1152, closes the gap of all of them."""
    parameters, gflops = WAYS[name]
    assert as_printed(counts(name)[1] / 1e6, parameters) == parameters
    assert 0.01 < gflops - own_gmacs(name) < 0.02
    assert as_printed(own_gmacs(name) + 57 * 256 * 1152 / 1e9, "0.00") == as_printed(gflops, "0.00")


@pytest.mark.parametrize("way", ["in_context", "cross_attention"])
def test_two_tokens_carry_time_and_class(way: str) -> None:
    """Time and class go in apart, not as their sum; attention cannot tell their order; no norm is modulated."""
    model, config = build(f"dit {way}")
    given = inputs(config, 2)
    lengths, tokens = set(), []

    def watch(site: str, block: nn.Module, x: Tensor, *args: Any) -> Tensor:
        lengths.add(x.shape[1])
        tokens.append(args[0] if args else x[:, -2:])
        return block(x, *args)

    out = model(*given, edit=watch)
    assert lengths == {16 + 2 if way == "in_context" else 16}
    label = model.prepare(given[2], given[0].shape).static["label"]
    assert_close(tokens[0], torch.stack((model.get_submodule("t_embedder")(given[1]), label), dim=1))
    assert not any("adaLN" in name for name, _ in model.named_parameters())

    def swap(site: str, block: nn.Module, x: Tensor, *args: Any) -> Tensor:
        if args:
            return block(x, args[0].flip(1))
        return block(torch.cat((x[:, :-2], x[:, -2:].flip(1)), dim=1) if site == "blocks.0" else x)

    assert_close(model(*given, edit=swap), out, rtol=1e-4, atol=1e-5)


def test_an_unknown_conditioning_lists_the_near_ones() -> None:
    with pytest.raises(DitkitError, match=r"model.conditioning 'adaln-zero': did you mean .*adaln_zero"):
        DiTConfig(conditioning="adaln-zero")


@pytest.mark.parametrize("name", JIT)
def test_jit_has_exactly_the_published_parameters_and_the_published_cost(name: str) -> None:
    total, trainable, macs = JIT[name]
    assert counts(name) == (total, trainable)
    assert as_printed(own_gmacs(name), macs) == macs


@pytest.mark.parametrize("name", LIGHTNING)
def test_lightningdit_has_the_size_of_the_dit_of_its_name(name: str) -> None:
    parameters, macs = LIGHTNING[name]
    assert as_printed(counts(name)[0] / 1e6, parameters) == parameters
    assert as_printed(own_gmacs(name), macs) == macs


@pytest.mark.parametrize("name", ADM)
def test_adm_has_the_published_size_and_cost(name: str) -> None:
    parameters, gflops = ADM[name]
    assert as_printed(counts(name)[0] / 1e6, parameters) == parameters
    if gflops is not None:
        assert own_gmacs(name) == pytest.approx(gflops, abs=1)


@pytest.mark.parametrize("name", RESNET)
def test_resnet_has_the_size_and_cost_of_its_page(name: str) -> None:
    parameters, macs = RESNET[name]
    assert as_printed(counts(name)[0] / 1e6, parameters) == parameters
    assert as_printed(own_gmacs(name), macs) == macs


def test_lightningdit_has_the_published_keys() -> None:
    with torch.device("meta"):
        keys = set(create_model("lightningdit_xl_1").state_dict())
        normed = set(create_model("lightningdit_xl_1", qk_norm=True).state_dict())
    assert len(keys) == 9 + 4 + 28 * 12  # embeddings, the last layer, blocks
    assert {"pos_embed", "x_embedder.proj.bias", "blocks.27.mlp.w12.weight", "final_layer.norm_final.weight"} <= keys
    assert "final_layer.norm_final.bias" not in keys
    assert normed - keys == {f"blocks.{i}.attn.{n}_norm.weight" for i in range(28) for n in "qk"}


def test_lightningdit_is_jit_without_bottleneck_and_class_tokens() -> None:
    """All else is that of JiT, which is proven equal to its authors': the same numbers with the same weights."""
    jit, config = build("jit without tokens")
    same = LightningDiTConfig(
        input_size=(8, 16), patch_size=4, in_channels=1, hidden_size=16, depth=2, num_heads=2, num_classes=5,
        qk_norm=True,
    ).build()  # fmt: skip
    weights = jit.state_dict()
    first, second = weights.pop("x_embedder.proj1.weight"), weights.pop("x_embedder.proj2.weight")[..., 0, 0]
    weights["x_embedder.proj.weight"] = torch.einsum("de,ecpq->dcpq", second, first)
    weights["x_embedder.proj.bias"] = weights.pop("x_embedder.proj2.bias")
    same.load_state_dict(weights)
    given = inputs(config, 3)
    assert_close(same.eval()(*given), jit(*given), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", PAPER)
def test_jit_g_is_that_of_the_paper(name: str) -> None:
    assert round(counts(name)[0] / 1e9) == 2
    assert own_gmacs(name) == pytest.approx(PAPER[name], abs=1)


def test_cost_grows_with_the_published_resolution() -> None:
    """DiT-XL/2 on 512 px (a latent of 64) takes 524.6 Gflops by the paper, whose counts are rounded more than once."""
    assert gmacs(model_config("dit_xl_2"), (4, 64, 64)) == pytest.approx(524.6, abs=0.1)
    with torch.device("meta"):
        b64: Any = create_model("jit_b_16", patch_size=64, input_size=1024)
    assert int(sum(p.numel() for p in b64.parameters()) / 1e6) == 141


def test_jit_b_has_the_published_keys() -> None:
    with torch.device("meta"):
        keys = set(create_model("jit_b_16").state_dict())
    assert len(keys) == 183
    assert {"pos_embed", "in_context_posemb", "x_embedder.proj1.weight", "blocks.11.attn.q_norm.weight"} <= keys
    assert {"blocks.0.mlp.w12.bias", "blocks.0.adaLN_modulation.1.weight", "final_layer.norm_final.weight"} <= keys
    assert "x_embedder.proj1.bias" not in keys


def test_swiglu_is_two_thirds_as_wide_and_not_rounded() -> None:
    for name, hidden in {"jit_b_16": 2048, "jit_l_16": 2730, "jit_h_16": 3413}.items():
        with torch.device("meta"):
            model: Any = create_model(name)
        assert model.blocks[0].mlp.w3.in_features == hidden
        assert model.blocks[0].mlp.w12.out_features == 2 * hidden


# shapes and gradients


@pytest.mark.parametrize("b", [1, 3])
@pytest.mark.parametrize("tiles", [(1, 1), (2, 3), (5, 1), (4, 4)])
def test_the_output_has_the_shape_of_x(tiny: tuple[Model, Any], tiles: tuple[int, int], b: int) -> None:
    model, config = tiny
    size = (tiles[0] * config.tile, tiles[1] * config.tile)
    out = model(*inputs(config, b, size))
    channels = config.in_channels * (2 if getattr(config, "learn_sigma", False) else 1)
    assert out.shape == (b, channels, *size)
    assert out.dtype == torch.float32
    assert bool(out.isfinite().all())


def test_every_trainable_parameter_gets_a_finite_gradient(tiny: tuple[Model, Any]) -> None:
    model, config = tiny
    x, t, cond = inputs(config, 3)
    model(x, t, cond).square().mean().backward()
    for name, p in model.named_parameters():
        if p.requires_grad:
            assert p.grad is not None, name
            assert bool(p.grad.isfinite().all()), name
            assert bool(p.grad.any()), name
        else:
            assert name == "pos_embed"
            assert p.grad is None


def test_a_sample_does_not_see_its_batch(tiny: tuple[Model, Any]) -> None:
    model, config = tiny
    x, t, cond = inputs(config, 5)
    whole = model(x, t, cond)
    for index in (torch.tensor([3]), torch.tensor([4, 0])):
        assert_close(model(x[index], t[index], cond.rows(index)), whole[index], rtol=1e-5, atol=1e-5)


def test_every_input_matters_everywhere(tiny: tuple[Model, Any]) -> None:
    """Each output pixel sees each input pixel, the time and the label."""
    model, config = tiny
    x, t, cond = inputs(config, 1)
    x.requires_grad_()
    out = model(x, t, cond)
    for pixel in (out[0, 0, 0, 0], out[0, -1, -1, -1]):
        (gradient,) = torch.autograd.grad(pixel, x, retain_graph=True)
        assert bool((gradient != 0).all())
    assert bool((model(x, t + 0.3, cond) != out).all())
    assert bool((model(x, t, Conditioning(label=(cond.label + 1) % 6)) != out).all())


def test_positions_tell_equal_patches_apart(tiny: tuple[Model, Any]) -> None:
    model, config = tiny
    p = config.tile
    x, t, cond = inputs(config, 1, (2 * p, 3 * p))
    x = x[:, :, :p, :p].repeat(1, 1, 2, 3)
    out = model(x, t, cond).unfold(2, p, p).unfold(3, p, p).flatten(2, 3)
    for i in range(6):
        for j in range(i):
            assert not torch.allclose(out[:, :, i], out[:, :, j], atol=1e-4)


def test_jit_needs_its_rotations_and_its_class_tokens() -> None:
    """Without stored positions, patches are still told apart by the rotation alone; the class tokens carry the label
    even when the modulation does not."""
    model, config = build("jit")
    assert isinstance(model, JiT)
    x, t, cond = inputs(config, 1, (8, 8))
    x = x[:, :, :4, :4].repeat(1, 1, 2, 2)
    ready = model.prepare(cond, x.shape)
    flat = ready.with_static(positions=torch.zeros_like(ready.static["positions"]))
    plain = ready.static["rope"].clone()
    plain[:, 0], plain[:, 1] = 1, 0
    turned, unturned = model(x, t, flat), model(x, t, flat.with_static(rope=plain))
    assert not torch.allclose(turned[..., :4, :4], turned[..., 4:, 4:], atol=1e-5)
    assert_close(unturned[..., :4, :4], unturned[..., 4:, 4:], rtol=1e-4, atol=1e-5)
    # relative positions are what the rotation knows: the class tokens are not turned
    assert bool((ready.static["rope"][0, 0, :3] == 1).all())
    assert bool((ready.static["rope"][0, 1, :3] == 0).all())
    with torch.no_grad():
        for block in model.blocks:
            block.adaLN_modulation[1].weight.zero_()  # type: ignore[union-attr]
        model.final_layer.adaLN_modulation[1].weight.zero_()  # type: ignore[operator]
    assert not torch.allclose(model(x, t, cond), model(x, t, Conditioning(label=torch.tensor([1]))), atol=1e-4)


def test_patches_go_out_as_they_came_in() -> None:
    """An embedding that is the identity on a patch, then unpatchify: the image itself."""
    channels, patch, grid = 3, 2, (3, 5)
    x = torch.arange(2 * channels * 6 * 10, dtype=torch.float32).view(2, channels, 6, 10)
    embed = PatchEmbed(channels, patch, patch * patch * channels)
    weight = torch.zeros(patch, patch, channels, channels, patch, patch)
    for i in range(patch):
        for j in range(patch):
            for c in range(channels):
                weight[i, j, c, c, i, j] = 1  # features are ordered row, column, channel
    assert embed.proj.bias is not None
    with torch.no_grad():
        embed.proj.weight.copy_(weight.view(-1, channels, patch, patch))
        embed.proj.bias.zero_()
    assert patch_grid(x, channels, patch) == grid
    assert torch.equal(unpatchify(embed(x), grid, patch), x)


def test_the_bottleneck_is_one_linear_map_of_low_rank() -> None:
    embed = BottleneckPatchEmbed(3, 4, 5, 64)
    x = torch.randn(200, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    out = embed(x)[:, 0] - embed(torch.zeros(1, 3, 4, 4))[:, 0]
    values = torch.linalg.svdvals(out)
    assert int((values > 1e-4 * values[0]).sum()) == 5


def test_positions_are_sines_of_the_column_then_of_the_row() -> None:
    table = sincos_2d(8, (2, 3))[0].double()
    assert table.shape == (6, 8)
    for row in range(2):
        for column in range(3):
            expected = []
            for position in (column, row):
                angles = torch.tensor([position * 1.0, position * 0.01], dtype=torch.float64)
                expected += [*angles.sin().tolist(), *angles.cos().tolist()]
            assert_close(table[row * 3 + column], torch.tensor(expected).double(), rtol=1e-6, atol=1e-6)


def test_rotation_turns_neighbouring_channels_by_row_then_by_column() -> None:
    """Channels 2i and 2i + 1 as a complex number, times exp(i position frequency); half of the pairs each."""
    row, column = torch.tensor([0, 3, 5]), torch.tensor([7, 1, 2])
    table = rope_table(axial_angles((row, column), (4, 4)))
    x = torch.randn(1, 2, 3, 8, generator=torch.Generator().manual_seed(0))
    position = torch.stack((row, row, column, column), dim=1).double()
    angle = position * torch.tensor([1.0, 0.01, 1.0, 0.01], dtype=torch.float64)
    turned = torch.view_as_complex(x.double().view(1, 2, 3, 4, 2)) * torch.polar(torch.ones_like(angle), angle)
    assert_close(rotate(x, table).double(), torch.view_as_real(turned).flatten(3), rtol=1e-5, atol=1e-6)


def test_jit_turns_each_patch_by_its_own_place_and_class_tokens_not_at_all() -> None:
    model, config = build("jit")
    given: list[Tensor] = []

    def watch(site: str, block: nn.Module, x: Tensor, *args: Any) -> Tensor:
        assert args[1].shape == (2, x.shape[1], 8)
        given.append(args[1])
        return block(x, *args)

    model(*inputs(config, 1, (8, 12)), edit=watch)
    patches = rope_table(axial_angles((torch.tensor([0, 0, 0, 1, 1, 1]), torch.tensor([0, 1, 2] * 2)), (4, 4)))
    still = torch.stack((torch.ones(3, 8), torch.zeros(3, 8)))
    for i, table in enumerate(given):
        expected = patches if i < config.in_context_start else torch.cat((still, patches), dim=1)
        assert torch.equal(table, expected)


def test_the_two_kinds_of_mlp_are_their_formulas() -> None:
    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))
    swiglu, mlp = SwiGLU(6, 7), Mlp(6, 7)
    gate, value = (x @ w.T + b for w, b in zip(swiglu.w12.weight.chunk(2), swiglu.w12.bias.chunk(2), strict=True))
    hidden = gate / (1 + (-gate).exp()) * value
    assert_close(swiglu(x), hidden @ swiglu.w3.weight.T + swiglu.w3.bias, rtol=1e-5, atol=1e-6)
    h = 3 * (x @ mlp.fc1.weight.T + mlp.fc1.bias)
    with torch.no_grad():  # far enough from 0 that the exact GELU is another function
        mlp.fc1.weight.mul_(3)
        mlp.fc1.bias.mul_(3)
    hidden = 0.5 * h * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (h + 0.044715 * h**3)))
    assert_close(mlp(x), hidden @ mlp.fc2.weight.T + mlp.fc2.bias, rtol=1e-5, atol=1e-6)


def test_the_norm_works_in_float32_and_casts_back_after_its_weight() -> None:
    generator = torch.Generator().manual_seed(0)
    norm = RMSNorm(64)
    with torch.no_grad():
        norm.weight.copy_(1 + 0.3 * torch.randn(64, generator=generator))
    x = (100 * torch.randn(20, 64, generator=generator)).bfloat16()
    y = x.double() / (x.double().square().mean(1, keepdim=True) + 1e-6).sqrt() * norm.weight.double()
    differing = norm(x) != y.float().bfloat16()
    assert int(differing.sum()) <= 2  # of 1280, where float32 and float64 round to different sides
    tiny = torch.full((1, 64), 1e-4)  # where eps is most of the mean square
    assert_close(norm(tiny), tiny / (1e-8 + 1e-6) ** 0.5 * norm.weight, rtol=1e-5, atol=0)


# seeds, memory and files


@pytest.mark.parametrize("name", ALL)
def test_the_same_seed_builds_the_same_model_and_leaves_the_global_generator_alone(name: str) -> None:
    torch.manual_seed(123)
    before = torch.get_rng_state()
    one = ALL[name].build(seed=7).state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(5)
    same, other = ALL[name].build(seed=7).state_dict(), ALL[name].build(seed=8).state_dict()
    assert one.keys() == same.keys() == other.keys()
    assert all(torch.equal(one[k], same[k]) for k in one)
    drawn = [k for k in one if k != "pos_embed" and one[k].unique().numel() > 1]
    assert all(not torch.equal(one[k], other[k]) for k in drawn)
    # one parameter's numbers are not another's
    firsts = [float(one[k].flatten()[0]) for k in drawn]
    assert len(set(firsts)) == len(firsts)
    assert len(drawn) > 8


@pytest.mark.parametrize("name", ALL)
def test_no_weight_is_memory_that_nobody_wrote(name: str) -> None:
    """Fill what `empty` gives with NaN; then with another number: the weights do not change."""
    real, filled = nn.Module.to_empty, []

    def build_over(value: float) -> dict[str, Tensor]:
        def to_empty(self: nn.Module, **kwargs: Any) -> nn.Module:
            real(self, **kwargs)
            with torch.no_grad():
                for p in (*self.parameters(), *self.buffers()):
                    p.fill_(value)
                    filled.append(p)
            return self

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(nn.Module, "to_empty", to_empty)
            return ALL[name].build(seed=1).state_dict()

    one, two = build_over(float("nan")), build_over(3.0)
    assert filled
    for key in one:
        assert bool(one[key].isfinite().all()), key
        assert torch.equal(one[key], two[key]), key


@pytest.mark.parametrize("name", TINY)
def test_initial_weights_are_those_of_the_papers(name: str) -> None:
    config = dataclasses.replace(TINY[name], hidden_size=48)
    model = config.build(seed=3)
    for key, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d) and "adaLN" not in key and "t_embedder" not in key:
            if key == "final_layer.linear":
                assert not module.weight.any()
            else:
                rows = module.weight.detach().flatten(1)
                bound = (6 / sum(rows.shape)) ** 0.5
                assert 0.9 * bound < float(rows.abs().max()) <= bound, key
                assert float(rows.std()) == pytest.approx(bound / 3**0.5, rel=0.15), key
        if "adaLN_modulation" in key and isinstance(module, nn.Linear):
            gated = getattr(config, "conditioning", "adaln_zero") == "adaln_zero" or key.startswith("final")
            assert bool(module.weight.any()) != gated
        if "t_embedder" in key and isinstance(module, nn.Linear):
            assert float(module.weight.detach().std()) == pytest.approx(0.02, rel=0.1)
        if isinstance(module, nn.Linear | nn.Conv2d) and module.bias is not None:
            assert not module.bias.any()
    parameters = dict(model.named_parameters())
    assert float(parameters["y_embedder.embedding_table.weight"].detach().std()) == pytest.approx(0.02, rel=0.15)
    assert torch.equal(parameters["pos_embed"], sincos_2d(48, model.config.grid))
    norms = [(key, p) for key, p in parameters.items() if "norm" in key]
    assert all(bool((p == key.endswith("weight")).all()) for key, p in norms)
    # a new network says nothing yet
    assert not model(*inputs(config)).any()


def test_a_state_dict_survives_safetensors_bit_for_bit(tiny: tuple[Model, Any], tmp_path: Path) -> None:
    model, config = tiny
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    other = config.build(seed=99).eval()
    given = inputs(config)
    assert not torch.equal(other(*given), model(*given))
    other.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=True)
    assert torch.equal(other(*given), model(*given))
    for name, p in other.named_parameters():
        assert torch.equal(p, model.get_parameter(name))
        assert p.requires_grad == model.get_parameter(name).requires_grad


def test_configurations_and_models_can_be_copied(tiny: tuple[Model, Any]) -> None:
    model, config = tiny
    assert copy.deepcopy(config) == config == pickle.loads(pickle.dumps(config))
    assert model.config == config
    other = copy.deepcopy(model)
    given = inputs(config)
    assert torch.equal(other(*given), model(*given))
    with torch.no_grad():
        next(other.parameters()).add_(1)
    assert not torch.equal(next(other.parameters()), next(model.parameters()))


def test_on_meta_a_model_takes_no_memory_and_can_be_given_some() -> None:
    with torch.device("meta"):
        model = create_model("dit_xl_2")
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert torch.get_default_device().type == "cpu"
    config = TINY["jit"]
    with torch.device("meta"):
        empty = config.build()
    empty.load_state_dict(build("jit")[0].state_dict(), assign=True)
    assert torch.equal(empty.eval()(*inputs(config)), build("jit")[0](*inputs(config)))


# prepare and edit


@pytest.mark.parametrize("size", [None, (2, 3)])
def test_prepared_work_changes_nothing(tiny: tuple[Model, Any], size: tuple[int, int] | None) -> None:
    model, config = tiny
    pixels = None if size is None else (size[0] * config.tile, size[1] * config.tile)
    x, t, cond = inputs(config, 3, pixels)
    ready = model.prepare(cond, x.shape, (1.0, 0.5))
    assert ready.static
    assert torch.equal(model(x, t, ready), model(x, t, cond))
    # the same prepared batch serves every step, and its rows
    assert torch.equal(model(x, t / 2, ready), model(x, t / 2, cond))
    index = torch.tensor([2, 0])
    assert_close(model(x[index], t[index], ready.rows(index)), model(x, t, cond)[index], rtol=1e-5, atol=1e-5)


def test_gradients_also_flow_through_prepared_work(tiny: tuple[Model, Any]) -> None:
    model, config = tiny
    x, t, cond = inputs(config)
    model(x, t, model.prepare(cond, x.shape)).square().mean().backward()
    prepared = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    model(x, t, cond).square().mean().backward()
    for name, gradient in prepared.items():
        assert gradient is not None, name
        assert_close(gradient, model.get_parameter(name).grad, rtol=1e-5, atol=1e-7)


def test_a_trajectory_equals_single_calls(tiny: tuple[Model, Any]) -> None:
    """In float64: a batch of four is not rounded as one of two is, and random weights amplify the last bit."""
    model, config = tiny
    model = model.double()
    x, _, cond = inputs(config, 2)
    x = x.double()
    denoiser = Meaning(Linear(), "x0", "1-t", 0.05).of(model)
    denoise = denoiser.start(cond, x.shape, (1.0, 0.5, 0.0))
    null = Conditioning(label=torch.full((2,), config.num_classes))
    guided = guide(denoiser, CFG(2.0, null)).start(cond, x.shape, (1.0, 0.5, 0.0))
    for t in (1.0, 0.5):
        strong, weak = denoiser(x, t, cond).out, denoiser(x, t, null).out
        assert torch.equal(denoise(x, t).out, strong)
        assert_close(guided(x, t).out, weak + 2 * (strong - weak), rtol=1e-6, atol=1e-6)


def test_the_identity_edit_is_bit_equal(tiny: tuple[Model, Any]) -> None:
    model, config = tiny
    given = inputs(config)
    assert torch.equal(model(*given, edit=lambda site, block, x, *args: block(x, *args)), model(*given))


def test_sites_are_the_blocks_names_in_order(transformer: tuple[Model, Any]) -> None:
    model, config = transformer
    visited: list[tuple[str, nn.Module]] = []

    def watch(site: str, block: nn.Module, x: Tensor, *args: Any) -> Tensor:
        visited.append((site, block))
        return block(x, *args)

    model(*inputs(config), edit=watch)
    assert [site for site, _ in visited] == [f"blocks.{i}" for i in range(config.depth)]
    assert all(model.get_submodule(site) is block for site, block in visited)
    in_file = {key.rsplit(".", 1)[0] for key in model.state_dict()}
    assert all(any(key.startswith(f"{site}.") for key in in_file) for site, _ in visited)
    assert {site.split(".")[0] for site, _ in visited} == set(model.plan.shard)


def test_an_edit_can_skip_a_block(transformer: tuple[Model, Any]) -> None:
    model, config = transformer
    given = inputs(config)
    out = model(*given, edit=lambda site, block, x, *args: x if site == "blocks.1" else block(x, *args))
    without = copy.deepcopy(model)
    with torch.no_grad():  # a block whose branches give 0 is skipped
        for name, p in without.get_submodule("blocks.1").named_parameters():
            if name.split(".")[-2] in ("proj", "fc2", "w3"):
                p.zero_()
    assert torch.equal(out, without(*given))
    assert not torch.equal(out, model(*given))


def test_an_edit_can_read_and_change_features(transformer: tuple[Model, Any]) -> None:
    model, config = transformer
    given, taps = inputs(config), {}

    def tap(site: str, block: nn.Module, x: Tensor, *args: Any) -> Tensor:
        taps[site] = block(x, *args)
        return taps[site]

    out = model(*given, edit=tap)
    assert torch.equal(out, model(*given))
    x = given[0]
    patches = x.shape[2] * x.shape[3] // config.patch_size**2
    for i in range(config.depth):
        joined = getattr(config, "in_context_len", 0) if i >= getattr(config, "in_context_start", 0) else 0
        joined += 2 if getattr(config, "conditioning", "") == "in_context" else 0
        assert taps[f"blocks.{i}"].shape == (2, patches + joined, config.hidden_size)
    # put back what the first block gave: the rest of the network follows from it
    last = f"blocks.{config.depth - 1}"
    replay = model(*given, edit=lambda site, block, x, *args: taps[site] if site == last else x)
    assert torch.equal(replay, out)
    taps[last].sum().backward()
    doubled = model(*given, edit=lambda site, block, x, *args: 2 * block(x, *args))
    assert not torch.allclose(doubled, out)


def test_attention_can_be_the_identity_in_some_rows(
    transformer: tuple[Model, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if every token of these rows were masked from all but itself; the other rows do not change by a bit."""
    model, config = transformer
    given, rows = inputs(config, 3), torch.tensor([True, False, True])

    def identity(site: str, block: nn.Module, x: Tensor, *args: Any) -> Tensor:
        return block(x, *args, identity=rows) if site == "blocks.1" else block(x, *args)

    def diagonal(site: str, block: nn.Module, x: Tensor, *args: Any) -> Tensor:
        def attend(q: Tensor, k: Tensor, v: Tensor, mask: Any = None, dropout: float = 0.0) -> Tensor:
            if q.shape[2] != k.shape[2]:  # attention to given tokens, not to itself
                return torch.nn.functional.scaled_dot_product_attention(q, k, v)
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, torch.eye(q.shape[2], dtype=torch.bool))

        with monkeypatch.context() as patch:
            if site == "blocks.1":
                patch.setattr("ditkit.layers.attention.attend", attend)
            return block(x, *args)

    out, plain, masked = (model(*given, edit=edit) for edit in (identity, None, diagonal))
    assert_close(out[rows], masked[rows], rtol=1e-5, atol=1e-5)
    assert torch.equal(out[~rows], plain[~rows])
    assert not torch.allclose(out[rows], plain[rows], rtol=1e-2)


# options


@pytest.mark.parametrize("name", TINY)
def test_without_classes_nothing_is_given(name: str) -> None:
    model, config = build(name, num_classes=0)
    x, t, cond = inputs(config)
    assert cond == Conditioning()
    out = model(x, t, cond)
    assert torch.equal(model(x, t, model.prepare(cond, x.shape)), out)
    out.square().mean().backward()
    table = model.get_parameter("y_embedder.embedding_table.weight")
    assert table.shape[0] == 1
    assert table.grad is not None
    assert bool(table.grad.any())
    with pytest.raises(ValueError, match="num_classes=0 and a label was given"):
        model(x, t, Conditioning(label=torch.zeros(2, dtype=torch.long)))


def test_labels_must_be_given_where_there_are_classes(tiny: tuple[Model, Any]) -> None:
    model, config = tiny
    x, t, _ = inputs(config)
    with pytest.raises(ValueError, match="num_classes=5 and no label was given"):
        model(x, t, Conditioning())
    with pytest.raises(ValueError, match="num_classes=5 and no label was given"):
        model.prepare(Conditioning(), x.shape)


@pytest.mark.parametrize("size", [None, (2, 3)])
def test_a_pure_bf16_model_runs_at_any_size(tiny: tuple[Model, Any], size: tuple[int, int] | None) -> None:
    model, config = tiny
    pixels = None if size is None else (size[0] * config.tile, size[1] * config.tile)
    x, t, cond = inputs(config, 2, pixels)
    exact = model(x, t, cond)
    low = copy.deepcopy(model).bfloat16()
    out = low(x.bfloat16(), t, cond)
    assert out.dtype == torch.bfloat16
    assert float((out.float() - exact).detach().norm() / exact.detach().norm()) < 0.1
    ready = low.prepare(cond, x.shape)
    assert torch.equal(low(x.bfloat16(), t, ready), out)


@pytest.mark.parametrize("size", [None, (2, 3)])
def test_autocast_runs_forward_and_backward(tiny: tuple[Model, Any], size: tuple[int, int] | None) -> None:
    model, config = tiny
    pixels = None if size is None else (size[0] * config.tile, size[1] * config.tile)
    x, t, cond = inputs(config, 2, pixels)
    exact = model(x, t, cond)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(x, t, cond)
    assert float((out.float() - exact).detach().norm() / exact.detach().norm()) < 0.1
    out.float().square().mean().backward()
    for name, p in model.named_parameters():
        if p.requires_grad:
            assert p.grad is not None, name
            assert p.grad.dtype == torch.float32
            assert bool(p.grad.isfinite().all()), name


@pytest.mark.parametrize(("depth", "dropped"), [(4, [1, 2]), (12, [3, 4, 5, 6, 7, 8]), (6, [1, 2]), (3, [])])
def test_jit_drops_only_in_the_middle_half(depth: int, dropped: list[int]) -> None:
    model, config = build("jit", depth=depth, proj_drop=0.3, attn_drop=0.2)
    assert isinstance(model, JiT)
    model.train()
    for i, block in enumerate(model.blocks):
        rates = {m.p for m in block.modules() if isinstance(m, nn.Dropout)}
        attention = block.get_submodule("attn")
        assert isinstance(attention, Attention)
        assert rates == ({0.3} if i in dropped else {0.0})
        assert attention.attn_drop == (0.2 if i in dropped else 0.0)
    given = inputs(config)
    outs = [model(*given) for _ in range(2)]
    assert torch.equal(outs[0], outs[1]) == (not dropped)
    model.eval()
    assert torch.equal(model(*given), model(*given))
    # block by block: which ones are random in training
    model.train()
    random = []

    def twice(site: str, block: nn.Module, x: Tensor, *args: Any) -> Tensor:
        a, b = block(x, *args), block(x, *args)
        if not torch.equal(a, b):
            random.append(int(site.split(".")[1]))
        return a

    model(*given, edit=twice)
    assert random == dropped


def test_attention_weights_alone_can_be_dropped() -> None:
    model, config = build("jit", attn_drop=0.5)
    given = inputs(config)
    model.train()
    assert not torch.equal(model(*given), model(*given))
    model.eval()
    assert torch.equal(model(*given), model(*given))


@pytest.mark.parametrize(("ratio", "hidden"), [(4.0, 64), (2.0, 32), (3.3, 52), (3.1, 49)])
def test_odd_hidden_sizes_work(ratio: float, hidden: int) -> None:
    model, config = build("jit", mlp_ratio=ratio)
    assert model.get_submodule("blocks.0.mlp.w3").in_features == hidden
    assert bool(model(*inputs(config)).isfinite().all())


# errors


def test_errors_say_which_option_to_change(tiny: tuple[Model, Any]) -> None:
    model, config = tiny
    x, t, cond = inputs(config)
    with pytest.raises(ValueError, match=f"in_channels={config.in_channels}.*change in_channels"):
        model(torch.cat((x, x), dim=1), t, cond)
    with pytest.raises(ValueError, match="change in_channels"):
        model(x[0], t, cond)
    if config.tile == 1:  # which tile everything
        return
    for wrong in (x[..., :-1], x[..., :-1, :], x[..., : config.tile - 1]):
        with pytest.raises(ValueError, match=r"do not tile: change (patch_size|channel_mult) or the size of x"):
            model(wrong, t, cond)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"num_heads": 5}, "hidden_size 24 is not divisible by num_heads 5"),
        ({"hidden_size": 30, "num_heads": 3}, "hidden_size 30 .* divisible by 4"),
        ({"num_heads": 0}, "model.num_heads must be at least 1, not 0"),
        ({"patch_size": 0}, "model.patch_size must be at least 1, not 0"),
        ({"depth": -1}, "model.depth must be at least 1, not -1"),
    ],
)
@pytest.mark.parametrize("name", ["dit", "jit"])
def test_sizes_that_cannot_be_built_are_refused(name: str, change: dict[str, Any], says: str) -> None:
    with pytest.raises(DitkitError, match=says):
        dataclasses.replace(TINY[name], **change).build()


def test_heads_that_cannot_be_rotated_are_refused() -> None:
    with pytest.raises(DitkitError, match=r"heads of 6 channels.*divisible by 4"):
        dataclasses.replace(TINY["jit"], num_heads=4).build()


@pytest.mark.parametrize("start", [4, 5, -1])
def test_class_tokens_that_would_never_join_are_refused(start: int) -> None:
    with pytest.raises(DitkitError, match=f"in_context_start {start} .*depth 4"):
        dataclasses.replace(TINY["jit"], in_context_start=start).build()


def test_unknown_names_and_options_list_the_near_ones() -> None:
    with pytest.raises(DitkitError, match=r"'jit_b_61'.*jit_b_16"):
        create_model("jit_b_61")
    with pytest.raises(DitkitError, match="'DiT-XL/2'"):
        create_model("DiT-XL/2")
    with pytest.raises(DitkitError, match="dit_s_2 has no option 'num_clases': did you mean num_classes"):
        create_model("dit_s_2", num_clases=3)


def test_named_models_take_options_and_globs() -> None:
    with torch.device("meta"):
        model = create_model("dit_s_2", num_classes=3, depth=1)
    assert isinstance(model, DiT)
    assert model.config == dataclasses.replace(model_config("dit_s_2"), num_classes=3, depth=1)  # type: ignore[type-var]
    assert list_models("jit_*_16") == ["jit_b_16", "jit_g_16", "jit_h_16", "jit_l_16"]
    assert list_models("zzz") == []
    assert isinstance(model_config("dit_s_2"), ModelConfig)


@pytest.mark.parametrize("name", list_models("[dj]i*"))  # SiT's are DiT's
def test_every_named_model_runs_on_its_own_input(name: str) -> None:
    with torch.device("meta"):
        model = create_model(name, depth=11)  # JiT-H's and -G's class tokens join before block 10
        config = model.config
        x = torch.empty(2, config.in_channels, config.input_size, config.input_size)
        out = model(x, torch.empty(2), Conditioning(label=torch.zeros(2, dtype=torch.long)))
    assert out.shape[2:] == x.shape[2:]
    assert model.get_parameter("pos_embed").shape[1] == (config.input_size // config.patch_size) ** 2


# compiled


@pytest.mark.slow
@pytest.mark.parametrize("name", ALL)
def test_a_compiled_block_equals_the_plain_one(name: str) -> None:
    model, config = build(name)
    given = inputs(config)
    plain = model(*given)
    for lists in model.plan.shard:
        blocks: Any = model.get_submodule(lists)
        for block in blocks:
            block.compile()
    assert_close(model(*given), plain, rtol=1e-5, atol=1e-5)
    # names of weights stay as they are
    assert set(model.state_dict()) == set(config.build().state_dict())


def test_the_final_layer_modulates_with_shift_then_scale() -> None:
    layer = FinalLayer(2, 2, nn.Identity())
    silu: Callable[[Tensor], Tensor] = nn.functional.silu
    c = torch.tensor([[1.0, 2.0]])
    with torch.no_grad():
        linear: Any = layer.get_submodule("adaLN_modulation.1")
        linear.weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, 0.0], [0.0, 3.0]]))
        linear.bias.zero_()
        layer.linear.weight.copy_(torch.eye(2))
        layer.linear.bias.zero_()
    s = silu(c)[0]
    x = torch.tensor([[[5.0, 7.0]]])
    expected = torch.stack((5 * (1 + 2 * s[0]) + s[0], 7 * (1 + 3 * s[1]) + s[1]))
    assert_close(layer(x, c)[0, 0], expected)
