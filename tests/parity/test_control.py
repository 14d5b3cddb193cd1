"""Z-Image's Union ControlNets against diffusers' ZImageControlNetModel with its base, in all four versions."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.loaders.single_file_utils import infer_diffusers_model_type
from diffusers.models.controlnets.controlnet_z_image import ZImageControlNetModel
from diffusers.models.transformers.transformer_z_image import ZImageTransformer2DModel
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.testing import assert_close

from ditkit.conditioning import Conditioning
from ditkit.config import DitkitError
from ditkit.importing import import_file
from ditkit.interop import FORMATS, Z_IMAGE, Z_IMAGE_CONTROL, read, z_image_control_settings
from ditkit.interop.table import their_shapes
from ditkit.models import Control, ControlConfig, ZImageConfig, create_model, model_config

from .carried import captions, compare_gradients, random_weights
from .test_zimage import TINY

DOUBLE = {"control_refiner_layers_places": [0, 1], "add_control_noise_refiner": "control_layers"}
HINTS = {"control_refiner_layers_places": [0, 1], "add_control_noise_refiner": "control_noise_refiner"}
# what differs between the versions, at a base of four blocks
VERSIONS: dict[str, dict[str, Any]] = {
    "1": {"control_layers_places": [0, 2], "control_in_dim": 4},
    "2_0": {"control_layers_places": [0, 1, 2, 3], "control_in_dim": 9, **DOUBLE},
    "2_1": {"control_layers_places": [0, 1, 2, 3], "control_in_dim": 9, **HINTS},
    "2_1_lite": {"control_layers_places": [0, 2], "control_in_dim": 9, **HINTS},
}
PUBLISHED: dict[str, tuple[dict[str, Any], int]] = {
    "1": ({"control_layers_places": [0, 5, 10, 15, 20, 25], "control_in_dim": 16}, 1_550_778_368),
    "2_0": ({"control_layers_places": list(range(0, 30, 2)), "control_in_dim": 33, **DOUBLE}, 2_950_156_800),
    "2_1": ({"control_layers_places": list(range(0, 30, 2)), "control_in_dim": 33, **HINTS}, 3_356_225_792),
    "2_1_lite": ({"control_layers_places": [0, 10, 20], "control_in_dim": 33, **HINTS}, 1_008_308_480),
}
BASE = ZImageConfig(
    in_channels=4, hidden_size=32, depth=4, num_heads=2, axes=(4, 6, 6), text_dim=12, input_size=128, text_length=512
)


def theirs(version: str) -> tuple[Any, Any]:
    """diffusers' base and branch with random weights, no projection among them zero."""
    base = random_weights(ZImageTransformer2DModel(**TINY), 0)
    branch: Any = random_weights(
        ZImageControlNetModel(dim=32, n_refiner_layers=2, n_heads=2, n_kv_heads=2, **VERSIONS[version]), 1
    )
    return base, branch


def ours(base: Any, branch: Any, folder: Path, places: tuple[int, ...]) -> Control:
    """Both read through their tables. Places of another number of blocks than the published ones are the person's."""
    save_file(branch.state_dict(), folder / "branch.safetensors")
    base.save_pretrained(folder / "base")
    found_base = read(folder / "base", FORMATS)
    found = read(folder / "branch.safetensors", FORMATS, options={"base": BASE, "places": places})
    assert found.format is Z_IMAGE_CONTROL
    assert found.config.base == found_base.config == BASE
    model = found.config.build()
    model.base.load_state_dict(found_base.weights)
    missing, unexpected = model.load_state_dict(found.weights, strict=False)
    assert not unexpected
    assert all(name.startswith("base.") for name in missing)
    return model.eval()


class Joined(nn.Module):
    """diffusers' two networks as the authors' code joins them.

    The authors run one network: hints behind the refiners reach the base's main blocks. diffusers (0.42.1) runs the
    refiners once more in the base, without hints. `as_authors` gives the base the tokens that the branch has refined.
    """

    def __init__(self, base: Any, branch: Any, as_authors: bool = True):
        super().__init__()
        self.base, self.branch, self.as_authors = base, branch, as_authors

    def forward(self, x: list[Tensor], t: Tensor, text: list[Tensor], control: list[Tensor], scale: float) -> Tensor:
        refined: list[Tensor] = []

        def keep(block: nn.Module, args: Any) -> None:
            refined.append(args[1])  # the tokens of the base that the first copy begins with

        branch = ZImageControlNetModel.from_transformer(self.branch, self.base)
        branch.gradient_checkpointing = False
        handle = self.branch.control_layers[0].register_forward_pre_hook(keep)
        samples = branch(x, t, text, control, conditioning_scale=scale)
        handle.remove()

        def replaced(block: nn.Module, args: Any, out: Tensor) -> Tensor:
            return refined[-1][:, : out.shape[1]]

        hook = self.base.noise_refiner[-1].register_forward_hook(replaced) if self.as_authors else None
        out = self.base(x, t, text, controlnet_block_samples=samples, return_dict=False)[0]
        if hook is not None:
            hook.remove()
        return torch.stack(out)[:, :, 0]


SHAPES = [((8, 8), [5, 40, 33]), ((12, 8), [64, 32, 60]), ((4, 22), [1, 2, 42])]


@pytest.mark.parametrize("version", VERSIONS)
def test_the_branch_is_that_of_diffusers(version: str, tmp_path: Path) -> None:
    """Three sizes, captions of mixed lengths: outputs, and gradients of x, the control and all weights of both."""
    base, branch = theirs(version)
    joined = Joined(base, branch)
    model = ours(base, branch, tmp_path, tuple(VERSIONS[version]["control_layers_places"]))
    model.requires_grad_(True)
    generator = torch.Generator().manual_seed(2)
    t, channels = torch.tensor([0.1, 0.5, 0.9]), VERSIONS[version]["control_in_dim"]
    for size, lengths in SHAPES:
        x = torch.randn(3, 4, *size, generator=generator, requires_grad=True)
        control = torch.randn(3, channels, *size, generator=generator, requires_grad=True)
        texts = [torch.randn(n, 12, generator=generator) for n in lengths]
        there = joined(list(x[:, :, None]), t, texts, list(control[:, :, None]), 0.7)
        weight = torch.randn(there.shape, generator=generator)
        for module in (base, branch, model):
            module.zero_grad()
        (there * weight).sum().backward()
        assert x.grad is not None
        assert control.grad is not None
        expected = x.grad, control.grad
        x.grad = control.grad = None
        cond = Conditioning(text=captions(texts, 70), control=control, scalars={"control_scale": torch.full((3,), 0.7)})
        here = model(x, t, cond)
        assert_close(here, there, rtol=1e-5, atol=1e-5)
        (here * weight).sum().backward()
        for found, wanted in zip((x.grad, control.grad), expected, strict=True):
            assert found is not None
            assert_close(found, wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max()))
        for form, network, reference in ((Z_IMAGE, model.base, base), (Z_IMAGE_CONTROL, model, branch)):
            compare_gradients(form, network, reference)


@pytest.mark.parametrize("version", VERSIONS)
def test_diffusers_loses_the_hints_of_the_refiners(version: str, tmp_path: Path) -> None:
    """Version 1 has none, and is equal as it is; in the others the base of diffusers refines without them."""
    base, branch = theirs(version)
    model = ours(base, branch, tmp_path, tuple(VERSIONS[version]["control_layers_places"]))
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(1, 4, 8, 8, generator=generator)
    control = torch.randn(1, VERSIONS[version]["control_in_dim"], 8, 8, generator=generator)
    text, t = torch.randn(9, 12, generator=generator), torch.tensor([0.6])
    with torch.no_grad():
        there = Joined(base, branch, as_authors=False)(list(x[:, :, None]), t, [text], list(control[:, :, None]), 1.0)
        here = model(x, t, Conditioning(text=captions([text], 9), control=control))
    assert torch.allclose(here, there, rtol=1e-5, atol=1e-5) == (version == "1")


# files


@pytest.mark.parametrize("version", VERSIONS)
def test_the_version_is_recognised_and_the_file_comes_back(version: str, tmp_path: Path) -> None:
    base, branch = theirs(version)
    model = ours(base, branch, tmp_path, tuple(VERSIONS[version]["control_layers_places"]))
    official = branch.state_dict()
    written = Z_IMAGE_CONTROL.write(model, model.state_dict())
    assert written.keys() == official.keys()
    assert all(torch.equal(written[name], official[name]) for name in official)
    again: Any = ZImageControlNetModel.from_config(z_image_control_settings(model.config))
    again.load_state_dict(written)
    options = {"base": BASE, "places": model.config.places}
    with pytest.raises(DitkitError, match="without its base: give that, too, with --base"):
        import_file(tmp_path / "branch.safetensors", tmp_path / "run", options=options)


def test_union_2_0_is_told_from_2_1_by_the_stack_that_it_never_used(tmp_path: Path) -> None:
    """The same names and shapes; in 2.0 the second stack is still as it began. diffusers decides by the same tensor."""
    _, branch = theirs("2_1")
    options = {"base": BASE, "places": (0, 1, 2, 3)}
    weights = dict(branch.state_dict())
    save_file(weights, tmp_path / "trained.safetensors")
    for name in weights:
        if name.startswith("control_noise_refiner.") and "_proj" in name:
            weights[name] = torch.zeros_like(weights[name])
    save_file(weights, tmp_path / "unused.safetensors")
    found = [read(tmp_path / f"{name}.safetensors", FORMATS, options=options) for name in ("trained", "unused")]
    assert [f.config.refiner for f in found] == ["hints", "double_pass"]
    assert any("refiner" in name for name in found[0].weights)
    assert not any("refiner" in name for name in found[1].weights)
    # diffusers' names of the two, for files with as many copies as the published ones
    marked = {**weights, "control_layers.14.adaLN_modulation.0.weight": torch.ones(1)}
    assert infer_diffusers_model_type(marked) == "z-image-turbo-controlnet-2.0"
    marked["control_noise_refiner.0.before_proj.weight"] = torch.ones(1)
    assert infer_diffusers_model_type(marked) == "z-image-turbo-controlnet-2.1"
    with pytest.raises(DitkitError, match=r"which blocks its copies are of: give --model\.places"):
        read(tmp_path / "trained.safetensors", FORMATS, options={"base": BASE})
    with pytest.raises(DitkitError, match="what its base is"):
        read(tmp_path / "trained.safetensors", FORMATS)
    with pytest.raises(DitkitError, match="a base of width 48"):
        read(tmp_path / "trained.safetensors", FORMATS, options={"base": replace(BASE, hidden_size=48, num_heads=3)})


@pytest.mark.parametrize("version", PUBLISHED)
def test_the_published_versions(version: str) -> None:
    """Names, shapes and counts of the branch, on meta; 16 or 33 channels and the places follow from shapes."""
    settings, count = PUBLISHED[version]
    with torch.device("meta"):
        model: Any = create_model(f"z_image_control_{version}")
        reference: Any = ZImageControlNetModel(**settings)
    assert sum(p.numel() for p in model.control.parameters()) == count
    names = {name: tuple(value.shape) for name, value in reference.state_dict().items()}
    table = Z_IMAGE_CONTROL.pairs(model)
    assert their_shapes(table, {name: tuple(v.shape) for name, v in model.state_dict().items()}) == names
    config: Any = model_config(f"z_image_control_{version}")
    source: Any = type("Source", (), {})()
    found: Any = Z_IMAGE_CONTROL.config(source, names, {"refiner": config.refiner})
    assert found == config
    said, own = dict(reference.config), z_image_control_settings(config)
    assert all(said[name] == value for name, value in own.items() if name in settings)


def test_what_the_layout_cannot_say_is_refused() -> None:
    meaning: Any = Z_IMAGE.denoiser(None, None)  # type: ignore[arg-type]
    config = ControlConfig()
    assert Z_IMAGE_CONTROL.refusal(config, meaning) is None
    assert "refiner none" in (Z_IMAGE_CONTROL.refusal(replace(config, refiner="none"), meaning) or "")
    dit: Any = model_config("dit_xl_2")
    other = ControlConfig(base=dit, refiner="none")
    assert "base is a Z-Image" in (Z_IMAGE_CONTROL.refusal(other, meaning) or "")
