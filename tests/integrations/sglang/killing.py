"""Stores pages as SGLang's backup thread does, until it is killed; run by the tests.

    python killing.py LOCATION LAYOUT

Says "N durable" after each flush that covers N pages, and stores on meanwhile.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from integrations.sglang import host
from spdk_kv.integrations.sglang import HiCacheSpdkKv

BATCH, BATCHES = 4, 64


def key(number: int) -> str:
    return f"{number:064x}"


def main(location: str, layout: str) -> None:
    _, pool = host.mha_pools(layout)
    backend = HiCacheSpdkKv(host.config(location), {})
    backend.register_mem_pool_host(pool)
    (store,) = backend._stores.opened()
    indices = torch.arange(BATCH * host.PAGE)
    flushed = store.flush_async()
    durable = 0
    for batch in range(BATCHES):
        # A page's bytes are those of its number.
        for at in range(BATCH):
            host.fill(pool, indices[at * host.PAGE : (at + 1) * host.PAGE], batch * BATCH + at)
        stored = backend.batch_set_v1([key(batch * BATCH + at) for at in range(BATCH)], indices)
        assert stored == [True] * BATCH
        if flushed.done():
            flushed.result()
            if durable:
                print(durable, "durable", flush=True)
            durable = (batch + 1) * BATCH
            flushed = store.flush_async()
    print("all stored", flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main(*sys.argv[1:])
