"""What the desktop tells of its user: when keyboard or mouse was last touched, whether a film or a call runs, a metered network.

There is no standard for most of it, so each desktop is asked in its own way, and the first answer counts.

- Input: GNOME's and Cinnamon's idle monitors, in milliseconds. Else `GetSessionIdleTime` of a screen saver: the specification
  says seconds and MATE and Xfce do so, but Plasma answers in milliseconds, and is known by its own name on the bus. Plasma on
  Wayland refuses the question. Else logind's hint for graphical sessions: desktops set it some minutes after the last input,
  so it errs on the owner's side; one that never set it tells nothing.
- Full screen: no desktop tells it. A film, a call or a presentation asks the desktop to keep the screen on, and that it does
  tell: Plasma's policy agent (screen settings inhibited), GNOME's session manager (idle inhibited; Cinnamon, MATE and Budgie
  have it too), else `HasInhibit` of the older power interface (Xfce).
- Metered: NetworkManager. Where another program manages the network nothing tells it, and the answer is None.
"""

import asyncio
import sys
import time
from collections.abc import Callable
from typing import NamedTuple

import msgspec

from fallow.adapters.senses.bus_link import CALL_TIMEOUT_S, RETRY_S, BusLink
from fallow.model.owner import Unknown

SESSIONS_MAX = 64
"""So many sessions of logind are looked at."""
PLASMA = "org.kde.screensaver"
GRAPHICAL = frozenset({"x11", "wayland", "mir"})
LOGIND = "org.freedesktop.login1"
NETWORK = "org.freedesktop.NetworkManager"
METERED = {1: True, 2: False, 3: True, 4: False}
"""NMMetered: yes, no, guessed yes, guessed no. 0: it doesn't know."""
MILLI, ONE = 0.001, 1.0


class _Question(NamedTuple):
    """One way to ask, and how many seconds a unit of the answer is."""

    destination: str
    path: str
    interface: str
    member: str
    unit_s: float = ONE
    signature: str = ""
    body: tuple[int, ...] = ()


def _screensaver(name: str, path: str, unit_s: float) -> _Question:
    return _Question(name, path, name, "GetSessionIdleTime", unit_s)


_MONITORS = (
    _Question("org.gnome.Mutter.IdleMonitor", "/org/gnome/Mutter/IdleMonitor/Core", "org.gnome.Mutter.IdleMonitor", "GetIdletime", MILLI),
    _Question(
        "org.cinnamon.Muffin.IdleMonitor", "/org/cinnamon/Muffin/IdleMonitor/Core", "org.cinnamon.Muffin.IdleMonitor", "GetIdletime", MILLI
    ),
    _screensaver("org.mate.ScreenSaver", "/org/mate/ScreenSaver", ONE),
    _screensaver("org.xfce.ScreenSaver", "/org/xfce/ScreenSaver", ONE),
)
_SAVER = _screensaver("org.freedesktop.ScreenSaver", "/org/freedesktop/ScreenSaver", ONE)
_KEPT_ON = (
    _Question(
        "org.kde.Solid.PowerManagement.PolicyAgent",
        "/org/kde/Solid/PowerManagement/PolicyAgent",
        "org.kde.Solid.PowerManagement.PolicyAgent",
        "HasInhibition",
        signature="u",
        body=(4,),  # ChangeScreenSettings
    ),
    _Question(
        "org.gnome.SessionManager",
        "/org/gnome/SessionManager",
        "org.gnome.SessionManager",
        "IsInhibited",
        signature="u",
        body=(8,),  # the session going idle
    ),
    _Question(
        "org.freedesktop.PowerManagement",
        "/org/freedesktop/PowerManagement/Inhibit",
        "org.freedesktop.PowerManagement.Inhibit",
        "HasInhibit",
    ),
)


class DesktopSenses(msgspec.Struct, frozen=True, kw_only=True):
    """What the desktop told. None: the machine has no desktop, or for `metered`, nothing that tells."""

    input_idle_s: float | Unknown | None
    fullscreen: bool | Unknown | None
    metered: bool | Unknown | None


class Desktop:
    """Asks the session's and the system's bus. An empty address: there is no such bus.

    `has_display`: the environment names a display, so there is a desktop even if none of its services answers.
    `monotonic_s` is the clock of logind's hints, CLOCK_MONOTONIC.
    """

    def __init__(
        self,
        *,
        session_bus: str,
        system_bus: str,
        has_display: bool,
        timeout_s: float = CALL_TIMEOUT_S,
        retry_s: float = RETRY_S,
        monotonic_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self._session = BusLink(session_bus, timeout_s=timeout_s, retry_s=retry_s)
        self._system = BusLink(system_bus, timeout_s=timeout_s, retry_s=retry_s)
        self._has_display = has_display
        self._monotonic_s = monotonic_s

    async def read(self) -> DesktopSenses:
        """Ask both buses. Never raises for what they do or say."""
        if sys.platform != "linux":
            unread = Unknown("the desktop of this system can't be asked")
            return DesktopSenses(input_idle_s=unread, fullscreen=unread, metered=unread)
        async with asyncio.TaskGroup() as group:
            session = group.create_task(self._ask_session())
            network = group.create_task(self._ask_metered())
        idle_s, kept_on = session.result()
        if not isinstance(idle_s, float) or not isinstance(kept_on, bool):
            idle_s, kept_on = await self._ask_further(idle_s, kept_on)
        return DesktopSenses(input_idle_s=idle_s, fullscreen=kept_on, metered=network.result())

    async def close(self) -> None:
        await self._session.close()
        await self._system.close()

    async def _ask_session(self) -> tuple[float | Unknown | None, bool | Unknown | None]:
        idle: float | Unknown | None = None
        for question in (*_MONITORS, _SAVER):
            told = await self._ask(question)
            if isinstance(told, int) and not isinstance(told, bool) and told >= 0:
                as_said = question is not _SAVER or await self._session.has_owner(PLASMA) is False
                idle = told * (question.unit_s if as_said else MILLI)  # the shorter time, if Plasma can't be ruled out
                break
            idle = idle or _unexpected(question, told)
        kept_on: bool | Unknown | None = None
        for question in _KEPT_ON:
            told = await self._ask(question)
            if isinstance(told, bool):
                kept_on = told
                break
            kept_on = kept_on or _unexpected(question, told)
        return idle, kept_on

    async def _ask(self, question: _Question) -> object:
        return await self._session.call(
            question.destination, question.path, question.interface, question.member, signature=question.signature, body=question.body
        )

    async def _ask_further(
        self, idle: float | Unknown | None, kept_on: bool | Unknown | None
    ) -> tuple[float | Unknown | None, bool | Unknown | None]:
        """The desktop told not all: ask logind, and find out whether there is a desktop at all."""
        seats = await self._ask_logind()
        missing: Unknown | None = Unknown("the desktop doesn't tell")
        if self._has_display or isinstance(idle, float) or isinstance(kept_on, bool):
            pass
        elif isinstance(seats, Unknown):
            missing = seats
        elif seats == [] or (seats is None and not await self._session.exists()):
            return None, None
        if not isinstance(idle, float):
            hints = [hint for hint in seats if hint is not None] if isinstance(seats, list) else []
            complete = isinstance(seats, list) and 0 < len(seats) == len(hints)
            idle = min(hints) if complete else idle or missing
        return idle, kept_on if kept_on is not None else missing

    async def _ask_logind(self) -> list[float | None] | Unknown | None:
        """How long each graphical session has been idle; None in the list: it never said. None: there is no logind."""
        told = await self._system.call(LOGIND, "/org/freedesktop/login1", f"{LOGIND}.Manager", "ListSessions")
        if told is None or isinstance(told, Unknown):
            return told
        if not isinstance(told, list):
            return Unknown("logind answers with something unexpected")
        seats: list[float | None] = []
        for entry in told[:SESSIONS_MAX]:
            path = entry[4] if isinstance(entry, (list, tuple)) and len(entry) == 5 else None
            if not isinstance(path, str):
                return Unknown("logind answers with something unexpected")
            kind = await self._read_session(path, "Type")
            if isinstance(kind, str) and kind in GRAPHICAL:
                seats.append(await self._read_hint(path))
        return seats

    async def _read_hint(self, path: str) -> float | None:
        since_us = await self._read_session(path, "IdleSinceHintMonotonic")
        idle = await self._read_session(path, "IdleHint")
        if not isinstance(idle, bool) or not isinstance(since_us, int) or since_us <= 0:
            return None
        return max(0.0, self._monotonic_s() - since_us / 1e6) if idle else 0.0

    async def _read_session(self, path: str, name: str) -> object:
        return await self._system.read_property(LOGIND, path, f"{LOGIND}.Session", name)

    async def _ask_metered(self) -> bool | Unknown | None:
        told = await self._system.read_property(NETWORK, "/org/freedesktop/NetworkManager", NETWORK, "Metered")
        if told is None or isinstance(told, Unknown):
            return told
        known = METERED.get(told) if isinstance(told, int) else None
        return known if known is not None else Unknown("NetworkManager doesn't know whether the network is metered")


def _unexpected(question: _Question, told: object) -> Unknown | None:
    """Why an answer isn't one; None if nobody was there to give it."""
    if told is None or isinstance(told, Unknown):
        return told
    return Unknown(f"{question.destination} answers {question.member} with something unexpected")
