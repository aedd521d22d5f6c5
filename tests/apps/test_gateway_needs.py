"""Needs at the gateway: wishes in body and headers, the key's policy from the hub's settings, and errors in each protocol's shape."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

import pytest
import vendor
from one_key import OneKeyDesk

from fallow.adapters.memory_bus import MemoryBus
from fallow.apps.hub.founding import POLICY_BYTES_MAX, policy_of
from fallow.apps.settings import Key
from fallow.model.errors import BadSetting
from fallow.model.ids import OrgId
from fallow.model.needs import Policy
from fallow.wire import openai as wire

if TYPE_CHECKING:  # the same file under the two names by which mypy and pytest know it
    from tests.apps.one_loop import KEY, MODEL, ORG, Asgi, FakeServed, Network
else:
    from one_loop import KEY, MODEL, ORG, Asgi, FakeServed, Network

pytestmark = pytest.mark.anyio

ALL = sorted(wire.HEADS)
NARROW = "fk-narrow"
POLICY = Policy(
    rings=frozenset({"own"}),
    countries=frozenset({"de"}),
    hardware="cpu",
    cost_max_micro=1_000,
    price_max_micro_per_munit=2_000_000,
)


def ask(
    network: Network, fallow: Any = None, *, path: str = wire.CHAT, key: str = KEY, headers: dict[str, str] | None = None, **more: Any
) -> Asgi:
    body = {"model": MODEL, **more} | ({} if fallow is None else {"fallow": fallow})
    return Asgi(network.gateway.app, path, json.dumps(body).encode(), {"authorization": f"Bearer {key}"} | (headers or {}), "POST")


@contextlib.asynccontextmanager
async def narrow(network: Network, policy: Policy = POLICY) -> AsyncIterator[None]:
    """Another key at the hub, which allows less."""
    await network.hub_bus.close()
    bus = MemoryBus(network.broker)
    async with asyncio.TaskGroup() as group:
        await OneKeyDesk(bus, NARROW, ORG, policy).start(group)
        yield
        await bus.close()


def error_of(path: str, call: Asgi) -> Any:
    """The error, in the envelope that the path's clients read."""
    assert call.status == 400
    if path.startswith(wire.MESSAGES):
        vendor.check("anthropic", "ErrorResponse", call.json)
        assert "param" not in call.json["error"]
    else:
        vendor.check("openai", "ErrorResponse", call.json)
    error = call.json["error"]
    assert (error["type"], error["code"]) == ("invalid_request_error", "invalid_request")
    return error


@pytest.mark.parametrize("path", ALL)
@pytest.mark.parametrize(
    ("fallow", "headers", "param"),
    [
        ({"ring": ["own"]}, {}, "fallow.ring"),
        ({"first_token_ms": 0}, {}, "fallow.first_token_ms"),
        ({"rings": ["own", "all"]}, {}, "fallow.rings[1]"),
        ({"rings": ["market"]}, {}, "fallow.rings"),
        ({"deadline_s": 1, "first_token_ms": 2000}, {}, "fallow.deadline_s"),
        ({"region": "eu-de", "country": "fr"}, {}, "fallow.region"),
        ({"strict": True}, {"Fallow-Service-Tier": "flex"}, "fallow.strict"),
        ({"max_cost": 1}, {"Fallow-Max-Cost": "2"}, "fallow.max_cost"),
        (None, {"Fallow-Max-Cost": "much"}, "Fallow-Max-Cost"),
        (None, {"Fallow-Cost": "1"}, "fallow-cost"),
        (None, {"Fallow-Service-Tier": "gold"}, "Fallow-Service-Tier"),
        (None, {"Fallow-Rings": "own, market"}, "fallow.rings"),
    ],
)
async def test_needs_that_are_wrong(path: str, fallow: Any, headers: dict[str, str], param: str) -> None:
    async with Network() as network:
        node = await network.play("node-h")
        call = await ask(network, fallow, path=path, headers=headers).done()
        error = error_of(path, call)
        assert error.get("param", param) == param
        assert param in error["message"]
        assert node.requests.empty()


@pytest.mark.parametrize(
    ("fallow", "headers"),
    [
        ({"rings": ["own"], "max_cost": 0.5, "country": None}, {}),
        ({}, {"Fallow-Rings": "own, partner", "Fallow-Strict": "true"}),
        (None, {"Fallow-Deadline-S": "3.5", "Fallow-Prefer": "cheap", "Fallow-Service-Tier": "priority"}),
        ({"rings": ["own", "partner"]}, {"Fallow-Rings": "partner,own"}),
    ],
)
async def test_the_body_goes_on_as_it_came(fallow: Any, headers: dict[str, str]) -> None:
    async with Network() as network:
        served = FakeServed()
        await network.add("node-a", served)
        call = await ask(network, fallow, headers=headers, messages=[]).done()
        assert call.status == 200, call.json
        assert served.bodies == [json.dumps({"model": MODEL, "messages": []} | ({} if fallow is None else {"fallow": fallow})).encode()]


@pytest.mark.parametrize(
    ("fallow", "says"), [({"hardware": "gpu"}, "hardware"), ({"region": "eu-de"}, "region"), ({"isolation": "bwrap"}, "isolation")]
)
async def test_what_no_node_is_refuses_the_call(fallow: Any, says: str) -> None:
    async with Network() as network:
        node = await network.play("node-h")
        call = await ask(network, fallow).done()
        assert (call.status, call.code) == (400, "over_limits")
        assert says in call.json["error"]["message"]
        assert node.requests.empty()


@pytest.mark.parametrize("path", [wire.CHAT, wire.MESSAGES])
@pytest.mark.parametrize(
    ("fallow", "param", "says"),
    [
        ({"rings": ["own", "partner"]}, "fallow.rings", "your key allows own, not partner; "),
        ({"region": "eu-fr"}, "fallow.region", "the countries de, not eu-fr; "),
        ({"country": ["de", "FR"]}, "fallow.country", "de, not fr; "),
        ({"hardware": "gpu"}, "fallow.hardware", "cpu, not gpu; "),
        ({"max_cost": 0.002}, "fallow.max_cost", "at most 0.001 credits, not at most 0.002 credits; "),
        ({"max_price": 3}, "fallow.max_price", "at most 2 credits, not at most 3 credits; "),
    ],
)
async def test_a_key_that_allows_less(path: str, fallow: Any, param: str, says: str) -> None:
    async with Network() as network, narrow(network):
        node = await network.play("node-h")
        error = error_of(path, await ask(network, fallow, path=path, key=NARROW).done())
        assert error.get("param", param) == param
        assert error["message"].startswith(f"{param}: ")
        assert says in error["message"]
        assert node.requests.empty()


async def test_what_the_key_says_holds_without_any_wish() -> None:
    async with Network() as network, narrow(network, Policy(hardware="gpu")):
        node = await network.play("node-h")
        call = await ask(network, key=NARROW).done()
        assert (call.status, call.code) == (400, "over_limits")
        assert "hardware" in call.json["error"]["message"]
        assert node.requests.empty()


@pytest.mark.parametrize(
    ("key", "policy"),
    [
        (Key(), Policy()),
        (Key(max_cost=0, max_price=0, hardware="", isolation="none"), Policy()),
        (Key(rings=("own", "own")), Policy(rings=frozenset({"own"}))),
        (Key(max_cost=0.29, max_price=3), Policy(cost_max_micro=290_000, price_max_micro_per_munit=3_000_000)),
        (Key(max_cost=1e-12), Policy(cost_max_micro=1)),
        (Key(privacy="padded"), Policy(privacy="padded")),
        (Key(privacy="whole"), Policy(privacy="whole")),
        (Key(hardware="gpu", isolation="bwrap", prefer="fast"), Policy(hardware="gpu", isolation="bwrap", prefer="fast")),
        (
            Key(partners=("friend",), regions=("eu-de",), countries=("de", "at")),
            Policy(partners=frozenset({OrgId("friend")}), regions=frozenset({"eu-de"}), countries=frozenset({"de", "at"})),
        ),
    ],
)
def test_the_policy_of_the_settings(key: Key, policy: Policy) -> None:
    assert policy_of(key) == policy


def test_a_policy_that_no_message_carries() -> None:
    with pytest.raises(BadSetting, match=f"the limit is {POLICY_BYTES_MAX}: name fewer partners, regions or countries"):
        policy_of(Key(partners=tuple(f"organisation-{n:03}" for n in range(256))))
