"""``spdk-kv bench``: the measurements, each in a module of its own."""

from __future__ import annotations

from spdk_kv.cli.lazy import LazyGroup

bench = LazyGroup(
    "bench",
    commands_at={
        "decode": (
            "spdk_kv.cli.bench.decode:bench_decode",
            "Which path to the drive decodes fastest at which memory budget.",
        ),
        "io": ("spdk_kv.cli.bench.io:bench_io", "What an engine gets out of a drive."),
    },
    help="Measure a drive, an engine or a policy.",
)
