"""`spdk-kv stat --why`: what an open store tells others of its decisions, in a file beside its
index."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from paths.helpers import (
    PLENTY,
    SHAPE,
    UNIT_NBYTES,
    UNITS,
    filled,
    open_dual,
    scans,
    set_available,
)
from spdk_kv.cli import main
from spdk_kv.store.why import FILE_NAME, FORMAT, WhyFile, read_why
from store.helpers import folder_fixture, open_store
from support import blockdev
from support.places import TESTS
from support.subprocesses import run_script
from support.waiting import wait_until

folder = folder_fixture


def why(*words: str) -> dict[str, Any]:
    result = CliRunner().invoke(main, ["stat", *words, "--why", "--json"])
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def told(folder: Path, **wanted: Any) -> dict[str, Any]:
    """What the store tells, once it has the ``wanted`` fields."""

    def look() -> dict[str, Any] | None:
        found = read_why(str(folder))
        fits = found is not None and all(found[name] == wanted[name] for name in wanted)
        return found if fits else None

    found: dict[str, Any] = wait_until(look, f"no {wanted} are told")
    return found


def test_an_open_store_tells_what_it_decided_and_why(folder: Path) -> None:
    with open_dual(folder, 5 * UNIT_NBYTES) as store:
        assert why(f"file://{folder}")["decision"] is None
        sequence, reference = filled(store)
        scans(sequence, reference, 2)
        told(folder, cached_units=4)
        found = why(f"file://{folder}")
        assert set(found) == {"location", "memory", "owner_pid", "decision"}
        assert set(found["memory"]) == {"available_nbytes", "limited_by", "pressure", "notes"}
        assert found["owner_pid"] == os.getpid()
        decision, stats = found["decision"], store.stats()["residency"]
        assert (decision.pop("format"), decision.pop("pid")) == (FORMAT, os.getpid())
        assert time.time() - 60 < decision.pop("time") <= time.time()
        assert decision.pop("engine") == store.engine.name
        (one,) = decision.pop("sequences")
        assert one["name"] == "sequence 's'"
        assert (one["k_units"], one["v_units"]) == (SHAPE.layers, SHAPE.layers)
        assert one["k_cached_units"] + one["v_cached_units"] == 4
        assert one["k_cached_nbytes"] + one["v_cached_nbytes"] == stats["cached_nbytes"]
        steady = ("policy", "paths", "budget_nbytes", "limited_by", "cached_units", "units")
        assert {name: decision[name] for name in steady} == {name: stats[name] for name in steady}
        assert set(decision) == set(stats)

        set_available(store, 0)
        scans(sequence, reference)
        assert told(folder, budget_nbytes=0)["sequences"][0]["k_cached_units"] == 0
        sequence.delete()
        assert told(folder, units=0)["sequences"] == []
    assert why(f"file://{folder}")["decision"] is None
    assert not (folder / FILE_NAME).exists()


def test_lines_for_people(folder: Path) -> None:
    with open_dual(folder, 5 * UNIT_NBYTES) as store:
        sequence, reference = filled(store)
        scans(sequence, reference, 2)
        told(folder, cached_units=4)
        shown = subprocess.run(
            [sys.executable, "-m", "spdk_kv", "stat", f"file://{folder}", "--why"],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert (shown.returncode, shown.stderr) == (0, "")
        assert f"owner       process {os.getpid()};" in shown.stdout
        assert "limited by" in shown.stdout
        assert "available   5.0 MiB (what was given)" in shown.stdout
        assert "it holds 4 of 8 units" in shown.stdout
        assert "sequence 's': layers of K " in shown.stdout
        assert " misses), " in shown.stdout
    shown_after = CliRunner().invoke(main, ["stat", f"file://{folder}", "--why"])
    assert "none; no process has the store open" in shown_after.stdout


def test_a_store_with_one_path_says_so(folder: Path) -> None:
    with open_store(folder, policy="direct", capacity="64 MiB") as store:
        filled(store)
        told(folder, paths=1)
        result = CliRunner().invoke(main, ["stat", f"file://{folder}", "--why"])
        assert "residency is 'direct': the page cache is not used" in result.stdout
        assert "layers of K 0 of 4" in result.stdout


def test_the_file_is_private_and_whole_at_every_moment(folder: Path) -> None:
    before = os.umask(0)
    try:
        with open_dual(folder) as store:
            sequence, reference = filled(store)
            scans(sequence, reference)
            wait_until((folder / FILE_NAME).exists, "no file")
            assert stat.S_IMODE((folder / FILE_NAME).stat().st_mode) == 0o600
    finally:
        os.umask(before)


def test_changes_are_written_at_most_once_a_second_and_never_lost(tmp_path: Path) -> None:
    count = 0
    written: set[int] = set()
    file = WhyFile(str(tmp_path), lambda: {"count": count})
    began = time.monotonic()
    for count in range(1, 200):  # noqa: B007 - the lambda's
        file.changed()
        found = read_why(str(tmp_path))
        if found:
            written.add(found["count"])
        time.sleep(0.002)
    wait_until(lambda: (read_why(str(tmp_path)) or {}).get("count") == 199, "the last one is lost")
    assert len(written) <= 1 + (time.monotonic() - began)
    file.close()
    file.changed()
    file.close()
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_owner_left_is_not_taken_for_the_truth(folder: Path) -> None:
    script = (
        "import os, sys, time\n"
        "sys.path[:0] = sys.argv[2:]\n"
        "from paths.helpers import *\n"
        "store = open_dual(Path(sys.argv[1]))\n"
        "sequence, reference = filled(store)\n"
        "scans(sequence, reference)\n"
        "while not (Path(sys.argv[1]) / 'residency.json').exists(): time.sleep(0.01)\n"
        "print('told', flush=True)\n"
        "sys.stdin.read()\n"
    )
    owner = subprocess.Popen(
        [sys.executable, "-c", script, str(folder), str(TESTS)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert owner.stdout is not None
    try:
        assert owner.stdout.readline() == "told\n"
        told(folder, cached_units=UNITS)
        # While it lives, another process learns all, and the owner is not disturbed.
        found = why(f"file://{folder}")
        assert found["owner_pid"] == found["decision"]["pid"] == owner.pid
        assert found["decision"]["cached_units"] == UNITS
    finally:
        owner.send_signal(signal.SIGKILL)
        owner.communicate()
    assert (folder / FILE_NAME).exists()
    found = why(f"file://{folder}")
    assert (found["owner_pid"], found["decision"]) == (None, None)
    with open_store(folder, capacity=None):
        assert not (folder / FILE_NAME).exists()
        assert why(f"file://{folder}")["decision"] is None


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b'{"pid": "x"}', b"\xff\xfe\x00"])
def test_nonsense_in_the_file_is_no_decision(folder: Path, content: bytes) -> None:
    with open_store(folder):
        (folder / FILE_NAME).write_bytes(content)
        assert why(f"file://{folder}")["decision"] is None


@pytest.mark.parametrize("told", [{}, {"format": FORMAT + 1}])
def test_a_file_of_another_version_is_refused(folder: Path, told: dict[str, int]) -> None:
    with open_store(folder):
        (folder / FILE_NAME).write_text(json.dumps({"pid": os.getpid(), **told}))
        result = CliRunner().invoke(main, ["stat", f"file://{folder}", "--why"])
        assert result.exit_code != 0
        assert "another version of spdk_kv" in result.output
        # What a dead process of another version left is nothing to refuse.
        (folder / FILE_NAME).write_text(json.dumps({"pid": os.getpid() + 1, **told}))
        assert why(f"file://{folder}")["decision"] is None


def test_where_the_file_cannot_be_written_the_store_goes_on(folder: Path) -> None:
    with open_dual(folder) as store:
        (folder / FILE_NAME).mkdir()  # what nothing can be renamed to
        sequence, reference = filled(store)
        scans(sequence, reference, 2)
        assert store.stats()["residency"]["cached_units"] == UNITS
        sequence.delete()
    assert list((folder / FILE_NAME).iterdir()) == []


def test_a_child_after_fork_neither_writes_nor_removes_it(folder: Path) -> None:
    run_script(
        f"""
        import os
        from pathlib import Path
        from paths.helpers import *
        where = Path({str(folder)!r})
        store = open_dual(where)
        sequence, reference = filled(store)
        scans(sequence, reference)
        while not (where / "residency.json").exists():
            pass
        if (child := os.fork()) == 0:
            store.paths._watcher.changed()
            store.close()
            os._exit(0 if (where / "residency.json").exists() else 1)
        assert os.waitpid(child, 0)[1] == 0
        store.close()
        assert not (where / "residency.json").exists()
        """
    )


@pytest.fixture
def node(folder: Path) -> Iterator[str]:
    image = folder / "image"
    with open(image, "wb") as file:
        file.truncate(24 << 20)
    with blockdev.loop_device(image) as found:
        yield found


def test_of_a_device_the_file_lies_beside_its_index(node: str, folder: Path) -> None:
    index = folder / "index"
    with open_dual(f"block://{node}", PLENTY, capacity=None, create=True, index_dir=index) as store:
        sequence, reference = filled(store)
        scans(sequence, reference)
        told(index, cached_units=UNITS)
        found = why(f"block://{node}", "--index-dir", str(index))
        assert found["decision"]["cached_units"] == UNITS
        sequence.delete()


def test_bad_input(tmp_path: Path) -> None:
    for words, status, complaint in (
        ([f"file://{tmp_path}"], 1, "no store at file://"),
        ([f"file://{tmp_path}/none"], 1, "no store at file://"),
        (["ram://"], 2, "holds nothing once its process has ended"),
        (
            [f"file://{tmp_path}", "--index-dir", str(tmp_path)],
            2,
            "does not apply to file:// stores",
        ),
    ):
        result = CliRunner().invoke(main, ["stat", *words, "--why"])
        assert result.exit_code == status
        assert complaint in result.output
    assert list(tmp_path.iterdir()) == []
