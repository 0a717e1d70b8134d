"""Settings: what a user gets back for each kind of mistake."""

from __future__ import annotations

import pytest
from pydantic import Field

from nestling.core.config import Config, parse
from nestling.core.errors import UserError


class Inner(Config):
    learning_rate: float = Field(0.1, gt=0)


class Outer(Config):
    name: str
    inner: Inner = Inner()


def test_nested_values_are_read() -> None:
    assert parse(Outer, {"name": "a", "inner": {"learning_rate": 0.5}}, "x").inner.learning_rate == 0.5


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"nam": "a", "name": "b"}, "x.nam: unknown setting; did you mean 'name'? known: inner, name"),
        ({"name": "a", "inner": {"learning_rat": 1}}, "x.inner.learning_rat: unknown setting; did you mean"),
        (
            {"name": "a", "inner": {"learning_rate": -1}},
            "x.inner.learning_rate: must be greater than 0 (got -1)",
        ),
        ({}, "x.name: this setting is required"),
    ],
)
def test_mistakes_name_the_place_and_the_way_out(data: dict, message: str) -> None:
    with pytest.raises(UserError) as caught:
        parse(Outer, data, "x")
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_settings_are_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Inner().learning_rate = 1.0  # type: ignore[misc]
