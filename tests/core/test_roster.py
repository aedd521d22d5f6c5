"""What a gateway believes of a node: beats out of order, changed cards, silence and farewells."""

from typing import Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from fallow.core.roster import (
    BEAT_MS,
    BEATS_MISSED_MAX,
    GONE_AFTER_MS,
    SUSPECTED_AFTER_MS,
    Member,
    Stage,
    doubt,
    hear,
    is_consistent,
    is_gone,
    is_stranger,
    load_of,
    stage,
    suspects,
)
from fallow.model.card import Card, Hardware
from fallow.model.ids import NodeId, OrgId
from fallow.model.messages import Heartbeat, KemKey, NodeState
from fallow.model.offer import Load, Offer, Price, Speed

PROMISE = settings(max_examples=60)
NODE = NodeId("node-a")


def card(sequence: int = 1) -> Card:
    return Card(
        node_id=NODE,
        org_id=OrgId("home"),
        sequence=sequence,
        expires_at_ms=10**9,
        hardware=Hardware(kind="cpu", isa="x86_64-avx2", cores=4, memory_bytes=2**33),
        isolation="none",
        region="eu-de",
        serves=frozenset({"own", "partner"}),
    )


def offer(model: str = "tiny", node_id: NodeId = NODE) -> Offer:
    return Offer(
        node_id=node_id,
        model=model,
        paths=frozenset({"/v1/chat/completions"}),
        context_tokens=2048,
        model_digest="",
        speed=Speed(),
        price=Price(),
        slots=2,
        expires_at_ms=10**9,
    )


def kem(byte: int) -> KemKey:
    return KemKey(suite="x25519", public_key=bytes([byte]) * 32, expires_at_s=9)


def load(model: str = "tiny", waiting: int = 0) -> Load:
    return Load(model=model, readiness="ready", slots_free=2, waiting=waiting, waiting_max=4)


def beat(
    sequence: int,
    *,
    card_sequence: int = 1,
    full: Card | None = None,
    offers: tuple[Offer, ...] | None = None,
    state: NodeState = "run",
    loads: tuple[Load, ...] = (),
    kem: KemKey | None = None,
) -> Heartbeat:
    return Heartbeat(
        node_id=NODE, sequence=sequence, state=state, card_sequence=card_sequence, loads=loads, card=full, offers=offers, kem=kem
    )


KNOWN = Member(sequence=10, heard_at_ms=1_000, state="run", card=card(1), offers=(offer(),), loads=(load(),))


@pytest.mark.parametrize(
    ("member", "heard", "then"),
    [
        pytest.param(None, beat(1), Member(sequence=1, heard_at_ms=5_000, state="run"), id="a newcomer without its card"),
        pytest.param(
            None,
            beat(1, full=card(1), offers=(offer(),), loads=(load(),)),
            Member(sequence=1, heard_at_ms=5_000, state="run", card=card(1), offers=(offer(),), loads=(load(),)),
            id="a newcomer with everything",
        ),
        pytest.param(
            KNOWN,
            beat(11, loads=(load(waiting=3),)),
            Member(sequence=11, heard_at_ms=5_000, state="run", card=card(1), offers=(offer(),), loads=(load(waiting=3),)),
            id="a short beat renews the load and keeps card and offers",
        ),
        pytest.param(
            KNOWN,
            beat(11, card_sequence=2, loads=(load(),)),
            Member(sequence=11, heard_at_ms=5_000, state="run", loads=(load(),)),
            id="another card that we did not get",
        ),
        pytest.param(
            KNOWN,
            beat(11, card_sequence=2, full=card(2), offers=(offer("big"),)),
            Member(sequence=11, heard_at_ms=5_000, state="run", card=card(2), offers=(offer("big"),)),
            id="another card that came along",
        ),
        pytest.param(
            KNOWN,
            beat(11, full=card(1)),
            Member(sequence=11, heard_at_ms=5_000, state="run", card=card(1)),
            id="a card without offers withdraws them",
        ),
        pytest.param(
            KNOWN,
            beat(11, card_sequence=3, full=card(2), offers=(offer(),)),
            Member(sequence=11, heard_at_ms=5_000, state="run"),
            id="a card that isn't the one the beat names",
        ),
        pytest.param(
            KNOWN,
            beat(500, state="pause"),
            Member(sequence=500, heard_at_ms=5_000, state="pause", card=card(1), offers=(offer(),)),
            id="a gap in the sequence does no harm",
        ),
    ],
)
def test_hear(member: Member | None, heard: Heartbeat, then: Member) -> None:
    assert hear(member, heard, now_ms=5_000) == then


@pytest.mark.parametrize(
    ("heard", "then"),
    [
        (beat(11), kem(1)),
        (beat(11, kem=kem(2)), kem(2)),
        (beat(11, card_sequence=2), kem(1)),  # its card is gone until it comes; calls that are under way are still sealed to it
        (beat(11, full=card(2), card_sequence=2, offers=(offer(),), kem=kem(2)), kem(2)),
        (beat(10, kem=kem(2)), kem(1)),
    ],
    ids=["none came along", "another", "another card that we did not get", "another with its card", "late"],
)
def test_the_key_to_which_calls_are_sealed_is_the_one_said_last(heard: Heartbeat, then: KemKey) -> None:
    assert hear(replace(KNOWN, kem=kem(1)), heard, now_ms=5_000).kem == then
    first = hear(None, heard, now_ms=5_000)
    assert first.kem == heard.kem


@pytest.mark.parametrize("sequence", [0, 9, 10])
def test_older_beats_change_nothing(sequence: int) -> None:
    late = beat(sequence, card_sequence=9, state="leave", full=card(9), offers=())
    assert hear(KNOWN, late, now_ms=9_000) is KNOWN


@PROMISE
@given(st.lists(st.tuples(st.integers(0, 20), st.sampled_from(["run", "throttle", "pause", "leave"])), min_size=1, max_size=20))
def test_what_counts_is_the_first_hearing_of_the_newest_beat(beats: list[tuple[int, Literal["run", "throttle", "pause", "leave"]]]) -> None:
    member = None
    for at, (sequence, state) in enumerate(beats):
        member = hear(member, beat(sequence, state=state), now_ms=at)
    newest = max(sequence for sequence, _ in beats)
    first = next(at for at, (sequence, _) in enumerate(beats) if sequence == newest)
    assert member is not None
    assert (member.sequence, member.heard_at_ms, member.state) == (newest, first, beats[first][1])


def test_a_stranger_becomes_known_by_its_card() -> None:
    stranger = hear(KNOWN, beat(11, card_sequence=2), now_ms=0)
    assert is_stranger(stranger)
    assert stranger.offers == ()
    known = hear(stranger, beat(12, card_sequence=2, full=card(2), offers=(offer(),)), now_ms=1)
    assert not is_stranger(known)
    assert known.offers == (offer(),)


@pytest.mark.parametrize(
    ("state", "silent_ms", "gone"),
    [
        ("run", 0, False),
        ("run", BEATS_MISSED_MAX * BEAT_MS, False),  # the third one is only late
        ("run", GONE_AFTER_MS, False),
        ("run", GONE_AFTER_MS + 1, True),
        ("throttle", GONE_AFTER_MS + 1, True),
        ("pause", GONE_AFTER_MS, False),
        ("pause", GONE_AFTER_MS + 1, True),
        ("leave", 0, True),
    ],
)
def test_is_gone(state: NodeState, silent_ms: int, gone: bool) -> None:
    member = Member(sequence=1, heard_at_ms=77, state=state)
    assert is_gone(member, now_ms=77 + silent_ms) is gone


@pytest.mark.parametrize(
    ("state", "silent_ms", "doubted", "found"),
    [
        ("run", 0, False, "here"),
        ("run", BEAT_MS, False, "here"),
        ("run", SUSPECTED_AFTER_MS, False, "here"),  # one beat missed, and the next isn't even late
        ("run", SUSPECTED_AFTER_MS + 1, False, "suspected"),
        ("pause", SUSPECTED_AFTER_MS + 1, False, "suspected"),
        ("run", GONE_AFTER_MS, False, "suspected"),
        ("run", GONE_AFTER_MS + 1, False, "gone"),
        ("run", 0, True, "suspected"),
        ("run", GONE_AFTER_MS, True, "suspected"),
        ("run", GONE_AFTER_MS + 1, True, "gone"),
        ("leave", 0, False, "gone"),
        ("leave", 0, True, "gone"),
    ],
)
def test_stage(state: NodeState, silent_ms: int, doubted: bool, found: Stage) -> None:
    member = Member(sequence=1, heard_at_ms=77, state=state, doubted=doubted)
    assert stage(member, now_ms=77 + silent_ms) == found


def test_between_the_first_missed_beat_and_the_last_there_is_time() -> None:
    assert BEAT_MS < SUSPECTED_AFTER_MS < 2 * BEAT_MS < GONE_AFTER_MS


def test_only_a_newer_heartbeat_ends_a_doubt() -> None:
    doubted = doubt(KNOWN)
    assert stage(doubted, now_ms=1_000) == "suspected"
    assert (doubted.card, doubted.offers, doubted.heard_at_ms) == (KNOWN.card, KNOWN.offers, KNOWN.heard_at_ms)
    assert stage(hear(doubted, beat(10), now_ms=1_001), now_ms=1_001) == "suspected"
    assert stage(hear(doubted, beat(11), now_ms=1_001), now_ms=1_001) == "here"


def crowd(silent: int, there: int, doubted: int = 0, gone: int = 0) -> dict[NodeId, Member]:
    """Nodes as of 10 s, named by what they are."""
    kinds = {
        "silent": (silent, 10_000 - SUSPECTED_AFTER_MS - 1, False),
        "there": (there, 9_999, False),
        "doubted": (doubted, 9_999, True),
        "gone": (gone, 10_000 - GONE_AFTER_MS - 1, True),
    }
    return {
        NodeId(f"{name}-{at}"): Member(sequence=1, heard_at_ms=heard_at_ms, state="run", doubted=is_doubted)
        for name, (count, heard_at_ms, is_doubted) in kinds.items()
        for at in range(count)
    }


@pytest.mark.parametrize(
    ("members", "found"),
    [
        (crowd(0, 0), set()),
        (crowd(0, 3), set()),
        (crowd(1, 1), {"silent-0"}),
        (crowd(2, 3, 1), {"silent-0", "silent-1", "doubted-0"}),
        (crowd(1, 3, 0, 1), {"silent-0"}),
        pytest.param(crowd(1, 0), set(), id="the only one: it may be us"),
        pytest.param(crowd(3, 2), set(), id="most at once: it is us"),
        pytest.param(crowd(3, 1, 1), {"doubted-0"}, id="what an attempt told holds all the same"),
    ],
)
def test_suspects(members: dict[NodeId, Member], found: set[str]) -> None:
    assert suspects(members, now_ms=10_000) == found


def test_three_beats_may_be_missed_and_the_fourth_not() -> None:
    assert BEATS_MISSED_MAX == 3
    assert 3 * BEAT_MS < GONE_AFTER_MS < 4 * BEAT_MS


def test_load_of() -> None:
    member = Member(sequence=1, heard_at_ms=0, state="run", loads=(load("tiny"), load("big", waiting=2)))
    assert load_of(member, "big") == load("big", waiting=2)
    assert load_of(member, "absent") is None


OTHER = NodeId("node-b")


@pytest.mark.parametrize(
    ("heard", "consistent"),
    [
        (beat(1), True),
        (beat(1, full=card(), offers=()), True),
        (beat(1, full=card(), offers=(offer("tiny"), offer("big"))), True),
        (beat(1, full=replace(card(), node_id=OTHER)), False),
        (beat(1, full=card(), offers=(offer("tiny"), offer("big", OTHER))), False),  # it would get another node's calls
        (beat(1, offers=(offer("tiny", OTHER),)), False),
    ],
)
def test_a_node_speaks_only_for_itself(heard: Heartbeat, consistent: bool) -> None:
    assert is_consistent(heard) is consistent
