"""What people say of replies: votes, reports, rankings of several, and how much of it there is."""

from __future__ import annotations

from fastapi import APIRouter
from pydantic import ConfigDict, Field

from nestling.serving.protocol.messages import Wire
from nestling.serving.routes._opened import OpenStore
from nestling.serving.store.feedback import Stats
from nestling.serving.store.records import FlagRecord, RankingRecord, Record, VoteRecord

router = APIRouter(prefix="/api", tags=["feedback"])


class VoteBody(VoteRecord):
    """A vote, with its reason and free words."""

    model_config = ConfigDict(extra="forbid")


class FlagBody(Wire):
    """What is wrong with a message; a category of the moderation model's, or any other word."""

    category: str = Field(min_length=1, max_length=200)
    comment: str = ""


class FlagList(Record):
    """The caller's own reports."""

    data: list[FlagRecord]


class RankingBody(Wire):
    """Groups of replies from best to worst; those of one group tie."""

    order: list[list[str]]
    comment: str = ""


@router.put("/messages/{id}/vote")
def vote(store: OpenStore, id: str, body: VoteBody) -> VoteRecord:
    """Vote on a reply; a later vote replaces it."""
    return store.feedback.vote(id, VoteRecord(**dict(body)))


@router.delete("/messages/{id}/vote", status_code=204)
def unvote(store: OpenStore, id: str) -> None:
    """Take a vote back."""
    store.feedback.unvote(id)


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


@router.post("/conversations/{id}/rankings", status_code=201)
def rank(store: OpenStore, id: str, body: RankingBody) -> RankingRecord:
    """Put 2 to 9 replies to one message in order."""
    return store.feedback.rank(id, body.order, body.comment)


@router.get("/feedback/stats")
def stats(store: OpenStore) -> Stats:
    """Counts of the caller's own conversations and feedback."""
    return store.feedback.stats()
