"""Files that commands write."""

from __future__ import annotations

import os
from pathlib import Path

import click

OUTPUT = click.Path(dir_okay=False, path_type=Path)


def in_a_folder(
    context: click.Context, parameter: click.Parameter, value: Path | None
) -> Path | None:
    """Refuses a path where no file can be made, before anything that takes long."""
    if value is not None and not os.access(value.parent, os.W_OK):
        raise click.BadParameter(
            f"cannot write {value}: {value.parent} is no folder that can be written to",
            context,
            parameter,
        )
    return value
