"""/v1/responses: answers as lists of items, and conversations that go on by id."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from nestling.core.runtime import fresh_seed
from nestling.core.types import Message
from nestling.serving.answering import Answer, Question, begin_all
from nestling.serving.choosing import choose
from nestling.serving.errors import ApiError
from nestling.serving.models import Served
from nestling.serving.observing import Record
from nestling.serving.protocol.response_events import Composer, Event
from nestling.serving.protocol.responses import FORM, ResponsesRequest
from nestling.serving.protocol.tools import lets_own, offer
from nestling.serving.remembering import Kept, Memory
from nestling.serving.sending import STREAMS, EventStream, answer_to
from nestling.serving.settings import ServeSettings

router = APIRouter(tags=["responses"])
LOGPROBS = "message.output_text.logprobs"
"""The entry of `include` that asks for log-probabilities."""


@router.post("/v1/responses", responses=STREAMS)
async def create_response(request: Request, body: ResponsesRequest) -> Response:
    """Answer an input, whole or as a stream of events."""
    body.check()
    settings: ServeSettings = request.app.state.settings
    memory: Memory = request.app.state.memory
    record: Record = request.state.record
    before, own = await _before(body, memory, record.key), lets_own(body.nested_tools, body.nested_choice)
    chosen = choose(request.app.state, body.model, (*before, *body.messages()), tools=own)
    served, messages = chosen.served, (*before, *body.messages(chosen.served.tokenizer))
    question = chosen.adapt(_question(served, settings, body, messages))
    question = replace(question, guard=request.app.state.guard, key=record.key)
    answer = Answer(served, question, whole=not body.stream)
    await begin_all([answer])
    record.model, record.prompt_tokens = served.name, len(answer.prompt)
    record.text = {"messages": [message.to_row() for message in question.messages]}
    composer = Composer(served.tokenizer, _body(served, body, question), logprobs=LOGPROBS in (body.include or ()))
    reply = _Reply(answer, composer, record, messages, memory if body.store is not False else None)
    if body.stream:
        return EventStream(reply.events(), stall_seconds=settings.stall_seconds, done=False)
    return await answer_to(request, reply.whole())


@router.get("/v1/responses/{name}")
async def get_response(request: Request, name: str) -> dict[str, Any]:
    """A response that is still remembered."""
    return (await _remembered(request.app.state.memory, name, request.state.record.key)).body


@router.delete("/v1/responses/{name}")
async def delete_response(request: Request, name: str) -> dict[str, Any]:
    """Forget a response."""
    if not await request.app.state.memory.forget(name, request.state.record.key):
        raise _unknown(name)
    return {"id": name, "object": "response", "deleted": True}


class _Reply:
    """One answer on its way into a response; remembered when it is whole."""

    def __init__(
        self, answer: Answer, composer: Composer, record: Record, messages: tuple[Message, ...], memory: Memory | None
    ) -> None:
        self._answer, self._composer, self._record = answer, composer, record
        self._messages, self._memory = messages, memory

    async def whole(self) -> Response:
        """The response in one piece."""
        async with aclosing(self.events()) as batches:
            async for _ in batches:
                continue
        return JSONResponse(self._composer.body)

    async def events(self) -> AsyncGenerator[list[Event], None]:
        """The response as it grows."""
        yield self._composer.begin()
        try:
            async with aclosing(aiter(self._answer)) as batches:
                async for deltas in batches:
                    self._record.seen_token()
                    yield self._composer.add(deltas)
        finally:
            self._record.completion_tokens, self._record.finish = self._answer.completion_tokens, self._answer.finish
        last = self._composer.end(self._answer.finish, self._usage())
        await self._keep()
        yield last

    def _usage(self) -> dict[str, Any]:
        """Token counts."""
        read, written = self._record.prompt_tokens, self._answer.completion_tokens
        return {"input_tokens": read, "input_tokens_details": {"cached_tokens": self._answer.cached_tokens},
                "output_tokens": written, "output_tokens_details": {"reasoning_tokens": self._answer.thought_tokens},
                "total_tokens": read + written}  # fmt: skip

    async def _keep(self) -> None:
        """Remember the conversation, the reply as the model will be shown it included."""
        reply = self._answer.message
        self._record.text |= {"reply": reply.to_row()}
        if self._memory is not None:
            if reply.tool_calls:  # what comes of them belongs to the same turn, in which the thought still stands
                reply = Message(role="assistant", content=self._composer.thought + reply.content, tool_calls=reply.tool_calls)
            said = (*self._messages, *self._answer.steps, reply)
            await self._memory.keep(Kept(self._composer.body, said), self._record.key)


async def _remembered(memory: Memory, name: str, key: str, param: str | None = None) -> Kept:
    found = await memory.get(name, key)
    if found is None:
        raise _unknown(name, param)
    return found


def _unknown(name: str, param: str | None = None) -> ApiError:
    what = f"no response {name!r} is remembered here"
    return ApiError(what, status=404 if param is None else 400, code="response_not_found", param=param)


async def _before(body: ResponsesRequest, memory: Memory, key: str) -> tuple[Message, ...]:
    """What was said before what is said now."""
    previous = body.previous_response_id
    before = (await _remembered(memory, previous, key, "previous_response_id")).messages if previous else ()
    if not before and not body.messages():
        raise ApiError("input: there is nothing to answer", param="input", code="missing_required_parameter")
    return before


def _question(
    served: Served, settings: ServeSettings, body: ResponsesRequest, messages: tuple[Message, ...]
) -> Question:
    constraint = body.constraint_of_text
    sampling = body.sampling(
        served.tokenizer.vocab_size, max_tokens=body.max_output_tokens or served.context, constraint=constraint,
        top_logprobs=body.top_logprobs,
    )  # fmt: skip
    instructions = (Message(role="system", content=body.instructions),) if body.instructions else ()
    return Question(
        (*instructions, *messages), sampling, seed=fresh_seed() if body.seed is None else body.seed,
        offer=offer(body.nested_tools, body.nested_choice, served.toolbox.names, body.parallel_tool_calls is not False),
        effort=body.reasoning.effort if body.reasoning else None,
        rounds=settings.tool_rounds, max_runs=body.max_tool_calls, tool_seconds=settings.tool_seconds,
        opens_thought=settings.opens_thought, said="input", form=FORM if constraint else "",
    )  # fmt: skip


def _body(served: Served, body: ResponsesRequest, question: Question) -> dict[str, Any]:
    """The response's own fields; the request's come back as they were understood."""
    asked = body.model_dump(mode="json", by_alias=True, exclude_none=True, exclude_unset=True)
    text = asked.get("text", {})
    return {
        "id": f"resp_{secrets.token_hex(16)}", "object": "response", "created_at": int(time.time()),
        "status": "in_progress", "error": None, "incomplete_details": None, "model": served.name, "output": [],
        "instructions": body.instructions, "max_output_tokens": body.max_output_tokens,
        "max_tool_calls": body.max_tool_calls,
        "metadata": body.metadata or {}, "parallel_tool_calls": question.offer.parallel,
        "previous_response_id": body.previous_response_id, "reasoning": {"effort": question.effort, "summary": None},
        "store": body.store is not False, "temperature": question.sampling.temperature, "text": text
        | {"format": text.get("format", {"type": "text"})}, "tool_choice": asked.get("tool_choice", "auto"),
        "tools": asked.get("tools", []), "top_p": question.sampling.top_p, "truncation": "disabled", "usage": None,
        "top_logprobs": question.sampling.top_logprobs,
    }  # fmt: skip
