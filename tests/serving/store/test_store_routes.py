"""The JSON API of the page, over a real app with toy models and a real store."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fastapi import FastAPI
from pydantic import SecretStr
from sqlalchemy.exc import IntegrityError
from starlette.testclient import TestClient
from waiting import until

from nestling.generation.engine import Engine
from nestling.model.config import DecoderConfig
from nestling.model.decoder import build
from nestling.serving.app import create_app
from nestling.serving.driver import Driver
from nestling.serving.errors import answer_for
from nestling.serving.models import Models, Served
from nestling.serving.moderation import Verdict
from nestling.serving.settings import Key, ServeSettings
from nestling.serving.store.store import Store
from nestling.tokenizer.bpe import Tokenizer
from nestling.tokenizer.special import CHAT
from nestling.tools import Toolbox

Client = TestClient
GREEDY = {"temperature": 0, "max_tokens": 8}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    texts = ["the cat sat on the mat and the dog sat on the log", "12 + 3 = 15"] * 3
    return Tokenizer.train(texts, vocab_size=300).with_special(CHAT)


def served(name: str, tokenizer: Tokenizer, seed: int, context: int = 128) -> Served:
    """A model of random weights, large enough for clear opinions."""
    model = build(DecoderConfig(vocab_size=tokenizer.vocab_size, context=context, d_model=16, n_layers=1, n_heads=2))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 2:
                weight.copy_(torch.randn(weight.shape, generator=generator) * 0.3)
    engine = Engine(model.eval(), tokenizer, rows=8)
    return Served(name, Driver(engine), tokenizer, {"seed": seed}, toolbox=Toolbox({"calculator": {}}))


def app_of(
    tokenizer: Tokenizer, store: Store | None, context: int = 128, moderator: Any = None, **settings: Any
) -> FastAPI:
    models = Models([served(name, tokenizer, seed, context) for seed, name in enumerate(("small", "large"))])
    return create_app(ServeSettings(**settings), models, store, moderator=moderator)


@pytest.fixture
def kept(tmp_path: Path) -> Iterator[Store]:
    store = Store.open(tmp_path / "store.db")
    yield store
    store.close()


@pytest.fixture
def client(tokenizer: Tokenizer, kept: Store) -> Iterator[Client]:
    with TestClient(app_of(tokenizer, kept), base_url="http://localhost") as client:
        yield client


def events(response: Any) -> list[dict[str, Any]]:
    """The events of a stream that ended as it should."""
    assert response.status_code == 200, response.text
    lines = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    assert lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]


def begun(client: Client, **given: Any) -> tuple[str, str]:
    """A conversation with one question: (conversation id, message id)."""
    id = client.post("/api/conversations", json={"model": "small", "sampling": GREEDY, **given}).json()["id"]
    return id, client.post(f"/api/conversations/{id}/messages", json={"content": "the cat"}).json()["id"]


def test_a_reply_is_told_and_kept(client):
    id, asked = begun(client, system="Be brief.")
    told = events(client.post(f"/api/conversations/{id}/reply", json={}))
    assert told[0] == {"type": "start", "parent": asked, "model": "small", "forgotten": 0}
    message = told[-1]["message"]
    assert message["content"] == "".join(event["text"] for event in told if event["type"] == "text")
    assert (message["role"], message["parent"], message["blind"]) == ("assistant", asked, False)
    reply = message["reply"]
    assert (reply["model"], reply["system"], reply["sampling"]["temperature"]) == ("small", "Be brief.", 0)
    assert reply["checkpoint"].startswith("fp_")
    assert reply["finish"] in ("stop", "length")
    assert 0 < reply["completion_tokens"] <= 8
    assert 0 < reply["first_token_seconds"] <= reply["seconds"]
    whole = client.get(f"/api/conversations/{id}").json()
    assert whole["messages"][-1] == message
    assert (whole["tip"], whole["title"]) == (message["id"], "the cat")
    tokens = client.get(f"/api/messages/{message['id']}/tokens").json()["data"]
    assert tokens == [token for event in told if event["type"] == "text" for token in event["tokens"]]
    assert all(len(token["top"]) == 5 and token["top"][0]["logprob"] >= token["logprob"] for token in tokens)


def test_it_is_what_the_chat_endpoint_says(client):
    """The same messages, parameters and seed give the same words on the page and through /v1."""
    id, _ = begun(client, system="Be brief.", sampling={"temperature": 1, "top_p": 1, "max_tokens": 8, "seed": 5})
    page = events(client.post(f"/api/conversations/{id}/reply", json={}))[-1]["message"]["content"]
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "the cat"}]
    body = {"model": "small", "messages": messages, "temperature": 1, "max_tokens": 8, "seed": 5, "tool_choice": "none"}
    assert client.post("/v1/chat/completions", json=body).json()["choices"][0]["message"]["content"] == page


def test_regenerating_makes_variants_and_editing_makes_branches(client):
    id, asked = begun(client)
    first, second = [events(client.post(f"/api/conversations/{id}/reply", json={}))[-1]["message"] for _ in range(2)]
    assert first["parent"] == second["parent"] == asked
    assert first["content"] == second["content"]  # greedy
    edited = client.post(f"/api/conversations/{id}/messages", json={"content": "the dog", "parent": None}).json()
    assert edited["parent"] is None
    told = events(client.post(f"/api/conversations/{id}/reply", json={"parent": edited["id"], "model": "large"}))
    assert told[-1]["message"]["reply"]["model"] == "large"
    follow = client.post(f"/api/conversations/{id}/messages", json={"content": "and?"}).json()
    assert follow["parent"] == told[-1]["message"]["id"]
    again = client.post(f"/api/conversations/{id}/messages", json={"content": "and then?"}).json()
    assert again["parent"] == follow["parent"]


def test_old_turns_are_forgotten_when_the_context_is_full(client):
    id, _ = begun(client)
    for _ in range(6):
        told = events(client.post(f"/api/conversations/{id}/reply", json={}))
        client.post(f"/api/conversations/{id}/messages", json={"content": "the cat sat on the mat and the dog"})
    assert told[0]["forgotten"] > 0
    assert told[-1]["message"]["reply"]["forgotten"] == told[0]["forgotten"]
    stored = client.get(f"/api/conversations/{id}").json()["messages"]
    assert [one["reply"]["forgotten"] for one in stored if one["reply"]][-1] == told[0]["forgotten"]
    client.post(f"/api/conversations/{id}/messages", json={"content": "12 " * 200})
    response = client.post(f"/api/conversations/{id}/reply", json={})
    assert response.status_code == 400
    assert "context" in response.json()["error"]["message"]


def test_a_blind_comparison_from_question_to_table(client):
    id, _ = begun(client)
    body = {"candidates": [{"model": "small", "sampling": GREEDY}, {"model": "large", "sampling": GREEDY}]}
    comparison = client.post(f"/api/conversations/{id}/comparisons", json=body).json()
    assert comparison["identities"] is None
    assert "small" not in json.dumps(comparison)
    assert client.put(f"/api/comparisons/{comparison['id']}/vote", json={"choice": "a"}).status_code == 409
    for side in ("a", "b"):
        told = events(client.post(f"/api/comparisons/{comparison['id']}/reply/{side}"))
        assert told[0]["model"] is None
        message = told[-1]["message"]
        assert message["blind"]
        assert message["reply"] is None
        assert not {"small", "large"} & set(json.dumps(told).split('"'))
    assert client.post(f"/api/comparisons/{comparison['id']}/reply/a").status_code == 409
    decided = client.put(f"/api/comparisons/{comparison['id']}/vote", json={"choice": "b", "comment": "longer"}).json()
    assert sorted(who["model"] for who in decided["identities"].values()) == ["large", "small"]
    assert client.put(f"/api/comparisons/{comparison['id']}/vote", json={"choice": "a"}).status_code == 409
    assert client.get(f"/api/comparisons/{comparison['id']}").json() == decided
    table = client.get("/api/arena").json()
    assert [row["model"] for row in table["data"]] == [decided["identities"][side]["model"] for side in ("b", "a")]
    assert table["data"][0]["low"] < table["data"][0]["rating"] < table["data"][0]["high"]


def test_all_feedback_goes_in_and_out(client):
    id, asked = begun(client)
    replies = [events(client.post(f"/api/conversations/{id}/reply", json={}))[-1]["message"]["id"] for _ in range(3)]
    vote = {"value": -1, "reason": "wrong", "comment": "no cat"}
    assert client.put(f"/api/messages/{replies[0]}/vote", json=vote).json() == vote
    flag = client.post(f"/api/messages/{asked}/flags", json={"category": "spam"}).json()
    assert client.get("/api/flags").json()["data"] == [flag]
    order = [[replies[2]], replies[:2]]
    assert client.post(f"/api/conversations/{id}/rankings", json={"order": order}).status_code == 201
    pair = client.post(f"/api/conversations/{id}/comparisons", json={"replies": replies[:2]})
    assert pair.status_code == 201
    whole = client.get(f"/api/conversations/{id}").json()
    assert whole["messages"][1]["vote"] == vote
    assert whole["messages"][0]["flagged"]
    assert (len(whole["rankings"]), len(whole["comparisons"])) == (1, 1)
    stats = client.get("/api/feedback/stats").json()
    assert {name: count for name, count in stats.items() if count} == {
        "conversations": 1, "messages": 4, "replies": 3, "down": 1, "flags": 1, "comparisons": 1, "rankings": 1,
    }  # fmt: skip
    assert client.delete(f"/api/messages/{replies[0]}/vote").status_code == 204
    assert client.delete(f"/api/flags/{flag['id']}").status_code == 204
    assert client.delete(f"/api/conversations/{id}").status_code == 204
    assert not any(client.get("/api/feedback/stats").json().values())


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "param"),
    [
        ("GET", "/api/conversations/none", None, 404, None),
        ("PUT", "/api/messages/none/vote", {"value": 1}, 404, None),
        ("PUT", "/api/messages/none/vote", {"value": 2}, 400, "value"),
        ("POST", "/api/messages/none/flags", {"category": ""}, 400, "category"),
        ("DELETE", "/api/flags/none", None, 404, None),
        ("GET", "/api/conversations?limit=0", None, 400, "limit"),
        ("GET", "/api/conversations?after=x", None, 400, "after"),
        ("POST", "/api/conversations", {"titel": "x"}, 400, "titel"),
        ("POST", "/api/conversations", {"sampling": {"temperature": 9}}, 400, "sampling.temperature"),
        ("POST", "/api/conversations/{id}/reply", {"parent": "none"}, 404, None),
        ("POST", "/api/conversations/{id}/reply", {"model": "none"}, 404, "model"),
        ("POST", "/api/conversations/{id}/reply", {"tools": ["python"]}, 400, "tools"),
        ("POST", "/api/conversations/{id}/comparisons", {}, 400, None),
        ("POST", "/api/conversations/{id}/comparisons", {"candidates": [{"model": "small"}]}, 400, "candidates"),
        ("POST", "/api/conversations/{id}/rankings", {"order": [["x"]]}, 400, "order"),
        ("POST", "/api/comparisons/none/reply/c", None, 400, "side"),
    ],
)
def test_mistakes_are_told_in_openais_shape(client, method, path, body, status, param):
    id, _ = begun(client)
    response = client.request(method, path.format(id=id), json=body)
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert error["message"]
    if param is not None:
        assert error["param"] == param


def test_a_reply_needs_a_question(client):
    id = client.post("/api/conversations", json={}).json()["id"]
    assert client.post(f"/api/conversations/{id}/reply", json={}).status_code == 400
    assert client.post(f"/api/conversations/{id}/comparisons", json={"replies": ["x", "y"]}).status_code == 404


def test_keys_keep_people_apart(tokenizer, kept):
    keys = tuple(Key(name=name, secret=SecretStr(f"secret-of-{name}")) for name in ("ann", "bob"))
    with TestClient(app_of(tokenizer, kept, keys=keys), base_url="http://localhost") as client:
        ann, bob = [{"authorization": f"Bearer secret-of-{name}"} for name in ("ann", "bob")]
        id = client.post("/api/conversations", json={"title": "mine"}, headers=ann).json()["id"]
        assert client.get("/api/conversations").status_code == 401
        assert client.get("/api/conversations", headers=bob).json()["data"] == []
        assert client.get(f"/api/conversations/{id}", headers=bob).status_code == 404
        assert client.get(f"/api/conversations/{id}", headers=ann).json()["title"] == "mine"


def test_without_a_store_it_says_so(tokenizer):
    with TestClient(app_of(tokenizer, None), base_url="http://localhost") as client:
        response = client.get("/api/conversations")
        assert response.status_code == 503
        assert response.json()["error"]["code"] == "no_store"


def test_what_was_written_before_a_stop_is_kept(tokenizer, kept):
    """A client that goes away after the first words: the stream is closed as the server closes it."""
    app = app_of(tokenizer, kept, context=2048)
    view = kept.of("anybody")
    id = view.conversations.create().id
    view.conversations.ask(id, "the cat", None)
    said: list[str] = []

    async def vanish() -> None:
        sent = asyncio.Event()

        async def receive() -> dict[str, Any]:
            if not said:
                said.append("body")
                return {
                    "type": "http.request",
                    "body": b'{"sampling": {"max_tokens": 2000, "min_tokens": 2000}}',
                }
            await sent.wait()
            return {"type": "http.disconnect"}

        async def send(message: dict[str, Any]) -> None:
            if b'"text"' in message.get("body", b""):
                sent.set()

        path = f"/api/conversations/{id}/reply"
        headers = [(b"host", b"localhost"), (b"content-type", b"application/json")]
        scope = {"type": "http", "method": "POST", "path": path, "raw_path": path.encode(), "headers": headers,
                 "query_string": b"", "asgi": {"version": "3.0"}, "http_version": "1.1", "scheme": "http"}  # fmt: skip
        async with app.router.lifespan_context(app):
            await app(scope, receive, send)
            assert await until(lambda: app.state.models.get("small").driver.load == 0)

    asyncio.run(vanish())
    message = view.conversations.messages(id)[-1]
    assert message.role == "assistant"
    assert message.content
    assert message.reply.finish == "cancelled"


class Squeamish:
    """A moderation model that knows one word."""

    def __init__(self, word: str) -> None:
        self.word = word

    def judge(self, texts: list[str]) -> list[Verdict]:
        """Flags texts that hold the word."""
        found = [self.word in text for text in texts]
        return [Verdict(flagged, {"hate": flagged}, {"hate": float(flagged)}) for flagged in found]

    def recent(self, text: str, new: int) -> str:
        """It reads any text whole."""
        return text


def test_a_flagged_question_is_not_answered_and_its_verdict_goes_with_it(tokenizer, kept):
    with TestClient(app_of(tokenizer, kept, moderator=Squeamish("dog")), base_url="http://localhost") as client:
        id, asked = begun(client)
        assert events(client.post(f"/api/conversations/{id}/reply", json={}))[-1]["type"] == "done"
        bad = client.post(f"/api/conversations/{id}/messages", json={"content": "the dog"}).json()["id"]
        response = client.post(f"/api/conversations/{id}/reply", json={})
        assert response.status_code == 400
        assert response.json()["error"]["code"] == "content_policy_violation"
        flagged = {m["id"]: m["flagged"] for m in client.get(f"/api/conversations/{id}").json()["messages"]}
        assert flagged[bad]
        assert not flagged[asked]
        [verdict] = kept.moderation.of(bad)
        assert (verdict.direction, verdict.categories, verdict.text) == ("input", {"hate": True}, None)
        client.delete(f"/api/conversations/{id}")
        assert kept.moderation.judged() == []


def test_a_flagged_reply_is_withheld_and_kept_for_people_to_look_at(tokenizer, kept):
    moderator = Squeamish("nothing says this")
    with TestClient(app_of(tokenizer, kept, moderator=moderator), base_url="http://localhost") as client:
        id, _ = begun(client)
        said = events(client.post(f"/api/conversations/{id}/reply", json={}))[-1]["message"]["content"]
        moderator.word = said[-3:]
        message = events(client.post(f"/api/conversations/{id}/reply", json={}))[-1]["message"]
        assert (message["content"], message["reply"]["finish"]) == ("", "content_filter")
        assert client.get(f"/api/conversations/{id}").json()["messages"][-1]["flagged"]
        assert [text for text, said_of in kept.moderation.judged() if said_of.flagged] == [said]
        told = [said_of for _, said_of in kept.moderation.judged() if not said_of.flagged]
        assert [one.direction for one in told] == ["input", "output", "input"]
        assert all(one.message and one.text is None for one in told)


def test_a_change_that_came_first_is_a_conflict():
    """What the database refuses because of another's change is no fault of the service's."""
    assert (answer_for(IntegrityError("", {}, Exception())).status, answer_for(OSError()).status) == (409, 503)
