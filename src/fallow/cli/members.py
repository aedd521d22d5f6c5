"""`fallow hub invite` and its neighbours: who may join, who did, who is out, what was refused, and the public log of cards."""

from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from fallow.adapters.certificates import ca_pem
from fallow.adapters.operator import Operator, is_offline
from fallow.apps.hub import registrar
from fallow.apps.hub.refusals import REFUSALS_FILE, read_refusals
from fallow.apps.settings import HUB_FILE, HUB_KEYS_FOLDER, HUB_TLS_FOLDER, Settings
from fallow.cli.registry_desk import Desk, at_desk, local, print_json, print_table, say, span_ms, told, utc
from fallow.core.membership import CHAIN_START, first_break
from fallow.model.errors import BadFlag, StartFailed, StoreFailed, WireError
from fallow.model.identity import Invite, LogEntry, MemberRole
from fallow.ports import Registry
from fallow.wire import invitation
from fallow.wire.invitation import Invitation

ROLES: tuple[MemberRole, ...] = ("node", "gateway")
USES_MAX = 1_000_000
KEY_AWAY = "The operator's key isn't here: copy operator.seed back beside the hub's other keys"
PAGE = 1_000
"""Entries of the log that are read at once."""


class Running(msgspec.Struct, frozen=True):
    """What a hub that runs says of itself."""

    addresses: tuple[str, ...]


def invite(data: Path | None, *, org: str, roles: list[str], uses: str, lasts: str, addresses: list[str], as_json: bool) -> int:
    """`fallow hub invite`."""

    def act(desk: Desk) -> None:
        known = frozenset(one for one in ROLES if one in roles)
        if len(known) != len(set(roles)):
            raise BadFlag(f"--role: it may be {' or '.join(ROLES)}, and be given for each")
        frame = door(desk.settings, addresses)
        made, word = registrar.invite(
            desk.registry,
            org_id=desk.organisation(org),
            roles=known,
            uses=_uses(uses),
            lasts_ms=span_ms("expires", lasts),
            now_ms=desk.now_ms,
        )
        token = invitation.write(msgspec.structs.replace(frame, word=word))
        if as_json:
            return print_json({"id": made.id, "token": token})
        how_many = (
            "any number of machines" if made.uses_left is None else "one machine" if made.uses_left == 1 else f"{made.uses_left} machines"
        )
        until = f" until {local(made.expires_at_ms)}" if made.expires_at_ms is not None else ""
        joins = " or ".join(f"fallow {'lend' if role == 'node' else role} --join TOKEN" for role in ROLES if role in known)
        say(f"{made.id} lets {how_many} join {made.org_id}{until}, with `{joins}`. The token is a secret:")
        print(token)

    return at_desk(data, act)


def invites(data: Path | None, *, as_json: bool, all_of_them: bool, end: str) -> int:
    """`fallow hub invites`."""

    def act(desk: Desk) -> None:
        if end:
            desk.registry.members.end_invite(end, at_ms=desk.now_ms)
            return print(f"{end} lets nobody in any more")
        found = [one for one in desk.registry.members.invites() if all_of_them or _state(one, desk.now_ms) == "good"]
        if as_json:
            return print_json([_invite_document(one, desk.now_ms) for one in found])
        rows = [
            [
                one.id,
                one.org_id,
                ", ".join(sorted(one.roles)),
                _state(one, desk.now_ms),
                "any" if one.uses_left is None else str(one.uses_left),
                local(one.expires_at_ms) or "never",
            ]
            for one in found
        ]
        empty = "no invitations yet" if all_of_them else "no invitations that are good; `--all` shows the others"
        print_table(("invitation", "organisation", "for", "state", "uses left", "expires"), rows, empty)

    return at_desk(data, act)


def members(data: Path | None, *, as_json: bool) -> int:
    """`fallow hub members`."""

    def act(desk: Desk) -> None:
        found = desk.registry.members.all()
        if as_json:
            return print_json(
                [
                    {
                        "public_key": one.public_key,
                        "role": one.role,
                        "org_id": one.org_id,
                        "joined_at": utc(one.joined_at_ms),
                        "invite_id": one.invite_id,
                        "banned_at": utc(one.banned_at_ms),
                        "banned_why": one.banned_why,
                    }
                    for one in found
                ]
            )
        rows = [
            [
                one.public_key,
                one.role,
                one.org_id,
                local(one.joined_at_ms),
                one.invite_id or "open",
                local(one.banned_at_ms),
                one.banned_why,
            ]
            for one in found
        ]
        print_table(("member", "role", "organisation", "joined", "by", "banned", "why"), rows, "nobody has joined yet")

    return at_desk(data, act)


def ban(data: Path | None, name: str, *, why: str) -> int:
    """`fallow hub ban`."""

    def act(desk: Desk) -> None:
        member = registrar.ban(desk.registry, name, why=why, now_ms=desk.now_ms)
        if is_offline(desk.settings.data / HUB_KEYS_FOLDER):
            print(f"{member.public_key} gets no new credential; the one that it has ends within a day")
            return say(f"{KEY_AWAY}, and a hub that runs puts it out within a second.")
        print(f"{member.public_key} is out; a hub that runs closes its connection within a second")

    return at_desk(data, act)


def unban(data: Path | None, name: str) -> int:
    """`fallow hub unban`."""

    def act(desk: Desk) -> None:
        print(f"{registrar.unban(desk.registry, name).public_key} may join again")
        if is_offline(desk.settings.data / HUB_KEYS_FOLDER):
            say(f"{KEY_AWAY}, and the broker lets it in; without that, a ban that it knows holds for a day after its beginning.")

    return at_desk(data, act)


def refusals(data: Path | None, *, as_json: bool) -> int:
    """`fallow hub refusals`."""

    def act(settings: Settings) -> None:
        found = read_refusals(settings.data / REFUSALS_FILE)
        if as_json:
            return print_json(
                [
                    {
                        "what": one.what,
                        "reason": one.reason,
                        "why": one.why,
                        "count": one.count,
                        "first_at": utc(one.first_at_ms),
                        "last_at": utc(one.last_at_ms),
                    }
                    for one in found
                ]
            )
        rows = [[one.what, one.reason, str(one.count), local(one.last_at_ms), one.why] for one in found]
        print_table(("refused", "reason", "times", "last", "why"), rows, "nothing was refused yet")

    return told(data, act)


def log(data: Path | None, *, lines: int, node: str, as_json: bool) -> int:
    """`fallow hub log`: reads all of the log, so that it is also checked."""

    def act(desk: Desk) -> None:
        shown: deque[LogEntry] = deque(maxlen=lines)
        count = 0
        for page in _pages(desk.registry):
            count += len(page)
            shown.extend(one for one in page if one.node_id.startswith(node))
        if as_json:
            return print_json(
                [
                    {"number": one.number, "at": utc(one.at_ms), "node_id": one.node_id, "card": one.card.hex(), "hash": one.hash.hex()}
                    for one in shown
                ]
            )
        rows = [[str(one.number), local(one.at_ms), one.node_id, f"{len(one.card)} bytes", one.hash.hex()[:16]] for one in shown]
        print_table(("number", "logged", "node", "card", "hash"), rows, "no cards here yet")
        say(f"{count} cards in all; every one fits the hash of the one before")

    return at_desk(data, act)


def door(settings: Settings, addresses: list[str]) -> Invitation:
    """What every invitation of this hub says, without a word. Raises BadFlag, or StartFailed if nobody knows the hub's address."""
    found = addresses or _running(settings)
    authority = settings.data / HUB_TLS_FOLDER
    is_own = not settings.hub.certificate and (authority / "authority.pem").exists()
    guest = Operator.open(settings.data / HUB_KEYS_FOLDER).door()
    frame = Invitation(addresses=tuple(found), ca_pem=ca_pem(authority) if is_own else "", door_jwt=guest.jwt, door_seed=guest.key.seed)
    try:
        return invitation.read(invitation.write(frame))
    except WireError:
        # It isn't repeated: it may hold a password.
        text = (
            f"expected addresses of the broker, such as tls://hub.example.org:8422, {invitation.ADDRESSES_MAX} at most, without a password"
        )
        raise BadFlag(f"--address: {text}") from None


def _running(settings: Settings) -> list[str]:
    path = settings.data / HUB_FILE
    try:
        return list(msgspec.json.decode(path.read_bytes(), type=Running).addresses)
    except (OSError, msgspec.DecodeError):
        raise StartFailed("no hub runs here, so its address isn't known: start it, or give --address tls://HOST:PORT") from None


def _uses(text: str) -> int | None:
    if text == "any":
        return None
    if not (text.isascii() and text.isdigit() and 0 < int(text) <= USES_MAX):
        raise BadFlag(f"--uses: {text!r} is no number between 1 and {USES_MAX}; any is without a limit")
    return int(text)


def _state(one: Invite, now_ms: int) -> str:
    if one.ended_at_ms is not None:
        return "ended"
    if one.expires_at_ms is not None and one.expires_at_ms <= now_ms:
        return "expired"
    return "used up" if one.uses_left == 0 else "good"


def _invite_document(one: Invite, now_ms: int) -> dict[str, Any]:
    return {
        "id": one.id,
        "org_id": one.org_id,
        "roles": sorted(one.roles),
        "state": _state(one, now_ms),
        "uses_left": one.uses_left,
        "created_at": utc(one.created_at_ms),
        "expires_at": utc(one.expires_at_ms),
        "ended_at": utc(one.ended_at_ms),
    }


def _pages(registry: Registry) -> Iterator[list[LogEntry]]:
    """The whole log, oldest first; raises StoreFailed where it isn't what was once written."""
    number, before = 0, CHAIN_START
    while page := registry.cards.after(number, limit=PAGE):
        wrong = first_break(page, after_number=number, before=before)
        if wrong is not None:
            raise StoreFailed(f"the log of cards was changed: entry {wrong} doesn't fit the one before; restore the database from a copy")
        yield page
        number, before = page[-1].number, page[-1].hash
