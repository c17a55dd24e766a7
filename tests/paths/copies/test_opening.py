"""Stores whose page cache holds copies: opening them, refusing to, and what they report."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

import spdk_kv
from paths.copies.helpers import (
    CopyPlace,
    copied,
    copy_path,
    fully,
    on_memory,
    place_fixture,
)
from paths.helpers import (
    UNIT_NBYTES,
    UNITS,
    filled,
    paths,
    scans,
    units,
)
from spdk_kv.errors import EngineUnavailable
from store.helpers import check_books, folder_fixture, open_store

folder = folder_fixture
place = place_fixture


def test_the_file_of_copies_has_no_name_and_is_nobody_elses(place: CopyPlace) -> None:
    before = set(os.listdir(place.copies))
    with place.open() as store:
        sequence, reference = filled(store)
        fully(store, sequence, reference)
        status = os.fstat(store.paths.routes.cache.fd)
        assert stat.S_IMODE(status.st_mode) == 0o600
        assert status.st_nlink == 0
        assert status.st_size >= max(offset + n for u in units(store) for offset, n in u.extents)
        assert set(os.listdir(place.copies)) - before <= {"index"}
        held = os.readlink(copy_path(store))
    assert held not in {
        os.path.realpath(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd")
    }


@pytest.mark.parametrize("residency", ["adaptive", "paper", "pagecache"])
def test_policies_decide_as_on_one_medium(place: CopyPlace, residency: str) -> None:
    with place.open(3 * UNIT_NBYTES, policy=residency) as store:
        sequence, reference = filled(store)
        fully(store, sequence, reference)
        scans(sequence, reference, 2)
        cached = paths(store).count("C")
        assert cached == {"adaptive": 2, "paper": 3, "pagecache": UNITS}[residency]
        assert sum(copied(store)) == cached * UNIT_NBYTES
        told = store.stats()["residency"]
        assert (told["paths"], told["page_cache_dir"]) == (2, str(place.copies))
    if place.lasting:
        # The truth is on the drive: nothing else is needed to have it back.
        with place.open(folder=None, create=False) as store:
            scans(store.sequence("s"), reference)
            assert store.stats()["residency"]["page_cache_dir"] is None
            check_books(store)


def test_direct_uses_no_folder(place: CopyPlace) -> None:
    with place.open(policy="direct") as store:
        sequence, reference = filled(store)
        scans(sequence, reference, 2)
        told = store.stats()["residency"]
        assert (told["paths"], told["cached_read_nbytes"]) == (1, 0)
        assert "the page cache is not used" in told["reason"]


def test_why_says_what_is_not_there_yet(place: CopyPlace) -> None:
    with place.open() as store:
        sequence, reference = filled(store)
        store.paths.decide()
        assert {entry["path"] for entry in store.why()} == {store.engine.name}
        assert all(entry["why"].endswith("; 0 B of it are there so far") for entry in store.why())
        fully(store, sequence, reference)
        assert {entry["path"] for entry in store.why()} == {"page cache"}
        assert not any("so far" in entry["why"] for entry in store.why())


@pytest.mark.parametrize("where", ["file://{}", "{}", "auto", "block:///dev/null"])
def test_a_folder_is_refused_where_one_medium_has_both_paths(
    folder: Path, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    with pytest.raises(ValueError, match="needs no folder for the page cache"):
        spdk_kv.open(
            where.format(folder / "store"), page_cache=spdk_kv.PageCacheOptions(folder=folder)
        )
    assert list(folder.iterdir()) == []


def test_a_folder_is_refused_where_there_is_nothing_to_copy_or_to_check(folder: Path) -> None:
    with pytest.raises(ValueError, match="keeps no bytes"):
        open_store("null://", folder=folder)
    with pytest.raises(ValueError, match="verify=True"):
        open_store("ram://", folder=folder, verify=False)


def test_folders_that_will_not_do_are_refused_before_a_store_is_begun(
    place: CopyPlace, folder: Path
) -> None:
    (folder / "file").write_bytes(b"")
    bad = {
        folder / "missing": "does not exist: make it",
        folder / "file": "has to be a folder; .*file is none",
        Path("/proc/self"): "no file can be made in",
    }
    if os.path.ismount("/dev/shm"):
        bad[Path("/dev/shm")] = "on tmpfs, whose files are memory"
    for where, complaint in bad.items():
        with pytest.raises(EngineUnavailable, match=complaint):
            place.open(folder=where)
    assert place.index is None or not place.index.exists()
    with place.open(create=True) if place.lasting else place.open() as store:
        assert store.stats()["residency"]["paths"] == 2


def test_a_folder_that_may_not_be_written_is_refused(folder: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may write anywhere")
    folder.chmod(0o500)
    with pytest.raises(EngineUnavailable, match="Permission denied"):
        open_store("ram://", folder=folder)
    folder.chmod(0o700)


def test_a_filesystem_without_unnamed_files_serves(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As a kernel or filesystem without O_TMPFILE answers.
    monkeypatch.setattr(os, "O_TMPFILE", os.O_DIRECTORY)
    with on_memory() as place, place.open() as store:
        assert list(place.copies.iterdir()) == []
        sequence, reference = filled(store)
        fully(store, sequence, reference)
        assert copied(store) == [UNIT_NBYTES] * UNITS
