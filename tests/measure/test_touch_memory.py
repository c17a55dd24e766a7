"""Free memory is really touched, given back, and never more than there is."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from spdk_kv.binding.memory_limit import memory_group, why_impossible
from spdk_kv.measure.touch_memory import touch_free_memory
from support.subprocesses import run_script

# Empties the page cache of all, and needs memory that is free.
pytestmark = pytest.mark.machine
MIB = 1 << 20

_RESIDENT = """
    import os, resource
    from spdk_kv.measure.touch_memory import touch_free_memory

    def resident():
        return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()

    def peak():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
"""


@pytest.fixture
def plenty_free() -> None:
    """More is free than what is left alone, as only part of the memory that is available is."""
    if os.geteuid() == 0:
        Path("/proc/sys/vm/drop_caches").write_text("1")
    free_kib = int(re.findall(r"^MemFree: +(\d+) kB", Path("/proc/meminfo").read_text(), re.M)[0])
    if free_kib << 10 < 1024 * MIB:
        pytest.skip(f"only {free_kib >> 10} MiB of memory are free")


@pytest.mark.usefixtures("plenty_free")
def test_every_page_is_written_and_given_back() -> None:
    printed = run_script(
        _RESIDENT
        + """
    touch_free_memory(1 << 20)
    before = resident()
    print(touch_free_memory(96 << 20), peak() - before, resident() - before)
    """
    )
    touched, most, left = map(int, printed.split())
    assert touched == 96 * MIB
    assert most > 80 * MIB  # what was freed before is used again
    assert left < 8 * MIB


def test_nothing_is_asked_for() -> None:
    assert touch_free_memory(0) == 0


@pytest.mark.usefixtures("plenty_free")
def test_a_cgroup_with_less_room_is_respected() -> None:
    if reason := why_impossible():
        pytest.skip(reason)
    with memory_group() as group:
        group.limit(700 * MIB)
        printed = run_script(
            _RESIDENT
            + f"""
    open({str(group.path / "cgroup.procs")!r}, "w").write(str(os.getpid()))
    print(touch_free_memory(8 << 30))
    """
        )
    assert 0 < int(printed) <= (700 - 512) * MIB
