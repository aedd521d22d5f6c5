"""What each role may say and hear on the broker, and what its accounts exchange: all of it made from the table of subjects.

Only what is allowed is listed, nothing is denied: what no row of the table names can't be said or heard.
"""

from collections.abc import Mapping
from typing import Literal

import msgspec

from fallow.wire.subjects import ENROL, PAYLOAD_BYTES_MAX, TABLE, Role, Subject

Account = Literal["GATEWAYS", "NODES", "HUB", "GUESTS", "SYSTEM"]
"""The broker's rooms: what is said in one is heard in another only where a row of the table says so. SYSTEM is the broker's own."""

ACCOUNT_OF: Mapping[Role, Account] = {"gateway": "GATEWAYS", "node": "NODES", "hub": "HUB", "guest": "GUESTS"}
OWN = "{{subject()}}"
"""In an account's template: the user's own public key, which is a node's or a gateway's id."""
INBOX = f"_I.{OWN}.>"
"""Where the answers to one's own questions come. Nobody is granted another's."""
SERVICE_ANSWERS = "_R_.>"
"""Where the broker takes an answer to a question that came from another account."""


class Permissions(msgspec.Struct, frozen=True, kw_only=True):
    """The subjects on which a role may speak, and those to which it may listen."""

    publish: tuple[str, ...]
    subscribe: tuple[str, ...]


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """Of one connection: subscriptions (-1: any number) and message size; and how many connections the role's account holds."""

    subscriptions_max: int
    payload_bytes_max: int
    connections_max: int
    is_bearer: bool = False
    """Whoever shows the credential is let in, without a key of their own: there is nobody yet to have one."""


NODE_SUBSCRIPTIONS_MAX = 24
"""A node listens to eight: calls, bodies, control, the hub twice, prices, and its inbox. The rest is room for what comes."""
GUEST_SUBSCRIPTIONS_MAX = 4
GUEST_PAYLOAD_BYTES_MAX = 8 * 1024
NODE_CONNECTIONS_MAX = 16_000
"""Of the broker's 20,000. A node has two for a moment when its credential is renewed."""
GATEWAY_CONNECTIONS_MAX = 2_000
HUB_CONNECTIONS_MAX = 64
GUEST_CONNECTIONS_MAX = 512
SYSTEM_CONNECTIONS_MAX = 64
_ANY_NUMBER = -1

LIMITS: Mapping[Account, Limits] = {
    "NODES": Limits(subscriptions_max=NODE_SUBSCRIPTIONS_MAX, payload_bytes_max=PAYLOAD_BYTES_MAX, connections_max=NODE_CONNECTIONS_MAX),
    "GATEWAYS": Limits(subscriptions_max=_ANY_NUMBER, payload_bytes_max=PAYLOAD_BYTES_MAX, connections_max=GATEWAY_CONNECTIONS_MAX),
    "HUB": Limits(subscriptions_max=_ANY_NUMBER, payload_bytes_max=PAYLOAD_BYTES_MAX, connections_max=HUB_CONNECTIONS_MAX),
    "GUESTS": Limits(
        subscriptions_max=GUEST_SUBSCRIPTIONS_MAX,
        payload_bytes_max=GUEST_PAYLOAD_BYTES_MAX,
        connections_max=GUEST_CONNECTIONS_MAX,
        is_bearer=True,
    ),
    "SYSTEM": Limits(subscriptions_max=_ANY_NUMBER, payload_bytes_max=PAYLOAD_BYTES_MAX, connections_max=SYSTEM_CONNECTIONS_MAX),
}

CLAIMS_UPDATE = "$SYS.REQ.CLAIMS.UPDATE"
"""Where the broker takes an account's new JWT while it runs."""
LOGIN_REFUSED = "$SYS.SERVER.*.CLIENT.AUTH.ERR"
"""Where the broker tells of a login that it refused."""
SYSTEM_PERMISSIONS = Permissions(
    publish=(CLAIMS_UPDATE,),
    subscribe=(
        "$SYS.ACCOUNT.*.CONNECT",
        "$SYS.ACCOUNT.*.DISCONNECT",
        LOGIN_REFUSED,
        INBOX,
    ),
)
"""The hub's second user: it replaces accounts' JWTs, and hears who came, who went and who was turned away."""


class Export(msgspec.Struct, frozen=True, kw_only=True):
    """What an account lets others hear (`stream`) or ask (`service`)."""

    subject: str
    kind: Literal["stream", "service"]


class Import(msgspec.Struct, frozen=True, kw_only=True):
    """What an account hears or asks of another. `share`: who is asked learns who asks, and from which host."""

    subject: str
    kind: Literal["stream", "service"]
    account: Account
    share: bool = False


class Links(msgspec.Struct, frozen=True, kw_only=True):
    """What one account gives to others and takes from them."""

    exports: tuple[Export, ...]
    imports: tuple[Import, ...]


def allowed(role: Role) -> Permissions:
    """What one role may say and hear: the rows that name it, with its own id in its own place and anybody's in the others."""
    publish = {row.of(role, OWN) for row in TABLE if row.sender == role}
    subscribe = {row.of(role, OWN) for row in TABLE if role in row.receivers}
    if any(row.is_asked and row.sender == role for row in TABLE):
        subscribe.add(INBOX)
    if any(row.is_asked and role in row.receivers for row in TABLE):
        publish.add(SERVICE_ANSWERS)
    return Permissions(publish=tuple(sorted(publish)), subscribe=tuple(sorted(subscribe)))


def links() -> dict[Account, Links]:
    """What the accounts exchange. What is told is a stream of the sender's account; what is asked is a service of the receiver's."""
    exports: dict[Account, list[Export]] = {account: [] for account in LIMITS}
    imports: dict[Account, list[Import]] = {account: [] for account in LIMITS}
    for row in TABLE:
        sender, receivers = ACCOUNT_OF[row.sender], [ACCOUNT_OF[one] for one in row.receivers]
        if row.is_asked:
            _link_service(row, exports, imports)
            continue
        exports[sender].append(Export(subject=row.pattern, kind="stream"))
        for receiver in receivers:
            imports[receiver].append(Import(subject=row.pattern, kind="stream", account=sender))
    return {account: Links(exports=tuple(exports[account]), imports=tuple(imports[account])) for account in LIMITS}


def _link_service(row: Subject, exports: dict[Account, list[Export]], imports: dict[Account, list[Import]]) -> None:
    """Of each account that is asked, for the one that asks. A guest has no id, so the hub is told where it comes from."""
    for receiver in row.receivers:
        exports[ACCOUNT_OF[receiver]].append(Export(subject=row.pattern, kind="service"))
        entry = Import(subject=row.pattern, kind="service", account=ACCOUNT_OF[receiver], share=row is ENROL)
        imports[ACCOUNT_OF[row.sender]].append(entry)
