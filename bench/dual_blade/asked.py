"""What was asked of `dual`, by the paper and by this project, and what it reached."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import change
from rows import Row

from record import DUAL_BLADE, Figure, Target

DECODE_LOWER = Target("at least", 0.424, DUAL_BLADE)
PREFILL_LOWER = Target("at least", 0.331, DUAL_BLADE)
UTILISATION = Target("at least", 2.2, DUAL_BLADE)
DECODE_LOWER_BEST = Target("at least", 0.60)
OF_BOUND = Target("at most", 1.10)
OF_BETTER = Target("at most", 1.03)
OF_FIO = Target("at least", 0.95)
SETTLED = Target("at least", 1)
# Below this share of the KV cache the baseline thrashes.
TIGHT = 0.5


def of_budgets(rows: Sequence[Row]) -> Iterator[tuple[float | None, Figure]]:
    """(rho, figure) by budget; without a rho those that are about all budgets."""
    lowest: list[float] = []
    rows = [row for row in rows if row["kind"] == "budget" and row["decode_s_p50"] is not None]
    for rho in sorted({row["rho"] for row in rows}):
        here = {row["variant"]: row for row in rows if row["rho"] == rho}
        dual, flex = here.get("dual"), here.get("flexllmgen")
        if dual is None:
            continue
        ours = dual["decode_s_p50"]
        yield rho, Figure("decode / bound", dual["of_bound"], "ratio", target=OF_BOUND)
        others = [here[name]["decode_s_p50"] for name in ("direct", "pagecache") if name in here]
        if others:
            what = "decode / better of direct and pagecache"
            yield rho, Figure(what, ours / min(others), "ratio", target=OF_BETTER)
        if flex is None:
            continue
        lowest.append(1 - ours / flex["decode_s_p50"])
        if rho < 1:
            what = "decode lower than flexllmgen's by"
            yield rho, Figure(what, lowest[-1], "share", target=DECODE_LOWER)
        if rho < TIGHT:
            yield from ((rho, figure) for figure in _tight(dual, flex))
    if lowest:
        what = "decode lower than flexllmgen's, at the best budget"
        yield None, Figure(what, max(lowest), "share", target=DECODE_LOWER_BEST)


def _tight(dual: Row, flex: Row) -> Iterator[Figure]:
    lower = 1 - dual["prefill_s_p50"] / flex["prefill_s_p50"]
    yield Figure("prefill lower than flexllmgen's by", lower, "share", target=PREFILL_LOWER)
    if flex["utilisation"] and dual["utilisation"]:
        times = dual["utilisation"] / flex["utilisation"]
        yield Figure("utilisation / flexllmgen's", times, "ratio", target=UTILISATION)
        yield Figure("utilisation of fio", dual["utilisation"], "ratio", target=OF_FIO)


def of_changes(rows: Sequence[Row]) -> Iterator[Figure]:
    """Which share of the runs was inside the new bound soon enough after a change."""
    for row in rows:
        if row["kind"] != "settle" or row["variant"] != "dual" or row["errors"]:
            continue
        waited = row["steps_of_runs"]
        soon = [steps for steps in waited if steps is not None and steps <= change.WITHIN_STEPS]
        yield Figure(
            f"runs inside {change.OF_BOUND:g} of the bound {change.WITHIN_STEPS} steps after "
            f"rho {row['rho_before']:g} became {row['rho']:g}",
            len(soon) / len(waited),
            "share",
            target=SETTLED,
        )


def figures(rows: Sequence[Row]) -> list[Figure]:
    """Those of a record."""
    made = []
    for rho, found in of_budgets(rows):
        what = found.what if rho is None else f"rho {rho:g}: {found.what}"
        made.append(Figure(what, found.value, found.unit, target=found.target))
    return [*made, *of_changes(rows)]
