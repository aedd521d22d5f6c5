"""A hub's desk for unit tests that knows one API key and answers within the same turn of the loop."""

import asyncio
import contextlib
import hashlib

from fallow.model import messages as m
from fallow.model.call import Allowance, Grant
from fallow.model.errors import BrokerLost, WireError
from fallow.model.ids import KeyId, OrgId
from fallow.model.needs import Policy
from fallow.ports import Bus, Delivery
from fallow.wire import codec, subjects

USUAL = Policy()
GENEROUS = Allowance()


class OneKeyDesk:
    """Answers gateways' questions about API keys."""

    def __init__(self, bus: Bus, key: str, org_id: OrgId, policy: Policy = USUAL, allowance: Allowance = GENEROUS) -> None:
        self._bus = bus
        self._digest = hashlib.sha256(key.encode()).digest()
        self._grant = Grant(key_id=KeyId("key-" + self._digest.hex()[:12]), org_id=org_id, policy=policy, allowance=allowance)
        self._group: asyncio.TaskGroup | None = None

    async def start(self, group: asyncio.TaskGroup) -> None:
        self._group = group
        await self._bus.subscribe(subjects.KEY.pattern, self._on_query, group="hub")

    def _on_query(self, delivery: Delivery) -> None:
        try:
            known = codec.key_query.read(delivery.data).key_digest == self._digest
        except WireError:
            return
        assert self._group is not None, "queries come only while the hub runs"
        self._group.create_task(self._answer(delivery.reply, m.KeyAnswer(grant=self._grant if known else None)))

    async def _answer(self, subject: str, answer: m.KeyAnswer) -> None:
        with contextlib.suppress(BrokerLost):
            await self._bus.publish(subject, codec.encode(answer))
