"""The available memory: the tightest of MemAvailable and every cgroup around this process."""

from __future__ import annotations

import gc
import os
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spdk_kv.memory.available import (
    CgroupLimit,
    MemoryReader,
    MemorySnapshot,
    available_for_page_cache,
    read_memory,
)
from support.rounds import examples

MIB = 1 << 20
GIB = 1 << 30
V1_UNLIMITED = 0x7FFFFFFFFFFFF000

sizes = st.integers(0, 1 << 44)
cgroup_limits = st.builds(CgroupLimit, st.just("/c"), sizes, sizes, sizes)
snapshots = st.builds(
    MemorySnapshot,
    st.none() | sizes,
    st.none() | sizes,
    st.lists(cgroup_limits, max_size=4).map(tuple),
    st.just(()),
)


class Machine:
    """A directory that looks like ``/`` with a memory cgroup of version 1 or 2."""

    def __init__(self, root: Path, version: int, path: str, mount_root: str = "/") -> None:
        self.root = root
        self.version = version
        if version == 1:
            self.top = "sys/fs/cgroup/memory"
            mount = "cgroup cgroup rw,memory"
            self.write("proc/self/cgroup", f"9:name=systemd:/x\n4:cpu,memory:{path}\n0::/y")
        else:
            self.top = "sys/fs/cgroup"
            mount = "cgroup2 cgroup2 rw,nsdelegate"
            self.write("proc/self/cgroup", f"0::{path}")
        self.write("proc/self/mountinfo", f"35 31 0:32 {mount_root} /{self.top} rw - {mount}")
        self.meminfo(8 * GIB)

    def write(self, path: str, content: str) -> None:
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content + "\n")

    def meminfo(self, available: int) -> None:
        text = f"MemTotal: {16 * GIB >> 10} kB\nMemAvailable:   {available >> 10} kB"
        self.write("proc/meminfo", text)

    def cgroup(self, path: str, limit: object, usage: int = 0, cache: int = 0) -> None:
        """A cgroup at ``path`` below the mount; half of its page cache is active."""
        level = f"{self.top}/{path}".rstrip("/")
        if self.version == 1:
            self.write(f"{level}/memory.limit_in_bytes", str(limit))
            self.write(f"{level}/memory.usage_in_bytes", str(usage))
            # The first pair leaves out child cgroups and is a lure.
            stat = (f"active_file 0\ninactive_file 1\ntotal_active_file {cache // 2}\n"
                    f"total_inactive_file {cache - cache // 2}")  # fmt: skip
        else:
            self.write(f"{level}/memory.max", str(limit))
            self.write(f"{level}/memory.high", "max")
            self.write(f"{level}/memory.current", str(usage))
            stat = f"anon 5\nactive_file {cache // 2}\ninactive_file {cache - cache // 2}"
        self.write(f"{level}/memory.stat", stat)

    def available(self, reserve: int = 0) -> int:
        return available_for_page_cache(read_memory(self.root), reserve)


def test_this_machine_has_memory() -> None:
    snapshot = read_memory()
    assert snapshot.total_nbytes == os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert 0 < available_for_page_cache(snapshot, 0) <= snapshot.total_nbytes


@pytest.mark.parametrize("version", [1, 2])
def test_without_limits_there_is_what_is_available(tmp_path: Path, version: int) -> None:
    machine = Machine(tmp_path, version, "/a")
    unlimited = V1_UNLIMITED if version == 1 else "max"
    machine.cgroup("a", unlimited, usage=GIB)
    if version == 1:
        machine.cgroup("", unlimited)
    snapshot = read_memory(tmp_path)
    assert (snapshot.limits, snapshot.notes) == ((), ())
    assert available_for_page_cache(snapshot, 0) == 8 * GIB
    assert available_for_page_cache(snapshot, 3 * GIB) == 5 * GIB
    assert available_for_page_cache(snapshot, 9 * GIB) == 0


@pytest.mark.parametrize("version", [1, 2])
def test_page_cache_in_the_cgroup_counts_as_room(tmp_path: Path, version: int) -> None:
    machine = Machine(tmp_path, version, "/a")
    machine.cgroup("a", 2 * GIB, usage=GIB, cache=600 * MIB)
    assert machine.available() == GIB + 600 * MIB


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize(
    ("levels", "expected"),
    [
        ({"a": 4, "a/b": 2, "a/b/c": 3}, 2),
        ({"a": 1, "a/b": 2, "a/b/c": 3}, 1),
        ({"a": 4, "a/b": 3, "a/b/c": 2}, 2),
        ({"a": 400, "a/b": 300, "a/b/c": 200}, 8),
    ],
)
def test_tightest_of_nested_cgroups_wins(
    tmp_path: Path, version: int, levels: dict[str, int], expected: int
) -> None:
    machine = Machine(tmp_path, version, "/a/b/c")
    for path, gib in levels.items():
        machine.cgroup(path, gib * GIB)
    machine.cgroup("other", MIB)  # a neighbour's limit is none of ours
    assert machine.available() == expected * GIB


def test_full_outer_cgroup_leaves_less_than_a_small_inner_one(tmp_path: Path) -> None:
    machine = Machine(tmp_path, 2, "/a/b")
    machine.cgroup("a", 4 * GIB, usage=4 * GIB - MIB)
    machine.cgroup("a/b", GIB, usage=0)
    snapshot = read_memory(tmp_path)
    assert available_for_page_cache(snapshot, 0) == MIB
    assert snapshot.tightest is not None
    assert snapshot.tightest.path == "/sys/fs/cgroup/a"


def test_memory_high_limits_like_memory_max(tmp_path: Path) -> None:
    machine = Machine(tmp_path, 2, "/a")
    machine.cgroup("a", 4 * GIB)
    machine.write("sys/fs/cgroup/a/memory.high", str(GIB))
    assert machine.available() == GIB


def test_v1_limit_above_the_mount_is_seen_through_memory_stat(tmp_path: Path) -> None:
    machine = Machine(tmp_path, 1, "/pod/ctr", mount_root="/pod/ctr")
    machine.cgroup("", V1_UNLIMITED, usage=MIB)
    stat = tmp_path / machine.top / "memory.stat"
    stat.write_text(stat.read_text() + f"hierarchical_memory_limit {GIB}\n")
    assert machine.available() == GIB - MIB


@pytest.mark.parametrize("version", [1, 2])
def test_container_sees_its_cgroup_at_the_mount_point(tmp_path: Path, version: int) -> None:
    machine = Machine(tmp_path, version, "/docker/id", mount_root="/docker/id")
    machine.cgroup("", 3 * GIB)
    assert machine.available() == 3 * GIB
    assert read_memory(tmp_path).notes == ()


@pytest.mark.parametrize("path", ["/../outside", "/elsewhere/id"])
def test_cgroup_outside_the_mount_falls_back_to_its_top(tmp_path: Path, path: str) -> None:
    machine = Machine(tmp_path, 2, path, mount_root="/pod")
    machine.cgroup("", 3 * GIB)
    machine.write("sys/fs/outside/memory.max", "1")
    assert machine.available() == 3 * GIB
    assert f"{path} is outside" in read_memory(tmp_path).notes[0]


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("nonsense", ["", "-1", "1_000", "lots", "1e9", "٣", "9" * 5000, "max 3"])
def test_nonsense_limit_is_no_limit_and_is_named(
    tmp_path: Path, version: int, nonsense: str
) -> None:
    machine = Machine(tmp_path, version, "/a")
    machine.cgroup("", V1_UNLIMITED if version == 1 else "max")
    machine.cgroup("a", nonsense)
    snapshot = read_memory(tmp_path)
    assert available_for_page_cache(snapshot, 0) == 8 * GIB
    (note,) = snapshot.notes
    name = "memory.limit_in_bytes" if version == 1 else "memory.max"
    assert note.startswith(f"/{machine.top}/a/{name}: not a byte count")
    assert len(note) < 200


def test_missing_files_are_named(tmp_path: Path) -> None:
    assert read_memory(tmp_path).notes == (
        "/proc/meminfo: no usable MemAvailable",
        "/proc/self/cgroup: names no memory cgroup",
    )
    machine = Machine(tmp_path, 1, "/a")
    machine.cgroup("a", GIB, usage=MIB)
    machine.cgroup("", V1_UNLIMITED)
    for name in ("memory.usage_in_bytes", "memory.stat"):
        (tmp_path / machine.top / "a" / name).unlink()
    snapshot = read_memory(tmp_path)
    assert available_for_page_cache(snapshot, 0) == GIB
    assert [note.split(": ")[0].rsplit("/", 1)[1] for note in snapshot.notes] == [
        "memory.stat",
        "memory.usage_in_bytes",
    ]


def test_missing_cgroup_directory_is_named_and_its_parents_count(tmp_path: Path) -> None:
    machine = Machine(tmp_path, 2, "/a/gone/deep")
    machine.cgroup("a", GIB)
    assert machine.available() == GIB
    assert "/sys/fs/cgroup/a/gone: missing" in read_memory(tmp_path).notes


def test_budget_of_the_unknown_is_nothing() -> None:
    assert available_for_page_cache(MemorySnapshot(None, None, (), ()), 0) == 0


def test_negative_reserve_is_refused() -> None:
    with pytest.raises(ValueError, match="not negative"):
        available_for_page_cache(MemorySnapshot(GIB, GIB, (), ()), -1)


@given(snapshots, sizes, sizes)
def test_budget_is_bounded_and_falls_with_the_reserve(
    snapshot: MemorySnapshot, reserve: int, more: int
) -> None:
    available = available_for_page_cache(snapshot, reserve)
    assert 0 <= available_for_page_cache(snapshot, reserve + more) <= available
    if snapshot.available_nbytes is not None:
        assert available <= snapshot.available_nbytes
    for limit in snapshot.limits:
        assert available <= limit.limit_nbytes
        free = limit.limit_nbytes - limit.usage_nbytes + limit.reclaimable_nbytes
        assert available <= max(0, free)


@given(
    st.dictionaries(
        st.sampled_from(["proc/meminfo", "proc/self/cgroup", "proc/self/mountinfo",
                         "proc/pressure/memory", "sys/fs/cgroup/a/memory.pressure",
                         "sys/fs/cgroup/a/memory.max", "sys/fs/cgroup/a/memory.current",
                         "sys/fs/cgroup/a/memory.stat", "sys/fs/cgroup/memory.max"]),
        st.binary(max_size=60)
        | st.sampled_from([b"0::/a", b"0::/../..", b"4:memory:a\0b", b"MemAvailable: 1 kB",
                           b"1 1 0:1 / /sys/fs/cgroup rw - cgroup2 c rw", b"active_file x",
                           b"some avg10=7.25 avg60=0", b"some avg10=999 x", b"some avg10=-1 x",
                           b"1 1 0:1 /.. ../.. rw - cgroup c memory", b"12345", b"max"]),
    )
)  # fmt: skip
@settings(max_examples=examples(150))
def test_no_content_of_any_file_raises(files: dict[str, bytes]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        for path, content in files.items():
            file = Path(folder, path)
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content)
        snapshot = read_memory(Path(folder))
        assert available_for_page_cache(snapshot, 0) >= 0
        seen = MemoryReader(root=Path(folder)).read()
        assert (seen.nbytes, seen.notes) == (available_for_page_cache(snapshot, 0), snapshot.notes)
        assert seen.pressure is None or 0 <= seen.pressure <= 100
        if snapshot.available_nbytes is None:
            assert snapshot.notes
        for note in snapshot.notes:
            note.encode()  # it is printed


@pytest.mark.parametrize("version", [1, 2])
def test_mapped_page_cache_is_in_use_and_no_room(tmp_path: Path, version: int) -> None:
    machine = Machine(tmp_path, version, "/a")
    machine.cgroup("a", 2 * GIB, usage=GIB, cache=600 * MIB)
    stat = tmp_path / machine.top / "a/memory.stat"
    name = "total_mapped_file" if version == 1 else "file_mapped"
    stat.write_text(stat.read_text() + f"{name} {200 * MIB}\n")
    assert machine.available() == GIB + 400 * MIB
    # Mapped shared memory is counted too and is no file: there is never less than no cache.
    stat.write_text(stat.read_text().replace(str(200 * MIB), str(700 * MIB)))
    assert machine.available() == GIB
    machine.cgroup("a", "max" if version == 2 else V1_UNLIMITED)
    meminfo = tmp_path / "proc/meminfo"
    meminfo.write_text(meminfo.read_text() + f"Mapped: {3 * GIB >> 10} kB\n")
    assert machine.available() == 5 * GIB


PSI = "some avg10={} avg60=1.00 avg300=0.50 total=123\nfull avg10=99.00 avg60=0 avg300=0 total=1"


def test_pressure_is_that_of_the_innermost_cgroup_that_tells(tmp_path: Path) -> None:
    machine = Machine(tmp_path, 2, "/a/b")
    machine.cgroup("a/b", GIB)
    assert read_memory(tmp_path).pressure is None
    expected = [("proc/pressure/memory", "1.25"), (f"{machine.top}/a/memory.pressure", "20.00"),
                (f"{machine.top}/a/b/memory.pressure", "0.00")]  # fmt: skip
    for file, percent in expected:
        machine.write(file, PSI.format(percent))
        assert read_memory(tmp_path).pressure == float(percent)
        assert MemoryReader(root=tmp_path).read().pressure == float(percent)
        assert MemoryReader(5, root=tmp_path).read().pressure == float(percent)
    machine.write(expected[-1][0], "some avg10=nan")
    assert read_memory(tmp_path).pressure == 20.0


def test_v1_takes_the_pressure_of_the_machine(tmp_path: Path) -> None:
    machine = Machine(tmp_path, 1, "/a")
    machine.cgroup("a", GIB)
    machine.write("proc/pressure/memory", PSI.format("3.50"))
    assert read_memory(tmp_path).pressure == 3.5


# -- the reader -----------------------------------------------------------------------------------


@pytest.mark.parametrize("version", [1, 2])
def test_reader_follows_what_changes(tmp_path: Path, version: int) -> None:
    machine = Machine(tmp_path, version, "/a/b")
    top = f"/{machine.top}"
    machine.cgroup("a", 4 * GIB, usage=GIB)
    machine.cgroup("a/b", 2 * GIB)
    if version == 1:
        machine.cgroup("", V1_UNLIMITED)
    reader = MemoryReader(reserve_nbytes=MIB, root=tmp_path)
    seen = reader.read()
    assert (seen.nbytes, seen.limited_by, seen.notes) == (2 * GIB - MIB, f"{top}/a/b", ())
    machine.cgroup("a/b", GIB, usage=GIB, cache=300 * MIB)
    assert reader.read().nbytes == 299 * MIB
    machine.cgroup("a", 4 * GIB, usage=4 * GIB - 9 * MIB)
    assert (reader.read().nbytes, reader.read().limited_by) == (8 * MIB, f"{top}/a")
    machine.meminfo(5 * MIB)
    assert (reader.read().nbytes, reader.read().limited_by) == (4 * MIB, "MemAvailable")
    machine.meminfo(0)
    assert reader.read().nbytes == 0


@pytest.mark.parametrize("version", [1, 2])
def test_reader_survives_limits_that_turn_into_nonsense(tmp_path: Path, version: int) -> None:
    machine = Machine(tmp_path, version, "/a")
    name = "memory.limit_in_bytes" if version == 1 else "memory.max"
    machine.cgroup("", V1_UNLIMITED if version == 1 else "max")
    machine.cgroup("a", GIB)
    reader = MemoryReader(root=tmp_path)
    assert reader.read().nbytes == GIB
    for nonsense in ("", "-5", "lots", "9" * 5000):
        machine.write(f"{machine.top}/a/{name}", nonsense)
        seen = reader.read()
        assert (seen.nbytes, seen.limited_by) == (8 * GIB, "MemAvailable")
        assert "not a byte count" in seen.notes[0]
    machine.write(f"{machine.top}/a/{name}", str(GIB))
    assert (reader.read().nbytes, reader.read().notes) == (GIB, ())


def test_reader_notices_that_it_was_moved(tmp_path: Path) -> None:
    machine = Machine(tmp_path, 2, "/a")
    machine.cgroup("a", GIB)
    machine.cgroup("b", 2 * GIB)
    reader = MemoryReader(root=tmp_path)
    assert reader.read().limited_by == "/sys/fs/cgroup/a"
    machine.write("proc/self/cgroup", "0::/b")
    assert (reader.read().nbytes, reader.read().limited_by) == (2 * GIB, "/sys/fs/cgroup/b")
    machine.write("proc/self/cgroup", "0::/gone")
    assert "/sys/fs/cgroup/gone: missing" in reader.read().notes
    machine.cgroup("gone", GIB)  # it is there now, and is found after a while
    assert GIB in [reader.read().nbytes for _ in range(100)]


def test_reader_of_nothing_knows_nothing_and_then_something(tmp_path: Path) -> None:
    reader = MemoryReader(root=tmp_path)
    assert (reader.read().nbytes, reader.read().limited_by) == (0, "nothing is known")
    machine = Machine(tmp_path, 2, "/a")
    machine.cgroup("a", GIB)
    assert reader.read().nbytes == GIB


def test_reader_takes_what_is_given(tmp_path: Path) -> None:
    reader = MemoryReader(3 * GIB, reserve_nbytes=GIB, root=tmp_path)
    assert (reader.read().nbytes, reader.read().limited_by) == (3 * GIB, "what was given")
    assert MemoryReader(0).read().nbytes == 0
    for wrong in ({"given_nbytes": -1}, {"reserve_nbytes": -1}):
        with pytest.raises(ValueError, match="not negative"):
            MemoryReader(**wrong)


def test_reader_keeps_few_files_open_and_gives_them_back() -> None:
    gc.collect()  # what other tests left, not in between
    before = os.listdir("/proc/self/fd")
    reader = MemoryReader()
    for _ in range(2):
        reader.read()
    held = len(os.listdir("/proc/self/fd"))
    for _ in range(200):
        reader.read()
    assert len(os.listdir("/proc/self/fd")) == held
    reader.close()
    assert os.listdir("/proc/self/fd") == before
    assert reader.read().nbytes > 0
    del reader
    assert os.listdir("/proc/self/fd") == before


def test_reader_agrees_with_the_snapshot_of_this_machine() -> None:
    seen = MemoryReader().read()
    snapshot = read_memory()
    assert seen.nbytes == pytest.approx(available_for_page_cache(snapshot, 0), rel=0.1)
    assert seen.notes == snapshot.notes
