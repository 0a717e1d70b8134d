"""One thread owns an engine; requests come from the event loop, pieces go back to it in order.

Whatever touches the engine is an order that its thread carries out between two steps: submit, cancel, any other work.
So a client that has gone is out of the batch before the next step computes, and the engine needs no lock.
"""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from collections.abc import AsyncIterator, Callable
from typing import Any, TypeVar

from nestling.core.errors import UserError
from nestling.core.native import release_threads
from nestling.generation.engine import Engine
from nestling.generation.sequence import Completion, Piece, Request, Running
from nestling.serving.errors import ApiError

T = TypeVar("T")


class Stream:
    """One request as the event loop sees it: lists of pieces as they come, then `completion`.

    Args:
        whole: nothing is handed over before the end; saves waking the event loop at every token.
    """

    def __init__(self, driver: Driver, *, whole: bool) -> None:
        self.whole = whole
        self.completion: Completion | None = None
        self.failure: ApiError | None = None
        self.running: Running | None = None
        self.begun = False
        """Whether anything was handed over; this and `running` belong to the engine's thread."""
        self._driver = driver
        self._pieces: list[Piece] = []
        self._reader: asyncio.Future[None] | None = None

    def __aiter__(self) -> AsyncIterator[list[Piece]]:
        return self

    async def __anext__(self) -> list[Piece]:
        """What has come since the last call, at least one piece.

        Raises:
            ApiError: the engine has stopped.
        """
        while not self._pieces:
            if self.failure is not None:
                raise self.failure
            if self.completion is not None:
                raise StopAsyncIteration
            self._reader = asyncio.get_running_loop().create_future()
            await self._reader
        taken, self._pieces = self._pieces, []
        return taken

    def put(self, pieces: list[Piece], completion: Completion | None = None, failure: ApiError | None = None) -> None:
        """Take in what the engine's thread has handed over; called in the event loop."""
        self._pieces += pieces
        self.completion, self.failure = completion, failure
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)

    def close(self) -> None:
        """Give the request up if it is not done; its rows are free before the next step computes."""
        if self.completion is None and self.failure is None:
            self._driver.cancel(self)


class Driver:
    """Runs an engine in a thread of its own.

    Args:
        engine: used by nobody else from `start` to `stop`.
        max_requests: texts waiting or being written; more are refused.
        flush_seconds: all streams together are handed new pieces this often, but each its first ones and its end at once.
            Fast models write a token in less time than it takes to send it.
    """

    def __init__(self, engine: Engine, *, max_requests: int = 512, flush_seconds: float = 0.0) -> None:
        self.engine, self.max_requests, self.flush_seconds = engine, max_requests, flush_seconds
        self.steps = 0
        self.failed = False
        self._next_flush = 0.0  # this and the next belong to the engine's thread
        self._beginning = False  # whether a stream waits for its first pieces
        self._orders: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._streams: dict[int, Stream] = {}  # by id(running); belongs to the engine's thread
        self._open = 0  # streams promised and not done; this and the next belong to the event loop
        self._answers: set[asyncio.Future[Any]] = set()
        self._stopping = threading.Event()
        self._deadline = float("inf")
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop  # from `start` on

    # ---- in the event loop ----

    @property
    def load(self) -> int:
        """Texts waiting or being written."""
        return self._open

    @property
    def ready(self) -> bool:
        """Whether requests are taken."""
        return self._thread is not None and not self.failed and not self._stopping.is_set()

    def start(self) -> None:
        """Begin to work for the running event loop."""
        self._loop = asyncio.get_running_loop()
        self._thread = threading.Thread(target=self._run, name="nestling-engine", daemon=True)
        self._thread.start()

    async def stop(self, seconds: float = 0.0) -> None:
        """Take nothing new, let what is open go on for so long, cancel the rest, end the thread."""
        if self._thread is None:
            return
        self._stopping.set()
        self._deadline = time.monotonic() + seconds
        self._orders.put(lambda: None)  # only wakes the thread
        await asyncio.to_thread(self._thread.join)

    async def submit(self, request: Request, *, whole: bool = False) -> Stream:
        """Queue a request.

        Raises:
            UserError: the engine refuses it.
            ApiError: too many requests are waiting, or the engine has stopped.
        """
        if self._open >= self.max_requests:
            raise ApiError("the model is overloaded; try again", status=503, code="overloaded",
                           headers={"retry-after": "1"})  # fmt: skip
        stream = Stream(self, whole=whole)
        self._open += 1
        try:
            await self.call(lambda engine: self._enter(engine, stream, request))
        except (UserError, ApiError):
            self._open -= 1
            raise
        except asyncio.CancelledError:
            self.cancel(stream)
            raise
        return stream

    async def call(self, work: Callable[[Engine], T]) -> T:
        """Do something with the engine between two steps.

        Raises:
            UserError: the work raised it.
            ApiError: the engine has stopped.
        """
        if not self.ready:
            raise _stopped()
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[T] = loop.create_future()

        def order() -> None:
            try:
                result = work(self.engine)
            except UserError as error:
                loop.call_soon_threadsafe(_settle, answer, None, error)
            else:
                loop.call_soon_threadsafe(_settle, answer, result, None)

        self._answers.add(answer)
        answer.add_done_callback(self._answers.discard)
        self._orders.put(order)
        return await answer

    def cancel(self, stream: Stream) -> None:
        """Order a stream's request to be given up."""
        self._orders.put(lambda: self._cancel(stream))

    # ---- in the engine's thread ----

    def _run(self) -> None:
        try:
            while not (self._stopping.is_set() and (not self.engine.busy or time.monotonic() > self._deadline)):
                self._carry_out_orders()
                if self.engine.busy:
                    done = self.engine.step()
                    self.steps += 1
                    if done or self._beginning or time.monotonic() >= self._next_flush:
                        self._hand_over()
        finally:
            self.failed = not self._stopping.is_set()
            self._abandon()

    def _carry_out_orders(self) -> None:
        """All orders that are there; with nothing else to do, wait for one and leave the cores to others."""
        if not self.engine.busy:
            if self._orders.empty():
                release_threads()
            self._orders.get()()
        while not self._orders.empty():
            self._orders.get()()

    def _enter(self, engine: Engine, stream: Stream, request: Request) -> None:
        stream.running = engine.submit(request, stream=True)
        self._streams[id(stream.running)] = stream
        self._beginning |= not stream.whole

    def _cancel(self, stream: Stream) -> None:
        if stream.running is not None:
            self.engine.cancel(stream.running)
        else:  # the engine had refused it, and nobody was left to hear that
            self._loop.call_soon_threadsafe(self._forget)

    def _forget(self) -> None:
        self._open -= 1

    def _hand_over(self) -> None:
        """Give what became readable to the event loop, in one call."""
        news: list[tuple[Stream, list[Piece], Completion | None]] = []
        is_due = (now := time.monotonic()) >= self._next_flush
        self._beginning = False
        for key, stream in list(self._streams.items()):
            running = stream.running
            assert running is not None
            if running.completion is not None:
                del self._streams[key]
            elif stream.whole or (stream.begun and not is_due):
                continue
            if (pieces := running.take_pieces()) or running.completion is not None:
                stream.begun = True
                news.append((stream, pieces, running.completion))
            self._beginning |= not stream.begun
        self._next_flush = now + self.flush_seconds if is_due else self._next_flush
        if news:
            self._loop.call_soon_threadsafe(self._deliver, news)

    def _deliver(self, news: list[tuple[Stream, list[Piece], Completion | None]]) -> None:
        for stream, pieces, completion in news:
            self._open -= completion is not None
            stream.put(pieces, completion)

    def _abandon(self) -> None:
        """The thread ends: whoever still waits is told."""
        left, self._streams = list(self._streams.values()), {}
        self._loop.call_soon_threadsafe(self._disappoint, left)

    def _disappoint(self, left: list[Stream]) -> None:
        for stream in left:
            stream.put([], failure=_stopped())
        for answer in list(self._answers):
            _settle(answer, None, _stopped())


def _settle(answer: asyncio.Future[Any], result: Any, error: UserError | ApiError | None) -> None:
    if answer.done():
        return
    if error is not None:
        answer.set_exception(error)
    else:
        answer.set_result(result)


def _stopped() -> ApiError:
    return ApiError("the model has stopped", status=503, code="model_stopped")
