"""A gateway's memory of API keys: what it asks for, what it forgets, when a key ends, and which models it opens."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

import msgspec
import pytest

from fallow.adapters.memory_bus import MemoryBroker, MemoryBus
from fallow.apps.gateway import keys as module
from fallow.apps.gateway.errors import status_of
from fallow.apps.gateway.keys import Keys, other_model
from fallow.apps.hub.registrar import digest_of
from fallow.model import messages as m
from fallow.model.call import Grant
from fallow.model.errors import BrokerLost, InvalidApiKey
from fallow.model.ids import GatewayId, KeyId, OrgId
from fallow.ports import Delivery
from fallow.wire import codec, subjects

if TYPE_CHECKING:  # the same file under the two names by which mypy and pytest know it
    from tests.apps.one_loop import KEY as CALLERS_KEY
    from tests.apps.one_loop import MODEL, FakeClock, FakeServed, Network, turns, until
else:
    from one_loop import KEY as CALLERS_KEY
    from one_loop import MODEL, FakeClock, FakeServed, Network, turns, until

pytestmark = pytest.mark.anyio

KEY = "fk-good"
HEADER = b"Bearer fk-good"
GRANT = Grant(key_id=KeyId("key-1"), org_id=OrgId("home"))


class PlayedHub:
    """Answers with what the test puts there; `gate` holds answers back."""

    def __init__(self) -> None:
        self.broker = MemoryBroker()
        self.bus = MemoryBus(self.broker)
        self.clock = FakeClock()
        self.keys = Keys(GatewayId("gw-1"), MemoryBus(self.broker), self.clock)
        self.grants: dict[bytes, Grant] = {digest_of(KEY): GRANT}
        self.asked: list[bytes] = []
        self.silent = False
        self.gate: asyncio.Event | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    def on_query(self, delivery: Delivery) -> None:
        digest = codec.key_query.read(delivery.data).key_digest
        self.asked.append(digest)
        if not self.silent:
            task = asyncio.ensure_future(self.answer(delivery.reply, m.KeyAnswer(grant=self.grants.get(digest)), self.gate))
            self._tasks.add(task)

    async def answer(self, reply: str, answer: m.KeyAnswer, gate: asyncio.Event | None) -> None:
        if gate is not None:
            await gate.wait()
        await self.bus.publish(reply, codec.encode(answer))

    async def tell(self, *keys: str, all_of_them: bool = False) -> None:
        changed = m.KeysChanged(sequence=1, key_digests=tuple(map(digest_of, keys)), all_of_them=all_of_them)
        await self.bus.publish(subjects.CHANGED.pattern, codec.encode(changed))
        await turns(3)

    def change(self, **fields: object) -> None:
        self.grants[digest_of(KEY)] = msgspec.structs.replace(GRANT, **fields)


@contextlib.asynccontextmanager
async def running(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[PlayedHub]:
    monkeypatch.setattr(module, "LOOKUP_S", 0.05)
    hub = PlayedHub()
    await hub.bus.subscribe(subjects.KEY.pattern, hub.on_query)
    await hub.keys.start()
    yield hub


@pytest.mark.parametrize("header", [HEADER, b"bearer fk-good", b"BEARER   fk-good ", b"Bearer fk-good\t"])
async def test_a_key_is_one_however_it_is_written(monkeypatch: pytest.MonkeyPatch, header: bytes) -> None:
    async with running(monkeypatch) as hub:
        assert await hub.keys.check(HEADER) == GRANT
        assert hub.keys.recall(header) == GRANT
        assert len(hub.asked) == 1


@pytest.mark.parametrize("header", [b"", b"Bearer", b"Bearer ", b"Basic fk-good", b"fk-good", b"Bearer " + b"k" * 257])
async def test_what_is_no_key_is_never_asked_for(monkeypatch: pytest.MonkeyPatch, header: bytes) -> None:
    async with running(monkeypatch) as hub:
        assert hub.keys.recall(header) is None
        with pytest.raises(InvalidApiKey, match="Authorization: Bearer KEY"):
            await hub.keys.check(header)
        assert hub.asked == []


async def test_a_change_is_asked_for_at_the_next_call(monkeypatch: pytest.MonkeyPatch) -> None:
    async with running(monkeypatch) as hub:
        await hub.keys.check(HEADER)
        hub.change(budget_micro=7)
        await hub.tell("fk-another")
        assert hub.keys.recall(HEADER) == GRANT, "it is another key that changed"
        await hub.tell(KEY, "fk-another")
        assert hub.keys.recall(HEADER) is None
        assert (await hub.keys.check(HEADER)).budget_micro == 7


async def test_a_key_that_changed_is_not_let_in_on_old_words(monkeypatch: pytest.MonkeyPatch) -> None:
    """It may have been revoked: who can't ask the hub doesn't know."""
    async with running(monkeypatch) as hub:
        await hub.keys.check(HEADER)
        hub.silent = True
        await hub.tell(KEY)
        with pytest.raises(BrokerLost):
            await hub.keys.check(HEADER)


@pytest.mark.parametrize("how", ["told", "lost", "nonsense"])
async def test_doubt_makes_it_ask_again_and_known_keys_go_on_without_an_answer(monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    async with running(monkeypatch) as hub:
        await hub.keys.check(HEADER)
        match how:
            case "told":
                await hub.tell(all_of_them=True)
            case "lost":
                hub.broker.stop()
                hub.broker.up = True
            case "nonsense":
                await hub.bus.publish(subjects.CHANGED.pattern, b"\x02nonsense")
                await turns(3)
        assert hub.keys.recall(HEADER) is None
        hub.silent = True
        assert await hub.keys.check(HEADER) == GRANT
        assert len(hub.asked) == 2
        hub.silent = False
        hub.change(budget_micro=7)
        assert (await hub.keys.check(HEADER)).budget_micro == 7
        assert hub.keys.recall(HEADER) is not None


@pytest.mark.parametrize("all_of_them", [False, True])
async def test_an_answer_that_a_change_overtook_is_not_believed(monkeypatch: pytest.MonkeyPatch, all_of_them: bool) -> None:
    monkeypatch.setattr(module, "LOOKUP_S", 5.0)
    async with running(monkeypatch) as hub:
        hub.gate = asyncio.Event()
        asking = asyncio.ensure_future(hub.keys.check(HEADER))
        await until(lambda: hub.asked)
        old, hub.gate = hub.gate, None
        hub.change(budget_micro=7)
        await (hub.tell(all_of_them=True) if all_of_them else hub.tell(KEY))
        old.set()
        async with asyncio.timeout(5):
            assert (await asking).budget_micro == 7
        assert len(hub.asked) == 2


async def test_a_key_that_changes_all_the_time_is_not_asked_for_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    async with running(monkeypatch) as hub:
        answered = hub.answer

        async def answer(reply: str, answer: m.KeyAnswer, gate: asyncio.Event | None) -> None:
            await hub.tell(KEY)
            await answered(reply, answer, gate)

        monkeypatch.setattr(hub, "answer", answer)
        assert await hub.keys.check(HEADER) == GRANT
        assert len(hub.asked) == module.LOOKUP_TRIES
        assert hub.keys.recall(HEADER) is None


async def test_a_key_ends_at_its_time_also_while_the_hub_is_away(monkeypatch: pytest.MonkeyPatch) -> None:
    async with running(monkeypatch) as hub:
        hub.change(expires_at_ms=hub.clock.wall_ms() + 100)
        await hub.keys.check(HEADER)
        hub.silent = True
        hub.clock.advance(99)
        assert hub.keys.recall(HEADER) is not None
        hub.clock.advance(1)
        assert hub.keys.recall(HEADER) is None
        with pytest.raises(InvalidApiKey, match="expired"):
            await hub.keys.check(HEADER)
        hub.clock.advance(module.FRESH_MS)
        with pytest.raises(InvalidApiKey, match="expired"):
            await hub.keys.check(HEADER)
        hub.silent = False
        hub.change(expires_at_ms=None)
        await hub.tell(KEY)
        assert (await hub.keys.check(HEADER)).expires_at_ms is None, "whoever keeps the hub gave it more time"


async def test_what_is_remembered_is_bounded_and_good_keys_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "REMEMBERED_MAX", 5)
    async with running(monkeypatch) as hub:
        await hub.keys.check(HEADER)
        for number in range(20):
            with pytest.raises(InvalidApiKey):
                await hub.keys.check(f"Bearer fk-{number}".encode())
        assert len(hub.keys._known) == 5
        assert hub.keys.recall(HEADER) == GRANT


# models
def test_a_key_without_models_has_all() -> None:
    assert other_model(GRANT, "anything") is None


def test_another_model_is_refused_by_name() -> None:
    grant = msgspec.structs.replace(GRANT, models=frozenset(f"model-{number:02}" for number in range(10)))
    assert other_model(grant, "model-03") is None
    failure = other_model(grant, "other\nmodel")
    assert failure is not None
    assert (failure.code, failure.param, status_of(failure).http) == ("model_not_allowed", "model", 403)
    assert "model-07 and 2 more" in failure.message
    assert "model-08" not in failure.message
    assert "\n" not in failure.message


@contextlib.asynccontextmanager
async def allowing(*models: str) -> AsyncIterator[Network]:
    """A gateway with one node, and a hub whose key opens these models."""
    async with Network() as network:
        await network.add("node-a", FakeServed())
        await network.hub_bus.close()
        hub = MemoryBus(network.broker)
        answer = codec.encode(m.KeyAnswer(grant=msgspec.structs.replace(GRANT, models=frozenset(models))))
        tasks = set()

        def on_query(delivery: Delivery) -> None:
            assert codec.key_query.read(delivery.data).key_digest == digest_of(CALLERS_KEY)
            tasks.add(asyncio.ensure_future(hub.publish(delivery.reply, answer)))

        await hub.subscribe(subjects.KEY.pattern, on_query)
        yield network


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/quotes"])
async def test_calls_for_other_models_are_refused_before_anybody_is_asked(path: str) -> None:
    async with allowing("other") as network:
        body = msgspec.json.encode({"model": MODEL, "messages": [{"role": "user", "content": "hi"}]})
        call = await network.ask(path=path, body=body).done()
        assert (call.status, call.code) == (403, "model_not_allowed")
        assert b"only other;" in call.body
        assert network.broker.sent_to("n.node-a.req") == []


async def test_only_allowed_models_are_listed() -> None:
    async with allowing("other") as network:
        listed = await network.get("/v1/models")
        assert (listed.status, msgspec.json.decode(listed.body)["data"]) == (200, [])
        one = await network.get(f"/v1/models/{MODEL}")
        assert (one.status, one.code) == (403, "model_not_allowed")
        assert (await network.get("/v1/models/other")).code == "model_not_found"


async def test_allowed_models_work() -> None:
    async with allowing("other", MODEL) as network:
        await network.works()
        listed = await network.get("/v1/models")
        assert [one["id"] for one in msgspec.json.decode(listed.body)["data"]] == [MODEL]
        assert (await network.get(f"/v1/models/{MODEL}")).status == 200
