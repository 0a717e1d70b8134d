"""Judgements between replies: blind comparisons and rankings."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    """Make the tables of comparisons and rankings."""
    message = "messages.id"
    op.create_table(
        "comparisons",
        sa.Column("id", sa.String(32), primary_key=True),
        sa.Column(
            "conversation_id", sa.String(32), sa.ForeignKey("conversations.id", ondelete="CASCADE"), nullable=False
        ),
        sa.Column("parent_id", sa.String(32), sa.ForeignKey(message, ondelete="CASCADE"), nullable=False),
        sa.Column("candidate_a", sa.JSON, nullable=False),
        sa.Column("candidate_b", sa.JSON, nullable=False),
        sa.Column("a_id", sa.String(32), sa.ForeignKey(message, ondelete="CASCADE")),
        sa.Column("b_id", sa.String(32), sa.ForeignKey(message, ondelete="CASCADE")),
        sa.Column("choice", sa.String(16)),
        sa.Column("comment", sa.Text, nullable=False),
        sa.Column("created", sa.Double, nullable=False),
        sa.Column("decided", sa.Double),
    )
    for name, column in (("conversation", "conversation_id"), ("parent", "parent_id"), ("a", "a_id"), ("b", "b_id")):
        op.create_index(f"comparisons_by_{name}", "comparisons", [column])
    op.create_table(
        "rankings",
        sa.Column("id", sa.String(32), primary_key=True),
        sa.Column(
            "conversation_id", sa.String(32), sa.ForeignKey("conversations.id", ondelete="CASCADE"), nullable=False
        ),
        sa.Column("parent_id", sa.String(32), sa.ForeignKey(message, ondelete="CASCADE"), nullable=False),
        sa.Column("comment", sa.Text, nullable=False),
        sa.Column("created", sa.Double, nullable=False),
    )
    op.create_index("rankings_by_conversation", "rankings", ["conversation_id"])
    op.create_index("rankings_by_parent", "rankings", ["parent_id"])
    op.create_table(
        "ranked",
        sa.Column("ranking_id", sa.String(32), sa.ForeignKey("rankings.id", ondelete="CASCADE"), primary_key=True),
        sa.Column("message_id", sa.String(32), sa.ForeignKey(message, ondelete="CASCADE"), primary_key=True),
        sa.Column("rank", sa.Integer, nullable=False),
    )
    op.create_index("ranked_by_message", "ranked", ["message_id"])
