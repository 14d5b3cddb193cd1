"""Adapters of low rank: what they change, what they leave alone, and what becomes of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.testing import assert_close

from ditkit.cli import main
from ditkit.conditioning import Conditioning
from ditkit.config import DitkitError, from_json, to_json
from ditkit.models import DDiTConfig, JiTConfig, LoRAConfig, MLPConfig, adapters, base_weights, merged
from ditkit.pipeline import load
from ditkit.plan import cost
from ditkit.runs import Run

from .conftest import randomise

BASE = JiTConfig(
    input_size=8, patch_size=4, in_channels=1, hidden_size=16, depth=2, num_heads=2, num_classes=3, bottleneck_dim=8,
    in_context_len=2, in_context_start=1,
)  # fmt: skip
GIVEN = (torch.randn(2, 1, 8, 8), torch.tensor([0.2, 0.7]), Conditioning(label=torch.tensor([0, 2])))
TINY = "--model.hidden-size 16 --model.depth 2 --model.num-heads 2 --model.bottleneck-dim 8 --model.in-context-start 1 "
TINY += "--data.resolution 8 --model.patch-size 4 --train.batch 4 --train.sample-every 0 --train.log-every 1 --quiet"


def test_fresh_adapters_change_nothing_and_alone_are_trained() -> None:
    plain, model = BASE.build(3), LoRAConfig(BASE, rank=3).build(3)
    randomise(plain)
    state = model.state_dict()
    for own, here in base_weights(state).items():
        state[here].copy_(plain.state_dict()[own])
    assert set(base_weights(state)) == set(plain.state_dict())
    assert torch.equal(model(*GIVEN), plain(*GIVEN))
    model(*GIVEN).square().mean().backward()
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * 2 * 2  # two blocks, qkv and proj, A and B
    for name, p in model.named_parameters():
        assert (p.grad is not None) == ("lora_" in name)
        if "lora_B" in name:
            assert p.grad is not None
            assert bool(p.grad.any())


def test_adapters_begin_as_a_function_of_the_seed_alone() -> None:
    before = torch.get_rng_state()
    one, same, other = (LoRAConfig(BASE, rank=3).build(seed).state_dict() for seed in (3, 3, 4))
    assert torch.equal(before, torch.get_rng_state())
    for name, value in one.items():
        assert torch.equal(value, same[name])
    a = [n for n in one if "lora_A" in n]
    assert all(not torch.equal(one[n], other[n]) and bool(one[n].any()) for n in a)
    assert not torch.equal(one[a[0]], one[a[2]])
    with torch.device("meta"):
        assert {p.device.type for p in LoRAConfig(BASE).build().parameters()} == {"meta"}


def test_merged_weights_do_what_adapters_did() -> None:
    config = LoRAConfig(BASE, rank=3, alpha=1.5)
    model = randomise(config.build())
    weights = merged(config, model.state_dict())
    plain = BASE.build()
    plain.load_state_dict(weights)
    assert_close(plain(*GIVEN), model(*GIVEN), rtol=1e-5, atol=1e-5)
    a, b = adapters(model.state_dict())["blocks.1.attn.proj"]
    assert (a.shape, b.shape) == ((3, 16), (16, 3))
    own = model.state_dict()["blocks.1.attn.proj.base_layer.weight"]
    assert_close(weights["blocks.1.attn.proj.weight"], own + 0.5 * b @ a)
    assert not torch.equal(weights["blocks.1.attn.proj.weight"], own)


@pytest.mark.parametrize("base", [BASE, DDiTConfig(length=6, vocab=9, hidden_size=16, depth=1, num_heads=2)])
def test_a_network_with_adapters_is_a_model_as_any_other(base: JiTConfig | DDiTConfig) -> None:
    config = LoRAConfig(base, rank=2)
    assert from_json(to_json(config), "here") == config
    assert (config.shape, config.length, config.vocab) == (base.shape, base.length, base.vocab)
    fitted = config.fitted(base.shape, 7, base.vocab)
    assert fitted.num_classes == 7
    assert fitted.base == base.fitted(base.shape, 7, base.vocab)
    assert cost(config).trainable < cost(base).trainable


def test_adapters_of_nothing_are_refused() -> None:
    with pytest.raises(DitkitError, match=r"no Linear of the model is called 'quv'.*qkv"):
        LoRAConfig(BASE, targets=("quv",)).build()
    with pytest.raises(DitkitError, match="has adapters already"):
        LoRAConfig(LoRAConfig(BASE))
    with pytest.raises(DitkitError, match="rank is at least 1"):
        LoRAConfig(BASE, rank=0)
    with pytest.raises(DitkitError, match="no Linear"):
        LoRAConfig(MLPConfig()).build()


def _weights(run: Path, group: str = "model") -> dict[str, Tensor]:
    checkpoint = Run(run).newest()
    assert checkpoint is not None
    return checkpoint.tensors(group)


def test_a_run_is_fine_tuned_sampled_exported_and_begun_from(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    base, tuned, again = tmp_path / "base", tmp_path / "tuned", tmp_path / "again"
    command = f"train digits {TINY} --train.emas 0.5 --train.steps".split()
    assert main([*command, "2", "--out", str(base)]) == 0
    assert main([*command, "0", "--out", str(tuned), "--init", str(base), "--lora", "2"]) != 0  # no step at all
    assert main([*command, "3", "--out", str(tuned), "--init", str(base), "--lora", "2"]) == 0
    assert "loaded:" in capsys.readouterr().err
    before, after = _weights(base, "ema-0.5"), _weights(tuned)
    for own, here in base_weights(after).items():
        assert torch.equal(before[own], after[here])  # the average that sampling used is what the adapters lie beside
    changed = [bool(b.any()) for _, b in adapters(after).values()]
    assert changed == [True] * 4
    # gone on with
    assert main(["train", str(tuned), "--train.steps", "4", "--quiet"]) == 0
    pipeline = load(tuned)
    drawn = pipeline.sample(count=3, steps=3, seed=5)
    exported = tmp_path / "tuned.safetensors"
    assert main(["export", str(tuned), "--format", "official", "--out", str(exported)]) == 0
    assert main(["import", str(exported), "--out", str(tmp_path / "imported"), "--model.in-context-start", "1"]) == 0
    merged_run = load(tmp_path / "imported")
    assert isinstance(merged_run.recipe.model, JiTConfig)
    config = pipeline.recipe.model
    assert isinstance(config, LoRAConfig)
    weights = merged(config, _weights(tuned, "ema-0.5"))
    for name, value in merged_run.model.state_dict().items():
        assert_close(value, weights[name], rtol=1e-6, atol=1e-7)
    assert drawn.shape == (3, 1, 8, 8)
    # begun from: merged, with and without new adapters
    assert main([*command, "1", "--out", str(again), "--init", str(tuned), "--lora", "3", "--lora-targets", "qkv"]) == 0
    assert sorted(adapters(_weights(again))) == ["blocks.0.attn.qkv", "blocks.1.attn.qkv"]
    for own, here in base_weights(_weights(again)).items():
        assert_close(_weights(again)[here], weights[own], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--lora 2", "give the weights with --init"),
        ("--lora-targets qkv", "needs --lora RANK"),
        ("--lora 0 --init nowhere", "rank is at least 1"),
        ("--lora 2 --init nowhere", "there is no file nowhere"),
        ("--lora 2 --lora-targets w --init BASE", "no Linear of the model is called 'w'"),
    ],
)
def test_wrong_uses_are_said_in_one_line(
    words: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    out, base = tmp_path / "run", tmp_path / "base"
    command = ["train", "digits", *TINY.split(), "--out"]
    if "BASE" in words:
        assert main([*command, str(base), "--train.steps", "1"]) == 0
        capsys.readouterr()
    assert main([*command, str(out), *words.replace("BASE", str(base)).split()]) == 1
    error = capsys.readouterr().err.strip()
    assert message in error
    assert len(error.splitlines()) == 1
    assert not out.exists()


def test_a_fitted_configuration_keeps_its_adapters() -> None:
    config = LoRAConfig(BASE, rank=5, targets=("qkv",))
    assert replace(config.fitted((3, 16, 16), 2, 0), base=BASE) == config


def test_adapters_alone_are_exported_under_published_names(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    base, tuned, out = tmp_path / "base", tmp_path / "tuned", tmp_path / "adapters.safetensors"
    command = f"train digits {TINY} --train.emas 0.5 --train.steps 1".split()
    assert main([*command, "--out", str(base)]) == 0
    assert main([*command, "--out", str(tuned), "--init", str(base), "--lora", "2"]) == 0
    assert main(["export", str(tuned), "--format", "lora", "--ema", "0", "--out", str(out)]) == 0
    found, own = load_file(out), adapters(_weights(tuned))
    assert sorted(found) == sorted(f"transformer.{name}.lora_{end}.weight" for name in own for end in "AB")
    for name, (a, b) in own.items():
        assert torch.equal(found[f"transformer.{name}.lora_A.weight"], a)
        assert torch.equal(found[f"transformer.{name}.lora_B.weight"], b)
    capsys.readouterr()
    for run, where, said in (
        (base, tmp_path / "no.safetensors", "has no adapters"),
        (tuned, tmp_path / "no.pt", "written as a .safetensors file"),
        (tuned, out, "exists already"),
    ):
        assert main(["export", str(run), "--format", "lora", "--out", str(where)]) == 1
        assert said in capsys.readouterr().err
