"""Readers beside a writer in another process: exact bytes of some version, or not found."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

import spdk_kv
from spdk_kv.errors import KeyNotFound
from spdk_kv.store import KVStore
from store.helpers import FILE_ENGINES, folder_fixture, open_store, payload, python, version_of
from store.reading_beside import KEYS, NAMES, SHAPE
from store.test_readers import open_reader
from support import blockdev
from support.rounds import LONG
from support.waiting import PATIENCE_S

folder = folder_fixture
ROUNDS = 6000 if LONG else 600


@contextmanager
def writing(
    folder: Path, what: str, rounds: int, seed: int, engine: str
) -> Iterator[subprocess.Popen]:
    script = Path(__file__).with_name("reading_beside.py")
    command = [sys.executable, str(script), str(folder), str(rounds), str(seed), what, engine]
    writer = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "begins\n"
        yield writer
    finally:
        writer.kill()
        writer.wait()
        for pipe in (writer.stdin, writer.stdout):
            assert pipe is not None
            pipe.close()


def read_blobs(reader: KVStore, rng: random.Random, seen: dict[str, int]) -> None:
    """Some gets. No version of a key comes after a later one."""
    keys = rng.sample(KEYS, rng.choice((1, 1, 3)))
    try:
        if rng.random() < 0.3:
            found = reader.get_many_async(keys, as_numpy=True).result(PATIENCE_S)
        else:
            found = reader.get_many(keys, as_numpy=True)
    except KeyNotFound:
        seen["none"] = seen.get("none", 0) + 1
        return
    for key, each in zip(keys, found, strict=True):
        version = version_of(key, each)
        assert version >= seen.get(key, 0)
        seen[key] = version


@pytest.mark.parametrize("engine", FILE_ENGINES)
def test_every_get_is_of_some_version_or_not_found(folder, engine):
    rng, seen = random.Random(engine), {}
    with (
        writing(folder, "blobs", ROUNDS, 1, engine) as writer,
        open_reader(folder, engine=FILE_ENGINES[rng.randrange(3)]) as reader,
    ):
        gets = 0
        while writer.poll() is None:
            read_blobs(reader, rng, seen)
            if rng.random() < 0.05:
                reader.refresh()
                assert set(reader.keys()) <= set(KEYS)
            gets += 1
            if gets > 50 and len(set(seen.values())) > 5:
                writer.stdin.close()  # it may end
        assert writer.returncode == 0
        reader.refresh()
        final = {key: version_of(key, reader.get(key)) for key in reader.keys()}  # noqa: SIM118
        assert reader.stats()["corruptions"] == 0
    with open_store(folder, capacity=None) as store:
        assert {key: version_of(key, store.get(key)) for key in store.keys()} == final  # noqa: SIM118


@pytest.mark.parametrize("engine", FILE_ENGINES)
def test_every_token_is_of_the_flush_that_the_sequence_is_of(folder, engine):
    rng = random.Random(engine)
    read = missed = 0
    with (
        writing(folder, "sequences", ROUNDS // 2, 2, engine) as writer,
        open_reader(folder, engine=engine) as reader,
    ):
        held = {}
        while writer.poll() is None:
            name = rng.choice(NAMES)
            if rng.random() < 0.3:
                reader.refresh()
            try:
                sequence = held.get(name) or reader.sequence(name, SHAPE)
                if rng.random() < 0.7:
                    held[name] = sequence
                layers = [sequence.read(layer) for layer in range(SHAPE.layers)]
                count = sequence.tokens()
            except KeyNotFound:
                missed += 1
                held.pop(name, None)
                continue
            except spdk_kv.ReadOnlyStore:
                missed += 1  # deleted, and not there again yet
                continue
            assert {k.shape[2] for k, _ in layers} <= {count}
            versions = layers[0][0][0, 0, :, 0] // 2000
            for layer, (k, v) in enumerate(layers):
                numbers = torch.arange(count, dtype=torch.int32)
                wanted = (versions * 2000 + layer * 1000 + numbers).view(1, 1, count, 1)
                assert torch.equal(k, wanted.expand_as(k))
                assert torch.equal(v, -k)
            assert torch.equal(versions, versions.sort().values)
            read += 1
            if read > 50 and missed:
                writer.stdin.close()  # it may end
        assert writer.returncode == 0


def test_many_readers_and_threads_beside_one_writer(folder):
    code = """
import random, sys
from store.test_readers_beside import read_blobs
from store.test_readers import open_reader
rng, seen = random.Random(int(sys.argv[2])), {}
with open_reader(sys.argv[1]) as reader:
    for _ in range(150):
        read_blobs(reader, rng, seen)
    while len(seen) <= 3:  # the writer has not come to more
        read_blobs(reader, rng, seen)
"""
    tests = str(Path(__file__).parent.parent)
    failures = []
    with writing(folder, "blobs", 100_000, 3, "uring") as writer:
        others = [
            subprocess.Popen([sys.executable, "-c", code, str(folder), str(n)], cwd=tests)
            for n in range(3)
        ]
        with open_reader(folder) as reader:

            def use(seed: int) -> None:
                try:
                    rng = random.Random(seed)
                    for _ in range(100):
                        read_blobs(reader, rng, {})
                except BaseException as failed:
                    failures.append(failed)

            threads = [threading.Thread(target=use, args=(n,)) for n in range(6)]
            for each in threads:
                each.start()
            for each in threads:
                each.join()
        for other in others:
            assert other.wait(PATIENCE_S) == 0
        assert writer.poll() is None
    assert not failures


@pytest.mark.parametrize("how", ["closed", "killed"])
def test_a_reader_outlives_its_writer_and_meets_the_next_one(folder, how):
    code = """
import sys
from store.helpers import open_store, payload
version = int(sys.argv[2])
store = open_store(sys.argv[1], **({"capacity": None} if version > 1 else {}))
store.put_many({key: payload(key, version, 100_000) for key in "abc"})
store.flush()
store.put("a", payload("a", 1000 + version, 100_000))  # never flushed
print("flushed", flush=True)
sys.stdin.read()
store.close()
"""
    tests = str(Path(__file__).parent.parent)
    reader = None
    for version in range(1, 5):
        writer = subprocess.Popen(
            [sys.executable, "-c", code, str(folder), str(version)],
            cwd=tests, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert writer.stdout is not None
        assert writer.stdout.readline() == "flushed\n"
        reader = reader or open_reader(folder)
        assert version_of("b", reader.get("b")) in (version - 1, version)
        reader.refresh()
        assert [version_of(key, reader.get(key)) for key in "abc"] == [version] * 3
        if how == "killed":
            writer.send_signal(signal.SIGKILL)
        writer.communicate()
        assert writer.returncode == (-9 if how == "killed" else 0)
        assert [version_of(key, reader.get(key)) for key in "bc"] == [version] * 2
        reader.refresh()
        last = version if how == "killed" else 1000 + version
        assert version_of("a", reader.get("a")) == last
        with open_reader(folder) as fresh:
            assert version_of("a", fresh.get("a")) == last
    assert reader is not None
    reader.close()


def test_opening_beside_a_writer_that_opens_and_closes_all_the_time(folder):
    code = """
import sys, threading
from store.helpers import open_store, payload
version, told = 0, threading.Thread(target=sys.stdin.read)
told.start()
while version < 40 or told.is_alive():
    version += 1
    with open_store(sys.argv[1], capacity=f"{16 + version % 3} MiB") as store:
        store.put("a", payload("a", version, 50_000))
        for _ in range(version % 5):
            store.flush()
            store.put("b", payload("b", version, 50_000))
    if version == 1:
        print("begins", flush=True)
print(version)
"""
    tests = str(Path(__file__).parent.parent)
    command = [sys.executable, "-c", code, str(folder)]
    writer = subprocess.Popen(
        command, cwd=tests, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert writer.stdin is not None
    assert writer.stdout is not None
    assert writer.stdout.readline() == "begins\n"
    last = opened = 0
    held = open_reader(folder)
    while writer.poll() is None:
        with open_reader(folder) as reader:
            version = version_of("a", reader.get("a"))
            assert version >= last
            last = version
            assert reader.stats()["capacity_nbytes"] >> 20 in (16, 17, 18)
        held.refresh()
        assert version_of("a", held.get("a")) >= last
        assert held.stats()["capacity_nbytes"] >> 20 in (16, 17, 18)
        opened += 1
        if opened > 3:
            writer.stdin.close()  # it may end
    version = int(writer.stdout.read())
    writer.stdout.close()
    assert writer.returncode == 0
    held.refresh()
    assert version_of("a", held.get("a")) == version
    assert held.stats()["capacity_nbytes"] == (16 + version % 3) << 20
    held.close()


@pytest.mark.parametrize("engine", FILE_ENGINES)
def test_a_block_device_beside_its_writer(tmp_path, engine):
    image = tmp_path / "image"
    with open(image, "wb") as file:
        file.truncate(16 << 20)
    with blockdev.loop_device(image) as node:
        uri, index = f"block://{node}", tmp_path / "index"
        with open_store(uri, capacity=None, create=True, index_dir=index, engine=engine) as writer:
            writer.put("a", payload("a", 1))
            writer.flush()
            with open_reader(uri, index_dir=index, engine=engine) as reader:
                assert version_of("a", reader.get("a")) == 1
                for version in range(2, 40):
                    writer.put("a", payload("a", version, 900_000))
                    writer.flush()
                    if version % 9 == 0:
                        assert 1 <= version_of("a", reader.get("a")) <= version
                reader.refresh()
                assert version_of("a", reader.get("a")) == 39
        with open_reader(uri, index_dir=index) as reader:
            assert version_of("a", reader.get("a")) == 39
        with pytest.raises(spdk_kv.StoreMismatch, match="there is no index"):
            open_reader(uri, index_dir=tmp_path / "other")
    image.write_bytes(bytes(16 << 20))
    with blockdev.loop_device(image) as node:
        with pytest.raises(spdk_kv.StoreMismatch, match="is blank"):
            open_reader(f"block://{node}", index_dir=tmp_path / "other")
        assert not (tmp_path / "other").exists()


# -- workers --------------------------------------------------------------------------------------


class Stored(Dataset):
    """Opens its store in the worker, as docs/how-to/several-processes.md has it."""

    def __init__(self, location: str, keys: list[str]) -> None:
        self.location, self.keys = location, keys
        self.store: KVStore | None = None

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, number: int) -> torch.Tensor:
        if self.store is None:
            self.store = spdk_kv.open(self.location, read_only=True)
        return self.store.get(self.keys[number])


@pytest.mark.parametrize("method", ["fork", "spawn"])
@pytest.mark.parametrize("parent", ["writes", "reads", "neither"])
def test_workers_of_a_dataloader_read(folder, method, parent):
    keys = [str(number) for number in range(40)]
    store = open_store(folder)
    store.put_many({key: torch.full((50,), int(key)) for key in keys})
    store.flush()
    if parent != "writes":
        store.close()
    reader = open_reader(folder) if parent == "reads" else None
    if reader is not None:
        assert int(reader.get("7")[0]) == 7
    loader = DataLoader(
        Stored(f"file://{folder}", keys),
        batch_size=4,
        num_workers=2,
        multiprocessing_context=method,
    )
    for _ in range(2):
        found = torch.cat(list(loader))
        assert torch.equal(found, torch.arange(40).view(40, 1).expand(40, 50))
        if parent == "writes":
            store.put("more", torch.ones(3))
            store.flush()
    if reader is not None:
        assert int(reader.get("8")[0]) == 8
        reader.close()
    store.close()


def test_a_dataset_that_holds_a_store_is_told_what_to_do(folder):
    with open_store(folder) as store:
        store.put("a", torch.ones(3))
        data = Stored(f"file://{folder}", ["a"])
        data.store = store
        spawned = DataLoader(data, num_workers=1, multiprocessing_context="spawn")
        with pytest.raises(TypeError, match="open it in the worker with read_only=True"):
            next(iter(spawned))
        forked = DataLoader(data, num_workers=1, multiprocessing_context="fork")
        with pytest.raises(spdk_kv.ClosedError, match="open it in the child, with read_only=True"):
            next(iter(forked))


def test_nothing_but_numpy_is_needed_to_read(folder):
    with open_store(folder) as store:
        store.put("a", np.arange(3))
    ran = python(
        "import sys, spdk_kv\n"
        "with spdk_kv.open(sys.argv[1], read_only=True) as store:\n"
        "    print(store.get('a', as_numpy=True), store.read_only)",
        str(folder),
    )
    assert ran.stdout == "[0 1 2] True\n", ran.stderr
