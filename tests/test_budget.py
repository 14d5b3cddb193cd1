"""Networks sized to a budget: every family, what stays in proportion, and what cannot be met."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import pytest

from ditkit.budget import match, parameters
from ditkit.config import DitkitError, differences, lookup, names, to_json
from ditkit.models import (
    DiTConfig,
    JiTConfig,
    LoRAConfig,
    MLPConfig,
    ModelConfig,
    ResNetConfig,
    UNetConfig,
    model_config,
    resized,
    size,
    width_unit,
)
from ditkit.plan import gmacs

SMALL: dict[str, ModelConfig] = {
    "control": model_config("control_tiny"),
    "ddit": model_config("ddit_s", depth=4, length=32, vocab=50),
    "dit": model_config("dit_s_8", depth=4),
    "drax": model_config("drax_tiny"),
    "flux": model_config("flux1_tiny"),
    "jit": model_config("jit_b_32", hidden_size=192, num_heads=3, depth=4, in_context_start=1),
    "kandinsky5": model_config("kandinsky5_tiny"),
    "lightningdit": model_config("lightningdit_b_2", hidden_size=192, num_heads=3, depth=4),
    "lora": LoRAConfig(model_config("dit_s_8", depth=4), rank=2),
    "lumina2": model_config("lumina2_tiny", depth=8, refiner_depth=1, text_length=20),
    "mlp": MLPConfig(hidden_size=64),
    "mmdit": model_config("mmdit_tiny"),
    "pixart": model_config("pixart_tiny"),
    "resnet": model_config("resnet_tiny"),
    "sana": model_config("sana_tiny"),
    "unet": model_config("unet_tiny", num_head_channels=0, num_heads=2, norm_groups=4),
    "z_image": model_config("z_image_tiny"),
}
"""A small network of each family."""
DIT, JIT = SMALL["dit"], SMALL["jit"]


def test_every_family_is_there() -> None:
    assert {*SMALL, "autoencoder"} == set(names("model"))
    autoencoder = lookup("model", "autoencoder")()
    with pytest.raises(DitkitError, match="the model autoencoder has no one width and depth"):
        match(autoencoder, autoencoder.shape, params=1e6)
    assert all(type(config) is lookup("model", name) for name, config in SMALL.items())


@pytest.mark.parametrize(("name", "times"), [("dit", 3), *((name, 0.6) for name in SMALL)])  # all grow in the next test
def test_parameters_of_every_family_meet_the_budget(name: str, times: float) -> None:
    config = SMALL[name]
    target = times * parameters(config)
    found = match(config, config.shape, params=target, tolerance=0.15)
    assert parameters(found) == pytest.approx(target, rel=0.15)
    assert type(found) is type(config)
    assert (size(found) > size(config)) == (times > 1)


@pytest.mark.parametrize("name", SMALL)
def test_compute_of_every_family_meets_the_budget_and_the_rest_stays(name: str) -> None:
    config = SMALL[name]
    shape = config.shape
    target = 3 * gmacs(config, shape)
    found = match(config, shape, gmacs=target, tolerance=0.1)
    assert gmacs(found, shape) == pytest.approx(target, rel=0.1)
    assert found.shape == shape
    changed = {line.split(" is ")[0].rpartition(".")[2] for line in differences(to_json(config), to_json(found))}
    assert changed
    assert changed <= {
        *("hidden_size", "depth", "num_heads", "channels", "model_channels", "num_res_blocks", "ff_dim", "mlp_hidden"),
        *("kv_heads", "cross_heads", "in_context_start", "self_attention", "single_depth", "places"),
    }


def test_heads_keep_their_size_and_blocks_their_places() -> None:
    large: Any = match(DIT, DIT.shape, gmacs=4 * gmacs(DIT, DIT.shape))
    assert large.hidden_size // large.num_heads == pytest.approx(64, rel=0.5)
    assert large.depth == DIT.depth  # type: ignore[attr-defined]
    exact = resized(JiTConfig(), 1024, 24)
    assert (exact.num_heads, exact.in_context_start, exact.mlp_ratio) == (16, 8, 4.0)  # JiT-L
    small = resized(DiTConfig(), 384, 12)  # heads of 72 do not divide 384, those of 64 do
    assert small == replace(DiTConfig(), hidden_size=384, depth=12, num_heads=6)
    flux: Any = resized(model_config("flux1_dev"), 1536, 10)
    assert (flux.num_heads, flux.single_depth) == (12, 20)
    video: Any = resized(model_config("kandinsky5_lite_video"), 896, 32)
    assert (video.ff_dim, video.num_heads) == (3584, 14)
    half: Any = resized(model_config("z_image_control_1"), 1920, 15)
    assert (half.base.num_heads, half.places) == (15, (0, 2, 5, 8, 10, 12))


def test_units_are_what_the_family_divides_by() -> None:
    assert width_unit(DiTConfig(), exact=True) == 72
    assert width_unit(DiTConfig(), exact=False) == 4
    assert width_unit(model_config("z_image"), exact=False) == 128  # heads whose channels have names
    assert width_unit(model_config("lumina2"), exact=False) == 288  # three heads share keys and values
    assert width_unit(ResNetConfig(groups=12), exact=False) == 12
    assert width_unit(UNetConfig(norm_groups=32, num_head_channels=48), exact=True) == 96


def test_a_match_is_for_the_shape_that_is_asked_for() -> None:
    wide = match(JIT, (1, 64, 192), gmacs=0.02)
    assert wide.shape == (1, 64, 192)
    assert gmacs(wide, (1, 64, 192)) == pytest.approx(0.02, rel=0.05)
    assert wide.num_classes == 1000  # type: ignore[attr-defined]
    kept = match(JIT, JIT.shape, gmacs=gmacs(JIT, JIT.shape))
    assert kept == JIT


def test_the_nearest_is_named_where_no_size_fits() -> None:
    unet = model_config("unet_tiny")
    with pytest.raises(DitkitError, match=r"no size .* 0\.01 GMACs within 5%: the nearest has .*width 32, depth 1"):
        match(unet, unet.shape, gmacs=0.01)
    with pytest.raises(DitkitError, match="no size"):
        match(unet, unet.shape, params=1.0)
    for wrong in ({}, {"gmacs": 1.0, "params": 1.0}):
        with pytest.raises(DitkitError, match="give one"):
            match(DIT, DIT.shape, **wrong)
    for budget, tolerance in ((0.0, 0.05), (float("nan"), 0.05), (1.0, 0.0)):
        with pytest.raises(DitkitError, match="above 0"):
            match(DIT, DIT.shape, gmacs=budget, tolerance=tolerance)
    with pytest.raises(DitkitError, match="not tiled"):
        match(DIT, (4, 33, 33), gmacs=1.0)


def test_a_declared_size_names_fields_that_there_are() -> None:
    for name in names("model"):
        cls = lookup("model", name)
        sizing = getattr(cls, "sizing", None)
        if sizing:
            wished = {*sizing.wide, *sizing.divisors, *sizing.deep}
            assert wished <= {f.name for f in fields(cls)}, name


def test_the_command_plans_a_matched_model(ditkit: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    done = ditkit("plan", "dit_s_2", "--match-gmacs", "10", "--dtype", "fp32")
    assert done.returncode == 0
    assert "matched: model/dit" not in done.stdout
    assert "hidden_size is 384, not" in done.stdout
    line = next(line for line in done.stdout.splitlines() if line.startswith("compute"))
    assert float(line.split()[1]) == pytest.approx(10, rel=0.05)
    both = ditkit("plan", "dit_s_2", "--match-gmacs", "10", "--match-params", "3e6")
    assert both.returncode != 0
    far = ditkit("plan", "unet_tiny", "--match-params", "3")
    assert far.returncode == 1
    assert len(far.stderr.strip().splitlines()) == 1
