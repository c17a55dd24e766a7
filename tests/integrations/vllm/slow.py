"""An engine's offloading on a drive that becomes slow; run as a program, behind the library SOURCE.

    LD_PRELOAD=... python slow.py FOLDER

Prints what the scheduler had of it. An assertion that fails ends it.
"""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from integrations.vllm.host import ROW_NBYTES, Host, blocks, host, key_of, tier_at
from integrations.vllm.test_host_jobs import observed

# Stands before the C library: every read and write of a megabyte, or of less, takes so long.
SOURCE = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <sys/uio.h>
#include <unistd.h>

static volatile unsigned delay_us;

void slow_down(unsigned us) { delay_us = us; }

ssize_t pwrite64(int fd, const void *from, size_t nbytes, off64_t offset)
{
    ssize_t (*real)(int, const void *, size_t, off64_t) = dlsym(RTLD_NEXT, "pwrite64");
    if (delay_us)
        usleep(delay_us);
    return real(fd, from, nbytes, offset);
}

ssize_t preadv64v2(int fd, const struct iovec *parts, int count, off64_t offset, int flags)
{
    ssize_t (*real)(int, const struct iovec *, int, off64_t, int) = dlsym(RTLD_NEXT, "preadv64v2");
    if (delay_us)
        usleep(delay_us);
    return real(fd, parts, count, offset, flags);
}
"""
DELAY_S = 0.3
PATIENCE_S = 0.05


def lookups(running: Host, keys: list[bytes]) -> set[str]:
    """What a prompt hears of its blocks, and a step."""
    with running.request() as context:
        found = {running.manager.lookup(key, context).name for key in keys}
        running.step()
    return found


def tier_misses(running: Host, key: bytes) -> bool:
    with running.request() as context:
        return bool(running.tier.lookup(key, context).name == "MISS")


def main(folder: str) -> None:
    tier = tier_at(
        folder,
        engine={"name": "threads", "depth": 1},
        flush_interval_s=None,
        patience_s=PATIENCE_S,
        most_waiting=8 * ROW_NBYTES,
    )
    slow_down = ctypes.CDLL(None).slow_down
    wanted = blocks(range(16))
    with host(tier) as running:
        running.store(wanted)
        running.forget_memory()
        slow_down(int(DELAY_S * 1e6))
        # A prompt that is there: its blocks are on their way, for much longer than the patience.
        steps = 0
        keys = list(wanted)
        assert "MISS" not in lookups(running, keys[:8])
        assert running.jobs == 1
        while not tier_misses(running, keys[8]):
            running.step()
            steps += 1
            assert running.jobs, "the load is over, and nobody found it slow"
        assert lookups(running, keys[8:]) == {"MISS"}
        # Meanwhile another prompt's blocks, also there, are computed, and more is computed and
        # offered than the drive takes.
        for first in range(100, 120, 4):
            running.begin_store(blocks(range(first, first + 4)))
            running.step()
        assert running.jobs >= 2, "the drive was waited for"
        running.step()
        declined = observed(running, "spdk_kv_declined_chunks")
        assert declined >= 8
        while running.jobs:
            running.step()
            steps += 1
        slow_down(0)
        assert steps > 10, "the scheduler was held up"
        running.forget_memory()
        assert running.load(keys) == list(wanted.values())
        later = blocks(range(100, 120))
        found = running.load(list(later))
        assert sum(block is None for block in found) == declined
        for block, key in zip(found, later, strict=True):
            assert block in (None, later[key]), "other bytes"
        running.store({key_of(200): later[key_of(100)]})
    print(steps, int(declined))


if __name__ == "__main__":
    main(sys.argv[1])
