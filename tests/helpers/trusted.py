"""A broker that trusts an operator, its users, and plain connections for those who want to reach further than they may."""

import asyncio
import base64
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
from nats.aio.client import Client
from nats.aio.msg import Msg

from fallow.adapters.broker import Broker, start_broker
from fallow.adapters.nkey import Credentials, KeyPair, kept_key, make_key
from fallow.adapters.operator import BrokerTrust, Operator
from fallow.wire import jwt
from fallow.wire.subjects import Role

HERE = "127.0.0.1"
DAY_S = 86_400
WITHIN_S = 20.0
POLL_S = 0.002


async def until(said: Callable[[], Any], *, what: str = "it") -> None:
    """Poll until `said()` is true; the bound is only there so that a broken build ends."""
    deadline = time.monotonic() + WITHIN_S
    while not said():
        assert time.monotonic() < deadline, f"{what} did not happen within {WITHIN_S:g} s"
        await asyncio.sleep(POLL_S)


class Site:
    """An operator and its broker."""

    def __init__(self, operator: Operator, broker: Broker) -> None:
        self.operator = operator
        self.broker = broker

    @classmethod
    async def start(cls, folder: Path, **options: Any) -> "Site":
        operator = Operator.open(folder / "operator")
        return cls(operator, await start_broker(folder / "broker", host=HERE, port=0, trust=operator.trust({}), **options))

    def member(self, role: Role, key: KeyPair | None = None, *, now_s: int | None = None, life_s: int = DAY_S) -> Credentials:
        """A member with a new key, or the next credential of one that has one."""
        key = key or make_key("user")
        issued_s = int(time.time()) if now_s is None else now_s
        return Credentials(self.operator.credential(role, key.public, now_s=issued_s, life_s=life_s), key)


class OpenGround:
    """A broker's trust with one account, whose members may say and hear everything: for what holds whatever the subject is."""

    def __init__(self) -> None:
        operator, system, self._account, self._signing = (make_key(kind) for kind in ("operator", "account", "account", "account"))
        now_s = int(time.time())
        free = jwt.scope(
            self._signing.public,
            role="anyone",
            publish=[">"],
            subscribe=[">"],
            subscriptions_max=-1,
            payload_bytes_max=-1,
            bearer=False,
        )

        def account(key: KeyPair, scopes: list[dict[str, Any]]) -> str:
            body = jwt.account_body(exports=[], imports=[], connections_max=-1, scopes=scopes, bearer=False, revoked={})
            claims = jwt.account_claims(key.public, name="account", body=body, issued_at_s=now_s)
            return jwt.encode(claims, operator.public, operator.sign)

        said = jwt.operator_claims(operator.public, name="test", system_account=system.public, issued_at_s=now_s)
        self.trust = BrokerTrust(
            operator=jwt.encode(said, operator.public, operator.sign),
            system_account=system.public,
            accounts={system.public: account(system, []), self._account.public: account(self._account, [free])},
        )

    def member(self) -> Credentials:
        """Somebody new."""
        key, issued_s = make_key("user"), int(time.time())
        claims = jwt.user_claims(key.public, name="anyone", account=self._account.public, issued_at_s=issued_s, expires_at_s=None)
        return Credentials(jwt.encode(claims, self._signing.public, self._signing.sign), key)


class Tap:
    """A plain connection of nats-py, which keeps what it hears and what the broker refuses."""

    def __init__(self) -> None:
        self.client = Client()
        self.heard: list[Msg] = []
        self.refused: list[str] = []

    @classmethod
    async def open(cls, address: str, login: str, key: KeyPair, inbox: str = "") -> "Tap":
        """Raises what nats-py raises if the broker doesn't let it in."""
        tap = cls()

        async def on_error(error: Exception) -> None:
            tap.refused.append(str(error))

        try:
            await tap.client.connect(
                servers=[address],
                user_jwt_cb=login.encode,
                signature_cb=lambda nonce: base64.b64encode(key.sign(nonce.encode())),
                inbox_prefix=f"_I.{inbox or key.public}",
                error_cb=on_error,
                allow_reconnect=False,
            )
        except BaseException:
            await tap.client.close()
            raise
        return tap

    async def listen(self, subject: str) -> None:
        async def hear(message: Msg) -> None:
            self.heard.append(message)

        await self.client.subscribe(subject, cb=hear)

    async def flush(self) -> None:
        """Until the broker has taken all that was said, and refused what it refuses."""
        await self.client.flush()
        await self.client.flush()

    async def close(self) -> None:
        await self.client.close()


async def connections(address: str, keys: Path) -> dict[str, set[int]]:
    """The broker's own numbers of the connections that each name has: one that breaks comes back under another.

    It is the broker that is asked, since only root may see what another process has open. `keys` is the operator's folder: the hub's own
    login may not ask this.
    """
    system, me = kept_key(keys / "account-SYSTEM.seed", "account"), make_key("user")
    unbound = {"type": "user", "version": 2, "pub": {}, "sub": {}, "subs": -1, "data": -1, "payload": -1}
    claims = {"sub": me.public, "name": "watcher", "iat": int(time.time()), "nats": unbound}
    tap = await Tap.open(address, jwt.encode(claims, system.public, system.sign), me)
    try:
        answer = await tap.client.request("$SYS.REQ.SERVER.PING.CONNZ", b"{}", timeout=WITHIN_S)
    finally:
        await tap.close()
    found: defaultdict[str, set[int]] = defaultdict(set)
    for one in msgspec.json.decode(answer.data)["data"]["connections"]:
        found[one.get("name", "")].add(one["cid"])
    return found
