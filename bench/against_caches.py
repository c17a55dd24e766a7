"""Caches for transformers and stores of KV, side by side on this machine, without a GPU.

    python bench/against_caches.py --dir DIR [--rounds N] [--lmcache PROGRAM] [--out DIR]

How fast does a model with random weights decode, and how much memory does its cache take? Compared:
transformers' DynamicCache and StaticCache, DynamicCache with offloading=True (needs a GPU), spdk_kv
as it comes, and spdk_kv past the page cache.

How fast is a prompt's K/V stored, and read back with the page cache emptied of it? Compared:
spdk_kv, accelerate's disk offload, and LMCache's `fs_native` adapter (with --lmcache: the program
`lmcache` of another installation).

Every run is a process of its own; rounds interleave the runs, and every other round goes backwards.
Prints the tables; --out keeps them with every figure.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from contextlib import ExitStack
from datetime import date
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import machine

GIB, MIB = 1 << 30, 1 << 20
LAYERS, HEADS, DIM = 8, 8, 64
REPEATS = 3
DECODERS = (
    "DynamicCache",
    "StaticCache",
    "DynamicCache, offloading=True",
    "spdk_kv",
    "spdk_kv, direct",
)
STORES = ("spdk_kv", "accelerate", "LMCache fs_native")


# -- one run, in a process of its own -------------------------------------------------------------


def _model(tokens: int) -> Any:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        head_dim=DIM,
        max_position_embeddings=tokens,
        eos_token_id=None,
        pad_token_id=0,
        initializer_range=0.2,  # so that the tokens differ, and a wrong cache shows
    )
    return LlamaForCausalLM(config).eval()


def _peak_nbytes(reset: bool = False) -> int:
    """The process's largest resident size so far, or since it was last reset."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) << 10
    raise RuntimeError("/proc/self/status says no VmHWM")


def decode(name: str, folder: Path, tokens: int, new: int) -> dict[str, Any]:
    """Prefill and greedy decode with the cache ``name``."""
    import torch
    from transformers import DynamicCache, StaticCache

    import spdk_kv
    from spdk_kv.integrations.transformers import CACHE_ARGUMENT, OffloadedKVCache

    model = _model(tokens + new)
    # What one forward pass takes by itself is no part of what a cache takes.
    ids = torch.randint(1, 256, (1, tokens), generator=torch.manual_seed(1))
    store = None
    with torch.inference_mode():
        model(ids[:, :64])
        before = _peak_nbytes(reset=True)
        if name.startswith("spdk_kv"):
            policy = "direct" if name.endswith("direct") else "adaptive"
            path = spdk_kv.PageCacheOptions(policy=policy)
            store = spdk_kv.open(f"file://{folder}/kv", capacity="2 GiB", page_cache=path)
            cache: Any = OffloadedKVCache(store, model.config, max_tokens=tokens + new)
        elif name == "StaticCache":
            cache = StaticCache(config=model.config, max_cache_len=tokens + new)
        else:
            cache = DynamicCache(config=model.config, offloading=name.endswith("True"))
        begin = time.perf_counter()
        # In slices, so that attention's own memory stays out of the figure.
        for at in range(0, tokens, 512):
            out = model(ids[:, at : at + 512], logits_to_keep=1, **{CACHE_ARGUMENT: cache})
        prefill_s = time.perf_counter() - begin
        steps, chosen = [], []
        for _ in range(new):
            token = out.logits[:, -1:].argmax(-1)
            chosen.append(int(token))
            begin, spent = time.perf_counter(), time.process_time()
            out = model(token, **{CACHE_ARGUMENT: cache})
            steps.append((time.perf_counter() - begin, time.process_time() - spent))
    peak = _peak_nbytes() - before
    if store is not None:
        cache.close()
        store.close()
    return {
        "prefill_s": prefill_s,
        "tokens_per_s": 1 / median(wall for wall, _ in steps),
        "cpu_ms_per_token": 1e3 * median(cpu for _, cpu in steps),
        "peak_nbytes": peak,
        "tokens": chosen,
    }


def _forget(paths: list[Path]) -> None:
    """Empties the page cache of files that are on the drive already."""
    for path in paths:
        fd = os.open(path, os.O_RDONLY)
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


def keep(name: str, folder: Path, tokens: int) -> dict[str, Any]:
    """Stores the K/V of a prompt durably, and reads it back from the drive."""
    import torch

    import spdk_kv

    tensors = {f"{n}.{part}": torch.randn(1, HEADS, tokens, DIM) for n in range(LAYERS)
               for part in "kv"}  # fmt: skip
    nbytes = sum(tensor.nbytes for tensor in tensors.values())
    with ExitStack() as rest:
        if name == "spdk_kv":
            store = rest.enter_context(spdk_kv.open(f"file://{folder}/kv", capacity="2 GiB"))
            write, read = partial(_put, store, tensors), partial(store.get_many, tensors)
        else:
            index: dict[str, Any] = {}
            write = partial(_offload, folder, tensors, index)
            read = partial(_load, folder, tensors, index)
        seconds: list[tuple[float, float]] = []
        for _ in range(1 + REPEATS):  # the first one warms up, as LMCache's does
            begin = time.perf_counter()
            write()
            written = time.perf_counter()
            _forget(list(folder.glob("*.dat")))
            again = time.perf_counter()
            found = read()
            seconds.append((written - begin, time.perf_counter() - again))
            equal = map(torch.equal, found, tensors.values())
            assert all(equal), "other bytes came back"
    stored, loaded = zip(*seconds[1:], strict=True)
    return {
        "store_gib_s": nbytes / GIB / median(stored),
        "load_gib_s": nbytes / GIB / median(loaded),
    }


def _put(store: Any, tensors: dict[str, Any]) -> None:
    store.put_many(tensors)
    store.flush()


def _offload(folder: Path, tensors: dict[str, Any], index: dict[str, Any]) -> None:
    from accelerate.utils.offload import offload_weight

    for key, tensor in tensors.items():
        offload_weight(tensor, key, str(folder), index)  # ends with msync


def _load(folder: Path, keys: Iterable[str], index: dict[str, Any]) -> list[Any]:
    from accelerate.utils.offload import load_offloaded_weight

    return [load_offloaded_weight(str(folder / f"{key}.dat"), index[key]) for key in keys]


def keep_lmcache(program: str, folder: Path, tokens: int) -> dict[str, Any]:
    """LMCache's own measurement of its adapter: objects as large as one layer's K."""
    adapter = {"type": "fs_native", "base_path": str(folder), "use_odirect": True}
    size_kib = HEADS * tokens * DIM * 4 >> 10
    command = [
        *(program, "bench", "l2", "--l2-adapter", json.dumps(adapter), "--format", "json"),
        *("--num-keys", str(2 * LAYERS), "--data-size-kb", str(size_kib)),
        *("--l1-align-bytes", "4096", "--rounds", str(REPEATS), "--no-skip-verify"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    if done.returncode:
        return {"error": (done.stderr or done.stdout).strip().splitlines()[-1]}
    report = json.JSONDecoder().raw_decode(done.stdout[done.stdout.index("\n{\n") + 1 :])[0]
    metrics = report["metrics"]
    seconds = {op["operation"]: op["duration_p50_ms"] / 1e3 for op in metrics.values()
               if "operation" in op}  # fmt: skip
    gib = metrics["config"]["data_per_round_mb"] / 1024
    return {"store_gib_s": gib / seconds["Store"], "load_gib_s": gib / seconds["Load"]}


# -- rounds ---------------------------------------------------------------------------------------


def apart(kind: str, name: str, words: argparse.Namespace) -> dict[str, Any]:
    """One run in a process and a folder of its own; what it could not do, as ``error``."""
    with tempfile.TemporaryDirectory(prefix=".against_caches-", dir=words.dir) as folder:
        if name.startswith("LMCache"):
            return keep_lmcache(words.lmcache, Path(folder), words.tokens)
        command = [sys.executable, __file__, "--run", kind, name, "--dir", folder]
        command += ["--tokens", str(words.tokens), "--new", str(words.new)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        return {"error": done.stderr.strip().splitlines()[-1]}
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def measure(words: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """Every run of every round, by what was run."""
    stores = STORES if words.lmcache else STORES[:2]
    runs = [("decode", name) for name in DECODERS] + [("keep", name) for name in stores]
    found: dict[str, list[dict[str, Any]]] = {f"{kind} {name}": [] for kind, name in runs}
    for number in range(words.rounds):
        for kind, name in runs if number % 2 == 0 else reversed(runs):
            seen = apart(kind, name, words)
            found[f"{kind} {name}"].append(seen)
            print(f"round {number + 1}: {kind} {name}: {_short(seen)}", file=sys.stderr)
    chosen = {tuple(run["tokens"]) for runs in found.values() for run in runs if "tokens" in run}
    if len(chosen) != 1:
        raise SystemExit(f"the caches gave {len(chosen)} different texts")
    return found


def _short(seen: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value:.3g}" for key, value in seen.items() if type(value) is float)


Cell = tuple[str, str, float]
DECODE_CELLS: tuple[Cell, ...] = (
    ("tokens/s", "tokens_per_s", 1),
    ("CPU ms per token", "cpu_ms_per_token", 1),
    ("prefill s", "prefill_s", 1),
    ("memory MiB", "peak_nbytes", MIB),
)
STORE_CELLS: tuple[Cell, ...] = (
    ("store GiB/s", "store_gib_s", 1),
    ("load GiB/s", "load_gib_s", 1),
)


def table(kind: str, found: dict[str, list[dict[str, Any]]], cells: tuple[Cell, ...]) -> list[str]:
    """Markdown: one line per cache, medians with the smallest and largest."""
    lines = ["| |" + "|".join(f" {head} " for head, _, _ in cells) + "|", "|---" * (len(cells) + 1)]
    lines[1] += "|"
    for name, runs in found.items():
        if not name.startswith(kind):
            continue
        good = [run for run in runs if "error" not in run]
        if not good:
            shown = f" does not run here: {runs[0]['error']} |" + " |" * (len(cells) - 1)
        else:
            shown = "|".join(_cell([run[key] / unit for run in good]) for _, key, unit in cells)
            shown += "|"
        lines.append(f"| {name.removeprefix(kind + ' ')} |{shown}")
    return lines


def _cell(values: list[float]) -> str:
    return f" {median(values):.3g} ({min(values):.3g} to {max(values):.3g}) "


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--dir", type=Path, default=Path(), help="a folder on the drive")
    parser.add_argument("--tokens", type=int, default=2048, help="of the prompt")
    parser.add_argument("--new", type=int, default=16, help="tokens decoded")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--lmcache", default="", help="the program lmcache, where it is installed")
    parser.add_argument("--out", type=Path, help="a folder for the report; none without it")
    parser.add_argument("--run", nargs=2, help=argparse.SUPPRESS)
    words = parser.parse_args()
    if words.run:
        kind, name = words.run
        if kind == "decode":
            print(json.dumps(decode(name, words.dir, words.tokens, words.new)))
        else:
            print(json.dumps(keep(name, words.dir, words.tokens)))
        return
    about = machine.describe(words.dir, "transformers, accelerate and LMCache as installed")
    found = measure(words)
    kv_mib = 2 * LAYERS * HEADS * DIM * 4 * words.tokens // MIB
    text = [
        "# Caches side by side",
        "",
        f"`bench/against_caches.py`, {date.today()}: {words.tokens} tokens of prompt ({kv_mib} MiB "
        f"of K/V), {words.new} decoded, {words.rounds} rounds, medians (smallest to largest).",
        "Memory is what the process took beyond the model, without page cache, which the kernel",
        "takes back when others need it.",
        "",
        *(f"- {line}" for line in about),
        "",
        "## Decode",
        "",
        *table("decode", found, DECODE_CELLS),
        "",
        "## A prompt's K/V to the drive and back",
        "",
        *table("keep", found, STORE_CELLS),
        "",
    ]
    print("\n".join(text))
    if words.out:
        words.out.mkdir(exist_ok=True)
        (words.out / "README.md").write_text("\n".join(text))
        kept = {"machine": about, "date": str(date.today()), "runs": found}
        (words.out / "runs.json").write_text(json.dumps(kept, indent=1) + "\n")


if __name__ == "__main__":
    main()
