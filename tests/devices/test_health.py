"""A drive's health log is read by its layout, and what has none is no NVMe drive."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from spdk_kv.devices import read_health
from spdk_kv.devices.health import Health, controller_of, parse_health


def log_of(**fields: int) -> bytes:
    """A log page with bytes at their places in the specification's table."""
    places = {
        "warning": (0, 1),
        "spare": (3, 1),
        "used": (5, 1),
        "units_read": (32, 16),
        "units_written": (48, 16),
        "power_on_hours": (128, 16),
        "media_errors": (160, 16),
    }
    log = bytearray(512)
    for name, value in fields.items():
        begin, nbytes = places[name]
        log[begin : begin + nbytes] = value.to_bytes(nbytes, "little")
    return bytes(log)


def test_the_fields_lie_where_the_specification_has_them() -> None:
    log = log_of(
        spare=97, used=104, units_read=3, units_written=1 << 40, power_on_hours=8765, media_errors=2
    )
    assert parse_health(log) == Health(
        used=1.04,
        spare=0.97,
        written_nbytes=512_000 << 40,
        read_nbytes=1_536_000,
        power_on_hours=8765,
        media_errors=2,
        is_critical=False,
    )
    assert parse_health(log_of(warning=4)).is_critical


@pytest.mark.parametrize(
    ("where", "controller"),
    [
        ("sys/devices/pci0000:00/0000:01:00.0/nvme/nvme3/nvme3n1/nvme3n1p2", "nvme3"),
        ("sys/devices/virtual/nvme-subsystem/nvme-subsys1/nvme1n1", "nvme4"),
        ("sys/devices/virtual/block/loop0", None),
    ],
)
def test_the_controller_is_found_from_a_file_on_it(
    tmp_path: Path, where: str, controller: str | None
) -> None:
    device = os.stat(tmp_path).st_dev
    link = tmp_path / f"sys/dev/block/{os.major(device)}:{os.minor(device)}"
    link.parent.mkdir(parents=True)
    (tmp_path / where).mkdir(parents=True)
    link.symlink_to(tmp_path / where)
    # A subsystem has its namespaces and its controllers side by side.
    (tmp_path / "sys/devices/virtual/nvme-subsystem/nvme-subsys1/nvme4").mkdir(
        parents=True, exist_ok=True
    )
    assert controller_of(tmp_path, tmp_path) == controller


def test_what_is_on_no_nvme_drive_has_no_health(tmp_path: Path) -> None:
    assert read_health("/proc/self/stat") is None
    assert read_health(tmp_path / "missing") is None
    assert read_health("/dev/null") is None
