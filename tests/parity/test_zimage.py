"""Z-Image against diffusers' ZImageTransformer2DModel, which has the names and equations of the authors' release."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.loaders.single_file_utils import convert_z_image_transformer_checkpoint_to_diffusers
from diffusers.models.transformers.transformer_z_image import ZImageTransformer2DModel
from diffusers.pipelines.z_image.pipeline_z_image import ZImagePipeline
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from safetensors.torch import save_file
from torch import Tensor
from torch.testing import assert_close

from ditkit.conditioning import Conditioning
from ditkit.config import DitkitError
from ditkit.diffusion import CFG, Euler, Meaning, guide, integrate
from ditkit.diffusion.grid import SD3
from ditkit.interop import FORMATS, Z_IMAGE, Z_IMAGE_COMFY, read, save, z_image_settings
from ditkit.interop.table import their_shapes
from ditkit.models import ZImage, ZImageConfig
from ditkit.rng import Rng

from .carried import captions, compare_gradients, random_weights

TINY: dict[str, Any] = {
    "in_channels": 4, "dim": 32, "n_layers": 4, "n_heads": 2, "n_kv_heads": 2, "cap_feat_dim": 12,
    "axes_dims": [4, 6, 6], "axes_lens": [256, 32, 32],
}  # fmt: skip
SHAPES: list[dict[str, Any]] = [
    {},
    {"in_channels": 3, "dim": 48, "n_heads": 3, "n_kv_heads": 3, "n_layers": 2, "n_refiner_layers": 1},
    {"dim": 24, "n_heads": 1, "n_kv_heads": 1, "axes_dims": [8, 8, 8], "rope_theta": 100.0, "norm_eps": 1e-3},
]


def theirs(seed: int = 0, **changes: Any) -> Any:
    """diffusers' network with random weights, its pads among them."""
    return random_weights(ZImageTransformer2DModel(**{**TINY, **changes}), seed)


def ours(reference: Any, folder: Path) -> ZImage:
    reference.save_pretrained(folder)
    found = read(folder, FORMATS)
    assert found.format is Z_IMAGE
    assert found.denoiser == Meaning(prediction="-velocity", clock="1-t")
    model = found.config.build()
    model.load_state_dict(found.weights)
    return model.eval()


@pytest.mark.parametrize("changes", SHAPES, ids=["tiny", "three heads", "one head"])
def test_the_network_is_that_of_diffusers(changes: dict[str, Any], tmp_path: Path) -> None:
    """Captions of one slot and of several, with and without pads; images with and without pads; all in one list."""
    reference = theirs(**changes)
    model = ours(reference, tmp_path)
    generator = torch.Generator().manual_seed(1)
    config = model.config
    sizes, lengths = [(8, 12), (8, 12), (8, 12), (16, 8)], [5, 40, 32, 64]
    x = [torch.randn(config.in_channels, 1, *size, generator=generator, requires_grad=True) for size in sizes]
    texts = [torch.randn(length, config.text_dim, generator=generator) for length in lengths]
    t = torch.tensor([0.0, 0.3, 0.77, 1.0])
    there = reference(x, t, texts, return_dict=False)[0]
    weights = [torch.randn(out.shape, generator=generator) for out in there]
    torch.stack([(out * w).sum() for out, w in zip(there, weights, strict=True)]).sum().backward()
    expected = [image.grad for image in x]
    for image in x:
        image.grad = None

    loss = torch.zeros(())
    for rows in ([0, 1, 2], [3]):
        cond = Conditioning(text=captions([texts[i] for i in rows], 67))
        here = model(torch.cat([x[i].transpose(0, 1) for i in rows]), t[rows], cond)
        for out, i in zip(here, rows, strict=True):
            assert_close(out, there[i][:, 0], rtol=1e-5, atol=1e-5)
            loss = loss + (out * weights[i][:, 0]).sum()
    loss.backward()
    for image, gradient in zip(x, expected, strict=True):
        assert_close(image.grad, gradient, rtol=1e-4, atol=1e-5)
    compare_gradients(Z_IMAGE, model, reference)


def straightened(reference: Any) -> Any:
    """diffusers 0.42.1 gives a segment that it pads more positions than slots, and so those of later segments to wrong
    tokens; the authors' code (as VideoX-Fun keeps it) has the pads of Omni's segments at the origin."""
    pad = reference._pad_with_ids

    def pad_with_ids(feat: Tensor, grid: Any, *args: Any) -> Any:
        return pad(feat, (len(feat), 1, 1) if grid[1:] == (1, 1) else grid, *args)

    reference._pad_with_ids = pad_with_ids
    return reference


def as_diffusers_reads(features: Tensor) -> Tensor:
    """Features [h w d] which diffusers, where [d h w] is read as [h w d], reads as these tokens."""
    h, w, d = features.shape
    return features.reshape(d, h, w).permute(1, 2, 0)


@pytest.mark.parametrize("vision", [True, False])
def test_references_are_those_of_omni(vision: bool, tmp_path: Path) -> None:
    """Two references, one caption more than images, features of the references; and captions that need many pads."""
    reference = straightened(theirs(siglip_feat_dim=10))
    model = ours(reference, tmp_path)
    assert model.config.vision_dim == 10
    generator = torch.Generator().manual_seed(2)
    lengths = [[3, 2, 40, 2], [33, 5, 9, 1]]
    references = torch.randn(2, 2, 4, 8, 12, generator=generator)
    x = torch.randn(2, 4, 12, 8, generator=generator, requires_grad=True)
    texts = [[torch.randn(n, 12, generator=generator) for n in row] for row in lengths]
    features = torch.randn(2, 2, 3, 5, 10, generator=generator)
    t = torch.tensor([0.2, 0.9])
    there = reference(
        [[*references[i, :, :, None], x[i, :, None]] for i in range(2)],
        t,
        texts,
        siglip_feats=[[*map(as_diffusers_reads, features[i]), None] if vision else None for i in range(2)],
        image_noise_mask=[[0, 0, 1]] * 2,
        return_dict=False,
    )[0]
    there = torch.stack(there)[:, :, 0]
    weight = torch.randn(there.shape, generator=generator)
    (x_there,) = torch.autograd.grad((there * weight).sum(), x, retain_graph=True)
    (there * weight).sum().backward()
    x.grad = None
    cond = Conditioning(
        text=captions([torch.cat(row) for row in texts], 60),
        references=references,
        vision=features if vision else None,
        scalars={"segments": torch.tensor(lengths, dtype=torch.float32)},
    )
    here = model(x, t, cond)
    assert_close(here, there, rtol=1e-5, atol=1e-5)
    (here * weight).sum().backward()
    assert x.grad is not None
    assert_close(x.grad, x_there, rtol=1e-4, atol=1e-5 * float(x_there.abs().max()))
    if vision:
        compare_gradients(Z_IMAGE, model, reference)


def test_without_references_an_omni_prompt_has_two_segments(tmp_path: Path) -> None:
    """The image stands behind the last token of the first one, not behind its pads: not the same as a plain prompt."""
    reference = straightened(theirs(siglip_feat_dim=10))
    model = ours(reference, tmp_path)
    generator = torch.Generator().manual_seed(3)
    x, t = torch.randn(1, 4, 8, 8, generator=generator), torch.tensor([0.4])
    text = torch.randn(9, 12, generator=generator)
    there = reference(
        [[x[0, :, None]]], t, [[text[:7], text[7:]]], siglip_feats=[None], image_noise_mask=[[1]], return_dict=False
    )[0]
    plain = Conditioning(text=captions([text], 9))
    cond = Conditioning(text=plain.text, scalars={"segments": torch.tensor([[7.0, 2.0]])})
    assert_close(model(x, t, cond), there[0][:, 0][None], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(model(x, t, cond), model(x, t, plain), atol=1e-4)


def test_full_segments_are_those_of_diffusers_as_it_is(tmp_path: Path) -> None:
    """Where no segment is padded diffusers has all positions right; where one is, its own numbers are others."""
    reference = theirs()
    model = ours(reference, tmp_path)
    generator = torch.Generator().manual_seed(4)
    x, clean = torch.randn(1, 4, 8, 8, generator=generator), torch.randn(1, 1, 4, 8, 8, generator=generator)
    t, text = torch.tensor([0.4]), torch.randn(128, 12, generator=generator)
    for lengths, same in (([32, 64, 32], True), ([33, 63, 32], False)):
        there = reference(
            [[clean[0, 0, :, None], x[0, :, None]]],
            t,
            [list(text.split(lengths))],
            siglip_feats=[None],
            image_noise_mask=[[0, 1]],
            return_dict=False,
        )[0]
        segments = torch.tensor([lengths], dtype=torch.float32)
        cond = Conditioning(text=captions([text], 128), references=clean, scalars={"segments": segments})
        assert torch.allclose(model(x, t, cond), there[0][:, 0][None], rtol=1e-5, atol=1e-5) == same


def test_diffusers_own_pipeline_draws_what_we_draw(tmp_path: Path) -> None:
    """From an exported folder: the published grid (shift 3), guidance pos + g (pos - neg), captions of mixed lengths.

    Given its noise levels, diffusers' scheduler shifts them once (#13243 is about those that it makes itself).
    """
    config = ZImageConfig(
        input_size=8, in_channels=4, hidden_size=32, depth=2, num_heads=2, axes=(4, 6, 6), text_dim=12
    )
    model: Any = random_weights(config.build())
    meaning = Meaning(prediction="-velocity", clock="1-t")
    save(Z_IMAGE, model, meaning, tmp_path / "transformer")
    pipe: Any = ZImagePipeline(
        transformer=ZImageTransformer2DModel.from_pretrained(tmp_path / "transformer"),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=None,  # type: ignore[arg-type]
        text_encoder=None,  # type: ignore[arg-type]
        tokenizer=None,  # type: ignore[arg-type]
    )
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(5)
    noise = torch.randn(2, 4, 8, 12, generator=generator)
    texts, others = ([torch.randn(n, 12, generator=generator) for n in lengths] for lengths in ([5, 40], [3, 33]))
    there = pipe(
        height=64, width=96, num_inference_steps=6, guidance_scale=2.0, latents=noise.clone(), prompt_embeds=texts,
        negative_prompt_embeds=others, output_type="latent",
    ).images  # fmt: skip
    cond, null = (Conditioning(text=captions(given, 45)) for given in (texts, others))
    guided = guide(meaning.of(model), CFG(3.0, null))
    with torch.no_grad():
        here = integrate(
            guided, Euler(), SD3(3.0)(6, meaning.path, 24), noise, cond, Rng(0, sample_ids=torch.arange(2))
        )
    assert_close(here, there, rtol=1e-4, atol=1e-4)


# files


def test_both_layouts_come_back_bit_for_bit(tmp_path: Path) -> None:
    """Folder, one file, diffusers' own converter of that file: the same tensors; and the folder's settings are ours."""
    reference = theirs()
    model = ours(reference, tmp_path / "folder")
    official = reference.state_dict()
    written = Z_IMAGE.write(model, model.state_dict())
    assert written.keys() == official.keys()
    assert all(torch.equal(written[name], official[name]) for name in official)

    comfy = Z_IMAGE_COMFY.write(model, model.state_dict())
    assert all(name.startswith("model.diffusion_model.") for name in comfy)
    assert comfy["model.diffusion_model.layers.3.attention.qkv.weight"].shape == (96, 32)
    beside = {**comfy, "model.diffusion_model.norm_final.weight": torch.ones(32)}
    save_file(beside, tmp_path / "z.safetensors")
    converted = convert_z_image_transformer_checkpoint_to_diffusers(dict(beside))
    assert converted.keys() == official.keys()
    assert all(torch.equal(converted[name], official[name]) for name in official)

    with pytest.raises(DitkitError, match=r"give --model\.axes"):
        read(tmp_path / "z.safetensors", FORMATS)
    found = read(tmp_path / "z.safetensors", FORMATS, options={"axes": (4, 6, 6)})
    assert found.format is Z_IMAGE_COMFY
    assert found.config == model.config
    assert all(torch.equal(found.weights[name], value) for name, value in model.state_dict().items())

    said = dict(reference.config)
    settings = z_image_settings(model.config)
    for name, value in settings.items():
        if not name.startswith("_") and name != "axes_lens":
            there = said[name]
            assert (list(there) if isinstance(there, tuple) else there) == value, name
    again: Any = ZImageTransformer2DModel.from_config(settings)
    again.load_state_dict(written)


def test_the_published_size_is_recognised_with_its_axes() -> None:
    """521 tensors, 6.155 billion numbers, as diffusers' default."""
    with torch.device("meta"):
        reference: Any = ZImageTransformer2DModel()
        model = ZImageConfig().build()
    table = Z_IMAGE.pairs(model)
    names = {name: tuple(value.shape) for name, value in reference.state_dict().items()}
    assert their_shapes(table, {k: tuple(v.shape) for k, v in model.state_dict().items()}) == names
    assert len(names) == 521
    assert sum(p.numel() for p in model.parameters()) == 6_154_908_736
    source: Any = type("Source", (), {"settings": lambda self: {}})()
    assert Z_IMAGE.config(source, names, {}) == ZImageConfig()


def test_what_the_layout_cannot_say_is_refused() -> None:
    meaning = Meaning(prediction="-velocity", clock="1-t")
    assert Z_IMAGE.refusal(ZImageConfig(), meaning) is None
    assert "trained as velocity" in (Z_IMAGE.refusal(ZImageConfig(), Meaning()) or "")
    assert "patches of 2 x 2" in (Z_IMAGE.refusal(ZImageConfig(patch_size=4), meaning) or "")
