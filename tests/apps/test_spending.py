"""A key's budget at the gateway's door, on a real registry: what is charged, refused, told to the hub, and known to other gateways."""

import asyncio
import contextlib
import json
import logging
from collections.abc import AsyncIterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import vendor
from msgspec.structs import replace

from fallow.adapters.memory_bus import MemoryBus
from fallow.adapters.sql.registry import SqlRegistry, open_registry
from fallow.apps.card_check import anyones
from fallow.apps.gateway import sessions
from fallow.apps.gateway import spending as module
from fallow.apps.gateway.main import Gateway
from fallow.apps.hub import key_desk, registrar, spending_desk
from fallow.apps.hub.key_desk import KeyDesk
from fallow.apps.hub.key_limits import Limits, limits_of
from fallow.apps.hub.spending_desk import SpendingDesk
from fallow.core import hedge
from fallow.core.budget import Purses
from fallow.core.needs import MICRO
from fallow.model import messages as m
from fallow.model.call import Call
from fallow.model.errors import BrokerLost, Failure, StoreFailed
from fallow.model.identity import Member
from fallow.model.ids import GatewayId, KeyId
from fallow.model.offer import Price
from fallow.model.receipt import Usage
from fallow.wire import codec, quote_request, subjects
from fallow.wire import openai as wire

if TYPE_CHECKING:  # the same file under the two names by which mypy and pytest know it
    from tests.apps.one_loop import (
        GATEWAY,
        MODEL,
        ORG,
        SIGN,
        Asgi,
        Network,
        PlayedNode,
        beat_of,
        believed,
        kem_believed,
        offer_of,
        turns,
        until,
    )
else:
    from one_loop import GATEWAY, MODEL, ORG, SIGN, Asgi, Network, PlayedNode, beat_of, believed, kem_believed, offer_of, turns, until

pytestmark = pytest.mark.anyio

PRICE = Price(prompt_micro_per_munit=1_000_000, output_micro_per_munit=2_000_000)
"""A micro-credit for a token of the prompt, two for one of the answer."""
TOKENS_MAX = 100
USAGE = Usage(prompt_tokens=10, output_tokens=20)
COST = 50
BODY = {"model": MODEL, "max_tokens": TOKENS_MAX, "messages": [{"role": "user", "content": "hi"}]}
JSON_HEAD = m.Head(status=200, content_type="application/json", engine_us=5)
EVENTS_HEAD = m.Head(status=200, content_type="text/event-stream", engine_us=5)


class Flaky:
    """A registry whose database can be gone."""

    def __init__(self, registry: SqlRegistry) -> None:
        self._registry = registry
        self.gone = False

    def __getattr__(self, name: str) -> object:
        if self.gone:
            raise StoreFailed("the database is gone")
        return getattr(self._registry, name)


class Site:
    """Hub desks on a registry, a gateway, and a node that asks for money."""

    def __init__(self, network: Network, folder: Path) -> None:
        self.network = network
        self.registry = open_registry(f"sqlite:///{folder / 'hub.db'}")
        self.flaky = Flaky(self.registry)
        registrar.add_organisation(self.registry, ORG, public_key="", now_ms=1)
        for gateway in (GATEWAY, "gw-2", "gw-3"):
            self.registry.members.admit_open(Member(public_key=gateway, role="gateway", org_id=ORG, joined_at_ms=1))
        self.bus = MemoryBus(network.broker)
        self.gateway = network.gateway

    async def lend(self, node_id: str = "node-p", price: Price = PRICE) -> PlayedNode:
        node = await self.network.play(node_id)
        await self.tell_price(node_id, price)
        return node

    async def tell_price(self, node_id: str, price: Price = PRICE) -> None:
        offer = replace(offer_of(node_id, slots=8), price=price, paths=frozenset({wire.CHAT, wire.MESSAGES}))
        await self.network.hand.publish(f"hb.{node_id}", codec.encode(beat_of(node_id, 5, offers=(offer,))))
        await turns()

    async def another(self, id: str) -> Gateway:
        """One more gateway that knows the node."""
        asker = sessions.Asker(m.Hello(gateway_id=GatewayId(id), org_id=ORG), SIGN)
        bus = MemoryBus(self.network.broker)
        gateway = Gateway(asker, bus, self.network.clock, org_of=anyones, verify=believed, verify_kem=kem_believed)
        self.network._start(gateway.run)
        await turns()
        await self.tell_price("node-p")
        await until(lambda: list(gateway.roster.offers()), what="the offer at another gateway")
        return gateway

    def key(self, budget_micro: int | None) -> tuple[KeyId, str]:
        limits = Limits(budget_micro=budget_micro)
        key, secret = registrar.make_key(self.registry, org_id=ORG, now_ms=self.network.clock.wall_ms(), limits=limits)
        return key.id, secret

    def ask(self, secret: str, *, stream: bool = False, gateway: Gateway | None = None, path: str = wire.CHAT, **headers: str) -> Asgi:
        body = json.dumps({**BODY, "stream": stream}, separators=(",", ":")).encode()
        said = {"authorization": f"Bearer {secret}", **{name.replace("_", "-"): value for name, value in headers.items()}}
        return Asgi((gateway or self.gateway).app, path, body, said, "POST")

    async def cost(self, call: Asgi, secret: str) -> float | None:
        """What the call's story says, in micro-credits."""
        told = (await self.network.get(f"{wire.CALLS}/{call.headers['fallow-call']}", key=secret)).json["cost"]
        return None if told is None else told * MICRO

    async def answer(self, call: Asgi, node: PlayedNode, usage: Usage | None = USAGE) -> Asgi:
        await node.say(await node.request(), m.Final(index=0, data=b"{}", head=JSON_HEAD, usage=usage))
        return await call.done()

    def spent(self, key_id: KeyId) -> int:
        """What the hub knows."""
        return self.registry.spending.totals([key_id])[key_id]


@contextlib.asynccontextmanager
async def running(folder: Path) -> AsyncIterator[Site]:
    async with Network() as network:
        await network.hub_bus.close()
        site = Site(network, folder)
        try:
            async with asyncio.TaskGroup() as group:
                await KeyDesk(site.bus, site.flaky, network.clock, ORG).start(group)  # type: ignore[arg-type]
                await SpendingDesk(site.bus, site.flaky).start(group)  # type: ignore[arg-type]
                yield site
                await site.gateway.spending.report()
                await site.bus.close()
        finally:
            site.registry.close()


# what is charged
async def test_a_key_is_charged_what_the_story_of_its_calls_tells(tmp_path: Path) -> None:
    async with running(tmp_path) as site:
        node = await site.lend()
        id, secret = site.key(10_000)
        call = await site.answer(site.ask(secret), node)
        assert call.status == 200
        assert await site.cost(call, secret) == pytest.approx(COST)
        purse = site.gateway.calls.purses.of(id)
        assert (purse.spent_micro, purse.held_micro) == (COST, 0)
        assert site.spent(id) == 0
        for _ in range(3):
            await site.gateway.spending.report()
            assert site.spent(id) == COST, "saying it again changes nothing"
        stream = site.ask(secret, stream=True)
        request = await node.request()
        held = site.gateway.calls.purses.of(id).held_micro
        assert held > 2 * TOKENS_MAX, "the most that it can cost"
        await node.say(request, m.Part(index=0, data=b'data: {"n":1}\n\n', head=EVENTS_HEAD))
        await node.say(request, m.Final(index=1, data=b"data: [DONE]\n\n", usage=USAGE))
        assert (await stream.done()).status == 200
        assert site.gateway.calls.purses.of(id).spent_micro == 2 * COST


@pytest.mark.parametrize("usage", [None, USAGE], ids=["nobody counted", "counted"])
async def test_a_call_that_broke_off_gives_back_what_it_held(tmp_path: Path, usage: Usage | None) -> None:
    async with running(tmp_path) as site:
        node = await site.lend()
        id, secret = site.key(10_000)
        purse = site.gateway.calls.purses.of
        left = site.ask(secret, stream=True)
        request = await node.request()
        await node.say(request, m.Part(index=0, data=b'data: {"n":1}\n\n', head=EVENTS_HEAD))
        await until(lambda: left.chunks, what="the beginning")
        assert purse(id).held_micro
        await left.leave()
        assert (purse(id).held_micro, purse(id).spent_micro) == (0, 0)
        failed = site.ask(secret)
        await node.say(await node.request(), m.Final(index=0, failure=Failure(code="invalid_request", message="no"), usage=usage))
        assert (await failed.done()).status == 400
        assert await site.cost(failed, secret) is None
        assert (purse(id).held_micro, purse(id).spent_micro) == (0, 0), "as the story tells it"
        torn = site.ask(secret)
        await node.request()
        torn.task.cancel()
        await asyncio.wait([torn.task])
        assert purse(id).held_micro == 0


async def test_a_call_that_moves_is_charged_once(tmp_path: Path) -> None:
    async with running(tmp_path) as site:
        nodes = [await site.lend("node-a"), await site.lend("node-b")]
        id, secret = site.key(300)
        call = site.ask(secret)
        await until(lambda: any(node.requests.qsize() for node in nodes), what="a request")
        first, other = sorted(nodes, key=lambda node: -node.requests.qsize())
        held = site.gateway.calls.purses.of(id).held_micro
        await first.say(await first.request(), m.Final(index=0, failure=Failure(code="yielding", message="later")))
        request = await other.request()
        assert 0 < held == site.gateway.calls.purses.of(id).held_micro, "a second quote would not fit beside the first"
        await other.say(request, m.Final(index=0, data=b"{}", head=JSON_HEAD, usage=USAGE))
        assert (await call.done()).status == 200
        assert await site.cost(call, secret) == pytest.approx(COST)
        assert site.gateway.calls.purses.of(id).spent_micro == COST


@pytest.mark.parametrize(("budget", "is_hedged"), [(300, False), (500, True)])
async def test_a_late_call_is_sent_to_a_second_node_only_if_that_fits_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, budget: int, is_hedged: bool
) -> None:
    for name, value in (("SHARE_MAX", 1.0), ("LATE_MS_MIN", 10), ("LATE_FACTOR", 0.0)):
        monkeypatch.setattr(hedge, name, value)
    async with running(tmp_path) as site:
        twice = Price(prompt_micro_per_munit=2_000_000, output_micro_per_munit=4_000_000)
        cheap, dear = await site.lend("node-a"), await site.lend("node-b", twice)
        id, secret = site.key(budget)
        purses, quotes = site.gateway.calls.purses, list[int]()

        def hold(call: Call, quote_micro: int, *, now_ms: int) -> Failure | None:
            quotes.append(quote_micro)
            return Purses.hold(purses, call, quote_micro, now_ms=now_ms)

        monkeypatch.setattr(purses, "hold", hold)
        call = site.ask(secret, fallow_service_tier="priority", fallow_prefer="cheap")
        request = await cheap.request()
        await cheap.say(request, m.Accepted())
        await until(lambda: len(quotes) == 2, what="the second quote")
        assert quotes[0] < budget
        assert purses.of(id).held_micro == quotes[is_hedged] < 2.1 * quotes[0], "the higher of the two"
        if is_hedged:
            await dear.request()
        await cheap.say(request, m.Final(index=0, data=b"{}", head=JSON_HEAD, usage=USAGE))
        assert (await call.done()).status == 200
        assert dear.requests.empty()
        assert purses.of(id).spent_micro == round(await site.cost(call, secret) or 0) == COST, "at the price of the one that was heard"


async def test_an_answer_that_is_repeated_costs_nothing_more(tmp_path: Path) -> None:
    async with running(tmp_path) as site:
        node = await site.lend()
        id, secret = site.key(300)
        first = await site.answer(site.ask(secret, idempotency_key="once"), node)
        again = await site.ask(secret, idempotency_key="once").done()
        assert (first.status, again.status, again.headers["fallow-repeated"]) == (200, 200, "1")
        assert site.gateway.calls.purses.of(id).spent_micro == COST


async def test_keys_without_a_budget_are_not_counted(tmp_path: Path) -> None:
    async with running(tmp_path) as site:
        node = await site.lend()
        id, secret = site.key(None)
        assert (await site.answer(site.ask(secret), node)).status == 200
        await site.gateway.spending.report()
        assert site.gateway.calls.purses.of(id).spent_micro == 0
        assert site.network.broker.sent_to("hub.spent") == []


# what is refused
@pytest.mark.parametrize("path", [wire.CHAT, wire.MESSAGES])
async def test_what_goes_beyond_the_budget_is_refused_before_a_node_hears_of_it(tmp_path: Path, path: str) -> None:
    async with running(tmp_path) as site:
        node = await site.lend()
        id, secret = site.key(300)
        first = site.ask(secret)
        await until(node.requests.qsize, what="the first call")
        held = site.gateway.calls.purses.of(id).held_micro
        waits = await site.ask(secret, path=path).done()
        assert (waits.status, waits.headers["retry-after"]) == (429, "2"), "it may cost less than it holds"
        assert f"0.{held:06} are set aside" in waits.json["error"]["message"]
        assert (await site.answer(first, node)).status == 200
        assert (await site.answer(site.ask(secret), node)).status == 200
        refused = await site.ask(secret, path=path).done()
        assert (refused.status, "retry-after" in refused.headers) == (429, False)
        error = refused.json["error"]
        vendor.check(*(("anthropic", "ErrorResponse") if path == wire.MESSAGES else ("openai", "ErrorResponse")), refused.json)
        if path == wire.CHAT:
            assert (error["code"], error["type"]) == ("budget_spent", "insufficient_quota")
        assert "budget is 0.0003 credits: 0.0001 are spent, and this call can cost" in error["message"]
        assert "fallow keys limit --budget" in error["message"]
        assert node.requests.empty()
        told = (await site.network.get(f"{wire.CALLS}/{refused.headers['fallow-call']}", key=secret)).json
        assert (told["code"], told["attempts"], told["cost"]) == ("budget_spent", [], None)
        assert (await site.ask(secret, path=quote_request.PATH).done()).status == 200, "to ask what it would cost is free"


async def test_a_budget_that_is_raised_lets_calls_in_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(key_desk, "CHANGES_S", 0.005)
    async with running(tmp_path) as site:
        desk = KeyDesk(site.bus, site.registry, site.network.clock, ORG)
        telling = asyncio.ensure_future(desk.run())
        node = await site.lend()
        id, secret = site.key(10)
        assert (await site.ask(secret).done()).code == "budget_spent"
        raised = replace(limits_of(site.registry.keys.named(id)), budget_micro=1_000)
        registrar.limit_key(site.registry, id, raised)

        async def is_let_in() -> bool:
            call = site.ask(secret)
            await until(lambda: call.status or node.requests.qsize(), what="a word")
            if node.requests.qsize():
                assert (await site.answer(call, node)).status == 200
            return (await call.done()).status == 200

        for _ in range(1_000):
            if await is_let_in():
                break
        assert site.gateway.calls.purses.of(id).spent_micro == COST
        telling.cancel()
        await asyncio.wait([telling])


# what other gateways know
async def test_gateways_know_what_was_spent_on_others_and_before_they_began(tmp_path: Path) -> None:
    async with running(tmp_path) as site:
        node = await site.lend()
        id, secret = site.key(320)
        other = await site.another("gw-2")
        for gateway in (site.gateway, other, site.gateway):
            assert (await site.answer(site.ask(secret, gateway=gateway), node)).status == 200
            await gateway.spending.report()
        assert site.spent(id) == 3 * COST
        assert other.calls.purses.of(id).spent_micro == 2 * COST
        await other.spending.report()
        for gateway in (site.gateway, other):
            assert gateway.calls.purses.of(id).spent_micro == 3 * COST
            assert (await site.ask(secret, gateway=gateway).done()).code == "budget_spent"
        new = await site.another("gw-3")
        assert (await site.ask(secret, gateway=new).done()).code == "budget_spent", "its grant says so"


async def test_what_the_hub_misses_is_said_again_and_at_the_end(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async with running(tmp_path) as site:
        node = await site.lend()
        id, secret = site.key(10_000)
        site.flaky.gone = False
        assert (await site.answer(site.ask(secret), node)).status == 200
        site.flaky.gone = True
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "ANSWER_S", 0.05)
            for _ in range(2):
                await site.gateway.spending.report()
            with caplog.at_level(logging.WARNING):
                await site.gateway.spending.report_last()
        assert [record.message for record in caplog.records if "1 API keys" in record.message]
        assert sum("can't be kept now" in record.message for record in caplog.records) <= 1, "the hub complains once"
        site.flaky.gone = False
        assert (await site.answer(site.ask(secret), node)).status == 200, "the key is known, whatever the hub does"
        site.network._stops[0][0].set()
        await until(lambda: not site.network.gateway_runs, what="the end of the gateway")
        assert site.spent(id) == 2 * COST


# the hub's desk
async def test_the_desk_believes_a_gateway_of_itself_only(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async with running(tmp_path) as site:
        id, _ = site.key(100)
        bus = MemoryBus(site.network.broker)

        async def tell(subject: str, gateway: str, *keys: m.KeySpent) -> tuple[m.KeySpent, ...]:
            said = codec.encode(m.Spent(gateway_id=GatewayId(gateway), since_ms=1, keys=keys))
            return codec.spent_answer.read(await bus.request(subject, said, within_s=0.3)).keys

        mine = m.KeySpent(key_id=id, micro=7)
        assert await tell(subjects.spent(GATEWAY), GATEWAY, mine, m.KeySpent(key_id=KeyId("key-nobodys"), micro=9)) == (mine,)
        assert await tell(subjects.spent(GATEWAY), GATEWAY, mine, m.KeySpent(key_id=id, micro=5)) == (mine,), "the most that was said"
        for subject, gateway in ((subjects.spent(GatewayId("gw-2")), GATEWAY), (subjects.spent(GATEWAY), "gw-2")):
            with pytest.raises(BrokerLost):
                await tell(subject, gateway, m.KeySpent(key_id=id, micro=90))
        with pytest.raises(BrokerLost):
            await bus.request(subjects.spent(GATEWAY), b"\x02nonsense", within_s=0.3)
        assert sum("dropped" in record.message for record in caplog.records) == 3
        assert site.spent(id) == 7
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(spending_desk, "WAITING_MAX", 0)
            with pytest.raises(BrokerLost):
                await tell(subjects.spent(GATEWAY), GATEWAY, m.KeySpent(key_id=id, micro=8))
        assert await tell(subjects.spent(GATEWAY), GATEWAY, m.KeySpent(key_id=id, micro=8)) == (m.KeySpent(key_id=id, micro=8),)
