"""Trouble, really caused: the host goes on, misses, and never gets other bytes."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from integrations.vllm import slow
from integrations.vllm.host import ROW_NBYTES, Host, blocks, host, key_of, tier_at
from integrations.vllm.test_host_jobs import observed
from support.preload import preloaded
from support.waiting import PATIENCE_S, PROCESS_PATIENCE_S, in_use, wait_until

pytest.importorskip(
    "vllm.v1.kv_offload.tiering", reason="vLLM is not installed (tests/integrations/vllm)"
)


@pytest.fixture
def tier(tmp_path):
    return tier_at(tmp_path / "store")


def lookups(running: Host, keys: list[bytes]) -> set[str]:
    with running.request() as context:
        return {running.tier.lookup(key, context).name for key in keys}


def test_a_stuck_drive_holds_nobody_up(tier):
    stored, new = blocks(range(4)), blocks(range(4, 8))
    tier["patience_s"] = 0.001
    with host(tier) as running:
        running.store(stored)
        running.forget_memory()
        with in_use(running.tier.store._records.lock):
            # Everything that the scheduler calls comes back, while no job does.
            running.begin_store(new)
            with running.request() as context:
                for key in stored:
                    running.manager.lookup(key, context)
                running.step()
            assert running.jobs == 2
            wait_until(lambda: running.step() or lookups(running, list(stored)) == {"MISS"})
            assert running.jobs == 2
        running.run()
        assert lookups(running, list(stored)) == {"HIT"}
        assert running.load(list(new)) == list(new.values())


def test_a_slow_drive_costs_hits_and_no_step(tmp_path):
    """Really slow: the C library's reads and writes take their time, the engine's and all else."""
    done = subprocess.run(
        [sys.executable, slow.__file__, str(tmp_path / "store")],
        env=preloaded(slow.SOURCE, tmp_path),
        capture_output=True,
        text=True,
        timeout=PROCESS_PATIENCE_S,
    )
    assert done.returncode == 0, done.stderr
    steps, declined = map(int, done.stdout.split()[-2:])
    assert steps > 10
    assert declined >= 8


def test_stores_are_declined_while_too_much_waits(tier):
    tier["most_waiting"] = 4 * ROW_NBYTES
    with host(tier) as running:
        with in_use(running.tier.store._records.lock):
            running.begin_store(blocks(range(3)))
            running.begin_store(blocks(range(3, 6)))
            # Jobs are looked at once a step, which was when the second store began.
            running.step()
            running.step()
            assert running.jobs == 1, "one waits, one was declined at once"
        running.run()
        assert observed(running, "spdk_kv_declined_chunks") == 3
        running.forget_memory()
        loaded = running.load([key_of(number) for number in range(6)])
        assert loaded == [*blocks(range(3)).values(), None, None, None]


def test_a_full_store_with_everything_in_use_declines_and_recovers(tier):
    tier["capacity"] = 8 * ROW_NBYTES
    old, new = blocks(range(8)), blocks(range(8, 12))
    with host(tier) as running:
        running.store(old)
        records = running.tier.store.catalog.records
        pinned = records.find([running.tier._keys(key) for key in old])
        running.store(new)
        running.forget_memory()
        assert running.load(list(new)) == [None] * 4
        records.unpin(pinned)
        running.store(new)
        running.forget_memory()
        assert running.load(list(new)) == list(new.values())


def test_a_damaged_block_is_a_miss_and_counted(tier, tmp_path):
    wanted = blocks(range(4))
    with host(tier) as running:
        running.store(wanted)
        running.tier.store.flush()
        record = running.tier.store.catalog.records.blobs[running.tier._keys(key_of(2))]
        with open(tmp_path / "store" / "data", "r+b") as data:
            data.seek(record.offset + record.nbytes // 2)
            byte = data.read(1)[0]
            data.seek(-1, os.SEEK_CUR)
            data.write(bytes([byte ^ 1]))
        running.forget_memory()
        expected = [None if key == key_of(2) else block for key, block in wanted.items()]
        assert running.load(list(wanted)) == expected
        assert observed(running, "spdk_kv_damaged_chunks") == 1
        # It is computed again, and stored again.
        running.store({key_of(2): wanted[key_of(2)]})
        running.forget_memory()
        assert running.load(list(wanted)) == list(wanted.values())


def test_a_drive_that_lost_its_data_is_misses(tier, tmp_path):
    wanted = blocks(range(4))
    with host(tier) as running:
        running.store(wanted)
        running.tier.store.flush()
        os.truncate(tmp_path / "store" / "data", 0)
        running.forget_memory()
        assert running.load(list(wanted)) == [None] * 4
        assert lookups(running, list(wanted)) == {"MISS"}


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_a_folder_that_is_gone_stops_nobody(tier, tmp_path, caplog):
    wanted, more = blocks(range(4)), blocks(range(4, 8))
    running = Host(tier)
    running.store(wanted)
    running.tier.store.flush()
    shutil.rmtree(tmp_path / "store")
    running.store(more)
    running.forget_memory()
    everything = wanted | more
    found = running.load(list(everything))
    assert all(f in (None, block) for f, block in zip(found, everything.values(), strict=True))
    region = running.manager.primary_tier._mmap_region
    running.stop()
    assert region.mmap_obj is None, "the CPU cache is held"
    assert "closing the store of the tier" in caplog.text


def test_a_shutdown_with_jobs_under_way_ends_them_and_holds_no_memory(tier):
    running = Host(tier)
    running.store(blocks(range(4)))
    running.forget_memory()
    region = running.manager.primary_tier._mmap_region
    ours, results = running.tier, []
    with in_use(ours.store._records.lock):
        running.begin_store(blocks(range(10, 14)))
        running.begin_store(blocks(range(20, 24)))
        with running.request() as context:
            for key in blocks(range(4)):
                running.manager.lookup(key, context)
            running.step()
        assert running.jobs == 3
        stopping = threading.Thread(target=running.stop)
        stopping.start()
    stopping.join(PATIENCE_S)
    assert not stopping.is_alive()
    assert region.mmap_obj is None, "the CPU cache is held"
    results = list(ours.get_finished_jobs())
    assert sorted(result.job_id for result in results) == sorted(running.manager._jobs)


def test_a_reset_waits_for_what_is_under_way(tier):
    wanted = blocks(range(4))
    with host(tier) as running:
        with in_use(running.tier.store._records.lock):
            running.begin_store(wanted)
            resetting = threading.Thread(target=running.forget_memory)
            resetting.start()
            assert running.jobs == 1
        resetting.join(PATIENCE_S)
        assert running.jobs == 0
        assert running.load(list(wanted)) == list(wanted.values())


def test_what_a_killed_engine_left_is_exact_or_missing(tmp_path):
    """Engines are killed in the middle of stores; each looks first at what the last one left."""
    program = Path(__file__).with_name("killed.py")
    done = subprocess.run(
        [sys.executable, str(program), str(tmp_path / "store"), "12"],
        capture_output=True,
        text=True,
        timeout=PROCESS_PATIENCE_S,
    )
    assert done.returncode == 0, done.stderr
    exact, killed = map(int, done.stdout.split()[-2:])
    assert killed == 12
    assert exact > 0, "nothing was left to look at"
