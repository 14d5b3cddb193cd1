"""The codec of latents, against diffusers itself on a tiny random autoencoder in hub layout."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from torch.testing import assert_close

from ditkit.codecs import Autoencoder, Codec, Posterior
from ditkit.config import DitkitError, from_json, to_json
from ditkit.rng import Replay, Rng

from .conftest import tiny_autoencoder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_autoencoder(tmp_path_factory.mktemp("vae"))


@pytest.fixture
def codec(folder: Path) -> Autoencoder:
    return Autoencoder(str(folder), scale=0.7, shift=0.3, channels=4, factor=2)


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randint(0, 256, (3, 3, 16, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def test_it_is_a_codec_and_survives_json(codec: Autoencoder) -> None:
    assert isinstance(codec, Codec)
    assert from_json(json.loads(json.dumps(to_json(codec)))) == codec
    assert codec.state() == {}
    assert codec.loaded({}) == codec
    assert codec.vocab == 0


def test_a_file_that_is_older_than_statistics_has_none(folder: Path, tmp_path: Path, images: torch.Tensor) -> None:
    said = to_json(Autoencoder(str(folder), scale=0.7, shift=0.3, channels=4, factor=2, means=(), stds=()))
    old = {name: said[name] for name in ("type", "path", "download", "scale", "shift", "channels", "factor", "sample")}
    codec = from_json(old)
    assert to_json(codec) == said
    assert codec.filled() == codec  # so that a run of it goes on
    shutil.copytree(folder, tmp_path / "vae")
    config = json.loads((tmp_path / "vae" / "config.json").read_text())
    statistics = {"latents_mean": [0.5] * 4, "latents_std": [2.0] * 4}
    (tmp_path / "vae" / "config.json").write_text(json.dumps(config | statistics))
    moved = from_json({**old, "path": str(tmp_path / "vae")})
    assert torch.equal(moved.encode(images), codec.encode(images))  # as its network has learned them
    assert Autoencoder.of(tmp_path / "vae").means == (0.5,) * 4
    assert from_json({"type": "codec/autoencoder", "path": str(tmp_path / "vae")}).filled().means == (0.5,) * 4


def test_latents_and_images_are_those_of_diffusers(codec: Autoencoder, folder: Path, images: torch.Tensor) -> None:
    theirs: Any = AutoencoderKL.from_pretrained(folder)
    theirs.eval()
    with torch.no_grad():
        posterior = theirs.encode(images / 127.5 - 1).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=torch.Generator().manual_seed(2))
        drawn = (posterior.mean + posterior.std * noise - 0.3) * 0.7
        mode = (posterior.mode() - 0.3) * 0.7
        back = theirs.decode(mode / 0.7 + 0.3).sample
    draws = Replay({"codec": noise})
    assert_close(codec.encode(images, draws), drawn, rtol=1e-5, atol=1e-5)
    assert_close(replace(codec, sample=False).encode(images, draws), mode, rtol=1e-5, atol=1e-5)
    assert_close(codec.encode(images), mode, rtol=1e-5, atol=1e-5)
    assert (drawn - mode).abs().max() > 0.01
    decoded = codec.decode(mode)
    assert decoded.dtype == torch.uint8
    wanted = (back / 2 + 0.5).clamp(0, 1) * 255
    assert (decoded.float() - wanted).abs().max() <= 0.5 + 1e-3
    assert decoded.float().std() > 1
    assert codec.shape((3, 16, 8)) == tuple(mode.shape[1:])


def test_moments_are_what_an_encoding_is_drawn_from(codec: Autoencoder, images: torch.Tensor) -> None:
    assert isinstance(codec, Posterior)
    moments = codec.moments(images)
    assert moments.shape == (3, 2, 4, 8, 4)
    for rng in (None, Rng(0).at(1, torch.arange(3)), Rng(0).at(2, torch.arange(3))):
        assert torch.equal(codec.drawn(moments, rng), codec.encode(images, rng))
    ones = Replay({"codec": torch.ones(3, 4, 8, 4)})
    assert_close(codec.drawn(moments, ones) - codec.drawn(moments), 0.7 * moments[:, 1], rtol=1e-4, atol=1e-5)
    mean = replace(codec, sample=False)
    assert torch.equal(mean.moments(images), moments[:, :1])
    assert torch.equal(mean.drawn(moments[:, :1], ones), codec.drawn(moments))


def test_a_row_is_a_function_of_its_id_and_nothing_learns(codec: Autoencoder, images: torch.Tensor) -> None:
    rng = Rng(0)
    whole = codec.encode(images, rng.at(5, torch.arange(3)))
    part = codec.encode(images[2:], rng.at(5, torch.tensor([2])))
    assert_close(part, whole[2:])
    assert not whole.requires_grad
    assert not any(p.requires_grad for p in codec.model().parameters())
    assert codec.model() is codec.model()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"channels": 8}, "has 4 channels and the factor 2, not 8 and 2"),
        ({"factor": 8}, "not 4 and 8"),
        ({"path": "./nowhere"}, "no folder of diffusers"),
        ({"path": "nobody/nothing-of-this-name"}, "hf download"),
    ],
)
def test_what_cannot_be_had_is_said(codec: Autoencoder, change: dict, says: str, images: torch.Tensor) -> None:
    with pytest.raises(DitkitError, match=says) as caught:
        replace(codec, **change).encode(images)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("sample", [(3, 15, 16), (1, 16, 16), (16,)])
def test_images_that_do_not_fit_are_refused(codec: Autoencoder, sample: tuple[int, ...]) -> None:
    with pytest.raises(DitkitError, match="sides divisible by 2"):
        codec.shape(sample)


@pytest.mark.parametrize("change", [{"scale": 0.0}, {"scale": float("nan")}, {"channels": 0}, {"factor": 0}])
def test_sizes_that_cannot_be_are_refused(change: dict) -> None:
    with pytest.raises(DitkitError, match=r"codec\.scale above 0"):
        Autoencoder(**change)


def test_a_broken_file_gives_one_line(folder: Path, tmp_path: Path, images: torch.Tensor) -> None:
    broken = tmp_path / "vae"
    broken.mkdir()
    (broken / "config.json").write_bytes((folder / "config.json").read_bytes())
    with pytest.raises(DitkitError, match="cannot load the autoencoder") as caught:
        Autoencoder(str(broken), factor=2).encode(images)
    assert "\n" not in str(caught.value)
    weights = (folder / "diffusion_pytorch_model.safetensors").read_bytes()
    (broken / "diffusion_pytorch_model.safetensors").write_bytes(weights[:2000])
    with pytest.raises(DitkitError, match="cannot load the autoencoder"):
        Autoencoder(str(broken), factor=2).encode(images)


def test_latents_may_be_normalised_by_channel(codec: Autoencoder, images: torch.Tensor) -> None:
    """VA-VAE's: mean 0 and deviation 1 in each channel; there and back is the same as without."""
    plain = replace(codec, scale=1.0, shift=0.0, sample=False)
    z = plain.encode(images)
    means, stds = z.mean((0, 2, 3)).tolist(), z.std((0, 2, 3)).tolist()
    normal = replace(plain, means=tuple(means), stds=tuple(stds))
    latents = normal.encode(images)
    torch.testing.assert_close(latents.mean((0, 2, 3)), torch.zeros(4), rtol=0, atol=1e-4)
    torch.testing.assert_close(latents.std((0, 2, 3)), torch.ones(4), rtol=1e-4, atol=0)
    difference = normal.decode(latents).int() - plain.decode(z).int()
    assert int(difference.abs().max()) <= 1  # rounding to bytes
    for change in ({"means": (0.0,)}, {"means": tuple(means)}, {"means": tuple(means), "stds": (0.0,) * len(means)}):
        with pytest.raises(DitkitError, match=r"one number for each of the \d channels, stds above 0"):
            replace(codec, **change)
