"""Moderation: reports of users and verdicts of the moderation model."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    """Make the tables of reports and verdicts."""
    op.create_table(
        "flags",
        sa.Column("id", sa.String(32), primary_key=True),
        sa.Column("message_id", sa.String(32), sa.ForeignKey("messages.id", ondelete="CASCADE"), nullable=False),
        sa.Column("category", sa.String(200), nullable=False),
        sa.Column("comment", sa.Text, nullable=False),
        sa.Column("created", sa.Double, nullable=False),
    )
    op.create_index("flags_by_message", "flags", ["message_id"])
    op.create_table(
        "verdicts",
        sa.Column("id", sa.String(32), primary_key=True),
        sa.Column("message_id", sa.String(32), sa.ForeignKey("messages.id", ondelete="CASCADE")),
        sa.Column("direction", sa.String(16), nullable=False),
        sa.Column("moderator", sa.String(200), nullable=False),
        sa.Column("flagged", sa.Boolean, nullable=False),
        sa.Column("categories", sa.JSON, nullable=False),
        sa.Column("scores", sa.JSON, nullable=False),
        sa.Column("text", sa.Text),
        sa.Column("created", sa.Double, nullable=False),
    )
    op.create_index("verdicts_by_message", "verdicts", ["message_id"])
    op.create_index("verdicts_by_time", "verdicts", ["created"])
