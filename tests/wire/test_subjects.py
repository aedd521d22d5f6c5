"""The table of subjects: complete, without doubles, and no id can reach beyond its own place."""

from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fallow.model import messages as m
from fallow.model.errors import WireError
from fallow.model.ids import AttemptId, GatewayId, NodeId
from fallow.wire import subjects
from fallow.wire.subjects import ID_MAX, PART_BYTES_MAX, PAYLOAD_BYTES_MAX, TABLE, Subject, token

PROMISE = settings(max_examples=80)
NODE, GATEWAY, ATTEMPT = NodeId("node-1"), GatewayId("gw-1"), AttemptId("0af3")
KINDS: list[type[m.Message]] = m.Message.__subclasses__()
SEALED: set[type[m.Message]] = {m.Request, m.BodyPart, m.Part, m.Final}
"""What tells of a call: no subject carries it in the open."""
printable = st.text(st.characters(min_codepoint=0x21, max_codepoint=0x7E, exclude_characters=".*>"), min_size=1, max_size=20)


def matches(pattern: str, subject: str) -> bool:
    """The broker's rule: `*` is one token, `>` at the end is one or more."""
    wanted, there = pattern.split("."), subject.split(".")
    if wanted[-1] == ">":
        return len(there) >= len(wanted) and matches(".".join(wanted[:-1]), ".".join(there[: len(wanted) - 1]))
    return len(wanted) == len(there) and all(w in ("*", t) and t for w, t in zip(wanted, there, strict=True))


@pytest.mark.parametrize(
    ("built", "row", "text"),
    [
        (subjects.request(NODE), subjects.REQUEST, "n.node-1.req"),
        (subjects.body(NODE, ATTEMPT), subjects.BODY, "n.node-1.body.0af3"),
        (subjects.control(NODE), subjects.CONTROL, "n.node-1.ctl"),
        (subjects.answer(GATEWAY, NODE, ATTEMPT), subjects.ANSWER, "rsp.gw-1.node-1.0af3"),
        (subjects.heartbeat(NODE), subjects.HEARTBEAT, "hb.node-1"),
        (subjects.key(GATEWAY), subjects.KEY, "hub.key.gw-1"),
        (subjects.spent(GATEWAY), subjects.SPENT, "hub.spent.gw-1"),
        (subjects.hold(NODE), subjects.HOLD, "n.node-1.hub"),
        (subjects.echo(NODE, ATTEMPT), subjects.ECHO, "hub.echo.node-1.0af3"),
        (subjects.DEMAND.pattern, subjects.DEMAND, "hub.demand"),
        (subjects.INDEX.pattern, subjects.INDEX, "prices"),
        (subjects.HISTORY.pattern, subjects.HISTORY, "hub.prices"),
        (subjects.CHANGED.pattern, subjects.CHANGED, "keys"),
        (subjects.BANNED.pattern, subjects.BANNED, "banned"),
        (subjects.ENROL.pattern, subjects.ENROL, "hub.enrol"),
        (subjects.renewal("node", NODE), subjects.RENEW_NODE, "hub.node.node-1"),
        (subjects.renewal("gateway", GATEWAY), subjects.RENEW_GATEWAY, "hub.gateway.gw-1"),
    ],
)
def test_a_built_subject_fits_its_row_and_no_other(built: str, row: Subject, text: str) -> None:
    assert built == text
    assert [one for one in TABLE if matches(one.pattern, built)] == [row]


@pytest.mark.parametrize(
    ("subscribed", "heard", "not_heard"),
    [
        (subjects.bodies(NODE), subjects.body(NODE, ATTEMPT), subjects.body(NodeId("node-2"), ATTEMPT)),
        (subjects.answers(GATEWAY), subjects.answer(GATEWAY, NODE, ATTEMPT), subjects.answer(GatewayId("gw-2"), NODE, ATTEMPT)),
        (subjects.HEARTBEATS, subjects.heartbeat(NODE), subjects.control(NODE)),
        (subjects.request(NODE), subjects.request(NODE), subjects.request(NodeId("node-2"))),
        (subjects.control(NODE), subjects.control(NODE), subjects.control(NodeId("node-2"))),
    ],
)
def test_a_subscription_hears_its_own(subscribed: str, heard: str, not_heard: str) -> None:
    assert matches(subscribed, heard)
    assert not matches(subscribed, not_heard)


def test_the_table_is_complete_and_without_doubles() -> None:
    patterns = [row.pattern for row in TABLE]
    assert len(set(patterns)) == len(patterns)
    assert {kind for row in TABLE for kind in row.carries} == set(KINDS) - SEALED
    assert set(TABLE) == {one for one in vars(subjects).values() if isinstance(one, Subject)}


def test_who_may_say_what_to_whom() -> None:
    """The broker's permissions come from this: what changes here changes what a stranger may do."""
    assert {row.pattern: (row.sender, row.receivers, row.carries) for row in TABLE} == {
        "n.*.req": ("gateway", ("node",), (m.SealedRequest,)),
        "n.*.body.*": ("gateway", ("node",), (m.Sealed,)),
        "n.*.ctl": ("gateway", ("node",), (m.Cancel, m.Credit, m.Lease, m.Introduce, m.Ping, m.Hello)),
        "rsp.*.*.*": ("node", ("gateway",), (m.Accepted, m.Sealed, m.Alive, m.Credit, m.Welcome, m.Unopened, m.Lost)),
        "hb.*": ("node", ("gateway", "hub"), (m.Heartbeat,)),
        "hub.key.*": ("gateway", ("hub",), (m.KeyQuery, m.KeyAnswer)),
        "hub.spent.*": ("gateway", ("hub",), (m.Spent, m.SpentAnswer)),
        "keys": ("hub", ("gateway",), (m.KeysChanged,)),
        "banned": ("hub", ("gateway",), (m.PutOut,)),
        "n.*.hub": ("hub", ("node",), (m.Hold, m.Introduce, m.Ping)),
        "hub.echo.*.*": ("node", ("hub",), (m.Alive,)),
        "hub.demand": ("gateway", ("hub",), (m.Demand,)),
        "prices": ("hub", ("gateway", "node"), (m.Index,)),
        "hub.prices": ("gateway", ("hub",), (m.HistoryQuery, m.HistoryAnswer)),
        "hub.enrol": ("guest", ("hub",), (m.Enrol, m.Enrolled)),
        "hub.node.*": ("node", ("hub",), (m.Renew, m.Enrolled)),
        "hub.gateway.*": ("gateway", ("hub",), (m.Renew, m.Enrolled)),
    }


@pytest.mark.parametrize("row", TABLE, ids=[row.pattern for row in TABLE])
def test_a_row_makes_sense(row: Subject) -> None:
    assert row.carries
    assert len(set(row.carries)) == len(row.carries)
    assert row.receivers
    assert row.sender not in row.receivers
    assert 0 < row.payload_bytes_max <= PAYLOAD_BYTES_MAX
    if m.Sealed in row.carries or m.SealedRequest in row.carries:
        assert row.payload_bytes_max > PART_BYTES_MAX


def test_tags_are_not_used_twice() -> None:
    tags = [kind.__struct_config__.tag for kind in KINDS]
    assert len(set(tags)) == len(tags)
    assert all(isinstance(tag, int) for tag in tags)


BAD = [
    "", ".", "a.b", ".a", "a.", "*", "a*", ">", "a>", " ", "a b", "\t", "a\tb", "\n", "a\n", "\r", "a\r\nPUB b 1", "\x00", "a\x7f", "\x1b",
    "ü", "Ａ", "日本", "a\u200bb", "\u2028", "\ud800",
]  # fmt: skip


@pytest.mark.parametrize("text", BAD, ids=ascii)
def test_bad_ids_are_refused_by_every_builder(text: str) -> None:
    node, gateway, attempt = NodeId(text), GatewayId(text), AttemptId(text)
    builders: list[Callable[[], str]] = [
        lambda: token(text),
        lambda: subjects.request(node),
        lambda: subjects.body(node, ATTEMPT),
        lambda: subjects.body(NODE, attempt),
        lambda: subjects.bodies(node),
        lambda: subjects.control(node),
        lambda: subjects.answer(gateway, NODE, ATTEMPT),
        lambda: subjects.answer(GATEWAY, node, ATTEMPT),
        lambda: subjects.answer(GATEWAY, NODE, attempt),
        lambda: subjects.echo(node, ATTEMPT),
        lambda: subjects.echo(NODE, attempt),
        lambda: subjects.answers(gateway),
        lambda: subjects.heartbeat(node),
        lambda: subjects.spent(gateway),
    ]
    for build in builders:
        with pytest.raises(WireError):
            build()


@pytest.mark.parametrize("text", ["a", "0", "node-1", "UPPER_lower", "a:b/c@d", "~!#$%&'()+,;<=?[]^`{|}", "-"])
def test_other_printable_ascii_is_taken(text: str) -> None:
    assert token(text) == text


@PROMISE
@given(st.text(max_size=8))
def test_a_token_stays_in_its_place_or_is_refused(text: str) -> None:
    try:
        taken = token(text)
    except WireError:
        assert not text or not all("!" <= char <= "~" and char not in ".*>" for char in text)
    else:
        assert taken == text
        assert all("!" <= char <= "~" and char not in ".*>" for char in text)


@PROMISE
@given(printable, printable, printable)
def test_what_is_built_can_be_taken_apart(gateway: str, node: str, attempt: str) -> None:
    answer = subjects.answer(GatewayId(gateway), NodeId(node), AttemptId(attempt))
    assert subjects.last_token(answer) == attempt
    assert subjects.answering_node(answer) == node
    assert matches(subjects.answers(GatewayId(gateway)), answer)
    echo = subjects.echo(NodeId(node), AttemptId(attempt))
    assert (subjects.answering_node(echo), subjects.last_token(echo)) == (node, attempt)
    assert subjects.last_token(subjects.body(NodeId(node), AttemptId(attempt))) == attempt
    assert subjects.last_token(subjects.heartbeat(NodeId(node))) == node


@pytest.mark.parametrize("subject", ["", "rsp", "rsp.gw.node", "rsp.gw.node.attempt.more", "hb.node"])
def test_only_an_answer_names_an_answering_node(subject: str) -> None:
    assert subjects.answering_node(subject) == ""


@pytest.mark.parametrize("size", [1, ID_MAX, ID_MAX + 1, 5_000])
def test_an_id_too_long_for_the_broker_is_refused(size: int) -> None:
    attempt = AttemptId("a" * size)
    if size <= ID_MAX:
        assert subjects.answer(GATEWAY, NODE, attempt) == f"rsp.gw-1.node-1.{attempt}"
        return
    with pytest.raises(WireError):
        subjects.answer(GATEWAY, NODE, attempt)


def test_two_subjects_fit_into_the_brokers_control_line() -> None:
    longest = subjects.answer(GatewayId("g" * ID_MAX), NodeId("n" * ID_MAX), AttemptId("a" * ID_MAX))
    assert 2 * len(longest) + 64 < 4 * 1024  # a subject, a reply subject, and the sizes
