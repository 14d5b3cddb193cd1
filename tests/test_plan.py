"""What a model will cost: the prediction on shapes alone against real tensors."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from ditkit.conditioning import Conditioning
from ditkit.config import DitkitError
from ditkit.models import DiTConfig, JiTConfig, model_config
from ditkit.plan import Cost, cost, gmacs, peak_bytes

SMALL: dict[str, Any] = {
    "dit": DiTConfig(input_size=16, hidden_size=64, depth=3, num_heads=4, num_classes=7),
    "jit": JiTConfig(
        input_size=32, patch_size=4, hidden_size=64, depth=3, num_heads=4, num_classes=7, bottleneck_dim=8,
        in_context_len=4, in_context_start=1,
    ),
    "unconditional": JiTConfig(
        input_size=(16, 32), patch_size=4, hidden_size=32, depth=2, num_heads=2, num_classes=0, bottleneck_dim=8,
        in_context_len=0,
    ),
}  # fmt: skip


def real(config: Any, batch: int, dtype: str) -> tuple[int, int]:
    """The same steps with real weights and numbers: bytes of a sampling pass, and of a training step."""
    model = config.build()
    size = config.input_size if isinstance(config.input_size, tuple) else (config.input_size,) * 2
    x, t = torch.randn(batch, config.in_channels, *size), torch.rand(batch)
    cond = Conditioning(label=torch.zeros(batch, dtype=torch.long) if config.num_classes else None)

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bf16"):
            out = model(x, t, cond)
        out.float().square().mean().backward()

    training = peak_bytes(step)
    model.zero_grad()
    if dtype == "bf16":
        model, x = model.bfloat16(), x.bfloat16()
    with torch.no_grad():
        sampling = peak_bytes(lambda: model(x, t, cond))
    return sampling, training


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("batch", [1, 6])
@pytest.mark.parametrize("name", SMALL)
def test_the_predicted_memory_is_that_of_real_tensors(name: str, batch: int, dtype: str) -> None:
    config = SMALL[name]
    c = cost(config, batch=batch, dtype=dtype)
    sampling, training = real(config, batch, dtype)
    assert c.sampling - c.weights == pytest.approx(sampling, rel=0.02)
    assert c.training - c.parameters * 4 - c.trainable * 12 == pytest.approx(training, rel=0.02)
    assert min(sampling, training) > 1000


def test_peak_is_what_lives_at_once() -> None:
    kb = 1024

    def chain() -> None:
        x = torch.zeros(256)  # 1 KB
        for _ in range(10):
            x = x + 1  # the old one dies after the new one is made

    def hoard() -> None:
        kept = [torch.zeros(256) for _ in range(10)]
        views = [x.view(16, 16)[3:] for x in kept]  # views take nothing
        for x in kept:
            x.add_(1)  # nor what works in place
        del views

    given = torch.zeros(4096)
    assert peak_bytes(chain) == 2 * kb
    assert peak_bytes(hoard) == 10 * kb
    assert peak_bytes(lambda: given.add_(1).view(64, 64)) == 0  # what was there before does not count
    assert peak_bytes(lambda: (given + 1, given * 2)) == 32 * kb
    assert peak_bytes(lambda: None) == 0


def test_counts_are_those_of_the_model() -> None:
    config = SMALL["jit"]
    model = config.build()
    c = cost(config, dtype="fp32")
    assert c.parameters == sum(p.numel() for p in model.parameters())
    assert c.trainable == c.parameters - model.pos_embed.numel()
    assert c.weights == 4 * c.parameters
    assert cost(config).weights == 2 * c.parameters
    assert (c.shape, c.batch, c.dtype) == ((3, 32, 32), 1, "fp32")
    assert cost(SMALL["unconditional"]).shape == (3, 16, 32)
    # a training step holds at least weights, gradients, two moments and the average
    assert c.training > 4 * c.parameters + 16 * c.trainable


def test_compute_is_counted_by_hand() -> None:
    """n tokens of width d: per block qkv 3 n d^2, both products of attention 2 n^2 d, output n d^2, MLP 8 n d^2,
    modulation 6 d^2; the embeddings and the output besides."""
    d, n, depth, patch = 64, 64, 3, 2
    block = 12 * n * d * d + 2 * n * n * d + 6 * d * d
    ends = n * patch * patch * 4 * d + n * d * patch * patch * 8 + 2 * d * d + 256 * d + d * d
    assert gmacs(SMALL["dit"], (4, 16, 16)) * 1e9 == depth * block + ends


def activations(c: Cost) -> int:
    return c.sampling - c.weights


def test_memory_grows_in_proportion_to_the_batch_and_compute_is_per_sample() -> None:
    """Of a training step this holds once activations outweigh gradients; before, both live at their own times."""
    config = model_config("dit_s_4")
    one, eight, sixteen, many = (cost(config, batch=b) for b in (1, 8, 16, 32))
    assert one.gmacs == eight.gmacs
    assert activations(sixteen) - activations(eight) == pytest.approx((activations(eight) - activations(one)) * 8 / 7)
    assert activations(many) == pytest.approx(32 * activations(one), rel=0.05)
    assert many.training - sixteen.training == pytest.approx(2 * (sixteen.training - eight.training), rel=0.01)
    assert sixteen.training - eight.training >= (eight.training - one.training) * 8 / 7


def test_memory_and_compute_grow_with_the_square_of_the_side() -> None:
    config = model_config("dit_s_4")
    small, large = (cost(config, resolution=r, batch=2) for r in (32, 64))
    assert activations(large) == pytest.approx(4 * activations(small), rel=0.02)
    assert large.shape == (4, 64, 64)
    # linear layers four times, attention sixteen times
    d, n, depth = 384, 64, 12
    attention = depth * 2 * n * n * d / 1e9
    assert large.gmacs == pytest.approx(4 * small.gmacs + 12 * attention, rel=0.01)
    assert large.parameters - small.parameters == (256 - 64) * d


def test_bf16_takes_half_of_what_fp32_does_for_sampling() -> None:
    low, full = (cost(SMALL["dit"], batch=8, dtype=d) for d in ("bf16", "fp32"))
    assert activations(low) == pytest.approx(activations(full) / 2, rel=0.1)
    assert low.training < full.training


def test_planning_the_largest_model_takes_no_memory_to_speak_of() -> None:
    c = cost(model_config("jit_g_32"), batch=256)
    assert c.parameters > 2e9
    assert c.training > 200e9  # a machine that holds this does not run the tests


def test_planning_leaves_no_trace() -> None:
    state = torch.get_rng_state()
    first = cost(SMALL["jit"])
    assert cost(SMALL["jit"]) == first
    assert torch.equal(torch.get_rng_state(), state)
    assert type(torch.ones(1) + 1) is torch.Tensor
    assert torch.get_default_device().type == "cpu"


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"resolution": 33}, "images of 33 x 33 are not tiled by patches of 2"),
        ({"resolution": 1}, "images of 1 x 1 are not tiled"),
        ({"resolution": 0}, "images of 0 x 0 are not tiled"),
        ({"resolution": -2}, "images of -2 x -2 are not tiled"),
        ({"batch": 0}, "the batch is at least 1, not 0"),
        ({"dtype": "fp16"}, "bf16 or fp32, not 'fp16'"),
    ],
)
def test_what_cannot_be_planned_is_refused(options: dict[str, Any], says: str) -> None:
    with pytest.raises(DitkitError, match=says):
        cost(SMALL["dit"], **options)


def test_an_input_size_that_patches_do_not_tile_is_refused_without_a_resolution_too() -> None:
    with pytest.raises(DitkitError, match=r"17.*patches of 2"):
        cost(dataclasses.replace(SMALL["dit"], input_size=17))
