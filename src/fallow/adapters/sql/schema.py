"""The tables as they are now. Each change here needs a step in `versions/`; a test compares the two."""

from typing import Any

import msgspec
from sqlalchemy import (
    BigInteger,
    CheckConstraint,
    Column,
    Dialect,
    ForeignKeyConstraint,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    PrimaryKeyConstraint,
    Table,
    Text,
    TypeDecorator,
    UniqueConstraint,
)

from fallow.model.call import Allowance
from fallow.model.errors import StoreFailed
from fallow.model.identity import MemberRole
from fallow.model.needs import Policy

DIGEST_HEAD_BYTES = 8
"""So much of a digest is looked up by index; the whole is compared in constant time."""


class Json(TypeDecorator[Any]):
    """A msgspec value as JSON text. What an older version wrote is read with its defaults, what a newer one added is ignored."""

    impl = Text
    cache_ok = True

    def __init__(self, kind: Any) -> None:
        super().__init__()
        self.kind = kind

    def process_bind_param(self, value: Any, dialect: Dialect) -> str | None:
        """To text; sets in order, so that the same value is always the same text."""
        return None if value is None else msgspec.json.encode(value, order="deterministic").decode()

    def process_result_value(self, value: Any, dialect: Dialect) -> Any:
        """From text; raises StoreFailed for what isn't such a value."""
        try:
            return None if value is None else msgspec.json.decode(value, type=self.kind)
        except msgspec.DecodeError as error:
            raise StoreFailed(f"the database holds a value that this version of Fallow can't read: {error}") from None


Word = Text().with_variant(Text(collation="C"), "postgresql")
"""Text that both databases sort by code point."""
Stamp = BigInteger()
"""UTC in milliseconds."""
Counted = BigInteger().with_variant(Integer(), "sqlite")
"""A number that the database counts up itself: SQLite does so for INTEGER only."""

metadata = MetaData()

organisation = Table(
    "organisation",
    metadata,
    Column("id", Word, nullable=False),
    Column("public_key", Text, nullable=False),
    Column("created_at_ms", Stamp, nullable=False),
    PrimaryKeyConstraint("id", name="organisation_pk"),
)

agreement = Table(
    "agreement",
    metadata,
    Column("left", Word, nullable=False),
    Column("right", Word, nullable=False),
    Column("begins_at_ms", Stamp, nullable=False),
    Column("ends_at_ms", Stamp),
    Column("left_signature", LargeBinary, nullable=False),
    Column("right_signature", LargeBinary, nullable=False),
    PrimaryKeyConstraint("left", "right", "begins_at_ms", name="agreement_pk"),
    ForeignKeyConstraint(["left"], ["organisation.id"], name="agreement_left_fk"),
    ForeignKeyConstraint(["right"], ["organisation.id"], name="agreement_right_fk"),
)

invite = Table(
    "invite",
    metadata,
    Column("id", Word, nullable=False),
    Column("word_digest", LargeBinary, nullable=False),
    Column("word_digest_head", LargeBinary, nullable=False),
    Column("org_id", Word, nullable=False),
    Column("roles", Json(frozenset[MemberRole]), nullable=False),
    Column("uses_left", BigInteger),
    Column("created_at_ms", Stamp, nullable=False),
    Column("expires_at_ms", Stamp),
    Column("ended_at_ms", Stamp),
    PrimaryKeyConstraint("id", name="invite_pk"),
    UniqueConstraint("word_digest", name="invite_word_digest_unique"),
    ForeignKeyConstraint(["org_id"], ["organisation.id"], name="invite_org_fk"),
    CheckConstraint("uses_left >= 0", name="invite_uses_check"),
    Index("invite_word_digest_head", "word_digest_head"),
)

member = Table(
    "member",
    metadata,
    Column("public_key", Word, nullable=False),
    Column("role", Text, nullable=False),
    Column("org_id", Word, nullable=False),
    Column("joined_at_ms", Stamp, nullable=False),
    Column("invite_id", Text, nullable=False),
    Column("banned_at_ms", Stamp),
    Column("banned_why", Text, nullable=False),
    PrimaryKeyConstraint("public_key", name="member_pk"),
    ForeignKeyConstraint(["org_id"], ["organisation.id"], name="member_org_fk"),
)

api_key = Table(
    "api_key",
    metadata,
    Column("id", Word, nullable=False),
    Column("digest", LargeBinary, nullable=False),
    Column("digest_head", LargeBinary, nullable=False),
    Column("org_id", Word, nullable=False),
    Column("name", Text, nullable=False),
    Column("role", Text, nullable=False),
    Column("policy", Json(Policy), nullable=False),
    Column("allowance", Json(Allowance), nullable=False),
    Column("models", Json(frozenset[str]), nullable=False),
    Column("budget_micro", BigInteger),
    Column("created_at_ms", Stamp, nullable=False),
    Column("expires_at_ms", Stamp),
    Column("revoked_at_ms", Stamp),
    PrimaryKeyConstraint("id", name="api_key_pk"),
    UniqueConstraint("digest", name="api_key_digest_unique"),
    ForeignKeyConstraint(["org_id"], ["organisation.id"], name="api_key_org_fk"),
    Index("api_key_digest_head", "digest_head"),
)

spending = Table(
    "spending",
    metadata,
    Column("key_id", Word, nullable=False),
    Column("gateway_id", Word, nullable=False),
    Column("since_ms", Stamp, nullable=False),
    Column("micro", BigInteger, nullable=False),
    PrimaryKeyConstraint("key_id", "gateway_id", "since_ms", name="spending_pk"),
    ForeignKeyConstraint(["key_id"], ["api_key.id"], name="spending_key_fk"),
    CheckConstraint("micro >= 0", name="spending_micro_check"),
)
"""What a key's calls have cost at a gateway, in micro-credits, since the gateway's process began."""

change = Table(
    "change",
    metadata,
    Column("number", Counted, nullable=False, autoincrement=True),
    Column("digest", LargeBinary),
    PrimaryKeyConstraint("number", name="change_pk"),
    sqlite_autoincrement=True,
)
"""What changed of API keys, in order: the digest of one, or NULL for more than some keys."""

card_log = Table(
    "card_log",
    metadata,
    Column("number", BigInteger, nullable=False, autoincrement=False),
    Column("node_id", Word, nullable=False),
    Column("card", LargeBinary, nullable=False),
    Column("at_ms", Stamp, nullable=False),
    Column("hash", LargeBinary, nullable=False),
    PrimaryKeyConstraint("number", name="card_log_pk"),
    Index("card_log_node", "node_id", "number"),
)
"""A hash chain. Triggers refuse every change but an append."""
