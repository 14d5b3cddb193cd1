"""Adapters under diffusers' names: what diffusers does with ours, and we with theirs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.testing import assert_close

from ditkit.config import DitkitError
from ditkit.interop import DIFFUSERS_SD3, FORMATS, SD3, read, read_adapters, write_adapters
from ditkit.models import LoRAConfig

from ..conftest import randomise
from .carried import random_parameters
from .test_mmdit import SHAPES, TINY, called, drawn


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    model, folder = random_parameters(SD3Transformer2DModel(**TINY)), tmp_path_factory.mktemp("sd3")
    model.save_pretrained(folder)
    return model, folder


def loaded(config: LoRAConfig, base: dict[str, Tensor], own: dict[str, Tensor]) -> Any:
    """Our network with these weights and adapters."""
    model = config.build()
    state = {
        name: own.get(name, value) if "lora_" in name else base[name.replace(".base_layer.", ".")]
        for name, value in model.state_dict().items()
    }
    model.load_state_dict(state)
    return model.eval()


def test_diffusers_does_with_our_adapters_what_we_do(theirs: tuple[Any, Path], tmp_path: Path) -> None:
    _, folder = theirs
    found = read(folder, FORMATS)
    config = LoRAConfig(found.config, rank=3, alpha=1.5, targets=("qkv", "q", "k", "v", "proj", "fc1"))
    drawn_once = randomise(config.build())
    ours = loaded(config, dict(found.weights), dict(drawn_once.state_dict()))
    tensors = write_adapters(DIFFUSERS_SD3, config, ours.state_dict())
    save_file(tensors, tmp_path / "pytorch_lora_weights.safetensors")
    model = SD3Transformer2DModel.from_pretrained(folder)
    assert isinstance(model, SD3Transformer2DModel)
    plain = SD3Transformer2DModel.from_pretrained(folder)
    model.load_lora_adapter(load_file(tmp_path / "pytorch_lora_weights.safetensors"), prefix="transformer")
    for shape in SHAPES:
        given = drawn(found.config, shape)
        with torch.no_grad():
            out = called(model.eval(), *given)
            assert_close(ours(*given), out, rtol=1e-4, atol=1e-4)
            assert float((called(plain, *given) - out).abs().max()) > 0.01  # type: ignore[arg-type]


def test_we_do_with_diffusers_adapters_what_it_does(theirs: tuple[Any, Path]) -> None:
    """q, k and v have an A of their own there, and one place with us."""
    _, folder = theirs
    found = read(folder, FORMATS)
    model = SD3Transformer2DModel.from_pretrained(folder)
    assert isinstance(model, SD3Transformer2DModel)
    model.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_k", "add_v_proj", "to_out.0"]))
    random_parameters(model)
    base = {n.replace(".base_layer.", "."): p for n, p in model.state_dict().items() if "lora_" not in n}
    own = {f"transformer.{n}": p for n, p in get_peft_model_state_dict(model, adapter_name="default").items()}
    config, adapters = read_adapters(DIFFUSERS_SD3, found.config, own)
    assert config.rank == 4  # of q and k side by side
    fresh = SD3Transformer2DModel(**TINY)
    fresh.load_state_dict(base)
    fresh.save_pretrained(folder.parent / "base")
    weights = read(folder.parent / "base", FORMATS).weights
    ours = loaded(config, dict(weights), adapters)
    given = drawn(found.config, SHAPES[0])
    with torch.no_grad():
        assert_close(ours(*given), called(model.eval(), *given), rtol=1e-4, atol=1e-4)


def test_adapters_go_out_and_come_back(theirs: tuple[Any, Path]) -> None:
    found = read(theirs[1], FORMATS)
    config = LoRAConfig(found.config, rank=2, alpha=2.0, targets=("proj",))
    model = randomise(config.build())
    back, tensors = read_adapters(
        DIFFUSERS_SD3, found.config, write_adapters(DIFFUSERS_SD3, config, model.state_dict())
    )
    assert back == config
    for name, value in tensors.items():
        assert torch.equal(value, model.state_dict()[name])
    same, again = read_adapters(SD3, found.config, write_adapters(SD3, config, model.state_dict()))
    assert same == config
    assert set(again) == set(tensors)


def test_what_is_no_adapter_of_this_network_is_refused(theirs: tuple[Any, Path]) -> None:
    config = read(theirs[1], FORMATS).config
    a, b = torch.zeros(2, 32), torch.zeros(32, 2)
    name, other = "transformer.transformer_blocks.0.attn.to_q", "transformer.nothing"
    for tensors, said in (
        ({f"{name}.lora_A.weight": a}, "has no lora_B"),
        ({f"{name}.alpha": a}, "is no adapter of low rank"),
        (
            {f"{other}.lora_A.weight": a, f"{other}.lora_B.weight": b},
            "has no Linear called nothing",
        ),
        ({f"{name}.lora_A.weight": a[:, :3], f"{name}.lora_B.weight": b}, "takes 32 and gives 32"),
    ):
        with pytest.raises(DitkitError, match=said):
            read_adapters(DIFFUSERS_SD3, config, tensors)
