"""Makes RESULTS.md and its charts from the newest records in results/.

    python bench/results_page.py

Put a benchmark's JSON file into results/ first. The charts need matplotlib (``pip install
'spdk_kv[bench]'``); the page names a chart for every question either way.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import charts
import record
import side_by_side
from record import Figure, Record

HERE = Path(__file__).resolve().parent
TITLES = {
    "fio": (
        "Against fio",
        "How close io_uring's engine and a store are to fio on the same file in the same run.",
    ),
    "small": (
        "Small commands",
        "How close io_uring's engine is to fio with commands of 16 KiB, 64 in flight, and the "
        "engine `spdk` to `spdk_nvme_perf` with 4 KiB, 32 in flight: a steady stream, and one "
        "transfer after the other, each of which fills the queue and drains it again.",
    ),
    "spdk_perf": (
        "Against SPDK's perf",
        "How close the engine `spdk` and a store on it are to `spdk_nvme_perf` on the same drive, "
        "core, size and depth.",
    ),
    "decode": (
        "DUAL-BLADE's decode",
        "How fast a model decodes when the page cache may hold only a share (rho) of its KV cache. "
        "The bound is what drive and memory allow, flexllmgen the baseline rebuilt. In records "
        "before 2026-11-29 the page cache had more memory than rho says (0.31 of the KV cache at "
        "0.22, 0.53 at 0.44): alike for all variants, but the bound was too kind.",
    ),
    "pipeline": (
        "The pipeline to a GPU",
        "How much of the slower of drive and link remains when both work at once.",
    ),
    "cached_decode": (
        "Decode from the page cache",
        "How much of DynamicCache's speed an OffloadedKVCache has where everything is in the page "
        "cache, and what memory it takes. Models of Llama's shape with random weights; `1B` has "
        "layers as large as those of Llama 3.2 1B, `small` little but attention to compute.",
    ),
    "sequences": (
        "Forks and growth",
        "What it costs to begin with another sequence's tokens, to read one that grew token by "
        "token, and to have a thousand more that nobody uses.",
    ),
    "prompts": (
        "Stored prompts",
        "How soon the second question to a stored document of 4K tokens is answered, in a new "
        "process, and what it takes to find the longest stored beginning of a text.",
    ),
    "reading_a_part": (
        "Reading a part",
        "What is lost in answers by reading the tokens that a selector chooses, and how fast a "
        "decode step of an 8B model's shape is at 32K tokens. Answers by SmolLM2-135M.",
    ),
    "host_vllm": (
        "Under vLLM",
        "How fast chunks of its CPU cache are stored and fetched, beside its own `fs` tier with "
        "O_DIRECT on the same jobs, and what its scheduler's calls take while 1,000 jobs wait.",
    ),
    "host_lmcache": (
        "Under LMCache",
        "How fast objects are stored and fetched by LMCache's own bench, beside its own adapters "
        "with O_DIRECT. These store each object in a new file, ours in one that was written "
        "before.",
    ),
    "host_sglang": (
        "Under SGLang",
        "How fast SGLang's pages are stored and fetched, beside its own file backend, and what its "
        "scheduler's calls take while 1,000 jobs wait. Host pools and controller on the CPU.",
    ),
    "host_llama_cpp": (
        "Under llama-cpp-python",
        "How soon the answer to a stored prompt begins with `StateCache`, beside the caches that "
        "the host has. SmolLM2-135M on the CPU.",
    ),
    "own_cost": (
        "Our own cost",
        "What a call costs without a drive (the engine `null`), and what 100,000 blobs cost.",
    ),
}
_HEAD = """\
# Results

Made by `python bench/results_page.py` from the newest records in [results/](results): change those,
not this page. [README.md](README.md) has the method, and says what "simulated" means.

- Each figure is the median of its rounds; lowest and highest are single rounds. A ratio is taken
  within a round. "of fio", "of perf": ours divided by theirs.
- *asked by* says whose target it is: `spdk_kv` for the project's own, set before the measurement;
  `DUAL-BLADE` for a figure of the paper (arXiv 2604.26557).
- Figures without a target are in the records, and in the reports with what is known of each miss.
- *Side by side*: medians of each one's rounds (lowest to highest); **bold** marks who did best.
- In the charts 1 is the target, and further right is better; bars run from the lowest round to the
  highest.
"""


@dataclass(frozen=True)
class Kept:
    """A record, and the file that it was read from."""

    record: Record
    path: Path


def newest(folder: Path) -> dict[str, list[Kept]]:
    """The newest record of each drive, by question. ValueError names a file that is no record."""
    found: dict[tuple[str, str], Kept] = {}
    for path in sorted([*folder.glob("*.json"), *folder.glob("*/record.json")]):
        for one in record.read(path):
            key = (one.question, one.drive)
            if key not in found or found[key].record.date <= one.date:
                found[key] = Kept(one, path)
    return {
        question: [found[key] for key in sorted(found) if key[0] == question]
        for question in TITLES
        if any(key[0] == question for key in found)
    }


def asked(kept: Iterable[Kept]) -> list[tuple[Figure, str]]:
    """(figure, drive) of all that have a target; the same figure of several drives side by side."""
    found: dict[str, list[tuple[Figure, str]]] = {}
    for one in kept:
        for figure in one.record.figures:
            if figure.target is not None:
                found.setdefault(figure.what, []).append((figure, one.record.drive))
    return [pair for pairs in found.values() for pair in pairs]


def picture(question: str, kept: Sequence[Kept]) -> Path:
    """Where a question's chart lies: beside the fullest record where its benchmark draws one, and
    otherwise in results/charts/."""
    fullest = max(kept, key=lambda one: len(one.record.figures))
    own = fullest.path.parent / f"{question}.png"
    return own if own.exists() else HERE / "results" / "charts" / f"{question}.svg"


def page(found: dict[str, list[Kept]]) -> str:
    """The whole of RESULTS.md."""
    lines = [_HEAD, *_summary(found)]
    for question, kept in found.items():
        title, text = TITLES[question]
        chart = picture(question, kept).relative_to(HERE)
        lines += ["", f"## {title}", "", text, "", f"![{title}]({chart})", ""]
        lines += [*_table(asked(kept)), ""]
        for one in kept:
            if one.record.sides:
                lines += [f"Side by side, {record.short(one.record.drive)}:", ""]
                lines += [*side_by_side.table(one.record.sides), ""]
        lines += map(_source, kept)
    return "\n".join(lines) + "\n"


def _summary(found: dict[str, list[Kept]]) -> list[str]:
    lines = ["| question | targets | met | missed | newest |", "|---|---|---|---|---|"]
    for question, kept in found.items():
        title = TITLES[question][0]
        verdicts = [figure.verdict for figure, _ in asked(kept)]
        anchor = title.lower().replace(" ", "-").replace("'", "")
        lines.append(
            f"| [{title}](#{anchor}) | {len(verdicts)} | {verdicts.count('met')} | "
            f"{verdicts.count('missed')} | {max(one.record.date for one in kept)} |"
        )
    return lines


def _table(figures: Iterable[tuple[Figure, str]]) -> list[str]:
    lines = [
        "| what | drive | measured | lowest | highest | unit | target | asked by | |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for figure, drive in figures:
        assert figure.target is not None
        verdict = "met" if figure.verdict == "met" else "**missed**"
        cells = (
            *(figure.what, record.short(drive), _number(figure.value), _number(figure.low)),
            *(_number(figure.high), figure.unit, figure.wanted, figure.target.asked_by, verdict),
        )
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


def _source(kept: Kept) -> str:
    one, folder = kept.record, HERE / "results"
    file = kept.path.relative_to(HERE)
    report = f"report [{one.report}](results/{one.report}), " if one.report else ""
    assert not one.report or (folder / one.report).exists(), one.report
    return (
        f"- {_drive(one)}: {one.date}, commit {one.commit}; {one.method}; "
        f"{'; '.join(one.machine)}. "
        f"{report[:1].upper()}{report[1:]}record [{file.relative_to('results')}]({file})."
    )


def _drive(one: Record) -> str:
    short = record.short(one.drive)
    return short if short == one.drive else f"{short}, that is {one.drive}"


def main() -> None:
    found = newest(HERE / "results")
    if reason := charts.missing():
        sys.exit(f"error: {reason}")
    for question, kept in found.items():
        path = picture(question, kept)
        if path.suffix == ".svg":
            charts.draw(TITLES[question][0], asked(kept), path)
    (HERE / "RESULTS.md").write_text(page(found), encoding="utf-8")
    print(os.path.relpath(HERE / "RESULTS.md"))


if __name__ == "__main__":
    try:
        main()
    except ValueError as failed:
        sys.exit(f"error: {failed}")
