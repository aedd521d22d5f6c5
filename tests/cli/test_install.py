"""`fallow lend install` and `uninstall`, with stand-ins for systemctl and launchctl that write down what they are asked."""

import os
import plistlib
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from fallow.adapters.files import only_one
from fallow.adapters.service_unit import LABEL, UNIT
from fallow.cli import install as module
from fallow.cli.install import Launchd, Systemd, install, manager_here, uninstall
from fallow.model.errors import StartFailed

HUB = "nats://hub.example:8422"
SECRET = "canary-secret-44"
SYSTEMCTL = """\
#!/bin/sh
# Does what the tests need of systemctl. A file named after a verb in $STAND makes that verb fail.
echo "$*" >> "$STAND/asked"
case "$1" in --user) shift ;; esac
if [ -e "$STAND/fail-$1" ]; then echo "Failed: no $1 today" >&2; echo "more words" >&2; exit 1; fi
units="$STAND/units"
case "$1" in
  enable) mkdir -p "$units/$TARGET.wants" && ln -sf "$units/$2" "$units/$TARGET.wants/$2" ;;
  disable) rm -f "$units/$TARGET.wants/$3" ;;
esac
exit 0
"""
LAUNCHCTL = """\
#!/bin/sh
echo "$*" >> "$STAND/asked"
if [ -e "$STAND/fail-$1" ]; then echo "Bootstrap failed: 5: Input/output error" >&2; exit 5; fi
case "$1" in
  print) [ -e "$STAND/loaded" ] || exit 113 ;;
  bootstrap) touch "$STAND/loaded" ;;
  bootout) rm "$STAND/loaded" ;;
esac
"""


class Machine:
    """A home, and stand-ins on the PATH."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.home = folder / "home"
        self.stand = folder / "stand"
        self.programs = folder / "bin"
        for one in (self.home, self.stand, self.programs):
            one.mkdir()
        self.data = self.home / "data"
        self.units = self.home / ".config" / "systemd" / "user"
        (self.stand / "units").symlink_to(self.units)
        for name in [name for name in os.environ if name.startswith(("FALLOW_", "XDG_"))]:
            monkeypatch.delenv(name)
        monkeypatch.setenv("HOME", str(self.home))
        monkeypatch.setenv("PATH", f"{self.programs}:/usr/bin:/bin")
        monkeypatch.setenv("STAND", str(self.stand))
        monkeypatch.setenv("TARGET", "default.target")
        self._put("systemctl", SYSTEMCTL)
        self._put("launchctl", LAUNCHCTL)

    def _put(self, name: str, text: str) -> None:
        (self.programs / name).write_text(text)
        (self.programs / name).chmod(0o755)

    def fail(self, verb: str) -> None:
        (self.stand / f"fail-{verb}").touch()

    def mend(self, verb: str) -> None:
        (self.stand / f"fail-{verb}").unlink()

    def asked(self) -> list[str]:
        """What was asked since the last time."""
        path = self.stand / "asked"
        lines = path.read_text().splitlines() if path.exists() else []
        path.unlink(missing_ok=True)
        return lines

    def systemd(self) -> Systemd:
        return Systemd(self.units, is_root=False)

    def tree(self) -> list[str]:
        return sorted(str(path.relative_to(self.home)) for path in self.home.rglob("*"))

    @property
    def unit(self) -> Path:
        return self.units / UNIT


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(tmp_path, monkeypatch)


def put_in(machine: Machine, *flags: str) -> int:
    return install(machine.data, HUB, flags, manager=machine.systemd())


START = ["--user show --property=Version", "--user daemon-reload", f"--user enable {UNIT}", f"--user restart {UNIT}"]
FORGET = ["--user show --property=Version", "--user daemon-reload", f"--user reset-failed {UNIT}"]


# systemd
def test_install(machine: Machine, capsys: pytest.CaptureFixture[str]) -> None:
    assert put_in(machine, "--profile", "quiet", "--model", "a b") == 0
    assert machine.asked() == START
    text = machine.unit.read_text()
    command = f'{sys.executable} -P -m fallow lend --data {machine.data} --hub {HUB} --profile quiet --model "a b"'
    assert f"\nExecStart={command}\n" in text
    assert stat.S_IMODE(machine.unit.stat().st_mode) == 0o644
    assert [path.name for path in machine.units.iterdir() if path.name.startswith(".")] == []
    said = capsys.readouterr()
    assert str(machine.unit) in said.out
    assert "enable-linger" in said.out
    assert "journalctl --user -u fallow" in said.out
    assert f"invitation lies in {machine.data}/invitation" in said.err


def test_the_command_of_the_unit_is_one(machine: Machine, capsys: pytest.CaptureFixture[str]) -> None:
    assert install(machine.data, HUB, ["--slots", "2"], print_only=True, manager=machine.systemd()) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("ExecStart="))
    command = line.removeprefix("ExecStart=").split()
    done = subprocess.run([*command, "--help"], capture_output=True, text=True, timeout=30, cwd="/")
    assert (done.returncode, "--engine" in done.stdout) == (0, True), done.stderr


def test_the_secret_stays_where_it_is(
    machine: Machine, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("FALLOW_JOIN", SECRET)
    monkeypatch.chdir(tmp_path)
    Path("join-file").write_text(SECRET)
    assert install(machine.data, HUB, [], join_file=Path("join-file"), manager=machine.systemd()) == 0
    text = machine.unit.read_text()
    assert f"--join-file {tmp_path}/join-file" in text, "a service starts in another folder"
    assert SECRET not in text
    assert capsys.readouterr().err == ""


def test_install_again_takes_up_the_new_words(machine: Machine) -> None:
    assert put_in(machine, "--slots", "1") == 0
    machine.asked()
    assert put_in(machine, "--slots", "2") == 0
    assert machine.asked() == START
    assert "--slots 2" in machine.unit.read_text()


@pytest.mark.parametrize("verb", ["show", "daemon-reload", "enable", "restart"])
def test_what_fails_leaves_nothing(machine: Machine, capsys: pytest.CaptureFixture[str], verb: str) -> None:
    before = machine.tree()
    machine.fail(verb)
    assert put_in(machine) == 1
    assert machine.tree() == before
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.count("\n") == 1
    assert f"no {verb} today" in said.err
    assert "more words" not in said.err


@pytest.mark.parametrize("there", ["", "default.target.wants"])
def test_folders_that_were_there_stay(machine: Machine, there: str) -> None:
    (machine.units / there).mkdir(parents=True)
    before = machine.tree()
    machine.fail("restart")
    assert put_in(machine) == 1
    assert machine.tree() == before


@pytest.mark.parametrize("verb", ["daemon-reload", "enable", "restart"])
def test_what_fails_again_leaves_what_was_there(machine: Machine, verb: str) -> None:
    assert put_in(machine, "--slots", "1") == 0
    before, text = machine.tree(), machine.unit.read_text()
    machine.fail(verb)
    assert put_in(machine, "--slots", "2") == 1
    assert (machine.tree(), machine.unit.read_text()) == (before, text)


def test_without_systemd(machine: Machine, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(machine.stand))
    assert put_in(machine) == 1
    assert "no systemctl" in capsys.readouterr().err
    assert machine.tree() == []


def test_without_a_session(machine: Machine, capsys: pytest.CaptureFixture[str]) -> None:
    machine.fail("show")
    assert put_in(machine) == 1
    assert "no session of systemd for this user" in capsys.readouterr().err


def test_printing_changes_nothing(machine: Machine, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(machine.stand))
    assert install(machine.data, HUB, [], print_only=True, manager=machine.systemd()) == 0
    said = capsys.readouterr()
    assert said.out.startswith("# Written by")
    assert said.err == ""
    assert machine.tree() == []


FOREIGN = "[Service]\nExecStart=/usr/bin/fallow\n"


def test_what_somebody_else_wrote_is_left_alone(machine: Machine, capsys: pytest.CaptureFixture[str]) -> None:
    machine.units.mkdir(parents=True)
    machine.unit.write_text(FOREIGN)
    assert put_in(machine) == 1
    assert uninstall(manager=machine.systemd()) == 1
    assert capsys.readouterr().err.count("not written by Fallow") == 2
    assert machine.unit.read_text() == FOREIGN
    assert machine.asked() == []


def test_a_folder_that_cannot_be_one(machine: Machine, capsys: pytest.CaptureFixture[str]) -> None:
    (machine.home / ".config").write_text("")
    assert put_in(machine) == 1
    assert capsys.readouterr().err.count("\n") == 1
    assert machine.tree() == [".config"]


def test_a_node_that_runs_already(machine: Machine, capsys: pytest.CaptureFixture[str]) -> None:
    machine.data.mkdir()
    with only_one(machine.data, "node"):
        assert put_in(machine) == 1
        assert "runs on" in capsys.readouterr().err
        assert not machine.unit.exists()
    assert put_in(machine) == 0
    with only_one(machine.data, "node"):
        assert put_in(machine) == 0, "that is the service itself"


@pytest.mark.parametrize(
    ("hub", "flags"),
    [
        (f"nats://me:{SECRET}@hub:1", []),
        (HUB, ["--engine", f"https://me:{SECRET}@api.example.org/v1"]),
        (HUB, ["--engine", "localhost:11434"]),
        (HUB, ["--model", "a\nExecStartPre=/bin/evil"]),
    ],
)
def test_words_that_cannot_stand_in_a_unit(machine: Machine, capsys: pytest.CaptureFixture[str], hub: str, flags: list[str]) -> None:
    assert install(machine.data, hub, flags, manager=machine.systemd()) == 2
    said = capsys.readouterr()
    assert said.err.count("\n") == 1
    assert SECRET not in said.err
    assert (machine.tree(), machine.asked()) == ([], [])


# uninstall
def test_uninstall_leaves_nothing(machine: Machine, capsys: pytest.CaptureFixture[str]) -> None:
    machine.data.mkdir()
    (machine.data / "node_id").write_text("node-1")
    (machine.home / ".config").mkdir()
    before = machine.tree()
    assert put_in(machine) == 0
    assert (machine.units / "default.target.wants" / UNIT).is_symlink()
    machine.asked()
    capsys.readouterr()
    assert uninstall(manager=machine.systemd()) == 0
    assert machine.tree() == before
    assert machine.asked() == ["--user show --property=Version", f"--user disable --now {UNIT}", *FORGET]
    said = capsys.readouterr().out
    assert f"rm -r {machine.data}" in said
    assert (machine.data / "node_id").read_text() == "node-1"


def test_where_the_models_are_is_said(machine: Machine, capsys: pytest.CaptureFixture[str]) -> None:
    models = machine.home / "my models"
    models.mkdir()
    machine.data.mkdir()
    (machine.data / "settings.toml").write_text(f'[models]\nfolder = "{models}"\n')
    assert put_in(machine) == 0
    assert uninstall(manager=machine.systemd()) == 0
    assert f"rm -r {machine.data} '{models}'" in capsys.readouterr().out


def test_what_others_put_there_stays(machine: Machine) -> None:
    assert put_in(machine) == 0
    (machine.units / "default.target.wants" / "other.service").symlink_to("/nowhere")
    assert uninstall(manager=machine.systemd()) == 0
    assert machine.tree()[-2:] == [".config/systemd/user/default.target.wants", ".config/systemd/user/default.target.wants/other.service"]


def test_uninstall_where_nothing_is(machine: Machine, capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):
        assert uninstall(manager=machine.systemd()) == 0
    said = capsys.readouterr()
    assert said.out.count("Nothing is installed") == 2
    assert said.err == ""
    assert machine.tree() == []


def test_a_link_without_its_unit_goes_too(machine: Machine) -> None:
    assert put_in(machine) == 0
    machine.unit.unlink()
    assert uninstall(manager=machine.systemd()) == 0
    assert machine.tree() == [".config"]


def test_uninstall_without_a_session(machine: Machine, capsys: pytest.CaptureFixture[str]) -> None:
    assert put_in(machine) == 0
    machine.fail("show")
    assert uninstall(manager=machine.systemd()) == 0
    assert "can't be stopped from here" in capsys.readouterr().err
    assert machine.tree() == [".config"]


def test_a_service_that_does_not_stop_stays_installed(machine: Machine, capsys: pytest.CaptureFixture[str]) -> None:
    assert put_in(machine) == 0
    before = machine.tree()
    machine.fail("disable")
    assert uninstall(manager=machine.systemd()) == 1
    assert "no disable today" in capsys.readouterr().err
    assert machine.tree() == before
    machine.mend("disable")
    assert uninstall(manager=machine.systemd()) == 0


def test_for_root_it_is_a_service_of_the_machine(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TARGET", "multi-user.target")
    system = Systemd(machine.units, is_root=True)
    assert install(machine.data, HUB, [], manager=system) == 0
    assert machine.asked() == [line.removeprefix("--user ") for line in START]
    assert (machine.units / "multi-user.target.wants" / UNIT).is_symlink()
    assert uninstall(manager=system) == 0
    assert machine.asked()[1] == f"disable --now {UNIT}"
    assert not machine.unit.exists()
    assert machine.units.is_dir(), "the machine's own folder stays, however empty"


# launchd
def launchd(machine: Machine) -> Launchd:
    return Launchd(machine.home / "Library" / "LaunchAgents", user=501)


def test_launchd(machine: Machine, capsys: pytest.CaptureFixture[str]) -> None:
    agent = launchd(machine)
    assert install(machine.data, HUB, ["--slots", "2"], manager=agent) == 0
    name = f"gui/501/{LABEL}"
    assert machine.asked() == [f"print {name}", f"print {name}", f"bootstrap gui/501 {agent.path}"]
    found = plistlib.loads(agent.path.read_bytes())
    assert found["ProgramArguments"] == [
        sys.executable, "-P", "-m", "fallow", "lend", "--data", str(machine.data), "--hub", HUB, "--slots", "2"
    ]  # fmt: skip
    assert "launchctl print" in capsys.readouterr().out
    assert install(machine.data, HUB, [], manager=agent) == 0
    assert f"bootout {name}" in machine.asked(), "the old one goes first"
    assert uninstall(manager=agent) == 0
    assert not agent.path.exists()
    assert not (machine.stand / "loaded").exists()
    assert uninstall(manager=agent) == 0
    assert "Nothing is installed" in capsys.readouterr().out


def test_launchd_that_refuses(machine: Machine, capsys: pytest.CaptureFixture[str]) -> None:
    machine.fail("bootstrap")
    assert install(machine.data, HUB, [], manager=launchd(machine)) == 1
    assert "Input/output error" in capsys.readouterr().err
    assert machine.tree() == []


def test_launchd_that_never_lets_go(machine: Machine, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert install(machine.data, HUB, [], manager=launchd(machine)) == 0
    monkeypatch.setattr(module, "GONE_S", 0.0)
    (machine.programs / "launchctl").write_text("#!/bin/sh\nexit 0\n")
    assert uninstall(manager=launchd(machine)) == 1
    assert "did not let go" in capsys.readouterr().err
    assert launchd(machine).path.exists()


# which
def test_who_starts_services_here(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert manager_here("linux").path == machine.unit
    monkeypatch.setenv("XDG_CONFIG_HOME", str(machine.home / "elsewhere"))
    assert manager_here("linux").path == machine.home / "elsewhere" / "systemd" / "user" / UNIT
    assert manager_here("darwin").path == machine.home / "Library" / "LaunchAgents" / f"{LABEL}.plist"
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert manager_here("linux").path == Path("/etc/systemd/system") / UNIT
    with pytest.raises(StartFailed, match="not as root"):
        manager_here("darwin")
    with pytest.raises(StartFailed, match="WSL 2"):
        manager_here("win32")


def test_where_there_is_no_manager_it_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def nobody() -> Systemd:
        raise StartFailed("Windows is served through WSL 2")

    monkeypatch.setattr(module, "manager_here", nobody)
    assert (install(Path("/nowhere"), HUB, []), uninstall()) == (1, 1)
    assert capsys.readouterr().err.count("fallow: Windows is served through WSL 2\n") == 2
