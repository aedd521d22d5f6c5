"""The owner's limits as one table: what breaks each, how it is told to the owner, and what follows; the owner gate walks it."""

import math
from collections.abc import Callable

import msgspec
from msgspec.structs import asdict, replace

from fallow.core import hours
from fallow.model.owner import DAY_MINUTES, Battery, Limits, Reason, Senses, Unknown

OVER_SAMPLES = 2
"""How many samples in a row over the limit are "others are busy"; a single one of 100 ms is often nothing."""
EASED = 0.8
"""A limit that was broken counts as kept again below this part of it."""
EASED_TEMPERATURE_C = 5.0
EASED_MEMORY_SHARE = 0.05
GRACE_MS = 30_000
"""For reasons that can wait: calls that run may end."""
FAR_MS = 10 * 365 * 86_400_000
"""A pause for longer than this has no end that is worth telling."""
MINUTE_MS = 60_000
GB = 10**9


class Moment(msgspec.Struct, frozen=True, kw_only=True):
    """What a limit is compared with. `over` counts samples in a row over the CPU limit.

    `held` are limits that were broken since the node last ran: to be kept again they need some room.
    """

    senses: Senses
    limits: Limits
    now_ms: int
    over: int = 0
    held: frozenset[Reason] = frozenset()

    def eased(self, reason: Reason) -> float:
        """By what to multiply the limit of a reason."""
        return EASED if reason in self.held else 1.0

    def bound(self, reason: Reason, limit: str, to_go_on: str) -> str:
        """The limit in words, with what it takes to go on once it was broken."""
        return f"the limit is {limit}, and {to_go_on} to go on" if reason in self.held else f"the limit is {limit}"


class Rule(msgspec.Struct, frozen=True, kw_only=True):
    """One limit. `broken` says how it is broken, or None.

    `settles`: all must be quiet for the owner's quiet period before the node goes on. `frees`: memory is given back.
    """

    reason: Reason
    broken: Callable[[Moment], str | None]
    settles: bool = True
    frees: bool = False
    grace_ms: int = 0


class Broken(msgspec.Struct, frozen=True):
    """A limit that is broken, in a sentence for the owner."""

    rule: Rule
    detail: str


def broken_limits(moment: Moment) -> tuple[Broken, ...]:
    """All limits that are broken, in the order of RULES."""
    told = ((rule, rule.broken(moment)) for rule in RULES)
    return tuple(Broken(rule, detail) for rule, detail in told if detail is not None)


def legible(senses: Senses) -> tuple[Senses, tuple[str, ...]]:
    """The senses with numbers that are none (NaN, infinite) as Unknown, and the names of all that can't be read, sorted."""
    values = asdict(senses)
    nonsense = {name: Unknown("not a number") for name, value in values.items() if not _is_sane(value)}
    unread = {name for name, value in values.items() if isinstance(value, Unknown)} | set(nonsense)
    return (replace(senses, **nonsense) if nonsense else senses), tuple(sorted(unread))


SENSORS = ("battery", "disk_free_bytes", "fullscreen", "input_idle_s", "io_pressure", "memory_pressure", "metered", "temperature_c")
"""What a machine may lack."""


def absent(senses: Senses) -> tuple[str, ...]:
    """The sensors that the machine doesn't have, so that their limits are left out."""
    return tuple(name for name in SENSORS if getattr(senses, name) is None)


def others(senses: Senses) -> float | None:
    """How many cores' worth of work is others', no more than there are; None: can't be read."""
    if isinstance(senses.others_cores, Unknown):
        return None
    return min(max(0.0, senses.others_cores), float(cores(senses)))


def cores(senses: Senses) -> int:
    """How many cores there are, one at least."""
    return max(1, senses.cores)


def is_over(moment: Moment) -> bool:
    """Whether others use more than the owner's limit at this one sample."""
    busy, most = others(moment.senses), moment.limits.others_share_max
    return busy is not None and most is not None and busy / cores(moment.senses) > most * moment.eased("cpu_busy")


def usd_per_kwh_now(limits: Limits, minute: int) -> float:
    """What a kilowatt-hour costs at this minute of the day: the first window that has it, else the usual price."""
    for one in limits.power_windows:
        if hours.is_within((one.window,), minute):
            return one.usd_per_kwh
    return limits.usd_per_kwh


def until_ms(reason: Reason, moment: Moment) -> int | None:
    """When this reason ends, as far as can be told, to the minute where it is one of the day."""
    senses, limits, minute = moment.senses, moment.limits, moment.senses.minute
    if reason == "owner_paused":
        end = senses.paused_until_ms
        return end if end is not None and end - moment.now_ms <= FAR_MS else None
    if reason == "input" and isinstance(senses.input_idle_s, (int, float)) and limits.input_idle_s_min is not None:
        return moment.now_ms + round((limits.input_idle_s_min - max(0.0, senses.input_idle_s)) * 1_000)
    minutes: int | None = None
    if reason == "hours":
        minutes = hours.minutes_until(limits.hours, minute)
    elif reason == "upload_spent":
        minutes = DAY_MINUTES - minute
    elif reason == "power_price":
        minutes = _minutes_until_cheaper(limits, minute)
    return None if minutes is None else moment.now_ms + minutes * MINUTE_MS


def _minutes_until_cheaper(limits: Limits, minute: int) -> int | None:
    """The price changes only where a window begins or ends, so no other minute is looked at."""
    changes = {edge % DAY_MINUTES for one in limits.power_windows for edge in (one.window.start, one.window.end)}
    most = limits.usd_per_kwh_max
    waits = [(edge - minute) % DAY_MINUTES for edge in changes if most is None or usd_per_kwh_now(limits, edge) <= most]
    return min(waits, default=None)


def _is_sane(value: object) -> bool:
    if isinstance(value, Battery):
        return math.isfinite(value.percent)
    return not isinstance(value, float) or math.isfinite(value)


def _owner_paused(m: Moment) -> str | None:
    until = m.senses.paused_until_ms
    return "you paused it" if until is not None and m.now_ms < until else None


def _memory_low(m: Moment) -> str | None:
    free, least = m.senses.memory_free_share, m.limits.memory_free_share_min
    # Halfway to all of it at most: else an owner's limit near 100 % could never be kept again.
    needed = min(least + EASED_MEMORY_SHARE, (least + 1) / 2) if "memory_low" in m.held else least
    if isinstance(free, Unknown) or free >= needed:
        return None
    return f"{100 * free:.0f} % of memory is free, {m.bound('memory_low', f'{100 * least:.0f} %', f'{100 * needed:.0f} %')}"


def _memory_pressure(m: Moment) -> str | None:
    return _pressure(m, m.senses.memory_pressure, m.limits.memory_pressure_max, "memory_pressure", "memory")


def _io_pressure(m: Moment) -> str | None:
    return _pressure(m, m.senses.io_pressure, m.limits.io_pressure_max, "io_pressure", "the disk")


def _pressure(m: Moment, value: float | Unknown | None, most: float | None, reason: Reason, what: str) -> str | None:
    if value is None or isinstance(value, Unknown) or most is None or value <= most * m.eased(reason):
        return None
    return f"programs wait for {what} {value:.0f} % of the time, {m.bound(reason, f'{most:.0f} %', f'{EASED * most:.0f} %')}"


def _hours(m: Moment) -> str | None:
    return None if hours.is_within(m.limits.hours, m.senses.minute) else f"it is outside of the hours {hours.written(m.limits.hours)}"


def _power_price(m: Moment) -> str | None:
    price, most = usd_per_kwh_now(m.limits, m.senses.minute), m.limits.usd_per_kwh_max
    return None if most is None or price <= most else f"power costs {price:.2f} USD per kWh, the limit is {most:.2f}"


def _upload_spent(m: Moment) -> str | None:
    sent, most = m.senses.uploaded_today_bytes, m.limits.upload_bytes_per_day_max
    return None if most is None or sent < most else f"{sent / GB:.1f} GB were uploaded today, the limit is {most / GB:.1f} GB"


def _program(m: Moment) -> str | None:
    running = sorted(m.senses.programs)
    return f"{running[0]} runs, which is on your list of programs" if m.limits.programs and running else None


def _fullscreen(m: Moment) -> str | None:
    return "a program fills the screen" if m.senses.fullscreen is True and not m.limits.while_fullscreen else None


def _input(m: Moment) -> str | None:
    idle, least = m.senses.input_idle_s, m.limits.input_idle_s_min
    if idle is None or isinstance(idle, Unknown) or least is None or idle >= least:
        return None
    return f"keyboard or mouse were used {max(0.0, idle):.0f} s ago, the limit is {least:.0f} s"


def _cpu_busy(m: Moment) -> str | None:
    busy, most = others(m.senses), m.limits.others_share_max
    if m.over < OVER_SAMPLES or busy is None or most is None:
        return None
    count = cores(m.senses)
    bound = m.bound("cpu_busy", f"{most * count:.1f}", f"{EASED * most * count:.1f}")
    return f"others use {busy:.1f} of {count} {'core' if count == 1 else 'cores'}, {bound}"


def _on_battery(m: Moment) -> str | None:
    battery = m.senses.battery
    return "the machine runs on its battery" if isinstance(battery, Battery) and not battery.on_mains and not m.limits.on_battery else None


def _battery_low(m: Moment) -> str | None:
    # No room to be gained here: many laptops charge to 80 % only, and would never come back.
    battery, least = m.senses.battery, m.limits.battery_percent_min
    if not isinstance(battery, Battery) or battery.percent >= least:
        return None
    return f"the battery is at {battery.percent:.0f} %, the limit is {least:.0f} %"


def _battery_unknown(m: Moment) -> str | None:
    battery, matters = m.senses.battery, not m.limits.on_battery or m.limits.battery_percent_min > 0
    return f"the battery can't be read: {battery.why}" if isinstance(battery, Unknown) and matters else None


def _hot(m: Moment) -> str | None:
    now, most = m.senses.temperature_c, m.limits.temperature_c_max
    if now is None or isinstance(now, Unknown) or most is None:
        return None
    eased = most - EASED_TEMPERATURE_C
    if now <= (eased if "hot" in m.held else most):
        return None
    return f"the processor is at {now:.0f} degrees, {m.bound('hot', f'{most:.0f}', f'{eased:.0f}')}"


def _temperature_unknown(m: Moment) -> str | None:
    now = m.senses.temperature_c
    return f"the temperature can't be read: {now.why}" if isinstance(now, Unknown) and m.limits.temperature_c_max is not None else None


def _metered(m: Moment) -> str | None:
    return "the network is metered" if m.senses.metered is True and not m.limits.while_metered else None


def _disk_low(m: Moment) -> str | None:
    free, least = m.senses.disk_free_bytes, m.limits.disk_free_bytes_min
    if free is None or isinstance(free, Unknown) or free * m.eased("disk_low") >= least:
        return None
    return f"{free / GB:.1f} GB of the disk are free, {m.bound('disk_low', f'{least / GB:.1f} GB', f'{least / EASED / GB:.1f} GB')}"


RULES = (
    Rule(reason="owner_paused", broken=_owner_paused, settles=False),
    # What frees memory stands before all that only pauses, so that the reason explains the state.
    Rule(reason="memory_low", broken=_memory_low, frees=True),
    Rule(reason="memory_pressure", broken=_memory_pressure, frees=True),
    # What lasts for hours stands before what comes and goes: it tells the owner more, and fills no log.
    Rule(reason="hours", broken=_hours, settles=False, grace_ms=GRACE_MS),
    Rule(reason="power_price", broken=_power_price, settles=False, grace_ms=GRACE_MS),
    # The count starts anew once a day, so there is nothing that could flap.
    Rule(reason="upload_spent", broken=_upload_spent, settles=False, grace_ms=GRACE_MS),
    # What the owner does now.
    Rule(reason="program", broken=_program),
    Rule(reason="fullscreen", broken=_fullscreen),
    Rule(reason="input", broken=_input),
    Rule(reason="cpu_busy", broken=_cpu_busy),
    # What the machine is short of.
    Rule(reason="on_battery", broken=_on_battery),
    Rule(reason="battery_low", broken=_battery_low),
    Rule(reason="battery_unknown", broken=_battery_unknown),
    Rule(reason="hot", broken=_hot),
    Rule(reason="temperature_unknown", broken=_temperature_unknown),
    Rule(reason="metered", broken=_metered),
    Rule(reason="disk_low", broken=_disk_low),
    Rule(reason="io_pressure", broken=_io_pressure),
)
"""The owner's limits. When several are broken, the first is the reason that is told."""
