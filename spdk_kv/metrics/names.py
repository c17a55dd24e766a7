"""What each number of a sample is called in Prometheus, and what it says.

All names begin with ``spdk_kv_``; counters end in ``_total``; times are in seconds and sizes in
bytes. A number that is new is a line here, and a value in ``Sample.held`` (for one of the store as
a whole) or a field of :class:`Path` or :class:`Operation`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

PREFIX = "spdk_kv_"
STORE_LABELS = ("store",)
PATH_LABELS = ("store", "path")
OPERATION_LABELS = ("store", "path", "op")


@dataclass(frozen=True)
class Number:
    """``field``: its name in the sample. ``name``: without prefix and ``_total``. ``per``: by what
    it is divided for Prometheus, such as the nanoseconds of a second."""

    field: str
    name: str
    kind: Literal["counter", "gauge", "histogram"]
    help: str
    per: int = 1


_NS = 1_000_000_000

# Of the store as a whole: keys of `Sample.held`.
HELD = (
    Number("hits", "hits", "counter", "Keys that gets found."),
    Number("misses", "misses", "counter", "Keys that gets did not find."),
    Number("evictions", "evictions", "counter", "Blobs and sequences forgotten to make room."),
    Number(
        "corruptions",
        "corruptions",
        "counter",
        "Blobs and layers found damaged. They are never given out.",
    ),
    Number("capacity_nbytes", "capacity_bytes", "gauge", "Room for tensors."),
    Number("used_nbytes", "used_bytes", "gauge", "Room in use."),
    Number("largest_free_nbytes", "largest_free_bytes", "gauge", "The longest free run."),
    Number("blobs", "blobs", "gauge", "Blobs stored."),
    Number("sequences", "sequences", "gauge", "Sequences stored or in use."),
    Number(
        "discarded_nbytes",
        "discarded_bytes",
        "counter",
        "Free space given back to the filesystem or the drive.",
    ),
    Number(
        "failed_background_flushes", "failed_flushes", "counter", "Background flushes that failed."
    ),
    Number("staging_leased_nbytes", "staging_leased_bytes", "gauge", "Staging memory in use."),
    Number("staging_free_nbytes", "staging_free_bytes", "gauge", "Idle staging memory."),
    Number(
        "budget_nbytes",
        "page_cache_budget_bytes",
        "gauge",
        "What the page cache may hold of layers, by the last decision.",
    ),
    Number(
        "available_nbytes",
        "available_memory_bytes",
        "gauge",
        "Memory that was available at the last decision.",
    ),
    Number("decisions", "decisions", "counter", "Decisions on which path units are."),
    Number("promotions", "promotions", "counter", "Units moved to the page cache."),
    Number("demotions", "demotions", "counter", "Units moved out of the page cache."),
    Number(
        "cached_read_nbytes",
        "page_cache_read_bytes",
        "counter",
        "Bytes of sequences read through the page cache.",
    ),
    Number(
        "filled_nbytes",
        "page_cache_filled_bytes",
        "counter",
        "The part of them that was read for the first time.",
    ),
    Number(
        "missed_nbytes",
        "page_cache_missed_bytes",
        "counter",
        "The part of them that the kernel had dropped meanwhile.",
    ),
    Number(
        "taken_over_nbytes",
        "taken_over_bytes",
        "counter",
        "Bytes that one path failed to deliver and the other one did.",
    ),
    Number(
        "write_budget_nbytes",
        "write_budget_bytes",
        "gauge",
        "What may be written in each period of the write budget.",
    ),
    Number(
        "write_budget_period_s",
        "write_budget_period_seconds",
        "gauge",
        "The length of those periods.",
    ),
    Number(
        "write_budget_left_nbytes",
        "write_budget_left_bytes",
        "gauge",
        "What may be written at once just now; below 0 after a write that was larger.",
    ),
    Number(
        "declined_writes",
        "declined_writes",
        "counter",
        "Writes that the budget did not admit.",
    ),
)

# Of each path: fields of `Path`.
PATH = (
    Number("depth", "depth_target", "gauge", "Commands that are to be in flight."),
    Number("deepest", "depth_most", "gauge", "The most commands that were in flight at once."),
    Number(
        "depth_reached",
        "depth_reached",
        "gauge",
        "Commands in flight on average while there were any, since the store was opened.",
    ),
    Number("busy_ns", "busy_seconds", "counter", "Time with a command in flight.", _NS),
    Number(
        "cpu_ns",
        "cpu_seconds",
        "counter",
        "CPU time of the threads that drive the queue; callers that drive it are not in it.",
        _NS,
    ),
    Number("bounced_nbytes", "bounced_bytes", "counter", "Bytes copied for want of alignment."),
    Number("units", "units", "gauge", "Units (a layer's K or V) of sequences on this path."),
    Number("units_nbytes", "unit_bytes", "gauge", "Bytes of those units."),
)

# Of each path and operation: fields of `Operation`. A histogram has its sum in another field.
OPERATION = (
    Number("nbytes", "io_bytes", "counter", "Bytes moved by the drive, or by the page cache."),
    Number("errors", "transfer_errors", "counter", "Transfers that failed."),
    Number("latency", "command_seconds", "histogram", "Time of a command to the drive.", _NS),
    Number(
        "took",
        "transfer_seconds",
        "histogram",
        "Time of a transfer (any number of commands), from submission to end.",
        _NS,
    ),
)
SUMS = {"latency": "latency_ns", "took": "took_ns"}

# What is no field: the state of the watching, and of the process that has the store open.
UP = Number("up", "up", "gauge", "Whether a process has the store open and tells what it counts.")
ENGINE = Number("engine", "engine", "gauge", "The engine of a path.")
PROCESS = (
    Number(
        "cpu_ns", "process_cpu_seconds", "counter", "CPU time of the process with the store.", _NS
    ),
    Number("opened_s", "opened_timestamp_seconds", "gauge", "When the store was opened."),
    Number("time_s", "sampled_timestamp_seconds", "gauge", "When these numbers were taken."),
)
