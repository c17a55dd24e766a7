"""What forks, growth and many stored sequences cost.

    python bench/sequences.py --dir DIR [--json FILE]

A sequence of 1 GiB (32 layers of 8 KV heads of 128, bfloat16) is forked; the same tokens are read
from one that grew token by token and from one that had its room from the beginning, in turn; and
sequences of 1,000 tokens are stored by the thousand. Nothing here is a transfer of its own: compare
ratios, and times with what they are asked to be.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import tempfile
import time
from pathlib import Path

import torch

import machine
import record
import spdk_kv
from record import Figure, Target, figure
from spdk_kv.units import MIB

LARGE = spdk_kv.KVShape(32, 8, 128, torch.bfloat16)
TOKENS = 8192
SMALL = spdk_kv.KVShape(30, 3, 64, torch.bfloat16)  # SmolLM2-135M


def memory_nbytes() -> int:
    """Resident memory of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def forked(
    parent: spdk_kv.Sequence, tokens: int | None, count: int
) -> tuple[float, list[spdk_kv.Sequence]]:
    """The seconds that so many forks take, and those."""
    began = time.perf_counter()
    made = [parent.fork(tokens=tokens) for _ in range(count)]
    return time.perf_counter() - began, made


def block(shape: spdk_kv.KVShape, tokens: int) -> torch.Tensor:
    return torch.randn(1, shape.kv_heads, tokens, shape.head_dim).to(torch.bfloat16)


def forks(store: spdk_kv.KVStore, rounds: int) -> list[Figure]:
    """Forks of 1 GiB at its end, and of the beginning of it."""
    parent = store.sequence("parent", LARGE, temporary=True)
    k = block(LARGE, TOKENS + 5)
    for layer in range(LARGE.layers):
        parent.append(layer, k, k)
        parent.settle(layer)
    found = []
    for what, tokens in (("at its end", None), ("amid a chunk", TOKENS // 2 + 3)):
        first, one, many, held = [], [], [], []
        for _ in range(rounds):
            # Another place each time, so that its chunk is not known yet.
            place = None if tokens is None else tokens - len(first)
            took, begun = forked(parent, place, 1)
            first.append(1e3 * took)
            took, others = forked(parent, place, 1)
            one.append(1e3 * took)
            gc.collect()
            before = memory_nbytes()
            took, rest = forked(parent, place, 1000)
            many.append(took)
            held.append((memory_nbytes() - before) / MIB)
            for each in (*begun, *others, *rest):
                each.delete()
        found += [
            figure(f"first fork of 1 GiB {what}", first, "ms", Target("at most", 5)),
            figure(f"another fork {what}", one, "ms", Target("at most", 5)),
            figure(f"1,000 forks {what}", many, "s", Target("at most", 1)),
            figure(f"memory of 1,000 forks {what}", held, "MiB", Target("at most", 50)),
        ]
    parent.delete()
    return found


def growth(store: spdk_kv.KVStore, rounds: int, path: str) -> list[Figure]:
    """Reads of what grew token by token, over those of one piece."""
    layers, tokens = 2, 16384
    shape = spdk_kv.KVShape(layers, 8, 128, torch.bfloat16)
    fixed = spdk_kv.KVShape(layers, 8, 128, torch.bfloat16, tokens)
    grown = store.sequence("grown", shape, temporary=True)
    whole = store.sequence("whole", fixed, temporary=True)
    k = block(shape, 1)
    for layer in range(layers):
        for _ in range(tokens):
            for sequence in (grown, whole):  # or the kernel would cache the one in larger parts
                sequence.append(layer, k, k)
    for sequence in (grown, whole):
        sequence.read_ahead = False
        for layer in range(layers):
            sequence.settle(layer)
            sequence.read(layer)

    def scan(sequence: spdk_kv.Sequence) -> float:
        began = time.perf_counter()
        for layer in range(layers):
            sequence.read(layer)
        return time.perf_counter() - began

    ratios = []
    for number in range(10 * rounds):
        order = (grown, whole) if number % 2 else (whole, grown)
        took = {sequence: scan(sequence) for sequence in order}
        ratios.append(took[grown] / took[whole])
    pieces = len(grown._growth.pieces)
    for sequence in (grown, whole):
        sequence.delete()
    middle = sorted(ratios)[len(ratios) // 4 : -(len(ratios) // 4)]
    return [
        Figure(
            f"reading a layer of {pieces} pieces, {path}",
            statistics.median(ratios),
            "of one piece",
            min(middle),
            max(middle),
            Target("at most", 1.03),
        )
    ]


def stored(store: spdk_kv.KVStore, count: int) -> list[Figure]:
    """Memory of sequences that are stored and that nobody uses."""
    k = block(SMALL, 1000)
    base = store.sequence("base", SMALL)
    for layer in range(SMALL.layers):
        base.append(layer, k, k)
    before = 0
    for number in range(2 * count):
        base.fork(f"{number:032x}").note = bytes(4000)
        if number % 100 == 99 or number == 2 * count - 1:
            store.flush()
        if number == count - 1:  # what all have in common is there
            gc.collect()
            before = memory_nbytes()
    gc.collect()
    each = (memory_nbytes() - before) / count
    return [
        figure(
            f"memory of each of {count:,} stored sequences",
            [each / 1024],
            "KiB",
            Target("at most", 1),
        )
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--dir", type=Path, required=True, help="a folder on the drive")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--stored", type=int, default=1000, help="sequences to store")
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep the record there")
    words = parser.parse_args()
    lines = machine.describe(words.dir, "")
    found: list[Figure] = []
    with tempfile.TemporaryDirectory(prefix=".sequences-", dir=words.dir) as folder:
        for name, measure in (
            ("forks", lambda store: forks(store, words.rounds)),
            ("direct", lambda store: growth(store, words.rounds, "past the page cache")),
            ("pagecache", lambda store: growth(store, words.rounds, "through the page cache")),
            ("stored", lambda store: stored(store, words.stored)),
        ):
            place = Path(folder) / name
            policy = name if name in ("direct", "pagecache") else "adaptive"
            with spdk_kv.open(
                place,
                capacity="4 GiB",
                flush_interval_s=None,
                page_cache=spdk_kv.PageCacheOptions(policy=policy),
            ) as store:
                found += measure(store)
    for one in found:
        spread = "" if one.low is None else f" ({one.low:.3g} to {one.high:.3g})"
        print(f"{one.what}: {one.value:.3g}{spread} {one.unit} {one.verdict}")
    if words.json:
        method = f"{words.rounds} rounds; forks are deleted after each"
        label = machine.label(words.dir)
        record.write(words.json, [record.today("sequences", label, lines, method, found)])


if __name__ == "__main__":
    main()
