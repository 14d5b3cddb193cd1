"""Lumina-Image 2.0 against diffusers' Lumina2Transformer2DModel."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.loaders.single_file_utils import convert_lumina2_to_diffusers
from diffusers.models.transformers.transformer_lumina2 import Lumina2Transformer2DModel
from diffusers.pipelines.lumina2.pipeline_lumina2 import Lumina2Pipeline
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from safetensors.torch import save_file
from torch.testing import assert_close

from ditkit.conditioning import Conditioning
from ditkit.config import DitkitError
from ditkit.diffusion import CFG, Euler, Meaning, guide, integrate
from ditkit.diffusion.grid import SD3
from ditkit.interop import FORMATS, LUMINA2, LUMINA2_OFFICIAL, lumina2_settings, read, save
from ditkit.interop.table import their_shapes
from ditkit.models import Lumina2, Lumina2Config
from ditkit.rng import Rng

from .carried import captions, compare_gradients, random_weights

TINY: dict[str, Any] = {
    "sample_size": 8, "patch_size": 2, "in_channels": 4, "hidden_size": 48, "num_layers": 3, "num_refiner_layers": 1,
    "num_attention_heads": 4, "num_kv_heads": 2, "multiple_of": 16, "axes_dim_rope": (4, 4, 4),
    "axes_lens": (64, 32, 32), "cap_feat_dim": 12,
}  # fmt: skip
SHAPES: list[dict[str, Any]] = [
    {},
    {"in_channels": 3, "hidden_size": 72, "num_attention_heads": 6, "num_refiner_layers": 2, "ffn_dim_multiplier": 0.7},
    {"hidden_size": 24, "num_attention_heads": 1, "num_kv_heads": 1, "axes_dim_rope": (8, 8, 8), "norm_eps": 1e-3},
]


def theirs(**changes: Any) -> Any:
    model = Lumina2Transformer2DModel(**{**TINY, **changes})
    return random_weights(model, time="timestep_embedder", modulation="linear_1.")


def ours(reference: Any, folder: Path) -> Lumina2:
    reference.save_pretrained(folder)
    found = read(folder, FORMATS)
    assert found.format is LUMINA2
    assert found.denoiser == Meaning(prediction="-velocity", clock="1-t")
    model = found.config.build()
    model.load_state_dict(found.weights)
    return model.eval()


@pytest.mark.parametrize("changes", SHAPES, ids=["grouped heads", "three to one", "one head"])
def test_the_network_is_that_of_diffusers(changes: dict[str, Any], tmp_path: Path) -> None:
    reference = theirs(**changes)
    model = ours(reference, tmp_path)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(4, model.config.in_channels, 8, 12, generator=generator, requires_grad=True)
    text = captions([torch.randn(n, 12, generator=generator) for n in (5, 1, 23, 40)], 40)
    t = torch.tensor([0.0, 0.3, 0.77, 1.0])
    there = reference(x, t, text.values, text.mask, return_dict=False)[0]
    weight = torch.randn(there.shape, generator=generator)
    (x_there,) = torch.autograd.grad((there * weight).sum(), x, retain_graph=True)
    (there * weight).sum().backward()
    x.grad = None
    here = model(x, t, Conditioning(text=text))
    assert_close(here, there, rtol=1e-5, atol=1e-5)
    (here * weight).sum().backward()
    assert x.grad is not None
    assert_close(x.grad, x_there, rtol=1e-4, atol=1e-5 * float(x_there.abs().max()))
    compare_gradients(LUMINA2, model, reference)


def test_diffusers_own_pipeline_draws_what_we_draw(tmp_path: Path) -> None:
    """From an exported folder, with guidance and captions of mixed lengths; a static shift, for the pipeline takes the
    number of channels for that of tokens where its shift is dynamic."""
    config = Lumina2Config(
        input_size=8, in_channels=4, hidden_size=48, depth=2, refiner_depth=1, num_heads=4, kv_heads=2, mlp_hidden=80,
        axes=(4, 4, 4), text_dim=12,
    )  # fmt: skip
    model: Any = random_weights(config.build())
    meaning = Meaning(prediction="-velocity", clock="1-t")
    save(LUMINA2, model, meaning, tmp_path / "transformer")
    pipe: Any = Lumina2Pipeline(
        transformer=Lumina2Transformer2DModel.from_pretrained(tmp_path / "transformer"),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=2.0),
        vae=None,  # type: ignore[arg-type]
        text_encoder=None,  # type: ignore[arg-type]
        tokenizer=None,  # type: ignore[arg-type]
    )
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(5)
    noise = torch.randn(2, 4, 8, 12, generator=generator)
    text, other = (
        captions([torch.randn(n, 12, generator=generator) for n in lengths], 40) for lengths in ([5, 40], [1, 22])
    )
    there = pipe(
        height=64, width=96, num_inference_steps=6, guidance_scale=3.0, latents=noise.clone(), cfg_normalization=False,
        prompt_embeds=text.values, prompt_attention_mask=text.mask, negative_prompt_embeds=other.values,
        negative_prompt_attention_mask=other.mask, output_type="latent",
    ).images  # fmt: skip
    guided = guide(meaning.of(model), CFG(3.0, Conditioning(text=other)))
    times, rng = SD3(2.0)(6, meaning.path, 24), Rng(0, sample_ids=torch.arange(2))
    with torch.no_grad():
        here = integrate(guided, Euler(), times, noise, Conditioning(text=text), rng)
    assert_close(here, there, rtol=1e-4, atol=1e-4)


def test_the_folder_and_its_settings_come_back(tmp_path: Path) -> None:
    for changes in SHAPES:
        reference = theirs(**changes)
        model = ours(reference, tmp_path / str(changes.get("hidden_size")))
        official = reference.state_dict()
        written = LUMINA2.write(model, model.state_dict())
        assert written.keys() == official.keys()
        assert all(torch.equal(written[name], official[name]) for name in official)
        again: Any = Lumina2Transformer2DModel.from_config(lumina2_settings(model.config))
        again.load_state_dict(written)


def test_the_authors_file_is_read_as_diffusers_converts_it(tmp_path: Path) -> None:
    """At the width of the release, which diffusers' converter has built in (2304 and 768 rows of q and k)."""
    config = Lumina2Config(depth=1, refiner_depth=1, mlp_hidden=16, text_dim=8)
    with torch.device("meta"):
        model = config.build()
    model.to_empty(device="cpu")
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            p.fill_(i + 1)  # each tensor has its own number, and its rows are counted
            p.view(len(p), -1)[:, 0] += torch.arange(len(p)) / len(p)
    file = LUMINA2_OFFICIAL.write(model, model.state_dict())
    beside = {**file, "model.diffusion_model.norm_final.weight": torch.ones(2304)}
    save_file(beside, tmp_path / "lumina.safetensors")
    converted = convert_lumina2_to_diffusers({k.removeprefix("model.diffusion_model."): v for k, v in beside.items()})
    written = LUMINA2.write(model, model.state_dict())
    assert converted.keys() == written.keys()
    assert all(torch.equal(converted[name], written[name]) for name in written)

    with pytest.raises(DitkitError, match=r"give --model\.axes"):
        read(tmp_path / "lumina.safetensors", FORMATS)
    found = read(tmp_path / "lumina.safetensors", FORMATS, options={"axes": (32, 32, 32)})
    assert found.format is LUMINA2_OFFICIAL
    assert found.config == config
    assert all(torch.equal(found.weights[name], value) for name, value in model.state_dict().items())


def test_the_published_size_is_recognised_with_its_axes() -> None:
    """459 tensors, 2.61 billion numbers."""
    with torch.device("meta"):
        reference: Any = Lumina2Transformer2DModel(cap_feat_dim=2304)
        model = Lumina2Config().build()
    ours = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    names = {name: tuple(value.shape) for name, value in reference.state_dict().items()}
    assert len(names) == 459
    source: Any = type("Source", (), {"settings": lambda self: {}})()
    for form in (LUMINA2, LUMINA2_OFFICIAL):
        found = their_shapes(form.pairs(model), ours)
        assert form is LUMINA2_OFFICIAL or found == names
        assert form.config(source, found, {}) == Lumina2Config()


def test_what_the_layout_cannot_say_is_refused() -> None:
    meaning = Meaning(prediction="-velocity", clock="1-t")
    assert LUMINA2.refusal(Lumina2Config(), meaning) is None
    assert "trained as velocity" in (LUMINA2.refusal(Lumina2Config(), Meaning()) or "")
    assert "patches of 2 x 2" in (LUMINA2.refusal(Lumina2Config(patch_size=4), meaning) or "")
