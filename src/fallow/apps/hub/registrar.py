"""What who runs a hub does to its registry: keys, organisations, invitations and bans. Plain functions; commands call them."""

import hashlib
import re
import secrets

import msgspec

from fallow.apps.hub.key_limits import UNLIMITED, Limits, check_size, limits_of
from fallow.core.membership import is_in_force
from fallow.model.errors import BadFlag, FallowError, NameTaken, UnknownName, WireError, shortened
from fallow.model.identity import Agreement, ApiKey, Invite, KeyRole, Member, MemberRole, Organisation
from fallow.model.ids import KeyId, OrgId
from fallow.ports import Registry
from fallow.wire.agreement_line import NAME, ORGANISATION_KIND, Line, signed
from fallow.wire.nkey_text import raw_public
from fallow.wire.sign import Sign

KEY_PREFIX = "fk-"
KEY_BYTES = 24
"""Of chance, as 48 hexadecimal digits."""
WORD_BYTES = 24
PARTNERS_MAX = 100
"""Organisations with which one may have agreements at the same time. Their names travel with each of its keys."""
NAME_CHARS_MAX = 128
BEGUN_CHARS_MIN = 6
"""So much of a public key is enough to name a member, if no other one begins so."""


def digest_of(secret: str) -> bytes:
    """What is kept of a key, or of an invitation's word."""
    return hashlib.sha256(secret.encode()).digest()


# keys
def make_key(
    registry: Registry, *, org_id: OrgId, now_ms: int, name: str = "", role: KeyRole = "caller", limits: Limits = UNLIMITED
) -> tuple[ApiKey, str]:
    """A new key, and its secret, which is kept nowhere. Raises UnknownName for an organisation that isn't there."""
    check_size(limits)
    if len(name) > NAME_CHARS_MAX or not name.isprintable():
        raise BadFlag(f"a key's name is {NAME_CHARS_MAX} characters at most, on one line")
    secret = KEY_PREFIX + secrets.token_hex(KEY_BYTES)
    return keep_key(registry, secret, org_id=org_id, now_ms=now_ms, name=name, role=role, limits=limits), secret


def keep_key(registry: Registry, secret: str, *, org_id: OrgId, now_ms: int, name: str, role: KeyRole, limits: Limits) -> ApiKey:
    """Add the key with this secret. Raises NameTaken if it is there already."""
    digest = digest_of(secret)
    key = ApiKey(
        id=KeyId(f"key-{digest.hex()[:12]}"), digest=digest, org_id=org_id, name=name, role=role, created_at_ms=now_ms, **limits.fields()
    )
    registry.keys.add(key)
    return key


def limit_key(registry: Registry, id: KeyId, limits: Limits) -> ApiKey:
    """Other limits for a key, in force on every gateway within 2 s. Raises UnknownName, and BadFlag for one that was revoked."""
    check_size(limits)
    key = registry.keys.named(id)
    if key.revoked_at_ms is not None:
        raise BadFlag(f"{id} was revoked and stays so; make a new key with `fallow keys create`")
    key = msgspec.structs.replace(key, **limits.fields())
    registry.keys.change(key)
    return key


def rotate_key(registry: Registry, id: KeyId, *, grace_ms: int, now_ms: int) -> tuple[ApiKey, str]:
    """A new key with the same limits, and its secret; the old one holds for the grace time only. Raises UnknownName or BadFlag."""
    old = registry.keys.named(id)
    if old.revoked_at_ms is not None or (old.expires_at_ms is not None and old.expires_at_ms <= now_ms):
        raise BadFlag(f"{id} can't be used any more, so there is nothing to replace; make a new key with `fallow keys create`")
    key, secret = make_key(registry, org_id=old.org_id, now_ms=now_ms, name=old.name, role=old.role, limits=limits_of(old))
    until_ms = now_ms + grace_ms if old.expires_at_ms is None else min(old.expires_at_ms, now_ms + grace_ms)
    try:
        registry.keys.change(msgspec.structs.replace(old, expires_at_ms=until_ms))
    except FallowError:
        revoke_key(registry, key.id, now_ms=now_ms)  # nobody has seen its secret
        raise
    return key, secret


def revoke_key(registry: Registry, id: KeyId, *, now_ms: int) -> ApiKey:
    """End a key for good. Doing it again changes nothing. Raises UnknownName."""
    key = registry.keys.named(id)
    if key.revoked_at_ms is None:
        key = msgspec.structs.replace(key, revoked_at_ms=now_ms)
        registry.keys.change(key)
    return key


# organisations
def add_organisation(registry: Registry, id: OrgId, *, public_key: str = "", now_ms: int) -> Organisation:
    """Raises NameTaken, or BadFlag for what is no name or no organisation's public key."""
    _check_organisation(id, public_key)
    made = Organisation(id=id, public_key=public_key, created_at_ms=now_ms)
    registry.organisations.add(made)
    return made


def keep_organisation(registry: Registry, id: OrgId, *, public_key: str, now_ms: int) -> Organisation:
    """The organisation, added if it isn't there; raises NameTaken if one with another key has its name."""
    try:
        return add_organisation(registry, id, public_key=public_key, now_ms=now_ms)
    except NameTaken:
        known = find_organisation(registry, id)
    if public_key and known.public_key != public_key:
        has = f"the key {known.public_key}" if known.public_key else "no key"
        raise NameTaken(f"this hub knows an organisation {id} with {has}, not with {public_key}; another name has to be chosen")
    return known


def find_organisation(registry: Registry, id: OrgId) -> Organisation:
    """Raises UnknownName."""
    for one in registry.organisations.all():
        if one.id == id:
            return one
    raise UnknownName(f"there is no organisation {shortened(id)}; `fallow org list` shows them, `fallow org add` adds one")


def _check_organisation(id: str, public_key: str) -> None:
    if re.match(NAME, id) is None:
        raise BadFlag(f"{shortened(id)!r} can't be an organisation's name: it is letters, digits, _ and -, 63 at most")
    try:
        if public_key:
            raw_public(public_key, ORGANISATION_KIND)
    except WireError as error:
        raise BadFlag(error.message) from None


# agreements
def countersigned(line: Line, own: OrgId, public_key: str, sign: Sign) -> Line:
    """The line with our signature, which may be there already; raises WireError if it isn't for us."""
    if own not in (line.left, line.right):
        raise WireError(f"this agreement is between {line.left} and {line.right}, and this machine is of {own}")
    there = line.keys.get(own)
    if there is not None and there != public_key:
        raise WireError(f"the line is signed for {own} by another key ({there}) than this machine's ({public_key}): it isn't from you")
    if not line.keys:
        raise WireError("nobody has signed this line: ask the other side for a new one")
    return line if there else signed(line, own, public_key, sign)


def store_agreement(registry: Registry, line: Line, *, now_ms: int) -> Agreement:
    """Keep an agreement that both have signed; organisations that aren't known yet are added with their keys.

    Raises WireError if a signature is missing, NameTaken if a name is another's or the two have an agreement already.
    """
    agreement = line.agreement
    sides = line.keys
    if set(sides) != {agreement.left, agreement.right}:
        raise WireError("both organisations must sign before a hub keeps an agreement: `fallow org countersign` does it")
    for id, public_key in sides.items():
        keep_organisation(registry, id, public_key=public_key, now_ms=now_ms)
    known = registry.organisations.agreements()
    if agreement in known:
        return agreement
    begun = {(one.left, one.right, one.begins_at_ms) for one in known}
    if (agreement.left, agreement.right, agreement.begins_at_ms) in begun:
        raise NameTaken("this very agreement was ended; begin a new one with `fallow org agree`")  # else an old line would undo its end
    for id in sides:
        count = sum(id in (one.left, one.right) and is_in_force(one, now_ms) for one in known)
        if count >= PARTNERS_MAX:
            raise NameTaken(f"{id} has {count} partners, and {PARTNERS_MAX} is the limit; end another agreement first")
    registry.organisations.agree(agreement)
    return agreement


def end_agreement(registry: Registry, one: OrgId, other: OrgId, *, now_ms: int) -> None:
    """From now on the two are no partners; raises UnknownName if they aren't anyway."""
    left, right = sorted((one, other))
    registry.organisations.end_agreement(left, right, at_ms=now_ms)


# invitations and members
def invite(
    registry: Registry, *, org_id: OrgId, roles: frozenset[MemberRole], uses: int | None, lasts_ms: int | None, now_ms: int
) -> tuple[Invite, str]:
    """Leave to join, and its secret word, which is kept nowhere. Raises UnknownName for an organisation that isn't there."""
    word = secrets.token_urlsafe(WORD_BYTES)
    made = Invite(
        id=f"inv-{secrets.token_hex(4)}",
        word_digest=digest_of(word),
        org_id=org_id,
        roles=roles,
        uses_left=uses,
        created_at_ms=now_ms,
        expires_at_ms=None if lasts_ms is None else now_ms + lasts_ms,
    )
    registry.members.add_invite(made)
    return made, word


def find_member(registry: Registry, name: str) -> Member:
    """A node or a gateway by its public key, or by its beginning; raises UnknownName."""
    known = registry.members.named(name)
    if known is not None:
        return known
    if len(name) < BEGUN_CHARS_MIN:
        raise UnknownName(f"give {BEGUN_CHARS_MIN} characters of the public key at least; `fallow hub members` lists them")
    found = [one for one in registry.members.all() if one.public_key.startswith(name)]
    if len(found) != 1:
        how_many = f"{len(found)} members begin" if found else "no member begins"
        raise UnknownName(f"{how_many} with {shortened(name)}; `fallow hub members` lists them")
    return found[0]


def ban(registry: Registry, name: str, *, why: str, now_ms: int) -> Member:
    """Put a member out, and keep it out. Raises UnknownName."""
    member = find_member(registry, name)
    if member.banned_at_ms is None:
        registry.members.ban(member.public_key, at_ms=now_ms, why=why)
    return registry.members.named(member.public_key) or member


def unban(registry: Registry, name: str) -> Member:
    """Let a member in again. Raises UnknownName."""
    member = find_member(registry, name)
    registry.members.ban(member.public_key, at_ms=None)
    return registry.members.named(member.public_key) or member
