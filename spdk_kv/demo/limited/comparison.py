"""The same decode under a memory limit, with the KV cache kept in three different ways."""

from __future__ import annotations

import tempfile
from dataclasses import asdict, replace
from typing import Any

from spdk_kv.binding import memory_group, why_impossible
from spdk_kv.demo.limited.task import Outcome, Task, run_in_subprocess
from spdk_kv.terminal import CommandFailed, console, progress
from spdk_kv.units import format_nbytes

# (variant, under the limit, name). The first one shows what the tokens have to be.
_RUNS = (
    ("in memory", False, "in memory, no limit"),
    ("offloaded", True, "OffloadedKVCache"),
    ("mapped", True, "mapped files"),
    ("in memory", True, "in memory"),
)


def require_memory_cgroup() -> None:
    """Raises CommandFailed where this process cannot limit memory."""
    if why := why_impossible():
        raise CommandFailed(
            f"--memory-limit needs a memory cgroup of its own, but {why}; run it as root, or in a "
            "delegated part of the tree (systemd-run --user --scope -p Delegate=yes ...)"
        )


def run_limited(task: Task) -> dict[str, Any]:
    """Runs every variant of ``task`` in turn; returns one JSON object. Blocks.

    Raises CommandFailed if even the run without a limit fails.
    """
    runs: list[dict[str, Any]] = []
    outcomes: list[Outcome] = []
    with progress(len(_RUNS), "decoding") as advance:
        for variant, limited, name in _RUNS:
            outcome = _run(replace(task, variant=variant), limited)
            if not outcomes and outcome.ended != "finished":
                raise CommandFailed(f"without a limit: {outcome.why}")
            outcomes.append(outcome)
            runs.append({"name": name, "limited": limited, **_fields(outcome, outcomes[0])})
            advance(1)
    reference, offloaded = outcomes[:2]
    return {
        "limit_nbytes": task.limit_nbytes,
        "kv_nbytes": reference.kv_nbytes,
        "model": reference.label,
        "rows": reference.rows,
        "prompt_tokens": task.prompt_tokens,
        "new_tokens": len(reference.tokens) // reference.rows,
        "tokens_equal": offloaded.tokens == reference.tokens,
        "residency": offloaded.residency,
        "runs": runs,
    }


def _run(task: Task, limited: bool) -> Outcome:
    with tempfile.TemporaryDirectory(prefix=f"{task.variant[:2]}-", dir=task.folder) as folder:
        own = replace(task, folder=folder, location=task.location or f"file://{folder}")
        if not limited:
            return run_in_subprocess(own)
        with memory_group() as group:
            group.forbid_swap()
            own = replace(own, group=str(group.path), group_version=group.version)
            return replace(run_in_subprocess(own), peak_nbytes=group.peak_nbytes())


def _fields(outcome: Outcome, reference: Outcome) -> dict[str, Any]:
    shown = ("variant", "ended", "why", "tokens_per_s", "prompt_s", "decode_s", "peak_nbytes")
    fields = asdict(outcome)
    equal = outcome.tokens == reference.tokens if outcome.ended == "finished" else None
    return {name: fields[name] for name in shown} | {"tokens_equal": equal}


def print_limited(report: dict[str, Any]) -> None:
    """Prints the report for people."""
    out = console()

    def line(text: str = "", style: str = "") -> None:
        out.print(text, style=style or None, markup=False, soft_wrap=True)

    limit = format_nbytes(report["limit_nbytes"])
    line(f"The same decode with {limit} of memory beside the model", "bold")
    line()
    line(f"  model   {report['model']}")
    line(f"  batch   {report['rows']} rows")
    line(f"  tokens  {report['prompt_tokens']} in each prompt, {report['new_tokens']} new")
    line(f"  K/V     {format_nbytes(report['kv_nbytes'])} at the end")
    line()
    line(_row("", "decoding", "prompt", "peak", ""), "bold")
    for run in report["runs"]:
        line(_line(run))
    line()
    if report["residency"]:
        residency = report["residency"]
        line(f"  {format_nbytes(residency['cached_read_nbytes'])} were read through the page cache")
        line(f"  and {format_nbytes(residency['direct_read_nbytes'])} directly. Last decision:")
        line(f"  {residency['reason']}.")
        line()
    if report["tokens_equal"]:
        line("  The tokens are the same with and without the limit.", "bold green")
    else:
        line("  OffloadedKVCache gave other tokens than without a limit.", "red")


def _line(run: dict[str, Any]) -> str:
    if run["ended"] != "finished":
        peak = "" if run["peak_nbytes"] is None else format_nbytes(run["peak_nbytes"])
        return _row(run["name"], run["ended"], "", peak, run["why"])
    return _row(
        run["name"],
        f"{run['tokens_per_s']:.1f} tokens/s",
        f"{run['prompt_s']:.1f} s",
        "" if run["peak_nbytes"] is None else format_nbytes(run["peak_nbytes"]),
        "" if run["tokens_equal"] else "other tokens",
    )


def _row(name: str, speed: str, prompt: str, peak: str, note: str) -> str:
    return f"  {name:<20} {speed:<15} {prompt:<8} {peak:<10} {note}".rstrip()
