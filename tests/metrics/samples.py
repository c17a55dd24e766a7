"""Samples for tests: numbers that are all different."""

from __future__ import annotations

from itertools import count
from typing import Any

from spdk_kv.metrics import OPERATIONS, Operation, Path, Sample
from spdk_kv.metrics.names import HELD


def sample(**changes: Any) -> Sample:
    """A sample of a store with two paths; ``changes`` are fields of it."""
    number = count(1)

    def operation() -> Operation:
        return Operation(
            ios=6,
            nbytes=next(number),
            latency_ns=next(number),
            transfers=3,
            errors=next(number),
            took_ns=next(number),
            latency={1 << 14: 1, (1 << 14) + (1 << 12): 2, 1 << 40: 3},
            took={1 << 20: 3},
        )

    def path(engine: str) -> Path:
        return Path(
            engine=engine,
            depth=next(number),
            deepest=next(number),
            depth_reached=next(number) + 0.5,
            busy_ns=next(number),
            cpu_ns=next(number),
            bounced_nbytes=next(number),
            units=next(number),
            units_nbytes=next(number),
            ops={name: operation() for name in OPERATIONS},
        )

    fields: dict[str, Any] = {
        "store": "file:///var/cache/kv",
        "time_s": 1e9,
        "clock_s": 50.0,
        "opened_s": 1e9 - 100,
        "cpu_ns": 3_000_000_000,
        "held": {each.field: next(number) for each in HELD},
        "paths": {"direct": path("uring"), "page_cache": path("pagecache")},
        "sequences": (
            {
                "name": "sequence 'one'",
                "units": 8,
                "cached_units": 4,
                "nbytes": 800,
                "cached_nbytes": 400,
                "read_nbytes": 3000,
                "written_nbytes": 800,
            },
        ),
    }
    return Sample(**{**fields, **changes})
