"""`fallow lend install` and `uninstall`: the machine lends from its start on, or never did."""

import contextlib
import itertools
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import platformdirs

from fallow.adapters import service_unit
from fallow.adapters.endpoint import parse_endpoint
from fallow.adapters.files import is_held
from fallow.apps.run import complain
from fallow.apps.settings import FILE, INVITATION_FILE, default_data, load
from fallow.model.errors import AlreadyRunning, BadFlag, FallowError, StartFailed

COMMAND_S = 60.0
"""How long systemctl or launchctl may take; stopping the service is the longest part."""
GONE_S = 25.0
POLL_S = 0.2


class Manager(Protocol):
    """What starts services on this machine. `path` is where ours is described; `folders` may go once they are empty, in that order."""

    path: Path
    folders: tuple[Path, ...]

    def describe(self, command: Sequence[str], data: Path) -> bytes: ...

    def missing(self) -> str:
        """What isn't there that would be needed; empty if all is."""

    def start(self) -> None:
        """Take up what is described at `path`, now and from now on; raises StartFailed."""

    def stop(self) -> None:
        """Stop it, and never start it again; raises StartFailed."""

    def forget(self) -> None:
        """Remove all traces but the description itself."""

    def hints(self) -> str: ...


class Systemd:
    """systemd, of the machine for root, else of the user. `folder` is that of its units."""

    def __init__(self, folder: Path, *, is_root: bool) -> None:
        self.path = folder / service_unit.UNIT
        self._is_root = is_root
        self._wants = folder / f"{service_unit.systemd_target(is_root=is_root)}.wants"
        self.folders: tuple[Path, ...] = () if is_root else (self._wants, folder, folder.parent)
        self._systemctl = ("systemctl",) if is_root else ("systemctl", "--user")

    def describe(self, command: Sequence[str], data: Path) -> bytes:
        return service_unit.systemd_unit(command, data, is_root=self._is_root).encode()

    def missing(self) -> str:
        if shutil.which("systemctl") is None:
            return "this machine has no systemctl, so no systemd; let whatever starts programs here run `fallow lend`"
        why = _tried(*self._systemctl, "show", "--property=Version")
        session = (
            "systemd does not run here" if self._is_root else "there is no session of systemd for this user; log in on the machine itself"
        )
        return f"{session} ({why})" if why else ""

    def start(self) -> None:
        for words in (("daemon-reload",), ("enable", self.path.name), ("restart", self.path.name)):
            _do(*self._systemctl, *words)

    def stop(self) -> None:
        _do(*self._systemctl, "disable", "--now", self.path.name)

    def forget(self) -> None:
        (self._wants / self.path.name).unlink(missing_ok=True)
        if not self.missing():
            _tried(*self._systemctl, "daemon-reload")
            _tried(*self._systemctl, "reset-failed", self.path.name)

    def hints(self) -> str:
        words = " ".join(self._systemctl)
        journal = "journalctl -u fallow" if self._is_root else "journalctl --user -u fallow"
        linger = (
            "" if self._is_root else "It runs while you are logged in; `loginctl enable-linger` lets it run from the machine's start on.\n"
        )
        return f"{linger}State: `{words} status fallow`; log: `{journal}`."


class Launchd:
    """launchd, as the agent of a user."""

    def __init__(self, folder: Path, *, user: int) -> None:
        self.path = folder / f"{service_unit.LABEL}.plist"
        self.folders: tuple[Path, ...] = ()
        self._domain = f"gui/{user}"
        self._name = f"gui/{user}/{service_unit.LABEL}"

    def describe(self, command: Sequence[str], data: Path) -> bytes:
        return service_unit.launchd_plist(command, data)

    def missing(self) -> str:
        return "" if shutil.which("launchctl") else "this machine has no launchctl"

    def start(self) -> None:
        self.stop()
        _do("launchctl", "bootstrap", self._domain, str(self.path))

    def stop(self) -> None:
        if self._is_loaded():
            _do("launchctl", "bootout", self._name)
        deadline = time.monotonic() + GONE_S
        while self._is_loaded():  # it is told to go, and goes a little later
            if time.monotonic() > deadline:
                raise StartFailed(f"launchd did not let go of {service_unit.LABEL} within {GONE_S:g} s")
            time.sleep(POLL_S)

    def _is_loaded(self) -> bool:
        return not _tried("launchctl", "print", self._name)

    def forget(self) -> None:
        """There is nothing else."""

    def hints(self) -> str:
        return f"It runs while you are logged in. State: `launchctl print {self._name}`; log: lend.log in the data folder."


def manager_here(system: str = sys.platform) -> Manager:
    """What starts services on this machine; raises StartFailed where we know of nothing."""
    if system == "win32":
        raise StartFailed("Windows is served through WSL 2: install Fallow inside it, and run `fallow lend install` there")
    is_root = os.geteuid() == 0
    if system == "darwin":
        if is_root:
            raise StartFailed("run `fallow lend install` as the user who lends, not as root")
        return Launchd(Path.home() / "Library" / "LaunchAgents", user=os.getuid())
    return Systemd(service_unit.SYSTEM_FOLDER if is_root else platformdirs.user_config_path() / "systemd" / "user", is_root=is_root)


def install(
    data: Path | None,
    hub: str,
    flags: Sequence[str],
    *,
    join_file: Path | None = None,
    print_only: bool = False,
    manager: Manager | None = None,
) -> int:
    """`fallow lend install`: `flags` are further words for `fallow lend`. With `print_only` nothing is changed."""
    folder = (data or default_data()).expanduser().absolute()
    try:
        command = _command(folder, hub, flags, join_file)
        manager = manager or manager_here()
        text = manager.describe(command, folder)
        if print_only:
            sys.stdout.write(text.decode())
            return 0
        _install(manager, text, folder)
    except FallowError as error:
        complain(error)
        return 2 if isinstance(error, BadFlag) else 1
    print(f"This machine is lent from now on: {manager.path}\n{manager.hints()}\n`fallow lend uninstall` ends it.")
    if join_file is None and not any((folder / name).exists() for name in (INVITATION_FILE, "identity/node.json")):
        sys.stderr.write(f"fallow: it can't join before an invitation lies in {folder / INVITATION_FILE} (FALLOW_JOIN isn't passed on)\n")
    return 0


def _command(data: Path, hub: str, flags: Sequence[str], join_file: Path | None) -> list[str]:
    """What the service runs. `-P`: no module in the folder where it happens to start is ever taken for ours."""
    if "@" in hub:
        raise BadFlag("--hub: an address holds no secrets; who we are comes from --join")
    for flag, value in itertools.pairwise(flags):
        if flag == "--engine":
            parse_endpoint(value)
    join = [] if join_file is None else ["--join-file", str(join_file.expanduser().absolute())]
    where = ["--hub", hub] if hub else []
    return [sys.executable, "-P", "-m", "fallow", "lend", "--data", str(data), *where, *join, *flags]


def _install(manager: Manager, text: bytes, data: Path) -> None:
    """Raises FallowError, and then nothing has changed."""
    before = _described(manager)
    if missing := manager.missing():
        raise StartFailed(missing)
    if before is None and is_held(data, "node"):
        raise AlreadyRunning(f"a node runs on {data} already; stop it first, or choose another folder with --data")
    missing_folders = [folder for folder in dict.fromkeys((*manager.folders, *manager.path.parents)) if not folder.exists()]
    try:
        _write(manager.path, text)
        manager.start()
    except (StartFailed, OSError) as error:
        if before is None:
            _remove(manager)
            _prune(*missing_folders)
        else:
            with contextlib.suppress(StartFailed, OSError):
                _write(manager.path, before)
                manager.start()
        why = error.message if isinstance(error, StartFailed) else f"{manager.path} can't be written: {error.strerror}"
        raise StartFailed(f"{why}; nothing was changed") from None


def _described(manager: Manager) -> bytes | None:
    """What was installed before; raises StartFailed if somebody else did."""
    try:
        before = manager.path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise StartFailed(f"{manager.path} can't be read: {error.strerror}") from None
    if service_unit.data_folder(before) is None:
        raise StartFailed(f"{manager.path} was not written by Fallow, so it is left alone; move it away first")
    return before


def _write(path: Path, text: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_bytes(text)
        temporary.chmod(0o644)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _remove(manager: Manager) -> None:
    """As far as it goes."""
    with contextlib.suppress(StartFailed):
        manager.stop()
    with contextlib.suppress(OSError):
        manager.path.unlink(missing_ok=True)
        manager.forget()


def uninstall(*, manager: Manager | None = None) -> int:
    """`fallow lend uninstall`: stop the service and remove what install wrote. Data and models stay, and are named."""
    try:
        manager = manager or manager_here()
        before = _described(manager)
        if before is None:
            manager.forget()  # a link may be left where somebody removed the rest by hand
            _prune(*manager.folders)
            print(f"Nothing is installed: there is no {manager.path}")
            return 0
        if missing := manager.missing():
            sys.stderr.write(f"fallow: it can't be stopped from here: {missing}\n")
        else:
            manager.stop()
        manager.path.unlink(missing_ok=True)
        manager.forget()
        _prune(*manager.folders)
    except FallowError as error:
        complain(error)
        return 1
    except OSError as error:
        complain(StartFailed(f"{error.filename} can't be removed: {error.strerror}"))
        return 1
    print(f"This machine isn't lent any more; {manager.path} is removed.{_left(before)}")
    return 0


def _left(before: bytes) -> str:
    """Where data and models are, which may be of use yet."""
    data = service_unit.data_folder(before)
    if data is None or not data.exists():
        return ""
    folders = [data]
    if (data / FILE).exists():
        with contextlib.suppress(FallowError):
            folders.append(load(data).models_folder)
    there = [folder for folder in folders if folder.exists()]
    return f"\nSettings, keys and models are left. To remove them too: rm -r {' '.join(shlex.quote(str(folder)) for folder in there)}"


def _prune(*folders: Path) -> None:
    """Remove folders as long as they are empty, the innermost first."""
    with contextlib.suppress(OSError):
        for folder in folders:
            if folder.exists():
                folder.rmdir()


def _tried(*words: str) -> str:
    """Run a command; returns why it failed, or nothing."""
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=COMMAND_S, stdin=subprocess.DEVNULL, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{words[0]}: {type(error).__name__}"
    if done.returncode == 0:
        return ""
    return (done.stderr.strip().splitlines() or done.stdout.strip().splitlines() or [f"{words[0]} ended with code {done.returncode}"])[0]


def _do(*words: str) -> None:
    """Run a command; raises StartFailed with its own words."""
    if why := _tried(*words):
        raise StartFailed(f"`{' '.join(words)}` failed: {why}")
