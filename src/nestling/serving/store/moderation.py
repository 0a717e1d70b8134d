"""Verdicts of the moderation model, kept for its next training."""

from __future__ import annotations

import time
from collections.abc import Sequence

from sqlalchemy import and_, delete, insert, select

from nestling.serving.store.conversations import Conversations
from nestling.serving.store.database import Database
from nestling.serving.store.messages import new_id
from nestling.serving.store.records import Verdict
from nestling.serving.store.schema import CONVERSATIONS, MESSAGES, VERDICTS


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
            .where(VERDICTS.c.created >= since, VERDICTS.c.message_id.is_(None) | self._conversations.mine())
            .order_by(VERDICTS.c.created)
        )
        with self._database.read() as connection:
            found = [(row.text or row.content, Verdict(**row._mapping)) for row in connection.execute(query)]
        return [(text, verdict) for text, verdict in found if text]

    def forget(self, before: float | None = None) -> int:
        """Delete verdicts on texts outside any conversation, all or those before a time; returns how many."""
        loose = VERDICTS.c.message_id.is_(None)
        which = loose if before is None else and_(loose, VERDICTS.c.created < before)
        with self._database.write() as connection:
            return connection.execute(delete(VERDICTS).where(which)).rowcount
