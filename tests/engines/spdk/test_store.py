"""A store on `spdk`, over vfio-user and TCP: what it holds, who owns it, on which drive."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result

import spdk_kv
from engines.spdk.target import SERIAL, Target, target_fixture, wait_until_back
from integrations.transformers.models import assert_same as assert_same_tokens
from integrations.transformers.models import model_of, prompt
from spdk_kv.cli import main
from spdk_kv.engines import open_engine, parse_location
from spdk_kv.errors import DeviceGone, KeyNotFound, StoreLocked, StoreMismatch
from spdk_kv.testing import read, write
from store.helpers import assert_same, check_books, open_store, payload, tensor_of, version_of
from support.places import TESTS
from support.waiting import PATIENCE_S

MIB = 1 << 20
TRANSPORTS = ("vfiouser", "tcp")
SHAPE = spdk_kv.KVShape(2, 2, 40, torch.float16, 400, batch=1)
target = target_fixture

_CHILD = f"""
import sys; sys.path[:0] = [{str(TESTS)!r}]
from store.helpers import open_store, payload
from engines.spdk.target import SETTINGS
from spdk_kv.engines.spdk import environment
from spdk_kv.errors import StoreLocked
environment.configure(SETTINGS)
import os, signal, spdk_kv
uri, folder = sys.argv[1:]
"""


@pytest.fixture(scope="module", autouse=True)
def listening(target: Target) -> None:
    target.listen()


@pytest.fixture(params=TRANSPORTS)
def place(request: pytest.FixtureRequest, target: Target, tmp_path: Path) -> Iterator[Place]:
    """A blank namespace and a folder for its index."""
    nsid = target.add_namespace(64 * MIB, 4096 if request.param == "tcp" else 512)
    yield Place(target.uri(request.param, nsid), tmp_path / "index")
    target.remove_namespace(nsid)


class Place:
    def __init__(self, uri: str, folder: Path) -> None:
        self.uri = uri
        self.folder = folder

    def open(self, **options: Any) -> spdk_kv.KVStore:
        return open_store(self.uri, **({"capacity": None, "index_dir": self.folder} | options))

    def child(self, script: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", _CHILD + script, self.uri, str(self.folder)]
        return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S)


def run(*words: object) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words])


def test_tensors_come_back_and_survive_a_reopen(place):
    tensors = {
        f"{dtype} {shape}": tensor_of(dtype, shape)
        for dtype in (torch.bfloat16, torch.float8_e4m3fn, torch.float32, torch.bool)
        for shape in ((), (1,), (7, 33), (3, 5, 4096), (2 * MIB,))
    }
    with place.open(create=True) as store:
        assert store.engine.name == "spdk"
        for key, tensor in tensors.items():
            store.put(key, tensor)
        for key, tensor in tensors.items():
            assert_same(store.get(key), tensor)
        out = torch.empty(2 * MIB, dtype=torch.bfloat16)
        assert store.get("torch.bfloat16 (2097152,)", out=out) is out
        assert_same(out, tensors["torch.bfloat16 (2097152,)"])
        store.delete("torch.bool (1,)")
        check_books(store)
    with place.open() as store:
        assert len(store) == len(tensors) - 1
        for key, tensor in tensors.items():
            if key != "torch.bool (1,)":
                assert_same(store.get(key), tensor)
        check_books(store)


def test_more_tensors_are_held_than_the_drive_has_memory_for(target, tmp_path):
    nsid = target.add_namespace(64 * MIB, 4096)
    place = Place(target.uri("vfiouser", nsid), tmp_path / "index")
    with place.open(create=True, staging="64 MiB") as store:
        large = tensor_of(torch.uint8, (56 * MIB,))
        store.put("large", large)
        # SPDK has 512 MiB; these are 560, alive all at once.
        held = [store.get("large") for _ in range(10)]
        assert torch.equal(held[0], large)
        assert torch.equal(held[-1], large)
    target.remove_namespace(nsid)


def test_a_sequence_comes_back(place):
    keys, values = (tensor_of(torch.float16, (1, 2, 300, 40), seed) for seed in (1, 2))
    with place.open(create=True) as store:
        sequence = store.sequence("q", SHAPE)
        for layer in range(2):
            for first, last in ((0, 200), (200, 201), (201, 300)):
                sequence.append(layer, keys[:, :, first:last], values[:, :, first:last])
        store.flush()
    with place.open() as store:
        sequence = store.sequence("q", SHAPE)
        for layer in range(2):
            k, v = sequence.read(layer)
            assert_same(k, keys)
            assert_same(v, values)
        sequence.truncate(100)
        assert_same(sequence.read(1)[0], keys[:, :, :100])


def test_greedy_tokens_are_those_of_a_cache_in_memory(place):
    with place.open(create=True) as store:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            stats = assert_same_tokens(store, model_of("llama"), prompt(1, 100))
        finally:
            torch.set_num_threads(threads)
        assert stats["drive_read_nbytes"] > 0


def test_a_killed_process_loses_nothing_that_was_flushed(place):
    killed = place.child(
        """
store = open_store(uri, capacity=None, index_dir=folder, create=True)
for version in range(1, 4):
    for key in "abc":
        store.put(key, payload(key, version, 90_000))
    store.flush()
    print(version, flush=True)
for key in "abcd":
    store.put(key, payload(key, 4, 90_000))
os.kill(os.getpid(), signal.SIGKILL)
"""
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert killed.stdout.split() == ["1", "2", "3"]
    assert not killed.stderr
    with place.open() as store:
        for key in "abc":
            assert version_of(key, store.get(key, as_numpy=True)) in (3, 4)
        with pytest.raises(KeyNotFound):
            store.get("d")
        check_books(store)


def test_a_second_process_is_told_the_owner(place):
    with place.open(create=True) as store:
        store.put("key", payload("key", 1))
        second = place.child(
            """
try:
    open_store(uri, index_dir=folder)
except StoreLocked as locked:
    print(locked.pid)
"""
        )
        assert second.stdout.strip() == str(os.getpid()), second.stderr
        with pytest.raises(StoreLocked, match="this one, through another store object"):
            place.open()
        assert version_of("key", store.get("key", as_numpy=True)) == 1


def test_a_store_is_begun_on_request_and_on_blank_namespaces_only(place):
    with pytest.raises(StoreMismatch, match="create=True"):
        place.open()
    engine = open_engine(parse_location(place.uri))
    write(engine, 64 * MIB - 4096, b"a table at the end")
    engine.close()
    with pytest.raises(StoreMismatch, match="not blank within the MiB at offset"):
        place.open(create=True)


def test_an_index_or_namespace_of_another_store_is_refused(target, tmp_path):
    first, second = (target.add_namespace(64 * MIB, 4096) for _ in range(2))
    places = [Place(target.uri("tcp", nsid), tmp_path / str(nsid)) for nsid in (first, second)]
    for place in places:
        with place.open(create=True) as store:
            store.put("key", payload("key", first))
    swapped = Place(places[0].uri, places[1].folder)
    with pytest.raises(StoreMismatch, match="the data is that of store"):
        swapped.open()
    with pytest.raises(StoreMismatch, match="whose index is not in"):
        Place(places[0].uri, tmp_path / "none").open()
    # The same bytes on another drive: a copy, which may be an old one.
    other = target.add_namespace(64 * MIB, 4096)
    old, new = (open_engine(parse_location(target.uri("tcp", nsid))) for nsid in (first, other))
    write(new, 0, read(old, 0, 64 * MIB))
    old.close()
    new.close()
    with pytest.raises(StoreMismatch, match="the store was made on drive"):
        Place(target.uri("tcp", other), places[0].folder).open()
    for place in places:
        with place.open() as store:
            assert version_of("key", store.get("key", as_numpy=True)) == first
    for nsid in (other, first, second):
        target.remove_namespace(nsid)


def test_without_index_dir_it_lies_in_a_folder_named_after_the_location(
    target, tmp_path, monkeypatch
):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    nsid = target.add_namespace(64 * MIB, 4096)
    uris = [target.uri("tcp", nsid), target.uri("tcp", nsid).removesuffix(f"/{nsid}") + f"/{nsid}"]
    with open_store(uris[0], create=True, capacity=None) as store:
        store.put("key", payload("key", 1))
    with open_store(uris[1], capacity=None) as store:
        assert version_of("key", store.get("key", as_numpy=True)) == 1
    (folder,) = (tmp_path / "spdk_kv").iterdir()
    assert folder.name.startswith("spdk-tcp-127.0.0.1-")
    assert folder.stat().st_mode & 0o777 == 0o700
    target.remove_namespace(nsid)


def test_the_commands_take_these_locations(place):
    with place.open(create=True) as store:
        store.put("key", payload("key", 1))
    found = run("stat", place.uri, "--index-dir", place.folder, "--json")
    assert found.exit_code == 0, found.output
    report = json.loads(found.stdout)
    assert (report["engine"], report["blobs"]) == ("spdk", 1)
    assert SERIAL in report["superblock"]["device_id"]
    words = ("bench", "io", "--location", place.uri, "--seconds", "0.1", "--segment-nbytes", "64k")
    found = run(*words, "--json")
    assert found.exit_code == 0, found.output
    assert json.loads(found.stdout)["nbytes"] > 0
    for confirmed in ((), ("--i-know-this-destroys", place.uri + "x")):
        refused = run(*words, "--op", "write", *confirmed)
        assert refused.exit_code == 2
        assert "writing destroys" in refused.stderr
    with place.open() as store:
        assert version_of("key", store.get("key", as_numpy=True)) == 1
    found = run(*words, "--op", "write", "--i-know-this-destroys", place.uri)
    assert found.exit_code == 0, found.output
    found = run("doctor", place.uri, place.uri[:-1] + "77")
    assert found.exit_code == 0, found.output
    assert f"serial {SERIAL}" in " ".join(found.stdout.split())
    assert "no namespace" in " ".join(found.stdout.split())
    assert run("doctor", "file:///tmp").exit_code == 2


def test_a_drive_that_went_away_comes_back_to_its_store(target, tmp_path):
    image = tmp_path / "image"
    image.write_bytes(bytes(64 * MIB))
    nsid = target.add_file(image)
    place = Place(target.uri("vfiouser", nsid), tmp_path / "index")
    store = place.open(create=True)
    store.put("key", payload("key", 1))
    store.flush()
    target.kill()
    with pytest.raises(DeviceGone):
        store.get("key")
    target.restart()
    target.namespaces = nsid - 1
    assert target.add_file(image) == nsid
    target.listen()
    wait_until_back(lambda: store.get("key"))
    assert version_of("key", store.get("key", as_numpy=True)) == 1
    store.put("key", payload("key", 2))
    store.close()
    with place.open() as store:
        assert version_of("key", store.get("key", as_numpy=True)) == 2
