"""`fallow keys`: API keys, made, shown, limited, replaced and ended."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from fallow.apps.hub import key_limits, registrar
from fallow.apps.hub.key_limits import UNLIMITED, limited, limits_of, wishes_of
from fallow.cli.registry_desk import Desk, at_desk, listed, local, print_json, print_table, say, span_ms, utc
from fallow.core.needs import MICRO
from fallow.model.errors import BadFlag
from fallow.model.identity import ApiKey, KeyRole
from fallow.model.ids import KeyId

LISTS = ("rings", "partners", "regions", "countries", "models")
ROLES: tuple[KeyRole, ...] = ("caller", "lender", "operator")


def create(data: Path | None, *, name: str, org: str, role: str, said: Mapping[str, Any], as_json: bool) -> int:
    """`fallow keys create`."""

    def act(desk: Desk) -> None:
        limits = _changed(UNLIMITED, said, desk.now_ms)
        known = next((one for one in ROLES if one == role), None)
        if known is None:
            raise BadFlag(f"--role: {role!r} is none; it may be {', '.join(ROLES)}")
        key, secret = registrar.make_key(
            desk.registry, org_id=desk.organisation(org), now_ms=desk.now_ms, name=name, role=known, limits=limits
        )
        _show_secret(key, secret, as_json=as_json)

    return at_desk(data, act)


def list_keys(data: Path | None, *, as_json: bool, all_of_them: bool) -> int:
    """`fallow keys list`."""

    def act(desk: Desk) -> None:
        found = [one for one in desk.registry.keys.all() if all_of_them or _state(one, desk.now_ms) == "good"]
        spent = desk.registry.spending.totals()
        if as_json:
            return print_json([_document(one, spent, desk.now_ms) for one in found])
        rows = [
            [
                *(one.id, one.name, one.org_id, one.role, _state(one, desk.now_ms), local(one.expires_at_ms) or "never"),
                *(_spent(one, spent), _in_short(one)),
            ]
            for one in found
        ]
        print_table(
            ("key", "name", "organisation", "role", "state", "expires", "spent", "limits"),
            rows,
            "no keys yet; `fallow keys create` makes one" if all_of_them else "no keys that are good; `--all` shows the others",
        )

    return at_desk(data, act)


def show(data: Path | None, id: str, *, as_json: bool) -> int:
    """`fallow keys show`."""

    def act(desk: Desk) -> None:
        _tell(desk, desk.registry.keys.named(KeyId(id)), as_json=as_json)

    return at_desk(data, act)


def limit(data: Path | None, id: str, *, said: Mapping[str, Any], as_json: bool) -> int:
    """`fallow keys limit`."""

    def act(desk: Desk) -> None:
        if all(value is None for value in said.values()):
            raise BadFlag("say which limit changes, such as --calls-per-minute 60; `fallow keys limit --help` lists them")
        key = desk.registry.keys.named(KeyId(id))
        key = registrar.limit_key(desk.registry, key.id, _changed(limits_of(key), said, desk.now_ms))
        _tell(desk, key, as_json=as_json)

    return at_desk(data, act)


def rotate(data: Path | None, id: str, *, grace: str, as_json: bool) -> int:
    """`fallow keys rotate`."""

    def act(desk: Desk) -> None:
        grace_ms = 0 if grace == "0" else span_ms("grace", grace)
        if grace_ms is None:
            raise BadFlag("--grace: the old key has to end; write 0, 90m, 12h or 30d")
        key, secret = registrar.rotate_key(desk.registry, KeyId(id), grace_ms=grace_ms, now_ms=desk.now_ms)
        say(f"{id} holds until {local(desk.now_ms + grace_ms)}." if grace_ms else f"{id} holds no more.")
        _show_secret(key, secret, as_json=as_json)

    return at_desk(data, act)


def revoke(data: Path | None, ids: list[str]) -> int:
    """`fallow keys revoke`."""

    def act(desk: Desk) -> None:
        keys = [desk.registry.keys.named(KeyId(id)) for id in ids]  # all of them, or none if one is mistyped
        for key in keys:
            registrar.revoke_key(desk.registry, key.id, now_ms=desk.now_ms)
            print(f"{key.id} is revoked")

    return at_desk(data, act)


def _changed(limits: key_limits.Limits, said: Mapping[str, Any], now_ms: int) -> key_limits.Limits:
    """Limits with what the flags say."""
    words = {name: listed(value) if name in LISTS else value for name, value in said.items() if name != "expires"}
    changed = limited(limits, wishes_of(words))
    expires = said.get("expires")
    if expires is None:
        return changed
    lasts_ms = span_ms("expires", expires)
    return msgspec.structs.replace(changed, expires_at_ms=None if lasts_ms is None else now_ms + lasts_ms)


def _show_secret(key: ApiKey, secret: str, *, as_json: bool) -> None:
    if as_json:
        return print_json({"id": key.id, "secret": secret})
    say(f"{key.id} of {key.org_id}. This is its only showing: what is kept can't be turned back into it.")
    print(secret)


def _state(key: ApiKey, now_ms: int) -> str:
    if key.revoked_at_ms is not None:
        return "revoked"
    return "expired" if key.expires_at_ms is not None and key.expires_at_ms <= now_ms else "good"


def _in_short(key: ApiKey) -> str:
    """What differs from a key without limits."""
    usual = _terms(ApiKey(id=key.id, digest=b"", org_id=key.org_id))
    return "; ".join(f"{name} {value}" for name, value in _terms(key).items() if value != usual[name]) or "none"


def _terms(key: ApiKey) -> dict[str, str]:
    """A key's limits, each in words; empty: no limit."""
    policy, allowance = key.policy, key.allowance
    return {
        "rings": ", ".join(ring for ring in ("own", "partner", "market") if ring in policy.rings),
        "partners": ", ".join(sorted(policy.partners)),
        "regions": ", ".join(sorted(policy.regions)),
        "countries": ", ".join(sorted(policy.countries)),
        "hardware": policy.hardware or "",
        "isolation": policy.isolation or "",
        "prefer": policy.prefer,
        "privacy": policy.privacy,
        "max cost": _credits(policy.cost_max_micro),
        "max price": _credits(policy.price_max_micro_per_munit),
        "models": ", ".join(sorted(key.models)),
        "budget": _credits(key.budget_micro),
        "concurrency": str(allowance.concurrency_max),
        "calls a minute": str(allowance.calls_per_minute or ""),
        "tokens a minute": str(allowance.tokens_per_minute or ""),
        "weight": f"{allowance.weight:g}",
    }


def _credits(amount_micro: int | None) -> str:
    return "" if amount_micro is None else f"{amount_micro / MICRO:.6f}".rstrip("0").rstrip(".")


def _spent(key: ApiKey, spent: Mapping[KeyId, int]) -> str:
    """What the calls of a key have cost in credits; empty if it never had a budget, since nobody counted then."""
    counts = key.budget_micro is not None or key.id in spent
    return _credits(spent.get(key.id, 0)) if counts else ""


def _tell(desk: Desk, key: ApiKey, *, as_json: bool) -> None:
    spent, now_ms = desk.registry.spending.totals(), desk.now_ms
    if as_json:
        return print_json(_document(key, spent, now_ms))
    told = {
        "key": key.id,
        "name": key.name,
        "organisation": key.org_id,
        "role": key.role,
        "state": _state(key, now_ms),
        "made": local(key.created_at_ms),
        "expires": local(key.expires_at_ms) or "never",
        "revoked": local(key.revoked_at_ms),
        "spent": _spent(key, spent),
    } | _terms(key)
    for name, value in told.items():
        if value:
            print(f"{name:<16}{value}")


def _document(key: ApiKey, spent: Mapping[KeyId, int], now_ms: int) -> dict[str, Any]:
    document: dict[str, Any] = msgspec.to_builtins(key, order="sorted")
    del document["digest"]
    for name in ("created", "expires", "revoked"):
        document[f"{name}_at"] = utc(document.pop(f"{name}_at_ms"))
    return document | {"state": _state(key, now_ms), "spent_micro": spent.get(key.id, 0)}
