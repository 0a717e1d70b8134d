"""What people say of replies: thumbs, reports, rankings of several variants."""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import groupby
from typing import Any

from sqlalchemy import ColumnElement, Connection, delete, func, insert, select

from nestling.core.errors import UserError
from nestling.serving.store.conversations import Conversations
from nestling.serving.store.database import Database
from nestling.serving.store.messages import INSERTS, new_id
from nestling.serving.store.records import FlagRecord, Missing, RankingRecord, Record, VoteRecord
from nestling.serving.store.schema import (
    COMPARISONS,
    CONVERSATIONS,
    FLAGS,
    MESSAGES,
    RANKED,
    RANKINGS,
    REPLIES,
    VERDICTS,
    VOTES,
)


class Stats(Record):
    """How much there is of everything."""

    conversations: int
    messages: int
    replies: int
    up: int
    down: int
    flags: int
    comparisons: int
    decided: int
    rankings: int
    verdicts: int
    verdicts_flagged: int


class Feedback:
    """Thumbs, reports and rankings on the conversations of one owner."""

    def __init__(self, database: Database, conversations: Conversations) -> None:
        self._database, self._conversations = database, conversations

    def vote(self, message: str, vote: VoteRecord) -> VoteRecord:
        """Thumbs up or down on a reply, in place of an earlier vote.

        Raises:
            Missing: there is no such message.
            UserError: it is no reply.
        """
        with self._database.write() as connection:
            self._reply(connection, message)
            said = {**vote.model_dump(), "created": time.time()}
            row = INSERTS[connection.dialect.name](VOTES).values(message_id=message, **said)
            connection.execute(row.on_conflict_do_update(index_elements=[VOTES.c.message_id], set_=said))
        return vote

    def unvote(self, message: str) -> None:
        """Take a vote back.

        Raises:
            Missing: there is no such message, or no vote on it.
        """
        with self._database.write() as connection:
            self._conversations.visible(connection, message)
            if not connection.execute(delete(VOTES).where(VOTES.c.message_id == message)).rowcount:
                raise Missing("there is no vote on this message", value=message)

    def flag(self, message: str, category: str, comment: str = "") -> FlagRecord:
        """Report a message.

        Raises:
            Missing: there is no such message.
        """
        flag = FlagRecord(id=new_id(), message=message, category=category, comment=comment, created=time.time())
        values = flag.model_dump(exclude={"message"})
        with self._database.write() as connection:
            self._conversations.visible(connection, message)
            connection.execute(insert(FLAGS).values(message_id=message, **values))
        return flag

    def flags(self) -> list[FlagRecord]:
        """All reports, the newest first."""
        query = select(FLAGS, FLAGS.c.message_id.label("message"))
        query = query.select_from(FLAGS.join(MESSAGES).join(CONVERSATIONS)).where(self._conversations.mine())
        query = query.order_by(FLAGS.c.created.desc())
        with self._database.read() as connection:
            return [FlagRecord(**row._mapping) for row in connection.execute(query)]

    def unflag(self, flag: str) -> None:
        """Withdraw a report.

        Raises:
            Missing: there is none with this id.
        """
        mine = select(MESSAGES.c.id).select_from(MESSAGES.join(CONVERSATIONS)).where(self._conversations.mine())
        with self._database.write() as connection:
            which = (FLAGS.c.id == flag, FLAGS.c.message_id.in_(mine))
            if not connection.execute(delete(FLAGS).where(*which)).rowcount:
                raise Missing("there is no such report", value=flag)

    def rank(self, conversation: str, order: Sequence[Sequence[str]], comment: str = "") -> RankingRecord:
        """Put 2 to 9 replies to one message in order, best first; those of one group tie.

        Raises:
            Missing: no such conversation, or no such message in it.
            UserError: fewer than 2 or more than 9, one named twice, or replies to different messages.
        """
        named = [message for group in order for message in group]
        if not 2 <= len(named) <= 9 or len({*named}) < len(named):
            raise UserError("a ranking takes 2 to 9 different replies", where="order", value=len(named))
        with self._database.write() as connection:
            self._conversations.locked(connection, conversation)
            found = [self._conversations.member(connection, conversation, message) for message in named]
            parents = {message.parent for message in found}
            parent = parents.pop()
            if parents or parent is None or any(message.role != "assistant" for message in found):
                raise UserError("a ranking takes replies to one message", where="order")
            ranking = RankingRecord(
                id=new_id(), parent=parent, order=[[*group] for group in order if group], comment=comment,
                created=time.time(),
            )  # fmt: skip
            _insert_ranking(connection, conversation, ranking)
        return ranking

    def rankings(self, conversation: str) -> list[RankingRecord]:
        """The rankings of a conversation, oldest first.

        Raises:
            Missing: there is no such conversation.
        """
        self._conversations.get(conversation)
        with self._database.read() as connection:
            return read_rankings(connection, RANKINGS.c.conversation_id == conversation)

    def stats(self) -> Stats:
        """Counts of everything that belongs to the owner; verdicts on texts outside any conversation are nobody's."""
        of_message = MESSAGES.join(CONVERSATIONS)
        with self._database.read() as connection:

            def count(source: Any, *conditions: Any) -> int:
                query = select(func.count()).select_from(source).where(self._conversations.mine(), *conditions)
                return connection.execute(query).scalar_one()

            return Stats(
                conversations=count(CONVERSATIONS),
                messages=count(of_message),
                replies=count(of_message.join(REPLIES)),
                up=count(of_message.join(VOTES), VOTES.c.value > 0),
                down=count(of_message.join(VOTES), VOTES.c.value < 0),
                flags=count(of_message.join(FLAGS)),
                comparisons=count(CONVERSATIONS.join(COMPARISONS)),
                decided=count(CONVERSATIONS.join(COMPARISONS), COMPARISONS.c.choice.is_not(None)),
                rankings=count(CONVERSATIONS.join(RANKINGS)),
                verdicts=count(of_message.join(VERDICTS)),
                verdicts_flagged=count(of_message.join(VERDICTS), VERDICTS.c.flagged),
            )

    def _reply(self, connection: Connection, message: str) -> None:
        if self._conversations.visible(connection, message).role != "assistant":
            raise UserError("only replies are voted on", where="message", value=message)


def _insert_ranking(connection: Connection, conversation: str, ranking: RankingRecord) -> None:
    values = ranking.model_dump(exclude={"order", "parent"})
    connection.execute(insert(RANKINGS).values(conversation_id=conversation, parent_id=ranking.parent, **values))
    rows = [
        {"ranking_id": ranking.id, "message_id": message, "rank": place}
        for place, group in enumerate(ranking.order, start=1)
        for message in group
    ]
    connection.execute(insert(RANKED), rows)


def read_rankings(connection: Connection, *which: ColumnElement[bool]) -> list[RankingRecord]:
    """The rankings that fulfil conditions, oldest first."""
    query = select(RANKINGS, RANKED.c.message_id, RANKED.c.rank).join(RANKED).where(*which)
    query = query.order_by(RANKINGS.c.created, RANKINGS.c.id, RANKED.c.rank, RANKED.c.message_id)
    rankings = []
    for _, rows in groupby(connection.execute(query).all(), key=lambda row: row.id):
        ranked = list(rows)
        order = [[row.message_id for row in group] for _, group in groupby(ranked, key=lambda row: row.rank)]
        first = ranked[0]
        rankings.append(
            RankingRecord(
                id=first.id, parent=first.parent_id, order=order, comment=first.comment, created=first.created
            )
        )
    return rankings
