"""Who may use the service, how often, with how much; what it tells of itself."""

from __future__ import annotations

import json
import logging
import time

import httpx
import openai
import pytest

from nestling.core.config import parse
from nestling.core.errors import UserError
from nestling.serving.limits import Bucket
from nestling.serving.settings import ServeSettings

HI = [{"role": "user", "content": "Hello!"}]
KEYS = [{"name": "ann", "secret": "sk-ann"}, {"name": "bob", "secret": "sk-bob", "requests_per_minute": 2}]


@pytest.fixture(scope="module")
def keyed(serve):
    """A service that wants keys, with a small body limit and few tokens a minute."""
    return serve(keys=KEYS, max_body_bytes=4096, tokens_per_minute=60, requests_per_minute=100)


def ask(client, **more):
    return client.chat.completions.create(model="tiny", messages=HI, temperature=0, **more)


def test_a_key_is_needed(keyed):
    """Without one, or with a wrong one, nothing is answered; health is open."""
    for path in ("/v1/models", "/tokenize", "/metrics", "/api/conversations"):
        answer = httpx.get(keyed.url + path)
        assert (answer.status_code, answer.json()["error"]["code"]) == (401, "missing_api_key"), path
    with pytest.raises(openai.AuthenticationError) as caught:
        keyed.client("sk-eve").models.list()
    assert caught.value.code == "invalid_api_key"
    assert httpx.get(f"{keyed.url}/health").status_code == 200
    assert keyed.client("sk-ann").models.list().data[0].id == "tiny"


def test_requests_are_limited_by_key(keyed):
    """bob's third request in a minute is refused with the time to wait; ann's are not."""
    bob = keyed.client("sk-bob")
    left = [bob.models.with_raw_response.list().headers["x-ratelimit-remaining-requests"] for _ in range(2)]
    assert left == ["1", "0"]
    with pytest.raises(openai.RateLimitError) as caught:
        bob.models.list()
    assert caught.value.code == "rate_limit_exceeded"
    assert 0 < int(caught.value.response.headers["retry-after"]) <= 31
    keyed.client("sk-ann").models.list()


def test_tokens_are_limited_by_key(serve):
    """Read and written tokens count; beyond the limit the next request waits."""
    client = serve(keys=KEYS, tokens_per_minute=40).client("sk-ann")
    used = 0
    with pytest.raises(openai.RateLimitError, match="40 tokens per minute"):
        for _ in range(10):
            used += ask(client).usage.total_tokens
    assert 40 <= used < 80


def test_large_bodies_are_refused(keyed):
    """By their declared length, and by what really comes where no length is declared."""
    headers = {"authorization": "Bearer sk-ann", "content-type": "application/json"}
    big = json.dumps({"model": "tiny", "messages": [{"role": "user", "content": "x" * 5000}]}).encode()
    url = f"{keyed.url}/v1/chat/completions"
    assert httpx.post(url, content=big, headers=headers).status_code == 413
    answer = httpx.post(url, content=(big[n : n + 500] for n in range(0, len(big), 500)), headers=headers)
    assert answer.status_code == 413
    assert "4096 bytes" in answer.json()["error"]["message"]


def test_without_keys_only_this_machine(service):
    """A foreign Host (DNS rebinding) or Origin (another page in the browser) is refused; our own are not."""
    url = f"{service.url}/v1/models"
    assert httpx.get(url, headers={"host": "evil.example:80"}).status_code == 403
    assert httpx.get(url, headers={"origin": "http://evil.example"}).status_code == 403
    assert httpx.get(url, headers={"origin": "null"}).status_code == 403
    assert httpx.get(url, headers={"origin": "http://localhost:3000", "host": "localhost:80"}).status_code == 200


def test_other_addresses_demand_a_key():
    """Settings that would open the service to others without a key are refused."""
    with pytest.raises(UserError, match="without a key"):
        parse(ServeSettings, {"host": "0.0.0.0"}, "serve")
    assert not ServeSettings(host="0.0.0.0", keys=KEYS).is_loopback
    assert ServeSettings(host="::1").is_loopback


def test_cors_is_off_unless_named(service, serve):
    """No CORS headers by default; with an origin named, its preflight and its requests pass."""
    asked = {"origin": "http://app.example", "access-control-request-method": "POST"}
    answer = httpx.options(f"{service.url}/v1/chat/completions", headers=asked)
    assert "access-control-allow-origin" not in answer.headers
    open_ = serve(cors_origins=["http://app.example"])
    answer = httpx.options(f"{open_.url}/v1/chat/completions", headers=asked)
    assert answer.headers["access-control-allow-origin"] == "http://app.example"
    assert httpx.get(f"{open_.url}/v1/models", headers={"origin": "http://app.example"}).status_code == 200


def test_request_ids(service):
    """The client's id comes back, a strange one is replaced; every answer has one."""
    url = f"{service.url}/v1/models"
    assert httpx.get(url, headers={"x-request-id": "mine-1"}).headers["x-request-id"] == "mine-1"
    assert httpx.get(url, headers={"x-request-id": "a b"}).headers["x-request-id"].startswith("req_")
    assert httpx.get(f"{service.url}/nothing").headers["x-request-id"]


@pytest.mark.parametrize("log_text", [False, True])
def test_the_log_has_text_only_when_asked(serve, caplog, log_text):
    """One JSON line a request, with who, what and how much; prompts and replies only with log_text."""
    service = serve(log_text=log_text)
    with caplog.at_level(logging.INFO, "nestling.serving"):
        ask(service.client())
        service.server.should_exit = True  # the line is written after the answer is sent
        while service.server.lifespan.shutdown_event.is_set() is False:
            time.sleep(0.01)
    [line] = [json.loads(record.message) for record in caplog.records if record.name == "nestling.serving"]
    assert (line["status"], line["model"], line["key"], line["finish"]) == (200, "tiny", "anybody", "stop")
    assert line["completion_tokens"] > 0
    assert line["request"].startswith("req_")
    assert ("Hello!" in json.dumps(line)) == log_text


def test_metrics(serve):
    """Prometheus' form: requests by status, tokens, time to the first token."""
    service = serve()
    usage = ask(service.client()).usage
    text = httpx.get(f"{service.url}/metrics").text
    assert 'nestling_requests_total{route="/v1/chat/completions",status="200"} 1.0' in text
    assert f'nestling_tokens_total{{kind="completion",model="tiny"}} {usage.completion_tokens:.1f}' in text
    assert 'nestling_first_token_seconds_count{model="tiny"} 1.0' in text
    assert 'nestling_open_texts{model="tiny"} 0.0' in text


def test_a_bucket_fills_evenly():
    """60 a minute is one a second, never more than 60 at once; a debt is paid off first."""
    now = [0.0]
    bucket = Bucket(60, clock=lambda: now[0])
    assert [bucket.take(1) for _ in range(61)] == [0.0] * 60 + [1.0]
    now[0] = 10
    assert bucket.level == 10
    bucket.spend(30)
    assert bucket.wait(1) == 21
    now[0] = 10_000
    assert bucket.level == 60
    assert Bucket(0).take(10**9) == 0
