"""What commands share for their output: results to stdout, progress and errors to stderr."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import IO, TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from rich.console import Console

json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")


def print_json(value: Mapping[str, Any]) -> None:
    """``value`` as one indented JSON object on stdout. Raises TypeError for what JSON lacks."""
    click.echo(json.dumps(value, indent=2))


def on_terminal() -> bool:
    """Whether stdout is a terminal: tables and colours there, plain lines in a pipe."""
    # Not Console.is_terminal: CI sets FORCE_COLOR, which would put tables into pipes.
    return sys.stdout.isatty()


def console(*, stderr: bool = False) -> Console:
    """A rich console on today's stdout or stderr, so that redirections made later count."""
    from rich.console import Console  # a tenth of a second: not for `--help`

    return Console(file=sys.stderr if stderr else sys.stdout, highlight=False)


@contextmanager
def progress(total: int, description: str) -> Iterator[Callable[[int], None]]:
    """A progress bar on stderr, shown only if that is a terminal, and removed at the end.

    Yields ``advance(n)``, which may be called from any thread; ``total`` and ``n`` count in one
    unit of the caller's choice.
    """
    from rich.progress import Progress

    with Progress(
        console=console(stderr=True), transient=True, disable=not sys.stderr.isatty()
    ) as bar:
        task = bar.add_task(description, total=total)
        yield lambda n: bar.advance(task, n)


class CommandFailed(click.ClickException):
    """A command ended with one of spdk_kv's errors: one line on stderr, exit status 1."""

    def show(self, file: IO[Any] | None = None) -> None:
        click.echo(f"error: {self.format_message()}", file=file, err=file is None)
