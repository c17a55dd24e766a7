"""What each part gives, at one budget: the paths by themselves, both, and reading ahead; and the
paper's budget (its X), swept by hand, beside the one that is found.

``samples`` and rows of kind ``ablation``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rows import Row, Sample, row_of, yardsticks_of

from spdk_kv.measure import Load, Outcome, outcome_from
from spdk_kv.units import MIB

RHO = 0.55
_AHEAD = 2
# Shares of the KV cache.
_SWEEP = (0.0, 0.22, 0.33, 0.44, 0.55, 0.66)


@dataclass(frozen=True)
class Setting:
    """``variant``: of spdk_kv.measure.decode.case; ``ahead``: layers read ahead; ``x_share``: the
    budget as a share of the KV cache, None where the store finds it."""

    label: str
    variant: str
    ahead: int = _AHEAD
    x_share: float | None = None

    def options(self, load: Load) -> dict[str, Any]:
        return {} if self.x_share is None else {"memory": round(self.x_share * load.nbytes)}


STEPS = (
    Setting("page cache alone", "pagecache", 0),
    Setting("+direct: all direct", "direct", 0),
    Setting("+dual: the paper's policy", "paper", 0),
    Setting("+dual: adaptive", "dual", 0),
    Setting("+read ahead: all direct", "direct"),
    Setting("+read ahead: the paper's policy", "paper"),
    Setting("+read ahead: adaptive", "dual"),
)
SWEEP = tuple(Setting(f"X = {share:g} W", "paper", x_share=share) for share in _SWEEP)
SETTINGS = STEPS + SWEEP


def fields(setting: Setting, outcome: Outcome, run: int) -> dict[str, Any]:
    """Those of a sample."""
    return {"run": run, "rho": RHO, "setting": asdict(setting), "outcome": asdict(outcome)}


def make_rows(samples: Sequence[Sample]) -> list[Row]:
    """One row per setting. No rows where none was measured."""
    runs: dict[Setting, list[Outcome]] = {}
    for sample in samples:
        if sample["kind"] == "ablation":
            setting = Setting(**sample["setting"])
            runs.setdefault(setting, []).append(outcome_from(sample["outcome"]))
    if not runs:
        return []
    sticks = yardsticks_of(samples)
    order = {setting: place for place, setting in enumerate(SETTINGS)}
    return [
        {"kind": "ablation", "rho": RHO, **asdict(setting), **row_of(runs[setting], RHO, sticks)}
        for setting in sorted(runs, key=lambda setting: order.get(setting, len(order)))
    ]


def tables(rows: Sequence[Row]) -> list[str]:
    """Markdown: the parts, then the sweep of X beside the two that find it."""
    rows = [row for row in rows if row["kind"] == "ablation"]
    if not rows:
        return []
    parts = [row for row in rows if row["x_share"] is None]
    found = [row for row in parts if row["ahead"] and row["variant"] in ("paper", "dual")]
    sweep = [row for row in rows if row["x_share"] is not None]
    lines = [f"At rho {RHO:g}, the same memory limit for all.", "", *_table(parts)]
    if sweep:
        lines += [
            "",
            "The paper's policy with budgets set by hand, and the budget that is found:",
            "",
        ]
        lines += _table([*sweep, *found])
    return lines


def _table(rows: Sequence[Row]) -> list[str]:
    lines = [
        "| | budget (MiB) | s per token | / bound | first token (s) | hit rate |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        if row["decode_s_p50"] is None:
            lines.append(f"| {row['label']} | failed: {'; '.join(row['errors'])} | | | | |")
            continue
        limit, hits = row["x_nbytes"], row["hit_rate"]
        spread = f"({row['decode_s_p25']:.3f} to {row['decode_s_p75']:.3f})"
        lines.append(
            f"| {row['label']} | {'' if limit is None else f'{limit / MIB:,.0f}'} | "
            f"{row['decode_s_p50']:.3f} {spread} | {row['of_bound']:.2f} | "
            f"{row['decode_first_s']:.3f} | {'' if hits is None else f'{hits:.0%}'} |"
        )
    return lines
