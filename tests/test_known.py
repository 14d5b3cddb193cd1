"""Known parts of a sample: prompts, templates and inpainting, from the solvers to the command line."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.testing import assert_close

from ditkit.codecs import Autoencoder, Vectors
from ditkit.conditioning import Conditioning, Known
from ditkit.config import DitkitError
from ditkit.data import Captions, Dataset, Digits, InMemory, points, prompt, strings, template
from ditkit.diffusion import (
    APG,
    CFG,
    RK4,
    Dopri5,
    Heun,
    Jumps,
    Linear,
    Meaning,
    Rescale,
    SiTSDE,
    guide,
    integrate,
    keep,
)
from ditkit.diffusion.grid import Uniform
from ditkit.models import DDiTConfig, MLPConfig
from ditkit.pipeline import Pipeline
from ditkit.recipe import Recipe, Sample
from ditkit.recipes import captions, captions_uniform, digits
from ditkit.rng import Rng

from .conftest import TINY, Command, randomised, tiny_autoencoder
from .exact import NOTHING, grid, mixture, start
from .test_solvers import SOLVERS

# ------------------------------------------------------------------------------------------------------- solvers

EXACT = [name for name in SOLVERS if name not in ("sit_sde", "sit_sde without last step")]


@pytest.mark.parametrize("name", EXACT)
def test_every_solver_follows_the_path_to_what_is_known(name: str) -> None:
    """Also those that look at t = 0, where data do not show their noise; SiT's SDE leaves noise in its last step."""
    path, values = Linear(), torch.tensor([[0.3, 9.0]], dtype=torch.float64)
    denoiser, rng = mixture(path, "velocity").denoiser(), Rng(4).at(0, torch.arange(24))
    kept = keep(denoiser, Known(values, torch.tensor([[True, False]])))
    x = integrate(kept, SOLVERS[name], grid("uniform", 12, path), start(), NOTHING, rng)
    assert_close(x[:, 0], torch.full((24,), 0.3, dtype=torch.float64), rtol=0, atol=1e-9 if name != "dopri5" else 1e-3)
    assert float(x[:, 1].std()) > 0.1  # the rest is drawn
    assert float((x[:, 1] - 9).abs().min()) > 1


def test_a_guide_cannot_move_what_is_known() -> None:
    values = torch.rand(3, 1, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    mask = torch.zeros(3, 1, 4, 4, dtype=torch.bool)
    mask[..., 1:] = True

    def network(x: Tensor, t: Tensor, cond: Conditioning, *, edit: Any = None) -> Tensor:
        assert cond.label is not None
        return x * cond.label.view(-1, 1, 1, 1)

    def null(n: int) -> Conditioning:
        return Conditioning(label=torch.full((n,), 7.0))

    denoiser = Meaning(Linear(), prediction="x0", clock="1-t", t_eps=0.05).of(network)
    kept = keep(guide(denoiser, CFG(5.0, null(3))), Known(values, mask))
    rng = Rng(0).at(0, torch.arange(3))
    x = rng("prior", "normal", (1, 4, 4)).double()
    found = integrate(kept, Heun(), Uniform()(9, Linear(), 16), x, Conditioning(label=torch.ones(3)), rng)
    assert_close(found[mask], values[mask], rtol=0, atol=1e-9)
    assert float(found[~mask].abs().max()) > 2


# ------------------------------------------------------------------------------------------------------- pipelines


def images(sample: Sample | None = None) -> Pipeline:
    """Ten classes of digits by a random network."""
    recipe = replace(digits(), model=TINY, sample=sample or Sample(steps=3, guidance=2.0, batch=4))
    recipe = recipe.fitted(Digits().open())
    return Pipeline(recipe, randomised(recipe.model), recipe.model.shape)


def texts(recipe: Recipe) -> Pipeline:
    """Captions by a random network."""
    model = DDiTConfig(hidden_size=16, depth=1, num_heads=2, cond_dim=8)
    recipe = replace(recipe, model=model, sample=Sample(steps=8, solver=Jumps(), batch=4)).fitted(Captions().open())
    return Pipeline(recipe, randomised(recipe.model), recipe.model.shape)


def half(n: int | None = None, seed: int = 0) -> Known:
    """Noise as an image, the upper half of which is given."""
    shape = (1, 28, 28) if n is None else (n, 1, 28, 28)
    values = torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    mask = torch.zeros(shape, dtype=torch.bool)
    mask[..., :14, :] = True
    return Known(values, mask)


SETTINGS: list[dict[str, Any]] = [
    {"solver": name} for name in ("euler", "ddim", "midpoint", "ab2", "dpmpp_2m", "dpmpp_2m_sde", "unipc_3", "deis_3")
]
SETTINGS += [
    {"solver": RK4()},
    {"solver": Dopri5(rtol=1e-2, atol=1e-2)},
    {"solver": SiTSDE("linear"), "guidance": 1.0},
    {"guidance": 1.0, "guides": (APG(4.0),), "finish": Rescale(0.7)},
    {"solver": Heun(), "interval": (0.3, 0.9)},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: " ".join(map(str, s.values())))
def test_known_pixels_are_equal_whatever_the_solver_and_the_guide(settings: dict[str, Any]) -> None:
    known = half()
    found = images().sample(count=3, known=known, **settings)
    assert torch.equal(found[..., :14, :], known.values[..., :14, :].expand(3, -1, -1, -1))
    assert not torch.equal(found[..., 14:, :], known.values[..., 14:, :].expand(3, -1, -1, -1))
    assert len(found.unique(dim=0)) == 3


def test_a_sample_depends_on_its_own_known_part_and_not_on_its_batch() -> None:
    pipeline, known = images(), half(5)
    whole = pipeline.sample(count=5, known=known, seed=3)
    for n, batch in ((3, 2), (1, 1)):
        part = Known(known.values[:n], known.mask[:n])
        found = pipeline.sample(count=n, known=part, seed=3, batch=batch)
        assert int((found.int() - whole[:n].int()).abs().max()) <= 1  # a matrix product may round by its batch
    one = pipeline.sample(count=5, known=Known(known.values[0], known.mask[0]), seed=3)
    assert int((one[0].int() - whole[0].int()).abs().max()) <= 1
    every = Known(known.values[0], torch.ones(1, 28, 28, dtype=torch.bool))
    assert torch.equal(pipeline.sample(count=2, known=every), known.values[:1].expand(2, -1, -1, -1))


def test_what_is_hidden_changes_nothing_and_nothing_given_is_plain_sampling() -> None:
    pipeline, known = images(), half()
    other = Known(torch.where(known.mask, known.values, 255 - known.values), known.mask)
    assert torch.equal(pipeline.sample(count=2, known=known), pipeline.sample(count=2, known=other))
    nothing = Known(known.values, torch.zeros(1, 28, 28, dtype=torch.bool))
    assert torch.equal(pipeline.sample(count=2, known=nothing), pipeline.sample(count=2))


def test_the_network_is_told_what_is_known_the_weak_opinion_too() -> None:
    pipeline, known, seen = images(), half(), []
    model = pipeline.model

    class Listening(torch.nn.Module):
        config = model.config

        def forward(self, x: Tensor, t: Tensor, cond: Conditioning, *, edit: Any = None) -> Tensor:
            seen.append(cond.known)
            return model(x, t, replace(cond, known=None), edit=edit)

        def prepare(self, cond: Conditioning, shape: Any, times: Any = ()) -> Conditioning:
            return model.prepare(cond, shape, times)

    listening = Listening()
    listening.register_parameter("weight", torch.nn.Parameter(torch.zeros(1)))
    pipeline.denoiser = pipeline.recipe.denoiser.of(listening)
    pipeline.sample(count=2, known=known)
    for told in seen:
        assert told is not None
        assert told.values.shape == (4, 1, 28, 28)  # two samples, strong and weak
        assert torch.equal(told.mask, known.mask.expand(4, 1, 28, 28))
        assert_close(told.values[:, :, :14], (known.values[:, :14] / 127.5 - 1).expand(4, 1, -1, -1))


def test_known_latents_are_those_of_the_image_and_a_cell_with_a_hole_is_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    codec = Autoencoder(str(tiny_autoencoder(tmp_path / "vae")), factor=2, scale=1.0)
    model = replace(TINY, input_size=8, in_channels=4, patch_size=2, num_classes=0)
    recipe = Recipe(codec=codec, model=model, sample=Sample(steps=4, solver=Heun()))
    pipeline = Pipeline(recipe, randomised(model), model.shape)
    image = torch.randint(0, 256, (3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    mask = torch.ones(1, 16, 16, dtype=torch.bool)
    mask[0, 5, 9] = False  # one pixel
    with pytest.raises(DitkitError, match=r"the known image is \[3, 18, 16\], and this model draws \[3, 16, 16\]"):
        pipeline.sample(count=1, known=Known(image.new_zeros(3, 18, 16), torch.ones(1, 18, 16, dtype=torch.bool)))
    seen = pipeline.sample(count=2, known=Known(image, mask))
    assert seen.shape == (2, 3, 16, 16)
    monkeypatch.setattr(Autoencoder, "decode", lambda self, x0: x0)  # what comes out are the latents themselves
    found = pipeline.sample(count=2, known=Known(image, mask))
    wanted = codec.encode(torch.where(mask, image, torch.tensor(128, dtype=torch.uint8))[None])[0]
    drawn = torch.zeros(8, 8, dtype=torch.bool)
    drawn[2, 4] = True
    assert torch.equal(found[..., ~drawn], wanted[:, ~drawn].expand(2, -1, -1))
    assert bool(((found - wanted)[..., drawn].abs() > 1e-3).all())
    image[:, 5, 9] = 255 - image[:, 5, 9]
    assert torch.equal(pipeline.sample(count=2, known=Known(image, mask)), found)


def test_a_coordinate_of_a_vector_can_be_given() -> None:
    model = MLPConfig(dimension=3, hidden_size=8, depth=2)
    recipe = Recipe(codec=Vectors(), model=model, sample=Sample(steps=5))
    pipeline = Pipeline(recipe, randomised(model), (3,))
    found = pipeline.sample(count=4, known=Known(torch.tensor([0.25, 0, 0]), torch.tensor([True, False, False])))
    assert torch.equal(found[:, 0], torch.full((4,), 0.25))
    assert len(found[:, 1].unique()) == 4
    with pytest.raises(DitkitError, match="not finite"):
        pipeline.sample(count=1, known=Known(torch.tensor([torch.nan, 0, 0]), torch.tensor([True, False, False])))


def test_one_channel_of_an_image_can_be_given() -> None:
    split = InMemory(torch.zeros(1, 3, 16, 16), None, torch.arange(1))
    colour = Dataset("colour", (), (3, 16, 16), split, split, "zeros")
    recipe = replace(digits(), model=replace(TINY, patch_size=8), sample=Sample(steps=2)).fitted(colour)
    pipeline = Pipeline(recipe, randomised(recipe.model), recipe.model.shape)
    values = torch.arange(3 * 256).view(3, 16, 16).to(torch.uint8)
    mask = torch.zeros(3, 16, 16, dtype=torch.bool)
    mask[1] = True  # one channel is given
    found = pipeline.sample(count=2, known=Known(values, mask))
    assert torch.equal(found[:, 1], values[1].expand(2, -1, -1))
    assert not torch.equal(found[:, 0], values[0].expand(2, -1, -1))


def test_the_first_frame_of_a_video_can_be_given() -> None:
    recipe = Recipe(sample=Sample(steps=3))

    class Network(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = torch.nn.Linear(8, 8)

        def forward(self, x: Tensor, t: Tensor, cond: Conditioning, *, edit: Any = None) -> Tensor:
            return self.linear(x)

    network: Any = Network()
    pipeline = Pipeline(recipe, network, (1, 4, 8, 8))
    frame = torch.arange(64, dtype=torch.uint8).view(1, 1, 8, 8)
    first = torch.arange(4).view(1, 4, 1, 1).expand(1, 4, 8, 8) == 0
    found = pipeline.sample(count=2, known=Known(frame.expand(1, 4, 8, 8), first))
    assert torch.equal(found[:, :, :1], frame.expand(2, 1, 1, 8, 8))
    assert not torch.equal(found[0, :, 1:], found[1, :, 1:])


@pytest.mark.parametrize("recipe", [captions, captions_uniform])
@pytest.mark.parametrize("divergence_free", [0.0, 3.0])
def test_prompts_and_templates_stay_and_the_rest_is_drawn(recipe: Any, divergence_free: float) -> None:
    pipeline = texts(recipe())
    settings: dict[str, Any] = {"solver": Jumps(divergence_free=divergence_free)}
    begun = strings(pipeline.sample(count=6, known=prompt("a red", 32), **settings))
    assert all(text.startswith("a red") for text in begun)
    assert len(set(begun)) == 6
    filled = pipeline.sample(count=6, known=template("red ___ of", 32), **settings)
    assert bool((filled[:, 10:] == 0).all())  # a template is the whole text
    assert {text[:4] for text in strings(filled)} == {"red "}
    assert {text[7:10] for text in strings(filled)} == {" of"}
    assert len({text[4:7] for text in strings(filled)}) > 1
    assert torch.equal(pipeline.sample(count=3, known=template("red ___ of", 32), batch=2, **settings), filled[:3])
    each = Known(points(["cat", "dog", "red"], 32), torch.arange(32).expand(3, 32) < 3)
    assert [t[:3] for t in strings(pipeline.sample(count=3, known=each, **settings))] == ["cat", "dog", "red"]


def test_prompts_and_templates_are_what_they_say() -> None:
    begun, whole = prompt("ab", 4), template("a_b", 4)
    assert begun.mask.tolist() == [True, True, False, False]
    assert whole.mask.tolist() == [True, False, True, True]
    assert whole.values.tolist() == [97, 0, 98, 0]
    assert template("a_b?", 4, blank="?").mask.tolist() == [True, True, True, False]
    for make in (prompt, template):
        for wrong, says in (("", "0 characters"), ("abcde", "5 characters"), ("a\0b", "a character 0")):
            with pytest.raises(DitkitError, match=f"{says}: give one of 1 to 4"):
                make(wrong, 4)


def test_what_does_not_fit_is_said_before_anything_is_drawn() -> None:
    image, text = images(), texts(captions())
    ones = torch.ones(1, 28, 28, dtype=torch.bool)
    pixels = torch.zeros(1, 28, 28, dtype=torch.uint8)
    for pipeline, known, says in (
        (image, prompt("red", 32), r"this model draws images: give bytes \[c h w\]"),
        (image, Known(pixels.float(), ones), "what is known is float32"),
        (image, Known(pixels[0], ones[0]), r"uint8 \[28, 28\]"),
        (image, Known(pixels[:, :27], ones[:, :27]), r"\[1, 27, 28\], and this model draws \[1, 28, 28\]"),
        (image, Known(pixels.expand(3, -1, -1), ones), r"\[3, 28, 28\], and this model draws \[1, 28, 28\]"),
        (image, Known(pixels, ones[..., :27]), r"the mask of what is known is bool \[1, 1, 28, 27\]"),
        (image, Known(pixels, ones[..., :1]), "of the same size"),
        (image, Known(pixels, ones.byte()), r"uint8 \[1, 1, 28, 28\]"),
        (image, Known(pixels, ones[0]), "of the same size"),
        (image, Known(pixels.expand(2, 1, -1, -1), ones.expand(2, 1, -1, -1)), "2 known parts were given for 3"),
        (text, Known(pixels, ones), "this model draws texts"),
        (text, Known(torch.zeros(32), torch.ones(32, dtype=torch.bool)), r"float32 \[32\], and this model draws texts"),
        (text, prompt("red", 31), r"the known text is \[31\], and this model draws \[32\]"),
        (text, prompt("rëd", 32), "the character 'ë' is none of those"),
    ):
        with pytest.raises(DitkitError, match=says):
            next(pipeline.stream(count=3, known=known))


# --------------------------------------------------------------------------------------------------- command line


def saved(pipeline: Pipeline, folder: Path) -> Path:
    """The pipeline as a run."""
    from ditkit.runs import Run
    from ditkit.training import train

    train(replace(pipeline.recipe, train=replace(pipeline.recipe.train, steps=1, batch=2)), folder, quiet=True)
    assert Run(folder).exists()
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A run of images and one of texts."""
    folder = tmp_path_factory.mktemp("runs")
    return saved(images(), folder / "images"), saved(texts(captions()), folder / "texts")


def picture(path: Path, size: tuple[int, int] = (28, 28)) -> Image.Image:
    """Grey noise, width by height."""
    values = torch.randint(0, 256, (*reversed(size), 1), generator=torch.Generator().manual_seed(0))
    image = Image.fromarray(values.to(torch.uint8).squeeze(-1).numpy())
    image.save(path)
    return image


def test_inpainting_on_the_command_line(ditkit: Command, runs: tuple[Path, Path], tmp_path: Path) -> None:
    image = picture(tmp_path / "image.png")
    mask = Image.new("RGB", (28, 28), "black")
    mask.paste("white", (14, 0, 28, 28))
    mask.save(tmp_path / "mask.png")
    words = ("sample", runs[0], "--count", "3", "--known", "image.png", "--mask", "mask.png", "--guidance", "2")
    done = ditkit(*words, "--out", "single")
    assert done.returncode == 0, done.stderr
    kept, drawn = (0, 0, 14, 28), (14, 0, 28, 28)
    for i in range(3):
        found = Image.open(tmp_path / "single" / f"{i:06d}.png")
        assert found.crop(kept).tobytes() == image.crop(kept).tobytes()
        assert found.crop(drawn).tobytes() != image.crop(drawn).tobytes()
    assert ditkit(*words, "--out", "colour", "--batch", "2").returncode == 0
    image.convert("RGB").save(tmp_path / "image.png")  # the model's images are grey
    assert ditkit(*words, "--out", "grey", "--batch", "2").returncode == 0
    for i in range(3):
        assert (tmp_path / "colour" / f"{i:06d}.png").read_bytes() == (tmp_path / "grey" / f"{i:06d}.png").read_bytes()


def test_prompts_on_the_command_line(ditkit: Command, runs: tuple[Path, Path]) -> None:
    done = ditkit("sample", runs[1], "--count", "4", "--prompt", "a red")
    assert done.returncode == 0, done.stderr
    assert [line[:5] for line in done.stdout.splitlines()] == ["a red"] * 4
    done = ditkit("sample", runs[1], "--count", "4", "--template", "red ___ with ___")
    assert {line[:4] + line[7:13] for line in done.stdout.splitlines()} == {"red  with "}


@pytest.mark.parametrize(
    ("which", "words", "says"),
    [
        (0, "--known image.png", "--known and --mask go together"),
        (0, "--mask mask.png", "--known and --mask go together"),
        (0, "--known nowhere.png --mask mask.png", "nowhere.png: not a file"),
        (0, "--known image.png --mask text.txt", "text.txt: not an image"),
        (0, "--known image.png --mask wide.png", "28 x 28 pixels (height x width) and wide.png 28 x 30"),
        (0, "--known wide.png --mask wide.png", "[3, 28, 30], and this model draws [1, 28, 28]"),
        (0, "--prompt red", "--prompt is for models of texts"),
        (0, "--template red", "--template is for models of texts"),
        (1, "--known image.png --mask mask.png", "--known is for models of images"),
        (1, "--prompt red --template red", "give one of --prompt, --template and --known"),
        (1, "--prompt 0123456789012345678901234567890123", "has 34 characters: give one of 1 to 32"),
        (1, "--template ___________________________________", "has 35 characters"),
        (1, "--prompt", "expected at least one argument"),
        (1, "--prompt ß", "the character 'ß' is none of those that the model knows"),
    ],
)
def test_wrong_known_parts_get_one_clear_line(
    which: int, words: str, says: str, ditkit: Command, runs: tuple[Path, Path], tmp_path: Path
) -> None:
    for name, size in (("image", (28, 28)), ("mask", (28, 28)), ("wide", (30, 28))):
        picture(tmp_path / f"{name}.png", size)
    (tmp_path / "text.txt").write_text("red")
    before = sorted(tmp_path.iterdir())
    done = ditkit("sample", runs[which], *words.split())
    lines = [line for line in done.stderr.splitlines() if line.strip() and "?step" not in line]
    assert done.returncode == 1
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("ditkit: ")
    assert says in lines[0]
    assert sorted(tmp_path.iterdir()) == before
