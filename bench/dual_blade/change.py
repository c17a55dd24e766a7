"""A budget that changes in mid-run: it falls to a half, and later rises to the double again.

Per step the decode seconds against the bound of that moment. ``samples`` of kind ``change``: one
run; rows of kind ``change``: one step of a variant; of kind ``settle``: one change of it.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from rows import Row, Sample, quartiles, yardsticks_of

from spdk_kv.measure import Load, Outcome, outcome_from
from spdk_kv.units import MIB

VARIANTS = ("flexllmgen", "pagecache", "dual")
# Budgets as shares of the KV cache, and how many decode steps each lasts.
PHASES = (0.9, 0.45, 0.9)
PHASE_STEPS = 10
# The first phase is longer by the steps in which units are promoted.
FIRST_STEPS = PHASE_STEPS + 2
OF_BOUND, WITHIN_STEPS = 1.15, 2
_LAST = 3


def load_for(load: Load) -> Load:
    """The same cache, decoded for as many steps as the phases last."""
    return replace(load, generate=1 + len(budgets()))


def budgets() -> list[float]:
    """The budget of each step."""
    first, *others = PHASES
    return [first] * FIRST_STEPS + [rho for rho in others for _ in range(PHASE_STEPS)]


def changes() -> Iterator[tuple[int, float]]:
    """(step, budget from that step on)."""
    steps = budgets()
    for step in range(1, len(steps)):
        if steps[step] != steps[step - 1]:
            yield step, steps[step]


def make_rows(samples: Sequence[Sample]) -> list[Row]:
    """Of each variant the steps, then the changes. No rows where no change was measured."""
    runs: dict[str, list[tuple[Sample, Outcome]]] = {}
    for sample in samples:
        if sample["kind"] == "change":
            outcome = outcome_from(sample["outcome"])
            runs.setdefault(outcome.variant, []).append((sample, outcome))
    rows: list[Row] = []
    for variant, measured in runs.items():
        good = [(sample, outcome) for sample, outcome in measured if not outcome.error]
        errors = sorted({outcome.error for _, outcome in measured if outcome.error})
        steps = _steps(variant, good, samples) if good else []
        rows += steps
        rows += _settling(variant, good, steps) if good else []
        if errors:
            rows.append({"kind": "settle", "variant": variant, "errors": errors})
    return rows


def _steps(
    variant: str, runs: Sequence[tuple[Sample, Outcome]], samples: Sequence[Sample]
) -> list[Row]:
    sticks = yardsticks_of(samples)
    outcomes = [outcome for _, outcome in runs]
    rows = []
    for step, rho in enumerate(runs[0][0]["rhos"]):
        p25, p50, p75 = quartiles([outcome.steps_s[step] for outcome in outcomes])
        left = [o.steps_cached_nbytes[step] for o in outcomes if o.steps_cached_nbytes]
        share = statistics.median(left) / sticks.load.nbytes if left else None
        nbytes = outcomes[0].steps_nbytes[step]
        bound, overlapped = sticks.bounds_s(nbytes, rho if share is None else share)
        budgets = [o.steps_budget_nbytes[step] for o in outcomes if o.steps_budget_nbytes]
        rows.append(
            {
                "kind": "change", "variant": variant, "step": step, "rho": rho,
                "cached_share": share,
                "runs": len(outcomes), "decode_s_p50": p50, "decode_s_p25": p25,
                "decode_s_p75": p75, "bound_s": bound, "bound_overlapped_s": overlapped,
                "of_bound": p50 / bound, "fio_read_gib_s": sticks.read_gib_s,
                "x_nbytes": statistics.median(budgets) if budgets else None,
            }
        )  # fmt: skip
    return rows


def _settling(
    variant: str, runs: Sequence[tuple[Sample, Outcome]], steps: Sequence[Row]
) -> list[Row]:
    rows = []
    rhos = [step["rho"] for step in steps]
    starts = [step for step in range(1, len(rhos)) if rhos[step] != rhos[step - 1]]
    for start, end in zip(starts, [*starts[1:], len(rhos)], strict=True):
        bounds = [step["bound_s"] for step in steps[start:end]]
        waited = [back_inside(outcome.steps_s[start:end], bounds) for _, outcome in runs]
        rows.append(
            {
                "kind": "settle", "variant": variant, "rho_before": rhos[start - 1],
                "rho": rhos[start], "step": start, "runs": len(runs), "errors": [],
                "of_bound_before": _last(steps[:start]),
                "of_bound_after": _last(steps[start:end]), "steps_of_runs": waited,
            }
        )  # fmt: skip
    return rows


def back_inside(seconds: Sequence[float], bounds: Sequence[float]) -> int | None:
    """Which step after the change (from 1) was the first inside 1.15 of its bound, or None."""
    for number, (took, bound) in enumerate(zip(seconds, bounds, strict=True), 1):
        if took <= OF_BOUND * bound:
            return number
    return None


def _last(steps: Sequence[Row]) -> float:
    return statistics.median(step["of_bound"] for step in steps[-_LAST:])


def tables(rows: Sequence[Row]) -> list[str]:
    """Markdown: the changes, then the steps."""
    settles = [row for row in rows if row["kind"] == "settle"]
    if not settles:
        return []
    lines = [
        f"How many steps until one is inside {OF_BOUND:g} of the new bound (asked: "
        f"{WITHIN_STEPS}), run by run; before and after: decode / bound, the median of the last "
        f"{_LAST} steps.",
        "",
        "| variant | rho | before | steps of each run | after |",
        "|---|---|---|---|---|",
    ]
    for row in settles:
        if row["errors"]:
            lines.append(f"| {row['variant']} | failed: {'; '.join(row['errors'])} | | | |")
            continue
        waited = ", ".join(
            "none" if steps is None else str(steps) for steps in row["steps_of_runs"]
        )
        lines.append(
            f"| {row['variant']} | {row['rho_before']:g} to {row['rho']:g} | "
            f"{row['of_bound_before']:.2f} | {waited} | {row['of_bound_after']:.2f} |"
        )
    return [*lines, "", *_step_table([row for row in rows if row["kind"] == "change"])]


def _step_table(rows: Sequence[Row]) -> list[str]:
    names = list(dict.fromkeys(row["variant"] for row in rows))
    by_step: dict[int, dict[str, Any]] = {}
    for row in rows:
        by_step.setdefault(row["step"], {})[row["variant"]] = row
    lines = [
        f"| step | rho | bound | {' | '.join(names)} | budget of dual (MiB) |",
        "|---" * (len(names) + 4) + "|",
    ]
    for step, here in by_step.items():
        first = next(iter(here.values()))
        cells = [f"{here[name]['decode_s_p50']:.3f}" if name in here else "" for name in names]
        limit = here.get("dual", {}).get("x_nbytes")
        lines.append(
            f"| {step} | {first['rho']:g} | {first['bound_s']:.3f} | {' | '.join(cells)} | "
            f"{'' if limit is None else f'{limit / MIB:,.0f}'} |"
        )
    return lines
