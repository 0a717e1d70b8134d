"""/api/messages/{id}/vote: thumbs up or down on a reply."""

from __future__ import annotations

from fastapi import APIRouter
from pydantic import ConfigDict

from nestling.serving.routes._opened import OpenStore
from nestling.serving.store.records import VoteRecord

router = APIRouter(prefix="/api", tags=["feedback"])


class VoteBody(VoteRecord):
    """A vote, with its reason and free words."""

    model_config = ConfigDict(extra="forbid")


@router.put("/messages/{id}/vote")
def vote(store: OpenStore, id: str, body: VoteBody) -> VoteRecord:
    """Vote on a reply; a later vote replaces it."""
    return store.feedback.vote(id, VoteRecord(**dict(body)))


@router.delete("/messages/{id}/vote", status_code=204)
def unvote(store: OpenStore, id: str) -> None:
    """Take a vote back."""
    store.feedback.unvote(id)
