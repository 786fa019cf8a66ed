"""A forked process knows that it is one, whoever forked."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys

import pytest

from tracevault import forks

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")

FORK = "import ctypes, os\nfork = {}\nfrom tracevault.events.ids import uuid7\nfrom tracevault.forks import *\n"
WAYS = {"python": "os.fork", "C": "ctypes.PyDLL(None).fork"}


def output_of(way: str, script: str) -> list[str]:
    """Return the words that a process and its children print, in any order."""
    command = [sys.executable, "-c", FORK.format(WAYS[way]) + script]
    return sorted(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split())


@pytest.mark.parametrize("make", ["fork_mark()", "forks._ByPid()"])
@pytest.mark.parametrize("way", WAYS)
def test_a_mark_is_lost_in_children_alone(way: str, make: str) -> None:
    script = f"""
from tracevault import forks
first = {make}
here = "child" if fork() == 0 else "parent"
second = {make}
there = "child" if fork() == 0 else "parent"
os.write(1, f"{{here}}-{{there}}:{{bool(first[0])}},{{bool(second[0])}}\\n".encode())
os._exit(0) if "child" in (here, there) else [os.wait(), os.wait()]
"""
    assert output_of(way, script) == [
        "child-child:False,False",
        "child-parent:False,True",
        "parent-child:False,False",
        "parent-parent:True,True",
    ]


@pytest.mark.parametrize("way", WAYS)
def test_ids_of_forked_processes_do_not_repeat_each_other(way: str) -> None:
    script = """
uuid7()
children = [fork() for _ in range(2)]
made = [uuid7() for _ in range(100)]
os.write(1, "".join(f"{id_}:{id_.int & (2**62 - 1):x}\\n" for id_ in made).encode())
os._exit(0) if 0 in children else [os.wait(), os.wait()]
"""
    made = [line.split(":") for line in output_of(way, script)]
    assert len(made) == len({id_ for id_, _ in made}) == 4 * 100
    assert len({random_bits for _, random_bits in made}) == 4 * 100


@pytest.mark.skipif(sys.platform != "linux", reason="only there are such pages")
def test_where_the_kernel_takes_any_advice_the_process_id_tells(monkeypatch: pytest.MonkeyPatch) -> None:
    """As emulators do, which follow none."""

    class Page(mmap.mmap):
        def madvise(self, option: int, *_: int) -> None:
            pass

    monkeypatch.setattr(mmap, "mmap", Page)
    assert forks._wiped_page() is None
    assert forks.fork_mark()[0]


@pytest.mark.skipif(sys.platform != "linux", reason="only there are such pages")
def test_an_older_kernel_has_no_such_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    class Page(mmap.mmap):
        def madvise(self, *_: int) -> None:
            raise OSError(22, "Invalid argument")

    monkeypatch.setattr(mmap, "mmap", Page)
    assert forks._wiped_page() is None
