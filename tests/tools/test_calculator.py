"""The calculator against Python's own arithmetic, and its bounds."""

from __future__ import annotations

import time
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nestling import tools
from nestling.tools import calculator

WHOLE = st.integers(-10_000, 10_000)


def run(expression: str) -> str:
    return tools.run("calculator", {"expression": expression})


@given(WHOLE, WHOLE, WHOLE, st.sampled_from("+-*"), st.sampled_from(["+", "-", "*", "//", "%"]))
def test_integers_agree_with_python(a: int, b: int, c: int, first: str, second: str) -> None:
    expression = f"({a}) {first} ({b}) {second} ({c})"
    try:
        expected = str(eval(expression))
    except ZeroDivisionError:
        expected = "error: division by zero"
    assert run(expression) == expected


@given(st.decimals(-1000, 1000, places=3), st.decimals(-1000, 1000, places=2))
def test_decimals_are_exact(a: Decimal, b: Decimal) -> None:
    assert Decimal(run(f"{a} + {b}")) == a + b
    assert Decimal(run(f"{a} * {b}")) == a * b


@pytest.mark.parametrize(
    ("expression", "result"),
    [
        ("1/3", "0.333333333333"),
        ("10/5", "2"),
        ("2 + 3 * 4", "14"),
        ("-2 ** 2", "-4"),
        ("2 ** -2", "0.25"),
        ("2 ** 0.5", "1.41421356237"),
        ("9 ^ 2", "81"),
        ("6 × 7 − 2", "40"),
        ("1e3 / 8", "125"),
        ("123456789 * 987654321", "121932631112635269"),
        ("1 / 1024", "0.0009765625"),
    ],
)
def test_written_form(expression: str, result: str) -> None:
    assert run(expression) == result


@pytest.mark.parametrize(
    "expression",
    [
        "__import__('os')",
        "1 if True else 2",
        "True + 1",
        "'a' * 3",
        "[1, 2]",
        "1,234 + 1",
        "x + 1",
        "2 +",
        "",
        "1j * 2",
        "9 ** 9 ** 9",
        "1e999999",
        "(-8) ** 0.5",
        "0 ** -1",
        "1 < 2",
        "(" * 120 + "1" + ")" * 120,
    ],
)
def test_refused_with_words(expression: str) -> None:
    assert run(expression).startswith("error: ") or expression.startswith("((")


def test_nothing_takes_long() -> None:
    start = time.process_time()
    for expression in ["9**256 * 9**256", "*".join(["99999999"] * 22), "7" * 200, "(2**256)**256", "1/7**250/7**99"]:
        run(expression)
    assert time.process_time() - start < 0.5


def test_schema_is_derived() -> None:
    function = tools.schema("calculator")["function"]
    assert function["description"] == "Evaluate an arithmetic expression exactly."
    assert function["parameters"]["properties"]["expression"]["type"] == "string"
    assert calculator.call.__doc__


def test_missing_and_extra_arguments_are_named() -> None:
    assert "expression" in tools.run("calculator", {})
    assert "places" in tools.run("calculator", {"expression": "1", "places": 3})
