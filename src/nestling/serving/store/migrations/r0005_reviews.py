"""What an operator said of reports and verdicts."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"


def upgrade() -> None:
    """Add the columns of a review; nothing that is there has been looked at."""
    for table in ("flags", "verdicts"):
        op.add_column(table, sa.Column("upheld", sa.Boolean))
        op.add_column(table, sa.Column("reviewed", sa.Double))
