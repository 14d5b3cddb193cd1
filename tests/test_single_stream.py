"""Z-Image and Lumina 2, one stream of image and caption: sizes, masks, what sees what, prepared work, the one door."""

from __future__ import annotations

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
from ditkit.models import Lumina2Config, Model, ZImageConfig, create_model, model_config
from ditkit.models.zimage import slots, starts
from ditkit.plan import gmacs

Z_IMAGE = ZImageConfig(
    input_size=(8, 12), in_channels=4, hidden_size=32, depth=3, refiner_depth=2, num_heads=2, axes=(4, 6, 6),
    text_dim=12, text_length=20,
)  # fmt: skip
LUMINA = Lumina2Config(
    input_size=(8, 12), in_channels=4, hidden_size=48, depth=3, refiner_depth=2, num_heads=4, kv_heads=2,
    mlp_hidden=80, axes=(4, 4, 4), text_dim=12, text_length=20,
)  # fmt: skip
TINY: dict[str, Any] = {
    "lumina2": LUMINA,
    "lumina2 of equal heads": replace(LUMINA, input_size=4, patch_size=1, num_heads=2, axes=(8, 8, 8), refiner_depth=1),
    "z_image": Z_IMAGE,
    "z_image with references": replace(Z_IMAGE, vision_dim=10),
    "z_image of one head": replace(
        Z_IMAGE, input_size=4, patch_size=1, in_channels=2, hidden_size=24, num_heads=1, axes=(8, 8, 8), depth=2,
        refiner_depth=1,
    ),
}  # fmt: skip


def build(name: str, std: float = 0.1) -> tuple[Model, Any]:
    """Weights under which nothing is zero and nothing saturates."""
    model = TINY[name].build()
    generator = torch.Generator().manual_seed(0)
    for key, p in model.named_parameters():
        p.data = std * torch.randn(p.shape, generator=generator) + ("norm" in key)
    return model.eval(), TINY[name]


@pytest.fixture(params=TINY)
def tiny(request: pytest.FixtureRequest) -> tuple[Model, Any]:
    return build(request.param)


def caption(config: Any, lengths: list[int], length: int | None = None, seed: int = 2) -> Tokens:
    """Captions of these lengths, each its own, whatever they are padded to; the pads are far from zero."""
    length = length or max(lengths)
    values = torch.full((len(lengths), length, config.text_dim), 7.0)
    for i, n in enumerate(lengths):
        values[i, :n] = torch.randn(n, config.text_dim, generator=torch.Generator().manual_seed(seed + i))
    return Tokens(values, torch.arange(length) < torch.tensor(lengths)[:, None])


def given(config: Any, b: int = 2, size: tuple[int, int] | None = None) -> tuple[Tensor, Tensor, Conditioning]:
    """x, t, captions of different lengths; references and their features where the model takes them."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(b, config.in_channels, *(size or config.shape[1:]), generator=generator)
    t = torch.rand(b, generator=generator)
    cond = Conditioning(text=caption(config, [3 + 17 * i for i in range(b)]))
    if getattr(config, "vision_dim", 0):
        references = torch.randn(b, 1, config.in_channels, 8, 8, generator=generator)
        vision = torch.randn(b, 1, 2, 3, config.vision_dim, generator=generator)
        lengths = torch.tensor([[1, 1, 1 + 17 * i] for i in range(b)], dtype=torch.float32)
        cond = replace(cond, references=references, vision=vision, scalars={"segments": lengths})
    return x, t, cond


# sizes


@pytest.mark.parametrize(("name", "count"), [("z_image", 6_154_908_736), ("lumina2", 2_609_769_152)])
def test_the_published_size(name: str, count: int) -> None:
    """6.155 and 2.61 billion, as diffusers' classes count; the small ones are for tests."""
    with torch.device("meta"):
        model, tiny = create_model(name), create_model(f"{name}_tiny")
    assert sum(p.numel() for p in model.parameters()) == count
    assert sum(p.numel() for p in tiny.parameters()) < 3_000_000


@pytest.mark.parametrize("name", ["z_image_tiny", "lumina2_tiny"])
def test_a_plan_reckons_with_the_caption(name: str) -> None:
    configs = [model_config(name, text_length=length, depth=1, refiner_depth=1) for length in (32, 320)]
    short, long = (gmacs(config, config.shape) for config in configs)
    assert long > 1.5 * short


def test_the_configuration_survives_json(tiny: tuple[Model, Any]) -> None:
    assert from_json(to_json(tiny[1])) == tiny[1]


# what goes in, what comes out


@pytest.mark.parametrize("tiles", [(1, 1), (2, 3), (9, 4)])
def test_the_output_has_the_shape_of_x(tiny: tuple[Model, Any], tiles: tuple[int, int]) -> None:
    model, config = tiny
    x, t, cond = given(config, 3, (tiles[0] * config.patch_size, tiles[1] * config.patch_size))
    out = model(x, t, cond)
    assert out.shape == x.shape
    assert bool(out.isfinite().all())


def test_a_new_network_says_nothing_and_its_gated_blocks_are_the_identity(tiny: tuple[Model, Any]) -> None:
    config = tiny[1]
    model = config.build(seed=3)
    inside: list[bool] = []

    def watch(site: str, block: nn.Module, x: Tensor, *args: Any) -> Tensor:
        out = block(x, *args)
        inside.append(torch.equal(out, x))
        return out

    assert not bool(model(*given(config), edit=watch).any())
    assert inside
    assert all(inside)


def test_every_parameter_gets_a_finite_gradient(tiny: tuple[Model, Any]) -> None:
    model, config = tiny
    model(*given(config, 3)).square().mean().backward()
    for name, p in model.named_parameters():
        assert p.grad is not None, name
        assert bool(p.grad.isfinite().all()), name
        assert bool(p.grad.any()), name


def test_every_pixel_sees_every_pixel_the_time_and_every_token(tiny: tuple[Model, Any]) -> None:
    model, config = tiny
    x, t, cond = given(config, 2)
    assert cond.text is not None
    values = cond.text.values.clone().requires_grad_()
    x.requires_grad_()
    out = model(x, t, replace(cond, text=Tokens(values, cond.text.mask)))
    for pixel in (out[1, 0, 0, 0], out[1, -1, -1, -1]):
        of_x, of_text = torch.autograd.grad(pixel, (x, values), retain_graph=True)
        assert bool((of_x[1] != 0).all())
        assert not bool(of_x[0].any())
        assert bool((of_text[1][cond.text.mask[1]] != 0).all())
        assert not bool(of_text[0].any())
    assert not torch.allclose(model(x, t + 0.3, cond), out, atol=1e-3)


def test_what_is_masked_changes_no_output_and_no_gradient(tiny: tuple[Model, Any]) -> None:
    """Longer padding, of whatever values, and a batch with a longer caption: the same numbers."""
    model, config = tiny
    x, t, cond = given(config, 2)
    assert cond.text is not None

    def gradients(x: Tensor, t: Tensor, cond: Conditioning) -> tuple[Tensor, dict[str, Tensor]]:
        model.zero_grad()
        out = model(x, t, cond)
        out[0].square().sum().backward()
        return out[0], {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    index = torch.tensor([0])
    alone = replace(cond.rows(index), text=Tokens(cond.text.values[:1, :3], cond.text.mask[:1, :3]))
    out, expected = gradients(x[:1], t[:1], alone)
    longer = cond.text.values.clone()
    longer[0, 3:] = -50.0
    masked = cond.text.padded(150)
    for other in (
        replace(alone, text=caption(config, [3], 40)),
        replace(alone, text=caption(config, [3], 100)),
        replace(cond, text=Tokens(longer, cond.text.mask)),
        replace(cond, text=masked),
    ):
        rows = len(other.text.values) if other.text is not None else 0
        same, found = gradients(x[:rows], t[:rows], other)
        assert_close(same, out, rtol=1e-5, atol=1e-5)
        for name, gradient in found.items():
            scale = float(expected[name].abs().max())
            assert_close(gradient, expected[name], rtol=1e-4, atol=1e-4 * scale, msg=name)


@pytest.mark.parametrize("name", [name for name in TINY if "references" not in name])
def test_a_row_without_a_caption_stays_finite_beside_others(name: str) -> None:
    model, config = build(name)
    x, t, _ = given(config, 2)
    cond = Conditioning(text=caption(config, [0, 40]))
    out = model(x, t, cond)
    assert bool(out.isfinite().all())
    out[0].square().sum().backward()
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None)
    empty = Conditioning(text=Tokens(torch.zeros(1, 0, config.text_dim), torch.zeros(1, 0, dtype=torch.bool)))
    assert_close(model(x[:1], t[:1], empty), out[:1], rtol=1e-5, atol=1e-5)


def test_positions_tell_equal_patches_and_equal_tokens_apart(tiny: tuple[Model, Any]) -> None:
    model, config = tiny
    p = config.patch_size
    x, t, cond = given(config, 1, (2 * p, 3 * p))
    x = x[:, :, :p, :p].repeat(1, 1, 2, 3)
    patches = model(x, t, cond).unfold(2, p, p).unfold(3, p, p).flatten(2, 3)
    for i in range(6):
        for j in range(i):
            assert not torch.allclose(patches[:, :, i], patches[:, :, j], atol=1e-4)
    assert cond.text is not None
    turned = replace(cond, text=Tokens(cond.text.values.flip(1), cond.text.mask))
    assert not torch.allclose(model(x, t, turned), model(x, t, cond), atol=1e-4)


# segments


def test_segments_are_padded_one_by_one() -> None:
    lengths = torch.tensor([[3, 32, 33], [0, 1, 0]])
    assert starts(lengths).tolist() == [[1, 6, 40], [1, 3, 6]]
    found = slots(lengths, 160, omni=True)
    assert found.used.sum(1).tolist() == [32 + 32 + 64, 32]
    assert found.real.sum(1).tolist() == [68, 1]
    for row, places in ((0, [*range(3), *range(32, 64), *range(64, 97)]), (1, [0])):
        assert found.real[row].nonzero()[:, 0].tolist() == places
        assert found.token[row][found.real[row]].tolist() == list(range(len(places)))
    assert found.time[0][found.real[0]].tolist() == [*range(1, 4), *range(6, 38), *range(40, 73)]
    assert found.segment[0, [0, 31, 32, 63, 64, 127]].tolist() == [0, 0, 1, 1, 2, 2]
    assert not bool(found.time[~found.real].any())
    plain = slots(torch.tensor([[5], [40]]), 64, omni=False)
    assert plain.used.sum(1).tolist() == [32, 64]
    assert plain.time[0].tolist() == list(range(1, 65))  # pads count on


def test_no_references_in_a_tensor_are_no_references() -> None:
    model, config = build("z_image")
    x, t, cond = given(config, 2)
    two = replace(cond, scalars={"segments": torch.tensor([[1.0, 2.0], [15.0, 5.0]])})
    assert torch.equal(model(x, t, replace(two, references=torch.zeros(2, 0, 4, 8, 8))), model(x, t, two))


def test_references_are_read_as_clean_data() -> None:
    """The time reaches the image alone: what is clean sees t = 1, whatever the time is."""
    model, config = build("z_image with references")
    x, t, cond = given(config, 2)
    seen: dict[str, Tensor] = {}

    def watch(site: str, block: nn.Module, h: Tensor, c: Tensor, *args: Any) -> Tensor:
        seen[site] = c
        return block(h, c, *args)

    model(x, t, cond, edit=watch)
    vector: Any = model.get_submodule("t_embedder")
    noisy, clean = vector(1000 * t), vector(torch.full((2,), 1000.0))
    # 24 patches and 8 pads of the image; 16 and 16 of the reference
    for site, n in (("noise_refiner.0", 64), ("blocks.0", 64 + 96 + 64)):
        c = seen[site]
        assert c.shape[:2] == (2, n), site
        assert_close(c[:, :32], noisy[:, None].expand(-1, 32, -1))
        assert_close(c[:, 32:64], clean[:, None].expand(-1, 32, -1))
    # the caption: the piece before the reference is clean, the others are not; the features' pads belong to the image
    assert_close(seen["blocks.0"][:, 64:96], clean[:, None].expand(-1, 32, -1))
    assert_close(seen["blocks.0"][:, 96:160], noisy[:, None].expand(-1, 64, -1))
    assert_close(seen["blocks.0"][:, 160:192], clean[:, None].expand(-1, 32, -1))
    assert_close(seen["blocks.0"][:, 192:], noisy[:, None].expand(-1, 32, -1))


# prepared work, the door, files


def test_prepared_work_changes_nothing(tiny: tuple[Model, Any]) -> None:
    model, config = tiny
    x, t, cond = given(config, 3)
    ready = model.prepare(cond, x.shape, (1.0, 0.5))
    whole = model(x, t, cond)
    assert torch.equal(model(x, t, ready), whole)
    assert torch.equal(model(x, t / 2, ready), model(x, t / 2, cond))
    index = torch.tensor([2, 0])
    assert_close(model(x[index], t[index], ready.rows(index)), whole[index], rtol=1e-5, atol=1e-5)
    assert_close(model(x[index], t[index], cond.rows(index)), whole[index], rtol=1e-5, atol=1e-5)
    model.zero_grad()
    model(x, t, ready).square().mean().backward()
    prepared = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    model(x, t, cond).square().mean().backward()
    for name, gradient in prepared.items():
        assert gradient is not None, name
        assert_close(gradient, model.get_parameter(name).grad, rtol=1e-5, atol=1e-7)


def test_a_guided_trajectory_equals_single_calls(tiny: tuple[Model, Any]) -> None:
    """The captions of the batch and those that it turns away from have other lengths, and are one batch."""
    model, config = tiny
    x, _, cond = given(config, 2)
    denoiser = Meaning(Linear(), "-velocity", "1-t").of(model)
    null = replace(cond, text=caption(config, [3, 20], 50, seed=9))
    guided = guide(denoiser, CFG(2.0, null)).start(cond, x.shape, (1.0, 0.5, 0.0))
    for t in (1.0, 0.5):
        strong, weak = denoiser(x, t, cond).out, denoiser(x, t, null).out
        assert_close(guided(x, t).out, weak + 2 * (strong - weak), rtol=1e-4, atol=1e-4)
    assert len(cat((cond, null)).text.values) == 4  # type: ignore[union-attr]


def test_the_door_opens_at_every_block_that_sees_the_image(tiny: tuple[Model, Any]) -> None:
    model, config = tiny
    seen: list[str] = []

    def watch(site: str, block: nn.Module, x: Tensor, *args: Any) -> Tensor:
        assert model.get_submodule(site) is block
        seen.append(site)
        return block(x, *args)

    args = given(config)
    assert torch.equal(model(*args, edit=watch), model(*args))
    refiners = [f"noise_refiner.{i}" for i in range(config.refiner_depth)]
    assert seen == [*refiners, *(f"blocks.{i}" for i in range(config.depth))]
    assert {site.split(".")[0] for site in seen} <= set(model.plan.shard)
    skipped = model(*args, edit=lambda site, block, x, *rest: x if site == "blocks.1" else block(x, *rest))
    assert not torch.allclose(skipped, model(*args), atol=1e-3)


def test_attention_can_be_the_identity_in_some_rows(tiny: tuple[Model, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """As if every token of these rows saw itself alone; the other rows do not change by a bit."""
    model, config = tiny
    args, rows = given(config, 3), torch.tensor([True, False, True])

    def identity(site: str, block: nn.Module, x: Tensor, *rest: Any) -> Tensor:
        return block(x, *rest, identity=rows) if site == "blocks.1" else block(x, *rest)

    def diagonal(site: str, block: nn.Module, x: Tensor, *rest: Any) -> Tensor:
        def attend(q: Tensor, k: Tensor, v: Tensor, mask: Any = None, dropout: float = 0.0) -> Tensor:
            own = torch.eye(q.shape[2], dtype=torch.bool)
            return nn.functional.scaled_dot_product_attention(q, k, v, own, enable_gqa=True)

        with monkeypatch.context() as patch:
            if site == "blocks.1":
                patch.setattr("ditkit.layers.attention.attend", attend)
            return block(x, *rest)

    out, plain, masked = (model(*args, edit=edit) for edit in (identity, None, diagonal))
    assert_close(out[rows], masked[rows], rtol=1e-5, atol=1e-5)
    assert torch.equal(out[~rows], plain[~rows])
    assert not torch.allclose(out[rows], plain[rows], rtol=1e-2)


@pytest.mark.parametrize("name", TINY)
def test_the_same_seed_builds_the_same_weights_and_nothing_is_left_unwritten(name: str) -> None:
    """The memory that a model is given is filled with NaN, then with 3: the weights do not change."""
    real = nn.Module.to_empty

    def over(value: float) -> dict[str, Tensor]:
        def to_empty(self: nn.Module, **kwargs: Any) -> nn.Module:
            real(self, **kwargs)
            for p in self.parameters():
                p.data.fill_(value)
            return self

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(nn.Module, "to_empty", to_empty)
            return TINY[name].build(seed=1).state_dict()

    before = torch.get_rng_state()
    one, two = over(float("nan")), over(3.0)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(one[key], two[key]) and bool(one[key].isfinite().all()) for key in one)
    other = TINY[name].build(seed=2).state_dict()
    drawn = [key for key in one if one[key].unique().numel() > 1]
    assert len(drawn) > 8
    assert any("pad_token" in key for key in drawn) == ("z_image" in name)
    assert not any(torch.equal(one[key], other[key]) for key in drawn)


def test_a_state_dict_survives_safetensors(tiny: tuple[Model, Any], tmp_path: Path) -> None:
    model, config = tiny
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    other = config.build(seed=99).eval()
    other.load_state_dict(load_file(tmp_path / "model.safetensors"))
    assert torch.equal(other(*given(config)), model(*given(config)))


def test_it_runs_in_bfloat16(tiny: tuple[Model, Any]) -> None:
    model, config = tiny
    x, t, cond = given(config, 2)
    expected = model(x, t, cond).detach()
    out = model.bfloat16()(x.bfloat16(), t, cond).detach()
    assert out.dtype == torch.bfloat16
    assert float((out.float() - expected).abs().mean()) < 0.1 * float(expected.std())


# mistakes


def test_mistakes_say_what_to_change() -> None:
    model, config = build("z_image with references")
    x, t, cond = given(config, 2)
    plain = Conditioning(text=cond.text)

    def fails(match: str, x: Tensor = x, **changes: Any) -> None:
        with pytest.raises(ValueError, match=match):
            model(x, t, replace(cond, **changes))

    fails(r"takes a text, tokens \[b l 12\], and none", text=None)
    fails(
        r"text \[b l 12\].*given \[2, 20, 7\]: change text_dim",
        text=Tokens(torch.zeros(2, 20, 7), caption(config, [20, 20]).mask),
    )
    fails("x has 2 samples, and texts were given for 1", text=caption(config, [20]))
    fails("between segments", scalars={})
    fails("1 references stand between 3 segments, not 2", scalars={"segments": torch.ones(2, 2)})
    fails(r"features \[2, 1, 2, 3, 4\].*vision_dim=10", vision=torch.zeros(2, 1, 2, 3, 4))
    fails("in_channels=4.*change in_channels", x=x[:, :3])
    fails("2 x 2 do not tile", x=x[:, :, :7])
    with pytest.raises(DitkitError, match="hidden_size 32 is not num_heads 4 x 16, the sum of axes"):
        replace(config, num_heads=4).build()
    with pytest.raises(DitkitError, match="hidden_size 48 is not num_heads 2 x 12, the sum of axes"):
        replace(LUMINA, num_heads=2).build()
    with pytest.raises(DitkitError, match="num_heads 4 is not divisible by num_kv_heads 3"):
        replace(LUMINA, kv_heads=3).build()
    with pytest.raises(DitkitError, match="theta is above 1"):
        replace(config, theta=0.5)
    assert config.fitted((3, 8, 12), 0, 0) == replace(config, in_channels=3, input_size=(8, 12))
    assert model(x, t, plain).shape == x.shape
