"""Every subject on the broker, in one table: who sends what to whom, and how large it may be."""

from typing import Literal

import msgspec

from fallow.model import messages as m
from fallow.model.errors import WireError
from fallow.model.ids import AttemptId, GatewayId, NodeId

Role = Literal["gateway", "node", "hub"]

PAYLOAD_BYTES_MAX = 256 * 1024
"""What the broker carries in one message."""
PART_BYTES_MAX = 192 * 1024
"""What we put into one; the rest is room for the envelope, a seal and a signature."""


class Subject(msgspec.Struct, frozen=True, kw_only=True):
    """A row: `pattern` with `*` for each id, sender and receivers, and the messages it carries."""

    pattern: str
    sender: Role
    receivers: tuple[Role, ...]
    carries: tuple[type[m.Message], ...]
    payload_bytes_max: int = PAYLOAD_BYTES_MAX


REQUEST = Subject(pattern="n.*.req", sender="gateway", receivers=("node",), carries=(m.Request,))
BODY = Subject(pattern="n.*.body.*", sender="gateway", receivers=("node",), carries=(m.BodyPart,))
CONTROL = Subject(
    pattern="n.*.ctl",
    sender="gateway",
    receivers=("node",),
    carries=(m.Cancel, m.Credit, m.Lease, m.Introduce, m.Ping),
    payload_bytes_max=64 * 1024,
)
ANSWER = Subject(pattern="rsp.*.*.*", sender="node", receivers=("gateway",), carries=(m.Accepted, m.Part, m.Final, m.Alive, m.Credit))
HEARTBEAT = Subject(pattern="hb.*", sender="node", receivers=("gateway", "hub"), carries=(m.Heartbeat,), payload_bytes_max=64 * 1024)
KEY = Subject(pattern="hub.key", sender="gateway", receivers=("hub",), carries=(m.KeyQuery, m.KeyAnswer), payload_bytes_max=4 * 1024)

HOLD = Subject(pattern="n.*.hold", sender="hub", receivers=("node",), carries=(m.Hold,), payload_bytes_max=16 * 1024)
DEMAND = Subject(pattern="hub.demand", sender="gateway", receivers=("hub",), carries=(m.Demand,), payload_bytes_max=64 * 1024)
INDEX = Subject(pattern="prices", sender="hub", receivers=("gateway", "node"), carries=(m.Index,))
HISTORY = Subject(pattern="hub.prices", sender="gateway", receivers=("hub",), carries=(m.HistoryQuery, m.HistoryAnswer))

TABLE = (REQUEST, BODY, CONTROL, ANSWER, HEARTBEAT, KEY, HOLD, DEMAND, INDEX, HISTORY)

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
    return f"n.{token(node)}.hold"


def answer(gateway: GatewayId, node: NodeId, attempt: AttemptId) -> str:
    return f"rsp.{token(gateway)}.{token(node)}.{token(attempt)}"


def answers(gateway: GatewayId) -> str:
    return f"rsp.{token(gateway)}.>"


def heartbeat(node: NodeId) -> str:
    return f"hb.{token(node)}"


HEARTBEATS = HEARTBEAT.pattern


def last_token(subject: str) -> str:
    """The id at a subject's end: the attempt of an answer or a body, the node of a heartbeat."""
    return subject[subject.rfind(".") + 1 :]


def answering_node(subject: str) -> str:
    """The node that an answer's subject names."""
    parts = subject.split(".")
    return parts[2] if len(parts) == 4 else ""
