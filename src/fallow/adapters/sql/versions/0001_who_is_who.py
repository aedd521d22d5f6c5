"""Step 1: organisations, agreements, invitations, members, API keys and their changes, and the log of cards."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None

WORD = sa.Text().with_variant(sa.Text(collation="C"), "postgresql")
COUNTED = sa.BigInteger().with_variant(sa.Integer(), "sqlite")

SQLITE_TRIGGERS = (
    """CREATE TRIGGER card_log_keeps_rows BEFORE UPDATE ON card_log
    BEGIN SELECT RAISE(ABORT, 'the log of cards can only be appended to'); END""",
    """CREATE TRIGGER card_log_keeps_all BEFORE DELETE ON card_log
    BEGIN SELECT RAISE(ABORT, 'the log of cards can only be appended to'); END""",
    # INSERT OR REPLACE deletes without asking the trigger above
    """CREATE TRIGGER card_log_appends BEFORE INSERT ON card_log WHEN NEW.number <= (SELECT max(number) FROM card_log)
    BEGIN SELECT RAISE(ABORT, 'the log of cards can only be appended to'); END""",
)
POSTGRESQL_TRIGGERS = (
    """CREATE FUNCTION card_log_refuse() RETURNS trigger LANGUAGE plpgsql AS
    $$ BEGIN RAISE EXCEPTION 'the log of cards can only be appended to'; END $$""",
    "CREATE TRIGGER card_log_keeps_rows BEFORE UPDATE OR DELETE ON card_log FOR EACH ROW EXECUTE FUNCTION card_log_refuse()",
    "CREATE TRIGGER card_log_keeps_all BEFORE TRUNCATE ON card_log FOR EACH STATEMENT EXECUTE FUNCTION card_log_refuse()",
)


def upgrade() -> None:
    """From an empty database."""
    make_organisations()
    make_members()
    make_keys()
    make_card_log()


def make_organisations() -> None:
    """Organisations, and what they agreed on."""
    op.create_table(
        "organisation",
        sa.Column("id", WORD, nullable=False),
        sa.Column("public_key", sa.Text(), nullable=False),
        sa.Column("created_at_ms", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="organisation_pk"),
    )
    op.create_table(
        "agreement",
        sa.Column("left", WORD, nullable=False),
        sa.Column("right", WORD, nullable=False),
        sa.Column("begins_at_ms", sa.BigInteger(), nullable=False),
        sa.Column("ends_at_ms", sa.BigInteger()),
        sa.Column("left_signature", sa.LargeBinary(), nullable=False),
        sa.Column("right_signature", sa.LargeBinary(), nullable=False),
        sa.PrimaryKeyConstraint("left", "right", "begins_at_ms", name="agreement_pk"),
        sa.ForeignKeyConstraint(["left"], ["organisation.id"], name="agreement_left_fk"),
        sa.ForeignKeyConstraint(["right"], ["organisation.id"], name="agreement_right_fk"),
    )


def make_members() -> None:
    """Invitations, and who joined."""
    op.create_table(
        "invite",
        sa.Column("id", WORD, nullable=False),
        sa.Column("word_digest", sa.LargeBinary(), nullable=False),
        sa.Column("word_digest_head", sa.LargeBinary(), nullable=False),
        sa.Column("org_id", WORD, nullable=False),
        sa.Column("roles", sa.Text(), nullable=False),
        sa.Column("uses_left", sa.BigInteger()),
        sa.Column("created_at_ms", sa.BigInteger(), nullable=False),
        sa.Column("expires_at_ms", sa.BigInteger()),
        sa.Column("ended_at_ms", sa.BigInteger()),
        sa.PrimaryKeyConstraint("id", name="invite_pk"),
        sa.UniqueConstraint("word_digest", name="invite_word_digest_unique"),
        sa.ForeignKeyConstraint(["org_id"], ["organisation.id"], name="invite_org_fk"),
        sa.CheckConstraint("uses_left >= 0", name="invite_uses_check"),
    )
    op.create_index("invite_word_digest_head", "invite", ["word_digest_head"])
    op.create_table(
        "member",
        sa.Column("public_key", WORD, nullable=False),
        sa.Column("role", sa.Text(), nullable=False),
        sa.Column("org_id", WORD, nullable=False),
        sa.Column("joined_at_ms", sa.BigInteger(), nullable=False),
        sa.Column("invite_id", sa.Text(), nullable=False),
        sa.Column("banned_at_ms", sa.BigInteger()),
        sa.Column("banned_why", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("public_key", name="member_pk"),
        sa.ForeignKeyConstraint(["org_id"], ["organisation.id"], name="member_org_fk"),
    )


def make_keys() -> None:
    """API keys, and what changed of them."""
    op.create_table(
        "api_key",
        sa.Column("id", WORD, nullable=False),
        sa.Column("digest", sa.LargeBinary(), nullable=False),
        sa.Column("digest_head", sa.LargeBinary(), nullable=False),
        sa.Column("org_id", WORD, nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("role", sa.Text(), nullable=False),
        sa.Column("policy", sa.Text(), nullable=False),
        sa.Column("allowance", sa.Text(), nullable=False),
        sa.Column("models", sa.Text(), nullable=False),
        sa.Column("budget_micro", sa.BigInteger()),
        sa.Column("created_at_ms", sa.BigInteger(), nullable=False),
        sa.Column("expires_at_ms", sa.BigInteger()),
        sa.Column("revoked_at_ms", sa.BigInteger()),
        sa.PrimaryKeyConstraint("id", name="api_key_pk"),
        sa.UniqueConstraint("digest", name="api_key_digest_unique"),
        sa.ForeignKeyConstraint(["org_id"], ["organisation.id"], name="api_key_org_fk"),
    )
    op.create_index("api_key_digest_head", "api_key", ["digest_head"])
    op.create_table(
        "change",
        sa.Column("number", COUNTED, nullable=False, autoincrement=True),
        sa.Column("digest", sa.LargeBinary()),
        sa.PrimaryKeyConstraint("number", name="change_pk"),
        sqlite_autoincrement=True,
    )


def make_card_log() -> None:
    """The log of cards, and what keeps it append-only."""
    op.create_table(
        "card_log",
        sa.Column("number", sa.BigInteger(), nullable=False, autoincrement=False),
        sa.Column("node_id", WORD, nullable=False),
        sa.Column("card", sa.LargeBinary(), nullable=False),
        sa.Column("at_ms", sa.BigInteger(), nullable=False),
        sa.Column("hash", sa.LargeBinary(), nullable=False),
        sa.PrimaryKeyConstraint("number", name="card_log_pk"),
    )
    op.create_index("card_log_node", "card_log", ["node_id", "number"])
    for statement in SQLITE_TRIGGERS if op.get_bind().dialect.name == "sqlite" else POSTGRESQL_TRIGGERS:
        op.execute(statement)
