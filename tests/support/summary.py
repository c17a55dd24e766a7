"""The closing lines of a run: its counts, and what needed a second try."""

from __future__ import annotations

from pathlib import Path

import pytest


def write_summary(
    reporter: pytest.TerminalReporter, only_machine: bool, collected_in: Path | None
) -> None:
    """Shows the line of this run; appends it to ``collected_in`` for who runs pytest more than
    once."""

    def named(*outcomes: str) -> list[str]:
        reports = [report for outcome in outcomes for report in reporter.stats.get(outcome, [])]
        # A report of collecting that failed is one of these, and has a nodeid as well.
        return list(dict.fromkeys(report.nodeid for report in reports))

    failed = named("failed", "error")
    second_try = [name for name in named("rerun") if name not in failed]
    passed = [name for name in named("passed") if name not in {*failed, *second_try}]
    counts = [f"{len(passed)} passed"]
    if only_machine:
        counts.append(f"{len(second_try)} passed at the second try{_listed(second_try)}")
        _show_first_tries(reporter, second_try)
    counts.append(f"{len(failed)} failed{_listed(failed)}")
    counts.append(f"{len(named('skipped'))} skipped")
    line = f"{'machine tests' if only_machine else 'tests'}: {', '.join(counts)}"
    if only_machine:
        reporter.write_line(line)
    if collected_in is not None:
        with collected_in.open("a", encoding="utf-8") as file:
            file.write(line + "\n")


def _listed(names: list[str]) -> str:
    return f" ({' '.join(names)})" if names else ""


def _show_first_tries(reporter: pytest.TerminalReporter, names: list[str]) -> None:
    """Why tests failed that passed at the second try."""
    reports = [report for report in reporter.stats.get("rerun", []) if report.nodeid in names]
    if reports:
        reporter.write_sep("=", "FAILED AT THE FIRST TRY")
    for report in reports:
        reporter.write_sep("_", report.nodeid)
        reporter.write_line(report.longreprtext)
