"""The residual network: what it is by hand, how it starts, its sites, and that it and the U-Net learn."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from ditkit.config import DitkitError
from ditkit.diffusion import Linear, Meaning, PerturbedAttention, SkipLayer, guide
from ditkit.models import ResNetConfig, model_config
from ditkit.plan import gmacs
from ditkit.recipe import Recipe, Train
from ditkit.recipes import digits, find_recipe
from ditkit.training import train

from .test_models import build, inputs


def test_it_is_a_stem_blocks_and_an_output() -> None:
    model, config = build("resnet on patches")
    x, t, cond = inputs(config, 2)
    part: Any = model.get_submodule
    emb = part("t_embedder")(t) + part("y_embedder")(cond.label, 2)
    squares = x.view(2, 2, 2, 2, 4, 2).permute(0, 1, 3, 5, 2, 4).reshape(2, 8, 2, 4)  # channel, row in it, column in it
    h = part("stem")(squares)
    for i in range(config.depth):
        h = part(f"blocks.{i}")(h, emb)
    out = part("out")(h).view(2, 2, 2, 2, 2, 4).permute(0, 1, 4, 2, 5, 3).reshape(2, 2, 4, 8)
    assert_close(model(x, t, cond), out, rtol=1e-5, atol=1e-5)


def test_it_starts_as_nothing_with_blocks_that_change_nothing_and_know_no_time() -> None:
    config = ResNetConfig(input_size=8, channels=32, depth=2, num_classes=5)
    model = config.build(seed=2)
    x, t, cond = inputs(config, 3)
    assert not model(x, t, cond).any()

    def unchanged(site: str, block: nn.Module, x: Tensor, *args: Any) -> Tensor:
        out = block(x, *args)
        assert torch.equal(out, x)
        return out

    model(x, t, cond, edit=unchanged)
    for name, weight in model.named_parameters():
        zero = "emb_layers" in name or "out_layers.3" in name or name.startswith("out.2")
        assert bool(weight.any()) != (zero or ("layers.0.bias" in name) or name == "out.0.bias"), name


def test_sites_are_its_blocks_which_can_be_skipped_but_have_no_attention() -> None:
    model, config = build("resnet")
    x, t, cond = inputs(config, 2)
    sites: list[str] = []

    def watch(site: str, block: nn.Module, x: Tensor, *args: Any) -> Tensor:
        assert model.get_submodule(site) is block
        sites.append(site)
        return block(x, *args)

    plain = model(x, t, cond, edit=watch)
    assert sites == ["blocks.0", "blocks.1", "blocks.2"]
    skipped = model(x, t, cond, edit=lambda site, block, x, *args: x if site == "blocks.1" else block(x, *args))
    assert not torch.allclose(skipped, plain, rtol=1e-2)
    denoiser = Meaning(Linear(), "x0", "t").of(model)
    guide(denoiser, SkipLayer(2.0, blocks=("blocks.1",))).check((0.5,), ())
    with pytest.raises(DitkitError, match=r"the attention of 'blocks.1' cannot be the identity"):
        guide(denoiser, PerturbedAttention(2.0, blocks=("blocks.1",))).check((0.5,), ())


def test_without_norms_a_pixel_sees_as_far_as_its_convolutions(monkeypatch: pytest.MonkeyPatch) -> None:
    """2 depth + 2 pixels in each direction; what lies beyond is seen through the means of the norms alone."""
    monkeypatch.setattr("ditkit.layers.convolution.GroupNorm.forward", lambda self, input: input)
    model, config = build("resnet", depth=1)
    x, t, cond = inputs(config, 1, (15, 15))
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(model(x, t, cond)[0, 0, 7, 7], x)
    reach = (gradient[0].abs().sum(0) > 0).nonzero()
    assert (reach.min(), reach.max()) == (7 - 4, 7 + 4)


@pytest.mark.parametrize("patch", [1, 2])
def test_compute_is_counted_by_hand(patch: int) -> None:
    """Convolutions of 3 x 3 on pixels, two in each of 3 blocks, a Linear to scale and shift; the embedding of time."""
    config = ResNetConfig(input_size=8, channels=12, depth=3, groups=3, num_classes=5, patch_size=patch)
    n, d, c = 64 // patch**2, 12, 3 * patch**2
    expected = 3 * (2 * 9 * n * d * d + d * 2 * d) + 2 * 9 * n * c * d + 256 * d + d * d
    assert gmacs(config, (3, 8, 8)) * 1e9 == pytest.approx(expected, abs=1e-3)


def test_sizes_that_cannot_be_built_or_fitted_are_refused() -> None:
    with pytest.raises(DitkitError, match="20 channels are not divisible by the 32 groups"):
        ResNetConfig(channels=20).build()
    with pytest.raises(DitkitError, match=r"model.depth must be at least 1, not 0"):
        ResNetConfig(depth=0)
    with pytest.raises(DitkitError, match=r"28 x 28 are not tiled by patches of 8: .*--model\.patch-size"):
        ResNetConfig(patch_size=8).fitted((1, 28, 28), 10, 0)


@pytest.mark.parametrize("name", ["digits_resnet", "digits_unet"])
def test_the_recipes_of_digits_cost_two_thirds_of_the_transformers(name: str) -> None:
    def macs(recipe: Recipe) -> float:
        config = recipe.model.fitted((1, 28, 28), 10, 0)
        return gmacs(config, config.shape) * recipe.train.steps * recipe.train.batch

    recipe = find_recipe(name)
    assert recipe == Recipe.from_json(recipe.to_json())
    assert 0.6 < macs(recipe) / macs(digits()) < 0.7
    assert (recipe.denoiser, recipe.objective, recipe.sample) == (
        digits().denoiser,
        digits().objective,
        digits().sample,
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet_tiny", "unet_tiny"])
def test_two_hundred_steps_on_digits_lower_the_loss_by_an_order(name: str, tmp_path: Path) -> None:
    """Batches of 8; the mean of the last 50 steps over that of the first 10. Measured: 11.3 and 13.3 times lower."""
    settings = Train(
        steps=200, batch=8, lr=1e-3, warmup=20, emas=(0.99,), log_every=10, sample_every=0, checkpoint_every=200
    )
    train(replace(digits(), model=model_config(name), train=settings), tmp_path / "run", quiet=True)
    losses = [json.loads(row)["loss"] for row in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert len(losses) == 20
    assert losses[0] > 9 * sum(losses[-5:]) / 5
