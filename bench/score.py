"""What choosing tokens costs: scores from 2-bit codes, log-probabilities and the best groups.

    python bench/score.py [--tokens 32768] [--group 4] [--share 0.075] [--rounds 15]
                          [--implementation avx2|portable] [--json FILE]

One thread does what a decode step does in each layer: it scores the queries of every KV head
against its codes, makes log-probabilities of the scores, and takes the best groups. The codes are
noise; none of the kernels takes a time that depends on them. Each layer has codes of its own, so
that they come from memory as in a real step. The figure is the median of the rounds, in seconds of
the thread; copying a selection is what `gather` costs for bf16 K and V of the groups taken.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import machine
from spdk_kv._native import score as native


@dataclass(frozen=True)
class Shape:
    """A model's attention."""

    name: str
    layers: int
    heads: int
    kv_heads: int
    dim: int


SHAPES = (Shape("135M", 30, 9, 3, 64), Shape("8B", 32, 32, 8, 128))
STEPS = ("score", "softmax_max", "top_groups", "gather")


class Step:
    """The codes of a model and the arrays of one decode step."""

    def __init__(self, shape: Shape, tokens: int, group: int, share: float, name: str) -> None:
        rng = np.random.default_rng(0)
        per_layer = (shape.layers, shape.kv_heads, tokens)
        self.shape, self.group, self.name = shape, group, name
        self.codes = rng.integers(0, 256, (*per_layer, shape.dim // 4), np.uint8)
        self.scales = rng.random(per_layer, np.float32) / shape.dim
        self.signs = rng.choice([np.float32(-1), np.float32(1)], shape.dim)
        per_kv_head = (shape.kv_heads, shape.heads // shape.kv_heads)
        self.queries = rng.standard_normal((*per_kv_head, shape.dim), np.float32)
        self.scores = np.empty((*per_kv_head, tokens), np.float32)
        groups = -(-tokens // group)
        self.best = np.empty(groups, np.float32)
        self.top = np.empty(round(share * groups), np.int64)
        self.piece_nbytes = 2 * 2 * group * shape.kv_heads * shape.dim
        self.kept = np.zeros(groups * self.piece_nbytes, np.uint8)
        self.target = np.empty(len(self.top) * self.piece_nbytes, np.uint8)

    def layer(self, number: int) -> tuple[Callable[[], None], ...]:
        """What one layer does, in the order of STEPS."""
        codes, scales = self.codes[number], self.scales[number]
        by_head = self.scores.reshape(self.shape.heads, -1)

        def score() -> None:
            for kv_head, queries in enumerate(self.queries):
                out = self.scores[kv_head]
                native.score(queries, self.signs, codes[kv_head], scales[kv_head], out, self.name)

        def gather() -> None:
            native.gather(self.kept, self.top * self.piece_nbytes, self.piece_nbytes, self.target)

        return (
            score,
            lambda: native.softmax_max(by_head, self.group, self.best, self.name),
            lambda: native.top_groups(self.best, len(self.top), self.top, self.name),
            gather,
        )

    def run(self) -> list[float]:
        """Seconds of this thread in one decode step, by STEPS."""
        took = [0.0] * len(STEPS)
        for number in range(self.shape.layers):
            for part, call in enumerate(self.layer(number)):
                began = time.thread_time()
                call()
                took[part] += time.thread_time() - began
        return took


def measure(step: Step, rounds: int) -> dict[str, object]:
    step.run()
    runs = [step.run() for _ in range(rounds)]
    shape, tokens = step.shape, step.scores.shape[-1]
    took = {part: statistics.median(run[at] for run in runs) for at, part in enumerate(STEPS)}
    choosing = [sum(run[:3]) for run in runs]
    return {
        "shape": shape.name,
        "tokens": tokens,
        "implementation": step.name,
        "step_ms": {part: seconds * 1e3 for part, seconds in took.items()},
        "choosing_ms": [one * 1e3 for one in (statistics.median(choosing), min(choosing))],
        "score_ns_per_pair": took["score"] * 1e9 / (shape.layers * shape.heads * tokens),
        "encode_ns_per_key": encoding_ns(shape, step.name, rounds),
    }


def encoding_ns(shape: Shape, name: str, rounds: int) -> float:
    """The codes of a prompt's keys, per token and KV head."""
    keys = np.random.default_rng(0).standard_normal((4096, shape.dim), np.float32)
    signs, mean = np.ones(shape.dim, np.float32), np.zeros(shape.dim, np.float32)
    codes, scales = np.empty((4096, shape.dim // 4), np.uint8), np.empty(4096, np.float32)
    took = []
    for _ in range(rounds):
        began = time.thread_time()
        native.encode(keys, mean, signs, codes, scales, name)
        took.append(time.thread_time() - began)
    return statistics.median(took) * 1e9 / len(keys)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--group", type=int, default=4, help="tokens of a group")
    parser.add_argument("--share", type=float, default=0.075, help="of the groups that are taken")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--implementation", default=native.implementation())
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    given = parser.parse_args()
    lines = machine.describe(None, "no yardstick")
    print(*lines, sep="\n")
    found = []
    for shape in SHAPES:
        step = Step(shape, given.tokens, given.group, given.share, given.implementation)
        one = measure(step, given.rounds)
        parts = ", ".join(f"{part} {ms:.2f}" for part, ms in one["step_ms"].items())
        median, least = one["choosing_ms"]
        print(
            f"{shape.name}, {given.tokens} tokens, {given.implementation}: "
            f"choosing {median:.2f} ms per step (at least {least:.2f}); {parts} ms; "
            f"{one['score_ns_per_pair']:.3f} ns per query and key; "
            f"encoding {one['encode_ns_per_key']:.0f} ns per key"
        )
        found.append(one)
    if given.json:
        given.json.write_text(json.dumps({"machine": lines, "runs": found}, indent=2) + "\n")


if __name__ == "__main__":
    main()
