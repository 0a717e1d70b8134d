"""/v1/completions: prompts continued as they are, without a conversation around them."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from nestling.core.runtime import fresh_name, fresh_seed, stream_seed
from nestling.generation.sampling import Sampling
from nestling.generation.sequence import Completion, Piece, TokenLog
from nestling.generation.sequence import Request as TextRequest
from nestling.serving.answering import too_long
from nestling.serving.driver import Stream
from nestling.serving.errors import ApiError
from nestling.serving.guarding import Guard, Watched
from nestling.serving.models import Models, Served
from nestling.serving.observing import Record
from nestling.serving.protocol.chat import usage
from nestling.serving.protocol.completions import DEFAULT_TOKENS, CompletionRequest, TextWriter
from nestling.serving.protocol.logprobs import TextLogprobs
from nestling.serving.reading import prompt_logprobs
from nestling.serving.sending import STREAMS, EventStream, all_or_first_error, answer_to, merge
from nestling.serving.settings import ServeSettings

router = APIRouter(tags=["completions"])
NOTHING = Completion([], [], [], "", "length")
Batches = AsyncGenerator[tuple["Text", list[Piece]], None]
"""What comes of texts."""


@dataclass
class Text:
    """One continuation: of which prompt, what it begins with, what is known of it when it is done."""

    index: int
    prompt: list[int]
    logprobs: TextLogprobs
    seed: int
    opening: str = ""
    """The prompt's text, where echo asks for it; its tokens are already in `logprobs`."""
    stream: Stream | None = None
    text: str = ""
    flagged: bool = False

    @property
    def done(self) -> Completion:
        """What the engine made of it; nothing yet, or of nothing to write, is a length."""
        return (self.stream.completion if self.stream else None) or NOTHING

    @property
    def finish(self) -> str:
        """Why it ended."""
        return "content_filter" if self.flagged else self.done.finish

    @property
    def score(self) -> float:
        """Mean log-probability: what best_of compares."""
        return sum(self.done.logprobs) / max(len(self.done.logprobs), 1)

    def add(self, pieces: Sequence[Piece]) -> str:
        """Take in what is new; its text."""
        for piece in pieces:
            for log in piece.tokens:
                self.logprobs.add(log.id, log.logprob, log.alternatives)
        new = "".join(piece.text for piece in pieces)
        self.text += new
        return new


@router.post("/v1/completions", responses=STREAMS)
async def create_completion(request: Request, body: CompletionRequest) -> Response:
    """Continue prompts, whole or as a stream of chunks."""
    body.check()
    models: Models = request.app.state.models
    settings: ServeSettings = request.app.state.settings
    served = models.get(body.model)
    prompts = body.prompts(served.tokenizer)
    count = max(body.n or 1, body.best_of or 1)
    if count * len(prompts) > settings.max_choices:
        what = f"n: at most {settings.max_choices} texts in one request, this is {count * len(prompts)}"
        raise ApiError(what, param="n", code="invalid_value")
    for ids in prompts:
        if len(ids) >= served.context:
            raise too_long(len(ids), served.context, "prompt")
    record: Record = request.state.record
    guard: Guard | None = request.app.state.guard
    if guard is not None:
        await guard.admit([served.tokenizer.decode(ids) for ids in prompts], record.key, "prompt")
    record.model, record.prompt_tokens = served.name, sum(map(len, prompts))
    record.text = {"prompt": body.prompt}
    writer = TextWriter(
        f"cmpl-{fresh_name()}", int(time.time()), served.name, served.fingerprint,
        logprobs=body.logprobs is not None,
        include_usage=bool(body.stream_options and body.stream_options.include_usage),
    )  # fmt: skip
    texts = await _begin(served, body, prompts, count)
    told = merge([_told(text, guard, record.key) for text in texts])
    if body.stream:
        return EventStream(_streamed(writer, texts, told, record), stall_seconds=settings.stall_seconds)
    return await answer_to(request, _whole(writer, texts, told, record, count, body.n or 1))


async def _begin(served: Served, body: CompletionRequest, prompts: list[list[int]], count: int) -> list[Text]:
    """Hand all texts to the engine, or none."""
    limit = DEFAULT_TOKENS if body.max_tokens is None else body.max_tokens
    sampling = body.sampling(served.tokenizer.vocab_size, max_tokens=limit or 1, top_logprobs=body.logprobs)
    seed = fresh_seed() if body.seed is None else body.seed
    texts: list[Text] = []
    begun = False
    try:
        for place, ids in enumerate(prompts):
            echoed = await _echo(served, ids, body) if body.echo else []
            texts += [_text(served, body, ids, echoed, place * count + n, seed) for n in range(count)]
        if limit:
            await all_or_first_error(_submit(served, text, sampling, whole=not body.stream) for text in texts)
        begun = True
    finally:
        if not begun:
            _close(texts)
    return texts


def _text(
    served: Served, body: CompletionRequest, ids: list[int], echoed: list[TokenLog], index: int, seed: int
) -> Text:
    logprobs = TextLogprobs(served.tokenizer, body.logprobs)
    for log in echoed:
        logprobs.add(log.id, log.logprob, log.alternatives)
    opening = served.tokenizer.decode([log.id for log in echoed], control=True)
    return Text(index, ids, logprobs, seed if index == 0 else stream_seed(seed, "choice", index), opening, text=opening)


async def _echo(served: Served, ids: list[int], body: CompletionRequest) -> list[TokenLog]:
    """The prompt's own tokens with their log-probabilities; the <|endoftext|> before a text is not part of it."""
    if len(ids) == 1:
        return [] if ids[0] == served.tokenizer.start_of_text else [TokenLog(ids[0], None)]  # type: ignore[arg-type]
    scored = await prompt_logprobs(served.driver, ids, body.logprobs or 0)
    given = body.prompt
    is_text = isinstance(given, str) or (isinstance(given, list) and isinstance(given[0], str))
    return scored if is_text else [TokenLog(ids[0], None), *scored]  # type: ignore[arg-type]


async def _submit(served: Served, text: Text, sampling: Sampling, *, whole: bool) -> None:
    text.stream = await served.driver.submit(TextRequest(text.prompt, sampling, text.seed), whole=whole)


def _close(texts: Sequence[Text]) -> None:
    for text in texts:
        if text.stream is not None:
            text.stream.close()


async def _pieces(text: Text) -> AsyncGenerator[list[Piece], None]:
    if text.stream is not None:
        try:
            async for pieces in text.stream:
                yield pieces
        finally:
            text.stream.close()


async def _told(text: Text, guard: Guard | None, key: str) -> Batches:
    """What may be told of one text; a last empty list when it is done."""
    watched = Watched(guard, _pieces(text), key)
    async with aclosing(watched.told()) as batches:
        async for pieces in batches:
            yield text, pieces
    text.flagged = bool(watched.flagged)
    yield text, []


async def _whole(
    writer: TextWriter, texts: Sequence[Text], told: Batches, record: Record, count: int, wanted: int
) -> Response:
    try:
        async with aclosing(told) as batches:
            async for text, pieces in batches:
                record.seen_token()
                text.add(pieces)
    finally:
        _close(texts)
    groups = [texts[start : start + count] for start in range(0, len(texts), count)]
    kept = [text for group in groups for text in sorted(group, key=lambda text: (text.flagged, -text.score))[:wanted]]
    kept = kept if wanted < count else list(texts)
    choices = [writer.choice(index, text.text, text.logprobs, text.finish) for index, text in enumerate(kept)]
    record.text |= {"replies": [text.text for text in kept]}
    return JSONResponse(writer.body(choices, _usage(texts, record)))


async def _streamed(
    writer: TextWriter, texts: Sequence[Text], told: Batches, record: Record
) -> AsyncGenerator[list[dict[str, Any]], None]:
    try:
        opening = [writer.chunk(text.index, text.opening, text.logprobs) for text in texts if text.opening]
        if opening:
            yield opening
        async with aclosing(told) as batches:
            async for text, pieces in batches:
                record.seen_token()
                new = text.add(pieces)
                yield [writer.chunk(text.index, new, text.logprobs, None if pieces else text.finish)]
    finally:
        _close(texts)
        total = _usage(texts, record)
    if writer.include_usage:
        yield [writer.body([], total)]


def _usage(texts: Sequence[Text], record: Record) -> dict[str, Any]:
    record.completion_tokens = sum(sum(text.done.sampled) for text in texts)
    record.finish = texts[0].finish
    cached: dict[int, int] = {}  # by prompt: its texts share it, and it is counted once
    for text in texts:
        cached[id(text.prompt)] = min(text.done.reused, cached.get(id(text.prompt), text.done.reused))
    return usage(record.prompt_tokens, record.completion_tokens, cached=sum(cached.values()))
