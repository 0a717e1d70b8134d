"""Conversations as trees of messages: written, listed, searched, deleted."""

from __future__ import annotations

import time
from typing import Any

from sqlalchemy import ColumnElement, Connection, Row, and_, delete, exists, insert, or_, select, true, tuple_, update

from nestling.core.errors import UserError
from nestling.serving.store.database import Database
from nestling.serving.store.messages import add_message, add_reply, new_id, path_to, read_messages
from nestling.serving.store.records import (
    ConversationChanges,
    ConversationPage,
    ConversationRecord,
    Found,
    MessageRecord,
    Missing,
    TokenRecord,
    Written,
)
from nestling.serving.store.schema import CONVERSATIONS, MESSAGES, REPLIES

TITLE_CHARACTERS = 60
SNIPPET_CHARACTERS = 80


class Conversations:
    """The conversations of one owner; of everybody where the owner is None."""

    def __init__(self, database: Database, owner: str | None) -> None:
        self._database, self._owner = database, owner

    def create(self, given: ConversationChanges | None = None) -> ConversationRecord:
        """Begin a conversation."""
        given = given or ConversationChanges()
        now = time.time()
        values = {**given.model_dump(), "tip": None, "id": new_id(), "owner": self._owner or ""}
        with self._database.write() as connection:
            connection.execute(insert(CONVERSATIONS).values(**values, created=now, updated=now))
            return ConversationRecord(**self.locked(connection, values["id"])._mapping)

    def get(self, id: str) -> ConversationRecord:
        """One conversation.

        Raises:
            Missing: there is none with this id.
        """
        with self._database.read() as connection:
            return ConversationRecord(**self._row(connection, id)._mapping)

    def page(self, search: str = "", limit: int = 50, after: str | None = None) -> ConversationPage:
        """Conversations, the latest first; with `search`, those whose title or messages contain these words.

        The search is `LIKE '%words%'`: it finds any part of a text in any script, Chinese too, and ignores case (in
        SQLite that of A to Z only). It reads every message of the owner.

        Args:
            after: the `next` of the page before.
        """
        query = select(CONVERSATIONS).where(self.mine())
        if search:
            found = exists().where(
                MESSAGES.c.conversation_id == CONVERSATIONS.c.id, _contains(MESSAGES.c.content, search)
            )
            query = query.where(or_(_contains(CONVERSATIONS.c.title, search), found))
        if after:
            query = query.where(tuple_(CONVERSATIONS.c.updated, CONVERSATIONS.c.id) < tuple_(*_cursor(after)))
        query = query.order_by(CONVERSATIONS.c.updated.desc(), CONVERSATIONS.c.id.desc()).limit(limit + 1)
        with self._database.read() as connection:
            rows = connection.execute(query).all()
            data = [Found(**row._mapping, snippet=self._snippet(connection, row.id, search)) for row in rows[:limit]]
        last = f"{data[-1].updated!r}:{data[-1].id}" if len(rows) > limit else None
        return ConversationPage(data=data, next=last)

    def change(self, id: str, changes: ConversationChanges) -> ConversationRecord:
        """Rename a conversation, or change its system message, tools, model, sampling or tip.

        Raises:
            Missing: there is no such conversation, or the tip is no message of it.
        """
        given = changes.model_dump(exclude_unset=True)
        with self._database.write() as connection:
            self.locked(connection, id)
            if given.get("tip") is not None:
                self.member(connection, id, given["tip"])
            connection.execute(
                update(CONVERSATIONS).where(CONVERSATIONS.c.id == id).values(**given, updated=time.time())
            )
            return ConversationRecord(**self._row(connection, id)._mapping)

    def delete(self, id: str) -> None:
        """Delete a conversation with its messages and all feedback on them.

        Raises:
            Missing: there is none with this id.
        """
        with self._database.write() as connection:
            self.locked(connection, id)
            connection.execute(delete(CONVERSATIONS).where(CONVERSATIONS.c.id == id))

    def delete_all(self, before: float | None = None) -> int:
        """Delete every conversation, or those not touched since `before` (Unix seconds); returns how many."""
        which = self.mine() if before is None else and_(self.mine(), CONVERSATIONS.c.updated < before)
        with self._database.write() as connection:
            return connection.execute(delete(CONVERSATIONS).where(which)).rowcount

    def messages(self, id: str) -> list[MessageRecord]:
        """All messages of a conversation, parents before children, variants by age.

        Raises:
            Missing: there is no such conversation.
        """
        with self._database.read() as connection:
            self._row(connection, id)
            return read_messages(connection, MESSAGES.c.conversation_id == id)

    def message(self, id: str) -> MessageRecord:
        """One message.

        Raises:
            Missing: there is none with this id.
        """
        with self._database.read() as connection:
            return self.visible(connection, id)

    def path(self, id: str, tip: str | None) -> list[MessageRecord]:
        """The messages from the start to `tip`; none for None.

        Raises:
            Missing: no such conversation, or the tip is no message of it.
        """
        return path_to(self.messages(id), tip)

    def tokens(self, message: str) -> list[TokenRecord]:
        """The tokens of a reply, where they were kept.

        Raises:
            Missing: there is no such message.
        """
        with self._database.read() as connection:
            self.visible(connection, message)
            kept = connection.execute(select(REPLIES.c.tokens).where(REPLIES.c.message_id == message)).scalar()
        return [TokenRecord.model_validate(token) for token in kept or []]

    def ask(self, id: str, content: str, parent: str | None) -> MessageRecord:
        """Add a user's message after `parent` (None: at the start) and look at it; an edit is a second one there.

        Raises:
            Missing: no such conversation, or the parent is no message of it.
            UserError: the parent is a user's message too.
        """
        with self._database.write() as connection:
            conversation = self.locked(connection, id)
            if parent is not None and self.member(connection, id, parent).role != "assistant":
                raise UserError("a user's message follows one of the assistant", where="parent", value=parent)
            message = add_message(connection, id, parent, {"role": "user", "content": content})
            title = conversation.title or content.strip()[:TITLE_CHARACTERS]
            self.look_at(connection, id, message, title=title)
            return self.visible(connection, message)

    def answer(self, id: str, parent: str, written: Written) -> MessageRecord:
        """Add a reply to a user's message and look at it; a second reply to the same message is its variant.

        Raises:
            Missing: no such conversation, or the parent is no message of it.
            UserError: the parent is no user's message.
        """
        with self._database.write() as connection:
            self.locked(connection, id)
            self.question(connection, id, parent)
            message = add_reply(connection, id, parent, written)
            self.look_at(connection, id, message)
            return self.visible(connection, message)

    def locked(self, connection: Connection, id: str) -> Row[Any]:
        """The conversation's row, which no other transaction changes before this one ends."""
        return self._row(connection, id, lock=True)

    def question(self, connection: Connection, id: str, message: str) -> MessageRecord:
        """The user's message that is to be answered.

        Raises:
            Missing: it is no message of the conversation.
            UserError: it is none of the user's.
        """
        found = self.member(connection, id, message)
        if found.role != "user":
            raise UserError("a reply follows a user's message", where="parent", value=message)
        return found

    def member(self, connection: Connection, id: str, message: str) -> MessageRecord:
        """A message of this conversation.

        Raises:
            Missing: there is no such message in it.
        """
        found = read_messages(connection, and_(MESSAGES.c.id == message, MESSAGES.c.conversation_id == id))
        if not found:
            raise Missing("the conversation has no such message", value=message)
        return found[0]

    def visible(self, connection: Connection, message: str) -> MessageRecord:
        """A message of any conversation of the owner.

        Raises:
            Missing: there is no such message.
        """
        found = read_messages(connection, and_(MESSAGES.c.id == message, self.mine()))
        if not found:
            raise Missing("there is no such message", value=message)
        return found[0]

    def mine(self) -> ColumnElement[bool]:
        """The condition that a conversation belongs to the owner."""
        return true() if self._owner is None else CONVERSATIONS.c.owner == self._owner

    def _row(self, connection: Connection, id: str, *, lock: bool = False) -> Row[Any]:
        query = select(CONVERSATIONS).where(CONVERSATIONS.c.id == id, self.mine())
        row = connection.execute(query.with_for_update() if lock else query).first()
        if row is None:
            raise Missing("there is no such conversation", value=id)
        return row

    def look_at(self, connection: Connection, id: str, message: str, **values: Any) -> None:
        """Set the tip of a conversation, and other columns."""
        changes = {"tip": message, "updated": time.time(), **values}
        connection.execute(update(CONVERSATIONS).where(CONVERSATIONS.c.id == id).values(changes))

    def _snippet(self, connection: Connection, id: str, search: str) -> str:
        if not search:
            return ""
        query = select(MESSAGES.c.content).where(
            MESSAGES.c.conversation_id == id, _contains(MESSAGES.c.content, search)
        )
        text = connection.execute(query.order_by(MESSAGES.c.created).limit(1)).scalar()
        return "" if text is None else _around(text, search)


def _contains(column: Any, words: str) -> ColumnElement[bool]:
    return column.icontains(words, autoescape=True)


def _around(text: str, words: str) -> str:
    """One line of text around the first place where the words stand."""
    place = max(0, text.lower().find(words.lower()))
    start = max(0, place - SNIPPET_CHARACTERS // 2)
    end = place + len(words) + SNIPPET_CHARACTERS // 2
    line = " ".join(text[start:end].split())
    return f"{'…' if start else ''}{line}{'…' if end < len(text) else ''}"


def _cursor(after: str) -> tuple[float, str]:
    updated, _, id = after.partition(":")
    try:
        return float(updated), id
    except ValueError:
        raise UserError("not the `next` of a list", where="after", value=after) from None
