"""The command line as a person uses it, and misuses it: one clear line, a non-zero exit, and no file harmed."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from ditkit.diffusion import MinSNR
from ditkit.pipeline import load
from ditkit.recipe import Evaluate, Gate, Recipe, Sample, Train
from ditkit.recipes import digits
from ditkit.runs import Run
from ditkit.training import train

from .conftest import TINY, TINY_FLAGS, Command


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short run of the digits, to be copied or only read."""
    recipe = replace(
        digits(),
        model=TINY,
        train=Train(steps=4, batch=8, emas=(0.9, 0.99), log_every=2, sample_every=0, checkpoint_every=2),
        sample=Sample(steps=3, batch=8),
        evaluate=Evaluate(
            20, 32, (Gate("class_accuracy", "at_least", 0.97), Gate("classifier_accuracy", "at_least", 0.98))
        ),
    )
    folder = tmp_path_factory.mktemp("trained") / "run"
    train(recipe, folder, quiet=True)
    return folder


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def refused(done: subprocess.CompletedProcess[str], *says: str) -> None:
    """One line on stderr that says these things, and a non-zero exit."""
    progress = ("it/s", "step/s", "?step", "...", "skipped")
    lines = [line for line in done.stderr.splitlines() if line.strip() and not any(p in line for p in progress)]
    assert done.returncode != 0
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("ditkit: ")
    for text in says:
        assert text in lines[0], lines[0]


def test_help_is_there_for_every_command(ditkit: Command, ditkit_process: Command) -> None:
    top = ditkit_process("--help")
    assert top.returncode == 0
    for command in ("train", "sample", "evaluate", "plan", "models"):
        assert command in top.stdout
        done = ditkit(command, "--help")
        assert done.returncode == 0, done.stderr
        assert command in done.stdout
    fields = ditkit("train", "digits", "--fields")
    assert fields.returncode == 0
    assert "--train.steps" in fields.stdout
    assert "--sample.solver" in fields.stdout


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("", "COMMAND"),
        ("trian digits", "trian"),
        ("train", "RECIPE"),
        ("train digts", "did you mean digits?"),
        ("train digits --train.step 5", "--train.steps"),
        ("train digits --train.steps many", "many"),
        ("train digits --train.steps 0", "train.steps must be at least 1"),
        ("train digits --train.precision fp8", "fp32 or bf16"),
        ("train digits --train.device tpu", "tpu"),
        ("train digits --sample.solver hein", "did you mean heun?"),
        ("train digits --model ditt", "unknown model 'ditt': did you mean"),
        ("train digits --model.num-classes 7", "follows from the data"),
        ("train digits --model.patch-size 5", "not tiled by patches of 5"),
        ("train folder:nowhere", "nowhere"),
        ("sample nowhere", "there is no run or checkpoint at nowhere"),
        ("evaluate nowhere", "there is no run at nowhere"),
        ("plan dit_xl_3", "unknown model 'dit_xl_3': did you mean dit_xl_"),
        ("plan dit_xl_2 --resolution 33", "not tiled"),
        ("plan dit_xl_2 --batch 0", "at least 1"),
        ("plan dit_xl_2 --dtype fp8", "bf16 or fp32"),
        ("models vgg*", "no model matches"),
        ("models --what", "--what"),
    ],
)
def test_wrong_words_get_one_clear_line(words: str, says: str, ditkit: Command, tmp_path: Path) -> None:
    refused(ditkit(*words.split()), says)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("--label 10", "label 10 is out of range"),
        ("--label -1", "label -1 is out of range"),
        ("--label cat", "there is no class 'cat'"),
        ("--label 1 2 --count 3", "2 labels were given for 3 samples"),
        ("--count 0", "count must be at least 1"),
        ("--steps 0", "at least 1 step"),
        ("--solver ddpm", "predicts no variance"),
        ("--interval 0.9 0.1 --guidance 2", "interval"),
        ("--ema 0.5", "(0.9, 0.99), not 0.5"),
        ("--device tpu", "tpu"),
        ("--dtype fp8", "fp32 or bf16"),
        ("--out samples.jpg", ".png"),
        ("--out out.png --batch 0", "sample.batch"),
        ("--columns 0", "--columns"),
    ],
)
def test_wrong_wishes_for_samples_get_one_clear_line(
    words: str, says: str, ditkit: Command, trained: Path, tmp_path: Path
) -> None:
    before = snapshot(trained)
    refused(ditkit("sample", trained, *words.split()), says)
    assert snapshot(trained) == before
    assert not list(tmp_path.iterdir())


def test_samples_do_not_depend_on_batch_or_count(ditkit: Command, trained: Path, tmp_path: Path) -> None:
    assert ditkit("sample", trained, "--label", "3", "--count", "5", "--out", "a").returncode == 0
    done = ditkit("sample", trained, "--label", "3", "--count", "3", "--batch", "2", "--out", "b")
    assert done.returncode == 0, done.stderr
    for i in range(3):
        a, b = (Image.open(tmp_path / folder / f"{i:06d}.png").tobytes() for folder in "ab")
        assert max(abs(x - y) for x, y in zip(a, b, strict=True)) <= 1  # a matrix product may round by its batch
    words = (
        "--count",
        "4",
        "--steps",
        "5",
        "--guidance",
        "2.0",
        "--solver",
        "euler",
        "--seed",
        "7",
        "--out",
        "grid.png",
    )
    pictures = []
    for _ in range(2):
        assert ditkit("sample", trained, *words).returncode == 0
        pictures.append((tmp_path / "grid.png").read_bytes())
    assert pictures[0] == pictures[1]
    assert Image.open(tmp_path / "grid.png").size[0] >= 2 * 28


def test_bf16_draws_nearly_the_same(trained: Path) -> None:
    drawn = []
    for dtype, kind in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        pipeline = load(trained, device="cpu", dtype=dtype)
        assert all(p.dtype == kind for p in pipeline.model.parameters())
        seeded = torch.Generator().manual_seed(0)  # after four steps the output is still nearly zero
        weight = pipeline.model.get_parameter("final_layer.linear.weight")
        weight.data = torch.empty(weight.shape).normal_(std=0.1, generator=seeded).to(kind)
        drawn.append(pipeline.sample(count=10).float())
    assert not torch.equal(*drawn)
    assert float((drawn[0] - drawn[1]).abs().mean()) < 2  # of 255


def test_settings_changed_after_training_are_the_ones_used(ditkit: Command, trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained, tmp_path / "run")
    assert ditkit("train", "run", "--sample.guidance", "3", "--sample.steps", "2", "--quiet").returncode == 0
    pipeline = load(tmp_path / "run", device="cpu")
    assert (pipeline.settings().guidance, pipeline.settings().steps) == (3, 2)


def test_a_full_disk_in_the_log_is_one_line(ditkit_process: Command, tiny: Recipe, tmp_path: Path) -> None:
    words = (
        "--train.steps",
        "400",
        "--train.log-every",
        "1",
        "--train.checkpoint-every",
        "400",
        "--quiet",
        *TINY_FLAGS,
    )
    refused(
        ditkit_process("train", "digits", "--out", "run", *words, preexec_fn=limited(6000)), "cannot write", "log.jsonl"
    )


def test_leftovers_of_a_crash_do_not_block_the_same_command(ditkit: Command, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".writing-1-recipe.json").write_text("{")
    done = ditkit("train", "digits", "--out", "run", "--train.steps", "1", "--quiet", *TINY_FLAGS)
    assert done.returncode == 0, done.stderr
    assert not list((tmp_path / "run").glob(".writing-*"))


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("--sample.grid ddpm", "needs a DDPM path"),
        ("--sample.ema 0.5", "sample.ema is 0.5"),
        ("--sample.solver ddpm", "predicts no variance"),
        ("--sample.interval 0.9 0.1", "interval"),
        ("--denoiser.clock index", "DDPM path"),
        ("--denoiser.t-eps -1", "t_eps"),
        ("--objective.variance hybrid", "DDPM"),
        ("--train.clip=-1", "train.clip must not be negative"),
        ("--train.betas 2 3", "train.betas"),
        ("--train.lr=-1", "train.lr"),
        ("--evaluate.samples 3", "at least 10"),
        ("--data folder", "needs its path: write folder:PATH"),
        ("--data folder:nowhere", "nowhere does not exist: give a folder"),
        ("--objective.weighting min_snr", "set objective.loss_space to x0"),
    ],
)
def test_what_cannot_work_is_said_before_anything_is_written(
    words: str, says: str, ditkit: Command, tmp_path: Path
) -> None:
    refused(ditkit("train", "digits", *TINY_FLAGS, *words.split()), says)
    assert not list(tmp_path.iterdir())


def test_a_configuration_that_is_none_can_be_chosen_too(ditkit: Command, tmp_path: Path) -> None:
    words = ("--objective.loss-space", "x0", "--objective.weighting", "min_snr", "--train.steps", "1", "--quiet")
    done = ditkit("train", "digits", "--out", "run", *TINY_FLAGS, *words)
    assert done.returncode == 0, done.stderr
    assert Run(tmp_path / "run").recipe().objective.weighting == MinSNR()


def test_a_run_whose_images_have_changed_is_not_continued(ditkit: Command, pictures: Path, tmp_path: Path) -> None:
    shutil.copytree(pictures, tmp_path / "pets")
    words = ["--data.resolution", "16", "--quiet", *("8" if word == "7" else word for word in TINY_FLAGS)]
    assert ditkit("train", "folder:pets", "--train.steps", "2", *words).returncode == 0
    next((tmp_path / "pets" / "blue").glob("*.png")).unlink()
    refused(ditkit("train", "runs/pets", "--train.steps", "4", "--quiet"), "the data has changed")


def test_damaged_runs_are_named(ditkit: Command, trained: Path, tmp_path: Path) -> None:
    for damage, says in {
        "truncated": "damaged",
        "garbage": "damaged",
        "state": "state.json",
        "recipe": "recipe.json",
        "foreign": "no field",
        "empty": "no checkpoint yet",
    }.items():
        run = tmp_path / damage
        shutil.copytree(trained, run)
        newest = run / "checkpoints" / "step-00000004"
        if damage == "truncated":
            os.truncate(newest / "ema-0.9.safetensors", 1000)
        elif damage == "garbage":
            size = (newest / "ema-0.9.safetensors").stat().st_size
            (newest / "ema-0.9.safetensors").write_bytes(os.urandom(size))
        elif damage == "state":
            (newest / "state.json").write_text("{")
        elif damage == "recipe":
            (run / "recipe.json").write_text("not json")
        elif damage == "foreign":
            text = (newest / "state.json").read_text()
            (newest / "state.json").write_text(text.replace('"hidden_size"', '"width"'))
        else:
            shutil.rmtree(run / "checkpoints")
        before = snapshot(run)
        if damage == "recipe":
            refused(ditkit("evaluate", run), says)
            refused(ditkit("train", run), says)
        else:
            refused(ditkit("sample", run, "--out", "x.png"), says)
        assert snapshot(run) == before
    assert not (tmp_path / "x.png").exists()


def limited(size: int) -> Callable[[], None]:
    """Files of this process may not grow beyond `size` bytes, as on a full disk."""
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def test_a_full_disk_stops_training_and_leaves_what_was_there(
    ditkit_process: Command, tiny: Recipe, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    train(tiny, out, quiet=True)
    before = snapshot(out / "checkpoints")
    done = ditkit_process("train", out, "--train.steps", "12", "--quiet", preexec_fn=limited(50_000))
    refused(done, "cannot write the checkpoint of step 9", "File too large", "step-00000006")
    assert snapshot(out / "checkpoints") == before
    assert not list(out.rglob(".writing-*"))
    assert ditkit_process("train", out, "--train.steps", "12", "--quiet").returncode == 0
    newest = Run(out).newest()
    assert newest is not None
    assert newest.step == 12


def test_a_full_disk_leaves_an_old_picture(ditkit_process: Command, trained: Path, tmp_path: Path) -> None:
    (tmp_path / "grid.png").write_bytes(b"precious")
    done = ditkit_process("sample", trained, "--steps", "2", "--out", "grid.png", preexec_fn=limited(50))
    refused(done, "cannot write grid.png")
    assert (tmp_path / "grid.png").read_bytes() == b"precious"
    assert [p.name for p in tmp_path.iterdir()] == ["grid.png"]


def test_a_folder_that_cannot_be_written_is_named(ditkit: Command, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    refused(ditkit("train", "digits", "--out", "file/run", *TINY_FLAGS), "file/run")


def test_a_newcomers_folder_trains_samples_and_is_measured(ditkit: Command, pictures: Path, tmp_path: Path) -> None:
    words = ("--train.steps", "4", "--train.log-every", "1", "--data.resolution", "16", *TINY_FLAGS)
    words = tuple("8" if word == "7" else word for word in words)
    done = ditkit("train", f"folder:{pictures}", "--out", "mine", *words)
    assert done.returncode == 0, done.stderr
    assert "broken.png" in done.stdout + done.stderr
    done = ditkit("sample", "mine", "--label", "blue", "--count", "4", "--steps", "2", "--out", "blue.png")
    assert done.returncode == 0, done.stderr
    refused(ditkit("sample", "mine", "--label", "bleu"), "did you mean blue?")
    refused(ditkit("evaluate", "mine", "--samples", "12"), "held-out")  # too few pictures to measure, and it says so


def test_a_folder_without_classes_trains_without_labels(ditkit: Command, pictures: Path, tmp_path: Path) -> None:
    words = ("--train.steps", "2", "--data.resolution", "16", *TINY_FLAGS)
    words = tuple("8" if word == "7" else word for word in words)
    done = ditkit("train", f"folder:{pictures / 'blue'}", *words)
    assert done.returncode == 0, done.stderr
    assert Run(tmp_path / "runs" / "blue").recipe().model.num_classes == 0
    assert ditkit("sample", "runs/blue", "--count", "3", "--steps", "2", "--out", "x.png").returncode == 0
    refused(ditkit("sample", "runs/blue", "--label", "1"), "takes no label")
    refused(ditkit("sample", "runs/blue", "--guidance", "2"), "cannot be guided")


def test_a_report_has_every_number_with_its_protocol_and_a_missed_bound_fails_the_command(
    ditkit: Command, trained: Path, tmp_path: Path
) -> None:
    shutil.copytree(trained, tmp_path / "run")
    done = ditkit("evaluate", "run", "--steps", "2")
    assert done.returncode == 1
    assert "bounds missed: class_accuracy >= 0.97" in done.stderr.splitlines()[-1]
    assert "classifier_accuracy >= 0.98" not in done.stderr
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    keys = (
        "class_accuracy classifier_accuracy kid kid_untrained kid_blurred diversity f_mem f_mem_floor seconds protocol"
    )
    assert set(keys.split()) <= set(report)
    assert report["missed"] == ["class_accuracy >= 0.97"]
    assert abs(report["kid_train"]) < 4 * report["kid_train_error"]
    assert report["protocol"]["sampling"]["steps"] == 2
    assert report["protocol"]["features"]["sha256"]
    page = (tmp_path / "run" / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 2
    assert "http" not in page
    for name in ("samples.png", "loss.png", "report.md"):
        assert (tmp_path / "run" / name).stat().st_size > 0
