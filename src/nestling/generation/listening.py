"""Tool calls out of a stream in a foreign form: what may be a call is held back, and goes on in our form or as it was.

Who shows a reply knows one form of call: the control token <tool_call>, JSON, </tool_call>. A model that was made elsewhere
may write others (`tokenizer/calls.py`), of which only the end of the turn tells whether they are calls.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence

from nestling.generation.sequence import Piece
from nestling.tokenizer.bpe import Tokenizer
from nestling.tokenizer.calls import may_call, read_calls
from nestling.tokenizer.special import CALL_END, CALL_START, THINK_END, THINK_START

OWN = (CALL_START, CALL_END, THINK_START, THINK_END)


class Listener:
    """Turns the pieces of one reply, tools' answers included, into our form.

    Args:
        tools: names of those on offer; without any nothing is a call, but blanks before the reply are dropped all the same.
        opened: the control token with which the prompt has already begun the reply, if any.
    """

    def __init__(self, tokenizer: Tokenizer, tools: Sequence[str], opened: str = "") -> None:
        self._is_foreign, self._tools = not tokenizer.has_own_form, tuple(tools)
        self._ends = tokenizer.turn_ends if self._is_foreign else frozenset()
        self._held: list[Piece] = []
        self._is_first = True  # whether nothing has been said in this turn
        self._depth = int(bool(opened))  # inside a call or thought whose tokens say so

    def listen(self, pieces: Iterable[Piece]) -> Iterator[Piece]:
        """All pieces of a stream."""
        for piece in pieces:
            yield from self.read([piece])
        yield from self.end()

    def read(self, pieces: Iterable[Piece]) -> list[Piece]:
        """What can be told after some more pieces."""
        if not self._is_foreign:
            return list(pieces)
        return [told for piece in pieces for told in self._one(piece)]

    def end(self) -> list[Piece]:
        """What was held back, when a turn is over."""
        held, self._held, self._is_first = self._held, [], True
        said, calls = read_calls("".join(piece.text for piece in held), self._tools)
        if not calls:
            return held
        told = [Piece(said)] if said else []
        for call in calls:
            text = json.dumps({"name": call.name, "arguments": call.arguments}, ensure_ascii=False)
            told += [Piece(CALL_START, control=True), Piece(text), Piece(CALL_END, control=True)]
        return told

    def _one(self, piece: Piece) -> list[Piece]:
        is_mark = piece.control and piece.text in OWN
        if is_mark:
            self._depth += 1 if piece.text in (CALL_START, THINK_START) else -self._depth
        if not piece.sampled or piece.token in self._ends:
            self._depth *= piece.token not in self._ends
            return [*self.end(), piece]
        is_inside = is_mark or self._depth > 0
        if self._is_first and not (self._held or is_inside or piece.control):
            piece = piece._replace(text=piece.text.lstrip())  # templates begin a reply with blanks
            if not piece.text:
                return [piece]  # for its tokens
        self._held.append(piece)
        if self._tools and not is_inside and may_call("".join(part.text for part in self._held), offered=self._is_first):
            return []
        held, self._held, self._is_first = self._held, [], is_inside and piece.text == THINK_END
        return held
