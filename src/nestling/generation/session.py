"""One conversation with a model: its history, its parameters, streaming, asking again."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from nestling.core import registry
from nestling.core.config import parse
from nestling.core.errors import UserError
from nestling.core.runtime import stream_seed
from nestling.core.storage import write_rows
from nestling.core.types import Conversation, Message
from nestling.generation.chat import Run, ToolLoop, ask, prompt_ids
from nestling.generation.engine import Engine
from nestling.generation.listening import Listener
from nestling.generation.sampling import Sampling
from nestling.generation.sequence import Piece, Running
from nestling.tokenizer.conversation import opened_by
from nestling.tokenizer.special import CALL_END, CALL_START, THINK_END, THINK_START
from nestling.tools import run as run_plainly

CHAT_SAMPLING = Sampling(temperature=0.7, top_p=0.9, max_tokens=256)


@dataclass(frozen=True)
class Event:
    """Something to show. `text` comes in pieces; a `thought`, a `call` (its JSON) and a `result` come whole."""

    kind: Literal["text", "thought", "call", "result"]
    text: str


class ChatSession:
    """A conversation held with an engine.

    Args:
        engine: may be shared with other sessions.
        system: the system message; empty for none.
        tools: names of the tools on offer.
        run: answers their calls; a `Toolbox`'s own, for tools with settings.
        sampling: decoding parameters, changeable by `set`.
        seed: drives every reply; the same seed and the same words give the same conversation.

    Raises:
        UserError: there is no such tool.
    """

    def __init__(
        self, engine: Engine, *, system: str = "", tools: Sequence[str] = (), run: Run = run_plainly,
        sampling: Sampling = CHAT_SAMPLING, seed: int = 0,
    ) -> None:  # fmt: skip
        if run is run_plainly:
            for name in tools:
                registry.find("tools", name)
        self._run = run
        self.engine, self.tools, self.sampling, self.seed = engine, tuple(tools), sampling, seed
        self.system = system
        self.history: list[Message] = []
        self.forgotten = 0
        """Messages at the beginning that no longer fit into the context of the last reply."""
        self._replies = 0

    @property
    def messages(self) -> list[Message]:
        """The whole conversation, system message included."""
        return [*([Message(role="system", content=self.system)] if self.system else []), *self.history]

    def say(self, text: str) -> Generator[Event, None, None]:
        """Add a user turn and stream the reply. Closing the iterator early keeps what was written so far.

        Raises:
            UserError: the turn alone is longer than the context; the history is left as it was.
        """
        self.history.append(Message(role="user", content=text))
        try:
            prompt = self._fitting()
        except UserError:
            self.history.pop()
            raise
        return self._answer(prompt)

    def regenerate(self) -> Generator[Event, None, None]:
        """Forget the last reply and answer the last user turn again, with fresh randomness.

        Raises:
            UserError: there is no user turn yet.
        """
        asked = [place for place, message in enumerate(self.history) if message.role == "user"]
        if not asked:
            raise UserError("there is nothing to answer again", fix="say something first")
        del self.history[asked[-1] + 1 :]
        return self._answer(self._fitting())

    def reset(self) -> None:
        """Forget the conversation; system message, tools and parameters stay."""
        self.history.clear()
        self.forgotten = 0

    def set(self, name: str, value: Any) -> None:
        """Change one field of `sampling`.

        Raises:
            UserError: no such field, or a value it cannot have.
        """
        if name in ("stop", "options") and isinstance(value, str):
            raise UserError("this parameter is not a number", where=name, value=value, fix="set it in code")
        self.sampling = parse(Sampling, {**self.sampling.model_dump(), name: value}, "params")

    def save(self, path: str | Path) -> None:
        """Write the conversation as one row of a conversations file (JSONL)."""
        if not self.history:
            raise UserError("there is no conversation to save", fix="say something first")
        write_rows(Path(path), [Conversation(messages=tuple(self.messages), tools=self.tools).to_row()])

    def _answer(self, prompt: list[Message]) -> Generator[Event, None, None]:
        self._replies += 1
        loop = ToolLoop(self.engine.tokenizer, self.tools, run=self._run)
        seed = stream_seed(self.seed, "chat", self._replies)
        request = ask(self.engine.tokenizer, prompt, self.sampling, seed, loop)
        running = self.engine.submit(request, stream=True)
        try:
            opened = opened_by(self.engine.tokenizer, request.ids)
            listener = Listener(self.engine.tokenizer, self.tools if loop.tools else (), opened)
            yield from _events(listener.listen(self.engine.pieces(running)), loop, opened)
        finally:
            self._keep(running, loop)

    def _keep(self, running: Running, loop: ToolLoop) -> None:
        """Add what was written to the history; an interrupted reply is cancelled first."""
        self.engine.cancel(running)
        if running.completion is None:
            self.engine.step()
        assert running.completion is not None
        self.history += loop.reply(running.completion, self.sampling).messages

    def _fitting(self) -> list[Message]:
        """The conversation, without its oldest turns where they would leave no room for a reply."""
        room = self.engine.capacity - min(self.sampling.max_tokens, self.engine.capacity // 4)
        starts = [place for place, message in enumerate(self.history) if message.role == "user"]
        system = [Message(role="system", content=self.system)] if self.system else []
        for start in starts:
            prompt = [*system, *self.history[start:]]
            length = len(prompt_ids(self.engine.tokenizer, prompt, self.tools))
            if length <= room or (start == starts[-1] and length < self.engine.capacity):
                self.forgotten = start
                return prompt
        raise UserError(
            "the message is longer than the context", value=length,
            fix=f"use fewer than {self.engine.capacity} tokens, system message included",
        )  # fmt: skip


def _events(pieces: Iterator[Piece], loop: ToolLoop, inside: str) -> Generator[Event, None, None]:
    """What a person reads out of a stream of pieces: control tokens and forced text become events.

    Args:
        inside: the control token with which the prompt has already begun the reply, if any.
    """
    collected = ""
    shown = 0
    for piece in pieces:
        if not piece.sampled:
            results = [message.content for message in loop.messages if message.role == "tool"]
            yield from (Event("result", text) for text in results[shown:])
            shown = len(results)
        if piece.control and piece.text in (CALL_START, THINK_START):
            inside, collected = piece.text, ""
        elif piece.control and inside:
            if piece.text in (CALL_END, THINK_END):
                yield Event("call" if inside == CALL_START else "thought", collected)
            inside = ""
        elif inside:
            collected += piece.text
        elif piece.sampled and not piece.control:
            yield Event("text", piece.text)
    if inside == THINK_START and collected.strip():  # it was cut
        yield Event("thought", collected)
