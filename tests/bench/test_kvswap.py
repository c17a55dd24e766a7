"""bench/kvswap: what its masked model computes, its tasks, and its arithmetic."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from spdk_kv.sparse import Settings
from support.places import ROOT

pytest.importorskip("transformers", reason="transformers is not installed")

FOLDER = ROOT / "bench" / "kvswap"


@pytest.fixture(scope="module")
def parts() -> Iterator[dict[str, ModuleType]]:
    """The scripts of the folder, imported as they import each other."""
    before = set(sys.modules)
    sys.path.insert(0, str(FOLDER))
    try:
        yield {
            name: __import__(name)
            for name in ("tasks", "masked", "quality", "report", "figures", "variants")
        }
    finally:
        sys.path.remove(str(FOLDER))
        for name in set(sys.modules) - before:
            if str(getattr(sys.modules[name], "__file__", "")).startswith(str(FOLDER)):
                del sys.modules[name]


@pytest.fixture(scope="module")
def llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=300, hidden_size=64, intermediate_size=96, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=1024,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def asked(llama: Any) -> SimpleNamespace:
    """A text, questions and answers of random tokens, and the plain model's logits."""
    made = torch.Generator().manual_seed(1)
    text, prompts, answers = (
        torch.randint(0, 300, shape, generator=made) for shape in ((600,), (3, 7), (3, 6))
    )

    def plain() -> torch.Tensor:
        rows = torch.cat([text.expand(3, -1), prompts, answers], dim=1)
        with torch.inference_mode():
            found: torch.Tensor = llama(rows, use_cache=False).logits[:, -6:-1]
        return found

    # Of the places that are scored, what the model says is right in 2, and wrong in 5.
    answers[:, 2] = plain()[:, 1].argmax(-1)
    answers[:, 5] = plain()[:, 4].argmin(-1)
    logits = plain()
    return SimpleNamespace(text=text, prompts=prompts, answers=answers, logits=logits)


@pytest.fixture(scope="module")
def asking(
    parts: dict[str, ModuleType],
    llama: Any,
    asked: SimpleNamespace,
    tmp_path_factory: pytest.TempPathFactory,
) -> Any:
    masked = parts["masked"].MaskedModel(llama)
    kv = parts["quality"].text_kv(masked, asked.text, tmp_path_factory.mktemp("kv"))
    questions = parts["tasks"].Questions(asked.prompts, asked.answers, (2, 5))
    return parts["quality"].Asking(masked, kv, questions)


def test_attending_to_everything_is_the_plain_model(asking: Any, asked: SimpleNamespace) -> None:
    asking._model.back(asking._kept)
    found = asking._model.dense(asked.answers)
    assert torch.allclose(found, asked.logits, atol=1e-4)
    score = asking.dense
    assert (score.accuracy, score.answers, score.tokens, score.right_answers) == (0.5, 3, 6, 0)


@pytest.mark.parametrize("selector", ["codes", "kvswap", "previous"])
def test_a_selection_of_everything_is_the_plain_model(asking: Any, selector: str) -> None:
    from spdk_kv.sparse import preset

    found = asking.run(preset(selector, tokens=640))
    assert found.score.accuracy == 0.5
    assert found.score.mean_kl == pytest.approx(0, abs=1e-5)
    assert found.reads[2.0].missed <= 3 * 3 * 2  # of two groups that became whole in an answer


def test_a_part_costs_something_and_the_next_run_begins_anew(asking: Any) -> None:
    small, other = Settings(tokens=16), Settings(tokens=16, keys="exact")
    first = asking.run(small)
    assert first.score.mean_kl > 1e-6
    assert first.token_nbytes == 2 * (16 / 4 + 4)
    asking.run(other)
    assert vars(asking.run(small).score) == vars(first.score)
    assert asking.run(Settings(tokens=640)).score.mean_kl == pytest.approx(0, abs=1e-5)


def test_a_text_is_computed_once(
    parts: dict[str, ModuleType], asking: Any, asked: SimpleNamespace, tmp_path: Path
) -> None:
    text_kv = parts["quality"].text_kv
    first = text_kv(asking._model, asked.text, tmp_path)
    again = text_kv(None, asked.text, tmp_path)
    assert all(
        torch.equal(*pair)
        for one in zip(first, again, strict=True)
        for pair in zip(*one, strict=True)
    )


def test_reads_are_those_of_the_pool(parts: dict[str, ModuleType]) -> None:
    quality, masked = parts["quality"], parts["masked"]
    steps = [[0, 1], [0, 2], [0, 1], [0, 3]]
    trace = masked.Trace([[np.array([step])] for step in steps])
    settings = Settings(tokens=8)
    once, twice = (quality.reads(trace, settings, pool) for pool in (1.0, 2.0))
    assert (once.wanted, once.missed, once.row_steps) == (6, 3, 3)
    assert (twice.wanted, twice.missed) == (6, 2)
    assert twice.nbytes_per_token(1000) == pytest.approx(2000 / 3)


class Words:
    """A tokenizer: words with the space before them, single digits, and everything else."""

    chat_template = None

    def __init__(self) -> None:
        self._known: dict[str, int] = {}

    def __call__(self, text: str, **_: Any) -> Any:
        pieces = re.findall(r" ?[A-Za-z]+|[0-9]|\s|[^\sA-Za-z0-9]", text)
        return SimpleNamespace(
            input_ids=[self._known.setdefault(p, len(self._known)) for p in pieces]
        )

    def text(self, ids: list[int]) -> str:
        words = list(self._known)
        return "".join(words[number] for number in ids)


@pytest.mark.parametrize("task", ["digits", "four orders", "quote"])
def test_the_text_has_what_is_asked(parts: dict[str, ModuleType], task: str) -> None:
    words = Words()
    text = parts["tasks"].Text(words, seed=3, tokens=2500)
    assert 2400 <= len(text.ids) <= 2520
    whole = words.text(text.ids.tolist())
    facts = [f"Order {name}{code} was sent." for name, code in text.codes.items()]
    assert len(facts) == 60
    assert all(fact in whole for fact in facts)
    found = text.questions(task, 6)
    assert len(found.prompts) == len(found.answers) == 6
    for answer in found.answers.tolist():
        said = words.text(answer)
        if task == "quote":
            assert said in whole
            assert "." not in said, "more than one sentence"
            assert found.scored == tuple(range(16, 28))
        else:
            codes = re.findall(r"Order [a-z]+\d{4}", said)
            assert len(codes) == (1 if task == "digits" else 4)
            assert all(code in whole for code in codes)
            assert all(words.text([answer[at]]).isdigit() for at in found.scored)
            assert len(found.scored) == 4 * len(codes)


def test_a_text_is_the_same_for_the_same_seed(parts: dict[str, ModuleType]) -> None:
    words = Words()
    one, same, other = (parts["tasks"].Text(words, seed=seed, tokens=1500) for seed in (1, 1, 2))
    assert one.ids.tolist() == same.ids.tolist() != other.ids.tolist()
    assert (
        one.questions("digits", 4).prompts.tolist() == same.questions("digits", 4).prompts.tolist()
    )


def test_questions_that_there_are_too_few_of(
    parts: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parts["tasks"], "NOUNS", parts["tasks"].NOUNS[:4])
    text = parts["tasks"].Text(Words(), seed=0, tokens=1500)
    with pytest.raises(ValueError, match="digits has no 30 questions of one length"):
        text.questions("digits", 30)


def test_rows_take_the_worst_of_the_tasks_that_the_model_can_do(
    parts: dict[str, ModuleType],
) -> None:
    quality, report = parts["quality"], parts["report"]
    totals = quality.Totals(100)
    for task, right in (("easy", 100), ("fair", 90), ("hard", 50)):
        totals.add_dense(task, quality.Score(25, 100, right))
    settings = Settings(tokens=128)
    for task, right, kl in (("easy", 97, 1.0), ("fair", 88, 3.0), ("hard", 0, 99.0)):
        reads = {pool: quality.Reads(100, int(40 / pool), 10) for pool in quality.POOLS}
        outcome = quality.Outcome(quality.Score(25, 100, right, 0, kl), reads, 60.0)
        totals.add("codes", 0.075, task, settings, outcome)
    merged = quality.Totals()
    for _ in range(2):
        merged.merge(totals)
    (row,) = report.rows(merged)
    assert row["answers"] == {"easy": 50, "fair": 50, "hard": 50}
    assert row["part"] == "quality"
    assert (row["selector"], row["share"], row["tokens"]) == ("codes", 0.075, 128)
    assert row["worst_loss_points"] == pytest.approx(3)
    assert row["worst_task"] == "easy"
    assert row["kl"] == pytest.approx(0.02)
    assert row["metadata_nbytes"] == 60
    assert row["read_nbytes_per_token"] == pytest.approx(2 * 4 * 100)
    assert row["miss_rate_of_pools"] == {"1": 0.4, "2": 0.2, "4": 0.1}
    page = report.markdown([report.about("quality", "a method", ["CPU: one"]), row])
    assert "a method" in page
    assert "- CPU: one" in page
    assert "Not counted, for the model itself is below 90 %: hard." in page
    assert "| codes | 7.50% | 97.0% | 88.0% | 0.0% | 3.0 | 0.020 | 60 B |" in page


def quality_row(selector: str, worst: float) -> dict[str, Any]:
    return {
        "part": "quality", "selector": selector, "share": 0.075, "worst_loss_points": worst,
        "kl": 0.04, "miss_rate_of_pools": {"1": 0.5, "2": 0.25, "4": 0.125},
        "dense_accuracy": {"easy": 1.0}, "answers": {"easy": 8}, "accuracy": {"easy": 0.9},
        "metadata_nbytes": 60, "read_nbytes_per_token": 1 << 20,
    }  # fmt: skip


def speed_row(variant: str, drive: str, compute: str, tokens_per_s: float) -> dict[str, Any]:
    return {
        "part": "speed", "variant": variant, "drive": drive, "compute": compute, "tokens": 8192,
        "batch": 1, "tokens_per_s": tokens_per_s, "lowest_tokens_per_s": tokens_per_s / 2,
        "highest_tokens_per_s": tokens_per_s * 2, "read_nbytes_per_token": 1 << 20,
        "memory_nbytes": 50 if "dense" not in variant else 1000,
    }  # fmt: skip


SPEEDS = [
    speed_row(variant, drive, compute, tokens_per_s)
    for compute in ("emulated", "real")
    for variant, drive, tokens_per_s in (
        ("full", "NVMe", 1.0), ("codes", "NVMe", 8.0), ("kvswap 400", "NVMe", 6.0),
        ("kvswap 9000", "NVMe", 2.0), ("codes in memory", "memory", 10.0),
        ("dense in memory", "memory", 4.0),
    )
]  # fmt: skip


STEPS = [
    {
        "part": "step", "variant": variant, "tokens": 32768, "step_s": step_s, "select_s": 0.02,
        "lowest_step_s": step_s / 2, "highest_step_s": step_s * 2, "read_nbytes_per_token": 0,
        "memory_nbytes": nbytes,
    }
    for variant, step_s, nbytes in (("dense in memory", 0.1, 50), ("a part", 0.2, 10))
]  # fmt: skip


def test_figures_against_their_targets(parts: dict[str, ModuleType]) -> None:
    found = {
        one.what: (round(one.value, 3), one.verdict)
        for one in parts["figures"].figures(
            [quality_row("codes", 1.5), quality_row("kvswap", 30.0), *SPEEDS, *STEPS]
        )
    }
    assert found == {
        "worst task, 7.5% of the tokens": (1.5, "met"),
        "KL to dense, 7.5% of the tokens": (0.04, "met"),
        "worst task, 7.5% of the tokens, kvswap": (30.0, ""),
        "read per token, 8B shape, 400 tokens, these misses, pool of 2 times": (12.5, "met"),
        "read per token, 8B shape, 400 tokens, these misses, pool of 4 times": (6.25, ""),
        "codes, NVMe: of full reads": (8.0, "met"),
        "codes, NVMe: of kvswap 9000": (4.0, "met"),
        "codes, NVMe: of the same from memory": (0.8, "missed"),
        "codes, NVMe, real compute: of dense in memory": (2.0, "met"),
        "memory, of dense in memory": (0.05, "met"),
        "135M at 32K tokens: selecting, of a step": (0.1, "met"),
        "135M at 32K tokens: a part from the drive, of dense in memory": (0.5, "missed"),
        "135M at 32K tokens: memory, of dense in memory": (0.2, "missed"),
    }


def test_a_report_keeps_the_parts_that_were_not_run_again(
    parts: dict[str, ModuleType], tmp_path: Path
) -> None:
    report = parts["report"]
    quality = [report.about("quality", "by masks", ["CPU: one"]), quality_row("codes", 1.5)]
    report.write(quality, tmp_path, "disk")
    report.write([report.about("speed", "steps", ["CPU: two"]), *SPEEDS], tmp_path, "disk")
    report.write([report.about("step", "whole steps", ["CPU: two"]), *STEPS], tmp_path, "disk")
    again = [report.about("quality", "by masks", ["CPU: one"]), quality_row("codes", 9.5)]
    report.write(again, tmp_path, "disk")
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [row["worst_loss_points"] for row in rows if row["part"] == "quality"] == [9.5]
    assert [row for row in rows if row["part"] == "speed"] == SPEEDS
    page = (tmp_path / "README.md").read_text()
    assert "| codes | 7.50% | 90.0% | 9.5 | 0.040 |" in page
    assert "| codes | NVMe | emulated | 1 | 8.00 | 4.00 | 16.00 | 1.00 | 0 |" in page
    assert "| a part | 200.0 | 100.0 | 400.0 | 20.0 | 0.00 | 0 |" in page
    (kept,) = json.loads((tmp_path / "record.json").read_text())
    assert (kept["question"], kept["method"]) == ("reading_a_part", "by masks steps whole steps")


def test_a_selector_that_was_run_again_takes_its_own_place(
    parts: dict[str, ModuleType], tmp_path: Path
) -> None:
    report = parts["report"]

    def losses() -> dict[str, float]:
        rows = json.loads((tmp_path / "rows.json").read_text())
        return {row["selector"]: row["worst_loss_points"] for row in rows if "selector" in row}

    told = report.about("quality", "by masks", ["CPU: one"])
    report.write([told, quality_row("codes", 1.0), quality_row("kvswap", 2.0)], tmp_path, "disk")
    report.write([told, quality_row("codes", 3.0), quality_row("exact", 4.0)], tmp_path, "disk")
    assert losses() == {"kvswap": 2.0, "codes": 3.0, "exact": 4.0}
    # Of texts that are others now nothing is kept.
    told = report.about("quality", "other texts", ["CPU: one"])
    report.write([told, quality_row("codes", 5.0)], tmp_path, "disk")
    assert losses() == {"codes": 5.0}


def test_what_is_planned(parts: dict[str, ModuleType]) -> None:
    planned = parts["variants"].planned
    everything = planned(None, None)
    assert len(everything) == len(set(everything))
    assert {variant for variant, _ in everything} == set(parts["variants"].VARIANTS)
    assert ("kvswap", 0.5) in everything
    assert planned(["codes"], [0.1, 0.2]) == [("codes", 0.1), ("codes", 0.2)]


def test_every_variant_has_settings(parts: dict[str, ModuleType]) -> None:
    for name in parts["variants"].VARIANTS:
        settings = parts["variants"].settings_of(name, 262)
        assert 248 <= settings.tokens <= 262
        assert settings.pool in parts["quality"].POOLS
