"""Verdicts of the moderation model and reports of users, which an operator upholds or rejects for its next training."""

from __future__ import annotations

import time
from collections.abc import Sequence

from sqlalchemy import ColumnElement, and_, delete, insert, select, update

from nestling.serving.store.conversations import Conversations
from nestling.serving.store.database import Database
from nestling.serving.store.messages import new_id
from nestling.serving.store.records import Case, Missing, Verdict
from nestling.serving.store.schema import CONVERSATIONS, FLAGS, MESSAGES, VERDICTS


class Moderation:
    """Verdicts on messages of one owner, and on texts outside any conversation."""

    def __init__(self, database: Database, conversations: Conversations) -> None:
        self._database, self._conversations = database, conversations

    def add(self, verdicts: Sequence[Verdict]) -> None:
        """Keep verdicts.

        Raises:
            Missing: one is about a message that is not there.
        """
        rows = [
            {**verdict.model_dump(exclude={"message"}), "message_id": verdict.message, "id": new_id(),
             "created": time.time()}
            for verdict in verdicts
        ]  # fmt: skip
        if not rows:
            return
        with self._database.write() as connection:
            for message in {row["message_id"] for row in rows} - {None}:
                self._conversations.visible(connection, message)
            connection.execute(insert(VERDICTS), rows)

    def of(self, message: str) -> list[Verdict]:
        """The verdicts on a message, oldest first.

        Raises:
            Missing: there is no such message.
        """
        query = select(VERDICTS, VERDICTS.c.message_id.label("message")).where(VERDICTS.c.message_id == message)
        with self._database.read() as connection:
            self._conversations.visible(connection, message)
            return [Verdict(**row._mapping) for row in connection.execute(query.order_by(VERDICTS.c.created))]

    def judged(self, since: float = 0.0) -> list[tuple[str, Verdict]]:
        """(text, verdict) of everything judged since then whose text is known, oldest first."""
        query = (
            select(VERDICTS, VERDICTS.c.message_id.label("message"), MESSAGES.c.content)
            .outerjoin(MESSAGES, MESSAGES.c.id == VERDICTS.c.message_id)
            .outerjoin(CONVERSATIONS, CONVERSATIONS.c.id == MESSAGES.c.conversation_id)
            .where(VERDICTS.c.created >= since, self._in_sight())
            .order_by(VERDICTS.c.created)
        )
        with self._database.read() as connection:
            found = [(row.text or row.content, Verdict(**row._mapping)) for row in connection.execute(query)]
        return [(text, verdict) for text, verdict in found if text]

    def cases(self) -> list[Case]:
        """What no operator has looked at, oldest first; verdicts whose text is not known are nothing to look at."""
        with_message = (MESSAGES.c.content, CONVERSATIONS.c.id.label("conversation"))
        reports = select(FLAGS, *with_message).select_from(FLAGS.join(MESSAGES).join(CONVERSATIONS))
        reports = reports.where(self._conversations.mine(), FLAGS.c.upheld.is_(None))
        source = VERDICTS.outerjoin(MESSAGES).outerjoin(CONVERSATIONS)
        verdicts = select(VERDICTS, *with_message).select_from(source)
        verdicts = verdicts.where(self._in_sight(), VERDICTS.c.flagged, VERDICTS.c.upheld.is_(None))
        with self._database.read() as connection:
            found = [
                Case(id=row.id, kind="report", text=row.content, categories=[row.category], comment=row.comment,
                     created=row.created)
                for row in connection.execute(reports)
            ]  # fmt: skip
            found += [
                Case(id=row.id, kind="verdict", text=row.text or row.content, created=row.created,
                     categories=[name for name, over in row.categories.items() if over])
                for row in connection.execute(verdicts) if row.text or row.content
            ]  # fmt: skip
        return sorted(found, key=lambda case: case.created)

    def review(self, id: str, upheld: bool) -> None:
        """Note what an operator says of a report or of a verdict that flags; again replaces it.

        Raises:
            Missing: there is none with this id.
        """
        said = {"upheld": upheld, "reviewed": time.time()}
        mine = select(MESSAGES.c.id).select_from(MESSAGES.join(CONVERSATIONS)).where(self._conversations.mine())
        loose = VERDICTS.c.message_id.is_(None)
        reports = update(FLAGS).where(FLAGS.c.id == id, FLAGS.c.message_id.in_(mine))
        verdicts = update(VERDICTS).where(
            VERDICTS.c.id == id, VERDICTS.c.flagged, loose | VERDICTS.c.message_id.in_(mine)
        )
        with self._database.write() as connection:
            if not any(connection.execute(which.values(said)).rowcount for which in (reports, verdicts)):
                raise Missing("there is no such report or verdict", value=id)

    def _in_sight(self) -> ColumnElement[bool]:
        """Verdicts on the owner's messages, and on texts outside any conversation, which are nobody's."""
        return VERDICTS.c.message_id.is_(None) | self._conversations.mine()

    def forget(self, before: float | None = None) -> int:
        """Delete verdicts on texts outside any conversation, all or those before a time; returns how many."""
        loose = VERDICTS.c.message_id.is_(None)
        which = loose if before is None else and_(loose, VERDICTS.c.created < before)
        with self._database.write() as connection:
            return connection.execute(delete(VERDICTS).where(which)).rowcount
