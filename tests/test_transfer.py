"""Fine-tuning: what is loaded, resized or new, that it is said, and that a run keeps it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch.testing import assert_close

from ditkit.codecs import Autoencoder
from ditkit.conditioning import Conditioning, Tokens
from ditkit.config import DitkitError
from ditkit.data import Folder
from ditkit.diffusion import DDIM, DDPM, Discrete, Meaning, Regression
from ditkit.diffusion.grid import Leading
from ditkit.importing import import_file
from ditkit.interop import transfer
from ditkit.interop.transfer import patch_matrix
from ditkit.layers import sincos_2d
from ditkit.models import DDiTConfig, DiTConfig, JiTConfig, MLPConfig, Model, model_config
from ditkit.pipeline import load
from ditkit.recipe import Recipe, Sample, Train
from ditkit.recipes import FAMILIES
from ditkit.runs import Run, find_checkpoint
from ditkit.training import Trainer, train

from .conftest import TINY, TINY_FLAGS, Command, randomised, tiny_autoencoder

DIT = DiTConfig(input_size=8, patch_size=2, hidden_size=16, depth=2, num_heads=2, num_classes=5)
JIT = replace(TINY, num_classes=5, input_size=28)
TOKENS = DDiTConfig(length=6, vocab=5, hidden_size=16, depth=2, num_heads=2, cond_dim=8, num_classes=3)
VECTORS = MLPConfig(dimension=4, hidden_size=8, depth=2)


def moved(config: Any, **changes: Any) -> tuple[Model, Model, Any]:
    """A random model, one of a changed configuration that began from it, and the report."""
    old, new = randomised(config, 1), replace(config, **changes).build(seed=3)
    return old, new, transfer(config, old.state_dict(), new)


def kinds(report: Any) -> dict[str, str]:
    return {c.name: kind for kind, changes in (("resized", report.resized), ("new", report.new)) for c in changes}


@pytest.mark.parametrize("config", [DIT, JIT, TOKENS, VECTORS], ids=["dit", "jit", "ddit", "mlp"])
def test_the_same_model_takes_everything_as_it_is(config: Any) -> None:
    old, new, report = moved(config)
    assert set(report.loaded) == set(old.state_dict())
    assert kinds(report) == {}
    for name, value in new.state_dict().items():
        assert torch.equal(value, old.state_dict()[name]), name
    assert report.lines() == [f"loaded: {len(report.loaded)} tensors as they are"]


@pytest.mark.parametrize("config", [DIT, JIT], ids=["dit", "jit"])
def test_other_classes_begin_anew_and_the_null_label_stays(config: Any) -> None:
    old, new, report = moved(config, num_classes=7)
    key = "y_embedder.embedding_table.weight"
    assert kinds(report) == {key: "resized"}
    assert torch.equal(new.state_dict()[key][-1], old.state_dict()[key][-1])
    fresh = replace(config, num_classes=7).build(seed=3).state_dict()[key]
    assert torch.equal(new.state_dict()[key][:-1], fresh[:-1])
    (line,) = [line for line in report.lines() if "embedding_table" in line]
    assert "6x" in line
    assert "-> 8x" in line
    assert "7 classes begin anew" in line
    # without classes only the null label is left: the model is the old one without a label
    _, new, _ = moved(config, num_classes=0)
    x = torch.randn(2, config.in_channels, config.input_size, config.input_size)
    t = torch.tensor([0.3, 0.7])
    with torch.no_grad():
        assert_close(new.eval()(x, t, Conditioning()), old(x, t, Conditioning(label=torch.tensor([5, 5]))))


@pytest.mark.parametrize("config", [DIT, JIT], ids=["dit", "jit"])
def test_fixed_positions_are_recomputed(config: Any) -> None:
    size = 2 * config.input_size
    _, new, report = moved(config, input_size=size)
    assert kinds(report) == {"pos_embed": "resized"}
    grid = size // config.patch_size
    assert torch.equal(new.state_dict()["pos_embed"], sincos_2d(config.hidden_size, (grid, grid)))
    assert "fixed positions, recomputed" in "".join(report.lines())


def test_learned_positions_are_interpolated() -> None:
    wide = replace(DIT, input_size=32)
    weights = dict(randomised(wide, 1).state_dict())
    # a plane over rows and columns is what interpolation must keep, away from the edges
    rows, columns = torch.meshgrid(torch.arange(16.0), torch.arange(16.0), indexing="ij")
    weights["pos_embed"] = torch.stack([rows * 2 + columns] * 16, dim=-1).view(1, 256, 16)
    new = replace(DIT, input_size=(64, 96)).build()
    report = transfer(wide, weights, new)
    assert "learned positions, interpolated" in "".join(report.lines())
    got = new.state_dict()["pos_embed"].view(32, 48, 16)
    there = ((torch.arange(32) + 0.5) / 2 - 0.5)[:, None] * 2 + ((torch.arange(48) + 0.5) / 3 - 0.5)
    assert_close(got[6:-6, 9:-9, 0], there[6:-6, 9:-9], rtol=0, atol=1e-3)
    # a grid of as many patches and another form is another grid
    new = replace(DIT, input_size=(16, 64)).build()
    assert kinds(transfer(wide, weights, new)) == {"pos_embed": "resized"}


def test_class_tokens_are_interpolated_taken_or_left() -> None:
    _, new, report = moved(JIT, in_context_len=5)
    assert kinds(report) == {"in_context_posemb": "resized"}
    assert new.state_dict()["in_context_posemb"].shape == (1, 5, 32)
    _, _, report = moved(JIT, in_context_len=0)
    assert report.left == ("in_context_posemb",)
    old = replace(JIT, in_context_len=0)
    _, _, report = moved(old, in_context_len=2)
    assert kinds(report) == {"in_context_posemb": "new"}


def test_another_codec_s_channels_begin_anew() -> None:
    _, new, report = moved(DIT, in_channels=6)
    assert kinds(report) == {
        "x_embedder.proj.weight": "new",
        "x_embedder.proj.bias": "new",
        "final_layer.linear.weight": "new",
        "final_layer.linear.bias": "new",
    }
    fresh = replace(DIT, in_channels=6).build(seed=3).state_dict()
    for name in kinds(report):
        assert torch.equal(new.state_dict()[name], fresh[name])
    _, _, report = moved(JIT, in_channels=1)
    assert set(kinds(report)) == {"x_embedder.proj1.weight", "final_layer.linear.weight", "final_layer.linear.bias"}


@pytest.mark.parametrize("config", [DIT, JIT], ids=["dit", "jit"])
def test_larger_patches_see_an_enlarged_image_as_the_old_ones_saw_it(config: Any) -> None:
    before, after = config.patch_size, 2 * config.patch_size
    old, new, report = moved(config, patch_size=after, input_size=2 * config.input_size)
    assert set(kinds(report).values()) == {"resized"}
    assert not {"pos_embed", "blocks.0.attn.qkv.weight"} & set(kinds(report))  # the same grid of patches
    x = torch.randn(2, config.in_channels, config.input_size, config.input_size)
    # enlarge patch by patch, as the matrix does
    patches = F.unfold(x, before, stride=before).view(2, config.in_channels, before * before, -1)
    enlarged = torch.einsum("qp,bcpn->bcqn", patch_matrix(before, after).float(), patches).flatten(1, 2)
    big = F.fold(enlarged, (2 * config.input_size, 2 * config.input_size), after, stride=after)
    t, cond = torch.tensor([0.2, 0.9]), Conditioning(label=torch.tensor([0, 3]))
    with torch.no_grad():
        small_out, big_out = old(x, t, cond), new.eval()(big, t, cond)
        out = F.unfold(small_out, before, stride=before).view(2, small_out.shape[1], before * before, -1)
        wanted = torch.einsum("qp,bcpn->bcqn", patch_matrix(before, after).float(), out).flatten(1, 2)
        wanted = F.fold(wanted, (2 * config.input_size, 2 * config.input_size), after, stride=after)
    assert_close(big_out, wanted, rtol=1e-3, atol=1e-4)


def test_smaller_patches_are_resized_too() -> None:
    _, new, report = moved(DIT, patch_size=1, input_size=4)
    assert set(kinds(report)) == {"x_embedder.proj.weight", "final_layer.linear.weight", "final_layer.linear.bias"}
    assert all(bool(value.isfinite().all()) for value in new.state_dict().values())


def test_the_variance_goes_and_comes() -> None:
    old, new, report = moved(DIT, learn_sigma=False)
    assert "without the variance" in "".join(report.lines())
    x, t, cond = torch.randn(2, 4, 8, 8), torch.tensor([3.0, 700.0]), Conditioning(label=torch.tensor([0, 4]))
    with torch.no_grad():
        assert_close(new.eval()(x, t, cond), old(x, t, cond)[:, :4])
        old, new, report = moved(replace(DIT, learn_sigma=False), learn_sigma=True)
        assert "the variance begins at 0" in "".join(report.lines())
        out = new.eval()(x, t, cond)
        assert_close(out[:, :4], old(x, t, cond))
    assert bool((out[:, 4:] == 0).all())


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        (DIT, JIT, "weights of a dit, and the recipe's model is a jit"),
        (DIT, replace(DIT, depth=3), r"depth 2, not 3: train with --model\.depth 2"),
        (DIT, replace(DIT, hidden_size=24), r"--model\.hidden-size 16"),
        (DIT, replace(DIT, num_heads=4), r"--model\.num-heads 2"),
        (DIT, replace(DIT, frequency_shift=1, mlp_norm_eps=1e-5), r"--model\.frequency-shift 0 --model\.mlp-norm-eps"),
        (DIT, replace(DIT, conditioning="adaln"), r"--model\.conditioning adaln_zero"),
        (JIT, replace(JIT, bottleneck_dim=4), r"--model\.bottleneck-dim 8"),
    ],
)
def test_models_that_cannot_take_the_weights_are_left_alone(old: Any, new: Any, says: str) -> None:
    model = new.build()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(DitkitError, match=says):
        transfer(old, randomised(old).state_dict(), model)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


# every family: other sizes, channels, patches

LARGER: dict[str, dict[str, Any]] = {
    "pixart_tiny": {"input_size": 24, "position_scale": 1.5},  # the same range of positions, as its authors have it
    "mmdit_tiny": {"input_size": 24},
    "flux1_tiny": {"input_size": 12},
    "flux2_tiny": {"input_size": 12},
    "z_image_tiny": {"input_size": 48},
    "lumina2_tiny": {"input_size": 48},
    "sana_tiny": {"input_size": 12},
    "kandinsky5_tiny": {"input_size": (5, 24, 16)},
    "unet_tiny": {"input_size": 48},
    "resnet_tiny": {"input_size": 48},
    "drax_tiny": {"length": 24},
}


def family(name: str, **overrides: Any) -> Any:
    """As its recipe, in two blocks."""
    fewer = {"kandinsky5_tiny": {"depth": 2}, "unet_tiny": {}, "resnet_tiny": {"depth": 2}}
    return model_config(name, **{**fewer.get(name, {}), **overrides})


def noise(config: Any) -> torch.Tensor:
    if config.vocab:
        return torch.arange(2 * config.length).view(2, -1) % config.vocab
    return torch.randn(2, *config.shape, generator=torch.Generator().manual_seed(5))


def answer(model: Model, x: torch.Tensor) -> torch.Tensor:
    """Of a text of random tokens where the model reads one."""
    cond = model.config.example(2)
    if cond.text is not None:
        values = torch.randn(cond.text.values.shape, generator=torch.Generator().manual_seed(7))
        cond = replace(cond, text=Tokens(values, cond.text.mask))
    with torch.no_grad():
        return model.eval()(x, torch.tensor([0.3, 0.6]), replace(cond, channels=None))


def test_all_families_are_here() -> None:
    assert set(LARGER) == set(FAMILIES)


@pytest.mark.parametrize("name", FAMILIES)
def test_another_size_computes_with_the_same_weights(name: str) -> None:
    """All tensors are taken, a fixed table of positions is recomputed; at the old size the output is the old one."""
    config = family(name)
    old, new, report = moved(config, **LARGER[name])
    assert kinds(report) == ({"pos_embed": "resized"} if name == "mmdit_tiny" else {})
    assert not report.left
    x = noise(new.config)
    out = answer(new, x)
    assert out.shape == ((*x.shape, config.vocab) if config.vocab else (2, out.shape[1], *x.shape[2:]))
    assert bool(out.isfinite().all())
    if name != "mmdit_tiny":
        assert_close(answer(new, noise(config)), answer(old, noise(config)))


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "drax_tiny"])
def test_other_channels_begin_anew_and_nothing_else(name: str) -> None:
    config = family(name)
    old, new, report = moved(config, in_channels=config.in_channels + 1)
    fresh = new.config.build(seed=3).state_dict()
    ends = set(kinds(report))
    assert set(kinds(report).values()) == {"new"}
    first = {"x_embedder.proj.weight", "x_embedder.weight", "img_in.weight", "input_blocks.0.0.weight", "stem.weight"}
    last = {"final_layer.linear.weight", "out.2.weight"}
    assert len(ends & first) == 1
    assert len(ends & last) == 1
    assert ends <= first | last | {"x_embedder.proj.bias", "x_embedder.bias", "img_in.bias"} | {
        "final_layer.linear.bias", "out.2.bias",
    }  # fmt: skip
    for key, value in new.state_dict().items():
        assert torch.equal(value, fresh[key] if key in ends else old.state_dict()[key]), key
    assert set(report.loaded) | ends == set(new.state_dict())


@pytest.mark.parametrize(
    "name", ["pixart_tiny", "mmdit_tiny", "flux1_tiny", "z_image_tiny", "lumina2_tiny", "sana_tiny", "kandinsky5_tiny"]
)
def test_larger_patches_see_and_make_what_the_old_ones_did(name: str) -> None:
    """An image that is enlarged patch by patch gives the old output, enlarged so: whatever the order of features."""
    config = family(name)
    sides = config.patch_size if isinstance(config.patch_size, tuple) else (config.patch_size,) * 2
    before, after = sides[-1], 2 * sides[-1]
    patch = (*sides[:-2], after, after) if isinstance(config.patch_size, tuple) else after
    size = config.input_size if isinstance(config.input_size, tuple) else (config.input_size,) * 2
    size = (*size[:-2], 2 * size[-2], 2 * size[-1])
    old, new, report = moved(config, patch_size=patch, input_size=size)
    assert set(kinds(report).values()) == {"resized"}
    assert "pos_embed" not in kinds(report)

    def enlarged(x: torch.Tensor) -> torch.Tensor:
        matrix = patch_matrix(before, after).float()
        *lead, height, width = x.shape
        cut = x.reshape(-1, height // before, before, width // before, before).transpose(2, 3).flatten(3)
        made = (cut @ matrix.T).unflatten(3, (after, after)).transpose(2, 3)
        return made.reshape(*lead, 2 * height, 2 * width)

    x = noise(config)
    assert_close(answer(new, enlarged(x)), enlarged(answer(old, x)), rtol=1e-3, atol=1e-3)


def test_given_channels_come_at_zero_and_go() -> None:
    """Kandinsky's image model becomes one with a given latent and mask, as those of videos are."""
    config = family("kandinsky5_tiny", given_channels=False)
    old, new, report = moved(config, given_channels=True)
    assert kinds(report) == {"x_embedder.weight": "resized"}
    assert "the given channels begin at 0" in "".join(report.lines())
    x = noise(config)
    assert_close(answer(new, x), answer(old, x))
    cond = replace(new.config.example(2), channels=torch.randn(2, 5, *config.shape[1:]))
    with torch.no_grad():
        times = torch.tensor([0.3, 0.6])
        assert torch.equal(new(x, times, cond), new(x, times, replace(cond, channels=None)))
    back = config.build(seed=4)
    assert kinds(transfer(new.config, new.state_dict(), back)) == {"x_embedder.weight": "resized"}
    assert torch.equal(back.state_dict()["x_embedder.weight"], old.state_dict()["x_embedder.weight"])
    with pytest.raises(DitkitError, match=r"patches of 1 x 2 x 2: train with --model\.patch-size 1 x 2 x 2"):
        moved(config, patch_size=(3, 2, 2))


def test_a_table_of_positions_that_a_file_brings_is_cropped() -> None:
    config = family("mmdit_tiny")
    weights = dict(randomised(config, 1).state_dict())
    weights["pos_embed"] = torch.arange(16.0 * 16)[None, :, None].expand(1, 256, 96).clone()
    same = replace(config, input_size=24).build()
    assert kinds(transfer(config, weights, same)) == {}
    assert torch.equal(same.state_dict()["pos_embed"], weights["pos_embed"])
    smaller = replace(config, position_size=8).build()
    report = transfer(config, weights, smaller)
    assert "the middle of the table of positions" in "".join(report.lines())
    middle = weights["pos_embed"].view(1, 16, 16, 96)[:, 4:12, 4:12].flatten(1, 2)
    assert torch.equal(smaller.state_dict()["pos_embed"], middle)
    with pytest.raises(DitkitError, match=r"cannot grow to 20 x 20: train with --model\.position-size 16"):
        transfer(config, weights, replace(config, position_size=20).build())


def test_what_changes_with_the_same_weights_is_said() -> None:
    _, _, report = moved(family("pixart_tiny"), input_size=32, position_scale=2.0)
    assert report.lines()[-1] == "position_scale 1.0 -> 2.0, with the same weights"
    assert kinds(report) == {}


# runs


def test_a_run_begins_from_a_run_says_so_and_goes_on_without_it(tiny: Recipe, tmp_path: Path, ditkit: Command) -> None:
    train(tiny, tmp_path / "first", quiet=True)
    words = (
        "train",
        "digits",
        *TINY_FLAGS,
        "--train.checkpoint-every",
        "2",
        "--train.cooldown",
        "0",
        "--quiet",
        "--out",
    )
    done = ditkit(*words, "second", "--init", "first", "--train.steps", "2")
    assert done.returncode == 0, done.stderr
    assert "begins from ema-0.9 of first" in done.stderr
    assert "tensors as they are" in done.stderr
    noted = json.loads((tmp_path / "second" / "init.json").read_text())
    assert noted["init"] == "first"
    assert set(noted["loaded"]) == set(find_checkpoint("first").tensors("model"))
    # both the weights and the averages begin from what was loaded, and it is on disk before the first step
    start = Run(tmp_path / "second").checkpoints()[0]
    assert start.name == "step-00000000"
    loaded = find_checkpoint("first").tensors("ema-0.9")
    for group in find_checkpoint(start).groups:
        if group != "optimizer":
            found = find_checkpoint(start).tensors(group)
            assert all(torch.equal(found[name], value) for name, value in loaded.items()), group
    (tmp_path / "first").rename(tmp_path / "gone")
    done = ditkit("train", "second", "--train.steps", "4", "--quiet")
    assert done.returncode == 0, done.stderr
    # in one go, from a copy: bit for bit the same
    (tmp_path / "gone").rename(tmp_path / "first")
    assert ditkit(*words, "third", "--init", "first", "--train.steps", "4").returncode == 0
    one, two = (find_checkpoint(name).tensors("model") for name in ("second", "third"))
    assert all(torch.equal(one[name], two[name]) for name in one)
    # the same command goes on; another start is refused
    assert ditkit(*words, "third", "--init", "first", "--train.steps", "5").returncode == 0
    done = ditkit(*words, "third", "--init", "second", "--train.steps", "6")
    assert done.returncode == 1
    assert "began from first: leave out --init" in done.stderr
    done = ditkit(*words, "first", "--init", "second", "--train.steps", "9")
    assert done.returncode == 1


def test_weights_of_another_family_or_of_no_file_are_refused_before_anything_is_written(
    tmp_path: Path, ditkit: Command
) -> None:
    save_file(randomised(DIT).state_dict(), tmp_path / "dit.safetensors")
    for init, says in {
        "dit.safetensors": "weights of a dit, and the recipe's model is a jit",
        "no": "no file no",
    }.items():
        done = ditkit("train", "digits", *TINY_FLAGS, "--out", "run", "--init", init, "--quiet")
        assert done.returncode == 1
        assert says in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1
        assert not (tmp_path / "run").exists()


def test_a_published_jit_is_tuned_to_digits(tmp_path: Path, ditkit: Command) -> None:
    """Other classes, size, channels and patches at once."""
    config: Any = JiTConfig(**{**vars(TINY), "patch_size": 4, "input_size": 16, "num_classes": 1000})
    torch.save({"model_ema1": {f"net.{k}": v for k, v in randomised(config).state_dict().items()}}, tmp_path / "j.pth")
    done = ditkit("train", "digits", *TINY_FLAGS, "--out", "run", "--init", "j.pth", "--train.steps", "2", "--quiet")
    assert done.returncode == 0, done.stderr
    for text in ("model_ema1 of j.pth (JiT", "10 classes begin anew", "1 channels instead of 3"):
        assert text in done.stderr, text
    assert ditkit("sample", "run", "--steps", "2", "--count", "2", "--out", "x.png").returncode == 0


def test_another_meaning_is_said(tiny: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(tiny, tmp_path / "first", quiet=True)
    other = replace(tiny, denoiser=Meaning(prediction="velocity", clock="1-t", t_eps=0.05))
    train(other, tmp_path / "second", init=tmp_path / "first", quiet=True)
    said = capsys.readouterr().err
    assert "their output meant something else" in said
    assert "prediction" in said


def latent_recipe(pictures: Path, vae: Path) -> Recipe:
    return Recipe(
        data=Folder(str(pictures), resolution=16),
        codec=Autoencoder(str(vae), factor=2),
        model=replace(DIT, frequency_shift=1),
        denoiser=Meaning(DDPM(), "eps", "index"),
        objective=Regression("eps", Discrete(1000), variance="hybrid"),
        train=Train(steps=2, batch=4, emas=(0.9,), log_every=1, sample_every=0, checkpoint_every=2),
        sample=Sample(steps=3, solver=DDIM(), grid=Leading()),
    )


def test_latents_train_sample_and_tune_what_diffusers_published(pictures: Path, tmp_path: Path) -> None:
    """A DiTPipeline of ten classes at another resolution becomes a model of two classes of pictures."""
    from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel

    vae = tiny_autoencoder(tmp_path / "pipe" / "vae")
    sizes: dict[str, Any] = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 2, "sample_size": 4}
    there = DiTTransformer2DModel(**sizes, in_channels=4, out_channels=8, num_embeds_ada_norm=10, norm_eps=1e-6)
    with torch.no_grad():
        embedders: Any = [block.norm1.emb for block in there.transformer_blocks]  # type: ignore[union-attr]
        embedders[1].load_state_dict(embedders[0].state_dict())
    there.save_pretrained(tmp_path / "pipe" / "transformer")
    run, _ = import_file(tmp_path / "pipe", tmp_path / "imported")
    assert run.recipe().codec.path == str(vae)
    recipe = latent_recipe(pictures, vae)
    for number, init in enumerate((tmp_path / "pipe", run.folder)):
        train(recipe, tmp_path / str(number), init=init, quiet=True)
    noted = json.loads((tmp_path / "0" / "init.json").read_text())
    assert {c["name"] for c in noted["resized"]} == {"pos_embed", "y_embedder.embedding_table.weight"}
    one, two = (find_checkpoint(tmp_path / str(n)).tensors("model") for n in (0, 1))
    assert all(torch.equal(one[name], two[name]) for name in one)
    images = load(tmp_path / "0", device="cpu").sample(label="red", count=2, steps=2)
    assert images.shape == (2, 3, 16, 16)


def test_a_codec_that_does_not_fit_the_pictures_is_said_before_anything_is_written(
    pictures: Path, tmp_path: Path
) -> None:
    vae = tiny_autoencoder(tmp_path / "there")
    recipe = replace(latent_recipe(pictures, vae), data=Folder(str(pictures), resolution=15))
    with pytest.raises(DitkitError, match="sides divisible by 2"):
        train(recipe, tmp_path / "run", quiet=True)
    with pytest.raises(DitkitError, match="no folder of diffusers"):
        train(latent_recipe(pictures, tmp_path), tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()


def test_a_trainer_that_begins_keeps_its_averages_apart_from_its_weights(tiny: Recipe, tmp_path: Path) -> None:
    train(tiny, tmp_path / "first", quiet=True)
    from ditkit.start import begin_from

    data = tiny.data.open()
    recipe = tiny.fitted(data)
    trainer = Trainer(recipe, data)
    trainer.begin(begin_from(tmp_path / "first", recipe))
    before = {name: value.clone() for name, value in trainer.averages.tensors("ema-0.9").items()}
    trainer.advance(trainer.read(0))
    for name, parameter in trainer.model.named_parameters():
        if parameter.requires_grad:
            lerped = torch.lerp(before[name], parameter.detach(), 0.1)
            assert_close(trainer.averages.tensors("ema-0.9")[name], lerped, msg=name)
