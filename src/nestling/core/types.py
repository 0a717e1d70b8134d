"""The values that flow through Nestling, in the data forms that its files hold. Each has a worked example.

Rows of files and values in memory are the same thing: `from_row` reads a JSON object, `to_row` writes it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Self, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from nestling.core.config import nearest
from nestling.core.errors import UserError

Role = Literal["system", "user", "assistant", "tool"]
Tool = str | dict[str, Any]
"""A tool on offer: its name, or its whole definition in OpenAI's shape."""


class Row(BaseModel):
    """A frozen value with a JSON form."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> Self:
        """Read one JSON object.

        Raises:
            UserError: a field is missing or of the wrong kind; names the field.
        """
        try:
            return cls.model_validate(row)
        except (TypeError, KeyError, AttributeError) as error:  # out of a validator that reads a shape of OpenAI's
            raise UserError(f"the row has another shape: {error}", fix=f"a row needs {_required(cls)}") from None
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(str(part) for part in first["loc"])
            if first["type"] == "missing":
                raise UserError(f"field {place!r} is missing", fix=f"a row needs {_required(cls)}") from None
            what = first["msg"].removeprefix("Value error, ").replace("Input should be", "must be")
            raise UserError(f"field {place!r}: {what}" if place else what, value=first["input"]) from None

    def to_row(self) -> dict[str, Any]:
        """The JSON object; fields left at their default are not written."""
        return self.model_dump(exclude_defaults=True)


def _required(cls: type[Row]) -> str:
    return ", ".join(name for name, field in cls.model_fields.items() if field.is_required())


class ToolCall(Row):
    """A function the model asks for.

    >>> ToolCall(name="calculator", arguments={"expression": "2 + 3"}).name
    'calculator'
    """

    name: str
    arguments: dict[str, Any]

    @model_validator(mode="before")
    @classmethod
    def _from_openai(cls, data: Any) -> Any:
        """Accept OpenAI's {"type": "function", "function": {"name", "arguments": "<json text>"}} as well."""
        if isinstance(data, Mapping) and "function" in data:
            data = dict(data["function"])
            if isinstance(data.get("arguments"), str):
                data["arguments"] = json.loads(data["arguments"] or "{}")
        return data

    def to_row(self) -> dict[str, Any]:
        """OpenAI's shape."""
        arguments = json.dumps(self.arguments, ensure_ascii=False)
        return {"type": "function", "function": {"name": self.name, "arguments": arguments}}


class Message(Row):
    """One turn of a conversation.

    >>> Message(role="user", content="Hello!").to_row()
    {'role': 'user', 'content': 'Hello!'}
    """

    role: Role
    content: str = ""
    tool_calls: tuple[ToolCall, ...] = ()

    @field_validator("role", mode="before")
    @classmethod
    def _known_role(cls, role: Any) -> Any:
        if role not in get_args(Role):
            raise ValueError(f"unknown role {role!r}; {nearest(str(role), get_args(Role))}")
        return role

    @field_validator("content", mode="before")
    @classmethod
    def _none_is_empty(cls, content: Any) -> Any:
        return "" if content is None else content

    def to_row(self) -> dict[str, Any]:
        """OpenAI's shape."""
        row: dict[str, Any] = {"role": self.role, "content": self.content}
        if self.tool_calls:
            row["tool_calls"] = [call.to_row() for call in self.tool_calls]
        return row


class Conversation(Row):
    """Messages in order, the tools on offer, and what the maker of the data knows about it (`meta`).

    >>> Conversation.from_row({"messages": [{"role": "user", "content": "Hi"}]}).messages[0].content
    'Hi'
    """

    messages: tuple[Message, ...]
    tools: tuple[Tool, ...] = ()
    meta: dict[str, Any] = {}

    @field_validator("messages")
    @classmethod
    def _not_empty(cls, messages: tuple[Message, ...]) -> tuple[Message, ...]:
        if not messages:
            raise ValueError("a conversation has no message")
        return messages

    @field_validator("tools", mode="before")
    @classmethod
    def _tools_have_names(cls, tools: Any) -> Any:
        return checked_tools(tools)

    def offering(self, tools: Sequence[Tool]) -> Self:
        """The same with other tools."""
        return self.model_copy(update={"tools": tuple(tools)})

    def to_row(self) -> dict[str, Any]:
        """The OpenAI shape, with `tools` as names or definitions."""
        row: dict[str, Any] = {"messages": [message.to_row() for message in self.messages]}
        if self.tools:
            row["tools"] = list(self.tools)
        return row | ({"meta": self.meta} if self.meta else {})


def checked_tools(tools: Any) -> tuple[Tool, ...]:
    """Tools of a row, none where it has none.

    Raises:
        ValueError: something that is neither a name nor a definition with a name.
    """
    if isinstance(tools, str | Mapping):
        raise ValueError("tools are a list of names or definitions")
    for tool in tools or ():
        function = tool.get("function") if isinstance(tool, Mapping) else {"name": tool}
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise ValueError('a tool is its name, or {"type": "function", "function": {"name": …, "parameters": …}}')
    return tuple(tools or ())


class Document(Row):
    """A piece of text to learn from.

    >>> Document(id="a1", text="Once upon a time.").to_row()
    {'id': 'a1', 'text': 'Once upon a time.'}
    """

    id: str
    text: str
    url: str | None = None
    source: str | None = None
    meta: dict[str, Any] = {}


class Response(Row):
    """One candidate answer; a higher score is better, rank 1 is best; equal values tie."""

    content: str
    score: float | None = Field(None, allow_inf_nan=False)
    rank: float | None = Field(None, allow_inf_nan=False)

    @property
    def value(self) -> float:
        """The quantity to order by: the score, or the negative rank."""
        if self.score is not None:
            return self.score
        return -self.rank if self.rank is not None else 0.0


class PromptRow(Row):
    """A prompt to answer; `meta` holds the tools on offer and what is known about the right answer.

    >>> PromptRow(prompt=(Message(role="user", content="2 + 3?"),), meta={"tools": ["calculator"]}).tools
    ('calculator',)
    """

    prompt: tuple[Message, ...]
    meta: dict[str, Any] = {}

    @field_validator("meta")
    @classmethod
    def _tools_have_names(cls, meta: dict[str, Any]) -> dict[str, Any]:
        checked_tools(meta.get("tools"))
        return meta

    @property
    def tools(self) -> tuple[Tool, ...]:
        """The tools on offer."""
        return tuple(self.meta.get("tools") or ())

    def offering(self, tools: Sequence[Tool]) -> Self:
        """The same with other tools."""
        return self.model_copy(update={"meta": {**self.meta, "tools": list(tools)}})

    def to_row(self) -> dict[str, Any]:
        """The JSON object."""
        row: dict[str, Any] = {"prompt": [message.to_row() for message in self.prompt]}
        return row | ({"meta": self.meta} if self.meta else {})


Scorer = Callable[[PromptRow, str], float]
"""How good a reply to a prompt is, by a program that knows (the embedded world's rubric) or a model that guesses."""


class Ranking(PromptRow):
    """2 to 9 responses to one prompt, scored or ranked by a person (or a rubric); ties allowed.

    >>> row = {"prompt": [{"role": "user", "content": "Hi"}], "chosen": "Hello!", "rejected": "What?"}
    >>> [r.score for r in Ranking.from_row(row).responses]
    [1.0, 0.0]
    """

    responses: tuple[Response, ...]

    @model_validator(mode="before")
    @classmethod
    def _chosen_rejected(cls, data: Any) -> Any:
        if isinstance(data, Mapping) and "chosen" in data and "rejected" in data:
            pair = ({"content": data["chosen"], "score": 1.0}, {"content": data["rejected"], "score": 0.0})
            data = {key: value for key, value in data.items() if key not in ("chosen", "rejected")}
            data["responses"] = pair
        return data

    @field_validator("responses")
    @classmethod
    def _two_to_nine(cls, responses: tuple[Response, ...]) -> tuple[Response, ...]:
        if not 2 <= len(responses) <= 9:
            raise ValueError(f"a ranking needs 2 to 9 responses, this one has {len(responses)}")
        if any(r.score is None and r.rank is None for r in responses):
            raise ValueError("a response has neither score nor rank")
        return responses

    def to_row(self) -> dict[str, Any]:
        """The JSON object."""
        return super().to_row() | {"responses": [r.model_dump(exclude_none=True) for r in self.responses]}


class Problem(PromptRow):
    """A prompt whose answer a program can check; `verifier` names the checker."""

    answer: str
    verifier: str

    def to_row(self) -> dict[str, Any]:
        """The JSON object."""
        return super().to_row() | {"answer": self.answer, "verifier": self.verifier}


class Labelled(Row):
    """A text and the categories that it belongs to.

    `labels` is a list, or says of each category whether it applies; null means that nobody looked. `judged` holds the
    categories that were looked at, None where all were: a report of one thing says nothing about the others.

    >>> Labelled.from_row({"text": "Shut up!", "labels": {"harassment": True, "hate": False}}).judged
    ('harassment', 'hate')
    """

    text: str
    labels: tuple[str, ...]
    judged: tuple[str, ...] | None = None
    meta: dict[str, Any] = {}

    @model_validator(mode="before")
    @classmethod
    def _from_mapping(cls, data: Any) -> Any:
        if not isinstance(data, Mapping) or not isinstance(data.get("labels"), Mapping):
            return data
        said = {name: value for name, value in data["labels"].items() if value is not None}
        if wrong := [value for value in said.values() if value not in (0, 1)]:
            raise ValueError(f"labels are true or false, not {wrong[0]!r}")
        return {**data, "labels": [name for name, value in said.items() if value], "judged": list(said)}

    @model_validator(mode="after")
    def _labels_are_judged(self) -> Self:
        if self.judged is not None and (unseen := [name for name in self.labels if name not in self.judged]):
            raise ValueError(f"labels has {unseen[0]!r}, and judged has not")
        return self
