"""The owner's side of a node: the gate and what it senses, the desk, the settings' watch, and what the owner is shown."""

import asyncio
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import msgspec

from fallow.adapters import machine
from fallow.adapters.jail import Jail
from fallow.adapters.owner_record import OwnerRecord, stamp
from fallow.adapters.reins import Reins
from fallow.adapters.senses.machine_senses import MachineSenses
from fallow.apps.node.asking import Asking, choice_of
from fallow.apps.node.attached import KINDS
from fallow.apps.node.desk import Desk
from fallow.apps.node.engine_served import EngineServed
from fallow.apps.node.gatekeeper import Gatekeeper
from fallow.apps.node.limits import limits_of
from fallow.apps.node.node import Node
from fallow.apps.node.pricing import Pricing
from fallow.apps.node.served import Served
from fallow.apps.node.settings_watch import SettingsWatch
from fallow.apps.node.workbook import WorkBook
from fallow.apps.settings import Settings, desktop
from fallow.model.ids import NodeId
from fallow.model.measured import Measured
from fallow.model.owner import WORKING, Limits, OwnerStatus, Profile, Refusals
from fallow.ports import Clock


class LentEngines:
    """The engines of our own, as the gatekeeper sees them; an attached server has none."""

    def __init__(self) -> None:
        self._served: list[EngineServed] = []
        self._left: list[EngineServed] = []

    def take(self, served: Sequence[Served]) -> None:
        """From now on these are there."""
        self._served = [one for one in served if isinstance(one, EngineServed)]

    def reins(self) -> Iterable[Reins]:
        return [one.supervisor.reins for one in self._served]

    @property
    def threads(self) -> int:
        return max((one.facts.threads for one in self._served), default=1)

    def free(self) -> None:
        here = [one for one in self._served if one.supervisor.phase != "cold"]
        self._left = here or self._left
        for one in here:
            one.leave()

    def left(self) -> None:
        """Nothing was loaded when the node started; the first model should be there once it may work."""
        self._left = self._served[:1]

    def fetch_back(self) -> bool:
        """Only the first: the others are loaded when somebody calls for them."""
        if any(one.supervisor.phase == "leaving" for one in self._left):
            return False
        for one in self._left[:1]:
            one.want()
        self._left = []
        return True

    @property
    def are_loading(self) -> bool:
        return any(one.supervisor.phase == "loading" for one in self._served)


def refusals_of(settings: Settings) -> Refusals:
    """What the settings refuse."""
    lend = settings.lend
    return Refusals(
        models=frozenset(lend.refuse_models),
        paths=frozenset(path for kind in lend.refuse_kinds for path in KINDS[kind]),
        organisations=frozenset(lend.refuse_organisations),
        countries=frozenset(lend.refuse_countries),
    )


class OwnerSide:
    """All of it, for one node. `default` is the profile where the settings name none."""

    def __init__(
        self,
        settings: Settings,
        *,
        node_id: NodeId,
        default: Profile,
        roots: Sequence[int],
        is_attached: bool,
        reload: Callable[[], Settings],
        clock: Clock,
    ) -> None:
        self._settings = settings
        self._node_id = node_id
        self._default = default
        self._is_attached = is_attached
        self._clock = clock
        self._served: Sequence[Served] = ()
        self._isolation: tuple[str, tuple[str, ...]] = ("", ())
        self._pricing = Pricing(settings, {})
        self._engines = LentEngines()
        self._record = OwnerRecord(settings.data)
        self._work = WorkBook(self._record, clock, lambda cores: self._pricing.watts(cores).value)
        here = desktop()
        self._sensing = MachineSenses(
            roots=roots,
            disk_folder=settings.data,
            programs=lambda: self.gatekeeper.limits.programs,
            session_bus=here.session_bus,
            system_bus=here.system_bus,
            has_display=here.has_display,
        )
        self.gatekeeper = Gatekeeper(self._sensing, self._limits(settings), self._engines, self._record, self._work, clock)
        at_start = ("isolation", "measure", "cores", "serves", *(("refuse_kinds", "refuse_models") if is_attached else ()))
        self._watch = SettingsWatch(settings, reload, self._take, at_start)
        self._node: Node | None = None
        self._usd_per_kwh = settings.power.usd_per_kwh
        self.asking = Asking(choice_of(settings), clock, self._reprice)
        self.gatekeeper.power_costs = self._power_costs

    def _limits(self, settings: Settings) -> Limits:
        limits = limits_of(settings, default=self._default, cores_physical=machine.physical_cores(), cores=machine.usable_cpus())
        if self._is_attached:  # its use can't be told from the owner's
            limits = msgspec.structs.replace(limits, others_share_max=None)
        return limits

    def _take(self, settings: Settings) -> None:
        """Raises BadSetting, and then nothing has changed."""
        self.gatekeeper.limits = self._limits(settings)
        self._settings = settings
        self._pricing.owner_watts = settings.power.watts
        self.asking.choice = choice_of(settings)
        self._reprice()
        if self._node is not None:
            self._node.refuse(refusals_of(settings))
        self.gatekeeper.look()

    def _power_costs(self, usd_per_kwh: float) -> None:
        """Electricity costs something else from now on."""
        self._usd_per_kwh = usd_per_kwh
        self._reprice()

    def _reprice(self) -> bool:
        """Electricity, the index or the owner's choice is another; what an attached server costs is its lender's word.

        Whether anything is asked differently now. A call that was sent here keeps the price of the offer that it was sent for.
        """
        ours = [one for one in self._served if isinstance(one, EngineServed)]
        before = [one.price for one in ours]
        for one in ours:
            one.price = self.asking.ask(one.model, self._pricing.price(one.model, self._usd_per_kwh))
        has_changed = before != [one.price for one in ours]
        if has_changed and self._node is not None:
            self._node.pulse.introduce()
        return has_changed

    def lend(self, served: Sequence[Served], jail: Jail, measured: Mapping[str, Measured]) -> None:
        """What this machine lends; until now there was only the owner to listen to."""
        self._served = served
        self._isolation = (jail.level, jail.missing)
        self._pricing = Pricing(self._settings, measured)
        self._engines.take(served)
        self._reprice()

    def may_work(self) -> bool:
        """What the gate said last."""
        return self.gatekeeper.verdict.state in WORKING

    def follows_demand(self) -> bool:
        """Whether models may come and go now as callers want them."""
        return self._settings.lend.follow_demand and self.may_work()

    def offered(self) -> frozenset[str]:
        """The models in engines of our own that callers may have."""
        refused, ours = refusals_of(self._settings), [one for one in self._served if isinstance(one, EngineServed)]
        return frozenset(one.model for one in ours if one.model not in refused.models and one.paths - refused.paths)

    def load_later(self) -> None:
        """The first model, as soon as the machine may work."""
        self._engines.left()
        self.gatekeeper.fetch_back_later()

    def join(self, node: Node) -> None:
        """From now on the node hears what the gate says."""
        self._node = node
        self.gatekeeper.tell = node.take
        self.gatekeeper.is_idle = lambda: not len(node.jobs)
        node.jobs.did = self._work.did
        node.refuse(refusals_of(self._settings))
        node.take(self.gatekeeper.verdict, False)

    async def run(self, folder: Path) -> None:
        """Until cancelled. The desk's socket lies in `folder`."""
        desk = Desk(self._record, self._clock, self.status, self.gatekeeper.look)
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self.gatekeeper.run(), name="gatekeeper")
                group.create_task(desk.serve(folder, self._settings.data, os.getpid()), name="desk")
                group.create_task(self._watch.run(), name="settings")
        finally:
            await asyncio.shield(self._sensing.close())

    def status(self) -> OwnerStatus:
        verdict, limits, now = self.gatekeeper.verdict, self.gatekeeper.limits, self._clock.now_ms()
        wall = self._clock.wall_ms()
        watts = self._pricing.watts(float(limits.cores_max))
        return OwnerStatus(
            node_id=self._node_id,
            profile=limits.profile,
            state=verdict.state,
            reason=verdict.reason,
            detail=verdict.detail,
            since=stamp(wall - (now - verdict.since_ms)),
            until=None if verdict.until_ms is None else stamp(wall + (verdict.until_ms - now)),
            cores=verdict.cores,
            unread=verdict.unread,
            absent=verdict.absent,
            isolation=self._isolation[0],
            isolation_missing=self._isolation[1],
            models=tuple(one.model for one in self._served),
            running=len(self._node.jobs) if self._node is not None else 0,
            today=self._work.today(),
            watts=0.0 if self._is_attached else watts.value,
            watts_method=watts.method,
            usd_per_kwh=self._usd_per_kwh,
            settings_error=self._watch.error,
            needs_restart=self._watch.needs_restart,
        )
