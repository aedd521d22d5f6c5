"""A gateway forgets who was put out, at once, and nobody else."""

from typing import TYPE_CHECKING

import pytest

from fallow.model import messages as m
from fallow.model.ids import NodeId
from fallow.wire import codec, subjects

if TYPE_CHECKING:
    from tests.apps.one_loop import FakeServed, Network, turns
else:
    from one_loop import FakeServed, Network, turns

pytestmark = pytest.mark.anyio


async def test_who_is_banned_is_forgotten_and_the_others_stay() -> None:
    async with Network() as network:
        for name in ("node-a", "node-b"):
            await network.add(name, FakeServed())
        banned = m.PutOut(node_ids=(NodeId("node-a"), NodeId("nobody")))
        await network.hand.publish(subjects.BANNED.pattern, codec.encode(banned))
        await turns()
        assert set(network.gateway.roster.members()) == {"node-b"}
        await network.hand.publish(subjects.BANNED.pattern, b"\x02nonsense")
        await turns()
        assert set(network.gateway.roster.members()) == {"node-b"}
