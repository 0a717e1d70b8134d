"""Every file of `nestling/tools` keeps the contract of a tool; a new file is tested by being there."""

from __future__ import annotations

import json
import time

import pytest

from nestling import tools
from nestling.core import registry

NAMES = registry.names("tools")
TYPES = {"string", "integer", "number", "boolean", "array", "object"}


def test_there_is_a_calculator() -> None:
    assert "calculator" in NAMES


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
    json.dumps(definition)


@pytest.mark.parametrize("name", NAMES)
def test_worked_examples(name: str) -> None:
    examples = registry.find("tools", name).EXAMPLES
    assert examples, "a tool shows at least one worked call"
    for arguments, result in examples:
        assert tools.run(name, arguments) == result
        assert tools.run(name, json.loads(json.dumps(arguments))) == result


@pytest.mark.parametrize("name", NAMES)
def test_bad_arguments_become_error_text(name: str) -> None:
    properties = tools.schema(name)["function"]["parameters"]["properties"]
    required = tools.schema(name)["function"]["parameters"].get("required", [])
    cases: list[dict[str, object]] = [{"no_such_argument": 1}, {name: {"nested": []} for name in properties}]
    if required:
        cases.append({})
    for arguments in cases:
        result = tools.run(name, arguments)
        assert result.startswith("error: "), f"{arguments} gave {result}"
        assert "\n" not in result


@pytest.mark.parametrize("name", NAMES)
def test_odd_text_neither_raises_nor_hangs(name: str) -> None:
    properties = tools.schema(name)["function"]["parameters"]["properties"]
    texts = [field for field, entry in properties.items() if entry.get("type") == "string"]
    start = time.perf_counter()
    for odd in ["", " ", "\0", "((((", "9" * 5000, "🙂 é 白", "9**9**9**9", "a" * 10_000, "\n\n", "-" * 150 + "1"]:
        assert isinstance(tools.run(name, dict.fromkeys(texts, odd)), str)
    assert time.perf_counter() - start < 2


def test_unknown_tool_is_error_text() -> None:
    assert tools.run("calculatr", {}).startswith("error: ")
