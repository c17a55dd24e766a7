"""Two paths on a drive that SPDK owns: the tests of two media as they are, and what ends and fails
only there."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from engines.spdk.target import Target, target_fixture, wait_until_back
from paths.copies.helpers import DRIVE_NBYTES, CopyPlace, copied, folder_for_copies, fully, waited
from paths.copies.test_model import (
    churn,
    run_machine,
)
from paths.copies.test_opening import (  # noqa: F401
    test_direct_uses_no_folder,
    test_folders_that_will_not_do_are_refused_before_a_store_is_begun,
    test_policies_decide_as_on_one_medium,
    test_the_file_of_copies_has_no_name_and_is_nobody_elses,
    test_why_says_what_is_not_there_yet,
)
from paths.copies.test_paths import (  # noqa: F401
    test_a_full_folder_means_reading_directly_and_is_told_once,
    test_a_readers_changes_of_what_it_got_are_not_copied,
    test_copies_that_have_to_wait_are_made_later,
    test_damaged_copies_are_found_and_the_drive_delivers,
    test_extents_of_a_deleted_sequence_are_copied_for_their_next_owner,
    test_groups_are_right_on_whichever_path_they_come,
    test_heads_are_read_from_what_was_copied,
    test_layers_read_ahead_are_right_though_they_leave_the_path_meanwhile,
    test_the_order_of_rows_is_kept,
    test_what_is_appended_and_truncated_moves_the_end,
    test_what_is_read_of_the_page_cache_path_is_copied_and_then_read_there,
    test_what_the_kernel_evicts_comes_back_from_the_copys_own_drive,
    test_who_leaves_the_page_cache_path_leaves_nothing_there,
)
from paths.helpers import (
    PLENTY,
    SHAPE,
    UNIT_NBYTES,
    UNITS,
    filled,
    paths,
    scans,
    set_available,
    units,
)
from sequence.helpers import Reference
from spdk_kv.cli import main
from spdk_kv.errors import DeviceGone
from store.helpers import check_books, folder_fixture
from support.places import TESTS
from support.waiting import PATIENCE_S, wait_until

folder = folder_fixture
target = target_fixture

_CHILD = f"""
import sys; sys.path[:0] = [{str(TESTS)!r}]
import os, signal
from pathlib import Path
from engines.spdk.target import SETTINGS
from spdk_kv.engines.spdk import environment
environment.configure(SETTINGS)
from paths.helpers import *
from paths.copies.helpers import CopyPlace, copied, fully, waited
place = CopyPlace(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
"""


@pytest.fixture(scope="module", autouse=True)
def listening(target: Target) -> None:
    target.listen()


@contextlib.contextmanager
def on_namespace(target: Target, transport: str) -> Iterator[CopyPlace]:
    """A blank namespace of its own."""
    nsid = target.add_namespace(DRIVE_NBYTES, 4096 if transport == "tcp" else 512)
    try:
        with folder_for_copies() as copies:
            yield CopyPlace(target.uri(transport, nsid), copies, copies / "index")
    finally:
        target.remove_namespace(nsid)
        target.namespaces = nsid - 1  # a subsystem has room for 32 only


@pytest.fixture(params=["vfiouser"])
def place(request: pytest.FixtureRequest, target: Target) -> Iterator[CopyPlace]:
    with on_namespace(target, request.param) as drive:
        yield drive


@pytest.mark.parametrize("granularity", ["layer", "head"])
@pytest.mark.parametrize("residency", ["adaptive", "pagecache"])
def test_bytes_are_those_appended_whatever_is_copied_and_last(
    target: Target, residency: str, granularity: str
) -> None:
    transport = "tcp" if granularity == "head" else "vfiouser"
    run_machine(lambda: on_namespace(target, transport), residency, granularity, 10)


def test_threads_that_share_extents_one_after_another(place: CopyPlace) -> None:
    churn(place, 60)


def test_several_queue_pairs(place: CopyPlace) -> None:
    with place.open(queue_pairs=2, available=5 * UNIT_NBYTES) as store:
        sequence, reference = filled(store)
        fully(store, sequence, reference)
        scans(sequence, reference, 2)
        assert sum(copied(store)) == 4 * UNIT_NBYTES


def test_a_killed_process_leaves_no_copies_and_loses_nothing_that_was_flushed(
    place: CopyPlace,
) -> None:
    script = """
store = place.open()
sequence, reference = filled(store)
fully(store, sequence, reference)
store.flush()
reference.append(sequence, 0)
for layer in range(SHAPE.layers):
    sequence.truncate(1900, layer=layer)
turns_of = [sequence.read(layer) for layer in range(SHAPE.layers)]
set_available(store, 3 * UNIT_NBYTES)
store.paths.decide()  # killed while units leave
print(sum(copied(store)), flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    command = [sys.executable, "-c", _CHILD + script, place.uri]
    command += [str(place.copies), str(place.index)]
    killed = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not killed.stderr
    assert {path.name for path in place.copies.iterdir()} == {"index"}
    place.created = True
    with place.open() as store:
        sequence, reference = store.sequence("s"), Reference(SHAPE, 1000)
        whole = [reference.tokens(2048) for _ in range(SHAPE.layers)]
        reference.layers = [(k[:, :, :1900], v[:, :, :1900]) for k, v in whole]
        assert copied(store) == [0] * UNITS  # what is copied is of one process
        scans(sequence, reference)
        fully(store, sequence, reference)
        check_books(store)


def test_a_drive_that_goes_away_leaves_what_was_copied(target: Target, tmp_path: Path) -> None:
    image = tmp_path / "image"
    with image.open("wb") as file:
        file.truncate(DRIVE_NBYTES)
    nsid = target.add_file(image)
    with folder_for_copies() as copies:
        place = CopyPlace(target.uri("vfiouser", nsid), copies, copies / "index")
        store = place.open(5 * UNIT_NBYTES)
        sequence, reference = filled(store)
        sequence.read_ahead = False
        sequence.set_weight([1, 2], 2.0)
        fully(store, sequence, reference)
        assert paths(store) == list("DDCCCCDD")
        store.flush()
        target.kill()
        for layer in (1, 2):
            reference.check_layer(sequence, layer)
        with pytest.raises(DeviceGone):
            sequence.read(0)
        reference.check_layer(sequence, 1)
        target.restart()
        target.namespaces = nsid - 1
        assert target.add_file(image) == nsid
        target.listen()
        wait_until_back(lambda: scans(sequence, reference))
        scans(sequence, reference)
        set_available(store, PLENTY)
        fully(store, sequence, reference)
        assert copied(store) == [UNIT_NBYTES] * UNITS
        store.close()


def test_tensors_under_keys_are_beside_it(place: CopyPlace) -> None:
    """Blobs know no page cache, and take over extents that sequences had."""
    with place.open() as store:
        sequence, reference = filled(store)
        fully(store, sequence, reference)
        sequence.delete()
        store.flush()
        tensors = {f"key {n}": torch.full((UNIT_NBYTES,), n, dtype=torch.uint8) for n in range(8)}
        store.put_many(tensors)
        waited(store)
        for key, tensor in tensors.items():
            assert torch.equal(store.get(key), tensor)
        for key in tensors:
            store.delete(key)
        store.flush()
        again, other = filled(store, "again")
        fully(store, again, other)
        assert units(store)[0].served_nbytes == UNIT_NBYTES


def test_stat_why_tells_of_the_copies(place: CopyPlace) -> None:
    with place.open(5 * UNIT_NBYTES) as store:
        sequence, reference = filled(store)
        fully(store, sequence, reference)
        set_available(store, 4 * UNIT_NBYTES)
        scans(sequence, reference, 2)
        words = ["stat", place.uri, "--index-dir", str(place.index), "--why"]

        def told() -> dict[str, Any] | None:
            found = CliRunner().invoke(main, [*words, "--json"])
            assert found.exit_code == 0, found.output
            decision = json.loads(found.stdout)["decision"]
            fits = decision is not None and decision["copied_nbytes"] == 3 * UNIT_NBYTES
            return decision if fits else None

        decision = wait_until(told, "the note never tells of 3 units")
        assert decision["page_cache_dir"] == str(place.copies)
        found = CliRunner().invoke(main, words)
        text = " ".join(found.stdout.split())
        assert f"page cache of a file in {place.copies}: 3.0 MiB of 3.0 MiB copied" in text
        assert "to the page cache" in text
