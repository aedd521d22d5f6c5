"""The owner's commands: pause, resume, and what their machine did."""

import contextlib
import re
import socket
from pathlib import Path

import msgspec

from fallow.adapters.files import make_folder
from fallow.adapters.owner_record import FOREVER_MS, OwnerRecord, stamp
from fallow.apps.settings import default_data
from fallow.model.errors import BadFlag, FallowError, StartFailed
from fallow.model.owner import DeskAddress, DeskAnswer, DeskRequest, Entry, OwnerStatus

ASK_S = 5.0
ANSWER_BYTES_MAX = 256 * 1024
DURATION = re.compile(r"^(?:(\d{1,4})d)?(?:(\d{1,5})h)?(?:(\d{1,6})m(?:in)?)?(?:(\d{1,8})s)?\Z", re.ASCII)
LOG_LINES = 30


def read_duration(text: str) -> float:
    """Seconds from `2h`, `90m`, `1h30m`, `45s` or a number of minutes; raises BadFlag."""
    if text.isascii() and text.isdigit():
        text += "m"
    found = DURATION.match(text.strip())
    if not text.strip() or found is None:
        raise BadFlag(f"{text!r} isn't a time: write 2h, 90m or 1h30m")
    days, hours, minutes, seconds = (int(part or 0) for part in found.groups())
    total = ((days * 24 + hours) * 60 + minutes) * 60 + seconds
    if not 0 < total <= 365 * 86_400:
        raise BadFlag(f"{text!r} is not between a second and a year; leave it out to pause until `fallow resume`")
    return float(total)


def _ask(folder: Path, request: DeskRequest) -> OwnerStatus | None:
    """What the node that runs on this data folder says; None if none does. Raises StartFailed."""
    try:
        address = msgspec.json.decode((folder / "node.json").read_bytes(), type=DeskAddress)
        with socket.socket(socket.AF_UNIX) as desk:
            desk.settimeout(ASK_S)
            desk.connect(address.socket)
            desk.sendall(msgspec.json.encode(request) + b"\n")
            line = b""
            while not line.endswith(b"\n") and len(line) < ANSWER_BYTES_MAX:
                piece = desk.recv(65_536)
                if not piece:
                    break
                line += piece
        answer = msgspec.json.decode(line, type=DeskAnswer)
    except (FileNotFoundError, ConnectionRefusedError):
        return None
    except (OSError, msgspec.DecodeError) as error:
        raise StartFailed(f"the node that runs here doesn't answer: {error}") from None
    if answer.error or answer.status is None:
        raise StartFailed(answer.error or "the node that runs here said nothing")
    return answer.status


def _complain(error: FallowError) -> None:
    from fallow.apps.run import complain

    complain(error)


def _folder(data: Path | None) -> Path:
    return make_folder((data or default_data()).expanduser())


def pause(data: Path | None, lasting: str) -> int:
    """`fallow pause`."""
    try:
        for_s = read_duration(lasting) if lasting else None
        folder = _folder(data)
        status = _ask(folder, DeskRequest(ask="pause", for_s=for_s))
        if status is None:
            until = FOREVER_MS if for_s is None else _wall_ms() + round(for_s * 1000)
            OwnerRecord(folder).pause(until)
            print(f"No node runs here now; one that starts will be paused {_until(None if for_s is None else stamp(until))}.")
        else:
            print(f"Paused {_until(status.until)}. {status.node_id} does nothing until then.")
    except FallowError as error:
        _complain(error)
        return 2 if isinstance(error, BadFlag) else 1
    return 0


def resume(data: Path | None) -> int:
    """`fallow resume`."""
    try:
        folder = _folder(data)
        status = _ask(folder, DeskRequest(ask="resume"))
        if status is None:
            OwnerRecord(folder).resume()
            print("No node runs here now; one that starts won't be paused.")
        else:
            print(f"Resumed: {status.state}, {status.detail}.")
    except FallowError as error:
        _complain(error)
        return 1
    return 0


def _wall_ms() -> int:
    from fallow.adapters.clock import SystemClock

    return SystemClock().wall_ms()


def _until(until: str | None) -> str:
    return "until `fallow resume`" if until is None else f"until {_local(until)}"


def _local(utc: str, pattern: str = "%a %H:%M") -> str:
    """A stamp as the owner's clock shows it."""
    import datetime

    with contextlib.suppress(ValueError):
        return datetime.datetime.fromisoformat(utc).astimezone().strftime(pattern)
    return utc


def status(data: Path | None, *, as_json: bool) -> int:
    """`fallow lend status`."""
    try:
        found = _ask(_folder(data), DeskRequest(ask="status"))
        if found is None:
            raise StartFailed("no node runs here; `fallow lend` starts one")
    except FallowError as error:
        _complain(error)
        return 1
    if as_json:
        print(msgspec.json.encode(found).decode())
    else:
        print("\n".join(_status_lines(found)))
    return 0


def _status_lines(found: OwnerStatus) -> list[str]:
    today = found.today
    cores = f", {_counted(found.cores, 'core')}" if found.cores else ""
    until = f", until {_local(found.until)}" if found.until else ""
    kwh = today.watt_s / 3_600_000
    power = (
        f"power      {kwh:.3f} kWh today = {today.usd:.4f} USD at {found.usd_per_kwh:g} USD/kWh; "
        f"{found.watts:.0f} W when all lent cores work ({found.watts_method})"
        if found.watts
        else "power      not known of a server of your own"
    )
    lines = [
        f"node       {found.node_id}, profile {found.profile}",
        f"state      {found.state}{cores} since {_local(found.since)}{until}",
        f"because    {found.detail} ({found.reason})",
        f"lends      {', '.join(found.models) or 'nothing'}; {_counted(found.running, 'call')} now",
        f"isolation  {found.isolation}" + "".join(f"\n           {missing}" for missing in found.isolation_missing),
        f"today      {_counted(today.calls, 'call')}, {today.prompt_tokens:,} tokens read, {today.output_tokens:,} written, "
        f"{today.uploaded_bytes / 1e6:.1f} MB sent",
        f"           {_span(today.cpu_s * 1000)} of CPU, {_counted(today.pauses, 'pause')}, {_span(today.paused_ms)} in all",
        power,
    ]
    if found.unread:
        lines.append(f"unknown    {', '.join(found.unread)}: this machine doesn't tell")
    if found.absent:
        lines.append(f"not here   {', '.join(found.absent)}: these limits are left out")
    if found.settings_error:
        lines.append(f"settings   {found.settings_error}; the old ones are in force")
    if found.needs_restart:
        lines.append(f"restart    needed for {', '.join(found.needs_restart)}")
    return lines


def _counted(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def _span(ms: float) -> str:
    """A length of time in a few characters."""
    seconds = round(ms / 1000)
    if seconds < 60:
        return f"{ms / 1000:.1f} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60} min"


def log(data: Path | None, *, lines: int, as_json: bool) -> int:
    """`fallow lend log`."""
    try:
        folder = _folder(data)
        entries = OwnerRecord(folder).entries(lines)
        now = _ask(folder, DeskRequest(ask="status"))
    except FallowError as error:
        _complain(error)
        return 1
    if as_json:
        for entry in entries:
            print(msgspec.json.encode(entry).decode())
        return 0
    for entry in entries:
        print(_log_line(entry))
    if now is not None:
        print(f"{_local(now.since, '%d %b %H:%M:%S')}  {now.state:8}  now         {now.reason}: {now.detail}")
    elif not entries:
        print("nothing yet: this machine was not lent from this data folder")
    return 0


def _log_line(entry: Entry) -> str:
    return f"{_local(entry.at, '%d %b %H:%M:%S')}  {entry.state:8}  {_span(entry.lasted_ms):10}  {entry.reason}: {entry.detail}"
