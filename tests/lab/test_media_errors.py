"""A drive that lost some blocks: a typed error for them, and all others as they were."""

from __future__ import annotations

from lab.conftest import BAD_BLOCKS


def test_lost_blocks_are_read_errors_and_their_neighbours_are_intact(lab):
    told = lab.script("failing_blocks", "LAB-BAD", *BAD_BLOCKS)
    for place in ("lost", "across"):
        assert told[place]["kind"] == "DeviceError"
        assert told[place]["op"] == "read"
        # NVM Command Set: status code type 2h, status code 81h.
        assert "Unrecovered Read Error" in told[place]["text"]
        assert told[place]["status"] == 0x281
    assert told["lost"]["offset"] == BAD_BLOCKS[0] * 512
    # The failed command is one of 64 KiB.
    assert told["across"]["offset"] == BAD_BLOCKS[0] * 512 // 65536 * 65536
    for place in ("before", "after", "between"):
        assert told[place] == {"kind": "same"}
    assert not told["gone"]
