"""What a text must be: a JSON schema, any JSON object, a regular expression, one of some choices, or a Lark grammar.

llguidance turns each into a matcher that says which tokens may come next; here is the bridge to our tokenizer and to the
rows of the engine. A `Guide` is where one row is in its text; `Guide.allowed` becomes -inf elsewhere before a strategy
sees the logits (`View.penalised`), so every strategy obeys, and a row without a guide is not touched.

- Control tokens never match text. A Lark grammar may name one: `start: <tool_call> %json {…} </tool_call>`. Where it names
  a stop token, such as `<|im_end|>`, what follows in the grammar holds for what follows a tool's result.
- A stop token may come exactly where the text may end. Where it must end, the row ends at once, without a stop token.
- JSON is written on one line, with or without one blank after a comma or colon; "x-guidance" in a schema changes that.
- Properties come in the schema's order. A keyword that can't be enforced is refused, not ignored.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper
from torch import Tensor

from nestling.core.errors import UserError
from nestling.tokenizer.bpe import Tokenizer
from nestling.tokenizer.special import PAD, TURN_START

SPACING: Any = {"whitespace_flexible": False, "item_separator": ", ?", "key_separator": ": ?"}
KEPT = 64
"""Compiled constraints that are remembered; a server sees the same few again and again."""


@dataclass(frozen=True)
class Ends:
    """Tokens that end a text: those that are text, those that are control tokens, and llguidance's own (we have none)."""

    text: tuple[int, ...]
    control: tuple[int, ...]
    phantom: int


class Guide:
    """Where one row is in the text that its constraint describes.

    Args:
        matcher: llguidance's state; changed by `push`.
        ends: tokens that may come where the text may end.
    """

    __slots__ = ("_ends", "_matcher", "allowed")

    def __init__(self, matcher: LLMatcher, ends: Ends) -> None:
        self._matcher, self._ends = matcher, ends
        self.allowed: bytes | None = self._next()
        """A bit per token that may come next, lowest bit first (see `unpack`); None: the text is complete, all may."""

    def copy(self) -> Guide:
        """The same place, for a row that goes its own way from here."""
        twin = object.__new__(Guide)
        twin._matcher, twin._ends, twin.allowed = self._matcher.deep_copy(), self._ends, self.allowed
        return twin

    def push(self, token: int) -> Literal["stop", "length"] | None:
        """Go on by one allowed token.

        Returns "stop" when the text is now complete, "length" when it can't be completed with this tokenizer or within
        llguidance's limits, None when it goes on. After "stop" anything may follow: what a tool call's result leads to.
        """
        if self.allowed is None:
            return None
        consumed = self._matcher.try_consume_tokens([token]) == 1
        if not consumed or (self._matcher.is_stopped() and not self._matcher.is_error()):
            self.allowed = None  # not consumed: a stop token that the constraint does not name
            return "stop"
        self.allowed = self._next()
        return None if any(self.allowed) else "length"

    def _next(self) -> bytes:
        if self._matcher.is_error():
            return b""
        bits = bytearray(self._matcher.compute_bitmask())
        for token in (self._ends.phantom, *self._ends.text):
            bits[token >> 3] &= ~(1 << (token & 7))
        if self._matcher.is_accepting():
            for token in (*self._ends.text, *self._ends.control):
                bits[token >> 3] |= 1 << (token & 7)
        return bytes(bits)


def unpack(masks: Sequence[bytes], vocabulary: int) -> Tensor:
    """Some guides' `allowed` as a bool tensor [N, V]; ids past the tokenizer's last are false.

    >>> unpack([bytes([0b101])], 4)
    tensor([[ True, False,  True, False]])
    """
    packed = torch.from_numpy(np.stack([np.frombuffer(mask, dtype=np.uint8) for mask in masks]))
    bits = (packed.unsqueeze(2) >> torch.arange(8, dtype=torch.uint8)) & 1
    flat = bits.flatten(1)[:, :vocabulary].bool()
    return torch.nn.functional.pad(flat, (0, vocabulary - flat.shape[1]))


class Grammars:
    """Constraints compiled for one tokenizer.

    Args:
        tokenizer: whose tokens the text is made of.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self._compiled: dict[str, LLMatcher] = {}

    def open(self, constraint: dict[str, Any], stops: Iterable[int]) -> Guide:
        """A guide at the beginning of a text.

        Raises:
            UserError: the constraint is not valid, asks for what can't be enforced, or no token can begin such a text.
        """
        key = json.dumps(constraint, ensure_ascii=False)
        if key not in self._compiled:
            if len(self._compiled) >= KEPT:
                del self._compiled[next(iter(self._compiled))]
            self._compiled[key] = self._compile(constraint)
        guide = Guide(self._compiled[key].deep_copy(), self._ends(stops))
        if not any(guide.allowed or b""):
            raise UserError("no token of this tokenizer can begin such a text", where="sampling.constraint")
        return guide

    def _ends(self, stops: Iterable[int]) -> Ends:
        size, control = self.tokenizer.vocab_size, set(self.tokenizer.special.values())
        known = {stop for stop in stops if stop < size}
        return Ends(text=tuple(known - control), control=tuple(known & control), phantom=size)

    def _compile(self, constraint: dict[str, Any]) -> LLMatcher:
        [(kind, given)] = constraint.items()
        grammar = _grammar(kind, given)
        matcher = LLMatcher(self._bridge, grammar, log_level=0)
        if matcher.is_error():
            raise UserError(_reason(matcher.get_error()), where=f"sampling.constraint.{kind}", value=given)
        return matcher

    @cached_property
    def _bridge(self) -> LLTokenizer:
        """llguidance's view of the tokenizer; its end token is one more than we have, since a guide knows the stops."""
        return LLTokenizer(TokenizerWrapper(_Vocabulary(self.tokenizer)), n_vocab=self.tokenizer.vocab_size + 1)


class _Vocabulary:
    """What llguidance wants to know of a tokenizer: the bytes of each token, and how a text is cut."""

    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        names = {number: name for name, number in tokenizer.special.items() if name not in (PAD, TURN_START)}
        size = tokenizer.vocab_size
        self.eos_token_id = size
        self.special_token_ids = [*names, size]
        self.tokens = [names[n].encode() if n in names else tokenizer.decode_bytes([n]) for n in range(size)]
        self.tokens.append(b"<end>")

    def __call__(self, text: bytes | str) -> list[int]:
        """Ids of a part of a text: without the space that SentencePiece's models put before a whole one."""
        text = text if isinstance(text, str) else text.decode()
        lead = "\n" if self._tokenizer.strips_first else ""
        return self._tokenizer.encode(lead + text)[len(self._tokenizer.encode(lead)) :]


def _grammar(kind: str, given: Any) -> str:
    """llguidance's form of a constraint; what is inside is checked when it is compiled."""
    if kind == "json_schema":
        return LLMatcher.grammar_from_json_schema(json.dumps(given), defaults=SPACING)
    if kind == "json_object":
        return LLMatcher.grammar_from_json_schema('{"type": "object"}', defaults=SPACING)
    if kind == "regex":
        return LLMatcher.grammar_from_regex(given)
    if kind == "choice":
        return LLMatcher.grammar_from_lark("start: " + " | ".join(json.dumps(text) for text in given))
    return LLMatcher.grammar_from_lark(given)


def _reason(message: str) -> str:
    """The line of llguidance's error that says what is wrong, without its drawings of where."""
    lines = message.strip().splitlines()
    return next((line for line in lines if line.startswith("error: ")), lines[0]).removeprefix("error: ")
