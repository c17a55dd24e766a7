"""How the doctor's report looks at several widths, also with a name as long as a URI."""

from __future__ import annotations

import re
import sys

import pytest

from spdk_kv.cli.doctor.checks import Check, check_io_uring
from spdk_kv.cli.doctor.command import _lines
from spdk_kv.devices.io_uring import IoUringStatus, judge_features
from support.terminal import run_on_terminal

URI = "spdk+vfiouser:///run/no-such-folder/nqn.2026-11.org.example:drive-of-the-machine-room/1"
FOUND = "a model of some length, serial 1234567890, 3.5 TiB, blocks of 4096 bytes, " * 3
REPORT = [
    Check("memory", "ok", "15.2 GiB available, no cgroup limit"),
    Check("nvme 0000:01:00.0", "info", FOUND),
    Check(URI, "ok", FOUND),
]


@pytest.mark.parametrize("width", [80, 120])
def test_a_long_name_leaves_the_findings_their_width(width: int) -> None:
    lines = [(check.name, line.text) for check, line in _lines(REPORT, width)]
    assert next(text for name, text in lines if name == URI) == URI
    for name, text in lines:
        assert len(text) <= width - 9 or text == URI
        # No narrow column: all but the last line of a check are filled, more or less.
        following = [other for other_name, other in lines if other_name == name]
        if text not in (following[-1], URI):
            assert len(text) > width - 9 - 20
    assert {text[:19] for name, text in lines if name == "memory"} == {"memory             "}


def test_each_check_begins_once_and_ends_once() -> None:
    lines = list(_lines(REPORT, 80))
    for check in REPORT:
        mine = [line for found, line in lines if found is check]
        assert [line.first for line in mine] == [True] + [False] * (len(mine) - 1)
        assert [line.last for line in mine] == [False] * (len(mine) - 1) + [True]
        assert check.name in mine[0].text
        assert " ".join(" ".join(line.text for line in mine).split()).endswith(
            " ".join(check.found.split())
        )


@pytest.mark.parametrize("width", [80, 120])
def test_a_person_sees_the_location_whole_and_the_rest_beside_its_name(width: int) -> None:
    shown = run_on_terminal([sys.executable, "-m", "spdk_kv", "doctor", URI], width)
    lines = re.sub(r"\x1b\[\d*m", "", shown).splitlines()
    place = next(place for place, line in enumerate(lines) if line.endswith(f" {URI}"))
    assert lines[place + 1].startswith(" " * 11)
    assert len(lines[place + 1].strip()) > 30


def test_a_kernel_before_5_11_is_not_good_enough() -> None:
    # What Linux 5.10 answers: everything up to IORING_FEAT_SQPOLL_NONFIXED, but not EXT_ARG.
    old = judge_features(0xFF, None)
    assert (old.available, old.error, old.too_old) == (False, None, True)
    assert "too old" in old.reason
    check = check_io_uring(old)
    assert (check.status, check.remedy) == ("missing", "boot Linux 5.11 or newer")
    assert check_io_uring(IoUringStatus(True, None, 0)).status == "ok"
    assert judge_features(0x3FFF, 0).available
