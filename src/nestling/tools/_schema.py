"""From a tool's typed function to its JSON schema, and from a model's arguments to the call."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from functools import cache
from typing import Any, get_type_hints

from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model

from nestling.core import registry
from nestling.core.config import Config
from nestling.core.errors import UserError

ERROR = "error: "
SETTINGS = "settings"  # the parameter that the person who offers a tool fills in, never the model


def schema(name: str) -> dict[str, Any]:
    """The tool's definition in OpenAI's function form, derived from its signature and docstring.

    >>> schema("calculator")["function"]["parameters"]["required"]
    ['expression']

    Raises:
        UserError: no tool has this name.
    """
    parameters = _arguments_model(name).model_json_schema()
    parameters.pop("title", None)
    for entry in parameters.get("properties", {}).values():
        entry.pop("title", None)
    summary, _ = _read_docstring(registry.find("tools", name).call)
    return definition(name, summary, parameters)


def definition(name: str, description: str, parameters: Mapping[str, Any]) -> dict[str, Any]:
    """OpenAI's function form; a tool that lies outside ("my_lab.weather") is offered under its last name."""
    function = {"name": name.rsplit(".", 1)[-1], "description": description, "parameters": dict(parameters)}
    return {"type": "function", "function": function}


def run(name: str, arguments: Mapping[str, Any], settings: Config | None = None) -> str:
    """Call the tool; anything wrong with the name, the arguments or the call itself comes back as "error: …".

    >>> run("calculator", {"expression": "12 + 3"})
    '15'
    >>> run("calculator", {"expression": "1 / 0"})
    'error: division by zero'

    Args:
        settings: the tool's own `Settings`; without them it has its defaults.
    """
    try:
        values = _arguments_model(name).model_validate(dict(arguments))
        fields = {field: getattr(values, field) for field in type(values).model_fields}
        if settings is not None:
            fields[SETTINGS] = settings
        return registry.find("tools", name).call(**fields)
    except ValidationError as error:
        first = error.errors()[0]
        return f"{ERROR}argument {'.'.join(map(str, first['loc']))}: {first['msg'].lower()}"
    except UserError as error:
        return f"{ERROR}{error}"


def shorten(text: str, characters: int) -> str:
    """The text, or its head and tail with a note of how much was left out between them."""
    if len(text) <= characters:
        return text
    half = characters // 2
    return f"{text[:half]}\n… {len(text) - 2 * half} characters left out …\n{text[-half:]}"


@cache
def _arguments_model(name: str) -> type[BaseModel]:
    """A pydantic model with one field for each parameter of the tool's function that the model fills in."""
    function = registry.find("tools", name).call
    hints = get_type_hints(function, include_extras=True)
    _, notes = _read_docstring(function)
    fields: dict[str, Any] = {}
    for parameter in inspect.signature(function).parameters.values():
        if parameter.name != SETTINGS:
            default = ... if parameter.default is inspect.Parameter.empty else parameter.default
            fields[parameter.name] = (hints[parameter.name], Field(default, description=notes.get(parameter.name)))
    return create_model(name, __config__=ConfigDict(extra="forbid"), **fields)


def _read_docstring(function: Any) -> tuple[str, dict[str, str]]:
    """The first paragraph, and the sentence under `Args:` of each parameter."""
    text = inspect.getdoc(function) or ""
    summary = " ".join(text.split("\n\n")[0].split())
    section = re.search(r"^Args:\n((?:[ ]+.*\n?)+)", text, re.MULTILINE)
    lines = re.findall(r"^ {4}(\w+): (.*(?:\n {5,}.*)*)", section.group(1), re.MULTILINE) if section else []
    return summary, {name: " ".join(note.split()) for name, note in lines}
