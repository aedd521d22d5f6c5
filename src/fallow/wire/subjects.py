"""Every subject on the broker, in one table: who sends what to whom, and how large it may be. Permissions are made from it."""

import re
from typing import Literal

import msgspec

from fallow.model import messages as m
from fallow.model.errors import WireError
from fallow.model.ids import AttemptId, GatewayId, NodeId

Role = Literal["gateway", "node", "hub", "guest"]
"""Who is on the broker. A guest has no identity yet and may only ask the hub for one."""

PAYLOAD_BYTES_MAX = 256 * 1024
"""What the broker carries in one message."""
PART_BYTES_MAX = 192 * 1024
"""What we put into one; the rest is room for what goes with it, sealing and rounding up."""
_PLACE = re.compile(r"\{[a-z]+\}")


class Subject(msgspec.Struct, frozen=True, kw_only=True):
    """A row: `template` with a named place for each id, sender and receivers, and the messages it carries.

    A role's own place (`{node}` for a node) is its own id, and nobody else's. `is_asked`: the sender asks, and one receiver answers
    with the last of the messages.
    """

    template: str
    sender: Role
    receivers: tuple[Role, ...]
    carries: tuple[type[m.Message], ...]
    payload_bytes_max: int = PAYLOAD_BYTES_MAX
    is_asked: bool = False

    @property
    def pattern(self) -> str:
        """The subject with `*` for each id."""
        return _PLACE.sub("*", self.template)

    def of(self, role: Role, id: str) -> str:
        """The subject as far as `id` in `role` may use it: its own place is filled, each other is `*`."""
        return _PLACE.sub("*", self.template.replace(f"{{{role}}}", id))


REQUEST = Subject(template="n.{node}.req", sender="gateway", receivers=("node",), carries=(m.SealedRequest,))
BODY = Subject(template="n.{node}.body.{attempt}", sender="gateway", receivers=("node",), carries=(m.Sealed,))
CONTROL = Subject(
    template="n.{node}.ctl",
    sender="gateway",
    receivers=("node",),
    carries=(m.Cancel, m.Credit, m.Lease, m.Introduce, m.Ping, m.Hello),
    payload_bytes_max=64 * 1024,
)
ANSWER = Subject(
    template="rsp.{gateway}.{node}.{attempt}",
    sender="node",
    receivers=("gateway",),
    carries=(m.Accepted, m.Sealed, m.Alive, m.Credit, m.Welcome, m.Unopened, m.Lost),
)
HEARTBEAT = Subject(template="hb.{node}", sender="node", receivers=("gateway", "hub"), carries=(m.Heartbeat,), payload_bytes_max=64 * 1024)
KEY = Subject(
    template="hub.key.{gateway}",
    sender="gateway",
    receivers=("hub",),
    carries=(m.KeyQuery, m.KeyAnswer),
    payload_bytes_max=16 * 1024,
    is_asked=True,
)
SPENT = Subject(
    template="hub.spent.{gateway}",
    sender="gateway",
    receivers=("hub",),
    carries=(m.Spent, m.SpentAnswer),
    payload_bytes_max=64 * 1024,
    is_asked=True,
)
CHANGED = Subject(template="keys", sender="hub", receivers=("gateway",), carries=(m.KeysChanged,), payload_bytes_max=64 * 1024)
BANNED = Subject(template="banned", sender="hub", receivers=("gateway",), carries=(m.PutOut,), payload_bytes_max=128 * 1024)

HOLD = Subject(
    template="n.{node}.hub", sender="hub", receivers=("node",), carries=(m.Hold, m.Introduce, m.Ping), payload_bytes_max=16 * 1024
)
ECHO = Subject(template="hub.echo.{node}.{attempt}", sender="node", receivers=("hub",), carries=(m.Alive,), payload_bytes_max=1024)
DEMAND = Subject(template="hub.demand", sender="gateway", receivers=("hub",), carries=(m.Demand,), payload_bytes_max=64 * 1024)
INDEX = Subject(template="prices", sender="hub", receivers=("gateway", "node"), carries=(m.Index,))
HISTORY = Subject(template="hub.prices", sender="gateway", receivers=("hub",), carries=(m.HistoryQuery, m.HistoryAnswer), is_asked=True)

ENROL = Subject(
    template="hub.enrol", sender="guest", receivers=("hub",), carries=(m.Enrol, m.Enrolled), payload_bytes_max=8 * 1024, is_asked=True
)
RENEW_NODE = Subject(
    template="hub.node.{node}", sender="node", receivers=("hub",), carries=(m.Renew, m.Enrolled), payload_bytes_max=8 * 1024, is_asked=True
)
RENEW_GATEWAY = Subject(
    template="hub.gateway.{gateway}",
    sender="gateway",
    receivers=("hub",),
    carries=(m.Renew, m.Enrolled),
    payload_bytes_max=8 * 1024,
    is_asked=True,
)

TABLE = (
    REQUEST,
    BODY,
    CONTROL,
    ANSWER,
    HEARTBEAT,
    KEY,
    SPENT,
    CHANGED,
    BANNED,
    HOLD,
    ECHO,
    DEMAND,
    INDEX,
    HISTORY,
    ENROL,
    RENEW_NODE,
    RENEW_GATEWAY,
)

ECHO_PREFIX = "rtt-"
"""Ids of no attempt, by which a node is asked for an echo only, begin so."""
ID_MAX = 128
"""A subject of three ids stays far below the broker's control line."""
_FORBIDDEN = frozenset(". *>\t\r\n")


def token(text: str) -> str:
    """An id as a part of a subject; raises WireError if it could reach beyond its place."""
    if not 0 < len(text) <= ID_MAX or not text.isascii() or not text.isprintable() or _FORBIDDEN.intersection(text):
        raise WireError(f"an id in a subject must be printable ASCII without dots, spaces or wildcards, {ID_MAX} characters at most")
    return text


def request(node: NodeId) -> str:
    return f"n.{token(node)}.req"


def body(node: NodeId, attempt: AttemptId) -> str:
    return f"n.{token(node)}.body.{token(attempt)}"


def bodies(node: NodeId) -> str:
    return f"n.{token(node)}.body.*"


def control(node: NodeId) -> str:
    return f"n.{token(node)}.ctl"


def hold(node: NodeId) -> str:
    return f"n.{token(node)}.hub"


def answer(gateway: GatewayId, node: NodeId, attempt: AttemptId) -> str:
    return f"rsp.{token(gateway)}.{token(node)}.{token(attempt)}"


def echo(node: NodeId, attempt: AttemptId) -> str:
    return f"hub.echo.{token(node)}.{token(attempt)}"


def answers(gateway: GatewayId) -> str:
    return f"rsp.{token(gateway)}.*.*"


def heartbeat(node: NodeId) -> str:
    return f"hb.{token(node)}"


def key(gateway: GatewayId) -> str:
    """Where a gateway asks the hub whose an API key is."""
    return KEY.of("gateway", token(gateway))


def spent(gateway: GatewayId) -> str:
    """Where a gateway tells the hub what API keys have cost on it."""
    return SPENT.of("gateway", token(gateway))


def renewal(role: Role, id: str) -> str:
    """Where a node or a gateway asks the hub for its next credential."""
    row = RENEW_NODE if role == "node" else RENEW_GATEWAY
    return row.of(role, token(id))


HEARTBEATS = HEARTBEAT.pattern


def last_token(subject: str) -> str:
    """The id at a subject's end: the attempt of an answer, an echo or a body, the node of a heartbeat."""
    return subject[subject.rfind(".") + 1 :]


def answering_node(subject: str) -> str:
    """The node that the subject of an answer or an echo names."""
    parts = subject.split(".")
    return parts[2] if len(parts) == 4 else ""
