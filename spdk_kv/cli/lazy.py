"""A group of commands whose modules are imported only when they are called."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any

import click

from spdk_kv.errors import SpdkKvError
from spdk_kv.terminal import CommandFailed


class LazyGroup(click.Group):
    """A group that imports a command's module only to run it or to show its help.

    Args:
        commands_at: name -> (module:attribute, line in the group's help).
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
