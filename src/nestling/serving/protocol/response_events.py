"""A response as it grows: deltas in, events out, the whole object at the end.

One item at a time is open: a thought ("reasoning"), a text ("message"), a call for the client ("function_call"), or a tool
that the service runs ("mcp_call", OpenAI's word for calls made on the server).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from nestling.generation.sequence import TokenLog
from nestling.serving.protocol.deltas import Delta
from nestling.serving.protocol.logprobs import chat_logprobs
from nestling.tokenizer.bpe import Tokenizer
from nestling.tokenizer.special import THINK_END, THINK_START

Event = tuple[str, dict[str, Any]]
PREFIXES = {"message": "msg", "reasoning": "rs", "function_call": "fc", "mcp_call": "mcp"}


@dataclass
class Composer:
    """Composes one response.

    Args:
        body: the response's own fields, sent with the first and the last event.
        logprobs: tell the log-probabilities of the text's tokens.
    """

    tokenizer: Tokenizer
    body: dict[str, Any]
    logprobs: bool = False
    output: list[dict[str, Any]] = field(default_factory=list)
    _number: int = 0
    _open: dict[str, Any] | None = None
    _tokens: list[TokenLog] = field(default_factory=list)

    def begin(self) -> list[Event]:
        """The events before anything is written."""
        told = {**self.body, "status": "in_progress", "output": []}
        return [self._event("response.created", response=told), self._event("response.in_progress", response=told)]

    def add(self, deltas: Iterable[Delta]) -> list[Event]:
        """The events of new deltas."""
        return [event for delta in deltas for event in self._add(delta)]

    def end(self, finish: str, usage: dict[str, Any]) -> list[Event]:
        """Close what is open; the last event carries the whole response, which is `body` from now on."""
        reason = {"length": "max_output_tokens", "content_filter": "content_filter"}.get(finish)
        status = "incomplete" if reason else "completed"
        events = self._close(status)
        self.body |= {"status": status, "output": self.output, "usage": usage}
        self.body["incomplete_details"] = {"reason": reason} if reason else None
        return [*events, self._event(f"response.{self.body['status']}", response=self.body)]

    def _add(self, delta: Delta) -> list[Event]:
        match delta.kind:
            case "text":
                return [*self._ensure("message"), *self._text(delta)]
            case "thought":
                return [*self._ensure("reasoning"), *self._thought(delta)]
            case "call":
                return self._start("function_call", call_id=self._id("call"), name=delta.name, arguments="")
            case "arguments":
                return self._arguments(delta)
            case "run":
                return self._run(delta)
            case "result":
                return self._result(delta)

    def _text(self, delta: Delta) -> list[Event]:
        part = self._item["content"][0]
        part["text"] += delta.text
        logprobs = chat_logprobs(self.tokenizer, delta.tokens) if self.logprobs else []
        part["logprobs"] += logprobs
        place = {"content_index": 0, "delta": delta.text, "logprobs": logprobs}
        return [self._event("response.output_text.delta", **self._place(), **place)]

    def _thought(self, delta: Delta) -> list[Event]:
        self._item["content"][0]["text"] += delta.text
        return [self._event("response.reasoning_text.delta", **self._place(), content_index=0, delta=delta.text)]

    def _arguments(self, delta: Delta) -> list[Event]:
        self._item["arguments"] += delta.text
        return [self._event("response.function_call_arguments.delta", **self._place(), delta=delta.text)]

    def _run(self, delta: Delta) -> list[Event]:
        call = {"name": delta.name, "arguments": delta.text, "output": None, "error": None}
        begun = self._start("mcp_call", server_label="nestling", **call)
        return [*begun, self._event("response.mcp_call.in_progress", **self._place())]

    def _result(self, delta: Delta) -> list[Event]:
        """Runs begin together, and their results come in the same order."""
        kinds = [item["type"] == "mcp_call" and item["output"] is None for item in self.output]
        place, self._open = kinds.index(True), None
        item = self.output[place]
        item |= {"output": delta.text, "status": "completed"}
        where = {"item_id": item["id"], "output_index": place}
        return [self._event("response.mcp_call.completed", **where),
                self._event("response.output_item.done", output_index=place, item=item)]  # fmt: skip

    @property
    def thought(self) -> str:
        """What was thought since a tool of the service last ran, marked as the renderer takes it."""
        last = max((place for place, item in enumerate(self.output) if item["type"] == "mcp_call"), default=-1)
        items = (item for item in self.output[last + 1 :] if item["type"] == "reasoning")
        return "".join(f"{THINK_START}{item['content'][0]['text']}{THINK_END}" for item in items)

    # ---- items ----

    def _ensure(self, kind: str) -> list[Event]:
        """Open an item of this kind unless it is open."""
        if self._open is not None and self._open["type"] == kind:
            return []
        if kind == "reasoning":
            return self._start(kind, summary=[], content=[{"type": "reasoning_text", "text": ""}])
        part: dict[str, Any] = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        events = self._start(kind, role="assistant", content=[])
        told = {"content_index": 0, "part": dict(part, logprobs=[])}
        opened = self._event("response.content_part.added", **self._place(), **told)
        self._item["content"].append(part)
        return [*events, opened]

    def _start(self, kind: str, **fields: Any) -> list[Event]:
        events = self._close()
        self._open = {"id": self._id(PREFIXES[kind]), "type": kind, "status": "in_progress", **fields}
        self.output.append(self._open)
        item = {**self._open, "content": []} if kind == "message" else dict(self._open)
        return [*events, self._event("response.output_item.added", output_index=len(self.output) - 1, item=item)]

    def _close(self, status: str = "completed") -> list[Event]:
        """Tell that the open item is done; a run is done when its result has come."""
        item = self._open
        if item is None or item["type"] == "mcp_call":
            return []
        events = []
        if item["type"] == "message":
            part = item["content"][0]
            told = {"content_index": 0, "text": part["text"], "logprobs": part["logprobs"]}
            events = [self._event("response.output_text.done", **self._place(), **told),
                      self._event("response.content_part.done", **self._place(), content_index=0, part=part)]  # fmt: skip
        elif item["type"] == "reasoning":
            text = item["content"][0]["text"]
            events = [self._event("response.reasoning_text.done", **self._place(), content_index=0, text=text)]
        elif item["type"] == "function_call":
            told = {"name": item["name"], "arguments": item["arguments"]}
            events = [self._event("response.function_call_arguments.done", **self._place(), **told)]
        item["status"] = status
        done = self._event("response.output_item.done", output_index=len(self.output) - 1, item=item)
        self._open = None
        return [*events, done]

    @property
    def _item(self) -> dict[str, Any]:
        assert self._open is not None
        return self._open

    def _place(self) -> dict[str, Any]:
        return {"item_id": self._item["id"], "output_index": len(self.output) - 1}

    def _id(self, prefix: str) -> str:
        return f"{prefix}_{self.body['id'].partition('_')[2]}_{len(self.output)}"

    def _event(self, kind: str, **fields: Any) -> Event:
        self._number += 1
        return kind, {"type": kind, "sequence_number": self._number - 1, **fields}
