"""The page itself, on / and /page/: files of the package, sent as they are, revalidated by hash at each load."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files
from importlib.resources.abc import Traversable

from fastapi import APIRouter, Request
from fastapi.responses import Response

from nestling.serving.errors import ApiError

router = APIRouter(include_in_schema=False)
TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".json": "application/json",
         ".svg": "image/svg+xml"}  # fmt: skip
POLICY = "; ".join((
    "default-src 'none'", "script-src 'self'", "style-src 'self'", "img-src 'self' data:", "connect-src 'self'",
    "frame-src 'self'", "base-uri 'none'", "form-action 'none'", "frame-ancestors 'none'",
))  # fmt: skip
"""What a browser lets the page do: run and load what comes from this service, nothing written into the markup."""
HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cache-control": "no-cache",  # keep it, but ask whether it is still the same
}


@dataclass(frozen=True)
class Asset:
    """A file of the page."""

    content: bytes
    type: str
    etag: str


@router.api_route("/", methods=["GET", "HEAD"])
async def index(request: Request) -> Response:
    """The page."""
    return _send(request, "index.html")


@router.api_route("/page/{path:path}", methods=["GET", "HEAD"])
async def asset(request: Request, path: str) -> Response:
    """A script, a style sheet, a picture or the texts of a language."""
    return _send(request, path)


def _send(request: Request, path: str) -> Response:
    found = assets().get(path)
    if found is None:
        raise ApiError(f"the page has no file {path!r}", status=404, code="unknown_url")
    headers = HEADERS | {"etag": found.etag}
    if found.etag in request.headers.get("if-none-match", ""):
        return Response(status_code=304, headers=headers)
    return Response(found.content, media_type=found.type, headers=headers)


@lru_cache(maxsize=1)
def assets() -> dict[str, Asset]:
    """All files by their path below the page's folder; nothing else can be asked for."""
    return dict(_below(files("nestling.serving") / "page", ""))


def _below(folder: Traversable, prefix: str) -> list[tuple[str, Asset]]:
    found: list[tuple[str, Asset]] = []
    for entry in folder.iterdir():
        kind = TYPES.get(f".{entry.name.rpartition('.')[2]}")
        if entry.is_dir():
            found += _below(entry, f"{prefix}{entry.name}/")
        elif kind:
            content = entry.read_bytes()
            tag = f'"{hashlib.blake2b(content, digest_size=12).hexdigest()}"'
            found.append((f"{prefix}{entry.name}", Asset(content, kind, tag)))
    return found
