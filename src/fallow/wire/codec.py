"""Messages to bytes and back: one byte of major version, then MessagePack."""

from typing import Generic, TypeVar

import msgspec

from fallow.core.roster import is_consistent
from fallow.model import messages as m
from fallow.model.errors import Failure, WireError
from fallow.wire import subjects
from fallow.wire.subjects import PAYLOAD_BYTES_MAX

MAJOR = 2
"""Version 1 didn't seal: nothing of it is understood any more, and who speaks it is told so."""
UNSEALED_MAJOR = 1
_UNSEALED_FINAL = 9
_PREFIX = bytes([MAJOR])

T = TypeVar("T")

_encoder = msgspec.msgpack.Encoder()


def encode(message: m.Message) -> bytes:
    """The bytes as they are sent; raises WireError if the broker wouldn't carry them."""
    data = _PREFIX + _encoder.encode(message)
    if len(data) > PAYLOAD_BYTES_MAX:
        raise WireError(f"a message of {len(data)} bytes is over the broker's {PAYLOAD_BYTES_MAX}")
    return data


def unsealed_refusal(failure: Failure) -> bytes:
    """A refusal of a request as gateways of version 1 read it, in the open."""
    return bytes([UNSEALED_MAJOR]) + _encoder.encode([_UNSEALED_FINAL, 0, b"", None, None, failure])


class Reader(Generic[T]):
    """Reads the messages of one subject."""

    def __init__(self, kind: type[T], subject: subjects.Subject) -> None:
        self._decoder = msgspec.msgpack.Decoder(kind)
        self._bytes_max = subject.payload_bytes_max

    def read(self, data: bytes) -> T:
        """The message; raises WireError for another major version or anything that isn't what the subject carries."""
        if len(data) > self._bytes_max:
            raise WireError(f"a message of {len(data)} bytes is over the subject's {self._bytes_max}")
        if not data or data[0] != MAJOR:
            spoken = data[0] if data else "nothing"
            raise WireError(f"the message speaks version {spoken}, this side version {MAJOR}; update the older one")
        try:
            return self._decoder.decode(memoryview(data)[1:])
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise WireError(f"malformed message: {error}") from None


# A union type isn't a `type[...]` to the checker, though msgspec takes it.
to_node: Reader[m.ToNode] = Reader(m.ToNode, subjects.CONTROL)  # type: ignore[arg-type]
to_gateway: Reader[m.ToGateway] = Reader(m.ToGateway, subjects.ANSWER)  # type: ignore[arg-type]
sealed_request = Reader(m.SealedRequest, subjects.REQUEST)
sealed_body = Reader(m.Sealed, subjects.BODY)
heartbeat = Reader(m.Heartbeat, subjects.HEARTBEAT)
key_query = Reader(m.KeyQuery, subjects.KEY)
key_answer = Reader(m.KeyAnswer, subjects.KEY)
spent = Reader(m.Spent, subjects.SPENT)
spent_answer = Reader(m.SpentAnswer, subjects.SPENT)
from_hub: Reader[m.FromHub] = Reader(m.FromHub, subjects.HOLD)  # type: ignore[arg-type]
echo = Reader(m.Alive, subjects.ECHO)
keys_changed = Reader(m.KeysChanged, subjects.CHANGED)
put_out = Reader(m.PutOut, subjects.BANNED)
request = Reader(m.Request, subjects.REQUEST)
body_part = Reader(m.BodyPart, subjects.BODY)
inner: Reader[m.Inner] = Reader(m.Inner, subjects.ANSWER)  # type: ignore[arg-type]
"""These three are what was sealed."""
enrol = Reader(m.Enrol, subjects.ENROL)
enrolled = Reader(m.Enrolled, subjects.ENROL)
renew = Reader(m.Renew, subjects.RENEW_NODE)
demand = Reader(m.Demand, subjects.DEMAND)
index = Reader(m.Index, subjects.INDEX)
history_query = Reader(m.HistoryQuery, subjects.HISTORY)
history_answer = Reader(m.HistoryAnswer, subjects.HISTORY)


def read_spent(data: bytes, subject: str) -> m.Spent:
    """What a gateway says that keys have cost; raises WireError also if it speaks for another gateway than its subject."""
    told = spent.read(data)
    if told.gateway_id != subjects.last_token(subject):
        raise WireError("it names another gateway than its subject")
    return told


def read_heartbeat(data: bytes, subject: str) -> m.Heartbeat:
    """A node's heartbeat; raises WireError also if it speaks for another node than its subject."""
    beat = heartbeat.read(data)
    subjects.token(beat.node_id)
    if beat.node_id != subjects.last_token(subject) or not is_consistent(beat):
        raise WireError("it names another node than its subject")
    return beat
