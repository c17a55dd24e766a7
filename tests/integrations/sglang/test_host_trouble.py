"""What goes wrong under SGLang, really caused: it goes on, and never gets other bytes."""

from __future__ import annotations

import gc
import logging
import subprocess
import sys
import threading
import weakref
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("sglang", reason="SGLang is not installed: scripts/test.sh --hosts sglang")

import torch
from sglang.srt.environ import envs
from sglang.srt.mem_cache.hicache_storage import PoolName, PoolTransfer
from sglang.srt.mem_cache.radix_cache import RadixKey

from integrations.sglang import host, killing
from spdk_kv.errors import DeviceGone, StoreLocked
from spdk_kv.integrations.sglang import HiCacheSpdkKv
from store.helpers import extent_of, flip
from support.waiting import PATIENCE_S, wait_until

PAGES = 8
KEYS = [f"{number:064x}" for number in range(PAGES)]
FIRST = torch.arange(PAGES * host.PAGE)
SECOND = FIRST + PAGES * host.PAGE


class Engine:
    """A backend as one engine has it, with a pool of its own whose first pages hold something."""

    def __init__(self, location: str, layout: str = "page_first", seed: int = 1, **other: Any):
        fields = {name: other.pop(name) for name in list(other) if name in host_fields()}
        _, self.pool = host.mha_pools(layout, **other.pop("pools", {}))
        self.backend = HiCacheSpdkKv(
            host.config(location, extra_config=host.extra(location, **other), **fields), {}
        )
        self.backend.register_mem_pool_host(self.pool)
        self.pages = host.fill(self.pool, FIRST, seed)

    @property
    def store(self) -> Any:
        (store,) = self.backend._stores.opened()
        return store

    def put(self) -> list[bool]:
        return self.backend.batch_set_v1(KEYS, FIRST)

    def get(self) -> list[bool]:
        """Reads all pages to other places, and looks at what came."""
        host.fill(self.pool, SECOND, 99)
        sound = self.backend.batch_get_v1(KEYS, SECOND)
        for there, page, wanted in zip(
            sound, host.pages_at(self.pool, SECOND), self.pages, strict=True
        ):
            assert not there or torch.equal(page, wanted), "other bytes came back"
        return sound


def engine_page_nbytes() -> int:
    """Of a page of K and V, as 16-bit numbers."""
    return 2 * 2 * host.PAGE * host.LAYERS * host.HEADS * host.DIM


def host_fields() -> set[str]:
    return set(host.HiCacheStorageConfig.__dataclass_fields__)


@pytest.fixture
def location(tmp_path: Path) -> str:
    return f"file://{tmp_path}/kv"


@pytest.fixture
def make(location: str) -> Iterator[Callable[..., Engine]]:
    made: list[Engine] = []

    def engine(**other: Any) -> Engine:
        made.append(Engine(location, **other))
        return made[-1]

    yield engine
    for each in made:
        each.backend.close()


@pytest.mark.parametrize("layout", ["page_first", "layer_first"])
def test_after_a_kill_every_page_is_whole_or_missing(location: str, layout: str) -> None:
    command = [sys.executable, killing.__file__, location, layout]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stdin=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout is not None
        said = [child.stdout.readline() for _ in range(3)]
        child.kill()
    durable = max(int(line.split()[0]) for line in said if line.endswith("durable\n"))
    _, pool = host.mha_pools(layout)
    backend = HiCacheSpdkKv(host.config(location), {})
    backend.register_mem_pool_host(pool)
    one = torch.arange(host.PAGE)
    there = [
        number
        for number in range(killing.BATCH * killing.BATCHES)
        if backend.batch_get_v1([killing.key(number)], one) == [True] and _is(pool, one, number)
    ]
    backend.close()
    assert there[:durable] == list(range(durable))
    assert len(there) < killing.BATCH * killing.BATCHES or said[-1] == "all stored\n"


def _is(pool: Any, at: torch.Tensor, number: int) -> bool:
    (found,) = host.pages_at(pool, at)
    (wanted,) = host.fill(pool, at, number)
    assert torch.equal(found, wanted), "other bytes came back"
    return True


@pytest.mark.parametrize(
    "other",
    [
        {"model_name": "some/other-model"},
        {"identity": "another revision"},
        {"layout": "layer_first"},
        {"layout": "page_first_direct"},
        {"pools": {"dtype": torch.float16}},
        {"pools": {"page": 2 * host.PAGE}},
        {"tp_rank": 1, "tp_size": 2},
        {"tp_rank": 0, "tp_size": 2},
        {"pp_rank": 1, "pp_size": 2},
        {"attn_cp_rank": 1, "attn_cp_size": 2},
    ],
    ids=str,
)
def test_another_model_dtype_layout_or_rank_finds_nothing(
    make: Callable[..., Engine], other: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    # All ranks on one store, so that nothing but their keys tells them apart.
    monkeypatch.setattr(
        "spdk_kv.integrations.sglang.stores.place", lambda location, *_, **__: location
    )
    first = make()
    assert all(first.put())
    first.backend.close()
    stranger = make(seed=2, **other)
    keys = KEYS[: len(FIRST) // stranger.pool.page_size]
    assert stranger.backend.batch_exists(keys) == 0
    assert not any(stranger.backend.batch_get_v1(keys, SECOND[: len(FIRST)]))
    assert all(stranger.backend.batch_set_v1(keys, FIRST))
    stranger.backend.close()
    again = make()
    assert all(again.get())


def test_pages_of_another_adapter_or_salt_are_not_found(location: str) -> None:
    tokens = list(range(PAGES * host.PAGE))
    device, pool = host.mha_pools("page_first")
    with host.controller(device, pool, host.extra(location)) as engine:
        indices = pool.alloc(len(tokens))
        host.fill(pool, indices, 1)
        assert host.write(engine, indices, tokens) == len(tokens)
        for others, found in (
            ({}, len(tokens)),
            ({"extra_key": "an adapter"}, 0),
            ({"cache_salt": "of somebody"}, 0),
        ):
            operation = engine.prefetch("request", RadixKey(array("q", tokens), **others))
            assert engine.prefetch_hit_queue.get(timeout=PATIENCE_S) is operation
            assert operation.storage_hit_count == found


def test_the_two_kinds_of_eight_bits_are_told_apart(
    make: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    context = sys.modules["sglang.srt.runtime_context"]
    for kind, found in (("fp8_e4m3", 0), ("fp8_e5m2", 0), ("fp8_e4m3", PAGES)):
        # Both are stored as bytes, and only the engine's settings know.
        settings = type("Settings", (), {"kv_cache_dtype": kind})
        monkeypatch.setattr(context, "get_model", lambda settings=settings: settings)
        engine = make(pools={"dtype": torch.float8_e4m3fn}, seed=3 if kind == "fp8_e4m3" else 4)
        assert engine.pool.dtype is torch.uint8
        assert engine.backend.batch_exists(KEYS) == found
        assert all(engine.put())
        assert all(engine.get())
        engine.backend.close()


def test_a_damaged_page_is_a_miss_and_counted(make: Callable[..., Engine], tmp_path: Path) -> None:
    engine = make()
    engine.put()
    engine.store.flush()
    damaged = engine.backend._key("kv", KEYS[3])
    offset, nbytes = extent_of(engine.store, damaged)
    flip(tmp_path / "kv" / "data", offset + nbytes - 1)
    assert engine.get() == [number != 3 for number in range(PAGES)]
    assert engine.store.stats()["corruptions"] == 1
    assert engine.backend.batch_exists(KEYS) == 3
    assert all(engine.put())
    assert all(engine.get())


def test_a_full_store_in_use_stores_nothing_and_then_goes_on(make: Callable[..., Engine]) -> None:
    engine = make(capacity=PAGES * engine_page_nbytes())
    assert all(engine.put())
    engine.store.flush()
    held = engine.store.keys()
    pinned = engine.store.catalog.records.find(held)
    others = [f"{number:064x}" for number in range(100, 100 + PAGES)]
    assert not any(engine.backend.batch_set_v1(others, FIRST))
    assert set(held) <= set(engine.store.keys())
    engine.store.catalog.records.unpin(pinned)
    assert engine.backend.batch_set_v1(others[:1], FIRST[: host.PAGE]) == [True]


def held_drive(store: Any, monkeypatch: pytest.MonkeyPatch) -> tuple[threading.Event, Any]:
    """The drive takes no command before the event is set; the semaphore counts who waits."""
    opened, waiting = threading.Event(), threading.Semaphore(0)
    run = store.engine.run

    def slowly(*args: Any, **kwargs: Any) -> Any:
        waiting.release()
        assert opened.wait(PATIENCE_S)
        return run(*args, **kwargs)

    monkeypatch.setattr(store.engine, "run", slowly)
    return opened, waiting


def test_the_host_goes_on_beside_a_slow_drive(
    location: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    device, pool = host.mha_pools("page_first")
    tokens = list(range(PAGES * host.PAGE))
    with host.controller(device, pool, host.extra(location)) as engine:
        indices = pool.alloc(len(tokens))
        wanted = host.fill(pool, indices, 1)
        assert host.write(engine, indices, tokens) == len(tokens)
        (store,) = engine.storage_backend._stores.opened()
        opened, waiting = held_drive(store, monkeypatch)
        operation = engine.prefetch("slow", tokens)
        assert engine.prefetch_hit_queue.get(timeout=PATIENCE_S) is operation
        operation.host_indices = pool.alloc(operation.storage_hit_count)
        engine.prefetch_buffer.put(operation)
        assert waiting.acquire(timeout=PATIENCE_S)
        # The drive is at it. The scheduler asks on, hears what is stored, and gives this one up.
        assert engine.prefetch("next", tokens) is engine.prefetch_hit_queue.get(timeout=PATIENCE_S)
        assert engine.terminate_prefetch(operation)[0] == 0
        assert engine.ack_prefetch_queue.empty()
        opened.set()
        wait_until(lambda: engine.ack_prefetch_queue.get(timeout=PATIENCE_S).completed_req)
        assert host.same(host.pages_at(pool, operation.host_indices), wanted)


def test_a_drive_that_is_gone_is_a_miss(
    make: Callable[..., Engine],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    engine = make(flush_interval_s=None)
    assert all(engine.put())

    def gone(*args: Any, **kwargs: Any) -> Any:
        raise DeviceGone("it was pulled out")

    with monkeypatch.context() as patched, caplog.at_level(logging.WARNING):
        patched.setattr(engine.store.engine, "run", gone)
        assert engine.get() == [False] * PAGES
        assert engine.backend.batch_set_v1(["new"], FIRST[: host.PAGE]) == [False]
        assert engine.backend.get(KEYS[0]) is None
        assert not engine.backend.set("other", torch.ones(5))
    assert "it was pulled out" in caplog.text
    # Its end is cut off: what was there does not come any more.
    (tmp_path / "kv" / "data").write_bytes(b"")
    assert engine.get() == [False] * PAGES


def test_a_second_engine_is_told_at_the_start_or_reads(
    make: Callable[..., Engine], location: str
) -> None:
    first = make()
    assert all(first.put())
    first.store.flush()
    script = f"""if True:
        import sys
        sys.path.insert(0, {str(Path(__file__).parents[2])!r})
        from integrations.sglang import host
        from spdk_kv.integrations.sglang import HiCacheSpdkKv
        HiCacheSpdkKv(host.config({location!r}), {{}})
    """
    ran = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert ran.returncode == 1
    assert StoreLocked.__name__ in ran.stderr.splitlines()[-1]
    second = make(read_only=True)
    assert all(second.get())
    assert second.backend.batch_set_v1(["new"], FIRST[: host.PAGE]) == [False]
    assert second.backend.clear() is False
    assert all(first.get())


def test_keys_of_a_kib_and_pages_of_nothing(make: Callable[..., Engine]) -> None:
    backend = make().backend
    long = ["k" * 1024 + str(number) for number in range(PAGES)]
    assert all(backend.batch_set_v1(long, FIRST))
    assert backend.batch_exists([*long, "k" * 1024]) == PAGES
    assert backend.set("empty", torch.empty(0, dtype=torch.bfloat16))
    assert backend.exists("empty")
    assert backend.get("empty").numel() == 0
    assert backend.batch_set_v1([], FIRST[:0]) == [] == backend.batch_get_v1([], FIRST[:0])


def test_closed_amid_work_it_holds_nothing_of_the_hosts_memory(
    make: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make()
    assert all(engine.put())
    backend, store = engine.backend, engine.store
    opened, waiting = held_drive(store, monkeypatch)
    answers: list[list[bool]] = []
    thread = threading.Thread(target=lambda: answers.append(engine.get()))
    thread.start()
    assert waiting.acquire(timeout=PATIENCE_S)
    closing = threading.Thread(target=backend.close)
    closing.start()
    opened.set()
    thread.join(PATIENCE_S)
    closing.join(PATIENCE_S)
    assert len(answers) == 1  # either way, and no other bytes: `get` looks
    assert backend.batch_get_v1(KEYS, FIRST) == [False] * PAGES
    assert backend.batch_exists(KEYS) == 0
    backend.close()
    memory = weakref.ref(engine.pool.kv_buffer)
    engine.pool.destroy()
    del engine.pool
    gc.collect()
    assert memory() is None


def test_pages_are_the_writers_where_all_ranks_have_the_same(location: str) -> None:
    def rank(number: int) -> tuple[Any, Any]:
        _, pool = host.mla_pools("page_first")
        made = HiCacheSpdkKv(
            host.config(location, is_mla_model=True, tp_rank=number, tp_size=2), {}
        )
        made.register_mem_pool_host(pool)
        return made, pool

    reader, there = rank(1)
    assert reader.batch_exists(KEYS) == 0  # the writer has not begun its store
    assert reader.batch_set_v1(KEYS, FIRST) == [True] * PAGES  # the writer's to write
    writer, pool = rank(0)
    wanted = host.fill(pool, FIRST, 1)
    assert all(writer.batch_set_v1(KEYS, FIRST))
    (store,) = writer._stores.opened()
    store.flush()
    wait_until(lambda: reader.batch_exists(KEYS) == PAGES)
    assert reader.batch_get_v1(KEYS, FIRST) == [True] * PAGES
    assert host.same(host.pages_at(there, FIRST), wanted)
    # What differs between ranks is each rank's own, also beside pages that don't.
    answers = []
    for number, each in enumerate((writer, reader)):
        states = host.mamba_pool()
        each.register_mem_host_pool_v2(states, PoolName.MAMBA)
        each.on_host_pools_registered()
        slot = torch.tensor([0])
        state = host.fill(states, slot, 10 + number)
        transfer = PoolTransfer(PoolName.MAMBA, slot, keys=KEYS[:1])
        assert each.batch_set_v2([transfer]) == {PoolName.MAMBA: [True]}
        answers.append((each, states, transfer, state))
    for each, states, transfer, state in answers:
        host.fill(states, transfer.host_indices, 99)
        assert each.batch_get_v2([transfer]) == {PoolName.MAMBA: [True]}
        assert host.same(host.pages_at(states, transfer.host_indices), state)
    reader.close()
    writer.close()


def test_clear_forgets_this_models_pages_alone(make: Callable[..., Engine]) -> None:
    first = make()
    assert all(first.put())
    first.backend.close()
    other = make(model_name="some/other-model", seed=2)
    assert all(other.put())
    assert other.backend.clear()
    assert other.backend.batch_exists(KEYS) == 0
    other.backend.close()
    assert all(make().get())


def test_figures_of_what_was_moved_are_told_once(make: Callable[..., Engine]) -> None:
    engine = make()
    assert all(engine.put())
    assert all(engine.get())
    stats = engine.backend.get_stats()
    assert (stats.backup_pgs, stats.prefetch_pgs) == ([PAGES], [PAGES])
    assert len(stats.backup_bandwidth) == len(stats.prefetch_bandwidth) == 1
    assert min(*stats.backup_bandwidth, *stats.prefetch_bandwidth) > 0
    assert engine.backend.get_stats().prefetch_pgs == []


@pytest.mark.parametrize("layout", ["page_first", "layer_first"])
def test_beside_the_hosts_own_faults_nothing_wrong_comes_back(location: str, layout: str) -> None:
    tokens = list(range(PAGES * host.PAGE))
    device, pool = host.mha_pools(layout)
    completed = []
    with (
        envs.SGLANG_TEST_HICACHE_BACKEND_RANDOM_DELAY.override(0.002),
        envs.SGLANG_TEST_HICACHE_BACKEND_RANDOM_FAILURE.override(0.3),
        host.controller(device, pool, host.extra(location)) as engine,
    ):
        assert type(engine.storage_backend).__name__ == "HiCacheStorageFailureInjector"
        indices = pool.alloc(len(tokens))
        wanted = host.fill(pool, indices, 1)
        for _ in range(30):
            assert host.write(engine, indices, tokens) in (0, len(tokens))
            found, length = host.prefetch(engine, tokens)
            pages = host.pages_at(pool, found[:length])
            assert host.same(pages, wanted[: length // host.PAGE])
            completed.append(length)
            pool.free(found)
    assert max(completed) == len(tokens)
    assert min(completed) == 0
