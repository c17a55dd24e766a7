"""The figures of a run that have a target, for bench/results."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from variants import SHARE
from ways import SHAPE_8B

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from record import Figure, Target

Row = dict[str, Any]
SELECTED = 400


def figures(rows: Sequence[Row]) -> list[Figure]:
    """Of whatever parts ``rows`` have. Speeds are those of the smallest batch."""
    return [*_quality(rows), *_speed(rows), *_step(rows)]


def _quality(rows: Sequence[Row]) -> Iterator[Figure]:
    found = {(row["selector"], row["share"]): row for row in rows if row["part"] == "quality"}
    codes = found.get(("codes", SHARE))
    if codes is None:
        return
    at = f"{SHARE:.1%} of the tokens"
    yield Figure(
        f"worst task, {at}", codes["worst_loss_points"], "points lost", target=Target("at most", 2)
    )
    yield Figure(f"KL to dense, {at}", codes["kl"], "nats", target=Target("at most", 0.05))
    if kvswap := found.get(("kvswap", SHARE)):
        yield Figure(f"worst task, {at}, kvswap", kvswap["worst_loss_points"], "points lost")
    for pool, wanted in (("2", Target("at most", 13)), ("4", None)):
        read = codes["miss_rate_of_pools"][pool] * SELECTED * SHAPE_8B.token_nbytes / (1 << 20)
        what = f"read per token, 8B shape, {SELECTED} tokens, these misses, pool of {pool} times"
        yield Figure(what, read, "MiB", target=wanted)


def _speed(rows: Sequence[Row]) -> Iterator[Figure]:
    speeds = [row for row in rows if row["part"] == "speed"]
    batch = min((row["batch"] for row in speeds), default=0)
    found = {
        (row["variant"], row["drive"], row["compute"]): row
        for row in speeds
        if row["batch"] == batch
    }

    def ratio(what: str, one: tuple[str, ...], other: tuple[str, ...], least: float) -> Figure:
        ours, theirs = found[one], found[other]  # type: ignore[index]
        return Figure(
            what,
            ours["tokens_per_s"] / theirs["tokens_per_s"],
            "times",
            ours["lowest_tokens_per_s"] / theirs["tokens_per_s"],
            ours["highest_tokens_per_s"] / theirs["tokens_per_s"],
            Target("at least", least),
        )

    widest = max((one for one, *_ in found if one.startswith("kvswap")), key=_tokens, default=None)
    drives = [drive for one, drive, compute in found if (one, compute) == ("codes", "emulated")]
    for drive in drives:
        ours = ("codes", drive, "emulated")
        if drive != "unthrottled":
            yield ratio(f"codes, {drive}: of full reads", ours, ("full", *ours[1:]), 3.5)
            if widest is not None:
                what = f"codes, {drive}: of {widest}"
                yield ratio(what, ours, (widest, *ours[1:]), 1.8)
        memory = ("codes in memory", "memory", "emulated")
        yield ratio(f"codes, {drive}: of the same from memory", ours, memory, 0.9)
    for drive in drives:
        real = ("codes", drive, "real")
        dense = ("dense in memory", "memory", "real")
        yield ratio(f"codes, {drive}, real compute: of dense in memory", real, dense, 1)
    if drives:
        held = found[real]["memory_nbytes"] / found[dense]["memory_nbytes"]
        yield Figure(
            "memory, of dense in memory", held, "of its bytes", target=Target("at most", 0.1)
        )


def _step(rows: Sequence[Row]) -> Iterator[Figure]:
    found = {row["variant"]: row for row in rows if row["part"] == "step"}
    if not found:
        return
    part, dense = found["a part"], found["dense in memory"]
    model = f"135M at {part['tokens'] // 1024}K tokens"
    yield Figure(
        f"{model}: selecting, of a step",
        part["select_s"] / part["step_s"],
        "of its time",
        target=Target("at most", 0.15),
    )
    yield Figure(
        f"{model}: a part from the drive, of dense in memory",
        dense["step_s"] / part["step_s"],
        "times as fast",
        dense["step_s"] / part["highest_step_s"],
        dense["step_s"] / part["lowest_step_s"],
        Target("at least", 1),
    )
    yield Figure(
        f"{model}: memory, of dense in memory",
        part["memory_nbytes"] / dense["memory_nbytes"],
        "of its bytes",
        target=Target("at most", 0.1),
    )


def _tokens(variant: str) -> int:
    """Of a name as ``kvswap 400``."""
    return int(variant.rsplit(" ", 1)[1])
