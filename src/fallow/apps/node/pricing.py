"""What lending costs this owner in electricity, and so the least that their node asks."""

from collections.abc import Mapping

from fallow.adapters import machine
from fallow.apps.settings import Settings
from fallow.core import power
from fallow.core.match.predict import DECODE_TOKENS_PER_S_GUESS, PREFILL_TOKENS_PER_S_GUESS
from fallow.model.measured import Measured
from fallow.model.offer import Price


class Pricing:
    """`measured` has the models that were measured here; one that wasn't is priced as a slow one."""

    def __init__(self, settings: Settings, measured: Mapping[str, Measured]) -> None:
        self.owner_watts = settings.power.watts
        self._measured = dict(measured)
        self._cores = machine.physical_cores()
        self._machine = power.machine_class(cores=self._cores, has_battery=machine.has_battery(), cpu=machine.read_cpu_name())

    def watts(self, busy: float) -> power.Watts:
        """Beyond idling, while so many cores work. What the processor's meter said was for one model's threads."""
        whole = power.watts_of(busy=self._cores, cores=self._cores, machine=self._machine, owner_watts=self.owner_watts)
        share = min(1.0, busy / self._cores)
        return power.Watts(value=whole.value * share, method=whole.method)

    def price(self, model: str, usd_per_kwh: float) -> Price:
        """The floor: what the electricity of a million tokens costs, in micro-credits."""
        measured = self._measured.get(model)
        if measured is None:
            return self._guessed(usd_per_kwh)
        return power.price(measured, self.watts_at(measured), usd_per_kwh=usd_per_kwh)

    def watts_at(self, measured: Measured) -> power.Watts:
        """Beyond idling, while the model is asked as it was when it was measured."""
        return power.watts_of(
            busy=measured.choice.threads,
            cores=self._cores,
            machine=self._machine,
            owner_watts=self.owner_watts,
            measured_watts=measured.watts,
        )

    def _guessed(self, usd_per_kwh: float) -> Price:
        """For a model that wasn't measured: as slow as matching takes it to be, since a price must never be below what it costs."""
        watts = self.watts(self._cores)
        return Price(
            prompt_micro_per_munit=power.floor_price(watts, usd_per_kwh=usd_per_kwh, tokens_per_s=PREFILL_TOKENS_PER_S_GUESS),
            output_micro_per_munit=power.floor_price(watts, usd_per_kwh=usd_per_kwh, tokens_per_s=DECODE_TOKENS_PER_S_GUESS),
        )
