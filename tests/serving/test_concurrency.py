"""Many clients at once, clients that vanish, a service that ends."""

from __future__ import annotations

import asyncio
import time

import httpx
import openai
import pytest
from waiting import until, wait_until

from nestling.generation.engine import Engine
from nestling.generation.sampling import Sampling
from nestling.generation.sequence import Request
from nestling.serving.driver import Driver
from nestling.serving.errors import ApiError

STREAMS = 64
LONG = {"max_tokens": 150, "logit_bias": {"300": 100}}  # one token again and again: a reply that does not end by itself


def prompts() -> list[str]:
    return [f"Count. {n}" if n % 3 else "Hello!" * (1 + n % 5) for n in range(STREAMS)]


async def stream(client: openai.AsyncOpenAI, prompt: str, **more) -> tuple[str, float]:
    """The text, and the seconds to its first part."""
    started, first, text = time.perf_counter(), 0.0, ""
    asked = {"model": "tiny", "messages": [{"role": "user", "content": prompt}], "temperature": 0, "stream": True}
    async for chunk in await client.chat.completions.create(**asked | more):
        if chunk.choices[0].delta.content:
            first = first or time.perf_counter() - started
            text += chunk.choices[0].delta.content
    return text, first


def test_64_streams_equal_one_after_the_other(service):
    """All complete, each with the text that it has alone, and nobody waits much longer than the others."""

    async def both() -> tuple[list, list]:
        async with openai.AsyncOpenAI(base_url=f"{service.url}/v1", api_key="none", max_retries=0) as client:
            together = await asyncio.gather(*[stream(client, prompt, max_tokens=24) for prompt in prompts()])
            alone = [await stream(client, prompt, max_tokens=24) for prompt in prompts()]
            return together, alone

    together, alone = asyncio.run(both())
    assert [text for text, _ in together] == [text for text, _ in alone]
    assert all(text for text, _ in together)
    assert wait_until(lambda: service.driver.load == 0)


@pytest.mark.parametrize("streamed", [True, False])
def test_clients_that_vanish_free_their_rows(serve, streamed):
    """Streamed or not, a client that closes its connection is out of the batch, and a later one gets the row."""
    service = serve(rows=1)
    body = {"model": "tiny", "messages": [{"role": "user", "content": "Count."}], "stream": streamed, "n": 12, **LONG}
    for _ in range(3):
        with httpx.Client(timeout=30) as client:
            if streamed:
                with client.stream("POST", f"{service.url}/v1/chat/completions", json=body) as answer:
                    next(answer.iter_lines())
            else:
                with pytest.raises(httpx.ReadTimeout):
                    client.post(f"{service.url}/v1/chat/completions", json=body, timeout=0.15)
        assert wait_until(lambda: service.driver.load == 0 and not service.driver.engine.busy)
    assert service.client().chat.completions.create(model="tiny", messages=body["messages"], temperature=0)


def test_too_many_are_refused(serve):
    """Beyond max_requests the answer is 503 with a time to come back, and nothing of the refused request stays."""
    service = serve(max_requests=3, rows=1)
    with pytest.raises(openai.InternalServerError) as caught:
        service.client().chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": "Hi"}], n=4, **LONG
        )
    assert (caught.value.status_code, caught.value.code) == (503, "overloaded")
    assert caught.value.response.headers["retry-after"] == "1"
    assert wait_until(lambda: service.driver.load == 0)
    assert service.driver.steps < 50  # of 150 that each of the other three would take


def test_a_service_ends_with_its_streams(make_app, serve):
    """Open streams go on for shutdown_seconds and are then told that the model has stopped."""
    service = serve(shutdown_seconds=0.2)

    async def cut_off() -> str:
        async with httpx.AsyncClient(timeout=30) as client:
            body = {"model": "tiny", "prompt": "one", "stream": True, **LONG, "max_tokens": 170}
            async with client.stream("POST", f"{service.url}/v1/completions", json=body) as answer:
                lines = answer.aiter_lines()
                await anext(lines)
                service.server.should_exit = True
                return [line async for line in lines if line][-1]

    last = asyncio.run(cut_off())
    assert last == "data: [DONE]" or "model has stopped" in last


# ---- the driver alone ----


@pytest.fixture
def driver(model, tokenizer) -> Driver:
    return Driver(Engine(model, tokenizer, rows=2), max_requests=4)


def endless(tokenizer, tokens: int = 150) -> Request:
    return Request(tokenizer.encode("one"), Sampling(temperature=0, logit_bias={300: 100}, max_tokens=tokens))


def test_pieces_come_in_order_and_whole(driver, tokenizer):
    """Joined they are the completion's text, handed over as they come or at the end."""

    async def texts() -> tuple[int, str, str, int]:
        driver.start()
        live = await driver.submit(endless(tokenizer, 30))
        batches = [pieces async for pieces in live]
        whole = await driver.submit(endless(tokenizer, 30), whole=True)
        count = len([pieces async for pieces in whole])
        await driver.stop()
        joined = "".join(piece.text for pieces in batches for piece in pieces)
        return len(batches), joined, live.completion.text, count

    batches, joined, text, count = asyncio.run(texts())
    assert batches > 1
    assert joined == text
    assert count == 1


def test_a_cancelled_stream_is_gone_within_a_step(driver, tokenizer):
    """After `close`, the engine takes at most one more step with it."""

    async def steps_after_close() -> tuple[int, bool]:
        driver.start()
        stream = await driver.submit(endless(tokenizer))
        await anext(stream)
        stream.close()
        before = driver.steps
        while stream.completion is None:
            await asyncio.sleep(0)
        after = driver.steps
        await driver.stop()
        return after - before, driver.engine.busy

    steps, busy = asyncio.run(steps_after_close())
    assert steps <= 2  # the one that was under way, and the one that took it out
    assert not busy


@pytest.mark.parametrize("prompt", ["one", "one " * 300], ids=["taken", "refused"])
def test_a_task_cancelled_while_it_submits_leaves_nothing(driver, tokenizer, prompt):
    """The order may already lie in the queue: it is undone, and not counted where the engine has refused it."""

    async def is_free_after() -> bool:
        driver.start()
        task = asyncio.create_task(driver.submit(Request(tokenizer.encode(prompt), endless(tokenizer).sampling)))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        free = await until(lambda: driver.load == 0)
        await driver.stop()
        return free

    assert asyncio.run(is_free_after())


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_broken_engine_tells_everybody(driver, tokenizer, monkeypatch):
    """Where the engine's thread dies, those who wait and those who come are told, and it is not ready any more."""

    def broken() -> None:
        raise MemoryError("no memory for this step")

    async def failures() -> list[str | None]:
        driver.start()
        stream = await driver.submit(endless(tokenizer))
        monkeypatch.setattr(driver.engine, "step", broken)
        told = []
        for work in (to_the_end(stream), driver.submit(endless(tokenizer))):
            with pytest.raises(ApiError) as caught:
                await work
            told.append(caught.value.code)
        await driver.stop()
        return told

    async def to_the_end(stream) -> None:
        async for _ in stream:
            pass

    assert asyncio.run(failures()) == ["model_stopped", "model_stopped"]
    assert not driver.ready


def test_a_paced_stream_is_told_in_fewer_parts(model, tokenizer):
    """The first piece and the end come at once, what lies between together; nothing is lost."""

    async def batches(seconds: float) -> list[str]:
        driver = Driver(Engine(model, tokenizer, rows=2), flush_seconds=seconds)
        driver.start()
        told = ["".join(piece.text for piece in pieces) async for pieces in await driver.submit(endless(tokenizer, 60))]
        await driver.stop()
        return told

    every, paced = asyncio.run(batches(0)), asyncio.run(batches(100))
    assert len(paced) <= 2 < len(every)
    assert "".join(paced) == "".join(every)
