"""Responses of /v1/responses, kept so that a conversation can go on by id after the service was started anew."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from sqlalchemy import ColumnElement, and_, delete, insert, select, true

from nestling.core.types import Message
from nestling.serving.store.database import Database
from nestling.serving.store.schema import RESPONSES


class Responses:
    """The responses of one owner; of everybody where the owner is None."""

    def __init__(self, database: Database, owner: str | None) -> None:
        self._database, self._owner = database, owner

    def keep(self, body: dict[str, Any], messages: Sequence[Message], limit: int) -> None:
        """Keep a response with the conversation up to it; of the owner's, the latest `limit` stay."""
        row = {"id": body["id"], "owner": self._owner or "", "body": body, "created": time.time(),
               "messages": [message.to_row() for message in messages]}  # fmt: skip
        newest = select(RESPONSES.c.created).where(self._mine()).order_by(RESPONSES.c.created.desc())
        with self._database.write() as connection:
            connection.execute(insert(RESPONSES).values(row))
            beyond = connection.execute(newest.offset(limit).limit(1)).scalar()
            if beyond is not None:
                connection.execute(delete(RESPONSES).where(self._mine(), RESPONSES.c.created <= beyond))

    def get(self, id: str) -> tuple[dict[str, Any], tuple[Message, ...]] | None:
        """(what was sent, the conversation up to it), or None where there is no such response."""
        with self._database.read() as connection:
            row = connection.execute(select(RESPONSES).where(RESPONSES.c.id == id, self._mine())).first()
        return None if row is None else (row.body, tuple(map(Message.from_row, row.messages)))

    def forget(self, id: str) -> bool:
        """Delete a response; whether there was one."""
        with self._database.write() as connection:
            return connection.execute(delete(RESPONSES).where(RESPONSES.c.id == id, self._mine())).rowcount > 0

    def forget_all(self, before: float | None = None) -> int:
        """Delete every response, or those made before a time (Unix seconds); returns how many."""
        which = self._mine() if before is None else and_(self._mine(), RESPONSES.c.created < before)
        with self._database.write() as connection:
            return connection.execute(delete(RESPONSES).where(which)).rowcount

    def _mine(self) -> ColumnElement[bool]:
        return true() if self._owner is None else RESPONSES.c.owner == self._owner
