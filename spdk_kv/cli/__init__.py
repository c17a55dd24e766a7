"""``spdk-kv``: the command line. Each command lives in a module of its own, loaded when called."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import IO, Any

import click

from spdk_kv.errors import SpdkKvError

try:
    VERSION = version("spdk_kv")
except PackageNotFoundError:  # a checkout that was never installed
    VERSION = "0.0.0+uninstalled"

# Name -> (module:attribute, line in the help). The line is kept here because asking the command
# for it would import the command, and with it torch: seconds for a `--help`.
COMMANDS = {
    "bench": ("spdk_kv.cli.bench:bench", "Measure a drive, an engine or a policy."),
    "demo": ("spdk_kv.cli.demo:demo", "Let a model decode with its KV cache on the drive."),
    "device": ("spdk_kv.cli.device:device", "Take a drive from the kernel, and give it back."),
    "doctor": ("spdk_kv.cli.doctor:doctor", "Show what this machine offers and what to mend."),
    "stat": ("spdk_kv.cli.stat:stat", "Show what a store holds."),
}


class CommandFailed(click.ClickException):
    """A command ended with one of spdk_kv's errors: one line on stderr, exit status 1."""

    def show(self, file: IO[Any] | None = None) -> None:
        click.echo(f"error: {self.format_message()}", file=file, err=file is None)


class LazyGroup(click.Group):
    """A group that imports a command's module only to run it or to show its own help.

    ``commands_at``: name -> (module:attribute, line in the group's help).
    """

    def __init__(
        self, *args: Any, commands_at: Mapping[str, tuple[str, str]], **attrs: Any
    ) -> None:
        super().__init__(*args, **attrs)
        self._commands_at = commands_at

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(self._commands_at)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in self._commands_at:
            return None
        module, _, attribute = self._commands_at[cmd_name][0].partition(":")
        command = getattr(import_module(module), attribute)
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(
                [(name, self._commands_at[name][1]) for name in self.list_commands(ctx)]
            )

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except SpdkKvError as error:
            raise CommandFailed(str(error)) from error
        except KeyboardInterrupt:
            click.echo("interrupted", err=True)
            ctx.exit(130)  # 128 + SIGINT, as a shell reports it


@click.group(cls=LazyGroup, commands_at=COMMANDS)
@click.version_option(VERSION, prog_name="spdk-kv")
@click.option("-v", "--verbose", count=True, help="Log to stderr; twice for debugging.")
def main(verbose: int) -> None:
    """Keep KV caches of large language models on an NVMe drive."""
    if verbose:
        # Only our own logger: at the root, torch and its friends would talk as well.
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s"))
        logger = logging.getLogger("spdk_kv")
        logger.addHandler(handler)
        logger.setLevel(logging.INFO if verbose == 1 else logging.DEBUG)
