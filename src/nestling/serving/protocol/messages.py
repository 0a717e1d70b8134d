"""OpenAI's messages as ours: parts of content joined, developer read as system, what no model here can see refused."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import AliasChoices, BaseModel, ConfigDict, Field

from nestling.core.types import Message, ToolCall
from nestling.serving.errors import ApiError, lacking
from nestling.tokenizer.bpe import Tokenizer
from nestling.tokenizer.special import THINK_END, THINK_START

REFUSED_PARTS = {
    "image_url": "images", "input_image": "images", "input_audio": "sound", "file": "files", "input_file": "files",
}  # fmt: skip
PartType = Literal[
    "text", "input_text", "output_text", "reasoning_text", "refusal", "image_url", "input_image", "input_audio", "file",
    "input_file",
]  # fmt: skip
Role = Literal["system", "developer", "user", "assistant", "tool"]


class Wire(BaseModel):
    """What a client sends: strict about names, so that a misspelt parameter is not ignored."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Part(BaseModel):
    """A part of a message's content."""

    type: PartType
    text: str | None = None
    refusal: str | None = None


class CallFunction(BaseModel):
    """The function of a call and its arguments as JSON text."""

    name: str
    arguments: str = "{}"


class Call(BaseModel):
    """A call in an assistant's message."""

    id: str | None = None
    type: Literal["function"] = "function"
    function: CallFunction


class ChatMessage(BaseModel):
    """One message of a chat request."""

    role: Role
    content: str | list[Part] | None = None
    name: str | None = None
    refusal: str | None = None
    tool_calls: list[Call] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = Field(None, validation_alias=AliasChoices("reasoning_content", "reasoning"))
    """What an assistant thought, by this service's name for it or by that of others."""


Messages = Annotated[list[ChatMessage], Field(min_length=1)]


def to_messages(messages: Sequence[ChatMessage], tokenizer: Tokenizer | None = None) -> list[Message]:
    """The conversation as the renderer takes it, which leaves out the thoughts of before the last question.

    Args:
        tokenizer: of the model; without one, and for one that has no thoughts, there are none.

    Raises:
        ApiError: a part that is no text, arguments that are no JSON object, a result of no call.
    """
    called: set[str | None] = set()
    for place, message in enumerate(messages):
        called |= {call.id for call in message.tool_calls or ()}
        if message.role == "tool" and message.tool_call_id not in called:
            where = f"messages[{place}].tool_call_id"
            raise ApiError(f"{where}: no call before it has this id", param=where, code="invalid_value")
    thoughts = tokenizer is not None and THINK_START in tokenizer.special
    return [_to_message(message, f"messages[{place}]", thoughts) for place, message in enumerate(messages)]


def _to_message(message: ChatMessage, param: str, thoughts: bool) -> Message:
    asked = [(call.function, f"{param}.tool_calls[{n}].function") for n, call in enumerate(message.tool_calls or ())]
    calls = tuple(to_call(function.name, function.arguments, place) for function, place in asked)
    if calls and message.role != "assistant":
        raise ApiError(f"{param}: only an assistant calls functions", param=param, code="invalid_value")
    role: Any = "system" if message.role == "developer" else message.role
    content = message.content or "" if role == "assistant" else message.content
    text = to_text(content, f"{param}.content")
    if thoughts and message.reasoning_content and role == "assistant":
        text = f"{THINK_START}{message.reasoning_content}{THINK_END}{text}"
    return Message(role=role, content=text, tool_calls=calls)


def to_text(content: str | Sequence[Part] | None, param: str) -> str:
    """The text of a message's content.

    Raises:
        ApiError: none, a picture, a sound or a file.
    """
    if content is None:
        raise lacking(param)
    if isinstance(content, str):
        return content
    return "".join(_part_text(part, f"{param}[{place}]") for place, part in enumerate(content))


def _part_text(part: Part, param: str) -> str:
    if part.type in REFUSED_PARTS:
        what = f"{param}: this model reads text only, no {REFUSED_PARTS[part.type]}"
        raise ApiError(what, param=param, code="unsupported_content_type")
    text = part.refusal if part.type == "refusal" else part.text
    if text is None:
        raise lacking(f"{param}.text")
    return text


def to_call(name: str, arguments: str | None, param: str) -> ToolCall:
    """A call that was made.

    Raises:
        ApiError: `arguments` are no JSON object.
    """
    try:
        read = json.loads(arguments or "{}")
    except (json.JSONDecodeError, RecursionError):
        read = None
    if not isinstance(read, dict):
        place = f"{param}.arguments"
        raise ApiError(f"{place}: must be a JSON object", param=place, code="invalid_value")
    return ToolCall(name=name, arguments=read)
