"""Step 2: what API keys with a budget have cost, at each gateway."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"

WORD = sa.Text().with_variant(sa.Text(collation="C"), "postgresql")


def upgrade() -> None:
    """A table more; nothing that is there changes."""
    op.create_table(
        "spending",
        sa.Column("key_id", WORD, nullable=False),
        sa.Column("gateway_id", WORD, nullable=False),
        sa.Column("since_ms", sa.BigInteger(), nullable=False),
        sa.Column("micro", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("key_id", "gateway_id", "since_ms", name="spending_pk"),
        sa.ForeignKeyConstraint(["key_id"], ["api_key.id"], name="spending_key_fk"),
        sa.CheckConstraint("micro >= 0", name="spending_micro_check"),
    )
