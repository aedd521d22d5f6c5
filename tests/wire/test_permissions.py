"""What each role may say and hear: all of it follows from the table of subjects, and some of it is written down here by hand."""

from collections import Counter
from typing import Literal

import pytest

from fallow.wire import subjects
from fallow.wire.permissions import (
    ACCOUNT_OF,
    INBOX,
    LIMITS,
    OWN,
    SERVICE_ANSWERS,
    SYSTEM_PERMISSIONS,
    Account,
    Import,
    Links,
    allowed,
    links,
)
from fallow.wire.subjects import PAYLOAD_BYTES_MAX, TABLE, Role, Subject

ROLES: tuple[Role, ...] = ("gateway", "node", "hub", "guest")


def test_by_hand() -> None:
    """What changes here changes what a stranger may do."""
    assert {role: (set(allowed(role).publish), set(allowed(role).subscribe)) for role in ROLES} == {
        "node": (
            {"rsp.*.{{subject()}}.*", "hb.{{subject()}}", "hub.node.{{subject()}}", "hub.echo.{{subject()}}.*"},
            {
                "n.{{subject()}}.req",
                "n.{{subject()}}.body.*",
                "n.{{subject()}}.ctl",
                "n.{{subject()}}.hub",
                "prices",
                "_I.{{subject()}}.>",
            },
        ),
        "gateway": (
            {
                "n.*.req",
                "n.*.body.*",
                "n.*.ctl",
                "hub.key.{{subject()}}",
                "hub.demand",
                "hub.prices",
                "hub.spent.{{subject()}}",
                "hub.gateway.{{subject()}}",
            },
            {"rsp.{{subject()}}.*.*", "hb.*", "keys", "banned", "prices", "_I.{{subject()}}.>"},
        ),
        "hub": (
            {"keys", "banned", "n.*.hub", "prices", "_R_.>"},
            {"hb.*", "hub.key.*", "hub.spent.*", "hub.demand", "hub.prices", "hub.enrol", "hub.node.*", "hub.gateway.*", "hub.echo.*.*"},
        ),
        "guest": ({"hub.enrol"}, {"_I.{{subject()}}.>"}),
    }


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("row", TABLE, ids=[row.pattern for row in TABLE])
def test_every_row_for_every_role(row: Subject, role: Role) -> None:
    """A row is in a role's list as the table says, with the role's own id in its own place; and no list has it in another form."""
    may = allowed(role)
    own = row.of(role, OWN)
    assert (own in may.publish) is (row.sender == role)
    assert (own in may.subscribe) is (role in row.receivers)
    if own != row.pattern:
        assert row.pattern not in may.publish
        assert row.pattern not in may.subscribe


@pytest.mark.parametrize("role", ROLES)
def test_there_is_nothing_else(role: Role) -> None:
    of_table = {row.of(role, OWN) for row in TABLE}
    may = allowed(role)
    asks = any(row.is_asked and row.sender == role for row in TABLE)
    is_asked = any(row.is_asked and role in row.receivers for row in TABLE)
    assert set(may.publish) - of_table == ({SERVICE_ANSWERS} if is_asked else set())
    assert set(may.subscribe) - of_table == ({INBOX} if asks else set())
    for subject in (*may.publish, *may.subscribe):
        assert not subject.startswith(("$", ">", "*"))
        assert ">" not in subject or subject in (INBOX, SERVICE_ANSWERS)
    assert list(may.publish) == sorted(set(may.publish))
    assert list(may.subscribe) == sorted(set(may.subscribe))


@pytest.mark.parametrize("row", TABLE, ids=[row.pattern for row in TABLE])
def test_each_row_is_a_way_between_accounts(row: Subject) -> None:
    made = links()
    kind: Literal["stream", "service"] = "service" if row.is_asked else "stream"
    gives = [ACCOUNT_OF[one] for one in row.receivers] if row.is_asked else [ACCOUNT_OF[row.sender]]
    takes = {ACCOUNT_OF[row.sender]} if row.is_asked else {ACCOUNT_OF[one] for one in row.receivers}
    exporting = [account for account, one in made.items() for export in one.exports if export.subject == row.pattern]
    assert exporting == gives
    for account, one in made.items():
        found = [entry for entry in one.imports if entry.subject == row.pattern]
        expected = Import(subject=row.pattern, kind=kind, account=gives[0], share=row is subjects.ENROL)
        assert found == ([expected] if account in takes else [])
        assert all(export.kind == kind for export in one.exports if export.subject == row.pattern)


def test_nothing_else_goes_between_accounts() -> None:
    patterns = {row.pattern for row in TABLE}
    for account, one in links().items():
        assert {entry.subject for entry in one.imports} | {entry.subject for entry in one.exports} <= patterns
        assert max(Counter(entry.subject for entry in one.exports).values(), default=0) <= 1
        assert all(entry.account != account for entry in one.imports)
    assert links()["SYSTEM"] == Links(imports=(), exports=())
    assert links()["GUESTS"].exports == ()


def test_limits() -> None:
    node = LIMITS["NODES"]
    assert 16 <= node.subscriptions_max <= 64
    assert node.subscriptions_max >= 2 * len(allowed("node").subscribe), "room for what comes"
    assert node.payload_bytes_max == PAYLOAD_BYTES_MAX == 256 * 1024
    assert LIMITS["GUESTS"].subscriptions_max == 4
    assert LIMITS["GUESTS"].payload_bytes_max == subjects.ENROL.payload_bytes_max
    accounts: set[Account] = set(LIMITS)
    assert accounts == {*ACCOUNT_OF.values(), "SYSTEM"}
    for account, limits in LIMITS.items():
        assert 0 < limits.connections_max <= 20_000
        assert limits.is_bearer is (account == "GUESTS")
    for role in ROLES:
        largest = max(row.payload_bytes_max for row in TABLE if row.sender == role)
        assert LIMITS[ACCOUNT_OF[role]].payload_bytes_max >= largest


def test_the_system_user_changes_accounts_and_hears_who_came() -> None:
    assert SYSTEM_PERMISSIONS.publish == ("$SYS.REQ.CLAIMS.UPDATE",)
    assert all(one == INBOX or one.startswith("$SYS.") for one in SYSTEM_PERMISSIONS.subscribe)
    assert not any(">" in one for one in SYSTEM_PERMISSIONS.subscribe if one != INBOX)
