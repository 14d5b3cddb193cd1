"""The loop: exact resume, signals, losses that are not finite, averages, accumulation."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ditkit.config import DitkitError
from ditkit.data import Digits
from ditkit.diffusion import DDPM, Ancestral, Discrete, Jumps, LogitNormal, LogVariance, Meaning, Regression
from ditkit.diffusion.grid import SD3
from ditkit.diffusion.grid import SiT as SiTGrid
from ditkit.models import DDiTConfig, DiTConfig
from ditkit.pipeline import load
from ditkit.recipe import Recipe, Sample
from ditkit.recipes import captions
from ditkit.runs import FORMAT, Run
from ditkit.training import WALL_CLOCK, Trainer, train

from .conftest import TINY_FLAGS


def settled(run: Run) -> list[dict[str, Any]]:
    """The log without what depends on the machine."""
    return [{k: v for k, v in row.items() if k not in WALL_CLOCK} for row in run.rows()]


def assert_same(a: Run, b: Run) -> None:
    """Newest checkpoints and logs are bit-identical."""
    one, two = a.newest(), b.newest()
    assert one is not None
    assert two is not None
    assert one.step == two.step
    assert set(one.state["files"]) == set(two.state["files"])
    for name in one.state["files"]:
        left, right = (c.tensors(name.removesuffix(".safetensors")) for c in (one, two))
        assert left.keys() == right.keys()
        for key in left:
            assert torch.equal(left[key], right[key]), f"{name}: {key}"
    assert settled(a) == settled(b)


def with_train(recipe: Recipe, **changes: Any) -> Recipe:
    return replace(recipe, train=replace(recipe.train, **changes))


def test_training_changes_every_trained_weight_and_writes_what_it_says(tiny: Recipe, tmp_path: Path) -> None:
    recipe = with_train(tiny, sample_every=6)
    assert train(recipe, tmp_path / "run", quiet=True)
    run = Run(tmp_path / "run")
    assert [c.name for c in run.checkpoints()] == ["step-00000003", "step-00000006"]
    assert [row["step"] for row in run.rows()] == [2, 4, 6]
    assert {"loss", "mse", "grad_norm", "lr", "samples_per_second", "seconds", "time"} <= set(run.rows()[0])
    assert (run.folder / "samples" / "step-00000006.png").stat().st_size > 0
    assert run.recipe() == recipe.fitted(Digits().open())
    start = run.recipe().model.build(recipe.seed)
    newest = run.newest()
    assert newest is not None
    end = newest.tensors("model")
    for name, parameter in start.named_parameters():
        assert torch.equal(parameter, end[name]) != parameter.requires_grad, name
    assert not list(tmp_path.rglob(".writing-*"))


def test_resume_in_one_process_is_bit_exact(tiny: Recipe, tmp_path: Path) -> None:
    train(with_train(tiny, steps=8), tmp_path / "whole", quiet=True)
    train(with_train(tiny, steps=5), tmp_path / "parts", quiet=True)  # ends inside a row of the log
    train(with_train(tiny, steps=8), tmp_path / "parts", quiet=True)
    assert_same(Run(tmp_path / "whole"), Run(tmp_path / "parts"))


def test_resume_is_bit_exact_with_dropout_and_flips(tiny: Recipe, tmp_path: Path) -> None:
    recipe = replace(tiny, data=Digits(flip=True), model=replace(tiny.model, depth=4, proj_drop=0.5, attn_drop=0.5))
    train(with_train(recipe, steps=6), tmp_path / "whole", quiet=True)
    train(with_train(recipe, steps=3), tmp_path / "parts", quiet=True)
    torch.rand(17)  # whatever the process did with the global generator in between
    train(with_train(recipe, steps=6), tmp_path / "parts", quiet=True)
    assert_same(Run(tmp_path / "whole"), Run(tmp_path / "parts"))


def test_what_the_objective_learns_is_trained_saved_and_resumed_bit_exactly(tiny: Recipe, tmp_path: Path) -> None:
    recipe = replace(tiny, objective=Regression("velocity", LogitNormal(0.8, 0.8), LogVariance(8)))
    train(with_train(recipe, steps=6), tmp_path / "whole", quiet=True)
    train(with_train(recipe, steps=3), tmp_path / "parts", quiet=True)
    train(with_train(recipe, steps=6), tmp_path / "parts", quiet=True)
    assert_same(Run(tmp_path / "whole"), Run(tmp_path / "parts"))
    newest = Run(tmp_path / "whole").newest()
    assert newest is not None
    assert bool(newest.tensors("objective")["weight"].any())
    assert "exp_avg.objective/weight" in newest.tensors("optimizer")
    assert not [name for name in newest.tensors("model") if "objective" in name]
    assert {"error", "log_variance", "mse"} <= set(Run(tmp_path / "whole").rows()[0])
    assert load(tmp_path / "whole", device="cpu").sample(count=2, steps=2).shape == (2, 1, 28, 28)


def test_five_kills_at_random_moments_leave_no_trace(tmp_path: Path) -> None:
    """SIGKILL while training or while writing a checkpoint; the same command goes on to the same bits."""
    words = [*TINY_FLAGS, "--train.steps", "200", "--train.checkpoint-every", "4", "--train.log-every", "3"]
    words += ["--train.ema-stds", "0.05", "0.1", "--train.snapshot-every", "7"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def start(out: Path) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "ditkit", "train", "digits", "--out", str(out), "--quiet", *words]
        return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)

    whole, killed = Run(tmp_path / "whole"), Run(tmp_path / "killed")
    began = time.monotonic()
    assert start(whole.folder).wait(timeout=300) == 0
    seconds = whole.rows()[-1]["seconds"]
    assert time.monotonic() - began > seconds
    seed = random.SystemRandom().randrange(1 << 32)
    moments = random.Random(seed)
    kills = 0
    while kills < 5:
        rows = len(killed.rows())
        process = start(killed.folder)
        while len(killed.rows()) <= rows and process.poll() is None:  # it has begun, and has gone on from before
            time.sleep(0.005)
        time.sleep(moments.uniform(0, seconds / 10))
        assert process.poll() is None, f"finished before it was killed (seed {seed})"
        process.send_signal(signal.SIGKILL)
        process.wait()
        kills += 1
    assert start(killed.folder).wait(timeout=300) == 0
    assert_same(whole, killed)
    assert [p.name for p in whole.snapshots()] == [p.name for p in killed.snapshots()]
    for folder in whole.snapshots():
        for file in folder.glob("*.safetensors"):
            assert file.read_bytes() == (killed.folder / "snapshots" / folder.name / file.name).read_bytes()
    assert not list(killed.folder.rglob(".writing-*"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_writes_a_checkpoint_and_exits_0(number: signal.Signals, tmp_path: Path) -> None:
    out = tmp_path / "run"
    words = [*TINY_FLAGS, "--train.steps", "100000", "--train.checkpoint-every", "100000"]
    command = [sys.executable, "-m", "ditkit", "train", "digits", "--out", str(out), *words]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not Run(out).rows() and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(number)
    said, complained = process.communicate(timeout=60)
    assert process.returncode == 0, complained
    assert f"ditkit train {out}" in said + complained
    newest = Run(out).newest()
    assert newest is not None
    assert newest.step >= 10
    assert load(out, device="cpu").sample(count=2, steps=2).shape == (2, 1, 28, 28)


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_checkpoint(tiny: Recipe, tmp_path: Path) -> None:
    out = tmp_path / "run"
    train(with_train(tiny, steps=3), out, quiet=True)
    bad = with_train(tiny, steps=50, lr=1e30, warmup=0)
    with pytest.raises(
        DitkitError, match=r"(loss|gradient) is (nan|inf) at step \d+; the last good checkpoint is .*step-0000000"
    ):
        train(bad, out, quiet=True)
    newest = Run(out).newest()
    assert newest is not None
    assert newest.step == 3
    assert all(bool(torch.isfinite(v).all()) for v in newest.tensors("model").values())
    assert train(with_train(tiny, steps=6), out, quiet=True)


def test_accumulation_is_the_whole_batch_up_to_rounding(tiny: Recipe) -> None:
    data = Digits().open()
    trainers = [Trainer(with_train(tiny, accumulate=n).fitted(data), data) for n in (1, 4)]
    for _ in range(3):
        whole, parts = (t.advance(t.read(t.step)) for t in trainers)
        assert whole[0].keys() == parts[0].keys()
        for name in whole[0]:
            assert whole[0][name] == pytest.approx(parts[0][name], rel=1e-4), name
    for a, b in zip(trainers[0].model.parameters(), trainers[1].model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_the_averages_are_what_their_decays_say(tiny: Recipe) -> None:
    data = Digits().open()
    trainer = Trainer(tiny.fitted(data), data)
    expected = {d: [p.detach().double() for p in trainer.model.parameters()] for d in (0.9, 0.99)}
    for _ in range(4):
        trainer.advance(trainer.read(trainer.step))
        for decay, copies in expected.items():
            new = trainer.model.parameters()
            expected[decay] = [decay * c + (1 - decay) * p.detach().double() for c, p in zip(copies, new, strict=True)]
    for decay, copies in expected.items():
        for value, wanted in zip(trainer.averages.tensors(f"ema-{decay}").values(), copies, strict=True):
            torch.testing.assert_close(value.double(), wanted, rtol=1e-5, atol=1e-7)


def test_the_learning_rate_rises_stays_and_falls(tiny: Recipe) -> None:
    data = Digits().open()
    trainer = Trainer(with_train(tiny, steps=10, lr=1.0, warmup=4, cooldown=4).fitted(data), data)
    rates = [trainer.rate(step) for step in range(10)]
    assert rates == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1, 1, 0.75, 0.5, 0.25])


def test_clipping_bounds_the_update_of_plain_gradients(tiny: Recipe) -> None:
    data = Digits().open()
    trainer = Trainer(with_train(tiny, clip=1e-3).fitted(data), data)
    seen = []

    def spy(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        seen.append(torch.stack([p.grad.norm() for p in trainer.model.parameters() if p.grad is not None]).norm())

    trainer.optimizer.register_step_pre_hook(spy)
    _, norm, _ = trainer.advance(trainer.read(0))
    assert norm > 1e-3
    assert float(seen[0]) == pytest.approx(1e-3, rel=1e-3)


def test_bf16_keeps_float32_master_weights_and_learns_the_same_direction(tiny: Recipe) -> None:
    data = Digits().open()
    trainers = [Trainer(with_train(tiny, precision=p).fitted(data), data) for p in ("fp32", "bf16")]
    losses = []
    for _ in range(4):
        losses = [t.advance(t.read(t.step))[0]["loss"] for t in trainers]
        assert losses[0] == pytest.approx(losses[1], rel=0.02)
    assert losses[0] != losses[1]  # the first step is exact: every output is still zero
    assert all(p.dtype == torch.float32 for p in trainers[1].model.parameters())
    state = trainers[1].optimizer.state
    assert all(s["exp_avg"].dtype == torch.float32 for s in state.values())


def test_ddpm_with_learned_variance_trains_and_samples_in_the_same_loop(tiny: Recipe, tmp_path: Path) -> None:
    recipe = replace(
        tiny,
        model=DiTConfig(patch_size=7, hidden_size=32, depth=2, num_heads=2),
        denoiser=Meaning(DDPM(), prediction="eps", clock="index"),
        objective=Regression("eps", Discrete(), variance="hybrid"),
        sample=Sample(steps=4, solver=Ancestral(), grid="ddpm", guidance=1.5, channels=1),
    )
    assert train(recipe, tmp_path / "run", quiet=True)
    assert {"mse", "vb"} <= set(Run(tmp_path / "run").rows()[-1])
    assert load(tmp_path / "run", device="cpu").sample("3", 2).shape == (2, 1, 28, 28)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": DiTConfig(patch_size=5, hidden_size=32, depth=1, num_heads=2)}, "not tiled by patches of 5"),
        ({"objective": Regression("velocity", Discrete())}, None),
        ({"denoiser": Meaning(prediction="x0", clock="1-t"), "objective": Regression("eps")}, "t_eps"),
        ({"denoiser": Meaning(DDPM(), "eps", "index"), "objective": Regression("eps", LogitNormal())}, "discrete"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_written(
    change: dict[str, Any], message: str | None, tiny: Recipe, tmp_path: Path
) -> None:
    recipe = replace(tiny, **change)
    if message is None:
        assert train(recipe, tmp_path / "run", quiet=True)  # discrete times are fine on a continuous path
        return
    with pytest.raises(DitkitError, match=message):
        train(recipe, tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()


def test_the_rehearsal_visits_times_of_the_recipes_own_grid(tiny: Recipe) -> None:
    """A grid that fails at its second time is refused; one that only has as many steps as the recipe says is not."""
    table = replace(
        tiny,
        denoiser=Meaning(DDPM(999), "v", "index"),
        objective=Regression("v", Discrete(999)),
        sample=Sample(steps=3, solver="ddim", batch=8),  # equal steps, and 999 is no multiple of 2
    )
    Trainer(table.fitted(table.data.open()), table.data.open())
    for grid in (SiTGrid(1e-3), SD3(2.0)):
        wrong = replace(table, sample=Sample(steps=6, solver="ddim", grid=grid, batch=8))
        with pytest.raises(DitkitError, match="has no entry at t = "):
            Trainer(wrong.fitted(wrong.data.open()), wrong.data.open())


def test_a_folder_with_another_run_or_other_files_is_left_alone(tiny: Recipe, tmp_path: Path) -> None:
    train(tiny, tmp_path / "run", quiet=True)
    before = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    for other, name in (
        (replace(tiny, model=replace(tiny.model, depth=3)), "model.depth is 2, not 3"),
        (replace(tiny, seed=1), "seed is 0, not 1"),
        (with_train(tiny, batch=16), "train.batch is 8, not 16"),
        (with_train(tiny, emas=(0.9,)), "train.emas"),
        (with_train(tiny, steps=2), "6 steps already"),
    ):
        with pytest.raises(DitkitError, match=name):
            train(other, tmp_path / "run", quiet=True)
    assert {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()} == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("dear")
    with pytest.raises(DitkitError, match="not empty"):
        train(tiny, tmp_path / "mine", quiet=True)


def test_tensorboard_gets_what_the_log_has(tiny: Recipe, tmp_path: Path) -> None:
    train(with_train(tiny, tensorboard=True), tmp_path / "run", quiet=True)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    rows = Run(tmp_path / "run").rows()
    assert [e.step for e in events.Scalars("loss")] == [row["step"] for row in rows]
    assert [e.value for e in events.Scalars("loss")] == pytest.approx([row["loss"] for row in rows])


@pytest.mark.slow
def test_compiled_blocks_train_to_the_same_loss(tiny: Recipe) -> None:
    data = Digits().open()
    trainers = [Trainer(with_train(tiny, compile=c).fitted(data), data) for c in (False, True)]
    for _ in range(3):
        plain, compiled = (t.advance(t.read(t.step))[0]["loss"] for t in trainers)
        assert plain == pytest.approx(compiled, rel=1e-4)


@pytest.mark.parametrize("name", ["model", "ema-0.9", "optimizer"])
@pytest.mark.parametrize("damage", ["missing", "truncated", "flipped"])
def test_a_damaged_checkpoint_is_named_and_nothing_else_is_touched(
    name: str, damage: str, tiny: Recipe, tmp_path: Path
) -> None:
    train(with_train(tiny, steps=3), tmp_path / "run", quiet=True)
    path = tmp_path / "run" / "checkpoints" / "step-00000003" / f"{name}.safetensors"
    content = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(content[:-100] if damage == "truncated" else content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(DitkitError, match=rf"damaged.*{name}.safetensors"):
        train(with_train(tiny, steps=6), tmp_path / "run", quiet=True)
    state = path.with_name("state.json")
    state.write_text(state.read_text()[:50])
    with pytest.raises(DitkitError, match=r"state\.json"):
        load(tmp_path / "run", device="cpu")


def test_the_state_of_a_checkpoint_is_json_with_the_recipe(tiny: Recipe, tmp_path: Path) -> None:
    train(tiny, tmp_path / "run", quiet=True)
    newest = Run(tmp_path / "run").newest()
    assert newest is not None
    assert newest.recipe == Run(tmp_path / "run").recipe()
    assert newest.emas == (0.9, 0.99)
    assert json.loads((newest.folder / "state.json").read_text())["step"] == 6


def _written(path: Path, **changes: Any) -> None:
    """state.json with other entries; None takes one away."""
    state = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in state.items() if value is not None}))


def test_checkpoints_say_their_format(tiny: Recipe, tmp_path: Path) -> None:
    """Those without one still load, but for a DDiT, whose rotations have changed; those of a newer one do not."""
    train(tiny, tmp_path / "images", quiet=True)
    texts = replace(
        captions(),
        model=DDiTConfig(length=32, hidden_size=16, depth=1, num_heads=2, cond_dim=8),
        train=replace(captions().train, steps=1, batch=4, sample_every=0),
        sample=Sample(steps=2, solver=Jumps(), batch=2),
    )
    train(texts, tmp_path / "texts", quiet=True)
    states = {}
    for name in ("images", "texts"):
        newest = Run(tmp_path / name).newest()
        assert newest is not None
        states[name] = newest.folder / "state.json"
        assert newest.state["format"] == FORMAT
        load(tmp_path / name)
    for path in states.values():
        _written(path, format=None)
    load(tmp_path / "images")
    with pytest.raises(DitkitError, match=r"is a ddit of an older ditkit: its rotations .*; train it again") as old:
        load(tmp_path / "texts")
    assert "\n" not in str(old.value)
    with pytest.raises(DitkitError, match="of an older ditkit"):
        train(replace(texts, train=replace(texts.train, steps=2)), tmp_path / "texts", quiet=True)
    _written(states["images"], format=FORMAT + 1)
    with pytest.raises(DitkitError, match=f"format {FORMAT + 1} of a newer ditkit"):
        load(tmp_path / "images")
    _written(states["images"], format="new")
    with pytest.raises(DitkitError, match=r"is not a checkpoint: state\.json"):
        load(tmp_path / "images")
