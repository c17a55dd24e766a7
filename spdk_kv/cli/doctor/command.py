"""``spdk-kv doctor``: what this machine offers, and the commands that add what is missing."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import click

from spdk_kv.cli.doctor.checks import (
    Check,
    check_drives,
    check_hugepages,
    check_io_uring,
    check_iommu,
    check_memlock,
    check_memory,
    check_system,
    check_vfio,
)
from spdk_kv.devices import NvmeDrive, list_drives, read_host
from spdk_kv.memory import MemorySnapshot, available_for_page_cache, read_memory
from spdk_kv.terminal import console, is_terminal, json_option, print_json
from spdk_kv.units import format_nbytes

if TYPE_CHECKING:
    from spdk_kv.engines import EngineStatus, Location

_STYLES = {"ok": "green", "missing": "red", "limited": "yellow", "info": "cyan"}
_PIPE_WIDTH = 80
_STATUS_WIDTH = 9
# What is named by more letters than this stands above what was found, not before it.
_LONGEST_NAME = 20
_LEAST_WIDTH = 40


@click.command()
@click.argument("locations", nargs=-1, metavar="[URI]...")
@json_option
def doctor(locations: tuple[str, ...], as_json: bool) -> None:
    """Show what this machine offers and how to fix what is missing.

    Given the URI of an NVMe drive (spdk://, spdk+tcp://, spdk+vfiouser://), it also shows whether
    SPDK reaches the drive, and what drive it is. It only reads. The exit status is 0 whatever it
    finds.
    """
    places = [_nvme_location(location) for location in locations]
    from spdk_kv.engines import engine_status  # may load native code: not for `--help`

    engines = engine_status()
    drives = list_drives()
    memory = read_memory()
    host = read_host()
    checks = [
        check_system(host),
        check_memory(memory),
        check_hugepages(host),
        check_memlock(host),
        check_iommu(host),
        check_vfio(host),
        check_io_uring(host.io_uring),
        _check_gpu(),
        *check_drives(drives),
        *(_check_location(place) for place in places),
    ]
    if as_json:
        print_json(
            {
                "checks": [asdict(check) for check in checks],
                "engines": [_engine_fields(engine) for engine in engines],
                "drives": [_drive_fields(drive) for drive in drives],
                "memory": _memory_fields(memory),
            }
        )
        return
    checks += [Check("memory", "info", note) for note in memory.notes]
    report = [*(_engine_check(engine) for engine in engines), *checks]
    if is_terminal():
        _print_terminal(report)
    else:
        _print_lines(report)


def _nvme_location(text: str) -> Location:
    from spdk_kv.engines import parse_location

    try:
        place = parse_location(text)
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    if not place.is_nvme:
        raise click.UsageError(f"{place} is not the location of an NVMe drive (spdk://...)")
    return place


def _check_location(place: Location) -> Check:
    """Opens the drive briefly, and closes it again."""
    from spdk_kv.engines import QueueOptions, SpdkEngine, open_engine
    from spdk_kv.errors import SpdkKvError

    try:
        drive = open_engine(place, options=QueueOptions(depth=1, segment_nbytes=4096))
    except SpdkKvError as error:
        return Check(str(place), "missing", str(error))
    assert isinstance(drive, SpdkEngine)
    try:
        facts = [
            drive.controller["model"],
            f"serial {drive.controller['serial']}",
            format_nbytes(drive.capacity_nbytes),
            f"blocks of {drive.block_nbytes} bytes",
            f"at most {format_nbytes(drive.namespace['max_transfer_nbytes'])} per command",
            f"identity {drive.identity}",
        ]
    finally:
        drive.close()
    return Check(str(place), "ok", ", ".join(facts))


def _check_gpu() -> Check:
    try:
        import torch
    except ImportError as error:
        return Check("gpu", "missing", f"torch cannot be imported: {error}", "pip install torch")
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        return Check("gpu", "ok", f"torch {torch.__version__}: {', '.join(names)}")
    if torch.version.cuda is None and os.path.exists("/proc/driver/nvidia/version"):
        found = f"there is an NVIDIA driver, but torch {torch.__version__} is built without CUDA"
        remedy = "pip install --force-reinstall torch"  # PyPI's Linux wheels have CUDA
        return Check("gpu", "limited", found, remedy)
    return Check("gpu", "info", f"torch {torch.__version__} finds none; tensors stay on the CPU")


def _engine_check(engine: EngineStatus) -> Check:
    return Check(
        f"engine {engine.name}",
        "ok" if engine.available else "missing",
        engine.reason or "available",
        "" if engine.available else engine.remedy,
    )


def _engine_fields(engine: EngineStatus) -> dict[str, Any]:
    names = ("name", "available", "reason", "remedy")
    return {name: getattr(engine, name) for name in names}


def _drive_fields(drive: NvmeDrive) -> dict[str, Any]:
    return asdict(drive) | {
        "nbytes": drive.nbytes,
        "mounted": drive.mounted,
        "mount_points": drive.mount_points,
    }


def _memory_fields(memory: MemorySnapshot) -> dict[str, Any]:
    return asdict(memory) | {"available_for_page_cache_nbytes": available_for_page_cache(memory, 0)}


def _print_lines(report: Sequence[Check]) -> None:
    for check, line in _lines(report, _PIPE_WIDTH):
        click.echo(f"{check.status if line.first else '':<{_STATUS_WIDTH}}{line.text}")
        if line.last and check.remedy:
            # Not wrapped, so that it can be copied.
            click.echo(f"{'':{_STATUS_WIDTH}}fix: {check.remedy}")


def _print_terminal(report: Sequence[Check]) -> None:
    from rich.text import Text

    out = console()
    for check, line in _lines(report, out.width):
        status = f"{check.status if line.first else '':<{_STATUS_WIDTH}}"
        out.print(Text().append(status, _STYLES[check.status]).append(line.text), soft_wrap=True)
    remedies = [check for check in report if check.remedy]
    if remedies:
        out.print("\nTo fix", style="bold")
    for check in remedies:
        # After the lines, and wrapped by the terminal, so that it can be copied whole.
        out.print(Text(f"{check.name}:", _STYLES[check.status]), soft_wrap=True)
        out.print(Text(f"  {check.remedy}"), soft_wrap=True)


@dataclass(frozen=True)
class _Line:
    """One line of a check, what stands behind its status."""

    text: str
    first: bool
    last: bool


def _lines(report: Sequence[Check], width: int) -> Iterator[tuple[Check, _Line]]:
    """The report's lines for so many columns, each with its check."""
    names = max(len(check.name) for check in report if len(check.name) <= _LONGEST_NAME)
    for check in report:
        head = f"{check.name:<{names}}  "
        # A URI would leave no room beside itself, so it has a line of its own.
        alone = len(head) > names + 2
        texts = [check.name] if alone else []
        texts += textwrap.wrap(
            check.found,
            width=max(_LEAST_WIDTH, width - _STATUS_WIDTH),
            initial_indent="  " if alone else head,
            subsequent_indent="  " if alone else " " * len(head),
            break_long_words=False,
            break_on_hyphens=False,
        )
        for place, text in enumerate(texts):
            yield check, _Line(text, first=place == 0, last=place == len(texts) - 1)
