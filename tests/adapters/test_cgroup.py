"""Control groups for engines: on a tree of files that looks like the kernel's, and on the kernel's where there is one to write to."""

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from fallow.adapters import cgroup
from fallow.adapters.cgroup import NO_CGROUPS, detect

UNIFIED = next((one for one in (Path("/sys/fs/cgroup"), Path("/sys/fs/cgroup/unified")) if (one / "cgroup.controllers").exists()), None)


class Tree:
    """What a system with cgroup v2 shows of us."""

    def __init__(self, folder: Path) -> None:
        self.mounted = folder / "cgroup"
        self.own = folder / "own"
        self.ours = self.mounted / "system.slice" / "fallow.service"
        self.group(self.ours, pids=[os.getpid()], controllers="cpu memory pids")
        self.group(self.ours / "agent")
        self.group(self.ours / "e1", "cpu.idle", "cpu.weight", "memory.max", "memory.swap.max", "pids.max")
        self.group(self.mounted)
        self.own.write_text("1:name=systemd:/x\n0::/system.slice/fallow.service\n")

    def group(self, path: Path, *files: str, pids: list[int] | None = None, controllers: str = "") -> None:
        path.mkdir(parents=True, exist_ok=True)
        for name in ("cgroup.procs", "cgroup.controllers", "cgroup.subtree_control", *files):
            (path / name).write_text("")
        (path / "cgroup.procs").write_text("".join(f"{pid}\n" for pid in pids or []))
        (path / "cgroup.controllers").write_text(controllers)

    def detect(self) -> cgroup.Cgroups:
        return detect(mounted=self.mounted, own=self.own)


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    return Tree(tmp_path)


def test_we_move_aside_and_engines_get_groups_with_bounds(tree: Tree) -> None:
    found = tree.detect()
    assert found.base == tree.ours
    assert (tree.ours / "agent" / "cgroup.procs").read_text() == str(os.getpid())
    found.make("e1", memory_bytes=10**9)
    group = tree.ours / "e1"
    assert found.entrance("e1") == group / "cgroup.procs"
    assert (group / "cpu.idle").read_text() == "1"
    assert (group / "cpu.weight").read_text() == ""
    assert int((group / "memory.max").read_text()) == 10**9 + cgroup.SPARE_BYTES
    assert (group / "memory.swap.max").read_text() == "0"
    assert int((group / "pids.max").read_text()) == cgroup.TASKS_MAX


def test_an_older_kernel_gives_the_least_weight(tree: Tree) -> None:
    (tree.ours / "e1" / "cpu.idle").unlink()
    tree.detect().make("e1")
    assert (tree.ours / "e1" / "cpu.weight").read_text() == "1"
    assert (tree.ours / "e1" / "memory.max").read_text() == ""


def test_who_moved_aside_before_finds_the_same_place(tree: Tree) -> None:
    (tree.ours / "cgroup.procs").write_text("")
    tree.own.write_text("0::/system.slice/fallow.service/agent\n")
    assert tree.detect().base == tree.ours


@pytest.mark.parametrize(
    ("own", "said"),
    [("0::/\n", "of our own"), ("3:cpu:/x\n", "cgroup v1"), ("0::/system.slice/absent\n", "not delegated")],
)
def test_where_there_is_none_it_says_why(tree: Tree, own: str, said: str) -> None:
    tree.own.write_text(own)
    found = tree.detect()
    assert found.base is None
    assert said in found.why_not


def test_a_group_with_others_in_it_is_left_alone(tree: Tree) -> None:
    (tree.ours / "cgroup.procs").write_text(f"{os.getpid()}\n1\n")
    found = tree.detect()
    assert found.base is None
    assert "other programs" in found.why_not
    assert (tree.ours / "agent" / "cgroup.procs").read_text() == ""


def test_what_our_group_lacks_is_named(tree: Tree) -> None:
    found = tree.detect()  # nobody here makes a controller of what was written
    assert found.controllers == ()
    assert found.why_not == "our control group lacks cpu, memory, pids"


def test_a_machine_without_v2_has_none(tmp_path: Path) -> None:
    assert "cgroup v1" in detect(mounted=tmp_path, own=tmp_path / "own").why_not


def test_no_groups_make_nothing() -> None:
    NO_CGROUPS.make("e1", memory_bytes=1)
    NO_CGROUPS.remove("e1")
    assert NO_CGROUPS.entrance("e1") is None


INSIDE = """
import asyncio, os, sys
from pathlib import Path
from fallow.adapters import cgroup, children

async def main():
    mounted, base = Path(sys.argv[1]), Path(sys.argv[2])
    found = cgroup.detect(mounted=mounted)
    assert found.base == base, found
    found.make("e1", memory_bytes=1)
    process = await children.spawn(["sleep", "60"], cgroup=found.entrance("e1"))
    while not (base / "e1" / "cgroup.procs").read_text().split() == [str(process.pid)]:
        await asyncio.sleep(0.01)
    assert str(os.getpid()) in (base / "agent" / "cgroup.procs").read_text().split()
    await children.kill(process)
    found.remove("e1")
    assert not (base / "e1").exists()

asyncio.run(asyncio.wait_for(main(), 20))
"""


@pytest.fixture
def group() -> Iterator[Path]:
    """A group of the kernel's, for a process to be alone in."""
    if UNIFIED is None or not os.access(UNIFIED, os.W_OK):
        pytest.skip("no cgroup v2 tree that we may write to")
    path = UNIFIED / f"fallow-test-{os.getpid()}"
    try:
        path.mkdir()
    except OSError:
        pytest.skip("no cgroup v2 tree that we may write to")
    try:
        yield path
    finally:
        for one in (path / "agent", path / "e1", path):
            with contextlib.suppress(OSError):
                one.rmdir()


def test_an_engine_starts_inside_its_group(group: Path) -> None:
    program = ["sh", "-c", f'echo $$ > {group}/cgroup.procs; exec "$@"', "sh", sys.executable, "-c", INSIDE, str(group.parent), str(group)]
    ended = subprocess.run(program, timeout=30, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
