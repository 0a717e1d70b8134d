"""/v1/moderations: verdicts of the moderation model that the service was given."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Annotated, Any

from fastapi import APIRouter, Request
from pydantic import Field

from nestling.core.runtime import fresh_name
from nestling.serving.errors import ApiError
from nestling.serving.guarding import NAME
from nestling.serving.protocol.messages import Part, Wire, to_text

router = APIRouter(tags=["moderations"])


class ModerationRequest(Wire):
    """Texts to judge. Whatever `model` names, which clients fill in, the service's one judges, and its name is told."""

    input: str | Annotated[list[str], Field(min_length=1, max_length=2048)] | Annotated[list[Part], Field(min_length=1)]
    model: str | None = None


@router.post("/v1/moderations")
async def create_moderation(request: Request, body: ModerationRequest) -> dict[str, Any]:
    """A verdict for each text, in OpenAI's categories."""
    moderator = request.app.state.moderator
    if moderator is None:
        what = "this service has no moderation model; start it with --moderation FOLDER"
        raise ApiError(what, status=404, code="model_not_found", param="model")
    verdicts = await asyncio.to_thread(moderator.judge, _texts(body))
    results = [{"flagged": verdict.flagged, "categories": verdict.categories, "category_scores": verdict.scores,
                "category_applied_input_types": {name: ["text"] for name in verdict.categories}}
               for verdict in verdicts]  # fmt: skip
    return {"id": f"modr-{fresh_name()}", "model": NAME, "results": results}


def _texts(body: ModerationRequest) -> list[str]:
    if isinstance(body.input, str):
        return [body.input]
    given: Sequence[str | Part] = body.input
    return [one if isinstance(one, str) else to_text([one], f"input[{n}]") for n, one in enumerate(given)]
