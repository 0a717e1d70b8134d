"""Runs of recipes: how far each is, what it logs, its report."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query, Request
from fastapi.responses import FileResponse

from nestling.serving.errors import ApiError
from nestling.serving.runs import Runs

router = APIRouter(tags=["runs"])
REPORT_HEADERS = {
    "content-security-policy": "sandbox; default-src 'none'; style-src 'unsafe-inline'; img-src data:; frame-ancestors 'self'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}


def _opened(request: Request) -> Runs:
    """The service's runs, for keys that are for them."""
    if not request.state.key.runs:
        raise ApiError("this key is not for training runs", status=403, code="runs_forbidden")
    runs: Runs = request.app.state.runs
    return runs


OpenRuns = Annotated[Runs, Depends(_opened)]


@router.get("/api/runs")
def list_runs(runs: OpenRuns) -> dict[str, Any]:
    """Every run of the folder, the latest first."""
    return {"data": runs.all()}


@router.get("/api/runs/{name}")
def get_run(runs: OpenRuns, name: str) -> dict[str, Any]:
    """A run with the settings and figures of its stages."""
    return runs.get(name)


@router.get("/api/runs/{name}/metrics")
def get_metrics(
    runs: OpenRuns, name: str, after: Annotated[str, Query(description="`next` of the answer before.")] = ""
) -> dict[str, Any]:
    """What a run has logged since the answer before; ask again with its `next`, at once where there is `more`."""
    return runs.news(name, after)


@router.get("/runs/{name}/report.html", include_in_schema=False)
def get_report(runs: OpenRuns, name: str, ticket: str = "") -> FileResponse:
    """The report as `nestling run` wrote it, in a sandbox: it runs nothing and loads nothing. The ticket is its key."""
    return FileResponse(runs.report(name, ticket), media_type="text/html", headers=REPORT_HEADERS)
