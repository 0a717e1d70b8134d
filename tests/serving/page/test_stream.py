"""What the page is told while a reply is written, beside what tests/serving/store/test_store_routes.py checks."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
from starlette.testclient import TestClient

from nestling.serving.rendering import to_html
from nestling.serving.store.store import Store


@pytest.fixture
def client(make_app, tmp_path) -> Iterator[TestClient]:
    store = Store.open(tmp_path / "store.db")
    app, _ = make_app(store=store, tools={"calculator": {}})
    with TestClient(app, base_url="http://localhost") as client:
        yield client
    store.close()


def reply(client: TestClient, question: str, **given) -> list[dict]:
    """The events of a reply to a question in a new conversation."""
    body = {"model": "tiny", "sampling": {"temperature": 0}, **given}
    id = client.post("/api/conversations", json=body).json()["id"]
    client.post(f"/api/conversations/{id}/messages", json={"content": question})
    lines = client.post(f"/api/conversations/{id}/reply", json={}).text.split("\n\n")
    told = [line.removeprefix("data: ") for line in lines if line]
    assert told.pop() == "[DONE]"
    return [json.loads(line) for line in told]


def test_html_is_of_the_text_that_was_told_before_it(client):
    events = reply(client, "Count.")
    text, seen = "", 0
    for event in events:
        if event["type"] == "text":
            text += event["text"]
        elif event["type"] == "html":
            assert event["html"] == to_html(text)
            seen += 1
    assert seen > 0
    assert events[-1]["type"] == "done"
    assert events[-1]["html"] == to_html(events[-1]["message"]["content"])


def test_after_a_tool_the_html_begins_anew(client):
    events = reply(client, "What is 2 + 3?", tools=["calculator"])
    kinds = [event["type"] for event in events]
    assert events[-1]["message"]["content"] == "It is 5."
    later = [event["html"] for event in events[kinds.index("result") :] if event["type"] == "html"]
    assert later
    assert all(to_html("It is 5.").startswith(html.removesuffix("</p>\n")) for html in later)


def test_the_seed_that_is_told_is_the_one(client):
    """JavaScript reads it as a double; asked for again, it gives the same words."""
    warm = {"temperature": 1.5, "max_tokens": 20}
    first = reply(client, "Hello!", sampling=warm)[-1]["message"]
    seed = first["reply"]["seed"]
    assert int(float(seed)) == seed < 2**53
    again = reply(client, "Hello!", sampling={**warm, "seed": seed})[-1]["message"]
    assert again["content"] == first["content"]


def test_models_tell_their_tools(client):
    [tiny] = client.get("/v1/models").json()["data"]
    assert tiny["tools"] == ["calculator"]


def test_as_little_as_possible_is_forgotten(client):
    """The first message that is read is the earliest with which the prompt leaves room for the reply (the toy's context is 192)."""
    id = client.post(
        "/api/conversations", json={"model": "tiny", "sampling": {"temperature": 0, "max_tokens": 8}}
    ).json()["id"]
    said: list[dict[str, str]] = []
    for turn in range(12):
        client.post(f"/api/conversations/{id}/messages", json={"content": f"Count. {turn}"})
        told = client.post(f"/api/conversations/{id}/reply", json={}).text
        start, done = (
            json.loads(line.removeprefix("data: ")) for line in (told.split("\n\n")[0], told.split("\n\n")[-3])
        )
        said.append({"role": "user", "content": f"Count. {turn}"})

        def length(first: int) -> int:
            return client.post("/tokenize", json={"messages": said[first:]}).json()["count"]

        fits = [first for first in range(0, len(said), 2) if length(first) <= 192 - 8]
        assert start["forgotten"] == fits[0]
        said.append({"role": "assistant", "content": done["message"]["content"]})
    assert start["forgotten"] > 0
