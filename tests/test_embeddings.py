"""What encoders made elsewhere: networks whose texts or speech no conditioner makes, from import to samples."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.testing import assert_close

from ditkit.cli import main
from ditkit.codecs import Pixels
from ditkit.conditioners import Edges, Label
from ditkit.conditioning import Conditioning, Tokens
from ditkit.config import DitkitError
from ditkit.diffusion import CFG, Euler, integrate
from ditkit.given import needed, read_embeddings
from ditkit.interop import SD3, save
from ditkit.models import ControlConfig
from ditkit.pipeline import Pipeline, load
from ditkit.recipe import Recipe
from ditkit.recipes import find_recipe
from ditkit.rng import Rng

from .conftest import randomise, tiny_autoencoder

FAMILIES = {
    "mmdit_tiny": {},
    "flux1_tiny": {"guidance": True},
    "flux2_tiny": {},
    "z_image_tiny": {},
    "lumina2_tiny": {},
    "kandinsky5_tiny": {},
    "sana_tiny": {"guidance": True},
    "pixart_tiny": {"sizes": True},
    "drax_tiny": {},
}
LENGTHS = (5, 2)


def pipeline_of(name: str, steps: int = 2, **changes: Any) -> Pipeline:
    """A family's network as import makes a run of it: nothing makes what it is given."""
    recipe = find_recipe(name)
    recipe = replace(recipe, model=replace(recipe.model, **FAMILIES[name]), conditioner=Label())
    recipe = recipe.fitted(recipe.data.open()) if name == "drax_tiny" else unlabelled(recipe)
    recipe = replace(recipe, sample=replace(recipe.sample, steps=steps, guidance=1.0, **changes))
    return Pipeline(recipe, randomise(recipe.model.build(), std=0.1), recipe.model.shape)


def unlabelled(recipe: Recipe) -> Recipe:
    return replace(recipe, model=recipe.model.fitted(recipe.codec.shape(recipe.data.open().shape), 0, 0))


def made(pipeline: Pipeline, seed: int = 0, lengths: tuple[int, ...] = LENGTHS) -> Conditioning:
    """Random embeddings, one of each length; what stands behind a text is 7 and is masked."""
    takes, generator = pipeline.recipe.model.example(len(lengths)), torch.Generator().manual_seed(seed)

    def draw(like: Tensor, *shape: int) -> Tensor:
        return torch.randn(*(shape or like.shape), generator=generator)

    def tokens(like: Tokens | None) -> Tokens | None:
        if like is None:
            return None
        values = draw(like.values, len(lengths), max(lengths), like.values.shape[2])
        mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
        return Tokens(torch.where(mask[..., None], values, 7.0), mask)

    pooled = None if takes.pooled is None else draw(takes.pooled)
    scalars = {name: 1 + draw(value).abs() for name, value in takes.scalars.items()}
    return Conditioning(text=tokens(takes.text), pooled=pooled, audio=tokens(takes.audio), scalars=scalars)


def alone(cond: Conditioning, i: int, length: int) -> Conditioning:
    """Row i without its padding."""
    row = cond.rows(slice(i, i + 1))
    cut = {n: Tokens(v.values[:, :length], v.mask[:, :length]) for n in ("text", "audio") if (v := getattr(row, n))}
    return replace(row, **cut)


@pytest.fixture
def undecoded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Samples as they are diffused: bytes would hide what lies outside their range."""
    monkeypatch.setattr(Pixels, "decode", lambda self, x0: x0)


@pytest.mark.usefixtures("undecoded")
@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_each_sample_is_of_its_own_embeddings(name: str) -> None:
    """As the network alone draws it from one row without padding, called through the same solver."""
    pipeline = pipeline_of(name)
    cond, recipe = made(pipeline), pipeline.recipe
    samples = pipeline.sample(count=2, embeddings=cond, seed=3)
    times = recipe.sample.grid(2, pipeline.denoiser.path, recipe.model.length)
    for i, length in enumerate(LENGTHS):
        rng = Rng(3).at(0, torch.tensor([i]))
        x = pipeline.denoiser.prior(rng, pipeline.shape)
        x0 = integrate(pipeline.denoiser, recipe.sample.solver, times, x, alone(cond, i, length), rng)
        assert_close(samples[i], recipe.codec.decode(x0)[0], rtol=1e-4, atol=1e-4)
    other = pipeline.sample(count=2, embeddings=made(pipeline, seed=1), seed=3)
    assert (other - samples).abs().max() > 0.05
    assert_close(pipeline.sample(count=2, embeddings=cond, seed=3, batch=1), samples, rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("undecoded")
@torch.no_grad()
def test_guidance_turns_away_from_the_negative() -> None:
    """Euler's steps by hand, with the network called twice a step; one negative of another length serves all."""
    pipeline = pipeline_of("mmdit_tiny", steps=3)
    cond, negative = made(pipeline), made(pipeline, seed=1, lengths=(9,))
    samples = pipeline.sample(count=2, embeddings=cond, negative=negative, guidance=3.0, seed=3)
    x = pipeline.denoiser.prior(Rng(3).at(0, torch.arange(2)), pipeline.shape)
    both = negative.rows(torch.zeros(2, dtype=torch.long))
    times = pipeline.recipe.sample.grid(3, pipeline.denoiser.path, 64)
    for t, s in pairwise(times):
        toward, away = (pipeline.model(x, torch.full((2,), 1000 * t), c) for c in (cond, both))
        x = x + (s - t) * (away + 3.0 * (toward - away))
    assert_close(samples, x, rtol=1e-4, atol=1e-4)
    plain = pipeline.sample(count=2, embeddings=cond, negative=negative, seed=3)  # turned away from nothing
    assert torch.equal(plain, pipeline.sample(count=2, embeddings=cond, seed=3))
    assert (plain - samples).abs().max() > 0.05
    guided = pipeline.sample(count=2, embeddings=cond, guides=(CFG(3.0, null=both),), seed=3)
    assert torch.equal(guided, samples)


def test_one_row_serves_all_and_numbers_are_those_of_the_embeddings() -> None:
    pipeline = pipeline_of("sana_tiny")
    one, negative = made(pipeline, lengths=(4,)), replace(made(pipeline, 1, (3,)), scalars={})
    many = one.rows(torch.zeros(3, dtype=torch.long))
    rest: dict[str, Any]
    for rest in ({}, {"negative": negative, "guidance": 2.0}):
        samples = pipeline.sample(count=3, embeddings=one, **rest)
        assert torch.equal(samples, pipeline.sample(count=3, embeddings=many, **rest))
    said = replace(negative, scalars=one.scalars)
    assert torch.equal(samples, pipeline.sample(count=3, embeddings=one, negative=said, guidance=2.0))
    half = replace(one, text=Tokens(one.text.values.bfloat16().float(), one.text.mask))  # type: ignore[union-attr]
    low = replace(one, text=Tokens(one.text.values.bfloat16(), one.text.mask))  # type: ignore[union-attr]
    assert torch.equal(pipeline.sample(count=1, embeddings=low), pipeline.sample(count=1, embeddings=half))
    pipeline.model.bfloat16()
    assert pipeline.sample(count=1, embeddings=low).shape == (1, 1, 8, 8)


def test_a_controlnet_of_such_a_network_is_given_both() -> None:
    base = pipeline_of("z_image_tiny")
    config = ControlConfig(base.recipe.model, places=(0, 2)).fitted(base.shape, 0, 0)
    recipe = replace(base.recipe, model=config, conditioner=Edges())
    model = randomise(config.build(), std=0.1)
    model.load_state_dict({f"base.{name}": value for name, value in base.model.state_dict().items()}, strict=False)
    pipeline, cond = Pipeline(recipe, model, base.shape), made(base)
    image = (torch.arange(256).view(1, 16, 16) % 97).byte()
    drawn = pipeline.sample(count=2, embeddings=cond, control=image)
    assert not torch.equal(drawn, base.sample(count=2, embeddings=cond))
    assert not torch.equal(drawn, pipeline.sample(count=2, embeddings=made(base, 1), control=image))
    unmoved = pipeline.sample(count=2, embeddings=cond, control=image, control_scale=0.0)
    assert_close(unmoved.float(), base.sample(count=2, embeddings=cond).float(), rtol=0, atol=1)
    with pytest.raises(DitkitError, match=r"this network is given text \[n \d+ 64\], and no encoder"):
        pipeline.sample(control=image)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("mmdit_tiny", "text [n 154 64], pooled [n 32]"),
        ("flux1_tiny", "text [n 512 64], pooled [n 32], scalars.guidance [n]"),
        ("pixart_tiny", "text [n 20 64], scalars.resolution [n 2], scalars.aspect_ratio [n 1]"),
        ("drax_tiny", "audio [n 50 64]"),
    ],
)
def test_without_them_a_sampling_says_what_to_give(name: str, said: str) -> None:
    pipeline = pipeline_of(name)
    assert needed(pipeline.recipe) == said
    settings: dict[str, Any]
    for settings in ({}, {"guidance": 2.0}):
        with pytest.raises(DitkitError) as caught:
            pipeline.sample(**settings)
        assert str(caught.value).startswith(f"this network is given {said}, and no encoder that makes it is here")
        assert "--embeddings FILE" in str(caught.value)
        assert "\n" not in str(caught.value)


def test_what_the_conditioner_makes_is_not_given(tiny: Recipe) -> None:
    recipe = find_recipe("mmdit_tiny")
    for one in (recipe.fitted(recipe.data.open()), tiny.fitted(tiny.data.open())):
        assert needed(one) == ""
        pipeline = Pipeline(one, one.model.build(), one.model.shape)
        cond = made(pipeline_of("mmdit_tiny"))
        given: dict[str, Any]
        for given in ({"embeddings": cond}, {"negative": cond}):
            with pytest.raises(DitkitError, match="given what its conditioner makes: leave out embeddings"):
                pipeline.sample(count=2, steps=1, **given)


def test_embeddings_that_do_not_fit_are_one_line() -> None:
    pipeline = pipeline_of("flux1_tiny")
    good = made(pipeline)
    text, scale = good.text, good.scalars["guidance"]
    assert text is not None
    values, mask = text.values, text.mask
    left = torch.tensor([[False, True, True, True, True], [True] * 5])
    for change, says in (
        ({"text": None}, "the embeddings do not hold text: this network is given text"),
        ({"pooled": None}, "do not hold pooled"),
        ({"scalars": {}}, r"do not hold scalars\.guidance"),
        ({"scalars": {"guidance": scale, "size": scale}}, r"the embeddings hold scalars\.size"),
        ({"label": torch.zeros(2, dtype=torch.long)}, "the embeddings hold label"),
        ({"audio": text}, "the embeddings hold audio"),
        ({"text": Tokens(values[..., :9], mask)}, r"text is float32 \[2, 5, 9\]: this network is given text \[n 512 6"),
        ({"pooled": torch.zeros(2, 3)}, r"pooled is float32 \[2, 3\]"),
        ({"pooled": torch.zeros(32)}, r"pooled is float32 \[32\]"),
        ({"pooled": torch.zeros(2, 32, dtype=torch.long)}, r"pooled is int64 \[2, 32\]"),
        ({"pooled": torch.zeros(3, 32)}, "pooled is of 3 samples, and 2 are drawn: give one, or one for each"),
        ({"pooled": torch.full((1, 32), torch.nan)}, "pooled holds numbers that are not finite"),
        ({"scalars": {"guidance": torch.ones(2, 1)}}, r"scalars\.guidance is float32 \[2, 1\]"),
        ({"text": Tokens(values, left)}, r"text\.mask has padding before tokens"),
        ({"text": Tokens(values, torch.zeros_like(mask))}, "or no token: tokens come first"),
        ({"text": Tokens(values[:, :0], mask[:, :0])}, "or no token"),
    ):
        with pytest.raises(DitkitError, match=says) as caught:
            pipeline.sample(count=2, embeddings=replace(good, **change))
        assert "\n" not in str(caught.value)
        if "scalars" not in change:
            with pytest.raises(DitkitError, match=says.replace("hold ", r"hold negative\.")) as caught:
                pipeline.sample(count=2, embeddings=good, negative=replace(good, **change), guidance=2.0)
            assert "negative." in str(caught.value)
    with pytest.raises(DitkitError, match="guidance turns away from a text, and none was given"):
        pipeline.sample(count=2, embeddings=good, guidance=2.0)


# files and the command line


def test_a_file_of_embeddings_is_read_as_it_was_given(tmp_path: Path) -> None:
    pipeline, path = pipeline_of("flux1_tiny"), tmp_path / "two.safetensors"
    cond = made(pipeline)
    assert cond.text is not None
    assert cond.pooled is not None
    tensors = {"text": cond.text.values, "text.mask": cond.text.mask.long(), "pooled": cond.pooled}
    tensors |= {"scalars.guidance": cond.scalars["guidance"]}
    save_file(tensors, path)
    given, negative = read_embeddings(path)
    assert negative is None
    assert torch.equal(pipeline.sample(count=2, embeddings=given), pipeline.sample(count=2, embeddings=cond))
    first = {f"negative.{name}": tensors[name][:1].clone() for name in ("text", "pooled")}
    save_file({**tensors, **first}, path)
    given, negative = read_embeddings(path)
    assert negative is not None
    assert negative.text is not None
    assert bool(negative.text.mask.all())  # all of them are tokens where no mask is given
    assert torch.equal(negative.text.values, cond.text.values[:1])
    assert given.text is not None
    assert torch.equal(given.text.mask, cond.text.mask)
    for change, says in (
        ({"txt": cond.pooled}, r"holds txt, which is none of embeddings: did you mean text"),
        ({"negative.pool": cond.pooled}, r"holds negative\.pool, which is none of embeddings: did you mean pooled"),
        ({"text": cond.pooled}, r"text is \[2, 32\] and text\.mask \[2, 5\]; give \[n l d\] and \[n l\]"),
        ({"text": torch.ones(2)}, r"text is \[2\]"),
        ({"text.mask": torch.ones(2, 4)}, r"text\.mask \[2, 4\]"),
        ({"negative.audio.mask": torch.ones(2, 4)}, r"negative\.audio is missing and negative\.audio\.mask \[2, 4\]"),
    ):
        save_file({name: value.clone() for name, value in {**tensors, **change}.items()}, path)
        with pytest.raises(DitkitError, match=says) as caught:
            read_embeddings(path)
        assert "\n" not in str(caught.value)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(DitkitError, match="damaged"):
        read_embeddings(path)


def test_an_imported_network_samples_from_a_file_of_embeddings(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As a person meets it: import says what is missing, sample refuses, and draws when it is given."""
    recipe, run, file = find_recipe("mmdit_tiny"), str(tmp_path / "run"), str(tmp_path / "cat.safetensors")
    model = randomise(replace(recipe.model, in_channels=4, input_size=8).build(), std=0.1)
    save(SD3, model, recipe.denoiser, tmp_path / "sd3.safetensors")
    words = ["import", str(tmp_path / "sd3.safetensors"), "--model.num-heads", "4", "--model.input-size", "8"]
    words += ["--autoencoder", str(tiny_autoencoder(tmp_path / "vae"))]
    assert main([*words, "--out", run]) == 0
    out = capsys.readouterr().out
    assert "it is given text [n 154 64], pooled [n 32], and no encoder that makes it is here" in out
    assert out.endswith(f"sample it with: ditkit sample {run} --embeddings FILE\n")

    generator = torch.Generator().manual_seed(0)
    tensors = {"text": torch.randn(1, 6, 64, generator=generator), "pooled": torch.randn(1, 32, generator=generator)}
    save_file(tensors, file)
    sample = ["sample", run, "--count", "2", "--steps", "2", "--out", str(tmp_path / "two.npy")]
    for extra, says in (
        ([], "this network is given text [n 154 64], pooled [n 32], and no encoder that makes it is here"),
        (
            ["--embeddings", file],
            "guidance turns away from a text, and none was given",
        ),  # it is 7 in Stable Diffusion 3
        (["--embeddings", str(tmp_path / "no")], "there is no file"),
    ):
        assert main([*sample, *extra]) == 1
        error = capsys.readouterr().err
        assert says in error
        assert error.count("\n") == 1
        assert not (tmp_path / "two.npy").exists()
    assert main([*sample, "--embeddings", file, "--guidance", "1"]) == 0
    drawn = torch.from_numpy(np.load(tmp_path / "two.npy"))
    pipeline = load(run, device="cpu")
    assert isinstance(pipeline.recipe.sample.solver, Euler)
    given, _ = read_embeddings(file)
    assert torch.equal(drawn, pipeline.sample(count=2, steps=2, guidance=1.0, embeddings=given))
    save_file({**tensors, **{f"negative.{name}": -value for name, value in tensors.items()}}, file)
    assert main([*sample, "--embeddings", file]) == 0
    assert not torch.equal(drawn, torch.from_numpy(np.load(tmp_path / "two.npy")))
