"""Stores registered with prometheus-client, and what it exports of them."""

from __future__ import annotations

import gc
import re
import shutil
import subprocess
import sys
import threading
import weakref
from collections.abc import Iterator

import prometheus_client
import pytest
import torch
from prometheus_client import CollectorRegistry, Counter, generate_latest
from prometheus_client.parser import text_string_to_metric_families

import spdk_kv
from metrics.samples import sample
from spdk_kv.errors import ClosedError
from spdk_kv.metrics import Published, Sample, register
from spdk_kv.metrics.names import HELD, OPERATION, PATH, PREFIX, PROCESS
from spdk_kv.metrics.times import BOUNDS_NS
from store.helpers import open_store

LABELS = {"store", "path", "op", "le", "engine"}


@pytest.fixture
def registry() -> CollectorRegistry:
    return CollectorRegistry(auto_describe=True)


@pytest.fixture
def store() -> Iterator[spdk_kv.KVStore]:
    with open_store("ram://") as found:
        yield found


def exported(registry: CollectorRegistry) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """(name, labels) -> value, as prometheus-client's parser reads the exposition."""
    found = {}
    for family in text_string_to_metric_families(generate_latest(registry).decode()):
        for each in family.samples:
            key = each.name, tuple(sorted(each.labels.items()))
            assert key not in found, f"twice: {key}"
            found[key] = each.value
    return found


def labels(**values: str) -> tuple[tuple[str, str], ...]:
    return tuple(sorted(values.items()))


def test_every_number_of_a_sample_is_exported_in_base_units(registry: CollectorRegistry) -> None:
    it = sample()
    registry.register(Published(lambda: [("one", it)]))
    found = exported(registry)

    def value(name: str, **more: str) -> float:
        return found[PREFIX + name, labels(store="one", **more)]

    assert value("up") == 1
    for number in (*HELD, *PROCESS, *PATH, *OPERATION):
        end = "_total" if number.kind == "counter" else ""
        if number in HELD:
            assert value(number.name + end) == it.held[number.field]
        elif number in PROCESS:
            assert value(number.name + end) == getattr(it, number.field) / number.per
        elif number in PATH:
            for way, path in it.paths.items():
                expected = getattr(path, number.field) / number.per
                assert value(number.name + end, path=way) == expected
        elif number.kind == "counter":
            for way, path in it.paths.items():
                for op, counted in path.ops.items():
                    expected = getattr(counted, number.field)
                    assert value(number.name + end, path=way, op=op) == expected
    for way, path in it.paths.items():
        assert value("engine_info", path=way, engine=path.engine) == 1
        for op, counted in path.ops.items():
            where = {"path": way, "op": op}
            assert value("command_seconds_sum", **where) == counted.latency_ns / 1e9
            assert value("command_seconds_count", **where) == counted.ios
            assert value("transfer_seconds_sum", **where) == counted.took_ns / 1e9
            assert value("transfer_seconds_count", **where) == counted.transfers
            # One ended below 2**14 ns, two more below 2**15 ns, three beyond the last bound.
            for exponent, below in ((13, 0), (14, 1), (15, 3), (33, 3)):
                le = repr((1 << exponent) / 1e9)
                assert value("command_seconds_bucket", le=le, **where) == below
            assert value("command_seconds_bucket", le="+Inf", **where) == 6
    assert all(name.startswith(PREFIX) for name, _ in found)


def test_the_exposition_passes_the_linters_rules(registry: CollectorRegistry) -> None:
    """What `promtool check metrics` complains about, and what Prometheus' naming guide asks for:
    https://prometheus.io/docs/practices/naming/"""
    registry.register(Published(lambda: [("one", sample()), ("two", None)]))
    text = generate_latest(registry).decode()
    helped = re.findall(r"^# HELP (\S+) (.+)$", text, re.MULTILINE)
    typed = re.findall(r"^# TYPE (\S+) (\S+)$", text, re.MULTILINE)
    assert [name for name, _ in helped] == [name for name, _ in typed], "HELP, then TYPE, of each"
    assert len({name for name, _ in typed}) == len(typed), "each metric is described once"
    kinds = dict(typed)
    for name, said in helped:
        assert said[0].isupper(), f"{name}: help is a sentence"
        assert said.endswith("."), f"{name}: help is a sentence"
    for name, kind in typed:
        assert re.fullmatch(r"spdk_kv_[a-z][a-z_]*", name), f"{name}: snake case, no digits"
        assert (kind == "counter") == name.endswith("_total"), f"{name}: _total is for counters"
        assert kind in ("counter", "gauge", "histogram"), name
        assert not re.search(r"_(count|sum|bucket)$", name), f"{name}: reserved for histograms"
        # Units come last, before _total, are base units, in the plural.
        assert not re.search(
            r"(milli|micro|nano|_ms\b|_ns\b|_us\b|minutes|hours|kilo|mega|giga|KiB|MiB|percent)",
            name,
        ), f"{name}: base units only"
        assert not re.search(r"_(second|byte|nbytes|s)(_total)?$", name), f"{name}: plural"
        assert kind not in name.split("_"), f"{name}: no types in names"
        if kind == "histogram":
            assert name.endswith("_seconds"), f"{name}: a unit"
    for family in text_string_to_metric_families(text):
        for each in family.samples:
            assert set(each.labels) <= LABELS, f"{each.name}: {each.labels}"
            assert not any(label in each.name.split("_") for label in ("store", "op")), each.name
            assert ("le" in each.labels) == each.name.endswith("_bucket")
            if kinds.get(family.name, kinds.get(family.name + "_total")) == "counter":
                assert each.value >= 0
        if family.type == "histogram":
            _check_buckets(family)


def test_promtool_has_nothing_to_say(registry: CollectorRegistry) -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool, of the package prometheus, is not installed")
    registry.register(Published(lambda: [("one", sample()), ("two", None)]))
    done = subprocess.run(
        [promtool, "check", "metrics"], input=generate_latest(registry), capture_output=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


def _check_buckets(family: prometheus_client.Metric) -> None:
    series: dict[tuple[tuple[str, str], ...], list[tuple[float, float]]] = {}
    counts = {}
    for each in family.samples:
        rest = tuple(sorted((k, v) for k, v in each.labels.items() if k != "le"))
        if each.name.endswith("_bucket"):
            series.setdefault(rest, []).append((float(each.labels["le"]), each.value))
        elif each.name.endswith("_count"):
            counts[rest] = each.value
    for rest, buckets in series.items():
        assert buckets == sorted(buckets), "bounds and counts grow"
        assert buckets[-1] == (float("inf"), counts[rest])
        assert len(buckets) == len(BOUNDS_NS) + 1


def test_a_store_is_exported_as_long_as_it_is_open(registry: CollectorRegistry) -> None:
    with open_store("ram://") as store:
        registration = register(store, registry)
        store.put("a", torch.ones(1000))
        store.get("a")
        with pytest.raises(KeyError):
            store.get("b")
        found = exported(registry)
        of_store = labels(store="ram://")
        assert found["spdk_kv_up", of_store] == 1
        assert found["spdk_kv_hits_total", of_store] == 1
        assert found["spdk_kv_misses_total", of_store] == 1
        reads = labels(store="ram://", path="memory", op="read")
        assert found["spdk_kv_io_bytes_total", reads] == 4000
        assert found["spdk_kv_transfer_seconds_count", reads] == 1
        assert registration.name == "ram://"
    assert exported(registry) == {}, "a registry without stores has nothing of them"


def test_several_stores_in_one_process_have_a_label_each(registry: CollectorRegistry) -> None:
    with open_store("ram://") as one, open_store("ram://") as two, open_store("null://") as three:
        names = [register(each, registry).name for each in (one, two)]
        names.append(register(three, registry, name="spare").name)
        assert names == ["ram://", "ram:// #2", "spare"]
        assert {dict(key[1])["store"] for key in exported(registry)} == set(names)
        one.close()
        assert {dict(key[1])["store"] for key in exported(registry)} == set(names[1:])
        # What came free is used again.
        with open_store("ram://") as again:
            assert register(again, registry).name == "ram://"


def test_a_registration_can_be_ended(registry: CollectorRegistry, store) -> None:
    registration = register(store, registry)
    assert exported(registry)
    registration.unregister()
    registration.unregister()
    assert exported(registry) == {}
    register(store, registry)
    assert exported(registry)


def test_registering_does_not_keep_a_store_alive(registry: CollectorRegistry) -> None:
    store = open_store("ram://")
    register(store, registry)
    gone = weakref.ref(store)
    store.close()
    del store
    gc.collect()
    assert gone() is None
    assert exported(registry) == {}


def test_the_default_registry_is_the_process_own(store) -> None:
    registration = register(store)
    try:
        text = generate_latest(prometheus_client.REGISTRY).decode()
        assert 'spdk_kv_up{store="ram://"} 1.0' in text
    finally:
        registration.unregister()
    assert "spdk_kv_up{" not in generate_latest(prometheus_client.REGISTRY).decode()


def test_a_closed_store_is_not_registered(registry: CollectorRegistry) -> None:
    store = open_store("ram://")
    store.close()
    with pytest.raises(ClosedError):
        register(store, registry)


def test_names_that_are_taken_are_refused_and_leave_nothing(store) -> None:
    registry = CollectorRegistry(auto_describe=True)
    other = Counter("spdk_kv_hits", "Somebody else's.", registry=registry)
    for _ in range(2):
        with pytest.raises(ValueError, match="spdk_kv_hits"):
            register(store, registry)
    registry.unregister(other)
    register(store, registry)
    assert exported(registry)


def test_scrapes_and_closing_at_the_same_time(registry: CollectorRegistry) -> None:
    stop, failures = threading.Event(), []

    def scrape() -> None:
        try:
            while not stop.is_set():
                exported(registry)
        except BaseException as failure:
            failures.append(failure)

    scrapers = [threading.Thread(target=scrape) for _ in range(2)]
    for thread in scrapers:
        thread.start()
    for _ in range(30):
        with open_store("ram://") as store:
            register(store, registry)
    stop.set()
    for thread in scrapers:
        thread.join()
    assert failures == []
    assert exported(registry) == {}


def test_a_store_that_nobody_has_open_is_down(registry: CollectorRegistry) -> None:
    told: list[Sample | None] = [None]
    registry.register(Published(lambda: [("one", told[0])]))
    assert exported(registry) == {("spdk_kv_up", labels(store="one")): 0}
    told[0] = sample()
    assert exported(registry)["spdk_kv_up", labels(store="one")] == 1


def test_without_prometheus_client_the_command_is_named() -> None:
    script = (
        "import sys; sys.modules['prometheus_client'] = None\n"
        "import spdk_kv\n"
        "from spdk_kv.metrics import register\n"
        "with spdk_kv.open('null://') as store:\n"
        "    try:\n"
        "        register(store)\n"
        "    except spdk_kv.EngineUnavailable as missing:\n"
        "        print(missing)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert "pip install prometheus-client" in done.stdout
    assert done.returncode == 0, done.stderr
