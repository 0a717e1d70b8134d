"""From the pieces of a reply to what a client is told: text, thoughts, calls and their arguments as they grow.

The streamed and the whole reply are made of the same deltas, so they cannot differ.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Literal

from nestling.generation.sequence import Piece, TokenLog
from nestling.tokenizer.conversation import parse_call
from nestling.tokenizer.special import CALL_END, CALL_START, THINK_END, THINK_START, TURN_END

HEAD = re.compile(r'\s*\{\s*"name":\s*("(?:[^"\\]|\\.)*"),\s*"arguments":\s*(?=\{)')
"""What stands before the arguments of a call as models are taught to write it."""


@dataclass(frozen=True, slots=True)
class Delta:
    """Something new in a reply.

    text, thought   `text` was written, of `tokens`
    call            a call for the client, number `index`, of the function `name`, begins
    arguments       `text` is the next part of the JSON of call `index`
    run             the service runs its own tool `name` with the JSON `text`, as run number `index`
    result          what came out of run `index`
    """

    kind: Literal["text", "thought", "call", "arguments", "run", "result"]
    text: str = ""
    index: int = 0
    name: str = ""
    tokens: tuple[TokenLog, ...] = ()


JOINED = ("text", "thought", "arguments")


class Reader:
    """Reads the pieces of one assistant turn, by the rules of `tokenizer.conversation.parse_reply`.

    The arguments of a call are told as they come when its JSON begins as it does in training; otherwise the call is
    told when it is whole. What turns out not to be a call is text, unless its arguments were already being told: then,
    as with OpenAI's models, they may be no valid JSON.

    Args:
        opened: the control token with which the prompt has already begun the turn, if any.
    """

    def __init__(self, opened: str = "") -> None:
        self.calls = 0
        self.thought_tokens = 0
        self._within = opened
        # of an open call: without and with control tokens in it, as the parser reads it
        self._held = self._spelled = ""
        self._object: _Object | None = None  # of the call whose arguments are being told
        self._ended = False

    def read(self, pieces: Iterable[Piece]) -> list[Delta]:
        """What these pieces say, neighbours of one kind joined."""
        return _joined(delta for piece in pieces if not self._ended for delta in self._read(piece))

    def end(self, closed: bool = False) -> list[Delta]:
        """What was held back when the turn ended: the beginning of something that never became a call.

        Args:
            closed: the turn ended with the </tool_call> of the open call.
        """
        deltas: list[Delta] = []
        if self._within == CALL_START and closed:
            deltas += self._close_call()
        elif self._within == CALL_START and self._object is None:
            deltas.append(Delta("text", CALL_START + self._spelled))
        elif self._within == CALL_START:
            self.calls += 1  # never closed, but already told
        self._within, self._ended = "", True
        return deltas

    def _read(self, piece: Piece) -> Iterator[Delta]:
        if self._within == THINK_START:
            self.thought_tokens += len(piece.tokens)
        if piece.control:
            yield from self._control(piece)
        elif self._within == THINK_START:
            yield Delta("thought", piece.text, tokens=piece.tokens)
        elif self._within == CALL_START:
            yield from self._call_text(piece.text)
        else:
            yield Delta("text", piece.text, tokens=piece.tokens)

    def _control(self, piece: Piece) -> Iterator[Delta]:
        """Control tokens open and close; one that does neither is spelled, but for a </think> that ends no thought."""
        name = piece.text
        if name == TURN_END:
            yield from self.end()
        elif name in (CALL_START, THINK_START) and not self._within:
            self._within, self._held, self._spelled, self._object = name, "", "", None
        elif (self._within, name) == (CALL_START, CALL_END):
            yield from self._close_call()
        elif name == THINK_END and self._within != CALL_START:
            self._within = ""
        elif self._within == CALL_START:
            self._spelled += name
        else:
            kind: Literal["text", "thought"] = "thought" if self._within else "text"
            yield Delta(kind, name, tokens=piece.tokens)

    def _call_text(self, text: str) -> Iterator[Delta]:
        self._held += text
        self._spelled += text
        if self._object is None and (head := HEAD.match(self._held)):
            self._object = _Object()
            text = self._held[head.end() :]
            yield Delta("call", index=self.calls, name=json.loads(head.group(1), strict=False))
        if self._object is not None and (told := self._object.take(text)):
            yield Delta("arguments", told, self.calls)

    def _close_call(self) -> Iterator[Delta]:
        self._within = ""
        call = parse_call(self._held) if self._object is None else None
        if self._object is None and call is None:
            yield Delta("text", CALL_START + self._spelled + CALL_END)
            return
        if call is not None:
            yield Delta("call", index=self.calls, name=call.name)
            yield Delta("arguments", json.dumps(call.arguments, ensure_ascii=False), self.calls)
        self.calls += 1


class _Object:
    """Finds the end of a JSON object that comes in parts."""

    def __init__(self) -> None:
        self._depth = 0
        self._in_string = self._escaped = self._closed = False

    def take(self, text: str) -> str:
        """The part of `text` that still belongs to the object."""
        if self._closed:
            return ""
        for place, character in enumerate(text):
            self._see(character)
            if self._depth == 0:
                self._closed = True
                return text[: place + 1]
        return text

    def _see(self, character: str) -> None:
        if self._in_string:
            self._in_string = self._escaped or character != '"'
            self._escaped = character == "\\" and not self._escaped
        elif character == '"':
            self._in_string = True
        else:
            self._depth += (character in "{[") - (character in "}]")


def _joined(deltas: Iterable[Delta]) -> list[Delta]:
    """Neighbours of one kind (and call) as one."""
    joined: list[Delta] = []
    for delta in deltas:
        last = joined[-1] if joined else None
        if last and delta.kind in JOINED and (last.kind, last.index) == (delta.kind, delta.index):
            joined[-1] = replace(last, text=last.text + delta.text, tokens=last.tokens + delta.tokens)
        else:
            joined.append(delta)
    return joined
