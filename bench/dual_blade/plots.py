"""The plots, by matplotlib: ``pip install 'spdk_kv[bench]'``. Without it there are none."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rows import VARIANTS, Row

# Colours that people who see fewer of them can tell apart (Okabe and Ito).
_COLOURS = {
    "flexllmgen": "#d55e00",
    "strong": "#e69f00",
    "direct": "#56b4e9",
    "pagecache": "#009e73",
    "dual": "#0b2e6f",
}
_LABELS = {
    "flexllmgen": "FlexLLMGen-like (memmap)",
    "strong": "strong (one descriptor, large preads)",
    "direct": "all direct",
    "pagecache": "all page cache",
    "dual": "dual (adaptive)",
}


def missing() -> str | None:
    """Why no plots can be drawn, or None."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return "matplotlib is not installed (pip install 'spdk_kv[bench]')"
    return None


def draw(rows: Sequence[Row], out: Path) -> list[str]:
    """Draws ``decode.png``, ``prefill.png``, ``utilisation.png``, and ``change.png`` of what was
    measured; returns their names, none where matplotlib is missing."""
    if missing():
        return []
    budgets = [row for row in rows if row["kind"] == "budget"]
    changes = [row for row in rows if row["kind"] == "change"]
    drawn = _draw_budgets(budgets, out) if budgets else []
    if changes:
        _draw_change(changes, out / "change.png")
        drawn.append("change.png")
    return drawn


def _draw_budgets(rows: Sequence[Row], out: Path) -> list[str]:
    pictures = (
        ("decode.png", "decode_s", "Decode: seconds per token", "s per token", True),
        ("prefill.png", "prefill_s", "Prefill: seconds", "s", False),
        ("utilisation.png", "utilisation", "Drive utilisation in decode", "of fio", False),
    )
    for file, name, title, unit, bounded in pictures:
        _picture(rows, out / file, name, title, unit, bounded)
    return [picture[0] for picture in pictures]


def _picture(
    rows: Sequence[Row], path: Path, name: str, title: str, unit: str, bounded: bool
) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.8), dpi=150)
    for variant in VARIANTS:
        mine = [row for row in rows if row["variant"] == variant]
        middle = f"{name}_p50" if f"{name}_p50" in rows[0] else name
        mine = [row for row in mine if row[middle] is not None]
        if mine:
            _line(axes, variant, mine, name, middle)
    if bounded:
        bound = {row["rho"]: row["bound_s"] for row in rows if row["bound_s"] is not None}
        best = {row["rho"]: row["bound_overlapped_s"] for row in rows if row["rho"] in bound}
        axes.plot(
            sorted(bound), [bound[x] for x in sorted(bound)], "k--", lw=1.2,
            label="bound (drive, then memory)",
        )  # fmt: skip
        axes.plot(
            sorted(best), [best[x] for x in sorted(best)], "k:", lw=1.2,
            label="bound (side by side)",
        )  # fmt: skip
    axes.axvline(1.0, color="0.85", lw=1, zorder=0)
    axes.set(xlabel="page-cache budget / KV cache (rho)", ylabel=unit, title=title)
    _finish(figure, axes, path)


def _finish(figure: Any, axes: Any, path: Path) -> None:
    from matplotlib import pyplot

    axes.set_ylim(bottom=0)
    axes.grid(axis="y", color="0.92")
    axes.spines[["top", "right"]].set_visible(False)
    # Beside the lines, which leave no room of which one can be sure.
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.tight_layout()
    figure.savefig(path, bbox_inches="tight")
    pyplot.close(figure)


def _draw_change(rows: Sequence[Row], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 3.6), dpi=150)
    for variant in dict.fromkeys(row["variant"] for row in rows):
        mine = [row for row in rows if row["variant"] == variant]
        axes.plot(
            [row["step"] for row in mine], [row["decode_s_p50"] for row in mine], "o-", ms=3,
            color=_COLOURS.get(variant), label=_LABELS.get(variant, variant),
        )  # fmt: skip
    bound = {row["step"]: row for row in rows}
    axes.step(
        list(bound), [row["bound_s"] for row in bound.values()], "k--", lw=1.2, where="mid",
        label="bound (drive, then memory)",
    )  # fmt: skip
    budget = None
    for step, row in bound.items():
        if row["rho"] != budget:
            budget = row["rho"]
            axes.axvline(step - 0.5, color="0.85", lw=1, zorder=0)
            axes.text(step, 1.0, f"rho {budget:g}", transform=axes.get_xaxis_transform(),
                      fontsize=8, va="bottom")  # fmt: skip
    axes.set(xlabel="decode step", ylabel="s per token")
    _finish(figure, axes, path)


def _line(axes: Any, variant: str, rows: Sequence[Row], name: str, middle: str) -> None:
    budgets = [row["rho"] for row in rows]
    size, width, height = (5, 2.4, 5) if variant == "dual" else (3.5, 1.5, 3)
    axes.plot(
        budgets, [row[middle] for row in rows], "o-", ms=size, lw=width, zorder=height,
        color=_COLOURS[variant], label=_LABELS[variant],
    )  # fmt: skip
    if f"{name}_p25" in rows[0]:
        axes.fill_between(
            budgets, [row[f"{name}_p25"] for row in rows], [row[f"{name}_p75"] for row in rows],
            color=_COLOURS[variant], alpha=0.15, lw=0,
        )  # fmt: skip
