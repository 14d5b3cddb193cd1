"""ditkit's own autoencoder: it begins as principal components, is trained by the one loop, and becomes a codec."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import dataclass, replace
from itertools import takewhile
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.testing import assert_close

from ditkit.codecs import Pca, TrainedAutoencoder, examples
from ditkit.conditioning import Conditioning
from ditkit.config import DitkitError, from_json, register, to_json
from ditkit.data import Batch, Dataset, Folder
from ditkit.diffusion import Autoencoding, Meaning, Reconstruction, Regression, VisionAlignment
from ditkit.diffusion.reconstruction import perceptual_distance, shifted
from ditkit.encoders import EfficientNet
from ditkit.evaluation import evaluate
from ditkit.evaluation.reconstruction import measure_reconstructions, psnr, squared_errors
from ditkit.layers import ResBlock, principal_components, project, unproject
from ditkit.models import Autoencoder, AutoencoderConfig, JiTConfig, Model
from ditkit.pipeline import Pipeline, load, open_run
from ditkit.recipe import Recipe, Train
from ditkit.recipes import find_recipe
from ditkit.reconstructions import Reconstructions
from ditkit.rng import Draw, Replay, Rng
from ditkit.runs import Run
from ditkit.training import Trainer, train

from .conftest import Command, randomise
from .test_cli import refused
from .test_training import assert_same, with_train

SMALL = AutoencoderConfig(
    input_size=16, factor=4, latent_channels=6, widths=(8, 12), encoder_depths=(1, 1), decoder_depths=(1, 1), groups=4
)
NOTHING = Conditioning()


@pytest.fixture
def own(pictures: Path) -> Recipe:
    """Pictures of 16 x 16 through f4c6, half of them held out, in six steps."""
    settings = Train(steps=6, batch=8, lr=1e-3, emas=(0.5,), log_every=2, sample_every=6, checkpoint_every=3)
    return replace(
        find_recipe(f"autoencoder:{pictures}"),
        data=Folder(str(pictures), resolution=16, holdout=0.5),
        model=SMALL,
        objective=Autoencoding(kl=1e-3, shift=2),
        train=settings,
    )


@pytest.fixture(scope="session")
def done(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of it."""
    folder = tmp_path_factory.mktemp("own") / "run"
    assert train(own.__wrapped__(pictures), folder, quiet=True)  # type: ignore[attr-defined]
    return folder


def random_autoencoder(config: AutoencoderConfig = SMALL) -> Autoencoder:
    model = randomise(config.build(), std=0.1)
    assert isinstance(model, Autoencoder)
    return model


def images(count: int = 4, side: int = 16, seed: int = 0) -> Tensor:
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(seed)) * 2 - 1


# ---------------------------------------------------------------------------------------------------------- components


def test_components_are_those_of_a_singular_value_decomposition() -> None:
    x = F.avg_pool2d(images(6, 18), 3, 1)
    found = principal_components([x[:2], x[2:]], 4, 5)
    rows = F.pixel_unshuffle(x, 4).movedim(1, 3).flatten(0, 2).double()
    _, values, vectors = torch.linalg.svd(rows - rows.mean(0), full_matrices=False)
    assert_close(found["mean"].flatten(), rows.mean(0).float())
    assert_close(found["std"], (values[:5] / len(rows) ** 0.5).float(), atol=1e-6, rtol=1e-5)
    cosines = (found["components"].flatten(1).double() * vectors[:5]).sum(1).abs()
    assert_close(cosines, torch.ones(5, dtype=torch.float64), atol=1e-6, rtol=0)
    z = project(x, **found)
    assert_close(z.mean((0, 2, 3)), torch.zeros(5), atol=1e-5, rtol=0)
    assert_close(z.std((0, 2, 3), correction=0), torch.ones(5), atol=1e-5, rtol=0)
    assert_close(project(unproject(z, **found), **found), z, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="there are none"):
        principal_components([], 4, 5)


def test_a_block_without_a_vector_has_no_weights_for_one_and_is_the_one_whose_vector_is_nothing() -> None:
    plain, given = ResBlock(8, 8, groups=4), ResBlock(8, 8, 3, groups=4)
    assert not [name for name, _ in plain.named_parameters() if "emb" in name]
    with torch.no_grad():
        for parameter in given.parameters():
            parameter.uniform_(-1, 1, generator=torch.Generator().manual_seed(1))
        for parameter in given.emb_layers.parameters():  # type: ignore[union-attr]
            parameter.zero_()
    plain.load_state_dict({k: v for k, v in given.state_dict().items() if "emb" not in k})
    x = images(2)[:, :1].expand(-1, 8, -1, -1)
    assert torch.equal(plain(x), given(x, torch.ones(2, 3)))


# ---------------------------------------------------------------------------------------------------------- the network


def test_before_the_first_step_it_is_the_principal_components_exactly(own: Recipe) -> None:
    data = own.data.open()
    trainer = Trainer(own.fitted(data), data)
    linear = Pca(factor=4, channels=6).fitted(data)
    shown = data.heldout.batch(torch.arange(len(data.heldout))).data
    found = trainer.pipeline()
    assert isinstance(found, Reconstructions)
    mean, log_variance = found.encode(shown)
    assert torch.equal(mean, linear.encode(shown))
    assert torch.equal(found.decode(mean), linear.decode(linear.encode(shown)))
    assert torch.equal(found.linear(shown), found.decode(mean))
    assert bool((log_variance == SMALL.log_variance).all())
    with torch.autocast("cpu", torch.bfloat16):  # what is trained in lower precision begins there, too
        assert torch.equal(found.encode(shown)[0], mean)
        assert torch.equal(found.decode(mean), linear.decode(mean))


def test_gradients_reach_every_weight_that_is_trained() -> None:
    model = random_autoencoder()
    denoiser = Reconstruction().of(model)
    loss = Autoencoding(kl=0.1).loss(denoiser, images(), NOTHING, Rng(0).at(0, torch.arange(4)))
    loss.total.mean().backward()
    for name, parameter in model.named_parameters():
        if name.startswith("components."):
            assert parameter.grad is None
        else:
            assert parameter.grad is not None, name
            assert float(parameter.grad.abs().max()) > 0, name


@pytest.mark.parametrize(
    "config",
    [
        SMALL,
        AutoencoderConfig(
            in_channels=1, factor=2, latent_channels=3, widths=(8,), encoder_depths=(0,), decoder_depths=(2,)
        ),
        AutoencoderConfig(factor=8, widths=(8, 8, 8, 16), encoder_depths=(0, 0, 1, 1), decoder_depths=(1, 0, 0, 0)),
    ],
)  # fmt: skip
def test_shapes_of_any_factor_number_of_levels_and_size(config: AutoencoderConfig) -> None:
    model = random_autoencoder(config)
    x = images(2, 32)[:, : config.in_channels, :16]
    mean, log_variance = model.encode(x)
    assert mean.shape == log_variance.shape == (2, config.latent_channels, 16 // config.factor, 32 // config.factor)
    assert model.decode(mean).shape == x.shape
    assert torch.equal(model(x, torch.zeros(2), NOTHING), model.decode(mean))
    assert len(model.plan.shard) == 2
    with pytest.raises(ValueError, match="do not tile"):
        model.encode(x[..., :-1])


def test_every_layer_is_behind_the_one_door() -> None:
    model, sites = random_autoencoder(), []

    def edit(site: str, block: Any, x: Tensor, *args: Any) -> Tensor:
        sites.append(site)
        return block(x, *args)

    x = images(2)
    assert torch.equal(model(x, torch.zeros(2), NOTHING, edit=edit), model(x, torch.zeros(2), NOTHING))
    assert sites[: len(model.encoder)] == [f"encoder.{i}" for i in range(len(model.encoder))]
    assert sites[len(model.encoder) :] == [f"decoder.{i}" for i in range(len(model.decoder))]
    assert isinstance(model, Model)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"widths": (8,)}, "one number for each level, and have 1, 2 and 2"),
        ({"factor": 5}, "cannot be halved for 2 levels"),
        ({"latent_channels": 49}, "have no 49 components"),
        ({"groups": 0}, "model.groups must be at least 1"),
        ({"encoder_depths": (1, -1)}, "depths not negative"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(DitkitError, match=says):
        replace(SMALL, **changes)
    with pytest.raises(DitkitError, match="cannot be built: 8 channels are not divisible by the 5"):
        replace(SMALL, groups=5).build()
    with pytest.raises(DitkitError, match="not tiled by latents of 4 pixels"):
        SMALL.fitted((3, 18, 16), 0, 0)


# -------------------------------------------------------------------------------------------------------- the objective


def test_the_loss_is_what_its_formula_says() -> None:
    model, x = random_autoencoder(), images()
    noise = torch.randn(4, 6, 4, 4, generator=torch.Generator().manual_seed(2))
    loss = Autoencoding(kl=0.5).loss(Reconstruction().of(model), x, NOTHING, Replay({"posterior": noise}))
    mean, log_variance = model.encode(x)
    q = torch.distributions.Normal(mean, (0.5 * log_variance).exp())
    nats = torch.distributions.kl_divergence(q, torch.distributions.Normal(0.0, 1.0)).mean((1, 2, 3))
    assert_close(loss.terms["kl"], 0.5 * nats)
    assert_close(loss.watched["kl_nats"], nats)
    assert_close(loss.terms["mse"], (model.decode(mean + q.stddev * noise) - x).square().mean((1, 2, 3)))
    assert set(loss.terms) == {"mse", "kl"}


def test_images_are_moved_by_whole_pixels_and_their_edges_continued() -> None:
    x = images(3, 6)
    draws = torch.tensor([[0.5, 0.5], [0.01, 0.99], [0.99, 0.5]])
    found = shifted(x, draws, 2)
    assert torch.equal(found[0], x[0])
    padded = F.pad(x, (2,) * 4, mode="replicate")
    assert torch.equal(found[1], padded[1, :, 0:6, 4:10])
    assert torch.equal(found[2], padded[2, :, 4:10, 2:8])
    seen = {tuple(d) for d in (torch.rand(4000, 2, generator=torch.Generator().manual_seed(0)) * 5).long().tolist()}
    assert len(seen) == 25


def test_the_perceptual_term_is_zero_for_the_same_image_and_leads_to_it() -> None:
    encoder = EfficientNet()
    x = images(2, 32)
    y = (x + 0.2 * images(2, 32, seed=1)).requires_grad_()
    wanted = encoder.maps(x)
    assert [m.shape[2] for m in wanted] == [16, 8, 4, 2, 2, 1, 1]
    assert_close(perceptual_distance(encoder.maps(x), wanted), torch.zeros(2), atol=1e-6, rtol=0)
    one, two = torch.tensor([3.0, 0.0]), torch.tensor([0.0, 5.0])
    apart = perceptual_distance([one.view(1, 2, 1, 1)], [two.view(1, 2, 1, 1)])
    assert_close(apart, torch.tensor([2.0]))  # unit vectors at a right angle
    before = perceptual_distance(encoder.maps(y), wanted)
    before.sum().backward()
    assert y.grad is not None
    after = perceptual_distance(encoder.maps(y.detach() - 0.5 * y.grad), wanted)
    assert bool((after < before).all())
    loss = Autoencoding(perceptual=2.0, features=encoder).loss(
        Reconstruction().of(random_autoencoder()), x, NOTHING, Rng(0).at(0, torch.arange(2))
    )
    assert set(loss.terms) == {"mse", "kl", "perceptual"}


def test_the_distances_of_the_alignment_by_hand() -> None:
    alignment = VisionAlignment(encoder=EfficientNet(), cosine_margin=0.25, distance_margin=0.125)
    z = torch.tensor([[1.0, 0.0], [0.0, 2.0]]).view(1, 2, 1, 2)  # two places, at a right angle
    features = torch.tensor([[1.0, 1.0], [0.0, 1.0]]).view(1, 2, 1, 2)  # at 45 degrees
    root = math.sqrt(0.5)
    mcos = (max(0, 0.75 - 1) + max(0, 0.75 - root)) / 2
    mdms = 2 * (root - 0.125) / 4
    assert_close(alignment.distances(z, z, features), torch.tensor([mcos + mdms]))
    assert_close(alignment.distances(4 * z, 3 * z, 5 * features), torch.tensor([mcos + mdms]))  # lengths are nothing


@pytest.mark.parametrize("weight", [0.1, 3.0])
def test_the_alignment_is_weighted_by_gradients_and_its_matrix_learns(weight: float) -> None:
    model, x, rng = random_autoencoder(), images(), Rng(0).at(0, torch.arange(4))
    config = Autoencoding(kl=0.5, alignment=VisionAlignment(encoder=EfficientNet(size=64), weight=weight))
    denoiser = Reconstruction().of(model)
    with pytest.raises(DitkitError, match="the alignment learns"):
        config.loss(denoiser, x, NOTHING, rng)
    objective = config.learn(denoiser, Rng(0))
    loss = objective.loss(denoiser, x, NOTHING, rng)
    assert set(loss.terms) == {"mse", "kl", "alignment"}
    last = model.encoder[-1].weight
    of = {k: torch.autograd.grad(v.mean(), last, retain_graph=True)[0].norm() for k, v in loss.terms.items()}  # type: ignore[arg-type]
    assert_close(of["alignment"], weight * of["mse"], rtol=1e-3, atol=0)
    loss.total.mean().backward()
    assert objective.matrix.grad is not None
    assert float(objective.matrix.grad.abs().max()) > 0
    assert objective.matrix.shape == (1280, 6, 1, 1)
    with torch.no_grad():  # as it is rehearsed
        assert set(objective.loss(denoiser, x, NOTHING, rng).terms) == set(loss.terms)


def test_what_cannot_be_trained_is_said(own: Recipe) -> None:
    with pytest.raises(DitkitError, match="needs an encoder with maps"):
        Autoencoding(perceptual=1.0)
    with pytest.raises(DitkitError, match="must not be negative"):
        Autoencoding(kl=-1.0)
    with pytest.raises(DitkitError, match="weight must be above 0"):
        VisionAlignment(weight=0.0)
    with pytest.raises(DitkitError, match="the alignment needs an encoder"):
        Autoencoding(alignment=VisionAlignment()).learn(Reconstruction().of(random_autoencoder()), Rng(0))
    with pytest.raises(DitkitError, match="the data are tokens"):
        Reconstruction().fitted(5)
    data = own.data.open()
    jit = JiTConfig(patch_size=4, hidden_size=16, depth=1, num_heads=2, bottleneck_dim=4, in_context_len=0)
    for changes, says in (
        ({"model": jit}, "is for an autoencoder, not JiT"),
        ({"denoiser": Meaning()}, "not a denoiser"),
        ({"objective": Regression()}, "is for a denoiser"),
        ({"codec": Pca(factor=1, channels=3)}, "trained on pixels, not on what the codec pca makes"),
    ):
        with pytest.raises(DitkitError, match=says):
            Trainer(replace(own, **changes).fitted(data), data)


# ------------------------------------------------------------------------------------------------------------- the loop


@pytest.mark.parametrize("aligned", [False, True])
def test_a_run_in_two_parts_is_one_run(own: Recipe, tmp_path: Path, aligned: bool) -> None:
    if aligned:
        own = replace(own, objective=replace(own.objective, alignment=VisionAlignment(encoder=EfficientNet(size=32))))
    train(own, tmp_path / "whole", quiet=True)
    train(with_train(own, steps=3), tmp_path / "parts", quiet=True)
    train(own, tmp_path / "parts", quiet=True)
    assert_same(Run(tmp_path / "whole"), Run(tmp_path / "parts"))
    for name in ("autoencoder.safetensors", "samples/step-00000006.png"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "parts" / name).read_bytes()
    rows = Run(tmp_path / "whole").rows()
    assert {"mse", "kl", "kl_nats", "loss"} <= set(rows[0])
    assert ("alignment" in rows[0]) == aligned


def test_training_changes_all_but_the_components_and_lowers_the_loss(own: Recipe, tmp_path: Path) -> None:
    folder = tmp_path / "boxes"
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    for i in range(40):  # flat boxes on white, of which an edge is anywhere: far from linear
        pixels = torch.full((16, 16, 3), 255, dtype=torch.uint8)
        top, left, height, width = torch.randint(1, 9, (4,), generator=generator).tolist()
        pixels[top : top + height, left : left + width] = torch.randint(0, 256, (3,), generator=generator).byte()
        Image.fromarray(pixels.numpy()).save(folder / f"{i}.png")
    own = replace(own, data=Folder(str(folder), resolution=16), objective=Autoencoding(kl=1e-5))
    own = with_train(own, steps=60, lr=3e-3, sample_every=0, checkpoint_every=60)
    train(own, tmp_path / "run", quiet=True)
    run = Run(tmp_path / "run")
    newest = run.newest()
    assert newest is not None
    data = own.data.open()
    before = dict(Trainer(own.fitted(data), data).model.named_parameters())
    for name, value in newest.tensors("model").items():
        assert torch.equal(value, before[name]) == name.startswith("components."), name
    assert run.rows()[-1]["mse"] < 0.7 * run.rows()[0]["mse"]


def test_a_new_run_begins_with_the_weights_of_another(done: Path, own: Recipe, tmp_path: Path) -> None:
    train(with_train(own, steps=1, lr=1e-12), tmp_path / "next", init=done, quiet=True)
    before, after = Run(done).newest(), Run(tmp_path / "next").newest()
    assert before is not None
    assert after is not None
    weights = after.tensors("model")
    for name, value in before.tensors("ema-0.5").items():
        assert_close(weights[name], value, atol=1e-9, rtol=1e-6)


@pytest.mark.parametrize("holdout", [0.5, 0.1, 0.0])
def test_a_sheet_has_originals_above_what_comes_back(done: Path, own: Recipe, holdout: float) -> None:
    data = replace(own.data, holdout=holdout).open()
    found = open_run(done, device="cpu")
    assert isinstance(found, Reconstructions)
    shown, across = found.sheet(data)
    assert across == min(10, len(data.heldout) or len(data.train))
    assert len(shown) % (2 * across) == 0
    for first in range(0, len(shown), 2 * across):
        originals, back = shown[first : first + 2 * across].split(across)
        assert torch.equal(back, found.decode(found.encode(originals)[0]))


def test_nothing_is_sampled_from_an_autoencoder(done: Path, ditkit: Command) -> None:
    refused(ditkit("sample", done), "an autoencoder draws no samples: ditkit evaluate RUN")
    refused(ditkit("evaluate", done, "--steps", "3"), "leave out steps")
    with pytest.raises(DitkitError, match="draws no samples"):
        load(done)
    found = open_run(done, device="cpu")
    assert isinstance(found, Reconstructions)
    assert not isinstance(found, Pipeline)


# ------------------------------------------------------------------------------------------------------- the evaluation


def test_decibels_by_hand() -> None:
    a = torch.tensor([10, 20, 30, 40], dtype=torch.uint8).view(1, 1, 2, 2)
    b = torch.tensor([10, 22, 29, 40], dtype=torch.uint8).view(1, 1, 2, 2)
    assert squared_errors(a, b).tolist() == [1.25]
    assert squared_errors(b, a).tolist() == [1.25]  # bytes do not wrap around
    assert float(psnr(squared_errors(a, b), 4)) == pytest.approx(10 * math.log10(65025 / 1.25))
    assert float(psnr(squared_errors(a, a), 4)) == pytest.approx(10 * math.log10(65025 * 4))


def test_few_held_out_images_are_said_in_one_line(done: Path, own: Recipe) -> None:
    data = replace(own.data, holdout=0.1).open()
    assert 0 < len(data.heldout) < 10
    trained = open_run(done)
    assert isinstance(trained, Reconstructions)
    with pytest.raises(DitkitError, match=f"at least 10 held-out images, and there are {len(data.heldout)}"):
        measure_reconstructions(trained, data, 100)


def test_what_evaluate_says_is_what_a_person_would_find(done: Path, own: Recipe) -> None:
    found = evaluate(done, device="cpu")
    data = own.data.open()
    codec = TrainedAutoencoder(str(done)).fitted(data)
    linear = Pca(factor=4, channels=6).fitted(data)
    real = data.heldout.batch(torch.arange(len(data.heldout))).data

    def decibels(other: Tensor) -> list[float]:
        errors = [((a.float() - b.float()) ** 2).mean().item() for a, b in zip(real, other, strict=True)]
        return [10 * math.log10(255**2 / error) for error in errors]

    latents = codec.encode(real)
    ours, pca = decibels(codec.decode(latents)), decibels(linear.decode(linear.encode(real)))
    numbers = found.numbers
    assert numbers["psnr"] == pytest.approx(sum(ours) / len(ours), abs=1e-3)
    assert numbers["psnr_pca"] == pytest.approx(sum(pca) / len(pca), abs=1e-3)
    assert numbers["psnr_gain"] == pytest.approx((sum(ours) - sum(pca)) / len(ours), abs=1e-3)
    mean_error = sum(10 ** (-value / 10) for value in ours) / len(ours)
    assert numbers["psnr_of_mean"] == pytest.approx(-10 * math.log10(mean_error), abs=1e-3)
    means, stds = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    assert numbers["latent_mean"] == pytest.approx(float(means.abs().max()), abs=1e-4)
    assert numbers["latent_std_least"] == pytest.approx(float(stds.min()), abs=1e-3)
    assert numbers["latent_std_most"] == pytest.approx(float(stds.max()), abs=1e-3)
    assert found.protocol["reference_images"] == len(real)
    assert found.images.shape[1:] == (3, 16, 16)
    assert torch.equal(found.images[:10], real[:10])
    assert torch.equal(found.images[10:20], linear.decode(linear.encode(real[:10])))


def test_the_report_is_written(done: Path, ditkit: Command) -> None:
    out = ditkit("evaluate", done)
    assert out.returncode == 0, out.stderr
    assert "psnr_pca" in out.stdout
    report = json.loads((done / "report.json").read_text())
    assert report["psnr"] > 0
    assert "through the autoencoder" in (done / "report.html").read_text()


WATCHED: list[tuple[bool, int]] = []
"""Of each batch that was read of the training images: whether it was augmented, as for training, and its size."""


@dataclass(frozen=True)
class Watched:
    split: Any

    def __len__(self) -> int:
        return len(self.split)

    def batch(self, indices: Tensor, rng: Draw | None = None) -> Batch:
        WATCHED.append((rng is not None, len(indices)))
        return self.split.batch(indices, rng)


@register("data", "test_watched")
@dataclass(frozen=True)
class WatchedFolder:
    path: str

    def open(self) -> Dataset:
        found = Folder(self.path, resolution=16, holdout=0.5).open()
        return replace(found, train=Watched(found.train))


def test_a_run_that_goes_on_has_its_components_and_does_not_look_for_them_again(own: Recipe, tmp_path: Path) -> None:
    watched = with_train(replace(own, data=WatchedFolder(own.data.path)), sample_every=0)

    def before_training() -> list[int]:
        """Sizes of the batches that were read until training began, and forgets all."""
        sizes = [size for _, size in takewhile(lambda batch: not batch[0], WATCHED)]
        WATCHED.clear()
        return sizes

    WATCHED.clear()
    assert train(watched, tmp_path / "whole", quiet=True)
    assert max(before_training()) > 2  # the components are found
    assert train(with_train(watched, steps=3), tmp_path / "parts", quiet=True)
    assert max(before_training()) > 2
    assert train(watched, tmp_path / "parts", quiet=True)
    assert before_training() == [2]  # the rehearsal
    assert_same(Run(tmp_path / "whole"), Run(tmp_path / "parts"))


# ------------------------------------------------------------------------------------------------------------ the codec


def test_latents_are_normalised_on_the_training_images_and_decoded_as_by_the_network(done: Path, own: Recipe) -> None:
    data = own.data.open()
    codec = TrainedAutoencoder(str(done)).fitted(data)
    real = torch.cat(list(examples(data.train)))
    assert len(real) == len(data.train)
    z = codec.encode(real)
    assert z.shape[1:] == codec.shape(data.shape) == (6, 4, 4)
    assert codec.downsampling() == 4
    assert_close(z.mean((0, 2, 3)), torch.zeros(6), atol=1e-5, rtol=0)
    assert_close(z.std((0, 2, 3), correction=0), torch.ones(6), atol=1e-5, rtol=0)
    found = open_run(done, device="cpu")
    assert isinstance(found, Reconstructions)
    own_z, log_variance = found.encode(real)
    assert_close(codec.decode(z).float(), found.decode(own_z).float(), atol=1, rtol=0)
    draws = replace(codec, sample=True)
    rng = Rng(3).at(0, torch.arange(len(real)))
    assert torch.equal(draws.encode(real), z)
    assert torch.equal(codec.encode(real, rng), z)
    noise = rng("codec", "normal", z.shape[1:])
    moments = draws.moments(real)
    assert moments.shape == (len(real), 2, 6, 4, 4)
    assert_close(moments[:, 1] * load_file(done / "autoencoder.safetensors")["latent_std"][:, None, None],
                 (0.5 * log_variance).exp())  # fmt: skip
    assert_close(draws.encode(real, rng), z + moments[:, 1] * noise)


def test_a_run_that_uses_it_needs_nothing_else(done: Path, own: Recipe, ditkit: Command, tmp_path: Path) -> None:
    shutil.copytree(done, "autoencoder")
    words = (
        *("--codec", "trained_autoencoder:autoencoder", "--data.resolution", "16", "--data.holdout", "0.5"),
        *("--model.patch-size", "1", "--model.hidden-size", "24", "--model.depth", "2", "--model.num-heads", "2"),
        *("--model.bottleneck-dim", "6", "--model.in-context-len", "2", "--model.in-context-start", "1", "--quiet"),
        *("--train.batch", "4", "--train.sample-every", "0", "--sample.steps", "2", "--out", "latent"),
    )
    folder = f"folder:{own.data.path}"
    out = ditkit("train", folder, *words, "--train.steps", "2")
    assert out.returncode == 0, out.stderr
    recipe = Run("latent").recipe()
    assert recipe.model.shape == (6, 4, 4)
    assert recipe.codec.path == str(tmp_path / "autoencoder")
    assert recipe.codec.downsampling() == 4
    before = TrainedAutoencoder("autoencoder").fitted(own.data.open()).state()
    shutil.rmtree("autoencoder")
    samples = load("latent", device="cpu").sample(count=2)
    assert samples.shape == (2, 3, 16, 16)
    assert samples.dtype == torch.uint8
    for again in (("latent", "--train.steps", "3", "--quiet"), (folder, *words, "--train.steps", "4")):
        out = ditkit("train", *again)
        assert out.returncode == 0, out.stderr
    newest = Run("latent").newest()
    assert newest is not None
    assert newest.step == 4
    after = newest.tensors("codec")
    assert after.keys() == before.keys()
    for name, value in before.items():
        assert torch.equal(after[name], value), name


def test_what_it_has_learned_is_no_part_of_what_it_says(done: Path, own: Recipe) -> None:
    codec = TrainedAutoencoder(str(done))
    fitted = codec.fitted(own.data.open())
    assert from_json(to_json(fitted)) == codec == fitted
    assert codec.state() == {}
    back = codec.loaded(fitted.state())
    real = own.data.open().heldout.batch(torch.arange(3)).data
    assert torch.equal(back.encode(real), fitted.encode(real))


def test_what_is_no_autoencoder_is_refused_in_one_line(done: Path, own: Recipe, tmp_path: Path) -> None:
    data = own.data.open()
    with pytest.raises(DitkitError, match="write --codec trained_autoencoder:RUN"):
        TrainedAutoencoder("")
    with pytest.raises(DitkitError, match="come to its first checkpoint"):
        TrainedAutoencoder(str(tmp_path)).fitted(data)
    with pytest.raises(DitkitError, match="come to its first checkpoint"):
        TrainedAutoencoder(str(tmp_path)).downsampling()
    assert TrainedAutoencoder(str(done)).downsampling() == 4
    with pytest.raises(DitkitError, match="has not been fitted"):
        TrainedAutoencoder(str(done)).encode(torch.zeros(1, 3, 16, 16, dtype=torch.uint8))
    fitted = TrainedAutoencoder(str(done)).fitted(data)
    for shape in ((1, 16, 16), (3, 18, 16), (16,)):
        with pytest.raises(DitkitError, match="is for images \\[3 h w\\] with sides divisible by 4"):
            fitted.shape(shape)
    state = fitted.state()
    file = tmp_path / "autoencoder.safetensors"
    jit = torch.tensor(list(json.dumps(to_json(JiTConfig())).encode()), dtype=torch.uint8)
    for changes, says in (
        ({"latent_std": torch.zeros(6)}, "statistics are not those of 6 channels"),
        ({"latent_mean": torch.zeros(5)}, "statistics are not those of 6 channels"),
        ({"config": torch.zeros(4, dtype=torch.uint8)}, "config cannot be read"),
        ({"config": jit}, "is of another network"),
        ({"model.decoder.0.weight": torch.zeros(3)}, "do not fit its config"),
    ):
        save_file({**state, **changes}, file)
        with pytest.raises(DitkitError, match=says) as error:
            TrainedAutoencoder(str(file)).fitted(data)
        assert "\n" not in str(error.value)
        assert str(file) in str(error.value)
    save_file({"x": torch.zeros(1)}, file)
    with pytest.raises(DitkitError, match="config is missing"):
        TrainedAutoencoder(str(file)).fitted(data)
    file.write_bytes(b"damaged")
    with pytest.raises(DitkitError, match="is no autoencoder of ditkit"):
        TrainedAutoencoder(str(file)).fitted(data)


def test_the_recipe_is_for_emoji_or_a_folder() -> None:
    assert to_json(find_recipe("autoencoder").data)["type"] == "data/emoji"
    assert to_json(find_recipe("autoencoder:images").data)["type"] == "data/folder"
    count = sum(p.numel() for p in find_recipe("autoencoder").model.build().parameters())
    assert 0.8e6 < count < 1e6
