"""The hub's side of the broker's trust: its operator, the accounts, and the keys that sign who may come in.

The operator's key signs accounts and is needed when they change: at the start, after an update of Fallow, for a ban. The accounts' own
keys sign nothing after the start. Both may be taken away from the machine; the signing keys alone let members in. A ban that is made
meanwhile waits for the operator's key.
"""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from fallow.adapters.files import make_folder, write_private
from fallow.adapters.nkey import Credentials, KeyPair, kept_key
from fallow.model.errors import StartFailed, WireError
from fallow.model.ids import OrgId
from fallow.wire import jwt, nkey_text, permissions, sign
from fallow.wire.permissions import ACCOUNT_OF, LIMITS, Account
from fallow.wire.subjects import Role

REVOKED_MAX = 2_000
"""Bans that the broker knows of: the newest. About 70 bytes each, in an account's JWT that must fit into one message."""
REVOKED_AHEAD_S = 86_400
"""A ban also ends credentials that a clock which ran ahead dated up to a day after it. Who is taken back in is off the list."""
LIFE_S_MAX = 86_400
"""No credential of a member is made for longer."""
CLOCKS_S = 1_200
"""Two clocks that are ten minutes off, one each way: the one by which a ban was dated, and the one by which it is forgotten."""
REVOKED_KEPT_S = REVOKED_AHEAD_S + LIFE_S_MAX + CLOCKS_S
"""How long the broker knows of a ban: all that it puts out has run out by then. The banned get nothing new: the registry remembers."""
NAME = "fallow"
_BANNED_FROM: tuple[Account, ...] = ("NODES", "GATEWAYS")
_ROLE_NAMES: Mapping[Account, str] = {**{account: role for role, account in ACCOUNT_OF.items()}, "SYSTEM": "system"}


class BrokerTrust(msgspec.Struct, frozen=True, kw_only=True):
    """Whom a broker trusts. `accounts` are JWTs by the account's public key; `system_account` is one of those keys.

    `unsigned` are banned users whom the accounts let in, and users taken back whom they don't: the operator's key isn't here to sign it.
    """

    operator: str
    system_account: str
    accounts: Mapping[str, str]
    unsigned: frozenset[str] = frozenset()


class Operator:
    """The keys of one hub's folder. Its text shows none of them. `key_file` is where the operator's own lies while it is here."""

    def __init__(self, folder: Path, operator: str, accounts: Mapping[Account, str], signing: Mapping[Account, KeyPair]) -> None:
        self.key_file = _key_file(folder)
        self._folder = folder
        self._operator = operator
        self._accounts = accounts
        self._signing = signing

    @classmethod
    def open(cls, folder: Path) -> "Operator":
        """What the folder keeps, made on first use. Raises StartFailed or BadSetting, which name the file that is missing or wrong."""
        folder = make_folder(folder)
        if not (folder / "operator.jwt").exists():
            _begin(folder)
        accounts: dict[Account, str] = {}
        signing: dict[Account, KeyPair] = {}
        for name in LIMITS:
            accounts[name] = _account_public(folder, name)
            path = _signing_path(folder, name)
            if not path.exists():
                raise StartFailed(f"{path} is missing: without it nobody can be let in; bring it back from your copy")
            signing[name] = kept_key(path, "account")
        return cls(folder, _read(folder / "operator.jwt"), accounts, signing)

    def trust(self, revoked: Mapping[str, int], *, now_s: int | None = None) -> BrokerTrust:
        """What the broker is to know; `revoked` are banned users' public keys and when they were banned (UTC seconds).

        An account's JWT is kept as long as it says what it should; a new one is always dated later than the one before, since the
        broker drops older ones. While the operator's key isn't here, the kept ones stay, if only bans came or went. Raises StartFailed
        if anything else must change then. `now_s` is UTC, by this machine's clock if None.
        """
        now_s = int(time.time()) if now_s is None else now_s
        live = {public: at_s for public, at_s in revoked.items() if at_s > now_s - REVOKED_KEPT_S}
        newest = sorted(live.items(), key=lambda one: (-one[1], one[0]))[:REVOKED_MAX]
        banned = {public: at_s + REVOKED_AHEAD_S for public, at_s in newest}
        accounts: dict[str, str] = {}
        unsigned: set[str] = set()
        for name in LIMITS:
            wanted = banned if name in _BANNED_FROM else {}
            accounts[self._accounts[name]], said = self._account(name, wanted, now_s)
            unsigned |= {public for public, until_s in wanted.items() if said.get(public) != until_s}
            unsigned |= {public for public, until_s in said.items() if public not in revoked and until_s > now_s - CLOCKS_S}
        return BrokerTrust(
            operator=self._operator, system_account=self._accounts["SYSTEM"], accounts=accounts, unsigned=frozenset(unsigned)
        )

    def _account(self, name: Account, revoked: Mapping[str, int], now_s: int) -> tuple[str, Mapping[str, int]]:
        """The kept JWT of an account, or a new one if that says something else than it should; and whom it revokes."""
        body = self._body(name, revoked)
        path = self._folder / f"account-{name}.jwt"
        kept = _claims(path)
        if kept is not None and kept.nats == body and kept.sub == self._accounts[name]:
            return _read(path), revoked
        if not self.key_file.exists():
            if kept is not None and kept.sub == self._accounts[name]:
                said = _revoked(kept)
                if kept.nats == self._body(name, said):
                    return _read(path), said
            raise StartFailed(
                f"account {name} must be signed anew (its JWT is gone, or of another version of Fallow), "
                f"and {self.key_file} isn't here to sign that; bring the operator's key back for it"
            )
        operator = kept_key(self.key_file, "operator")
        issued_at_s = max(now_s, 0 if kept is None else kept.iat + 1)
        claims = jwt.account_claims(self._accounts[name], name=name, body=body, issued_at_s=issued_at_s)
        text = jwt.encode(claims, operator.public, operator.sign)
        write_private(path, text + "\n")
        return text, revoked

    def _body(self, name: Account, revoked: Mapping[str, int]) -> dict[str, Any]:
        links = permissions.links()[name]
        makers = {"stream": jwt.stream_export, "service": jwt.service_export}
        return jwt.account_body(
            exports=[makers[one.kind](one.subject) for one in links.exports],
            imports=[
                jwt.imported(one.subject, kind=one.kind, account=self._accounts[one.account], share=one.share) for one in links.imports
            ],
            connections_max=LIMITS[name].connections_max,
            scopes=[self._scope(name)],
            bearer=LIMITS[name].is_bearer,
            revoked=revoked,
        )

    def _scope(self, name: Account) -> dict[str, Any]:
        roles: list[Role] = [role for role, account in ACCOUNT_OF.items() if account == name]
        may = permissions.allowed(roles[0]) if roles else permissions.SYSTEM_PERMISSIONS
        return jwt.scope(
            self._signing[name].public,
            role=_ROLE_NAMES[name],
            publish=may.publish,
            subscribe=may.subscribe,
            subscriptions_max=LIMITS[name].subscriptions_max,
            payload_bytes_max=LIMITS[name].payload_bytes_max,
            bearer=LIMITS[name].is_bearer,
        )

    def credential(self, role: Role, public_key: str, *, now_s: int, life_s: int) -> str:
        """A user's JWT from `now_s` (UTC) on for `life_s`. It carries no permissions of its own. Raises WireError for a bad key."""
        return self._user(ACCOUNT_OF[role], public_key, issued_at_s=now_s, expires_at_s=now_s + life_s)

    def _user(self, name: Account, public_key: str, *, issued_at_s: int, expires_at_s: int | None) -> str:
        nkey_text.raw_public(public_key, "U")
        signing = self._signing[name]
        claims = jwt.user_claims(
            public_key, name=_ROLE_NAMES[name], account=self._accounts[name], issued_at_s=issued_at_s, expires_at_s=expires_at_s
        )
        return jwt.encode(claims, signing.public, signing.sign)

    @property
    def authority(self) -> str:
        """The public key that vouches for members."""
        return self._signing["NODES"].public

    @property
    def issuers(self) -> frozenset[str]:
        """The public keys that sign users' credentials."""
        return frozenset(key.public for key in self._signing.values())

    def vouch(self, public_key: str, org_id: OrgId, until_s: int) -> bytes:
        """That a member belongs to an organisation until then (UTC seconds)."""
        return self._signing["NODES"].sign(sign.member_bytes(public_key, org_id, until_s))

    def hub_user(self) -> Credentials:
        """The hub's own login. It doesn't expire: the hub holds the key that would renew it."""
        return self._kept_user("HUB", "hub.seed")

    def system_user(self) -> Credentials:
        """The login with which the hub changes accounts while the broker runs."""
        return self._kept_user("SYSTEM", "system.seed")

    def _kept_user(self, name: Account, file: str) -> Credentials:
        key = kept_key(self._folder / file, "user")
        return Credentials(self._user(name, key.public, issued_at_s=int(time.time()), expires_at_s=None), key)

    def door(self) -> Credentials:
        """The login that all guests share, which may only ask to be let in. The same after a restart, and without an end.

        Its JWT alone is enough to use it (`bearer_token`), so that is what an invitation carries.
        """
        key = kept_key(self._folder / "door.seed", "user")
        path = self._folder / "door.jwt"
        kept = _claims(path)
        if kept is not None and (kept.sub, kept.iss) == (key.public, self._signing["GUESTS"].public):
            return Credentials(_read(path), key)
        text = self._user("GUESTS", key.public, issued_at_s=int(time.time()), expires_at_s=None)
        write_private(path, text + "\n")
        return Credentials(text, key)


def is_offline(folder: Path) -> bool:
    """Whether the operator of this folder keeps its key elsewhere, so that bans wait for it."""
    return (folder / "operator.jwt").exists() and not _key_file(folder).exists()


def _key_file(folder: Path) -> Path:
    return folder / "operator.seed"


def _revoked(kept: jwt.Claims) -> dict[str, int]:
    """Whom a kept account revokes. It is our own word, but files get damaged."""
    try:
        return msgspec.convert(kept.nats.get("revocations", {}), dict[str, int])
    except msgspec.ValidationError:
        return {}


def _begin(folder: Path) -> None:
    """All keys, and last the operator's JWT, so that a beginning that was cut off is gone on with."""
    operator = kept_key(_key_file(folder), "operator")
    for name in LIMITS:
        kept_key(folder / f"account-{name}.seed", "account")
        kept_key(_signing_path(folder, name), "account")
    system = kept_key(folder / "account-SYSTEM.seed", "account").public
    claims = jwt.operator_claims(operator.public, name=NAME, system_account=system, issued_at_s=int(time.time()))
    write_private(folder / "operator.jwt", jwt.encode(claims, operator.public, operator.sign) + "\n")


def _account_public(folder: Path, name: Account) -> str:
    """An account's public key: by its own key, or by its JWT where that key is kept elsewhere."""
    path = folder / f"account-{name}.seed"
    if path.exists():
        return kept_key(path, "account").public
    kept = _claims(folder / f"account-{name}.jwt")
    if kept is None:
        raise StartFailed(f"neither {path} nor the account's JWT beside it is there; bring one of them back from your copy")
    return kept.sub


def _signing_path(folder: Path, name: Account) -> Path:
    return folder / f"signing-{name}.seed"


def _claims(path: Path) -> jwt.Claims | None:
    """What a kept JWT says; None if there is none."""
    if not path.exists():
        return None
    try:
        return jwt.claims_of(_read(path))
    except WireError as error:
        raise StartFailed(f"{path}: {error.message}") from None


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace").strip()
    except OSError as error:
        raise StartFailed(f"could not read {path}: {error.strerror}") from None
