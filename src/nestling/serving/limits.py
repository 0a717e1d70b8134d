"""Who may come in, how often, with how large a body: what is decided before a request is read.

With keys, every path that does something wants one. Without keys only this machine is served, and then a page of another
origin, or one whose name was pointed here after it was loaded (DNS rebinding), must not use the browser to get in: the
Host and Origin headers have to name this service.
"""

from __future__ import annotations

import hmac
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from ipaddress import ip_address
from typing import Any
from urllib.parse import urlsplit

from pydantic import SecretStr
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from nestling.serving.errors import ApiError
from nestling.serving.observing import Observer, Record
from nestling.serving.settings import Key, ServeSettings

GUARDED = ("/v1/", "/api/", "/tokenize", "/detokenize", "/metrics")
"""Paths that need a key where there are keys; the page itself and /health are open."""
ANYBODY = Key(name="anybody", secret=SecretStr(""), runs=True)
MINUTE = 60.0


@dataclass
class Bucket:
    """So much per minute: fills evenly, holds a minute's worth, may go into debt.

    >>> bucket = Bucket(2, clock=lambda: 0.0)
    >>> [bucket.take(1), bucket.take(1), bucket.take(1)]
    [0.0, 0.0, 30.0]
    """

    rate: int
    """Units per minute; 0: no limit."""
    clock: Callable[[], float] = time.monotonic
    _level: float = field(init=False)
    _at: float = field(init=False)

    def __post_init__(self) -> None:
        self._level, self._at = float(self.rate), self.clock()

    @property
    def level(self) -> float:
        """What is left now."""
        now = self.clock()
        self._level = min(self._level + (now - self._at) * self.rate / MINUTE, float(self.rate))
        self._at = now
        return self._level

    def take(self, amount: float) -> float:
        """Take `amount`, or nothing where it is not there; seconds until it will be, 0 when taken."""
        missing = self.wait(amount)
        if not missing:
            self._level -= amount if self.rate else 0
        return missing

    def wait(self, amount: float) -> float:
        """Seconds until `amount` is there."""
        return max(amount - self.level, 0) * MINUTE / self.rate if self.rate else 0.0

    def spend(self, amount: float) -> None:
        """Take `amount`, which is already used up: the level may become negative."""
        if self.rate:
            self._level = self.level - amount


class Limits:
    """The buckets of every key."""

    def __init__(self, settings: ServeSettings) -> None:
        self._settings = settings
        self._requests: dict[str, Bucket] = {}
        self._tokens: dict[str, Bucket] = {}

    def enter(self, key: Key) -> Mapping[str, str]:
        """Count a request; headers that tell what is left.

        Raises:
            ApiError: 429, with the seconds to wait.
        """
        requests, tokens = self._of(key)
        for bucket, wait, unit in ((tokens, tokens.wait(1), "tokens"), (requests, requests.take(1), "requests")):
            if wait:
                what = f"rate limit of {bucket.rate} {unit} per minute reached; try again in {wait:.1f} s"
                headers = {"retry-after": str(int(wait) + 1), **_left(requests, tokens)}
                raise ApiError(what, status=429, code="rate_limit_exceeded", headers=headers)
        return _left(requests, tokens)

    def spend(self, key: Key, tokens: int) -> None:
        """Count the tokens of a request that is done."""
        self._of(key)[1].spend(tokens)

    def _of(self, key: Key) -> tuple[Bucket, Bucket]:
        if key.name not in self._requests:
            settings = self._settings
            self._requests[key.name] = Bucket(key.requests_per_minute or settings.requests_per_minute)
            self._tokens[key.name] = Bucket(key.tokens_per_minute or settings.tokens_per_minute)
        return self._requests[key.name], self._tokens[key.name]


def _left(requests: Bucket, tokens: Bucket) -> dict[str, str]:
    headers = {}
    for bucket, unit in ((requests, "requests"), (tokens, "tokens")):
        if bucket.rate:
            headers[f"x-ratelimit-limit-{unit}"] = str(bucket.rate)
            headers[f"x-ratelimit-remaining-{unit}"] = str(max(int(bucket.level), 0))
    return headers


class Gate:
    """ASGI middleware: lets a request in or answers it, and tells the observer how it ended."""

    def __init__(self, app: ASGIApp, settings: ServeSettings, observer: Observer) -> None:
        self._app, self._settings, self._observer = app, settings, observer
        self._limits = Limits(settings)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        record = self._observer.begin(scope)
        scope.setdefault("state", {})["record"] = record
        told = self._telling(record, send)
        try:
            key = self._check(scope, record)
            scope["state"]["key"] = key
        except ApiError as error:
            await error.response()(scope, receive, told)
            self._observer.end(record)
            return
        try:
            await self._app(scope, _bounded(receive, self._settings.max_body_bytes), told)
        finally:
            record.route = record.route or getattr(scope.get("route"), "path", "")
            record.status = record.status or 500  # what crashes is answered outside of this gate
            self._limits.spend(key, record.prompt_tokens + record.completion_tokens)
            self._observer.end(record)

    def _check(self, scope: Scope, record: Record) -> Key:
        headers = Headers(scope=scope)
        self._check_host(scope, headers)
        length = headers.get("content-length", "0")
        if length.isdecimal() and int(length) > self._settings.max_body_bytes:
            raise ApiError(f"the body is larger than {self._settings.max_body_bytes} bytes", status=413)
        if not scope["path"].startswith(GUARDED):
            return ANYBODY
        key = self._key(headers)
        record.key = key.name
        if not scope["path"].startswith("/metrics"):
            record.headers = self._limits.enter(key)
        return key

    def _check_host(self, scope: Scope, headers: Headers) -> None:
        """Without keys only the service's own names count, in Host and in Origin."""
        if self._settings.keys:
            return
        origin = headers.get("origin")
        names = [("Host", _hostname(f"//{headers.get('host', '')}"))]
        if origin and origin not in self._settings.cors_origins:
            names.append(("Origin", _hostname(origin)))
        for header, name in names:
            if not self._is_ours(name):
                what = f"{header} {name!r} is not this service; allow it with the setting hosts, or use keys"
                raise ApiError(what, status=403, code="forbidden_host")

    def _is_ours(self, name: str) -> bool:
        if name in ("localhost", self._settings.host, *self._settings.hosts):
            return True
        try:
            return ip_address(name).is_loopback
        except ValueError:
            return False

    def _key(self, headers: Headers) -> Key:
        if not self._settings.keys:
            return ANYBODY
        scheme, _, secret = headers.get("authorization", "").partition(" ")
        given = secret.strip() if scheme.lower() == "bearer" else ""
        if not given:
            raise ApiError("no API key given: send Authorization: Bearer KEY", status=401, code="missing_api_key")
        found = [key for key in self._settings.keys if _same(key.secret.get_secret_value(), given)]
        if not found:
            raise ApiError("this API key is not known here", status=401, code="invalid_api_key")
        return found[0]

    def _telling(self, record: Record, send: Send) -> Send:
        """`send` that adds our headers and notes the status."""

        async def told(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.status = message["status"]
                MutableHeaders(scope=message).update({"x-request-id": record.id, **record.headers})
            await send(message)

        return told


def _bounded(receive: Receive, limit: int) -> Receive:
    """`receive` that refuses a body which turns out larger than it may be."""
    read = 0

    async def bounded() -> Any:
        nonlocal read
        message = await receive()
        read += len(message.get("body", b""))
        if read > limit:
            raise HTTPException(413, f"the body is larger than {limit} bytes")
        return message

    return bounded


def _hostname(url: str) -> str:
    try:
        return urlsplit(url).hostname or ""
    except ValueError:
        return ""


def _same(left: str, right: str) -> bool:
    return hmac.compare_digest(left.encode(), right.encode())
