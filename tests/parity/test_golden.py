"""Every tensor of every golden file, against ditkit.

A golden file holds inputs, random weights under the official key names and the outputs of the official implementation.
The folder is named by DITKIT_GOLDEN (default tests/golden). The system is recognised by the file's `source`, everything
else is read from the file: other configurations, seeds and batch sizes pass the same tests.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.testing import assert_close

from ditkit.conditioning import Conditioning, Known, Tokens
from ditkit.config import lookup
from ditkit.diffusion import (
    CFG,
    DDIM,
    DDPM,
    GVP,
    RK4,
    VP,
    Ancestral,
    Denoise,
    Denoiser,
    Discrete,
    Euler,
    Heun,
    Likelihood,
    Linear,
    LogitNormal,
    Meaning,
    Prediction,
    Regression,
    SiTSDE,
    guide,
    integrate,
    row,
)
from ditkit.interop import DRAX, FORMATS, KANDINSKY5, read, unet_config
from ditkit.interop.table import read_table
from ditkit.layers import Nabla, Pattern
from ditkit.models import DiT, DiTConfig, DraxConfig, JiT, JiTConfig, Kandinsky5Config
from ditkit.rng import Replay

FOLDER = Path(os.environ.get("DITKIT_GOLDEN", Path(__file__).parents[1] / "golden"))
FILES = sorted(FOLDER.glob("*.safetensors"))

one_pass = partial(assert_close, rtol=1e-5, atol=1e-5)
many_steps = partial(assert_close, rtol=1e-4, atol=1e-4)


class Golden:
    """A golden file that knows which of its tensors were used."""

    def __init__(self, path: Path):
        with safe_open(path, "pt") as file:
            self.meta = file.metadata() or {}
            self.tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
        self.used: set[str] = set()

    def __getitem__(self, key: str) -> Tensor:
        self.used.add(key)
        return self.tensors[key]

    def under(self, prefix: str) -> dict[str, Tensor]:
        return {key.removeprefix(prefix): self[key] for key in self.tensors if key.startswith(prefix)}

    def json(self, key: str) -> dict:
        return json.loads(self.meta[key])

    def unused(self) -> set[str]:
        return set(self.tensors) - self.used


def check_loss(
    golden: Golden, model: torch.nn.Module, denoiser: Denoiser, objective: Regression, draws: Replay
) -> None:
    """Terms per sample, their sum, and the gradients of the batch mean."""
    cond = Conditioning(label=golden["loss/y"])
    loss = objective.loss(denoiser, golden["loss/x0"], cond, draws)
    for name, term in loss.terms.items():
        if f"loss/{name}" in golden.tensors:
            one_pass(term, golden[f"loss/{name}"])
    one_pass(loss.total, golden["loss/loss"])
    model.zero_grad()
    loss.total.mean().backward()
    gradients = dict(model.named_parameters())
    for name, value in golden.under("loss/grad/").items():
        gradient = gradients[name].grad
        assert gradient is not None, name
        one_pass(gradient, value, msg=lambda text, name=name: f"{name}: {text}")


def both_halves(denoiser: Denoiser, label: Tensor, null: Tensor, scale: float) -> Callable[[Tensor, float], Prediction]:
    """DiT's `forward_with_cfg`: both halves see the first half's x and take the guided noise of channels 0 to 2; the
    rest of the output, and the state that is stepped, are each row's own."""
    cond, weak = Conditioning(label=label), Conditioning(label=null)
    guided = guide(denoiser, CFG(scale, weak, channels=3))

    def denoise(x: Tensor, t: float) -> Prediction:
        half = x[: len(x) // 2]
        strong = guided.start(cond, half.shape, ())(half, t)
        own = denoiser(half, t, weak)
        assert strong.extra is not None
        assert own.extra is not None
        out = torch.cat((strong.out, torch.cat((strong.out[:, :3], own.out[:, 3:]), dim=1)))
        extra = torch.cat((strong.extra, own.extra))
        return Prediction(out, x, strong.t, strong.path, strong.space, extra=extra)

    return denoise


class Started:
    """A trajectory as the sampler's denoiser."""

    def __init__(self, denoise: Callable[[Tensor, Any], Prediction]):
        self.denoise = denoise

    def start(self, cond: Conditioning, shape: Sequence[int], times: Sequence[float]) -> Denoise:
        return self.denoise

    def check(self, visited: Iterable[float], needs: Iterable[str], visitor: str = "") -> None:
        """Nothing to refuse: eps is read on a table whose alpha is never 0."""


def check_dit(golden: Golden) -> None:
    config = DiTConfig(**golden.json("config"))
    model = config.build().eval()
    assert isinstance(model, DiT)
    model.load_state_dict(golden.under("weights/"))
    out = model(golden["forward/x"], golden["forward/t"], Conditioning(label=golden["forward/y"]))
    one_pass(out, golden["forward/out"])

    path = DDPM()
    denoiser = Meaning(path, prediction="eps", clock="index").of(model)

    # guidance: rows are [labels, nulls]; t is one index per row
    x, t, label = golden["cfg/x"], golden["cfg/t"], golden["cfg/y"]
    half = len(x) // 2
    halves = both_halves(denoiser, label[:half], label[half:], 4.0)
    for i in range(half):
        assert t[i] == t[i + half]
        rows = torch.tensor([i, i + half])
        halves = both_halves(denoiser, label[i : i + 1], label[i + half : i + half + 1], 4.0)
        prediction = halves(x[rows], (int(t[i]) + 1) / path.steps)
        assert prediction.extra is not None
        one_pass(torch.cat((prediction.out, prediction.extra), dim=1), golden["cfg/out_scale4"][rows])

    objective = Regression("eps", times=Discrete(path.steps), variance="hybrid")
    objective.check(denoiser)
    draws = Replay({"t": (golden["loss/t"].double() + 1) / path.steps, "noise": golden["loss/noise"]})
    check_loss(golden, model, denoiser, objective, draws)

    # both samplers on the respaced table
    steps = int(golden.meta["steps"])
    times = lookup("grid", "ddpm")()(steps, path, 0)
    assert path.index(torch.tensor(times[:-1])).flip(0).tolist() == golden["ddpm/timestep_map"].tolist()
    label, z = golden["ddpm/y"], golden["ddpm/z"]
    half = len(label) // 2
    scale = float(golden.meta["cfg_scale_sampling"])
    started = Started(both_halves(denoiser, label[:half], label[half:], scale))
    draws = Replay({"solver": list(golden["ddpm/noises"])})
    with torch.no_grad():
        for key, solver in {"ddpm/out": Ancestral(), "ddim/out": DDIM()}.items():
            many_steps(integrate(started, solver, times, z, Conditioning(), draws), golden[key])
        # and the library's own guided sampling gives the rows that a user would keep
        guided = guide(denoiser, CFG(scale, Conditioning(label=label[half:]), channels=3))
        own = Replay({"solver": list(golden["ddpm/noises"][:, :half])})
        out = integrate(guided, Ancestral(), times, z[:half], Conditioning(label=label[:half]), own)
        many_steps(out, golden["ddpm/out"][:half])


def check_jit(golden: Golden) -> None:
    config = JiTConfig(**golden.json("config"))
    model = config.build().eval()
    assert isinstance(model, JiT)
    model.load_state_dict(golden.under("weights/"))
    out = model(golden["forward/x"], golden["forward/t"], Conditioning(label=golden["forward/y"]))
    one_pass(out, golden["forward/out"])

    process = golden.json("denoiser")
    path = Linear(process["noise_scale"])
    denoiser = Meaning(path, prediction="x0", clock="1-t", t_eps=process["t_eps"]).of(model)
    objective = Regression("velocity", times=LogitNormal(0.8, 0.8))
    objective.check(denoiser)
    noise = golden["loss/e"] / process["noise_scale"]
    check_loss(golden, model, denoiser, objective, Replay({"t": 1 - golden["loss/t"].double(), "noise": noise}))

    label = golden["sample/y"]
    null = Conditioning(label=torch.full_like(label, config.num_classes))
    interval = (1 - process["hi"], 1 - process["lo"])
    guided = guide(denoiser, CFG(process["cfg"], null, interval=interval))
    x = golden["sample/noise_unscaled"] * path.prior_std
    times = lookup("grid", "uniform")()(process["steps"], path, 0)
    with torch.no_grad():
        for key, solver in {"sample/heun": Heun(), "sample/euler": Euler()}.items():
            out = integrate(guided, solver, times, x, Conditioning(label=label), Replay({}))
            assert_close(out, golden[key])


def check_drax(golden: Golden) -> None:
    """Every tensor under its official name, the rotations' buffer too; the loss is a mean over batch and tokens."""
    said = golden.json("config")
    names = {
        "vocab_size": "vocab",
        "n_heads": "num_heads",
        "n_blocks": "depth",
        "dropout": "drop",
        "whisper_dim": "audio_dim",
    }
    options: dict[str, Any] = {names.get(str(key), str(key)): value for key, value in said.items()}
    config = DraxConfig(**options)
    weights = golden.under("weights/")
    with tempfile.TemporaryDirectory() as name:
        save_file(weights, Path(name) / "decoder.safetensors")
        (Path(name) / "config.json").write_text(json.dumps({"model_type": "drax", "decoder_config": said}))
        found = read(name, FORMATS)
    assert found.format is DRAX
    assert found.config == config
    model = config.build()
    model.load_state_dict(found.weights)
    written = DRAX.write(model, model.state_dict())
    assert written.keys() == weights.keys()
    for name, value in written.items():
        same = torch.equal if name != "rotary_emb.inv_freq" else torch.allclose
        assert same(value, weights[name]), name

    model.eval()
    audio, mask = golden["forward/audio"], golden["forward/preserve_mask"].bool()
    x, t = golden["forward/x"], golden["forward/t"]
    heard = Tokens(audio, torch.ones(audio.shape[:2], dtype=torch.bool))
    cond = Conditioning(audio=heard, known=Known(x, mask))
    logits = model(x, t, cond)
    one_pass(logits, golden["forward/logits"])
    one_pass(model(golden["soft/x"], t, cond), golden["soft/logits"])
    one_pass(model(x, t, model.prepare(cond, x.shape)), golden["forward/logits"])

    loss = -torch.log_softmax(logits, dim=-1).gather(-1, golden["loss/x1"][..., None]).mean()
    one_pass(loss, golden["loss/ce"])
    loss.backward()
    there = {pair.theirs[0]: pair.ours for pair in DRAX.pairs(model)}
    for name, value in golden.under("loss/grad/").items():
        one_pass(model.get_parameter(there[name]).grad, value)


SIT_PATHS: dict[str, Any] = {"Linear": Linear(), "GVP": GVP(), "VP": VP()}
SIT_PREDICTIONS = {"velocity": "-velocity", "score": "score", "noise": "eps"}
# the squared error is taken in eps unless a weighting says otherwise: (sigma out + noise)^2 for the score
SIT_LOSSES: dict[str, tuple[str, Any]] = {
    "none": ("eps", None),
    "velocity": ("velocity", None),
    "likelihood": ("eps", Likelihood()),
}


def sit_network(x: Tensor, t: Tensor, cond: Conditioning, *, edit: Any = None) -> Tensor:
    """The network of the file's metadata, in SiT's time."""
    return torch.tanh(0.7 * x + 0.3 * t.view(-1, *[1] * (x.ndim - 1))) + 0.1 * x


def check_sit_transport(golden: Golden) -> None:
    """SiT's time runs from noise to data: its t is 1 - t, and velocities turn their sign."""
    assert golden.meta["network"].startswith("tanh(0.7*x + 0.3*t) + 0.1*x")
    assert golden.meta["sde"] == "Euler-Maruyama, last_step Mean, last_step_size 0.04"
    t, x0, noise = 1 - golden["t"].double(), golden["data"], golden["noise"]
    draws = Replay({"t": t, "noise": noise})
    nothing = Conditioning()
    for name, path in SIT_PATHS.items():
        if f"{name}/xt" in golden.tensors:
            alpha, sigma = (c.view(-1, 1, 1, 1) for c in path(t))
            one_pass((alpha * x0 + sigma * noise).float(), golden[f"{name}/xt"])
            a, b = (c.view(-1, 1, 1, 1) for c in row("-velocity", path, t))
            one_pass((a * x0 + b * noise).float(), golden[f"{name}/velocity_target"])
    for key in golden.tensors:
        name, *rest = key.split("/")
        if rest and rest[-1] == "loss":
            prediction, weighting = rest[:2]
            denoiser = Meaning(SIT_PATHS[name], SIT_PREDICTIONS[prediction], "1-t").of(sit_network)
            space, weight = SIT_LOSSES[weighting]
            space = "velocity" if prediction == "velocity" else space
            loss = Regression(space, weighting=weight).loss(denoiser, x0, nothing, draws)
            one_pass(loss.total, golden[key])

    noises, init = list(golden["sde_noises"]), golden["init"]
    steps = int(golden.meta["steps"].split(":")[1].split()[0])
    for key, (first, last), (_, eps) in json.loads(golden.meta["intervals"]):
        name, prediction, _ = key.split("/")
        path = SIT_PATHS[name]
        denoiser = Meaning(path, SIT_PREDICTIONS[prediction], "1-t").of(sit_network)
        ode = lookup("grid", "sit")(eps)(steps, path, 0)
        assert (1 - ode[0], 1 - ode[-1]) == pytest.approx((first, last), abs=1e-12)
        for method, solver in {"euler": Euler(), "rk4": RK4()}.items():
            out = integrate(denoiser, solver, ode, init, nothing, Replay({}))
            many_steps(out, golden[f"{key}/ode_{method}"])
        sde = lookup("grid", "sit")(eps, 0.04)(len(noises) + 1, path, 0)
        for form in ("sigma", "linear"):
            solver = SiTSDE(form, last_step="Mean")
            out = integrate(denoiser, solver, sde, init, nothing, Replay({"solver": noises}))
            many_steps(out, golden[f"{key}/sde_euler_{form}"])


def check_adm(golden: Golden) -> None:
    config = unet_config(golden.json("config"))
    model = config.build().eval()
    model.load_state_dict(golden.under("weights/"))
    label = golden["y"] if "y" in golden.tensors else None
    one_pass(model(golden["x"], golden["t"], Conditioning(label=label)), golden["out"])


def check_kandinsky5(golden: Golden) -> None:
    """Plain, with a mask of the text, and with Nabla. Theirs are [t h w c], one sample, all channels joined."""
    config, nabla = golden.json("config"), golden.json("nabla")
    assert nabla["block"] == nabla["tile"] ** 2
    x, mask = golden["x"].permute(3, 0, 1, 2)[None], golden["text_mask"].bool()
    own = config["in_visual_dim"]
    weights = golden.under("weights/")

    def out(pattern: Pattern | None, mask: Tensor) -> Tensor:
        model = Kandinsky5Config(
            patch_size=tuple(config["patch_size"]),
            in_channels=own,
            given_channels=config["visual_cond"],
            hidden_size=config["model_dim"],
            ff_dim=config["ff_dim"],
            time_dim=config["time_dim"],
            text_depth=config["num_text_blocks"],
            depth=config["num_visual_blocks"],
            axes=tuple(config["axes_dims"]),
            text_dim=config["in_text_dim"],
            pooled_dim=config["in_text_dim2"],
            scale_factor=tuple(json.loads(golden.meta["scale_factor"])),
            pattern=pattern,
        ).build()
        shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
        model.load_state_dict(read_table(KANDINSKY5.pairs(model), weights, shapes))
        channels = x[:, own:] if config["visual_cond"] else None
        cond = Conditioning(text=Tokens(golden["text"], mask), pooled=golden["pooled"], channels=channels)
        with torch.no_grad():
            return model.eval()(x[:, :own], golden["t"], cond)[0].permute(1, 2, 3, 0)

    all_real = torch.ones_like(mask)
    one_pass(out(None, all_real), golden["out"])
    one_pass(out(None, mask), golden["out_text_mask"])
    window, side = (nabla["wT"], nabla["wH"], nabla["wW"]), nabla["tile"]
    one_pass(out(Nabla(nabla["P"], window, (1, side, side)), all_real), golden["out_nabla"])


SYSTEMS = {
    "facebookresearch/DiT": check_dit,
    "LTH14/JiT": check_jit,
    "aiola-lab/drax": check_drax,
    "kandinskylab/kandinsky-5": check_kandinsky5,
    "willisma/SiT transport": check_sit_transport,
    "openai/guided-diffusion UNetModel": check_adm,
}


def test_there_are_golden_files() -> None:
    assert FILES, f"no golden files in {FOLDER}"


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_golden(file: Path) -> None:
    golden = Golden(file)
    source = golden.meta.get("source", "")
    known = [check for prefix, check in SYSTEMS.items() if source.startswith(prefix)]
    assert len(known) == 1, f"{file.name}: no test for the source {source!r}"
    known[0](golden)
    assert not golden.unused(), f"{file.name}: tensors that no comparison used: {sorted(golden.unused())}"
