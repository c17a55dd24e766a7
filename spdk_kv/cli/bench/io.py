"""``spdk-kv bench io``: one engine under one kind of load."""

from __future__ import annotations

import errno
import os
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from spdk_kv.engines import Location, parse_location
from spdk_kv.errors import CapacityError, file_error
from spdk_kv.memory import read_memory
from spdk_kv.terminal import console, is_terminal, json_option, print_json, progress
from spdk_kv.units import GIB, KIB, MIB, align_down, format_nbytes, parse_nbytes

if TYPE_CHECKING:
    from spdk_kv.engines import Engine, QueueOptions
    from spdk_kv.measure import Measurement, Workload

_OPS = ("read", "write", "randread")
_DEFAULT_NBYTES = {"ram": 256 * MIB}  # a GiB for all others
_CONFIRM = "--i-know-this-destroys"


def _nbytes(
    context: click.Context, parameter: click.Parameter, value: int | str | None
) -> int | None:
    """Parses a byte count as people write it: ``4096``, ``16k``, ``1 MiB``."""
    if value is None:
        return None
    try:
        return parse_nbytes(value)
    except ValueError as error:
        raise click.BadParameter(str(error), context, parameter) from error


@click.command("io")
@click.option(
    "--location",
    required=True,
    metavar="URI",
    help="file:///DIR (a temporary file in DIR), block:///dev/NODE, ng:///dev/NODE, "
    "spdk://ADDRESS/NAMESPACE, ram:// or null://.",
)
@click.option(
    "--op", type=click.Choice(_OPS), default="read", show_default=True, help="What to do."
)
@click.option(
    "--segment-nbytes",
    callback=_nbytes,
    default="1 MiB",
    show_default=True,
    metavar="SIZE",
    help="Bytes per command, such as 16384, 16k or 1MiB.",
)
@click.option(
    "--depth",
    type=click.IntRange(1, 4096),
    default=16,
    show_default=True,
    help="Commands in flight.",
)
@click.option(
    "--seconds",
    type=click.FloatRange(0.01, 86400),
    default=5.0,
    show_default=True,
    help="How long to measure.",
)
@click.option(
    "--engine",
    metavar="NAME",
    help="uring, threads or pagecache.  [default: the best available]",
)
@click.option(
    "--size",
    callback=_nbytes,
    metavar="SIZE",
    help="Bytes to run over.  [default: 1 GiB (ram: 256 MiB), at most half of the free space]",
)
@click.option("--checksum", is_flag=True, help="Compute CRC32C over every byte, as a store does.")
@click.option(
    _CONFIRM,
    "destroys",
    metavar="PATH|URI",
    help="Required to write to a drive: its path (spdk: its URI) again, exactly.",
)
@json_option
def bench_io(
    location: str,
    op: str,
    segment_nbytes: int,
    depth: int,
    seconds: float,
    engine: str | None,
    size: int | None,
    checksum: bool,
    destroys: str | None,
    as_json: bool,
) -> None:
    """Measure an engine on a drive.

    On file:// it uses a temporary file, which is written once before the clock starts and removed
    afterwards in any case; stores in that folder are not touched. On block://, ng:// and spdk:// it
    only reads, unless the path or URI is repeated to confirm a write.
    """
    from spdk_kv.engines import QueueOptions
    from spdk_kv.measure import Workload, measure

    try:
        place = parse_location(location)
        options = QueueOptions(depth, segment_nbytes)
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    _check_memory(depth, segment_nbytes)
    if place.scheme == "block":
        _check_block(place.path)
        _check_write(place.path, op, destroys)
    elif place.scheme == "ng":
        _check_write(place.path, op, destroys)
    elif place.is_nvme:
        _check_write(location, op, destroys)
    elif destroys is not None:
        raise click.UsageError(
            f"{_CONFIRM} is only for block://, ng:// and spdk://; {place} does not need it"
        )
    span = size or _default_size(place)
    if span < segment_nbytes:
        raise click.UsageError(
            f"{format_nbytes(span)} cannot hold one segment of {format_nbytes(segment_nbytes)}"
        )
    with _opened(place, engine, options, align_down(span, segment_nbytes)) as opened:
        capacity = opened.capacity_nbytes
        if capacity is not None:
            span = min(span, capacity)
        load = Workload(op, segment_nbytes, align_down(span, segment_nbytes), checksum)
        with progress(round(seconds * 1000), f"{op} {place}") as advance:
            seen = measure(opened, load, seconds, _ticker(advance))
        report = _report(place, opened, load, depth, seen)
    if as_json:
        print_json(report)
    else:
        _print(report)


def _ticker(advance: Callable[[int], None]) -> Callable[[float], None]:
    """Advances a bar that counts milliseconds by the time elapsed since the beginning."""
    shown = 0

    def tick(elapsed_s: float) -> None:
        nonlocal shown
        # Redrawing the bar for each of thousands of transfers would cost more than they do.
        now = round(elapsed_s * 1000)
        if now - shown >= 100:
            advance(now - shown)
            shown = now

    return tick


def _check_memory(depth: int, segment_nbytes: int) -> None:
    # The buffers, and twice as much in the engine's own slots.
    wanted = 3 * depth * segment_nbytes
    available = read_memory().available_nbytes
    if available is not None and wanted > available // 2:
        raise click.UsageError(
            f"depth {depth} of {format_nbytes(segment_nbytes)} needs {format_nbytes(wanted)} of "
            f"memory; {format_nbytes(available)} are available"
        )


def _check_block(path: str) -> None:
    try:
        mode = os.stat(path).st_mode
    except OSError as refused:
        raise file_error("open", path, refused) from refused
    if not stat.S_ISBLK(mode):
        raise click.UsageError(f"{path} is not a block device; a folder is file://")


def _check_write(name: str, op: str, destroys: str | None) -> None:
    if op == "write" and destroys != name:
        raise click.UsageError(
            f"writing destroys what is on {name}; to do it anyway, add {_CONFIRM} {name}"
        )


def _default_size(place: Location) -> int:
    size = _DEFAULT_NBYTES.get(place.scheme, GIB)
    if place.scheme != "file":
        return size
    try:
        space = os.statvfs(place.path)
    except OSError as refused:
        raise file_error("open", place.path, refused) from refused
    return min(size, space.f_bavail * space.f_frsize // 2)


@contextmanager
def _opened(
    place: Location, engine: str | None, options: QueueOptions, nbytes: int
) -> Iterator[Engine]:
    """The engine over ``nbytes``, filled first unless they are on a drive of their own."""
    from spdk_kv.engines import open_engine
    from spdk_kv.measure import fill

    path = _temporary_file(place.path, nbytes) if place.scheme == "file" else ""
    try:
        opened = open_engine(place, path, engine=engine, capacity_nbytes=nbytes, options=options)
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    finally:
        if path:
            # The engine has it open. Without a name nothing is left behind, even by kill -9.
            os.unlink(path)
    try:
        if place.scheme in ("file", "ram"):
            with progress(nbytes, "filling") as advance:
                fill(opened, nbytes, advance)
        yield opened
    finally:
        opened.close()


def _temporary_file(folder: str, nbytes: int) -> str:
    """A new file of ``nbytes`` in ``folder``, fully allocated."""
    try:
        fd, path = tempfile.mkstemp(prefix=".spdk_kv-bench-", dir=folder)
    except OSError as refused:
        raise file_error("create a file in", folder, refused) from refused
    try:
        os.posix_fallocate(fd, 0, nbytes)
    except BaseException as failed:
        os.unlink(path)
        if isinstance(failed, OSError) and failed.errno in (errno.ENOSPC, errno.EDQUOT):
            raise CapacityError(f"{folder} has no room for {format_nbytes(nbytes)}") from failed
        if isinstance(failed, OSError):
            raise file_error("create a file in", folder, failed) from failed
        raise
    finally:
        os.close(fd)
    return path


def _report(
    place: Location, engine: Engine, load: Workload, depth: int, seen: Measurement
) -> dict[str, Any]:
    fields = asdict(seen)
    return {
        "location": str(place),
        "engine": engine.name,
        "direct": engine.direct,
        "op": load.op,
        "segment_nbytes": load.segment_nbytes,
        "depth": depth,
        "size_nbytes": load.span_nbytes,
        "checksum": load.checksum,
        "seconds": fields.pop("elapsed_s"),
        **fields,
    }


def _print(report: dict[str, Any]) -> None:
    size = report["segment_nbytes"]
    summed = ", with checksums" if report["checksum"] else ""
    rows = [
        ("load", f"{report['op']}, {_short(size)} x {report['depth']}{summed}"),
        ("engine", report["engine"] + (" (past the page cache)" if report["direct"] else "")),
        ("moved", f"{format_nbytes(report['nbytes'])} in {report['seconds']:.2f} s"),
        ("speed", f"{report['gib_s']:.2f} GiB/s, {report['iops']:,.0f} commands/s"),
        ("CPU", f"{report['cpu_s_per_gib']:.3f} s per GiB"),
        ("depth", f"{report['depth_achieved']:.1f} in flight on average"),
        (
            "latency",
            f"{report['lat_us_p50']:,.0f} us median, {report['lat_us_p99']:,.0f} p99, "
            f"{report['lat_us_p999']:,.0f} p99.9",
        ),
    ]
    if not is_terminal():
        for name, text in rows:
            click.echo(f"{name:<8} {text}")
        return
    from rich.table import Table

    table = Table(box=None, show_header=False, pad_edge=False, title=report["location"])
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, text in rows:
        table.add_row(name, text)
    console().print(table)


def _short(nbytes: int) -> str:
    """``16 KiB`` rather than ``16.0 KiB``."""
    if nbytes % MIB == 0:
        return f"{nbytes // MIB} MiB"
    return f"{nbytes / KIB:g} KiB"
