"""What several did side by side, as a table: a row for each, the best of each column bold."""

from __future__ import annotations

from collections.abc import Sequence

from record import Figure, Side


def table(sides: Sequence[Side]) -> list[str]:
    """Markdown. Rows of one ``what`` are compared, and stand together."""
    heads: dict[str, Figure] = {}
    groups: dict[str, list[Side]] = {}
    for side in sides:
        groups.setdefault(side.what, []).append(side)
        for figure in side.measured:
            heads.setdefault(figure.what, figure)
    columns = ["what", "by", *(f"{name}, {figure.unit}" for name, figure in heads.items())]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for what, group in groups.items():
        best = {name: _best(group, name) for name in heads}
        for side in group:
            by_name = {figure.what: figure for figure in side.measured}
            cells = [_cell(by_name.get(name), best[name]) for name in heads]
            lines.append(f"| {' | '.join([what, side.by, *cells])} |")
    return lines


def _best(group: Sequence[Side], name: str) -> float | None:
    """The best value of a column; None where nothing was compared."""
    found = [figure for side in group for figure in side.measured if figure.what == name]
    if len(found) < 2:
        return None
    # Of rates more is better, and less of all else: seconds, bytes kept.
    choose = max if found[0].unit.endswith("/s") else min
    return choose(figure.value for figure in found)


def _cell(figure: Figure | None, best: float | None) -> str:
    if figure is None:
        return ""
    value = number(figure.value)
    shown = f"**{value}**" if figure.value == best else value
    if figure.low is None or figure.high is None:
        return shown
    return f"{shown} ({number(figure.low)} to {number(figure.high)})"


def number(value: float) -> str:
    """Three digits, and no exponent where a number is large."""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"
