"""Views on a terminal, by rich, and as plain lines."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from spdk_kv.cli.top.view import PATH_COLUMNS, SEQUENCE_COLUMNS, View, clock

if TYPE_CHECKING:
    from rich.console import RenderableType

_TEXT_COLUMNS = ("path", "op", "sequence")
# Of a view besides its sequences: title, facts, an empty line, and the heads of tables.
_OTHER_LINES = 14


def sequences_that_fit(height: int, stores: int) -> int:
    """How many sequences of each store there is room for on a screen of ``height`` lines."""
    return max(1, height // stores - _OTHER_LINES)


def on_terminal(views: Sequence[View], interval_s: float) -> RenderableType:
    """All of it, for a console of any width."""
    from rich.console import Group
    from rich.rule import Rule
    from rich.table import Table
    from rich.text import Text

    def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
        made = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
        for name in columns:
            is_text = name in _TEXT_COLUMNS
            made.add_column(
                name,
                justify="left" if is_text else "right",
                no_wrap=True,
                overflow="ellipsis",
                ratio=None,
            )
        for row in rows:
            made.add_row(*(Text(cell) for cell in row))
        return made

    parts: list[RenderableType] = []
    for view in views:
        if parts:
            parts.append(Text(""))
        parts.append(Rule(Text(view.title, style="bold", overflow="ellipsis"), align="left"))
        facts = Table(box=None, show_header=False, pad_edge=False)
        facts.add_column(style="bold")
        facts.add_column(overflow="fold")
        for name, text in view.facts:
            facts.add_row(name, Text(text))
        parts.append(facts)
        for columns, rows in ((PATH_COLUMNS, view.paths), (SEQUENCE_COLUMNS, view.sequences)):
            if rows:
                parts += [Text(""), table(columns, rows)]
        if view.more_sequences:
            parts.append(Text(f"and {view.more_sequences:,} more sequences", style="dim"))
    every = f"every {interval_s:g} s"
    parts.append(Text(f"\n{clock()}, {every}; Ctrl-C ends", style="dim"))
    return Group(*parts)


def as_lines(view: View) -> Iterator[str]:
    """Plain lines, in columns."""
    yield f"{'store':<8} {view.title}"
    for name, text in view.facts:
        yield f"{name:<8} {text}"
    for columns, rows in ((PATH_COLUMNS, view.paths), (SEQUENCE_COLUMNS, view.sequences)):
        if not rows:
            continue
        yield ""
        table = [columns, *rows]
        widths = [max(len(row[at]) for row in table) for at in range(len(columns))]
        for row in table:
            cells = [
                f"{cell:<{width}}" if name in _TEXT_COLUMNS else f"{cell:>{width}}"
                for name, cell, width in zip(columns, row, widths, strict=True)
            ]
            yield "  ".join(cells).rstrip()
    if view.more_sequences:
        yield f"and {view.more_sequences:,} more sequences"
