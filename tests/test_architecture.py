"""The house's own rules, where import-linter does not see them."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import ditkit
from ditkit.cli import COMMANDS
from ditkit.recipes import FAMILIES

SOURCE = Path(ditkit.__file__).parent
FILES = sorted(SOURCE.rglob("*.py"))
HEAVY = ("torch", "numpy", "PIL", "safetensors", "matplotlib", "tyro")

# functions that draw from a global generator unless they are given one
DRAWING = {
    "rand", "randn", "randint", "randperm", "normal", "bernoulli", "multinomial", "poisson", "rand_like", "randn_like",
    "randint_like", "normal_", "uniform_", "bernoulli_", "exponential_", "random_", "cauchy_", "log_normal_",
    "geometric_", "trunc_normal_", "xavier_uniform_", "xavier_normal_", "kaiming_uniform_", "kaiming_normal_",
    "orthogonal_", "sparse_",
}  # fmt: skip
SEEDING = {
    "manual_seed",
    "manual_seed_all",
    "seed_all",
    "set_rng_state",
    "set_state",
    "fork_rng",
    "default_rng",
    "seed",
}


def loaded_after(code: str) -> set[str]:
    """The heavy modules that a fresh Python has imported after running some code."""
    report = f"import sys; print('loaded:', *(m for m in {HEAVY!r} if m in sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\n{report}"], capture_output=True, text=True, check=True, timeout=60
    )
    return set(done.stdout.rsplit("loaded:", 1)[1].split())


def test_importing_ditkit_imports_nothing_heavy() -> None:
    assert loaded_after("import ditkit; ditkit.__version__") == set()


@pytest.mark.parametrize("words", [[], *([command] for command in COMMANDS)], ids=lambda words: " ".join(words) or "-")
def test_help_imports_nothing_heavy(words: list[str]) -> None:
    code = f"""
from ditkit.cli import main
try:
    main({[*words, "--help"]!r})
except SystemExit as end:
    assert end.code == 0
"""
    assert loaded_after(code) == set()


def test_names_are_imported_on_first_use() -> None:
    assert "torch" in loaded_after("import ditkit; ditkit.list_models")
    assert set(ditkit.__all__) <= {*dir(ditkit), "create_model", "list_models", "load"}
    for name in ditkit.__all__:
        assert getattr(ditkit, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'creat_model'"):
        _ = ditkit.creat_model


def test_building_on_meta_leaves_the_compiler_alone() -> None:
    """torch imports it, for a second, to find that a random number on meta is none."""
    code = f"""
import sys, torch
from ditkit.recipes import FAMILIES, find_recipe
with torch.device("meta"):
    for name in {[*FAMILIES, "digits", "captions"]!r}:
        find_recipe(name).model.build()
        assert "torch._dynamo" not in sys.modules, name
"""
    assert "torch" in loaded_after(code)


@pytest.mark.parametrize("path", sorted((SOURCE / "models").glob("*.py")), ids=lambda p: p.name)
def test_a_model_file_is_short(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 400


ALLOWED = {
    ("hub.py", "torch.random.fork_rng"): "a library draws weights before it reads them: the generator stays as it was",
    ("evaluation/protocols.py", "np.random.RandomState"): "a private generator: torch-fidelity's own shuffle",
    ("evaluation/protocols.py", "np.random.RandomState(2020).permutation"): "the shuffle",
}
"""Calls that look as if they used a global generator, and why they do not."""


def calls(path: Path) -> Iterator[tuple[str, ast.Call]]:
    """Every call with the dotted name of what is called."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def arguments(call: ast.Call) -> set[str]:
    return {keyword.arg for keyword in call.keywords if keyword.arg}


def offences(path: Path) -> list[str]:
    """Calls that load pickles, or that use or seed a global generator."""
    name, found = path.relative_to(SOURCE).as_posix(), []
    seeds = name == "training/loop.py"
    for function, call in calls(path):
        if (name, function) in ALLOWED:
            continue
        where, last = f"{name}:{call.lineno} {function}", function.rpartition(".")[2]
        weights_only = [k.value for k in call.keywords if k.arg == "weights_only"]
        if function == "torch.load" and not any(isinstance(v, ast.Constant) and v.value is True for v in weights_only):
            found.append(f"{where}: without weights_only=True")
        if re.match(r"(pickle|dill|joblib|marshal|shelve)\.", function) or function in ("eval", "exec"):
            found.append(f"{where}: runs foreign code")
        if last in DRAWING and "generator" not in arguments(call):
            found.append(f"{where}: draws from the global generator")
        if re.match(r"(np|numpy)\.random\.|random\.", function):
            found.append(f"{where}: draws from a global generator")
        private = function.endswith("Generator().manual_seed") or re.search(
            r"Generator\([^()]*\)\.manual_seed$", function
        )
        if last in SEEDING and not private and not seeds:
            found.append(f"{where}: seeds a global generator")
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.relative_to(SOURCE).as_posix())
def test_a_file_loads_no_pickle_and_uses_no_global_generator(path: Path) -> None:
    assert offences(path) == []


@pytest.mark.parametrize(
    ("line", "bad"),
    [
        ("torch.load(p)", True),
        ("torch.load(p, weights_only=False)", True),
        ("torch.load(p, weights_only=True)", False),
        ("torch.randn(3)", True),
        ("torch.randn(3, generator=g)", False),
        ("x.normal_()", True),
        ("torch.manual_seed(0)", True),
        ("torch.Generator().manual_seed(0)", False),
        ("torch.Generator(device).manual_seed(0)", False),
        ("np.random.default_rng(0)", True),
        ("random.shuffle(x)", True),
        ("torch.random.fork_rng()", True),
        ("np.random.RandomState(0).permutation(3)", True),
        ("pickle.load(f)", True),
    ],
)
def test_the_rules_themselves_see_what_they_should(
    line: str, bad: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules[__name__], "SOURCE", tmp_path)
    (tmp_path / "file.py").write_text(line)
    assert bool(offences(tmp_path / "file.py")) == bad


def test_no_class_or_function_without_a_name_in_all_is_imported_by_its_package() -> None:
    """What a module does not list is private to it: no other module imports it, apart from names with a reason."""
    lists: dict[str, set[str]] = {}
    for path in FILES:
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
                lists[path.relative_to(SOURCE.parent).with_suffix("").as_posix()] = set(ast.literal_eval(node.value))
    hidden = []
    for path in FILES:
        here = path.relative_to(SOURCE.parent).parent.parts
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level and node.module:
                target = "/".join((*here[: len(here) - node.level + 1], *node.module.split(".")))
                for alias in node.names:
                    if alias.name.startswith("_") and not alias.name.startswith("__"):
                        hidden.append(f"{path.name}: {target}.{alias.name}")
    assert lists
    assert hidden == []
