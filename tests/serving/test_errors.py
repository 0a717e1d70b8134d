"""Errors have OpenAI's shape, status, code and param."""

from __future__ import annotations

import httpx
import openai
import pytest
from fastapi.testclient import TestClient

HI = [{"role": "user", "content": "Hi"}]
IMAGE = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://127.0.0.1/x.png"}}]}]
CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{"}}
CASES = {
    "unknown model": ({"model": "big"}, 404, "model_not_found", "model"),
    "auto without a router": ({"model": "auto"}, 404, "model_not_found", "model"),
    "no model": ({"model": None}, 400, "invalid_type", "model"),
    "no messages": ({"messages": []}, 400, "invalid_value", "messages"),
    "an unknown role": ({"messages": [{"role": "king", "content": "Hi"}]}, 400, "invalid_value", "messages[0].role"),
    "an image": ({"messages": IMAGE}, 400, "unsupported_content_type", "messages[0].content[0]"),
    "a call that is no JSON": ({"messages": [*HI, {"role": "assistant", "tool_calls": [CALL]}]}, 400, "invalid_value",
                               "messages[1].tool_calls[0].function.arguments"),
    "too long": ({"messages": [{"role": "user", "content": "one two " * 300}]}, 400, "context_length_exceeded", "messages"),
    "too hot": ({"temperature": 3}, 400, "invalid_value", "temperature"),
    "too many choices": ({"n": 100}, 400, "invalid_value", "n"),
    "too many stops": ({"stop": list("abcde")}, 400, "invalid_value", "stop"),
    "an unknown token": ({"logit_bias": {"100000": 1}}, 400, "invalid_value", "logit_bias"),
    "alternatives without logprobs": ({"top_logprobs": 2}, 400, "invalid_value", "top_logprobs"),
    "a choice without tools": ({"tool_choice": "required"}, 400, "invalid_value", "tool_choice"),
    "sound": ({"modalities": ["audio"]}, 400, "unsupported_parameter", "modalities"),
    "functions of old": ({"functions": []}, 400, "unsupported_parameter", "functions"),
    "a misspelt name": ({"tempratur": 1}, 400, "unknown_parameter", "tempratur"),
    "an impossible schema": ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {
        "type": "nothing"}}}}, 400, "invalid_value", "response_format.json_schema.schema"),
    "an impossible constraint": ({"constraint": {"regex": "("}}, 400, "invalid_value", "constraint.regex"),
    "impossible arguments": ({"tool_choice": "required", "tools": [{"type": "function", "function": {
        "name": "f", "parameters": {"type": "nothing"}}}]}, 400, "invalid_value", "tools"),
    "nothing said": ({"messages": [{"role": "user", "content": None}]}, 400, "missing_required_parameter",
                     "messages[0].content"),
    "a result of no call": ({"messages": [*HI, {"role": "tool", "tool_call_id": "c", "content": "5"}]}, 400,
                            "invalid_value", "messages[1].tool_call_id"),
    "a result before its call": ({"messages": [{"role": "tool", "tool_call_id": "c", "content": "5"}, {
        "role": "assistant", "tool_calls": [CALL]}]}, 400, "invalid_value", "messages[0].tool_call_id"),
    "a custom tool": ({"tools": [{"type": "custom", "custom": {"name": "f"}}]}, 400, "invalid_value", "tools[0].type"),
    "a choice of a custom tool": ({"tool_choice": {"type": "custom", "custom": {"name": "f"}}}, 400, "invalid_value",
                                  "tool_choice.type"),
    "a choice among other tools": ({"tools": [], "tool_choice": {"type": "allowed_tools", "allowed_tools": {
        "mode": "auto", "tools": [{"type": "function", "function": {"name": "f"}}]}}}, 400, "invalid_value", "tool_choice"),
    "a schema without a schema": ({"response_format": {"type": "json_schema"}}, 400, "missing_required_parameter",
                                  "response_format.json_schema.schema"),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("stream", [False, True])
def test_mistakes_are_explained(service, name, stream):
    """Streamed or not, the status says that it failed, and the error says where."""
    change, status, code, param = CASES[name]
    body = {"model": "tiny", "messages": HI, "stream": stream} | change
    answer = httpx.post(f"{service.url}/v1/chat/completions", json=body)
    assert answer.status_code == status
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["type"], error["code"]) == ("invalid_request_error", code)
    assert error["param"] == param
    assert "sampling" not in error["message"]
    assert len(error["message"]) > 8
    assert "\n" not in error["message"]


def test_the_client_raises_its_own_errors(client):
    """openai turns them into its exceptions, with code and param."""
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="big", messages=HI)
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.NotFoundError, match="known: tiny"):
        client.models.retrieve("big")


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "code"),
    [
        ("POST", "/v1/chat/completions", b"{", 400, "invalid_json"),
        ("POST", "/v1/chat/completions", b"[1]", 400, "invalid_type"),
        ("POST", "/v1/chat/completions", b"\xff\xfe", 400, "invalid_json"),
        ("GET", "/v1/chat/completions", b"", 405, "method_not_supported"),
        ("GET", "/v1/nothing", b"", 404, "unknown_url"),
    ],
)
def test_mistakes_of_http(service, method, path, body, status, code):
    """A body that is no JSON, a path that is not there, a method that it does not have."""
    answer = httpx.request(method, service.url + path, content=body, headers={"content-type": "application/json"})
    assert answer.status_code == status
    assert answer.json()["error"]["code"] == code
    assert "jSON" not in answer.text


def test_a_crash_is_told_with_the_id_of_its_request(make_app):
    """In OpenAI's shape, without what went wrong; the figures count it."""
    app, _ = make_app()

    @app.get("/v1/crash")
    def crash() -> None:
        raise RuntimeError("secret")

    with TestClient(app, base_url="http://localhost", raise_server_exceptions=False) as client:
        answer = client.get("/v1/crash", headers={"x-request-id": "mine"})
        assert (answer.status_code, answer.headers["x-request-id"]) == (500, "mine")
        assert answer.json()["error"]["code"] == "internal_error"
        assert "secret" not in answer.text
        assert 'nestling_requests_total{route="/v1/crash",status="500"} 1.0' in client.get("/metrics").text


def test_moderation_needs_a_model(client):
    """Without one the error says how to give one."""
    with pytest.raises(openai.NotFoundError, match="--moderation"):
        client.moderations.create(input="Hi")


def test_a_base_model_does_not_chat(model, tokenizer, make_app):
    """Its chat requests are refused with the path to use instead."""
    import asyncio

    from nestling.generation.engine import Engine
    from nestling.serving.app import create_app
    from nestling.serving.driver import Driver
    from nestling.serving.models import Models, Served
    from nestling.serving.settings import ServeSettings
    from nestling.tokenizer.bpe import Tokenizer

    plain = Tokenizer.train(["one two three"], vocab_size=300)
    served = Served("base", Driver(Engine(model, plain, rows=2)), plain)
    app = create_app(ServeSettings(), Models([served]))

    async def ask() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://127.0.0.1") as client:
            return await client.post("/v1/chat/completions", json={"model": "base", "messages": HI})

    assert "use /v1/completions" in asyncio.run(ask()).json()["error"]["message"]
