"""Blind comparisons of two replies to one message."""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from sqlalchemy import ColumnElement, Connection, Row, insert, select, update

from nestling.core.errors import UserError
from nestling.evaluation.arena import Game, Standing, standings
from nestling.serving.store.conversations import Conversations
from nestling.serving.store.database import Database
from nestling.serving.store.messages import add_reply, new_id
from nestling.serving.store.records import (
    Candidate,
    Choice,
    ComparisonRecord,
    Conflict,
    MessageRecord,
    Missing,
    Record,
    Side,
    Written,
)
from nestling.serving.store.schema import COMPARISONS, CONVERSATIONS, MODEL_VERSIONS, REPLIES

POINTS: dict[str, float] = {"a": 1.0, "b": 0.0, "tie": 0.5, "both_bad": 0.5}
"""What side a gains by each choice."""


class ArenaTable(Record):
    """The models that met in blind comparisons, the strongest first."""

    data: list[Standing]
    votes: int
    undecided: int
    same_model: int
    """Decided comparisons of two samples of one model: they say nothing about models."""
    both_bad: int
    """Votes that found both replies bad; they count as ties."""


class Arena:
    """Comparisons in the conversations of one owner.

    Args:
        flip: whether the first candidate becomes side b; drawn anew for each comparison.
    """

    def __init__(
        self, database: Database, conversations: Conversations, flip: Callable[[], bool] = lambda: random.random() < 0.5
    ) -> None:
        self._database, self._conversations, self._flip = database, conversations, flip

    def compare(self, conversation: str, parent: str, candidates: Sequence[Candidate]) -> ComparisonRecord:
        """Begin a comparison of two replies that are still to be written. Who is a and who is b is drawn.

        Raises:
            Missing: no such conversation, or no such message in it.
            UserError: not two candidates, or the parent is no user's message.
        """
        first, second = self._drawn(candidates)
        with self._database.write() as connection:
            self._conversations.locked(connection, conversation)
            self._conversations.question(connection, conversation, parent)
            return self._insert(connection, conversation, parent, candidate_a=first, candidate_b=second)

    def compare_replies(self, conversation: str, replies: Sequence[str]) -> ComparisonRecord:
        """Begin a comparison of two replies that are there. Who is a and who is b is drawn.

        Raises:
            Missing: no such conversation, or no such message in it.
            UserError: not two different replies to one message.
        """
        with self._database.write() as connection:
            self._conversations.locked(connection, conversation)
            found = [self._conversations.member(connection, conversation, message) for message in replies]
            parent = found[0].parent if found else None
            if len({*replies}) != 2 or parent is None or {(m.role, m.parent) for m in found} != {("assistant", parent)}:
                raise UserError("a comparison takes two different replies to one message", where="replies")
            (a, first), (b, second) = self._drawn([(m.id, self._identity(connection, m.id)) for m in found])
            return self._insert(
                connection, conversation, parent, candidate_a=first, candidate_b=second, a_id=a, b_id=b
            )  # fmt: skip

    def get(self, id: str) -> ComparisonRecord:
        """One comparison; its identities are told once it is decided.

        Raises:
            Missing: there is none with this id.
        """
        with self._database.read() as connection:
            return _comparison(self._row(connection, id))

    def of(self, conversation: str) -> list[ComparisonRecord]:
        """The comparisons of a conversation, oldest first.

        Raises:
            Missing: there is no such conversation.
        """
        self._conversations.get(conversation)
        with self._database.read() as connection:
            return [
                _comparison(row) for row in read_comparisons(connection, COMPARISONS.c.conversation_id == conversation)
            ]

    def candidate(self, id: str, side: Side) -> Candidate:
        """Who is to write this side: for the server, not for the voter.

        Raises:
            Missing: there is no such comparison.
            Conflict: the side is written already.
        """
        with self._database.read() as connection:
            return self._open_side(self._row(connection, id), side)

    def answer(self, id: str, side: Side, written: Written) -> MessageRecord:
        """Store the reply of one side; it is no tip before the vote.

        Raises:
            Missing: there is no such comparison.
            Conflict: the side is written already.
        """
        with self._database.write() as connection:
            row = self._row(connection, id, lock=True)
            asked = self._open_side(row, side)
            message = add_reply(connection, row.conversation_id, row.parent_id, written)
            told = {"sampling": written.sampling, "seed": written.seed, "checkpoint": written.version.checkpoint}
            values = {f"{side}_id": message, f"candidate_{side}": asked.model_copy(update=told).model_dump()}
            connection.execute(update(COMPARISONS).where(COMPARISONS.c.id == id).values(values))
            return self._conversations.visible(connection, message)

    def decide(self, id: str, choice: Choice, comment: str = "") -> ComparisonRecord:
        """Vote, and learn who was who. The conversation goes on from the better reply, from a where none is better.

        Raises:
            Missing: there is no such comparison.
            Conflict: it is decided already, or a side is not written yet.
        """
        with self._database.write() as connection:
            row = self._row(connection, id, lock=True)
            if row.choice is not None:
                raise Conflict("this comparison is decided", value=row.choice)
            if row.a_id is None or row.b_id is None:
                raise Conflict("a reply of this comparison is not written yet", value=id)
            values = {"choice": choice, "comment": comment, "decided": time.time()}
            connection.execute(update(COMPARISONS).where(COMPARISONS.c.id == id).values(values))
            self._conversations.look_at(connection, row.conversation_id, row.b_id if choice == "b" else row.a_id)
            return _comparison(self._row(connection, id))

    def table(self, since: float = 0.0) -> ArenaTable:
        """Ratings of the models by Bradley and Terry, from the decided comparisons of two different models."""
        with self._database.read() as connection:
            rows = read_comparisons(connection, self._conversations.mine(), COMPARISONS.c.created >= since)
        decided = [row for row in rows if row.choice is not None]
        pairs = _labelled([(Candidate(**row.candidate_a), Candidate(**row.candidate_b)) for row in decided])
        games = [Game(*pair, POINTS[row.choice]) for pair, row in zip(pairs, decided, strict=True)]
        between = [game for game in games if game.first != game.second]
        return ArenaTable(
            data=standings(between),
            votes=len(decided),
            undecided=len(rows) - len(decided),
            same_model=len(games) - len(between),
            both_bad=Counter(row.choice for row in decided)["both_bad"],
        )

    def _drawn(self, two: Sequence[Any]) -> Sequence[Any]:
        if len(two) != 2:
            raise UserError("a comparison takes two", where="candidates", value=len(two))
        return two[::-1] if self._flip() else two

    def _insert(self, connection: Connection, conversation: str, parent: str, **values: Any) -> ComparisonRecord:
        row = {name: v.model_dump() if isinstance(v, Candidate) else v for name, v in values.items()}
        row |= {"id": new_id(), "conversation_id": conversation, "parent_id": parent}
        connection.execute(insert(COMPARISONS).values(**row, comment="", created=time.time()))
        return _comparison(self._row(connection, str(row["id"])))

    def _identity(self, connection: Connection, message: str) -> Candidate:
        query = select(MODEL_VERSIONS.c.name, MODEL_VERSIONS.c.checkpoint, REPLIES.c.sampling, REPLIES.c.seed)
        row = connection.execute(query.join(REPLIES).where(REPLIES.c.message_id == message)).one()
        return Candidate(model=row.name, checkpoint=row.checkpoint, sampling=row.sampling, seed=row.seed)

    def _row(self, connection: Connection, id: str, *, lock: bool = False) -> Row[Any]:
        query = select(COMPARISONS).select_from(COMPARISONS.join(CONVERSATIONS))
        query = query.where(COMPARISONS.c.id == id, self._conversations.mine())
        row = connection.execute(query.with_for_update() if lock else query).first()
        if row is None:
            raise Missing("there is no such comparison", value=id)
        return row

    def _open_side(self, row: Row[Any], side: Side) -> Candidate:
        if getattr(row, f"{side}_id") is not None:
            raise Conflict("this side is written already", value=side)
        return Candidate(**getattr(row, f"candidate_{side}"))


def read_comparisons(connection: Connection, *which: ColumnElement[bool]) -> Sequence[Row[Any]]:
    """The comparisons that fulfil conditions on them or their conversation, oldest first."""
    query = select(COMPARISONS).select_from(COMPARISONS.join(CONVERSATIONS)).where(*which)
    return connection.execute(query.order_by(COMPARISONS.c.created, COMPARISONS.c.id)).all()


def _comparison(row: Row[Any]) -> ComparisonRecord:
    told = {"a": Candidate(**row.candidate_a), "b": Candidate(**row.candidate_b)} if row.choice else None
    return ComparisonRecord(
        id=row.id, conversation=row.conversation_id, parent=row.parent_id, a=row.a_id, b=row.b_id, choice=row.choice,
        comment=row.comment, created=row.created, identities=told,
    )  # fmt: skip


def _labelled(pairs: Sequence[tuple[Candidate, Candidate]]) -> list[tuple[str, str]]:
    """The names under which candidates play; with its checkpoint where a name has stood for several."""
    known = {(one.model, one.checkpoint) for pair in pairs for one in pair}
    count = Counter(model for model, _ in known)

    def label(one: Candidate) -> str:
        return one.model if count[one.model] == 1 else f"{one.model} ({one.checkpoint})"

    return [(label(a), label(b)) for a, b in pairs]
