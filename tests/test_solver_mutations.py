"""Each coefficient of each solver, changed by 1%, must be caught by a check of test_solver_formulas.py.

A mutant is the module's source with one expression multiplied by 1.01: a number, a product or quotient, or a term of a
sum. Its function is compiled and put in the place of the original, so that everything that uses it is altered.
"""

from __future__ import annotations

import ast
import copy
import inspect
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest

from ditkit.diffusion.solvers import adaptive, exponential, multistep, one_step, stochastic, unipc

from .test_solver_formulas import CHECKS

MODULES = (one_step, multistep, exponential, unipc, stochastic, adaptive)

# Functions that serve several solvers.
EXPONENTIAL = ("DPMpp2M", "DPMpp3M", "DEIS2", "DEIS3", "UniPC2", "UniPC3", "DPMpp2MSDE")
SERVES = {
    "polynomial": ("AB2", *EXPONENTIAL),
    "Memory": EXPONENTIAL,
    "moment": EXPONENTIAL,
    "usable": EXPONENTIAL,
    "middle": EXPONENTIAL,
    "Point": (*EXPONENTIAL, "EDMStochasticHeun"),
    "_DEIS": ("DEIS2", "DEIS3"),
    "_moment_in_time": ("DEIS2", "DEIS3"),
    "_UniPC": ("UniPC2", "UniPC3"),
    "_weights": ("UniPC2", "UniPC3"),
    "Rademacher": ("log_likelihood",),
    "LogLikelihood": ("log_likelihood",),
}

FINITE = "only whether the length of the step is finite is asked"
RETAIN = "a graph that is kept without need is only memory"
EQUIVALENT = {
    ("moment", "if abs(h) < 1.01:"): "both ways of computing agree there",
    ("Point.of", "alpha, sigma = (c if c > SMALLEST else 0 * c * 1.01 for c in path(t))"): "zero times anything",
    (
        "_UniPC.step",
        "order = len(memory.values) if math.isfinite(there.half_log_snr - here.half_log_snr * 1.01) else 1",
    ): (FINITE),
    (
        "_UniPC.step",
        "order = len(memory.values) if math.isfinite(there.half_log_snr * 1.01 - here.half_log_snr) else 1",
    ): (FINITE),
    ("log_likelihood", "product, = torch.autograd.grad(velocity, x, v, retain_graph=i + 1.01 < probes)"): RETAIN,
    ("log_likelihood", "product, = torch.autograd.grad(velocity, x, v, retain_graph=i * 1.01 + 1 < probes)"): RETAIN,
}
"""(function, changed line) of mutants that are the same method, and why."""


@dataclass(frozen=True)
class Mutant:
    """A function with one expression multiplied by 1.01."""

    function: str
    line: str
    code: types.CodeType
    target: Any

    @contextmanager
    def applied(self) -> Iterator[None]:
        original = self.target.__code__
        self.target.__code__ = self.code
        try:
            yield
        finally:
            self.target.__code__ = original


class Sites(ast.NodeVisitor):
    """The expressions of a function that stand for a coefficient."""

    def __init__(self) -> None:
        self.found: list[ast.expr] = []

    def visit_Constant(self, node: ast.Constant) -> None:
        if isinstance(node.value, int | float) and not isinstance(node.value, bool) and node.value != 0:
            self.found.append(node)

    def visit_BinOp(self, node: ast.BinOp) -> None:
        if isinstance(node.op, ast.Mult | ast.Div):
            self.found.append(node)
        elif isinstance(node.op, ast.Add | ast.Sub):
            for side in (node.left, node.right):
                if not isinstance(side, ast.Constant | ast.BinOp):  # those are sites themselves
                    self.found.append(side)
        self.generic_visit(node)

    def visit_Subscript(self, node: ast.Subscript) -> None:
        self.visit(node.value)  # an index is no coefficient

    def visit_JoinedStr(self, node: ast.JoinedStr) -> None:
        pass  # a message is none

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        if node.value is not None:
            self.visit(node.value)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        for statement in node.body:  # neither annotations nor defaults
            self.visit(statement)


class Scale(ast.NodeTransformer):
    """Multiplies one node by 1.01."""

    def __init__(self, target: ast.expr):
        self.target = target

    def visit(self, node: ast.AST) -> Any:
        if node is not self.target:
            return self.generic_visit(node)
        if isinstance(node, ast.Constant) and isinstance(node.value, int | float):
            return ast.Constant(node.value * 1.01)
        return ast.BinOp(self.target, ast.Mult(), ast.Constant(1.01))


def functions(module: types.ModuleType) -> Iterator[tuple[str, ast.FunctionDef, types.FunctionType]]:
    """Qualified name, source and object of every function and method of a module; a check of settings has no
    coefficients."""
    for node in ast.parse(inspect.getsource(module)).body:
        members = node.body if isinstance(node, ast.ClassDef) else [node]
        scope = vars(getattr(module, node.name)) if isinstance(node, ast.ClassDef) else vars(module)
        for member in members:
            if isinstance(member, ast.FunctionDef) and member.name != "__post_init__":
                value = scope[member.name]
                value = getattr(value, "fget", None) or getattr(value, "__func__", value)
                prefix = f"{node.name}." if isinstance(node, ast.ClassDef) else ""
                yield prefix + member.name, member, value


def sites(function: ast.FunctionDef) -> list[ast.expr]:
    visitor = Sites()
    visitor.visit(function)
    return visitor.found


def mutants(module: types.ModuleType) -> Iterator[Mutant]:
    """All of a module."""
    for name, function, target in functions(module):
        for number in range(len(sites(function))):
            changed = copy.deepcopy(function)
            site = sites(changed)[number]
            holders = [s for s in ast.walk(changed) if isinstance(s, ast.stmt) and any(n is site for n in ast.walk(s))]
            Scale(site).visit(changed)
            line = ast.unparse(holders[-1]).splitlines()[0]  # walked breadth first: the last one is the innermost
            changed.decorator_list = []
            compiled = compile(ast.fix_missing_locations(ast.Module([changed], [])), "mutant", "exec")
            code = next(c for c in compiled.co_consts if isinstance(c, types.CodeType) and c.co_name == function.name)
            yield Mutant(name, line, code, target)


def survives(mutant: Mutant, last: dict[str, Callable[[], None]]) -> bool:
    """Whether all checks pass with it. The check that caught the last mutant of a function is tried first."""
    owner = mutant.function.partition(".")[0]
    checks = list(dict.fromkeys(check for solver in SERVES.get(owner, (owner,)) for check in CHECKS[solver]))
    if owner in last:
        checks.insert(0, last[owner])
    for check in checks:
        try:
            with mutant.applied():
                check()
        except Exception:
            last[owner] = check
            return False
    return True


@pytest.mark.parametrize("module", MODULES, ids=lambda m: m.__name__.rpartition(".")[2])
def test_every_changed_coefficient_is_caught(module: types.ModuleType) -> None:
    name = module.__name__.rpartition(".")[2]
    last: dict[str, Callable[[], None]] = {}
    found = list(mutants(module))
    assert len(found) > 5
    alive = {(m.function, m.line) for m in found if survives(m, last)}
    listed = {key for key in EQUIVALENT if key[0] in {m.function for m in found}}
    assert alive - listed == set(), f"{name}: coefficients that no check knows"
    assert listed - alive == set(), f"{name}: listed as equivalent, and caught"


def test_the_checks_pass_on_what_is_not_changed() -> None:
    """And a mutant that was applied is gone."""
    before = one_step.Euler.step.__code__
    mutant = next(m for m in mutants(one_step) if m.function == "Euler.step")
    with mutant.applied():
        assert one_step.Euler.step.__code__ is not before
    assert one_step.Euler.step.__code__ is before
    for check in dict.fromkeys(check for checks in CHECKS.values() for check in checks):
        check()
