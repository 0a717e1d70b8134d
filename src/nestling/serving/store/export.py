"""Feedback as training data: rankings, conversations and labels in the project's data forms.

    rankings.jsonl        two replies of which one was voted up and the other down; blind comparisons (0.5 each for a tie);
                          rankings of several variants
    conversations.jsonl   from the start to a reply that was voted up; the longest such path of each branch
    labels.jsonl          what an operator said of reports and of verdicts, and clean messages beside it (`labels.py`)

A row tells in `meta` which conversation it comes from, and which models answered.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, select

from nestling.core.storage import write_json, write_rows
from nestling.core.types import Conversation, Labelled, Message, Ranking, Response
from nestling.serving.store.arena import POINTS, read_comparisons
from nestling.serving.store.feedback import read_rankings
from nestling.serving.store.labels import labels
from nestling.serving.store.messages import path_to, read_messages
from nestling.serving.store.records import MessageRecord
from nestling.serving.store.schema import COMPARISONS, CONVERSATIONS, MESSAGES, RANKINGS, VOTES
from nestling.serving.store.store import Store


@dataclass(frozen=True)
class Filters:
    """Which feedback is exported. ``Filters(since=1.7e9, model="demo")``."""

    since: float = 0.0
    """Unix seconds: judgements from then on."""
    model: str | None = None
    """Only rows in which every judged reply is this model's."""
    with_flagged: bool = False
    """Also rankings and conversations in which a message was reported."""
    clean: float = 1.0
    """Most labels of clean messages for each label that an operator gave."""
    trust_reports: bool = False
    """Take reports that no operator has looked at for upheld."""


@dataclass
class Counts:
    """What was written, and what was left out and why."""

    written: Counter[str] = field(default_factory=Counter)
    left_out: Counter[str] = field(default_factory=Counter)

    def to_row(self) -> dict[str, Any]:
        """As feedback.json tells it."""
        return {"written": dict(self.written), "left_out": dict(self.left_out)}


def export(store: Store, folder: Path, filters: Filters | None = None) -> Counts:
    """Write the three files and feedback.json, which counts their rows; each appears whole or not at all.

    Raises:
        UserError: the folder can't be written.
    """
    counts = Counts()
    exporter = Exporter(store, filters or Filters(), counts)
    for name, rows in (("rankings", exporter.rankings()), ("conversations", exporter.conversations()),
                       ("labels", exporter.labels())):  # fmt: skip
        write_rows(folder / f"{name}.jsonl", (row.to_row() for row in rows))
    write_json(folder / "feedback.json", counts.to_row())
    return counts


@dataclass(frozen=True)
class Judged:
    """Replies to one message with what was said of them: a ranking before it is a row."""

    kind: str
    replies: tuple[MessageRecord, ...]
    scores: tuple[float, ...]
    choice: str | None = None
    """Of a comparison."""


class Exporter:
    """Reads one conversation after the other; each is seen in one state."""

    def __init__(self, store: Store, filters: Filters, counts: Counts) -> None:
        self._store, self._filters, self._counts = store, filters, counts

    def rankings(self) -> Iterator[Ranking]:
        """Every judgement between replies."""
        for talk in self._talks():
            for judged in talk.judgements(self._filters.since):
                if self._counted(self._reason_against(talk, judged.replies) or _not_comparable(judged.replies)):
                    continue
                self._counts.written[judged.kind] += 1
                yield _ranking(talk, judged)

    def conversations(self) -> Iterator[Conversation]:
        """Every path to a reply that was voted up, without those that a longer one begins with."""
        for talk in self._talks():
            liked = [talk.path(reply.id) for reply in talk.voted(1, self._filters.since)]
            paths = [
                path for path in liked if not self._counted(self._reason_against(talk, path[-1:]) or _no_example(path))
            ]
            inner = {record.id for path in paths for record in path[:-1]}
            for path in paths:
                if path[-1].id not in inner:
                    self._counts.written["conversations"] += 1
                    yield _conversation(talk, path)

    def labels(self) -> Iterator[Labelled]:
        """Reviewed reports and verdicts, and clean messages."""
        wanted = self._filters
        for row in labels(self._store, wanted.since, wanted.clean, wanted.trust_reports, self._counts.left_out):
            self._counts.written["clean labels" if row.meta["kind"] == "clean" else "labels"] += 1
            yield row

    def _talks(self) -> Iterator[Talk]:
        database, mine = self._store.database, self._store.conversations.mine()
        with database.read() as connection:
            ids = connection.execute(select(CONVERSATIONS.c.id).where(mine).order_by(CONVERSATIONS.c.created)).scalars()
            for id in ids.all():
                yield Talk(connection, id)

    def _counted(self, reason: str | None) -> bool:
        """Whether there is a reason to leave something out; counts it."""
        if reason is not None:
            self._counts.left_out[reason] += 1
        return reason is not None

    def _reason_against(self, talk: Talk, replies: Sequence[MessageRecord]) -> str | None:
        """Why nothing is made of these replies."""
        if self._filters.model is not None and {talk.model(reply) for reply in replies} != {self._filters.model}:
            return "other model"
        read = [record for reply in replies for record in talk.path(reply.id)]
        if not self._filters.with_flagged and any(record.flagged for record in read):
            return "flagged"
        return "in an undecided comparison" if any(reply.reply is None for reply in replies) else None


class Talk:
    """One conversation with everything that was said of it."""

    def __init__(self, connection: Connection, id: str) -> None:
        self.id = id
        self._connection = connection
        self.messages = read_messages(connection, MESSAGES.c.conversation_id == id)
        self._known = {message.id: message for message in self.messages}

    def path(self, tip: str) -> list[MessageRecord]:
        """The messages from the start to this one."""
        return path_to(self.messages, tip)

    def model(self, reply: MessageRecord) -> str | None:
        """Who wrote a reply."""
        return reply.reply.model if reply.reply else None

    def voted(self, value: int, since: float) -> list[MessageRecord]:
        """The replies that were voted up (1) or down (-1) since then."""
        query = select(VOTES.c.message_id).join(MESSAGES, MESSAGES.c.id == VOTES.c.message_id)
        query = query.where(MESSAGES.c.conversation_id == self.id, VOTES.c.value == value, VOTES.c.created >= since)
        chosen = {*self._connection.execute(query).scalars()}
        return [message for message in self.messages if message.id in chosen]

    def judgements(self, since: float) -> Iterator[Judged]:
        """Thumbs, comparisons and rankings between replies to one message."""
        ups, downs = self.voted(1, since), self.voted(-1, since)
        for up in ups:
            for down in downs:
                if up.parent == down.parent:
                    yield Judged("thumbs", (up, down), (1.0, 0.0))
        which = (COMPARISONS.c.conversation_id == self.id, COMPARISONS.c.decided >= since)
        for row in read_comparisons(self._connection, *which):
            points = POINTS[row.choice]
            yield Judged("comparisons", self._all([row.a_id, row.b_id]), (points, 1 - points), row.choice)
        which = (RANKINGS.c.conversation_id == self.id, RANKINGS.c.created >= since)
        for ranking in read_rankings(self._connection, *which):
            places = [(id, -float(place)) for place, group in enumerate(ranking.order, start=1) for id in group]
            yield Judged("rankings", self._all(id for id, _ in places), tuple(score for _, score in places))

    def _all(self, ids: Iterable[str]) -> tuple[MessageRecord, ...]:
        return tuple(self._known[id] for id in ids)


def _not_comparable(replies: Sequence[MessageRecord]) -> str | None:
    """Why replies cannot stand in one ranking, whose responses are texts that answer one and the same prompt."""
    if any(reply.steps for reply in replies):
        return "reply that called tools"
    asked = [(one.system, one.tools, one.forgotten) for one in (reply.reply for reply in replies) if one]
    return "different prompts" if any(one != asked[0] for one in asked) else None


def _no_example(path: Sequence[MessageRecord]) -> str | None:
    """Why a path is nothing to imitate."""
    if any(record.vote is not None and record.vote.value < 0 for record in path):
        return "voted down on the way"
    return "cut off" if any(record.reply and record.reply.finish != "stop" for record in path) else None


def _prompt(path: Sequence[MessageRecord], system: str) -> tuple[Message, ...]:
    first = (Message(role="system", content=system),) if system else ()
    return (*first, *(message for record in path for message in record.messages()))


def _ranking(talk: Talk, judged: Judged) -> Ranking:
    first = judged.replies[0]
    assert first.reply is not None
    meta: dict[str, Any] = {"tools": first.reply.tools} if first.reply.tools else {}
    models = [talk.model(reply) for reply in judged.replies]
    meta |= {"source": "feedback", "kind": judged.kind, "conversation": talk.id, "models": models}
    meta |= {"choice": judged.choice} if judged.choice else {}
    responses = [
        Response(content=reply.content, score=score) for reply, score in zip(judged.replies, judged.scores, strict=True)
    ]
    read = talk.path(first.id)[first.reply.forgotten : -1]
    return Ranking(prompt=_prompt(read, first.reply.system), responses=tuple(responses), meta=meta)


def _conversation(talk: Talk, path: Sequence[MessageRecord]) -> Conversation:
    last = path[-1].reply
    assert last is not None
    meta = {"source": "feedback", "conversation": talk.id, "model": last.model}
    return Conversation(messages=_prompt(path, last.system), tools=tuple(last.tools), meta=meta)
