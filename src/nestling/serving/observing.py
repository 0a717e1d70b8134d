"""What is known about the service from outside: one log line a request, Prometheus figures. No text unless asked."""

from __future__ import annotations

import json
import logging
import re
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from starlette.datastructures import Headers
from starlette.types import Scope

from nestling.core.runtime import fresh_name
from nestling.serving.models import Models

LOG = "nestling.serving"
"""The logger; a line is a JSON object."""
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
REQUEST_ID = re.compile(r"[\w.:-]{1,64}")


@dataclass
class Record:
    """One request: begun by the gate, filled by its route, told when it is over."""

    id: str
    method: str
    path: str
    started: float
    route: str = ""
    key: str = ""
    model: str = ""
    status: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    first: float | None = None
    """Seconds to the first token."""
    finish: str = ""
    text: dict[str, Any] = field(default_factory=dict)
    """What was said, for a log that asks for it."""
    headers: Mapping[str, str] = field(default_factory=dict)
    """Sent with the answer."""

    def seen_token(self) -> None:
        """The first token is on its way to the client."""
        if self.first is None:
            self.first = time.perf_counter() - self.started


class Observer:
    """Counts and logs.

    Args:
        models: whose load is told.
        log_text: prompts and replies go to the log too.
    """

    def __init__(self, models: Models, *, log_text: bool = False) -> None:
        self._log_text = log_text
        self._log = logging.getLogger(LOG)
        self.registry = CollectorRegistry(auto_describe=False)
        self.registry.register(_Load(models))
        counter = partial(Counter, registry=self.registry)
        histogram = partial(Histogram, buckets=SECONDS, registry=self.registry)
        self._requests = counter("nestling_requests", "Requests by path and status.", ("route", "status"))
        self._tokens = counter("nestling_tokens", "Tokens by model and kind.", ("model", "kind"))
        self._finishes = counter("nestling_finishes", "Why replies ended.", ("model", "reason"))
        self._seconds = histogram("nestling_request_seconds", "Time to the end of the answer.", ("route",))
        self._first = histogram("nestling_first_token_seconds", "Time to the first token.", ("model",))

    def begin(self, scope: Scope) -> Record:
        """A record with the client's request id, or a fresh one."""
        given = Headers(scope=scope).get("x-request-id", "")
        name = given if REQUEST_ID.fullmatch(given) else f"req_{fresh_name()}"
        return Record(name, scope["method"], scope["path"], time.perf_counter())

    def end(self, record: Record) -> None:
        """Count the request and write its line."""
        seconds = time.perf_counter() - record.started
        route = record.route or "other"
        self._requests.labels(route, str(record.status)).inc()
        self._seconds.labels(route).observe(seconds)
        if record.model:
            self._tokens.labels(record.model, "prompt").inc(record.prompt_tokens)
            self._tokens.labels(record.model, "completion").inc(record.completion_tokens)
        if record.finish:
            self._finishes.labels(record.model, record.finish).inc()
        if record.first is not None:
            self._first.labels(record.model).observe(record.first)
        if self._log.isEnabledFor(logging.INFO):
            self._log.info(json.dumps(self._line(record, seconds), ensure_ascii=False))

    def exposition(self) -> bytes:
        """The figures in Prometheus' text form."""
        return generate_latest(self.registry)

    def _line(self, record: Record, seconds: float) -> dict[str, Any]:
        line: dict[str, Any] = {"time": round(time.time(), 3), "request": record.id, "method": record.method,
                                "path": record.path, "status": record.status, "seconds": round(seconds, 4)}  # fmt: skip
        for name in ("key", "model", "prompt_tokens", "completion_tokens", "finish"):
            if value := getattr(record, name):
                line[name] = value
        if record.first is not None:
            line["first_token_seconds"] = round(record.first, 4)
        return line | (record.text if self._log_text else {})


class _Load:
    """Gauges read when asked for: how much each model has to do."""

    def __init__(self, models: Models) -> None:
        self._models = models

    def collect(self) -> Iterable[Metric]:
        """Called by prometheus_client."""
        load = GaugeMetricFamily("nestling_open_texts", "Texts waiting or being written.", labels=("model",))
        steps = GaugeMetricFamily("nestling_engine_steps", "Steps since the start.", labels=("model",))
        ready = GaugeMetricFamily("nestling_model_ready", "1 while requests are taken.", labels=("model",))
        for one in self._models:
            load.add_metric([one.name], one.driver.load)
            steps.add_metric([one.name], one.driver.steps)
            ready.add_metric([one.name], one.driver.ready)
        return [load, steps, ready]
