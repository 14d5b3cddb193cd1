"""The codec of published autoencoders against diffusers itself: each class, tiny and random, in hub layout, with the
scale, shift and statistics that the pipelines of its family apply."""

from __future__ import annotations

import inspect
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers.image_processor import VaeImageProcessor
from diffusers.models.autoencoders.autoencoder_dc import AutoencoderDC
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.autoencoders.autoencoder_kl_flux2 import AutoencoderKLFlux2
from diffusers.models.autoencoders.autoencoder_kl_hunyuan_video import AutoencoderKLHunyuanVideo
from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTiny
from diffusers.models.autoencoders.vq_model import VQModel
from diffusers.models.transformers.sana_transformer import SanaTransformer2DModel
from diffusers.models.transformers.transformer_flux2 import Flux2Transformer2DModel
from diffusers.pipelines.flux.pipeline_flux_img2img import FluxImg2ImgPipeline
from diffusers.pipelines.flux2.pipeline_flux2 import Flux2Pipeline
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion_inpaint import StableDiffusionInpaintPipeline
from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3_inpaint import StableDiffusion3InpaintPipeline
from diffusers.video_processor import VideoProcessor
from torch import Tensor

from ditkit.codecs import Autoencoder, Codec, autoencoder
from ditkit.config import DitkitError, from_json, to_json
from ditkit.importing import import_file
from ditkit.recipes import PUBLISHED
from ditkit.rng import Replay
from ditkit.runs import Run

from .conftest import Command
from .test_codecs import dataset

KL: dict[str, Any] = {
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "sample_size": 16,
}
BARE: dict[str, Any] = {**KL, "use_quant_conv": False, "use_post_quant_conv": False}
DC: dict[str, Any] = {
    "latent_channels": 4,
    "attention_head_dim": 2,
    "encoder_block_types": ("ResBlock", "EfficientViTBlock"),
    "decoder_block_types": ("ResBlock", "EfficientViTBlock"),
    "encoder_block_out_channels": (8, 8),
    "decoder_block_out_channels": (8, 8),
    "encoder_qkv_multiscales": ((), (5,)),
    "decoder_qkv_multiscales": ((), (5,)),
    "encoder_layers_per_block": (1, 1),
    "decoder_layers_per_block": (1, 1),
    "downsample_block_type": "conv",
    "upsample_block_type": "interpolate",
    "scaling_factor": 0.41407,
}
TAESD: dict[str, Any] = {
    **{f"{part}_block_out_channels": (8,) * 4 for part in ("encoder", "decoder")},
    **{f"num_{part}_blocks": (1,) * 4 for part in ("encoder", "decoder")},
}
VIDEO: dict[str, Any] = {"block_out_channels": (4,) * 4, "layers_per_block": 1, "norm_num_groups": 2}
MEAN, STD = (0.1, -0.7, 0.3, 0.05), (1.3, 0.4, 2.1, 0.9)


def by_channel(values: tuple[float, ...]) -> Tensor:
    return torch.tensor(values).view(1, -1, 1, 1)


def through(pipeline: Any) -> Callable[[Any, Tensor, torch.Generator], Tensor]:
    """How a pipeline of diffusers encodes an image: its own code, of which only the autoencoder is used."""

    def encode(vae: Any, images: Tensor, generator: torch.Generator) -> Tensor:
        patchify = getattr(pipeline, "_patchify_latents", None)
        return pipeline._encode_vae_image(SimpleNamespace(vae=vae, _patchify_latents=patchify), images, generator)

    return encode


@dataclass(frozen=True)
class Family:
    """A published kind of latents: its class, what is special in its configuration, and its pipeline's arithmetic."""

    cls: Any
    config: dict[str, Any]
    encode: Callable[[Any, Tensor, torch.Generator], Tensor]
    raw: Callable[[Any, Tensor], Tensor]
    """From latents to what the decoder is given."""
    shape: tuple[int, int, int]
    """Of the latents of 32 x 16 pixels."""
    numbers: tuple[float, float]
    """Scale and shift."""


def scaled(vae: Any, z: Tensor) -> Tensor:
    return z / vae.config.scaling_factor


def shifted(vae: Any, z: Tensor) -> Tensor:
    return (z / vae.config.scaling_factor) + vae.config.shift_factor


def normed(vae: Any, z: Tensor) -> Tensor:
    std = torch.sqrt(vae.bn.running_var.view(1, -1, 1, 1) + vae.config.batch_norm_eps)
    return Flux2Pipeline._unpatchify_latents(z * std + vae.bn.running_mean.view(1, -1, 1, 1))


FAMILIES = {
    "stable diffusion": Family(
        AutoencoderKL, {**KL, "latent_channels": 4}, through(StableDiffusionInpaintPipeline), scaled, (4, 16, 8),
        (0.18215, 0.0),
    ),
    "sdxl": Family(
        AutoencoderKL, {**KL, "latent_channels": 4, "scaling_factor": 0.13025},
        through(StableDiffusionInpaintPipeline), scaled, (4, 16, 8), (0.13025, 0.0),
    ),
    "sdxl with statistics": Family(
        AutoencoderKL,
        {**KL, "latent_channels": 4, "scaling_factor": 0.5, "latents_mean": MEAN, "latents_std": STD},
        lambda vae, x, g: (vae.encode(x).latent_dist.sample(g) - by_channel(MEAN)) * 0.5 / by_channel(STD),
        lambda vae, z: z * by_channel(STD) / vae.config.scaling_factor + by_channel(MEAN),
        (4, 16, 8),
        (0.5, 0.0),
    ),
    "sd3": Family(
        AutoencoderKL, {**BARE, "latent_channels": 16, "scaling_factor": 1.5305, "shift_factor": 0.0609},
        through(StableDiffusion3InpaintPipeline), shifted, (16, 16, 8), (1.5305, 0.0609),
    ),
    "flux.1": Family(
        AutoencoderKL,
        {**BARE, "latent_channels": 16, "scaling_factor": 0.3611, "shift_factor": 0.1159},
        through(FluxImg2ImgPipeline), shifted, (16, 16, 8), (0.3611, 0.1159),
    ),
    "flux.2": Family(
        AutoencoderKLFlux2, {**KL, "latent_channels": 3}, through(Flux2Pipeline), normed, (12, 8, 4), (1.0, 0.0)
    ),
    "sana": Family(
        AutoencoderDC, DC, lambda vae, x, g: vae.encode(x).latent * vae.config.scaling_factor, scaled, (4, 16, 8),
        (0.41407, 0.0),
    ),
    "tiny": Family(
        AutoencoderTiny, TAESD, lambda vae, x, g: vae.encode(x).latents, lambda vae, z: z, (4, 4, 2), (1.0, 0.0)
    ),
}  # fmt: skip
DRAWS = {"flux.2": False, "sana": False, "tiny": False}
"""Pipelines that take the mean of the posterior, or have none."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("autoencoders")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for name, family in FAMILIES.items():
            model = family.cls(**family.config)
            if name == "flux.2":
                model.bn.running_mean.normal_(0.2, 0.5)
                model.bn.running_var.uniform_(0.3, 2.0)
            model.save_pretrained(root / name)
    return {name: root / name for name in FAMILIES}


def reference(name: str, folder: Path) -> Any:
    return FAMILIES[name].cls.from_pretrained(folder).eval()


@pytest.fixture
def images() -> Tensor:
    return torch.randint(0, 256, (3, 3, 32, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def in_bytes(decoded: Tensor) -> Tensor:
    """As the pipelines write an image."""
    theirs: Any = VaeImageProcessor().postprocess(decoded, output_type="np")
    return torch.from_numpy((theirs * 255).round()).permute(0, 3, 1, 2).byte()


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_latents_and_images_are_those_of_the_pipelines(name: str, folders: dict[str, Path], images: Tensor) -> None:
    family, vae = FAMILIES[name], reference(name, folders[name])
    codec = Autoencoder.of(folders[name])
    assert isinstance(codec, Codec)
    assert (codec.channels, *codec.shape((3, 32, 16))[1:]) == family.shape
    assert (codec.scale, codec.shift) == family.numbers
    pixels = images / 127.5 - 1
    wanted = family.encode(vae, pixels, torch.Generator().manual_seed(5))
    assert wanted.shape[1:] == family.shape
    assert wanted.std() > 0.02
    drawn = DRAWS.get(name, True)
    if drawn:
        mean = vae.encode(pixels).latent_dist.mean
        noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(5))
        assert torch.equal(codec.encode(images, Replay({"codec": noise})), wanted)
        assert torch.equal(replace(codec, sample=False).encode(images, Replay({"codec": noise})), codec.encode(images))
        assert not torch.equal(codec.encode(images), wanted)
    else:
        assert torch.equal(replace(codec, sample=False).encode(images, Replay({})), wanted)
        assert torch.equal(codec.encode(images), wanted)
    decoded = vae.decode(family.raw(vae, wanted)).sample
    assert torch.equal(codec.decode(wanted), in_bytes(decoded))
    assert codec.decode(wanted).float().std() > 1


@pytest.mark.parametrize("name", FAMILIES)
def test_all_that_the_files_say_is_in_the_fitted_recipe_and_what_is_given_wins(
    name: str, folders: dict[str, Path], images: Tensor
) -> None:
    plain = Autoencoder(str(folders[name]))
    fitted = plain.fitted(dataset(images))
    assert from_json(json.loads(json.dumps(to_json(fitted)))) == fitted
    assert None not in (fitted.scale, fitted.shift, fitted.channels, fitted.factor, fitted.means, fitted.stds)
    assert fitted.sample == (name not in ("sana", "tiny"))
    assert fitted.fitted(dataset(images)) == fitted
    assert fitted.state() == {}
    assert torch.equal(plain.encode(images), fitted.encode(images))
    assert torch.equal(plain.decode(plain.encode(images)), fitted.decode(fitted.encode(images)))
    other = replace(plain, scale=0.7, means=(), stds=(), shift=0.4).fitted(dataset(images))
    assert (other.scale, other.shift, other.means, other.channels) == (0.7, 0.4, (), fitted.channels)
    assert not torch.equal(other.encode(images), fitted.encode(images))


def test_a_folder_is_the_same_from_everywhere(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = next(iter(folders.values()))
    monkeypatch.chdir(folder.parent)
    codec = Autoencoder(folder.name)
    assert codec.path == str(folder.resolve())
    monkeypatch.chdir(tmp_path)
    assert from_json(to_json(codec)).filled().channels
    assert Autoencoder(folder.name).path == folder.name  # here it is a name on the hub


def test_statistics_that_are_given_take_the_place_of_a_shift(folders: dict[str, Path], images: Tensor) -> None:
    statistics: dict[str, Any] = {"means": (0.5,) * 16, "stds": (2.0,) * 16}
    codec = Autoencoder.of(folders["sd3"], **statistics)
    assert (codec.shift, codec.scale) == (0.0, 1.5305)
    z = Autoencoder.of(folders["sd3"], scale=1.0, shift=0.0).encode(images)
    assert torch.equal(codec.encode(images), (z - 0.5) * 1.5305 / 2.0)
    with pytest.raises(DitkitError, match=r"shifts twice: set codec\.shift 0"):
        replace(codec, shift=0.1)


@pytest.mark.parametrize("name", ["stable diffusion", "flux.2", "sana"])
@torch.no_grad()
def test_tiles_and_slices_are_those_of_diffusers(name: str, folders: dict[str, Path]) -> None:
    big = torch.randint(0, 256, (2, 3, 48, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    vae, codec = reference(name, folders[name]), Autoencoder.of(folders[name], sample=False)
    small = {}
    if name == "sana":  # whose tiles are 512 pixels, whatever it was trained on
        small = {"tile_sample_min_height": 24, "tile_sample_min_width": 24}
        small |= {"tile_sample_stride_height": 16, "tile_sample_stride_width": 16}
        codec.model().enable_tiling(**small)
    family, whole = FAMILIES[name], codec.encode(big)
    vae.enable_tiling(**small)
    vae.enable_slicing()
    tiled = replace(codec, tiling=True, slicing=True)
    z = family.encode(vae, big / 127.5 - 1, torch.Generator()) if name != "stable diffusion" else None
    if z is None:
        z = vae.encode(big / 127.5 - 1).latent_dist.mean * vae.config.scaling_factor
    assert torch.equal(tiled.encode(big), z)
    assert not torch.allclose(whole, z, atol=1e-3)
    assert torch.equal(tiled.decode(z), in_bytes(vae.decode(family.raw(vae, z)).sample))
    assert torch.equal(codec.encode(big), whole)  # the others of this path have no tiles
    torch.testing.assert_close(replace(codec, slicing=True).encode(big), whole, rtol=1e-5, atol=1e-5)


def test_the_tiny_one_is_tiled_where_diffusers_can(folders: dict[str, Path], tmp_path: Path) -> None:
    codec = Autoencoder.of(folders["tiny"], tiling=True)
    big = torch.randint(0, 256, (1, 3, 520, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    vae = reference("tiny", folders["tiny"])
    vae.enable_tiling()
    with torch.no_grad():
        assert torch.equal(codec.encode(big), vae.encode(big / 127.5 - 1).latents)
    AutoencoderTiny(**TAESD, latent_channels=16).save_pretrained(tmp_path)
    with pytest.raises(DitkitError, match=r"only with 4 channels and the factor 8.* 16 and 8: set codec\.tiling False"):
        Autoencoder.of(tmp_path, tiling=True).encode(big)


def test_what_a_config_leaves_out_is_what_its_class_takes() -> None:
    for name, kind in autoencoder._CLASSES.items():
        cls = autoencoder._diffusers(kind.module, name)
        defaults = {key: p.default for key, p in inspect.signature(cls.__init__).parameters.items()}
        assert kind.depth == len(defaults[kind.levels])
        assert kind.channels == defaults["latent_channels"]
        assert kind.scale == defaults.get("scaling_factor", 1.0)
        assert kind.patch == defaults.get("patch_size", (1, 1))[0]
        said = {key: value for key, value in defaults.items() if value is not None and key != "self"}
        assert autoencoder._settings(kind, said) == autoencoder._settings(kind, {})


def test_recipes_of_papers_read_no_file() -> None:
    """Their latents are the papers', whatever a file says: 0.18215 of Stable Diffusion's, VA-VAE's own statistics."""
    codecs = [make("nowhere").codec for make in PUBLISHED.values()]
    latent = [codec for codec in codecs if isinstance(codec, Autoencoder)]
    assert latent
    for codec in latent:
        assert codec.filled() is codec
        assert codec.sample
        assert (codec.scale, codec.shift, codec.channels, codec.factor, codec.means, codec.stds) in (
            (0.18215, 0.0, 4, 8, (), ()),
            (1.0, 0.0, 32, 16, (), ()),
        )


def changed(source: Path, target: Path, **entries: Any) -> Path:
    shutil.copytree(source, target)
    config = json.loads((target / "config.json").read_text()) | entries
    (target / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v != "absent"}))
    return target


def test_what_is_no_such_autoencoder_gets_one_line(folders: dict[str, Path], tmp_path: Path, images: Tensor) -> None:
    vq: dict[str, Any] = {key: value for key, value in KL.items() if key != "sample_size"}
    VQModel(**vq).save_pretrained(tmp_path / "vq")
    (tmp_path / "empty").mkdir()
    run = tmp_path / "run"
    run.mkdir()
    (run / "recipe.json").write_text("{}")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{")
    shutil.copytree(folders["sana"], tmp_path / "pipeline" / "vae")
    first = folders["stable diffusion"]
    for path, fields, says in (
        (tmp_path / "vq", {}, "is a VQModel, and the codec autoencoder reads AutoencoderKL, .*AutoencoderTiny"),
        (tmp_path / "empty", {}, "holds no config.json"),
        (run, {}, f"is a run of ditkit.*use --codec trained_autoencoder:{run}"),
        (tmp_path / "broken", {}, "cannot load the autoencoder"),
        (tmp_path / "pipeline", {}, "is a whole pipeline of diffusers: give its autoencoder, .*pipeline/vae"),
        (changed(first, tmp_path / "a", _class_name="absent"), {}, "its config.json names no class"),
        (changed(first, tmp_path / "b", latent_channels="x"), {}, "is no AutoencoderKL's"),
        (changed(first, tmp_path / "c", _class_name="AutoencoderTiny"), {}, r"its file has no \S+ and \d+ others"),
        (first, {"channels": 5}, "has 4 channels and the factor 2, not 5 and 2"),
        (folders["flux.2"], {"channels": 3}, "one number for each of the 3 channels"),
        (folders["flux.2"], {"channels": 3, "means": (), "stds": ()}, "has 12 channels and the factor 4, not 3 and 4"),
    ):
        with pytest.raises(DitkitError, match=says) as caught:
            Autoencoder.of(path, **fields).encode(images)
        assert "\n" not in str(caught.value)
    AutoencoderKL(**KL, in_channels=1, out_channels=1).save_pretrained(tmp_path / "grey")
    with pytest.raises(DitkitError, match="is for images of 1 channels, and the codec is for RGB"):
        Autoencoder.of(tmp_path / "grey").encode(images)


# --------------------------------------------------------------------------------------------------------------- videos


@pytest.fixture(scope="module")
def video_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Kandinsky 5's class of autoencoders of videos; only the widths are not the published ones."""
    folder = tmp_path_factory.mktemp("video") / "vae"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        AutoencoderKLHunyuanVideo(**VIDEO).save_pretrained(folder)
    return folder


def video_reference(folder: Path) -> Any:
    """Without gradients: torch rounds a Linear whose weights want some otherwise, by 1e-7."""
    return AutoencoderKLHunyuanVideo.from_pretrained(folder).eval().requires_grad_(False)


def clips(count: int, frames: int, height: int = 16, width: int = 8) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (count, 3, frames, height, width), dtype=torch.uint8, generator=generator)


def video_bytes(decoded: Tensor) -> Tensor:
    """As Kandinsky 5's pipeline writes a video."""
    theirs: Any = VideoProcessor().postprocess_video(decoded, output_type="np")
    return torch.from_numpy((theirs * 255).round()).permute(0, 4, 1, 2, 3).byte()


@pytest.mark.parametrize("frames", [1, 5, 9, 21])  # more than 16 are cut along time
@torch.no_grad()
def test_latents_of_videos_and_videos_are_those_of_diffusers(frames: int, video_folder: Path) -> None:
    vae = video_reference(video_folder)
    codec = Autoencoder.of(video_folder)
    assert (codec.channels, codec.factor, codec.frames, codec.scale, codec.shift) == (16, 8, 4, 0.476986, 0.0)
    assert from_json(json.loads(json.dumps(to_json(codec)))) == codec
    videos = clips(2, frames)
    posterior = vae.encode(videos / 127.5 - 1).latent_dist
    noise = torch.randn(posterior.mean.shape, generator=torch.Generator().manual_seed(5))
    wanted = posterior.sample(torch.Generator().manual_seed(5)) * vae.config.scaling_factor
    assert wanted.shape == (2, 16, 1 + (frames - 1) // 4, 2, 1)
    assert codec.shape((3, frames, 16, 8)) == tuple(wanted.shape[1:])
    assert wanted.std() > 0.02
    assert torch.equal(codec.encode(videos, Replay({"codec": noise})), wanted)
    mean = posterior.mean * vae.config.scaling_factor
    assert torch.equal(codec.encode(videos), mean)
    assert torch.equal(replace(codec, sample=False).encode(videos, Replay({"codec": noise})), mean)
    assert torch.equal(codec.drawn(codec.moments(videos), Replay({"codec": noise})), wanted)
    decoded = codec.decode(wanted)
    assert torch.equal(decoded, video_bytes(vae.decode(wanted / vae.config.scaling_factor).sample))
    assert decoded.shape == videos.shape
    assert decoded.float().std() > 1


@torch.no_grad()
def test_videos_are_tiled_and_sliced_as_by_diffusers(video_folder: Path) -> None:
    vae = video_reference(video_folder)
    codec = Autoencoder.of(video_folder)
    small = {f"tile_sample_min_{side}": 16 for side in ("height", "width")}
    small |= {f"tile_sample_stride_{side}": 8 for side in ("height", "width")}
    codec.model().enable_tiling(**small)
    videos = clips(2, 5, 32, 24)
    whole = codec.encode(videos)
    vae.enable_tiling(**small)
    vae.use_slicing = True
    tiled = replace(codec, tiling=True, slicing=True)
    z = vae.encode(videos / 127.5 - 1).latent_dist.mean * vae.config.scaling_factor
    assert torch.equal(tiled.encode(videos), z)
    assert not torch.allclose(whole, z, atol=1e-3)
    assert torch.equal(tiled.decode(z), video_bytes(vae.decode(z / vae.config.scaling_factor).sample))
    assert torch.equal(codec.encode(videos), whole)


@torch.no_grad()
def test_statistics_of_channels_are_of_the_channels_of_videos(video_folder: Path) -> None:
    means, stds = tuple(0.1 * i for i in range(16)), tuple(1 + 0.1 * i for i in range(16))
    videos, plain = clips(1, 5), Autoencoder.of(video_folder, scale=1.0)
    codec = replace(plain, means=means, stds=stds)
    latents, z = codec.encode(videos), plain.encode(videos)
    for i in range(16):
        assert torch.allclose(latents[:, i], (z[:, i] - means[i]) / stds[i], atol=1e-6)
    assert torch.equal(codec.decode(latents), plain.decode(latents * by_video(stds) + by_video(means)))


def by_video(values: tuple[float, ...]) -> Tensor:
    return torch.tensor(values).view(1, -1, 1, 1, 1)


@torch.no_grad()
def test_an_image_is_a_video_of_one_frame_where_the_network_wants_it(folders: dict[str, Path], images: Tensor) -> None:
    """Kandinsky 5's images: FLUX.1's latents without the shift, with an axis of one frame."""
    vae = reference("flux.1", folders["flux.1"])
    codec = Autoencoder.of(folders["flux.1"], one_frame=True, shift=0.0)
    assert codec.shape((3, 32, 16)) == (16, 1, 16, 8)
    posterior = vae.encode(images / 127.5 - 1).latent_dist
    noise = torch.randn(posterior.mean.shape, generator=torch.Generator().manual_seed(5))
    wanted = posterior.sample(torch.Generator().manual_seed(5)) * vae.config.scaling_factor
    latents = codec.encode(images, Replay({"codec": noise[:, :, None]}))
    assert torch.equal(latents, wanted[:, :, None])
    assert torch.equal(codec.decode(latents), in_bytes(vae.decode(wanted / vae.config.scaling_factor).sample))


def test_what_is_no_such_video_gets_one_line(video_folder: Path, folders: dict[str, Path], images: Tensor) -> None:
    codec, first = Autoencoder.of(video_folder), Autoencoder.of(folders["stable diffusion"])
    for frames, near in ((2, "1 or 5"), (4, "1 or 5"), (8, "5 or 9"), (122, "121 or 125")):
        with pytest.raises(DitkitError, match=f"videos of 1 \\+ 4 k frames, and a video has {frames}: give {near}$"):
            codec.encode(clips(1, frames))
        with pytest.raises(DitkitError, match=f"a video has {frames}"):
            codec.shape((3, frames, 16, 8))
    for call, says in (
        (lambda: codec.encode(images), r"for videos \[3 t h w\].*divisible by 8, and a sample is \[3, 32, 16\]"),
        (lambda: codec.encode(clips(1, 5, 12)), r"divisible by 8, and a sample is \[3, 5, 12, 8\]"),
        (lambda: codec.encode(clips(1, 5)[:, :1]), r"a sample is \[1, 5, 16, 8\]"),
        (lambda: first.encode(clips(1, 5)), r"for images \[3 h w\].*a sample is \[3, 5, 16, 8\]"),
        (
            lambda: replace(codec, frames=8).encode(clips(1, 9)),
            r"videos of 4 frames in one latent: set codec\.frames 4",
        ),
        (lambda: replace(first, frames=4).encode(clips(1, 5)), r"is for images: set codec\.frames None"),
        (lambda: Autoencoder.of(video_folder, one_frame=True), r"codec\.one_frame is for one of images"),
        (lambda: replace(codec, frames=0), r"codec\.frames is at least 1"),
    ):
        with pytest.raises(DitkitError, match=says) as caught:
            call()
        assert "\n" not in str(caught.value)


# --------------------------------------------------------------------------------------------------------------- import


@pytest.mark.parametrize(
    ("name", "cls", "config"),
    [
        (
            "sana",
            SanaTransformer2DModel,
            {"in_channels": 4, "out_channels": 4, "num_cross_attention_heads": 2, "cross_attention_head_dim": 8}
            | {"cross_attention_dim": 16, "caption_channels": 8, "sample_size": 8, "attention_head_dim": 8},
        ),
        (
            "flux.2",
            Flux2Transformer2DModel,
            {"in_channels": 12, "num_single_layers": 1, "joint_attention_dim": 16, "axes_dims_rope": (4, 4, 4, 4)}
            | {"attention_head_dim": 16},
        ),
    ],
)
def test_a_pipeline_that_is_imported_brings_its_autoencoder(
    name: str, cls: Any, config: dict[str, Any], folders: dict[str, Path], tmp_path: Path
) -> None:
    cls(**config, patch_size=1, num_layers=1, num_attention_heads=2).save_pretrained(tmp_path / "pipe" / "transformer")
    shutil.copytree(folders[name], tmp_path / "pipe" / "vae")
    run, _ = import_file(tmp_path / "pipe", tmp_path / "run")
    assert run.recipe().codec == Autoencoder.of(tmp_path / "pipe" / "vae")
    with pytest.raises(DitkitError, match="makes latents of 16 channels, and the model takes"):
        import_file(tmp_path / "pipe", tmp_path / "other", autoencoder=str(folders["sd3"]))


def test_one_word_on_the_command_line_is_enough(
    ditkit: Command, folders: dict[str, Path], pictures: Path, tmp_path: Path
) -> None:
    words = ("--model.hidden-size", "16", "--model.depth", "1", "--model.num-heads", "2")
    words += (
        "--model.in-context-len",
        "0",
        "--model.bottleneck-dim",
        "4",
        "--train.batch",
        "4",
        "--train.sample-every",
        "0",
        "--sample.steps",
        "2",
        "--quiet",
    )
    for name in ("flux.2", "sana"):
        codec = f"autoencoder:{folders[name]}"
        begin = ("train", f"folder:{pictures}", "--data.resolution", "16", "--codec", codec, "--out", name)
        for steps in ("2", "3"):  # the same words go on
            done = ditkit(*begin, *words, "--train.steps", steps)
            assert done.returncode == 0, done.stderr
        recipe = Run(tmp_path / name).recipe()
        assert recipe.codec == Autoencoder(str(folders[name])).fitted(dataset(torch.zeros(1, 3, 16, 16)))
        assert recipe.model.shape == recipe.codec.shape((3, 16, 16))
        assert recipe.model.patch_size * recipe.codec.factor == 8  # pixels, as before
        assert ditkit("sample", name, "--count", "2", "--out", f"{name}.png").returncode == 0
