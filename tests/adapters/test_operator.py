"""The broker under an operator: who is let in, and every subject tried by everyone, against a real server."""

import asyncio
import base64
import itertools
import json
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import pytest
from nats import errors
from nats.aio.client import Client
from nats.aio.msg import Msg
from trusted import DAY_S, HERE, Site, Tap, until

from fallow.adapters.broker import start_broker
from fallow.adapters.nats_bus import NatsBus, push_accounts
from fallow.adapters.nkey import Credentials, KeyPair, make_key
from fallow.adapters.operator import REVOKED_AHEAD_S, REVOKED_KEPT_S, REVOKED_MAX, BrokerTrust, Operator, is_offline
from fallow.apps.hub.enrolling import LIFE_S
from fallow.model.errors import BrokerLost, StartFailed, WireError
from fallow.ports import Delivery
from fallow.wire import jwt, permissions, subjects
from fallow.wire.subjects import TABLE, Role, Subject

pytestmark = pytest.mark.anyio

ATTEMPT = "a1"
REFUSED = (errors.Error, OSError)


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
async def site(anyio_backend: str, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Site]:
    """One broker for all tests that ban nobody."""
    site = await Site.start(tmp_path_factory.mktemp("site"))
    yield site
    await site.broker.stop()


def now_s() -> int:
    return int(time.time())


# every subject, every role
class User(NamedTuple):
    role: Role
    name: str


USERS = [User("node", "n1"), User("node", "n2"), User("gateway", "g1"), User("gateway", "g2"), User("hub", "h"), User("guest", "e")]


class Tried(NamedTuple):
    """What came of it: the key of each user, who heard what whom say, and what was refused to whom."""

    keys: dict[str, str]
    heard: dict[tuple[str, str], set[str]]
    refused: dict[str, list[str]]


def filled(template: str, node: str, gateway: str) -> str:
    return template.replace("{node}", node).replace("{gateway}", gateway).replace("{attempt}", ATTEMPT)


def named(row: Subject, keys: dict[str, str]) -> list[tuple[str, str, str]]:
    """A row's subject for every node and gateway in its places: the subject, and their names."""
    nodes = ["n1", "n2"] if "{node}" in row.template else ["n1"]
    gateways = ["g1", "g2"] if "{gateway}" in row.template else ["g1"]
    return [(filled(row.template, keys[n], keys[g]), n, g) for n, g in itertools.product(nodes, gateways)]


def is_own(user: User, row: Subject, node: str, gateway: str) -> bool:
    """Whether the user's own place, if the row has one, holds its own id."""
    place = {"node": node, "gateway": gateway}.get(user.role, "")
    return f"{{{user.role}}}" not in row.template or place == user.name


@pytest.fixture(scope="module")
async def tried(site: Site) -> Tried:
    taps: dict[str, Tap] = {}
    keys: dict[str, str] = {}
    for user in USERS:
        login = {"hub": site.operator.hub_user, "guest": site.operator.door}.get(user.role, lambda role=user.role: site.member(role))()
        taps[user.name] = await Tap.open(site.broker.address, login.jwt, login.key)
        keys[user.name] = login.key.public
    for user in USERS:
        for row in TABLE:
            await taps[user.name].listen(row.of(user.role, keys[user.name]))
            for subject, node, gateway in named(row, keys):
                if user.role not in row.receivers or not is_own(user, row, node, gateway):
                    await taps[user.name].listen(subject)
        await taps[user.name].flush()
    for user in USERS:
        for row in TABLE:
            for subject, _, _ in named(row, keys):
                await taps[user.name].client.publish(subject, user.name.encode())
        await taps[user.name].flush()
    for tap in taps.values():
        await tap.flush()
    heard: dict[tuple[str, str], set[str]] = {}
    for listener, tap in taps.items():
        for message in tap.heard:
            heard.setdefault((message.data.decode(), message.subject), set()).add(listener)
    refused = {name: [text.lower() for text in tap.refused] for name, tap in taps.items()}
    for tap in taps.values():
        await tap.close()
    return Tried(keys, heard, refused)


@pytest.mark.parametrize("user", USERS, ids=lambda user: user.name)
@pytest.mark.parametrize("row", TABLE, ids=lambda row: row.pattern)
async def test_who_hears_whom(tried: Tried, row: Subject, user: User) -> None:
    """What a user says is heard by those whom the row names, in their own places, if the row lets the user say it; else by nobody."""
    for subject, node, gateway in named(row, tried.keys):
        may = user.role == row.sender and is_own(user, row, node, gateway)
        ears = {one.name for one in USERS if one.role in row.receivers and is_own(one, row, node, gateway)} if may else set()
        assert tried.heard.get((user.name, subject), set()) == ears
        was_refused = f'nats: permissions violation for publish to "{subject.lower()}"' in tried.refused[user.name]
        assert was_refused is not may


@pytest.mark.parametrize("user", USERS, ids=lambda user: user.name)
@pytest.mark.parametrize("row", TABLE, ids=lambda row: row.pattern)
async def test_who_may_listen(tried: Tried, row: Subject, user: User) -> None:
    own = row.of(user.role, tried.keys[user.name])
    said = f'nats: permissions violation for subscription to "{own.lower()}"'
    assert (said in tried.refused[user.name]) is (user.role not in row.receivers)
    for subject, node, gateway in named(row, tried.keys):
        if user.role in row.receivers and is_own(user, row, node, gateway):
            continue
        assert f'nats: permissions violation for subscription to "{subject.lower()}"' in tried.refused[user.name]


WIDER = [">", "*", "*.>", "n.>", "n.*.req", "rsp.>", "rsp.*.*.*", "_I.>", "_I.*.*", "_INBOX.>", "_R_.>", "$SYS.>", "$SYS.ACCOUNT.>"]
WIDER += ["$SYS.REQ.>", "$JS.>", "$JS.API.>", "hub.>"]
SPOKEN = ["$SYS.REQ.CLAIMS.UPDATE", "$SYS.REQ.SERVER.PING", "$JS.API.STREAM.NAMES", "_INBOX.x", "_I.x", "x", "hub", "hub.key.x", "prices.x"]


@pytest.mark.parametrize("role", ["node", "gateway", "guest"])
async def test_what_no_row_names_is_refused(site: Site, role: Role) -> None:
    """Each listed attack leaves one refusal, and nothing else. `_R_.x` is what the hub answers on."""
    login = site.operator.door() if role == "guest" else site.member(role)
    other = site.member("gateway")
    tap = await Tap.open(site.broker.address, login.jwt, login.key)
    listened = [
        *WIDER,
        f"_I.{other.key.public}.>",
        f"n.{other.key.public}.req",
        f"rsp.{other.key.public}.*.*",
        f"hub.node.{other.key.public}",
    ]
    for subject in listened:
        await tap.listen(subject)
    for subject in [*SPOKEN, "_R_.x", f"_I.{other.key.public}.x.y"]:
        await tap.client.publish(subject, b"x")
    await tap.flush()
    assert sum("subscription" in text for text in tap.refused) == len(listened)
    assert sum("publish" in text for text in tap.refused) == len(SPOKEN) + 2
    await tap.close()


async def test_queue_groups_open_nothing(site: Site) -> None:
    """The broker's group syntax has been a way around a refusal before."""
    login = site.member("node")
    tap = await Tap.open(site.broker.address, login.jwt, login.key)

    async def hear(message: Msg) -> None:
        raise AssertionError(message)

    for subject, group in (("n.*.req", "g"), ("rsp.>", ">"), (">", "*"), ("hub.key", "hub")):
        await tap.client.subscribe(subject, queue=group, cb=hear)
    await tap.flush()
    assert sum("permissions violation for subscription" in text for text in tap.refused) == 4
    await tap.close()


# questions across accounts
async def answering(site: Site, row: Subject) -> tuple[NatsBus, list[Delivery]]:
    bus = NatsBus(site.broker.address, site.operator.hub_user(), "hub")
    await bus.connect()
    heard: list[Delivery] = []
    tasks: list[asyncio.Task[None]] = []

    def hear(delivery: Delivery) -> None:
        heard.append(delivery)
        tasks.append(asyncio.ensure_future(bus.publish(delivery.reply, delivery.data[::-1])))

    await bus.subscribe(row.pattern, hear, group="hub")
    return bus, heard


@pytest.mark.parametrize("row", [row for row in TABLE if row.is_asked], ids=lambda row: row.pattern)
async def test_the_hub_answers_who_may_ask(site: Site, row: Subject) -> None:
    hub, heard = await answering(site, row)
    login = site.operator.door() if row.sender == "guest" else site.member(row.sender)
    asker = NatsBus(site.broker.address, login, "asker")
    await asker.connect()
    subject = row.of(row.sender, login.key.public)
    assert await asker.request(subject, b"abc", within_s=2) == b"cba"
    assert [one.subject for one in heard] == [subject]
    assert bool(heard[0].host) is (row is subjects.ENROL), "only of a guest is it told where it comes from"
    await asker.close()
    await hub.close()


async def test_nobody_there_is_told_at_once_to_who_asks(site: Site) -> None:
    login = site.member("gateway")
    asker = NatsBus(site.broker.address, login, "asker")
    await asker.connect()
    with pytest.raises(BrokerLost, match="no responders"):
        await asker.request(f"hub.key.{login.key.public}", b"", within_s=30)
    await asker.close()


async def test_a_call_to_a_node_that_is_gone_comes_back_as_unheard(site: Site) -> None:
    """Across accounts too: the gateway finds another node in a millisecond."""
    login, node, gone = site.member("gateway"), site.member("node"), site.member("node")
    gateway, lender = NatsBus(site.broker.address, login, "gateway"), NatsBus(site.broker.address, node, "node")
    await gateway.connect()
    await lender.connect()
    at_gateway: list[Delivery] = []
    at_node: list[Delivery] = []
    await gateway.subscribe(f"rsp.{login.key.public}.*.*", at_gateway.append)
    await lender.subscribe(f"n.{node.key.public}.req", at_node.append)
    reply = f"rsp.{login.key.public}.{gone.key.public}.{ATTEMPT}"
    await gateway.publish(f"n.{gone.key.public}.req", b"x", reply)
    await until(lambda: at_gateway, what="the answer that nobody is there")
    assert at_gateway == [Delivery(reply, "", b"", True)]
    await gateway.publish(f"n.{node.key.public}.req", b"x", f"rsp.{login.key.public}.{node.key.public}.{ATTEMPT}")
    await until(lambda: at_node)
    await lender.publish(at_node[0].reply, b"part")
    await until(lambda: len(at_gateway) == 2)
    assert at_gateway[1] == Delivery(f"rsp.{login.key.public}.{node.key.public}.{ATTEMPT}", "", b"part", False)
    await gateway.close()
    await lender.close()


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Nats-Request-Info": '{"host":"6.6.6.6"}'},
        {"nats-request-info": '{"host":"6.6.6.6"}'},
        {"NATS-REQUEST-INFO": "no json"},
        {"X": 'Nats-Request-Info: {"host":"6.6.6.6"}'},
    ],
)
async def test_a_guest_can_not_say_that_it_is_elsewhere(site: Site, headers: dict[str, str]) -> None:
    hub, heard = await answering(site, subjects.ENROL)
    door = site.operator.door()
    guest = await Tap.open(site.broker.address, door.jwt, door.key)
    await guest.client.request("hub.enrol", b"let me in", headers=headers or None, timeout=2)
    assert heard[0].host in (HERE, ""), "the truth, or nothing"
    if not any(key.lower() == "nats-request-info" for key in headers):
        assert heard[0].host == HERE
    await guest.close()
    await hub.close()


async def test_the_doors_jwt_is_enough(site: Site) -> None:
    """Whoever was invited has no key that the hub knows; its inbox is the door's."""
    hub, _ = await answering(site, subjects.ENROL)
    guest = NatsBus(site.broker.address, Credentials(site.operator.door().jwt, make_key("user")), "guest")
    await guest.connect()
    assert await guest.request("hub.enrol", b"abc", within_s=2) == b"cba"
    await guest.close()
    await hub.close()


# who is let in
async def test_without_a_credential_nobody_is_let_in(site: Site) -> None:
    for token in (None, "a word"):
        client = Client()
        with pytest.raises(REFUSED):
            await client.connect(servers=[site.broker.address], allow_reconnect=False, token=token)
        await client.close()


def with_claims(change: Callable[[dict[str, Any]], None]) -> Callable[[Site, Credentials], str]:
    """The credential with its claims changed, and signed anew by its own scoped key."""

    def made(site: Site, login: Credentials) -> str:
        claims = decoded(login.jwt)
        change(claims)
        signing = site.operator._signing["NODES"]
        return jwt.encode(claims, signing.public, signing.sign)

    return made


def decoded(text: str) -> dict[str, Any]:
    part = text.split(".")[1]
    claims = json.loads(base64.urlsafe_b64decode(part + "=" * (-len(part) % 4)))
    assert isinstance(claims, dict)
    return claims


def edited(site: Site, login: Credentials) -> str:
    """Claims that say more than what was signed."""
    head, _, signature = login.jwt.split(".")
    claims = {**decoded(login.jwt), "exp": now_s() + 10 * DAY_S}
    return f"{head}.{base64.urlsafe_b64encode(json.dumps(claims).encode()).rstrip(b'=').decode()}.{signature}"


def signed_by(key: KeyPair) -> Callable[[Site, Credentials], str]:
    return lambda site, login: jwt.encode(decoded(login.jwt), key.public, key.sign)


def unsigned(site: Site, login: Credentials) -> str:
    none = base64.urlsafe_b64encode(b'{"typ":"JWT","alg":"none"}').rstrip(b"=").decode()
    return f"{none}.{login.jwt.split('.')[1]}."


def widen(claims: dict[str, Any]) -> None:
    claims["nats"]["pub"] = {"allow": [">"]}


def listens_wider(claims: dict[str, Any]) -> None:
    claims["nats"]["sub"] = {"allow": [">"]}


def unlimited(claims: dict[str, Any]) -> None:
    claims["nats"].update({"subs": -1, "data": -1, "payload": -1})


def bearer(claims: dict[str, Any]) -> None:
    claims["nats"]["bearer_token"] = True


def of_another_account(site: Site, login: Credentials) -> str:
    claims = decoded(login.jwt)
    claims["nats"]["issuer_account"] = site.operator._accounts["GATEWAYS"]
    signing = site.operator._signing["NODES"]
    return jwt.encode(claims, signing.public, signing.sign)


def expire(claims: dict[str, Any]) -> None:
    claims["exp"] = now_s() - 5


@pytest.mark.parametrize(
    "forge",
    [
        with_claims(widen),
        with_claims(listens_wider),
        with_claims(unlimited),
        with_claims(bearer),
        with_claims(expire),
        with_claims(lambda claims: claims.update({"nbf": now_s() + DAY_S})),
        edited,
        unsigned,
        of_another_account,
        signed_by(make_key("account")),
        signed_by(make_key("operator")),
        signed_by(make_key("user")),
        lambda site, login: "",
        lambda site, login: login.jwt[:-4],
        lambda site, login: login.jwt.split(".")[1],
        lambda site, login: site.operator.trust({}).operator,
        lambda site, login: next(iter(site.operator.trust({}).accounts.values())),
    ],
    ids=["speaks-wider", "listens-wider", "unlimited", "bearer", "expired", "not-yet", "edited", "unsigned", "another-account",
         "by-account", "by-operator", "by-user", "empty", "cut-off", "claims-only", "operators", "an-accounts"],
)  # fmt: skip
async def test_a_forged_credential_is_refused(site: Site, forge: Callable[[Site, Credentials], str]) -> None:
    login = site.member("node")
    with pytest.raises(REFUSED):
        await Tap.open(site.broker.address, forge(site, login), login.key)
    honest = await Tap.open(site.broker.address, with_claims(lambda claims: None)(site, login), login.key)
    await honest.close()


async def test_a_stolen_credential_is_worth_nothing_without_its_key(site: Site) -> None:
    login = site.member("node")
    with pytest.raises(REFUSED):
        await Tap.open(site.broker.address, login.jwt, make_key("user"))


async def test_a_credential_of_another_operator_is_refused(site: Site, tmp_path: Path) -> None:
    key = make_key("user")
    foreign = Operator.open(tmp_path / "other").credential("node", key.public, now_s=now_s(), life_s=DAY_S)
    with pytest.raises(REFUSED):
        await Tap.open(site.broker.address, foreign, key)


@pytest.mark.parametrize("off_s", [-600, 600])
async def test_a_clock_that_is_off_by_ten_minutes_keeps_nobody_out(site: Site, off_s: int) -> None:
    login = site.member("node", now_s=now_s() + off_s)
    tap = await Tap.open(site.broker.address, login.jwt, login.key)
    await tap.close()


async def test_a_connection_ends_with_its_credential_and_comes_back_with_the_next(site: Site) -> None:
    login = site.member("node", life_s=2)
    bus = NatsBus(site.broker.address, login, "node")
    lost: list[bool] = []
    bus.on_lost(lambda: lost.append(True))
    await bus.connect()
    heard: list[Delivery] = []
    await bus.subscribe("prices", heard.append)
    await until(lambda: lost, what="the end of the credential")
    assert not bus.is_up()
    await bus.renew(site.member("node", login.key))
    await until(bus.is_up, what="the connection with the new one")
    hub = NatsBus(site.broker.address, site.operator.hub_user(), "hub")
    await hub.connect()
    await hub.publish("prices", b"x")
    await until(lambda: heard)
    assert lost == [True]
    await hub.close()
    await bus.close()


# limits
async def test_too_much_at_once_ends_that_connection_only(site: Site) -> None:
    one, two = site.member("node"), site.member("node")
    greedy = await Tap.open(site.broker.address, one.jwt, one.key)
    other = await Tap.open(site.broker.address, two.jwt, two.key)
    greedy.client._max_payload = 10**9  # the client would refuse it by itself
    await greedy.client.publish(f"hb.{one.key.public}", bytes(300_000))
    await until(lambda: greedy.client.is_closed, what="the end of the connection")
    await other.client.publish(f"hb.{two.key.public}", bytes(200_000))
    await other.flush()
    assert other.refused == []
    await other.close()


async def test_a_guest_may_say_little(site: Site) -> None:
    door = site.operator.door()
    guest, other = [await Tap.open(site.broker.address, door.jwt, door.key) for _ in range(2)]
    await guest.client.publish("hub.enrol", bytes(permissions.GUEST_PAYLOAD_BYTES_MAX + 1))
    await until(lambda: guest.client.is_closed, what="the end of the connection")
    await other.client.publish("hub.enrol", bytes(permissions.GUEST_PAYLOAD_BYTES_MAX))
    await other.flush()
    assert not other.client.is_closed
    await other.close()


@pytest.mark.parametrize(("role", "limit"), [("node", permissions.NODE_SUBSCRIPTIONS_MAX), ("guest", permissions.GUEST_SUBSCRIPTIONS_MAX)])
async def test_subscriptions_are_limited(site: Site, role: Role, limit: int) -> None:
    login = site.operator.door() if role == "guest" else site.member(role)
    tap = await Tap.open(site.broker.address, login.jwt, login.key)
    for number in range(limit):
        await tap.listen(f"_I.{login.key.public}.{number}")
    await tap.flush()
    assert not tap.client.is_closed
    await tap.listen(f"_I.{login.key.public}.more")
    await until(lambda: tap.client.is_closed, what="the refusal")


# bans
async def test_a_ban_puts_out_and_keeps_out(tmp_path: Path) -> None:
    site = await Site.start(tmp_path)
    system = NatsBus(site.broker.address, site.operator.system_user(), "system")
    await system.connect()
    bad, good, gateway = site.member("node"), site.member("node"), site.member("gateway")
    taps = [await Tap.open(site.broker.address, one.jwt, one.key) for one in (bad, good, gateway)]
    try:
        await push_accounts(system, site.operator.trust({bad.key.public: now_s()}).accounts.values())
        await until(lambda: taps[0].client.is_closed, what="the ban")
        assert not taps[1].client.is_closed
        assert not taps[2].client.is_closed
        with pytest.raises(REFUSED):
            await Tap.open(site.broker.address, bad.jwt, bad.key)
        later = site.member("node", bad.key, now_s=now_s() + 600)
        with pytest.raises(REFUSED):
            await Tap.open(site.broker.address, later.jwt, later.key)  # made before the ban by a clock that is ahead
        await site.broker.stop()
        trust = Operator.open(tmp_path / "operator").trust({bad.key.public: now_s()})
        again = await start_broker(tmp_path / "broker", host=HERE, port=0, trust=trust)
        with pytest.raises(REFUSED):
            await Tap.open(again.address, bad.jwt, bad.key)
        await (await Tap.open(again.address, good.jwt, good.key)).close()
        await again.stop()
    finally:
        await system.close()
        for tap in taps:
            await tap.close()
        await site.broker.stop()


async def test_who_is_taken_back_is_let_in(tmp_path: Path) -> None:
    """Two changes within a second: the later one counts, whatever the clock says."""
    site = await Site.start(tmp_path)
    system = NatsBus(site.broker.address, site.operator.system_user(), "system")
    await system.connect()
    login = site.member("node")
    try:
        for _ in range(2):
            await push_accounts(system, site.operator.trust({login.key.public: now_s()}).accounts.values())
            with pytest.raises(REFUSED):
                await Tap.open(site.broker.address, login.jwt, login.key)
            await push_accounts(system, site.operator.trust({}).accounts.values())
            await (await Tap.open(site.broker.address, login.jwt, login.key)).close()
    finally:
        await system.close()
        await site.broker.stop()


async def test_only_the_system_user_changes_accounts(site: Site) -> None:
    for login in (site.operator.hub_user(), site.member("gateway")):
        bus = NatsBus(site.broker.address, login, "not system")
        await bus.connect()
        with pytest.raises(BrokerLost):
            await push_accounts_quickly(bus, site)
        await bus.close()


async def push_accounts_quickly(bus: NatsBus, site: Site) -> None:
    await bus.request(permissions.CLAIMS_UPDATE, next(iter(site.operator.trust({}).accounts.values())).encode(), within_s=0.2)


async def test_an_account_of_another_operator_lets_nobody_in(site: Site, tmp_path: Path) -> None:
    """The broker keeps what the system user sends, and believes only what its own operator signed."""
    other = Operator.open(tmp_path / "other")
    system = NatsBus(site.broker.address, site.operator.system_user(), "system")
    await system.connect()
    await push_accounts(system, other.trust({}).accounts.values())
    key = make_key("user")
    with pytest.raises(REFUSED):
        await Tap.open(site.broker.address, other.credential("node", key.public, now_s=now_s(), life_s=DAY_S), key)
    await system.close()


@pytest.mark.parametrize("text", ["", "nonsense", "a.b.c"])
async def test_what_is_no_account_is_not_taken(site: Site, text: str) -> None:
    system = NatsBus(site.broker.address, site.operator.system_user(), "system")
    await system.connect()
    with pytest.raises(StartFailed, match="didn't take"):
        await push_accounts(system, [text])
    await system.close()


# keys in their folder
def test_everything_is_kept_and_private(tmp_path: Path) -> None:
    first = Operator.open(tmp_path / "o")
    seen = (first.trust({}), first.door().jwt, first.hub_user().key.public, first.system_user().key.public)
    second = Operator.open(tmp_path / "o")
    assert (second.trust({}), second.door().jwt, second.hub_user().key.public, second.system_user().key.public) == seen
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "o").iterdir()} == {0o600}
    assert first.hub_user().key.seed not in repr(first.hub_user())
    assert len({path.read_text() for path in (tmp_path / "o").glob("*.seed")}) == 14


def test_a_beginning_that_was_cut_off_is_gone_on_with(tmp_path: Path) -> None:
    before = Operator.open(tmp_path)
    public = before.hub_user().key.public
    (tmp_path / "operator.jwt").unlink()
    (tmp_path / "signing-NODES.seed").unlink()
    after = Operator.open(tmp_path)
    assert after.hub_user().key.public == public
    assert after.trust({}).system_account == before.trust({}).system_account


def take_offline(folder: Path) -> None:
    (folder / "operator.seed").unlink()
    for path in folder.glob("account-*.seed"):
        path.unlink()


async def test_members_come_in_while_the_operators_keys_are_elsewhere(tmp_path: Path) -> None:
    trusted = Operator.open(tmp_path / "operator").trust({})
    take_offline(tmp_path / "operator")
    operator = Operator.open(tmp_path / "operator")
    assert operator.trust({}) == trusted
    broker = await start_broker(tmp_path / "broker", host=HERE, port=0, trust=operator.trust({}))
    try:
        site = Site(operator, broker)
        for login in (site.member("node"), operator.hub_user(), operator.door(), operator.system_user()):
            await (await Tap.open(broker.address, login.jwt, login.key)).close()
    finally:
        await broker.stop()


def revoked_in(trust: BrokerTrust, operator: Operator, name: str = "NODES") -> dict[str, int]:
    """Whom an account puts out."""
    return dict(jwt.claims_of(trust.accounts[operator._accounts[name]]).nats.get("revocations", {}))  # type: ignore[index]


def test_bans_and_their_ends_wait_for_the_operators_key(tmp_path: Path) -> None:
    """Until then what was signed last is what the broker is told."""
    operator, now = Operator.open(tmp_path), 10**9
    out, stays = make_key("user").public, make_key("user").public
    trusted = operator.trust({out: now, stays: now}, now_s=now)
    kept = tmp_path / "kept"
    kept.mkdir()
    assert not is_offline(tmp_path)
    (tmp_path / "operator.seed").rename(kept / "operator.seed")
    for path in tmp_path.glob("account-*.seed"):
        path.rename(kept / path.name)
    operator = Operator.open(tmp_path)
    assert is_offline(tmp_path)
    banned = make_key("user").public
    waiting = operator.trust({banned: now + 1, stays: now}, now_s=now + 2)
    assert waiting.accounts == trusted.accounts
    assert waiting.unsigned == {banned, out}
    assert operator.trust({banned: now + 1, stays: now}, now_s=now + 2) == waiting
    assert operator.trust({out: now, stays: now + 5}, now_s=now + 6).unsigned == {stays}, "out, let in, and out again"

    (kept / "operator.seed").rename(tmp_path / "operator.seed")
    after = operator.trust({banned: now + 1, stays: now}, now_s=now + 3)
    assert after.unsigned == frozenset()
    assert revoked_in(after, operator).keys() == {banned, stays}


@pytest.mark.parametrize("change", ["version", "gone", "damaged"])
def test_another_change_can_not_wait_for_the_operators_key(tmp_path: Path, change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    operator = Operator.open(tmp_path)
    banned = make_key("user").public
    operator.trust({banned: now_s()})
    (tmp_path / "operator.seed").unlink()
    path = tmp_path / "account-NODES.jwt"
    match change:
        case "version":
            nodes = msgspec.structs.replace(permissions.LIMITS["NODES"], subscriptions_max=1)
            monkeypatch.setattr("fallow.adapters.operator.LIMITS", {**permissions.LIMITS, "NODES": nodes})
        case "gone":
            path.unlink()
        case _:
            claims = decoded(path.read_text())
            claims["nats"]["revocations"] = ["everybody"]
            path.write_text(jwt.encode(claims, make_key("operator").public, make_key("operator").sign))
    with pytest.raises(StartFailed, match=r"account NODES must be signed anew .* bring the operator's key back") as caught:
        operator.trust({banned: now_s()})
    assert str(tmp_path / "operator.seed") in caught.value.message
    assert "\n" not in caught.value.message


def test_a_ban_is_forgotten_once_all_that_it_puts_out_has_run_out(tmp_path: Path) -> None:
    """A credential of the last moment, by a hub whose clock ran a day ahead, and a broker whose clock is ten minutes late."""
    operator, at_s = Operator.open(tmp_path), 10**9
    old, new = make_key("user").public, make_key("user").public
    assert REVOKED_KEPT_S >= REVOKED_AHEAD_S + LIFE_S + 2 * 600
    last_s = at_s + REVOKED_KEPT_S - 1
    first = operator.trust({old: at_s, new: last_s}, now_s=last_s)
    assert revoked_in(first, operator) == {old: at_s + REVOKED_AHEAD_S, new: last_s + REVOKED_AHEAD_S}
    (tmp_path / "operator.seed").rename(tmp_path / "elsewhere")
    later = operator.trust({old: at_s, new: last_s}, now_s=last_s + 1)
    assert (later.accounts, later.unsigned) == (first.accounts, frozenset()), "nothing is missing: one too many does no harm"
    assert operator.trust({new: last_s}, now_s=last_s + 1).unsigned == frozenset(), "taken back: what is new is let in already"
    (tmp_path / "elsewhere").rename(tmp_path / "operator.seed")
    pruned = operator.trust({old: at_s, new: last_s}, now_s=last_s + 1)
    assert revoked_in(pruned, operator) == revoked_in(pruned, operator, "GATEWAYS") == {new: last_s + REVOKED_AHEAD_S}
    back = operator.trust({old: at_s, new: last_s}, now_s=last_s - 600)
    assert old in revoked_in(back, operator), "the clock was set back"


@pytest.mark.parametrize("gone", ["signing-NODES.seed", "account-NODES.*"])
def test_what_is_missing_is_named(tmp_path: Path, gone: str) -> None:
    Operator.open(tmp_path).trust({})
    for path in tmp_path.glob(gone):
        path.unlink()
    with pytest.raises(StartFailed, match=gone.split(".")[0]):
        Operator.open(tmp_path)


def test_a_credential_is_for_a_users_key_only(tmp_path: Path) -> None:
    operator = Operator.open(tmp_path)
    for public in ("", "U", make_key("account").public, make_key("user").public[:-1] + "!", make_key("user").public.lower()):
        with pytest.raises(WireError):
            operator.credential("node", public, now_s=0, life_s=1)


def test_the_newest_bans_are_told_and_only_where_the_banned_are(tmp_path: Path) -> None:
    operator = Operator.open(tmp_path)
    banned = {f"U{number:055d}": number for number in range(REVOKED_MAX + 10)}
    trust = operator.trust(banned, now_s=REVOKED_MAX)
    for public, text in trust.accounts.items():
        revoked = jwt.claims_of(text).nats.get("revocations", {})
        where = {operator._accounts[name] for name in ("NODES", "GATEWAYS")}
        expected = {key: at_s + REVOKED_AHEAD_S for key, at_s in banned.items() if at_s >= 10}
        assert revoked == (expected if public in where else {})
        assert len(text) < jwt.JWT_BYTES_MAX
