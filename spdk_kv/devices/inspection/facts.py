"""All facts about one NVMe function at one moment, from which verdict.py judges."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from spdk_kv.devices.host import VfioState, vfio_pci_state
from spdk_kv.devices.inspection.claims import claim
from spdk_kv.devices.inspection.contents import Contents, read_contents
from spdk_kv.devices.inspection.kernel import Kernel, ToolMissing
from spdk_kv.devices.inspection.processes import check_host
from spdk_kv.devices.inspection.reasons import USE_CODES, Code, Reason
from spdk_kv.devices.inspection.references import check_references
from spdk_kv.devices.inspection.sightings import Sightings
from spdk_kv.devices.inspection.stack import Disk, Stack, read_stack
from spdk_kv.devices.inspection.strict import (
    Unreadable,
    listing,
    optional_link_name,
    optional_text,
    required_text,
)
from spdk_kv.devices.inspection.usage import check_usage, writes_completed

BDF = re.compile(r"[0-9a-f]{4,8}:[0-9a-f]{2}:[0-9a-f]{2}\.[0-7]")
NVM_EXPRESS_CLASS = "0x010802"  # mass storage, NVM, NVM Express I/O controller
_NO_SERIALS = ("", "(null)")


@dataclass(frozen=True)
class Facts:
    """One look at one function.

    Attributes:
        inode: of its sysfs directory, which changes if it is unplugged and replaced.
        override: its driver_override; None for none.
        members: functions in its IOMMU group.
        other_paths: other controllers that reach the same namespaces.
        reasons: what was found against taking it, including what could not be read.
        contents: None where they were not read.
        writes: per disk, counters of writes; equal before and after means untouched.
    """

    bdf: str
    present: bool
    inode: int = 0
    pci_class: str = ""
    serial: str | None = None
    model: str | None = None
    driver: str | None = None
    override: str | None = None
    group: str | None = None
    group_kind: str | None = None
    members: tuple[str, ...] = ()
    virtual_functions: int = 0
    controllers: tuple[str, ...] = ()
    state: str | None = None
    other_paths: tuple[str, ...] = ()
    disks: tuple[Disk, ...] = ()
    vfio: VfioState = "missing"
    reasons: tuple[Reason, ...] = ()
    contents: Contents | None = None
    writes: tuple[tuple[str, tuple[str, ...]], ...] = ()


def function_path(root: Path, bdf: str) -> Path:
    """The sysfs directory of PCI function ``bdf``."""
    return root / "sys/bus/pci/devices" / bdf


def read_override(root: Path, bdf: str) -> str | None:
    """The driver_override of ``bdf``; None for none. Raises Unreadable."""
    text = (optional_text(function_path(root, bdf) / "driver_override") or "").strip()
    return None if text in _NO_SERIALS else text


def read_driver(root: Path, bdf: str) -> str | None:
    """The driver that has ``bdf``; None for none. Raises Unreadable."""
    return optional_link_name(function_path(root, bdf) / "driver")


def read_serial(root: Path, bdf: str) -> str | None:
    """The drive's serial; None where the kernel does not drive it. Raises Unreadable."""
    return _controller_text(root, bdf, "serial")


def _controller_text(root: Path, bdf: str, name: str) -> str | None:
    base = function_path(root, bdf) / "nvme"
    texts = {(optional_text(base / entry / name) or "").strip() for entry in listing(base)}
    return texts.pop() or None if len(texts) == 1 else None


class _Collector:
    """Collects reasons; what cannot be read becomes a reason as well."""

    def __init__(self) -> None:
        self.reasons: list[Reason] = []

    def __call__(self, collect: Callable[[], Iterable[Reason]]) -> None:
        try:
            # One by one, to keep what was found before an error.
            for reason in collect():
                if reason not in self.reasons:
                    self.reasons.append(reason)
        except ToolMissing as error:
            self.reasons.append(Reason(Code.TOOL_MISSING, f"{error} is not installed"))
        except (Unreadable, OSError, ValueError) as error:
            self.reasons.append(Reason(Code.UNREADABLE, str(error)))

    @property
    def in_use(self) -> bool:
        return any(reason.code in USE_CODES for reason in self.reasons)


def read_facts(
    root: Path,
    kernel: Kernel,
    bdf: str,
    *,
    claimed: bool = False,
    seen: Sightings | None = None,
) -> Facts:
    """Looks at ``bdf``. Nothing is written, and a drive in use is not even opened.

    Args:
        root: the folder that stands for ``/``.
        kernel: what answers beyond files.
        bdf: PCI address of the function.
        claimed: this process already holds the exclusive claims, so they are not tried.
        seen: what processes have open, if it was read before for several drives; otherwise it is
            read now, which takes seconds.
    """
    function = function_path(root, bdf)
    try:
        inode = os.stat(function).st_ino
    except OSError:
        return Facts(bdf, present=False)
    collect = _Collector()
    if not kernel.is_root():
        collect.reasons.append(Reason(Code.NOT_ROOT, "only root can see what every process uses"))
    collect(lambda: check_host(root))
    fields: dict[str, object] = {}
    collect(lambda: _read_identity(root, bdf, fields))
    collect(lambda: _read_isolation(root, kernel, bdf, fields))
    contents: list[Contents] = []
    seen = seen or Sightings(root, kernel)
    collect(lambda: _look_inside(root, kernel, bdf, fields, collect, contents, claimed, seen))
    return Facts(
        bdf,
        present=True,
        inode=inode,
        reasons=tuple(collect.reasons),
        contents=contents[0] if contents else None,
        **fields,  # type: ignore[arg-type]
    )


def _read_identity(root: Path, bdf: str, fields: dict[str, object]) -> Iterable[Reason]:
    # One by one, so that what is readable is known even if something is not.
    fields["pci_class"] = required_text(function_path(root, bdf) / "class")
    fields["driver"] = read_driver(root, bdf)
    fields["serial"] = read_serial(root, bdf)
    fields["model"] = _controller_text(root, bdf, "model")
    fields["state"] = _controller_text(root, bdf, "state")
    fields["override"] = read_override(root, bdf)
    virtual = optional_text(function_path(root, bdf) / "sriov_numvfs")
    fields["virtual_functions"] = int((virtual or "0").strip())
    return ()


def _read_isolation(
    root: Path, kernel: Kernel, bdf: str, fields: dict[str, object]
) -> Iterable[Reason]:
    fields["group"] = group = optional_link_name(function_path(root, bdf) / "iommu_group")
    if group is not None:
        folder = root / "sys/kernel/iommu_groups" / group
        fields["members"] = listing(folder / "devices")
        fields["group_kind"] = (optional_text(folder / "name") or "").strip() or None
    release = required_text(root / "proc/sys/kernel/osrelease")
    fields["vfio"] = vfio = vfio_pci_state(root, release)
    if vfio == "available" and not kernel.has_tool("modprobe"):
        raise ToolMissing("modprobe")
    return ()


def _look_inside(
    root: Path,
    kernel: Kernel,
    bdf: str,
    fields: dict[str, object],
    collect: _Collector,
    contents: list[Contents],
    claimed: bool,
    seen: Sightings,
) -> Iterable[Reason]:
    if fields.get("driver") != "nvme":
        return ()
    stack = read_stack(root, bdf)
    fields["controllers"] = stack.controllers
    fields["disks"] = stack.disks
    fields["writes"] = tuple(writes_completed(root, stack).items())
    fields["other_paths"] = _other_paths(root, stack)
    serial = fields.get("serial")
    serial = serial if isinstance(serial, str) else None
    collect(lambda: check_usage(root, kernel, stack, seen))
    collect(lambda: check_references(root, kernel, stack, serial, Contents()))
    if not claimed and not collect.in_use and kernel.is_root():
        collect(lambda: _try_claims(root, kernel, stack))
    if collect.in_use or not kernel.is_root():
        return ()
    contents.append(read_contents(root, kernel, stack))
    # Once more, with the UUIDs and labels that were found.
    collect(lambda: check_references(root, kernel, stack, serial, contents[0]))
    return contents[0].boot


def _try_claims(root: Path, kernel: Kernel, stack: Stack) -> Iterable[Reason]:
    with claim(root, kernel, stack.disks) as claims:
        return claims.refusals


def _other_paths(root: Path, stack: Stack) -> tuple[str, ...]:
    """Controllers of the same subsystem, through which the kernel would keep using the drive."""
    base = root / "sys/class/nvme-subsystem"
    found: set[str] = set()
    seen: set[str] = set()
    for subsystem in listing(base):
        controllers = {n for n in listing(base / subsystem) if re.fullmatch(r"nvme\d+", n)}
        if controllers & set(stack.controllers):
            found |= controllers
            seen |= controllers & set(stack.controllers)
    if seen != set(stack.controllers):
        missing = ", ".join(sorted(set(stack.controllers) - seen))
        raise Unreadable(f"{base}: does not show the subsystem of {missing}")
    return tuple(sorted(found - set(stack.controllers)))
