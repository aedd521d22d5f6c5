"""The broker's credentials: NATS JWTs, version 2, signed with Ed25519 by an operator or an account.

Their fields are those of the `github.com/nats-io/jwt/v2` library. A user's JWT that a scoped key signs carries no permissions and no
limits of its own: the account's JWT holds them, once for all users of that key.
"""

import base64
import binascii
import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec

from fallow.model.errors import WireError
from fallow.model.messages import CREDENTIAL_MAX

JWT_BYTES_MAX = 256 * 1024
"""What the broker takes as one message: an account with many bans is the largest."""
_HEADER = {"typ": "JWT", "alg": "ed25519-nkey"}
_NO_LIMIT = -1


class Claims(msgspec.Struct, frozen=True):
    """What we read of a JWT of our own. `nats` differs by kind."""

    sub: str
    iss: str
    iat: int
    nats: dict[str, Any]
    exp: int | None = None


def operator_claims(public: str, *, name: str, system_account: str, issued_at_s: int) -> dict[str, Any]:
    """An operator, who signs accounts. `system_account` may change them while the broker runs."""
    body = {"type": "operator", "version": 2, "system_account": system_account}
    return {"sub": public, "name": name, "iat": issued_at_s, "nats": body}


def account_claims(public: str, *, name: str, body: Mapping[str, Any], issued_at_s: int) -> dict[str, Any]:
    """An account; `body` comes from `account_body`."""
    return {"sub": public, "name": name, "iat": issued_at_s, "nats": dict(body)}


def account_body(
    *,
    exports: Sequence[Mapping[str, Any]],
    imports: Sequence[Mapping[str, Any]],
    connections_max: int,
    scopes: Sequence[Mapping[str, Any]],
    bearer: bool,
    revoked: Mapping[str, int],
) -> dict[str, Any]:
    """What an account may: what it exchanges with others, how many connections it holds, and which keys sign its users.

    Users in `revoked` can't use a JWT that was issued at or before the second (UTC) given. `bearer`: its users need not sign.
    """
    limits = {
        "subs": _NO_LIMIT,
        "data": _NO_LIMIT,
        "payload": _NO_LIMIT,
        "imports": _NO_LIMIT,
        "exports": _NO_LIMIT,
        "wildcards": True,
        "conn": connections_max,
        "leaf": 0,
        "disallow_bearer": not bearer,
    }
    body: dict[str, Any] = {
        "type": "account",
        "version": 2,
        "exports": [dict(one) for one in exports],
        "imports": [dict(one) for one in imports],
        "limits": limits,
        "signing_keys": [dict(one) for one in scopes],
        "default_permissions": {"pub": {}, "sub": {}},
    }
    return {**body, "revocations": dict(sorted(revoked.items()))} if revoked else body


def stream_export(subject: str) -> dict[str, Any]:
    """Others may hear what is said here."""
    return {"name": subject, "subject": subject, "type": "stream"}


def service_export(subject: str) -> dict[str, Any]:
    """Others may ask here, and get one answer."""
    return {"name": subject, "subject": subject, "type": "service", "response_type": "Singleton"}


def imported(subject: str, *, kind: str, account: str, share: bool = False) -> dict[str, Any]:
    """What is heard or asked of another account (its public key). `share`: who answers is told who asked, and from which host."""
    entry = {"name": subject, "subject": subject, "account": account, "type": kind}
    return {**entry, "share": True} if share else entry


def scope(
    key: str,
    *,
    role: str,
    publish: Sequence[str],
    subscribe: Sequence[str],
    subscriptions_max: int,
    payload_bytes_max: int,
    bearer: bool,
) -> dict[str, Any]:
    """A signing key of an account whose users all may exactly this. `{{subject()}}` stands for the user's own public key."""
    template: dict[str, Any] = {
        "pub": {"allow": list(publish)},
        "sub": {"allow": list(subscribe)},
        "subs": subscriptions_max,
        "data": _NO_LIMIT,
        "payload": payload_bytes_max,
        "allowed_connection_types": ["STANDARD", "WEBSOCKET"],
    }
    if bearer:
        template["bearer_token"] = True
    return {"kind": "user_scope", "key": key, "role": role, "template": template}


def user_claims(public: str, *, name: str, account: str, issued_at_s: int, expires_at_s: int | None) -> dict[str, Any]:
    """A user under a scoped key of `account` (its public key)."""
    claims = {"sub": public, "name": name, "iat": issued_at_s, "nats": {"issuer_account": account, "type": "user", "version": 2}}
    return claims if expires_at_s is None else {**claims, "exp": expires_at_s}


def encode(claims: Mapping[str, Any], issuer_public: str, sign: Callable[[bytes], bytes]) -> str:
    """The JWT of these claims, signed. Its id (`jti`) is a digest of all else, so equal claims make equal JWTs."""
    named = {**claims, "iss": issuer_public}
    digest = hashlib.sha256(msgspec.json.encode(named, order="deterministic")).digest()
    named["jti"] = base64.b32encode(digest).decode().rstrip("=")
    said = f"{_text(msgspec.json.encode(_HEADER))}.{_text(msgspec.json.encode(named))}"
    return f"{said}.{_text(sign(said.encode()))}"


def claims_of(jwt: str) -> Claims:
    """What a JWT of our own says. Its signature is not checked; raises WireError if it can't be read."""
    parts = jwt.split(".")
    if len(jwt) > JWT_BYTES_MAX or len(parts) != 3 or not jwt.isascii():
        raise WireError("not a credential of the broker: three parts with dots between are expected")
    try:
        return msgspec.json.decode(base64.urlsafe_b64decode(parts[1] + "=" * (-len(parts[1]) % 4)), type=Claims)
    except (binascii.Error, msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise WireError("not a credential of the broker: its claims can't be read") from None


def expiry_of(jwt: str) -> int | None:
    """When our own credential ends, in UTC seconds; None if it doesn't. Its signature is not checked; raises WireError."""
    if len(jwt) > CREDENTIAL_MAX:
        raise WireError(f"not a credential of the broker: it is longer than {CREDENTIAL_MAX} bytes")
    return claims_of(jwt).exp


def _text(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()
