"""Trouble, really caused: the host goes on, and answers as it would without a cache."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

import spdk_kv
from integrations.llama_cpp import killing
from integrations.llama_cpp.models import answer, evaluated, open_llama, text
from spdk_kv.errors import DeviceTimeout, StoreLocked
from spdk_kv.integrations.llama_cpp import StateCache
from spdk_kv.store import KVStore
from support.waiting import PATIENCE_S

llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")

EVERY = 64
COUNT = 8
PROMPT = text(1, 5 * EVERY)


@pytest.fixture
def llama(model_path: Path) -> Iterator[Any]:
    with_model = open_llama(model_path)
    yield with_model
    with_model.close()


@pytest.fixture
def expected(model_path: Path) -> list[int]:
    """The answer to ``PROMPT``, of a Llama without a cache."""
    plain = open_llama(model_path)
    found = answer(plain, PROMPT, COUNT)
    plain.close()
    return found


def cached(llama: Any, store: KVStore) -> StateCache:
    cache = StateCache(store, llama, every=EVERY)
    llama.set_cache(cache)
    return cache


def remember(path: Path, store: KVStore, *prompts: list[int]) -> StateCache:
    llama = open_llama(path)
    cache = cached(llama, store)
    for prompt in prompts:
        answer(llama, prompt, COUNT)
    cache.wait()
    llama.close()
    return cache


def state_keys(store: KVStore) -> list[str]:
    return [key for key in store.keys("llama_cpp/") if "/files/" not in key]


def damage(store: KVStore, folder: Path, tokens: int) -> None:
    """Flips a bit in the middle of the state of the last tokens before ``tokens``."""
    key = state_keys(store)[tokens // EVERY - 1]
    record = store.catalog.records.blobs[key]
    store.flush()
    with (folder / "data").open("r+b") as file:
        file.seek(record.offset + record.nbytes // 2)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 0x10]))
        os.fsync(file.fileno())


@pytest.mark.parametrize("before", [1, 3, 8, 13])
def test_killed_while_it_stores(model_path: Path, tmp_path: Path, before: int) -> None:
    folder = tmp_path / "store"
    command = [sys.executable, killing.__file__, str(model_path), str(folder), str(before)]
    durable = 0
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line == "storing\n":
                process.send_signal(signal.SIGKILL)
                break
            durable += 1
    assert process.returncode == -signal.SIGKILL
    with spdk_kv.open(f"file://{folder}") as store:
        for number in range(durable + 1):
            prompt = text(number, killing.TOKENS)
            plain, llama = open_llama(model_path), open_llama(model_path)
            cache = cached(llama, store)
            got: list[int] = []
            computed = evaluated(llama, lambda: got.extend(answer(llama, prompt, COUNT)))  # noqa: B023
            assert got == answer(plain, prompt, COUNT)
            assert cache.stats()["damaged"] == 0
            if number < durable:
                assert computed == COUNT
            plain.close()
            llama.close()


def test_a_damaged_piece_ends_what_is_taken_up(
    model_path: Path, llama: Any, store: KVStore, tmp_path: Path, expected: list[int]
) -> None:
    remember(model_path, store, PROMPT)
    damage(store, tmp_path / "store", 3 * EVERY)
    cache = cached(llama, store)
    assert answer(llama, PROMPT, COUNT) == expected
    assert cache.stats()["damaged"] == 1
    assert cache.stats()["restored_tokens"] == 2 * EVERY
    # It was computed, and stored again.
    cache.wait()
    assert cache.stats()["saved"] == 1
    again = open_llama(model_path)
    cached(again, store)
    assert evaluated(again, lambda: answer(again, PROMPT, COUNT)) == COUNT
    again.close()


def test_a_damaged_beginning_is_a_miss(
    model_path: Path, llama: Any, store: KVStore, tmp_path: Path, expected: list[int]
) -> None:
    remember(model_path, store, PROMPT)
    damage(store, tmp_path / "store", EVERY)
    cache = cached(llama, store)
    assert answer(llama, PROMPT, COUNT) == expected
    assert (cache.stats()["damaged"], cache.stats()["misses"], cache.stats()["hits"]) == (1, 1, 0)


def test_what_llama_cpp_refuses_is_a_miss(
    model_path: Path, llama: Any, store: KVStore, expected: list[int]
) -> None:
    remember(model_path, store, PROMPT)
    first, *others = state_keys(store)
    for wrong in (store.get(first, as_numpy=True)[:-8], store.get(others[0], as_numpy=True)):
        store.put(first, wrong)  # cut short; and the state of other tokens
        cache = cached(llama, store)
        llama.reset()
        assert answer(llama, PROMPT, COUNT) == expected
        assert (cache.stats()["failed"], cache.stats()["misses"]) == (1, 1)
        # It is not in the way of what was computed instead.
        cache.wait()
        again = open_llama(model_path)
        cached(again, store)
        assert evaluated(again, lambda again=again: answer(again, PROMPT, COUNT)) == COUNT
        again.close()


def test_pieces_of_another_length_are_no_hindrance(
    model_path: Path, store: KVStore, expected: list[int]
) -> None:
    remember(model_path, store, PROMPT)
    # Their first pieces begin alike; others are in nobody's way.
    for every, held in ((2 * EVERY, EVERY), (2 * EVERY, len(PROMPT)), (EVERY, len(PROMPT))):
        asking = open_llama(model_path)
        cache = StateCache(store, asking, every=every)
        asking.set_cache(cache)
        got: list[int] = []
        computed = evaluated(asking, lambda: got.extend(answer(asking, PROMPT, COUNT)))  # noqa: B023
        assert computed == COUNT + len(PROMPT) - held - (held != len(PROMPT))
        assert got == expected
        assert cache.stats()["failed"] == 0
        cache.wait()
        asking.close()


def test_without_memory_for_a_state_the_host_goes_on(
    model_path: Path,
    llama: Any,
    store: KVStore,
    expected: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def none(*_: Any, **__: Any) -> Any:
        raise MemoryError

    cache = cached(llama, store)
    with monkeypatch.context() as patched:
        patched.setattr("spdk_kv.integrations.llama_cpp.contexts._buffer", none)
        assert answer(llama, PROMPT, COUNT) == expected
        assert (cache.stats()["saved"], cache.stats()["unsaved"]) == (0, 1)
    remember(model_path, store, PROMPT)
    llama.reset()
    with monkeypatch.context() as patched:
        patched.setattr(store, "get_async", none)
        assert answer(llama, PROMPT, COUNT) == expected
        assert cache.stats()["failed"] == 1
    llama.reset()
    assert evaluated(llama, lambda: answer(llama, PROMPT, COUNT)) == COUNT


def test_a_drive_that_takes_nothing_is_not_waited_for_piece_by_piece(
    llama: Any, store: KVStore, expected: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[str] = []

    def put_async(key: str, *_: Any, **__: Any) -> Any:
        tried.append(key)
        late: Future[None] = Future()
        late.set_exception(DeviceTimeout("too late"))
        return late

    monkeypatch.setattr(store, "put_async", put_async)
    cache = StateCache(store, llama, every=EVERY // 4)
    llama.set_cache(cache)
    assert answer(llama, PROMPT, COUNT) == expected
    cache.wait()
    assert len(tried) == 4, "those that were under way when the first had failed"
    assert cache.stats()["saved"] == 0


def test_a_full_store_that_may_not_forget_takes_no_more(
    llama: Any, tmp_path: Path, expected: list[int]
) -> None:
    location = f"file://{tmp_path}/full"
    with spdk_kv.open(location, capacity="64 KiB", eviction="none") as store:
        cache = cached(llama, store)
        assert answer(llama, PROMPT, COUNT) == expected
        cache.wait()
        assert cache.stats()["unsaved"] > 0
        held = cache.cache_size
        assert answer(llama, text(2, 300), COUNT)
        assert cache.cache_size == held


def test_a_full_store_that_is_in_use_takes_no_more_until_it_is_not(
    model_path: Path, llama: Any, tmp_path: Path, expected: list[int]
) -> None:
    with spdk_kv.open(f"file://{tmp_path}/full", capacity="256 KiB") as store:
        remember(model_path, store, PROMPT)
        records = store.catalog.records
        held = store.keys()
        pinned = records.find(held)
        cache = cached(llama, store)
        for seed in range(30, 34):
            answer(llama, text(seed, 300), COUNT)
        cache.wait()
        assert cache.stats()["unsaved"] > 0
        assert set(held) <= set(store.keys())
        assert answer(llama, PROMPT, COUNT) == expected
        records.unpin(pinned)
        before = cache.stats()["saved"]
        answer(llama, text(40, 300), COUNT)
        cache.wait()
        assert cache.stats()["saved"] > before


def test_a_full_store_forgets_what_was_used_longest_ago(
    model_path: Path, llama: Any, tmp_path: Path, expected: list[int]
) -> None:
    nbytes = 600 << 10
    with spdk_kv.open(f"file://{tmp_path}/full", capacity=nbytes) as store:
        cache = remember(model_path, store, PROMPT, *(text(seed, 300) for seed in range(10, 20)))
        assert cache.stats()["unsaved"] == 0
        assert cache.cache_size <= nbytes
        assert text(19, 300) in cached(llama, store)
        assert PROMPT not in llama.cache
        assert answer(llama, PROMPT, COUNT) == expected


def test_a_second_process_is_told_who_has_the_store_and_may_read_it(
    model_path: Path, store: KVStore, tmp_path: Path, expected: list[int]
) -> None:
    remember(model_path, store, PROMPT)
    store.flush()
    script = f"""
import sys
sys.path.insert(0, {str(Path(killing.__file__).parents[2])!r})
from pathlib import Path
import spdk_kv
from integrations.llama_cpp.models import answer, evaluated, open_llama, text
from spdk_kv.integrations.llama_cpp import StateCache
try:
    spdk_kv.open({store.location!r})
except spdk_kv.errors.StoreLocked as refused:
    print(refused.pid)
with spdk_kv.open({store.location!r}, read_only=True) as store:
    llama = open_llama(Path({str(model_path)!r}))
    cache = StateCache(store, llama, every={EVERY})
    llama.set_cache(cache)
    got = []
    print(evaluated(llama, lambda: got.extend(answer(llama, text(1, 5 * {EVERY}), {COUNT}))))
    print(got)
    answer(llama, text(2, 200), {COUNT})
    cache.wait()
    print(cache.stats()["saved"])
"""
    process = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert process.returncode == 0, process.stderr
    assert process.stdout.splitlines() == [str(os.getpid()), str(COUNT), str(expected), "0"]
    with pytest.raises(StoreLocked, match=str(os.getpid())):
        spdk_kv.open(store.location)


def test_a_reader_finds_what_is_stored_later(model_path: Path, store: KVStore, llama: Any) -> None:
    store.flush()
    with spdk_kv.open(store.location, read_only=True) as reader:
        cache = cached(llama, reader)
        assert PROMPT not in cache
        remember(model_path, store, PROMPT)
        store.flush()
        assert PROMPT in cache


def test_a_llama_is_closed_when_its_state_was_copied(
    model_path: Path, store: KVStore, expected: list[int]
) -> None:
    llama = open_llama(model_path)
    cache = cached(llama, store)
    begun, go = threading.Event(), threading.Event()
    order: list[str] = []
    put = store.put_async

    def put_async(*args: Any, **kwargs: Any) -> Any:
        begun.set()
        assert go.wait(PATIENCE_S)
        assert llama._ctx.ctx is not None
        order.append("stored")
        return put(*args, **kwargs)

    def close() -> None:
        llama.close()
        order.append("closed")

    store.put_async = put_async  # type: ignore[method-assign]
    asking = threading.Thread(target=answer, args=(llama, PROMPT, COUNT))
    closing = threading.Thread(target=close)
    asking.start()
    assert begun.wait(PATIENCE_S)
    closing.start()
    closing.join(0.2)  # time to go wrong in
    assert order == []
    go.set()
    asking.join(PATIENCE_S)
    closing.join(PATIENCE_S)
    assert order == ["stored"] * 6 + ["closed"]
    store.put_async = put  # type: ignore[method-assign]
    cache.wait()
    again = open_llama(model_path)
    cached(again, store)
    assert answer(again, PROMPT, COUNT) == expected
    again.close()


def test_a_cache_ends_with_its_llama(model_path: Path, store: KVStore) -> None:
    llama = open_llama(model_path)
    cache = cached(llama, store)
    answer(llama, PROMPT, COUNT)
    cache.wait()
    stored = store.keys()
    llama.close()
    with pytest.raises(KeyError):
        cache[PROMPT]
    cache[PROMPT] = None
    assert store.keys() == stored


def test_a_drive_that_is_too_slow_is_not_waited_for(
    model_path: Path, llama: Any, store: KVStore, expected: list[int]
) -> None:
    remember(model_path, store, PROMPT)
    held = set(store.keys())
    cache = StateCache(store, llama, every=EVERY, timeout_s=1e-9)
    llama.set_cache(cache)
    assert answer(llama, PROMPT, COUNT) == expected
    assert (cache.stats()["failed"], cache.stats()["misses"]) == (1, 1)
    answer(llama, text(2, 200), COUNT)
    cache.wait()
    assert cache.stats()["unsaved"] > 0
    assert set(store.keys()) == held


def test_a_store_that_is_closed_under_it_is_a_miss(
    model_path: Path, tmp_path: Path, llama: Any, expected: list[int]
) -> None:
    store = spdk_kv.open(f"file://{tmp_path}/closed", capacity="4 MiB")
    cache = cached(llama, store)
    store.close()
    assert answer(llama, PROMPT, COUNT) == expected
    assert cache.stats()["misses"] == 1
    assert cache.stats()["saved"] == 0


def test_a_data_file_that_was_cut_off_is_a_miss(
    model_path: Path, store: KVStore, tmp_path: Path, llama: Any, expected: list[int]
) -> None:
    remember(model_path, store, PROMPT)
    store.flush()
    os.truncate(tmp_path / "store" / "data", 1 << 20)
    cache = cached(llama, store)
    assert answer(llama, PROMPT, COUNT) == expected
    assert cache.stats()["hits"] == 0
    assert cache.stats()["damaged"] + cache.stats()["failed"] > 0
