"""Messages and replies as rows of the tables: read with all that belongs to them, and added."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from typing import Any

from sqlalchemy import ColumnElement, Connection, exists, insert, or_, select
from sqlalchemy.dialects import postgresql, sqlite

from nestling.serving.store.records import MessageRecord, Missing, ReplyRecord, VoteRecord, Written
from nestling.serving.store.schema import (
    COMPARISONS,
    CONVERSATIONS,
    FLAGS,
    MESSAGES,
    MODEL_VERSIONS,
    REPLIES,
    VERDICTS,
    VOTES,
)

INSERTS: dict[str, Any] = {"sqlite": sqlite.insert, "postgresql": postgresql.insert}
"""`insert` with what to do where the row is there already, by dialect."""


def new_id() -> str:
    """An id that nobody can guess."""
    return secrets.token_hex(12)


def read_messages(connection: Connection, which: ColumnElement[bool]) -> list[MessageRecord]:
    """The messages that fulfil a condition on messages or their conversation, oldest first, in one query."""
    undecided = exists().where(
        or_(COMPARISONS.c.a_id == MESSAGES.c.id, COMPARISONS.c.b_id == MESSAGES.c.id), COMPARISONS.c.choice.is_(None)
    )
    reported = exists().where(FLAGS.c.message_id == MESSAGES.c.id, FLAGS.c.upheld.is_not(False))
    objected = (VERDICTS.c.flagged, VERDICTS.c.upheld.is_not(False))
    judged = exists().where(VERDICTS.c.message_id == MESSAGES.c.id, *objected)
    query = (
        select(
            MESSAGES, MODEL_VERSIONS.c.name.label("model"), MODEL_VERSIONS.c.checkpoint,
            *[column for column in REPLIES.c if column.name != "tokens"],
            VOTES.c.value, VOTES.c.reason, VOTES.c.comment,
            or_(reported, judged).label("flagged"), undecided.label("blind"),
        )
        .join(CONVERSATIONS, CONVERSATIONS.c.id == MESSAGES.c.conversation_id)
        .outerjoin(REPLIES, REPLIES.c.message_id == MESSAGES.c.id)
        .outerjoin(MODEL_VERSIONS, MODEL_VERSIONS.c.id == REPLIES.c.version_id)
        .outerjoin(VOTES, VOTES.c.message_id == MESSAGES.c.id)
        .where(which)
        .order_by(MESSAGES.c.created, MESSAGES.c.id)
    )  # fmt: skip
    return [_message(row._mapping) for row in connection.execute(query)]


def _message(row: Any) -> MessageRecord:
    shows_reply = row["model"] is not None and not row["blind"]
    return MessageRecord(
        **{name: row[name] for name in ("id", "role", "content", "thinking", "steps", "created", "flagged", "blind")},
        conversation=row["conversation_id"],
        parent=row["parent_id"],
        forgotten=row["forgotten"] or 0,
        finish=row["finish"] or "",
        reply=ReplyRecord(**{name: row[name] for name in ReplyRecord.model_fields}) if shows_reply else None,
        vote=None if row["value"] is None else VoteRecord(**{name: row[name] for name in VoteRecord.model_fields}),
    )


def path_to(messages: Sequence[MessageRecord], tip: str | None) -> list[MessageRecord]:
    """The messages from the start to `tip`, out of all messages of a conversation.

    Raises:
        Missing: the tip is none of them.
    """
    known = {message.id: message for message in messages}
    path: list[MessageRecord] = []
    while tip is not None:
        if tip not in known:
            raise Missing("the conversation has no such message", value=tip)
        path.append(known[tip])
        tip = known[tip].parent
    return path[::-1]


def add_message(connection: Connection, conversation: str, parent: str | None, values: dict[str, Any]) -> str:
    """Insert a message and return its id. It is never older than its parent, whatever the clock says."""
    earliest = connection.execute(select(MESSAGES.c.created).where(MESSAGES.c.id == parent)).scalar() or 0.0
    row = {"thinking": "", "steps": [], **values, "id": new_id(), "created": max(time.time(), earliest + 1e-6)}
    connection.execute(insert(MESSAGES).values(**row, conversation_id=conversation, parent_id=parent))
    return row["id"]


def add_reply(connection: Connection, conversation: str, parent: str, written: Written) -> str:
    """Insert a reply with how it came about; returns the message's id."""
    version = {**written.version.model_dump(), "id": written.version.id, "created": time.time()}
    connection.execute(INSERTS[connection.dialect.name](MODEL_VERSIONS).values(version).on_conflict_do_nothing())
    values = written.model_dump(exclude={"version"})
    shown = {name: values.pop(name) for name in ("content", "thinking", "steps")}
    message = add_message(connection, conversation, parent, {"role": "assistant", **shown})
    connection.execute(insert(REPLIES).values(message_id=message, version_id=version["id"], **values))
    return message
