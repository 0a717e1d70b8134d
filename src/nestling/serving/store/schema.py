"""The tables. Times are Unix seconds, ids are random; whatever belongs to a conversation goes when it goes."""

from __future__ import annotations

from functools import partial
from typing import Any

from sqlalchemy import BigInteger, Boolean, Column, Double, ForeignKey, Index, Integer, MetaData, String, Table
from sqlalchemy.engine import Dialect
from sqlalchemy.types import JSON, Text, TypeDecorator


def storable(value: Any) -> Any:
    """`value` with every text in it as both databases can hold it: no NUL, no half of a surrogate pair.

    >>> storable({"said": "a" + chr(0) + "b"})
    {'said': 'a�b'}
    """
    if isinstance(value, str):
        return value.replace("\0", "\ufffd").encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if isinstance(value, dict):
        return {storable(key): storable(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [storable(inner) for inner in value]
    return value


class Words(TypeDecorator[str]):
    """Text of any length that a person or a model wrote."""

    impl = Text
    cache_ok = True

    def process_bind_param(self, value: str | None, dialect: Dialect) -> str | None:
        """What goes into the database."""
        return storable(value)


class Json(TypeDecorator[Any]):
    """A JSON value."""

    impl = JSON
    cache_ok = True

    def process_bind_param(self, value: Any, dialect: Dialect) -> Any:
        """What goes into the database."""
        return storable(value)


METADATA = MetaData()
ID = partial(Column, "id", String(32), primary_key=True)
TIME = partial(Column, type_=Double, nullable=False)
GOES_WITH = partial(ForeignKey, ondelete="CASCADE")
"""A reference to a row with which this one goes."""

CONVERSATIONS = Table(
    "conversations",
    METADATA,
    ID(),
    Column("owner", String(200), nullable=False),
    Column("title", Words, nullable=False),
    Column("system", Words, nullable=False),
    Column("tools", Json, nullable=False),
    Column("model", String(200), nullable=False),
    Column("sampling", Json, nullable=False),
    Column("tip", String(32)),
    TIME("created"),
    TIME("updated"),
    Index("conversations_by_owner", "owner", "updated"),
)
"""`owner` is the name of the API key that wrote it, empty where the server has none; `tip` the message last looked at."""

MESSAGES = Table(
    "messages",
    METADATA,
    ID(),
    Column("conversation_id", String(32), GOES_WITH("conversations.id"), nullable=False),
    Column("parent_id", String(32), ForeignKey("messages.id")),
    Column("role", String(16), nullable=False),
    Column("content", Words, nullable=False),
    Column("thinking", Words, nullable=False),
    Column("steps", Json, nullable=False),
    TIME("created"),
    Index("messages_by_conversation", "conversation_id", "created"),
    Index("messages_by_parent", "parent_id"),
)
"""`parent_id` does not cascade: all messages of a conversation go at once, and SQLite stops a cascade 1,000 rows deep."""

MODEL_VERSIONS = Table(
    "model_versions",
    METADATA,
    ID(),
    Column("name", String(200), nullable=False),
    Column("checkpoint", String(200), nullable=False),
    Column("provenance", Json, nullable=False),
    TIME("created"),
)
"""What answered: the served name, the checkpoint's identity, what nestling.json tells. The id is a hash of the three."""

REPLIES = Table(
    "replies",
    METADATA,
    Column("message_id", String(32), GOES_WITH("messages.id"), primary_key=True),
    Column("version_id", String(32), ForeignKey("model_versions.id"), nullable=False),
    Column("system", Words, nullable=False),
    Column("tools", Json, nullable=False),
    Column("sampling", Json, nullable=False),
    Column("seed", BigInteger, nullable=False),
    Column("prompt_tokens", Integer, nullable=False),
    Column("completion_tokens", Integer, nullable=False),
    Column("finish", String(32), nullable=False),
    Column("seconds", Double, nullable=False),
    Column("first_token_seconds", Double),
    Column("tokens", Json),
    Column("forgotten", Integer, nullable=False, server_default="0"),
    Index("replies_by_version", "version_id"),
)
"""How a message of the assistant came about: `system` and `tools` as they were then, `tokens` for the token view.

`forgotten` messages at the start had no room in the context and were not read."""

VOTES = Table(
    "votes",
    METADATA,
    Column("message_id", String(32), GOES_WITH("messages.id"), primary_key=True),
    Column("value", Integer, nullable=False),
    Column("reason", String(200), nullable=False),
    Column("comment", Words, nullable=False),
    TIME("created"),
)
"""Thumbs: `value` is 1 or -1."""

FLAGS = Table(
    "flags",
    METADATA,
    ID(),
    Column("message_id", String(32), GOES_WITH("messages.id"), nullable=False),
    Column("category", String(200), nullable=False),
    Column("comment", Words, nullable=False),
    TIME("created"),
    Column("upheld", Boolean),
    Column("reviewed", Double),
    Index("flags_by_message", "message_id"),
)
"""Reports of users; `upheld` is what an operator said of one, and null until then."""

COMPARISONS = Table(
    "comparisons",
    METADATA,
    ID(),
    Column("conversation_id", String(32), GOES_WITH("conversations.id"), nullable=False),
    Column("parent_id", String(32), GOES_WITH("messages.id"), nullable=False),
    Column("candidate_a", Json, nullable=False),
    Column("candidate_b", Json, nullable=False),
    Column("a_id", String(32), GOES_WITH("messages.id")),
    Column("b_id", String(32), GOES_WITH("messages.id")),
    Column("choice", String(16)),
    Column("comment", Words, nullable=False),
    TIME("created"),
    Column("decided", Double),
    Index("comparisons_by_conversation", "conversation_id"),
    Index("comparisons_by_parent", "parent_id"),
    Index("comparisons_by_a", "a_id"),
    Index("comparisons_by_b", "b_id"),
)
"""Two replies to one message, side by side; a candidate is what was asked of a model, unknown to the voter before."""

RANKINGS = Table(
    "rankings",
    METADATA,
    ID(),
    Column("conversation_id", String(32), GOES_WITH("conversations.id"), nullable=False),
    Column("parent_id", String(32), GOES_WITH("messages.id"), nullable=False),
    Column("comment", Words, nullable=False),
    TIME("created"),
    Index("rankings_by_conversation", "conversation_id"),
    Index("rankings_by_parent", "parent_id"),
)

RANKED = Table(
    "ranked",
    METADATA,
    Column("ranking_id", String(32), GOES_WITH("rankings.id"), primary_key=True),
    Column("message_id", String(32), GOES_WITH("messages.id"), primary_key=True),
    Column("rank", Integer, nullable=False),
    Index("ranked_by_message", "message_id"),
)
"""The replies of a ranking; rank 1 is best, equal ranks tie."""

VERDICTS = Table(
    "verdicts",
    METADATA,
    ID(),
    Column("message_id", String(32), GOES_WITH("messages.id")),
    Column("direction", String(16), nullable=False),
    Column("moderator", String(200), nullable=False),
    Column("flagged", Boolean, nullable=False),
    Column("categories", Json, nullable=False),
    Column("scores", Json, nullable=False),
    Column("text", Words),
    TIME("created"),
    Column("upheld", Boolean),
    Column("reviewed", Double),
    Index("verdicts_by_message", "message_id"),
    Index("verdicts_by_time", "created"),
)
"""What the moderation model said of a message, or of text outside any conversation (then `text` may hold it).

`upheld` is what an operator said of a verdict that flags, and null until then."""

RESPONSES = Table(
    "responses",
    METADATA,
    Column("id", String(64), primary_key=True),
    Column("owner", String(200), nullable=False),
    Column("body", Json, nullable=False),
    Column("messages", Json, nullable=False),
    TIME("created"),
    Index("responses_by_owner", "owner", "created"),
)
"""What /v1/responses sent, and the conversation up to it, for clients that go on by id."""
