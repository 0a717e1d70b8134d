"""How many messages a reply did not read because they had no room."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"


def upgrade() -> None:
    """Add the column; of replies that are there it is not known, and none are told."""
    op.add_column("replies", sa.Column("forgotten", sa.Integer, nullable=False, server_default="0"))
