"""Requests made from the service's own OpenAPI document: whatever comes, no mistake of the server's and no hang."""

from __future__ import annotations

import zlib

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis.checks import not_a_server_error
from schemathesis.generation import GenerationMode
from schemathesis.specs.openapi.checks import content_type_conformance, response_schema_conformance

EXAMPLES = 20
CHECKS = (not_a_server_error, content_type_conformance, response_schema_conformance)
NEEDED, EASY = {"messages", "input"}, {"/v1/responses": {"input": "Hi"}}
"""What a request that is answered has."""
PATHS = (
    "/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/responses/{name}", "/v1/embeddings",
    "/v1/moderations", "/v1/models", "/v1/models/{name}", "/tokenize", "/detokenize", "/health", "/metrics",
)  # fmt: skip


@pytest.fixture(scope="module")
def fuzzed(serve):
    """A service with small limits, so that a long reply ends soon, and its document."""
    service = serve(capacity=48, max_choices=3, tools={"calculator": {}})
    return service, schemathesis.openapi.from_url(f"{service.url}/openapi.json")


def test_every_path_is_fuzzed(fuzzed):
    """What the document has outside /api and the page is in the list."""
    paths = {operation.ok().path for operation in fuzzed[1].get_all_operations()}
    assert {
        path for path in paths if path.startswith(("/v1", "/tokenize", "/detokenize", "/health", "/metrics"))
    } == set(PATHS)


WRITES = tuple(path for path in PATHS if path not in ("/v1/models", "/v1/models/{name}", "/health", "/metrics"))
CASES = [(path, GenerationMode.POSITIVE) for path in PATHS] + [(path, GenerationMode.NEGATIVE) for path in WRITES]


@pytest.mark.parametrize(("path", "mode"), CASES)
def test_no_request_breaks_the_service(fuzzed, path, mode):
    """Bodies that fit the schema and bodies that nearly do, with the name of a real model in them or not."""
    service, schema = fuzzed
    for operation in (found.ok() for found in schema.get_all_operations()):
        if operation.path == path and (mode is GenerationMode.POSITIVE or operation.method == "post"):
            send(operation, mode)
    assert httpx.get(f"{service.url}/health").status_code == 200


def send(operation, mode: GenerationMode) -> None:
    @settings(max_examples=EXAMPLES, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(case=operation.as_strategy(generation_mode=mode), thin=st.booleans(), salt=st.integers(0, 9999))
    def each(case, thin, salt):
        if thin and isinstance(case.body, dict) and "model" in case.body:  # with all fields at once, some refuse others
            kept = {name for name in case.body if name in NEEDED or zlib.crc32(f"{salt} {name}".encode()) % 6 == 0}
            case.body = EASY.get(operation.path, {}) | {name: case.body[name] for name in kept} | {"model": "tiny"}
        case.call_and_validate(timeout=20, checks=CHECKS)

    each()
