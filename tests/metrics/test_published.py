"""The file by which an owner tells others what it counts."""

from __future__ import annotations

import json
import multiprocessing
import os
import stat
import struct
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from itertools import count
from pathlib import Path

import pytest

from metrics.samples import sample
from spdk_kv.errors import ClosedError, StoreMismatch
from spdk_kv.metrics import Publisher, Reading, Sample, read_published
from spdk_kv.metrics import published as module
from spdk_kv.metrics.published import FILE_NAME, FORMAT, SLOT_NBYTES, encode
from support.subprocesses import run_script
from support.waiting import PATIENCE_S, wait_until

OWN = os.getpid()


def publisher(folder: Path, take: Callable[[], Sample | None]) -> Publisher:
    """One that looks all the time."""
    made = Publisher(str(folder), take, interval_s=0.0)
    made.start()
    return made


def told(folder: Path, owner: int | None = OWN) -> Reading | None:
    return read_published(str(folder), owner)


def test_what_is_told_is_what_was_counted(tmp_path: Path) -> None:
    it = sample()
    assert Sample.from_json(json.loads(json.dumps(it.to_json()))) == it
    owner = publisher(tmp_path, lambda: it)
    found = wait_until(lambda: told(tmp_path))
    assert found.sample == it
    assert (found.pid, found.number) == (OWN, 1)
    owner.close()
    assert list(tmp_path.iterdir()) == []
    assert told(tmp_path) is None
    owner.close()


def test_the_file_is_private(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        owner = publisher(tmp_path, sample)
        wait_until((tmp_path / FILE_NAME).exists)
        assert stat.S_IMODE((tmp_path / FILE_NAME).stat().st_mode) == 0o600
        owner.close()
    finally:
        os.umask(before)


def test_nothing_is_written_while_nothing_happens(tmp_path: Path) -> None:
    looks, clock = threading.Semaphore(0), count()

    def take() -> Sample:
        looks.release()
        at = next(clock)
        # CPU time goes by in the process, whatever the store does.
        return sample(cpu_ns=at, clock_s=at / 1000, time_s=1e9 + at)

    owner = publisher(tmp_path, take)
    for _ in range(100):
        assert looks.acquire(timeout=PATIENCE_S)
    owner.close()
    # A heartbeat comes every 10 s of the samples' clock.
    assert owner._count == 1 + (next(clock) - 1) // 10_000


def test_a_heartbeat_comes_where_nothing_happens(tmp_path: Path) -> None:
    clock = count()
    owner = publisher(tmp_path, lambda: sample(clock_s=11.0 * next(clock)))
    wait_until(lambda: (found := told(tmp_path)) is not None and found.number >= 5)
    owner.close()


def _write_all_the_time(folder: str, stop: object) -> None:
    numbers = count(1)

    def take() -> Sample:
        # All of them the same, so that parts of two samples would be seen.
        at = next(numbers)
        it = sample()
        return replace(it, held=dict.fromkeys(it.held, at), cpu_ns=at)

    owner = Publisher(folder, take, interval_s=0.0)
    owner.start()
    stop.wait()  # type: ignore[attr-defined]
    owner.close()


def test_a_reader_never_sees_parts_of_two_samples(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(module, "_LEAST_IDLE", 0)  # as quickly as it can
    context = multiprocessing.get_context("fork")
    stop = context.Event()
    writer = context.Process(target=_write_all_the_time, args=(str(tmp_path), stop))
    writer.start()
    try:
        seen: set[int] = set()

        def look() -> bool:
            found = told(tmp_path, writer.pid)
            if found is not None:
                (value,) = set(found.sample.held.values())
                assert found.sample.cpu_ns == value
                seen.add(value)
            return len(seen) >= 50

        wait_until(look)
        assert max(seen) > 50
    finally:
        stop.set()
        writer.join(PATIENCE_S)


@pytest.mark.parametrize("at", [8, 12, 20, 60, 500])
def test_of_a_torn_slot_the_other_one_is_read(tmp_path: Path, at: int) -> None:
    def slot(number: int) -> bytes:
        return encode(
            {
                "owner": module.own_identity(),
                "looked_s": None,
                "wait_s": 1.0,
                **sample(cpu_ns=number).to_json(),
            },
            number,
        )

    old, new = slot(7), bytearray(slot(8))
    new[at] ^= 0x40
    torn = bytes(new).ljust(SLOT_NBYTES, b"\0") + old
    (tmp_path / FILE_NAME).write_bytes(torn)
    found = told(tmp_path)
    assert found is not None
    assert (found.number, found.sample.cpu_ns) == (7, 7)


@pytest.mark.parametrize("content", [b"", b"x", b"\0" * 200_000, b"SPDKKVCO", b"\xff" * 70_000])
def test_nonsense_in_the_file_tells_nothing(tmp_path: Path, content: bytes) -> None:
    (tmp_path / FILE_NAME).write_bytes(content)
    assert told(tmp_path) is None


def test_json_that_is_no_sample_tells_nothing(tmp_path: Path) -> None:
    for wrong in ({}, {"owner": 3}, {"owner": module.own_identity(), "paths": {"direct": {}}}):
        (tmp_path / FILE_NAME).write_bytes(encode({"sequences": [], **wrong}, 1))
        assert told(tmp_path) is None


def test_another_version_is_refused_while_its_owner_lives(tmp_path: Path) -> None:
    slot = bytearray(encode({"sequences": []}, 1))
    struct.pack_into("<I", slot, 8, FORMAT + 1)
    (tmp_path / FILE_NAME).write_bytes(slot)
    with pytest.raises(StoreMismatch, match="another version of spdk_kv"):
        told(tmp_path)
    assert told(tmp_path, None) is None


def test_what_a_killed_owner_left_is_not_taken_for_the_truth(tmp_path: Path) -> None:
    script = (
        "import sys; sys.path[:0] = sys.argv[2:]\n"
        "from metrics.samples import sample\n"
        "from spdk_kv.metrics import Publisher\n"
        "Publisher(sys.argv[1], sample).start()\n"
        "sys.stdin.read()\n"
    )
    owner = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path), *sys.path], stdin=subprocess.PIPE
    )
    try:
        wait_until(lambda: told(tmp_path, owner.pid))
        # The lock says who owns the store, whoever is alive.
        assert told(tmp_path, OWN) is None
        assert told(tmp_path, None) is None
    finally:
        owner.kill()
        owner.communicate()
    assert (tmp_path / FILE_NAME).exists()
    assert told(tmp_path, owner.pid) is None
    # A process that has its number now is another one.
    whole = (tmp_path / FILE_NAME).read_bytes()
    found = json.loads(whole[SLOT_NBYTES + 28 :])
    found["owner"]["pid"] = OWN
    (tmp_path / FILE_NAME).write_bytes(encode(found, 9))
    assert told(tmp_path) is None
    # The next owner begins with an empty file.
    following = publisher(tmp_path, lambda: sample(cpu_ns=5))
    assert wait_until(lambda: told(tmp_path)).sample.cpu_ns == 5
    following.close()


def test_an_owner_in_another_container_lives_as_long_as_it_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner = publisher(tmp_path, lambda: sample(time_s=module.time.time()))
    wait_until(lambda: told(tmp_path))
    monkeypatch.setattr("spdk_kv.metrics.owner._namespace", lambda: 1)
    # Its number says nothing here: the lock's may be anybody's.
    assert told(tmp_path, None) is not None
    now = module.time.time()
    monkeypatch.setattr(module.time, "time", lambda: now + module.STALE_S + 100)
    assert told(tmp_path, None) is None
    monkeypatch.undo()
    owner.close()


def test_an_owner_that_tells_nothing_any_more_is_stale(tmp_path: Path) -> None:
    owner = publisher(tmp_path, lambda: sample(time_s=module.time.time() - 60))
    assert wait_until(lambda: told(tmp_path)).is_stale
    owner.close()


def test_where_it_cannot_be_written_nobody_is_disturbed(tmp_path: Path, caplog) -> None:
    (tmp_path / FILE_NAME).mkdir()  # in its place
    looks = threading.Semaphore(0)

    def take() -> Sample:
        looks.release()
        return sample()

    owner = publisher(tmp_path, take)
    for _ in range(3):
        assert looks.acquire(timeout=PATIENCE_S)
    assert told(tmp_path) is None
    owner.close()
    assert (tmp_path / FILE_NAME).is_dir()
    assert caplog.records == []


def test_a_sample_that_fails_does_not_end_it(tmp_path: Path, caplog) -> None:
    turns = iter([ValueError("once"), None, ClosedError("the store is closed")])

    def take() -> Sample:
        failure = next(turns)
        if failure is not None:
            raise failure
        return sample()

    owner = publisher(tmp_path, take)
    assert owner._thread is not None
    owner._thread.join(PATIENCE_S)
    assert not owner._thread.is_alive(), "a closed store ends it"
    assert list(tmp_path.iterdir()) == []
    assert [record.exc_info[1].args for record in caplog.records] == [("once",)]


def test_many_sequences_with_long_names_fit(tmp_path: Path) -> None:
    (one,) = sample().sequences
    many = tuple({**one, "name": f"{number}" + "\N{SNOWMAN}" * 5000} for number in range(32))
    owner = publisher(tmp_path, lambda: sample(sequences=many))
    found = wait_until(lambda: told(tmp_path))
    owner.close()
    assert 0 < len(found.sample.sequences) < 32
    assert found.sample.sequences == tuple(many[: len(found.sample.sequences)])


def test_without_a_folder_nothing_is_told() -> None:
    owner = Publisher(None, sample)
    owner.start()
    owner.close()
    assert owner._thread is None


def test_a_child_after_fork_neither_writes_nor_removes_it(tmp_path: Path) -> None:
    run_script(
        f"""
        import os
        from pathlib import Path
        from metrics.samples import sample
        from spdk_kv.metrics import Publisher
        where = Path({str(tmp_path)!r})
        owner = Publisher(str(where), sample)
        owner.start()
        while not (where / "counters").exists():
            pass
        if (child := os.fork()) == 0:
            owner.close()
            os._exit(0 if (where / "counters").exists() else 1)
        assert os.waitpid(child, 0)[1] == 0
        owner.close()
        assert not (where / "counters").exists()
        """
    )
