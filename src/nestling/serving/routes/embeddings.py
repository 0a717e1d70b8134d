"""/v1/embeddings: mean-pooled hidden states of the model, normalised to length 1."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request

from nestling.serving.answering import too_long
from nestling.serving.errors import ApiError, unsupported
from nestling.serving.models import Served
from nestling.serving.protocol.completions import check_ids
from nestling.serving.protocol.embeddings import EmbeddingRequest, embedding_list
from nestling.serving.reading import embeddings

router = APIRouter(tags=["embeddings"])


@router.post("/v1/embeddings")
async def create_embeddings(request: Request, body: EmbeddingRequest) -> dict[str, Any]:
    """A vector for each input."""
    served: Served = request.app.state.models.get(body.model)
    size = served.driver.engine.model.config.d_model
    if body.dimensions not in (None, size):
        raise unsupported("dimensions", f"this model's vectors have {size}; a part of one means nothing")
    texts = [_ids(served, one, f"input[{place}]") for place, one in enumerate(body.inputs)]
    record = request.state.record
    record.model, record.prompt_tokens = served.name, sum(map(len, texts))
    vectors = await embeddings(served.driver, texts)
    as_base64 = body.encoding_format == "base64"
    return embedding_list(vectors, served.name, record.prompt_tokens, as_base64=as_base64)


def _ids(served: Served, one: str | list[int], param: str) -> list[int]:
    ids = served.tokenizer.encode(one) if isinstance(one, str) else check_ids(served.tokenizer, one, param)
    if not ids:
        raise ApiError(f"{param}: is empty", param=param, code="invalid_value")
    if len(ids) > served.context:
        raise too_long(len(ids), served.context, param)
    return ids
