"""When a network copies: the two times of training of Bonnaire et al. 2025 (arXiv 2505.17638).

Good samples come at a time tau_gen that does not depend on the number n of training images, copies of them at a time
tau_mem that grows as n, and falls with the width W of the network: tau_mem ~ n / W. Between the two lies a window in
which to stop. One network here on more and more images, and wider ones on as many; what each of them draws is looked at
many times in its training.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

from ..data import Digits
from ..diffusion import AB2, LogitNormal, Meaning, Regression
from ..models import DiTConfig
from ..recipe import Evaluate, Monitor, Recipe, Sample, Train
from ..report import Line, Picture, Section, Table, Value, lines, number
from .copies import LEVELS, measure_copies
from .laws import PowerLaw, power_laws
from .random_features import Flow, Losses
from .study import Cell, Claim, Missing, Results, Study

__all__ = ["memorization"]

COUNTS = (256, 512, 1024)
"""Training images of the sweep over n."""
MIDDLE = 512
"""Training images of the sweep over W."""
WIDTHS = {"cpu": (60, 84, 120), "full": (128, 256, 512)}
BASE = {"cpu": 120, "full": 256}
"""The width of the sweep over n."""
STEPS = {256: 3072, 512: 6912, 1024: 16_896}
"""Of the preset cpu, at the width of the sweep over n: where a quarter of the samples are copies, and more."""
NARROW = 1.6
"""The length of the preset cpu goes as W to minus this, as the time to a tenth of copies was seen to."""
SNAPSHOTS = 96
SAMPLES = 1024
"""Of the preset cpu: those whose copies are counted at each look, the monitor's and the study's."""
LIVE = 2**0.25
"""An interval between two evaluations of the monitor."""
MODEL: dict[str, Any] = {"d": 32, "p": 1024, "t": 0.03, "ratios": (2, 4, 8, 16)}
"""The random-features model of the theory: psi_p = 32, and psi_n = n / d."""


def memorization(preset: str = "cpu") -> Study:
    """cpu: digits of 14 px in one token, at most 1M MACs. full: digits of 28 px in 49 tokens, for a GPU."""
    widths = WIDTHS[preset]
    make = _cpu if preset == "cpu" else _full
    cells = [Cell(_of_count(n), make(n, BASE[preset])) for n in COUNTS]
    cells += [Cell(_of_width(w), make(MIDDLE, w)) for w in widths if w != BASE[preset]]
    question = (
        "A network that is trained long enough draws its training images. Is the time at which this begins, tau_mem, "
        "proportional to the number n of images, while the time tau_gen at which samples are good does not depend on "
        "it, and does a wider network copy sooner? Then there is a window in which to stop, and more data widen it."
    )
    return Study("memorization", preset, question, tuple(cells), measure_copies, _present, _claims(), (0, 1))


def _of_count(n: int) -> str:
    return f"n{n}"


def _of_width(width: int) -> str:
    return f"w{width}"


def _train(steps: int, **settings: Any) -> Train:
    """A constant rate, so that a step is a step, and weights averaged over a share of the training that stays 5%.

    The monitor has half of the time: so short a training has none for so many samples in the usual 5%.
    """
    every = max(1, steps // SNAPSHOTS)
    return Train(
        steps=every * SNAPSHOTS,
        emas=(),
        ema_stds=(0.05,),
        snapshot_every=every,
        log_every=50,
        sample_every=0,
        checkpoint_every=every * SNAPSHOTS // 4,
        keep=1,
        monitor=Monitor(budget=0.5, samples=SAMPLES),
        **settings,
    )


def _cpu(n: int, width: int) -> Recipe:
    """Every cell is trained until well after its first copies."""
    return Recipe(
        data=Digits(resolution=14, count=n),
        model=DiTConfig(
            patch_size=14, hidden_size=width, depth=3, num_heads=width // 30, learn_sigma=False, num_classes=10
        ),
        denoiser=Meaning(prediction="x0", clock="1000t", t_eps=0.05),
        objective=Regression("velocity", LogitNormal(0.0, 1.0)),
        train=_train(round(STEPS[n] * (BASE["cpu"] / width) ** NARROW), batch=128, lr=1e-3, warmup=50),
        sample=Sample(steps=20, solver=AB2(), batch=256),
        evaluate=Evaluate(samples=SAMPLES, size=64),
    )


def _full(n: int, width: int) -> Recipe:
    return replace(
        _cpu(n, width),
        data=Digits(count=n),
        model=DiTConfig(
            patch_size=4, hidden_size=width, depth=6, num_heads=width // 64, learn_sigma=False, num_classes=10
        ),
        train=_train(100 * n * 256 // width, batch=256, lr=2e-4, warmup=500),
        sample=Sample(steps=50, solver=AB2(), batch=512),
        evaluate=Evaluate(samples=2048, size=96),
    )


def _fit(results: Results, name: str) -> tuple[PowerLaw, PowerLaw]:
    """The exponents of n and of W. Raises Missing where a run has no such time."""
    points = {}
    for cell in results.study.cells:
        values = results.values(cell.name, name)
        if len(values) < len(results.study.seeds):
            raise Missing(f"a run of {cell.name} did not come to {name}")
        points[float(cell.recipe.data.count), float(cell.recipe.model.hidden_size)] = values
    n, w = power_laws(points, fixed=True)
    return n, w


def _said(law: PowerLaw) -> str:
    return f"{number(law.exponent)}, {number(law.low)} to {number(law.high)}"


def _mem_grows(results: Results) -> tuple[str, bool]:
    n, _ = _fit(results, "tau_mem_2")
    return _said(n), 0.7 <= n.exponent <= 1.3


def _width_shrinks(results: Results) -> tuple[str, bool]:
    _, w = _fit(results, "tau_mem_2")
    return _said(w), w.high < 0


def _gen_stays(results: Results, name: str) -> tuple[str, bool]:
    times = {n: results.mean(_of_count(n), name) for n in COUNTS}
    ratio = max(times.values()) / min(times.values())
    return f"{number(ratio)} times: {', '.join(f'n = {n} {number(t)}' for n, t in times.items())}", ratio < 2


def _live_agrees(results: Results, names: tuple[str, str]) -> tuple[str, bool]:
    """Two steps of each run: what the monitor of the training saw, and what the dense look says."""
    found, ratios, within = results.found, [], 0
    for (cell, seed), finding in found.items():
        numbers = finding.numbers
        if not numbers.keys() >= set(names):
            raise Missing(f"{cell} with seed {seed} has no two steps to compare")
        live, seen = (numbers[name] for name in names)
        ratios.append(live / seen)
        within += seen / LIVE - 1 <= live <= seen * LIVE + 1  # steps are whole: the next look is at the step after
    said = f"{within} of {len(ratios)}, from {number(min(ratios))} to {number(max(ratios))} times"
    return said, within == len(ratios)


def _stopping(results: Results) -> tuple[str, bool]:
    early = [results.mean(cell.name, "lowest_f_mem") for cell in results.study.cells]
    late = [results.mean(cell.name, "last_f_mem") for cell in results.study.cells]
    said = f"at most {max(early):.1%} there, {min(late):.0%} to {max(late):.0%} at the end"
    return said, max(early) <= LEVELS[0] and min(late) >= LEVELS[-1]


def _theory_holds(results: Results) -> tuple[str, bool]:
    found = _solved_losses(**MODEL)
    times = [
        power_laws({(float(r),): [getattr(losses, what)()] for r, losses in found.items()})[0].exponent
        for what in ("memorizes", "generalises")
    ]
    return f"{number(times[0])} and {number(times[1])}", 0.7 <= times[0] <= 1.3 and abs(times[1]) <= 0.3


def _claims() -> tuple[Claim, ...]:
    gen = "tau_gen differs by less than 2 times from n = 256 to 1,024"
    near = "one of its evaluations, 2^(1/4) times"
    pairs = ("live_tau_mem_2", "tau_mem_2"), ("live_copies", "dense_copies")
    return (
        Claim("tau_mem, 2% copies, ~ n^a W^b: a is within 0.7 to 1.3 (theory: 1)", _mem_grows),
        Claim("b is below 0, with its whole interval (theory: -1)", _width_shrinks),
        Claim(f"{gen}, by the class that samples show", lambda results: _gen_stays(results, "tau_gen")),
        Claim(f"{gen}, by 90% of the fall of KID", lambda results: _gen_stays(results, "tau_gen_kid")),
        Claim(
            f"tau_mem, 2% copies, from the monitor of the training is within {near}, of that from the dense look",
            lambda results: _live_agrees(results, pairs[0]),
        ),
        Claim(
            f"the first copies by the monitor's rule are within {near}, of those of the dense look",
            lambda results: _live_agrees(results, pairs[1]),
        ),
        Claim("at the lowest held-out loss at most 2% are copies, at the end at least 25%, in every cell", _stopping),
        Claim("random features: tau_mem ~ n^a with a within 0.7 to 1.3, tau_gen within -0.3 to 0.3", _theory_holds),
    )


@functools.lru_cache(maxsize=1)
def _solved_losses(d: int, p: int, t: float, ratios: tuple[int, ...]) -> dict[int, Losses]:
    """Losses of the random-features model by psi_n."""
    times = [10 ** (k / 6) for k in range(43)]
    return {ratio: Flow(d, ratio * d, p, t, frequency=1.0).losses(times) for ratio in ratios}


def _curve(results: Results, cell: str, column: str) -> tuple[list[float], list[float]] | None:
    """Steps, and the mean over seeds of what was measured at each; None where nothing was."""
    found = [f.series for (name, _), f in results.found.items() if name == cell and column in f.series]
    found = [series for series in found if series["step"] == found[0]["step"]]
    if not found:
        return None
    columns = [series[column] for series in found]
    return list(found[0]["step"]), [sum(row) / len(row) for row in zip(*columns, strict=True)]


def _present(results: Results) -> tuple[Section, ...]:
    return (_times(results), _curves(results), _stops(results), _solved())


def _label(recipe: Recipe) -> str:
    return f"n = {recipe.data.count:,}, W = {recipe.model.hidden_size}"


def _times(results: Results) -> Section:
    names = {
        "gmacs": "GMACs",
        "tau_gen": "tau_gen, class",
        "tau_gen_kid": "tau_gen, KID",
        **{f"tau_mem_{round(100 * level)}": f"tau_mem, {level:.0%}" for level in LEVELS},
        "live_tau_mem_2": "tau_mem, 2%, live",
        "dense_copies": "copies, densely",
        "live_copies": "copies, live",
        "seconds": "seconds",
    }
    rows = tuple((_label(c.recipe), *(results.value(c.name, k) for k in names)) for c in results.study.cells)
    parts: list[Table | Picture | str] = [
        "Steps. tau_mem: where the share of copies among samples comes to 2%, 10% and 25%. tau_gen: where 80% as "
        "many of them as of held-out images are seen as the class asked for, and where 90% of the fall of KID is done. "
        "Live: from what the monitor of the training saw at its own steps, four in each doubling. "
        "The last two are where copies begin by the rule of the monitor, the lower end of the interval of f_mem above "
        "its floor by 1%: in the snapshots, and as the training's own monitor saw it.",
        Table(("", *names.values()), rows),
    ]
    laws = {}
    for level in LEVELS:
        try:
            laws[level] = _fit(results, f"tau_mem_{round(100 * level)}")
        except (Missing, ValueError) as error:
            parts.append(f"No fit at {level:.0%} copies: {error}.")
    if laws:
        head = ("tau_mem ~ n^a W^b at", "a", "interval of a", "b", "interval of b", "explained")
        rows = tuple(
            (
                f"{level:.0%} copies",
                Value(n.exponent, n.error),
                f"{number(n.low)} to {number(n.high)}",
                Value(w.exponent, w.error),
                f"{number(w.low)} to {number(w.high)}",
                f"{n.explained:.1%}",
            )
            for level, (n, w) in laws.items()
        )
        parts += [Table(head, rows), "Errors and intervals (95%) are the bootstrap's over seeds."]
    by_count = [cell for cell in results.study.cells if cell.name.startswith("n")]
    curves = []
    for name, label in (
        ("tau_mem_2", "tau_mem, 2% copies"),
        ("tau_gen", "tau_gen, class"),
        ("tau_gen_kid", "tau_gen, KID"),
    ):
        values = {c.recipe.data.count: results.value(c.name, name) for c in by_count}
        known = {n: v for n, v in values.items() if v.value}
        if known:
            heights = [v.value or 0.0 for v in known.values()]
            curves.append(Line(label, list(known), heights, [v.error or 0.0 for v in known.values()]))
    if LEVELS[0] in laws:
        n, w = laws[LEVELS[0]]
        width = by_count[0].recipe.model.hidden_size
        law = [n.factor * count**n.exponent * width**w.exponent for count in COUNTS]
        curves.append(Line(f"n^{n.exponent:.2f}", list(COUNTS), law, strong=False))
    if curves:
        plot = lines(curves, "training images n", "steps", log_x=True, log_y=True)
        parts.append(Picture("times.png", "tau_mem and tau_gen against n, log-log, with the fit", plot))
    return Section("The two times", tuple(parts))


def _curves(results: Results) -> Section:
    """f_mem, KID and losses against steps, f_mem against steps / n, too."""
    by_count = [cell for cell in results.study.cells if cell.name.startswith("n")]
    by_width = sorted(
        (c for c in results.study.cells if c.recipe.data.count == MIDDLE), key=lambda c: c.recipe.model.hidden_size
    )
    plots = (
        ("copies.png", by_count, "f_mem", "steps", lambda r: 1.0, "copies against steps, by n"),
        ("collapse.png", by_count, "f_mem", "steps / n", lambda r: 1 / r.data.count, "copies against steps / n"),
        ("widths.png", by_width, "f_mem", "steps", lambda r: 1.0, "copies against steps, by width"),
        ("accuracy.png", by_count, "accuracy", "steps", lambda r: 1.0, "samples seen as their class against steps"),
        ("kid.png", by_count, "kid", "steps", lambda r: 1.0, "KID to held-out images against steps"),
        ("loss.png", by_count, "heldout_loss", "steps", lambda r: 1.0, "held-out loss against steps"),
    )
    names = {
        "f_mem": "share of copies",
        "kid": "KID",
        "heldout_loss": "held-out loss",
        "accuracy": "seen as their class",
    }
    parts: list[Picture | str] = ["Means over the seeds."]
    for file, cells, column, x, scale, alt in plots:
        curves = []
        for cell in cells:
            found = _curve(results, cell.name, column)
            if found is not None:
                steps = [step * scale(cell.recipe) for step in found[0]]
                curves.append(Line(_label(cell.recipe), steps, found[1]))
        if curves:
            plot = lines(curves, x, names[column], log_x=True, log_y=column in ("kid", "heldout_loss"))
            parts.append(Picture(file, alt, plot))
    return Section("In the course of training", tuple(parts))


def _stops(results: Results) -> Section:
    said = (
        "What there is at three steps: the lowest held-out loss; the best KID before the first copies; "
        "and the last step. KID to held-out images does not see copies: a "
        "copy is a good image."
    )
    head = [
        "",
        *(f"{name}: {what}" for name in ("lowest loss", "before copies", "last") for what in ("step", "KID", "f_mem")),
    ]
    rows = tuple(
        (
            _label(cell.recipe),
            *(
                results.value(cell.name, f"{name}_{what}")
                for name in ("lowest", "window", "last")
                for what in ("step", "kid", "f_mem")
            ),
        )
        for cell in results.study.cells
    )
    return Section("Stopping early", (said, Table(tuple(head), rows)))


def _solved() -> Section:
    found = _solved_losses(**MODEL)
    d, delta = MODEL["d"], Flow(1, 1, 1, MODEL["t"]).delta
    curves = [
        Line(f"{what}, n = {ratio} d", [t / ratio for t in losses.times], getattr(losses, what))
        for what in ("test", "train")
        for ratio, losses in found.items()
    ]
    rows = tuple(
        (f"{ratio}", Value(losses.generalises()), Value(losses.memorizes()), Value(losses.memorizes() / ratio))
        for ratio, losses in found.items()
    )
    said = (
        f"A score of {MODEL['p']:,} random features in {d} dimensions, for one time t = {MODEL['t']:g}, trained "
        "by gradient flow, whose losses are known in closed form (studies/random_features.py). tau_gen: 90% of the "
        "fall of the test loss; tau_mem: a tenth of the gap between test and training loss that there is in the end. "
        f"The score of the population has a test loss of {number(1 - delta)}."
    )
    plot = lines(curves, "time / psi_n", "loss", log_x=True, log_y=True)
    picture = Picture("theory.png", "test and training loss of random features against time / psi_n", plot)
    return Section(
        "The same where it can be solved",
        (said, Table(("psi_n", "tau_gen", "tau_mem", "tau_mem / psi_n"), rows), picture),
    )
