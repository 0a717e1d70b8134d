"""Answers over time: server-sent events, and work that ends when its client has gone."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Coroutine, Iterable, Sequence
from contextlib import aclosing
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from nestling.serving.errors import REPORTED, answer_for

T = TypeVar("T")
DONE = "data: [DONE]\n\n"
STREAMS: dict[int | str, dict[str, Any]] = {200: {"content": {"text/event-stream": {}}}}
"""For the OpenAPI document of a path that can stream."""
CLIENT_GONE = 499  # nginx's word for it; nobody reads it


class ClientGone(Exception):
    """The client has closed its connection."""


class EventStream(Response):
    """A server-sent event stream of JSON objects; each list of the iterator is sent at once.

    Args:
        batches: lists of events, each an object (`data:`) or a pair of event name and object. Closed when the client goes.
        stall_seconds: a client that takes nothing for so long is cut off.
        done: end with `data: [DONE]`.
    """

    media_type = "text/event-stream"

    def __init__(
        self, batches: AsyncGenerator[Sequence[Any], None], *, stall_seconds: float = 60.0, done: bool = True
    ) -> None:
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._batches, self._stall, self._done = batches, stall_seconds, done

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send everything, or stop where the client has gone."""
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        try:
            await while_connected(receive, self._send_all(send))
        except (ClientGone, OSError, TimeoutError):
            return

    async def _send_all(self, send: Send) -> None:
        async with aclosing(self._batches) as batches:
            try:
                async for batch in batches:
                    await self._send(send, "".join(map(event, batch)))
            except REPORTED as error:
                await self._send(send, event(answer_for(error).body))
        await self._send(send, DONE if self._done else "", more=False)

    async def _send(self, send: Send, text: str, *, more: bool = True) -> None:
        """uvicorn makes `send` wait while the client's buffer is full; that is the back pressure."""
        async with asyncio.timeout(self._stall):
            await send({"type": "http.response.body", "body": text.encode(), "more_body": more})


def event(content: Any) -> str:
    """One server-sent event.

    >>> event({"a": 1})
    'data: {"a":1}\\n\\n'
    """
    name, told = content if isinstance(content, tuple) else ("", content)
    line = f"data: {json.dumps(told, ensure_ascii=False, separators=(',', ':'))}\n\n"
    return f"event: {name}\n{line}" if name else line


async def while_connected(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled when the client disconnects.

    Raises:
        ClientGone: it did.
    """
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone
        return task.result()
    finally:
        gone.cancel()
        task.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def answer_to(request: Request, work: Coroutine[Any, Any, Response]) -> Response:
    """The response of `work`, given up when the client disconnects."""
    try:
        return await while_connected(request.receive, work)
    except ClientGone:
        return Response(status_code=CLIENT_GONE)


async def all_or_first_error(works: Iterable[Coroutine[Any, Any, None]]) -> None:
    """Do all of it at once; where something fails the rest is finished too, so that all of it can be undone.

    Raises:
        Exception: the first one of them.
    """
    for failure in await asyncio.gather(*works, return_exceptions=True):
        if failure is not None:
            raise failure


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        continue


async def merge(sources: Sequence[AsyncGenerator[T, None]]) -> AsyncGenerator[T, None]:
    """What several iterators give, as it comes; closing this one closes them. Their first error is raised."""
    if len(sources) == 1:
        async with aclosing(sources[0]) as only:
            async for one in only:
                yield one
        return
    come: asyncio.Queue[T | asyncio.Task[None]] = asyncio.Queue()  # bounded by the context: texts are
    tasks = [asyncio.create_task(_pour(source, come)) for source in sources]
    for task in tasks:
        task.add_done_callback(come.put_nowait)
    try:
        left = len(tasks)
        while left:
            item = await come.get()
            if isinstance(item, asyncio.Task):
                item.result()
                left -= 1
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _pour(source: AsyncGenerator[T, None], into: asyncio.Queue[Any]) -> None:
    async with aclosing(source) as items:
        async for item in items:
            into.put_nowait(item)
