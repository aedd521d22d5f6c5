"""The registry on SQLite and on a real PostgreSQL: every method, many threads, two hubs on one database, and a restart."""

import hashlib
import hmac
import itertools
import secrets
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import msgspec
import pytest
import sqlalchemy as sa

from fallow import ports
from fallow.adapters.sql import changes
from fallow.adapters.sql.database import Database, open_database
from fallow.adapters.sql.registry import SqlRegistry, open_registry
from fallow.adapters.sql.schema import api_key
from fallow.core.membership import first_break
from fallow.model.call import Allowance
from fallow.model.errors import FallowError, NameTaken, NotAdmitted, StoreFailed, UnknownName
from fallow.model.identity import Agreement, ApiKey, Invite, Member, MemberRole, Organisation
from fallow.model.ids import KeyId, NodeId, OrgId
from fallow.model.messages import KEYS_CHANGED_MAX
from fallow.model.needs import Policy
from fallow.ports import Changes

pytest_plugins = ("databases",)
T = TypeVar("T")
THREADS = 20
ACME, BETA, GAMMA = OrgId("acme"), OrgId("beta"), OrgId("gamma")
NOW = 1_800_000_000_000
NODE = Member(public_key="UNODE", role="node", org_id=ACME, joined_at_ms=NOW)
NODES: frozenset[MemberRole] = frozenset({"node"})


def digest(word: str) -> bytes:
    return hashlib.sha256(word.encode()).digest()


WORD = digest("word")
INVITE = Invite(id="i1", word_digest=WORD, org_id=ACME, roles=NODES, uses_left=1, created_at_ms=NOW - 10)
KEY = ApiKey(id=KeyId("k1"), digest=digest("key"), org_id=ACME, name="one", created_at_ms=NOW)


@pytest.fixture
def registry(database_url: str) -> Iterator[SqlRegistry]:
    opened = open_registry(database_url)
    for id in (ACME, BETA, GAMMA):
        opened.organisations.add(Organisation(id=id, public_key=f"A{id}", created_at_ms=NOW))
    yield opened
    opened.close()


@pytest.fixture
def database(database_url: str) -> Iterator[Database]:
    """The same database, past the registry's back."""
    opened = open_database(database_url)
    yield opened
    opened.close()


def at_once(calls: Sequence[Callable[[], T]]) -> list[T | FallowError]:
    """All of them in threads of their own, begun together; what they gave or raised, in their order."""
    barrier = threading.Barrier(len(calls))

    def one(call: Callable[[], T]) -> T | FallowError:
        barrier.wait(30)
        try:
            return call()
        except FallowError as error:
            return error

    with ThreadPoolExecutor(len(calls)) as pool:
        return list(pool.map(one, calls))


def test_it_is_what_the_applications_ask_for(registry: SqlRegistry) -> None:
    filled: ports.Registry = registry
    assert filled.members.all() == []


# Organisations and agreements


def test_organisations(registry: SqlRegistry) -> None:
    registry.organisations.add(Organisation(id=OrgId("Zoo"), created_at_ms=NOW))
    assert [o.id for o in registry.organisations.all()] == ["Zoo", "acme", "beta", "gamma"], "by code point, on each database"
    assert registry.organisations.all()[1] == Organisation(id=ACME, public_key="Aacme", created_at_ms=NOW)
    with pytest.raises(NameTaken, match="acme"):
        registry.organisations.add(Organisation(id=ACME, public_key="other"))
    assert registry.organisations.all()[1].public_key == "Aacme"


def test_agreements_begin_end_and_begin_anew(registry: SqlRegistry) -> None:
    first = Agreement(left=ACME, right=BETA, begins_at_ms=NOW, left_signature=b"\x00l", right_signature=b"r")
    registry.organisations.agree(first)
    registry.organisations.agree(Agreement(left=ACME, right=GAMMA, begins_at_ms=NOW))
    again = Agreement(left=ACME, right=BETA, begins_at_ms=NOW + 50)
    with pytest.raises(NameTaken, match="acme and beta"):
        registry.organisations.agree(again)
    registry.organisations.end_agreement(ACME, BETA, at_ms=NOW + 50)
    ended = msgspec.structs.replace(first, ends_at_ms=NOW + 50)
    assert registry.organisations.agreements()[0] == ended
    with pytest.raises(UnknownName, match="acme and beta"):
        registry.organisations.end_agreement(ACME, BETA, at_ms=NOW + 60)
    registry.organisations.agree(again)
    assert registry.organisations.agreements() == [ended, again, Agreement(left=ACME, right=GAMMA, begins_at_ms=NOW)]


def test_an_agreement_needs_both_organisations(registry: SqlRegistry) -> None:
    with pytest.raises(UnknownName, match="zeta"):
        registry.organisations.agree(Agreement(left=ACME, right=OrgId("zeta"), begins_at_ms=NOW))
    with pytest.raises(UnknownName, match="acme and gamma"):
        registry.organisations.end_agreement(ACME, GAMMA, at_ms=NOW)
    assert registry.organisations.agreements() == []


# Invitations and members


def test_invitations(registry: SqlRegistry) -> None:
    later = Invite(
        id="i0",
        word_digest=digest("other"),
        org_id=BETA,
        roles=frozenset[MemberRole]({"node", "gateway"}),
        uses_left=None,
        created_at_ms=NOW,
        expires_at_ms=NOW + 9,
    )
    registry.members.add_invite(later)
    registry.members.add_invite(INVITE)
    assert registry.members.invites() == [INVITE, later]
    for taken in ({"id": "i1"}, {"word_digest": WORD}):
        with pytest.raises(NameTaken):
            registry.members.add_invite(msgspec.structs.replace(later, **{"id": "i9", "word_digest": digest("new"), **taken}))
    with pytest.raises(UnknownName, match="nobody"):
        registry.members.add_invite(msgspec.structs.replace(INVITE, id="i9", word_digest=digest("new"), org_id=OrgId("nobody")))
    registry.members.end_invite("i1", at_ms=NOW)
    registry.members.end_invite("i1", at_ms=NOW + 99)
    assert registry.members.invites()[0].ended_at_ms == NOW
    with pytest.raises(UnknownName, match="i9"):
        registry.members.end_invite("i9", at_ms=NOW)


def test_who_joins_belongs_to_the_invitations_organisation(registry: SqlRegistry) -> None:
    registry.members.add_invite(msgspec.structs.replace(INVITE, org_id=BETA))
    claimed = msgspec.structs.replace(NODE, org_id=GAMMA, invite_id="mine", banned_at_ms=NOW, banned_why="x")
    admitted = registry.members.admit(claimed, word_digest=WORD)
    assert admitted == msgspec.structs.replace(NODE, org_id=BETA, invite_id="i1")
    assert registry.members.named("UNODE") == admitted
    assert registry.members.invites()[0].uses_left == 0


def test_who_is_known_uses_nothing_up(registry: SqlRegistry) -> None:
    registry.members.add_invite(msgspec.structs.replace(INVITE, uses_left=2))
    admitted = registry.members.admit(NODE, word_digest=WORD)
    later = msgspec.structs.replace(NODE, joined_at_ms=NOW + 5)
    for word in (WORD, b"", digest("wrong")):
        assert registry.members.admit(later, word_digest=word) == admitted
    assert registry.members.invites()[0].uses_left == 1
    registry.members.end_invite("i1", at_ms=NOW)
    assert registry.members.admit(later, word_digest=WORD) == admitted


def test_an_invitation_without_limit_stays(registry: SqlRegistry) -> None:
    registry.members.add_invite(msgspec.structs.replace(INVITE, uses_left=None))
    for number in range(3):
        registry.members.admit(msgspec.structs.replace(NODE, public_key=f"U{number}"), word_digest=WORD)
    assert registry.members.invites()[0].uses_left is None


@pytest.mark.parametrize(
    ("changed", "word", "says"),
    [
        ({}, b"", "no invitation"),
        ({}, digest("wrong"), "no invitation"),
        ({}, WORD[:8] + bytes(24), "no invitation"),
        ({}, WORD[:8], "no invitation"),
        ({"uses_left": 0}, WORD, "used up"),
        ({"expires_at_ms": NOW}, WORD, "expired"),
        ({"ended_at_ms": NOW - 1}, WORD, "ended"),
        ({"roles": frozenset({"gateway"})}, WORD, "node"),
    ],
)
def test_who_is_refused_leaves_no_trace(registry: SqlRegistry, changed: dict[str, Any], word: bytes, says: str) -> None:
    invite = msgspec.structs.replace(INVITE, **changed)
    registry.members.add_invite(invite)
    with pytest.raises(NotAdmitted, match=says):
        registry.members.admit(NODE, word_digest=word)
    assert registry.members.invites() == [invite]
    assert registry.members.all() == []


def test_a_banned_member_is_refused_until_it_isnt(registry: SqlRegistry) -> None:
    registry.members.add_invite(msgspec.structs.replace(INVITE, uses_left=5))
    admitted = registry.members.admit(NODE, word_digest=WORD)
    registry.members.ban("UNODE", at_ms=NOW + 1, why="lied " * 100)
    banned = registry.members.named("UNODE")
    assert banned is not None
    assert banned.banned_at_ms == NOW + 1
    assert banned.banned_why.startswith("lied lied")
    with pytest.raises(NotAdmitted, match="lied"):
        registry.members.admit(NODE, word_digest=WORD)
    with pytest.raises(NotAdmitted, match="lied"):
        registry.members.admit_open(NODE)
    assert registry.members.invites()[0].uses_left == 4
    registry.members.ban("UNODE", at_ms=None)
    assert registry.members.admit(NODE, word_digest=b"") == admitted
    with pytest.raises(UnknownName, match="UNEVER"):
        registry.members.ban("UNEVER", at_ms=NOW)


def test_those_who_are_out(registry: SqlRegistry) -> None:
    for key in ("UB", "UA", "UC"):
        registry.members.admit_open(msgspec.structs.replace(NODE, public_key=key))
    assert registry.members.banned() == []
    for key in ("UB", "UA"):
        registry.members.ban(key, at_ms=NOW)
    assert [(one.public_key, one.banned_at_ms) for one in registry.members.banned()] == [("UA", NOW), ("UB", NOW)]


def test_who_read_a_key_before_it_was_revoked_does_not_bring_it_back(registry: SqlRegistry) -> None:
    registry.keys.add(KEY)
    registry.keys.change(msgspec.structs.replace(KEY, revoked_at_ms=NOW))
    registry.keys.change(msgspec.structs.replace(KEY, name="other"))
    assert registry.keys.named(KEY.id) == msgspec.structs.replace(KEY, name="other", revoked_at_ms=NOW)


def test_open_enrolment(registry: SqlRegistry) -> None:
    admitted = registry.members.admit_open(msgspec.structs.replace(NODE, invite_id="mine", banned_at_ms=NOW))
    assert admitted == NODE
    assert registry.members.admit_open(msgspec.structs.replace(NODE, org_id=BETA, joined_at_ms=NOW + 7)) == NODE, "it stays where it was"
    with pytest.raises(NotAdmitted, match="joined as a node"):
        registry.members.admit_open(msgspec.structs.replace(NODE, role="gateway"))
    with pytest.raises(UnknownName, match="nobody"):
        registry.members.admit_open(msgspec.structs.replace(NODE, public_key="UNEW", org_id=OrgId("nobody")))
    assert registry.members.all() == [NODE]


def test_members_by_role(registry: SqlRegistry) -> None:
    gateway = msgspec.structs.replace(NODE, public_key="UGATE", role="gateway", joined_at_ms=NOW - 1)
    for member in (NODE, gateway):
        registry.members.admit_open(member)
    assert registry.members.all() == [gateway, NODE]
    assert registry.members.all("node") == [NODE]
    assert registry.members.all("gateway") == [gateway]
    assert registry.members.named("UNEVER") is None


@pytest.mark.parametrize("uses", [1, 7])
def test_no_use_is_given_twice(database_url: str, registry: SqlRegistry, uses: int) -> None:
    registry.members.add_invite(msgspec.structs.replace(INVITE, uses_left=uses))
    other_hub = open_registry(database_url)
    hubs = itertools.cycle([registry, other_hub])

    def joins(hub: SqlRegistry, number: int) -> Callable[[], Member]:
        return lambda: hub.members.admit(msgspec.structs.replace(NODE, public_key=f"U{number}"), word_digest=WORD)

    results = at_once([joins(next(hubs), number) for number in range(THREADS)])
    other_hub.close()
    refused = [r for r in results if isinstance(r, FallowError)]
    assert [type(r) for r in refused] == [NotAdmitted] * (THREADS - uses), refused
    assert {m.public_key for m in results if isinstance(m, Member)} == {m.public_key for m in registry.members.all()}
    assert registry.members.invites()[0].uses_left == 0


def test_one_key_that_joins_many_times_at_once_is_one_member(database_url: str, registry: SqlRegistry) -> None:
    words = [digest("a"), digest("b")]
    for word in words:
        registry.members.add_invite(msgspec.structs.replace(INVITE, id=word.hex(), word_digest=word, uses_left=THREADS))
    other_hub = open_registry(database_url)

    def joins(hub: SqlRegistry, word: bytes) -> Callable[[], Member]:
        return lambda: hub.members.admit(NODE, word_digest=word)

    results = at_once([joins(*pair) for pair in itertools.product([registry, other_hub], words)] * (THREADS // 4))
    other_hub.close()
    (member,) = registry.members.all()
    assert results == [member] * THREADS
    assert sum(i.uses_left or 0 for i in registry.members.invites()) == 2 * THREADS - 1, "one use is gone"


# API keys


def test_keys(registry: SqlRegistry) -> None:
    whole = ApiKey(
        id=KeyId("k0"),
        digest=digest("other"),
        org_id=BETA,
        name="näme",
        role="operator",
        policy=Policy(rings=frozenset({"market"}), regions=frozenset({"eu", "us"}), cost_max_micro=5),
        allowance=Allowance(calls_per_minute=3, weight=2.5),
        models=frozenset({"b", "a"}),
        budget_micro=2**60,
        created_at_ms=NOW + 1,
        expires_at_ms=NOW + 2,
        revoked_at_ms=NOW + 3,
    )
    for key in (whole, KEY):
        registry.keys.add(key)
    assert registry.keys.all() == [KEY, whole]
    for key in (whole, KEY):
        assert registry.keys.find(key.digest) == key
        assert registry.keys.named(key.id) == key
    for taken in ({"id": "k1"}, {"digest": KEY.digest}):
        with pytest.raises(NameTaken):
            registry.keys.add(msgspec.structs.replace(whole, **{"id": KeyId("k9"), "digest": digest("new"), **taken}))
    with pytest.raises(UnknownName, match="nobody"):
        registry.keys.add(msgspec.structs.replace(KEY, id=KeyId("k9"), digest=digest("new"), org_id=OrgId("nobody")))
    with pytest.raises(UnknownName, match="k9"):
        registry.keys.named(KeyId("k9"))
    assert registry.keys.all() == [KEY, whole]


def test_all_of_a_key_but_its_id_may_change(registry: SqlRegistry) -> None:
    other = msgspec.structs.replace(KEY, id=KeyId("k2"), digest=digest("other"))
    for key in (KEY, other):
        registry.keys.add(key)
    rotated = msgspec.structs.replace(
        KEY,
        digest=digest("rotated"),
        org_id=BETA,
        name="two",
        role="lender",
        policy=Policy(regions=frozenset({"eu"})),
        allowance=Allowance(weight=3),
        models=frozenset({"m"}),
        budget_micro=1,
        created_at_ms=NOW - 1,
        expires_at_ms=NOW + 1,
        revoked_at_ms=NOW,
    )
    assert all(getattr(rotated, name) != getattr(KEY, name) for name in ApiKey.__struct_fields__ if name != "id")
    registry.keys.change(rotated)
    assert registry.keys.named(KEY.id) == rotated
    assert registry.keys.find(KEY.digest) is None
    assert registry.keys.find(rotated.digest) == rotated
    assert registry.keys.named(other.id) == other
    with pytest.raises(NameTaken):
        registry.keys.change(msgspec.structs.replace(rotated, digest=other.digest))
    for unknown in ({"id": KeyId("k9")}, {"org_id": OrgId("nobody")}):
        with pytest.raises(UnknownName):
            registry.keys.change(msgspec.structs.replace(rotated, **unknown))
    assert registry.keys.named(KEY.id) == rotated


def test_a_look_up_compares_all_of_a_digest_in_constant_time(registry: SqlRegistry, monkeypatch: pytest.MonkeyPatch) -> None:
    twins = [KEY, *(msgspec.structs.replace(KEY, id=KeyId(f"t{n}"), digest=KEY.digest[:8] + bytes([n]) * 24) for n in range(3))]
    for key in twins:
        registry.keys.add(key)
    registry.keys.add(msgspec.structs.replace(KEY, id=KeyId("far"), digest=digest("far")))
    compared: list[tuple[bytes, bytes]] = []
    compare = hmac.compare_digest

    def noted(one: bytes, other: bytes) -> bool:
        compared.append((one, other))
        return compare(one, other)

    monkeypatch.setattr(hmac, "compare_digest", noted)
    for key in twins:
        compared.clear()
        assert registry.keys.find(key.digest) == key
        assert sorted(compared) == sorted((twin.digest, key.digest) for twin in twins), "whichever it is, all are compared"
    for wrong in (KEY.digest[:8] + bytes(23), KEY.digest[:8], b"", KEY.digest + b"x", bytes(32)):
        assert registry.keys.find(wrong) is None


def test_a_look_up_goes_by_index(registry: SqlRegistry, database: Database) -> None:
    look_up = (
        sa.select(api_key.c.id).where(api_key.c.digest_head == bytes(8)).compile(database.engine, compile_kwargs={"literal_binds": False})
    )
    with database.reading() as connection:
        if database.is_sqlite:
            plan = connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {look_up}", (bytes(8),)).all()
        else:
            connection.exec_driver_sql("SET LOCAL enable_seqscan = off")  # which is best for so few rows
            plan = connection.exec_driver_sql(f"EXPLAIN {look_up}", {"digest_head_1": bytes(8)}).all()
    assert "api_key_digest_head" in str(plan)


def test_keys_that_are_added_and_changed_at_once(database_url: str, registry: SqlRegistry) -> None:
    other_hub = open_registry(database_url)
    hubs = itertools.cycle([registry, other_hub])
    keys = [msgspec.structs.replace(KEY, id=KeyId(f"k{n}"), digest=digest(f"{n}")) for n in range(THREADS // 2)]

    def adds(hub: SqlRegistry, key: ApiKey) -> Callable[[], None]:
        return lambda: hub.keys.add(key)

    results = at_once([adds(next(hubs), key) for key in keys for _ in range(2)])
    assert results.count(None) == len(keys)
    assert [type(r) for r in results if r is not None] == [NameTaken] * len(keys)
    assert sorted(registry.keys.all(), key=lambda k: k.id) == sorted(keys, key=lambda k: k.id)

    def changes_it(hub: SqlRegistry, n: int) -> Callable[[], None]:
        return lambda: hub.keys.change(msgspec.structs.replace(keys[0], name=f"name {n}", budget_micro=n))

    assert at_once([changes_it(next(hubs), n) for n in range(THREADS)]) == [None] * THREADS
    other_hub.close()
    changed = registry.keys.named(keys[0].id)
    assert changed.name == f"name {changed.budget_micro}", "one of them, whole"


# What changed


def test_changes_name_the_keys_concerned(registry: SqlRegistry) -> None:
    assert registry.changes_after(0) == Changes(0, (), False)
    registry.keys.add(KEY)
    added = registry.changes_after(0)
    assert added == Changes(1, (KEY.digest,), False)
    assert registry.changes_after(1) == Changes(1, (), False)
    registry.keys.change(msgspec.structs.replace(KEY, name="two"))
    registry.keys.change(msgspec.structs.replace(KEY, name="three"))
    assert registry.changes_after(1) == Changes(3, (KEY.digest,), False), "each once"
    registry.keys.change(msgspec.structs.replace(KEY, digest=digest("rotated")))
    after = registry.changes_after(3)
    assert after.key_digests == (KEY.digest, digest("rotated")), "the old one too: it must be forgotten"
    registry.organisations.agree(Agreement(left=ACME, right=BETA, begins_at_ms=NOW))
    agreed = registry.changes_after(after.number)
    assert (agreed.key_digests, agreed.all_of_them) == ((), True)
    assert not registry.changes_after(agreed.number).all_of_them
    registry.organisations.end_agreement(ACME, BETA, at_ms=NOW + 1)
    assert registry.changes_after(agreed.number) == Changes(agreed.number + 1, (), True)
    assert registry.changes_after(0).all_of_them


def test_what_fails_or_concerns_no_key_changes_nothing(registry: SqlRegistry) -> None:
    registry.keys.add(KEY)
    before = registry.changes_after(0)
    registry.members.add_invite(INVITE)
    registry.members.admit(NODE, word_digest=WORD)
    registry.members.ban("UNODE", at_ms=NOW)
    registry.cards.append(NodeId("UNODE"), b"card", at_ms=NOW)
    with pytest.raises(NameTaken):
        registry.keys.add(KEY)
    with pytest.raises(UnknownName):
        registry.keys.change(msgspec.structs.replace(KEY, id=KeyId("k9")))
    with pytest.raises(UnknownName):
        registry.organisations.end_agreement(ACME, BETA, at_ms=NOW)
    assert registry.changes_after(0) == before


def test_who_is_far_behind_or_ahead_forgets_all(registry: SqlRegistry, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(changes, "CHANGES_KEPT", 3)
    assert registry.changes_after(5) == Changes(0, (), True), "an empty database stands where another one was"
    for n in range(5):
        registry.keys.add(msgspec.structs.replace(KEY, id=KeyId(f"k{n}"), digest=digest(f"{n}")))
    assert registry.changes_after(2) == Changes(5, tuple(digest(f"{n}") for n in (2, 3, 4)), False)
    assert registry.changes_after(1) == Changes(5, (), True)
    assert registry.changes_after(6) == Changes(5, (), True), "the database was put back to an older copy"


def test_very_many_changes_are_told_as_all(registry: SqlRegistry, database: Database) -> None:
    with database.writing(lock=changes.CHANGES_LOCK) as connection:
        changes.note_changes(connection, (secrets.token_bytes(32) for _ in range(KEYS_CHANGED_MAX + 1)))
    assert registry.changes_after(0) == Changes(KEYS_CHANGED_MAX + 1, (), True)
    assert len(registry.changes_after(1).key_digests) == KEYS_CHANGED_MAX


def test_no_change_is_missed_by_who_reads_along(database_url: str, registry: SqlRegistry) -> None:
    """A transaction that took its number first may commit last; nobody may see the later number before it."""
    other_hub = open_registry(database_url)
    keys = [msgspec.structs.replace(KEY, id=KeyId(f"k{n}"), digest=digest(f"{n}")) for n in range(THREADS)]
    done = threading.Event()
    seen: set[bytes] = set()

    def reads() -> None:
        number = 0
        while True:
            last = done.is_set()
            number, found, all_of_them = registry.changes_after(number)
            assert not all_of_them
            seen.update(found)
            if last:
                return

    def adds(hub: SqlRegistry, key: ApiKey) -> Callable[[], None]:
        return lambda: hub.keys.add(key)

    with ThreadPoolExecutor(1) as pool:
        reader = pool.submit(reads)
        try:
            assert (
                at_once([adds(hub, key) for hub, key in zip(itertools.cycle([registry, other_hub]), keys, strict=False)])
                == [None] * THREADS
            )
        finally:
            done.set()
        reader.result(30)
    other_hub.close()
    assert seen == {key.digest for key in keys}


def test_a_number_is_seen_after_those_before_it(database: Database, registry: SqlRegistry) -> None:
    """The same with the order forced: the second writer waits for the first one's commit."""
    second_wrote = threading.Event()

    def second() -> None:
        registry.keys.add(KEY)
        second_wrote.set()

    with ThreadPoolExecutor(1) as pool, database.writing(lock=changes.CHANGES_LOCK) as connection:
        changes.note_changes(connection, [digest("first")])
        waiting = pool.submit(second)
        assert not second_wrote.wait(0.2)
        assert registry.changes_after(0) == Changes(0, (), False)
        connection.commit()
        waiting.result(30)
    assert registry.changes_after(0).key_digests == (digest("first"), KEY.digest)


# The log of cards


def test_the_log_of_cards_is_a_chain(registry: SqlRegistry) -> None:
    assert registry.cards.after(0, limit=9) == []
    entries = [
        registry.cards.append(NodeId(node), card, at_ms=at) for node, card, at in [("a", b"1", NOW), ("b", b"1", NOW), ("a", b"2", 5)]
    ]
    assert [(e.number, e.node_id, e.card, e.at_ms) for e in entries] == [(1, "a", b"1", NOW), (2, "b", b"1", NOW), (3, "a", b"2", 5)]
    assert registry.cards.append(NodeId("b"), b"1", at_ms=NOW + 9) == entries[1], "the same card is not logged again"
    assert registry.cards.after(0, limit=9) == entries
    assert first_break(entries) is None
    assert registry.cards.after(1, limit=1) == entries[1:2]
    assert registry.cards.after(0, limit=0) == registry.cards.after(0, limit=-1) == registry.cards.after(3, limit=9) == []
    assert registry.cards.append(NodeId("a"), b"1", at_ms=NOW).number == 4, "an older card that comes back is news"


def test_the_chain_stays_whole_whoever_appends(database_url: str, registry: SqlRegistry) -> None:
    other_hub = open_registry(database_url)

    def appends(hub: SqlRegistry, n: int) -> Callable[[], list[int]]:
        return lambda: [hub.cards.append(NodeId(f"n{n}"), f"{n} {turn}".encode(), at_ms=NOW + n).number for turn in range(3)]

    results = at_once([appends(hub, n) for hub, n in zip(itertools.cycle([registry, other_hub]), range(THREADS), strict=False)])
    other_hub.close()
    numbers = [number for r in results if isinstance(r, list) for number in r]
    assert sorted(numbers) == list(range(1, 3 * THREADS + 1)), results
    entries = registry.cards.after(0, limit=1_000)
    assert len(entries) == 3 * THREADS
    assert first_break(entries) is None


FORGERIES = {
    "sqlite": [
        "INSERT OR REPLACE INTO card_log SELECT number, 'x', card, at_ms, hash FROM card_log WHERE number = 2",
        "INSERT INTO card_log SELECT 0, 'x', card, at_ms, hash FROM card_log WHERE number = 2",
    ],
    "postgresql": ["TRUNCATE card_log"],
}
FORGERIES_ANYWHERE = [
    "UPDATE card_log SET card = hash",
    "UPDATE card_log SET at_ms = at_ms",
    "DELETE FROM card_log",
    "DELETE FROM card_log WHERE number = 2",
    "INSERT INTO card_log SELECT number, 'x', card, at_ms, hash FROM card_log WHERE number = 2 "
    "ON CONFLICT (number) DO UPDATE SET node_id = excluded.node_id",
]


def test_the_log_can_only_be_appended_to(registry: SqlRegistry, database: Database) -> None:
    for n in range(3):
        registry.cards.append(NodeId(f"n{n}"), b"card", at_ms=NOW)
    before = registry.cards.after(0, limit=9)
    for forgery in FORGERIES_ANYWHERE + FORGERIES[database.engine.dialect.name]:
        with pytest.raises(StoreFailed, match="can only be appended to"), database.writing() as connection:
            connection.exec_driver_sql(forgery)
        assert registry.cards.after(0, limit=9) == before, forgery


# The database


def test_a_restart_keeps_all(database_url: str, registry: SqlRegistry) -> None:
    registry.members.add_invite(INVITE)
    registry.members.admit(NODE, word_digest=WORD)
    registry.keys.add(KEY)
    registry.organisations.agree(Agreement(left=ACME, right=BETA, begins_at_ms=NOW))
    registry.cards.append(NodeId("UNODE"), b"card", at_ms=NOW)

    def state(of: SqlRegistry) -> list[Any]:
        organisations, members = of.organisations.all(), of.members.all()
        return [organisations, members, of.members.invites(), of.keys.all(), of.organisations.agreements(), of.cards.after(0, limit=9)]

    before, changed = state(registry), registry.changes_after(0)
    registry.close()
    again = open_registry(database_url)
    assert state(again) == before
    assert all(before)
    assert again.changes_after(0) == changed
    assert again.cards.append(NodeId("UNODE"), b"next", at_ms=NOW).number == 2
    assert first_break(again.cards.after(0, limit=9)) is None
    again.close()


def test_what_a_database_doesnt_take_is_told_without_values(registry: SqlRegistry, database: Database) -> None:
    with pytest.raises(StoreFailed) as failure:
        registry.keys.add(msgspec.structs.replace(KEY, name="hush", budget_micro=2**70))
    assert "hush" not in failure.value.message
    assert KEY.digest.hex() not in failure.value.message
    assert "\n" not in failure.value.message
    assert registry.keys.all() == []
    assert registry.changes_after(0) == Changes(0, (), False)
    with pytest.raises(StoreFailed, match="invite_id") as failure, database.writing() as connection:
        connection.execute(sa.text("INSERT INTO member VALUES ('UNODE', 'hush', 'acme', 0, NULL, NULL, '')"))
    assert "hush" not in failure.value.message, "PostgreSQL tells the whole row"
    assert failure.value.__suppress_context__


def test_what_an_older_or_newer_version_wrote_is_read(registry: SqlRegistry, database: Database) -> None:
    registry.keys.add(KEY)
    with database.writing() as connection:
        connection.execute(sa.text("UPDATE api_key SET policy = '{\"later\": 1}', allowance = '{}'"))
    assert registry.keys.named(KEY.id) == KEY
    with database.writing() as connection:
        connection.execute(sa.text("UPDATE api_key SET policy = 'nonsense'"))
    with pytest.raises(StoreFailed, match="can't read"):
        registry.keys.find(KEY.digest)


def test_more_threads_than_connections(registry: SqlRegistry) -> None:
    registry.keys.add(KEY)
    assert at_once([lambda: registry.keys.find(KEY.digest)] * THREADS) == [KEY] * THREADS


def test_a_sqlite_commit_is_on_the_disk(sqlite_url: str) -> None:
    opened = open_database(sqlite_url)
    with opened.reading() as connection:
        found = {name: connection.exec_driver_sql(f"PRAGMA {name}").scalar() for name in ("journal_mode", "synchronous", "foreign_keys")}
    opened.close()
    assert found == {"journal_mode": "wal", "synchronous": 2, "foreign_keys": 1}


def test_a_postgresql_that_restarts_costs_nobody_an_error(postgresql_url: str) -> None:
    registry, other = open_registry(postgresql_url), open_database(postgresql_url)
    registry.organisations.add(Organisation(id=ACME))
    with other.writing() as connection:
        ended = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = current_database() AND pid != pg_backend_pid()"
        assert connection.execute(sa.text(ended)).all() != []
    assert [o.id for o in registry.organisations.all()] == [ACME]
    registry.close()
    other.close()
