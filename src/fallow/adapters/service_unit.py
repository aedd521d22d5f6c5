"""The service that lends this machine without a terminal: its text for systemd and launchd, and where it is written."""

import plistlib
import re
from collections.abc import Sequence
from pathlib import Path

from fallow.model.errors import BadFlag, shortened

UNIT = "fallow.service"
LABEL = "org.fallow.lend"
MARK = "Written by `fallow lend install`; `fallow lend uninstall` removes it."
DATA = "# Data folder: "
SYSTEM_FOLDER = Path("/etc/systemd/system")
_PLAIN = re.compile(r"[A-Za-z0-9_@+=:,./%$-]+")
_NEVER = frozenset("$\"'\\")
"""What systemd takes in no program's path, however it is written."""
_MARKED = "FallowMark"

SYSTEMD = """\
# {mark}
{data}
[Unit]
Description=Fallow lends this machine while its owner does not need it
# A hub or a network that is away comes back, so it never gives up.
StartLimitIntervalSec=0
{needs}
[Service]
Type=exec
ExecStart={command}
Restart=always
RestartSec=10
# Engines get control groups of their own below this one.
Delegate=yes
# Little, but not "idle": whoever has to stop the engines must get a turn while the owner uses every core.
CPUWeight=5
IOWeight=5
IOSchedulingClass=idle
OOMScoreAdjust=500
OOMPolicy=continue
KillMode=mixed
TimeoutStopSec=20
UMask=0077

[Install]
WantedBy={target}
"""
NETWORK = "Wants=network-online.target\nAfter=network-online.target\n"


def systemd_target(*, is_root: bool) -> str:
    """What starts the service: the machine's boot, or its user's first login."""
    return "multi-user.target" if is_root else "default.target"


def systemd_unit(command: Sequence[str], data: Path, *, is_root: bool) -> str:
    """The unit. It holds no secret, so anybody may read it. Raises BadFlag for what can't be written into one."""
    program, *arguments = command
    if odd := sorted(set(program) & _NEVER):
        raise BadFlag(f"systemd can't start {shortened(program)!r}, because of {' '.join(odd)} in its path; install Fallow elsewhere")
    return SYSTEMD.format(
        mark=MARK,
        data=DATA + _writable(str(data)),
        needs=NETWORK if is_root else "",
        command=" ".join([_quoted(program), *(_quoted(word.replace("$", "$$")) for word in arguments)]),
        target=systemd_target(is_root=is_root),
    )


def _quoted(word: str) -> str:
    """One word as systemd.syntax(7) and systemd.unit(5) want it."""
    word = _writable(word).replace("%", "%%")
    if _PLAIN.fullmatch(word):
        return word
    return '"' + word.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _writable(word: str) -> str:
    """The word, if it fits on a line of a text; raises BadFlag."""
    if any(ord(c) < 32 or ord(c) == 127 or "\ud800" <= c <= "\udfff" for c in word):
        raise BadFlag(f"a service can't be started with {shortened(word)!r}: it may hold no control characters, and must be UTF-8")
    return word


def launchd_plist(command: Sequence[str], data: Path) -> bytes:
    """launchd's description of the agent; what it logs goes to a file in the data folder. Raises BadFlag."""
    log = _writable(str(data / "lend.log"))
    return plistlib.dumps(
        {
            "Label": LABEL,
            "ProgramArguments": [_writable(word) for word in command],
            "RunAtLoad": True,
            "KeepAlive": True,
            "ThrottleInterval": 10,
            "ExitTimeOut": 20,
            "ProcessType": "Background",
            "LowPriorityIO": True,
            "LowPriorityBackgroundIO": True,
            "Nice": 10,
            "Umask": 0o077,
            "StandardOutPath": log,
            "StandardErrorPath": log,
            _MARKED: {"By": MARK, "Data": str(data)},
        }
    )


def data_folder(text: bytes) -> Path | None:
    """The data folder of a service that we wrote; None if somebody else wrote it."""
    if text.startswith(f"# {MARK}\n{DATA}".encode()):
        return Path(text.decode().split("\n")[1].removeprefix(DATA))
    try:
        found = plistlib.loads(text)[_MARKED]["Data"]
    except Exception:  # noqa: BLE001  (a foreign file; the parser raises what it likes)
        return None
    return Path(found) if isinstance(found, str) else None
