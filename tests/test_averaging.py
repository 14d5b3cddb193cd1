"""Power-function averages, and averages of any length made afterwards from stored ones."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ditkit.averaging import WIDEST, exponent, power_decay, reconstruction
from ditkit.config import DitkitError
from ditkit.exporting import export_run
from ditkit.interop import FORMATS, read
from ditkit.pipeline import load
from ditkit.recipe import Recipe, Sample, Train
from ditkit.runs import Run, find_checkpoint
from ditkit.start import begin_from
from ditkit.training import Averages, train

from .conftest import Command
from .test_training import assert_same, with_train

TRACKED = (0.05, 0.1)


def profile(std: float, steps: int) -> Tensor:
    """How much the weights of each step count after `steps` of them, straight from the recursion."""
    weights = torch.zeros(steps, dtype=torch.float64)
    for step in range(1, steps + 1):
        beta = power_decay(std, step)
        weights *= beta
        weights[step - 1] = 1 - beta
    return weights


@pytest.mark.parametrize("std", [0.01, 0.05, 0.1, 0.2, WIDEST])
def test_the_profile_has_the_width_that_names_it(std: float) -> None:
    steps = 4000
    weights = profile(std, steps)
    times = torch.arange(1, steps + 1, dtype=torch.float64) / steps
    assert float(weights.sum()) == pytest.approx(1, abs=1e-12)
    mean = float(weights @ times)
    assert math.sqrt(float(weights @ (times - mean).square())) == pytest.approx(std, rel=2e-3)
    gamma = exponent(std)
    k = torch.arange(steps + 1, dtype=torch.float64) / steps
    torch.testing.assert_close(weights, (k ** (gamma + 1)).diff(), rtol=1e-8, atol=1e-15)


def test_exponents_are_those_of_the_paper() -> None:
    assert exponent(0.05) == pytest.approx(16.97, abs=0.005)
    assert exponent(0.10) == pytest.approx(6.94, abs=0.005)
    assert exponent(WIDEST) == pytest.approx(0, abs=1e-12)
    for std in (0, -0.1, 0.3, math.nan):
        with pytest.raises(DitkitError, match=r"share of the training in \(0, 0.288\]"):
            exponent(std)


def test_an_average_begins_as_the_weights_and_follows_its_profile() -> None:
    model = nn.Linear(3, 2)
    averages = Averages(model, (0.9,), TRACKED)
    assert averages.names == ("ema-0.9", "ema-std-0.05", "ema-std-0.1")
    generator, seen = torch.Generator().manual_seed(0), []
    for step in range(1, 41):
        model.weight.data = torch.randn(2, 3, generator=generator)
        seen.append(model.weight.detach().double())
        averages.update(step)
        if step == 1:
            assert torch.equal(averages.tensors("ema-std-0.05")["weight"], model.weight)
    for std in TRACKED:
        wanted = torch.einsum("k,kij->ij", profile(std, 40), torch.stack(seen))
        torch.testing.assert_close(averages.tensors(f"ema-std-{std}")["weight"].double(), wanted, rtol=1e-5, atol=1e-6)


STEPS = 2000


@pytest.fixture(scope="module")
def walk() -> Tensor:
    """Weights that wander far from where they began: 64 random walks with a drift, about 100."""
    generator = torch.Generator().manual_seed(0)
    steps = torch.randn(STEPS, 64, generator=generator, dtype=torch.float64) + 0.02
    return 100 + steps.cumsum(0)


def averaged(walk: Tensor, std: float, steps: int = STEPS) -> Tensor:
    return profile(std, steps) @ walk[:steps]


@pytest.mark.parametrize(("std", "bound"), [(0.03, 0.02), (0.07, 1e-3), (0.12, 1e-3), (0.15, 1e-3), (0.2, 0.01)])
def test_a_reconstruction_is_the_average_that_was_not_tracked(walk: Tensor, std: float, bound: float) -> None:
    """From 16 snapshots of two lengths. The error is a share of what averaging does: the way to the last weights."""
    stored = [(step, tracked) for step in range(125, STEPS + 1, 125) for tracked in TRACKED]
    factors, missing = reconstruction(stored, (STEPS, std))
    made = factors @ torch.stack([averaged(walk, s, step) for step, s in stored])
    direct = averaged(walk, std)
    assert float((made - direct).norm() / (walk[-1] - direct).norm()) < bound
    assert 0 < missing < 0.05
    # it is none of those that were stored: these are further away by far
    for tracked in TRACKED:
        other = averaged(walk, tracked)
        assert float((other - direct).norm() / (walk[-1] - direct).norm()) > 10 * bound


def test_more_snapshots_come_nearer(walk: Tensor) -> None:
    errors, missing = [], []
    for every in (1000, 500, 250, 125):
        stored = [(step, tracked) for step in range(every, STEPS + 1, every) for tracked in TRACKED]
        factors, left = reconstruction(stored, (STEPS, 0.15))
        made = factors @ torch.stack([averaged(walk, s, step) for step, s in stored])
        errors.append(float((made - averaged(walk, 0.15)).norm()))
        missing.append(left)
    assert errors == sorted(errors, reverse=True)
    assert missing == sorted(missing, reverse=True)
    assert errors[-1] < 0.01 * errors[0]


def test_a_tracked_length_is_its_own_reconstruction() -> None:
    stored = [(step, tracked) for step in range(125, STEPS + 1, 125) for tracked in TRACKED]
    for std in TRACKED:
        factors, missing = reconstruction(stored, (STEPS, std))
        own = torch.tensor([float(s == (STEPS, std)) for s in stored], dtype=torch.float64)
        torch.testing.assert_close(factors, own, rtol=0, atol=1e-6)
        assert missing < 1e-6


def test_weights_that_stand_still_stay_what_they_are() -> None:
    for stored in ([(100, 0.05), (100, 0.1)], [(s, t) for s in (30, 60, 100) for t in TRACKED]):
        factors, _ = reconstruction(stored, (100, 0.2))
        assert float(factors.sum()) == pytest.approx(1, abs=1e-9)
    with pytest.raises(DitkitError, match="stored power-function averages"):
        reconstruction([], (100, 0.2))


# runs


@pytest.fixture
def tracking(tiny: Recipe) -> Recipe:
    return with_train(tiny, emas=(0.9,), ema_stds=TRACKED, snapshot_every=2, steps=12, checkpoint_every=5)


def snapshots(run: Run) -> dict[str, bytes]:
    """Every file of every snapshot."""
    return {
        f"{folder.name}/{p.name}": p.read_bytes() for folder in run.snapshots() for p in folder.glob("*.safetensors")
    }


def test_snapshots_survive_a_stop_bit_for_bit(tracking: Recipe, tmp_path: Path) -> None:
    whole, parts = Run(tmp_path / "whole"), Run(tmp_path / "parts")
    train(tracking, whole.folder, quiet=True)
    train(with_train(tracking, steps=5), parts.folder, quiet=True)
    train(tracking, parts.folder, quiet=True)
    assert [p.name for p in whole.snapshots()] == [f"step-{s:08d}" for s in (2, 4, 6, 8, 10, 12)]
    assert_same(whole, parts)
    assert snapshots(whole) == snapshots(parts)
    assert len(snapshots(whole)) == 12


def test_what_a_kill_left_after_the_last_checkpoint_is_made_anew(tracking: Recipe, tmp_path: Path) -> None:
    """Snapshots of steps that are trained again, perhaps with another rate, are not kept from before."""
    run, other = Run(tmp_path / "run"), Run(tmp_path / "other")
    train(with_train(tracking, steps=9), run.folder, quiet=True)
    for checkpoint in run.checkpoints()[1:]:  # as if it was killed before step 9 was written
        for file in checkpoint.iterdir():
            file.unlink()
        checkpoint.rmdir()
    (run.folder / "snapshots" / ".writing-1-step-00000008").mkdir()
    old = snapshots(run)
    train(with_train(tracking, lr=1e-2), run.folder, quiet=True)
    train(with_train(tracking, steps=5), other.folder, quiet=True)
    train(with_train(tracking, lr=1e-2), other.folder, quiet=True)
    assert snapshots(run) == snapshots(other)
    for name, content in snapshots(run).items():
        if name in old:
            assert (content == old[name]) == (name < "step-00000006")
    assert not list(run.folder.rglob(".writing-*"))


def test_any_length_is_loaded_and_a_tracked_one_is_itself(tracking: Recipe, tmp_path: Path, ditkit: Command) -> None:
    folder = tmp_path / "run"
    train(tracking, folder, quiet=True)
    checkpoint = find_checkpoint(folder)
    assert (checkpoint.emas, checkpoint.stds) == ((0.9,), TRACKED)
    pipeline = load(folder, ema_std=0.05, device="cpu")
    assert pipeline.origin == "step-00000012/ema-std-0.05"
    for name, value in checkpoint.tensors("ema-std-0.05").items():
        assert torch.equal(pipeline.model.state_dict()[name], value)
    made = load(folder, ema_std=0.07, device="cpu")
    assert made.origin.startswith("step-00000012/ema-std-0.07 made from 12 averages")
    factors, _ = reconstruction([(step, s) for step in (2, 4, 6, 8, 10, 12) for s in TRACKED], (12, 0.07))
    parts = [find_checkpoint(p).tensors(f"ema-std-{s}") for p in Run(folder).snapshots() for s in TRACKED]
    for name, value in made.model.state_dict().items():
        wanted = sum(f * p[name].double() for f, p in zip(factors.tolist(), parts, strict=True))
        torch.testing.assert_close(value.double(), wanted, rtol=1e-5, atol=1e-7)
    # an older checkpoint does not see what came after it
    old = load(folder / "checkpoints" / "step-00000010", ema_std=0.07, device="cpu")
    assert old.origin.startswith("step-00000010/ema-std-0.07 made from 10 averages")
    assert old.sample(count=2, steps=2).shape == (2, 1, 28, 28)
    done = ditkit("sample", folder, "--ema-std", "0.07", "--count", "2", "--steps", "2", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    for words, message in (
        (("--ema-std", "0.5"), "share of the training"),
        (("--ema-std", "0.01"), "of its profile would be missing; choose a length nearer"),
        (("--ema-std", "0.07", "--ema", "0.9"), "not both"),
    ):
        done = ditkit("sample", folder, *words)
        assert done.returncode == 1
        assert message in done.stderr


def test_what_samples_is_what_is_exported_and_begun_from(tracking: Recipe, tmp_path: Path, ditkit: Command) -> None:
    """A length that was not tracked, asked for or named by the recipe: made from the snapshots, as by `load`."""
    folder = tmp_path / "run"
    train(tracking, folder, quiet=True)
    wanted = dict(load(folder, ema_std=0.07, device="cpu").model.state_dict())

    def written(file: str) -> dict[str, torch.Tensor]:
        return {name.removeprefix("net."): value for name, value in load_file(tmp_path / file).items()}

    done = ditkit("export", folder, "--format", "official", "--out", "asked.safetensors", "--ema-std", "0.07")
    assert done.returncode == 0, done.stderr
    assert "ema-std-0.07 made from 12 averages" in done.stdout
    named = replace(Run(folder).recipe(), sample=replace(tracking.sample, ema_std=0.07))
    (folder / "recipe.json").write_text(named.to_json())
    export_run(folder, "official", tmp_path / "named.safetensors")
    begun = begin_from(folder, tracking)
    assert begun.origin.startswith("ema-std-0.07 made from 12 averages")
    for found in (written("asked.safetensors"), written("named.safetensors"), begun.weights):
        assert {name: torch.equal(value, wanted[name]) for name, value in found.items()} == dict.fromkeys(wanted, True)
    export_run(folder, "official", tmp_path / "jit.pth")
    first = read(tmp_path / "jit.pth", FORMATS, weights="model_ema1").weights
    assert all(torch.equal(first[name], value) for name, value in wanted.items())
    export_run(folder, "official", tmp_path / "decay.safetensors", ema=0.9)
    assert torch.equal(written("decay.safetensors")["pos_embed"], wanted["pos_embed"])
    assert not torch.equal(
        written("decay.safetensors")["final_layer.linear.weight"], wanted["final_layer.linear.weight"]
    )
    with pytest.raises(DitkitError, match="not both"):
        export_run(folder, "official", tmp_path / "no.safetensors", ema=0.9, ema_std=0.07)
    with pytest.raises(DitkitError, match="of its profile would be missing"):
        export_run(folder, "official", tmp_path / "no.safetensors", ema_std=0.01)


def test_old_runs_still_load_and_have_no_lengths(tiny: Recipe, tmp_path: Path) -> None:
    """A run whose JSON knows nothing of lengths."""
    folder = tmp_path / "run"
    train(with_train(tiny, steps=4), folder, quiet=True)

    def forget(value: object) -> object:
        if isinstance(value, dict):
            return {k: forget(v) for k, v in value.items() if k not in ("ema_stds", "snapshot_every", "ema_std")}
        return [forget(v) for v in value] if isinstance(value, list) else value

    for path in (folder / "recipe.json", *folder.rglob("state.json")):
        path.write_text(json.dumps(forget(json.loads(path.read_text()))))
    assert load(folder, device="cpu").origin.endswith("ema-0.9")
    with pytest.raises(DitkitError, match=r"no power-function averages.*--train.ema-stds"):
        load(folder, ema_std=0.07, device="cpu")
    assert train(tiny, folder, quiet=True)


def test_lengths_alone_are_enough(tracking: Recipe, tmp_path: Path) -> None:
    recipe = with_train(tracking, emas=(), steps=2)
    assert train(recipe, tmp_path / "run", quiet=True)
    assert load(tmp_path / "run", device="cpu").origin.endswith("ema-std-0.05")
    assert load(tmp_path / "run", ema=0, device="cpu").origin.endswith("model")


def test_settings_that_cannot_work_are_refused(tracking: Recipe, tmp_path: Path) -> None:
    for changes, message in (
        ({"emas": (), "ema_stds": ()}, "at least one"),
        ({"ema_stds": (0.4,)}, "share of the training"),
        ({"ema_stds": (0.05, 0.05)}, "different lengths"),
        ({"snapshot_every": 5}, "set train.ema_stds"),
        ({"snapshot_every": -1, "ema_stds": TRACKED}, "must not be negative"),
    ):
        with pytest.raises(DitkitError, match=message):
            Train(**changes)  # pyright: ignore[reportArgumentType]
    with pytest.raises(DitkitError, match="not both"):
        Sample(ema=0.9, ema_std=0.05)
    with pytest.raises(DitkitError, match=r"sample.ema_std is 0.07.*made after training"):
        train(replace(tracking, sample=Sample(ema_std=0.07)), tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()
