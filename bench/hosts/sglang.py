"""SGLang's pages to the drive and back: spdk_kv beside SGLang's own file backend.

    python bench/hosts/sglang.py --dir DIR [--fast-drive] [--python PYTHON] [--json FILE]

PYTHON is that of an environment with SGLang (`scripts/test.sh --hosts sglang` makes one in
.hosts/sglang). Host pool, controller and the calls of its threads are SGLang's, on the CPU; a batch
is stored, and fetched, as its backup and prefetch threads do it. The page cache is emptied of what
was stored before it is fetched. Bytes that come back are compared.

Every run is a process of its own; rounds interleave the backends, and every other round goes
backwards. SGLang's file backend has no O_DIRECT and no checksums; ours verifies.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
# This file would be taken for SGLang.
sys.path[:] = [path for path in sys.path if Path(path or ".").resolve() != HERE]
sys.path.insert(0, str(HERE.parent))

import fast_drive  # noqa: E402
import machine  # noqa: E402
import record  # noqa: E402
import side_by_side  # noqa: E402

GIB, MIB = 1 << 30, 1 << 20
PAGE = 64
# Layers, KV heads, head dimension, pages: as of Llama 3.1 8B, and of Qwen 2.5 0.5B.
SHAPES = {"8 MiB": (32, 8, 128, 64), "0.75 MiB": (24, 2, 64, 512)}
LAYOUTS = ("page_first", "layer_first")
FASTER = record.Target("at least", 1.3)
CALL = record.Target("at most", 100)
# Jobs that wait while calls are timed.
WAITING = 1000
BACKENDS = ("spdk_kv", "file")
BATCHES = 16


# -- one run, in a process of its own -------------------------------------------------------------


def _engine(words: argparse.Namespace) -> tuple[Any, Any]:
    """SGLang's controller with the backend, and its host pool."""
    import torch
    import torch.distributed as dist
    from sglang.srt.managers.cache_controller import HiCacheController
    from sglang.srt.mem_cache.allocator import TokenToKVPoolAllocator
    from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool
    from sglang.srt.mem_cache.pool_host import base
    from sglang.srt.mem_cache.pool_host.mha import MHATokenToKVPoolHost
    from sglang.srt.runtime_context import get_parallel

    # SGLang leaves that much to others; what is measured here takes less.
    base.HICACHE_HOST_MEMORY_RESERVE_BYTES = 2 * GIB
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    names = [f"{name}_{kind}" for name in ("tp", "pp", "attn_tp", "attn_cp", "attn_dp", "attn_dcp")
             for kind in ("rank", "size")]  # fmt: skip
    forced = get_parallel().override(**{name: int(name.endswith("size")) for name in names})
    forced.__enter__()
    layers, heads, dim, pages = SHAPES[words.shape]
    device = MHATokenToKVPool(
        PAGE, PAGE, torch.bfloat16, heads, dim, layers, "cpu", False, enable_alt_stream=False
    )
    host = MHATokenToKVPoolHost(
        device._mha_buffer_info(),
        host_to_device_ratio=2.0,
        host_size=0,
        page_size=PAGE,
        layout=words.layout,
        pin_memory=False,
        device="cpu",
        device_capacity_tokens=PAGE,
        start_layer=0,
        end_layer=layers - 1,
        host_token_capacity=pages * PAGE,
    )
    extra: dict[str, Any] = {"file_storage_path": str(words.dir)}
    if words.run == "spdk_kv":
        extra = {
            "backend_name": "spdk_kv",
            "module_path": "spdk_kv.integrations.sglang",
            "class_name": "HiCacheSpdkKv",
            "interface_v1": 1,
            "location": f"file://{words.dir.resolve()}/kv",
            "capacity": "1 GiB",
        }
    engine = HiCacheController(
        TokenToKVPoolAllocator(PAGE, torch.bfloat16, "cpu", device, False),
        host,
        PAGE,
        dist.group.WORLD,
        load_cache_event=threading.Event(),
        io_backend="direct",
        storage_backend="dynamic" if words.run == "spdk_kv" else "file",
        model_name="bench/model",
        storage_backend_extra_config=extra,
        enable_storage_metrics=True,
    )
    engine.kept = forced  # restores everything when it is collected
    return engine, host


class _Operation:
    request_id = "bench"

    @staticmethod
    def is_terminated() -> bool:
        return False


def run(words: argparse.Namespace) -> dict[str, Any]:
    """Stores every page of a pool, and fetches them to a pool that was emptied."""
    import torch
    from sglang.srt.mem_cache.utils import get_hash_str

    engine, host = _engine(words)
    pages = SHAPES[words.shape][3]
    indices = torch.arange(pages * PAGE, dtype=torch.int64)
    noise = torch.randint(0, 256, (16 * MIB + 4096,), dtype=torch.uint8)
    memory = host.kv_buffer.view(torch.uint8).reshape(-1)
    nbytes = memory.numel()
    for at in range(0, nbytes, 16 * MIB):
        memory[at : at + 16 * MIB] = noise[(at // MIB) % 4096 :][: min(16 * MIB, nbytes - at)]
    wanted = memory.clone()
    hashes = get_hash_str(list(range(pages * PAGE)), None, PAGE)
    step = pages // BATCHES

    def through(move: Any) -> tuple[list[float], float]:
        latencies, spent = [], time.process_time()
        for first in range(0, pages, step):
            begun = time.perf_counter()
            moved = move(
                hashes[first : first + step], indices[first * PAGE : (first + step) * PAGE]
            )
            latencies.append(time.perf_counter() - begun)
            if not moved:
                raise SystemExit("a batch was not moved")
        return latencies, time.process_time() - spent

    begun = time.perf_counter()
    stored, store_cpu = through(engine.page_set_func)
    spent = time.process_time()
    _to_the_drive(words, engine)
    durable_s = time.perf_counter() - begun
    store_cpu_durable = store_cpu + time.process_time() - spent
    memory.zero_()
    loaded, load_cpu = through(lambda keys, at: engine.page_get_func(_Operation, keys, at) == step)
    assert torch.equal(memory, wanted), "other bytes came back"
    engine.detach_storage_backend()
    gib = nbytes / GIB
    return {
        "store_gib_s": gib / sum(stored),
        "durable_gib_s": gib / durable_s,
        "load_gib_s": gib / sum(loaded),
        "store_cpu_s_per_gib": store_cpu / gib,
        "durable_cpu_s_per_gib": store_cpu_durable / gib,
        "load_cpu_s_per_gib": load_cpu / gib,
        "store_s": stored,
        "load_s": loaded,
    }


def calls(words: argparse.Namespace) -> dict[str, Any]:
    """What the scheduler's thread calls of a backend, and what its other threads ask without the
    drive, while pages are stored and 1,000 such jobs wait. Seconds of each call."""
    import torch
    from sglang.srt.mem_cache.utils import get_hash_str

    engine, _ = _engine(words)
    pages = SHAPES[words.shape][3]
    hashes = get_hash_str(list(range(WAITING * PAGE)), None, PAGE)
    for number, key in enumerate(hashes):
        first = number % pages * PAGE
        engine.write_storage(torch.arange(first, first + PAGE), [], hash_value=[key])
    took: dict[str, list[float]] = {"get_stats": [], "batch_exists": []}
    waiting = []
    while engine.backup_queue.qsize():
        waiting.append(engine.backup_queue.qsize())
        for name, seconds in took.items():
            call = getattr(engine.storage_backend, name)
            given = (hashes[:128],) if name == "batch_exists" else ()
            begun = time.perf_counter()
            call(*given)
            seconds.append(time.perf_counter() - begun)
        time.sleep(0.0005)
    engine.detach_storage_backend()
    return {"most_waiting": max(waiting), **took}


def _to_the_drive(words: argparse.Namespace, engine: Any) -> None:
    """Makes what was stored durable, and empties the page cache of it."""
    if words.run == "spdk_kv":
        for store in engine.storage_backend._stores.opened():
            store.flush()
    for path in words.dir.rglob("*"):
        if path.is_file():
            handle = os.open(path, os.O_RDONLY)
            os.fsync(handle)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(handle)


# -- rounds ---------------------------------------------------------------------------------------


def apart(
    words: argparse.Namespace, folder: Path, case: tuple[str, str], backend: str, *more: str
) -> Any:
    """One run in a process and a folder of its own."""
    shape, layout = case
    with tempfile.TemporaryDirectory(prefix=".bench_sglang-", dir=folder) as place:
        command = [words.python, str(HERE / "sglang.py"), "--run", backend, "--dir", place]
        command += ["--shape", shape, "--layout", layout, *more]
        # With more, torch's threads spin while they wait for each other, which the file backend's
        # copies of small pages take most of their time with.
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise SystemExit(f"{backend}: {done.stderr.strip().splitlines()[-1]}\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def measure(words: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """All rounds on the drive under ``folder``: one entry a case and backend, with its runs."""
    cases = [(shape, layout) for shape in words.shapes for layout in words.layouts]
    found: dict[tuple[str, str, str], list[Any]] = {}
    for number in range(words.rounds):
        for case in cases:
            for backend in BACKENDS if number % 2 == 0 else reversed(BACKENDS):
                seen = apart(words, folder, case, backend)
                found.setdefault((*case, backend), []).append(seen)
                short = ", ".join(f"{k} {v:.3g}" for k, v in seen.items() if isinstance(v, float))
                print(f"round {number + 1}: {case} {backend}: {short}", file=sys.stderr)
    return [
        {"shape": shape, "layout": layout, "backend": backend, "runs": runs}
        for (shape, layout, backend), runs in found.items()
    ]


COLUMNS = (
    ("store GiB/s", "store_gib_s"),
    ("to the drive GiB/s", "durable_gib_s"),
    ("load GiB/s", "load_gib_s"),
    ("CPU s/GiB store", "durable_cpu_s_per_gib"),
    ("CPU s/GiB load", "load_cpu_s_per_gib"),
)
# Of a table: (what, unit, key) of each column, and the key of the times of batches.
DIRECTIONS = (
    (
        "store",
        (
            ("speed", "GiB/s", "store_gib_s"),
            ("until on the drive", "GiB/s", "durable_gib_s"),
            ("CPU", "s/GiB", "durable_cpu_s_per_gib"),
        ),
        "store_s",
    ),
    ("load", (("speed", "GiB/s", "load_gib_s"), ("CPU", "s/GiB", "load_cpu_s_per_gib")), "load_s"),
)


def sides(rows: list[dict[str, Any]]) -> list[record.Side]:
    """What each backend did, by page, layout and direction."""
    found = []
    for direction, columns, seconds in DIRECTIONS:
        for row in rows:
            measured = [
                record.figure(what, [run[key] for run in row["runs"]], unit)
                for what, unit, key in columns
            ]
            p99 = 1e3 * _p99([s for run in row["runs"] for s in run[seconds]])
            measured.append(record.figure("p99 of a batch", [p99], "ms"))
            what = f"{direction} {row['shape']}, {row['layout']}"
            found.append(record.Side(what, row["backend"], measured))
    return sorted(found, key=lambda side: side.what)


def _p99(values: list[float]) -> float:
    return sorted(values)[min(len(values) - 1, int(0.99 * len(values)))]


def figures(rows: list[dict[str, Any]]) -> list[record.Figure]:
    """How ours are beside the file backend, round by round."""
    found = []
    by = {(row["shape"], row["layout"], row["backend"]): row["runs"] for row in rows}
    for shape, layout, backend in by:
        if backend != "spdk_kv":
            continue
        ours, theirs = (by[shape, layout, name] for name in BACKENDS)
        for head, key in COLUMNS:
            ratio = [mine[key] / other[key] for mine, other in zip(ours, theirs, strict=True)]
            target = FASTER if head.endswith("GiB/s") else None
            what = f"{shape}, {layout}: {head.removesuffix(' GiB/s')} beside the file backend"
            found.append(record.figure(what, ratio, "times", target))
        for head, key in (("store", "store_s"), ("load", "load_s")):
            p99 = [_p99([s for run in runs for s in run[key]]) for runs in (ours, theirs)]
            what = f"{shape}, {layout}: p99 of a batch, {head}, beside the file backend"
            found.append(record.figure(what, [p99[0] / p99[1]], "times"))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--dir", type=Path, action="append", default=[], help="a folder to work in")
    parser.add_argument("--fast-drive", action="store_true", help="a simulated drive as well")
    parser.add_argument("--python", default=str(HERE.parents[1] / ".hosts/sglang/bin/python"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=list(LAYOUTS))
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep the records there")
    parser.add_argument("--run", choices=BACKENDS, help=argparse.SUPPRESS)
    parser.add_argument("--calls", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--shape", choices=SHAPES, help=argparse.SUPPRESS)
    parser.add_argument("--layout", choices=LAYOUTS, help=argparse.SUPPRESS)
    words = parser.parse_args()
    if words.run:
        (words.dir,) = words.dir
        print(json.dumps(calls(words) if words.calls else run(words)))
        return
    if not (words.dir or words.fast_drive):
        parser.error("nothing to do: --dir or --fast-drive")
    if shutil.which(words.python) is None:
        raise SystemExit(f"no {words.python}: scripts/test.sh --hosts sglang makes it")
    records = []
    with ExitStack() as undo:
        folders = list(words.dir)
        if words.fast_drive:
            folders.append(undo.enter_context(fast_drive.fast_drive(2 * GIB)))
        for folder in folders:
            about = machine.describe(folder, "SGLang 0.5.23")
            rows = measure(words, folder)
            timed = apart(words, folder, ("0.75 MiB", "page_first"), "spdk_kv", "--calls")
            records.append(result(machine.label(folder), about, rows, timed))
            compared = side_by_side.table(records[-1].sides)
            print("\n".join(["", *(f"- {line}" for line in about), "", *compared, ""]))
            for one in records[-1].figures:
                print(f"- {one.what}: {one.value:.3g} {one.unit} {one.wanted} {one.verdict}")
    if words.json:
        record.write(words.json, records)


def result(
    drive: str, about: list[str], rows: list[dict[str, Any]], timed: dict[str, Any]
) -> record.Record:
    """What is kept of the rounds on one drive."""
    rounds = len(rows[0]["runs"])
    method = (
        f"{rounds} rounds; each stores and fetches a pool of 512 MiB (pages of 8 MiB) or 384 MiB "
        f"(0.75 MiB) in {BATCHES} batches through the functions of SGLang's threads, each backend "
        "in a process of its own; checksums verified in ours; fetched after the page cache was "
        "emptied; medians of the ratios of the rounds, p99 over the batches of all rounds"
    )
    found = figures(rows)
    for name, target in (("get_stats", CALL), ("batch_exists", None)):
        what = f"{name}, {timed['most_waiting']} jobs waiting: p99"
        found.append(record.figure(what, [1e6 * _p99(timed[name])], "us", target))
    runs = {"rows": rows, "calls": timed}
    return record.today("host_sglang", drive, about, method, found, runs, sides(rows))


if __name__ == "__main__":
    main()
