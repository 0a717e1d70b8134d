"""/v1/chat/completions."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from nestling.core.runtime import fresh_name, fresh_seed
from nestling.serving.answering import Answer, Question, begin_all, choices
from nestling.serving.choosing import choose
from nestling.serving.errors import ApiError
from nestling.serving.models import Served
from nestling.serving.observing import Record
from nestling.serving.protocol.chat import FORM, ChatRequest, ChatWriter, Choice, usage
from nestling.serving.protocol.messages import to_messages
from nestling.serving.protocol.tools import lets_own, offer
from nestling.serving.sending import STREAMS, EventStream, all_or_first_error, answer_to, merge
from nestling.serving.settings import ServeSettings

router = APIRouter(tags=["chat"])


@router.post("/v1/chat/completions", responses=STREAMS)
async def create_chat_completion(request: Request, body: ChatRequest) -> Response:
    """Answer a conversation, whole or as a stream of chunks."""
    body.check()
    settings: ServeSettings = request.app.state.settings
    record: Record = request.state.record
    count = body.n or 1
    if count > settings.max_choices:
        raise ApiError(f"n: at most {settings.max_choices}", param="n", code="invalid_value")
    said = to_messages(body.messages)
    chosen = choose(request.app.state, body.model, said, tools=lets_own(body.tools, body.tool_choice))
    served, question = chosen.served, chosen.adapt(_question(chosen.served, settings, body))
    question = replace(question, guard=request.app.state.guard, key=record.key)
    answers = choices(served, question, count, whole=not body.stream)
    await begin_all(answers)
    record.model, record.prompt_tokens = served.name, len(answers[0].prompt)
    record.text = {"messages": [message.to_row() for message in question.messages]}
    writer = ChatWriter(
        f"chatcmpl-{fresh_name()}", int(time.time()), served.name, served.fingerprint, tokenizer=served.tokenizer,
        logprobs=bool(body.logprobs), include_usage=bool(body.stream_options and body.stream_options.include_usage),
    )  # fmt: skip
    if body.stream:
        return EventStream(_stream(writer, answers, record), stall_seconds=settings.stall_seconds)
    return await answer_to(request, _whole(writer, answers, record))


def _question(served: Served, settings: ServeSettings, body: ChatRequest) -> Question:
    constraint = body.response_format.constraint if body.response_format else None
    sampling = body.sampling(
        served.tokenizer.vocab_size, max_tokens=body.limit or served.context, constraint=constraint,
        top_logprobs=body.top_logprobs,
    )  # fmt: skip
    return Question(
        tuple(to_messages(body.messages, served.tokenizer)), sampling,
        seed=fresh_seed() if body.seed is None else body.seed, effort=body.reasoning_effort,
        offer=offer(body.tools, body.tool_choice, served.toolbox.names, body.parallel_tool_calls is not False),
        rounds=settings.tool_rounds, tool_seconds=settings.tool_seconds, opens_thought=settings.opens_thought,
        form=FORM if constraint else "",
    )  # fmt: skip


async def _whole(writer: ChatWriter, answers: Sequence[Answer], record: Record) -> Response:
    collected = [Choice(writer.id, index) for index in range(len(answers))]
    pairs = zip(collected, answers, strict=True)
    await all_or_first_error(_collect(choice, answer, record) for choice, answer in pairs)
    record.text |= {"replies": [choice.message for choice in collected]}
    return JSONResponse(writer.whole(collected, _usage(answers, record)))


async def _stream(
    writer: ChatWriter, answers: Sequence[Answer], record: Record
) -> AsyncGenerator[list[dict[str, Any]], None]:
    yield [writer.opening(index) for index in range(len(answers))]
    try:
        async with aclosing(merge([_told(writer, index, answer) for index, answer in enumerate(answers)])) as batches:
            async for chunks in batches:
                record.seen_token()
                yield chunks
    finally:
        total = _usage(answers, record)
    if writer.include_usage:
        yield [writer.usage_chunk(total)]


async def _told(writer: ChatWriter, index: int, answer: Answer) -> AsyncGenerator[list[dict[str, Any]], None]:
    """The chunks of one choice, the last one with the reason why it ended."""
    async with aclosing(answer.__aiter__()) as batches:
        async for deltas in batches:
            yield writer.chunks(index, deltas)
    yield [writer.chunk(index, {}, answer.finish)]


async def _collect(choice: Choice, answer: Answer, record: Record) -> None:
    async with aclosing(answer.__aiter__()) as batches:
        async for deltas in batches:
            record.seen_token()
            choice.add(deltas)
    choice.finish = answer.finish


def _usage(answers: Sequence[Answer], record: Record) -> dict[str, Any]:
    """Token counts of all choices; the record learns them too."""
    record.completion_tokens = sum(answer.completion_tokens for answer in answers)
    record.finish = answers[0].finish
    cached = min(answer.cached_tokens for answer in answers)  # choices share their prompt, which is counted once
    thought = sum(answer.thought_tokens for answer in answers)
    return usage(record.prompt_tokens, record.completion_tokens, cached=cached, thought=thought)
