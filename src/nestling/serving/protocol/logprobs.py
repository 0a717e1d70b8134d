"""Log-probabilities of written tokens, as chat tells them and as the older completions do."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from nestling.generation.sequence import TokenLog
from nestling.tokenizer.bpe import Tokenizer

LOWEST = -9999.0
"""What OpenAI tells for a log-probability of minus infinity, for which JSON has no word."""


def chat_logprobs(tokenizer: Tokenizer, tokens: Sequence[TokenLog]) -> list[dict[str, Any]]:
    """The `content` list of a chat choice's logprobs."""
    told = []
    for log in tokens:
        top = [_entry(tokenizer, token, logprob) for token, logprob in log.alternatives]
        told.append({**_entry(tokenizer, log.id, log.logprob), "top_logprobs": top})
    return told


class TextLogprobs:
    """The logprobs of a completion choice, which lie side by side in lists.

    Args:
        count: alternatives asked for; the token itself is told beside them. None: nothing is told.
        start: characters of the text before the first token.
    """

    def __init__(self, tokenizer: Tokenizer, count: int | None, start: int = 0) -> None:
        self._tokenizer, self._count, self._end = tokenizer, count, start
        self.told: dict[str, list[Any]] = {}
        self.clear()

    def clear(self) -> None:
        """Forget what was told; the offset stays."""
        self.told = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}

    def add(self, token: int, logprob: float | None, alternatives: Iterable[tuple[int, float]]) -> None:
        """The next token; the first one of a prompt has no logprob."""
        if self._count is None:
            return
        name = spelled(self._tokenizer, token)
        known = None if logprob is None else _finite(logprob)
        best = {spelled(self._tokenizer, other): _finite(value) for other, value in alternatives}
        row = (name, known, best | {name: known} if self._count and known is not None else None, self._end)
        for column, value in zip(self.told.values(), row, strict=True):
            column.append(value)
        self._end += len(self._tokenizer.decode([token], control=True, begins=False))


def spelled(tokenizer: Tokenizer, token: int) -> str:
    """A token as text; bytes that are no whole characters as "bytes:\\\\xe2\\\\x98"."""
    raw = tokenizer.decode_bytes([token], control=True)
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def _entry(tokenizer: Tokenizer, token: int, logprob: float) -> dict[str, Any]:
    raw = tokenizer.decode_bytes([token], control=True)
    return {"token": spelled(tokenizer, token), "logprob": _finite(logprob), "bytes": list(raw)}


def _finite(logprob: float) -> float:
    return max(logprob, LOWEST)
