"""What is known on the host about one request while it runs: its rows, their text, why they ended."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

from torch import Tensor

from nestling.generation.constraints import Guide
from nestling.generation.sampling import Noise, Sampling
from nestling.tokenizer.bpe import Tokenizer
from nestling.tokenizer.stream import StreamDecoder

Finish = Literal["stop", "length", "cancelled"]
Interject = Callable[[list[int]], list[int] | None]
"""Given all tokens so far (prompt excluded) after each sampled one, may return tokens to force: a tool's result."""


@dataclass(frozen=True)
class Request:
    """A text to continue.

    >>> Request(ids=[5, 17, 9], sampling=Sampling(temperature=0.7, max_tokens=20), seed=3).seed
    3
    """

    ids: Sequence[int]
    sampling: Sampling = field(default_factory=Sampling)
    seed: int = 0
    interject: Interject | None = None
    stop_ids: frozenset[int] | None = None
    """Tokens that end the text; the tokenizer's `stop_ids` when not given."""
    speculate: int = 0
    """Tokens proposed ahead per step (see generation/speculation.py); for sample and greedy."""


Alternatives = tuple[tuple[int, float], ...]
"""(token, log-probability), likeliest first."""


@dataclass(frozen=True)
class Completion:
    """What was written. `ids`, `sampled` and `logprobs` have the same length; a stop token is the last of `ids`.

    `logprobs[t]` is log softmax(logits / temperature) at ids[t], before any filter: what the learner computes with the
    same temperature (1 for greedy). Forced tokens have 0. `text` ends before the stop token or stop text.
    `top_logprobs[t]` are the likeliest (token, log-probability) at t by the same measure, as many as the request's
    `top_logprobs` asks for and none at a forced token; the list is empty where none are asked for.
    """

    ids: list[int]
    sampled: list[bool]
    logprobs: list[float]
    text: str
    finish: Finish
    top_logprobs: list[list[tuple[int, float]]] = field(default_factory=list)
    others: list[Completion] = field(default_factory=list)
    """What the other rows of a strategy with several hold, best first; empty where there is one row."""
    proposed: int = 0
    """Tokens proposed by speculation, of which `accepted` were taken."""
    accepted: int = 0
    reused: int = 0
    """Tokens of the prompt whose keys and values were copied from a text before or beside it instead of computed."""


class TokenLog(NamedTuple):
    """A sampled token, its log-probability as in `Completion.logprobs`, and the alternatives that were asked for."""

    id: int
    logprob: float
    alternatives: Alternatives = ()


class Piece(NamedTuple):
    """A part of a streamed text. A control token (`control`) comes alone, spelled; `token` is its id.

    `tokens` are the sampled tokens whose last character this piece shows; a character of several tokens comes with all
    of them. A token that ends in a stop text is in no piece.
    """

    text: str
    sampled: bool = True
    control: bool = False
    token: int | None = None
    tokens: tuple[TokenLog, ...] = ()


class Watch:
    """Text as it grows: looks for stop texts, and releases only what can no longer become part of one."""

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str], begins: bool = True) -> None:
        self._tokenizer, self._stops = tokenizer, stops
        self._names = {number: name for name, number in tokenizer.special.items()}
        self._decoder = StreamDecoder(tokenizer, begins)
        self._held = ""  # decoded, not released: it may be the beginning of a stop text
        self._logs: deque[tuple[int, TokenLog]] = deque()  # tokens not released, and where in the text each ends
        self.text = ""
        self._pieces: list[Piece] = []

    def read(self, logs: Sequence[TokenLog]) -> bool:
        """Add sampled tokens, as one piece where nothing has to be looked for; true when a stop text is now complete."""
        ids = [log.id for log in logs]
        busy = self._stops or self._held or self._logs
        if busy or not self._names.keys().isdisjoint(ids) or not self._decoder.ends_whole(ids[-1]):
            return any(self.push(log.id, log=log) for log in logs)
        self._held = self._decoder.push(*ids)
        self._logs.extend((len(self.text) + len(self._held), log) for log in logs)
        self._release(len(self._held), True)
        return False

    def push(self, token: int, sampled: bool = True, log: TokenLog | None = None) -> bool:
        """Add one token; true when a stop text is now complete (its text and what follows are not released)."""
        if token in self._names:
            self.flush(sampled)
            self._pieces.append(Piece(self._names[token], sampled, True, token, () if log is None else (log,)))
            return False
        text = self._decoder.push(token)
        self._held += text
        if log is not None:
            self._logs.append((len(self.text) + len(self._held), log))
        found = [place for stop in self._stops if (place := self._held.find(stop)) >= 0] if sampled else []
        if found:
            self._release(min(found), sampled)
            self._held = ""
            self._logs.clear()
            self._decoder = StreamDecoder(self._tokenizer, begins=False)
            return True
        self._release(len(self._held) - (self._overlap() if sampled else 0), sampled)
        return False

    def flush(self, sampled: bool = True) -> None:
        """Release everything that was held back; called at the end and where who writes changes."""
        self._held += self._decoder.flush()
        self._release(len(self._held), sampled)

    def force(self, tokens: Sequence[int]) -> None:
        """Add tokens that the model did not write; no stop text is looked for in them."""
        self.flush()
        for token in tokens:
            self.push(token, sampled=False)
        self.flush(sampled=False)

    def take(self) -> list[Piece]:
        """The released pieces, once."""
        taken, self._pieces = self._pieces, []
        return taken

    def _release(self, length: int, sampled: bool) -> None:
        if length <= 0:
            return
        self.text += self._held[:length]
        logs: list[TokenLog] = []
        while self._logs and self._logs[0][0] <= len(self.text):
            logs.append(self._logs.popleft()[1])
        self._pieces.append(Piece(self._held[:length], sampled, tokens=tuple(logs)))
        self._held = self._held[length:]

    def _overlap(self) -> int:
        """Characters at the end of the held text that begin a stop text."""
        for length in range(min(len(self._held), max(map(len, self._stops), default=1) - 1), 0, -1):
            if any(stop.startswith(self._held[-length:]) for stop in self._stops):
                return length
        return 0


@dataclass(slots=True, eq=False)
class Row:
    """One continuation of a request's prompt, in one row of the cache."""

    slot: int
    watch: Watch | None
    read: int = 0  # tokens that the watch knows
    left: int = 0  # how many more tokens there may be
    cached: int = 0  # tokens of prompt + ids that the cache holds
    ids: list[int] = field(default_factory=list)
    sampled: list[bool] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    tops: list[Alternatives] = field(default_factory=list)  # of each token, where the request asks for them
    count: int = 0  # sampled tokens
    score: float = 0.0  # their summed log-probability
    finish: str | None = None
    guide: Guide | None = None  # where it is in the text that the request's constraint describes

    def fork(self, slot: int) -> Row:
        """A copy that lives in another cache row; rows that fork have no watch (see `Running`)."""
        row = Row(slot, None, left=self.left)
        row.cached, row.count, row.score, row.finish = self.cached, self.count, self.score, self.finish
        row.ids, row.sampled, row.logprobs = self.ids[:], self.sampled[:], self.logprobs[:]
        row.tops = self.tops[:]
        row.guide = self.guide and self.guide.copy()
        return row


class Running:
    """A submitted request: its rows while it runs, its `completion` when it is done.

    A lone row is watched as it grows. Where several rows compete, nothing can be shown before one has won, so their
    texts are read again when needed.
    """

    def __init__(
        self, request: Request, tokenizer: Tokenizer, *, stop_ids: frozenset[int], width: int, capacity: int
    ) -> None:
        self.request, self.tokenizer, self.stop_ids = request, tokenizer, stop_ids
        self.width, self.capacity = width, capacity  # rows of the request, tokens of a row
        self.prompt = list(request.ids)
        self._begins = self.prompt[-1] in tokenizer.special.values()  # else what is written goes on with a text
        self.sampling, self.stops, self.interject = request.sampling, request.sampling.stop, request.interject
        self.noise = Noise(request.seed)
        self.rows: list[Row] = []
        self.memory: Any = None
        self.begun = False  # whether the strategy has seen the prompt
        self.reads_prompt = False
        self.proposed = self.accepted = 0  # tokens of speculation
        self.reused = 0  # tokens of the prompt that the first row did not compute
        self.outputs: list[Tensor] = []  # the model's at the prompt, for a strategy that reads them
        self.guide: Guide | None = None  # of a text that has not begun
        self.completion: Completion | None = None
        self.cancelled = False
        self._pieces: list[Piece] = []

    def start(self, stream: bool) -> None:
        """Make the rows; the caller gives them their slots."""
        watched = self.width == 1 and (stream or bool(self.stops))
        left = min(self.sampling.max_tokens, self.capacity - len(self.prompt))
        self.rows = [Row(-1, self._new_watch() if watched else None, left=left) for _ in range(self.width)]
        for row in self.rows:
            row.guide = self.guide and self.guide.copy()

    def length(self, row: Row) -> int:
        """Tokens of prompt and continuation."""
        return len(self.prompt) + len(row.ids)

    def pending(self, row: Row) -> list[int]:
        """Tokens of prompt and continuation that the cache does not hold yet."""
        start = row.cached - len(self.prompt)
        return row.ids[start:] if start >= 0 else self.prompt[start:] + row.ids

    def append(self, row: Row, token: int, logprob: float, top: Alternatives = ()) -> None:
        """Add a sampled token to a row, let the request interject, and see whether the row has ended."""
        row.ids.append(token)
        row.sampled.append(True)
        row.logprobs.append(logprob)
        if top:
            row.tops.append(top)
        row.count += 1
        row.left -= 1
        row.score += logprob
        if row.guide is not None:
            row.finish = row.guide.push(token)
        if token in self.stop_ids:
            row.finish = "stop"
        elif self.stops and self._completes_stop_text(row):
            row.finish = "stop"
            return
        if self.interject is not None and row.count < self.sampling.max_tokens:
            self._interject(row, self.interject)
        if row.finish is None and row.left <= 0:
            row.finish = "length"

    def drop(self, row: Row) -> None:
        """Give a row up: nothing follows from it, and it is never the result."""
        row.finish, row.score = "dropped", -math.inf

    def complete(self, rows: Sequence[Row], finish: Finish | None = None) -> None:
        """Fix the result: what the first of these rows holds; the others stand beside it."""
        best, pieces = self._result(rows[0], finish)
        others = [self._result(row, finish)[0] for row in rows[1:] if row.finish != "dropped"]
        best = replace(best, proposed=self.proposed, accepted=self.accepted, reused=self.reused)
        self.completion = replace(best, others=others)
        self._pieces += pieces
        self.rows = []

    def _result(self, row: Row, finish: Finish | None) -> tuple[Completion, list[Piece]]:
        """What a row holds, and the pieces of its text that were not taken yet."""
        watch = row.watch or (self._new_watch() if self.width > 1 else None)
        pieces: list[Piece] = []
        if watch is None:
            stopped = bool(row.ids) and row.sampled[-1] and row.ids[-1] in self.stop_ids
            text = self.tokenizer.decode(row.ids[:-1] if stopped else row.ids, begins=self._begins)
        else:
            self._read(row, watch)
            watch.flush()
            text, pieces = watch.text, watch.take()
        tops = [list(top) for top in row.tops]
        return Completion(row.ids, row.sampled, row.logprobs, text, finish or _finish(row), tops), pieces

    def take_pieces(self) -> list[Piece]:
        """What became readable since the last call; only for requests submitted with `stream`."""
        for row in self.rows:
            if row.watch is not None:
                self._read(row, row.watch)
                self._pieces += row.watch.take()
        taken, self._pieces = self._pieces, []
        return taken

    def _completes_stop_text(self, row: Row) -> bool:
        return self._read(row, row.watch or self._new_watch())

    def _interject(self, row: Row, interject: Interject) -> None:
        """Force the tokens that the request asks for now; they may revive a row that a stop token has just ended."""
        forced = interject(row.ids)
        if not forced:
            return
        if self.length(row) + len(forced) >= self.capacity:
            row.finish = "length"
            return
        if row.watch is not None:
            self._read(row, row.watch)
            if row.ids[-1] in self.stop_ids:
                row.watch.push(row.ids[-1], log=_log(row, len(row.ids) - 1))
            row.watch.force(forced)
        row.finish = None
        row.ids += forced
        row.read = len(row.ids)
        row.left = min(row.left, self.capacity - self.length(row))
        row.sampled += [False] * len(forced)
        row.logprobs += [0.0] * len(forced)
        if self.sampling.top_logprobs:
            row.tops += [()] * len(forced)

    def _new_watch(self) -> Watch:
        return Watch(self.tokenizer, self.stops, self._begins)

    def _read(self, row: Row, watch: Watch) -> bool:
        """Show a watch what it has not seen: a row's own the news, another all. Whether a stop text ends it now."""
        first, end = row.read if watch is row.watch else 0, len(row.ids)
        if row.ids and row.sampled[-1] and row.ids[-1] in self.stop_ids:
            end -= 1
        if watch is row.watch:
            row.read = end
        return first < end and watch.read([_log(row, place) for place in range(first, end)])


def _log(row: Row, place: int) -> TokenLog:
    return TokenLog(row.ids[place], row.logprobs[place], row.tops[place] if row.tops else ())


def _finish(row: Row) -> Finish:
    return "stop" if row.finish == "stop" else "length"
