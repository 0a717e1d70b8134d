"""/api/render: Markdown as HTML, for replies that the page shows again."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter
from pydantic import Field, field_validator

from nestling.core.errors import UserError
from nestling.serving.protocol.messages import Wire
from nestling.serving.rendering import to_html

router = APIRouter(prefix="/api", tags=["page"])
MOST_CHARACTERS = 500_000
"""Of all texts of a request together; the slowest kind of text takes about ten seconds then."""


class RenderRequest(Wire):
    """Texts as models write them."""

    texts: Annotated[list[str], Field(max_length=500)]

    @field_validator("texts")
    @classmethod
    def _not_too_much(cls, texts: list[str]) -> list[str]:
        if (count := sum(map(len, texts))) > MOST_CHARACTERS:
            raise UserError(f"at most {MOST_CHARACTERS} characters at once", value=count)
        return texts


@router.post("/render")
def render(body: RenderRequest) -> dict[str, Any]:
    """Sanitised HTML of each text."""
    return {"data": [to_html(text) for text in body.texts]}
