"""The health log of a drive that the kernel drives."""

from __future__ import annotations

from lab.binding_script import node


def test_a_drive_says_how_worn_it_is(lab):
    before, after = lab.script("health", node(lab, "LAB-N0"))
    assert before["used"] == 0
    assert not before["is_critical"]
    # Counted in thousands of 512 bytes, of reads that the kernel rounds up.
    assert after["read_nbytes"] - before["read_nbytes"] >= (4 << 20) - 512_000
    assert after["written_nbytes"] >= before["written_nbytes"]
