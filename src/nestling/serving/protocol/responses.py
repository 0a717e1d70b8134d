"""/v1/responses: the request and its items as messages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from nestling.core.types import Message
from nestling.serving.errors import lacking, unsupported
from nestling.serving.protocol.chat import Effort, Form, TalkRequest, constraint_of
from nestling.serving.protocol.messages import Part, Role, to_call, to_text
from nestling.serving.protocol.tools import Allowed, Choice, Function, FunctionName, Tool, ToolChoice
from nestling.tokenizer.bpe import Tokenizer
from nestling.tokenizer.special import THINK_END, THINK_START

FORM = "text.format.schema"
"""Where a request says what the text must be."""


class Item(BaseModel):
    """An item of the input: a message, a call that was made, what came out of it, or both of a call on the server.

    Reasoning belongs to the turn that it began; the renderer shows it within a round of tools only.
    """

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
    error: Any = None


class FlatTool(BaseModel):
    """A tool as /v1/responses spells it: the function's fields beside the type."""

    model_config = ConfigDict(extra="allow")

    type: str
    name: FunctionName | None = None
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None

    def nested(self, param: str) -> Tool:
        """The same as chat spells it."""
        if self.type != "function":
            return Tool(type=self.type)
        if self.name is None:
            raise lacking(f"{param}.name")
        return Tool(type="function", function=Function.model_validate(self.model_dump()))


class FlatChoice(BaseModel):
    """A tool_choice that names a function, or leaves some of the tools."""

    type: Literal["function", "allowed_tools"]
    name: FunctionName | None = None
    mode: Literal["auto", "required"] = "auto"
    tools: list[FlatTool] = []

    @property
    def nested(self) -> Choice:
        """The same as chat spells it."""
        if self.type == "function":
            return Choice(type=self.type, function=self.name and Function(name=self.name))
        allowed = Allowed(mode=self.mode, tools=_nested(self.tools, "tool_choice.tools"))
        return Choice(type=self.type, allowed_tools=allowed)


class Format(BaseModel):
    """What the text must be."""

    model_config = ConfigDict(extra="ignore")

    type: Form
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


class ResponsesRequest(TalkRequest):
    """Create a response."""

    input: str | list[Item] | None = None
    instructions: str | None = None
    previous_response_id: str | None = None
    stream_options: dict[str, Any] | None = None
    max_output_tokens: int | None = Field(None, ge=1)
    text: TextSettings | None = None
    tools: list[FlatTool] | None = None
    tool_choice: Literal["none", "auto", "required"] | FlatChoice | None = None
    max_tool_calls: int | None = Field(None, ge=1)
    reasoning: Reasoning | None = None
    include: list[str] | None = None
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
        return constraint_of(wanted.type, wanted.schema_, FORM) if wanted else None

    @property
    def nested_tools(self) -> list[Tool] | None:
        """The tools as chat spells them."""
        return None if self.tools is None else _nested(self.tools, "tools")

    @property
    def nested_choice(self) -> ToolChoice | None:
        """The choice as chat spells it."""
        return self.tool_choice.nested if isinstance(self.tool_choice, FlatChoice) else self.tool_choice

    def messages(self, tokenizer: Tokenizer | None = None) -> list[Message]:
        """The input as messages, without the instructions.

        Args:
            tokenizer: of the model; without one, and for one that has no thoughts, there are none.

        Raises:
            ApiError: an item that is no text, that lacks what its type needs, or that only refers to another.
        """
        if self.input is None or isinstance(self.input, str):
            return [Message(role="user", content=self.input)] if self.input is not None else []
        messages: list[Message] = []
        thoughts = tokenizer is not None and THINK_START in tokenizer.special
        for place, item in enumerate(self.input):
            for message in _to_messages(item, f"input[{place}]"):
                if thoughts or not _is_thought(message):
                    _append(messages, message)
        return [message for message in messages if not _is_thought(message)]


def _nested(tools: Sequence[FlatTool], param: str) -> list[Tool]:
    return [tool.nested(f"{param}[{place}]") for place, tool in enumerate(tools)]


def _to_messages(item: Item, param: str) -> list[Message]:
    if item.type == "message":
        if item.role is None:
            raise lacking(f"{param}.role")
        role: Any = "system" if item.role == "developer" else item.role
        return [Message(role=role, content=to_text(item.content, f"{param}.content"))]
    if item.type == "item_reference":
        raise unsupported(param, "send the item itself, or go on with previous_response_id")
    messages = []
    if item.type == "reasoning" and (thought := to_text(item.content or "", f"{param}.content")):
        messages.append(Message(role="assistant", content=f"{THINK_START}{thought}{THINK_END}"))
    if item.type in ("function_call", "mcp_call"):
        if item.name is None:
            raise lacking(f"{param}.name")
        messages.append(Message(role="assistant", tool_calls=(to_call(item.name, item.arguments, param),)))
    if item.type in ("function_call_output", "mcp_call"):
        output = item.output if item.error is None else f"error: {item.error}"
        messages.append(Message(role="tool", content=to_text(output, f"{param}.output")))
    return messages


def _is_thought(message: Message) -> bool:
    """Whether nothing was said after it."""
    whole = message.content.startswith(THINK_START) and message.content.endswith(THINK_END)
    return whole and message.role == "assistant" and not message.tool_calls


def _append(messages: list[Message], message: Message) -> None:
    """A call goes into the assistant's turn before it, and all after a thought: items are finer than turns."""
    last = messages[-1] if messages else None
    if last and last.role == message.role == "assistant" and (message.tool_calls or _is_thought(last)):
        calls = (*last.tool_calls, *message.tool_calls)
        messages[-1] = Message(role="assistant", content=last.content + message.content, tool_calls=calls)
    else:
        messages.append(message)
