"""Data sets of the package datasets: folders in the hub's layout, their columns and splits, and no network."""

from __future__ import annotations

import io
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import datasets.config
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from PIL import Image

import ditkit.data.images
from ditkit.cli.configs import named
from ditkit.config import DitkitError, from_json, to_json
from ditkit.data import HuggingFace, read_image, strings
from ditkit.recipes import find_recipe
from ditkit.rng import Rng
from ditkit.runs import Run
from ditkit.training import train


def picture(seed: int, width: int = 14, height: int = 10) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "png")
    return buffer.getvalue()


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of its own, and a network that nobody may touch."""
    folder = tmp_path / "cache"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)

    def refused(*_: Any) -> None:
        raise AssertionError("the network was touched")

    monkeypatch.setattr(socket.socket, "connect", refused)
    monkeypatch.setattr(socket, "getaddrinfo", refused)
    return folder


def store(root: Path, split: str, columns: Mapping[str, Sequence[Any]], **features: Any) -> Path:
    """Parquet as the hub has it: data/SPLIT-00000-of-00001.parquet, with the types of its columns inside."""
    kinds = {name: features.get(name) or datasets.Value("string") for name in columns}
    (root / "data").mkdir(parents=True, exist_ok=True)
    made = datasets.Dataset.from_dict(dict(columns), features=datasets.Features(kinds))
    made.to_parquet(root / "data" / f"{split}-00000-of-00001.parquet")
    return root


PETS = datasets.ClassLabel(names=["cat", "unused", "dog"])


def pets(root: Path, count: int = 12, split: str = "train", first: int = 0) -> Path:
    return store(
        root,
        split,
        {
            "photo": [{"bytes": png(picture(first + i)), "path": None} for i in range(count)],
            "pet": [2 * (i % 2) for i in range(count)],
            "caption": [f"pet number {first + i}" for i in range(count)],
        },
        photo=datasets.Image(),
        pet=PETS,
    )


def pixels(seeds: Sequence[int], resolution: int = 8, channels: int = 3) -> torch.Tensor:
    return torch.from_numpy(np.stack([read_image(png(picture(seed)), resolution, channels) for seed in seeds]))


@pytest.fixture(params=["eager", "lazy"])
def mode(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "lazy":
        monkeypatch.setattr(ditkit.data.images, "MEMORY_GB", 0)


def every(split: Any) -> Any:
    return split.batch(torch.arange(len(split)))


def test_columns_are_found_by_their_types(tmp_path: Path, mode: None) -> None:
    data = HuggingFace(str(pets(tmp_path / "pets")), 8, holdout=0).open()
    batch = every(data.train)
    assert (data.name, data.classes, data.shape, data.captions) == ("pets", ("cat", "dog"), (3, 8, 8), 13)
    assert torch.equal(batch.data, pixels(range(12)))
    assert batch.label.tolist() == [0, 1] * 6
    assert batch.label.dtype == torch.int64
    assert strings(batch.text) == [f"pet number {i}" for i in range(12)]
    assert len(data.heldout) == 0
    assert every(data.heldout).text.shape == (0, 13)
    assert data.skipped == ()
    some: Any = data.train.batch(torch.tensor([7, 2, 7]))
    assert torch.equal(some.data, batch.data[[7, 2, 7]])
    assert torch.equal(some.text, batch.text[[7, 2, 7]])
    assert torch.equal(some.label, batch.label[[7, 2, 7]])
    with pytest.raises(IndexError):
        data.train.batch(torch.tensor([12]))


def test_flips_are_a_function_of_ids(tmp_path: Path, mode: None) -> None:
    split = HuggingFace(str(pets(tmp_path / "pets")), 8, holdout=0).open().train
    ids = torch.arange(50, 62)
    whole = split.batch(torch.arange(12), Rng(5).at(3, ids)).data
    mirrored = Rng(5).at(3, ids)("flip", "uniform") < 0.5
    assert 0 < mirrored.sum() < 12
    assert torch.equal(whole, torch.where(mirrored[:, None, None, None], every(split).data.flip(-1), every(split).data))
    back = torch.arange(11, -1, -1)
    assert torch.equal(split.batch(back, Rng(5).at(3, ids[back])).data, whole[back])


def test_eager_and_lazy_say_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = HuggingFace(str(pets(tmp_path / "pets", 40)), 8, holdout=0.3)
    eager = config.open()
    monkeypatch.setattr(ditkit.data.images, "MEMORY_GB", 0)
    lazy = config.open()
    assert eager.source == lazy.source
    for one, other in ((eager.train, lazy.train), (eager.heldout, lazy.heldout)):
        a, b = every(one), every(other)
        assert len(one) > 3
        assert torch.equal(a.data, b.data)
        assert torch.equal(a.label, b.label)
        assert torch.equal(a.text, b.text)


def test_a_share_is_held_out_and_stays_when_rows_are_added(tmp_path: Path) -> None:
    few = HuggingFace(str(pets(tmp_path / "few", 40)), 8, holdout=0.3).open()
    more = HuggingFace(str(pets(tmp_path / "more", 60)), 8, holdout=0.3).open()
    a, b = strings(every(few.heldout).text), strings(every(more.heldout).text)
    assert 4 < len(a) < 20
    assert a == b[: len(a)]
    assert not set(a) & set(strings(every(few.train).text))
    assert len(few.train) + len(few.heldout) == 40


def test_a_split_of_its_own_is_held_out(tmp_path: Path, mode: None) -> None:
    root = pets(pets(pets(tmp_path / "pets"), 4, "test", 100), 6, "validation", 200)
    data = HuggingFace(str(root), 8).open()
    assert torch.equal(every(data.train).data, pixels(range(12)))
    assert torch.equal(every(data.heldout).data, pixels(range(200, 206)))
    assert strings(every(data.heldout).text)[0] == "pet number 200"
    assert "(train and validation)" in data.source
    data = HuggingFace(str(root), 8, heldout_split="test").open()
    assert torch.equal(every(data.heldout).data, pixels(range(100, 104)))
    data = HuggingFace(str(root), 8, heldout_split=None, holdout=0).open()
    assert len(data.heldout) == 0
    data = HuggingFace(str(root), 8, split="test", holdout=0).open()
    assert torch.equal(every(data.train).data, pixels(range(100, 104)))
    with pytest.raises(DitkitError, match=r"no split 'trian'; it has .*train.*--data\.split"):
        HuggingFace(str(root), 8, split="trian").open()
    with pytest.raises(DitkitError, match=r"no split 'tset'.*--data\.heldout-split"):
        HuggingFace(str(root), 8, heldout_split="tset").open()
    with pytest.raises(DitkitError, match="cannot be both"):
        HuggingFace(str(root), 8, heldout_split="train").open()


def test_splits_with_other_classes_are_refused(tmp_path: Path) -> None:
    root = pets(tmp_path / "pets")
    one = {"photo": [{"bytes": png(picture(0)), "path": None}]}
    store(root, "test", {**one, "animal": [0]}, photo=datasets.Image(), animal=PETS)
    with pytest.raises(DitkitError) as error:
        HuggingFace(str(root), 8).open()
    assert "\n" not in str(error.value)


def test_test_labels_that_are_hidden(tmp_path: Path) -> None:
    root = pets(tmp_path / "pets")
    hidden = {"photo": [{"bytes": png(picture(0)), "path": None}], "pet": [-1], "caption": ["?"]}
    store(root, "test", hidden, photo=datasets.Image(), pet=PETS)
    with pytest.raises(DitkitError, match=r"no label in test\[0\] \(column pet\).*--data\.label None"):
        HuggingFace(str(root), 8).open()
    data = HuggingFace(str(root), 8, label=None).open()
    assert (data.classes, every(data.heldout).label) == ((), None)


@pytest.mark.parametrize(
    ("values", "kind", "classes"),
    [
        (["b", "a", "b", "c"], None, ("a", "b", "c")),
        ([10, 9, 10, 2], datasets.Value("int64"), ("2", "9", "10")),
        ([True, False, True, True], datasets.Value("bool"), ("False", "True")),
    ],
)
def test_labels_without_names(tmp_path: Path, values: list[Any], kind: Any, classes: tuple[str, ...]) -> None:
    images = [{"bytes": png(picture(i)), "path": None} for i in range(4)]
    root = store(tmp_path / "d", "train", {"image": images, "label": values}, image=datasets.Image(), label=kind)
    data = HuggingFace(str(root), 8, holdout=0).open()
    assert data.classes == classes
    assert [data.classes[i] for i in every(data.train).label] == [str(v) for v in values]
    assert every(data.train).text is None


def test_captions_that_are_lists_missing_or_long(tmp_path: Path, mode: None) -> None:
    images = [{"bytes": png(picture(i)), "path": None} for i in range(4)]
    captions = [["one", "other"], [], None, ["x" * 50 + "\0"]]
    columns = {"image": images, "sentences": captions}
    root = store(
        tmp_path / "d", "train", columns, image=datasets.Image(), sentences=datasets.List(datasets.Value("string"))
    )
    data = HuggingFace(str(root), 8, holdout=0, caption="sentences", characters=20).open()
    assert strings(every(data.train).text) == ["one", "", "", "x" * 20]
    assert data.captions == 20
    assert every(HuggingFace(str(root), 8, holdout=0).open().train).text is None  # no usual name


def test_unclear_and_missing_columns_are_refused_with_the_list(tmp_path: Path) -> None:
    images = [{"bytes": png(picture(i)), "path": None} for i in range(2)]
    columns = {"left": images, "right": images, "fine": [0, 2], "coarse": [2, 0], "score": [0.5, 1.0]}
    kinds = {"left": datasets.Image(), "right": datasets.Image(), "fine": PETS, "coarse": PETS}
    root = store(tmp_path / "d", "train", columns, **kinds, score=datasets.Value("float32"))
    config = HuggingFace(str(root), 8, holdout=0)
    everything = r"left \(Image\), right \(Image\), fine \(ClassLabel\), coarse \(ClassLabel\), score \(float32\)"

    def refused(match: str, **changes: Any) -> None:
        with pytest.raises(DitkitError, match=match) as error:
            replace(config, **changes).open()
        assert "\n" not in str(error.value)

    refused(rf"several columns that may be its image: .*--data\.image \(left, right; its columns: {everything}")
    refused(r"several columns that may be its label: .*fine, coarse", image="left")
    refused(rf"no column 'rigth': did you mean right\? .*{everything}", image="rigth")
    refused("'score' .* cannot be its label: it is float32", image="left", label="score")
    refused("'fine' .* cannot be its image: it is ClassLabel", image="fine")
    refused("'left' .* cannot be its caption", image="left", label="fine", caption="left")
    assert replace(config, image="right", label="coarse").open().classes == ("cat", "dog")
    text = store(tmp_path / "t", "train", {"text": ["a", "b"]})
    with pytest.raises(DitkitError, match=r"no column of images: .*text \(string\)"):
        HuggingFace(str(text)).open()


def test_parquet_without_types(tmp_path: Path) -> None:
    for name, column in (
        ("plain", pyarrow.array([png(picture(i)) for i in range(3)])),
        ("packed", pyarrow.array([{"bytes": png(picture(i)), "path": f"{i}.png"} for i in range(3)])),
    ):
        (tmp_path / name).mkdir()
        table = pyarrow.table({"image": column, "label": ["a", "b", "a"]})
        pyarrow.parquet.write_table(table, tmp_path / name / "train.parquet")
        data = HuggingFace(str(tmp_path / name), 8, holdout=0).open()
        assert torch.equal(every(data.train).data, pixels(range(3)))
        assert data.classes == ("a", "b")


def test_grey_deep_transparent_and_broken_images(tmp_path: Path, mode: None) -> None:
    deep = Image.fromarray(np.full((8, 8), 0x80FF, np.uint16))
    clear = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    encoded = [png(Image.new("L", (9, 8), 77)), png(deep), png(clear), b"", b"no image", None, png(picture(0))[:30]]
    images = [None if e is None else {"bytes": e, "path": None} for e in encoded]
    images.append({"bytes": None, "path": str(tmp_path / "nowhere.png")})
    root = tmp_path / "d"
    root.mkdir()
    # not by datasets, which would look into the files to embed them
    pyarrow.parquet.write_table(pyarrow.table({"image": images}), root / "train.parquet")
    data = HuggingFace(str(root), 8, holdout=0).open()
    assert [line.split(": ")[0] for line in data.skipped] == [f"train[{i}]" for i in (3, 4, 5, 6, 7)]
    for line, reason in zip(
        data.skipped, ("an empty file", "accepted formats", "no image", "", "not a file"), strict=True
    ):
        assert reason in line.partition(": ")[2]
    got = every(data.train)
    assert got.data[:, :, 0, 0].tolist() == [[77] * 3, [128] * 3, [255] * 3]
    assert got.label is None
    grey = HuggingFace(str(root), 8, holdout=0, channels=1).open()
    assert grey.shape == (1, 8, 8)
    assert every(grey.train).data[:, :, 0, 0].tolist() == [[77], [128], [255]]


def test_broken_data_is_named_when_it_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ditkit.data.images, "MEMORY_GB", 0)
    good = [png(picture(i)) for i in range(3)]
    encoded = [good[0], good[1][: len(good[1]) * 2 // 3], good[2]]  # sound headers
    columns = {"image": [{"bytes": e, "path": None} for e in encoded], "text": ["a", "b", "c"]}
    root = store(tmp_path / "d", "train", columns, image=datasets.Image())
    data = HuggingFace(str(root), 8, holdout=0).open()
    assert data.skipped == ()
    with pytest.warns(UserWarning, match=r"skipped train\[1\]: .*truncated"):
        batch = every(data.train)
    assert torch.equal(batch.data, pixels([0, 2, 2]))
    assert strings(batch.text) == ["a", "c", "c"]  # the caption of the image that took its place
    assert len(data.skipped) == 1


def test_a_class_without_readable_images(tmp_path: Path) -> None:
    images = [{"bytes": png(picture(0)), "path": None}, {"bytes": b"x", "path": None}]
    root = store(tmp_path / "d", "train", {"image": images, "label": ["a", "b"]}, image=datasets.Image())
    with pytest.raises(DitkitError, match=r"no image of class 'b' can be read \(train\[1\].*leave them out"):
        HuggingFace(str(root), 8, holdout=0).open()


def test_a_folder_of_images_with_metadata(tmp_path: Path) -> None:
    root = tmp_path / "album"
    (root / "train").mkdir(parents=True)
    for i in range(3):
        picture(i).save(root / "train" / f"{i}.png")
    (root / "train" / "metadata.csv").write_text(
        "file_name,text\n" + "".join(f"{i}.png,picture {i}\n" for i in range(3))
    )
    data = HuggingFace(str(root), 8, holdout=0).open()
    assert torch.equal(every(data.train).data, pixels(range(3)))
    assert strings(every(data.train).text) == ["picture 0", "picture 1", "picture 2"]


def test_what_save_to_disk_wrote(tmp_path: Path) -> None:
    root = pets(tmp_path / "pets")
    loaded = datasets.load_dataset(str(root))
    loaded.save_to_disk(tmp_path / "both")
    loaded["train"].shuffle(seed=0).select(range(5)).save_to_disk(tmp_path / "one")
    assert torch.equal(every(HuggingFace(str(tmp_path / "both"), 8, holdout=0).open().train).data, pixels(range(12)))
    assert len(HuggingFace(str(tmp_path / "one"), 8, holdout=0).open().train) == 5


def test_the_fingerprint_follows_the_rows_and_not_the_place(tmp_path: Path) -> None:
    def source(root: Path) -> str:
        return HuggingFace(str(root), 8, holdout=0).open().source

    here = source(pets(tmp_path / "a" / "pets"))
    shutil.copytree(tmp_path / "a" / "pets", tmp_path / "b" / "pets")
    assert source(tmp_path / "b" / "pets") == here
    rows: dict[str, list[Any]] = {
        "photo": [{"bytes": png(picture(i)), "path": None} for i in range(12)],
        "pet": [2 * (i % 2) for i in range(12)],
        "caption": [f"pet number {i}" for i in range(12)],
    }
    changes: list[Callable[[], Any]] = [
        lambda: rows["caption"].__setitem__(3, "pet number 5"),
        lambda: rows["pet"].__setitem__(3, 0),
        lambda: rows["photo"].__setitem__(3, {"bytes": png(picture(3, 15)), "path": None}),
    ]
    seen = {here}
    for n, change in enumerate(changes):
        change()
        seen.add(source(store(tmp_path / str(n) / "pets", "train", rows, photo=datasets.Image(), pet=PETS)))
    assert len(seen) == 4


def test_nothing_is_fetched_unasked(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    before = datasets.config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE
    with pytest.raises(DitkitError, match=r"nobody/nothing is neither .* nor in the cache .*add --data\.download"):
        HuggingFace("nobody/nothing").open()
    assert before == (datasets.config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE)
    asked = {}

    def load(*_: Any, **__: Any) -> Any:
        asked["offline"] = datasets.config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE
        raise RuntimeError("stop\nhere")

    monkeypatch.setattr(datasets, "load_dataset", load)
    for download in (False, True):
        with pytest.raises(DitkitError, match="cannot load the data set nobody/nothing: stop here"):
            HuggingFace("nobody/nothing", download=download).open()
        assert asked["offline"] == ((True, True) if not download else before)


def test_links_in_a_folder_are_not_followed_to_the_network(tmp_path: Path) -> None:
    root = tmp_path / "d"
    root.mkdir()
    (root / "README.md").write_text(
        "---\nconfigs:\n- config_name: default\n  data_files: https://example.com/train.parquet\n---\n"
    )
    with pytest.raises(DitkitError, match="cannot load the data set") as error:
        HuggingFace(str(root)).open()
    assert "\n" not in str(error.value)
    assert "network was touched" not in str(error.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"path": ""}, "write hf:NAME"),
        ({"path": "a", "streaming": True}, "leave out streaming; rows are read from files on the disk"),
        ({"path": "a", "resolution": 0}, "data hf: resolution"),
        ({"path": "a", "holdout": 1.0}, "data hf: holdout"),
        ({"path": "a", "channels": 2}, "data hf: channels"),
        ({"path": "a", "characters": 0}, "characters must be at least 1"),
    ],
)
def test_settings_that_cannot_work(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(DitkitError, match=re.escape(message)):
        HuggingFace(**fields)


def test_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DitkitError, match="does not exist: give a folder"):
        HuggingFace(str(tmp_path / "nowhere")).open()
    (tmp_path / "file.parquet").write_bytes(b"x")
    with pytest.raises(DitkitError, match="is a file, not a folder"):
        HuggingFace(str(tmp_path / "file.parquet")).open()
    (tmp_path / "empty").mkdir()
    with pytest.raises(DitkitError, match="cannot load the data set"):
        HuggingFace(str(tmp_path / "empty")).open()
    monkeypatch.chdir(tmp_path)
    assert HuggingFace("empty").path == str(tmp_path / "empty")
    assert HuggingFace("owner/name").path == "owner/name"
    config = HuggingFace("owner/name", label=None, heldout_split="test")
    assert from_json(to_json(config)) == config
    assert named("data", "hf:owner/name") == HuggingFace("owner/name")
    assert find_recipe("hf:owner/name").data == HuggingFace("owner/name")
    with pytest.raises(DitkitError, match="hf:PATH"):
        named("data", "hf")


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DitkitError, match=re.escape("pip install 'ditkit[hf]'")):
        HuggingFace("owner/name").open()


def test_the_package_is_imported_only_when_it_is_needed() -> None:
    code = "import sys, ditkit, ditkit.data, ditkit.recipes; assert not {'datasets', 'pyarrow'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_a_run_goes_on_bit_for_bit(tmp_path: Path, mode: None) -> None:
    root = pets(tmp_path / "pets", 20)

    def recipe(steps: int) -> Any:
        base = find_recipe(f"hf:{root}")
        model = replace(base.model, hidden_size=16, num_heads=2, depth=1, in_context_start=0, in_context_len=1)
        settings = replace(base.train, steps=steps, batch=6, sample_every=0, checkpoint_every=2, cooldown=0, warmup=0)
        return replace(base, data=replace(base.data, resolution=8), model=model, train=settings)

    assert train(recipe(4), tmp_path / "whole", quiet=True)
    assert train(recipe(2), tmp_path / "parts", quiet=True)
    assert train(recipe(4), tmp_path / "parts", quiet=True)
    one, other = (Run(tmp_path / name).newest() for name in ("whole", "parts"))
    assert one is not None
    assert other is not None
    a, b = one.tensors("model"), other.tensors("model")
    assert a.keys() == b.keys()
    assert all(torch.equal(a[k], b[k]) for k in a)
    pets(root, 21)
    with pytest.raises(DitkitError, match="the data has changed since"):
        train(recipe(6), tmp_path / "parts", quiet=True)
