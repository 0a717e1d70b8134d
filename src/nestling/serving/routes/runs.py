"""Runs of recipes: how far each is, what it logs, its report."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from fastapi.responses import FileResponse

from nestling.serving.errors import ApiError
from nestling.serving.runs import Runs
from nestling.serving.store.records import Missing

router = APIRouter(tags=["runs"])
REPORT_HEADERS = {
    "content-security-policy": "sandbox; default-src 'none'; style-src 'unsafe-inline'; img-src data:; frame-ancestors 'self'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}


@router.get("/api/runs")
def list_runs(request: Request) -> dict[str, Any]:
    """Every run of the folder, the latest first."""
    runs: Runs | None = request.app.state.runs
    return {"data": [] if runs is None else runs.all()}


@router.get("/api/runs/{name}")
def get_run(request: Request, name: str) -> dict[str, Any]:
    """A run with the settings and figures of its stages."""
    try:
        return _runs(request, name).get(name)
    except Missing as error:
        raise _unknown(error) from None


@router.get("/api/runs/{name}/metrics")
def get_metrics(
    request: Request, name: str, after: Annotated[str, Query(description="`next` of the answer before.")] = ""
) -> dict[str, Any]:
    """What a run has logged since the answer before; ask again with its `next`, at once where there is `more`."""
    try:
        return _runs(request, name).news(name, after)
    except Missing as error:
        raise _unknown(error) from None


@router.get("/runs/{name}/report.html", include_in_schema=False)
def get_report(request: Request, name: str, ticket: str = "") -> FileResponse:
    """The report as `nestling run` wrote it, in a sandbox: it runs nothing and loads nothing."""
    try:
        path = _runs(request, name).report(name, ticket)
    except Missing as error:
        raise _unknown(error) from None
    return FileResponse(path, media_type="text/html", headers=REPORT_HEADERS)


def _runs(request: Request, name: str) -> Runs:
    if request.app.state.runs is None:
        raise ApiError(f"there is no such run: {name!r}", status=404, code="not_found")
    found: Runs = request.app.state.runs
    return found


def _unknown(error: Missing) -> ApiError:
    return ApiError(str(error), status=404, code="not_found")
