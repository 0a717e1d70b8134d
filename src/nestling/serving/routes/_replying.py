"""A reply on the page: from the path of a conversation to a stored message, told as events on the way."""

from __future__ import annotations

import asyncio
import secrets
import time
from bisect import bisect_left
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import Any

from fastapi import Request
from pydantic import Field

from nestling.core.errors import UserError
from nestling.core.types import Message
from nestling.generation.sampling import Sampling
from nestling.serving.answering import Answer, Question, begin_all
from nestling.serving.choosing import choose
from nestling.serving.errors import ApiError
from nestling.serving.guarding import Guard
from nestling.serving.models import Models, Served
from nestling.serving.observing import Record
from nestling.serving.protocol.chat import Effort
from nestling.serving.protocol.decoding import Decoding
from nestling.serving.protocol.deltas import Delta
from nestling.serving.protocol.logprobs import LOWEST, spelled
from nestling.serving.protocol.messages import Wire
from nestling.serving.protocol.tools import Offer
from nestling.serving.rendering import Progressive, to_html
from nestling.serving.sending import EventStream
from nestling.serving.settings import ServeSettings
from nestling.serving.store.records import MessageRecord, ModelVersion, TokenRecord, Verdict, Written
from nestling.serving.store.store import Store
from nestling.tokenizer.bpe import Tokenizer

Keep = Callable[[Written], MessageRecord]
"""Puts a reply into the store; called in a thread."""
DEFAULTS: dict[str, Any] = {"temperature": 0.7, "top_p": 0.9, "top_logprobs": 5}
"""What a conversation samples with unless it says otherwise."""
SEED_BITS = 53
"""Of a seed that is drawn: as many as a number in JavaScript holds exactly, so that the one the page tells is the one."""
ROOM = 4
"""One part in so many of the context is kept free for the reply; older messages are forgotten for it."""


class PageSampling(Decoding):
    """The sampling panel: the parameters of decoding, the longest reply, how many alternatives the token view keeps."""

    max_tokens: int | None = Field(None, ge=1)
    top_logprobs: int | None = Field(None, ge=0, le=20)


class ReplyRequest(Wire):
    """Who answers which message, and how; what is not said is taken from the conversation."""

    parent: str | None = None
    model: str | None = None
    sampling: PageSampling = PageSampling()
    tools: list[str] | None = None
    reasoning_effort: Effort | None = None


@dataclass(frozen=True)
class Wish:
    """What is to be answered, by whom and how."""

    served: Served
    system: str
    path: tuple[MessageRecord, ...]
    """From the start to the user's message that is to be answered."""
    given: dict[str, Any]
    """What was said of sampling, without the seed."""
    question: Question
    """All but the messages, which `answer` fills in."""

    def answer(self) -> tuple[Answer, int]:
        """The answer, and how many messages at the start were left out so that it has room.

        Raises:
            ApiError: the last message alone is longer than the context.
        """
        starts = [place for place, message in enumerate(self.path) if message.role == "user"]
        context = self.served.context
        room = context - min(self.question.sampling.max_tokens, context // ROOM)
        # The later a prompt begins, the shorter it is: a long conversation is rendered a few times, not once per message.
        fits = bisect_left(starts, True, key=lambda start: len(self._asked(start).prompt(self.served)) <= room)
        start = starts[min(fits, len(starts) - 1)]
        return Answer(self.served, self._asked(start)), start

    def _asked(self, start: int) -> Question:
        return replace(self.question, messages=self._messages(start))

    def _messages(self, start: int) -> tuple[Message, ...]:
        system = (Message(role="system", content=self.system),) if self.system else ()
        return (*system, *(message for record in self.path[start:] for message in record.messages()))


async def wish_for(request: Request, store: Store, id: str, body: ReplyRequest) -> Wish:
    """Work out what a request wants answered in a conversation.

    Raises:
        Missing: no such conversation, or no such message in it.
        ApiError, UserError: no such model or tool, nothing to answer, parameters that make no sense.
    """
    conversation = await asyncio.to_thread(store.conversations.get, id)
    path = await asyncio.to_thread(store.conversations.path, id, body.parent or conversation.tip)
    if body.parent is None and path and path[-1].role == "assistant":
        path.pop()  # the reply that is looked at is written again
    if not path or path[-1].role != "user":
        raise UserError("there is no message of the user's to answer", where="parent", fix="ask something first")
    models: Models = request.app.state.models
    name = body.model or conversation.model or models.default.name
    said = [message for record in path for message in record.messages()]
    tools = conversation.tools if body.tools is None else body.tools
    chosen = choose(request.app.state, name, said, tools=bool(tools))
    panel = _panel(conversation.sampling, body.sampling)
    settings: ServeSettings = request.app.state.settings
    question = Question(
        (), _sampling(chosen.served, panel), seed=secrets.randbits(SEED_BITS) if panel.seed is None else panel.seed,
        offer=_offer(chosen.served, tools),
        effort=body.reasoning_effort, rounds=settings.tool_rounds, tool_seconds=settings.tool_seconds,
        opens_thought=settings.opens_thought,
    )  # fmt: skip
    given = panel.model_dump(exclude_none=True, exclude={"seed"})
    return Wish(chosen.served, conversation.system, tuple(path), given, chosen.adapt(question))


def _panel(*said: Mapping[str, Any] | PageSampling) -> PageSampling:
    """The sampling panel where later words count more."""
    merged = dict(DEFAULTS)
    for one in said:
        merged |= one.model_dump(exclude_none=True) if isinstance(one, PageSampling) else one
    return PageSampling.model_validate(merged)


def _sampling(served: Served, panel: PageSampling) -> Sampling:
    most = panel.max_tokens or served.context
    return panel.sampling(served.tokenizer.vocab_size, max_tokens=most, top_logprobs=panel.top_logprobs)


def _offer(served: Served, names: Sequence[str]) -> Offer:
    here = served.toolbox.names
    if unknown := [name for name in names if name not in here]:
        there = f"there is {', '.join(here)}" if here else "it has none"
        raise ApiError(f"this service has no tool {unknown[0]!r}; {there}", param="tools", code="invalid_value")
    return Offer(own=tuple(names))


@dataclass(frozen=True)
class Begun:
    """A wish that its model is working on."""

    wish: Wish
    answer: Answer
    forgotten: int
    """Messages at the start that had no room."""
    verdicts: list[Verdict] = field(default_factory=list)
    """What the moderation model says of the reply while it is written."""


async def begin(request: Request, store: Store, wish: Wish) -> Begun:
    """Hand a wish to its model; what is wrong with it is raised here, before anything is told.

    Raises:
        UserError, ApiError: as `Answer` and `begin_all`.
    """
    verdicts: list[Verdict] = []
    guard: Guard | None = request.app.state.guard
    if guard is not None:
        said_in = {message.content: message for message in wish.path}

        def keep(key: str, said: Verdict) -> None:
            if said.direction == "output":
                verdicts.append(said)
            else:
                store.moderation.add([_about(said, said_in.get(said.text or "", wish.path[-1]))])

        wish = replace(wish, question=replace(wish.question, guard=guard.keeping(keep)))
    answer, forgotten = await asyncio.to_thread(wish.answer)
    await begin_all([answer])
    record: Record = request.state.record
    record.route, record.model, record.prompt_tokens = "page", wish.served.name, len(answer.prompt)
    record.text = {"messages": [message.to_row() for message in answer.question.messages]}
    return Begun(wish, answer, forgotten, verdicts)


def tell(request: Request, store: Store, begun: Begun, keep: Keep, *, blind: bool = False) -> EventStream:
    """The response that tells a reply and stores it with what the moderation model said of it."""

    def keep_all(written: Written) -> MessageRecord:
        message = keep(written)
        store.moderation.add([_about(said, message) for said in begun.verdicts[-1:]])  # the one on the whole text
        return message

    telling = Telling(begun, keep_all, request.state.record, request.app.state.progressive, blind=blind)
    return EventStream(telling.events(), stall_seconds=request.app.state.settings.stall_seconds)


def _about(verdict: Verdict, message: MessageRecord) -> Verdict:
    """The verdict as one on a message, with the text only where one was withheld."""
    text = verdict.text if verdict.flagged and verdict.text != message.content else None
    return verdict.model_copy(update={"message": message.id, "text": text})


class Telling:
    """One reply while it is told; what has been written is stored however it ends.

    Args:
        progressive: renders the reply while it grows.
        blind: who answers is not told.
    """

    def __init__(self, begun: Begun, keep: Keep, record: Record, progressive: Progressive, *, blind: bool) -> None:
        self._wish, self._answer, self._forgotten = begun.wish, begun.answer, begun.forgotten
        self._keep, self._record, self._blind = keep, record, blind
        self._text, self._thought = "", ""
        self._progressive = progressive
        self._tokens: list[TokenRecord] = []
        self._started = time.perf_counter()
        self._first: float | None = None

    async def events(self) -> AsyncGenerator[list[dict[str, Any]], None]:
        """Events as they come, the stored message last."""
        model = None if self._blind else self._wish.served.name
        parent = self._wish.path[-1].id
        yield [{"type": "start", "parent": parent, "model": model, "forgotten": self._forgotten}]
        message: MessageRecord | None = None
        try:
            async with aclosing(self._answer.__aiter__()) as batches:
                async for deltas in batches:
                    self._note_first()
                    events = [self._event(delta) for delta in deltas]
                    yield events
                    has_text = any(event["type"] == "text" for event in events)
                    if has_text and (html := await asyncio.to_thread(self._progressive.offer, self._text)):
                        yield [{"type": "html", "html": html}]
        finally:
            self._tell_record()
            if self._text or self._thought or self._answer.steps or self._answer.finish != "cancelled":
                message = await asyncio.to_thread(self._keep, self._written())
        assert message is not None
        html = await asyncio.to_thread(to_html, message.content)
        yield [{"type": "done", "message": message.model_dump(mode="json"), "html": html}]

    def _note_first(self) -> None:
        self._record.seen_token()
        if self._first is None:
            self._first = time.perf_counter() - self._started

    def _event(self, delta: Delta) -> dict[str, Any]:
        match delta.kind:
            case "thought":
                self._thought += delta.text
                return {"type": "thinking", "text": delta.text}
            case "run":
                self._text = ""  # what came before stands in the steps
                return {"type": "call", "name": delta.name, "arguments": delta.text}
            case "result":
                return {"type": "result", "text": delta.text}
        tokens = token_records(self._answer.served.tokenizer, delta)
        self._text += delta.text
        self._tokens += tokens
        return {"type": "text", "text": delta.text, "tokens": [token.model_dump() for token in tokens]}

    def _written(self) -> Written:
        answer, question, served = self._answer, self._answer.question, self._wish.served
        return Written(
            version=version_of(served),
            content=self._text,
            thinking=self._thought,
            steps=[message.to_row() for message in answer.steps],
            system=self._wish.system,
            tools=list(question.offer.own),
            sampling=self._wish.given,
            seed=question.seed,
            prompt_tokens=len(answer.prompt),
            completion_tokens=self._count(),
            finish=answer.finish,
            seconds=time.perf_counter() - self._started,
            first_token_seconds=self._first,
            tokens=self._tokens,
            forgotten=self._forgotten,
        )

    def _count(self) -> int:
        """Tokens written; of a reply that was cut off, those that were told."""
        return max(self._answer.completion_tokens, len(self._tokens))

    def _tell_record(self) -> None:
        record, answer = self._record, self._answer
        record.completion_tokens, record.finish = self._count(), answer.finish
        record.text |= {"reply": self._text}


def token_records(tokenizer: Tokenizer, delta: Delta) -> list[TokenRecord]:
    """The tokens of a delta for the token view."""

    def record(token: int, logprob: float) -> TokenRecord:
        return TokenRecord(text=spelled(tokenizer, token), logprob=max(logprob, LOWEST))

    return [
        record(log.id, log.logprob).model_copy(update={"top": [record(*other) for other in log.alternatives]})
        for log in delta.tokens
    ]


def version_of(served: Served) -> ModelVersion:
    """Which model answers under a name now."""
    return ModelVersion(name=served.name, checkpoint=served.fingerprint, provenance=dict(served.provenance))
