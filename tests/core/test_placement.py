"""Which node should hold which models."""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from fallow.core import roster
from fallow.core.demand import IDLE_AFTER_MS
from fallow.core.placement import BARRED_MS, TRIAL_MS, Move, PlacementState, models_for, plan
from fallow.core.placement_draft import MIN_STAY_MS
from fallow.core.supply import ModelSupply, NodeSupply, supply_of
from fallow.model.card import Card, Hardware
from fallow.model.ids import GatewayId, NodeId, OrgId
from fallow.model.messages import Demand, ModelDemand, NodeState
from fallow.model.offer import Load, Offer, Price, Readiness, Speed

SPAN_MS = 15_000
START_MS = 10_000_000
SLOW_TEN = ModelSupply(model="-", prefill_tokens_per_s=1000, decode_tokens_per_s=10)


def node(
    name: str,
    models: str = "a",
    *,
    org: str = "",
    region: str = "",
    network: str = "",
    room: int | None = 1,
    works: bool = True,
    has: str = "",
    speed: float = 10.0,
) -> NodeSupply:
    """A node that offers models, by their letters; `has` names those in its memory."""
    offered = tuple(
        replace(SLOW_TEN, model=model, decode_tokens_per_s=speed, readiness="ready" if model in has else "cold") for model in models
    )
    return NodeSupply(
        node_id=NodeId(name), org_id=OrgId(org or name), region=region, network=network, works=works, room=room, models=offered
    )


def calls(model: str, count: int = 1, *, tokens: int = 1, missed: int = 0) -> ModelDemand:
    """In one span; `tokens` are written for each."""
    return ModelDemand(model=model, calls=count, missed=missed, output_tokens=count * tokens)


class Hub:
    """Plans every span, for nodes that load what they are told at once unless `obey` says otherwise."""

    def __init__(self, *nodes: NodeSupply) -> None:
        self.nodes = list(nodes)
        self.state = PlacementState()
        self.now_ms = START_MS
        self.obeys: Callable[[NodeSupply], bool] = lambda _: True

    def step(self, *asked: ModelDemand) -> tuple[Move, ...]:
        self.now_ms += SPAN_MS
        report = Demand(gateway_id=GatewayId("g"), sequence=self.now_ms, span_ms=SPAN_MS, models=asked)
        self.state, moves = plan(self.state, self.nodes, [report], span_ms=SPAN_MS, now_ms=self.now_ms)
        self.nodes = [self._load(one) if one.works and self.obeys(one) else one for one in self.nodes]
        return moves

    def _load(self, one: NodeSupply) -> NodeSupply:
        held = models_for(self.state, one.node_id)
        readiness: dict[str, Readiness] = {model.model: "ready" if model.model in held else "cold" for model in one.models}
        return replace(one, models=tuple(replace(model, readiness=readiness[model.model]) for model in one.models))

    def run(self, spans: int, *asked: ModelDemand) -> list[tuple[Move, ...]]:
        return [self.step(*asked) for _ in range(spans)]

    def change(self, name: str, **fields: Any) -> None:
        self.nodes = [replace(one, **fields) if one.node_id == name else one for one in self.nodes]

    @property
    def held(self) -> dict[str, str]:
        """The models of each node that holds any, as letters."""
        return {str(node_id): "".join(sorted(models)) for node_id, models in sorted(self.state.held.items())}


def spans(ms: int) -> int:
    return -(-ms // SPAN_MS)


@pytest.mark.parametrize(
    ("nodes", "asked", "held"),
    [
        ([node("n1")], [], {}),
        ([node("n1")], [calls("a")], {"n1": "a"}),
        ([node("n1")], [calls("b")], {}),
        ([node("n1"), node("n2")], [calls("a")], {"n1": "a"}),  # ties by id
        ([node("n1"), node("n2", has="a")], [calls("a")], {"n2": "a"}),  # who has it already
        ([node("n1"), node("n2", speed=20)], [calls("a")], {"n2": "a"}),  # who is faster
        ([node("n1", works=False), node("n2")], [calls("a")], {"n2": "a"}),
        ([node("n1", works=False)], [calls("a")], {}),
        ([node("n1", "ab", room=2), node("n2", "ab", room=2)], [calls("a", 2), calls("b")], {"n1": "a", "n2": "b"}),  # who holds less
        ([node("n1", "ab")], [calls("a"), calls("b", 2)], {"n1": "b"}),  # the most wanted first
        ([node("n1", "ab", room=0)], [calls("a")], {}),
        ([replace(node("n1"), models=(ModelSupply(model="a", readiness="failed"),))], [calls("a")], {}),
        ([replace(node("n1", room=4), models=(ModelSupply(model="a", takes=5),))], [calls("a")], {}),  # too large for it
    ],
)
def test_the_first_plan(nodes: list[NodeSupply], asked: list[ModelDemand], held: dict[str, str]) -> None:
    hub = Hub(*nodes)
    hub.step(*asked)
    assert hub.held == held


@pytest.mark.parametrize(
    ("tokens", "replicas"),
    [(15, 1), (104, 1), (108, 2), (300, 3), (1500, 5)],  # in a span; a replica writes 150 in it, of which 105 are planned
)
def test_as_many_replicas_as_the_demand_needs(tokens: int, replicas: int) -> None:
    hub = Hub(*(node(f"n{i}") for i in range(5)))
    hub.run(40, calls("a", tokens=tokens))
    assert len(hub.held) == replicas


def test_missed_calls_bring_replicas_although_the_demand_is_carried() -> None:
    hub = Hub(*(node(f"n{i}") for i in range(9)))
    hub.run(40, calls("a"))
    assert len(hub.held) == 1
    hub.run(40, calls("a", missed=1))
    assert len(hub.held) == 4
    hub.run(400, calls("a"))
    assert len(hub.held) == 1


@pytest.mark.parametrize(
    ("nodes", "chosen"),
    [
        ([node("n1", org="x"), node("n2", org="x"), node("n3", org="y")], {"n1", "n3"}),
        ([node("n1", region="x"), node("n2", region="x"), node("n3", region="y")], {"n1", "n3"}),
        ([node("n1", network="x"), node("n2", network="x"), node("n3", network="y")], {"n1", "n3"}),
        ([node("n1"), node("n2", region=""), node("n3")], {"n1", "n2"}),  # what isn't known doesn't count as alike
    ],
)
def test_replicas_stand_apart(nodes: list[NodeSupply], chosen: set[str]) -> None:
    hub = Hub(*nodes)
    hub.run(30, calls("a", 15, tokens=10))  # ten a second: two replicas
    assert set(hub.held) == chosen


def test_replicas_move_apart_once_they_can() -> None:
    hub = Hub(node("n1", org="x"), node("n2", org="x"))
    hub.run(60, calls("a", 15, tokens=10))
    assert set(hub.held) == {"n1", "n2"}
    hub.nodes.append(node("n3", org="y"))
    moves = [move for step in hub.run(3, calls("a", 15, tokens=10)) for move in step]
    assert {(move.node_id, move.kind, move.why) for move in moves} == {
        ("n3", "load", "its replicas move apart"),
        ("n2", "drop", "its replicas move apart"),
    }


def test_a_model_stays_for_a_while_and_leaves_when_nobody_asks() -> None:
    hub = Hub(node("n1"))
    hub.step(calls("a"))
    assert not any(hub.run(spans(IDLE_AFTER_MS) - 1))
    moves = hub.step()
    assert [(move.kind, move.why) for move in moves] == [("drop", "nobody asks for it")]
    assert hub.held == {}


def test_a_model_gives_way_to_one_that_is_wanted_clearly_more_and_not_before_its_time() -> None:
    hub = Hub(node("n1", "ab"))
    hub.step(calls("a", 100))
    early = hub.run(spans(MIN_STAY_MS) - 1, calls("a", 100), calls("b", 1000))
    assert not any(early)
    moves = hub.step(calls("a", 100), calls("b", 1000))
    assert [(move.model, move.kind) for move in moves] == [("a", "drop"), ("b", "load")]


def test_a_little_more_is_no_reason_to_change() -> None:
    hub = Hub(node("n1", "ab"))
    hub.step(calls("a", 100))
    assert not any(hub.run(200, calls("a", 100), calls("b", 125)))
    assert any(hub.run(200, calls("a", 100), calls("b", 140)))


def test_a_second_replica_gives_way_to_the_first_of_another() -> None:
    hub = Hub(node("n1", "ab"), node("n2", "ab"))
    hub.run(40, calls("a", 15, tokens=10))
    assert hub.held == {"n1": "a", "n2": "a"}
    hub.step(calls("a", 15, tokens=10), calls("b", 1))
    assert sorted(hub.held.values()) == ["a", "b"]


def test_an_owner_who_is_back_keeps_the_plan_and_others_stand_in() -> None:
    hub = Hub(node("n1"), node("n2"))
    hub.step(calls("a"))
    hub.change("n1", works=False)
    hub.step(calls("a"))
    assert hub.held == {"n1": "a", "n2": "a"}
    hub.run(100, calls("a"))
    assert hub.held == {"n1": "a", "n2": "a"}
    hub.change("n1", works=True)
    hub.run(2, calls("a"))
    assert len(hub.held) == 1, "one of the two is enough again"


def test_a_node_that_is_gone_is_forgotten() -> None:
    hub = Hub(node("n1"), node("n2"))
    hub.step(calls("a"))
    hub.nodes.pop(0)
    hub.step(calls("a"))
    assert hub.held == {"n2": "a"}


def test_a_node_that_does_not_load_is_passed_over_for_a_while() -> None:
    hub = Hub(node("n1", room=None, speed=20), node("n2", room=None))
    hub.obeys = lambda one: one.node_id != "n1"
    hub.run(1 + spans(TRIAL_MS) - 1, calls("a"))
    assert hub.held == {"n1": "a"}
    hub.step(calls("a"))
    assert hub.held == {"n2": "a"}
    assert not any(hub.run(spans(BARRED_MS) // 2, calls("a")))


def test_a_node_that_still_loads_has_its_time() -> None:
    hub = Hub(node("n1", room=None), node("n2", room=None))
    hub.obeys = lambda one: False
    hub.step(calls("a"))
    hub.change("n1", models=(replace(SLOW_TEN, model="a", readiness="loading"),))
    assert not any(hub.run(3 * spans(TRIAL_MS), calls("a")))


def test_after_a_pause_a_node_has_its_time_anew() -> None:
    hub = Hub(node("n1", room=None))
    hub.obeys = lambda one: False
    hub.step(calls("a"))
    hub.change("n1", works=False)
    hub.run(3 * spans(TRIAL_MS), calls("a"))
    hub.change("n1", works=True)
    assert not any(hub.run(spans(TRIAL_MS) - 1, calls("a")))
    assert any(hub.run(1, calls("a")))


def test_room_is_learnt_from_what_a_node_comes_to_hold() -> None:
    """It is asked for one model more as long as it loads them, and not again for a while once it didn't."""
    hub = Hub(node("n1", "abcde", room=None))
    asked = [calls(model, 100 - ord(model)) for model in "abcde"]
    hub.step(*asked)
    assert hub.held == {"n1": "a"}
    hub.step(*asked)
    assert hub.held == {"n1": "ab"}
    hub.obeys = lambda one: False
    hub.step(*asked)
    assert hub.held == {"n1": "abc"}, "the first two are there"
    hub.run(spans(TRIAL_MS), *asked)
    assert hub.held == {"n1": "ab"}
    assert not any(hub.run(spans(BARRED_MS) - 2, *asked))
    assert any(hub.run(4, *asked)), "then it is tried again"


def test_a_node_that_holds_more_than_was_learnt_has_more_room() -> None:
    hub = Hub(node("n1", "abc", room=None, has="a"))
    hub.obeys = lambda one: False
    asked = [calls("a", 9), calls("b", 8), calls("c", 7)]
    hub.run(2 + spans(TRIAL_MS), *asked)
    assert hub.held == {"n1": "a"}
    hub.nodes = [node("n1", "abc", room=None, has="ac")]
    hub.step(*asked)
    assert hub.held == {"n1": "ac"}


def test_a_node_is_told_the_most_wanted_first() -> None:
    hub = Hub(node("n1", "abc", room=3))
    hub.step(calls("a", 2), calls("b", 3), calls("c", 2))
    assert models_for(hub.state, NodeId("n1")) == ("b", "a", "c")
    assert models_for(hub.state, NodeId("n2")) == ()


# properties
MODELS = "abcd"
nodes_strategy = st.lists(
    st.builds(
        lambda org, region, room, works, offered, speed, has: node(
            "-", "".join(offered), org=f"o{org}", region=f"r{region}", room=room, works=works, speed=speed, has="".join(has)
        ),
        st.integers(0, 3),
        st.integers(0, 2),
        st.one_of(st.none(), st.integers(0, 3)),
        st.booleans(),
        st.sets(st.sampled_from(MODELS), min_size=1).map(sorted),
        st.sampled_from([5.0, 10.0, 40.0]),
        st.sets(st.sampled_from(MODELS), max_size=2).map(sorted),
    ),
    max_size=8,
).map(lambda found: [replace(one, node_id=NodeId(f"n{i}")) for i, one in enumerate(found)])
demand_strategy = st.lists(
    st.builds(
        lambda model, count, tokens, missed: calls(model, count, tokens=tokens, missed=min(missed, count)),
        st.sampled_from(MODELS),
        st.integers(1, 40),
        st.integers(1, 20),
        st.integers(0, 3),
    ),
    max_size=5,
)


@given(nodes_strategy, st.lists(demand_strategy, min_size=1, max_size=8), st.lists(st.integers(0, 7), max_size=4))
def test_never_more_than_a_node_offers_and_has_room_for(nodes: list[NodeSupply], asked: list[list[ModelDemand]], owners: list[int]) -> None:
    hub = Hub(*nodes)
    for number, demand in enumerate(asked):
        if number < len(owners):
            hub.nodes = [replace(one, works=not one.works) if i == owners[number] else one for i, one in enumerate(hub.nodes)]
        before = hub.held
        hub.step(*demand)
        for one in hub.nodes:
            mine = hub.held.get(one.node_id, "")
            assert set(mine) <= {model.model for model in one.models}
            assert one.room is None or len(mine) <= one.room
            assert one.works or set(mine) <= set(before.get(one.node_id, "")), "nothing new while the owner needs it"


@given(nodes_strategy, st.lists(demand_strategy, min_size=1, max_size=4))
def test_the_order_of_nodes_changes_nothing(nodes: list[NodeSupply], asked: list[list[ModelDemand]]) -> None:
    one, other = Hub(*nodes), Hub(*reversed(nodes))
    for demand in asked:
        assert one.step(*demand) == other.step(*reversed(demand))
    assert one.state == other.state


@settings(max_examples=40)
@given(nodes_strategy, demand_strategy)
def test_a_steady_demand_comes_to_rest(nodes: list[NodeSupply], asked: list[ModelDemand]) -> None:
    hub = Hub(*nodes)
    hub.run(300, *asked)
    assert not any(hub.run(60, *asked))


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 2)), min_size=1, max_size=10), st.integers(1, 12))
def test_organisations_before_doubling_up(places: list[tuple[int, int]], replicas: int) -> None:
    """Among nodes that are alike, no organisation has two more replicas than another that has room."""
    hub = Hub(*(node(f"n{i}", org=f"o{org}", region=f"r{region}") for i, (org, region) in enumerate(places)))
    hub.run(60, calls("a", tokens=105 * replicas - 40))  # each writes 105 of them in a span
    held = Counter(one.org_id for one in hub.nodes if one.node_id in hub.held)
    free = Counter(one.org_id for one in hub.nodes if one.node_id not in hub.held)
    assert sum(held.values()) == min(replicas, len(places))
    assert max(held.values()) - min((held[org] for org in free), default=max(held.values())) <= 1


@given(nodes_strategy, demand_strategy)
def test_whoever_is_wanted_is_there_if_anybody_has_room(nodes: list[NodeSupply], asked: list[ModelDemand]) -> None:
    hub = Hub(*nodes)
    hub.step(*asked)
    held: set[str] = {model for one in hub.nodes if one.works for model in hub.held.get(one.node_id, "")}
    for model in {one.model for one in asked} - held:
        for one in hub.nodes:
            has_room = one.room is None or len(hub.held.get(one.node_id, "")) < one.room
            offers = model in {other.model for other in one.models}
            assert not (one.works and offers and has_room and one.room is not None)


# from the network's words
def member(*, state: NodeState = "run", with_card: bool = True, loads: Sequence[Load] = ()) -> roster.Member:
    hardware = Hardware(kind="cpu", isa="x86_64-avx2", cores=4, memory_bytes=2**33)
    card = Card(
        node_id=NodeId("n1"),
        org_id=OrgId("home"),
        sequence=1,
        expires_at_ms=2**50,
        hardware=hardware,
        isolation="none",
        region="unknown",
        serves=frozenset({"own"}),
    )
    speed = Speed(prefill_tokens_per_s=100, decode_tokens_per_s=10, decode_by_streams=((1, 10.0), (2, 18.0), (4, 30.0)))
    offer = Offer(
        node_id=NodeId("n1"),
        model="a",
        paths=frozenset(),
        context_tokens=1,
        model_digest="",
        speed=speed,
        price=Price(),
        slots=2,
        expires_at_ms=2**50,
    )
    return roster.Member(
        sequence=1,
        heard_at_ms=0,
        state=state,
        card=card if with_card else None,
        offers=(offer,),
        loads=tuple(loads),
    )


LOADING = Load(model="a", readiness="loading", slots_free=2, waiting=0, waiting_max=2)


def test_a_node_as_its_heartbeats_tell() -> None:
    found = supply_of(NodeId("n1"), member(loads=[LOADING]))
    model = ModelSupply(model="a", readiness="loading", prefill_tokens_per_s=100, decode_tokens_per_s=18)
    assert found == NodeSupply(node_id=NodeId("n1"), org_id=OrgId("home"), region="", works=True, models=(model,))


def test_a_node_without_a_card_or_a_load_offers_nothing() -> None:
    assert supply_of(NodeId("n1"), member(with_card=False)) is None
    bare = supply_of(NodeId("n1"), member())
    assert bare is not None
    assert bare.models == ()


@pytest.mark.parametrize(("state", "works"), [("run", True), ("throttle", True), ("pause", False), ("leave", False)])
def test_who_works(state: NodeState, works: bool) -> None:
    found = supply_of(NodeId("n1"), member(state=state))
    assert found is not None
    assert found.works is works
