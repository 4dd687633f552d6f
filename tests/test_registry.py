from dataclasses import dataclass, field
from typing import Any, Literal

import pytest

from fmdistill.registry import UserError, bind, convert, resolve, typed


@dataclass(frozen=True)
class Inner:
    size: int = 1


@dataclass(frozen=True)
class Weigh:
    temperature: float
    padding: Literal["include", "exclude"] = "include"
    sizes: list[int] = field(default_factory=list)
    inner: Inner = Inner()
    label: str = ""


def loss(scale: float, students: int, **options: Any) -> tuple:
    return scale, students, options


TABLE = {"weigh": Weigh, "loss": loss}


def test_bind_converts_the_arguments():
    weigh = bind({"name": "weigh", "temperature": 1, "sizes": "[1, 2]", "inner": {"size": "3"}}, TABLE, "w")()
    assert weigh == Weigh(1.0, "include", [1, 2], Inner(3)) and isinstance(weigh.temperature, float)


def test_only_the_caller_may_supply_the_context():
    assert bind({"name": "loss", "scale": "0.5"}, TABLE, "o.mse", context=("students",))(students=2)[:2] == (0.5, 2)
    with pytest.raises(UserError, match="o.mse.students: no such setting"):
        bind({"name": "loss", "scale": 1, "students": 2}, TABLE, "o.mse", context=("students",))


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({}, "w: needs a `name`. Known: loss, weigh"),
        ({"name": 3}, "w: needs a `name`"),
        ({"name": "wiegh"}, "w.name: unknown name 'wiegh'. Did you mean 'weigh'? Known: loss, weigh."),
        ({"name": "weigh"}, "w.temperature: required but not set; .* w.temperature=VALUE"),
        ({"name": "weigh", "temprature": 1}, "w.temprature: no such setting.* Did you mean 'temperature'"),
        ({"name": "weigh", "temperature": "hot"}, "w.temperature='hot': expected float, got str"),
        ({"name": "weigh", "temperature": True}, "w.temperature=True: expected float, got bool"),
        ({"name": "weigh", "temperature": "[1"}, r"w.temperature='\[1': not a YAML value"),
        ({"name": "weigh", "temperature": "a: b"}, "w.temperature='a: b': not a YAML value"),
        ({"name": "weigh", "temperature": "${"}, r"w.temperature='\${': not a YAML value"),
        ({"name": "weigh", "temperature": 1, "padding": "exclud"}, "w.padding='exclud': unknown. Did you mean"),
        ({"name": "weigh", "temperature": 1, "sizes": [1, "x"]}, r"w.sizes\[1\]='x': expected int"),
        ({"name": "weigh", "temperature": 1, "inner": {"sise": 1}}, "w.inner.sise: no such .* Did you mean 'size'"),
        ({"name": "weigh", "temperature": 1, "label": 7}, "w.label=7: expected str, got int; quote it"),
        ({"name": "loss", "scale": 1, "students": 1, "extra": 1}, "w.extra: no such setting, it would be ignored"),
        ({"name": "no.such.module:Thing"}, "w.name: cannot import 'no.such.module:Thing'"),
        ({"name": "math:pi"}, "w.name: 'math:pi' is a float; name a class or a function"),
        ({"name": "fractions:Fractoin"}, "w.name: cannot import 'fractions:Fractoin'"),
        ({"name": ":Thing"}, "w.name: cannot import ':Thing'"),
        ({"name": ".near:Thing"}, "w.name: cannot import '.near:Thing'"),
    ],
)
def test_a_wrong_setting_raises_one_line_with_the_place_and_the_way_out(settings, says):
    with pytest.raises(UserError, match=says.replace("? ", r"\? ")) as error:
        bind(settings, TABLE, "w")
    assert "\n" not in str(error.value)


def test_a_component_of_another_package_is_imported():
    from fractions import Fraction

    assert resolve("fractions:Fraction", TABLE, "w") is Fraction


@pytest.mark.parametrize(
    ("value", "kind", "expected"),
    [
        ("007", str, "007"),
        ("1e-3", str, "1e-3"),
        ("null", str, "null"),
        ("${oc.env:HOME}", str, "${oc.env:HOME}"),
        ("[a]", list[str] | str, "[a]"),
        ("null", str | None, None),
        ("null", int | None, None),
        (None, Literal["a", "b"] | None, None),
        ("null", Literal["a", "b"] | None, None),
        (None, int | None, None),
        ("1e-3", float, 0.001),
        ("3", float, 3.0),
        ("3", int | None, 3),
        ("true", bool, True),
        ("[1, 2]", tuple[int, int], (1, 2)),
        ("[1, 2, 3]", tuple[int, ...], (1, 2, 3)),
        ("{a: 1}", dict[str, float], {"a": 1.0}),
        ("5m", Literal["5m", "11m"], "5m"),
        ("16", Literal[5, 16], 16),
        ("7", Any, "7"),
    ],
)
def test_convert(value, kind, expected):
    converted = convert(value, kind, "x")
    assert converted == expected and type(converted) is type(expected)


@pytest.mark.parametrize(
    ("value", "kind"),
    [(None, str), (1.0, int), (True, int), (1, bool), ([1], tuple[int, int]), ("[1]", tuple[int, int])],
)
def test_convert_raises_for_other_types(value, kind):
    with pytest.raises(UserError, match="^x"):
        convert(value, kind, "x")


def test_typed_names_every_level():
    with pytest.raises(UserError, match="^w.inner.size='big': expected int"):
        typed(Weigh, {"temperature": 1, "inner": {"size": "big"}}, "w")
