"""What travels between gateways, nodes and hubs. The subject table says which of these goes where.

Messages are arrays on the wire: a newer minor version may add fields at the end, and an older reader ignores them.
What gateways and nodes say of a call is sealed (`wire/seal.py`): a `Request` travels within a `SealedRequest`, and `BodyPart`, `Part`
and `Final` within a `Sealed`. Only what says nothing of the call's content goes in the open.
"""

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from fallow.model.call import Grant
from fallow.model.card import Card
from fallow.model.errors import Failure, UnopenedReason
from fallow.model.ids import AttemptId, CallId, GatewayId, KeyId, NodeId, OrgId
from fallow.model.needs import COUNTRY_UNKNOWN, HardwareKind, Privacy
from fallow.model.offer import Load, ModelName, Offer, Price
from fallow.model.owner import State
from fallow.model.receipt import Usage

OFFERS_MAX = 64
"""What one node may offer."""
DEMAND_MODELS_MAX = 512
INDEX_PRICES_MAX = 512
HISTORY_PRICES_MAX = 1_024
"""About 100 bytes each: they fit into one message of the broker."""
PIECES_MAX = 16_384
"""Of an answer that is to be continued; longer ones aren't."""
LOAD_WAIT_MS_MAX = 600_000
"""The longest that a call may wait for its model to be loaded."""
NodeState = State
TOKENS_MAX = 32_768
"""Numbers of tokens that an answer's last message carries; a longer answer carries none. They take up to five bytes each."""
TokenId = Annotated[int, Meta(ge=0, lt=2**32)]


class Message(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    """The root of all messages."""


class Request(Message, frozen=True, kw_only=True, array_like=True, tag=1):
    """Gateway to node: a call's header and its body, or the first part of it.

    `body_bytes` is the whole body's size; what `body` lacks follows as `BodyPart`s. `load_wait_ms` is how long the caller
    is willing to wait for the model to be loaded; None if nothing was said of it. `made_at_s` is when the call came, in UTC
    seconds: all attempts of a call say the same of themselves. `delivered` are the pieces of text that the caller has already
    from an attempt that broke off, to be continued; None for an answer from the beginning. `model_digest` and `price` are the offer's
    that the gateway chose, and `cost_max_micro` the most that the call may cost by it: the node refuses what it doesn't offer any more.
    """

    attempt_id: AttemptId
    call_id: CallId
    gateway_id: GatewayId
    org_id: OrgId
    key_id: KeyId
    path: str
    model: str
    stream: bool
    body_bytes: int
    body: bytes
    load_wait_ms: Annotated[int, Meta(ge=0, le=LOAD_WAIT_MS_MAX)] | None = None
    country: str = COUNTRY_UNKNOWN
    made_at_s: Annotated[int, Meta(ge=0, le=2**40)] = 0
    delivered: Annotated[tuple[str, ...], Meta(max_length=PIECES_MAX)] | None = None
    model_digest: Annotated[str, Meta(max_length=128)] = ""
    price: Price = Price()
    cost_max_micro: Annotated[int, Meta(ge=0, le=2**60)] = 0
    privacy: Privacy = "plain"


class BodyPart(Message, frozen=True, kw_only=True, array_like=True, tag=2):
    """Gateway to node: more of a request's body. `offset` counts bytes from the body's start."""

    offset: int
    data: bytes


class Cancel(Message, frozen=True, kw_only=True, array_like=True, tag=3):
    """Gateway to node: nobody waits for this attempt any more."""

    attempt_id: AttemptId


class Credit(Message, frozen=True, kw_only=True, array_like=True, tag=4):
    """Either way: the other side may send bytes up to this offset. Saying it twice changes nothing."""

    attempt_id: AttemptId
    until_bytes: int


class Lease(Message, frozen=True, kw_only=True, array_like=True, tag=5):
    """Gateway to node: I live and still wait for these attempts."""

    gateway_id: GatewayId
    attempt_ids: tuple[AttemptId, ...]


class Introduce(Message, frozen=True, kw_only=True, array_like=True, tag=6):
    """Gateway or hub to node: send your card and offers with the next heartbeat, at once."""

    gateway_id: GatewayId


class Accepted(Message, frozen=True, kw_only=True, array_like=True, tag=7):
    """Node to gateway: the attempt is here; sent only when the answer takes longer than a moment."""


class Head(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    """The start of the engine's HTTP answer. `engine_us` is the time from asking the engine to what is sent first."""

    status: Annotated[int, Meta(ge=200, le=599)]
    content_type: Annotated[str, Meta(pattern=r"^[ -~]{1,128}\Z")]
    engine_us: Annotated[int, Meta(ge=0)]


class Part(Message, frozen=True, kw_only=True, array_like=True, tag=8):
    """Node to gateway: a piece of the answer. `index` counts up from 0; the first one carries the head."""

    index: int
    data: bytes
    head: Head | None = None


class Final(Message, frozen=True, kw_only=True, array_like=True, tag=9):
    """Node to gateway: the last piece of the answer, or why there is none. An answer without it was cut off.

    `tokens` are what the engine wrote, as its own numbers, if it tells them. `digest` commits to all of the answer (`wire/commitment.py`).
    """

    index: int
    data: bytes = b""
    head: Head | None = None
    usage: Usage | None = None
    failure: Failure | None = None
    tokens: Annotated[tuple[TokenId, ...], Meta(max_length=TOKENS_MAX)] = ()
    digest: Annotated[bytes, Meta(max_length=32)] = b""


class Alive(Message, frozen=True, kw_only=True, array_like=True, tag=10):
    """Node to gateway: still at it. Node to hub: the echo that you asked for."""


SuiteName = Literal["mlkem768-x25519", "x25519"]
"""How a session's secret is sealed: HPKE (RFC 9180) with this KEM. The first withstands quantum computers, if ML-KEM-768 does."""


class KemKey(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    """The key to which gateways seal a session's secret, signed by the node's own key. Only the node's memory has its other half."""

    suite: SuiteName
    public_key: Annotated[bytes, Meta(min_length=32, max_length=1_216)]
    expires_at_s: Annotated[int, Meta(ge=0, le=2**40)]
    signature: Annotated[bytes, Meta(max_length=64)] = b""


class Heartbeat(Message, frozen=True, kw_only=True, array_like=True, tag=11):
    """Node to everyone: I live. `card`, `offers` and `kem` come along when they changed or somebody asked."""

    node_id: NodeId
    sequence: int
    state: NodeState
    card_sequence: int
    loads: Annotated[tuple[Load, ...], Meta(max_length=OFFERS_MAX)]
    card: Card | None = None
    offers: Annotated[tuple[Offer, ...], Meta(max_length=OFFERS_MAX)] | None = None
    kem: KemKey | None = None


class KeyQuery(Message, frozen=True, kw_only=True, array_like=True, tag=12):
    """Gateway to hub: whose key has this SHA-256?"""

    key_digest: bytes


class KeyAnswer(Message, frozen=True, kw_only=True, array_like=True, tag=13):
    """Hub to gateway: what the key allows, or nothing if nobody knows it.

    `elsewhere`: the key is of an organisation for whose callers this gateway doesn't speak.
    """

    grant: Grant | None = None
    elsewhere: bool = False


class Hold(Message, frozen=True, kw_only=True, array_like=True, tag=14):
    """Hub to node: the models that are wanted in its memory, the most wanted first; the others may leave.

    Advice: a node follows it as far as its owner's limits allow. A higher `sequence` replaces a lower one.
    """

    sequence: int
    models: Annotated[tuple[ModelName, ...], Meta(max_length=OFFERS_MAX)]


class ModelDemand(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    """What callers asked of one model in a span of time. `missed` calls were refused, or not met as they needed."""

    model: ModelName
    calls: Annotated[int, Meta(ge=0, le=2**40)] = 0
    missed: Annotated[int, Meta(ge=0, le=2**40)] = 0
    prompt_tokens: Annotated[int, Meta(ge=0, le=2**50)] = 0
    output_tokens: Annotated[int, Meta(ge=0, le=2**50)] = 0


class Demand(Message, frozen=True, kw_only=True, array_like=True, tag=15):
    """Gateway to hub: what was asked of it since it last said so."""

    gateway_id: GatewayId
    sequence: int
    span_ms: Annotated[int, Meta(ge=1, le=3_600_000)]
    models: Annotated[tuple[ModelDemand, ...], Meta(max_length=DEMAND_MODELS_MAX)]


class IndexPrice(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    """What a million tokens of a model go for on one kind of hardware, and how busy that is (0 to 1)."""

    model: ModelName
    hardware: HardwareKind
    price: Price
    utilisation: Annotated[float, Meta(ge=0, le=1)]
    at_ms: int


class Index(Message, frozen=True, kw_only=True, array_like=True, tag=16):
    """Hub to everyone: the price index now."""

    sequence: int
    prices: Annotated[tuple[IndexPrice, ...], Meta(max_length=INDEX_PRICES_MAX)]


class HistoryQuery(Message, frozen=True, kw_only=True, array_like=True, tag=17):
    """Gateway to hub: how did a model's prices go? An empty name asks for all that are remembered."""

    model: str = ""


class HistoryAnswer(Message, frozen=True, kw_only=True, array_like=True, tag=18):
    """Hub to gateway: past prices, oldest first."""

    prices: Annotated[tuple[IndexPrice, ...], Meta(max_length=HISTORY_PRICES_MAX)]


class Ping(Message, frozen=True, kw_only=True, array_like=True, tag=19):
    """Gateway to node: are you still at this attempt? The broker answers itself if the node's connection is gone.

    Gateway or hub to node, with an id that begins with `rtt-`: answer at once, so that I see how far you are at most.
    """

    attempt_id: AttemptId


PublicKey = Annotated[str, Meta(pattern=r"^[A-Z2-7]{56}\Z")]
"""An NKey's public half: base32, a letter for its kind (`U` for who connects, `A` for an organisation) and a checksum."""
CREDENTIAL_MAX = 4_096


class Enrol(Message, frozen=True, kw_only=True, array_like=True, tag=20):
    """Guest to hub: let this key in as a node or a gateway.

    `invite` is the secret word of an invitation; empty where open enrolment is hoped for, or the hub knows the key already.
    `proof` is the key's signature over `wire/sign.py`'s bytes of all else.
    """

    role: Literal["node", "gateway"]
    public_key: PublicKey
    invite: Annotated[str, Meta(max_length=128)] = ""
    at_s: Annotated[int, Meta(ge=0, le=2**40)] = 0
    proof: Annotated[bytes, Meta(max_length=64)] = b""


class Enrolled(Message, frozen=True, kw_only=True, array_like=True, tag=21):
    """Hub to guest, node or gateway: your credential for the broker until `expires_at_s` (UTC), or why there is none.

    `membership` says so long that the key belongs to `org_id`, signed by `authority`, the key that all of this hub's members trust.
    `hub_org_id` is whose the hub is: gateways of that organisation speak for the callers of all.
    """

    credential: Annotated[str, Meta(max_length=CREDENTIAL_MAX)] = ""
    org_id: OrgId = OrgId("")
    expires_at_s: Annotated[int, Meta(ge=0, le=2**40)] = 0
    failure: Failure | None = None
    membership: Annotated[bytes, Meta(max_length=64)] = b""
    authority: Annotated[str, Meta(max_length=64)] = ""
    hub_org_id: OrgId = OrgId("")


class Renew(Message, frozen=True, kw_only=True, array_like=True, tag=22):
    """Node or gateway to hub: my next credential, please. The subject says who asks."""


KEYS_CHANGED_MAX = 1_024


class KeysChanged(Message, frozen=True, kw_only=True, array_like=True, tag=23):
    """Hub to gateways: forget what you know of the API keys with these SHA-256 digests; of all keys if `all_of_them`."""

    sequence: int
    key_digests: Annotated[tuple[bytes, ...], Meta(max_length=KEYS_CHANGED_MAX)] = ()
    all_of_them: bool = False


PUT_OUT_MAX = 1_024


class PutOut(Message, frozen=True, kw_only=True, array_like=True, tag=24):
    """Hub to gateways: these nodes were banned, and the broker has ended their connections. What they said no longer counts."""

    node_ids: Annotated[tuple[NodeId, ...], Meta(max_length=PUT_OUT_MAX)]


SPENT_KEYS_MAX = 256
"""About 150 bytes each at most: they fit into a message of the subject."""
SPENT_MICRO_MAX = 2**50
"""A thousand million credits. Some thousands of such amounts can still be added up in 64 bits."""


class KeySpent(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    """What the calls of an API key have cost, in micro-credits."""

    key_id: Annotated[KeyId, Meta(pattern=r"^[!-~]{1,128}\Z")]
    micro: Annotated[int, Meta(ge=0, le=SPENT_MICRO_MAX)]


class Spent(Message, frozen=True, kw_only=True, array_like=True, tag=25):
    """Gateway to hub: what keys with a budget have cost here in all since `since_ms` (UTC), when this process began.

    Saying it twice changes nothing, and what was said later holds whatever comes first.
    """

    gateway_id: GatewayId
    since_ms: Annotated[int, Meta(ge=0, le=2**53)]
    keys: Annotated[tuple[KeySpent, ...], Meta(max_length=SPENT_KEYS_MAX)]


class SpentAnswer(Message, frozen=True, kw_only=True, array_like=True, tag=26):
    """Hub to gateway: what each of these keys has cost on all gateways. Those that nobody knows are left out."""

    keys: Annotated[tuple[KeySpent, ...], Meta(max_length=SPENT_KEYS_MAX)]


SessionName = Annotated[bytes, Meta(min_length=16, max_length=16)]
Share = Annotated[bytes, Meta(min_length=32, max_length=32)]


class Hello(Message, frozen=True, kw_only=True, array_like=True, tag=28):
    """Gateway to node: let us open a session. `kid` names the node's KEM key, to which `box` is sealed.

    `membership` is the hub's word that the gateway is of `org_id`, as in a card; `signature` is the gateway's own.
    """

    gateway_id: GatewayId
    org_id: OrgId
    member_until_s: Annotated[int, Meta(ge=0, le=2**40)] = 0
    membership: Annotated[bytes, Meta(max_length=64)] = b""
    session: Annotated[bytes, Meta(max_length=16)] = b""
    kid: Annotated[bytes, Meta(max_length=8)] = b""
    box: Annotated[bytes, Meta(max_length=2_048)] = b""
    signature: Annotated[bytes, Meta(max_length=64)] = b""


class Welcome(Message, frozen=True, kw_only=True, array_like=True, tag=29):
    """Node to gateway: the session is open. `confirm` shows that the node could open the hello."""

    share: Share
    confirm: Share


class SealedRequest(Message, frozen=True, kw_only=True, array_like=True, tag=30):
    """Gateway to node: a `Request`, as the call with this number of a session."""

    session: SessionName
    number: Annotated[int, Meta(ge=0, le=2**32)]
    box: bytes


class Sealed(Message, frozen=True, kw_only=True, array_like=True, tag=31):
    """Either way, in an attempt: a `BodyPart`, `Part`, `Final` or `Alive`. `index` counts within a direction; the request is 0."""

    index: Annotated[int, Meta(ge=0, le=2**32)]
    box: bytes


class Unopened(Message, frozen=True, kw_only=True, array_like=True, tag=32):
    """Node to gateway: what you sent can't be opened. It is said in the open, so it proves nothing against anybody."""

    reason: UnopenedReason


class Lost(Message, frozen=True, kw_only=True, array_like=True, tag=33):
    """Node to gateway: I don't know the attempt that you asked for any more."""


ToNode = Cancel | Credit | Lease | Introduce | Ping | Hello
FromHub = Hold | Introduce | Ping
ToGateway = Accepted | Sealed | Alive | Credit | Welcome | Unopened | Lost
Inner = Part | Final | Alive
"""What a node seals."""
