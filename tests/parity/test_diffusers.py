"""Against diffusers' own classes: the same weights through our table of names give the same numbers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.embeddings import get_timestep_embedding
from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel
from diffusers.pipelines.dit.pipeline_dit import DiTPipeline
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor
from torch.testing import assert_close

from ditkit.codecs import Autoencoder
from ditkit.conditioners import Label
from ditkit.conditioning import Conditioning
from ditkit.config import DitkitError, to_json
from ditkit.diffusion import CFG, DDIM, DDPM, Meaning, guide, integrate
from ditkit.diffusion.grid import Leading
from ditkit.exporting import export_run
from ditkit.importing import import_file
from ditkit.interop import DIFFUSERS, FORMATS, read
from ditkit.layers.embeddings import sinusoid
from ditkit.models import DiT, DiTConfig
from ditkit.pipeline import load
from ditkit.recipe import Recipe, Sample, Train
from ditkit.rng import Replay, Rng
from ditkit.runs import Run

from ..conftest import randomised, tiny_autoencoder


@pytest.mark.parametrize("shift", [0, 1])
def test_frequencies_of_time_are_those_of_diffusers(shift: int) -> None:
    t = torch.tensor([0.0, 1.0, 499.0, 999.0])
    theirs = get_timestep_embedding(t, 256, flip_sin_to_cos=True, downscale_freq_shift=shift)
    assert_close(sinusoid(t, 256, shift), theirs, rtol=0, atol=1e-4)  # angles up to 999 in float32
    assert (sinusoid(t, 256, 1 - shift) - theirs).abs().max() > 0.1


def test_the_two_constants_reach_the_network_and_nothing_else() -> None:
    def built(**options: Any) -> tuple[int, set[float], set[float]]:
        model: Any = DiTConfig(input_size=4, hidden_size=16, depth=2, num_heads=2, num_classes=3, **options).build()
        blocks = list(model.blocks)
        return (
            model.t_embedder.shift,
            {b.norm1.eps for b in blocks} | {model.final_layer.norm_final.eps},
            {b.norm2.eps for b in blocks},
        )

    assert built() == (0, {1e-6}, {1e-6})
    assert built(frequency_shift=1, mlp_norm_eps=1e-5) == (1, {1e-6}, {1e-5})
    with pytest.raises(DitkitError, match="frequency_shift is 0 or 1"):
        DiTConfig(frequency_shift=2)
    with pytest.raises(DitkitError, match="mlp_norm_eps must be above 0"):
        DiTConfig(mlp_norm_eps=0.0)


def options(heads: int, head: int, depth: int, size: int, patch: int, out: int) -> dict[str, int]:
    return {
        "num_attention_heads": heads,
        "attention_head_dim": head,
        "num_layers": depth,
        "sample_size": size,
        "patch_size": patch,
        "out_channels": out,
    }


SHAPES = [options(2, 8, 2, 8, 2, 8), options(3, 4, 1, 4, 1, 8), options(1, 16, 3, 16, 4, 4)]


def theirs(seed: int = 0, **options: Any) -> Any:
    """diffusers' network with random weights, the embedders of all blocks equal."""
    model: Any = DiTTransformer2DModel(in_channels=4, num_embeds_ada_norm=10, **options)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.08 * torch.randn(parameter.shape, generator=generator))
        first = model.transformer_blocks[0].norm1.emb.state_dict()
        for block in model.transformer_blocks:
            block.norm1.emb.load_state_dict(first)
    return model.eval()


def ours(folder: Path) -> DiT:
    found = read(folder, FORMATS)
    assert found.format is DIFFUSERS
    model = found.config.build()
    model.load_state_dict(found.weights)
    assert isinstance(model, DiT)
    return model.eval()


@pytest.mark.parametrize("sizes", SHAPES, ids=lambda o: f"patch{o['patch_size']}")
def test_the_network_is_that_of_diffusers_with_its_two_constants(sizes: dict, tmp_path: Path) -> None:
    reference = theirs(**sizes)
    reference.save_pretrained(tmp_path)
    model = ours(tmp_path)
    assert (model.config.frequency_shift, model.config.mlp_norm_eps) == (1, 1e-5)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(3, 4, sizes["sample_size"], sizes["sample_size"], generator=generator)
    t, y = torch.tensor([0, 500, 999]), torch.tensor([1, 9, 10])
    x.requires_grad_()
    there = reference(x, t, y).sample
    weight = torch.randn(there.shape, generator=generator)
    (x_there,) = torch.autograd.grad((there * weight).sum(), x, retain_graph=True)
    (there * weight).sum().backward()
    x.grad = None
    here = model(x, t.float(), Conditioning(label=y))
    assert_close(here, there, rtol=1e-5, atol=1e-5)
    (here * weight).sum().backward()
    assert x.grad is not None
    assert_close(x.grad, x_there, rtol=1e-5, atol=1e-5)
    # gradients of weights: the table carries gradients as it carries weights; those of copies add up
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    given = {name: p.grad for name, p in reference.named_parameters()}
    for pair in DIFFUSERS.pairs(model):
        parts = [given[name] for name in pair.theirs]
        if pair.how == "computed":
            continue
        whole = torch.cat(parts) if pair.how == "fused" else torch.stack(parts).sum(0)
        assert_close(gradients[pair.ours], whole, rtol=1e-4, atol=1e-4 * float(whole.abs().max()), msg=pair.ours)
    # and each constant is needed
    for change in ({"frequency_shift": 0}, {"mlp_norm_eps": 1e-2}):
        other = replace(model.config, **change).build()
        other.load_state_dict(model.state_dict())
        assert (other.eval()(x, t.float(), Conditioning(label=y)) - there).abs().max() > 1e-4, change


def test_sharded_folders_are_the_same(tmp_path: Path) -> None:
    reference = theirs(**SHAPES[0])
    reference.save_pretrained(tmp_path / "whole")
    reference.save_pretrained(tmp_path / "parts", max_shard_size="20KB")
    assert len(list((tmp_path / "parts").glob("*.safetensors"))) > 2
    whole, parts = ours(tmp_path / "whole"), ours(tmp_path / "parts")
    for name, value in whole.state_dict().items():
        assert torch.equal(parts.state_dict()[name], value), name


def test_embedders_that_differ_between_blocks_are_refused(tmp_path: Path) -> None:
    reference = theirs(**SHAPES[0])
    with torch.no_grad():
        reference.transformer_blocks[1].norm1.emb.timestep_embedder.linear_2.bias[3] += 1e-6
    reference.save_pretrained(tmp_path)
    with pytest.raises(
        DitkitError, match=r"transformer_blocks\.1\.\S+linear_2\.bias differs from transformer_blocks\.0"
    ):
        read(tmp_path, FORMATS)


def tiny_run(folder: Path, vae: Path, *, classes: int = 1000, scale: float = 0.7, **options: Any) -> Recipe:
    """A run with random weights, in both the weights and an average."""
    config = DiTConfig(
        input_size=8, hidden_size=16, depth=2, num_heads=2, num_classes=classes, frequency_shift=1, mlp_norm_eps=1e-5
    )
    config = replace(config, **options)
    recipe = Recipe(
        codec=Autoencoder(str(vae), scale=scale, factor=2),
        conditioner=Label(tuple(f"thing {i}" for i in range(classes))),
        model=config,
        denoiser=Meaning(DDPM(), "eps", "index"),
        train=Train(emas=(0.9,)),
        sample=Sample(steps=5, solver=DDIM(), grid=Leading(), guidance=2.0),
    )
    run = Run(folder)
    groups = {"model": randomised(config, 1).state_dict(), "ema-0.9": randomised(config, 2).state_dict()}
    run.save(0, to_json(recipe), groups, {"log": {"sums": {}, "count": 0, "seconds": 0.0}, "data": None})
    run.begin(recipe)
    return recipe


@pytest.fixture(scope="module")
def vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_autoencoder(tmp_path_factory.mktemp("vae"))


def drawn(folder: Path, labels: list[int], steps: int, guidance: float) -> Tensor:
    """Images of diffusers' pipeline, [b 3 h w] in 0..1."""
    pipe: Any = DiTPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    out = pipe(
        labels,
        guidance_scale=guidance,
        generator=torch.Generator().manual_seed(7),
        num_inference_steps=steps,
        output_type="np",
    )
    return torch.from_numpy(out.images).permute(0, 3, 1, 2)


@pytest.mark.parametrize(
    ("steps", "guidance", "options"),
    [
        (5, 2.0, {}),
        (7, 3.0, {"learn_sigma": False}),  # 7 does not divide 1000: the grid is "leading", not an even respacing
        (4, 1.0, {"patch_size": 4, "classes": 12}),
    ],
)
@torch.no_grad()
def test_diffusers_pipeline_runs_an_exported_run_and_draws_the_same_images(
    steps: int, guidance: float, options: dict, vae: Path, tmp_path: Path
) -> None:
    recipe = tiny_run(tmp_path / "run", vae, **options)
    lines = export_run(tmp_path / "run", "diffusers", tmp_path / "there")
    assert ("rows more" in "".join(lines)) == ("classes" in options)
    labels = [1, 5, 0]
    images = drawn(tmp_path / "there", labels, steps, guidance)

    pipeline = load(tmp_path / "run", device="cpu")
    x = randn_tensor((3, *pipeline.shape), generator=torch.Generator().manual_seed(7))
    cond = recipe.conditioner.null(3)
    guides = [CFG(guidance, cond)] if guidance != 1 else []
    times = Leading()(steps, recipe.denoiser.path, 0)
    given = Conditioning(label=torch.tensor(labels))
    latents = integrate(guide(pipeline.denoiser, *guides), DDIM(), times, x, given, Replay({}))
    mine = recipe.codec.model().decode(latents / recipe.codec.scale).sample / 2 + 0.5
    assert images.std() > 0.05
    assert_close(mine.clamp(0, 1), images, rtol=0, atol=1e-3)
    bytes_ = recipe.codec.decode(latents)
    assert (bytes_.float() - images * 255).abs().max() <= 0.5 + 0.255
    # another label, scale or grid is seen
    assert (drawn(tmp_path / "there", [2, 5, 0], steps, guidance)[0] - images[0]).abs().max() > 1e-3


def test_an_exported_run_comes_back_with_the_same_tensors(vae: Path, tmp_path: Path) -> None:
    recipe = tiny_run(tmp_path / "run", vae)
    export_run(tmp_path / "run", "diffusers", tmp_path / "there", ema=0)
    run, lines = import_file(tmp_path / "there", tmp_path / "back")
    assert "DiT in diffusers" in lines[0]
    back = run.newest()
    first = Run(tmp_path / "run").newest()
    assert back is not None
    assert first is not None
    assert back.recipe.model == recipe.model
    assert back.recipe.denoiser == recipe.denoiser
    assert back.recipe.conditioner.classes == recipe.conditioner.classes
    codec = back.recipe.codec
    assert (codec.scale, codec.shift, codec.channels, codec.factor) == (0.7, 0.0, 4, 2)
    weights = first.tensors("model")
    for name, value in back.tensors("model").items():
        if name != "pos_embed":
            assert torch.equal(value, weights[name]), name
    images = load(tmp_path / "back", device="cpu").sample(count=2, steps=2, label=3)
    assert images.shape == (2, 3, 16, 16)


@pytest.mark.parametrize(
    ("options", "change", "says"),
    [
        ({"classes": 1001}, {}, "null label 1000 built in"),
        ({"classes": 0}, {}, "null label 1000 built in"),
        ({"frequency_shift": 0}, {}, "--approximate"),
        ({"input_size": (8, 4)}, {}, "squares only, not 8 x 4"),
        ({"mlp_ratio": 2.0}, {}, "mlp_ratio of 4, not 2"),
        ({"conditioning": "adaln"}, {}, "adaLN-Zero alone"),
        ({}, {"denoiser": Meaning(prediction="-velocity", clock="1-t")}, "DDPM tables with eps, x0 or v"),
        ({}, {"denoiser": Meaning(DDPM(schedule="cosine"), "eps", "index")}, "no beta_schedule equal to our cosine"),
        ({}, {"codec": Autoencoder(shift=0.1)}, "does not know a shift"),
        ({}, {"codec": "pixels"}, "it works on pixels"),
        ({}, {"codec": Autoencoder("./nowhere")}, "no folder of diffusers"),
    ],
)
def test_what_diffusers_cannot_express_is_refused(
    options: dict, change: dict, says: str, vae: Path, tmp_path: Path
) -> None:
    recipe = tiny_run(tmp_path / "run", vae, **options)
    change = {key: Recipe().codec if value == "pixels" else value for key, value in change.items()}
    run = Run(tmp_path / "other")
    first = Run(tmp_path / "run").newest()
    assert first is not None
    changed = replace(recipe, **change)
    run.save(0, to_json(changed), {"ema-0.9": first.tensors("ema-0.9")}, {"log": {}})
    run.begin(changed)
    with pytest.raises(DitkitError, match=says) as caught:
        export_run(run.folder, "diffusers", tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".writing-*"))


@torch.no_grad()
def test_the_release_s_frequencies_are_exported_only_when_asked_and_the_difference_is_said(
    vae: Path, tmp_path: Path
) -> None:
    tiny_run(tmp_path / "run", vae, frequency_shift=0, mlp_norm_eps=1e-6)
    lines = export_run(tmp_path / "run", "diffusers", tmp_path / "out", approximate=True)
    assert "approximate" in lines[0]
    assert float(lines[0].split("by up to ")[1].split(",")[0]) > 1e-3
    transformer: Any = DiTTransformer2DModel.from_pretrained(tmp_path / "out" / "transformer")
    found = read(tmp_path / "out", FORMATS)
    assert (found.config.frequency_shift, found.config.mlp_norm_eps) == (1, 1e-6)
    model = found.config.build().eval()
    model.load_state_dict(found.weights)
    x, t, y = torch.randn(2, 4, 8, 8, generator=Rng(0).generator("x")), torch.tensor([3, 900]), torch.tensor([0, 1000])
    assert_close(model(x, t.float(), Conditioning(label=y)), transformer.eval()(x, t, y).sample, rtol=1e-5, atol=1e-5)
