"""The owner of a machine: what is sensed of it, what they allow, and what the owner gate says."""

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

State = Literal["run", "throttle", "pause", "leave"]
WORKING: frozenset[State] = frozenset({"run", "throttle"})
"""The states in which engines run."""
Reason = Literal[
    "clear",
    "cores_busy",
    "owner_paused",
    "cpu_busy",
    "input",
    "fullscreen",
    "program",
    "on_battery",
    "battery_low",
    "battery_unknown",
    "hot",
    "temperature_unknown",
    "memory_low",
    "memory_pressure",
    "io_pressure",
    "disk_low",
    "metered",
    "upload_spent",
    "hours",
    "power_price",
    "settling",
    "paused_long",
]
"""Why the gate says what it says. `settling`: all is quiet again, but not for long enough; `cores_busy`: fewer threads."""
Profile = Literal["invisible", "balanced", "dedicated", "night", "quiet"]
Minute = Annotated[int, Meta(ge=0, le=1439)]
DAY_MINUTES = 1440


class Unknown(msgspec.Struct, frozen=True, tag=True):
    """The machine has this sensor, or may have it, and it can't be read."""

    why: str


class Battery(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The machine's battery. `on_mains` is set while it is plugged in."""

    percent: float
    on_mains: bool


class Senses(msgspec.Struct, frozen=True, kw_only=True):
    """What the machine tells at one moment. None: it has no such thing; Unknown: it can't be read.

    `others_cores` is how many cores' worth of work ran that isn't ours since the last sample, `cores` how many there are.
    Pressure is the kernel's `some avg10` in percent. `input_idle_s` is how long nobody has touched keyboard or mouse.
    `programs` are those of the owner's list that run. `minute` is the local time of day.
    """

    cores: int
    others_cores: float | Unknown
    memory_free_share: float | Unknown = 1.0
    memory_pressure: float | Unknown | None = None
    io_pressure: float | Unknown | None = None
    battery: Battery | Unknown | None = None
    temperature_c: float | Unknown | None = None
    disk_free_bytes: int | Unknown | None = None
    input_idle_s: float | Unknown | None = None
    fullscreen: bool | Unknown | None = None
    metered: bool | Unknown | None = None
    programs: frozenset[str] = frozenset()
    uploaded_today_bytes: int = 0
    minute: Minute = 0
    paused_until_ms: int | None = None
    """The owner's own pause, on the clock of `now_ms`; a very large number: until they resume."""


class Window(msgspec.Struct, frozen=True):
    """A part of the local day, from `start` until just before `end`, over midnight if `end` is not after `start`."""

    start: Minute
    end: Annotated[int, Meta(ge=0, le=1440)]


class PowerWindow(msgspec.Struct, frozen=True, kw_only=True):
    """What a kilowatt-hour costs in a part of the day."""

    window: Window
    usd_per_kwh: float


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """What the owner allows. None switches a limit off.

    `others_share_max` is the share of all cores that others may use before we stop. `hours` empty: always.
    """

    profile: Profile
    cores_max: int
    others_share_max: float | None
    resume_after_ms: int
    input_idle_s_min: float | None
    while_fullscreen: bool
    while_metered: bool
    on_battery: bool
    battery_percent_min: float
    temperature_c_max: float | None
    memory_free_share_min: float
    memory_pressure_max: float | None
    io_pressure_max: float | None
    disk_free_bytes_min: int
    upload_bytes_per_day_max: int | None
    hours: tuple[Window, ...] = ()
    programs: tuple[str, ...] = ()
    usd_per_kwh: float = 0.0
    power_windows: tuple[PowerWindow, ...] = ()
    usd_per_kwh_max: float | None = None
    leave_after_ms: int | None = None
    """How long a pause may keep memory."""


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """What the gate says. `cores` is how many engines may use now, 0 unless they run.

    `grace_ms` is how long calls that run may go on; 0: stop at once. `unread` names the sensors that can't be read, `absent` those
    that the machine doesn't have. `since_ms` is when this state and reason began, `until_ms` when it will end as far as can be told.
    """

    state: State
    reason: Reason
    detail: str
    cores: int
    since_ms: int
    until_ms: int | None = None
    grace_ms: int = 0
    unread: tuple[str, ...] = ()
    absent: tuple[str, ...] = ()


class Refusals(msgspec.Struct, frozen=True, kw_only=True):
    """What and whom the owner doesn't work for. `paths` are the endpoints of the kinds of work refused."""

    models: frozenset[str] = frozenset()
    paths: frozenset[str] = frozenset()
    organisations: frozenset[str] = frozenset()
    countries: frozenset[str] = frozenset()


class Work(msgspec.Struct, frozen=True, kw_only=True):
    """What a machine did on one day, `day` being local (`2026-11-23`). `watt_s` is beyond idling, `usd` its electricity."""

    day: str = ""
    calls: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0
    uploaded_bytes: int = 0
    cpu_s: float = 0.0
    watt_s: float = 0.0
    usd: float = 0.0
    pauses: int = 0
    paused_ms: int = 0


class Entry(msgspec.Struct, frozen=True, kw_only=True):
    """A line of the owner's log: a state, why, and how long it lasted; `at` is UTC in ISO 8601."""

    at: str
    state: State
    reason: Reason
    detail: str
    lasted_ms: int


class OwnerStatus(msgspec.Struct, frozen=True, kw_only=True):
    """What `fallow lend status` shows."""

    node_id: str
    profile: Profile
    state: State
    reason: Reason
    detail: str
    since: str
    until: str | None
    cores: int
    unread: tuple[str, ...]
    absent: tuple[str, ...]
    isolation: str
    isolation_missing: tuple[str, ...]
    models: tuple[str, ...]
    running: int
    today: Work
    watts: float
    watts_method: str
    usd_per_kwh: float
    settings_error: str = ""
    needs_restart: tuple[str, ...] = ()


class DeskRequest(msgspec.Struct, frozen=True, kw_only=True):
    """What a command on the same machine asks of a running node. `for_s` None: until the owner resumes."""

    ask: Literal["status", "pause", "resume"]
    for_s: Annotated[float, Meta(gt=0, le=10 * 365 * 86_400)] | None = None


class DeskAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """What a command gets; `error` is empty if what it asked was done."""

    error: str = ""
    status: OwnerStatus | None = None


class DeskAddress(msgspec.Struct, frozen=True, kw_only=True):
    """Where the desk of a running node is."""

    socket: str
    pid: int
