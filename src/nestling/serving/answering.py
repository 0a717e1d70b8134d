"""A question put to a model and its answer as it comes: rendered as in training, tools of the service run on the way.

The token sequence of an answer with tools is the one that `generation.chat.ToolLoop` makes and models are trained on.
Here each turn is a request of its own, so that a slow tool keeps nobody else waiting.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain
from typing import Any

from nestling.core.errors import UserError
from nestling.core.runtime import stream_seed
from nestling.core.types import Message, ToolCall
from nestling.generation.chat import MALFORMED
from nestling.generation.listening import Listener
from nestling.generation.sampling import Sampling
from nestling.generation.sequence import Completion, Request
from nestling.serving.driver import Stream
from nestling.serving.errors import ApiError
from nestling.serving.guarding import Guard, Watched, joined
from nestling.serving.models import Served
from nestling.serving.protocol.deltas import Delta, Reader
from nestling.serving.protocol.tools import Offer
from nestling.serving.sending import all_or_first_error
from nestling.tokenizer.bpe import Tokenizer
from nestling.tokenizer.conversation import between, opened_by, parse_reply, render
from nestling.tokenizer.special import CALL_END, CALL_START, THINK_END, THINK_START

EFFORTS = {"none": 0.0, "minimal": 0.0, "low": 1 / 8, "medium": 1 / 4, "high": 1 / 2, "xhigh": 3 / 4}
"""reasoning_effort -> the share of the room for a reply that may be thought; 0: the model may not think."""
NEVER = -100.0  # a logit bias
UNREADABLE = ToolCall(name="", arguments={})
"""Stands for a call that is no JSON with a name and arguments."""


@dataclass(frozen=True)
class Question:
    """One reply that is wanted.

    >>> Question((Message(role="user", content="Hi"),)).seed
    0
    """

    messages: tuple[Message, ...]
    sampling: Sampling = field(default_factory=Sampling)
    seed: int = 0
    offer: Offer = field(default_factory=Offer)
    effort: str | None = None
    """A key of EFFORTS; None leaves thinking to the model."""
    rounds: int = 4
    max_runs: int | None = None
    """Calls that the service runs, over all rounds; later ones are left out."""
    tool_seconds: float = 30.0
    opens_thought: bool = False
    guard: Guard | None = None
    """Judges what is asked, and the reply on its way."""
    key: str = ""
    """Who asks; for the guard."""
    said: str = "messages"
    form: str = ""
    """The client's names for the conversation and for what the text must be, where it is not `constraint`."""

    def prompt(self, served: Served) -> list[int]:
        """The ids that the model goes on from."""
        tokenizer = served.tokenizer
        if self.offer.functions and not tokenizer.takes_tools:
            what = "this model's chat template knows no tools; ask without them"
            raise ApiError(what, code="unsupported_parameter", param="tools")
        if self.opens and self.opens not in tokenizer.special:
            what = f"this model has no token {self.opens}, which this request needs at the beginning of the reply"
            raise ApiError(
                what, code="unsupported_parameter", param="tool_choice" if self.offer.forced else "reasoning"
            )
        ids = render(tokenizer, self.messages, self.offer.told(tokenizer, served.toolbox), prompt=True).ids
        return ids if self.opens in ("", opened_by(tokenizer, ids)) else [*ids, tokenizer.id(self.opens)]

    @property
    def opens(self) -> str:
        """The control token with which the service begins the assistant's turn for the model, if any."""
        if self.offer.forced:
            return CALL_START
        return THINK_START if self.opens_thought and EFFORTS.get(self.effort or "", 0) else ""


class Answer:
    """The answer to a question, as an asynchronous iterable of lists of deltas; then its figures are final.

    Args:
        whole: the deltas come together at the end (of each turn), which costs the service less.

    Raises:
        ApiError: the prompt does not fit into the context.
    """

    def __init__(self, served: Served, question: Question, *, whole: bool = False) -> None:
        if not served.tokenizer.takes_tools:  # those of the service are offered where they can be
            question = replace(question, offer=replace(question.offer, own=()))
        self.served, self.question, self.whole = served, question, whole
        self.prompt = question.prompt(served)
        if len(self.prompt) >= served.context:
            raise too_long(len(self.prompt), served.context, question.said)
        self.finish = "cancelled"
        """stop, length, tool_calls or content_filter once it has ended."""
        self.completion_tokens = self.thought_tokens = 0
        self.cached_tokens = 0
        """Of the prompt: those that the engine knew from other texts."""
        self.steps: list[Message] = []
        """Assistant turns with calls that the service ran, and their results."""
        self._stream: Stream | None = None  # of the turn that is being written
        self._ids = list(self.prompt)
        self._calls = self._runs = 0  # calls for the client, runs of the service: told so far, over all turns
        self.message = Message(role="assistant")
        """The last turn as the renderer takes it; `steps` are the turns before."""
        self._hidden = False  # whether the call that is being read is the service's own

    async def begin(self) -> None:
        """Hand the question to the engine; what is wrong with it is raised here, before anything is told.

        Raises:
            UserError: the engine refuses it.
            ApiError: the model is overloaded or has stopped.
        """
        try:
            self._stream = await self._submit(0)
        except UserError as error:
            place = "tools" if self.question.offer.forced else self.question.form
            if not place or not str(error.where).startswith("sampling.constraint"):
                raise
            raise ApiError.of(UserError(error.what, where=place, value=error.value, fix=error.fix)) from None

    def close(self) -> None:
        """Give the answer up if it is not done."""
        if self._stream is not None:
            self._stream.close()

    async def __aiter__(self) -> AsyncGenerator[list[Delta], None]:
        """Deltas as they come, judged where the question has a guard; raises as `begin`."""
        watched = Watched(self.question.guard, self._deltas(), self.question.key)
        async with aclosing(watched.told()) as batches:
            async for deltas in batches:
                yield deltas
        if watched.flagged:
            self.finish = "content_filter"

    async def _deltas(self) -> AsyncGenerator[list[Delta], None]:
        try:
            for turn in range(self.question.rounds + 1):
                if self._stream is None:
                    self._stream = await self._submit(turn)
                async for deltas in self._turn(self._stream, Reader(self._opened)):
                    yield deltas
                completion, self._stream = self._stream.completion, None
                assert completion is not None
                self.message = self._parsed(completion)
                calls = self._calls_to_run(completion) if turn < self.question.rounds else ()
                if not calls:
                    return
                numbered = list(enumerate(calls, start=self._runs))
                yield [Delta("run", _json(call.arguments), number, call.name) for number, call in numbered]
                results = await self._run_all(calls, completion)
                yield [Delta("result", text, number) for (number, _), text in zip(numbered, results, strict=True)]
                if self._room <= 0:
                    self.finish = "length"
                    return
        finally:
            self.close()

    @property
    def sent(self) -> list[str]:
        """All that the model is told and a client may have written: every turn, calls, definitions that it reads."""
        question = self.question
        shown = () if self.served.tokenizer.has_own_form else question.offer.functions
        turns = [(turn.content, *(_json(call.arguments) for call in turn.tool_calls)) for turn in question.messages]
        told = [*(function.model_dump_json(exclude_none=True) for function in shown), *joined(question.messages)]
        return [*told, *chain.from_iterable(turns)]

    @property
    def _room(self) -> int:
        """Tokens that may still be written."""
        return min(self.question.sampling.max_tokens - self.completion_tokens, self.served.context - len(self._ids))

    @property
    def _left(self) -> int | None:
        """Calls that the service may still run; None for any number."""
        return None if self.question.max_runs is None else self.question.max_runs - self._runs

    @property
    def _opened(self) -> str:
        """The control token that has begun the turn, the service's or the chat template's, if any."""
        return opened_by(self.served.tokenizer, self._ids)

    def _parsed(self, completion: Completion) -> Message:
        return parse_reply(self.served.tokenizer, completion.ids, self.question.offer.names, self._opened)

    async def _submit(self, turn: int) -> Stream:
        return await self.served.driver.submit(self._request(turn), whole=self.whole)

    async def _turn(self, stream: Stream, reader: Reader) -> AsyncGenerator[list[Delta], None]:
        """One assistant turn; its tokens are counted at its end."""
        listener = Listener(self.served.tokenizer, self.question.offer.names, self._opened)
        async for pieces in stream:
            if deltas := self._told(reader.read(listener.read(pieces))):
                yield deltas
        assert stream.completion is not None
        last = [*reader.read(listener.end()), *reader.end(self._closes_call(stream.completion))]
        if deltas := self._told(last):
            yield deltas
        self._count(stream.completion, reader)

    def _request(self, turn: int) -> Request:
        """The next turn: what is left of max_tokens, what must not be written, where it ends."""
        question, tokenizer, sampling = self.question, self.served.tokenizer, self.question.sampling
        left = self._room
        share = EFFORTS.get(question.effort or "")
        opened = self._opened
        calls = opened == CALL_START
        may_call = bool(question.offer.functions or (question.offer.own and self._left != 0))
        bias = forbidden(tokenizer, self._ids, calls=may_call, thoughts=share != 0)
        changes = {
            "max_tokens": left,
            "min_tokens": min(sampling.min_tokens, left),
            "logit_bias": sampling.logit_bias | bias,
            "constraint": question.offer.constraint if calls else sampling.constraint,
        }
        limit = ThoughtLimit(tokenizer, int(left * share), opened) if share and not changes["constraint"] else None
        one_call = CALL_END in tokenizer.special and (calls or not question.offer.parallel)
        stops = self.served.driver.engine.stop_ids | {tokenizer.id(CALL_END)} if one_call else None
        seed = stream_seed(question.seed, "turn", turn)
        return Request(list(self._ids), sampling.model_copy(update=changes), seed, interject=limit, stop_ids=stops)

    def _closes_call(self, completion: Completion) -> bool:
        """Whether the turn ended where its call does, with a stop token, which is not among the pieces."""
        one_call = bool(self.question.offer.forced) or completion.ids[-1:] == [
            self.served.tokenizer.special.get(CALL_END)
        ]
        return one_call and completion.finish == "stop"

    def _told(self, deltas: list[Delta]) -> list[Delta]:
        """Without the calls that the service runs, which are told with their results; the others numbered over all turns."""
        offer = self.question.offer
        told: list[Delta] = []
        for delta in deltas:
            if delta.kind == "call":
                self._hidden = delta.name in offer.own or (bool(offer.own) and not offer.functions)
                self._calls += not self._hidden
            if delta.kind not in ("call", "arguments"):
                told.append(delta)
            elif not self._hidden:
                told.append(replace(delta, index=self._calls - 1))
        return told

    def _count(self, completion: Completion, reader: Reader) -> None:
        self.completion_tokens += sum(completion.sampled)
        if not self.steps:  # later turns share what the first one has just computed
            self.cached_tokens = completion.reused
        self.thought_tokens += reader.thought_tokens
        self.finish = "tool_calls" if reader.calls and completion.finish == "stop" else completion.finish

    def _calls_to_run(self, completion: Completion) -> tuple[ToolCall, ...]:
        """The calls of a finished turn that the service answers: its own, and those that nobody can read (MALFORMED)."""
        offer, tokenizer = self.question.offer, self.served.tokenizer
        if not offer.own or not completion.ids or completion.ids[-1] not in tokenizer.turn_ends:
            return ()
        calls = self.message.tool_calls
        unread = completion.ids.count(tokenizer.special.get(CALL_START, -1)) - len(calls)
        theirs = {function.name for function in offer.functions}
        return () if any(call.name in theirs for call in calls) else (*calls, *[UNREADABLE] * unread)[: self._left]

    async def _run_all(self, calls: Sequence[ToolCall], completion: Completion) -> list[str]:
        """Run calls and put their results behind the turn."""
        results = list(await asyncio.gather(*[self._run(call) for call in calls]))
        answers = [Message(role="tool", content=text) for text in results]
        tokenizer, said = self.served.tokenizer, (*self.question.messages, *self.steps)
        tools = self.question.offer.told(tokenizer, self.served.toolbox)
        self._ids += [*completion.ids, *between(tokenizer, said, self.message, answers, tools)]
        self.steps += [self.message, *answers]
        self.message = Message(role="assistant")
        self._runs += len(calls)
        return results

    async def _run(self, call: ToolCall) -> str:
        if call is UNREADABLE:
            return MALFORMED
        if call.name not in self.question.offer.own:
            return f"error: no tool {call.name!r} on offer; there is {', '.join(self.question.offer.own)}"
        run = partial(self.served.toolbox.run, call.name, call.arguments)
        work = asyncio.get_running_loop().run_in_executor(self.served.workers, run)
        try:
            return await asyncio.wait_for(work, self.question.tool_seconds)
        except TimeoutError:
            return f"error: {call.name} took longer than {self.question.tool_seconds:g} s"


def _json(arguments: Mapping[str, Any]) -> str:
    return json.dumps(arguments, ensure_ascii=False)


def forbidden(tokenizer: Tokenizer, prompt: Sequence[int], *, calls: bool, thoughts: bool) -> dict[int, float]:
    """A bias against calls where nothing may be called, and against thoughts where none are wanted.

    A thought that the chat template has opened at the end of the prompt may end all the same.
    """
    may_end = thoughts or opened_by(tokenizer, prompt) == THINK_START
    names = [CALL_START] * (not calls) + [THINK_START] * (not thoughts) + [THINK_END] * (not may_end)
    return {tokenizer.special[name]: NEVER for name in names if name in tokenizer.special}


class ThoughtLimit:
    """As the `interject` of a request: closes a thought that has become longer than `budget` tokens."""

    def __init__(self, tokenizer: Tokenizer, budget: int, opened: str) -> None:
        self._start, self._end = tokenizer.special.get(THINK_START), tokenizer.special.get(THINK_END)
        self._budget = max(budget, 1)
        self._length = 0 if opened == THINK_START else -1  # -1: not thinking

    def __call__(self, ids: list[int]) -> list[int] | None:
        """Given all tokens after each sampled one."""
        last = ids[-1]
        if self._length < 0:
            self._length = 0 if last == self._start else -1
        elif last == self._end:
            self._length = -1
        else:
            self._length += 1
            if self._length >= self._budget and self._end is not None:
                self._length = -1
                return [self._end]
        return None


def choices(served: Served, question: Question, count: int, *, whole: bool) -> list[Answer]:
    """Several answers to one question, each with its own random stream; the first is the same whatever the count."""
    seeds = [question.seed if n == 0 else stream_seed(question.seed, "choice", n) for n in range(count)]
    return [Answer(served, replace(question, seed=seed), whole=whole) for seed in seeds]


async def begin_all(answers: Sequence[Answer]) -> None:
    """Begin all answers to a question, or none.

    Raises:
        UserError, ApiError: as `Answer.begin`; the question is flagged.
    """
    question = answers[0].question
    if question.guard is not None:
        await question.guard.admit(answers[0].sent, question.key, question.said)
    begun = False
    try:
        await all_or_first_error(answer.begin() for answer in answers)
        begun = True
    finally:
        if not begun:
            for answer in answers:
                answer.close()


def too_long(length: int, context: int, param: str = "messages") -> ApiError:
    """The error for a prompt of `length` tokens."""
    what = f"this model's context is {context} tokens, the prompt alone has {length}; shorten it"
    return ApiError(what, code="context_length_exceeded", param=param)
