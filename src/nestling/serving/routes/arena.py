"""/api/comparisons and /api/arena: two replies side by side, blind, and the table that follows from the votes."""

from __future__ import annotations

import asyncio
from typing import Self

from fastapi import APIRouter, Request, Response
from pydantic import Field, model_validator

from nestling.core.errors import UserError
from nestling.serving.errors import ApiError
from nestling.serving.models import AUTO
from nestling.serving.protocol.messages import Wire
from nestling.serving.routes._opened import OpenStore
from nestling.serving.routes._replying import PageSampling, ReplyRequest, begin, tell, wish_for
from nestling.serving.store.arena import ArenaTable
from nestling.serving.store.records import Candidate, Choice, ComparisonRecord, Side
from nestling.serving.store.store import Store

router = APIRouter(prefix="/api", tags=["arena"])


class CandidateBody(Wire):
    """One side: a model and how it samples."""

    model: str
    sampling: PageSampling = PageSampling()


class ComparisonBody(Wire):
    """Two candidates that will answer `parent` (the last user's message if not given), or two replies that are there."""

    parent: str | None = None
    candidates: list[CandidateBody] | None = Field(None, min_length=2, max_length=2)
    replies: list[str] | None = Field(None, min_length=2, max_length=2)

    @model_validator(mode="after")
    def _one_kind(self) -> Self:
        if (self.candidates is None) == (self.replies is None):
            raise UserError("give either candidates or replies")
        return self


class DecisionBody(Wire):
    """Which reply is better."""

    choice: Choice
    comment: str = ""


@router.post("/conversations/{id}/comparisons", status_code=201)
def compare(request: Request, store: OpenStore, id: str, body: ComparisonBody) -> ComparisonRecord:
    """Begin a comparison; who is a and who is b is drawn, and told after the vote."""
    if body.replies is not None:
        return store.arena.compare_replies(id, body.replies)
    candidates = [_candidate(request, one) for one in body.candidates or ()]
    return store.arena.compare(id, body.parent or _last_question(store, id), candidates)


@router.get("/comparisons/{id}")
def get_comparison(store: OpenStore, id: str) -> ComparisonRecord:
    """One comparison."""
    return store.arena.get(id)


@router.post("/comparisons/{id}/reply/{side}")
async def reply_of_side(request: Request, store: OpenStore, id: str, side: Side) -> Response:
    """Write one side of a comparison, told as server-sent events."""
    comparison = await asyncio.to_thread(store.arena.get, id)
    candidate = await asyncio.to_thread(store.arena.candidate, id, side)
    body = ReplyRequest(
        parent=comparison.parent, model=candidate.model, sampling=PageSampling.model_validate(candidate.sampling)
    )
    wanted = await wish_for(request, store, comparison.conversation, body)
    begun = await begin(request, store, wanted)
    return tell(request, store, begun, lambda written: store.arena.answer(id, side, written), blind=True)


@router.put("/comparisons/{id}/vote")
def decide(store: OpenStore, id: str, body: DecisionBody) -> ComparisonRecord:
    """Vote, and learn who was who."""
    return store.arena.decide(id, body.choice, body.comment)


@router.get("/arena")
def arena(store: OpenStore) -> ArenaTable:
    """The models that met in the caller's comparisons, rated by Bradley and Terry."""
    return store.arena.table()


def _candidate(request: Request, body: CandidateBody) -> Candidate:
    if body.model == AUTO:
        raise ApiError("a comparison is between models; the router is none", param="candidates", code="invalid_value")
    request.app.state.models.chat(body.model)
    return Candidate(model=body.model, sampling=body.sampling.model_dump(exclude_none=True), seed=body.sampling.seed)


def _last_question(store: Store, id: str) -> str:
    path = store.conversations.path(id, store.conversations.get(id).tip)
    asked = [message.id for message in path if message.role == "user"]
    if not asked:
        raise UserError("there is nothing to answer yet", where="parent", fix="ask something first")
    return asked[-1]
