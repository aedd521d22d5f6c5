"""What a hub makes sure of when it starts: its own organisation, that one's API key, and an invitation for its own machine."""

import contextlib
import hashlib
import secrets
from collections.abc import Sequence

import msgspec

from fallow.adapters.files import read_or_make, write_private
from fallow.adapters.nkey import Credentials, kept_key
from fallow.apps.settings import INVITATION_FILE, KEY_FILE, Key, Settings
from fallow.core.needs import micro
from fallow.model.call import Allowance
from fallow.model.errors import BadSetting, NameTaken, WireError
from fallow.model.identity import ApiKey, Invite, Organisation
from fallow.model.ids import KeyId, OrgId
from fallow.model.needs import Policy
from fallow.ports import Registry
from fallow.wire import invitation, subjects
from fallow.wire.invitation import Invitation

KEY_PREFIX = "fk-"
ORG_KEY_FILE = "org.nk"
HOME_INVITE = "this-machine"
WORD_BYTES = 24
POLICY_BYTES_MAX = 2_048
"""What a policy may take of the message in which gateways hear of it; the rest is room for partners, ids and the allowance."""
assert subjects.KEY.payload_bytes_max > POLICY_BYTES_MAX


def policy_of(key: Key) -> Policy:
    """What the settings allow the hub's own key; raises BadSetting if it doesn't fit into a message."""
    policy = Policy(
        rings=frozenset(key.rings),
        partners=frozenset(map(OrgId, key.partners)),
        regions=frozenset(key.regions),
        countries=frozenset(key.countries),
        hardware=key.hardware or None,
        isolation=None if key.isolation == "none" else key.isolation,
        prefer=key.prefer,
        cost_max_micro=micro(key.max_cost) if key.max_cost else None,
        price_max_micro_per_munit=micro(key.max_price) if key.max_price else None,
    )
    size = len(msgspec.msgpack.encode(policy))
    if size > POLICY_BYTES_MAX:
        text = f"what the key allows takes {size} bytes, the limit is {POLICY_BYTES_MAX}: name fewer partners, regions or countries"
        raise BadSetting(f"settings.toml: key: {text}")
    return policy


def allowance_of(key: Key) -> Allowance:
    """How much the settings let the hub's own key ask for at a time."""
    return Allowance(
        concurrency_max=key.concurrency,
        calls_per_minute=key.calls_per_minute,
        tokens_per_minute=key.tokens_per_minute,
        weight=key.weight,
    )


def found(settings: Settings, registry: Registry, *, now_ms: int) -> None:
    """The organisation of this machine, and its first key with the limits of the settings; blocks. Raises StoreFailed, BadSetting."""
    org_id = OrgId(settings.organisation.id)
    key = kept_key(settings.data / ORG_KEY_FILE, "account")
    if all(one.id != org_id for one in registry.organisations.all()):
        registry.organisations.add(Organisation(id=org_id, public_key=key.public, created_at_ms=now_ms))
    digest = hashlib.sha256(read_or_make(settings.data / KEY_FILE, prefix=KEY_PREFIX).encode()).digest()
    policy, allowance = policy_of(settings.key), allowance_of(settings.key)
    known = registry.keys.find(digest)
    if known is None:
        id = KeyId("key-" + digest.hex()[:12])
        made = ApiKey(id=id, digest=digest, org_id=org_id, name="this machine", policy=policy, allowance=allowance, created_at_ms=now_ms)
        registry.keys.add(made)
    elif (known.policy, known.allowance) != (policy, allowance):
        registry.keys.change(msgspec.structs.replace(known, policy=policy, allowance=allowance))


def invite_home(
    settings: Settings, registry: Registry, door: Credentials, *, addresses: Sequence[str], ca_pem: str, now_ms: int
) -> Invitation:
    """The invitation for gateways and nodes of this machine, kept in its data folder; its word stays the same. Blocks."""
    file = settings.data / INVITATION_FILE
    try:
        word = invitation.read(file.read_text().strip()).word
    except (OSError, WireError):
        word = secrets.token_urlsafe(WORD_BYTES)
    invited = Invitation(addresses=tuple(addresses), ca_pem=ca_pem, door_jwt=door.jwt, door_seed=door.key.seed, word=word)
    text = invitation.write(invited) + "\n"
    if not file.exists() or file.read_text() != text:
        write_private(file, text)
    _have_invite(settings, registry, hashlib.sha256(word.encode()).digest(), now_ms)
    return invited


def _have_invite(settings: Settings, registry: Registry, digest: bytes, now_ms: int) -> None:
    """An invitation with this word that doesn't end. One whose word was lost is ended."""
    mine = [one for one in registry.members.invites() if one.id.startswith(HOME_INVITE) and one.ended_at_ms is None]
    if any(one.word_digest == digest for one in mine):
        return
    for one in mine:
        registry.members.end_invite(one.id, at_ms=now_ms)
    invite = Invite(
        id=f"{HOME_INVITE}-{digest.hex()[:8]}",
        word_digest=digest,
        org_id=OrgId(settings.organisation.id),
        roles=frozenset({"node", "gateway"}),
        uses_left=None,
        created_at_ms=now_ms,
    )
    with contextlib.suppress(NameTaken):  # another hub on the same database was quicker
        registry.members.add_invite(invite)
