"""Keys are never paths, and what a store writes is its owner's alone."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spdk_kv.errors import ClosedError, KeyNotFound
from store.helpers import (
    check_books,
    folder_fixture,
    open_store,
    payload,
    reopen,
    version_of,
)
from support.rounds import examples
from support.waiting import PATIENCE_S, wait_until

folder = folder_fixture

NAMES = {"data", "lock", "index.sqlite", "index.sqlite-commits"}
WHILE_OPEN = {"index.sqlite-wal", "index.sqlite-shm", "counters"}
HOSTILE = [
    "",
    ".",
    "..",
    "../escape",
    "../../../../../../tmp/escape",
    "/etc/passwd",
    "data",
    "index.sqlite",
    "a\0b",
    "\0",
    "\n\r\t\x1b[31m",
    "'; DROP TABLE blobs; --",
    "%s%n{0}{key}",
    "\ud800",
    "a\udfffb",
    "é",
    "e\u0301",
    "\U0010ffff",
    "CON",
    " ",
    "x" * (1 << 20),
    "y" * (1 << 20),
]


def everything_under(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def test_hostile_keys_are_keys_and_nothing_else(folder):
    with open_store(folder / "kv") as store:
        store.put_many({key: payload(key, i, 100) for i, key in enumerate(HOSTILE)})
        store.flush()
        assert everything_under(folder) <= {"kv", *(f"kv/{name}" for name in NAMES | WHILE_OPEN)}
        for i, key in enumerate(HOSTILE):
            assert version_of(key, store.get(key)) == i
            assert key in store
        with pytest.raises(KeyNotFound) as missing:
            store.get("z" * (1 << 20))
        assert len(str(missing.value)) < 200
        check_books(store)
    with reopen(folder / "kv") as store:
        assert set(store.keys()) == set(HOSTILE)
        assert [version_of(key, store.get(key)) for key in HOSTILE] == [*range(len(HOSTILE))]
        assert store.keys("../") == ["../escape", "../../../../../../tmp/escape"]
        for key in HOSTILE:
            assert store.delete(key)
    assert everything_under(folder) == {"kv", *(f"kv/{name}" for name in NAMES)}
    with reopen(folder / "kv") as store:
        assert len(store) == 0


@given(st.dictionaries(st.text(st.characters(exclude_categories=())), st.integers(0, 2**60)))
@settings(max_examples=examples(40))
def test_any_text_is_a_key_of_its_own(folder, chosen):
    with open_store(folder) as store:
        for key in store.keys(""):
            store.delete(key)
        store.put_many({key: payload(key, version, 20) for key, version in chosen.items()})
    with reopen(folder) as store:
        assert set(store.keys()) == set(chosen)
        for key, version in chosen.items():
            assert version_of(key, store.get(key)) == version


def test_subclasses_of_str_are_their_text(folder):
    class Key(str):
        __slots__ = ()

    with open_store(folder) as store:
        store.put(Key("k"), payload("k", 1))
        assert version_of("k", store.get("k")) == 1


@pytest.mark.parametrize("key", [b"bytes", 1, None, ("a",), 1.5, Path("p")], ids=repr)
def test_what_is_no_str_is_a_type_error(folder, key):
    with open_store(folder) as store:
        array = np.zeros(3)
        for call in (
            lambda: store.put(key, array),
            lambda: store.put_many({"ok": array, key: array}),
            lambda: store.put_async(key, array),
            lambda: store.get(key),
            lambda: store.get_many(["ok", key]),
            lambda: store.get_async(key),
            lambda: store.sequence(key),
        ):
            with pytest.raises(TypeError, match="str"):
                call()
        # These could only say that it is not there.
        assert not store.delete(key)
        assert not store.contains(key)
        assert len(store) == 0


# -- others ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("umask", [0, 0o777])
@pytest.mark.parametrize("engine", ["uring", "threads", "pagecache"])
def test_modes_do_not_depend_on_the_umask(folder, umask, engine):
    before = os.umask(umask)
    try:
        with open_store(folder / "kv", engine=engine) as store:
            store.put("k", payload("k", 1))
            store.flush()
            counters = folder / "kv" / "counters"
            wait_until(lambda: counters.exists() and counters.stat().st_size)
            found = {path.name: path.stat() for path in (folder / "kv").iterdir()}
    finally:
        os.umask(before)
    assert set(found) == NAMES | WHILE_OPEN
    assert {oct(stat.S_IMODE(info.st_mode)) for info in found.values()} == {"0o600"}
    assert stat.S_IMODE((folder / "kv").stat().st_mode) == 0o700


_OTHER = """
import os, sys
os.setgroups([]); os.setgid(65534); os.setuid(65534)
readable = 0
for name in sys.argv[1:]:
    try:
        os.close(os.open(name, os.O_RDONLY))
        readable += 1
    except PermissionError:
        pass
print(readable)
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="becoming another user needs root")
def test_another_user_can_read_none_of_it(folder):
    folder.chmod(0o755)
    with open_store(folder / "kv") as store:
        store.put("k", payload("k", 1))
        store.flush()
        names = [str(path) for path in (folder / "kv").iterdir()]
        names += [f"/proc/{os.getpid()}/fd/{fd}" for fd in os.listdir("/proc/self/fd")]
        # Were the folder open to all, the files would still not be.
        for mode in (0o700, 0o755):
            (folder / "kv").chmod(mode)
            command = [sys.executable, "-I", "-S", "-c", _OTHER, *names, str(folder)]
            ran = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S)
            assert ran.stdout.strip() == "1", ran.stderr  # the folder above, to see that it can


def test_a_touch_is_a_use_of_what_is_there(folder):
    with open_store(folder) as store:
        for key in "abc":
            store.put(key, np.zeros(100))
        hits = store.stats()["hits"]
        store.touch(["a", "none", "b"])
        assert store.keys() == ["c", "a", "b"]
        store.touch([])
        assert store.stats()["hits"] == hits
        store.flush()
        with reopen(folder, read_only=True) as reader:
            before = reader.keys()
            reader.touch(["c", "none"])
            assert reader.keys() == before
    with open_store(folder) as store:
        assert store.keys() == ["c", "a", "b"]
        store.close()
        with pytest.raises(ClosedError):
            store.touch(["a"])
