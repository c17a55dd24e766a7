"""``spdk-kv top``: what stores do that other processes have open."""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import Any

import click

from spdk_kv.cli.top.rates import Difference
from spdk_kv.cli.top.screen import as_lines, on_terminal, sequences_that_fit
from spdk_kv.cli.top.view import View, view_of
from spdk_kv.cli.watched import Seen, Watched, index_dir_option, watch
from spdk_kv.terminal import console, is_terminal, json_option, print_json

# Where it is printed once: between two looks at what is told, and for two samples at most.
_POLL_S = 0.1
_ONCE_S = 10.0
_PRINTED_SEQUENCES = 32


class _Window:
    """A store, and what it did between the last two samples."""

    def __init__(self, watched: Watched) -> None:
        self.watched = watched
        self.seen = Seen(None, None)
        self.difference = Difference()

    def look(self) -> None:
        self.seen = self.watched.look()
        self.difference.add(self.seen.reading)

    @property
    def is_known(self) -> bool:
        """Whether there is nothing to wait for."""
        return self.seen.reading is None or self.difference.rates() is not None

    def view(self, most_sequences: int) -> View:
        rates = self.difference.rates()
        return view_of(self.watched.name, self.seen, rates, most_sequences)

    def report(self) -> dict[str, Any]:
        reading, rates = self.seen.reading, self.difference.rates()
        return {
            "store": self.watched.name,
            "owner_pid": self.seen.owner,
            "trouble": self.seen.trouble or None,
            "age_s": None if reading is None else reading.age_s,
            "sample": None if reading is None else reading.sample.to_json(),
            "per_second": None if rates is None else asdict(rates),
        }


@click.command()
@click.argument("locations", metavar="URI...", nargs=-1, required=True)
@click.option(
    "--interval",
    "interval_s",
    type=click.FloatRange(min=0.1, max=3600),
    default=1.0,
    show_default=True,
    help="Seconds between two looks.",
)
@click.option("--once", is_flag=True, help="Print what is the case now, also on a terminal.")
@index_dir_option
@json_option
def top(
    locations: tuple[str, ...], interval_s: float, once: bool, index_dir: str | None, as_json: bool
) -> None:
    """Watch what the stores at each URI do, in the processes that have them open.

    Shows throughput, queue depth, latency, hits and misses, memory and CPU time, by path, operation
    and sequence. The stores are not opened, and those processes are not disturbed: each writes
    down what it counts once a second. Ctrl-C ends it.

    In a pipe it prints once, of the last second, and ends; the exit status is 1 if no process has
    any of the stores open.
    """
    windows = [_Window(watched) for watched in watch(locations, index_dir)]
    if as_json or once or not is_terminal():
        _print_once(windows, as_json)
        return
    _live(windows, interval_s)


def _print_once(windows: list[_Window], as_json: bool) -> None:
    until = time.monotonic() + _ONCE_S
    while True:
        for window in windows:
            window.look()
        if all(window.is_known for window in windows) or time.monotonic() > until:
            break
        time.sleep(_POLL_S)
    if as_json:
        print_json({"stores": [window.report() for window in windows]})
    else:
        for position, window in enumerate(windows):
            if position:
                click.echo()
            for line in as_lines(window.view(_PRINTED_SEQUENCES)):
                click.echo(line)
    if all(window.seen.owner is None for window in windows):
        click.get_current_context().exit(1)


def _live(windows: list[_Window], interval_s: float) -> None:
    from rich.live import Live

    out = console()
    shown: Any = ""
    try:
        with Live(console=out, screen=True, auto_refresh=False) as live:
            while True:
                for window in windows:
                    window.look()
                most = sequences_that_fit(out.height, len(windows))
                shown = on_terminal([window.view(most) for window in windows], interval_s)
                live.update(shown, refresh=True)
                time.sleep(interval_s)
    except KeyboardInterrupt:
        pass
    # The screen is gone, and with it what was last seen.
    out.print(shown)
