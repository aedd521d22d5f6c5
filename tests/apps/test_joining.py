"""Joining a real broker by a real hub's desk: the first address that answers, what is kept, what is asked anew, and renewal."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest
from trusted import Site

from fallow.adapters.clock import SystemClock
from fallow.adapters.nats_bus import NatsBus
from fallow.adapters.sql.registry import SqlRegistry, open_registry
from fallow.apps import joining
from fallow.apps.hub import registrar
from fallow.apps.hub.enrolling import EnrolDesk
from fallow.apps.joining import Renewal, join, read_invitation
from fallow.model import messages as m
from fallow.model.errors import NotAdmitted, StartFailed
from fallow.model.ids import OrgId
from fallow.wire import invitation
from fallow.wire.invitation import Invitation
from fallow.wire.jwt import expiry_of

pytestmark = pytest.mark.anyio
ACME = OrgId("acme")
NOBODY = "nats://127.0.0.1:9"
CLOCK = SystemClock()


class Hub:
    """A broker, a registry, and the desk that lets machines in."""

    def __init__(self, site: Site, registry: SqlRegistry, life_s: int) -> None:
        self.site = site
        self.registry = registry
        self.bus = NatsBus(site.broker.address, site.operator.hub_user(), "hub")
        issue = site.operator.credential
        self.desk = EnrolDesk(
            self.bus,
            registry,
            lambda role, key, life_s: issue(role, key, now_s=CLOCK.wall_ms() // 1000, life_s=life_s),
            CLOCK,
            open_to=None,
            vouch=site.operator.vouch,
            authority=site.operator.authority,
            hub_org_id=OrgId("hub"),
            life_s=life_s,
        )

    def invite(self, *addresses: str) -> Invitation:
        _, word = registrar.invite(self.registry, org_id=ACME, roles=frozenset({"node"}), uses=1, lasts_ms=None, now_ms=CLOCK.wall_ms())
        door = self.site.operator.door()
        return Invitation(addresses=addresses or (self.site.broker.address,), door_jwt=door.jwt, door_seed=door.key.seed, word=word)


@contextlib.asynccontextmanager
async def running(folder: Path, *, life_s: int = 86_400) -> AsyncIterator[Hub]:
    site = await Site.start(folder)
    registry = open_registry(f"sqlite:///{folder / 'hub.db'}")
    registrar.add_organisation(registry, ACME, now_ms=1)
    hub = Hub(site, registry, life_s)
    await hub.bus.connect()
    try:
        async with asyncio.TaskGroup() as group:
            await hub.desk.start(group)
            yield hub
    finally:
        await hub.bus.close()
        registry.close()
        await site.broker.stop()


async def test_what_the_hub_gave_is_kept_and_used_again(tmp_path: Path) -> None:
    async with running(tmp_path) as hub:
        invited = hub.invite()
        first = await join(tmp_path, "node", invited, "", "", CLOCK)
        assert first.org_id == ACME
        assert first.authority == hub.site.operator.authority
        again = await join(tmp_path, "node", None, "", "", CLOCK)
        assert again.credentials.jwt == first.credentials.jwt
        assert first.hub_org_id == again.hub_org_id == "hub"
        assert again.credentials.key.public == first.credentials.key.public
        assert hub.desk.admitted == {"node": 1}, "what is kept needs no asking"
        bus = NatsBus(again.address, again.credentials, "node", reach=again.reach)
        await bus.connect()
        await bus.close()


async def test_a_machine_that_was_away_for_long_is_let_in_without_an_invitation(tmp_path: Path) -> None:
    async with running(tmp_path, life_s=int(joining.FRESH_S_MIN) - 1) as hub:
        first = await join(tmp_path, "node", hub.invite(), "", "", CLOCK)
        again = await join(tmp_path, "node", None, "", "", CLOCK)
        assert hub.desk.admitted == {"node": 2}
        assert again.credentials.key.public == first.credentials.key.public


async def test_the_first_address_that_answers_is_the_one_from_now_on(tmp_path: Path) -> None:
    async with running(tmp_path) as hub:
        there = hub.site.broker.address
        joined = await join(tmp_path, "node", hub.invite(NOBODY, there), "", "", CLOCK)
        assert joined.address == there
        assert (await join(tmp_path, "node", None, "", "", CLOCK)).address == there
        assert (await join(tmp_path, "node", None, NOBODY, "", CLOCK)).address == NOBODY, "a flag wins"
        with pytest.raises(StartFailed, match=r"127\.0\.0\.1:9"):
            await join(tmp_path / "other", "node", hub.invite(NOBODY), "", "", CLOCK)


async def test_who_may_not_is_told_so(tmp_path: Path) -> None:
    async with running(tmp_path) as hub:
        invited = hub.invite()
        with pytest.raises(NotAdmitted, match="did not let us in") as caught:
            await join(tmp_path, "node", msgspec.structs.replace(invited, word="another"), "", "", CLOCK)
        assert invited.door_seed not in caught.value.message
        assert not (tmp_path / "identity" / "node.json").exists()
        with pytest.raises(StartFailed, match="--join TOKEN"):
            await join(tmp_path, "node", None, "", "", CLOCK)
        with pytest.raises(NotAdmitted):
            await join(tmp_path, "gateway", invited, "", "", CLOCK)


async def test_nothing_but_a_websocket_goes_through_a_proxy(tmp_path: Path) -> None:
    async with running(tmp_path) as hub:
        with pytest.raises(StartFailed, match="websocket_port"):
            await join(tmp_path, "node", hub.invite(), "", "http://127.0.0.1:9", CLOCK)


async def test_a_credential_is_renewed_and_kept(tmp_path: Path) -> None:
    async with running(tmp_path) as hub:
        joined = await join(tmp_path, "node", hub.invite(), "", "", CLOCK)
        bus = NatsBus(joined.address, joined.credentials, "node", reach=joined.reach)
        await bus.connect()
        told: list[m.Enrolled] = []
        hub.desk._life_s *= 2
        assert await Renewal("node", joined, bus, CLOCK, told.append).renew()
        await bus.close()
        kept = (await join(tmp_path, "node", None, "", "", CLOCK)).credentials.jwt
        assert kept == told[0].credential != joined.credentials.jwt
        until_s, before_s = expiry_of(kept), expiry_of(joined.credentials.jwt)
        assert until_s is not None
        assert before_s is not None
        assert until_s > before_s + 3_600
        assert hub.desk.renewed == {"node": 1}


async def test_who_was_put_out_is_not_renewed(tmp_path: Path) -> None:
    async with running(tmp_path) as hub:
        joined = await join(tmp_path, "node", hub.invite(), "", "", CLOCK)
        bus = NatsBus(joined.address, joined.credentials, "node", reach=joined.reach)
        await bus.connect()
        hub.registry.members.ban(joined.credentials.key.public, at_ms=CLOCK.wall_ms())
        assert not await Renewal("node", joined, bus, CLOCK).renew()
        await bus.close()
        assert hub.desk.refused["banned"] == 1


@pytest.mark.parametrize("text", ["", "nonsense", "fallow1-AAAA"])
def test_what_is_no_invitation_names_where_it_stood(text: str) -> None:
    with pytest.raises(StartFailed, match="FALLOW_JOIN holds no invitation"):
        read_invitation(text, "FALLOW_JOIN")


def test_an_invitation_is_read_with_its_line_end() -> None:
    invited = Invitation(addresses=(NOBODY,), word="word")
    assert read_invitation(invitation.write(invited) + "\n", "a file") == invited
