"""Every file of `nestling/tools` keeps the contract of a tool; a new file is tested by being there."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from nestling import tools
from nestling.core import registry
from nestling.core.config import Config
from nestling.tools import python

NAMES = registry.names("tools")
TYPES = {"string", "integer", "number", "boolean", "array", "object"}
ODD = ["", " ", "\0", "((((", "9" * 5000, "🙂 é 白", "9**9**9**9", "a" * 10_000, "\n\n", "-" * 150 + "1"]


@pytest.fixture
def settings(name: str, tmp_path: Path) -> Config | None:
    """What a tool's own `toy` says, for tools that need something set up."""
    make = getattr(registry.find("tools", name), "toy", None)
    return make(tmp_path) if make else None


def refuses(name: str) -> bool:
    """Whether this machine lacks what the tool must have to run anything."""
    return name == "python" and any(kept.how is None for kept in python.isolation())


def test_the_tools_are_there() -> None:
    assert {"calculator", "python", "search"} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_schema_has_openai_form_and_every_parameter_is_explained(name: str) -> None:
    definition = tools.schema(name)
    assert definition["type"] == "function"
    function = definition["function"]
    assert function["name"] == name
    assert len(function["description"]) > 10
    parameters = function["parameters"]
    assert parameters["type"] == "object"
    assert parameters["additionalProperties"] is False
    for field, entry in parameters["properties"].items():
        assert entry.get("description"), f"{name}: no sentence about the argument {field}"
        assert entry.get("type") in TYPES or "enum" in entry or "anyOf" in entry
    assert set(parameters.get("required", [])) <= set(parameters["properties"])
    assert "settings" not in parameters["properties"]
    json.dumps(definition)


@pytest.mark.parametrize("name", NAMES)
def test_settings_are_explained(name: str) -> None:
    kind = getattr(registry.find("tools", name), "Settings", None)
    if kind is not None:
        assert issubclass(kind, Config)
        assert all(field.description for field in kind.model_fields.values())


@pytest.mark.parametrize("name", NAMES)
def test_worked_examples(name: str, settings: Config | None) -> None:
    examples = registry.find("tools", name).EXAMPLES
    assert examples, "a tool shows at least one worked call"
    for arguments, result in examples:
        for values in (arguments, json.loads(json.dumps(arguments))):
            answer = tools.run(name, values, settings)
            assert answer.startswith("error: ") if refuses(name) else answer == result


@pytest.mark.parametrize("name", NAMES)
def test_bad_arguments_become_error_text(name: str, settings: Config | None) -> None:
    properties = tools.schema(name)["function"]["parameters"]["properties"]
    required = tools.schema(name)["function"]["parameters"].get("required", [])
    cases: list[dict[str, object]] = [{"no_such_argument": 1}, {name: {"nested": []} for name in properties}]
    cases.append({"settings": {}})
    if required:
        cases.append({})
    for arguments in cases:
        result = tools.run(name, arguments, settings)
        assert result.startswith("error: "), f"{arguments} gave {result}"
        assert "\n" not in result


@pytest.mark.parametrize("name", NAMES)
def test_odd_text_neither_raises_nor_hangs(name: str, settings: Config | None) -> None:
    properties = tools.schema(name)["function"]["parameters"]["properties"]
    texts = [field for field, entry in properties.items() if entry.get("type") == "string"]
    start = time.perf_counter()
    for odd in ODD:
        assert isinstance(tools.run(name, dict.fromkeys(texts, odd), settings), str)
    assert time.perf_counter() - start < 2 + len(ODD) * getattr(settings, "seconds", 0)


def test_unknown_tool_is_error_text() -> None:
    assert tools.run("calculatr", {}).startswith("error: ")
