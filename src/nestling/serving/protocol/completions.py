"""/v1/completions: the request, and the JSON of its choices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import Field

from nestling.serving.errors import ApiError, unsupported
from nestling.serving.protocol.chat import StreamOptions, Writer
from nestling.serving.protocol.decoding import Decoding
from nestling.serving.protocol.logprobs import TextLogprobs
from nestling.tokenizer.bpe import Tokenizer

DEFAULT_TOKENS = 16
Ids = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]
Texts = Annotated[list[str], Field(min_length=1)]


class CompletionRequest(Decoding):
    """Continue one or several prompts, as texts or as token ids."""

    model: str
    prompt: str | Texts | Ids | Annotated[list[Ids], Field(min_length=1)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: int | None = Field(None, ge=1, le=128)
    best_of: int | None = Field(None, ge=1, le=20)
    max_tokens: int | None = Field(None, ge=0)
    echo: bool | None = None
    logprobs: int | None = Field(None, ge=0, le=5)
    suffix: str | None = None
    user: str | None = None

    def check(self) -> None:
        """Refuse what would be silently wrong.

        Raises:
            ApiError: a suffix, nothing to write, best_of with stream or below n.
        """
        if self.suffix is not None:
            raise unsupported("suffix", "this model writes from left to right; it cannot fill a gap")
        if self.max_tokens == 0 and not self.echo:
            what = "max_tokens: 0 needs echo, else nothing would be told"
            raise ApiError(what, param="max_tokens", code="invalid_value")
        if self.best_of is not None and (self.stream or self.best_of < (self.n or 1)):
            what = "best_of: cannot be streamed" if self.stream else "best_of: must be at least n"
            raise ApiError(what, param="best_of", code="invalid_value")

    def prompts(self, tokenizer: Tokenizer) -> list[list[int]]:
        """The ids of each prompt; a text begins where a document begins, as in pre-training.

        Raises:
            ApiError: a token id that the model does not have.
        """
        given: Any = [""] if self.prompt is None else self.prompt
        several = given if isinstance(given, list) and not isinstance(given[0], int) else [given]
        return [
            [tokenizer.start_of_text, *tokenizer.encode(one)]
            if isinstance(one, str)
            else check_ids(tokenizer, one, "prompt")
            for one in several
        ]


def check_ids(tokenizer: Tokenizer, ids: Sequence[int], param: str) -> list[int]:
    """The ids, if the tokenizer has them all.

    Raises:
        ApiError: it has not.
    """
    if max(ids) >= tokenizer.vocab_size:
        what = f"{param}: the model has no token {max(ids)}; its ids end at {tokenizer.vocab_size - 1}"
        raise ApiError(what, param=param, code="invalid_value")
    return list(ids)


@dataclass
class TextWriter(Writer):
    """Writes the JSON of completions."""

    def choice(self, index: int, text: str, logprobs: TextLogprobs, finish: str | None = None) -> dict[str, Any]:
        """One entry of `choices`."""
        told = logprobs.told if self.logprobs else None
        return {"index": index, "text": text, "logprobs": told, "finish_reason": finish}

    def chunk(self, index: int, text: str, logprobs: TextLogprobs, finish: str | None = None) -> dict[str, Any]:
        """One chunk of a stream, with the logprobs that no chunk has told yet."""
        told = self.body([self.choice(index, text, logprobs, finish)])
        logprobs.clear()
        return told

    def body(self, choices: list[dict[str, Any]], usage: dict[str, Any] | None = None) -> dict[str, Any]:
        """A whole reply, or a chunk of a stream."""
        return self._head("text_completion", choices) | ({"usage": usage} if usage or self.include_usage else {})
