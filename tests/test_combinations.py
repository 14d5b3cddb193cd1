"""Any combination of path, prediction, loss, weighting, times, grid, solver, guide, clock and network is a recipe.

A pairwise design: every pair of values of two factors is in a case that trains two steps and samples four through the
real training and the real pipeline, or, if it can be in none, in a case that is refused. RULES say from the
mathematics, and not from the code, which combinations mean nothing: a case is refused if and only if a rule says so,
in one line, with the message of such a rule, and before anything is trained. So a refusal that is too eager fails, as
does one that is missing.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path as FilePath
from typing import Any

import pytest
import torch

from ditkit.cli.train import override
from ditkit.codecs import Pixels, Vectors
from ditkit.conditioners import Label
from ditkit.config import DitkitError, lookup, names, registered_as
from ditkit.data import Dataset, Folder, Spiral
from ditkit.diffusion import (
    APG,
    CFG,
    CFGPP,
    DDIM,
    DDPM,
    DEIS2,
    GVP,
    P2,
    SPACES,
    VE,
    VP,
    Ancestral,
    Autoguidance,
    CFGZeroStar,
    Cosmap,
    Discrete,
    DPMpp2MSDE,
    DPMpp3M,
    EDMStochasticHeun,
    Likelihood,
    Linear,
    LogitNormal,
    LogNormal,
    LogVariance,
    Meaning,
    MinSNR,
    Mode,
    PerturbedAttention,
    Regression,
    Rescale,
    SiTSDE,
    SkipLayer,
    Uniform,
)
from ditkit.diffusion.grid import SiT as SiTGrid
from ditkit.models import DiTConfig, JiTConfig, LightningDiTConfig, MLPConfig
from ditkit.pipeline import load
from ditkit.recipe import Recipe, Sample, Train
from ditkit.recipes import digits
from ditkit.training import Trainer, train

Case = Mapping[str, str]
STEPS, LENGTH = 4, 4

# the factors; a value that is its registered name is built from it

PATHS: dict[str, Any] = {
    "linear": Linear(),
    "linear of twice the noise": Linear(2.0),
    "gvp": GVP(),
    "vp": VP(),
    "ve": VE(),
    "ddpm linear": DDPM(),
    "ddpm cosine": DDPM(schedule="cosine"),
    "ddpm scaled_linear": DDPM(1000, 0.00085, 0.012, "scaled_linear"),
    "ddpm zero snr": DDPM(1000, 0.00085, 0.012, "scaled_linear", zero_snr=True),
}
WEIGHTINGS: dict[str, Any] = {
    "none": None, "min_snr": MinSNR(), "p2": P2(), "likelihood": Likelihood(), "log_variance": LogVariance(16),
}  # fmt: skip
TIMES: dict[str, Any] = {
    "uniform": Uniform(),
    "uniform inside": Uniform(1e-3, 1 - 1e-3),
    "logit_normal": LogitNormal(),
    "mode": Mode(),
    "cosmap": Cosmap(),
    "log_normal": LogNormal(),
    "discrete": Discrete(1000),
}
GRIDS: dict[str, Any] = {name: name for name in names("grid") if name != "sit"} | {
    "sit": SiTGrid(eps=1e-3),
    "sit with a last step": SiTGrid(last_step=0.04),
}
VELOCITY = {"euler", "heun", "midpoint", "rk4", "ab2", "dopri5"}
SOLVERS: dict[str, tuple[Any, set[str]]] = {
    **{name: (name, {"velocity"}) for name in sorted(VELOCITY)},
    **{name: (name, {"x0"}) for name in ("dpmpp_2m", "dpmpp_3m", "unipc_2", "unipc_3")},
    **{name: (name, {"x0", "eps"}) for name in ("ddim", "deis_2", "deis_3", "edm_stochastic_heun")},
    "ddim of eta 1": (DDIM(1.0), {"x0", "eps"}),
    "deis_2 in t": (DEIS2(variable="t"), {"x0", "eps"}),
    "dpmpp_3m as published": (DPMpp3M("published", lower_order_final=True), {"x0"}),
    "dpmpp_2m_sde": (DPMpp2MSDE(), {"x0"}),
    "edm_stochastic_heun with churn": (EDMStochasticHeun(S_churn=1.0), {"x0", "eps"}),
    "ddpm learned": (Ancestral(), {"x0"}),
    "ddpm posterior": (Ancestral("posterior"), {"x0"}),
    "ddpm beta": (Ancestral("beta"), {"x0"}),
    "sit_sde sigma": (SiTSDE("sigma"), {"velocity", "score"}),
    "sit_sde SBDM": (SiTSDE("SBDM", last_step="Tweedie"), {"velocity", "score", "x0"}),
}
BACKBONES: dict[str, Any] = {
    **{
        f"dit {way}": DiTConfig(8, 4, 3, 12, 2, 2, num_classes=2, learn_sigma=way == "adaln_zero", conditioning=way)
        for way in ("adaln_zero", "adaln", "in_context", "cross_attention")
    },
    "jit": JiTConfig(
        8, 4, 3, 16, 2, 2, num_classes=2, bottleneck_dim=4, in_context_len=1, in_context_start=1
    ),
    "lightningdit": LightningDiTConfig(8, 4, 3, 16, 2, 2, num_classes=2),
    "mlp": MLPConfig(3, 16, 3),
}  # fmt: skip
BLOCKS = {name: "layers.1" if name == "mlp" else "blocks.1" for name in BACKBONES}
GUIDES = (
    "none", "cfg", "cfg in an interval", "cfg on two channels", "cfg, rescaled", "cfg and skip_layer", "cfg_pp",
    "cfg_zero_star", "cfg_zero_star of eps", "apg", "apg of the output", "autoguidance", "perturbed_attention",
    "skip_layer",
)  # fmt: skip
OF_CLASSES = {name for name in GUIDES if name.startswith(("cfg", "apg"))}

FACTORS: dict[str, tuple[str, ...]] = {
    "path": tuple(PATHS),
    "prediction": (*SPACES, "-velocity"),
    "times": tuple(TIMES),
    "loss": SPACES,
    "weighting": tuple(WEIGHTINGS),
    "t_eps": ("0", "0.05"),
    "grid": tuple(GRIDS),
    "solver": tuple(SOLVERS),
    "guide": GUIDES,
    "clock": tuple(names("clock")),
    "backbone": tuple(BACKBONES),
    "terms": ("mse", "hybrid", "direction"),
    "input": ("as it is", "scaled"),
}


# what means nothing, and why

TABLE = {name for name in PATHS if name.startswith("ddpm")}
NO_SIGNAL = {"linear", "linear of twice the noise", "gvp", "ddpm zero snr"}
"""alpha = 0 at t = 1."""
NEAR: dict[str, set[int]] = {
    "uniform": {0, 1}, "mode": {0, 1}, "cosmap": {0, 1}, "discrete": {1},
    "uniform inside": set(), "logit_normal": set(), "log_normal": set(),
}  # fmt: skip
"""The ends that a law comes so near that what is infinite there has an infinite mean."""


def unsigned(space: str) -> str:
    return space.removeprefix("-")


def infinite(space: str, path: str) -> set[int]:
    """The ends at which a number in this space is infinite: the score of data, and VP's velocity there."""
    return {0} if space == "score" or (unsigned(space) == "velocity" and path == "vp") else set()


def parallel(space: str, path: str) -> set[int]:
    """The ends at which x and an output say the same, so that nothing else follows from the two."""
    data = {0} if space in ("x0", "score") else set()
    return data | ({1} if space in ("eps", "score") and path in NO_SIGNAL else set()) | infinite(space, path)


def unreadable(have: str, want: str, path: str, t_eps: str) -> set[int]:
    """The ends at which an output in one space cannot be read in another."""
    if unsigned(have) == unsigned(want) or t_eps != "0":
        return set()
    ends = parallel(have, path) | infinite(want, path)
    return ends - {1} if {have, want} == {"eps", "score"} else ends  # one is the other over sigma


@functools.cache
def visited(grid: str, path: str) -> tuple[float, ...]:
    made = Sample(grid=GRIDS[grid]).grid
    return made(STEPS, PATHS[path], LENGTH)


def ends(c: Case) -> set[int]:
    """The ends of time at which the solver asks."""
    if c["path"] not in TABLE and c["grid"] in ("ddpm", "ddpm_integer", "leading", "trailing"):
        return set()
    times = visited(c["grid"], c["path"])
    return {1} & {int(times[0])} | ({0} if times[-1] == 0 and c["solver"] in ("rk4", "dopri5") else set())


@dataclass(frozen=True)
class Rule:
    """A reason to refuse: the factors it depends on, when it holds, and what is said."""

    of: tuple[str, ...]
    when: Callable[[Case], bool]
    says: str


def rule(of: str, says: str) -> Callable[[Callable[[Case], bool]], Callable[[Case], bool]]:
    def add(when: Callable[[Case], bool]) -> Callable[[Case], bool]:
        RULES.append(Rule(tuple(of.split()), when, says))
        return when

    return add


RULES: list[Rule] = []


@rule("path prediction", "has no rates")
def a_table_has_no_velocity(c: Case) -> bool:
    return c["path"] in TABLE and unsigned(c["prediction"]) == "velocity"


@rule("path loss", "has no rates")
def nor_a_loss_of_it(c: Case) -> bool:
    return c["path"] in TABLE and c["loss"] == "velocity"


@rule("path weighting", "has no rates")
def nor_a_weighting_by_it(c: Case) -> bool:
    return c["path"] in TABLE and c["weighting"] == "likelihood"


@rule("path solver", "has no rates")
def nor_a_solver_on_it(c: Case) -> bool:
    return c["path"] in TABLE and ("velocity" in SOLVERS[c["solver"]][1] or c["solver"] == "deis_2 in t")


@rule("path guide", "a DDPM path has none")
def nor_can_it_be_held_still(c: Case) -> bool:
    return c["path"] in TABLE and c["guide"] == "cfg_zero_star"


@rule("path times", "needs the time sampler discrete")
def a_table_is_trained_at_its_entries(c: Case) -> bool:
    return c["path"] in TABLE and c["times"] != "discrete"


@rule("path grid", "needs a DDPM path")
def a_grid_of_entries_needs_a_table(c: Case) -> bool:
    return c["path"] not in TABLE and c["grid"] in ("ddpm", "ddpm_integer", "leading", "trailing")


@rule("path grid", "has no entry at t")
def a_table_is_sampled_at_its_entries(c: Case) -> bool:
    return c["path"] in TABLE and any(abs(1000 * t - round(1000 * t)) > 1e-3 for t in visited(c["grid"], c["path"]))


@rule("path clock", "the clock 'index'")
def an_index_is_of_a_table(c: Case) -> bool:
    return c["path"] not in TABLE and c["clock"] == "index"


@rule("path clock grid solver", "the clock 'log_sigma/4' is infinite")
def the_noise_level_is_infinite_where_sampling_asks(c: Case) -> bool:
    return c["clock"] == "log_sigma/4" and bool(ends(c) & ({0, 1} if c["path"] in NO_SIGNAL else {0}))


@rule("path clock times", "the clock 'log_sigma/4' is infinite")
def the_noise_level_is_infinite_where_training_asks(c: Case) -> bool:
    return c["clock"] == "log_sigma/4" and c["path"] in NO_SIGNAL and c["times"] == "discrete"


@rule("weighting loss", "is defined on the error of")
def a_weighting_belongs_to_a_space(c: Case) -> bool:
    return c["loss"] != {"min_snr": "x0", "p2": "eps", "likelihood": "eps"}.get(c["weighting"], c["loss"])


@rule("path weighting times", "the weighting likelihood is infinite")
def likelihood_is_infinite_at_both_ends(c: Case) -> bool:
    """(gain from eps to velocity) / sigma: the first is infinite where alpha = 0."""
    return c["weighting"] == "likelihood" and bool(NEAR[c["times"]] & ({0, 1} if c["path"] in NO_SIGNAL else {0}))


@rule("path prediction loss times t_eps", "cannot be read as .* which the time sampler")
def the_loss_is_infinite(c: Case) -> bool:
    return bool(NEAR[c["times"]] & unreadable(c["prediction"], c["loss"], c["path"], c["t_eps"]))


@rule("path loss times t_eps", "is infinite at t = 0, which the time sampler")
def what_is_to_be_predicted_is_infinite(c: Case) -> bool:
    return c["t_eps"] == "0" and bool(NEAR[c["times"]] & infinite(c["loss"], c["path"]))


@rule("path terms", "'hybrid' needs a DDPM path")
def a_bound_is_of_a_table(c: Case) -> bool:
    return c["terms"] == "hybrid" and c["path"] not in TABLE


@rule("backbone terms", "'hybrid' needs a network that predicts it")
def a_bound_is_of_a_variance(c: Case) -> bool:
    return c["terms"] == "hybrid" and c["backbone"] != "dit adaln_zero"


@rule("path prediction times terms t_eps", "cannot be read as x0 at t = 1, which the time sampler")
def a_bound_reads_x0(c: Case) -> bool:
    return c["terms"] == "hybrid" and bool(NEAR[c["times"]] & unreadable(c["prediction"], "x0", c["path"], c["t_eps"]))


@rule("backbone solver", "set solver.variance to")
def a_learned_variance_is_of_a_network_that_has_one(c: Case) -> bool:
    return c["solver"] == "ddpm learned" and c["backbone"] != "dit adaln_zero"


@rule("guide solver", "set solver.variance to")
def who_holds_still_predicts_no_variance(c: Case) -> bool:
    return c["solver"] == "ddpm learned" and c["guide"] == "cfg_zero_star"


@rule("path prediction grid solver t_eps", "cannot be read as")
def what_the_solver_reads_is_singular(c: Case) -> bool:
    return any(ends(c) & unreadable(c["prediction"], want, c["path"], c["t_eps"]) for want in SOLVERS[c["solver"]][1])


@rule("path prediction grid solver guide t_eps", "cannot be read as")
def what_the_guide_reads_is_singular(c: Case) -> bool:
    want = {"apg": "x0", "cfg_zero_star": "velocity", "cfg_zero_star of eps": "eps"}.get(c["guide"], c["prediction"])
    return bool(ends(c) & unreadable(c["prediction"], want, c["path"], c["t_eps"]))


@rule("path grid solver", "the diffusion 'SBDM' is infinite")
def forgetting_all_signal_takes_an_infinite_diffusion(c: Case) -> bool:
    return c["solver"] == "sit_sde SBDM" and c["path"] in NO_SIGNAL and 1 in ends(c)


@rule("backbone guide", "this model is unconditional")
def without_classes_nothing_guides_by_them(c: Case) -> bool:
    return c["backbone"] == "mlp" and c["guide"] in OF_CLASSES


@rule("backbone guide", "cannot be the identity")
def without_attention_none_is_perturbed(c: Case) -> bool:
    return c["backbone"] == "mlp" and c["guide"] == "perturbed_attention"


def broken(case: Case) -> list[Rule]:
    """The rules that a case, or a part of one, breaks."""
    return [rule for rule in RULES if all(factor in case for factor in rule.of) and rule.when(case)]


# the design

Level = tuple[str, str]
LEVELS = [(factor, value) for factor, values in FACTORS.items() for value in values]


def pairs(case: Case) -> set[frozenset[Level]]:
    return set(map(frozenset, itertools.combinations(case.items(), 2)))


def completed(
    part: dict[str, str], wanted: Mapping[Level, set[Level]], chance: random.Random, but: Sequence[Rule] = ()
) -> dict[str, str] | None:
    """A case without a broken rule, `but` for these, that has this part, with many of the wanted pairs; None if there
    is none."""
    if not all(rule in but for rule in broken(part)):
        return None
    free = next((factor for factor in FACTORS if factor not in part), None)
    if free is None:
        return part
    known = set(part.items())
    values = {v: len(wanted.get((free, v), set()) & known) + chance.random() for v in FACTORS[free]}
    for value in sorted(values, key=values.__getitem__, reverse=True):
        found = completed({**part, free: value}, wanted, chance, but)
        if found is not None:
            return found
    return None


@functools.cache
def design() -> tuple[tuple[Case, ...], tuple[Case, ...]]:
    """Cases that are to run, which have every pair that such a case can have, and cases that are to be refused: the
    other pairs, and each rule alone up to three times."""
    chance, running, refused = random.Random(0), list[Case](), list[Case]()
    wanted = {level: {other for other in LEVELS if other[0] != level[0]} for level in LEVELS}
    for level in LEVELS:
        for other in sorted(wanted[level]):
            if other not in wanted[level]:
                continue
            tries = [completed(dict((level, other)), wanted, chance) for _ in range(3)]
            found = [case for case in tries if case is not None]
            if found:
                case = max(found, key=lambda case: sum(len(wanted[one] & {*case.items()}) for one in case.items()))
                running.append(case)
                for one in case.items():
                    wanted[one] -= {*case.items()}
            else:
                own = broken(dict((level, other)))
                few = (own, *([*own, rule] for rule in RULES))
                cases = (completed(dict((level, other)), {}, chance, but) for but in few)
                refused.append(next(case for case in cases if case is not None))
                wanted[level].remove(other)
                wanted[other].remove(level)
    for rule in RULES:
        parts = [dict(zip(rule.of, v, strict=True)) for v in itertools.product(*(FACTORS[f] for f in rule.of))]
        parts = [part for part in parts if rule.when(part)]
        cases = (completed(part, {}, chance, [rule]) for part in chance.sample(parts, len(parts)))
        refused.extend(itertools.islice((case for case in cases if case is not None), 3))
    return tuple(running), tuple(refused)


# the recipes


def recipe_of(case: Case, pictures: FilePath, weaker: Callable[[Case], str]) -> Recipe:
    """What a person would write."""
    vectors, block, guide = case["backbone"] == "mlp", BLOCKS[case["backbone"]], case["guide"]
    sample: dict[str, Any] = {
        "none": {},
        "cfg": {"guidance": 2.5},
        "cfg in an interval": {"guidance": 2.5, "interval": (0.2, 0.8)},
        "cfg on two channels": {"guidance": 2.5, "channels": 2},
        "cfg, rescaled": {"guidance": 2.5, "finish": Rescale()},
        "cfg and skip_layer": {"guides": (CFG(2.0), SkipLayer(2.0, (block,), fractions=(0.0, 0.5)))},
        "cfg_pp": {"guides": (CFGPP(0.6),)},
        "cfg_zero_star": {"guides": (CFGZeroStar(2.0),)},
        "cfg_zero_star of eps": {"guides": (CFGZeroStar(2.0, zero_init=0, space="eps"),)},
        "apg": {"guides": (APG(3.0, threshold=5.0),)},
        "apg of the output": {"guides": (APG(3.0, eta=0.5, momentum=0.3, space=None),)},
        "perturbed_attention": {"guides": (PerturbedAttention(2.0, (block,)),)},
        "skip_layer": {"guides": (SkipLayer(2.0, (block,)),)},
    }.get(guide) or ({"guides": (Autoguidance(2.0, weaker(case)),)} if guide == "autoguidance" else {})
    return Recipe(
        data=Spiral(3, samples=40) if vectors else Folder(str(pictures), resolution=8),
        codec=Vectors() if vectors else Pixels(),
        conditioner=Label(drop=0.3),
        model=BACKBONES[case["backbone"]],
        denoiser=Meaning(
            PATHS[case["path"]], case["prediction"], case["clock"], float(case["t_eps"]), case["input"] == "scaled"
        ),
        objective=Regression(
            case["loss"],
            TIMES[case["times"]],
            WEIGHTINGS[case["weighting"]],
            "hybrid" if case["terms"] == "hybrid" else None,
            0.5 if case["terms"] == "direction" else 0.0,
        ),
        train=Train(steps=2, batch=4, lr=1e-3, emas=(0.5,), sample_every=0, device="cpu"),
        sample=Sample(steps=STEPS, solver=SOLVERS[case["solver"]][0], grid=GRIDS[case["grid"]], batch=2, **sample),
    )


Outcome = Callable[[Case], str | None]


@pytest.fixture(scope="module")
def outcome(pictures: FilePath, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """What becomes of a case: the message of its refusal, or None if it trained and sampled."""
    opened: dict[bool, Dataset] = {}
    folder = tmp_path_factory.mktemp("weaker")

    def data(recipe: Recipe) -> Dataset:
        return opened.setdefault(isinstance(recipe.data, Spiral), recipe.data.open())

    def weaker(case: Case) -> str:
        """A run of another prediction on the same path, made when it is first asked for."""
        backbone = "mlp" if case["backbone"] == "mlp" else "dit adaln"
        out = folder / f"{case['path']}, {backbone}"
        if not out.exists():
            table = case["path"] in TABLE
            plain = {factor: values[0] for factor, values in FACTORS.items()} | {
                "path": case["path"], "prediction": "v", "loss": "v", "t_eps": "0.05", "backbone": backbone,
                "solver": "ddim", "grid": "ddpm" if table else "uniform", "times": "discrete" if table else "uniform",
                "clock": "t",
            }  # fmt: skip
            train(recipe_of(plain, pictures, weaker), out, quiet=True)
        return str(out)

    def become(case: Case) -> str | None:
        recipe = recipe_of(case, pictures, weaker)
        assert Recipe.from_json(recipe.to_json()) == recipe
        found = opened.get(isinstance(recipe.data, Spiral)) or data(recipe)
        try:
            trainer = Trainer(recipe.fitted(found), found)
        except DitkitError as error:
            return str(error)
        before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
        for step in range(2):
            terms, norm, _ = trainer.advance(trainer.read(step))
            assert all(torch.tensor([*terms.values(), norm]).isfinite())
        assert any(not torch.equal(value, before[name]) for name, value in trainer.model.state_dict().items())
        samples = trainer.pipeline().sample(count=3)
        assert samples.shape == (3, *found.shape)
        assert bool(samples.isfinite().all())
        return None

    return become


def judged(case: Case, outcome: Outcome) -> str | None:
    """What is wrong with what becomes of a case; None if nothing is."""
    rules = broken(case)
    try:
        said = outcome(case)
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
        return f"{dict(case)}\n    failed: {said}"
    if not rules:
        return None if said is None else f"{dict(case)}\n    is refused without a reason: {said}"
    reasons = ", ".join(rule.when.__name__ for rule in rules)
    if said is None:
        return f"{dict(case)}\n    is not refused: {reasons}"
    if "\n" in said or not any(re.search(rule.says, said) for rule in rules):
        return f"{dict(case)}\n    is refused with other words than {reasons}: {said}"
    return None


def wrong(cases: Sequence[Case], outcome: Outcome) -> list[str]:
    return [said for case in cases if (said := judged(case, outcome)) is not None]


def test_the_design_has_every_pair_of_values_and_every_reason() -> None:
    running, refused = design()
    expected = {frozenset((a, b)) for a, b in itertools.combinations(LEVELS, 2) if a[0] != b[0]}
    found = [set[frozenset[Level]]().union(*map(pairs, cases)) for cases in (running, refused)]
    assert found[0] | found[1] == expected
    assert not any(broken(case) for case in running)
    alone = {broken(case)[0].when.__name__ for case in refused if len(broken(case)) == 1}
    assert alone == {rule.when.__name__ for rule in RULES}


def test_the_design_has_every_registered_part() -> None:
    """What is new in one of these kinds belongs into the design; tokens have a path and a solver of their own."""

    def kinds(values: Any) -> set[str]:
        return {value if isinstance(value, str) else registered_as(value)[1] for value in values if value is not None}

    assert kinds(PATHS.values()) == {name for name in names("path") if hasattr(lookup("path", name), "prior_std")}
    assert kinds(TIMES.values()) == set(names("times"))
    assert kinds(WEIGHTINGS.values()) == set(names("weighting"))
    assert kinds(GRIDS.values()) == set(names("grid"))
    assert kinds(solver for solver, _ in SOLVERS.values()) == set(names("solver")) - {"jumps"}
    assert [name for name in names("guide") if name not in GUIDES] == []


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_share_of_the_combinations_runs_or_is_refused_for_a_reason(solver: str, outcome: Outcome) -> None:
    cases = [case for cases in design() for case in cases[::5] if case["solver"] == solver]
    assert cases
    assert not wrong(cases, outcome)


@pytest.mark.slow
@pytest.mark.parametrize("solver", SOLVERS)
def test_every_combination_runs_or_is_refused_for_a_reason(solver: str, outcome: Outcome) -> None:
    cases = [case for cases in design() for case in cases if case["solver"] == solver]
    assert not wrong(cases, outcome)


def flags(value: Any, name: str) -> list[str]:
    """The options that make a configuration of its kind this one."""
    if dataclasses.is_dataclass(value):
        words = ["--" + name, registered_as(value)[1]] if registered_as(value)[0] not in ("settings", "guide") else []
        fields = [(f.name, getattr(value, f.name)) for f in dataclasses.fields(value) if f.name != "null"]
        return words + [word for field, inner in fields for word in flags(inner, f"{name}.{field.replace('_', '-')}")]
    if name.endswith("guides"):
        found = [[registered_as(g)[1], *(f"{f.name}={said(getattr(g, f.name))}" for f in guided(g))] for g in value]
        return ["--" + name, *itertools.chain(*found)] if value else []
    if isinstance(value, bool):
        *path, last = name.split(".")
        return ["--" + ".".join([*path, last if value else f"no-{last}"])]
    return ["--" + name, *(map(str, value) if isinstance(value, tuple) else [str(value)])]


def guided(guide: Any) -> list[Any]:
    return [f for f in dataclasses.fields(guide) if f.name != "null"]


def said(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else "null" if value is None else str(value).lower()


def test_what_a_recipe_has_can_be_taken_away_on_the_command_line() -> None:
    """None where there may be nothing; a space is a word and no configuration; "-velocity" is no option."""
    full = replace(digits(), objective=Regression("x0", LogitNormal(), MinSNR()), sample=Sample(2, finish=Rescale()))
    words = ["--objective.weighting", "None", "--sample.finish", "None", "--denoiser.prediction", "-velocity"]
    found = override(full, words, "ditkit train digits")
    assert (found.objective.weighting, found.sample.finish, found.denoiser.prediction) == (None, None, "-velocity")
    assert override(full, ["--sample.finish.space", "x0"], "").sample.finish == Rescale(space="x0")
    for wrong, says in (
        (["--sample.solver", "None"], "unknown solver 'None'"),
        (["--objective.weighting", "min_rsn"], "did you mean min_snr"),
        (["--sample.finish.space", "x1"], "unknown space 'x1'"),
    ):
        with pytest.raises(DitkitError, match=says):
            override(full, wrong, "")


@pytest.mark.parametrize("number", range(0, 320, 16))
def test_a_combination_is_options_of_the_command_line(number: int, tmp_path: FilePath) -> None:
    recipe = recipe_of(design()[0][number], tmp_path, lambda case: "runs/weaker")
    words = [word for part in ("denoiser", "objective", "sample") for word in flags(getattr(recipe, part), part)]
    assert override(replace(digits(), model=recipe.model), words, "ditkit train digits") == replace(
        digits(), model=recipe.model, denoiser=recipe.denoiser, objective=recipe.objective, sample=recipe.sample
    )


def test_a_combination_is_trained_stored_and_loaded(pictures: FilePath, tmp_path: FilePath) -> None:
    """By the doors that a person uses, for two that few would think of."""
    chosen = [case for case in design()[0] if case["guide"] != "autoguidance" and case["backbone"] != "mlp"]
    for case in (next(c for c in chosen if c["path"] == path) for path in ("ddpm zero snr", "ve")):
        recipe = recipe_of(case, pictures, lambda case: "")
        assert train(recipe, tmp_path / case["path"], quiet=True)
        pipeline = load(tmp_path / case["path"], device="cpu")
        assert pipeline.recipe == recipe.fitted(recipe.data.open())
        assert pipeline.sample(count=3).shape == (3, 3, 8, 8)
