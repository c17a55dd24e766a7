"""Blocks go through vLLM's own tiering manager into the store, and come back as they were."""

from __future__ import annotations

import numpy as np
import pytest

import spdk_kv
from integrations.vllm.host import ROW_NBYTES, Host, blocks, host, key_of, tier_at
from support.waiting import wait_until

pytest.importorskip(
    "vllm.v1.kv_offload.tiering", reason="vLLM is not installed (tests/integrations/vllm)"
)


@pytest.fixture
def tier(tmp_path):
    return tier_at(tmp_path / "store")


def observed(running: Host, name: str) -> float:
    """A metric of vLLM's about our tier, since it was asked last."""
    stats = running.manager.get_stats()
    values = {} if stats is None else stats.reduce()
    found = [value for key, value in values.items() if name in key and "primary" not in key]
    return sum(found)


def test_what_was_stored_is_loaded_exactly(tier):
    wanted = blocks(range(128))
    with host(tier, chunks=192) as running:
        running.store(wanted)
        running.forget_memory()
        assert running.load(list(wanted)) == list(wanted.values())
        assert running.load([key_of(999)]) == [None]


def test_time_and_bytes_of_jobs_are_told(tier):
    from vllm.v1.kv_offload.tiering.base import TieringOffloadingMetrics as Metrics

    wanted = blocks(range(8))
    with host(tier) as running:
        running.store(wanted)
        stats = running.manager.get_stats().reduce()
        label = "('1:SpdkKvTier',)"
        assert stats[f"{Metrics.WRITE_BYTES}:{label}"] == 8 * ROW_NBYTES
        assert stats[f"{Metrics.WRITE_TIME}:{label}"] > 0
        running.forget_memory()
        running.load(list(wanted))
        stats = running.manager.get_stats().reduce()
        assert stats[f"{Metrics.READ_BYTES}:{label}"] == 8 * ROW_NBYTES
        assert stats[f"{Metrics.READ_TIME}:{label}"] > 0
        assert stats[f"{Metrics.CHUNK_HITS}:{label}"] == 8


def test_a_new_engine_has_what_the_last_one_stored(tier):
    wanted = blocks(range(16))
    with host(tier) as running:
        running.store(wanted)
        used = running.tier.store.stats()["used_nbytes"]
    with host(tier) as running:
        assert running.tier.store.stats()["used_nbytes"] == used == 16 * ROW_NBYTES
        assert running.load(list(wanted)) == list(wanted.values())


def test_what_is_stored_is_not_written_again(tier):
    wanted = blocks(range(4))
    with host(tier) as running:
        running.store(wanted)
        running.forget_memory()
        before = running.tier.store.stats()["transfers"]
        running.store(wanted)
        assert running.tier.store.stats()["transfers"] == before


def test_the_store_evicts_what_was_used_longest_ago(tier):
    old, new = blocks(range(10)), blocks(range(10, 20))
    tier["capacity"] = 15 * ROW_NBYTES
    with host(tier) as running:
        running.store(old)
        running.store(new)
        running.forget_memory()
        assert running.load(list(new)) == list(new.values())
        assert running.load(list(old)).count(None) == 5
        assert observed(running, "spdk_kv_evicted_chunks") == 5
        assert observed(running, "spdk_kv_evicted_chunks") == 0


@pytest.mark.parametrize(
    "other",
    [
        {"name": "other"},
        {"dtype": "float16"},
        {"kv_cache_layout": "HND"},
        {"layers": ("layers.0", "layers.1")},
        {"rank": 1},
        {"tp_size": 2},
        {"pp_size": 2},
        {"tokens_per_hash": 32},
        {"row_nbytes": 2 * ROW_NBYTES},
    ],
    ids=lambda other: next(iter(other)),
)
def test_blocks_of_other_models_and_layouts_are_not_found(tier, other):
    key = key_of(1)
    with host(tier) as running:
        running.store(blocks([1]))
    with host(tier, **other) as running:
        assert running.load([key]) == [None]
    with host(tier) as running:
        assert running.load([key]) == [blocks([1])[key]]


def test_other_weights_in_the_models_folder_find_nothing(tier, tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    (model / "weights").write_bytes(b"1")
    with host(tier, name=str(model)) as running:
        running.store(blocks([1]))
    with host(tier, name=str(model)) as running:
        assert running.load([key_of(1)]) == [blocks([1])[key_of(1)]]
    (model / "weights").write_bytes(b"12")
    with host(tier, name=str(model)) as running:
        assert running.load([key_of(1)]) == [None]


def test_keys_may_be_long_and_rows_odd(tier, tmp_path):
    from types import SimpleNamespace

    from vllm.v1.kv_offload.tiering.base import TransferJob

    from spdk_kv.integrations.vllm import SpdkKvTier

    with host(tier) as running:
        spec = running.spec
    rows = np.frombuffer(bytearray(np.random.default_rng(0).bytes(4 * 1001)), np.int8)
    rows = rows.reshape(4, 1001)
    wanted = rows.tobytes()
    view = memoryview(rows)
    alone = SpdkKvTier(spec, view, "SpdkKvTier", location=f"file://{tmp_path}/odd", capacity="1M")
    keys = [key_of(number, 1024) for number in range(4)]
    request = SimpleNamespace(req_id="r")

    def job(number, keys, load):
        return TransferJob(number, keys, np.arange(len(keys), dtype=np.int32), load, request)

    def ended(count):
        found = []
        wait_until(lambda: found.extend(alone.get_finished_jobs()) or len(found) == count)
        assert not list(alone.get_finished_jobs())
        return {result.job_id: result for result in found}

    alone.submit_store(job(1, keys, False))
    alone.submit_store(job(2, [], False))
    alone.submit_load(job(3, [], True))
    results = ended(3)
    assert all(result.success for result in results.values())
    assert results[1].transfer_bytes == 4 * 1001
    rows[:] = 0
    alone.submit_load(job(4, keys, True))
    assert ended(1)[4].success
    assert rows.tobytes() == wanted
    alone.shutdown()
    view.release()


def test_a_second_engine_is_told_who_has_the_store(tier):
    with host(tier) as running:
        running.store(blocks([1]))
        with pytest.raises(spdk_kv.StoreLocked, match=r"\d+"):
            Host(tier)


def test_a_second_engine_may_read(tier, tmp_path):
    wanted = blocks(range(8))
    with host(tier) as running:
        running.store(wanted)
        running.tier.store.flush()
        with host(tier_at(tmp_path / "store", read_only=True)) as reader:
            assert reader.load(list(wanted)) == list(wanted.values())
            reader.store(blocks([100]))
            assert observed(reader, "spdk_kv_declined_chunks") == 1
            reader.forget_memory()
            assert reader.load([key_of(100)]) == [None]
            # What the writer stores later is found by later requests.
            running.store(blocks([100]))
            running.tier.store.flush()
            assert reader.load([key_of(100)]) == [blocks([100])[key_of(100)]]


def test_an_unknown_option_ends_the_start(tier):
    with pytest.raises(ValueError, match="no option 'capcity'"):
        Host({**tier, "capcity": "1 GiB"})


def test_the_configuration_is_told(tier, tmp_path):
    with host({**tier, "locality": "LOCAL", "engine": "threads"}) as running:
        if not hasattr(running.manager, "config_info"):
            pytest.skip("this vLLM tells no configuration")
        (_, ours) = running.manager.config_info()
        assert ours["spdk_kv_location"] == f"file://{tmp_path}/store"
        assert ours["spdk_kv_engine"] == "threads"
        keys = type(running.spec).config_info_keys(running.spec.extra_config)
        assert {"spdk_kv_location", "spdk_kv_engine"} <= set(keys)


def test_every_metric_that_is_told_is_defined(tier):
    with host(tier) as running:
        running.store(blocks([1]))
        told = running.manager.get_stats().data["types"]
        names = {name for name in told if "spdk_kv" in name}
        assert len(names) == 3, "what is stored, and how much may be"
        assert names <= set(type(running.spec).build_metric_definitions(running.spec.extra_config))
