"""ADM's U-Net: its parts by hand, the one door into its halves, its files, and what it costs."""

from __future__ import annotations

import ast
import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.testing import assert_close

from ditkit.conditioning import Conditioning
from ditkit.config import DitkitError
from ditkit.diffusion import DDPM, Linear, Meaning, PerturbedAttention, SkipLayer, guide
from ditkit.interop import ADM, FORMATS, read, transfer, unet_config
from ditkit.layers import AttentionBlock, GroupNorm, ResBlock
from ditkit.models import UNetConfig, create_model, model_config
from ditkit.plan import cost, gmacs

from .conftest import Command, randomised
from .test_models import CONVOLUTIONAL, build, inputs
from .test_plan import real

# groups as published, the rest small
SMALL = UNetConfig(
    input_size=8, model_channels=32, channel_mult=(1, 2), num_res_blocks=1, attention_resolutions=(2,),
    num_head_channels=16, num_classes=3, null_label=False,
)  # fmt: skip
SIZES = {
    "residual resampling": SMALL,
    "convolutions": replace(SMALL, resblock_updown=False, channel_mult=(1, 1, 2), attention_resolutions=(1, 4)),
    "no weights": replace(SMALL, resblock_updown=False, conv_resample=False, num_res_blocks=2),
    "one level": replace(SMALL, channel_mult=(1,), attention_resolutions=(), num_res_blocks=3, resblock_updown=False),
    "added, unconditional": replace(SMALL, use_scale_shift_norm=False, num_classes=0, learn_sigma=False),
    "half a width": replace(SMALL, model_channels=64, channel_mult=(0.5, 1, 1.5), input_size=32),
}
HEADS = {"num_head_channels": 16}


# the parts


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def filled(module: Any, seed: int = 0) -> Any:
    """Weights none of which is 0."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in module.parameters():
            weight.copy_(0.3 * torch.randn(weight.shape, generator=generator))
    return module


def test_the_norm_is_that_of_groups_in_float32() -> None:
    norm = filled(GroupNorm(2, 4))
    x = 3 + numbers(2, 4, 5, 5)
    groups = x.double().view(2, 2, -1)
    mean, var = groups.mean(-1, keepdim=True), groups.var(-1, correction=0, keepdim=True)
    expected = ((groups - mean) / (var + 1e-5).sqrt()).view(2, 4, 5, 5)
    expected = expected * norm.weight.double()[:, None, None] + norm.bias.double()[:, None, None]
    assert_close(norm(x).double(), expected, rtol=1e-5, atol=1e-5)
    low = copy.deepcopy(norm).bfloat16()
    large = (1000 + x).bfloat16()  # a mean that bfloat16 would lose
    exact = F.group_norm(large.float(), 2, low.weight.float(), low.bias.float())
    assert torch.equal(low(large), exact.bfloat16())


@pytest.mark.parametrize("resample", [None, "up", "down"])
@pytest.mark.parametrize("modulated", [True, False])
def test_a_residual_block_is_its_formula(modulated: bool, resample: str | None) -> None:
    block = filled(ResBlock(4, 6, 5, modulated=modulated, resample=resample, groups=2))
    x, emb = numbers(2, 4, 6, 8), numbers(2, 5, seed=1)

    def change(h: Tensor) -> Tensor:
        if resample == "up":
            return h.repeat_interleave(2, 2).repeat_interleave(2, 3)
        if resample == "down":
            return (h[..., ::2, ::2] + h[..., 1::2, ::2] + h[..., ::2, 1::2] + h[..., 1::2, 1::2]) / 4
        return h

    def conv(h: Tensor, layer: nn.Conv2d) -> Tensor:
        return F.conv2d(h, layer.weight, layer.bias, padding=layer.padding)  # type: ignore[arg-type]

    given = F.linear(F.silu(emb), *block.emb_layers[1].parameters())[..., None, None]
    h = conv(change(F.silu(block.in_layers[0](x))), block.in_layers[2])
    if modulated:
        h = block.out_layers[0](h) * (1 + given[:, :6]) + given[:, 6:]
    else:
        h = block.out_layers[0](h + given)
    expected = conv(change(x), block.skip_connection) + conv(F.silu(h), block.out_layers[3])
    assert_close(block(x, emb), expected, rtol=1e-5, atol=1e-5)
    assert not block.keeps_shape
    same = ResBlock(4, 4, 5, groups=2)
    assert same.keeps_shape
    assert isinstance(same.skip_connection, nn.Identity)


@pytest.mark.parametrize("split_first", [True, False])
def test_attention_divides_its_channels_in_either_order(split_first: bool) -> None:
    block = filled(AttentionBlock(8, 2, split_first=split_first, groups=2))
    x = numbers(1, 8, 3, 2)
    rows = F.conv1d(block.norm(x).flatten(2), block.qkv.weight, block.qkv.bias)[0]  # [24, 6]
    heads = []
    for head in range(2):
        start = [part * 8 + head * 4 if split_first else head * 12 + part * 4 for part in range(3)]
        q, k, v = (rows[s : s + 4] for s in start)
        heads.append(v @ torch.softmax(q.T @ k / 2, dim=-1).T)
    expected = x + F.conv1d(torch.cat(heads)[None], block.proj_out.weight, block.proj_out.bias).view_as(x)
    assert_close(block(x), expected, rtol=1e-5, atol=1e-5)


def test_a_fresh_network_says_nothing_and_each_block_starts_as_its_skip() -> None:
    model = SMALL.build(seed=1)
    given = inputs(SMALL, 3)
    given = (*given[:2], Conditioning(label=torch.tensor([0, 1, 2])))
    assert not model(*given).any()

    def skip_only(site: str, block: nn.Module, x: Tensor, *args: Any) -> Tensor:
        out = block(x, *args)
        if isinstance(block, ResBlock | AttentionBlock):
            assert torch.equal(out, x)
        return out

    model(*given, edit=skip_only)
    bounds = {name: p for name, p in model.named_parameters() if name.endswith("in_layers.2.weight")}
    for weight in bounds.values():  # torch's own law
        bound = weight[0].numel() ** -0.5
        assert 0.98 * bound < float(weight.detach().abs().max()) <= bound
    assert float(model.get_parameter("label_emb.weight").detach().std()) == pytest.approx(1, rel=0.1)


# the one door


def test_sites_are_the_stages_names_in_order_and_halves_are_joined_before_the_edit() -> None:
    model, config = build("unet of the older parts")
    seen: dict[str, list[Tensor]] = {}

    def watch(site: str, block: nn.Module, x: Tensor, *args: Any) -> Tensor:
        assert model.get_submodule(site) is block
        seen[site] = [x, block(x, *args)]
        return seen[site][1]

    given = inputs(config)
    assert torch.equal(model(*given, edit=watch), model(*given))
    first = [f"input_blocks.{i}" for i in range(9)]
    second = [f"output_blocks.{i}" for i in range(9)]
    assert list(seen) == first + [f"middle_block.{i}" for i in range(3)] + second
    for down, up, before in zip(reversed(first), second, ["middle_block.2", *second], strict=False):
        assert torch.equal(seen[up][0], torch.cat((seen[before][1], seen[down][1]), dim=1))
    assert {site.split(".")[0] for site in seen} == set(model.plan.shard)
    assert {key.split(".")[0] for key in model.state_dict()} == {*model.plan.shard, "time_embed", "label_emb", "out"}


@pytest.mark.parametrize("site", ["input_blocks.3", "middle_block.1", "output_blocks.0"])
def test_attention_can_be_the_identity_in_some_rows(site: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, config = build("unet")
    given, rows = inputs(config, 3), torch.tensor([True, False, True])

    def identity(name: str, block: nn.Module, x: Tensor, *args: Any) -> Tensor:
        return block(x, *args, identity=rows) if name == site else block(x, *args)

    def diagonal(name: str, block: nn.Module, x: Tensor, *args: Any) -> Tensor:
        with monkeypatch.context() as patch:
            if name == site:
                patch.setattr("ditkit.layers.convolution.attend", lambda q, k, v: v)
            return block(x, *args)

    out, plain, masked = (model(*given, edit=edit) for edit in (identity, None, diagonal))
    assert_close(out[rows], masked[rows], rtol=1e-5, atol=1e-5)
    assert torch.equal(out[~rows], plain[~rows])
    assert not torch.allclose(out[rows], plain[rows], rtol=1e-2)


def test_guides_perturb_what_can_be_perturbed() -> None:
    model, config = build("unet", learn_sigma=False)
    x, _, cond = inputs(config, 2)
    denoiser = Meaning(DDPM(), "eps", "index").of(model)
    plain = denoiser.start(cond, x.shape, (0.5,))(x, 0.5).out
    for weaker in (
        PerturbedAttention(2.0, blocks=("middle_block.1", "input_blocks.3")),
        SkipLayer(2.0, blocks=("middle_block.0", "middle_block.1")),
    ):
        guided = guide(denoiser, weaker)
        guided.check((0.5,), ())
        assert not torch.allclose(guided.start(cond, x.shape, (0.5,))(x, 0.5).out, plain, rtol=1e-3)
    for wrong, says in (
        (PerturbedAttention(2.0, blocks=("input_blocks.1",)), r"'input_blocks.1' cannot be the identity"),
        (SkipLayer(2.0, blocks=("output_blocks.1",)), r"'output_blocks.1' changes the shape of x"),
        (SkipLayer(2.0, blocks=("input_blocks.2",)), r"'input_blocks.2' changes the shape of x"),
        (SkipLayer(2.0, blocks=("input_blocks.0",)), r"'input_blocks.0' changes the shape of x"),
        (SkipLayer(2.0, blocks=("input_blocks.9",)), r"no block 'input_blocks.9': did you mean input_blocks"),
    ):
        with pytest.raises(DitkitError, match=says):
            guide(denoiser, wrong).check((0.5,), ())


# options


def test_without_classes_there_is_no_table() -> None:
    model, config = build("unet", num_classes=0)
    x, t, cond = inputs(config)
    assert not any(name.startswith("label_emb") for name in model.state_dict())
    assert torch.equal(model(x, t, model.prepare(cond, x.shape)), model(x, t, cond))
    with pytest.raises(ValueError, match="num_classes=0 and a label was given"):
        model(x, t, Conditioning(label=torch.zeros(2, dtype=torch.long)))


def test_a_null_label_is_there_if_asked_for_and_missed_with_a_clear_error() -> None:
    with_null, without = SMALL.build(), replace(SMALL, null_label=True).build()
    assert with_null.get_parameter("label_emb.weight").shape[0] + 1 == len(without.get_parameter("label_emb.weight"))
    x, t = torch.zeros(1, 3, 8, 8), torch.zeros(1)
    null = Conditioning(label=torch.tensor([3]))
    assert without(x, t, null).shape == (1, 6, 8, 8)
    with pytest.raises(DitkitError, match=r"labels 0\.\.2 and no null label: guide it without one, or train it with"):
        with_null(x, t, null)


def test_dropout_is_there_in_training_alone() -> None:
    model, config = build("unet", dropout=0.3)
    given = inputs(config)
    assert torch.equal(model(*given), model(*given))
    model.train()
    assert not torch.equal(model(*given), model(*given))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"num_head_channels": 24}, "64 channels are not divisible by num_head_channels 24"),
        ({"num_head_channels": 0, "num_heads": 5}, "64 channels are not divisible by 5 heads"),
        ({"num_head_channels": 0, "num_heads": 0}, "num_heads or model.num_head_channels must be at least 1"),
        ({"model_channels": 34}, "34 channels are not divisible by the 32 groups"),
        ({"model_channels": 33}, "must be even"),
        ({"attention_resolutions": (2, 16)}, r"one of \[1, 2\] with the 2 levels of channel_mult, not 16"),
        ({"channel_mult": ()}, "one positive factor for each level"),
        ({"channel_mult": (1, 0)}, "one positive factor for each level"),
        ({"num_res_blocks": 0}, "model.num_res_blocks must be at least 1"),
    ],
)
def test_sizes_that_cannot_be_built_are_refused(change: dict[str, Any], says: str) -> None:
    with pytest.raises(DitkitError, match=says):
        replace(SMALL, **change).build()


def test_images_that_levels_do_not_divide_are_refused_with_the_option() -> None:
    config = replace(SMALL, channel_mult=(1, 1, 1, 1))
    assert config.fitted((1, 24, 16), 7, 0).shape == (1, 24, 16)
    with pytest.raises(DitkitError, match=r"28 x 28 are not tiled by 8 x 8 pixels, .* 4 levels: .*model\.channel-mult"):
        config.fitted((1, 28, 28), 10, 0)
    with pytest.raises(DitkitError, match=r"33 x 33 are not tiled by .*--model\.channel-mult"):
        cost(model_config("unet_tiny"), resolution=33)


def test_the_settings_of_the_release_are_understood_by_name() -> None:
    settings = {
        "image_size": 16, "in_channels": 3, "model_channels": 32, "out_channels": 3, "num_res_blocks": 2,
        "attention_resolutions": [2, 4], "channel_mult": [1, 2, 3], "num_classes": None, "num_heads": 2,
        "num_head_channels": -1, "num_heads_upsample": 4, "dropout": 0.1, "conv_resample": False, "use_fp16": True,
    }  # fmt: skip
    assert unet_config(settings) == UNetConfig(
        input_size=16, model_channels=32, channel_mult=(1, 2, 3), num_res_blocks=2, attention_resolutions=(2, 4),
        num_heads=2, num_head_channels=0, num_heads_upsample=4, use_scale_shift_norm=False, resblock_updown=False,
        conv_resample=False, dropout=0.1, num_classes=0, null_label=False, learn_sigma=False,
    )  # fmt: skip
    heads = {block.heads for block in unet_config(settings).build().modules() if isinstance(block, AttentionBlock)}
    assert heads == {2, 4}
    with pytest.raises(DitkitError, match="no setting 'num_head': did you mean"):
        unet_config({**settings, "num_head": 3})
    with pytest.raises(DitkitError, match="9 channels come out of 3"):
        unet_config({**settings, "out_channels": 9})


README = "--attention_resolutions 32,16,8 --diffusion_steps 1000 --learn_sigma True --resblock_updown True "
README += "--use_fp16 True --use_scale_shift_norm True "
FLAGS = {
    "adm_64": "--class_cond True --dropout 0.1 --image_size 64 --num_channels 192 --num_head_channels 64 "
    "--num_res_blocks 3 --use_new_attention_order True --noise_schedule cosine",
    "adm_128": "--class_cond True --image_size 128 --num_channels 256 --num_heads 4 --num_res_blocks 2",
    "adm_256": "--class_cond True --image_size 256 --num_channels 256 --num_head_channels 64 --num_res_blocks 2",
    "adm_512": "--class_cond True --image_size 512 --num_channels 256 --num_head_channels 64 --num_res_blocks 2",
}
FLAGS["adm_256_uncond"] = FLAGS["adm_256"].replace("class_cond True", "class_cond False")


@pytest.mark.parametrize("name", FLAGS)
def test_named_sizes_are_the_flags_of_the_readme(name: str) -> None:
    words = (README + FLAGS[name]).split()
    flags = {key[2:]: value for key, value in zip(words[::2], words[1::2], strict=True)}
    values = {
        key: value if "," in value else ast.literal_eval(value) for key, value in flags.items() if "sch" not in key
    }
    values.pop("diffusion_steps")
    sizes, wanted = unet_config(values), model_config(name)
    assert isinstance(wanted, UNetConfig)
    # of two ways to say how many heads there are, the other is not read
    assert replace(sizes, num_heads=wanted.num_heads) == wanted
    assert sizes.num_head_channels or sizes.num_heads == wanted.num_heads


# files


@pytest.mark.parametrize("name", SIZES)
def test_a_file_says_all_but_the_heads_and_comes_back_bit_for_bit(name: str, tmp_path: Path) -> None:
    config = SIZES[name]
    weights = randomised(config).state_dict()
    torch.save(weights, tmp_path / "model.pt")
    found = read(tmp_path / "model.pt", FORMATS, options=HEADS)
    assert found.format is ADM
    # 8 x 8 pixels in the last level, as all published models have, where nothing says more
    assert replace(found.config, input_size=config.input_size, num_heads=config.num_heads) == config
    assert found.config.input_size == 8 * config.tile
    assert set(found.weights) == set(weights)
    assert all(torch.equal(found.weights[key], value) for key, value in weights.items())
    written = ADM.write(randomised(config), found.weights)
    assert all(torch.equal(written[key], value) for key, value in weights.items())


@pytest.mark.parametrize("name", ["adm_64", "adm_128", "adm_256", "adm_256_uncond", "adm_512"])
def test_published_sizes_need_no_option(name: str) -> None:
    with torch.device("meta"):
        shapes = {key: tuple(value.shape) for key, value in create_model(name).state_dict().items()}
    assert ADM.match(shapes)
    found = ADM.config(None, shapes, {})  # type: ignore[arg-type]
    assert found == model_config(name)
    assert ADM.denoiser(None, found).path.schedule == ("cosine" if name == "adm_64" else "linear")  # type: ignore[arg-type]
    assert [form.name for form in FORMATS if form.match(shapes)] == ["adm"]


def test_other_files_of_the_release_and_wrong_ones_are_named(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"

    def refused(weights: dict[str, Tensor], says: str, **options: Any) -> None:
        save_file({key: value.contiguous() for key, value in weights.items()}, file)
        with pytest.raises(DitkitError, match=says):
            read(file, FORMATS, options=options)

    good = randomised(SMALL).state_dict()
    refused(good, r"how many heads its attention has, .*: give --model\.num-heads")
    upsampler = randomised(replace(SMALL, in_channels=6, learn_sigma=False)).state_dict()
    refused(upsampler, "upsampler, which is given a small image besides", **HEADS)
    missing = "output_blocks.1.0.in_layers.2.weight"
    refused({name: value for name, value in good.items() if name != missing}, f"lacks {missing}", **HEADS)
    refused({**good, "label_emb.weight": torch.zeros(3)}, r"label_emb\.weight is \[3\], which should have 2", **HEADS)
    refused({**good, "out.2.weight": torch.zeros(4, 32, 3, 3)}, "4 channels come out of 3", **HEADS)
    refused(
        {**good, "input_blocks.1.0.extra": torch.zeros(1)}, "nothing there is called input_blocks.1.0.extra", **HEADS
    )


def test_an_import_samples_and_its_export_is_the_file(tmp_path: Path, ditkit: Command) -> None:
    weights = randomised(SMALL).state_dict()
    torch.save(weights, tmp_path / "adm.pt")
    said = ditkit("import", "adm.pt", "--model.num-head-channels", 16, "--model.input-size", 8)
    assert said.returncode == 0, said.stderr
    assert "ADM (Dhariwal & Nichol 2021): no published size" in said.stdout
    assert "levels of 32, 64 channels with 1 residual blocks each" in said.stdout
    assert "means eps on DDPM" in said.stdout
    assert ditkit("sample", "runs/adm", "--count", 2, "--steps", 3, "--out", "a.png").returncode == 0
    again = ditkit("export", "runs/adm", "--format", "official", "--out", "again.pt")
    assert again.returncode == 0, again.stderr
    back = torch.load(tmp_path / "again.pt", weights_only=True)
    assert set(back) == set(weights)
    assert all(torch.equal(back[key], weights[key]) for key in weights)
    guided = ditkit("sample", "runs/adm", "--guidance", 2, "--count", 2, "--steps", 3, "--out", "b.png")
    assert guided.returncode != 0
    assert "no null label" in guided.stderr
    assert (
        "works on pixels"
        in ditkit("import", "adm.pt", "--out", "b", "--model.num-heads", 4, "--autoencoder", "x").stderr
    )


def test_what_a_file_cannot_say_is_not_written() -> None:
    eps = Meaning(DDPM(), "eps", "index")
    assert ADM.refusal(SMALL, eps) is None
    assert ADM.refusal(SMALL, Meaning(DDPM(schedule="cosine"), "eps", "index")) is None
    assert "an ADM file means eps on a DDPM table" in str(ADM.refusal(SMALL, Meaning(Linear(), "x0", "1-t")))
    assert "norms have 32 groups, and this model's have 8" in str(ADM.refusal(replace(SMALL, norm_groups=8), eps))


def test_a_published_model_is_trained_on_with_a_null_label_and_other_classes() -> None:
    old = randomised(SMALL)
    weights, table = old.state_dict(), old.get_parameter("label_emb.weight").detach()
    for change, says in (
        ({"null_label": True}, "the null label begins as the mean of all classes"),
        ({"null_label": True, "num_classes": 7}, "7 classes begin anew"),
        ({"learn_sigma": False}, "without the variance"),
        ({"in_channels": 1}, "1 channels of patches of 1 instead of 3 channels of patches of 1"),
        ({"dropout": 0.1, "input_size": 16}, None),
    ):
        target: Any = replace(SMALL, **change)
        model = target.build()
        done = transfer(SMALL, weights, model)
        assert {str(c).split(": ")[1] for c in (*done.resized, *done.new)} == ({says} if says else set())
        assert len(done.loaded) == len(weights) - {"learn_sigma": 2, "in_channels": 3, "dropout": 0}.get(
            next(iter(change)), 1
        )
        if says is not None and "mean" in says:
            assert torch.equal(model.get_parameter("label_emb.weight"), torch.cat((table, table.mean(0)[None])))
    silent = replace(SMALL, learn_sigma=False)
    model = SMALL.build()
    noise = randomised(silent)
    assert {str(c).split(": ")[1] for c in transfer(silent, noise.state_dict(), model).resized} == {
        "the variance begins at 0"
    }
    given = (*inputs(SMALL, 2)[:2], Conditioning(label=torch.tensor([0, 2])))
    out = model.eval()(*given)
    assert_close(out[:, :3], noise(*given))
    assert not out[:, 3:].any()
    null = replace(SMALL, null_label=True)
    own = randomised(null)
    model = replace(null, num_classes=9).build()
    transfer(null, own.state_dict(), model)
    assert torch.equal(model.get_parameter("label_emb.weight")[-1], own.get_parameter("label_emb.weight")[-1])
    model = SMALL.build()
    assert "without the null label" in str(transfer(null, own.state_dict(), model).resized[0])
    assert torch.equal(model.get_parameter("label_emb.weight"), own.get_parameter("label_emb.weight")[:-1])
    with pytest.raises(DitkitError, match=r"model_channels 32, not 64: train with --model\.model-channels 32"):
        transfer(SMALL, weights, replace(SMALL, model_channels=64).build())


# cost


def test_compute_is_counted_by_hand() -> None:
    """SMALL on 8 x 8: convolutions are pixels x 9 x in x out, attention two products of 16 x 16 with 64 channels."""

    def residual(pixels: int, channels: int, out: int, before: int | None = None) -> int:
        skip = 0 if channels == out else (before or pixels) * channels * out
        return pixels * 9 * (channels * out + out * out) + skip + 128 * 2 * out

    n, m, attention = 64, 16, 4 * 16 * 64 * 64 + 2 * 16 * 16 * 64
    embedding = 32 * 128 + 128 * 128
    first = n * 9 * 3 * 32 + residual(n, 32, 32) + residual(m, 32, 32) + residual(m, 32, 64) + attention
    middle = 2 * residual(m, 64, 64) + attention
    second = residual(m, 128, 64) + attention + residual(m, 96, 64) + attention + residual(n, 64, 64)
    second += residual(n, 96, 32) + residual(n, 64, 32) + n * 9 * 32 * 6
    assert gmacs(SMALL, (3, 8, 8)) * 1e9 == embedding + first + middle + second


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("name", ["unet", "unet of the older parts", "resnet"])
def test_the_predicted_memory_is_that_of_real_tensors(name: str, dtype: str) -> None:
    config = CONVOLUTIONAL[name]
    c = cost(config, batch=6, dtype=dtype)
    sampling, training = real(config, 6, dtype)
    assert c.sampling - c.weights == pytest.approx(sampling, rel=0.02)
    assert c.training - c.parameters * 4 - c.trainable * 12 == pytest.approx(training, rel=0.02)


# training


@pytest.mark.parametrize("model", ["unet_tiny", "resnet_tiny"])
def test_a_named_network_trains_and_samples_from_the_command_line(model: str, ditkit: Command) -> None:
    words = ("--model", model, "--train.steps", 2, "--train.batch", 2, "--sample.steps", 2, "--train.sample-every", 0)
    done = ditkit("train", "digits", *words, "--out", "runs/a", "--quiet")
    assert done.returncode == 0, done.stderr
    done = ditkit("sample", "runs/a", "--count", 2, "--steps", 2, "--out", "a.png")
    assert done.returncode == 0, done.stderr


def test_a_network_without_a_null_label_says_so_before_it_trains(ditkit: Command) -> None:
    words = ("train", "digits", "--model", "unet_tiny", "--out", "runs/a", "--quiet", "--train.steps", 2)
    done = ditkit(*words, "--model.no-null-label")
    assert done.returncode != 0
    assert "no null label" in done.stderr
    assert not Path("runs/a").exists()
    done = ditkit(*words, "--model.channel-mult", 1, 1, 2, 2)
    assert "28 x 28 are not tiled by 8 x 8 pixels" in done.stderr
    assert "--model.channel-mult" in done.stderr
