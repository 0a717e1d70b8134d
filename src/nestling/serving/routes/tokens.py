"""/tokenize and /detokenize: how a model cuts a text or a conversation into tokens."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request

from nestling.serving.errors import ApiError
from nestling.serving.models import Models, Served
from nestling.serving.protocol.completions import check_ids
from nestling.serving.protocol.messages import to_messages
from nestling.serving.protocol.tokens import DetokenizeRequest, TokenizeRequest, token_list
from nestling.tokenizer.conversation import render

router = APIRouter(tags=["tokens"])
MOST_TOKENS = 100_000
"""Of a text that is cut; the answer is a hundred times as large."""


@router.post("/tokenize")
def tokenize(request: Request, body: TokenizeRequest) -> dict[str, Any]:
    """Ids, their count, and each token's text and bytes."""
    served = _served(request, body.model)
    if body.messages is None:
        ids = served.tokenizer.encode(body.prompt or "")
    else:
        request.app.state.models.chat(served.name)
        messages = to_messages(body.messages, served.tokenizer)
        ids = render(served.tokenizer, messages, prompt=body.add_generation_prompt).ids
    if len(ids) > MOST_TOKENS:
        raise ApiError(f"at most {MOST_TOKENS} tokens at once; these are {len(ids)}", code="string_above_max_length",
                       param="prompt" if body.messages is None else "messages")  # fmt: skip
    return token_list(served.tokenizer, ids, served.context)


@router.post("/detokenize")
def detokenize(request: Request, body: DetokenizeRequest) -> dict[str, Any]:
    """The text of ids, control tokens spelled."""
    served = _served(request, body.model)
    ids = check_ids(served.tokenizer, body.tokens, "tokens") if body.tokens else []
    return {"prompt": served.tokenizer.decode(ids, control=True)}


def _served(request: Request, name: str | None) -> Served:
    """The model of that name; without a name the default one."""
    models: Models = request.app.state.models
    return models.default if name is None else models.get(name)
