"""How often a test repeats what it does: a few times by default, many in the long suite."""

from __future__ import annotations

import os

# Set by scripts/test.sh --long.
LONG = os.environ.get("SPDK_KV_LONG") == "1"


def rounds(default: int, long: int) -> int:
    return long if LONG else default


def examples(default: int) -> int:
    """A test's examples or a state machine's runs: ten times as many in the long suite."""
    return rounds(default, 10 * default)
