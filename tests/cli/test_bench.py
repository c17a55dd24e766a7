"""`spdk-kv bench io`: short real runs, what it refuses, and that it leaves nothing behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from spdk_kv.cli import main
from spdk_kv.cli.bench import io as bench_io
from spdk_kv.engines import QueueOptions, open_engine, parse_location
from spdk_kv.errors import DeviceError, EngineUnavailable
from spdk_kv.measure.io import OPS, Workload, fill, filled_memory, measure
from support.subprocesses import interruptible_fixture
from support.terminal import run_on_terminal
from support.waiting import PATIENCE_S, wait_until

interruptible = interruptible_fixture
KIB = 1 << 10
MIB = 1 << 20

KEYS = {
    *("location", "engine", "direct", "op", "segment_nbytes", "depth", "size_nbytes", "checksum"),
    *("seconds", "nbytes", "ios", "gib_s", "iops", "cpu_s_per_gib", "depth_achieved"),
    *("lat_us_p50", "lat_us_p99", "lat_us_p999"),
}


def bench(*words: str) -> Result:
    return CliRunner().invoke(main, ["bench", "io", *words])


def report(*words: str) -> dict[str, Any]:
    result = bench(*words, "--seconds", "0.2", "--json")
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def skip_unless_available(folder: Path, engine: str) -> None:
    """io_uring may be forbidden, and a filesystem may be without O_DIRECT."""
    probe = folder / "probe"
    try:
        open_engine(parse_location(str(folder)), str(probe), engine=engine).close()
    except EngineUnavailable as unavailable:
        pytest.skip(str(unavailable))
    finally:
        probe.unlink(missing_ok=True)


def check(found: dict[str, Any]) -> None:
    """Relations that hold on any machine."""
    assert set(found) == KEYS
    assert found["nbytes"] == found["ios"] * found["segment_nbytes"] > 0
    assert found["seconds"] >= 0.2
    assert found["gib_s"] == pytest.approx(found["nbytes"] / found["seconds"] / (1 << 30))
    assert found["iops"] == pytest.approx(found["ios"] / found["seconds"])
    assert found["cpu_s_per_gib"] > 0
    assert 0 < found["depth_achieved"] <= found["depth"] * 1.001
    assert 0 <= found["lat_us_p50"] <= found["lat_us_p99"] <= found["lat_us_p999"]


@pytest.mark.parametrize("op", ["read", "write", "randread"])
@pytest.mark.parametrize("engine", ["uring", "threads", "pagecache"])
def test_measures_every_engine_on_a_file(tmp_path: Path, engine: str, op: str) -> None:
    skip_unless_available(tmp_path, engine)
    found = report(
        *("--location", f"file://{tmp_path}", "--engine", engine, "--op", op),
        *("--segment-nbytes", "64k", "--depth", "8", "--size", "32MiB"),
    )
    check(found)
    assert (found["engine"], found["op"], found["depth"]) == (engine, op, 8)
    assert (found["segment_nbytes"], found["size_nbytes"]) == (64 * KIB, 32 * MIB)
    assert found["direct"] == (engine != "pagecache")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("location", ["ram://", "null://"])
def test_measures_without_a_device(location: str) -> None:
    found = report("--location", location, "--segment-nbytes", "16KiB", "--size", "16MiB")
    check(found)
    assert found["engine"] == location.removesuffix("://")


@pytest.mark.machine
def test_queue_stays_full_between_transfers(tmp_path: Path) -> None:
    words = ("--location", f"file://{tmp_path}", "--size", "64MiB", "--depth", "4")
    # The beginning and the end are not full; a queue drained after each transfer would show 3. A
    # command that is late at the end counts, too: the best of three.
    assert max(report(*words)["depth_achieved"] for _ in range(3)) > 3.5


@pytest.mark.machine
def test_checksum_is_computed_and_said() -> None:
    found = report("--location", "null://", "--size", "16MiB", "--checksum")
    assert found["checksum"] is True
    plain = report("--location", "null://", "--size", "16MiB")
    assert found["cpu_s_per_gib"] > plain["cpu_s_per_gib"]


def test_size_is_cut_to_whole_segments_and_refused_when_too_small() -> None:
    assert report("--location", "null://", "--size", "2500KiB")["size_nbytes"] == 2 * MIB
    small = bench("--location", "null://", "--size", "512KiB")
    assert small.exit_code == 2
    assert "cannot hold one segment" in small.output


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--location", "null://", "--segment-nbytes", "5x"], "not a byte count"),
        (["--location", "null://", "--segment-nbytes", "1000"], "a multiple of 4096"),
        (["--location", "nvme://x"], "unknown scheme"),
        (["--location", "null://", "--engine", "uring"], "null:// is served by"),
        (["--location", "null://", "--depth", "4096", "--segment-nbytes", "1GiB"], "of memory"),
        (
            ["--location", "ram://", "--i-know-this-destroys", "/dev/x"],
            "only for block://, ng:// and spdk://",
        ),
        (["--location", "block:///etc/hostname"], "not a block device"),
    ],
)
def test_bad_input_is_a_usage_error(words: list[str], complaint: str) -> None:
    result = bench(*words)
    assert result.exit_code == 2, result.output
    assert complaint in " ".join(result.output.split())


def test_missing_folder_is_not_created(tmp_path: Path) -> None:
    result = bench("--location", f"file://{tmp_path / 'nowhere'}")
    assert result.exit_code == 1
    assert "No such file" in result.output
    assert not (tmp_path / "nowhere").exists()


def test_no_room_is_said_and_leaves_nothing(tmp_path: Path) -> None:
    result = bench("--location", f"file://{tmp_path}", "--size", "900TiB")
    assert result.exit_code == 1, result.output
    assert result.output.startswith("error: ")
    assert list(tmp_path.iterdir()) == []


def test_a_store_in_the_folder_is_left_alone(tmp_path: Path) -> None:
    for name in ("data", "index.sqlite", "lock"):
        (tmp_path / name).write_bytes(b"a store's own")
    report("--location", f"file://{tmp_path}", "--op", "write", "--size", "8MiB")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "index.sqlite", "lock"]
    assert all(path.read_bytes() == b"a store's own" for path in tmp_path.iterdir())


# --- block devices


@pytest.fixture
def loop_device(tmp_path: Path) -> Any:
    image = tmp_path / "image"
    image.write_bytes(os.urandom(8 * MIB))
    if os.geteuid() != 0:
        pytest.skip("a loop device needs root")
    made = subprocess.run(
        ["losetup", "-f", "--show", str(image)], capture_output=True, text=True, check=False
    )
    if made.returncode:
        pytest.skip(f"no loop device: {made.stderr.strip()}")
    device = made.stdout.strip()
    yield device, image
    subprocess.run(["losetup", "-d", device], check=True)


def test_reads_a_block_device_and_leaves_it_as_it_was(loop_device: tuple[str, Path]) -> None:
    device, image = loop_device
    before = image.read_bytes()
    found = report("--location", f"block://{device}", "--segment-nbytes", "64k")
    check(found)
    assert found["size_nbytes"] == 8 * MIB
    assert image.read_bytes() == before


@pytest.mark.parametrize("confirmation", [None, "", "/dev/loop", "yes"])
def test_refuses_to_write_to_a_block_device(
    loop_device: tuple[str, Path], confirmation: str | None
) -> None:
    device, image = loop_device
    before = image.read_bytes()
    words = [] if confirmation is None else ["--i-know-this-destroys", confirmation]
    result = bench("--location", f"block://{device}", "--op", "write", *words)
    assert result.exit_code == 2
    assert f"--i-know-this-destroys {device}" in " ".join(result.output.split())
    assert image.read_bytes() == before


def test_writes_to_a_block_device_whose_path_is_repeated(loop_device: tuple[str, Path]) -> None:
    device, image = loop_device
    before = image.read_bytes()
    words = ("--op", "write", "--segment-nbytes", "64k", "--i-know-this-destroys", device)
    check(report("--location", f"block://{device}", *words))
    os.sync()
    assert image.read_bytes() != before


def test_a_block_device_in_use_is_refused_even_when_confirmed(
    loop_device: tuple[str, Path],
) -> None:
    device, image = loop_device
    before = image.read_bytes()
    holder = os.open(device, os.O_RDWR | os.O_EXCL)  # what a mount does
    try:
        words = ("--op", "write", "--i-know-this-destroys", device)
        result = bench("--location", f"block://{device}", *words)
    finally:
        os.close(holder)
    assert result.exit_code == 1
    assert "in use" in result.output
    assert image.read_bytes() == before


# --- how it looks and how it ends


def run_words(folder: Path, *words: str) -> list[str]:
    return [
        *(sys.executable, "-m", "spdk_kv", "bench", "io", "--location", f"file://{folder}"),
        *("--segment-nbytes", "64k", "--size", "16MiB", *words),
    ]


def test_a_pipe_gets_plain_lines_and_no_bar(tmp_path: Path) -> None:
    result = subprocess.run(
        run_words(tmp_path, "--seconds", "0.3"),
        capture_output=True, text=True, check=False, env=os.environ | {"FORCE_COLOR": "1"},
    )  # fmt: skip
    assert (result.returncode, result.stderr) == (0, "")
    lines = dict(line.split(maxsplit=1) for line in result.stdout.splitlines())
    assert list(lines) == ["load", "engine", "moved", "speed", "CPU", "depth", "latency"]
    assert lines["load"] == "read, 64 KiB x 16"
    assert "\x1b" not in result.stdout


def test_a_terminal_gets_a_bar_and_a_table(tmp_path: Path) -> None:
    shown = run_on_terminal(run_words(tmp_path, "--seconds", "0.5"))
    assert "\x1b[" in shown
    assert "read file://" in shown  # the bar
    assert "GiB/s" in shown


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("op", ["read", "write"])
def test_interrupt_ends_cleanly_and_leaves_no_file(tmp_path: Path, op: str) -> None:
    process = subprocess.Popen(
        run_words(tmp_path, "--seconds", "600", "--op", op),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    wait_until_measuring(process.pid, tmp_path)
    process.send_signal(signal.SIGINT)
    output, complaint = process.communicate(timeout=PATIENCE_S)
    assert (process.returncode, output, complaint.strip()) == (130, "", "interrupted")
    assert list(tmp_path.iterdir()) == []


def wait_until_measuring(pid: int, folder: Path) -> None:
    """Until the process does I/O on the data file, which has lost its name by then."""

    def holds_the_file() -> bool:
        for link in Path(f"/proc/{pid}/fd").iterdir():
            with suppress(OSError):
                target = os.readlink(link)
                if target.startswith(str(folder)) and target.endswith("(deleted)"):
                    return True
        return False

    wait_until(holds_the_file, "the measurement never began")
    time.sleep(0.3)  # filling the file, or measuring: an interrupt is the same to both


# --- the kernel


def test_writes_stay_inside_the_span() -> None:
    engine = open_engine(
        parse_location("ram://"), capacity_nbytes=4 * MIB, options=QueueOptions(4, 64 * KIB)
    )
    try:
        measure(engine, Workload("write", 64 * KIB, 2 * MIB), 0.05)
        memory = filled_memory(engine, 2 * MIB)
        transfer = engine.transfer(OPS["read"])
        transfer.keep(memory)
        transfer.add(2 * MIB, memory.address, 2 * MIB)
        engine.run(transfer)
        assert not any(memoryview(memory)[: 2 * MIB])
        fill(engine, 4 * MIB)
        assert engine.stats()["written_nbytes"] > 4 * MIB
    finally:
        engine.close()


@pytest.mark.machine
def test_transfers_grow_on_a_fast_device() -> None:
    engine = open_engine(parse_location("null://"), options=QueueOptions(16, 128 * KIB))
    try:
        measure(engine, Workload("read", 128 * KIB, 64 * MIB), 0.3)
        seen = engine.stats()
        # They begin with 128 segments.
        assert seen["ios"] / seen["transfers"] > 300
    finally:
        engine.close()


def test_a_load_is_checked() -> None:
    with pytest.raises(ValueError, match="op is one of"):
        Workload("erase", 4096, 4096)
    with pytest.raises(ValueError, match="cannot hold one segment"):
        Workload("read", 8192, 4096)


def test_a_failing_device_ends_the_measurement_with_its_error() -> None:
    engine = open_engine(parse_location("ram://"), capacity_nbytes=MIB)
    try:
        with pytest.raises(DeviceError):
            measure(engine, Workload("read", MIB, 64 * MIB), 5.0)
        assert engine.queue.active == 0
    finally:
        engine.close()


def test_short_names_of_sizes() -> None:
    assert [bench_io._short(n) for n in (4096, MIB, 3 * MIB + 4096)] == [
        "4 KiB", "1 MiB", "3076 KiB"
    ]  # fmt: skip
