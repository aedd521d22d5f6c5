"""What a hub makes sure of when it starts: its own organisation, that one's API key, and an invitation for its own machine."""

import contextlib
import secrets
from collections.abc import Sequence
from pathlib import Path

import msgspec

from fallow.adapters.files import make_folder, read_or_make, write_private
from fallow.adapters.nkey import Credentials, KeyPair, kept_key
from fallow.apps.hub import registrar
from fallow.apps.hub.key_limits import UNLIMITED, Limits, Wishes, wished
from fallow.apps.settings import HUB_KEYS_FOLDER, INVITATION_FILE, KEY_FILE, ORGANISATION_KEY_FILE, Key, Settings
from fallow.model.call import Allowance
from fallow.model.errors import BadSetting, NameTaken, WireError
from fallow.model.identity import Invite
from fallow.model.ids import OrgId
from fallow.model.needs import Policy
from fallow.ports import Registry
from fallow.wire import invitation, subjects
from fallow.wire.invitation import Invitation

HOME_INVITE = "this-machine"
POLICY_BYTES_MAX = 2_048
"""What a policy may take of the message in which gateways hear of it; the rest is room for partners, ids and the allowance."""
assert subjects.KEY.payload_bytes_max > POLICY_BYTES_MAX


def policy_of(key: Key) -> Policy:
    """What the settings allow the hub's own key; raises BadSetting if it doesn't fit into a message."""
    policy = _limits(key).policy
    size = len(msgspec.msgpack.encode(policy))
    if size > POLICY_BYTES_MAX:
        text = f"what the key allows takes {size} bytes, the limit is {POLICY_BYTES_MAX}: name fewer partners, regions or countries"
        raise BadSetting(f"settings.toml: key: {text}")
    return policy


def allowance_of(key: Key) -> Allowance:
    """How much the settings let the hub's own key ask for at a time."""
    return _limits(key).allowance


def _limits(key: Key) -> Limits:
    """The settings say of the hub's own key what a command says of another."""
    return wished(UNLIMITED, Wishes(**msgspec.structs.asdict(key)))


def own_key(settings: Settings) -> tuple[OrgId, KeyPair]:
    """This machine's organisation, and its private key, which is made on first use."""
    return OrgId(settings.organisation.id), kept_key(settings.data / ORGANISATION_KEY_FILE, "account")


def operator_folder(data: Path) -> Path:
    """Where the keys lie from which all credentials follow; made if need be."""
    folder = data / HUB_KEYS_FOLDER
    make_folder(folder.parent)
    return make_folder(folder)


def found(settings: Settings, registry: Registry, *, now_ms: int) -> None:
    """The organisation of this machine, and its first key with the limits of the settings; blocks. Raises StoreFailed, BadSetting."""
    org_id, pair = own_key(settings)
    with contextlib.suppress(NameTaken):
        registrar.add_organisation(registry, org_id, public_key=pair.public, now_ms=now_ms)
    secret = read_or_make(settings.data / KEY_FILE, prefix=registrar.KEY_PREFIX)
    policy, allowance = policy_of(settings.key), allowance_of(settings.key)
    known = registry.keys.find(registrar.digest_of(secret))
    if known is None:
        limits = Limits(policy=policy, allowance=allowance)
        registrar.keep_key(registry, secret, org_id=org_id, now_ms=now_ms, name="this machine", role="caller", limits=limits)
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
        word = secrets.token_urlsafe(registrar.WORD_BYTES)
    invited = Invitation(addresses=tuple(addresses), ca_pem=ca_pem, door_jwt=door.jwt, door_seed=door.key.seed, word=word)
    text = invitation.write(invited) + "\n"
    if not file.exists() or file.read_text() != text:
        write_private(file, text)
    _have_invite(settings, registry, registrar.digest_of(word), now_ms)
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
