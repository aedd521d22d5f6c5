"""Invitations, and the nodes and gateways that joined, in SQL."""

import hmac

import msgspec
import sqlalchemy as sa

from fallow.adapters.sql.database import Database
from fallow.adapters.sql.organisations import must_know
from fallow.adapters.sql.schema import DIGEST_HEAD_BYTES
from fallow.adapters.sql.schema import invite as invite_table
from fallow.adapters.sql.schema import member as member_table
from fallow.core.membership import why_not_admitted
from fallow.model.errors import NameTaken, NotAdmitted, StoreFailed, UnknownName, shortened
from fallow.model.identity import Invite, Member, MemberRole

ADMIT_TRIES = 2
"""A key that is let in twice at the same moment is known at the second try."""
INVITE_COLUMNS = [column for column in invite_table.c if column.name != "word_digest_head"]


class SqlMembers:
    """Fills ports.Members."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def add_invite(self, invite: Invite) -> None:
        """Raises NameTaken, and UnknownName for an organisation that isn't there."""
        taken = f"there is an invitation {shortened(invite.id)} already, or one with the same word"
        with self._database.writing(taken=taken) as connection:
            must_know(connection, invite.org_id)
            row = {**msgspec.structs.asdict(invite), "word_digest_head": invite.word_digest[:DIGEST_HEAD_BYTES]}
            connection.execute(sa.insert(invite_table).values(row))

    def invites(self) -> list[Invite]:
        """All that ever were, oldest first."""
        table = invite_table.c
        with self._database.reading() as connection:
            rows = connection.execute(sa.select(*INVITE_COLUMNS).order_by(table.created_at_ms, table.id))
            return [Invite(**row) for row in rows.mappings()]

    def end_invite(self, id: str, *, at_ms: int) -> None:
        """Nobody joins by it any more; ending it again changes nothing. Raises UnknownName."""
        table = invite_table.c
        with self._database.writing() as connection:
            ended = connection.execute(
                sa.update(invite_table).where(table.id == id).values(ended_at_ms=sa.func.coalesce(table.ended_at_ms, at_ms))
            )
            if ended.rowcount == 0:
                raise UnknownName(f"there is no invitation {shortened(id)}")

    def admit(self, member: Member, *, word_digest: bytes) -> Member:
        """Let a member in by an invitation's word, or because it is known; raises NotAdmitted."""
        return self._admit(member, word_digest=word_digest, is_open=False)

    def admit_open(self, member: Member) -> Member:
        """Let a member in without an invitation; raises NotAdmitted, and UnknownName for an organisation that isn't there."""
        return self._admit(member, word_digest=b"", is_open=True)

    def named(self, public_key: str) -> Member | None:
        with self._database.reading() as connection:
            return _member(connection, public_key)

    def all(self, role: MemberRole | None = None) -> list[Member]:
        """In the order in which they joined."""
        table = member_table.c
        query = sa.select(member_table).order_by(table.joined_at_ms, table.public_key)
        with self._database.reading() as connection:
            rows = connection.execute(query if role is None else query.where(table.role == role))
            return [Member(**row) for row in rows.mappings()]

    def banned(self) -> list[Member]:
        """Those who are put out."""
        query = sa.select(member_table).where(member_table.c.banned_at_ms.is_not(None)).order_by(member_table.c.public_key)
        with self._database.reading() as connection:
            return [Member(**row) for row in connection.execute(query).mappings()]

    def ban(self, public_key: str, *, at_ms: int | None, why: str = "") -> None:
        """Put a member out, or let it back in with `at_ms` None; raises UnknownName."""
        kept = "" if at_ms is None else shortened(why)
        with self._database.writing() as connection:
            changed = connection.execute(
                sa.update(member_table).where(member_table.c.public_key == public_key).values(banned_at_ms=at_ms, banned_why=kept)
            )
            if changed.rowcount == 0:
                raise UnknownName(f"{shortened(public_key)} never joined")

    def _admit(self, member: Member, *, word_digest: bytes, is_open: bool) -> Member:
        for _ in range(ADMIT_TRIES):
            try:
                return self._admit_once(member, word_digest, is_open)
            except NameTaken:
                continue
        raise StoreFailed("a node or gateway could not be let in: others with the same key were faster each time; try again")

    def _admit_once(self, member: Member, word_digest: bytes, is_open: bool) -> Member:
        with self._database.writing(taken="this key joined just now") as connection:
            invite = _invite_for_use(connection, word_digest)
            known = _member(connection, member.public_key)
            if known is not None or not is_open:
                why = why_not_admitted(invite, known, member.role, member.joined_at_ms)
                if why is not None:
                    raise NotAdmitted(why)
            if known is not None:
                return known
            admitted = msgspec.structs.replace(member, invite_id="", banned_at_ms=None, banned_why="")
            if is_open:
                must_know(connection, member.org_id)
            else:
                assert invite is not None
                admitted = msgspec.structs.replace(admitted, org_id=invite.org_id, invite_id=invite.id)
                _use(connection, invite)
            connection.execute(sa.insert(member_table).values(msgspec.structs.asdict(admitted)))
            return admitted


def _invite_for_use(connection: sa.Connection, word_digest: bytes) -> Invite | None:
    """The invitation with this word; nobody else can use it until the transaction ends."""
    if not word_digest:
        return None
    head = word_digest[:DIGEST_HEAD_BYTES]
    rows = connection.execute(sa.select(*INVITE_COLUMNS).where(invite_table.c.word_digest_head == head).with_for_update())
    found = [row for row in rows.mappings() if hmac.compare_digest(row["word_digest"], word_digest)]
    return Invite(**found[0]) if found else None


def _use(connection: sa.Connection, invite: Invite) -> None:
    if invite.uses_left is not None:
        table = invite_table.c
        used = connection.execute(
            sa.update(invite_table).where(table.id == invite.id, table.uses_left > 0).values(uses_left=table.uses_left - 1)
        )
        assert used.rowcount == 1, "the row is locked since it was read"


def _member(connection: sa.Connection, public_key: str) -> Member | None:
    row = connection.execute(sa.select(member_table).where(member_table.c.public_key == public_key)).mappings().first()
    return None if row is None else Member(**row)
