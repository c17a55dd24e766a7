"""The steps that move a PCI function from the nvme driver to vfio-pci, and back.

They are generators that yield the name of each step before it is done, so that tests can stop
between any two steps, as a crash would, and restore from there. Decisions are made elsewhere.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from spdk_kv.binding.journal import BINDING, BOUND, RESTORING, Journal, Record
from spdk_kv.binding.kernel import StepFailed, WritableKernel
from spdk_kv.devices.inspection import (
    Code,
    function_path,
    read_driver,
    read_override,
    read_serial,
    refuse,
)

VFIO_DRIVER = "vfio-pci"
_SETTLE_S = 10.0  # a controller may take seconds to become ready (NVMe Base, CAP.TO)


def bind_steps(
    root: Path,
    kernel: WritableKernel,
    journal: Journal,
    record: Record,
    look_again: Callable[[], None],
) -> Iterator[str]:
    """Moves the function from the nvme driver to vfio-pci.

    ``look_again`` raises Refused if the drive may no longer be taken; it is called immediately
    before the unbind. Also raises StepFailed and OSError. :func:`give_back_steps` undoes whatever
    was done by then.
    """
    drivers = root / "sys/bus/pci/drivers"
    yield "journal"
    journal.write(replace(record, state=BINDING))
    yield "load"
    if not (drivers / VFIO_DRIVER).exists():
        done = kernel.run(["modprobe", VFIO_DRIVER])
        if done.status != 0:
            raise StepFailed(f"modprobe {VFIO_DRIVER}: {done.error.strip()}")
    # Set before the unbind, after which no other driver, nvme included, may take the function.
    yield "override"
    kernel.write(function_path(root, record.bdf) / "driver_override", VFIO_DRIVER)
    yield "look-again"
    look_again()
    yield "unbind"
    kernel.write(drivers / record.former_driver / "unbind", record.bdf)
    yield "probe"
    kernel.write(root / "sys/bus/pci/drivers_probe", record.bdf)
    yield "verify"
    _expect_driver(root, record.bdf, VFIO_DRIVER)
    node = root / "dev/vfio" / record.group
    if not _settles(node.exists):
        raise StepFailed(f"/dev/vfio/{record.group} did not appear")
    yield "done"
    journal.write(replace(record, state=BOUND))


def give_back_steps(
    root: Path, kernel: WritableKernel, journal: Journal, record: Record
) -> Iterator[str]:
    """Returns the function to its former driver, from wherever a bind or restore has left it.

    Raises Refused, with the code ``changed``, if someone else has changed it since; StepFailed and
    OSError.
    """
    function = function_path(root, record.bdf)
    drivers = root / "sys/bus/pci/drivers"
    driver, override = read_driver(root, record.bdf), read_override(root, record.bdf)
    _check_ours(record, driver, override)
    if driver != record.former_driver:
        yield "journal"
        journal.write(replace(record, state=RESTORING))
        # Names the driver instead of clearing: an ID added to vfio-pci (new_id) would make that
        # driver take the function again.
        yield "override"
        kernel.write(function / "driver_override", record.former_driver)
        if driver == VFIO_DRIVER:
            yield "unbind"
            kernel.write(drivers / VFIO_DRIVER / "unbind", record.bdf)
        yield "probe"
        kernel.write(root / "sys/bus/pci/drivers_probe", record.bdf)
        yield "verify"
        _expect_driver(root, record.bdf, record.former_driver)
    if read_override(root, record.bdf) != record.former_override:
        yield "clear-override"
        # A lone newline clears it (driver_override_store in drivers/pci/pci-sysfs.c).
        kernel.write(function / "driver_override", record.former_override or "\n")
    yield "done"
    journal.remove(record.bdf)


def take_again_steps(
    root: Path, kernel: WritableKernel, journal: Journal, record: Record
) -> Iterator[str]:
    """Undoes a restore that failed halfway: binds the drive to vfio-pci again."""
    yield "override"
    kernel.write(function_path(root, record.bdf) / "driver_override", VFIO_DRIVER)
    if read_driver(root, record.bdf) is None:
        yield "probe"
        kernel.write(root / "sys/bus/pci/drivers_probe", record.bdf)
    yield "verify"
    _expect_driver(root, record.bdf, VFIO_DRIVER)
    yield "done"
    journal.write(replace(record, state=BOUND))


def check_serial(root: Path, record: Record) -> str | None:
    """What is wrong with the drive's serial after a restore; None if it is the one recorded."""
    # Until its controller has answered, the attribute reads "(efault)".
    if _settles(lambda: read_serial(root, record.bdf) == record.serial):
        return None
    serial = read_serial(root, record.bdf)
    if serial is None:
        return f"the driver {record.former_driver} has it, but its controller does not answer"
    return f"its serial is {serial!r}, not {record.serial!r}"


def _check_ours(record: Record, driver: str | None, override: str | None) -> None:
    if driver not in (record.former_driver, VFIO_DRIVER, None):
        raise refuse(Code.CHANGED, f"{record.bdf} now has the driver {driver}")
    if override not in (record.former_override, VFIO_DRIVER, record.former_driver):
        raise refuse(Code.CHANGED, f"{record.bdf} now has the driver_override {override!r}")


def _expect_driver(root: Path, bdf: str, name: str) -> None:
    if not _settles(lambda: read_driver(root, bdf) == name):
        raise StepFailed(f"{bdf}: its driver is {read_driver(root, bdf)}, not {name}")


def _settles(condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + _SETTLE_S
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


@contextmanager
def signals_deferred() -> Iterator[None]:
    """Defers signals, one of which could leave a drive between two drivers.

    They are masked in this thread, which suffices for a program without others. Another thread may
    still receive them, so in the main thread their handlers only note them, and they are raised
    again at the end.
    """
    held = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    arrived: list[int] = []
    handlers = {}
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, held)
    try:
        if threading.current_thread() is threading.main_thread():
            for number in held:
                handlers[number] = signal.signal(number, lambda got, _frame: arrived.append(got))
        yield
    finally:
        for number, handler in handlers.items():
            # None is a handler that was installed from C, which Python cannot restore.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for got in arrived:
            signal.raise_signal(got)
