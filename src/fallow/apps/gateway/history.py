"""What happened to calls: told as it happens, packed small when a call is over, forgotten after an hour."""

from collections import deque
from datetime import UTC, datetime
from time import perf_counter_ns

import msgspec

from fallow.model.errors import shortened
from fallow.model.ids import CallId, NodeId, OrgId
from fallow.model.receipt import Usage
from fallow.model.views import AttemptView, CallState, CallView
from fallow.ports import Clock

ENDED_MAX = 8_192
"""Calls that are over and not yet forgotten; about 350 bytes each."""
KEPT_MS = 60 * 60_000
MODEL_CHARS_MAX = 64
"""A model's name is the caller's text until somebody offers it."""


class Try(msgspec.Struct, array_like=True, gc=False):
    """One node that was tried; `us` is None until it is over."""

    node_id: NodeId
    hardware: str
    began_us: int
    code: str | None = None
    us: int | None = None


class Story(msgspec.Struct, array_like=True, gc=False, kw_only=True):
    """A call from its arrival on. It becomes bytes when the call is over, so nothing in it may refer back to it."""

    org_id: OrgId
    path: str
    model: str | None = None
    arrived_at_ms: int
    began_ns: int
    state: CallState = "running"
    http_status: int | None = None
    code: str | None = None
    first_byte_us: int | None = None
    total_us: int | None = None
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    output_tokens: int | None = None
    ended_at_ms: int = 0
    tries: list[Try] = []

    def names(self, model: str) -> None:
        """What the call asks for."""
        self.model = shortened(model, MODEL_CHARS_MAX)

    def trying(self, node_id: NodeId, hardware: str) -> None:
        """The call is sent there."""
        self.tries.append(Try(node_id, hardware, self._us()))

    def tried(self, code: str | None) -> None:
        """That attempt is over; `code` says why it came to nothing."""
        last = self.tries[-1]
        last.code = code
        last.us = self._us() - last.began_us

    def first_byte(self) -> None:
        """The answer begins."""
        self.first_byte_us = self._us()

    def ends(self, *, http_status: int, left: bool, usage: Usage | None, now_ms: int) -> None:
        """The call is over."""
        self.state = "caller_left" if left else "failed" if self.code is not None else "done"
        self.http_status = http_status or None
        self.total_us = self._us()
        self.ended_at_ms = now_ms
        if usage is not None:
            self.prompt_tokens, self.cached_tokens, self.output_tokens = usage.prompt_tokens, usage.cached_tokens, usage.output_tokens

    def _us(self) -> int:
        return (perf_counter_ns() - self.began_ns) // 1000


_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(Story).decode


class History:
    """The stories of this gateway's calls."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._running: dict[str, Story] = {}
        self._ended: dict[str, bytes] = {}
        self._order: deque[str] = deque()

    def begin(self, call_id: CallId, org_id: OrgId, path: str, *, began_ns: int) -> Story:
        """A call of an organisation has come; the story is the caller's to tell."""
        story = Story(org_id=org_id, path=path, arrived_at_ms=self._clock.wall_ms(), began_ns=began_ns)
        self._running[call_id] = story
        return story

    def end(self, call_id: CallId, *, http_status: int, left: bool, usage: Usage | None) -> None:
        """The call is over."""
        story = self._running.pop(call_id)
        story.ends(http_status=http_status, left=left, usage=usage, now_ms=self._clock.now_ms())
        self._ended[call_id] = _encode(story)
        self._order.append(call_id)
        if len(self._order) > ENDED_MAX:
            del self._ended[self._order.popleft()]

    def forget_old(self) -> None:
        """Drop what has been over for an hour."""
        now = self._clock.now_ms()
        while self._order and now - _decode(self._ended[self._order[0]]).ended_at_ms > KEPT_MS:
            del self._ended[self._order.popleft()]

    def view(self, call_id: str, org_id: OrgId) -> CallView | None:
        """The call as its own organisation may see it; None for any other, and if nothing is known."""
        story = self._running.get(call_id)
        if story is None:
            packed = self._ended.get(call_id)
            story = None if packed is None else _decode(packed)
        if story is None or story.org_id != org_id:
            return None
        if story.state != "running" and self._clock.now_ms() - story.ended_at_ms > KEPT_MS:
            return None
        return _view(CallId(call_id), story)


def _view(call_id: CallId, story: Story) -> CallView:
    return CallView(
        id=call_id,
        path=story.path,
        model=story.model,
        status=story.state,
        http_status=story.http_status,
        code=story.code,
        arrived_at=datetime.fromtimestamp(story.arrived_at_ms / 1000, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z"),
        first_byte_ms=_ms(story.first_byte_us),
        total_ms=_ms(story.total_us),
        prompt_tokens=story.prompt_tokens,
        cached_tokens=story.cached_tokens,
        output_tokens=story.output_tokens,
        attempts=[AttemptView(node=one.node_id, hardware=one.hardware, code=one.code, ms=_ms(one.us)) for one in story.tries],
    )


def _ms(us: int | None) -> float | None:
    return None if us is None else us / 1000
