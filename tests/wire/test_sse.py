"""Server-sent events: the same ones however the bytes are cut, and none without a bound."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fallow.model.errors import WireError
from fallow.wire import sse
from fallow.wire.sse import DONE, EVENT_BYTES_MAX, EventCutter

PROMISE = settings(max_examples=60)
lines = st.binary(min_size=1, max_size=12).map(lambda raw: raw.replace(b"\n", b".").replace(b"\r", b","))
an_event = st.one_of(
    lines.map(sse.event),
    st.lists(lines, min_size=1, max_size=3).map(lambda several: b"\n".join(several) + b"\n\n"),
    st.sampled_from([DONE, b":\n\n", b": ping\n\n", b"data: \xc3\xa9\n\n"]),
)


def cut(data: bytes, places: list[int]) -> list[bytes]:
    """The bytes in pieces, some of them empty."""
    edges = [0, *sorted(place % (len(data) + 1) for place in places), len(data)]
    return [data[start:end] for start, end in itertools.pairwise(edges)]


@PROMISE
@given(st.lists(st.tuples(an_event, st.booleans()), max_size=8), lines | st.just(b""), st.lists(st.integers(0, 10**6), max_size=12))
def test_events_are_the_same_however_they_are_cut(events: list[tuple[bytes, bool]], rest: bytes, places: list[int]) -> None:
    """And however their lines end: some servers write CR LF."""
    data = b"".join([event.replace(b"\n", b"\r\n") if windows else event for event, windows in events]) + rest
    cutter = EventCutter()
    found = [event for piece in cut(data, places) for event in cutter.feed(piece)]
    assert found == [event for event, _ in events]
    assert cutter.feed(b"\n\n") == [rest + b"\n\n"]  # what was left over waited for its end


def test_events_come_byte_by_byte() -> None:
    cutter = EventCutter()
    data = sse.event(b'{"a":1}') + DONE
    assert [event for at in range(len(data)) for event in cutter.feed(data[at : at + 1])] == [sse.event(b'{"a":1}'), DONE]


@pytest.mark.parametrize(
    ("data", "events"),
    [
        (b"", []),
        (b"data: a", []),
        (b"data: a\n", []),
        (b"data: a\n\n", [b"data: a\n\n"]),
        (b"data: a\n\n\n", [b"data: a\n\n"]),
        (b"\n\n\n\n", [b"\n\n", b"\n\n"]),
        (b"data: a\ndata: b\n\ndata: c", [b"data: a\ndata: b\n\n"]),
        (b"data: a\r\n\r\ndata: b\r\n\n", [b"data: a\n\n", b"data: b\n\n"]),
        (b"data: a\rb\n\n", [b"data: a\rb\n\n"]),
    ],
)
def test_feed(data: bytes, events: list[bytes]) -> None:
    assert EventCutter().feed(data) == events


@pytest.mark.parametrize(
    ("event", "payload"),
    [
        (b'data: {"a":1}\n\n', b'{"a":1}'),
        (b"data: \n\n", b""),
        (b'data:{"a":1}\n\n', b'{"a":1}'),
        (b'data:  {"a":1} \n\n', b'{"a":1}'),
        (DONE, b"[DONE]"),
        (b":\n\n", b""),
        (b": data: x\n\n", b""),
        (b"event: data: x\n\n", b""),
        (b"\n\n", b""),
    ],
)
def test_payload(event: bytes, payload: bytes) -> None:
    assert sse.payload(event) == payload


@PROMISE
@given(lines)
def test_an_event_keeps_its_payload(line: bytes) -> None:
    event = sse.event(line)
    assert EventCutter().feed(event) == [event]
    for raw, escaped in sse._LINE_ENDS:
        line = line.replace(raw, escaped)
    assert sse.payload(event) == line.strip()


def test_an_event_that_grows_too_large_is_refused() -> None:
    cutter = EventCutter()
    cutter.feed(bytes(EVENT_BYTES_MAX))
    with pytest.raises(WireError, match=str(EVENT_BYTES_MAX)):
        cutter.feed(b"x")


def test_many_events_may_be_larger_together() -> None:
    event = sse.event(bytes(EVENT_BYTES_MAX // 3))
    cutter = EventCutter()
    assert cutter.feed(event * 4 + b"data") == [event] * 4


def test_an_event_too_large_is_refused_however_it_is_cut() -> None:
    with pytest.raises(WireError):
        EventCutter().feed(sse.event(bytes(EVENT_BYTES_MAX + 1)))
