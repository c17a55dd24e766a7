"""Output of the commands: results go to stdout, progress and errors to stderr."""

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
    """Prints ``value`` as one indented JSON object. Raises TypeError if JSON cannot hold it."""
    click.echo(json.dumps(value, indent=2))


def is_terminal() -> bool:
    """Whether stdout is a terminal, which gets tables and colours; a pipe gets plain lines."""
    # Not rich's Console.is_terminal: under FORCE_COLOR, which CI sets, it is true for a pipe.
    return sys.stdout.isatty()


def console(*, stderr: bool = False) -> Console:
    """A rich console on stdout or stderr as they are now, so that later redirections count."""
    from rich.console import Console  # takes a tenth of a second, too much for `--help`

    return Console(file=sys.stderr if stderr else sys.stdout, highlight=False)


@contextmanager
def progress(total: int, description: str) -> Iterator[Callable[[int], None]]:
    """A progress bar on stderr, shown only on a terminal and removed at the end.

    Args:
        total: the full count, in any unit.
        description: text in front of the bar.

    Yields:
        ``advance(n)``, to add to the count. Any thread may call it.
    """
    from rich.progress import Progress

    with Progress(
        console=console(stderr=True), transient=True, disable=not sys.stderr.isatty()
    ) as bar:
        task = bar.add_task(description, total=total)
        yield lambda n: bar.advance(task, n)


class CommandFailed(click.ClickException):
    """Ends a command with one line on stderr and exit status 1."""

    def show(self, file: IO[Any] | None = None) -> None:
        click.echo(f"error: {self.format_message()}", file=file, err=file is None)
