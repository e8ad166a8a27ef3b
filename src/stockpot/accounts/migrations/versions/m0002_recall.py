"""What the caches of answers did for a request, and what it saved.

Columns without a value for the rows that are there: neither database touches those, however many they are.
"""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add the columns."""
    for column in (
        sa.Column("recall_outcome", sa.Text),
        sa.Column("recall_reason", sa.Text),
        sa.Column("recall_entry", sa.Text),
        sa.Column("recall_similarity", sa.Double),
        sa.Column("recall_error_upper", sa.Double),
        sa.Column("saved_prompt_tokens", sa.BigInteger),
        sa.Column("saved_output_tokens", sa.BigInteger),
        sa.Column("saved_nanousd", sa.BigInteger),
        sa.Column("saved_s", sa.Double),
    ):
        op.add_column("requests", column)
