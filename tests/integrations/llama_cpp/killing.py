"""Asks a model one prompt after the other, and stores the states; run by the tests, which kill it.

    python killing.py MODEL STORE BEFORE

Says "N durable" after each flush, and "storing" when a write has begun that nobody waits for, after
BEFORE of them were let end.
"""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import spdk_kv
from integrations.llama_cpp.models import answer, open_llama, text
from spdk_kv.integrations.llama_cpp import StateCache

TOKENS = 200


def main(model: str, folder: str, before: int) -> None:
    store = spdk_kv.open(f"file://{folder}", capacity="64 MiB", flush_interval_s=None)
    llama = open_llama(Path(model))
    cache = StateCache(store, llama, every=64)
    llama.set_cache(cache)
    put = store.put_async
    begun = 0

    def put_async(*args: Any, **kwargs: Any) -> Any:
        nonlocal begun
        future = put(*args, **kwargs)
        begun += 1
        if begun > before:
            print("storing", flush=True)
            signal.pause()
        return future

    store.put_async = put_async  # type: ignore[method-assign]
    for number in range(before + 1):
        answer(llama, text(number, TOKENS))
        cache.wait()
        store.flush()
        print(number, "durable", flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
