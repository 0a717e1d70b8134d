"""/v1/responses: the request and its items as messages."""

from __future__ import annotations

import json
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from nestling.core.types import Message, ToolCall
from nestling.serving.errors import ApiError, unsupported
from nestling.serving.protocol.chat import Effort, json_constraint
from nestling.serving.protocol.decoding import Decoding
from nestling.serving.protocol.messages import Part, Role, to_text
from nestling.serving.protocol.tools import Choice, ChosenFunction, Function, Tool, ToolChoice


class Item(BaseModel):
    """An item of the input: a message, a call that was made, or what came out of it."""

    model_config = ConfigDict(extra="ignore")

    type: Literal["message", "function_call", "function_call_output", "reasoning", "mcp_call", "item_reference"] = (
        "message"
    )
    role: Role | None = None
    content: str | list[Part] | None = None
    call_id: str | None = None
    name: str | None = None
    arguments: str | None = None
    output: str | list[Part] | None = None


class FlatTool(BaseModel):
    """A tool as /v1/responses spells it: the function's fields beside the type."""

    model_config = ConfigDict(extra="allow")

    type: str
    name: str | None = None
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None

    def nested(self, place: int) -> Tool:
        """The same as chat spells it."""
        if self.type != "function":
            return Tool(type=self.type)
        if self.name is None:
            where = f"tools[{place}].name"
            raise ApiError(f"{where}: this field is required", param=where, code="missing_required_parameter")
        function = Function(
            name=self.name, description=self.description, parameters=self.parameters, strict=self.strict
        )
        return Tool(type="function", function=function)


class FlatChoice(BaseModel):
    """A tool_choice that names a function."""

    type: Literal["function"]
    name: str


class Format(BaseModel):
    """What the text must be."""

    model_config = ConfigDict(extra="ignore")

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")


class TextSettings(BaseModel):
    """Settings of the text."""

    format: Format | None = None
    verbosity: str | None = None


class Reasoning(BaseModel):
    """Settings of thinking."""

    effort: Effort | None = None
    summary: str | None = None
    generate_summary: str | None = None


class ResponsesRequest(Decoding):
    """Create a response."""

    model: str
    input: str | list[Item] | None = None
    instructions: str | None = None
    previous_response_id: str | None = None
    stream: bool | None = None
    stream_options: dict[str, Any] | None = None
    store: bool | None = None
    max_output_tokens: int | None = Field(None, ge=1)
    top_logprobs: int | None = Field(None, ge=0, le=20)
    text: TextSettings | None = None
    tools: list[FlatTool] | None = None
    tool_choice: Literal["none", "auto", "required"] | FlatChoice | None = None
    parallel_tool_calls: bool | None = None
    max_tool_calls: int | None = Field(None, ge=1)
    reasoning: Reasoning | None = None
    include: list[str] | None = None
    metadata: dict[str, str] | None = None
    # has no effect
    user: str | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    truncation: Literal["auto", "disabled"] | None = None
    # refused
    background: bool | None = None
    conversation: Any = None
    prompt: Any = None

    def check(self) -> None:
        """Refuse what would be silently wrong.

        Raises:
            ApiError: work in the background, stored conversations or prompts, truncation.
        """
        if self.background:
            raise unsupported("background", "a response is written while its client waits")
        if self.conversation is not None or self.prompt is not None:
            what = "use previous_response_id" if self.conversation is not None else "send the text itself"
            raise unsupported("conversation" if self.conversation is not None else "prompt", what)
        if self.truncation == "auto":
            raise unsupported("truncation", "what does not fit is refused, nothing is left out in silence")

    @property
    def constraint_of_text(self) -> dict[str, Any] | None:
        """What the text must be, as the engine takes it."""
        wanted = self.text.format if self.text else None
        if wanted is None or wanted.type == "text":
            return None
        return {"json_object": True} if wanted.type == "json_object" else json_constraint(wanted.schema_)

    @property
    def nested_tools(self) -> list[Tool] | None:
        """The tools as chat spells them."""
        return None if self.tools is None else [tool.nested(place) for place, tool in enumerate(self.tools)]

    @property
    def nested_choice(self) -> ToolChoice | None:
        """The choice as chat spells it."""
        choice = self.tool_choice
        if isinstance(choice, FlatChoice):
            return Choice(type="function", function=ChosenFunction(name=choice.name))
        return choice

    def messages(self) -> list[Message]:
        """The input as messages, without the instructions.

        Raises:
            ApiError: an item that is no text, or that lacks what its type needs.
        """
        if self.input is None or isinstance(self.input, str):
            return [Message(role="user", content=self.input)] if self.input is not None else []
        messages: list[Message] = []
        for place, item in enumerate(self.input):
            message = _to_message(item, f"input[{place}]")
            if message is not None:
                _append(messages, message)
        return messages


def _to_message(item: Item, param: str) -> Message | None:
    """None for items that only say how a reply came about, which the model is not told again."""
    if item.type == "message":
        if item.role is None:
            raise ApiError(
                f"{param}.role: this field is required", param=f"{param}.role", code="missing_required_parameter"
            )
        role: Any = "system" if item.role == "developer" else item.role
        return Message(role=role, content=to_text(item.content, f"{param}.content"))
    if item.type == "function_call":
        return Message(role="assistant", tool_calls=(_to_call(item, param),))
    if item.type == "function_call_output":
        return Message(role="tool", content=to_text(item.output, f"{param}.output"))
    return None


def _to_call(item: Item, param: str) -> ToolCall:
    try:
        arguments = json.loads(item.arguments or "{}")
    except (json.JSONDecodeError, RecursionError):
        arguments = None
    if item.name is None or not isinstance(arguments, dict):
        place = f"{param}.{'name' if item.name is None else 'arguments'}"
        raise ApiError(f"{place}: a call has a name and a JSON object", param=place, code="invalid_value")
    return ToolCall(name=item.name, arguments=arguments)


def _append(messages: list[Message], message: Message) -> None:
    """A call goes into the assistant's turn before it: items are finer than turns."""
    last = messages[-1] if messages else None
    if message.tool_calls and last and last.role == "assistant":
        calls = (*last.tool_calls, *message.tool_calls)
        messages[-1] = Message(role="assistant", content=last.content, tool_calls=calls)
    else:
        messages.append(message)
