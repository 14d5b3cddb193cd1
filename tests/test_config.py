"""Configurations: JSON and back, and the errors of a person who edits a JSON file."""

from __future__ import annotations

import dataclasses
import json
import re
import types
from dataclasses import dataclass
from typing import Any, Union, get_args, get_origin, get_type_hints

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import ditkit.recipe  # registers everything
from ditkit import config as configuration
from ditkit.codecs import Pca
from ditkit.config import DitkitError, from_json, lookup, names, near, register, register_name, said, to_json
from ditkit.diffusion import DDPM, Heun, Linear, Meaning
from ditkit.models import DiTConfig, JiTConfig
from ditkit.recipe import Gate, Recipe, Sample

REGISTERED = {
    f"{kind}/{name}": entry
    for kind, entries in configuration._entries.items()
    for name, entry in entries.items()
    if isinstance(entry, type) and dataclasses.is_dataclass(entry)
}
REQUIRED = {str: "at_least", int: 3, float: 1.5, bool: True, Any: Linear(), tuple[int, ...]: (3, 8, 8)}


def example(cls: type) -> Any:
    """The defaults, and something of the right type where there is none."""
    hints = get_type_hints(cls)
    missing = dataclasses.MISSING
    return cls(
        **{f.name: REQUIRED[hints[f.name]] for f in said(cls) if f.default is missing and f.default_factory is missing}
    )


def values(hint: Any) -> st.SearchStrategy[Any]:
    """Values of a field's type."""
    if hint is Any:
        return st.sampled_from([example(cls) for cls in REGISTERED.values()])
    if get_origin(hint) in (Union, types.UnionType):
        return st.one_of(*(values(h) for h in get_args(hint)))
    if get_origin(hint) is tuple:
        kinds = get_args(hint)
        if kinds[-1] is Ellipsis:
            return st.lists(values(kinds[0]), max_size=3).map(tuple)
        return st.tuples(*(values(k) for k in kinds))
    if hint in REGISTERED.values():
        return st.just(example(hint))
    plain = {
        int: st.integers(),
        float: st.floats(allow_nan=False, allow_infinity=False),
        str: st.text(max_size=8),
        bool: st.booleans(),
        type(None): st.none(),
    }
    return plain[hint]


def through_text(value: Any) -> Any:
    return from_json(json.loads(json.dumps(to_json(value))))


def test_the_registry_is_full() -> None:
    wanted = {"model/dit", "model/jit", "path/linear", "solver/heun", "objective/regression", "recipe/recipe"}
    assert wanted <= set(REGISTERED)


@pytest.mark.parametrize("name", sorted(REGISTERED))
def test_every_registered_configuration_survives_json(name: str) -> None:
    value = example(REGISTERED[name])
    back = through_text(value)
    assert back == value
    assert type(back) is type(value)
    assert to_json(back) == to_json(value)
    assert to_json(value)["type"] == name


@given(st.data())
@settings(deadline=None, max_examples=300)
def test_any_value_of_any_field_survives_json(data: st.DataObject) -> None:
    cls = REGISTERED[data.draw(st.sampled_from(sorted(REGISTERED)))]
    fields = said(cls)
    assume(fields)
    field = data.draw(st.sampled_from(fields))
    value = data.draw(values(get_type_hints(cls)[field.name]))
    try:
        changed = dataclasses.replace(example(cls), **{field.name: value})
    except (DitkitError, ValueError):
        assume(False)  # refused by the configuration itself, which is no matter of JSON
        raise
    back = through_text(changed)
    assert back == changed
    assert type(getattr(back, field.name)) is type(value)


def test_a_recipe_survives_as_text() -> None:
    recipe = Recipe(model=DiTConfig(input_size=(8, 12)), denoiser=Meaning(DDPM(7), "eps", "index"), seed=2**70)
    assert Recipe.from_json(recipe.to_json()) == recipe


def test_lists_become_tuples_at_every_depth() -> None:
    size = from_json({"type": "model/dit", "input_size": [8, 12]}).input_size
    assert size == (8, 12)
    assert type(size) is tuple
    assert from_json([[1, [2]], 3]) == ((1, (2,)), 3)


def test_absent_fields_take_their_defaults() -> None:
    assert from_json({"type": "model/jit", "depth": 2}) == JiTConfig(depth=2)


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ({"type": "model/dti"}, "unknown model 'dti'.*did you mean dit"),
        ({"type": "modle/dit"}, "unknown kind 'modle'.*did you mean.*model"),
        ({"type": "model/dit", "dept": 3}, "no field 'dept'.*did you mean depth"),
        ({"type": "model/dit", "zzz": 3}, "no field 'zzz'.*known: conditioning, depth, frequency_shift, hidden_size"),
        ({"depth": 3}, 'without "type"'),
        ({"type": "dit"}, 'without "type"'),
        ({"type": ["model/dit"]}, "unknown"),
        ({"type": 5}, 'without "type"'),
        ({"type": "model/"}, 'without "type"'),
        # registered, but not configurations
        ({"type": "clock/t"}, "clock/t"),
        ({"type": "space/x0"}, "space/x0"),
        ({"type": "size/dit_s_2"}, "size/dit_s_2"),
        # no import paths
        ({"type": "ditkit.models.dit.DiTConfig"}, 'without "type"'),
        ({"type": "os/system"}, "unknown kind 'os'"),
        ({"type": "builtins/eval"}, "unknown kind 'builtins'"),
        # missing
        ({"type": "settings/gate"}, "settings/gate.*metric"),
    ],
)
def test_a_wrong_name_is_an_error_that_helps(value: Any, says: str) -> None:
    with pytest.raises(DitkitError, match=says):
        from_json(value)


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        ("model/dit", "depth", "3"),
        ("model/dit", "depth", 3.0),
        ("model/dit", "depth", True),
        ("model/dit", "depth", None),
        ("model/dit", "depth", [3]),
        ("model/dit", "depth", {"type": "path/linear"}),
        ("model/dit", "mlp_ratio", "4"),
        ("model/dit", "mlp_ratio", False),
        ("model/dit", "learn_sigma", 1),
        ("model/dit", "input_size", "32"),
        ("model/dit", "input_size", 32.5),
        ("model/dit", "input_size", [8, "12"]),
        ("model/dit", "input_size", [8, 12, 3]),
        ("denoiser/denoiser", "prediction", 3),
        ("settings/sample", "channels", "3"),
        ("settings/sample", "channels", 1.5),
        ("settings/sample", "ema", "0.99"),
        ("settings/sample", "interval", [0.1]),
        ("settings/sample", "interval", 0.5),
        ("settings/train", "emas", 0.99),
        ("settings/train", "emas", ["0.99"]),
        ("settings/train", "betas", [0.9, True]),
        ("settings/evaluate", "gates", [3]),
        ("settings/gate", "times", 2),
        ("conditioner/label", "classes", ["a", 3]),
        ("conditioner/label", "classes", "cat"),
        ("recipe/recipe", "train", {"type": "settings/sample"}),
        ("recipe/recipe", "train", "fast"),
    ],
)
def test_a_value_of_the_wrong_type_is_refused_by_name(name: str, field: str, value: Any) -> None:
    known = to_json(example(REGISTERED[name]))
    with pytest.raises(DitkitError, match=re.escape(f"here.json: {name}.{field} must be ")):
        from_json({**known, field: value}, "here.json")


def test_near_names_are_those_about_as_near_as_the_nearest() -> None:
    assert near("digts", ["digits", "demo", "dit_s_8", "dit_s_4"]) == "did you mean digits?"
    assert near("dit_s2", ["digits", "dit_s_2", "dit_s_4"]) == "did you mean dit_s_2 or dit_s_4?"
    assert near("zzz", ["digits", "demo"]) == "known: demo, digits"


def test_a_configuration_of_another_kind_is_refused_by_name() -> None:
    known = to_json(example(REGISTERED["recipe/recipe"]))
    with pytest.raises(DitkitError, match=r"here.json: recipe/recipe: denoiser cannot be a path"):
        from_json({**known, "denoiser": {"type": "path/linear"}}, "here.json")


def test_whole_numbers_are_accepted_for_floats() -> None:
    assert from_json({"type": "path/linear", "noise_scale": 2}) == Linear(2.0)


def test_the_error_names_the_file_even_inside_a_nested_value() -> None:
    recipe = to_json(Recipe())
    recipe["model"]["detph"] = 3
    with pytest.raises(DitkitError, match=r"runs/a/recipe\.json: model/jit has no field 'detph'"):
        from_json(recipe, "runs/a/recipe.json")


def test_text_that_is_not_a_recipe_is_refused() -> None:
    with pytest.raises(DitkitError, match="is not JSON"):
        Recipe.from_json("{")
    for text in ("3", "[]", "null", json.dumps(to_json(Linear()))):
        with pytest.raises(DitkitError, match="does not hold a recipe"):
            Recipe.from_json(text)


def test_a_class_that_can_change_is_refused() -> None:
    @dataclass
    class Loose:
        depth: int = 1

    class Plain:
        pass

    for cls in (Loose, Plain):
        with pytest.raises(TypeError, match="must be a frozen dataclass"):
            register("model", "loose")(cls)
    assert "loose" not in names("model")


def test_a_name_is_registered_once() -> None:
    @dataclass(frozen=True)
    class Other:
        depth: int = 1

    with pytest.raises(ValueError, match="model/dit is registered twice"):
        register("model", "dit")(Other)
    with pytest.raises(ValueError, match="grid/uniform is registered twice"):
        register_name("grid", "uniform", None)
    assert lookup("model", "dit") is DiTConfig


def test_a_subclass_is_not_saved_under_the_name_of_its_parent() -> None:
    @dataclass(frozen=True)
    class Wider(DiTConfig):
        extra_width: int = 7

    with pytest.raises(TypeError, match="Wider is not registered"):
        to_json(Wider())


@pytest.mark.parametrize("value", [[1, 2], {"a": 1}, {1}, 1j, b"x", object(), DiTConfig, lambda: 1])
def test_what_json_cannot_give_back_is_not_saved(value: Any) -> None:
    with pytest.raises(TypeError):
        to_json((value,))


def test_configurations_cannot_be_changed_and_have_a_hash() -> None:
    for cls in REGISTERED.values():
        value = example(cls)
        assert hash(value) == hash(example(cls))
        for field in dataclasses.fields(cls):
            with pytest.raises(dataclasses.FrozenInstanceError):
                setattr(value, field.name, getattr(value, field.name))


def test_what_was_learned_is_no_part_of_what_a_configuration_says() -> None:
    fresh = Pca(channels=2)
    taught = dataclasses.replace(fresh, basis={"mean": torch.zeros(1, 4, 4)})
    assert taught == fresh
    assert hash(taught) == hash(fresh)
    assert to_json(taught) == to_json(fresh)
    assert "basis" not in to_json(taught)
    assert "basis" not in repr(taught)
    assert [f.name for f in said(Pca)] == ["factor", "channels", "samples"]
    assert dataclasses.replace(taught, samples=9).basis is taught.basis
    with pytest.raises(DitkitError, match="codec/pca has no field 'basis'"):
        from_json({**to_json(fresh), "basis": None})


def test_near_names() -> None:
    assert near("heun", ["heun2", "euler"]) == "did you mean heun2?"
    assert near("zzz", ["b", "a"]) == "known: a, b"
    assert near("zzz", [f"name{i:02}" for i in range(20)]).endswith("name11, ...")


def test_a_gate_says_and_keeps_its_bound() -> None:
    gate = Gate("kid", "at_most", 0.5, times="base", plus="floor")
    assert str(gate) == "kid <= 0.5 x base + floor"
    numbers = {"base": 4.0, "floor": 1.0}
    assert gate.limit(numbers) == 3.0
    assert gate.holds({**numbers, "kid": 3.0})
    assert not gate.holds({**numbers, "kid": 3.01})
    assert not gate.holds({**numbers, "kid": float("nan")})
    assert not Gate("kid", "at_least", 0.5).holds({"kid": float("nan")})


def test_settings_refuse_what_cannot_work() -> None:
    with pytest.raises(DitkitError, match=r"unknown grid 'unifrom'.*uniform"):
        Sample(grid="unifrom")
    with pytest.raises(DitkitError, match="batch must be at least 1"):
        Sample(batch=0)
    assert Sample(solver=Heun()).solver == Heun()
    assert ditkit.recipe.Train().batch == 64
