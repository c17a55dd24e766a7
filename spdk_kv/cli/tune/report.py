"""What ``spdk-kv tune`` found, as JSON and as tables."""

from __future__ import annotations

import textwrap
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import click

from spdk_kv.cli.tune.plot import text_plot
from spdk_kv.terminal import console, is_terminal
from spdk_kv.units import MIB, format_nbytes

if TYPE_CHECKING:
    from rich.table import Table

    from spdk_kv.measure.sparse import Measured
    from spdk_kv.sparse import Settings
    from spdk_kv.sparse.tuning import Choice, Cost

_WIDTH = 80


@dataclass(frozen=True)
class Report:
    """All that is reported.

    Attributes:
        model: what to call the model.
        location: of the store.
        engine: what read.
        memory_nbytes: what resident groups and the like may take.
        measured: of the machine.
        rows: the best settings for each share, with what they cost; None where none fits.
        whole: a step that reads everything.
        choice: what was chosen.
    """

    model: str
    location: str
    engine: str
    memory_nbytes: int
    measured: Measured
    rows: list[tuple[float, tuple[Settings, Cost] | None]]
    whole: Cost
    choice: Choice

    @property
    def title(self) -> str:
        decoding = self.measured.decoding
        rows = f", {decoding.batch} rows" if decoding.batch > 1 else ""
        return f"{self.model}, {decoding.tokens:,} tokens{rows}"

    @property
    def points(self) -> list[tuple[float, float]]:
        """(share, tokens/s) of the frontier, reading everything included."""
        found = [(share, row[1].tokens_per_s) for share, row in self.rows if row is not None]
        return [*found, (1.0, self.whole.tokens_per_s)]

    def fields(self) -> dict[str, Any]:
        """For JSON."""
        machine, decoding = self.measured.machine, self.measured.decoding
        return {
            "model": self.model,
            "location": self.location,
            "engine": self.engine,
            "memory_nbytes": self.memory_nbytes,
            **asdict(decoding),
            "reads": [
                {"group_tokens": size, "groups": groups, "seconds": seconds, "nbytes": nbytes}
                for size, times in machine.reads.items()
                for groups, seconds, nbytes in zip(
                    times.groups, times.seconds, times.nbytes, strict=True
                )
            ],
            "whole_nbytes_per_s": self.measured.whole_nbytes_per_s,
            "score_s": machine.score_s,
            "compute_s": machine.compute_s,
            "frontier": [
                {"share": share, "settings": asdict(row[0]), **asdict(row[1])}
                for share, row in self.rows
                if row is not None
            ],
            "whole": asdict(self.whole),
            "share": self.choice.share,
            "settings": asdict(self.choice.settings),
            "cost": asdict(self.choice.cost),
            "why": list(self.choice.why),
        }


def print_report(report: Report) -> None:
    """Prints everything but the settings as JSON."""
    click.echo(f"{report.title}, on {report.location} ({report.engine})\n")
    _show("Reads of groups at random places, MiB/s, by groups per transfer", _reads(report))
    machine, decoding = report.measured.machine, report.measured.decoding
    score_s = machine.score_s * decoding.layers * decoding.batch
    click.echo(
        f"whole layers  {report.measured.whole_nbytes_per_s / MIB:,.0f} MiB/s\n"
        f"scoring       {1e3 * score_s:.3g} ms per step\n"
        f"computing     {1e3 * machine.compute_s:.3g} ms per step\n"
    )
    _show("Fastest settings for each share of the tokens", _frontier(report))
    click.echo("tokens/s (modelled) by share of the tokens")
    labels = [(f"{100 * share:.3g} %", rate) for share, rate in report.points]
    click.echo(text_plot(labels) + "\n")
    click.echo(f"Chosen: {_short(report.choice.settings)}")
    for reason in report.choice.why:
        click.echo(textwrap.fill(reason, _WIDTH - 2, initial_indent="- ", subsequent_indent="  "))


def _reads(report: Report) -> list[list[str]]:
    reads = report.measured.machine.reads
    counts = sorted({count for times in reads.values() for count in times.groups})
    rows = [["group", "KiB", *(f"{count}" for count in counts), "ms for most"]]
    for size, times in reads.items():
        rates = {
            count: f"{nbytes / seconds / MIB:,.0f}"
            for count, seconds, nbytes in zip(
                times.groups, times.seconds, times.nbytes, strict=True
            )
        }
        kib = size * report.measured.decoding.token_nbytes / 1024
        rows.append(
            [
                f"{size}",
                f"{kib:,.0f}",
                *(rates.get(count, "") for count in counts),
                f"{1e3 * times.seconds[-1]:.3g}",
            ]
        )
    return rows


def _frontier(report: Report) -> list[list[str]]:
    rows = [["share", "tokens", "group", "pool", "read/token", "memory", "tokens/s", "bound by"]]
    for share, row in report.rows:
        label = f"{100 * share:.3g} %"
        if row is None:
            rows.append([label, "", "", "", "", "too little", "", ""])
            continue
        settings, cost = row
        rows.append(
            [
                label,
                f"{settings.tokens:,}",
                f"{settings.group_tokens}",
                f"{settings.pool:g}",
                *_costs(cost),
            ]
        )
    rows.append(["100 %", f"{report.measured.decoding.tokens:,}", "", "", *_costs(report.whole)])
    return rows


def _costs(cost: Cost) -> list[str]:
    return [
        format_nbytes(cost.read_nbytes_per_token),
        format_nbytes(cost.memory_nbytes),
        f"{cost.tokens_per_s:.3g}",
        cost.bound,
    ]


def _short(settings: Settings) -> str:
    return (
        f"tokens={settings.tokens} group_tokens={settings.group_tokens} pool={settings.pool:g} "
        f"recent={settings.recent}"
    )


def _show(title: str, rows: list[list[str]]) -> None:
    if not is_terminal():
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        click.echo(title)
        for row in rows:
            cells = zip(row, widths, strict=True)
            click.echo("  ".join(f"{cell:>{width}}" for cell, width in cells))
        click.echo()
        return
    console().print(_table(title, rows))
    click.echo()


def _table(title: str, rows: list[list[str]]) -> Table:
    from rich.box import SIMPLE
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=SIMPLE, pad_edge=False)
    for name in rows[0]:
        table.add_column(name, justify="right")
    for row in rows[1:]:
        table.add_row(*row)
    return table
