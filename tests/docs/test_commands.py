"""Every command and option that a document names is there, and its shell blocks parse."""

from __future__ import annotations

import re
import shlex
import subprocess
from collections.abc import Iterator
from functools import cache

import click
import pytest

from docs.pages import Page, pages
from spdk_kv.cli import main
from support.places import ROOT

_OPTION = re.compile(r"--[a-z][a-z_-]+")
# Of programs that are not ours: llama-cpp-python's server.
_OF_OTHERS = frozenset(("--cache", "--logits_all"))


def _missing(words: list[str]) -> str | None:
    """What of ``spdk-kv WORDS`` does not exist, or None."""
    command: click.Command = main
    context = click.Context(main)
    for word in words:
        if word.startswith("-"):
            known = {name for option in command.params for name in option.opts}
            if word.partition("=")[0] not in {*known, "--help"}:
                return f"{command.name} has no {word}"
        elif isinstance(command, click.Group):
            found = command.get_command(context, word)
            if found is None:
                return f"{command.name} has no command {word}"
            command = found
    return None


@cache
def _all_options() -> frozenset[str]:
    """Every option of ours: of the command line, the scripts and the measurements."""
    found = {"--help", *_OF_OTHERS}
    waiting: list[click.Command] = [main]
    while waiting:
        command = waiting.pop()
        found.update(name for option in command.params for name in option.opts)
        if isinstance(command, click.Group):
            context = click.Context(command)
            names = command.list_commands(context)
            waiting += [sub for name in names if (sub := command.get_command(context, name))]
    for folder in ("scripts", "bench", "vagrant", "spdk_kv/integrations"):
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in (".sh", ".py"):
                found.update(_OPTION.findall(path.read_text()))
    return frozenset(found)


def _wrong(line: str) -> str | None:
    """What of a line of shell is not there, or None."""
    words = [word for word in shlex.split(line, comments=True) if word != "sudo"]
    while words and "=" in words[0]:
        del words[0]
    if not words:
        return None
    program = words[0]
    if program.endswith("spdk-kv"):
        return _missing(words[1:])
    if program.endswith("setup_vfio.py"):
        return _missing(["device", *words[1:]])
    if program == "python" and len(words) > 1 and not words[1].startswith("-"):
        program = words[1]
    if "/" in program and not program.startswith("/") and ".venv" not in program:
        path = ROOT / program
        if not path.exists():
            return f"there is no {program}"
        options = set(_OPTION.findall(" ".join(words)))
        unknown = {option for option in options if option not in path.read_text()}
        return f"{program} has no {sorted(unknown)}" if unknown else None
    return None


def _lines(page: Page) -> Iterator[tuple[str, str]]:
    for block in page.blocks:
        if block.language == "sh":
            text = block.text.replace("\\\n", " ")
            yield from ((f"{page.name}:{block.line}", line) for line in text.splitlines())
    for code in page.inline_code:
        if code.startswith(("spdk-kv ", "./scripts/", "scripts/", "python bench/")):
            yield page.name, code


@pytest.mark.parametrize("page", pages(), ids=lambda page: page.name)
def test_named_commands_and_options_exist(page: Page) -> None:
    wrong = [f"{where}: {bad}" for where, line in _lines(page) if (bad := _wrong(line))]
    for code in page.inline_code:
        found = set(_OPTION.findall(code)) - _all_options()
        wrong += [f"{page.name}: no {option}" for option in found]
    assert not wrong, "\n".join(wrong)


def test_a_wrong_command_is_noticed() -> None:
    assert _wrong("sudo .venv/bin/spdk-kv bench io --locaton x") == "io has no --locaton"
    assert _wrong("spdk-kv bench lo") == "bench has no command lo"
    assert _wrong("scripts/setup_vfio.py bind A B --force") == "bind has no --force"
    assert _wrong("python bench/nothing.py") == "there is no bench/nothing.py"
    assert _wrong("./scripts/test.sh --lab  # all") is None


@pytest.mark.parametrize("page", pages(), ids=lambda page: page.name)
def test_shell_blocks_parse(page: Page) -> None:
    for block in page.blocks:
        if block.language == "sh":
            done = subprocess.run(
                ["bash", "-n"], input=block.text, capture_output=True, text=True, check=False
            )
            assert done.returncode == 0, f"{page.name}:{block.line}: {done.stderr}"
