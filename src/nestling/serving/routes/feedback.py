"""/api/…/rankings and /api/feedback/stats: several replies put in order, and how much feedback there is."""

from __future__ import annotations

from fastapi import APIRouter

from nestling.serving.protocol.messages import Wire
from nestling.serving.routes._opened import OpenStore
from nestling.serving.store.feedback import Stats
from nestling.serving.store.records import RankingRecord

router = APIRouter(prefix="/api", tags=["feedback"])


class RankingBody(Wire):
    """Groups of replies from best to worst; those of one group tie."""

    order: list[list[str]]
    comment: str = ""


@router.post("/conversations/{id}/rankings", status_code=201)
def rank(store: OpenStore, id: str, body: RankingBody) -> RankingRecord:
    """Put 2 to 9 replies to one message in order."""
    return store.feedback.rank(id, body.order, body.comment)


@router.get("/feedback/stats")
def stats(store: OpenStore) -> Stats:
    """Counts of the caller's own conversations and feedback."""
    return store.feedback.stats()
