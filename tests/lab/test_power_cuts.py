"""Power fails while a store is at work: what was flushed is there, and no byte is another one."""

from __future__ import annotations

CUTS = 24


def test_a_store_survives_power_cuts(lab):
    told = lab.script("power_cuts", "LAB-POWER", "/run/lab/power.log", CUTS)
    assert told["cuts"] == CUTS
    # The cuts fell where they say something: into a store at work, and between its flushes.
    assert told["begun"] > CUTS // 2, told
    assert told["flushes"] >= 10, told
    assert told["notes"] >= 5, told
    assert told["unflushed"] > CUTS, told
