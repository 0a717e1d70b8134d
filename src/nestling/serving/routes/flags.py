"""/api/flags: reports of messages by users."""

from __future__ import annotations

from fastapi import APIRouter
from pydantic import Field

from nestling.serving.protocol.messages import Wire
from nestling.serving.routes._opened import OpenStore
from nestling.serving.store.records import FlagRecord, Record

router = APIRouter(prefix="/api", tags=["feedback"])


class FlagBody(Wire):
    """What is wrong with a message; a category of the moderation model's, or any other word."""

    category: str = Field(min_length=1, max_length=200)
    comment: str = ""


class FlagList(Record):
    """The caller's own reports."""

    data: list[FlagRecord]


@router.post("/messages/{id}/flags", status_code=201)
def flag(store: OpenStore, id: str, body: FlagBody) -> FlagRecord:
    """Report a message."""
    return store.feedback.flag(id, body.category, body.comment)


@router.get("/flags")
def list_flags(store: OpenStore) -> FlagList:
    """Own reports, the newest first."""
    return FlagList(data=store.feedback.flags())


@router.delete("/flags/{id}", status_code=204)
def unflag(store: OpenStore, id: str) -> None:
    """Withdraw a report."""
    store.feedback.unflag(id)
