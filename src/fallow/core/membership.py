"""Who may join, who is whose partner, what an API key grants, and how the log of cards is chained: rules without a database."""

import hashlib
from collections.abc import Iterable

import msgspec

from fallow.model.call import Grant
from fallow.model.errors import shortened
from fallow.model.identity import Agreement, ApiKey, Invite, LogEntry, Member, MemberRole
from fallow.model.ids import OrgId

CHAIN_START = bytes(32)
"""What stands for the hash before the first entry of the log."""
NUMBER_BYTES = 8


def why_not_admitted(invite: Invite | None, member: Member | None, role: MemberRole, now_ms: int) -> str | None:
    """Why who asks may not join as `role`, and what would lift it; None if it may. `now_ms` is UTC.

    `member` is what is known of its key: who joined once needs no invitation again, and none that it shows is looked at.
    """
    if member is not None:
        return _why_known_is_refused(member, role)
    if invite is None:
        return "no invitation with this word is known here: ask the hub's operator for one, and join with all of its word"
    if invite.ended_at_ms is not None:  # whatever its stamp says: the clock of the hub that ended it may be ahead of ours
        return "the invitation was ended: ask the hub's operator for a new one"
    if invite.expires_at_ms is not None and invite.expires_at_ms <= now_ms:
        return "the invitation has expired: ask the hub's operator for a new one"
    if invite.uses_left is not None and invite.uses_left <= 0:
        return "the invitation is used up: ask the hub's operator for a new one, or for one with more uses"
    if role not in invite.roles:
        return f"the invitation doesn't let a {role} in: ask the hub's operator for one that does"
    return None


def _why_known_is_refused(member: Member, role: MemberRole) -> str | None:
    if member.banned_at_ms is not None:
        reason = f" ({shortened(member.banned_why)})" if member.banned_why else ""
        return f"this {member.role} was put out{reason}: only the hub's operator can lift the ban"
    if member.role != role:
        return f"this key joined as a {member.role}: join as a {role} with a key of its own"
    return None


def is_in_force(agreement: Agreement, now_ms: int) -> bool:
    """Whether an agreement holds at this moment, in UTC milliseconds. Its last moment is the one before `ends_at_ms`."""
    return agreement.begins_at_ms <= now_ms and (agreement.ends_at_ms is None or now_ms < agreement.ends_at_ms)


def partners_of(org: OrgId, agreements: Iterable[Agreement], now_ms: int) -> frozenset[OrgId]:
    """The organisations that agreed with this one, on whichever side they stand. The signatures must have been verified before."""
    in_force = [a for a in agreements if is_in_force(a, now_ms) and a.left != a.right]
    return frozenset({a.right for a in in_force if a.left == org} | {a.left for a in in_force if a.right == org})


def grant_of(key: ApiKey, partners: frozenset[OrgId], now_ms: int, *, spent_micro: int = 0) -> Grant | None:
    """What a key allows its caller; None if it can make no calls: revoked, expired, or for looking after nodes only.

    `partners` are those of its organisation. A key that names partners itself has only those of them that it names. `spent_micro` is
    what its calls have cost.
    """
    if key.revoked_at_ms is not None or key.role == "lender":
        return None
    if key.expires_at_ms is not None and key.expires_at_ms <= now_ms:
        return None
    allowed = partners & key.policy.partners if key.policy.partners else partners
    return Grant(
        key_id=key.id,
        org_id=key.org_id,
        policy=msgspec.structs.replace(key.policy, partners=allowed),
        allowance=key.allowance,
        models=key.models,
        expires_at_ms=key.expires_at_ms,
        budget_micro=key.budget_micro,
        spent_micro=spent_micro,
    )


def chained(before: bytes, *, number: int, at_ms: int, card: bytes) -> bytes:
    """The hash of an entry of the log of cards: SHA-256 over the hash before, number and time as 8 bytes each, and the card."""
    stamps = number.to_bytes(NUMBER_BYTES, "big") + at_ms.to_bytes(NUMBER_BYTES, "big")
    return hashlib.sha256(before + stamps + card).digest()


def first_break(entries: Iterable[LogEntry], *, after_number: int = 0, before: bytes = CHAIN_START) -> int | None:
    """The number at which a stretch of the log is not what was once written; None if it is whole.

    `before` is the hash of entry `after_number`, after which the stretch begins.
    """
    for expected, entry in enumerate(entries, start=after_number + 1):
        if entry.number != expected or entry.hash != chained(before, number=entry.number, at_ms=entry.at_ms, card=entry.card):
            return expected
        before = entry.hash
    return None
