"""/health and /metrics: for whoever watches the service."""

from __future__ import annotations

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response

from nestling.serving.models import Models

router = APIRouter(tags=["health"])


@router.get("/health")
async def health(request: Request) -> JSONResponse:
    """200 while every model takes requests, else 503."""
    models: Models = request.app.state.models
    ready = {one.name: one.driver.ready for one in models}
    well = all(ready.values())
    return JSONResponse({"status": "ok" if well else "failed", "models": ready}, 200 if well else 503)


@router.get("/metrics", response_class=PlainTextResponse)
async def metrics(request: Request) -> Response:
    """Figures in Prometheus' text form."""
    return PlainTextResponse(request.app.state.observer.exposition(), media_type="text/plain; version=0.0.4")
