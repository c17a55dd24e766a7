"""``spdk-kv bench``: a group of measurements, each in a module of its own."""

from __future__ import annotations

from spdk_kv.cli.lazy import LazyGroup

bench = LazyGroup(
    "bench",
    commands_at={
        "decode": (
            "spdk_kv.cli.bench.decode:bench_decode",
            "Find the path that decodes fastest at a memory budget.",
        ),
        "io": ("spdk_kv.cli.bench.io:bench_io", "Measure an engine on a drive."),
    },
    help="Measure a drive, an engine or a policy.",
)
