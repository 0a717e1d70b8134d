"""/v1/chat/completions: the request, and the chunks or the whole reply that deltas become."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from nestling.generation.sequence import TokenLog
from nestling.serving.errors import ApiError, lacking, unsupported
from nestling.serving.protocol.decoding import Decoding
from nestling.serving.protocol.deltas import Delta
from nestling.serving.protocol.logprobs import chat_logprobs
from nestling.serving.protocol.messages import Messages
from nestling.serving.protocol.tools import Tool, ToolChoice
from nestling.tokenizer.bpe import Tokenizer

Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh"]
Form = Literal["text", "json_object", "json_schema"]
FORM = "response_format.json_schema.schema"
"""Where a request says what the text must be."""


class JsonSchema(BaseModel):
    """The schema of response_format."""

    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None


class ResponseFormat(BaseModel):
    """What the text must be."""

    type: Form
    json_schema: JsonSchema | None = None

    @property
    def constraint(self) -> dict[str, Any] | None:
        """As the engine takes it."""
        return constraint_of(self.type, self.json_schema.schema_ if self.json_schema else None, FORM)


def constraint_of(form: Form, schema: dict[str, Any] | None, param: str) -> dict[str, Any] | None:
    """What text of a form must be, as the engine takes it.

    Raises:
        ApiError: the form is of a JSON schema, and there is none.
    """
    if form == "json_schema" and schema is None:
        raise lacking(param)
    return {"text": None, "json_object": {"json_object": True}, "json_schema": {"json_schema": schema}}[form]


class StreamOptions(BaseModel):
    """What a stream tells beside the text."""

    model_config = ConfigDict(extra="ignore")

    include_usage: bool | None = None


class TalkRequest(Decoding):
    """What requests of chat and of responses share. Fields under "has no effect" are accepted: common clients send them."""

    model: str
    stream: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    parallel_tool_calls: bool | None = None
    store: bool | None = None
    metadata: dict[str, str] | None = None
    # has no effect
    user: str | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None


class ChatRequest(TalkRequest):
    """Create a chat completion."""

    messages: Messages
    stream_options: StreamOptions | None = None
    n: int | None = Field(None, ge=1, le=128)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    response_format: ResponseFormat | None = None
    tools: list[Tool] | None = None
    tool_choice: ToolChoice | None = None
    reasoning_effort: Effort | None = None
    # has no effect
    verbosity: str | None = None
    prediction: dict[str, Any] | None = None
    # refused
    modalities: list[str] | None = None
    audio: dict[str, Any] | None = None
    web_search_options: dict[str, Any] | None = None
    functions: list[Any] | None = None
    function_call: Any = None

    def check(self) -> None:
        """Refuse what would be silently wrong.

        Raises:
            ApiError: sound, the functions of before tools, alternatives without logprobs.
        """
        if self.audio is not None or set(self.modalities or ()) - {"text"}:
            raise unsupported("modalities" if self.audio is None else "audio", "this model writes text only")
        if self.functions is not None or self.function_call is not None:
            raise unsupported("function_call" if self.functions is None else "functions", "use tools and tool_choice")
        if self.web_search_options is not None:
            raise unsupported("web_search_options", "give the search tool, if the service has it")
        if self.top_logprobs is not None and not self.logprobs:
            raise ApiError("top_logprobs: needs logprobs: true", param="top_logprobs", code="invalid_value")

    @property
    def limit(self) -> int | None:
        """Most tokens to write."""
        return self.max_completion_tokens or self.max_tokens


@dataclass
class Writer:
    """Writes the JSON of one reply: every chunk of it carries the same head."""

    id: str
    created: int
    model: str
    fingerprint: str
    logprobs: bool = False
    include_usage: bool = False

    def _head(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model,
                "system_fingerprint": self.fingerprint, "choices": choices}  # fmt: skip


@dataclass
class ChatWriter(Writer):
    """Writes the JSON of a chat completion."""

    tokenizer: Tokenizer = field(kw_only=True)

    def chunk(
        self, index: int, delta: dict[str, Any], finish: str | None = None, logprobs: Any = None
    ) -> dict[str, Any]:
        """One chunk of a stream."""
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
        return self._head("chat.completion.chunk", [choice]) | ({"usage": None} if self.include_usage else {})

    def opening(self, index: int) -> dict[str, Any]:
        """The first chunk of a choice."""
        return self.chunk(index, {"role": "assistant", "content": "", "refusal": None})

    def chunks(self, index: int, deltas: Iterable[Delta]) -> list[dict[str, Any]]:
        """What deltas become."""
        return [self.chunk(index, self._delta(index, delta), logprobs=self._logprobs(delta)) for delta in deltas]

    def usage_chunk(self, usage: dict[str, Any]) -> dict[str, Any]:
        """The last chunk, where usage was asked for."""
        return self._head("chat.completion.chunk", []) | {"usage": usage}

    def whole(self, choices: Sequence[Choice], usage: dict[str, Any]) -> dict[str, Any]:
        """The reply in one piece."""
        told = [
            {"index": index, "message": choice.message, "finish_reason": choice.finish,
             "logprobs": self._all_logprobs(choice.tokens) if self.logprobs else None}
            for index, choice in enumerate(choices)
        ]  # fmt: skip
        return self._head("chat.completion", told) | {"usage": usage}

    def _delta(self, index: int, delta: Delta) -> dict[str, Any]:
        match delta.kind:
            case "text":
                return {"content": delta.text}
            case "thought":
                return {"reasoning_content": delta.text}
            case "call":
                function = {"name": delta.name, "arguments": ""}
                return {"tool_calls": [{"index": delta.index, "id": call_id(self.id, index, delta.index), "type": "function",
                                        "function": function}]}  # fmt: skip
            case "arguments":
                return {"tool_calls": [{"index": delta.index, "function": {"arguments": delta.text}}]}
            case "run":
                return {"tool_runs": [{"index": delta.index, "name": delta.name, "arguments": delta.text}]}
            case "result":
                return {"tool_runs": [{"index": delta.index, "content": delta.text}]}

    def _logprobs(self, delta: Delta) -> dict[str, Any] | None:
        return self._all_logprobs(delta.tokens) if self.logprobs and delta.kind == "text" else None

    def _all_logprobs(self, tokens: Sequence[TokenLog]) -> dict[str, Any]:
        return {"content": chat_logprobs(self.tokenizer, tokens), "refusal": None}


@dataclass
class Choice:
    """One reply, collected from its deltas."""

    reply: str
    """Id of the reply, of which those of its calls are made."""
    index: int = 0
    finish: str = ""
    text: str = ""
    thought: str = ""
    tokens: list[TokenLog] = field(default_factory=list)
    calls: list[dict[str, Any]] = field(default_factory=list)
    runs: list[dict[str, Any]] = field(default_factory=list)
    """What the service ran by itself; beyond OpenAI's, as is reasoning_content."""

    def add(self, deltas: Iterable[Delta]) -> None:
        """Take in what is new."""
        for delta in deltas:
            match delta.kind:
                case "text":
                    self.text += delta.text
                    self.tokens += delta.tokens
                case "thought":
                    self.thought += delta.text
                case "call":
                    name = call_id(self.reply, self.index, delta.index)
                    function = {"name": delta.name, "arguments": ""}
                    self.calls.append({"id": name, "type": "function", "function": function})
                case "arguments":
                    self.calls[delta.index]["function"]["arguments"] += delta.text
                case "run":
                    self.runs.append({"name": delta.name, "arguments": delta.text, "content": None})
                case "result":
                    self.runs[delta.index]["content"] = delta.text

    @property
    def message(self) -> dict[str, Any]:
        """The assistant's message; content is null where there are only calls for the client."""
        told: dict[str, Any] = {"role": "assistant", "content": self.text, "refusal": None}
        if self.thought:
            told["reasoning_content"] = self.thought
        if self.calls:
            told |= {"tool_calls": self.calls, "content": self.text or None}
        if self.runs:
            told["tool_runs"] = self.runs
        return told


def call_id(reply: str, choice: int, index: int) -> str:
    """The id of a call.

    >>> call_id("chatcmpl-12ab", 0, 1)
    'call_12ab_0_1'
    """
    return f"call_{reply.rpartition('-')[2]}_{choice}_{index}"


def usage(prompt: int, written: int, *, cached: int = 0, thought: int = 0) -> dict[str, Any]:
    """Token counts of a chat reply or completion; `cached` tokens of the prompt did not have to be computed."""
    return {"prompt_tokens": prompt, "completion_tokens": written, "total_tokens": prompt + written,
            "prompt_tokens_details": {"cached_tokens": cached},
            "completion_tokens_details": {"reasoning_tokens": thought}}  # fmt: skip
