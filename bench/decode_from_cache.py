"""Decode with everything in the page cache, against DynamicCache, side by side and without a GPU.

    python bench/decode_from_cache.py --dir DIR [--quick] [--rounds N] [--json FILE]

How much of DynamicCache's speed has an OffloadedKVCache as it comes, where memory is plentiful?
Random models of Llama's shape over noise for K and V: `small` has little but attention to compute;
`1B` has layers as large as those of Llama 3.2 1B. Each cache decodes in a process of its own; the
two take turns of a few tokens, and every other round begins with the other one. They must choose
the same tokens.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import machine
import record
from record import Figure, Target, figure

MIB = 1 << 20
OURS, THEIRS = "OffloadedKVCache", "DynamicCache"
SPEED = Target("at least", 0.85)
MEMORY = Target("at most", 1)
# Of our own, beside resident layers and staging.
OWN_NBYTES = 64 * MIB
# Of a prompt that are stored at once.
SLICE_TOKENS = 1024


@dataclass(frozen=True)
class Shape:
    """A model of Llama's kind: sizes as in its configuration."""

    name: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int

    def layer_nbytes(self, tokens: int, dtype: str) -> int:
        """Bytes of K and V of one layer."""
        return 2 * tokens * self.kv_heads * self.head_dim * (2 if dtype == "bfloat16" else 4)


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("small", 512, 1024, 8, 16, 8, 64),
        Shape("small 128", 512, 1024, 4, 16, 8, 128),
        Shape("1B", 2048, 8192, 4, 32, 8, 64),
    )
}


@dataclass(frozen=True)
class Case:
    """One model, and what is in its cache when decoding begins."""

    shape: str
    dtype: str
    tokens: int

    @property
    def text(self) -> str:
        return f"{self.shape}, {self.dtype}, {self.tokens >> 10}K tokens"


CASES = [
    Case(shape, dtype, tokens)
    for shape in SHAPES
    for dtype in ("float32", "bfloat16")
    for tokens in (2048, 4096, 16384)
]
QUICK = [Case("small", dtype, 4096) for dtype in ("float32", "bfloat16")]


# -- one cache, in a process of its own -----------------------------------------------------------


def _model(shape: Shape, dtype: str, most_tokens: int) -> Any:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        max_position_embeddings=most_tokens,
        eos_token_id=None,
        pad_token_id=0,
        initializer_range=0.1,  # so that the tokens differ, and a wrong cache shows
    )
    return LlamaForCausalLM(config).to(getattr(torch, dtype)).eval()


def _fill(cache: Any, shape: Shape, dtype: str, tokens: int) -> None:
    """Noise in the place of a prompt: what is in a cache does not change how fast it is read."""
    import torch

    make, kind = torch.Generator().manual_seed(2), getattr(torch, dtype)
    for at in range(0, tokens, SLICE_TOKENS):
        size = (1, shape.kv_heads, min(SLICE_TOKENS, tokens - at), shape.head_dim)
        for layer in range(shape.layers):
            k, v = (torch.randn(size, generator=make).to(kind) for _ in "kv")
            cache.update(k, v, layer)


def _peak_nbytes(reset: bool = False) -> int:
    """The process's largest resident size so far, or since it was last reset."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) << 10
    raise RuntimeError("/proc/self/status says no VmHWM")


def child(name: str, case: Case, words: argparse.Namespace) -> None:
    """Decodes as many tokens as each line of stdin says, and writes what they took to stdout."""
    import torch
    from transformers import DynamicCache

    import spdk_kv
    from spdk_kv.integrations.transformers import CACHE_ARGUMENT, OffloadedKVCache

    shape = SHAPES[case.shape]
    model = _model(shape, case.dtype, case.tokens + words.most_new)
    staging = max(32 * MIB, 2 * shape.layer_nbytes(case.tokens, case.dtype))
    with ExitStack() as rest, torch.inference_mode():
        model(torch.ones((1, 64), dtype=torch.long))
        before = _peak_nbytes(reset=True)
        cache: Any = DynamicCache(config=model.config)
        if name == OURS:
            options = spdk_kv.EngineOptions(staging=staging)
            store = spdk_kv.open(f"file://{words.dir}/kv", capacity="4 GiB", engine=options)
            rest.enter_context(store)
            cache = rest.enter_context(OffloadedKVCache(store, model.config, **words.cache))
        _fill(cache, shape, case.dtype, case.tokens)
        token = torch.ones((1, 1), dtype=torch.long)
        print(json.dumps({"staging_nbytes": staging}), flush=True)
        for line in sys.stdin:
            steps, chosen = [], []
            spent = time.process_time()
            for _ in range(int(line)):
                begin = time.perf_counter()
                out = model(token, **{CACHE_ARGUMENT: cache})
                token = out.logits[:, -1:].argmax(-1)
                chosen.append(int(token))
                steps.append(time.perf_counter() - begin)
            cpu_s = (time.process_time() - spent) / len(steps)
            found = {"step_s": median(steps), "cpu_s": cpu_s, "tokens": chosen}
            print(json.dumps(found | {"peak_nbytes": _peak_nbytes() - before}), flush=True)


# -- both side by side ----------------------------------------------------------------------------


class Decoder:
    """A process that decodes when it is told to."""

    def __init__(self, name: str, case: Case, folder: str, words: argparse.Namespace) -> None:
        command = [sys.executable, __file__, "--dir", folder, "--run", name]
        command += [case.shape, case.dtype, str(case.tokens), "--cache", json.dumps(words.cache)]
        command += ["--rounds", str(words.rounds), "--new", str(words.new)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.about = self._answer()

    def __enter__(self) -> Decoder:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(60)

    def decode(self, tokens: int) -> dict[str, Any]:
        """What these tokens took. Blocks. RuntimeError if the process ended."""
        assert self._process.stdin is not None
        print(tokens, file=self._process.stdin, flush=True)
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"a cache's process ended with {self._process.wait(60)}")
        found: dict[str, Any] = json.loads(line)
        return found


def measure(case: Case, words: argparse.Namespace) -> dict[str, Any]:
    """All rounds of one case."""
    runs: dict[str, list[dict[str, Any]]] = {OURS: [], THEIRS: []}
    with ExitStack() as rest:
        folder = rest.enter_context(
            tempfile.TemporaryDirectory(prefix=".decode_from_cache-", dir=words.dir)
        )
        both = {name: rest.enter_context(Decoder(name, case, folder, words)) for name in runs}
        # The first scans promote layers to the page cache and bring them there.
        warm = {name: decoder.decode(words.warm)["tokens"] for name, decoder in both.items()}
        for number in range(words.rounds):
            for name in sorted(runs, reverse=bool(number % 2)):
                runs[name].append(both[name].decode(words.new))
        staging = both[OURS].about["staging_nbytes"]
    texts = [[warm[name], *(run.pop("tokens") for run in runs[name])] for name in runs]
    if texts[0] != texts[1]:
        raise RuntimeError(f"{case.text}: the two caches gave different tokens")
    layer = SHAPES[case.shape].layer_nbytes(case.tokens, case.dtype)
    resident = words.cache.get("resident_layers", 2) * layer
    return {"staging_nbytes": staging, "resident_nbytes": resident, "runs": runs}


def figures(case: Case, found: dict[str, Any]) -> list[Figure]:
    """What a case comes to. The ratios are within a round."""
    pairs = list(zip(found["runs"][OURS], found["runs"][THEIRS], strict=True))
    speeds = [theirs["step_s"] / ours["step_s"] for ours, theirs in pairs]
    spent = [ours["cpu_s"] / theirs["cpu_s"] for ours, theirs in pairs]
    peak = max(ours["peak_nbytes"] for ours, _ in pairs)
    allowed = found["staging_nbytes"] + found["resident_nbytes"] + OWN_NBYTES
    return [
        figure(f"{case.text}: tokens/s", speeds, "of DynamicCache", SPEED),
        figure(f"{case.text}: CPU time", spent, "of DynamicCache"),
        figure(f"{case.text}: ms per token", [1e3 * ours["step_s"] for ours, _ in pairs], "ms"),
        figure(
            f"{case.text}: peak memory",
            [peak / allowed],
            "of resident layers, staging and 64 MiB",
            MEMORY,
        ),
        figure(f"{case.text}: peak memory in MiB", [peak / MIB], "MiB"),
        figure(
            f"{case.text}: peak memory of DynamicCache",
            [max(theirs["peak_nbytes"] for _, theirs in pairs) / MIB],
            "MiB",
        ),
    ]


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--dir", type=Path, required=True, help="a folder on the drive")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--new", type=int, default=8, help="tokens decoded in a turn")
    parser.add_argument("--only", default="", metavar="TEXT", help="cases whose name has it")
    parser.add_argument("--quick", action="store_true", help="two cases, few rounds: a look only")
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep the record there")
    parser.add_argument(
        "--cache", type=json.loads, default={}, metavar="JSON", help="arguments of our cache"
    )
    parser.add_argument("--run", nargs=4, help=argparse.SUPPRESS)
    words = parser.parse_args()
    if words.quick:
        words.rounds = 3
    words.warm = 4
    words.most_new = words.warm + words.rounds * words.new
    return words


def main() -> None:
    words = _arguments()
    if words.run:
        name, shape, dtype, tokens = words.run
        child(name, Case(shape, dtype, int(tokens)), words)
        return
    lines = machine.describe(words.dir, "DynamicCache of transformers as installed")
    method = f"{words.rounds} rounds of {words.new} tokens by each, in turn"
    print(*(f"- {line}" for line in [*lines, f"method: {method}"]), "", sep="\n")
    all_figures, runs = [], {}
    for case in QUICK if words.quick else CASES:
        if words.only in case.text:
            runs[case.text] = measure(case, words)
            found = figures(case, runs[case.text])
            print(*map(_line, found), sep="\n", flush=True)
            all_figures += found
            if words.json:  # after each, so that one that is stopped has left what there is
                label = machine.label(words.dir)
                kept = record.today("cached_decode", label, lines, method, all_figures, runs)
                record.write(words.json, [kept])


def _line(one: Figure) -> str:
    spread = "" if one.low is None else f" ({one.low:.3g} to {one.high:.3g})"
    return f"{one.what}: {one.value:.3g}{spread} {one.unit} {one.verdict}"


if __name__ == "__main__":
    try:
        main()
    except RuntimeError as failed:
        sys.exit(f"error: {failed}")
    except KeyboardInterrupt:
        sys.exit(130)
