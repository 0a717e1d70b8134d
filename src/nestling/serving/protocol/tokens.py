"""/tokenize and /detokenize: the requests, and tokens as a picture of a text shows them."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, model_validator

from nestling.core.errors import UserError
from nestling.serving.protocol.messages import ChatMessage, Wire
from nestling.tokenizer.bpe import Tokenizer


class TokenizeRequest(Wire):
    """A text, or a conversation as the model reads it."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[ChatMessage], Field(min_length=1)] | None = None
    add_generation_prompt: bool = True

    @model_validator(mode="after")
    def _one_of_both(self) -> TokenizeRequest:
        if (self.prompt is None) == (self.messages is None):
            raise UserError("either prompt or messages", where="prompt")
        return self


class DetokenizeRequest(Wire):
    """Token ids."""

    model: str | None = None
    tokens: list[Annotated[int, Field(ge=0)]]


def token_list(tokenizer: Tokenizer, ids: list[int], context: int) -> dict[str, Any]:
    """The answer of /tokenize."""
    pieces = [{"id": piece.id, "text": piece.text, "bytes": list(piece.bytes), "control": piece.control}
              for piece in tokenizer.view(ids)]  # fmt: skip
    return {"tokens": ids, "count": len(ids), "max_model_len": context, "pieces": pieces}
