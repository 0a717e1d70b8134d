"""/v1/embeddings: the request, and vectors as numbers or as base64."""

from __future__ import annotations

import base64
import struct
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Field

from nestling.serving.protocol.completions import Ids
from nestling.serving.protocol.messages import Wire

MAX_INPUTS = 2048
Input = Annotated[str, Field(min_length=1)]


class EmbeddingRequest(Wire):
    """Embed one or several texts, given as texts or as token ids."""

    model: str
    input: (
        Input
        | Annotated[list[Input], Field(min_length=1, max_length=MAX_INPUTS)]
        | Ids
        | Annotated[list[Ids], Field(min_length=1, max_length=MAX_INPUTS)]
    )
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: int | None = Field(None, ge=1)
    user: str | None = None

    @property
    def inputs(self) -> list[str | list[int]]:
        """The inputs one by one."""
        given: Any = self.input
        return [given] if isinstance(given, str) or isinstance(given[0], int) else list(given)


def embedding_list(vectors: Sequence[Sequence[float]], model: str, tokens: int, *, as_base64: bool) -> dict[str, Any]:
    """The answer."""
    data = [
        {"object": "embedding", "index": place, "embedding": packed(vector) if as_base64 else vector}
        for place, vector in enumerate(vectors)
    ]
    return {"object": "list", "data": data, "model": model, "usage": {"prompt_tokens": tokens, "total_tokens": tokens}}


def packed(vector: Sequence[float]) -> str:
    """Little-endian float32 in base64, as OpenAI's SDK asks for.

    >>> packed([1.0])
    'AACAPw=='
    """
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()
