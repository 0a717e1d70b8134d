"""Tools of a request: functions that the client runs, and tools of the service's own, asked for by their type."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from nestling.serving.errors import ApiError, lacking
from nestling.tokenizer.bpe import Tokenizer
from nestling.tools import Toolbox

FunctionName = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]


class Function(BaseModel):
    """A function that the client offers."""

    name: FunctionName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(BaseModel):
    """{"type": "function", "function": {…}}, or {"type": "calculator"} for a tool that the service runs itself."""

    model_config = ConfigDict(extra="allow")

    type: str
    function: Function | None = None

    @property
    def key(self) -> tuple[str, str | None]:
        """What tells it from the others."""
        return self.type, self.function.name if self.function else None


class Allowed(BaseModel):
    """Tools by type and name, and whether one of them must be called."""

    mode: Literal["auto", "required"]
    tools: list[Tool]


class Choice(BaseModel):
    """A tool_choice that names a function, which must be called, or leaves some of the tools."""

    type: Literal["function", "allowed_tools"]
    function: Function | None = None
    allowed_tools: Allowed | None = None

    @property
    def left(self) -> Allowed:
        """What it leaves."""
        if self.type == "function" and self.function:
            return Allowed(mode="required", tools=[Tool(type="function", function=self.function)])
        if self.type == "allowed_tools" and self.allowed_tools:
            return self.allowed_tools
        raise lacking(f"tool_choice.{self.type}")


ToolChoice = Literal["none", "auto", "required"] | Choice
Tools = Sequence[Tool] | None


@dataclass(frozen=True)
class Offer:
    """What a model may call in one reply."""

    functions: tuple[Function, ...] = ()
    """Run by the client: the reply ends with the calls."""
    own: tuple[str, ...] = ()
    """Names of tools/ that the service runs: the reply goes on after the results."""
    forced: tuple[Function, ...] = ()
    """One of these must be called at once; empty: the model decides."""
    parallel: bool = True
    """Whether there may be several calls in one turn."""

    @property
    def names(self) -> tuple[str, ...]:
        """All names, for the system turn."""
        return (*(function.name for function in self.functions), *self.own)

    def told(self, tokenizer: Tokenizer, toolbox: Toolbox) -> Sequence[Any]:
        """What the model is told of them: ours know tools by name, others read their definitions."""
        if tokenizer.has_own_form:
            return self.names
        theirs = [{"type": "function", "function": one.model_dump(exclude_none=True)} for one in self.functions]
        return [*theirs, *(about for about in toolbox.schemas() if about["function"]["name"] in self.own)]

    @property
    def constraint(self) -> dict[str, Any] | None:
        """The JSON schema that the text of a forced call must have."""
        kinds = [_call_schema(function) for function in self.forced]
        return {"json_schema": kinds[0] if len(kinds) == 1 else {"anyOf": kinds}} if kinds else None


def offer(tools: Tools, choice: ToolChoice | None, own: Sequence[str], parallel: bool = True) -> Offer:
    """What a request offers.

    Args:
        own: tools that the service runs; all are on offer where the request names no tools at all.

    Raises:
        ApiError: a tool of another type, a choice of a tool that is not there.
    """
    tools, wish = _narrowed(tools, choice)
    if wish == "none":
        return Offer()
    if tools is None and wish != "required":
        return Offer(own=tuple(own))
    tools = tools or ()
    functions = tuple(_function(tool, place) for place, tool in enumerate(tools) if tool.type == "function")
    wanted = tuple(_own(tool, place, own) for place, tool in enumerate(tools) if tool.type != "function")
    if wish == "required" and not functions:
        raise ApiError("tool_choice: needs functions in tools", param="tool_choice", code="invalid_value")
    return Offer(functions, wanted, functions if wish == "required" else (), parallel)


def lets_own(tools: Tools, choice: ToolChoice | None) -> bool:
    """Whether a request lets the service use tools of its own: it names none at all, or one of them."""
    tools, wish = _narrowed(tools, choice)
    return wish != "none" and (tools is None or any(tool.type != "function" for tool in tools))


def _narrowed(tools: Tools, choice: ToolChoice | None) -> tuple[Tools, str | None]:
    """The tools that a choice leaves, and what it says of them."""
    if choice is None or isinstance(choice, str):
        return tools, choice
    given, wanted = {tool.key: tool for tool in tools or ()}, [tool.key for tool in choice.left.tools]
    for key in wanted:
        if key not in given:
            what = f"tool_choice: no {' '.join(filter(None, key))!r} in tools"
            raise ApiError(what, param="tool_choice", code="invalid_value")
    return [tool for key, tool in given.items() if key in wanted], choice.left.mode


def _function(tool: Tool, place: int) -> Function:
    if tool.function is None:
        raise lacking(f"tools[{place}].function")
    return tool.function


def _own(tool: Tool, place: int, own: Sequence[str]) -> str:
    if tool.type not in own:
        there = ", ".join(("function", *own))
        what = f"tools[{place}].type: this service has no tool {tool.type!r}; there is {there}"
        raise ApiError(what, param=f"tools[{place}].type", code="invalid_value")
    return tool.type


def _call_schema(function: Function) -> dict[str, Any]:
    """What stands between <tool_call> and </tool_call>, its keys in the order in which models are taught them."""
    return {
        "type": "object",
        "properties": {"name": {"const": function.name}, "arguments": function.parameters or {"type": "object"}},
        "required": ["name", "arguments"],
        "additionalProperties": False,
    }
