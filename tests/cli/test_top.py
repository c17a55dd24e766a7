"""`spdk-kv top`: what open stores do, from outside their processes."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from metrics.samples import sample
from paths.helpers import UNIT_NBYTES, filled, open_dual, scans
from spdk_kv.cli import main
from spdk_kv.cli.top.rates import Difference, Rates
from spdk_kv.cli.top.screen import as_lines
from spdk_kv.cli.top.view import duration, seconds, view_of
from spdk_kv.cli.watched import Seen
from spdk_kv.metrics import Reading, Sample
from spdk_kv.metrics.published import FILE_NAME, STALE_S, Publisher
from store.helpers import folder_fixture, open_store
from support import blockdev
from support.subprocesses import interruptible_fixture
from support.terminal import read_terminal
from support.waiting import PATIENCE_S, wait_until

folder = folder_fixture
interruptible = interruptible_fixture


def top(*words: str) -> tuple[int, str]:
    result = CliRunner().invoke(main, ["top", *words])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.output


def reading(number: int, at_s: float, **changes: Any) -> Reading:
    it = sample(clock_s=at_s, time_s=1e9 + at_s, **changes)
    return Reading(it, number, pid=7, age_s=0.1, looked_s=None, wait_s=1.0)


def busier(of: Sample, seconds: int) -> dict[str, Any]:
    """Fields of a sample in which 1 MiB/s was read directly since ``of``, in 4 requests."""
    direct = of.paths["direct"]
    read = direct.ops["read"]
    now = replace(
        read,
        nbytes=read.nbytes + (seconds << 20),
        ios=read.ios + 8 * seconds,
        transfers=read.transfers + 4 * seconds,
        latency_ns=read.latency_ns + 3_000_000_000 * seconds,
        took={**read.took, 1 << 21: 4 * seconds},
    )
    busy_ns = direct.busy_ns + 1_000_000_000 * seconds
    path = replace(direct, busy_ns=busy_ns, ops={**direct.ops, "read": now})
    (one,) = of.sequences
    return {
        "paths": {**of.paths, "direct": path},
        "held": {**of.held, "hits": of.held["hits"] + 5 * seconds},
        "cpu_ns": of.cpu_ns + 500_000_000 * seconds,
        "sequences": ({**one, "read_nbytes": one["read_nbytes"] + (seconds << 10)},),
    }


def of_read(rates: Rates | None) -> Any:
    assert rates is not None
    (found,) = [each for each in rates.operations if (each.path, each.op) == ("direct", "read")]
    return found


def test_rates_are_of_the_time_between_two_samples() -> None:
    difference = Difference()
    first = reading(1, 10.0)
    difference.add(first)
    assert difference.rates() is None
    difference.add(reading(2, 14.0, **busier(first.sample, 4)))
    rates = difference.rates()
    read = of_read(rates)
    assert (read.nbytes, read.transfers, read.ios) == (1 << 20, 4, 8)
    assert rates is not None
    assert rates.held["hits"] == 5
    assert rates.depth["direct"] == 3
    assert rates.cpu == 0.5
    assert rates.sequences == {"sequence 'one'": (1024, 0)}
    # All that ended meanwhile took between 7/4 and 2 Mi ns, whatever came before.
    assert 1.75 * (1 << 20) / 1e9 < read.p50_s < read.p99_s < (1 << 21) / 1e9
    difference.add(reading(2, 14.0, **busier(first.sample, 4)))
    assert of_read(difference.rates()).nbytes == 1 << 20, "the same once more changes nothing"


def test_after_a_pause_rates_are_of_the_last_look_on() -> None:
    """Looks that find nothing write nothing: what is new happened after the last of them."""
    difference = Difference()
    first = reading(1, 10.0)
    difference.add(first)
    after = replace(reading(2, 18.0, **busier(first.sample, 1)), looked_s=17.0)
    difference.add(after)
    assert of_read(difference.rates()).nbytes == 1 << 20
    # Where a writing was not seen, that says nothing.
    difference = Difference()
    difference.add(first)
    difference.add(replace(after, number=3))
    assert of_read(difference.rates()).nbytes == (1 << 20) / 8


def test_a_store_that_does_nothing_has_rates_of_zero() -> None:
    difference = Difference()
    first = reading(1, 10.0)
    difference.add(first)
    difference.add(replace(first, age_s=2.0))
    assert difference.rates() is None
    difference.add(replace(first, age_s=2.6))
    rates = difference.rates()
    assert rates is not None
    assert rates.nbytes == 0
    assert rates.cpu is None
    assert of_read(rates).p50_s is None
    # Its process may be busy all the same: heartbeats say how busy.
    difference.add(reading(2, 20.0, cpu_ns=first.sample.cpu_ns + 5_000_000_000))
    difference.add(replace(reading(2, 20.0, cpu_ns=first.sample.cpu_ns + 5_000_000_000), age_s=9.0))
    rates = difference.rates()
    assert rates is not None
    assert (rates.cpu, rates.nbytes) == (0.5, 0)


def test_another_owner_begins_anew() -> None:
    first = reading(5, 10.0)
    for other in (replace(first, pid=8, number=6), replace(first, number=1), None):
        difference = Difference()
        difference.add(first)
        difference.add(other)
        assert difference.rates() is None
    later = reading(6, 11.0, opened_s=1e9 + 5)
    difference = Difference()
    difference.add(first)
    difference.add(later)
    assert difference.rates() is None


def test_an_owner_that_is_stuck_is_shown_as_such() -> None:
    found = replace(reading(1, 10.0), age_s=STALE_S + 60)
    difference = Difference()
    difference.add(found)
    view = view_of("it", Seen(7, found), difference.rates(), 5)
    owner = dict(view.facts)["owner"]
    assert owner.endswith("has told nothing for 1 min 25 s: is it stopped, or stuck?")
    assert {cell for row in view.paths for cell in row[2:]} == {"-", ""}, "nobody knows"


def test_more_sequences_than_there_is_room_for() -> None:
    (one,) = sample().sequences
    many = tuple({**one, "name": str(number)} for number in range(9))
    view = view_of("it", Seen(7, reading(1, 1.0, sequences=many)), None, 4)
    assert [row[0] for row in view.sequences] == ["0", "1", "2", "3"]
    assert list(as_lines(view))[-1] == "and 5 more sequences"


def test_times_for_people() -> None:
    assert [seconds(each) for each in (None, 8.2e-6, 0.00123, 0.25, 3.0)] == [
        *("-", "8.2 us", "1.23 ms", "250 ms", "3 s")
    ]
    assert [duration(each) for each in (-1.0, 59.0, 61.0, 3600 * 25.0, 7300.0)] == [
        *("0 s", "59 s", "1 min 1 s", "1 d 1 h", "2 h 1 min")
    ]


def test_in_a_pipe_it_prints_once(folder: Path) -> None:
    with open_dual(folder, 5 * UNIT_NBYTES) as store:
        sequence, reference = filled(store)
        scans(sequence, reference, 2)
        store.put("a", torch.ones(1000))
        store.get("a")
        wait_until(lambda: '"hits":1' in (folder / FILE_NAME).read_text(errors="replace"))
        status, shown = top(f"file://{folder}")
        assert status == 0
        lines = shown.splitlines()
        assert lines[0] == f"store    file://{folder}"
        assert lines[1].startswith(f"owner    process {os.getpid()}, open for ")
        assert "gets     100.0% of 1 keys found; now " in shown
        assert "memory   page cache 4.0 MiB of " in shown
        assert "0 evicted, 0 found damaged" in shown
        assert "\ndirect      read " in shown
        assert "\npage cache  read " in shown
        assert "\nsequence 's'  8.0 MiB        50%" in shown
        assert max(map(len, lines)) <= 80

        status, text = top(f"file://{folder}", "--json")
        (found,) = json.loads(text)["stores"]
        assert (status, found["owner_pid"], found["trouble"]) == (0, os.getpid(), None)
        assert found["sample"]["held"]["hits"] == 1
        assert {each["path"] for each in found["per_second"]["operations"]} == {
            *("direct", "page_cache")
        }


def test_without_an_owner_it_says_so_and_fails(folder: Path) -> None:
    open_store(folder).close()
    status, shown = top(f"file://{folder}")
    assert (status, shown.splitlines()[1]) == (1, "owner    none; no process has the store open")


def test_an_owner_that_tells_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Publisher, "start", lambda self: None)
    with open_store(folder):
        status, shown = top(f"file://{folder}")
        assert status == 0
        assert f"owner    process {os.getpid()}; it tells nothing" in shown


def test_several_stores(folder: Path) -> None:
    places = [folder / "one", folder / "two"]
    with open_store(places[0]), open_store(places[1]):
        status, shown = top(*(f"file://{place}" for place in places))
        assert status == 0
        assert [line for line in shown.splitlines() if line.startswith("store")] == [
            f"store    file://{place}" for place in places
        ]


def test_bad_input(tmp_path: Path) -> None:
    for words, status, complaint in (
        ([], 2, "Missing argument"),
        ([f"file://{tmp_path}"], 1, "no store at file://"),
        (["ram://"], 2, "spdk_kv.metrics.register(store)"),
        (["nonsense://x"], 2, "nonsense"),
        ([f"file://{tmp_path}", "--index-dir", str(tmp_path)], 2, "does not apply to file://"),
        ([f"file://{tmp_path}", "--interval", "0"], 2, "0"),
    ):
        found, shown = top(*words)
        assert (found, complaint in shown) == (status, True), shown
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def node(folder: Path) -> Iterator[str]:
    image = folder / "image"
    with open(image, "wb") as file:
        file.truncate(24 << 20)
    with blockdev.loop_device(image) as found:
        yield found


def test_of_a_device_the_file_lies_beside_its_index(node: str, folder: Path) -> None:
    index = folder / "index"
    with open_store(f"block://{node}", capacity=None, create=True, index_dir=index):
        wait_until((index / FILE_NAME).exists)
        status, shown = top(f"block://{node}", "--index-dir", str(index))
        assert status == 0
        assert f"owner    process {os.getpid()}, open for" in shown


@contextmanager
def on_terminal(*words: str, width: int) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    primary, secondary = pty.openpty()
    env = {key: value for key, value in os.environ.items() if key not in ("CI", "NO_COLOR")}
    process = subprocess.Popen(
        [sys.executable, "-m", "spdk_kv", "top", *words],
        stdin=subprocess.DEVNULL, stdout=secondary, stderr=secondary,
        env=env | {"TERM": "xterm", "COLUMNS": str(width), "LINES": "40"},
    )  # fmt: skip
    os.close(secondary)
    try:
        yield process, primary
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
        os.close(primary)


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("width", [80, 120])
def test_on_a_terminal_it_goes_on_until_it_is_interrupted(folder: Path, width: int) -> None:
    with open_dual(folder, 5 * UNIT_NBYTES) as store:
        sequence, reference = filled(store)
        scans(sequence, reference, 2)
        with on_terminal(f"file://{folder}", "--interval", "0.1", width=width) as (process, shown):
            # Twice: it looks again.
            seen = read_terminal(shown, lambda text: text.count(b"Ctrl-C ends") >= 2)
            assert f"process {os.getpid()}, open for".encode() in seen
            store.close()
            # The owner goes away, and it goes on.
            read_terminal(shown, lambda text: b"no process has the store open" in text)
            with open_store(folder, capacity=None):
                read_terminal(shown, lambda text: b"open for" in text)
                process.send_signal(signal.SIGINT)
                last = read_terminal(shown, lambda text: False)
                assert process.wait(PATIENCE_S) == 0
            assert b"\x1b[?1049l" in last, "the screen from before is back"
            after = last.rpartition(b"\x1b[?1049l")[2].decode()
            assert "open for" in after, "what was seen last stays"
            assert "Traceback" not in after
