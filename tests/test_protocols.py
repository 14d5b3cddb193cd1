"""Evaluators by name: what they read, what they refuse, and that their numbers stay apart."""

from __future__ import annotations

import io
import json
import pickle
import subprocess
import sys
import types
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from torch.testing import assert_close
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection, Dinov2Config, Dinov2Model

from ditkit.config import DitkitError, lookup, names
from ditkit.data import Dataset, Digits
from ditkit.evaluation import (
    RULES,
    Evaluator,
    find_protocol,
    frechet_distance,
    gaussian_distance,
    images_in_memory,
    images_of,
    inception_score,
    judge,
    judge_run,
    kernel_distance,
    labels_by,
    precision_recall,
    read_statistics,
    reference_of_images,
)
from ditkit.evaluation.features import Features
from ditkit.evaluation.measure import blurred
from ditkit.evaluation.networks import CleanInception, Clip, Dino, ScriptedInception, Seen
from ditkit.evaluation.protocols import Ditkit
from ditkit.evaluation.references import Reference, look
from ditkit.pipeline import load
from ditkit.report import Table, Value
from ditkit.studies.study import Finding, Results
from ditkit.training import train

from .conftest import Command


def pixels(n: int, side: int = 16, seed: int = 0, channels: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    small = torch.rand(n, channels, 4, 4, generator=generator)
    return (F.interpolate(small, (side, side), mode="bilinear") * 255).round().to(torch.uint8)


def save_pngs(images: Tensor, folder: Path) -> Path:
    folder.mkdir(parents=True)
    for i, image in enumerate(images):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{i:03d}.png")
    return folder


def save_arr(images: Tensor, path: Path, **others: np.ndarray) -> Path:
    np.savez(path, arr_0=images.permute(0, 2, 3, 1).numpy(), **others)  # type: ignore[arg-type]
    return path


class Layers(torch.nn.Module):
    """In the place of Inception's layers: numbers of an image scaled to [-1, 1]."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat((x.mean((2, 3)), x.square().mean((2, 3))), 1)[:, :, None, None]


class TinyInception(torch.nn.Module):
    """Answers as NVIDIA's TorchScript does."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = Layers()

    def forward(self, images: Tensor, return_features: bool = False, no_output_bias: bool = False) -> Tensor:
        found = self.layers((images.float() - 128) / 128).flatten(1)
        return found if return_features else torch.softmax(4 * found if no_output_bias else found + 1, 1)


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("weights") / "inception-2015-12-05.pt"
    torch.jit.save(torch.jit.script(TinyInception()), str(path))
    return str(path)


@pytest.fixture(scope="module")
def dino(tmp_path_factory: pytest.TempPathFactory) -> str:
    torch.manual_seed(0)
    config = Dinov2Config(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, patch_size=14, image_size=70)
    Dinov2Model(config).save_pretrained(folder := tmp_path_factory.mktemp("dino"))
    return str(folder)


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> str:
    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14,
        projection_dim=8,
    )  # fmt: skip
    CLIPVisionModelWithProjection(config).save_pretrained(folder := tmp_path_factory.mktemp("clip"))
    return str(folder)


# what is measured


def test_images_are_the_same_from_a_folder_and_an_archive(tmp_path: Path) -> None:
    images = pixels(7)
    folder, archive = save_pngs(images, tmp_path / "a"), save_arr(images, tmp_path / "a.npz")
    np.save(tmp_path / "a.npy", images.numpy())
    for path in (folder, archive, tmp_path / "a.npy"):
        found = images_of(path)
        assert found.count == 7
        assert torch.equal(torch.cat(list(found.batches(3))), images)
        assert found.sha256 == images_in_memory(images, "here").sha256
        assert torch.equal(torch.cat(list(images_of(path, 4).batches(3))), images[:4])
    assert images_in_memory(images.flip(0), "").sha256 != images_of(folder).sha256


def test_what_is_no_images_is_said(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    np.savez(tmp_path / "other.npz", mu=np.zeros(3))
    np.savez(tmp_path / "floats.npz", arr_0=np.zeros((2, 4, 4, 3)))
    (tmp_path / "text.npz").write_text("no archive")
    np.save(tmp_path / "floats.npy", np.zeros((2, 3, 4, 4)))
    save_pngs(pixels(2), tmp_path / "mixed")
    Image.new("RGB", (5, 4)).save(tmp_path / "mixed" / "z.png")
    for name, said in {
        "empty": "holds no images",
        "other.npz": "has no arr_0",
        "floats.npz": "must be uint8 images",
        "floats.npy": "must be uint8 images",
        "text.npz": "no .npz that can be read",
        "nothing": "neither a folder of images nor",
    }.items():
        with pytest.raises(DitkitError, match=said):
            images_of(tmp_path / name)
    with pytest.raises(DitkitError, match=r"4 x 5 pixels and 000\.png 16 x 16"):
        list(images_of(tmp_path / "mixed").batches(2))


def test_damaged_and_foreign_arrays_are_one_line_and_run_nothing(tmp_path: Path) -> None:
    class Program:
        def __reduce__(self) -> tuple[Callable[..., None], tuple[Path]]:
            return Path.touch, (tmp_path / "ran",)

    def header(shape: tuple[int, ...]) -> bytes:
        content = {"descr": "|u1", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(written := io.BytesIO(), content)
        return written.getvalue()

    good = pixels(40).permute(0, 2, 3, 1).numpy()
    np.savez(tmp_path / "good.npz", arr_0=good)
    whole = (tmp_path / "good.npz").read_bytes()
    changed, locked = bytearray(whole), bytearray(whole)
    changed[len(whole) // 2] ^= 255
    for at in (whole.find(b"PK\x03\x04") + 6, whole.rfind(b"PK\x01\x02") + 8):
        locked[at] |= 1
    (tmp_path / "changed.npz").write_bytes(changed)
    (tmp_path / "locked.npz").write_bytes(locked)
    for name, member, content in (
        ("short.npz", "arr_0.npy", header((500, 4, 4, 3)) + bytes(480)),
        ("negative.npz", "arr_0.npy", header((-1, 4, 4, 3)) + bytes(480)),
        ("words.npz", "arr_0.npy", b"\x93NUMPY\x01\x00\x10\x00{broken python  \n"),
        ("nameless.npz", "arr_0", b"hello"),
    ):
        with zipfile.ZipFile(tmp_path / name, "w") as archive:
            archive.writestr(member, content)
    np.savez(tmp_path / "columns.npz", arr_0=np.asfortranarray(good))
    np.savez(tmp_path / "first.npz", arr_0=pixels(5).numpy())
    np.save(tmp_path / "last.npy", good)
    programs = np.array([Program()] * 20, dtype=object)
    np.savez(tmp_path / "program.npz", arr_0=programs)
    np.save(tmp_path / "program.npy", programs)
    (tmp_path / "pickle.npy").write_bytes(pickle.dumps(Program()))
    (tmp_path / "empty.npy").write_bytes(b"")
    (tmp_path / "empty.npz").write_bytes(b"")
    for name, said in {
        "changed.npz": "arr_0 cannot be read: Bad CRC",
        "locked.npz": "arr_0 cannot be read: .*encrypted",
        "short.npz": "is cut off: it should hold 500 images",
        "negative.npz": "must be uint8 images",
        "words.npz": "arr_0 cannot be read",
        "nameless.npz": "has no arr_0",
        "columns.npz": r"save numpy.ascontiguousarray\(images\)",
        "first.npz": r"save numpy.transpose\(images, \(0, 2, 3, 1\)\)",
        "last.npy": r"save numpy.transpose\(images, \(0, 3, 1, 2\)\)",
        "program.npz": "must be uint8 images",
        "program.npy": "no .npy that can be read",
        "pickle.npy": "no .npy that can be read",
        "empty.npy": "no .npy that can be read",
        "empty.npz": "no .npz that can be read",
    }.items():
        with pytest.raises(DitkitError, match=said) as caught:
            list(images_of(tmp_path / name).batches(16))
        assert "\n" not in str(caught.value)
        assert "allow_pickle" not in str(caught.value)
    assert not (tmp_path / "ran").exists()


# each protocol is its network and its metrics, and nothing else


def test_ditkit_is_its_features_and_metrics_and_knows_blur_and_noise(tmp_path: Path) -> None:
    """On real digits: a set is at no distance from itself, and further away the more it is blurred or noised."""
    digits = Digits().open()
    real, other = (split.batch(torch.arange(60)).data for split in (digits.heldout, digits.train))
    protocol, reference = Ditkit(size=64), images_in_memory(real, "digits")
    found = judge(protocol, images_in_memory(other, "others"), reference, device="cpu", cache=str(tmp_path))
    a, b = (Features(64)(x) for x in (other, real))
    assert found.numbers["frechet"] == pytest.approx(frechet_distance(a, b), rel=1e-6)
    assert found.numbers["kid"] == kernel_distance(a, b)
    assert found.numbers["precision"] == precision_recall(a, b)[0]
    assert found.status == "proven"

    same = judge(protocol, reference, reference, device="cpu", cache=str(tmp_path)).numbers
    assert same["frechet"] < 1e-6 * float(b.var(0).sum())  # type: ignore[operator]
    assert same["precision"].value == same["recall"].value == same["coverage"].value == 1  # type: ignore[union-attr]

    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(real.shape, generator=generator)
    noised = [(real + s * noise).round().clamp(0, 255).to(torch.uint8) for s in (5, 15, 40)]
    for worse in ([blurred(real, s) for s in (0.6, 1.0, 2.0)], noised):
        seen = [judge(protocol, images_in_memory(x, ""), reference, device="cpu", cache=str(tmp_path)) for x in worse]
        frechet = [float(s.numbers["frechet"]) for s in seen]  # type: ignore[arg-type]
        assert 1e-3 < frechet[0] < frechet[1] < frechet[2]
        kid = [s.numbers["kid"].value for s in seen]  # type: ignore[union-attr]
        assert kid[0] < kid[1] < kid[2]


def test_the_inceptions_of_nvidias_file(script: str, tmp_path: Path) -> None:
    images, real = pixels(60), pixels(80, seed=1)
    net = TinyInception()
    a, b = net(images, return_features=True), net(real, return_features=True)
    how: dict[str, Any] = {"device": "cpu", "cache": str(tmp_path)}
    sets = images_in_memory(images, "samples"), images_in_memory(real, "real")
    assert judge(find_protocol("edm2", script), *sets, **how).numbers == {
        "fid": pytest.approx(frechet_distance(a, b), rel=1e-5)
    }
    adm = judge(find_protocol("adm", script), *sets, **how)
    assert set(adm.numbers) == {"fid", "inception_score", "precision", "recall"}
    score = inception_score(4 * a, splits=1)
    assert adm.numbers["inception_score"].value == pytest.approx(score.value, rel=1e-5)  # type: ignore[union-attr]
    assert adm.status == "unproven"
    assert str(adm.value("fid")).endswith("(unproven)")
    # clean-fid scales by Pillow before the network sees them
    clean = CleanInception(script, "cpu", "clean")(images).features
    channel = Image.fromarray(images[3, 1].float().numpy()).resize((299, 299), Image.Resampling.BICUBIC)
    scaled = (np.asarray(channel).clip(0, 255) - 128) / 128
    assert clean[3, 1].item() == pytest.approx(scaled.mean(), abs=1e-5)
    assert judge(find_protocol("clean", script), *sets, **how).numbers.keys() == {"clean_fid"}


def test_fd_dinov2_is_the_class_token_at_224_pixels(dino: str, tmp_path: Path) -> None:
    images, real = pixels(20), pixels(24, seed=1)
    model = Dinov2Model.from_pretrained(dino)

    def features(x: Tensor) -> Tensor:
        x = F.interpolate(x.float(), (224, 224), mode="bicubic", antialias=True) / 255
        mean, std = (torch.tensor(v)[:, None, None] for v in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
        with torch.no_grad():
            return model(pixel_values=(x - mean) / std).pooler_output

    assert_close(Dino(dino, "cpu", "edm2_dinov2")(images).features, features(images), rtol=1e-5, atol=1e-5)
    sets = images_in_memory(images, "samples"), images_in_memory(real, "real")
    found = judge(find_protocol("edm2_dinov2", dino), *sets, device="cpu", cache=str(tmp_path))
    assert found.numbers["fd_dinov2"] == pytest.approx(frechet_distance(features(images), features(real)), rel=1e-3)
    assert found.status == "unproven"


def test_cmmd_is_of_embeddings_of_length_one(clip: str, tmp_path: Path) -> None:
    images, real = pixels(20), pixels(24, seed=1)
    seen = Clip(clip, "cpu", "cmmd")(images).features
    assert_close(seen.norm(dim=1), torch.ones(20))
    found = judge(
        find_protocol("cmmd", clip), images_in_memory(images, ""), images_in_memory(real, ""), device="cpu",
        cache=str(tmp_path),
    )  # fmt: skip
    assert found.numbers["cmmd"] == gaussian_distance(seen, Clip(clip, "cpu", "cmmd")(real).features)


# references


def test_published_statistics_are_read(script: str, tmp_path: Path) -> None:
    """ADM's file has statistics of the whole training set, and other images for precision and recall alone."""
    real = pixels(50, seed=2)
    network = ScriptedInception(script, "cpu", "adm")
    mu, sigma = torch.randn(6, dtype=torch.float64).abs(), torch.eye(6, dtype=torch.float64) * 2
    spatial = {"mu_s": np.ones(4), "sigma_s": np.eye(4)}
    adm = save_arr(real, tmp_path / "VIRTUAL.npz", mu=mu.numpy(), sigma=sigma.numpy(), **spatial)
    found = read_statistics(adm, network)
    assert torch.equal(found.gaussian.mean, mu)
    assert found.spatial is not None
    assert found.seen is not None
    assert_close(found.seen.features, network(real).features)
    numbers = judge(find_protocol("adm", script), images_in_memory(pixels(40), ""), adm, device="cpu").numbers
    assert {"fid", "precision", "recall"} <= set(numbers)  # and no sFID: the network has none
    np.savez(tmp_path / "jit.npz", mu=mu.numpy(), sigma=sigma.numpy())
    save_file({"mean": mu, "covariance": sigma}, tmp_path / "own.safetensors")
    for name in ("jit.npz", "own.safetensors"):
        other = read_statistics(tmp_path / name, network)
        assert torch.equal(other.gaussian.covariance, sigma)
        assert other.seen is None
    numbers = judge(find_protocol("adm", script), images_in_memory(pixels(40), ""), tmp_path / "jit.npz").numbers
    assert set(numbers) == {"fid", "inception_score"}


def test_sfid_is_of_the_features_at_places() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(30, 5, generator=generator) for _ in range(2))
    from ditkit.evaluation import Moments

    gaussians = [Moments().add(x).gaussian() for x in (a, b)]
    reference = Reference("", "", gaussians[0], gaussians[1])
    numbers = find_protocol("adm").measure(Seen(b, spatial=a), reference)
    assert numbers["sfid"] == pytest.approx(numbers["fid"], rel=1e-9)  # a against b and b against a
    assert numbers["sfid"] == pytest.approx(frechet_distance(a, b), rel=1e-6)


def test_what_is_no_reference_is_said(script: str, clip: str, tmp_path: Path) -> None:
    network = ScriptedInception(script, "cpu", "edm2")
    (tmp_path / "img512.pkl").write_bytes(b"\x80\x04.")
    np.savez(tmp_path / "half.npz", mu=np.zeros(3))
    np.savez(tmp_path / "wrong.npz", mu=np.zeros(3), sigma=np.zeros((4, 4)))
    np.savez(tmp_path / "other.npz", mu=np.zeros(3), sigma=np.eye(3))
    np.savez(tmp_path / "turned.npz", mu=np.zeros(6), sigma=np.eye(6) + np.eye(6, k=1))
    np.savez(tmp_path / "complex.npz", mu=np.zeros(6) + 1j, sigma=np.eye(6))
    np.savez(tmp_path / "pickled.npz", mu=np.array([object()]), sigma=np.eye(3))
    (tmp_path / "text.npz").write_text("no archive")
    for name, said in {
        "img512.pkl": "is a pickle, which is a program",
        "half.npz": "holds no mu and sigma",
        "wrong.npz": r"a covariance \[d, d\]",
        "turned.npz": "a covariance is symmetric, and this one is not",
        "complex.npz": "the mean of features must be real",
        "pickled.npz": "cannot be read as statistics",
        "text.npz": "cannot be read as statistics",
        "nothing.npz": "there is no file",
    }.items():
        with pytest.raises(DitkitError, match=said):
            read_statistics(tmp_path / name, network)
    images = images_in_memory(pixels(20), "")
    with pytest.raises(DitkitError, match="of 6 and 3 features do not compare"):
        judge(find_protocol("edm2", script), images, tmp_path / "other.npz")
    np.savez(tmp_path / "negative.npz", mu=np.zeros(6), sigma=-np.eye(6))
    with pytest.raises(DitkitError, match="a covariance has no negative eigenvalues, and this one has -1 beside -1"):
        judge(find_protocol("edm2", script), images, tmp_path / "negative.npz")
    with pytest.raises(DitkitError, match="CMMD compares images with images"):
        judge(find_protocol("cmmd", clip), images, tmp_path / "other.npz")


def test_a_reference_is_looked_at_once_and_again_if_damaged(script: str, tmp_path: Path) -> None:
    network, calls = ScriptedInception(script, "cpu", "edm2"), []

    class Counted:
        name, sha256 = network.name, network.sha256

        def __call__(self, images: Tensor) -> Seen:
            calls.append(len(images))
            return network(images)

    real = images_in_memory(pixels(20), "here")
    first = reference_of_images(Counted(), real, str(tmp_path))
    again = reference_of_images(Counted(), images_in_memory(pixels(20), "elsewhere"), str(tmp_path))
    assert calls == [20]
    assert torch.equal(first.gaussian.covariance, again.gaussian.covariance)
    reference_of_images(Counted(), images_in_memory(pixels(20, seed=1), ""), str(tmp_path))
    assert calls == [20, 20]
    kept = sorted((tmp_path / "statistics").glob("*.json"))
    content = json.loads(kept[0].read_text())
    assert {"weights_sha256", "images_sha256", "source", "count", "network", "file_sha256"} <= set(content)
    for file in (tmp_path / "statistics").glob("*.safetensors"):
        damaged = bytearray(file.read_bytes())
        damaged[-1] ^= 1
        file.write_bytes(bytes(damaged))
    mended = reference_of_images(Counted(), real, str(tmp_path))
    assert calls == [20, 20, 20]
    assert torch.equal(mended.gaussian.covariance, first.gaussian.covariance)


def test_what_a_network_sees_does_not_depend_on_the_batch(script: str) -> None:
    images = images_in_memory(pixels(23, channels=1), "")
    network = ScriptedInception(script, "cpu", "edm2")
    assert_close(look(network, images, 5).features, look(network, images, 64).features)


# what is missing


@pytest.mark.parametrize("name", sorted(set(names("protocol")) - {"ditkit"}))
def test_a_protocol_without_its_weights_says_which(name: str) -> None:
    with pytest.raises(DitkitError, match=f"the protocol {name} needs .*--weights"):
        find_protocol(name).network("cpu")


def test_wrong_weights_are_one_line(script: str, dino: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "text.pt").write_text("no archive")
    torch.jit.save(torch.jit.script(Layers()), str(tmp_path / "other.pt"))
    with pytest.raises(DitkitError, match="is no TorchScript"):
        find_protocol("edm2", str(tmp_path / "text.pt")).network("cpu")
    with pytest.raises(DitkitError, match="does not answer as inception"):
        find_protocol("edm2", str(tmp_path / "other.pt")).network("cpu")(pixels(2))
    with pytest.raises(DitkitError, match=r"CLIP in .* is incomplete"):
        find_protocol("cmmd", dino).network("cpu")
    with pytest.raises(DitkitError, match="takes no weights"):
        find_protocol("ditkit", script)
    with pytest.raises(DitkitError, match="unknown protocol 'edm'"):
        find_protocol("edm")
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    with pytest.raises(DitkitError, match=r"the protocol jit needs torch-fidelity .* pip install 'ditkit\[fidelity\]'"):
        find_protocol("jit", script).network("cpu")


def test_every_protocol_says_what_it_is() -> None:
    for name in names("protocol"):
        cls = lookup("protocol", name)
        assert issubclass(cls, Evaluator)
        assert all((cls.table, cls.needs, cls.images, cls.reference, cls.labels))
        assert cls(weights="").status == ("proven" if name == "ditkit" else "unproven")


class Places(torch.nn.Module):
    """Answers as torch-fidelity's Inception-v3 does."""

    def __init__(self, name: str, features: list[str], weights: io.BytesIO) -> None:
        super().__init__()
        self.scale = torch.load(weights, weights_only=True)["scale"]
        self.Mixed_6d = torch.nn.ModuleDict({"branch1x1": torch.nn.Identity()})

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        x = self.Mixed_6d["branch1x1"](images[:, :, ::4, ::4].float() * self.scale)
        return x.flatten(1)[:, :4], x.mean((2, 3))


def test_a_reference_kept_for_jit_does_not_take_sfid_from_adm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They share the file of weights, and only adm looks at places."""
    package = types.ModuleType("torch_fidelity")
    package.FeatureExtractorInceptionV3 = Places  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch_fidelity", package)
    torch.save({"scale": torch.tensor(0.01)}, weights := tmp_path / "weights.pth")
    sets = images_in_memory(pixels(60), "samples"), images_in_memory(pixels(70, seed=1), "real")
    for name, numbers in (("jit", {"fid", "inception_score"}), ("adm", {"fid", "sfid", "inception_score"})):
        found = judge(find_protocol(name, str(weights)), *sets, device="cpu", cache=str(tmp_path))
        assert numbers <= set(found.numbers)
    again = judge(find_protocol("adm", str(weights)), *sets, device="cpu", cache=str(tmp_path))
    assert again.numbers == found.numbers


# numbers of different protocols


def test_numbers_of_different_protocols_refuse_one_column(script: str, tmp_path: Path) -> None:
    images, real = images_in_memory(pixels(30), ""), images_in_memory(pixels(40, seed=1), "")
    how: dict[str, Any] = {"device": "cpu", "cache": str(tmp_path)}
    edm2 = judge(find_protocol("edm2", script), images, real, **how)
    adm = judge(find_protocol("adm", script), images, real, **how)
    fewer = judge(find_protocol("edm2", script), images_in_memory(pixels(29), ""), real, **how)
    other = judge(find_protocol("edm2", script), images, images_in_memory(pixels(40, seed=2), ""), **how)
    Table(("model", "FID"), (("a", edm2.value("fid")), ("b", edm2.value("fid")), ("c", Value(None)), ("d", Value(3.0))))
    for second in (adm, fewer, other):
        with pytest.raises(DitkitError, match=r"cannot stand in one column \(FID\): .* samples; and (adm|edm2): "):
            Table(("model", "FID"), (("a", edm2.value("fid")), ("b", second.value("fid"))))


def test_a_study_does_not_mix_protocols(study: Callable[..., Results]) -> None:
    by = {"a": "ditkit: digits", "b": "ditkit: emoji"}
    results = study({(c, s): Finding({"kid": 1.0}, {"evaluators": {"kid": by[c]}}) for c in by for s in (0, 1)})
    assert results.value("a", "kid").protocol == "ditkit: digits"
    with pytest.raises(DitkitError, match="ditkit: digits; and ditkit: emoji"):
        Table(("", "KID"), tuple((c, results.value(c, "kid")) for c in by))
    seeds = {("a", s): Finding({"kid": 1.0}, {"evaluators": {"kid": f"ditkit: {s}"}}) for s in (0, 1)}
    with pytest.raises(DitkitError, match="kid of a was measured by different protocols"):
        study(seeds).value("a", "kid")
    before = study({("a", 0): Finding({"kid": 1.0}, {})})  # results from before protocols said it
    assert before.value("a", "kid").protocol == ""


@pytest.fixture
def study() -> Callable[..., Results]:
    return lambda found: Results(None, found)  # type: ignore[arg-type]


# samples


def test_label_rules() -> None:
    assert labels_by("in_turn", 3, 7).tolist() == [0, 1, 2, 0, 1, 2, 0]  # type: ignore[union-attr]
    assert labels_by("balanced", 3, 6).tolist() == [0, 0, 1, 1, 2, 2]  # type: ignore[union-attr]
    drawn = labels_by("random", 10, 5000, seed=3)
    assert drawn is not None
    counts = drawn.bincount()
    assert len(counts) == 10
    assert 0.5 < float(((counts - 500.0) ** 2 / 450).mean()) < 2  # as binomials vary, neither more nor less
    assert not torch.equal(drawn, labels_by("random", 10, 5000, seed=4))  # type: ignore[arg-type]
    for rule in RULES:
        whole = labels_by(rule, 10, 100, seed=3)
        half = labels_by(rule, 10, 100, seed=3, first=50)
        assert torch.equal(whole[50:], half)  # type: ignore[index, arg-type]
        assert labels_by(rule, 0, 5) is None
    with pytest.raises(DitkitError, match="100 samples cannot be balanced over 3 classes"):
        labels_by("balanced", 3, 100)
    for rule in RULES:
        with pytest.raises(DitkitError, match="at least 1 sample is drawn, not -5"):
            labels_by(rule, 10, -5)
    with pytest.raises(DitkitError, match="no label rule 'balance'"):
        labels_by("balance", 3, 9)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from dataclasses import replace

    from ditkit.recipe import Evaluate, Sample, Train
    from ditkit.recipes import digits
    from tests.conftest import TINY

    recipe = replace(
        digits(),
        model=TINY,
        train=Train(steps=6, batch=8, lr=1e-2, warmup=0, emas=(0.5,), sample_every=0),
        sample=Sample(steps=3, batch=8),
        evaluate=Evaluate(samples=20, size=32),
    )
    train(recipe, folder := tmp_path_factory.mktemp("runs") / "digits", quiet=True)
    return folder


def test_samples_depend_neither_on_the_batch_nor_on_the_number_of_processes(run: Path, tmp_path: Path) -> None:
    """To rounding: a byte may fall on the other side of a half."""
    pipeline = load(run, device="cpu")
    whole = pipeline.sample(None, 12, seed=5)
    for batch in (1, 5, 12):
        assert int((pipeline.sample(None, 12, seed=5, batch=batch).int() - whole.int()).abs().max()) <= 1
    assert int((pipeline.sample(None, 12, seed=6).int() - whole.int()).abs().max()) > 1
    halves = []
    for first in (0, 6):  # by two processes
        command = [sys.executable, "-m", "ditkit", "sample", str(run), "--count", "6", "--first", str(first)]
        command += ["--seed", "5", "--device", "cpu", "--out", str(tmp_path / f"{first}.npy")]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        halves.append(torch.from_numpy(np.load(tmp_path / f"{first}.npy")))
    assert int((torch.cat(halves).int() - whole.int()).abs().max()) <= 1
    with pytest.raises(DitkitError, match="numbered from 0, not -1"):
        pipeline.sample(None, 2, first=-1)


def test_a_run_is_measured_against_its_own_held_out_data(run: Path, tmp_path: Path) -> None:
    found = judge_run(run, Ditkit(size=32), samples=20, labels="balanced", device="cpu", cache=str(tmp_path))
    assert found.protocol["labels"] == RULES["balanced"]
    assert "held-out part" in found.protocol["reference"]
    assert found.protocol["images_count"] == 20
    assert found.numbers["kid"].value > 0  # type: ignore[union-attr]


def test_the_command_measures_runs_folders_and_archives(
    run: Path, script: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from ditkit.cli import main
    from ditkit.cli.evaluate import _reference

    monkeypatch.setenv("DITKIT_CACHE", str(tmp_path / "cache"))

    def said(*words: str) -> tuple[int, str, str]:
        status = main(["evaluate", *words])
        out, error = capsys.readouterr()
        return status, out, error.strip().splitlines()[-1] if error.strip() else ""

    folder, archive = save_pngs(pixels(30), tmp_path / "drawn"), save_arr(pixels(40, seed=1), tmp_path / "real.npz")
    words = (str(folder), "--protocol", "edm2", "--weights", script, "--reference", str(archive))
    status, out, error = said(*words, "--out", str(tmp_path / "report"))
    assert status == 0, error
    assert "(unproven)" in out
    assert "unproven: never held against published numbers" in out
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    assert report["status"] == "unproven"
    assert "| fid |" in (tmp_path / "report" / "report.md").read_text()
    status, out, error = said(str(run), "--protocol", "ditkit", "--samples", "10", "--reference", str(archive))
    assert status == 0, error
    assert (run / "protocols" / "ditkit" / "report.html").exists()
    assert "unproven" not in out
    held_out = _reference("digits")
    assert isinstance(held_out, Dataset)
    assert len(held_out.heldout) == 1000
    for wrong, line in (
        ((str(folder), "--protocol", "edm2", "--weights", script), "give --reference"),
        ((*words, "--steps", "3"), "is no run"),
        ((str(run), "--labels", "random"), "--labels belongs to a protocol"),
        ((str(run), "--protocol", "jit"), "needs the file weights-inception"),
        ((str(run), "--protocol", "fid"), "unknown protocol 'fid'"),
        ((*words[:-1], "no-such"), "there is no such file, and no such data set"),
    ):
        status, _, error = said(*wrong)
        assert status == 1
        assert line in error
        assert error.startswith("ditkit: ")


def test_what_the_command_refuses_before_the_work(run: Path, ditkit: Command, tmp_path: Path) -> None:
    save_arr(pixels(8), tmp_path / "a.npz")
    images = ("evaluate", tmp_path / "a.npz", "--protocol", "ditkit", "--reference", tmp_path / "a.npz")
    for words, said in (
        ((*images, "--seed", "3"), "without settings of a sampling"),
        ((*images, "--out", tmp_path / "a.npz"), "a.npz is a file; choose a folder with --out"),
        (("evaluate", run, "--protocol", "ditkit", "--samples", "-5"), "at least 1 sample is drawn, not -5"),
    ):
        bad = ditkit(*words)
        assert (bad.returncode, said in bad.stderr, bad.stderr.count("\n")) == (1, True, 1), bad.stderr
    (checkpoint,) = (run / "checkpoints").iterdir()  # is a run as well
    done = ditkit("evaluate", checkpoint, "--protocol", "ditkit", "--reference", images[1], "--samples", "6")
    assert done.returncode == 0, done.stderr
    assert "8 samples" not in done.stdout
    assert (checkpoint / "protocols" / "ditkit" / "report.json").exists()
